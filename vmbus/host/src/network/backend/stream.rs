//! A network behind a Unix socket in QEMU's stream framing: each frame has its length in front, 32 bits in network order. passt
//! speaks it, and so does anything that QEMU's `-netdev stream` talks to.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::vec::Vec;

use super::queue::Queue;
use super::{Backend, LargeSends, SendError, Waker};
use crate::sync::Mutex;

/// The longest frame in bytes: what passt's `--mtu 65520` and an Ethernet header make.
const LONGEST: usize = 65520 + 14;

/// A length beyond this is none: the stream has lost its step.
const NONSENSE: usize = 1 << 17;

/// How long to wait before the other end is called again.
const AGAIN: Duration = Duration::from_secs(1);

/// The socket cannot be used.
#[derive(Debug)]
pub struct StreamError {
    path: PathBuf,
    error: io::Error,
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.error.kind() {
            io::ErrorKind::NotFound => write!(f, "there is no socket {path} to reach a network by"),
            io::ErrorKind::ConnectionRefused => {
                write!(f, "nobody listens at the network socket {path}")
            }
            _ => write!(f, "network socket {path}: {}", self.error),
        }
    }
}

impl std::error::Error for StreamError {}

/// The network.
pub struct Stream {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Where to call again when the other end has gone.
    path: Option<PathBuf>,
    socket: Mutex<Option<UnixStream>>,
    incoming: Queue,
    outgoing: Queue,
    up: AtomicBool,
    closing: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Stream {
    /// Connects to the socket at `path`. When the other end goes the link is down, and it is called again every second.
    ///
    /// # Errors
    ///
    /// There is nobody now, or no thread can be had.
    pub fn connect(path: &Path) -> Result<Self, StreamError> {
        let failed = |error| StreamError {
            path: path.into(),
            error,
        };
        let socket = UnixStream::connect(path).map_err(failed)?;
        Self::start(socket, Some(path.into())).map_err(failed)
    }

    /// Takes a connected socket. When the other end goes the link is down for good.
    ///
    /// # Errors
    ///
    /// No thread can be had.
    pub fn from_socket(socket: UnixStream) -> io::Result<Self> {
        Self::start(socket, None)
    }

    fn start(socket: UnixStream, path: Option<PathBuf>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            path,
            socket: Mutex::new(Some(socket.try_clone()?)),
            incoming: Queue::default(),
            outgoing: Queue::default(),
            up: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            waker: Mutex::new(None),
        });
        let mut stream = Self {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        let reader = shared.clone();
        let thread = thread::Builder::new().name("network in".into());
        stream
            .threads
            .push(thread.spawn(move || reader.read_all(socket))?);
        let thread = thread::Builder::new().name("network out".into());
        stream
            .threads
            .push(thread.spawn(move || shared.write_all())?);
        Ok(stream)
    }
}

impl Shared {
    fn wake(&self) {
        let waker = self.waker.lock().clone();
        if let Some(waker) = waker {
            waker();
        }
    }

    /// Reads from this socket, and from those that come after it.
    fn read_all(&self, mut socket: UnixStream) {
        loop {
            // Whatever the reason, the other end is gone.
            let _ = self.read(&socket);
            let _ = socket.shutdown(Shutdown::Both);
            self.up.store(false, Ordering::SeqCst);
            *self.socket.lock() = None;
            self.outgoing.clear();
            if self.closing.load(Ordering::SeqCst) {
                return;
            }
            self.wake();
            let Some(next) = self.call_again() else {
                return;
            };
            socket = next;
            self.up.store(true, Ordering::SeqCst);
            self.wake();
        }
    }

