//! A wall clock in UTC over the reference clock, steered by the host's samples, that never goes back.
//!
//! The host's time is a straight line: reference time plus an offset. This clock is that line plus an error, which is
//! zero most of the time. A sample moves the line; what the clock is off then becomes the error, and it
//! shrinks as time passes. So the clock bends, and jumps only forward.

use core::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering, fence};
use core::time::Duration;

use spin::Mutex;

/// Units of 100 ns in a second.
const SECOND: i64 = 10_000_000;

/// The Unix epoch in units of 100 ns since 1601-01-01 (spec ic.md 7).
const UNIX_EPOCH: u64 = 116_444_736_000_000_000;

/// The first moment of the year 10000, in units of 100 ns since the Unix epoch.
const YEAR_10000: u64 = 253_402_300_800 * 10_000_000;

/// By how much the two ways to read the one reference clock may differ: 1 ms.
const SKEW: u64 = 10_000;

/// The largest error that is mended gently, 125 ms. A clock further behind jumps; one further ahead runs at half its speed.
const GENTLE: i64 = SECOND / 8;

/// A gentle correction takes 2^11 times as long as it is large: 488 millionths.
const GENTLE_SHIFT: u32 = 11;

/// At half speed a correction takes 2^1 times as long as it is large.
const FIRM_SHIFT: u32 = 1;

/// Readings have a resolution of a quarter of 100 ns, so that two of them differ even when they come in the same 100 ns.
const STEPS: u64 = 4;

/// What the host says about time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    /// UTC, in units of 100 ns since 1601-01-01.
    pub host_time: u64,
    /// The reference time at which that was the time.
    pub reference_time: u64,
    /// Whether to jump rather than to bend, where the clock is behind by whatever.
    pub sync: bool,
}

/// Why a sample was not used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Before 1970.
    TooEarly,
    /// After 9999.
    TooLate,
    /// Taken at a reference time that has not come yet.
    FromTheFuture,
    /// Taken before the newest one that came: nothing is wrong with it.
    Old,
}

/// What a sample did to the clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Adjustment {
    /// It was the first.
    Set,
    /// The clock agreed.
    None,
    /// The clock was behind by so many units of 100 ns, and jumped.
    Stepped(u64),
    /// The clock was behind, and runs faster until it is right.
    Faster(u64),
    /// The clock was ahead, and runs slower until it is right.
    Slower(u64),
}

/// How the clock stands.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ClockStatus {
    /// Samples that were used.
    pub samples: u64,
    /// Samples that made no sense.
    pub refused: u64,
    /// Samples that came too late.
    pub old: u64,
    /// Times that the clock jumped forward, not counting the first sample.
    pub steps: u64,
    /// How far the clock was ahead of the newest sample when it came, negative for behind; units of 100 ns.
    pub last_error: i64,
    /// When the newest sample was taken, in reference time.
    pub last_sample: Option<u64>,
}

/// The clock. Read it from anywhere, as often as wanted; steer it at PASSIVE.
#[derive(Debug, Default)]
pub struct WallClock {
    steering: Mutex<ClockStatus>,
    /// Two lines in turn: the one that readers use, and the one that is written. A reader that interrupts the writer
    /// finds the other one whole.
    lines: [PublishedLine; 2],
    /// Counts the lines that were published; the last is at this number modulo 2.
    published: AtomicU32,
    is_set: AtomicBool,
    /// The last reading, in steps since the Unix epoch.
    latest: AtomicU64,
}

/// The clock's time as a function of reference time, in units of 100 ns.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    /// Host time since the Unix epoch, less reference time.
    offset: i64,
    /// Since when the error shrinks, in reference time.
    since: i64,
    /// How far the clock was ahead of the host then.
    error: i64,
}

/// A [`Line`] that is read while it may be written.
#[derive(Debug, Default)]
struct PublishedLine {
    offset: AtomicI64,
    since: AtomicI64,
    error: AtomicI64,
}

