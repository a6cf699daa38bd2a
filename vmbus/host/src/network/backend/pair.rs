//! Networks in one process: a cable between two cards, a plug that leads back, and one that leads nowhere.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use super::queue::Queue;
use super::{Backend, SendError, Waker};
use crate::sync::Mutex;

/// One way of a cable.
#[derive(Default)]
struct Way {
    queue: Queue,
    /// The sender's, for room.
    sender: Mutex<Option<Waker>>,
    /// The receiver's, for frames.
    receiver: Mutex<Option<Waker>>,
}

fn call(waker: &Mutex<Option<Waker>>) {
    let waker = waker.lock().clone();
    if let Some(waker) = waker {
        waker();
    }
}

impl Way {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        let first = self.queue.push(frame).map_err(|_| SendError::Full)?;
        if first {
            call(&self.receiver);
        }
        Ok(())
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let (frame, relieved) = self.queue.pop();
        if relieved {
            call(&self.sender);
        }
        frame
    }
}

/// One end of a cable between two cards.
pub struct Pair {
    out: Arc<Way>,
    back: Arc<Way>,
    /// Whether both ends still exist.
    whole: Arc<AtomicBool>,
}

impl Pair {
    /// Both ends of a cable.
    pub fn new() -> (Self, Self) {
        let (one, other) = (Arc::new(Way::default()), Arc::new(Way::default()));
        let whole = Arc::new(AtomicBool::new(true));
        let first = Self {
            out: one.clone(),
            back: other.clone(),
            whole: whole.clone(),
        };
        let second = Self {
            out: other,
            back: one,
            whole,
        };
        (first, second)
    }
}

impl Backend for Pair {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        if !self.is_up() {
            return Err(SendError::Down);
        }
        self.out.send(frame)
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.back.receive()
    }

    fn set_waker(&self, waker: Option<Waker>) {
        *self.out.sender.lock() = waker.clone();
        *self.back.receiver.lock() = waker;
    }

    fn is_up(&self) -> bool {
        self.whole.load(Ordering::SeqCst)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.whole.store(false, Ordering::SeqCst);
        call(&self.out.receiver);
    }
}

/// A plug that leads back: the card receives what it sends.
#[derive(Default)]
pub struct Loop(Way);

impl Backend for Loop {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        self.0.send(frame)
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.0.receive()
    }

    fn set_waker(&self, waker: Option<Waker>) {
        *self.0.sender.lock() = waker.clone();
        *self.0.receiver.lock() = waker;
    }
}

/// No cable at all: the link is down.
#[derive(Clone, Copy, Default, Debug)]
pub struct Nowhere;

impl Backend for Nowhere {
    fn send(&self, _frame: &[u8]) -> Result<(), SendError> {
        Err(SendError::Down)
    }

    fn receive(&self) -> Option<Vec<u8>> {
        None
    }

    fn set_waker(&self, _waker: Option<Waker>) {}

    fn is_up(&self) -> bool {
        false
    }
}
