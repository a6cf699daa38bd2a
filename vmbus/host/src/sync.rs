//! Locks: the system's where there is one, spinning ones in a booted guest.

#[cfg(not(feature = "std"))]
pub use spin::{Mutex, MutexGuard, RwLock};
#[cfg(feature = "std")]
pub use with_std::{Mutex, MutexGuard, RwLock};

#[cfg(feature = "std")]
mod with_std {
    use std::sync::{self, PoisonError, RwLockReadGuard, RwLockWriteGuard};

    pub use std::sync::MutexGuard;

    /// [`std::sync::Mutex`] that a panic elsewhere does not poison: what it protects here is whole after each statement,
    /// or belongs to a guest that has to start anew anyhow.
    #[derive(Default, Debug)]
    pub struct Mutex<T: ?Sized>(sync::Mutex<T>);

    impl<T> Mutex<T> {
        /// A lock around `value`.
        pub const fn new(value: T) -> Self {
            Self(sync::Mutex::new(value))
        }
    }

    impl<T: ?Sized> Mutex<T> {
        /// Waits for the lock.
        pub fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }
    }

    /// [`std::sync::RwLock`], likewise.
    #[derive(Default, Debug)]
    pub struct RwLock<T: ?Sized>(sync::RwLock<T>);

    impl<T> RwLock<T> {
        /// A lock around `value`.
        pub const fn new(value: T) -> Self {
            Self(sync::RwLock::new(value))
        }
    }

    impl<T: ?Sized> RwLock<T> {
        /// Waits until nobody writes.
        pub fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(PoisonError::into_inner)
        }

        /// Waits until nobody reads or writes.
        pub fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(PoisonError::into_inner)
        }
    }
}
