//! The gate that virtual processors pass before they run guest code: open, closed, or closed for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use super::lock;

/// See above. Made closed.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// A copy of the state, for those inside: whether they may stay.
    stay: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    open: bool,
    /// The partition has ended: the gate does not open again.
    ended: bool,
    /// The threads are to end.
    quit: bool,
    inside: u32,
}

impl Gate {
    /// Waits until the gate is open and goes in. `false`: there is nothing to wait for, the thread is to end.
    pub fn enter(&self) -> bool {
        let mut state = lock(&self.state);
        while !state.open && !state.quit {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.quit {
            return false;
        }
        state.inside += 1;
        true
    }

    /// Goes out.
    pub fn leave(&self) {
        lock(&self.state).inside -= 1;
        self.changed.notify_all();
    }

    /// Whether who is inside may stay.
    pub fn may_stay(&self) -> bool {
        self.stay.load(Ordering::SeqCst)
    }

    /// Whether the gate is open.
    pub fn is_open(&self) -> bool {
        lock(&self.state).open
    }

    /// Opens it, unless the partition has ended. `true` if it was closed.
    pub fn open(&self) -> bool {
        self.change(|state| {
            let opens = !state.open && !state.ended && !state.quit;
            state.open |= opens;
            opens
        })
    }

    /// Closes it; those inside see it when they look.
    pub fn close(&self) {
        self.change(|state| state.open = false);
    }

    /// Closes it for ever. `true` if this was the first time.
    pub fn end(&self) -> bool {
        self.change(|state| {
            state.open = false;
            !std::mem::replace(&mut state.ended, true)
        })
    }

    /// Sends all threads to their end.
    pub fn quit(&self) {
        self.change(|state| {
            state.open = false;
            state.quit = true;
        });
    }

    /// Waits until nobody is inside. Not by somebody who is.
    pub fn wait_until_empty(&self) {
        let mut state = lock(&self.state);
        while state.inside > 0 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until nobody but the caller is inside.
    pub fn wait_until_alone(&self) {
        let mut state = lock(&self.state);
        while state.inside > 1 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn change<R>(&self, with: impl FnOnce(&mut State) -> R) -> R {
        let mut state = lock(&self.state);
        let result = with(&mut state);
        self.stay.store(state.open, Ordering::SeqCst);
        self.changed.notify_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn who_waits_goes_in_when_it_opens_and_out_when_it_closes() {
        let (gate, laps) = (Gate::default(), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while gate.enter() {
                        laps.fetch_add(1, Ordering::SeqCst);
                        while gate.may_stay() {
                            std::thread::yield_now();
                        }
                        gate.leave();
                    }
                });
            }
            assert!(!gate.is_open());
            for round in 1..=3 {
                let before = laps.load(Ordering::SeqCst);
                assert!(gate.open() && !gate.open());
                while laps.load(Ordering::SeqCst) == before {
                    std::thread::yield_now();
                }
                gate.close();
                gate.wait_until_empty();
                assert!(!gate.is_open(), "round {round}");
            }
            gate.quit();
        });
    }

    #[test]
    fn a_partition_ends_once_and_does_not_run_again() {
        let gate = Gate::default();
        assert!(gate.open());
        assert!(gate.end());
        assert!(!gate.end());
        assert!(!gate.open() && !gate.is_open());
    }
}
