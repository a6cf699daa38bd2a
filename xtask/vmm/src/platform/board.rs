//! The board: what answers at I/O ports and at addresses without memory.
//!
//! Ports that nothing answers at read as all ones, as those of a Generation 2 VM do: there is no PIC, no PIT, no
//! 8042 and no PCI (spec boot.md A6).

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use kvm_bindings::kvm_msi;
use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};

use super::acpi::{SERIAL_INTERRUPT, SERIAL_PORTS};
use super::io_apic::{IoApic, Message};
use super::power::{self, Power, Request};
use super::rtc::{self, Rtc};
use crate::partition::{End, Owner, Settings};

/// The port of QEMU's isa-debug-exit device: a test's way to end the VM with a status.
const DEBUG_EXIT: std::ops::RangeInclusive<u16> = 0xF4..=0xF7;

/// The devices.
pub struct Board {
    serial: Mutex<Serial<Line, Drained, Box<dyn Write + Send>>>,
    io_apic: Arc<Mutex<IoApic>>,
    power: Mutex<Power>,
    rtc: Mutex<Rtc>,
}

impl Board {
    /// A board after power-up.
    pub fn new(
        vm: &Arc<VmFd>,
        settings: &Settings,
        console: Box<dyn Write + Send>,
        owner: Arc<dyn Owner>,
    ) -> Self {
        let io_apic = Arc::new(Mutex::new(IoApic::default()));
        let line = Line {
            vm: Arc::clone(vm),
            io_apic: Arc::clone(&io_apic),
            input: SERIAL_INTERRUPT,
        };
        Self {
            serial: Mutex::new(Serial::with_events(line, Drained(owner), console)),
            io_apic,
            power: Mutex::new(Power::new(settings.hibernation)),
            rtc: Mutex::default(),
        }
    }

    /// The guest reads ports from `port` on; `now` gives the reference time. A string of bytes from the serial port or
    /// the clock is that many reads of one register.
    pub fn port_read(&self, port: u16, data: &mut [u8], now: impl Fn() -> u64) {
        if SERIAL_PORTS.contains(&port) {
            let mut serial = lock(&self.serial);
            let register = (port - SERIAL_PORTS.start()) as u8;
            data.fill_with(|| serial.read(register));
        } else if power::PORTS.contains(&port) {
            lock(&self.power).read(port, now(), data);
        } else if rtc::PORTS.contains(&port) {
            // A clock before 1970 reads as that.
            let time = SystemTime::now().duration_since(UNIX_EPOCH);
            let time = time.unwrap_or_default().as_secs();
            data.fill(lock(&self.rtc).read(port, time));
        } else {
            data.fill(0xFF);
        }
    }

    /// The guest writes; the result is how that ends the VM, if it does.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<End> {
        if SERIAL_PORTS.contains(&port) {
            let mut serial = lock(&self.serial);
            let register = (port - SERIAL_PORTS.start()) as u8;
            for byte in data {
                // A console that nobody reads any more does not stop the guest.
                drop(serial.write(register, *byte));
            }
        } else if power::PORTS.contains(&port) {
            return lock(&self.power)
                .write(port, data)
                .map(|request| match request {
                    Request::PowerOff => End::PowerOff,
                    Request::Hibernate => End::Hibernated,
                    Request::Reset => End::Reset,
                });
        } else if rtc::PORTS.contains(&port) {
            let mut rtc = lock(&self.rtc);
            for (port, byte) in (port..).zip(data) {
                rtc.write(port, *byte);
            }
        } else if DEBUG_EXIT.contains(&port) {
            let mut value = [0; 4];
            for (to, from) in value.iter_mut().zip(data) {
                *to = *from;
            }
            return Some(End::DebugExit(u32::from_le_bytes(value)));
        }
        None
    }

    /// The guest reads an address where no memory is.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        if IoApic::claims(address) {
            lock(&self.io_apic).read(address, data);
        } else {
            data.fill(0xFF);
        }
    }

    /// The guest writes to an address where no memory is.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        if IoApic::claims(address) {
            lock(&self.io_apic).write(address, data);
        }
    }

    /// Input for the serial port; gives how many bytes there was room for.
    pub fn serial_input(&self, bytes: &[u8]) -> usize {
        let mut serial = lock(&self.serial);
        // Full, or looped back by the guest.
        serial.enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}

/// A line to the I/O APIC.
struct Line {
    vm: Arc<VmFd>,
    io_apic: Arc<Mutex<IoApic>>,
    input: u8,
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        let Some(Message { address, data }) = lock(&self.io_apic).raise(self.input) else {
            return Ok(());
        };
        let message = kvm_msi {
            address_lo: address,
            data,
            ..Default::default()
        };
        self.vm.signal_msi(message)?;
        Ok(())
    }
}

/// Tells the owner when the guest has read all input.
struct Drained(Arc<dyn Owner>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.console_drained();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
