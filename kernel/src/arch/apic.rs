//! The local APIC of a VP: on, its legacy inputs masked, and the end of an interrupt.
//!
//! Three ways to reach it: x2APIC registers, Hyper-V's own MSRs where the host asks for them, and
//! memory-mapped registers on an old processor. Nothing else of the APIC is used: all
//! interrupts come from the SynIC.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use super::cpu::{read_msr, write_msr};
use super::physical;
use crate::hyperv::Features;
use crate::hyperv::features::{Privileges, Recommendations};
use crate::memory::manager;

/// The vector of the APIC's own spurious interrupt. It needs no EOI.
pub const SPURIOUS_VECTOR: u8 = 0x2F;

const APIC_BASE: u32 = 0x1B;
const BASE_ENABLED: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;

/// Register numbers: times 16 an offset, plus 0x800 an MSR (AMD64 Architecture Programmer's Manual 2, chapter 16).
mod register {
    pub(super) const EOI: u32 = 0x0B;
    pub(super) const SPURIOUS: u32 = 0x0F;
    pub(super) const ICR: u32 = 0x30;
    pub(super) const LVT_TIMER: u32 = 0x32;
    pub(super) const LVT_LINT0: u32 = 0x35;
}

/// Hyper-V's MSR that ends an interrupt (TLFS, Virtual Interrupt Controller).
const HYPERV_EOI: u32 = 0x4000_0070;

const SOFTWARE_ENABLED: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;

/// How the registers are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Access {
    /// Through MSRs of the x2APIC.
    X2Apic = 0,
    /// Through memory at the base address.
    XApic = 1,
    /// EOI through Hyper-V's MSR, the rest through memory.
    HyperV = 2,
}

impl core::fmt::Display for Access {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::X2Apic => "x2APIC",
            Self::XApic => "xAPIC",
            Self::HyperV => "xAPIC with Hyper-V MSRs",
        })
    }
}

/// Where the registers are in physical memory, when they are reached there.
static REGISTERS: AtomicU64 = AtomicU64::new(0);

static ACCESS: AtomicU8 = AtomicU8::new(Access::X2Apic as u8);

/// Turns the APIC of this VP on. `None` when memory for reaching it is short.
pub fn init(features: &Features) -> Option<Access> {
    // CPUID 1 ECX bit 21.
    let has_x2apic = features.processor.ecx & (1 << 21) != 0;
    let base = read_msr(APIC_BASE);
    let access = if has_x2apic || base & BASE_X2APIC != 0 {
        // From "off" the way leads over "on" (Intel SDM 3, section 11.12.5).
        if base & BASE_ENABLED == 0 {
            write_msr(APIC_BASE, base | BASE_ENABLED);
        }
        if base & BASE_X2APIC == 0 {
            write_msr(APIC_BASE, base | BASE_ENABLED | BASE_X2APIC);
        }
        Access::X2Apic
    } else {
        let registers = base & 0x000F_FFFF_FFFF_F000;
        if base & BASE_ENABLED == 0 {
            write_msr(APIC_BASE, base | BASE_ENABLED);
        }
        REGISTERS.store(registers, Ordering::Relaxed);
        manager::map_physical(registers..registers + 4096, true)?;
        let by_msr = features
            .recommendations
            .contains(Recommendations::APIC_MSRS)
            && features.privileges.contains(Privileges::INTERRUPT_CONTROL);
        if by_msr {
            Access::HyperV
        } else {
            Access::XApic
        }
    };
    ACCESS.store(access as u8, Ordering::Relaxed);
    // The firmware may have left the old interrupt controller behind LINT0, with a timer on it.
    write(register::LVT_LINT0, MASKED);
    write(register::LVT_TIMER, MASKED);
    write(
        register::SPURIOUS,
        SOFTWARE_ENABLED | u32::from(SPURIOUS_VECTOR),
    );
    Some(access)
}

/// Ends the interrupt in service.
pub fn end_of_interrupt() {
    if ACCESS.load(Ordering::Relaxed) == Access::HyperV as u8 {
        write_msr(HYPERV_EOI, 0);
    } else {
        write(register::EOI, 0);
    }
}

/// Has this VP interrupt itself.
pub(crate) fn interrupt_self(vector: u8) {
    // Destination shorthand "self", fixed delivery, edge.
    write(register::ICR, 0x4_0000 | u32::from(vector));
}

fn write(register: u32, value: u32) {
    if ACCESS.load(Ordering::Relaxed) == Access::X2Apic as u8 {
        write_msr(0x800 + register, value.into());
    } else {
        let base = REGISTERS.load(Ordering::Relaxed);
        let pointer = physical::pointer::<u32>(base + u64::from(register) * 16);
        // SAFETY: `init` mapped the registers, uncached.
        unsafe { pointer.write_volatile(value) };
    }
}