impl Line {
    fn at(self, reference: i64) -> i64 {
        let shift = if self.error.unsigned_abs() <= GENTLE as u64 {
            GENTLE_SHIFT
        } else {
            FIRM_SHIFT
        };
        let mended = reference.saturating_sub(self.since).max(0) >> shift;
        let error = if self.error > 0 {
            self.error.saturating_sub(mended).max(0)
        } else {
            self.error.saturating_add(mended).min(0)
        };
        reference.saturating_add(self.offset).saturating_add(error)
    }
}

impl PublishedLine {
    fn load(&self) -> Line {
        Line {
            offset: self.offset.load(Ordering::Relaxed),
            since: self.since.load(Ordering::Relaxed),
            error: self.error.load(Ordering::Relaxed),
        }
    }

    fn store(&self, line: Line) {
        self.offset.store(line.offset, Ordering::Relaxed);
        self.since.store(line.since, Ordering::Relaxed);
        self.error.store(line.error, Ordering::Relaxed);
    }
}

/// Reference time as a number that can be calculated with: no machine runs for 14000 years.
fn signed(reference: u64) -> i64 {
    reference.min(i64::MAX as u64 / 2) as i64
}

impl WallClock {
    /// A clock that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// UTC as the time since the Unix epoch, where the reference clock shows `now`; `None` before the first sample.
    ///
    /// Every reading is later than all before it, whatever the host says. Takes no lock: callable at any level.
    pub fn utc(&self, now: u64) -> Option<Duration> {
        if !self.is_set.load(Ordering::Acquire) {
            return None;
        }
        let time = self.line().at(signed(now)).max(0) as u64;
        // Beyond the year 16000 it stands still.
        let steps = time.saturating_mul(STEPS).min(u64::MAX - 1);
        let mut latest = self.latest.load(Ordering::Relaxed);
        loop {
            let next = steps.max(latest.saturating_add(1));
            match self.latest.compare_exchange_weak(
                latest,
                next,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(duration(next)),
                Err(other) => latest = other,
            }
        }
    }

    /// Takes a sample that came when the reference clock showed `now`. At PASSIVE.
    pub fn sample(&self, now: u64, sample: Sample) -> Result<Adjustment, Refusal> {
        let mut status = self.steering.lock();
        let host = match check(now, &sample, status.last_sample) {
            Ok(host) => host,
            Err(Refusal::Old) => {
                status.old += 1;
                return Err(Refusal::Old);
            }
            Err(refusal) => {
                status.refused += 1;
                return Err(refusal);
            }
        };
        status.samples += 1;
        status.last_sample = Some(sample.reference_time);
        let since = signed(now);
        let offset = host.saturating_sub(signed(sample.reference_time));
        if !self.is_set.load(Ordering::Relaxed) {
            self.publish(Line {
                offset,
                since,
                error: 0,
            });
            self.is_set.store(true, Ordering::Release);
            return Ok(Adjustment::Set);
        }
        let error = self
            .line()
            .at(since)
            .saturating_sub(since.saturating_add(offset));
        status.last_error = error;
        let size = error.unsigned_abs();
        let (adjustment, error) = match error {
            0 => (Adjustment::None, 0),
            1.. => (Adjustment::Slower(size), error),
            _ if sample.sync || error < -GENTLE => {
                status.steps += 1;
                (Adjustment::Stepped(size), 0)
            }
            _ => (Adjustment::Faster(size), error),
        };
        self.publish(Line {
            offset,
            since,
            error,
        });
        Ok(adjustment)
    }

    /// How it stands. At PASSIVE.
    pub fn status(&self) -> ClockStatus {
        *self.steering.lock()
    }

    fn line(&self) -> Line {
        loop {
            let published = self.published.load(Ordering::Acquire);
            let line = self.lines[published as usize % 2].load();
            // Whoever sees a part of a newer line sees here that there is one.
            fence(Ordering::Acquire);
            if self.published.load(Ordering::Relaxed) == published {
                return line;
            }
        }
    }

    /// Makes `line` the one to read. Only under the lock.
    fn publish(&self, line: Line) {
        let next = self.published.load(Ordering::Relaxed).wrapping_add(1);
        // The line that is overwritten was left by readers of the number before the last; they see that it is no more.
        fence(Ordering::Release);
        self.lines[next as usize % 2].store(line);
        self.published.store(next, Ordering::Release);
    }
}

