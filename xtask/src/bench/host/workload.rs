//! What the guests are made to do: requests to a disk, files over the network by HTTP; and what is read of it.

use anyhow::{Result, bail};

/// Bytes of a MiB.
const MIB: f64 = (1 << 20) as f64;

/// Bytes of the MB of MB/s.
const MB: f64 = 1e6;

/// Something that guests are made to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Requests to the disk.
    Disk(Disk),
    /// A file over the network.
    Network(Direction),
}

/// Requests to the disk, as many at a time as `depth` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    pub pattern: Pattern,
    pub write: bool,
    /// KiB of a request.
    pub kib: u32,
    pub depth: u32,
}

/// Where requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Anywhere.
    Random,
    /// One behind the other.
    Sequential,
}

/// Which way a file goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The host serves it, the guest fetches it.
    HostToGuest,
    /// The guest serves it, the host fetches it.
    GuestToHost,
}

/// All of them, in the order of the tables.
pub const ALL: [Workload; 10] = [
    random(false, 1),
    random(true, 1),
    random(false, 32),
    random(true, 32),
    sequential(false, 128),
    sequential(true, 128),
    sequential(false, 1024),
    sequential(true, 1024),
    Workload::Network(Direction::HostToGuest),
    Workload::Network(Direction::GuestToHost),
];

const fn random(write: bool, depth: u32) -> Workload {
    Workload::Disk(Disk {
        pattern: Pattern::Random,
        write,
        kib: 4,
        depth,
    })
}

const fn sequential(write: bool, kib: u32) -> Workload {
    Workload::Disk(Disk {
        pattern: Pattern::Sequential,
        write,
        kib,
        depth: 4,
    })
}

/// In what a workload is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Requests; their speed is IOPS.
    Requests,
    /// MiB; their speed is MB/s.
    Mebibytes,
}

impl Unit {
    /// What a speed is in.
    pub fn speed(self) -> &'static str {
        match self {
            Self::Requests => "IOPS",
            Self::Mebibytes => "MB/s",
        }
    }

    /// What exits are divided by.
    pub fn one(self) -> &'static str {
        match self {
            Self::Requests => "I/O",
            Self::Mebibytes => "MiB",
        }
    }
}

impl Workload {
    /// Its name in tables.
    pub fn name(self) -> String {
        match self {
            Self::Disk(Disk {
                pattern,
                write,
                kib,
                depth,
            }) => {
                let pattern = match pattern {
                    Pattern::Random => "random",
                    Pattern::Sequential => "sequential",
                };
                let verb = if write { "write" } else { "read" };
                let size = match kib {
                    1024 => "1 MiB".to_owned(),
                    kib => format!("{kib} KiB"),
                };
                format!("{pattern} {verb} {size}, depth {depth}")
            }
            Self::Network(Direction::HostToGuest) => "TCP, host to guest".into(),
            Self::Network(Direction::GuestToHost) => "TCP, guest to host".into(),
        }
    }

    /// The first of those that cost the same to start.
    pub fn first_alike(self) -> Self {
        match self {
            Self::Disk(_) => ALL[0],
            Self::Network(_) => self,
        }
    }

    /// In what it is counted.
    pub fn unit(self) -> Unit {
        match self {
            Self::Disk(disk) if disk.pattern == Pattern::Random => Unit::Requests,
            _ => Unit::Mebibytes,
        }
    }
}

/// How much of a workload there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// As little as it can: what starting it costs.
    Least,
    /// All: so many milliseconds of requests, or a whole file.
    Full { milliseconds: u32 },
}

impl Disk {
    /// The command for a disk of this name: a role of our first process.
    pub fn command(&self, device: &str, amount: Amount) -> String {
        let verb = if self.write { "write" } else { "read" };
        let pattern = match self.pattern {
            Pattern::Random => "random",
            Pattern::Sequential => "sequential",
        };
        let milliseconds = match amount {
            Amount::Least => 0,
            Amount::Full { milliseconds } => milliseconds,
        };
        let (bytes, depth) = (self.kib * 1024, self.depth);
        format!("/init load /dev/{device} {verb} {pattern} {bytes} {depth} {milliseconds}")
    }

