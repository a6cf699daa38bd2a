//! I/O ports: the console, ACPI power control and the test machine's exit device.

use core::arch::asm;

use uart_16550::Uart16550;
use uart_16550::backend::PioBackend;

/// Writes a byte.
pub fn write_u8(port: u16, value: u8) {
    // SAFETY: a port write cannot break memory safety by itself on a machine whose only devices
    // with access to memory are the host's.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags));
    };
}

/// Writes 16 bits.
pub fn write_u16(port: u16, value: u16) {
    // SAFETY: as in `write_u8`.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags));
    };
}

/// Writes 32 bits.
pub fn write_u32(port: u16, value: u32) {
    // SAFETY: as in `write_u8`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags));
    };
}

/// The serial port at this base, for the console alone.
pub fn serial(base: u16) -> Uart16550<PioBackend> {
    // SAFETY: port accesses cannot break memory safety here, see `write_u8`.
    match unsafe { Uart16550::new_port(base) } {
        Ok(uart) => uart,
        Err(error) => unreachable!("the eight ports from {base:#x} exist: {error}"),
    }
}
