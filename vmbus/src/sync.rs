//! A lock for data that interrupt handlers touch: whoever holds it runs at DISPATCH.

use core::ops::{Deref, DerefMut};

use spin::{Mutex, MutexGuard};

use crate::hypervisor::{Hypervisor, Level};

/// A spin lock that raises its VP to DISPATCH while it is held, so that an interrupt on the
/// same VP can never wait for it.
///
/// Hold it for a few steps only, and call nothing of a driver's while holding it.
#[derive(Debug, Default)]
pub struct DispatchLock<T> {
    inner: Mutex<T>,
}

impl<T> DispatchLock<T> {
    /// An open lock around `value`.
    pub const fn new(value: T) -> Self {
        Self {
            inner: Mutex::new(value),
        }
    }

    /// Raises to DISPATCH and waits until no other VP holds the lock.
    pub fn lock<'a>(&'a self, hypervisor: &'a dyn Hypervisor) -> DispatchGuard<'a, T> {
        let raised = Raised {
            hypervisor,
            before: hypervisor.raise_to_dispatch(),
        };
        DispatchGuard {
            value: self.inner.lock(),
            _raised: raised,
        }
    }
}

/// Access to the value of a [`DispatchLock`]. Dropping it opens the lock and then goes back to the level before.
pub struct DispatchGuard<'a, T> {
    // The order matters: fields are dropped from the top.
    value: MutexGuard<'a, T>,
    _raised: Raised<'a>,
}

impl<T> Deref for DispatchGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for DispatchGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// A VP at DISPATCH, until dropped.
struct Raised<'a> {
    hypervisor: &'a dyn Hypervisor,
    before: Level,
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.hypervisor.lower(self.before);
    }
}
