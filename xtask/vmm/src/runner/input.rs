//! What the user types, on its way to the guest's serial port: it waits until the guest reads.

use std::sync::{Condvar, Mutex, PoisonError};

/// Tells who feeds the guest that it has read something.
#[derive(Debug, Default)]
pub(super) struct Input {
    /// How often it has.
    drained: Mutex<u64>,
    changed: Condvar,
}

impl Input {
    /// The guest has read all that it was given, or there is another guest.
    pub(super) fn drained(&self) {
        *self.drained.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }

    /// Gives all of `bytes` by `give`, which says how many it took, and waits whenever that is not all.
    pub(super) fn feed(&self, bytes: &[u8], give: impl Fn(&[u8]) -> usize) {
        let mut rest = bytes;
        loop {
            let before = *self.drained.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = give(rest).min(rest.len());
            rest = rest.get(taken..).unwrap_or_default();
            if rest.is_empty() {
                return;
            }
            let mut drained = self.drained.lock().unwrap_or_else(PoisonError::into_inner);
            while *drained == before {
                drained = self
                    .changed
                    .wait(drained)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    #[test]
    fn what_the_guest_has_no_room_for_waits_until_it_has_read() {
        let input = Arc::new(Input::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (feeder, fifo) = (input.clone(), seen.clone());
        let thread = thread::spawn(move || {
            feeder.feed(b"abcdefgh", |bytes| {
                let taken = bytes.len().min(3);
                fifo.lock().unwrap().extend_from_slice(&bytes[..taken]);
                taken
            });
        });
        while !thread.is_finished() {
            input.drained();
            thread::yield_now();
        }
        thread.join().unwrap();
        assert_eq!(*seen.lock().unwrap(), b"abcdefgh");
    }
}
