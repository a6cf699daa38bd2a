//! The agent's working half: serves one client over one stream.

use std::{
    collections::HashMap,
    fs,
    io::{self, Read, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::{FileExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use crate::{
    files,
    protocol::{
        CHUNK, Call, Event, ListenerId, Nanoseconds, Numbered, Request, RequestId, StreamId,
        Target, VERSION, VmId, receive, send,
    },
    streams::{End, Side, Streams},
    vm::{Program, Running},
};

/// How serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The client asked for [`Request::PowerOff`].
    PowerOff,
    /// The client has gone.
    Closed,
}

/// Serves the client at the other end of the stream until it goes or asks for
/// power-off. Uploaded files live in `directory`, which must exist. VMs that
/// still run at the end are killed and waited for.
///
/// # Errors
/// When the stream breaks or carries something that is no request.
pub fn serve(
    mut input: impl Read,
    output: impl Write + Send + 'static,
    directory: &Path,
) -> io::Result<Ending> {
    let out = Out {
        stream: Arc::new(Mutex::new(Box::new(output))),
        start: Instant::now(),
    };
    let link = out.clone();
    let streams = Streams::new(Side::Agent, move |stream, piece| {
        link.event(&Event::Piece { stream, piece })
    });
    let mut server = Server {
        out,
        directory: directory.to_owned(),
        vms: HashMap::new(),
        streams,
        listeners: HashMap::new(),
    };
    server.out.event(&Event::Hello { version: VERSION })?;
    let ending = server.run(&mut input);
    for (_, listener) in server.listeners.drain() {
        listener.end();
    }
    server.streams.close();
    for (_, vm) in server.vms.drain() {
        vm.end();
    }
    ending
}

struct Server {
    out: Out,
    directory: PathBuf,
    vms: HashMap<VmId, Running>,
    streams: Streams,
    listeners: HashMap<ListenerId, Listener>,
}

impl Server {
    fn run(&mut self, input: &mut impl Read) -> io::Result<Ending> {
        while let Some(call) = receive(input)? {
            let Numbered { id, request } = match call {
                Call::Request(request) => request,
                Call::Piece { stream, piece } => {
                    self.streams.receive(stream, piece);
                    continue;
                }
            };
            let result = match request {
                Request::PowerOff => {
                    self.out.answer(id, Ok(()))?;
                    return Ok(Ending::PowerOff);
                }
                Request::Open { stream, to } => {
                    self.open(id, stream, to);
                    continue;
                }
                // A file may be one whose content the client has to bring: aside.
                Request::Read { path } => {
                    let out = self.out.clone();
                    thread::spawn(move || {
                        let result = read(&out, id, &path);
                        let reason = |error| format!("cannot read {path}: {error}");
                        // A client that has gone hears nothing.
                        drop(out.answer(id, result.map_err(reason)));
                    });
                    continue;
                }
                Request::Write { path, data } => {
                    let out = self.out.clone();
                    thread::spawn(move || {
                        let result = write(&path, &data);
                        let reason = |error| format!("cannot write {path}: {error}");
                        drop(out.answer(id, result.map_err(reason)));
                    });
                    continue;
                }
                request => self.carry_out(request),
            };
            self.out.answer(id, result)?;
        }
        Ok(Ending::Closed)
    }

    fn carry_out(&mut self, request: Request) -> Result<(), String> {
        match request {
            Request::Put {
                name,
                offset,
                data,
                executable,
            } => self
                .put(&name, offset, &data, executable)
                .map_err(|error| format!("cannot write {name}: {error}")),
            Request::Start {
                vm,
                program,
                arguments,
                first_thread_first,
            } => self.start(
                vm,
                &Program {
                    words: [program, arguments].concat(),
                    first_thread_first,
                },
            ),
            Request::Qmp { vm, line } => self
                .vm(vm)?
                .say(&line)
                .map_err(|error| format!("its control does not listen: {error}")),
            Request::Kill { vm } => {
                self.vm(vm)?.kill();
                Ok(())
            }
            Request::Listen { listener, path } => self
                .listen(listener, &path)
                .map_err(|error| format!("cannot listen at {path}: {error}")),
            Request::Unlisten { listener } => self
                .listeners
                .remove(&listener)
                .map(Listener::end)
                .ok_or_else(|| format!("there is no listener {}", listener.0)),
            // These are not answered here.
            Request::Read { .. }
            | Request::Write { .. }
            | Request::Open { .. }
            | Request::PowerOff => Ok(()),
        }
    }

    fn vm(&self, vm: VmId) -> Result<&Running, String> {
        self.vms
            .get(&vm)
            .ok_or_else(|| format!("there is no VM {}", vm.0))
    }

    fn put(&self, name: &str, offset: u64, data: &[u8], executable: bool) -> io::Result<()> {
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(io::Error::other("not a plain file name"));
        }
        let path = self.directory.join(name);
        // A program that runs can be replaced but not changed.
        if offset == 0 && executable && path.exists() {
            fs::remove_file(&path)?;
        }
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(offset == 0)
            .mode(if executable { 0o755 } else { 0o644 })
            .open(path)?;
        file.write_all_at(data, offset)
    }

    fn start(&mut self, vm: VmId, program: &Program) -> Result<(), String> {
        if self.vms.contains_key(&vm) {
            return Err(format!("VM {} exists already", vm.0));
        }
        let running = Running::start(vm, program, &self.directory, &self.out)
            .map_err(|error| format!("cannot start it: {error}"))?;
        self.vms.insert(vm, running);
        Ok(())
    }

    /// Opens a stream and answers. Connecting may have to wait for the one who listens,
    /// so it is done aside.
    fn open(&mut self, id: RequestId, stream: StreamId, to: Target) {
        let begin = |error: io::Error| format!("cannot open a stream: {error}");
        if let Err(error) = self.streams.announce(stream).map_err(begin) {
            // A client that has gone hears nothing.
            return drop(self.out.answer(id, Err(error)));
        }
        let (streams, out) = (self.streams.clone(), self.out.clone());
        let finish = move |end: Result<End, String>| match end {
            Ok(end) => {
                drop(out.answer(id, Ok(())));
                streams.join(stream, end);
            }
            Err(reason) => {
                streams.forget(stream);
                drop(out.answer(id, Err(reason)));
            }
        };
        match to {
            Target::Socket(path) => {
                let place = self.directory.join(&path);
                thread::spawn(move || {
                    let end = UnixStream::connect(place).and_then(End::of_socket);
                    finish(end.map_err(|error| format!("cannot connect to {path}: {error}")));
                });
            }
            Target::Input(vm) => {
                let input = match self.vms.get_mut(&vm) {
                    Some(vm) => vm.take_input(),
                    None => Err(format!("there is no VM {}", vm.0)),
                };
                finish(input);
            }
            Target::Files(directory) => finish(
                files::mount(&directory)
                    .map_err(|error| format!("cannot mount FUSE at {directory}: {error}")),
            ),
        }
    }

    fn listen(&mut self, id: ListenerId, path: &str) -> io::Result<()> {
        if self.listeners.contains_key(&id) {
            return Err(io::Error::other(format!(
                "listener {} exists already",
                id.0
            )));
        }
        let path = self.directory.join(path);
        let socket = Arc::new(UnixListener::bind(&path)?);
        let (streams, out) = (self.streams.clone(), self.out.clone());
        let accepting = socket.clone();
        let thread = thread::spawn(move || {
            for connection in accepting.incoming() {
                let Ok(connection) = connection else { return };
                // With too many streams open the connection is closed at once.
                let Ok(stream) = streams.reserve() else {
                    continue;
                };
                let said = out.event(&Event::Incoming {
                    listener: id,
                    stream,
                });
                match (said, End::of_socket(connection)) {
                    (Ok(()), Ok(end)) => streams.join(stream, end),
                    (Ok(()), Err(_)) => streams.reset(stream),
                    (Err(_), _) => return,
                }
            }
        });
        self.listeners.insert(
            id,
            Listener {
                socket,
                path,
                thread,
            },
        );
        Ok(())
    }
}

fn read(out: &Out, id: RequestId, path: &str) -> io::Result<()> {
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = file.read(&mut buffer)?;
        if length == 0 {
            return Ok(());
        }
        out.event(&Event::Part {
            id,
            data: buffer.get(..length).unwrap_or_default().to_vec(),
        })?;
    }
}

fn write(path: &str, data: &[u8]) -> io::Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)?
        .write_all(data)
}

/// A listening socket and the thread that accepts its connections.
struct Listener {
    socket: Arc<UnixListener>,
    path: PathBuf,
    thread: thread::JoinHandle<()>,
}

impl Listener {
    fn end(self) {
        // Wakes the thread. It fails only for a socket that is none.
        let _ = rustix::net::shutdown(self.socket.as_fd(), rustix::net::Shutdown::Both);
        drop(self.thread.join());
        drop(fs::remove_file(&self.path));
    }
}

/// Where events go; every thread of the agent has one.
#[derive(Clone)]
pub(crate) struct Out {
    stream: Arc<Mutex<Box<dyn Write + Send>>>,
    start: Instant,
}

impl Out {
    /// Says it.
    pub(crate) fn event(&self, event: &Event) -> io::Result<()> {
        send(&mut *lock(&self.stream), event)
    }

    /// The agent's clock.
    pub(crate) fn now(&self) -> Nanoseconds {
        Nanoseconds(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn answer(&self, id: RequestId, result: Result<(), String>) -> io::Result<()> {
        self.event(&Event::Answer { id, result })
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked holding it left a whole value behind: each critical
    // section is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
