//! What a controller and its units have done, counted; to be read at any time.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use super::scsi::{Outcome, Sense};

/// Declares counters, and what they said at one moment.
macro_rules! counters {
    ($(#[$about:meta])* $live:ident / $counts:ident { $($(#[$doc:meta])* $field:ident,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        pub(super) struct $live { $(pub(super) $field: Counter,)+ }

        $(#[$about])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct $counts { $($(#[$doc])* pub $field: u64,)+ }

        impl $live {
            /// What they say now.
            pub(super) fn read(&self) -> $counts {
                $counts { $($field: self.$field.get(),)+ }
            }
        }

        impl $counts {
            /// Each counter with its name.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($field), self.$field),)+].into_iter()
            }
        }
    };
}

/// A number that grows.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, number: u64) {
        self.0.fetch_add(number, Ordering::Relaxed);
    }

    pub(super) fn one(&self) {
        self.add(1);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

counters! {
    /// What a controller has done with packets.
    Packets / PacketCounts {
        /// Packets that came from the guest.
        packets,
        /// SCSI commands among them.
        commands,
        /// Packets that are wrong in themselves.
        malformed,
        /// Packets at the wrong time, or that no guest sends.
        refused,
        /// Packets that asked for no answer and were dropped.
        unanswerable,
        /// Commands for units that are not there.
        no_unit,
        /// Resets.
        resets,
        /// Answers sent.
        answers,
        /// Times that the ring had no room for an answer.
        ring_full,
        /// Times that as many commands were under way as may be.
        held_back,
        /// Notices sent unasked.
        notices,
        /// Rings that were broken.
        broken_rings,
    }
}

counters! {
    /// What a unit has done.
    Unit / UnitCounts {
        /// READ commands.
        reads,
        /// WRITE commands.
        writes,
        /// Bytes given to the guest by READ.
        read_bytes,
        /// Bytes taken from the guest by WRITE.
        written_bytes,
        /// Flushes of the disk.
        flushes,
        /// UNMAP commands.
        unmaps,
        /// Bytes given back by UNMAP.
        unmapped_bytes,
        /// Other commands.
        others,
        /// Commands that the guest's buffer was too small for.
        overruns,
        /// Commands whose memory could not be used, or that contradict themselves.
        invalid,
        /// Commands given up because of a reset or because the unit went.
        stopped,
        /// Commands that found the unit or its medium not ready.
        not_ready,
        /// Commands that found a damaged sector.
        medium_errors,
        /// Commands that failed inside of the host.
        hardware_errors,
        /// Commands that make no sense.
        illegal_requests,
        /// Unit attention conditions told.
        unit_attentions,
        /// Writes to what cannot be written, or has no room.
        data_protect,
        /// Commands that failed in another way.
        other_errors,
    }
}

impl Unit {
    /// Counts how a command ended.
    pub(super) fn ended(&self, outcome: &Outcome) {
        match outcome {
            Outcome::Good(_) => {}
            Outcome::Overrun(_) => self.overruns.one(),
            Outcome::Invalid => self.invalid.one(),
            Outcome::Stopped(_) => self.stopped.one(),
            Outcome::Check(sense) => self.failed(sense),
        }
    }

    fn failed(&self, sense: &Sense) {
        match sense.key.0 {
            0x2 => &self.not_ready,
            0x3 => &self.medium_errors,
            0x4 => &self.hardware_errors,
            0x5 => &self.illegal_requests,
            0x6 => &self.unit_attentions,
            0x7 => &self.data_protect,
            _ => &self.other_errors,
        }
        .one();
    }
}

/// What a controller has done, and each of its units.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// With packets.
    pub packets: PacketCounts,
    /// Commands under way now.
    pub in_flight: u64,
    /// Each unit, with its number.
    pub units: Vec<(u8, UnitCounts)>,
}
