//! Writing to an I/O port from a process: the referee's marks.
//!
//! Debian's cloud kernel has no `/dev/port`, so this asks for the port and uses the
//! instruction. The only `unsafe` of the test machine.

#![allow(unsafe_code)]

use std::io;

/// Writes a byte to a port.
pub(crate) fn write(port: u16, byte: u8) -> io::Result<()> {
    // SAFETY: the call changes this thread's rights to one port and touches no memory.
    if unsafe { libc::ioperm(port.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller names the port of a device that only counts what is written to it.
    unsafe {
        std::arch::asm!(
            "out dx, al",
            in("dx") port,
            in("al") byte,
            options(nomem, nostack, preserves_flags)
        );
    }
    Ok(())
}