    fn read(&self, socket: &UnixStream) -> io::Result<()> {
        let mut input = BufReader::with_capacity(256 << 10, socket);
        loop {
            let mut length = [0; 4];
            input.read_exact(&mut length)?;
            let length = u32::from_be_bytes(length) as usize;
            if length > NONSENSE {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut frame = std::vec![0; length];
            input.read_exact(&mut frame)?;
            match self.incoming.push_waiting(frame) {
                None => return Ok(()),
                Some(true) => self.wake(),
                Some(false) => {}
            }
        }
    }

    /// Connects again. `None` when that is no use.
    fn call_again(&self) -> Option<UnixStream> {
        let path = self.path.as_ref()?;
        loop {
            if self.incoming.wait_for_close(AGAIN) {
                return None;
            }
            let Ok(socket) = UnixStream::connect(path) else {
                continue;
            };
            let Ok(copy) = socket.try_clone() else {
                continue;
            };
            let mut slot = self.socket.lock();
            if self.closing.load(Ordering::SeqCst) {
                return None;
            }
            *slot = Some(copy);
            return Some(socket);
        }
    }

    /// Writes what is to be sent, all that there is at a time.
    fn write_all(&self) {
        let mut frames = VecDeque::new();
        let mut bytes = Vec::new();
        while let Some(relieved) = self.outgoing.pop_waiting(&mut frames) {
            if relieved {
                self.wake();
            }
            bytes.clear();
            for frame in frames.drain(..) {
                let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
                bytes.extend_from_slice(&length.to_be_bytes());
                bytes.extend_from_slice(&frame);
            }
            let socket = self.socket.lock().as_ref().map(UnixStream::try_clone);
            if let Some(Ok(mut socket)) = socket
                && socket.write_all(&bytes).is_err()
            {
                // The reader finds out, too, and calls again.
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }
}

impl Backend for Stream {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        if !self.is_up() {
            return Err(SendError::Down);
        }
        let pushed = self.shared.outgoing.push(frame);
        pushed.map(drop).map_err(|_| SendError::Full)
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.shared.incoming.pop().0
    }

    fn set_waker(&self, waker: Option<Waker>) {
        *self.shared.waker.lock() = waker;
        // What came before anybody could be told.
        self.shared.wake();
    }

    fn is_up(&self) -> bool {
        self.shared.up.load(Ordering::SeqCst)
    }

    fn large_sends(&self) -> LargeSends {
        LargeSends::Whole(LONGEST)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        *self.shared.waker.lock() = None;
        self.shared.incoming.close();
        self.shared.outgoing.close();
        if let Some(socket) = &*self.shared.socket.lock() {
            let _ = socket.shutdown(Shutdown::Both);
        }
        for thread in self.threads.drain(..) {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    use super::*;

    fn frame(socket: &mut UnixStream) -> Vec<u8> {
        let mut length = [0; 4];
        socket.read_exact(&mut length).unwrap();
        let mut frame = std::vec![0; u32::from_be_bytes(length) as usize];
        socket.read_exact(&mut frame).unwrap();
        frame
    }

    /// A stream, and what tells each time that it wakes.
    fn woken(stream: &Stream) -> mpsc::Receiver<()> {
        let (sender, receiver) = mpsc::channel();
        let sender = Mutex::new(sender);
        stream.set_waker(Some(Arc::new(move || {
            let _ = sender.lock().send(());
        })));
        receiver
    }

    #[test]
    fn frames_have_their_length_in_front() {
        let (mine, mut other) = UnixStream::pair().unwrap();
        let stream = Stream::from_socket(mine).unwrap();
        let woken = woken(&stream);
        stream.send(b"a frame").unwrap();
        assert_eq!(frame(&mut other), b"a frame");
        other.write_all(b"\0\0\0\x03one\0\0\0\x03two").unwrap();
        let mut got = Vec::new();
        while got.len() < 2 {
            woken.recv().unwrap();
            got.extend(std::iter::from_fn(|| stream.receive()));
        }
        assert_eq!(got, [b"one", b"two"]);
    }

    #[test]
    fn whoever_does_not_read_stops_the_sender_and_nothing_grows() {
        let (mine, mut other) = UnixStream::pair().unwrap();
        let stream = Stream::from_socket(mine).unwrap();
        let woken = woken(&stream);
        let big = [7; 32 << 10];
        let mut sent = 0;
        while stream.send(&big).is_ok() {
            sent += 1;
            assert!(sent < 10_000);
        }
        woken.recv().unwrap();
        for _ in 0..sent {
            assert_eq!(frame(&mut other), big);
        }
        // It is told when there is room again.
        while stream.send(b"room").is_err() {
            woken.recv().unwrap();
        }
        assert_eq!(frame(&mut other), b"room");
    }

    #[test]
    fn the_link_is_down_when_the_other_end_goes_and_up_when_it_comes_back() {
        let folder = std::env::temp_dir().join(std::format!("vmbus-net-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("socket");
        let _ = std::fs::remove_file(&path);
        let error = Stream::connect(&path).map(drop).unwrap_err();
        assert!(std::format!("{error}").starts_with("there is no socket"));
        let listener = UnixListener::bind(&path).unwrap();
        let stream = Stream::connect(&path).unwrap();
        let woken = woken(&stream);
        let (first, _) = listener.accept().unwrap();
        assert!(stream.is_up());
        drop(first);
        while stream.is_up() {
            woken.recv().unwrap();
        }
        assert_eq!(stream.send(b"lost"), Err(SendError::Down));
        let (mut second, _) = listener.accept().unwrap();
        while !stream.is_up() {
            woken.recv().unwrap();
        }
        stream.send(b"found").unwrap();
        assert_eq!(frame(&mut second), b"found");
        // A length that cannot be ends the connection; it is not believed.
        second.write_all(&[0xFF; 8]).unwrap();
        while stream.is_up() {
            woken.recv().unwrap();
        }
        drop(stream);
        let _ = std::fs::remove_dir_all(&folder);
    }
}
