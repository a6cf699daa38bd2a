//! The floor guest: the least that QEMU boots by PVH. It says a word on COM1
//! and ends, and so shows what QEMU and its firmware cost every guest.

use crate::pvh::{self, Segment};

/// What it prints.
pub const WORD: &str = "floor";

/// What it writes to the debug-exit port.
pub const CODE: u8 = 0x2a;

/// Where it is loaded: the first byte above the first megabyte, whose pages
/// belong to the firmware.
const BASE: u32 = 0x10_0000;

/// The guest as an ELF file.
pub fn elf() -> Vec<u8> {
    pvh::elf(&[Segment::new(BASE, code())], BASE)
}

/// 32-bit machine code. COM1's FIFO takes the word without being asked.
fn code() -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in WORD.bytes().chain(*b"\n") {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    code.extend([0x66, 0xba, 0xf4, 0x00]); // mov dx, 0xf4
    code.extend([0xb0, CODE, 0xee]); // mov al, CODE; out dx, al
    code.extend([0xfa, 0xf4, 0xeb, 0xfd]); // cli; again: hlt; jmp again
    code
}
