//! The first serial port: set up by `uart_16550`, filled 16 bytes at a time.
//!
//! Every access is a VM exit, so the line status is polled once for a full FIFO and not for each
//! byte. String output would not help: KVM leaves the guest for each of its bytes all the same, on
//! a slower path.

use core::fmt;

use uart_16550::backend::PioBackend;
use uart_16550::{Config, Uart16550};

use crate::arch::port;

/// COM1.
const PORT: u16 = 0x3F8;

/// What fits into the transmitter's FIFO once it has run empty.
const FIFO: usize = 16;

/// A port that takes nothing for this many polls has no reader: what follows is dropped until it takes
/// something again.
const PATIENCE: u32 = 100_000;

/// The port and the bytes on their way to it.
pub(super) struct Serial {
    uart: Uart16550<PioBackend>,
    buffer: [u8; FIFO],
    len: usize,
    stalled: bool,
}

impl Serial {
    /// Sets up the port, if there is one.
    pub(super) fn find() -> Option<Self> {
        let mut serial = Self::assume();
        serial.uart.init(Config::default()).ok()?;
        Some(serial)
    }

    /// The port, taken to be there and set up.
    pub(super) fn assume() -> Self {
        Self {
            uart: port::serial(PORT),
            buffer: [0; FIFO],
            len: 0,
            stalled: false,
        }
    }

    /// Sends what is in the buffer.
    pub(super) fn flush(&mut self) {
        let mut rest = &self.buffer[..core::mem::take(&mut self.len)];
        let polls = if self.stalled { 1 } else { PATIENCE };
        for _ in 0..polls {
            rest = &rest[self.uart.send_bytes(rest)..];
            if rest.is_empty() {
                self.stalled = false;
                return;
            }
        }
        self.stalled = true;
    }

    fn put(&mut self, byte: u8) {
        self.buffer[self.len] = byte;
        self.len += 1;
        if self.len == FIFO {
            self.flush();
        }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.put(b'\r');
            }
            self.put(byte);
        }
        Ok(())
    }
}
