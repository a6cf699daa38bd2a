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

/// A port that takes nothing for this many polls is gone.
const PATIENCE: u32 = 1_000_000;

/// The port and the bytes on their way to it.
pub(super) struct Serial {
    uart: Uart16550<PioBackend>,
    buffer: [u8; FIFO],
    len: usize,
    gone: bool,
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
            gone: false,
        }
    }

    /// Sends what is in the buffer.
    pub(super) fn flush(&mut self) {
        let mut rest = &self.buffer[..core::mem::take(&mut self.len)];
        for _ in 0..PATIENCE {
            if self.gone || rest.is_empty() {
                return;
            }
            rest = &rest[self.uart.send_bytes(rest)..];
        }
        self.gone = true;
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
