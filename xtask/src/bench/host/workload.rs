//! What the guests are made to do: requests to a disk by fio, files over the network by HTTP; and what is read of it.

use anyhow::{Context, Result, ensure};

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
    /// All: so many seconds of requests, or a whole file.
    Full { seconds: u32 },
}

impl Disk {
    /// The command for a disk of this name.
    pub fn command(&self, device: &str, amount: Amount) -> String {
        let direction = match (self.pattern, self.write) {
            (Pattern::Random, false) => "randread",
            (Pattern::Random, true) => "randwrite",
            (Pattern::Sequential, false) => "read",
            (Pattern::Sequential, true) => "write",
        };
        let amount = match amount {
            Amount::Least => "--number_ios=1".to_owned(),
            Amount::Full { seconds } => format!("--time_based --runtime={seconds}"),
        };
        format!(
            "fio --name=host --filename=/dev/{device} --thread --direct=1 --ioengine=libaio --norandommap \
             --gtod_reduce=1 --disk_util=0 --minimal --terse-version=3 --rw={direction} --bs={}k \
             --iodepth={} {amount}",
            self.kib, self.depth
        )
    }

    /// What fio says of its run.
    ///
    /// # Errors
    /// When it failed, or says something else.
    pub fn read(&self, said: &str) -> Result<Done> {
        /// Fields of a line of the third terse version (fio(1), TERSE OUTPUT), from 0.
        const ERROR: usize = 4;
        const READ_KIB: usize = 5;
        const READ_MILLISECONDS: usize = 8;
        const WRITTEN_KIB: usize = 46;
        const WRITE_MILLISECONDS: usize = 49;
        let line = said.lines().find(|line| line.starts_with("3;"));
        let fields: Vec<_> = line.unwrap_or_default().split(';').collect();
        let field = |index: usize| fields.get(index)?.parse::<u32>().ok();
        let (kib, milliseconds) = if self.write {
            (field(WRITTEN_KIB), field(WRITE_MILLISECONDS))
        } else {
            (field(READ_KIB), field(READ_MILLISECONDS))
        };
        let numbers = || Some((field(ERROR)?, kib?, milliseconds?));
        let (error, kib, milliseconds) =
            numbers().with_context(|| format!("fio says something else than a line: {said}"))?;
        ensure!(error == 0, "fio ended with the error {error}");
        Ok(Done {
            requests: f64::from(kib) / f64::from(self.kib),
            bytes: f64::from(kib) * 1024.0,
            seconds: f64::from(milliseconds) / 1000.0,
        })
    }
}

/// The shell's command for fetching a file, with the time before and after.
pub fn fetch(url: &str) -> String {
    format!(
        "read a x </proc/uptime && wget -q -O /dev/null {url} && read b x </proc/uptime && echo $a $b"
    )
}

/// What [`fetch`] says of a file of so many bytes.
pub fn fetched(said: &str, bytes: u32) -> Result<Done> {
    let times = said.split_whitespace().map(str::parse::<f64>);
    let times = times.collect::<Result<Vec<_>, _>>();
    let Ok([begin, end]) = times.as_deref() else {
        anyhow::bail!("the time of a fetched file cannot be read: {said}");
    };
    Ok(Done {
        requests: 1.0,
        bytes: f64::from(bytes),
        seconds: end - begin,
    })
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

    /// A line of fio's with these numbers at their places.
    fn line(error: &str, read: [&str; 2], written: [&str; 2]) -> String {
        let mut fields = vec!["0"; 130];
        fields[0] = "3";
        fields[4] = error;
        [fields[5], fields[8]] = read;
        [fields[46], fields[49]] = written;
        format!("a warning first\n{}\n", fields.join(";"))
    }

    #[test]
    fn requests_and_speed_come_from_bytes_and_time() {
        let said = line("0", ["8192", "2000"], ["0", "0"]);
        let done = READS.read(&said).unwrap();
        assert_eq!(done.amount(Unit::Requests), 2048.0);
        assert_eq!(done.speed(Unit::Requests), 1024.0);
        assert_eq!(done.amount(Unit::Mebibytes), 8.0);
        let writes = Disk {
            write: true,
            kib: 128,
            ..READS
        };
        let said = line("0", ["0", "0"], ["100000", "1000"]);
        let done = writes.read(&said).unwrap();
        assert_eq!(done.speed(Unit::Mebibytes), 102.4);
    }

    #[test]
    fn a_failed_run_is_no_number() {
        assert!(READS.read(&line("5", ["1", "1"], ["0", "0"])).is_err());
        assert!(READS.read("fio: cannot open /dev/sda\n").is_err());
        assert!(READS.read("3;fio-3.33;host;0;0;").is_err());
    }

    #[test]
    fn a_file_is_timed_by_the_one_who_fetches_it() {
        let done = fetched("12.50 14.50\n", 4_000_000).unwrap();
        assert_eq!(done.speed(Unit::Mebibytes), 2.0);
        assert!(fetched("wget: refused\n", 1).is_err());
        assert!(fetched("12.5\n", 1).is_err());
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
        assert!(command.contains("/dev/sda") && command.contains("--number_ios=1"));
        let command = READS.command("sda", Amount::Full { seconds: 2 });
        assert!(command.contains("--runtime=2") && command.contains("--rw=randread"));
    }
}
