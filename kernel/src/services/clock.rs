//! The wall clock: UTC as the host tells it, steered over the reference clock.
//!
//! For the time since the machine began, which needs no host, there is `embassy_time::Instant`.

use core::time::Duration;

use alloc::sync::Arc;
use spin::Once;
use vmbus::drivers::time_sync::{TimeSync, TimeSyncStatus};
use vmbus::drivers::wall_clock::WallClock;

use crate::hyperv::clock;

static DRIVER: Once<&'static TimeSync> = Once::new();
static CLOCK: Once<Arc<WallClock>> = Once::new();

/// The machine's wall clock. Copies are the same.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    _one: (),
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { _one: () }
    }

    /// UTC now, as the time since the Unix epoch; `None` while the host has not told it yet. Every reading is
    /// later than all before it. Callable at any level, takes no lock.
    pub fn utc(self) -> Option<Duration> {
        CLOCK.get()?.utc(clock::now())
    }

    /// How time synchronization stands. At PASSIVE.
    pub fn status(self) -> Option<TimeSyncStatus> {
        DRIVER.get().map(|driver| driver.status())
    }
}

/// The driver has been started.
pub(crate) fn init(driver: &'static TimeSync) {
    CLOCK.call_once(|| driver.clock().clone());
    DRIVER.call_once(|| driver);
}
