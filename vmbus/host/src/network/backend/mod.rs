//! The networks that a card can be plugged into.

mod faulty;
mod pair;
mod queue;
#[cfg(all(feature = "std", unix))]
mod stream;
#[cfg(all(feature = "std", target_os = "linux"))]
mod tap;

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::offload::Segmentation;

pub use faulty::{FaultControl, Faults, Faulty};
pub use pair::{Loop, Nowhere, Pair};
#[cfg(all(feature = "std", unix))]
pub use stream::{Stream, StreamError};
#[cfg(all(feature = "std", target_os = "linux"))]
pub use tap::{Tap, TapError};

/// Called, on any thread and with no lock of the backend held, when there are frames to receive, when there is room to send again,
/// or when the network has come or gone.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// What a network is to a card: frames go in and come out, whole Ethernet frames without checksum, as fast as either side can.
///
/// Nothing here waits. Threads, if it takes any, are the backend's own; its queues are bounded.
pub trait Backend: Send + Sync {
    /// Sends a frame.
    ///
    /// # Errors
    ///
    /// [`SendError::Full`] when there is no room now; the waker will be called when there is.
    fn send(&self, frame: &[u8]) -> Result<(), SendError>;

    /// The next frame for the card.
    fn receive(&self) -> Option<Vec<u8>>;

    /// Whom to tell. One at a time.
    fn set_waker(&self, waker: Option<Waker>);

    /// Whether there is anybody at the other end.
    fn is_up(&self) -> bool {
        true
    }

    /// What it does with TCP frames that are longer than its MTU.
    fn large_sends(&self) -> LargeSends {
        LargeSends::None
    }

    /// Sends a TCP frame that the network cuts, where [`large_sends`](Self::large_sends) says that it does.
    ///
    /// # Errors
    ///
    /// As of [`send`](Self::send).
    fn send_large(&self, frame: &[u8], cut: &Segmentation) -> Result<(), SendError> {
        let _ = (frame, cut);
        Err(SendError::Full)
    }

    /// Time has passed: networks that are slow on purpose move what is due. `now` is reference time in units of 100 ns, and so
    /// is the result, when to call again. Called before [`receive`](Self::receive).
    fn pass(&self, now: u64) -> Option<u64> {
        let _ = now;
        None
    }
}

/// What a network does with TCP frames that are longer than its MTU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LargeSends {
    /// It does not take them. The card cuts them.
    None,
    /// It takes them whole, with their checksums, up to so many bytes of frame.
    Whole(usize),
    /// It cuts them, and computes the checksums.
    Cut,
}

/// Why a network does not take a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SendError {
    /// There is no room now.
    Full,
    /// There is nobody at the other end. The frame is lost.
    Down,
}
