//! The host's half of a connection, as bytes: what a Unix socket is, or a buffer in memory.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::provider::Link;
use crate::sync::{Mutex, MutexGuard};

/// How far a read or write came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// So many bytes, at least one.
    Moved(usize),
    /// None now; the stream wakes the link when that changes.
    Blocked,
    /// None any more: the other end has finished, or is gone.
    Ended,
}

/// Bytes both ways that never block.
pub trait Stream: Send {
    /// Whom to wake when a read or write that was blocked can go on. Called once, before either.
    fn attach(&mut self, link: Link);

    /// Takes bytes that the host's program has sent; `buffer` has room for some.
    fn read(&mut self, buffer: &mut [u8]) -> Transfer;

    /// Gives bytes to the host's program; there are some.
    fn write(&mut self, bytes: &[u8]) -> Transfer;

    /// Nothing more will be written.
    fn finish(&mut self);
}

/// A stream in memory, and the other end of it. Each way holds `capacity` bytes at most.
pub fn memory_stream(capacity: usize) -> (MemoryStream, MemoryEnd) {
    let shared = Arc::new(Mutex::new(Both {
        capacity,
        ..Both::default()
    }));
    (MemoryStream(shared.clone()), MemoryEnd(shared))
}

/// The host's half of a connection in memory.
#[derive(Debug)]
pub struct MemoryStream(Arc<Mutex<Both>>);

/// What a program would have: the other end of a [`MemoryStream`].
#[derive(Debug)]
pub struct MemoryEnd(Arc<Mutex<Both>>);

#[derive(Debug, Default)]
struct Both {
    capacity: usize,
    to_guest: Way,
    from_guest: Way,
    link: Option<Link>,
    /// Whether each end is still there.
    host_gone: bool,
    program_gone: bool,
}

#[derive(Debug, Default)]
struct Way {
    bytes: VecDeque<u8>,
    finished: bool,
}

impl Way {
    fn put(&mut self, bytes: &[u8], capacity: usize) -> usize {
        let room = capacity.saturating_sub(self.bytes.len());
        let count = room.min(bytes.len());
        self.bytes.extend(bytes.iter().take(count));
        count
    }

    fn take(&mut self, buffer: &mut [u8]) -> usize {
        let count = self.bytes.len().min(buffer.len());
        let taken = self.bytes.drain(..count);
        buffer
            .iter_mut()
            .zip(taken)
            .for_each(|(to, from)| *to = from);
        count
    }
}

impl Stream for MemoryStream {
    fn attach(&mut self, link: Link) {
        self.0.lock().link = Some(link);
    }

    fn read(&mut self, buffer: &mut [u8]) -> Transfer {
        let mut both = self.0.lock();
        match both.to_guest.take(buffer) {
            0 if both.to_guest.finished || both.program_gone => Transfer::Ended,
            0 => Transfer::Blocked,
            count => Transfer::Moved(count),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Transfer {
        let mut both = self.0.lock();
        if both.program_gone {
            return Transfer::Ended;
        }
        let capacity = both.capacity;
        match both.from_guest.put(bytes, capacity) {
            0 => Transfer::Blocked,
            count => Transfer::Moved(count),
        }
    }

    fn finish(&mut self) {
        self.0.lock().from_guest.finished = true;
    }
}

impl Drop for MemoryStream {
    fn drop(&mut self) {
        self.0.lock().host_gone = true;
    }
}

impl MemoryEnd {
    /// Sends bytes to the guest; gives how many there was room for.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut both = self.0.lock();
        let capacity = both.capacity;
        let count = both.to_guest.put(bytes, capacity);
        wake(both);
        count
    }

    /// What has come from the guest, up to `limit` bytes.
    pub fn receive(&self, limit: usize) -> Vec<u8> {
        let mut both = self.0.lock();
        let mut bytes = alloc::vec![0; both.from_guest.bytes.len().min(limit)];
        both.from_guest.take(&mut bytes);
        wake(both);
        bytes
    }

    /// Nothing more will be sent.
    pub fn finish(&self) {
        let mut both = self.0.lock();
        both.to_guest.finished = true;
        wake(both);
    }

    /// Whether the guest has finished and everything of it has been received.
    pub fn is_finished(&self) -> bool {
        let both = self.0.lock();
        both.from_guest.finished && both.from_guest.bytes.is_empty()
    }

    /// Whether the host has let go of its half: the connection is over.
    pub fn is_closed(&self) -> bool {
        self.0.lock().host_gone
    }
}

/// Wakes the connection, once nobody holds the lock.
fn wake(both: MutexGuard<'_, Both>) {
    let link = both.link.clone();
    drop(both);
    if let Some(link) = link {
        link.wake();
    }
}

impl Drop for MemoryEnd {
    fn drop(&mut self) {
        let mut both = self.0.lock();
        both.program_gone = true;
        wake(both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_in_memory_holds_no_more_than_its_capacity() {
        let (mut stream, end) = memory_stream(4);
        assert_eq!(end.send(b"abcdef"), 4);
        let mut buffer = [0; 3];
        assert_eq!(stream.read(&mut buffer), Transfer::Moved(3));
        assert_eq!(&buffer, b"abc");
        assert_eq!(stream.write(b"123456"), Transfer::Moved(4));
        assert_eq!(stream.write(b"56"), Transfer::Blocked);
        assert_eq!(end.receive(2), b"12");
        assert_eq!(stream.write(b"56"), Transfer::Moved(2));
        end.finish();
        assert_eq!(stream.read(&mut buffer), Transfer::Moved(1));
        assert_eq!(stream.read(&mut buffer), Transfer::Ended);
        stream.finish();
        assert!(!end.is_finished());
        assert_eq!(end.receive(9), b"3456");
        assert!(end.is_finished());
        assert!(!end.is_closed());
        drop(stream);
        assert!(end.is_closed());
    }

    #[test]
    fn a_program_that_is_gone_ends_both_ways() {
        let (mut stream, end) = memory_stream(4);
        end.send(b"x");
        drop(end);
        assert_eq!(stream.write(b"1"), Transfer::Ended);
        let mut buffer = [0; 3];
        assert_eq!(stream.read(&mut buffer), Transfer::Moved(1));
        assert_eq!(stream.read(&mut buffer), Transfer::Ended);
    }
}