/// The host's time since the Unix epoch in units of 100 ns, if the sample makes sense.
fn check(now: u64, sample: &Sample, newest: Option<u64>) -> Result<i64, Refusal> {
    let since_epoch = sample
        .host_time
        .checked_sub(UNIX_EPOCH)
        .ok_or(Refusal::TooEarly)?;
    if since_epoch >= YEAR_10000 {
        return Err(Refusal::TooLate);
    }
    if sample.reference_time > now.saturating_add(SKEW) {
        return Err(Refusal::FromTheFuture);
    }
    if newest.is_some_and(|newest| sample.reference_time < newest) {
        return Err(Refusal::Old);
    }
    // Below 2^62.
    Ok(since_epoch as i64)
}

/// Steps as a time.
fn duration(steps: u64) -> Duration {
    const PER_SECOND: u64 = SECOND as u64 * STEPS;
    let nanoseconds = (steps % PER_SECOND) * (1_000_000_000 / PER_SECOND);
    // Below 10^9.
    Duration::new(steps / PER_SECOND, nanoseconds as u32)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// 2026-01-01, in units of 100 ns since 1601.
    const HOST: u64 = UNIX_EPOCH + 1_767_225_600 * 10_000_000;

    const S: u64 = SECOND as u64;

    fn sample(host_time: u64, reference_time: u64) -> Sample {
        Sample {
            host_time,
            reference_time,
            sync: false,
        }
    }

    fn sync(host_time: u64, reference_time: u64) -> Sample {
        Sample {
            sync: true,
            ..sample(host_time, reference_time)
        }
    }

    /// What a clock without error shows.
    fn utc(host_time: u64) -> Option<Duration> {
        Some(duration((host_time - UNIX_EPOCH) * STEPS))
    }

    /// How far the reading is from `host_time`, in units of 100 ns.
    fn error(clock: &WallClock, now: u64, host_time: u64) -> i128 {
        let reading = clock.utc(now).unwrap().as_nanos() as i128 / 100;
        reading - i128::from(host_time - UNIX_EPOCH)
    }

    #[test]
    fn the_clock_shows_nothing_before_the_first_sample() {
        let clock = WallClock::new();
        assert_eq!(clock.utc(5), None);
        assert_eq!(clock.sample(5, sample(HOST, 5)), Ok(Adjustment::Set));
        assert_eq!(clock.utc(5), utc(HOST));
    }

    #[test]
    fn the_clock_runs_with_the_reference_clock_from_when_the_sample_was_taken() {
        let clock = WallClock::new();
        clock.sample(7 * S, sample(HOST, 5 * S)).unwrap();
        assert_eq!(clock.utc(7 * S), utc(HOST + 2 * S));
        assert_eq!(clock.utc(9 * S), utc(HOST + 4 * S));
    }

    #[test]
    fn the_unix_epoch_is_where_unix_has_it() {
        let clock = WallClock::new();
        clock.sample(0, sample(HOST + 7, 0)).unwrap();
        assert_eq!(clock.utc(0), Some(Duration::new(1_767_225_600, 700)));
    }

    #[test]
    fn two_readings_differ_also_at_one_moment() {
        let clock = WallClock::new();
        clock.sample(0, sample(HOST, 0)).unwrap();
        let readings: Vec<_> = (0..100).map(|_| clock.utc(3).unwrap()).collect();
        assert!(readings.windows(2).all(|pair| pair[0] < pair[1]));
        // And they have not run away.
        assert_eq!(clock.utc(3 + 25), utc(HOST + 3 + 25));
    }

    #[test]
    fn a_clock_that_is_a_little_behind_runs_faster_until_it_is_right() {
        let clock = WallClock::new();
        clock.sample(0, sample(HOST, 0)).unwrap();
        let late = S / 10;
        assert_eq!(
            clock.sample(S, sample(HOST + S + late, S)),
            Ok(Adjustment::Faster(late))
        );
        assert_eq!(error(&clock, S, HOST + S + late), -i128::from(late));
        let half = (late / 2) << GENTLE_SHIFT;
        assert_eq!(
            error(&clock, S + half, HOST + S + late + half),
            -i128::from(late / 2)
        );
        let whole = late << GENTLE_SHIFT;
        assert_eq!(error(&clock, S + whole, HOST + S + late + whole), 0);
    }

    #[test]
    fn a_clock_that_is_far_behind_jumps() {
        let clock = WallClock::new();
        clock.sample(0, sample(HOST, 0)).unwrap();
        assert_eq!(
            clock.sample(S, sample(HOST + 3600 * S, S)),
            Ok(Adjustment::Stepped(3599 * S))
        );
        assert_eq!(clock.utc(S), utc(HOST + 3600 * S));
        assert_eq!(clock.status().steps, 1);
    }

    #[test]
    fn sync_makes_a_clock_jump_that_is_behind_by_anything() {
        let clock = WallClock::new();
        clock.sample(0, sample(HOST, 0)).unwrap();
        assert_eq!(
            clock.sample(S, sync(HOST + S + 1, S)),
            Ok(Adjustment::Stepped(1))
        );
        assert_eq!(clock.utc(S), utc(HOST + S + 1));
    }

    #[test]
    fn a_clock_that_is_ahead_runs_slower_and_never_back() {
        for (ahead, shift) in [(S / 10, GENTLE_SHIFT), (3600 * S, FIRM_SHIFT)] {
            let clock = WallClock::new();
            clock.sample(0, sample(HOST + ahead, 0)).unwrap();
            let before = clock.utc(S).unwrap();
            // Even when the host says: set it.
            assert_eq!(
                clock.sample(S, sync(HOST + S, S)),
                Ok(Adjustment::Slower(ahead))
            );
            assert!(clock.utc(S).unwrap() > before);
            let half = (ahead / 2) << shift;
            assert_eq!(
                error(&clock, S + half, HOST + S + half),
                i128::from(ahead / 2)
            );
            let whole = ahead << shift;
            assert_eq!(error(&clock, S + whole, HOST + S + whole), 0);
        }
    }

    #[test]
    fn a_sample_older_than_the_newest_is_ignored() {
        let clock = WallClock::new();
        clock.sample(9 * S, sample(HOST, 5 * S)).unwrap();
        assert_eq!(
            clock.sample(9 * S, sync(HOST + 77 * S, 5 * S - 1)),
            Err(Refusal::Old)
        );
        assert_eq!(clock.utc(9 * S), utc(HOST + 4 * S));
        let status = clock.status();
        assert_eq!((status.samples, status.old, status.refused), (1, 1, 0));
        assert_eq!(status.last_sample, Some(5 * S));
    }

    #[test]
    fn absurd_samples_are_refused_and_counted() {
        let clock = WallClock::new();
        for (host_time, reference_time, refusal) in [
            (0, 0, Refusal::TooEarly),
            (UNIX_EPOCH - 1, 0, Refusal::TooEarly),
            (UNIX_EPOCH + YEAR_10000, 0, Refusal::TooLate),
            (u64::MAX, 0, Refusal::TooLate),
            (HOST, S + SKEW + 1, Refusal::FromTheFuture),
            (HOST, u64::MAX, Refusal::FromTheFuture),
        ] {
            assert_eq!(
                clock.sample(S, sync(host_time, reference_time)),
                Err(refusal)
            );
        }
        assert_eq!(clock.utc(S), None);
        assert_eq!(clock.status().refused, 6);
        for host_time in [UNIX_EPOCH + 1, UNIX_EPOCH + YEAR_10000 - 1] {
            let clock = WallClock::new();
            clock.sample(S, sync(host_time, S)).unwrap();
            assert_eq!(clock.utc(S), utc(host_time));
        }
    }

    /// Readers on other processors, while the clock is steered to and fro: nobody sees half of a line, and nobody sees time
    /// go back.
    #[test]
    fn readers_meanwhile_see_whole_lines_and_no_step_back() {
        let clock = WallClock::new();
        let now = AtomicU64::new(S);
        clock.sample(S, sample(HOST + S, S)).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut last = Duration::ZERO;
                        let mut count = 0u64;
                        while !done.load(Ordering::Relaxed) || count == 0 {
                            let next = clock.utc(now.load(Ordering::SeqCst)).unwrap();
                            assert!(next > last);
                            last = next;
                            count += 1;
                        }
                        (last, count)
                    })
                })
                .collect();
            for round in 0..20_000u64 {
                let at = now.fetch_add(S, Ordering::SeqCst) + S;
                // A second ahead, then right again.
                let off = (round % 2) * S;
                clock.sample(at, sync(HOST + at + off, at)).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            let readings: Vec<_> = readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .collect();
            // Half of a line would have shown another year. That no two readings are equal makes each 25 ns late at most.
            let latest = utc(HOST + now.load(Ordering::SeqCst) + S).unwrap();
            let count: u64 = readings.iter().map(|&(_, count)| count).sum();
            for (last, _) in readings {
                assert!(last <= latest + Duration::from_nanos(25 * count));
            }
        });
    }

    #[derive(Clone, Debug)]
    enum Step {
        Read,
        Wait(u64),
        Sample { age: u64, off: i64, sync: bool },
        Garbage { host_time: u64, reference_time: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let off = prop_oneof![
            -20_000_000..20_000_000i64,
            -2_000_000..2_000_000i64,
            any::<i64>().prop_map(|off| off / 8),
            Just(0),
        ];
        let wait = prop_oneof![0..4u64, 0..100 * S, 0..1_000_000 * S];
        prop_oneof![
            3 => Just(Step::Read),
            2 => wait.prop_map(Step::Wait),
            3 => (0..3 * S, off, any::<bool>())
                .prop_map(|(age, off, sync)| Step::Sample { age, off, sync }),
            1 => (any::<u64>(), any::<u64>())
                .prop_map(|(host_time, reference_time)| Step::Garbage { host_time, reference_time }),
        ]
    }

    proptest! {
        /// Whatever the host says and whenever the clock is read: every reading is later than the one before, also
        /// right before and after each sample.
        #[test]
        fn the_clock_never_goes_back(steps in prop::collection::vec(step(), 1..60)) {
            let clock = WallClock::new();
            let mut now = 10 * S;
            let mut last = None;
            let mut read = |clock: &WallClock, now| {
                let next = clock.utc(now);
                prop_assert!(next > last || next.is_none(), "{last:?}, then {next:?} at {now}");
                last = next;
                Ok(())
            };
            for step in steps {
                read(&clock, now)?;
                let (host_time, reference_time, sync) = match step {
                    Step::Read => continue,
                    Step::Wait(time) => {
                        now += time;
                        continue;
                    }
                    Step::Sample { age, off, sync } => {
                        let reference_time = now.saturating_sub(age);
                        let host_time = (HOST + reference_time).saturating_add_signed(off);
                        (host_time, reference_time, sync)
                    }
                    Step::Garbage { host_time, reference_time } => (host_time, reference_time, true),
                };
                let _ = clock.sample(now, Sample { host_time, reference_time, sync });
                read(&clock, now)?;
            }
        }

    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// A host that keeps to one straight line from some moment on is believed in the end, to the unit, after whatever
        /// came before.
        #[test]
        fn the_clock_comes_to_show_what_the_host_shows(
            steps in prop::collection::vec(step(), 0..30),
            period in 30 * S..600 * S,
        ) {
            let clock = WallClock::new();
            let mut now = 10 * S;
            for step in steps {
                match step {
                    Step::Wait(time) => now += time,
                    Step::Sample { age, off, sync } => {
                        let reference_time = now.saturating_sub(age);
                        // Within a day of the truth: half speed makes up for that in two.
                        let host_time = (HOST + reference_time)
                            .saturating_add_signed(off % (86_400 * SECOND));
                        let _ = clock.sample(now, Sample { host_time, reference_time, sync });
                    }
                    Step::Read => drop(clock.utc(now)),
                    Step::Garbage { .. } => {}
                }
            }
            let mut errors = Vec::new();
            // Two days for what is more than gentle, 256 s for the rest, from whatever sample on.
            let end = now + 2 * 86_400 * S + 512 * S + 2 * period;
            while now < end {
                clock.sample(now, sample(HOST + now, now)).unwrap();
                errors.push(error(&clock, now, HOST + now).abs());
                now += period;
            }
            prop_assert!(errors.windows(2).all(|pair| pair[1] <= pair[0]), "the error grows");
            prop_assert_eq!(error(&clock, now, HOST + now), 0);
        }
    }
}
