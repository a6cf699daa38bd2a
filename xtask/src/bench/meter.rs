//! Runs a guest under KVM's trace.

use std::time::Duration;

use anyhow::{Result, anyhow};

use super::trace::{self, Cause, Exit};
use crate::machine::{Machine, Vm, VmConfig};

const TRACING: &str = "/sys/kernel/tracing";

/// Events that tell what an exit is about. Not every kernel has all.
const EVENTS: [&str; 7] = [
    "kvm_exit",
    "kvm_pio",
    "kvm_msr",
    "kvm_cpuid",
    "kvm_hypercall",
    "kvm_hv_hypercall",
    "kvm_page_fault",
];

/// Room for a Linux boot's events, in KiB.
const BUFFER: &str = "49152";

/// I/O port of the marks: a guest writes a [`Mark`] to it on its way.
pub const MARK_PORT: u16 = 0x4e9;

/// A point on a guest's way, by the byte that it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// First line of the kernel.
    Entry = 1,
    /// `main` begins.
    Main = 2,
    /// The balloon device is open.
    BalloonOpen = 3,
}

/// A machine with the trace switched on.
pub struct Meter<'a> {
    machine: &'a Machine,
}

impl<'a> Meter<'a> {
    /// Switches the trace on.
    ///
    /// # Errors
    /// Where the trace is not ours to use (it needs root).
    pub fn new(machine: &'a Machine) -> Result<Self> {
        let meter = Self { machine };
        meter.write("buffer_size_kb", BUFFER)?;
        for event in EVENTS {
            let control = format!("events/kvm/{event}/enable");
            // Only the exits themselves are needed by all means.
            if let Err(error) = meter.write(&control, "1")
                && event == EVENTS[0]
            {
                return Err(error);
            }
        }
        Ok(meter)
    }

    /// Empties the trace and starts a VM.
    pub fn start(&self, config: &VmConfig) -> Result<Vm> {
        self.clear()?;
        self.machine.run(config)
    }

    /// Empties the trace.
    pub fn clear(&self) -> Result<()> {
        self.write("trace", "")
    }

    /// All exits since the trace was emptied.
    pub fn exits(&self) -> Result<Vec<Exit>> {
        let text = self.machine.read(&format!("{TRACING}/trace"))?;
        trace::parse(&String::from_utf8_lossy(&text))
            .ok_or_else(|| anyhow!("KVM's trace has lost events: its buffer is too small"))
    }

    /// How long the machine has been up, in seconds of its own clock.
    pub fn uptime(&self) -> Result<f64> {
        let text = self.machine.read("/proc/uptime")?;
        String::from_utf8_lossy(&text)
            .split(' ')
            .next()
            .and_then(|seconds| seconds.parse().ok())
            .ok_or_else(|| anyhow!("the machine's uptime is not a number"))
    }

    /// Lets time pass while the guest does what it does.
    ///
    /// # Errors
    /// When the guest says something: it is not idle, then.
    pub fn idle(&self, vm: &mut Vm, span: Duration) -> Result<()> {
        match vm.console_piece(span)? {
            Some(piece) if piece.is_empty() => Ok(()),
            Some(piece) => Err(anyhow!(
                "the guest is not idle, it prints {:?}",
                String::from_utf8_lossy(&piece)
            )),
            None => Err(anyhow!("the guest has ended")),
        }
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        self.machine.write(&format!("{TRACING}/{file}"), text)
    }
}

/// Index of the exit that a mark made.
pub fn position(exits: &[Exit], mark: Mark) -> Option<usize> {
    exits.iter().position(|exit| {
        exit.cause
            == Cause::Port {
                port: MARK_PORT,
                write: true,
                value: mark as u32,
            }
    })
}

/// Index of the exit with which a guest began to print `word` on COM1.
pub fn printed(exits: &[Exit], word: &[u8]) -> Option<usize> {
    const DATA: u16 = 0x3f8;
    let (indices, text): (Vec<_>, Vec<_>) = exits
        .iter()
        .enumerate()
        .filter_map(|(index, exit)| match exit.cause {
            Cause::Port {
                port: DATA,
                write: true,
                value,
            } => Some((index, value.to_le_bytes()[0])),
            _ => None,
        })
        .unzip();
    let place = text.windows(word.len()).position(|part| part == word)?;
    indices.get(place).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_among_other_exits() {
        let exit = |cause| Exit {
            at: 0,
            rip: 0,
            cause,
        };
        let exits: Vec<_> = b"ab xyz"
            .iter()
            .flat_map(|byte| {
                let write = Cause::Port {
                    port: 0x3f8,
                    write: true,
                    value: u32::from(*byte),
                };
                [exit(Cause::Halt), exit(write)]
            })
            .collect();
        assert_eq!(printed(&exits, b"xy"), Some(7));
        assert_eq!(printed(&exits, b"yx"), None);
    }

    #[test]
    fn a_mark_is_a_write_of_its_byte() {
        let cause = Cause::Port {
            port: MARK_PORT,
            write: true,
            value: 2,
        };
        let exits = [Exit {
            at: 0,
            rip: 0,
            cause,
        }];
        assert_eq!(position(&exits, Mark::Main), Some(0));
        assert_eq!(position(&exits, Mark::Entry), None);
    }
}
