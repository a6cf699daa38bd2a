//! Partition reference time: the one clock, in units of 100 ns since the partition was made (TLFS,
//! Timers; spec tlfs.md 7).
//!
//! Two sources give the same time: the reference TSC page, which costs a few instructions, and the
//! counter MSR, which is a VM exit. The page may be missing, or become unusable at any time when
//! the VM moves; then the counter takes over until the page is good again.

#![forbid(unsafe_code)]

use core::fmt;
use core::mem::offset_of;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

use super::features::{Features, Privileges};
use super::instructions::ordered_tsc;
use super::msr;
use super::overlay::{Page, Published};

/// Units of reference time in a second.
pub const PER_SECOND: u64 = 10_000_000;

static COUNTER_OFFERED: AtomicBool = AtomicBool::new(false);
static PAGE: Published<TscPage> = Published::empty();
static LATEST: Latest = Latest::new();

/// Starts the clock. With `page`, and where the hypervisor offers it, [`now`] reads the reference
/// TSC page. May be called early without a page and again with one.
pub fn init(features: &Features, page: Option<Page>) {
    COUNTER_OFFERED.store(
        features.privileges.contains(Privileges::REFERENCE_COUNTER),
        Ordering::Relaxed,
    );
    if let Some(page) = page
        && features.privileges.contains(Privileges::REFERENCE_TSC)
    {
        PAGE.publish(page.enable::<TscPage>(msr::REFERENCE_TSC).contents());
    }
}

/// The time, in units of 100 ns. Callable anywhere, takes no lock; with the page it costs the
/// page's arithmetic and one locked instruction. Zero before [`init`].
///
/// Never goes back, on one VP or from one VP to another, even when the source changes: the
/// two sources may differ by a little.
pub fn now() -> u64 {
    LATEST.no_earlier_than(read())
}

fn read() -> u64 {
    if let Some(page) = PAGE.get()
        && let Some(time) = read_page(page, ordered_tsc)
    {
        time
    } else if COUNTER_OFFERED.load(Ordering::Relaxed) {
        msr::TIME_REF_COUNT.read()
    } else {
        0
    }
}

/// Where [`now`] gets the time from at this moment.
pub fn source() -> Source {
    if PAGE.get().is_some_and(|page| page.sequence().is_some()) {
        Source::TscPage
    } else if COUNTER_OFFERED.load(Ordering::Relaxed) {
        Source::Counter
    } else {
        Source::None
    }
}

/// Where the time comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The clock does not run.
    None,
    /// The reference TSC page.
    TscPage,
    /// The reference counter MSR, a VM exit each time.
    Counter,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::TscPage => "reference TSC page",
            Self::Counter => "reference counter MSR",
        })
    }
}

/// How fast the processor's own counters run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Frequencies {
    /// Time stamp counter, in Hz.
    pub tsc: u64,
    /// APIC timer, in Hz.
    pub apic: u64,
}

/// Asks the hypervisor how fast the processor's counters run, if it tells. Two VM exits.
pub fn frequencies(features: &Features) -> Option<Frequencies> {
    features.frequencies().then(|| Frequencies {
        tsc: msr::TSC_FREQUENCY.read(),
        apic: msr::APIC_FREQUENCY.read(),
    })
}

/// The reference TSC page, as the hypervisor fills it.
#[repr(C)]
pub(super) struct TscPage {
    sequence: AtomicU32,
    reserved: AtomicU32,
    scale: AtomicU64,
    offset: AtomicU64,
    rest: [AtomicU8; 4072],
}

const _: () = {
    assert!(offset_of!(TscPage, scale) == 8);
    assert!(offset_of!(TscPage, offset) == 16);
    assert!(size_of::<TscPage>() == 4096);
};

/// A page that has another sequence number each time is not worth more attempts.
const ATTEMPTS: u32 = 100;

/// What the page says, one field at a time.
trait TimePage {
    /// The sequence number, if the rest of the page is good. What is read after it is no older.
    fn sequence(&self) -> Option<u32>;
    /// Time per TSC tick as a 64.64 fraction's lower half, in units of 100 ns.
    fn scale(&self) -> u64;
    /// What to add, in units of 100 ns, in two's complement.
    fn offset(&self) -> u64;
}

impl TimePage for TscPage {
    fn sequence(&self) -> Option<u32> {
        match self.sequence.load(Ordering::Acquire) {
            // 0 says "do not use"; on hosts before 2012 R2 all ones did.
            0 | u32::MAX => None,
            sequence => Some(sequence),
        }
    }

    fn scale(&self) -> u64 {
        self.scale.load(Ordering::Relaxed)
    }

    fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }
}

/// The time by the page, if the page is good: the same sequence number before and after.
fn read_page<P: TimePage>(page: &P, tsc: impl Fn() -> u64) -> Option<u64> {
    for _ in 0..ATTEMPTS {
        let before = page.sequence()?;
        let (tsc, scale, offset) = (tsc(), page.scale(), page.offset());
        fence(Ordering::Acquire);
        if page.sequence() == Some(before) {
            return Some(scaled(tsc, scale).wrapping_add(offset));
        }
    }
    None
}

/// The upper half of the 128-bit product.
const fn scaled(tsc: u64, scale: u64) -> u64 {
    ((tsc as u128 * scale as u128) >> 64) as u64
}

/// The latest time that anyone was told.
struct Latest(AtomicU64);

