//! Work that one at a time does, and for which nobody waits: who comes second leaves a mark, and the first goes on.

use core::hint;
use core::ops::ControlFlow;

use crate::atomics::{AtomicU8, Mutex, Ordering};

/// Nobody works.
const FREE: u8 = 0;
/// Somebody works.
const TAKEN: u8 = 1;
/// Somebody works, and somebody else has come meanwhile.
const ASKED: u8 = 2;

/// A value that whoever has the turn works on.
///
/// The turn is one atomic word that is only ever accessed by read-modify-write: of two that meet, one sees the
/// other, and sees what the other did before. The lock gives safe access to the value and is never contended.
pub(crate) struct Turn<T> {
    state: AtomicU8,
    value: Mutex<T>,
}

/// What came of a turn.
pub(crate) struct Taken<R> {
    /// The result of the work.
    pub(crate) result: R,
    /// Whether somebody has come meanwhile and was turned away. See to it that it is not forgotten.
    pub(crate) asked: bool,
}

impl<T> Turn<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            state: AtomicU8::new(FREE),
            value: Mutex::new(value),
        }
    }

    /// Runs `work`, and again for as long as somebody has come meanwhile. Returns at once when the turn is
    /// taken; then the one who has it works once more after this call.
    ///
    /// `work` ends it by breaking off, and must then see to it that this is called again.
    pub(crate) fn run(&self, mut work: impl FnMut(&mut T) -> ControlFlow<()>) {
        if !self.take_or_ask() {
            return;
        }
        loop {
            if work(&mut self.value.lock()).is_break() {
                self.free();
                return;
            }
            let done =
                self.state
                    .compare_exchange(TAKEN, FREE, Ordering::AcqRel, Ordering::Relaxed);
            if done.is_ok() {
                return;
            }
            // The mark goes before the work begins that answers it.
            self.state.swap(TAKEN, Ordering::AcqRel);
        }
    }

    /// Runs `work` once if the turn is free, else leaves a mark.
    pub(crate) fn enter<R>(&self, work: impl FnOnce(&mut T) -> R) -> Option<Taken<R>> {
        self.take_or_ask().then(|| self.once(work))
    }

    /// Runs `work` once, as soon as the turn is free. At PASSIVE, and not for the one who has the turn.
    pub(crate) fn wait<R>(&self, work: impl FnOnce(&mut T) -> R) -> Taken<R> {
        while !self.take() {
            hint::spin_loop();
        }
        self.once(work)
    }

    fn once<R>(&self, work: impl FnOnce(&mut T) -> R) -> Taken<R> {
        let result = work(&mut self.value.lock());
        Taken {
            result,
            asked: self.free(),
        }
    }

    fn take(&self) -> bool {
        self.state
            .compare_exchange(FREE, TAKEN, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    fn take_or_ask(&self) -> bool {
        if self.take() {
            return true;
        }
        if self.state.swap(ASKED, Ordering::AcqRel) != FREE {
            return false;
        }
        // It was freed in between, so the turn is ours, and so is the mark.
        self.state.swap(TAKEN, Ordering::AcqRel);
        true
    }

    /// Frees the turn, and tells whether there was a mark.
    fn free(&self) -> bool {
        self.state.swap(FREE, Ordering::AcqRel) == ASKED
    }
}
