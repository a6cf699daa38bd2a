//! The kernel's lock: interrupts stay off while it is held, so a handler never waits for the code it interrupted.

use core::ops::{Deref, DerefMut};

use spin::{Mutex, MutexGuard};

use crate::arch::cpu::InterruptsOff;

/// A spin lock that turns interrupts off while it is held.
pub(crate) struct Lock<T>(Mutex<T>);

impl<T> Lock<T> {
    /// A lock around `value`.
    pub(crate) const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Takes the lock. It must not be held by this VP already.
    pub(crate) fn lock(&self) -> Guard<'_, T> {
        let interrupts = InterruptsOff::enter();
        Guard {
            value: self.0.lock(),
            _interrupts: interrupts,
        }
    }

    /// Takes the lock if nobody holds it: for reports of a machine that may have stopped anywhere.
    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        let interrupts = InterruptsOff::enter();
        let value = self.0.try_lock()?;
        Some(Guard {
            value,
            _interrupts: interrupts,
        })
    }
}

/// The lock, held. Fields drop in order: first the lock goes, then interrupts come back.
pub(crate) struct Guard<'a, T> {
    value: MutexGuard<'a, T>,
    _interrupts: InterruptsOff,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}
