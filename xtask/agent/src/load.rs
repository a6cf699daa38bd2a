//! Requests to a disk, as many at a time as are asked for, past the page cache: what the benchmarks of disks run in
//! their guests. `fio` would do, but it brings 80 MB of libraries, whose start alone takes an emulated guest many seconds.
//!
//! `/init load FILE read|write random|sequential BYTES DEPTH MILLISECONDS` keeps DEPTH requests of BYTES under way until the time is
//! over, each from a thread of its own; with 0 milliseconds it makes one. It prints the number of requests and the nanoseconds.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::OFlags;

/// What direct requests have to be aligned to, whatever the disk.
const ALIGNMENT: usize = 4096;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Load {
    write: bool,
    random: bool,
    /// Bytes of a request.
    bytes: usize,
    /// Requests under way at a time.
    depth: usize,
    time: Duration,
}

pub(crate) fn main(words: &[String]) -> io::Result<()> {
    let (file, load) = Load::parse(words).ok_or_else(|| {
        io::Error::other("load FILE read|write random|sequential BYTES DEPTH MILLISECONDS")
    })?;
    let mut file = OpenOptions::new()
        .read(true)
        .write(load.write)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(file)?;
    let length = file.seek(SeekFrom::End(0))?;
    let (requests, time) = load.run(&file, length)?;
    println!("{requests} {}", time.as_nanos());
    Ok(())
}

impl Load {
    fn parse(words: &[String]) -> Option<(&str, Self)> {
        let [file, verb, pattern, bytes, depth, milliseconds] = words else {
            return None;
        };
        let choice =
            |word: &str, yes: &str, no: &str| (word == yes || word == no).then_some(word == yes);
        let load = Self {
            write: choice(verb, "write", "read")?,
            random: choice(pattern, "random", "sequential")?,
            bytes: bytes
                .parse()
                .ok()
                .filter(|bytes| *bytes != 0 && bytes % ALIGNMENT == 0)?,
            depth: depth.parse().ok().filter(|depth| *depth != 0)?,
            time: Duration::from_millis(milliseconds.parse().ok()?),
        };
        Some((file, load))
    }

    /// Makes the requests; returns how many there were, and the time until the last was done.
    fn run(&self, file: &File, length: u64) -> io::Result<(u64, Duration)> {
        let places = length / self.bytes as u64;
        if places == 0 {
            return Err(io::Error::other("the disk is smaller than a request"));
        }
        let next = AtomicU64::new(0);
        let start = Instant::now();
        thread::scope(|scope| {
            let work = || self.work(file, places, &next, start);
            let one = self.time.is_zero();
            let threads = if one { 1 } else { self.depth };
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_fold(0, |sum, thread| {
                let done = thread
                    .join()
                    .map_err(|_| io::Error::other("a thread has panicked"))?;
                Ok::<_, io::Error>(sum + done?)
            })
        })
        .map(|requests| (requests, start.elapsed()))
    }

    /// One of those that have a request under way.
    fn work(&self, file: &File, places: u64, next: &AtomicU64, start: Instant) -> io::Result<u64> {
        let mut memory = vec![0x5a; self.bytes + ALIGNMENT];
        let from = memory.as_ptr().align_offset(ALIGNMENT);
        let memory = memory
            .get_mut(from..from + self.bytes)
            .ok_or_else(|| io::Error::other("memory cannot be aligned"))?;
        let mut done = 0;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let place = if self.random { scatter(number) } else { number } % places;
            let at = place * self.bytes as u64;
            if self.write {
                file.write_all_at(memory, at)?;
            } else {
                file.read_exact_at(memory, at)?;
            }
            done += 1;
            if start.elapsed() >= self.time {
                return Ok(done);
            }
        }
    }
}

/// The same number each time, and far from that of the next one (the finalizer of SplitMix64).
fn scatter(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn only_whole_and_aligned_requests_are_understood() {
        let line = words("/dev/sda write random 4096 32 200");
        let (file, load) = Load::parse(&line).unwrap();
        assert_eq!(file, "/dev/sda");
        assert!(load.write && load.random);
        assert_eq!((load.bytes, load.depth), (4096, 32));
        for wrong in [
            "/dev/sda write",
            "f read random 512 1 1",
            "f look random 4096 1 1",
            "f read random 4096 0 1",
        ] {
            assert_eq!(Load::parse(&words(wrong)), None, "{wrong}");
        }
    }

    #[test]
    fn requests_are_made_and_counted() {
        let load = Load {
            write: true,
            random: true,
            bytes: 4096,
            depth: 4,
            time: Duration::from_millis(20),
        };
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let (requests, time) = load.run(&file, 1 << 20).unwrap();
        assert!(requests >= 4 && time >= load.time);
        let mut start = [0; 1];
        let written = (0..256)
            .filter(|page| file.read_at(&mut start, page * 4096).is_ok() && start == [0x5a]);
        assert!(written.count() > 3, "they are spread");
        let one = Load {
            write: false,
            time: Duration::ZERO,
            ..load
        };
        assert_eq!(one.run(&file, 1 << 20).unwrap().0, 1);
        assert!(load.run(&file, 100).is_err());
    }
}
