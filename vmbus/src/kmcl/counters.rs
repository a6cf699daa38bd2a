//! What a channel counts, with the feature `counters`, which is on by default. Without it nothing is counted, nothing is stored,
//! and every counter reads as zero.

#[cfg(feature = "counters")]
use core::sync::atomic::{AtomicU64, Ordering};

/// Declares the counters twice: live, and as read.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// The counters of a channel since it was enabled; all zeros without the feature `counters`.
        #[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)+
        }

        impl Counters {
            /// Every counter by name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),+].into_iter()
            }
        }

        /// Counters that are being counted.
        #[derive(Default)]
        pub(crate) struct Live {
            $(pub(super) $name: Count,)+
        }

        impl Live {
            pub(crate) fn read(&self) -> Counters {
                Counters { $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    /// Data packets delivered to the driver.
    packets_received,
    /// Completions that the host sent for packets of ours.
    completions_received,
    /// Batches of the dispatcher in which something was there.
    batches,
    /// Packets written to the ring, completions of ours included.
    packets_sent,
    /// Signals to the host by hypercall.
    signals_sent,
    /// Signals to the host through the monitor page.
    signals_monitored,
    /// Writes to the ring after which no signal was due.
    signals_suppressed,
    /// Packets that the driver deferred to PASSIVE.
    deferrals,
    /// Batches that ended because the driver holds as many packets as its quota allows.
    quota_stops,
    /// Batches that ended because their budget was spent.
    budget_stops,
    /// Batches at DISPATCH that ended, or did not begin, because the channel's allowable share of the time was used up.
    cpu_budget_stops,
    /// Times that a packet had to wait because the ring was full.
    ring_full_waits,
    /// Interrupts that found nothing to do.
    spurious_events,
    /// Completions whose transaction id belongs to no packet of ours; they are dropped.
    unknown_completions,
    /// Requests that were given up before their answer came.
    cancelled_requests,
    /// Completions for requests that had been given up; they are dropped.
    late_completions,
    /// GPADLs that the driver left when its closed callback returned: bugs of the driver.
    leaked_gpadls,
    /// Received packets that the driver dropped without completing them: bugs of the driver.
    uncompleted_drops,
}

/// One counter.
#[cfg(feature = "counters")]
#[derive(Default)]
pub(crate) struct Count(AtomicU64);

/// What is left of a counter: nothing.
#[cfg(not(feature = "counters"))]
#[derive(Default)]
pub(crate) struct Count;

#[cfg(feature = "counters")]
impl Count {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(not(feature = "counters"))]
impl Count {
    pub(super) fn add(&self, _: u64) {}

    fn get(&self) -> u64 {
        0
    }
}

#[cfg(not(feature = "counters"))]
const _: () = assert!(size_of::<Live>() == 0);
