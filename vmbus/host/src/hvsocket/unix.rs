//! Sockets of the guest as Unix sockets of the host (spec hvsock.md 8).
//!
//! A program of the host connects to the socket `PATH` and writes `CONNECT <port or GUID>` to reach the guest; a guest that
//! connects to port p reaches whoever listens on `PATH_p`, or on `PATH_<GUID of the service>`. One thread waits for all of
//! them; what it finds it hands to the thread that runs the host.

use std::boxed::Box;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::vec::Vec;

use mio::net::{UnixListener, UnixStream};
use mio::{Events, Interest, Poll, Registry, Token, Waker};

use super::greeting::{self, Greeting, LONGEST};
use super::{Backend, HostConnection, Limits, Service, Sockets, SocketsHandle, Stream, Transfer};
use crate::provider::Link;
use crate::sync::Mutex;

/// Programs that may be about to say what they want to connect to.
const GREETINGS: usize = 64;

/// How long one may take to say it.
const PATIENCE: Duration = Duration::from_secs(10);

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
const FIRST: usize = 2;

/// Why there are no sockets.
#[derive(Debug)]
pub struct BindError {
    path: PathBuf,
    reason: Reason,
}

#[derive(Debug)]
enum Reason {
    InUse,
    NoSocket,
    Io(io::Error),
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.reason {
            Reason::InUse => write!(f, "the socket {path} is in use by another program"),
            Reason::NoSocket => write!(f, "{path} is there already, and is no socket"),
            Reason::Io(error) => write!(f, "the socket {path} cannot be made: {error}"),
        }
    }
}

impl std::error::Error for BindError {}

/// Listens on the socket `path`, and gives the guest's sockets, to be set as its host's connector. They end with it, and
/// the file is removed.
pub fn bind(path: &Path, limits: Limits) -> Result<Sockets, BindError> {
    let failed = |reason| BindError {
        path: path.into(),
        reason,
    };
    let io = |error| failed(Reason::Io(error));
    make_way(path).map_err(failed)?;
    let mut listener = UnixListener::bind(path).map_err(io)?;
    let poll = Poll::new().map_err(io)?;
    let registry = poll.registry().try_clone().map_err(io)?;
    let waker = Waker::new(&registry, WAKER).map_err(io)?;
    registry
        .register(&mut listener, LISTENER, Interest::READABLE)
        .map_err(io)?;
    let reactor = Arc::new(Reactor {
        registry,
        waker,
        next: AtomicUsize::new(FIRST),
        links: Mutex::new(HashMap::new()),
        stop: AtomicBool::new(false),
    });
    let mut backend = UnixSockets {
        path: path.into(),
        reactor: reactor.clone(),
        thread: None,
    };
    // The thread has to know the handle, and the sockets own the backend, whose end is the thread's.
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    let thread = move || {
        if let Ok(sockets) = receiver.recv() {
            Waiting {
                reactor,
                listener,
                poll,
                sockets,
                greetings: HashMap::new(),
            }
            .run();
        }
    };
    let builder = std::thread::Builder::new().name("hvsocket".into());
    backend.thread = Some(builder.spawn(thread).map_err(io)?);
    let sockets = Sockets::new(backend, limits);
    // The thread waits for nothing else.
    let _ = sender.send(sockets.handle());
    Ok(sockets)
}

/// Removes a socket that nobody listens on any more.
fn make_way(path: &Path) -> Result<(), Reason> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(Reason::NoSocket);
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(Reason::Io)
        }
        // Somebody listens, even if there is no room for one more.
        _ => Err(Reason::InUse),
    }
}

/// What waits for all sockets at once.
struct Reactor {
    registry: Registry,
    waker: Waker,
    next: AtomicUsize,
    /// Whom to wake for which socket.
    links: Mutex<HashMap<Token, Link>>,
    stop: AtomicBool,
}

