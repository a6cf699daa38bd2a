//! The processor: interrupts on and off, idle, time stamps, model-specific registers of the APIC.

use core::arch::asm;
use core::marker::PhantomData;

use x86_64::instructions::interrupts;
use x86_64::registers::model_specific::Msr;

/// Interrupts are off on this VP as long as this lives; then they are as they were before.
#[must_use]
pub struct InterruptsOff {
    were_on: bool,
    /// Belongs to the VP that made it.
    _not_send: PhantomData<*const ()>,
}

impl InterruptsOff {
    /// Turns interrupts off.
    pub fn enter() -> Self {
        let were_on = interrupts::are_enabled();
        interrupts::disable();
        Self {
            were_on,
            _not_send: PhantomData,
        }
    }
}

impl Drop for InterruptsOff {
    fn drop(&mut self) {
        if self.were_on {
            interrupts::enable();
        }
    }
}

/// Turns interrupts on.
pub fn enable_interrupts() {
    interrupts::enable();
}

/// Turns interrupts off.
pub fn disable_interrupts() {
    interrupts::disable();
}

/// Whether interrupts are on.
pub fn interrupts_enabled() -> bool {
    interrupts::are_enabled()
}

/// Turns interrupts on and waits for one, with no moment between the two.
pub fn enable_interrupts_and_halt() {
    interrupts::enable_and_hlt();
}

/// Stops this VP for good.
pub fn halt_forever() -> ! {
    loop {
        interrupts::disable();
        x86_64::instructions::hlt();
    }
}

/// The time stamp counter, not ordered with anything.
pub fn time_stamp() -> u64 {
    // SAFETY: reading the counter has no effect on memory; no control register forbids it here.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Reads a model-specific register that every x86_64 processor has.
pub(super) fn read_msr(number: u32) -> u64 {
    // SAFETY: callers in this module's parent name only architectural registers.
    unsafe { Msr::new(number).read() }
}

/// Writes a model-specific register of the APIC.
pub(super) fn write_msr(number: u32, value: u64) {
    // SAFETY: as in `read_msr`; APIC registers do not touch memory.
    unsafe { Msr::new(number).write(value) };
}

/// Faults without a way to handle it, which resets the machine.
pub fn triple_fault() -> ! {
    interrupts::disable();
    let nothing = x86_64::structures::DescriptorTablePointer {
        limit: 0,
        base: x86_64::VirtAddr::zero(),
    };
    // SAFETY: there is no going on from here, which is the point.
    unsafe { x86_64::instructions::tables::lidt(&nothing) };
    invalid_opcode()
}

/// Raises the invalid-opcode exception: lets a test see a fault report.
pub fn invalid_opcode() -> ! {
    // SAFETY: the exception's handler does not return.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// One critical section for crates that ask for it: interrupts off. Only the boot VP runs, so
/// there is nobody else to keep out; more VPs will need a lock here.
struct CriticalSection;

critical_section::set_impl!(CriticalSection);

// SAFETY: with interrupts off on the only VP that runs, nothing else runs.
unsafe impl critical_section::Impl for CriticalSection {
    unsafe fn acquire() -> bool {
        let were_on = interrupts::are_enabled();
        interrupts::disable();
        were_on
    }

    unsafe fn release(were_on: bool) {
        if were_on {
            interrupts::enable();
        }
    }
}