impl Latest {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// `time`, or the latest time told if that is later.
    fn no_earlier_than(&self, time: u64) -> u64 {
        // The look saves the locked exchange whenever less than a unit has passed.
        let latest = self.0.load(Ordering::Relaxed);
        if time <= latest {
            latest
        } else {
            self.0.fetch_max(time, Ordering::Relaxed).max(time)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use proptest::prelude::*;

    use super::*;

    /// One state of the page.
    #[derive(Clone, Copy, Debug)]
    struct State {
        sequence: u32,
        scale: u64,
        offset: u64,
    }

    /// A page whose host writes a field at any time between two reads, always sequence first
    /// invalid, then the rest, then the new sequence.
    struct Moving<'a> {
        now: RefCell<State>,
        steps: RefCell<&'a [(bool, State)]>,
        stage: Cell<u8>,
    }

    impl<'a> Moving<'a> {
        fn new(first: State, steps: &'a [(bool, State)]) -> Self {
            Self {
                now: first.into(),
                steps: steps.into(),
                stage: 0.into(),
            }
        }

        fn step(&self) {
            let steps = *self.steps.borrow();
            let Some((&(act, next), rest)) = steps.split_first() else {
                return;
            };
            if !act {
                *self.steps.borrow_mut() = rest;
                return;
            }
            let mut now = self.now.borrow_mut();
            match self.stage.get() {
                0 => now.sequence = 0,
                1 => now.scale = next.scale,
                2 => now.offset = next.offset,
                _ => {
                    now.sequence = next.sequence;
                    *self.steps.borrow_mut() = rest;
                }
            }
            self.stage.set((self.stage.get() + 1) % 4);
        }
    }

    impl TimePage for Moving<'_> {
        fn sequence(&self) -> Option<u32> {
            self.step();
            Some(self.now.borrow().sequence).filter(|&sequence| sequence != 0)
        }

        fn scale(&self) -> u64 {
            self.step();
            self.now.borrow().scale
        }

        fn offset(&self) -> u64 {
            self.step();
            self.now.borrow().offset
        }
    }

    fn time(state: State, tsc: u64) -> u64 {
        scaled(tsc, state.scale).wrapping_add(state.offset)
    }

    proptest! {
        /// Whatever the host does meanwhile, the time belongs to one state of the page, never to a
        /// mixture.
        #[test]
        fn time_is_never_of_two_states(
            tsc in any::<u64>(),
            states in proptest::collection::vec((any::<bool>(), any::<(u64, u64)>()), 1..12),
        ) {
            let states: Vec<_> = (1..)
                .zip(states)
                .map(|(sequence, (act, (scale, offset)))| (act, State { sequence, scale, offset }))
                .collect();
            let (first, rest) = states.split_first().unwrap();
            let page = Moving::new(first.1, rest);
            if let Some(result) = read_page(&page, || tsc) {
                prop_assert!(states.iter().any(|(_, state)| time(*state, tsc) == result));
            }
        }

        #[test]
        fn clock_never_goes_back(times in proptest::collection::vec(any::<u64>(), 1..100)) {
            let latest = Latest::new();
            let mut before = 0;
            for time in times {
                let told = latest.no_earlier_than(time);
                prop_assert!(told >= before && told >= time);
                prop_assert!(told == before || told == time);
                before = told;
            }
        }
    }

    #[test]
    fn clock_goes_back_for_no_vp() {
        let (latest, source) = (Latest::new(), AtomicU64::new(1_000));
        let vp = || {
            let mut before = 0;
            for step in 0..2_000_000_u64 {
                // Time goes on, but each reading is off by up to 7 units.
                let time =
                    source.fetch_add(1, Ordering::Relaxed) + step.wrapping_mul(0x9E37_79B9) % 8;
                let told = latest.no_earlier_than(time);
                assert!(told >= before, "{told} after {before}");
                before = told;
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(vp);
            scope.spawn(vp);
        });
    }

    #[test]
    fn quiet_page_gives_its_time_at_once() {
        // 10^7 * 2^64 / 2.5 GHz, one second of ticks, and an offset of minus one millisecond.
        let scale = ((u128::from(PER_SECOND) << 64) / 2_500_000_000) as u64;
        let state = State {
            sequence: 7,
            scale,
            offset: (-10_000_i64).cast_unsigned(),
        };
        let result = read_page(&Moving::new(state, &[]), || 2_500_000_000);
        // Rounding down costs at most one unit.
        assert!(result.unwrap().abs_diff(PER_SECOND - 10_000) <= 1);
    }

    #[test]
    fn unusable_pages_are_not_used() {
        let page = |sequence| TscPage {
            sequence: AtomicU32::new(sequence),
            reserved: AtomicU32::new(0),
            scale: AtomicU64::new(u64::MAX),
            offset: AtomicU64::new(5),
            rest: [const { AtomicU8::new(0) }; 4072],
        };
        assert_eq!(read_page(&page(0), || 100), None);
        assert_eq!(read_page(&page(u32::MAX), || 100), None);
        assert_eq!(read_page(&page(1), || 100), Some(99 + 5));
    }

    #[test]
    fn restless_page_is_given_up() {
        struct Restless(Cell<u32>);
        impl TimePage for Restless {
            fn sequence(&self) -> Option<u32> {
                self.0.set(self.0.get() + 1);
                Some(self.0.get())
            }
            fn scale(&self) -> u64 {
                1
            }
            fn offset(&self) -> u64 {
                0
            }
        }
        let page = Restless(0.into());
        assert_eq!(read_page(&page, || 1), None);
        assert_eq!(page.0.get(), ATTEMPTS * 2);
    }
}
