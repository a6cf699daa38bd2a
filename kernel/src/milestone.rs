//! Milestones of the boot: when the kernel got where, at a cost of one time stamp each.
//!
//! The first are reached before there is a clock. All are kept as time stamps and turned into reference time
//! when somebody asks, by two moments at which both are known.

use core::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};

use spin::Once;

use crate::arch::{cpu, port};
use crate::hyperv::clock;

/// The most milestones that are kept.
const MAX: usize = 16;

static NAMES: [Once<&'static str>; MAX] = [const { Once::new() }; MAX];
static STAMPS: [AtomicU64; MAX] = [const { AtomicU64::new(0) }; MAX];
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A moment at which both clocks were read.
static ANCHOR: Once<(u64, u64)> = Once::new();

/// The port for marks; 0 = none.
static MARK_PORT: AtomicU16 = AtomicU16::new(0);

/// A milestone that a test machine can see from outside, by a byte on the `mark=` port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Mark {
    /// Kernel code has begun.
    Entry = 1,
    /// `main` is about to run.
    Main = 2,
    /// The balloon's channel is open.
    Balloon = 3,
}

/// A milestone that was reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Milestone {
    /// What was reached.
    pub name: &'static str,
    /// When: units of 100 ns of reference time.
    pub at: u64,
}

/// Sets the port that [`mark`] writes to.
pub(crate) fn set_mark_port(port: u16) {
    MARK_PORT.store(port, Ordering::Relaxed);
}

/// Shows a mark to whoever watches the machine from outside.
pub(crate) fn mark(mark: Mark) {
    let number = MARK_PORT.load(Ordering::Relaxed);
    if number != 0 {
        port::write_u8(number, mark as u8);
    }
}

/// Notes that a milestone was reached. Beyond the sixteenth nothing is noted.
pub fn reached(name: &'static str) {
    let index = COUNT.fetch_add(1, Ordering::Relaxed);
    if let (Some(slot), Some(stamp)) = (NAMES.get(index), STAMPS.get(index)) {
        stamp.store(cpu::time_stamp(), Ordering::Relaxed);
        slot.call_once(|| name);
    }
}

/// Reads both clocks once, as soon as there are two.
pub(crate) fn anchor() {
    ANCHOR.call_once(|| (cpu::time_stamp(), clock::now()));
}

/// The milestones so far, in the order in which they were reached.
///
/// Call it no sooner than some hundred microseconds after the clock began: the rate between
/// the clocks comes from what has passed since.
pub fn all() -> impl Iterator<Item = Milestone> {
    let (stamp, time) = ANCHOR.get().copied().unwrap_or_default();
    let (stamp_now, time_now) = (cpu::time_stamp(), clock::now());
    let stamps = u128::from(stamp_now.saturating_sub(stamp)).max(1);
    let times = u128::from(time_now.saturating_sub(time));
    let scale = move |stamps_between: u64| {
        u64::try_from(u128::from(stamps_between) * times / stamps).unwrap_or(u64::MAX)
    };
    NAMES.iter().zip(&STAMPS).map_while(move |(name, at)| {
        let name = *name.get()?;
        let at = at.load(Ordering::Relaxed);
        let at = if at >= stamp {
            time.saturating_add(scale(at - stamp))
        } else {
            time.saturating_sub(scale(stamp - at))
        };
        Some(Milestone { name, at })
    })
}