    /// What it says of its run.
    ///
    /// # Errors
    /// When it says something else.
    pub fn read(&self, said: &str) -> Result<Done> {
        let Some([requests, nanoseconds]) = two_numbers(said) else {
            bail!("what was done to the disk cannot be read: {said}");
        };
        Ok(Done {
            requests,
            bytes: requests * f64::from(self.kib) * 1024.0,
            seconds: nanoseconds / 1e9,
        })
    }
}

/// The command for fetching a file: a role of our first process, at either end.
pub fn fetch(address: &str, file: &str) -> String {
    format!("/init fetch {address} /{file}")
}

/// What [`fetch`] says: bytes and nanoseconds.
///
/// # Errors
/// When it says something else.
pub fn fetched(said: &str) -> Result<Done> {
    let Some([bytes, nanoseconds]) = two_numbers(said) else {
        bail!("what was fetched cannot be read: {said}");
    };
    Ok(Done {
        requests: 1.0,
        bytes,
        seconds: nanoseconds / 1e9,
    })
}

fn two_numbers(said: &str) -> Option<[f64; 2]> {
    let mut words = said.split_whitespace();
    let mut next = || words.next()?.parse().ok();
    let numbers = [next()?, next()?];
    words.next().is_none().then_some(numbers)
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    pub requests: f64,
    pub bytes: f64,
    pub seconds: f64,
}

impl Done {
    /// How much it is, counted in this unit.
    pub fn amount(&self, unit: Unit) -> f64 {
        match unit {
            Unit::Requests => self.requests,
            Unit::Mebibytes => self.bytes / MIB,
        }
    }

    /// How fast it was, in this unit's speed.
    pub fn speed(&self, unit: Unit) -> f64 {
        let amount = match unit {
            Unit::Requests => self.requests,
            Unit::Mebibytes => self.bytes / MB,
        };
        amount / self.seconds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READS: Disk = Disk {
        pattern: Pattern::Random,
        write: false,
        kib: 4,
        depth: 32,
    };

    #[test]
    fn requests_and_speed_come_from_bytes_and_time() {
        let done = READS.read("2048 2000000000\n").unwrap();
        assert_eq!(done.amount(Unit::Requests), 2048.0);
        assert_eq!(done.speed(Unit::Requests), 1024.0);
        assert_eq!(done.amount(Unit::Mebibytes), 8.0);
        let writes = Disk {
            write: true,
            kib: 128,
            ..READS
        };
        let done = writes.read("1000 1000000000").unwrap();
        assert_eq!(done.speed(Unit::Mebibytes), 131.072);
        assert!(READS.read("error: no such disk").is_err());
        assert!(READS.read("12").is_err());
    }

    #[test]
    fn a_file_is_timed_by_the_one_who_fetches_it() {
        let done = fetched("4000000 2000000000\n").unwrap();
        assert_eq!(done.speed(Unit::Mebibytes), 2.0);
        assert!(fetched("error: refused\n").is_err());
        assert!(fetched("12\n").is_err());
        assert!(fetched("1 2 3\n").is_err());
    }

    #[test]
    fn names_tell_workloads_apart() {
        let mut names: Vec<_> = ALL.iter().map(|workload| workload.name()).collect();
        assert!(names.contains(&"random write 4 KiB, depth 32".to_owned()));
        assert!(names.contains(&"sequential read 1 MiB, depth 4".to_owned()));
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn the_least_of_a_workload_is_one_request() {
        let command = READS.command("sda", Amount::Least);
        assert_eq!(command, "/init load /dev/sda read random 4096 32 0");
        let command = READS.command("sda", Amount::Full { milliseconds: 200 });
        assert_eq!(command, "/init load /dev/sda read random 4096 32 200");
    }
}
