//! The transaction quota: how many packets the driver holds, and whether delivery waits for one of them.

use crate::atomics::{AtomicU32, Ordering};

/// Set while delivery waits. The bits below count packets.
const STARVED: u32 = 1 << 31;

/// The most packets that a quota can allow.
pub(super) const MAX: u32 = STARVED - 1;

/// Count and waiting mark in one atomic word: a completion either comes before the mark, and then whoever sets
/// it sees the lower count, or after it, and then it sees the mark.
pub(super) struct Quota {
    limit: AtomicU32,
    state: AtomicU32,
}

impl Quota {
    pub(super) fn new(limit: u32) -> Self {
        Self {
            limit: AtomicU32::new(limit.clamp(1, MAX)),
            state: AtomicU32::new(0),
        }
    }

    pub(super) fn set_limit(&self, limit: u32) {
        self.limit.store(limit.clamp(1, MAX), Ordering::Relaxed);
    }

    /// Packets that the driver holds.
    pub(super) fn held(&self) -> u32 {
        self.state.load(Ordering::Acquire) & !STARVED
    }

    /// Whether one more may be delivered.
    pub(super) fn admits(&self) -> bool {
        self.held() < self.limit.load(Ordering::Relaxed)
    }

    /// Counts a packet that the driver keeps.
    pub(super) fn hold(&self) {
        self.state.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts a kept packet as completed. `true`: delivery waits for that, and must be run again.
    pub(super) fn complete(&self) -> bool {
        let before = self.state.fetch_sub(1, Ordering::AcqRel);
        before & STARVED != 0 && self.take_mark()
    }

    /// A place for one more packet, if the quota admits it and `find` has one. If not, delivery is marked as waiting:
    /// whoever completes a packet or gives a place back after that learns of it, and what was done before is seen here.
    pub(super) fn admit<T>(&self, mut find: impl FnMut() -> Option<T>) -> Option<T> {
        let mut admit = || if self.admits() { find() } else { None };
        if let Some(place) = admit() {
            return Some(place);
        }
        self.state.fetch_or(STARVED, Ordering::AcqRel);
        let place = admit()?;
        self.take_mark();
        Some(place)
    }

    /// Whether delivery waits. Takes the mark away, so that one caller runs it again.
    pub(super) fn take_starved(&self) -> bool {
        self.state.load(Ordering::Acquire) & STARVED != 0 && self.take_mark()
    }

    fn take_mark(&self) -> bool {
        self.state.fetch_and(!STARVED, Ordering::AcqRel) & STARVED != 0
    }
}
