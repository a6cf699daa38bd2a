//! The network behind the card: takes what the card sends and judges it, and gives what the input says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use vmbus_host::network::backend::{Backend, SendError, Waker};

/// The network. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Net(Arc<Mutex<Inner>>);

#[derive(Default)]
pub(crate) struct Inner {
    /// Bytes of the longest frame that guest and host have agreed on, with a tag.
    pub(crate) longest: usize,
    /// Bytes of the longest frame that is taken uncut.
    pub(crate) large: Option<usize>,
    /// There is no room.
    pub(crate) full: bool,
    /// There is nobody at the other end.
    pub(crate) down: bool,
    /// Frames for the card.
    pub(crate) inbound: VecDeque<Vec<u8>>,
    /// Frames that the card has taken and not delivered, as far as this is known.
    pub(crate) under_way: Vec<Vec<u8>>,
    /// Frames that the card has taken.
    pub(crate) taken: u64,
    waker: Option<Waker>,
}

impl Net {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("nobody panics")
    }

    /// Tells the card that something has changed.
    pub(crate) fn wake(&self) {
        let waker = self.lock().waker.clone();
        if let Some(waker) = waker {
            waker();
        }
    }
}

impl Backend for Net {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        let inner = self.lock();
        assert!(frame.len() >= 14, "a frame has a header");
        let uncut = inner.large.is_some_and(|longest| frame.len() <= longest);
        let fits = frame.len() <= inner.longest || uncut;
        assert!(fits, "{} bytes are too long", frame.len());
        match (inner.down, inner.full) {
            (true, _) => Err(SendError::Down),
            (_, true) => Err(SendError::Full),
            _ => Ok(()),
        }
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut inner = self.lock();
        let frame = inner.inbound.pop_front()?;
        inner.taken += 1;
        inner.under_way.push(frame.clone());
        Some(frame)
    }

    fn set_waker(&self, waker: Option<Waker>) {
        self.lock().waker = waker;
    }

    fn is_up(&self) -> bool {
        !self.lock().down
    }

    fn large_send(&self) -> Option<usize> {
        self.lock().large
    }
}
