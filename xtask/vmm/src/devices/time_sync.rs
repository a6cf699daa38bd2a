//! Time synchronization: the guest is told the time of the system that the machine runs on.

use vmbus_host::integration::{SystemClock, TimeSync};

use super::counted;
use super::integration::Integration;

/// Units of 100 ns in a millisecond.
const MILLISECOND: i64 = 10_000;

pub(super) fn build() -> Integration<TimeSync> {
    let component = TimeSync::with_clock(SystemClock);
    Integration::new(component, |time| {
        let status = time.status();
        counted([("syncs", status.syncs), ("samples", status.samples)])
    })
}

impl Integration<TimeSync> {
    /// Moves the clock that the guest is told.
    pub(super) fn step(&self, milliseconds: i64) {
        self.handle.step(milliseconds.saturating_mul(MILLISECOND));
    }
}
