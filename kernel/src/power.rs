//! The end of the machine: power off, reboot, and the ways out when something has failed.

use core::fmt;
use core::str::FromStr;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::arch::{backtrace, cpu, image, port};
use crate::hyperv::crash::{self, Reported};
use crate::{acpi_tables, partition, println};

/// Crash parameter 0 of a machine that could not start; a panic's is [`PANIC`].
const CANNOT_START: u64 = 0x454E_0001;

/// Crash parameter 0 of a panic.
const PANIC: u64 = 0x454E_0002;

/// Crash parameter 0 of an exception is this plus its vector.
const EXCEPTION: u64 = 0x454E_0100;

/// How long a machine may take to power off or reset, in cycles of the time stamp counter: one to four seconds.
const PATIENCE_CYCLES: u64 = 4_000_000_000;

/// What to do once a failure was reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum OnPanic {
    /// Power off: nothing runs wild, and the host sees a VM that has stopped.
    PowerOff,
    /// Reboot, and hope.
    Reboot,
    /// Stand still, for whoever looks at the memory.
    Halt,
}

impl FromStr for OnPanic {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "poweroff" => Ok(Self::PowerOff),
            "reboot" => Ok(Self::Reboot),
            "halt" => Ok(Self::Halt),
            _ => Err(()),
        }
    }
}

static ON_PANIC: AtomicU8 = AtomicU8::new(OnPanic::PowerOff as u8);

/// The port of an isa-debug-exit device; 0 = none.
static DEBUG_EXIT: AtomicU16 = AtomicU16::new(0);

pub(crate) fn set_on_panic(action: OnPanic) {
    ON_PANIC.store(action as u8, Ordering::Relaxed);
}

pub(crate) fn set_debug_exit(port: u16) {
    DEBUG_EXIT.store(port, Ordering::Relaxed);
}

/// Ends a machine that cannot start, with one line that says why.
///
/// The line goes to the console and to the host, as a crash; the VM ends with a failing status
/// where there is a way to have one.
pub fn cannot_start(reason: &dyn fmt::Display) -> ! {
    cpu::disable_interrupts();
    crate::console::prepare_for_report();
    println!("enlit: cannot start: {reason}");
    report(CANNOT_START, None, &format_args!("cannot start: {reason}"));
    end_failed()
}

/// What a crash report says besides its text.
pub(crate) struct CrashState {
    /// The exception's vector, if it was one.
    pub(crate) vector: Option<u64>,
    pub(crate) rip: u64,
    pub(crate) rax: u64,
    pub(crate) rsp: u64,
}

/// Reports a panic or an exception to the host and ends the machine.
pub(crate) fn crashed(state: &CrashState, text: &dyn fmt::Display) -> ! {
    let code = state.vector.map_or(PANIC, |vector| EXCEPTION + vector);
    report(code, Some(state), text);
    end_failed()
}

fn report(code: u64, state: Option<&CrashState>, text: &dyn fmt::Display) {
    let (rip, rax, rsp) = match state {
        Some(state) => (state.rip, state.rax, state.rsp),
        None => (0, 0, backtrace::frame_pointer()),
    };
    let guest = image::range().start;
    match crash::report([code, guest, rip, rax, rsp], text) {
        Reported::NotOffered => println!("enlit: the host takes no crash reports"),
        Reported::Already => {}
        Reported::Parameters => println!("enlit: the host was told (crash code {code:#x})"),
        Reported::Text => {
            println!("enlit: the host was told, with the text (crash code {code:#x})");
        }
    }
}

fn end_failed() -> ! {
    let exit = DEBUG_EXIT.load(Ordering::Relaxed);
    if exit != 0 {
        port::write_u32(exit, 0x10);
    }
    static ENDING: AtomicBool = AtomicBool::new(false);
    let action = ON_PANIC.load(Ordering::Relaxed);
    // A fault in what follows must not come back here for ever.
    if action != OnPanic::Halt as u8 && !ENDING.swap(true, Ordering::Relaxed) {
        if action == OnPanic::PowerOff as u8 {
            power_off_now();
        }
        reboot_now();
    }
    cpu::halt_forever()
}

/// Powers off at once. Returns only if the machine has no way to do that.
pub(crate) fn power_off_now() {
    if !acpi_tables::power_off() {
        println!("enlit: power-off is not possible: ACPI names no usable sleep register");
        return;
    }
    // Some machines act on it a little later.
    wait();
    println!("enlit: the machine did not power off when told to");
}

/// Reboots: by the hypervisor, else by ACPI, else by a fault that no processor survives.
pub(crate) fn reboot_now() -> ! {
    println!("enlit: rebooting");
    partition::reset();
    if acpi_tables::reset() {
        wait();
    }
    cpu::triple_fault()
}

/// Gives the machine time to act.
fn wait() {
    let start = cpu::time_stamp();
    while cpu::time_stamp().wrapping_sub(start) < PATIENCE_CYCLES {
        core::hint::spin_loop();
    }
}