impl Reactor {
    fn token(&self) -> Token {
        Token(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// The programs that listen for the guest; owner of the thread.
struct UnixSockets {
    path: PathBuf,
    reactor: Arc<Reactor>,
    thread: Option<JoinHandle<()>>,
}

impl UnixSockets {
    fn connect_to(&self, name: &str) -> Option<Box<dyn Stream>> {
        let mut path = OsString::from(self.path.as_os_str());
        path.push("_");
        path.push(name);
        let stream = UnixStream::connect(PathBuf::from(path)).ok()?;
        Some(Box::new(Socket::new(stream, self.reactor.clone())))
    }
}

impl Backend for UnixSockets {
    fn connect(&mut self, service: Service) -> Option<Box<dyn Stream>> {
        use std::string::ToString;
        let port = service.port_number();
        let by_port = port.and_then(|port| self.connect_to(&port.to_string()));
        by_port.or_else(|| self.connect_to(&service.0.to_string()))
    }
}

impl Drop for UnixSockets {
    fn drop(&mut self) {
        self.reactor.stop.store(true, Ordering::SeqCst);
        let woken = self.reactor.waker.wake();
        if let Some(thread) = self.thread.take()
            && woken.is_ok()
        {
            // A panic of the thread has been told already.
            let _ = thread.join();
        }
        // Somebody else may have removed it.
        let _ = fs::remove_file(&self.path);
    }
}

/// A connected socket. It is registered once its connection is open.
struct Socket {
    stream: UnixStream,
    reactor: Arc<Reactor>,
    token: Option<Token>,
    /// It could not be registered, so nobody would ever be woken.
    useless: bool,
}

impl Socket {
    fn new(stream: UnixStream, reactor: Arc<Reactor>) -> Self {
        Self {
            stream,
            reactor,
            token: None,
            useless: false,
        }
    }
}

impl Stream for Socket {
    fn attach(&mut self, link: Link) {
        let token = self.reactor.token();
        self.reactor.links.lock().insert(token, link);
        self.token = Some(token);
        let interest = Interest::READABLE | Interest::WRITABLE;
        let registered = self
            .reactor
            .registry
            .register(&mut self.stream, token, interest);
        self.useless = registered.is_err();
    }

    fn read(&mut self, buffer: &mut [u8]) -> Transfer {
        if self.useless {
            return Transfer::Ended;
        }
        transfer(|| self.stream.read(buffer))
    }

    fn write(&mut self, bytes: &[u8]) -> Transfer {
        if self.useless {
            return Transfer::Ended;
        }
        transfer(|| self.stream.write(bytes))
    }

    fn finish(&mut self) {
        // It may be gone.
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(token) = self.token {
            let _ = self.reactor.registry.deregister(&mut self.stream);
            self.reactor.links.lock().remove(&token);
        }
    }
}

fn transfer(mut act: impl FnMut() -> io::Result<usize>) -> Transfer {
    loop {
        return match act() {
            Ok(0) => Transfer::Ended,
            Ok(count) => Transfer::Moved(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Transfer::Blocked,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => Transfer::Ended,
        };
    }
}

/// The thread's own.
struct Waiting {
    reactor: Arc<Reactor>,
    listener: UnixListener,
    poll: Poll,
    sockets: SocketsHandle,
    greetings: HashMap<Token, Greeter>,
}

/// A program that is about to say what it wants.
struct Greeter {
    stream: UnixStream,
    bytes: Vec<u8>,
    until: Instant,
}

impl Waiting {
    fn run(mut self) {
        let mut events = Events::with_capacity(256);
        loop {
            let next = self.greetings.values().map(|greeter| greeter.until).min();
            let wait = next.map(|until| until.saturating_duration_since(Instant::now()));
            // A poll that fails for another reason than a signal would fail for ever.
            match self.poll.poll(&mut events, wait) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            }
            if self.reactor.stop.load(Ordering::SeqCst) {
                return;
            }
            for event in &events {
                match event.token() {
                    LISTENER => self.accept(),
                    WAKER => {}
                    token if self.greetings.contains_key(&token) => self.greeted(token),
                    token => {
                        let link = self.reactor.links.lock().get(&token).cloned();
                        if let Some(link) = link {
                            link.wake();
                        }
                    }
                }
            }
            let now = Instant::now();
            self.greetings.retain(|_, greeter| greeter.until > now);
        }
    }

    fn accept(&mut self) {
        loop {
            let mut stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // No more of them, or no more files: then the next one brings this one along.
                Err(_) => return,
            };
            let token = self.reactor.token();
            let registry = self.poll.registry();
            if self.greetings.len() < GREETINGS
                && registry
                    .register(&mut stream, token, Interest::READABLE)
                    .is_ok()
            {
                let greeter = Greeter {
                    stream,
                    bytes: Vec::new(),
                    until: Instant::now() + PATIENCE,
                };
                self.greetings.insert(token, greeter);
            }
        }
    }

    /// Something has come from a program that has not said yet what it wants.
    fn greeted(&mut self, token: Token) {
        let Some(mut greeter) = self.greetings.remove(&token) else {
            return;
        };
        loop {
            match greeting::parse(&greeter.bytes) {
                Greeting::Incomplete => {}
                Greeting::Bad => return,
                Greeting::Connect(service, first) => {
                    let _ = self.poll.registry().deregister(&mut greeter.stream);
                    let stream = Socket::new(greeter.stream, self.reactor.clone());
                    return self.sockets.connect(HostConnection {
                        service,
                        stream: Box::new(stream),
                        first,
                        greet: true,
                    });
                }
            }
            let mut buffer = [0; LONGEST];
            match transfer(|| greeter.stream.read(&mut buffer)) {
                Transfer::Moved(count) => greeter.bytes.extend(buffer.iter().take(count)),
                Transfer::Blocked => break,
                Transfer::Ended => return,
            }
        }
        self.greetings.insert(token, greeter);
    }
}

impl fmt::Debug for UnixSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UnixSockets({})", self.path.display())
    }
}
