//! A bounded queue of frames between a network's thread and the card's.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::sync::Mutex;

/// Frames that a queue holds at most.
const FRAMES: usize = 1024;

/// Bytes that a queue holds at most.
const BYTES: usize = 2 << 20;

/// The queue.
#[derive(Default, Debug)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    /// Told when a frame comes, when there is room, and when the end is near.
    #[cfg(feature = "std")]
    changed: std::sync::Condvar,
}

#[derive(Default, Debug)]
struct Inner {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Somebody was refused, and wants to know when there is room.
    refused: bool,
    closed: bool,
}

/// The queue is full or closed; here is the frame.
#[derive(Debug)]
pub(super) struct Refused;

impl Inner {
    fn has_room(&self) -> bool {
        self.frames.len() < FRAMES && self.bytes < BYTES
    }

    fn put(&mut self, frame: Vec<u8>) -> bool {
        let first = self.frames.is_empty();
        self.bytes += frame.len();
        self.frames.push_back(frame);
        first
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }

    /// Whether somebody who was refused should try again: once half of the queue is free.
    fn relieve(&mut self) -> bool {
        let now = self.refused && self.frames.len() <= FRAMES / 2 && self.bytes <= BYTES / 2;
        self.refused &= !now;
        now
    }
}

impl Queue {
    /// Adds a frame, and tells whether it is the first.
    pub(super) fn push(&self, frame: &[u8]) -> Result<bool, Refused> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return Err(Refused);
        }
        if !inner.has_room() {
            inner.refused = true;
            return Err(Refused);
        }
        let first = inner.put(frame.to_vec());
        drop(inner);
        #[cfg(feature = "std")]
        self.changed.notify_all();
        Ok(first)
    }

    /// Takes a frame, and tells whether whoever was refused should try again.
    pub(super) fn pop(&self) -> (Option<Vec<u8>>, bool) {
        let mut inner = self.inner.lock();
        let frame = inner.take();
        let relieved = inner.relieve();
        drop(inner);
        #[cfg(feature = "std")]
        self.changed.notify_all();
        (frame, relieved)
    }

    /// Forgets all frames.
    #[cfg(all(feature = "std", unix))]
    pub(super) fn clear(&self) {
        let mut inner = self.inner.lock();
        inner.frames.clear();
        inner.bytes = 0;
        inner.refused = false;
        drop(inner);
        self.changed.notify_all();
    }
}

#[cfg(all(feature = "std", unix))]
impl Queue {
    /// Adds a frame when there is room, and tells whether it is the first. `None` once the queue is closed.
    pub(super) fn push_waiting(&self, frame: Vec<u8>) -> Option<bool> {
        let mut inner = self.inner.lock();
        while !inner.closed && !inner.has_room() {
            inner = self.wait(inner);
        }
        if inner.closed {
            return None;
        }
        let first = inner.put(frame);
        drop(inner);
        self.changed.notify_all();
        Some(first)
    }

    /// Moves all frames to `frames` when there are any, and tells whether somebody who was refused should try again. `None` once
    /// the queue is closed.
    pub(super) fn pop_waiting(&self, frames: &mut VecDeque<Vec<u8>>) -> Option<bool> {
        let mut inner = self.inner.lock();
        while !inner.closed && inner.frames.is_empty() {
            inner = self.wait(inner);
        }
        if inner.closed {
            return None;
        }
        frames.append(&mut inner.frames);
        inner.bytes = 0;
        let relieved = inner.relieve();
        drop(inner);
        self.changed.notify_all();
        Some(relieved)
    }

    /// Lets nobody wait any more, and takes no frame.
    pub(super) fn close(&self) {
        self.inner.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until the queue is closed, or this long. Returns whether it is.
    pub(super) fn wait_for_close(&self, time: std::time::Duration) -> bool {
        let inner = self.inner.lock();
        let waited = self
            .changed
            .wait_timeout_while(inner, time, |inner| !inner.closed);
        let (inner, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        inner.closed
    }

    fn wait<'a>(
        &self,
        guard: std::sync::MutexGuard<'a, Inner>,
    ) -> std::sync::MutexGuard<'a, Inner> {
        let waited = self.changed.wait(guard);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_are_told_once_half_of_the_queue_is_free() {
        let queue = Queue::default();
        for frame in 0..FRAMES {
            assert_eq!(queue.push(&[0; 60]).ok(), Some(frame == 0));
        }
        assert!(queue.push(&[0; 60]).is_err());
        for _ in 0..FRAMES / 2 - 1 {
            assert!(!queue.pop().1);
        }
        assert!(queue.pop().1);
        assert!(!queue.pop().1, "once");
    }

    #[test]
    fn a_queue_of_long_frames_is_bounded_in_bytes() {
        let queue = Queue::default();
        let frame = [0; 64 << 10];
        let taken = (0..FRAMES)
            .take_while(|_| queue.push(&frame).is_ok())
            .count();
        assert_eq!(taken, BYTES / frame.len());
    }
}
