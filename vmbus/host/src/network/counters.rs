//! What a network card counts.

use core::sync::atomic::{AtomicU64, Ordering};

/// Declares the counters twice: live, and as read.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// The counters of a network card since it was made.
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
        #[derive(Default, Debug)]
        pub(super) struct Live {
            $(pub(super) $name: Count,)+
        }

        impl Live {
            /// All of them, now.
            pub(super) fn read(&self) -> Counters {
                Counters { $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    /// Frames of the guest that the network took.
    sent_frames,
    /// Bytes of them.
    sent_bytes,
    /// Frames of the guest that went nowhere: the link was down.
    sent_link_down,
    /// Frames of the guest that the network did not take in time.
    sent_dropped,
    /// NVSP packets whose RNDIS messages made no sense, or came before INITIALIZE.
    sent_invalid,
    /// Frames whose offload could not be done: they are not what the guest says.
    sent_not_applicable,
    /// Frames that were cut by large send offload.
    large_sends,
    /// Frames that the network delivered and the guest got.
    received_frames,
    /// Bytes of them.
    received_bytes,
    /// Frames that the guest's packet filter or VLAN keeps out, or that came while the link was down.
    received_filtered,
    /// Frames longer than the guest's MTU.
    received_oversized,
    /// Frames that the guest had no room for in time.
    received_dropped,
    /// RNDIS messages other than frames.
    control_messages,
    /// Transfer-page packets that the guest has not completed yet, counted when they are sent.
    transfers_sent,
    /// Those that it has completed.
    transfers_completed,
    /// Completions of packets that the host does not know.
    stray_completions,
    /// Times that the guest broke the protocol such that its channel is served no longer.
    protocol_errors,
}

/// One counter.
#[derive(Default, Debug)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(super) fn one(&self) {
        self.add(1);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
