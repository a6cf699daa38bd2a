//! VM exits by kind, as KVM's own trace of the system that runs the VMs counts them: the same
//! source for every monitor.
//!
//! A histogram of the trace sums up in the kernel (Linux, Documentation/trace/histogram.rst), so nothing is
//! lost, whatever the rate. Numbers of exit reasons are AMD's (APM volume 2, appendix C), which is what the nested machine's processor is.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::{Add, Sub},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::machine::Machine;

/// Where the kernel's trace is controlled.
const EVENTS: &str = "/sys/kernel/tracing/events/kvm";

/// Exits of virtual processors to KVM: the event and what it is counted by.
const TO_KVM: Histogram = Histogram {
    event: "kvm_exit",
    key: "exit_reason",
};

/// Of those, the exits that KVM hands on to the monitor's process.
const TO_MONITOR: Histogram = Histogram {
    event: "kvm_userspace_exit",
    key: "reason",
};

/// Access to an I/O port, among the monitor's reasons (KVM_EXIT_IO).
const MONITOR_PORT: u64 = 2;

/// Each VM has a directory here, named after its process.
const VMS: &str = "/sys/kernel/debug/kvm";

/// Longest look at the system that runs the VMs.
const SOON: Duration = Duration::from_secs(30);

/// Why a virtual processor has left the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// A nested page fault: the first touch of memory, or a device's register, as virtio's doorbells are.
    Memory,
    /// A model-specific register: the timer, the end of an interrupt.
    Msr,
    /// A hypercall, as VMBus's signals are.
    Hypercall,
    /// The processor has nothing to do.
    Halt,
    /// The guest can take the interrupt that waits.
    Window,
    /// Anything else that the guest does.
    Other,
    /// A port. These guests have only the serial console there.
    Console,
    /// The host's own interrupt.
    HostInterrupt,
}

impl Reason {
    /// What the guest itself brings about, in the order of tables.
    pub const COUNTED: [Self; 6] = [
        Self::Memory,
        Self::Msr,
        Self::Hypercall,
        Self::Halt,
        Self::Window,
        Self::Other,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Msr => "MSR",
            Self::Hypercall => "hypercall",
            Self::Halt => "halt",
            Self::Window => "window",
            Self::Other => "other",
            Self::Console => "console",
            Self::HostInterrupt => "host",
        }
    }

    fn of_amd(code: u64) -> Self {
        match code {
            0x60 | 0x61 => Self::HostInterrupt,
            0x64 => Self::Window,
            0x78 => Self::Halt,
            0x7b => Self::Console,
            0x7c => Self::Msr,
            0x81 => Self::Hypercall,
            0x400 => Self::Memory,
            _ => Self::Other,
        }
    }
}

/// Exits of one VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Exits {
    /// By reason.
    pub by_reason: BTreeMap<Reason, u64>,
    /// How many of them went on to the monitor's process, those of the console left out.
    pub to_monitor: u64,
}

impl Exits {
    /// How many there were for this reason.
    pub fn of(&self, reason: Reason) -> u64 {
        self.by_reason.get(&reason).copied().unwrap_or(0)
    }

    /// All that the guest itself brought about.
    pub fn counted(&self) -> u64 {
        Reason::COUNTED.iter().map(|reason| self.of(*reason)).sum()
    }
}

impl Add<&Self> for Exits {
    type Output = Self;

    fn add(mut self, other: &Self) -> Self {
        for (reason, count) in &other.by_reason {
            *self.by_reason.entry(*reason).or_default() += count;
        }
        self.to_monitor += other.to_monitor;
        self
    }
}

impl Sub<&Self> for Exits {
    type Output = Self;

    /// What is left; less than nothing is nothing.
    fn sub(mut self, other: &Self) -> Self {
        for (reason, count) in &mut self.by_reason {
            *count = count.saturating_sub(other.of(*reason));
        }
        self.to_monitor = self.to_monitor.saturating_sub(other.to_monitor);
        self
    }
}

/// The threads of a VM's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Threads(BTreeSet<u64>);

/// Counts on a machine.
pub struct Counter<'a> {
    machine: &'a Machine,
    /// Processes of VMs that are known.
    known: BTreeSet<u64>,
}

impl<'a> Counter<'a> {
    /// Has the kernel count.
    ///
    /// # Errors
    /// Where its trace has no histograms.
    pub fn new(machine: &'a Machine) -> Result<Self> {
        for histogram in [TO_KVM, TO_MONITOR] {
            histogram
                .begin(machine)
                .context("this kernel's trace cannot count (CONFIG_HIST_TRIGGERS)")?;
        }
        Ok(Self {
            machine,
            known: BTreeSet::new(),
        })
    }

    /// The threads of the VM that was started last. It must have come up: later ones are not among them.
    ///
    /// # Errors
    /// When there is not exactly one VM more than the last time.
    pub fn started(&mut self) -> Result<Threads> {
        let said = self.machine.command(&["./busybox", "ls", VMS], SOON)?;
        let now = processes(&said);
        let new: Vec<_> = now.difference(&self.known).copied().collect();
        let [process] = new[..] else {
            anyhow::bail!("there are {} new VMs where there should be one", new.len());
        };
        self.known = now;
        let tasks = format!("/proc/{process}/task");
        let said = self.machine.command(&["./busybox", "ls", &tasks], SOON)?;
        let threads = said.split_whitespace().map(str::parse);
        Ok(Threads(threads.collect::<Result<_, _>>()?))
    }

