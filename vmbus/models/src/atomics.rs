//! Loom's atomics where the stack has the processor's (`vmbus/src/atomics.rs`).

use std::ops::DerefMut;

pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

/// A lock that must never be contended: so it is with the one inside of a turn.
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> impl DerefMut<Target = T> {
        self.0.try_lock().expect("only one has the turn")
    }
}
