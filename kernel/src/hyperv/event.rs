//! Event flags: one bit for each channel, set by the host, cleared by the guest (TLFS,
//! Inter-Partition Communication; spec tlfs.md 5.4).

#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

/// Flags of one SINT.
pub const FLAGS: usize = 2048;

/// The flags of one SINT, flag `n` in bit `n % 64` of word `n / 64`.
pub(super) type EventFlags = [AtomicU64; FLAGS / 64];

/// The SIEF page: the flags of each SINT.
#[repr(C)]
pub(super) struct EventPage {
    pub(super) flags: [EventFlags; 16],
}

const _: () = assert!(size_of::<EventPage>() == 4096);

/// Clears the flags that are set and calls `handle` with the number of each, lowest first. Returns
/// how many there were.
///
/// A flag is clear before its source is looked at, so a signal that comes in between sets it again.
pub(super) fn take(flags: &EventFlags, mut handle: impl FnMut(u16)) -> u32 {
    let mut count = 0;
    for (index, word) in (0_u16..).zip(flags) {
        // Most words are zero: look before the locked exchange.
        if word.load(Ordering::Relaxed) == 0 {
            continue;
        }
        let mut set = word.swap(0, Ordering::AcqRel);
        while set != 0 {
            handle(index * 64 + set.trailing_zeros() as u16);
            set &= set - 1;
            count += 1;
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use core::sync::atomic::AtomicBool;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn no_flags() -> EventFlags {
        [const { AtomicU64::new(0) }; FLAGS / 64]
    }

    /// Sets a flag as the specification counts: by byte and bit.
    fn signal(flags: &EventFlags, flag: u16) {
        let (byte, bit) = (flag / 8, flag % 8);
        let mask = 1_u64 << bit << (byte % 8 * 8);
        flags[usize::from(byte / 8)].fetch_or(mask, Ordering::SeqCst);
    }

    #[test]
    fn no_signal_is_lost_while_the_host_goes_on() {
        let flags = no_flags();
        let done = AtomicBool::new(false);
        let (mut raised, mut taken) = (0, 0);
        std::thread::scope(|scope| {
            let host = scope.spawn(|| {
                let mut raised = 0;
                for step in 0..3_000_000_u64 {
                    // All in one word, so that host and guest meet often.
                    let mask = 1 << (step % 64);
                    raised += u32::from(flags[1].fetch_or(mask, Ordering::SeqCst) & mask == 0);
                }
                done.store(true, Ordering::Release);
                raised
            });
            while !done.load(Ordering::Acquire) {
                taken += take(&flags, |flag| assert_eq!(flag / 64, 1));
            }
            raised = host.join().unwrap();
        });
        taken += take(&flags, |_| {});
        assert_eq!(taken, raised);
    }

    proptest! {
        #[test]
        fn visits_exactly_the_flags_that_are_set(set in proptest::collection::btree_set(0_u16..2048, 0..300)) {
            let flags = no_flags();
            set.iter().for_each(|&flag| signal(&flags, flag));
            let mut seen = Vec::new();
            let count = take(&flags, |flag| seen.push(flag));
            prop_assert_eq!(count as usize, set.len());
            prop_assert_eq!(seen, set.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(take(&flags, |_| unreachable!()), 0);
        }

        #[test]
        fn a_signal_during_the_scan_is_not_lost(
            set in proptest::collection::btree_set(0_u16..2048, 1..50),
            again in proptest::collection::vec(0_u16..2048, 0..50),
        ) {
            let flags = no_flags();
            set.iter().for_each(|&flag| signal(&flags, flag));
            let mut again = again.into_iter();
            let (mut raised, mut handled) = (BTreeSet::from_iter(set), BTreeSet::new());
            // Each source is served when its flag is seen; what is raised after that must be seen
            // later.
            while take(&flags, |flag| {
                raised.remove(&flag);
                handled.insert(flag);
                if let Some(next) = again.next() {
                    signal(&flags, next);
                    raised.insert(next);
                }
            }) > 0 {}
            prop_assert!(raised.is_empty(), "lost: {:?}", raised);
        }
    }
}
