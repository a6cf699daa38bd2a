//! Exits to this program, counted by kind.

use std::collections::BTreeMap;
use std::fmt;
use std::iter::Sum;
use std::sync::Mutex;

use super::lock;

/// Why a virtual processor came out of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ExitKind {
    /// A read of this port.
    PortRead(u16),
    /// A write to this port.
    PortWrite(u16),
    /// A read of an address where no memory is.
    MmioRead,
    /// A write to an address where no memory is.
    MmioWrite,
    /// A read of this MSR.
    MsrRead(u32),
    /// A write to this MSR.
    MsrWrite(u32),
    /// A hypercall with this code.
    Hypercall(u16),
    /// A write to a register of the SynIC.
    Synic,
    /// The kernel reports an event of this type: reset, shutdown.
    SystemEvent(u32),
    /// A triple fault.
    Shutdown,
    /// This program called it out: to pause, or to deliver a message.
    Interrupted,
    /// Anything else.
    Other,
}

impl fmt::Display for ExitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PortRead(port) => write!(f, "port-read {port:#x}"),
            Self::PortWrite(port) => write!(f, "port-write {port:#x}"),
            Self::MmioRead => f.write_str("mmio-read"),
            Self::MmioWrite => f.write_str("mmio-write"),
            Self::MsrRead(msr) => write!(f, "msr-read {msr:#x}"),
            Self::MsrWrite(msr) => write!(f, "msr-write {msr:#x}"),
            Self::Hypercall(code) => write!(f, "hypercall {code:#x}"),
            Self::Synic => f.write_str("synic"),
            Self::SystemEvent(kind) => write!(f, "system-event {kind}"),
            Self::Shutdown => f.write_str("triple-fault"),
            Self::Interrupted => f.write_str("interrupted"),
            Self::Other => f.write_str("other"),
        }
    }
}

/// How many exits there were of each kind.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct ExitCounts(BTreeMap<ExitKind, u64>);

impl ExitCounts {
    /// The kinds that occurred, in order, and how often.
    pub fn iter(&self) -> impl Iterator<Item = (ExitKind, u64)> {
        self.0.iter().map(|(kind, count)| (*kind, *count))
    }

    /// How often one kind occurred.
    pub fn of(&self, kind: ExitKind) -> u64 {
        self.0.get(&kind).copied().unwrap_or(0)
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

impl Sum for ExitCounts {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let mut sum = Self::default();
        for (kind, count) in all.flat_map(|counts| counts.0) {
            *sum.0.entry(kind).or_default() += count;
        }
        sum
    }
}

/// The counters of one VP. Its thread alone counts, so the lock is free but when somebody reads.
#[derive(Default, Debug)]
pub struct Counter(Mutex<ExitCounts>);

impl Counter {
    /// One more.
    pub fn count(&self, kind: ExitKind) {
        *lock(&self.0).0.entry(kind).or_default() += 1;
    }

    /// What was counted.
    pub fn read(&self) -> ExitCounts {
        lock(&self.0).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_of_all_processors_add_up_by_kind() {
        let (one, two) = (Counter::default(), Counter::default());
        one.count(ExitKind::Hypercall(0x5C));
        one.count(ExitKind::PortWrite(0x3F8));
        two.count(ExitKind::Hypercall(0x5C));
        let sum: ExitCounts = [one.read(), two.read()].into_iter().sum();
        assert_eq!(sum.of(ExitKind::Hypercall(0x5C)), 2);
        assert_eq!((sum.of(ExitKind::MmioRead), sum.total()), (0, 3));
        let names: Vec<_> = sum.iter().map(|(kind, _)| kind.to_string()).collect();
        assert_eq!(names, ["port-write 0x3f8", "hypercall 0x5c"]);
    }
}
