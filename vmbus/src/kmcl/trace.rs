//! What a channel does, as log records of level trace whose target is the channel's friendly name: with the
//! feature `trace`. Without it there is nothing left of this in the program.
//!
//! The events are those of KMCL's own ETW provider (spec kmcl.md 0, T).

use super::channel::Shared;

/// A record about a channel.
macro_rules! record {
    ($shared:expr, $($what:tt)+) => {
        if cfg!(feature = "trace") {
            log::trace!(target: &*$shared.config.friendly_name, $($what)+);
        }
    };
}

/// A packet has been read from the ring.
#[inline(always)]
pub(super) fn fetched(shared: &Shared, is_completion: bool, transaction: u64) {
    record!(
        shared,
        "packet fetched: completion={is_completion} transaction={transaction:#x}"
    );
}

/// Packets have been written to the ring.
#[inline(always)]
pub(super) fn sent(shared: &Shared, packets: u64) {
    record!(shared, "packets sent: {packets}");
}

/// The dispatcher reads no further for now.
#[inline(always)]
pub(super) fn fetch_ended(shared: &Shared, fetched: u32, maximum: u32) {
    record!(shared, "fetch ended: packets={fetched} maximum={maximum}");
}

/// The driver holds as many packets as its quota allows.
#[inline(always)]
pub(super) fn quota_hit(shared: &Shared) {
    record!(shared, "quota hit: outstanding={}", shared.quota.held());
}

/// The packets of a batch, or the time at DISPATCH, are used up.
#[inline(always)]
pub(super) fn budget_hit(shared: &Shared) {
    record!(shared, "budget hit");
}
