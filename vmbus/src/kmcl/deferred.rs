//! The channels that want the dispatcher at PASSIVE: one bit each.

use crate::atomics::{AtomicU64, Ordering};
use crate::ids::ChannelId;

const WORDS: usize = (ChannelId::MAX as usize + 1) / 64;

/// A set of channel numbers that any VP adds to at any level, without a lock.
pub(super) struct Deferred {
    words: [AtomicU64; WORDS],
}

impl Deferred {
    pub(super) fn new() -> Self {
        Self {
            words: core::array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    /// Adds a channel. Whoever takes it out sees what was done before; request work after this.
    pub(super) fn add(&self, id: ChannelId) {
        let word = id.index().and_then(|index| self.words.get(index / 64));
        if let Some(word) = word {
            word.fetch_or(1 << (id.0 % 64), Ordering::AcqRel);
        }
    }

    /// Takes out every channel that was in the set when its word was looked at, and runs `serve` for each.
    ///
    /// One at a time: when a driver waits in `serve`, whoever serves the stack meanwhile finds the others still
    /// here. One that is added meanwhile, itself perhaps, is left for the next call.
    pub(super) fn serve_each(&self, mut serve: impl FnMut(ChannelId)) {
        for (word, base) in self.words.iter().zip((0u32..).step_by(64)) {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != 0 {
                let bit = bits.trailing_zeros();
                bits &= bits - 1;
                if word.fetch_and(!(1 << bit), Ordering::AcqRel) & (1 << bit) != 0 {
                    serve(ChannelId(base + bit));
                }
            }
        }
    }
}