    /// Begins at nothing.
    pub fn clear(&self) -> Result<()> {
        for histogram in [TO_KVM, TO_MONITOR] {
            histogram.begin(self.machine)?;
        }
        Ok(())
    }

    /// What these threads have counted since.
    pub fn read(&self, threads: &Threads) -> Result<Exits> {
        let mut exits = Exits::default();
        for (reason, count) in TO_KVM.read(self.machine, threads)? {
            *exits.by_reason.entry(Reason::of_amd(reason)).or_default() += count;
        }
        let to_monitor = TO_MONITOR.read(self.machine, threads)?;
        exits.to_monitor = to_monitor
            .iter()
            .filter(|(reason, _)| *reason != MONITOR_PORT)
            .map(|(_, count)| count)
            .sum();
        Ok(exits)
    }
}

/// A sum by one field of an event, and by thread.
struct Histogram {
    event: &'static str,
    key: &'static str,
}

impl Histogram {
    /// Begins at nothing. Opening the file for writing anew ends the sum that was there.
    fn begin(&self, machine: &Machine) -> Result<()> {
        let Self { event, key } = self;
        let trigger = format!("hist:keys={key},common_pid");
        machine.write(&format!("{EVENTS}/{event}/trigger"), &trigger)
    }

    fn read(&self, machine: &Machine, threads: &Threads) -> Result<Vec<(u64, u64)>> {
        let text = machine.read(&format!("{EVENTS}/{}/hist", self.event))?;
        let text = String::from_utf8_lossy(&text);
        let rows = parse(&text, self.key)
            .with_context(|| format!("the trace's sums of {} cannot be read", self.event))?;
        ensure!(
            text.lines().any(|line| line.trim() == "Dropped: 0"),
            "the trace has dropped sums of {}",
            self.event
        );
        Ok(rows
            .into_iter()
            .filter(|row| threads.0.contains(&row.thread))
            .map(|row| (row.value, row.count))
            .collect())
    }
}

/// A line of a histogram.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    value: u64,
    thread: u64,
    count: u64,
}

/// Reads lines like `{ exit_reason: 96, common_pid: 123 } hitcount: 5`; others are passed over. `None` for one without
/// a number.
fn parse(text: &str, key: &str) -> Option<Vec<Row>> {
    let lines = text.lines().filter(|line| line.starts_with('{'));
    lines
        .map(|line| {
            let field = |name: &str| {
                let (_, rest) = line.split_once(&format!("{name}:"))?;
                let word = rest.split_whitespace().next()?;
                word.trim_end_matches(',').parse().ok()
            };
            Some(Row {
                value: field(key)?,
                thread: field("common_pid")?,
                count: field("hitcount")?,
            })
        })
        .collect()
}

/// Processes in a list of names like `123-11`; other names are no VMs.
fn processes(list: &str) -> BTreeSet<u64> {
    list.split_whitespace()
        .filter_map(|name| name.split_once('-')?.0.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUMS: &str = "\
# event histogram
#
# trigger info: hist:keys=exit_reason,common_pid:vals=hitcount:sort=hitcount:size=2048 [active]
#

{ exit_reason:        120, common_pid:        301 } hitcount:          7
{ exit_reason:       1024, common_pid:        302 } hitcount:      41950

Totals:
    Hits: 41957
    Entries: 2
    Dropped: 0
";

    #[test]
    fn sums_are_read_by_reason_and_thread() {
        let rows = parse(SUMS, "exit_reason").unwrap();
        let row = |value, thread, count| Row {
            value,
            thread,
            count,
        };
        assert_eq!(rows, [row(120, 301, 7), row(1024, 302, 41_950)]);
        assert_eq!(Reason::of_amd(rows[0].value), Reason::Halt);
        assert_eq!(Reason::of_amd(rows[1].value), Reason::Memory);
        assert_eq!(parse(SUMS, "reason_that_is_not"), None);
        assert_eq!(parse("# nothing yet\n", "exit_reason"), Some(Vec::new()));
    }

    #[test]
    fn what_is_no_doing_of_the_guest_is_apart() {
        let exits = Exits {
            by_reason: BTreeMap::from([
                (Reason::Halt, 3),
                (Reason::Console, 100),
                (Reason::HostInterrupt, 10),
            ]),
            to_monitor: 2,
        };
        assert_eq!(exits.counted(), 3);
        let twice = exits.clone() + &exits;
        assert_eq!((twice.counted(), twice.to_monitor), (6, 4));
        let none = exits.clone() - &twice;
        assert_eq!((none.counted(), none.to_monitor), (0, 0));
    }

    #[test]
    fn vms_are_named_after_their_processes() {
        let found = processes("312-11\nexits\n405-9\nhalt_exits\n");
        assert_eq!(found, BTreeSet::from([312, 405]));
    }
}
