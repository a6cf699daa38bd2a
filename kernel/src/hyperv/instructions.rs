//! The instructions under this directory: CPUID, RDMSR, WRMSR, RDTSC and the call of the
//! hypercall page. Each one but RDTSC is, or may be, a VM exit.

#![allow(unsafe_code)]

use core::arch::asm;
use core::arch::x86_64::{__cpuid, _mm_lfence, _rdtsc, CpuidResult};

use x86_64::registers::model_specific;

use super::msr::{Guarded, Msr, Readable, Value, Writable};

/// Reads sub-leaf 0 of a CPUID leaf. Always a VM exit.
pub(super) fn cpuid(leaf: u32) -> CpuidResult {
    __cpuid(leaf)
}

/// The time stamp counter, not read before earlier loads are done.
pub(super) fn ordered_tsc() -> u64 {
    // SAFETY: LFENCE is part of SSE2, which every x86-64 processor has.
    unsafe { _mm_lfence() };
    // SAFETY: RDTSC has no effect on memory.
    unsafe { _rdtsc() }
}

impl<V: Value, A: Readable> Msr<V, A> {
    /// Reads the register of the VP that runs this code.
    ///
    /// Raises #GP when the hypervisor does not offer the register: ask
    /// [`Features`](super::Features) first.
    pub fn read(self) -> V {
        let register = model_specific::Msr::new(self.number());
        // SAFETY: no register of the synthetic range changes memory when it is read.
        V::from_bits(unsafe { register.read() })
    }
}

impl<V: Value, A: Writable> Msr<V, A> {
    /// Writes the register of the VP that runs this code.
    ///
    /// Raises #GP when the hypervisor does not offer the register or refuses the value.
    pub fn write(self, value: V) {
        let mut register = model_specific::Msr::new(self.number());
        // SAFETY: only registers whose values neither move memory nor start code are `Writable`;
        // the others are `Guarded`.
        unsafe { register.write(value.bits()) };
    }
}

impl<V: Value> Msr<V, Guarded> {
    /// Writes a register that can break memory safety.
    ///
    /// # Safety
    /// A page that `value` names must be the caller's to give away until the register is written
    /// again, and code that the write starts must be fit to run.
    pub unsafe fn write_guarded(self, value: V) {
        let mut register = model_specific::Msr::new(self.number());
        // SAFETY: the caller's promise.
        unsafe { register.write(value.bits()) };
    }
}

/// Calls the hypercall page at `entry` (TLFS, Hypercall Interface; the 64-bit register form) and
/// returns the result value.
///
/// # Safety
/// `entry` is the base of an enabled, executable hypercall page; what the call named in
/// `control` does with `input` and `output` must be sound.
pub(super) unsafe fn hypercall(entry: u64, control: u64, input: u64, output: u64) -> u64 {
    let result;
    // SAFETY: the caller vouches for the page and the call. The page changes RAX, and RCX, RDX and
    // R8 by some call forms; R9 to R11 are given up as well, as for a call in the C ABI.
    unsafe {
        asm!(
            "call {entry}",
            entry = in(reg) entry,
            inlateout("rcx") control => _,
            inlateout("rdx") input => _,
            inlateout("r8") output => _,
            lateout("rax") result,
            lateout("r9") _,
            lateout("r10") _,
            lateout("r11") _,
        );
    }
    result
}
