//! The network behind the card: takes what the card sends and judges it, and gives what the input says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use vmbus_host::network::backend::{Backend, LargeSends, SendError, Waker};
use vmbus_host::network::offload::Segmentation;

/// The network. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Net(Arc<Mutex<Inner>>);

#[derive(Default)]
pub(crate) struct Inner {
    /// Bytes of the longest frame that guest and host have agreed on, with a tag.
    pub(crate) longest: usize,
    /// What happens to large frames.
    pub(crate) large: Option<LargeSends>,
    /// Bytes of the longest frame that has ever been taken whole: what waits may have been meant for it.
    pub(crate) whole: usize,
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

impl Inner {
    /// What becomes of a frame now.
    fn state(&self) -> Result<(), SendError> {
        match (self.down, self.full) {
            (true, _) => Err(SendError::Down),
            (_, true) => Err(SendError::Full),
            _ => Ok(()),
        }
    }
}

impl Backend for Net {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        let inner = self.lock();
        assert!(frame.len() >= 14, "a frame has a header");
        let fits = frame.len() <= inner.longest.max(inner.whole);
        assert!(fits, "{} bytes are too long", frame.len());
        inner.state()
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

    fn large_sends(&self) -> LargeSends {
        self.lock().large.unwrap_or(LargeSends::None)
    }

    fn send_large(&self, frame: &[u8], cut: &Segmentation) -> Result<(), SendError> {
        let inner = self.lock();
        assert_eq!(inner.large, Some(LargeSends::Cut), "it says that it cuts");
        assert!(cut.tcp + 20 <= cut.headers && cut.headers <= frame.len());
        let longest = cut.headers + usize::from(cut.size);
        assert!(longest <= inner.longest, "segments of {longest} bytes");
        inner.state()
    }
}
