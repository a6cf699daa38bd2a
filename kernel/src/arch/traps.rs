//! Exceptions and interrupts: the entry stubs, the saved state, and the way to a handler.
//!
//! The target has no SSE and no x87 code (soft float), so the general registers are the whole
//! interrupted state.

use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::sync::atomic::Ordering;

use x86_64::registers::control::Cr2;

use super::per_cpu;
use crate::interrupt;

/// Entries of the interrupt descriptor table: whatever is raised finds a stub.
pub const VECTORS: usize = 256;

/// Bytes between two stubs.
const STUB_SIZE: usize = 16;

/// What was interrupted. The order is the order on the stack.
#[derive(Debug)]
#[repr(C)]
#[allow(missing_docs, reason = "registers by their own names")]
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rax: u64,
    pub vector: u64,
    /// The processor's error code, or 0 where there is none.
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

// The stubs rely on this: 22 words (and two more for the backtrace) keep the stack aligned to 16 bytes at the call.
const _: () = assert!(size_of::<TrapFrame>() == 22 * 8);

impl TrapFrame {
    /// Whether the interrupted code had interrupts on.
    pub fn interrupts_were_on(&self) -> bool {
        self.rflags & (1 << 9) != 0
    }
}

global_asm!(
    ".pushsection .text.traps, \"ax\"",
    ".balign 16",
    "trap_stubs:",
    ".set vector, 0",
    ".rept {vectors}",
    ".balign 16",
    // Vectors that push an error code themselves: 8, 10 to 14, 17, 21, 29, 30.
    ".if (({error_codes}) >> vector) & 1",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    "jmp trap_entry",
    ".set vector, vector + 1",
    ".endr",
    ".balign 16",
    "trap_entry:",
    "push rax",
    "push rcx",
    "push rdx",
    "push rbx",
    "push rbp",
    "push rsi",
    "push rdi",
    "push r8",
    "push r9",
    "push r10",
    "push r11",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "cld",
    "mov rdi, rsp",
    // As if the interrupted code had called: backtraces of a handler go on into it.
    "push qword ptr [rdi + {rip}]",
    "push rbp",
    "mov rbp, rsp",
    "call {handle}",
    "add rsp, 16",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop r11",
    "pop r10",
    "pop r9",
    "pop r8",
    "pop rdi",
    "pop rsi",
    "pop rbp",
    "pop rbx",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    ".popsection",
    vectors = const VECTORS,
    error_codes = const 1u64 << 8 | 0x1F << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30,
    rip = const offset_of!(TrapFrame, rip),
    handle = sym handle,
);

unsafe extern "C" {
    static trap_stubs: u8;
}

/// The address of a vector's stub.
pub(super) fn stub(vector: usize) -> u64 {
    (&raw const trap_stubs).addr() as u64 + (vector * STUB_SIZE) as u64
}

extern "sysv64" fn handle(frame: &mut TrapFrame) {
    if frame.vector < 32 {
        crate::panic::exception(frame, Cr2::read_raw());
    }
    let cpu = per_cpu::current();
    // An external interrupt cannot find interrupts off. Nested SVM emulation has been seen to
    // deliver one twice, the second time as if it were an exception: count it, touch nothing.
    if !frame.interrupts_were_on() {
        cpu.spurious_interrupts.fetch_add(1, Ordering::Relaxed);
        return;
    }
    // SAFETY: interrupts do not nest (they are off now, and come back with the frame), so the
    // stack is free.
    unsafe {
        call_on_stack(
            cpu.interrupt_stack_top(),
            interrupt_on_own_stack,
            frame.vector,
        );
    };
}

extern "sysv64" fn interrupt_on_own_stack(vector: u64) {
    interrupt::dispatch(vector as u8);
}

/// Calls `function(argument)` on another stack.
///
/// # Safety
///
/// `top` is the 16-byte aligned top of a stack that nothing uses until this returns.
unsafe fn call_on_stack(top: u64, function: extern "sysv64" fn(u64), argument: u64) {
    // SAFETY: R12 keeps the old stack through the call; everything else that a call may change
    // is declared.
    unsafe {
        asm!(
            "mov r12, rsp",
            "mov rsp, {top}",
            "call {function}",
            "mov rsp, r12",
            top = in(reg) top,
            function = in(reg) function,
            in("rdi") argument,
            out("r12") _,
            clobber_abi("sysv64"),
        );
    }
}
