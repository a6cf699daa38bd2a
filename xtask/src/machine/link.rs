//! The client's end of an agent's stream: requests go out, answers and events
//! come in and are sorted by VM; streams run beside them.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use agent::{
    protocol::{
        CHUNK, Call, Event, ListenerId, Nanoseconds, Numbered, Request, RequestId, StreamId,
        Target, VERSION, VmId, receive, send,
    },
    streams::{End, Side, Streams},
};
use anyhow::{Result, anyhow, bail, ensure};
use serde_json::Value;

/// Longest wait for an answer. Requests are carried out at once; only the
/// agent's end, or a machine that stands still, takes longer.
const ANSWER: Duration = Duration::from_secs(60);

/// A connection to an agent. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
}

type Output = Arc<Mutex<Box<dyn Write + Send>>>;

/// Makes the client's end for a connection that came in.
type Accept = Arc<dyn Fn() -> io::Result<End> + Send + Sync>;

struct Shared {
    stream: Output,
    streams: Streams,
    listeners: Mutex<HashMap<ListenerId, Accept>>,
    state: Mutex<State>,
    changed: Condvar,
    next: AtomicU32,
}

#[derive(Default)]
struct State {
    hello: Option<u32>,
    closed: bool,
    answers: HashMap<RequestId, Result<(), String>>,
    parts: HashMap<RequestId, Vec<u8>>,
    vms: HashMap<VmId, Record>,
}

/// All that a VM has said so far.
#[derive(Debug, Default)]
pub struct Record {
    /// Console bytes.
    pub console: Vec<u8>,
    /// Error output of the VM's program.
    pub complaints: Vec<u8>,
    /// QMP messages with their times of arrival.
    pub qmp: Vec<(Nanoseconds, Value)>,
    /// Set when the VM has ended.
    pub exited: Option<Exited>,
}

/// A VM's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// When.
    pub at: Nanoseconds,
    /// The program's exit status; `None` when a signal ended it.
    pub status: Option<i32>,
}

impl Link {
    /// Takes over a stream and waits until the agent says hello.
    pub fn new(
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
        limit: Duration,
    ) -> Result<Self> {
        let stream: Output = Arc::new(Mutex::new(Box::new(output)));
        let pieces = stream.clone();
        let streams = Streams::new(Side::Client, move |stream, piece| {
            send(&mut *lock(&pieces), &Call::Piece { stream, piece })
        });
        let link = Self {
            shared: Arc::new(Shared {
                stream,
                streams,
                listeners: Mutex::default(),
                state: Mutex::default(),
                changed: Condvar::new(),
                next: AtomicU32::new(0),
            }),
        };
        let shared = link.shared.clone();
        thread::spawn(move || shared.read(input));
        let version = link
            .wait(limit, |state| state.hello)?
            .ok_or_else(|| anyhow!("the agent did not come up within {} s", limit.as_secs()))?;
        ensure!(
            version == VERSION,
            "the agent speaks version {version}, xtask version {VERSION}"
        );
        Ok(link)
    }

    /// Whether the stream has ended.
    pub fn is_closed(&self) -> bool {
        lock(&self.shared.state).closed
    }

    /// Puts a file into the agent's directory.
    pub fn put(&self, name: &str, content: &[u8], executable: bool) -> Result<()> {
        let mut offset = 0;
        let mut chunks = content.chunks(CHUNK);
        // An empty file is a file, too.
        let mut chunk = Some(chunks.next().unwrap_or_default());
        while let Some(data) = chunk {
            self.ask(Request::Put {
                name: name.to_owned(),
                offset,
                data: data.to_vec(),
                executable,
            })?;
            offset += data.len() as u64;
            chunk = chunks.next();
        }
        Ok(())
    }

    /// Starts a VM and gives it a name.
    pub fn start(
        &self,
        program: Vec<String>,
        arguments: Vec<String>,
        first_thread_first: bool,
    ) -> Result<VmId> {
        let vm = VmId(self.next());
        lock(&self.shared.state).vms.insert(vm, Record::default());
        self.ask(Request::Start {
            vm,
            program,
            arguments,
            first_thread_first,
        })?;
        Ok(vm)
    }

    /// Opens a stream to something on the agent's system and joins it to `end`.
    pub fn open(&self, to: Target, end: End) -> Result<()> {
        let stream = self.shared.streams.reserve()?;
        match self.ask(Request::Open { stream, to }) {
            Ok(()) => self.shared.streams.join(stream, end),
            Err(error) => {
                self.shared.streams.forget(stream);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Listens on a Unix socket of the agent's system. Each connection becomes a stream
    /// to what `accept` makes, or is closed when that fails.
    pub fn listen(
        &self,
        path: &str,
        accept: impl Fn() -> io::Result<End> + Send + Sync + 'static,
    ) -> Result<ListenerId> {
        let listener = ListenerId(self.next());
        lock(&self.shared.listeners).insert(listener, Arc::new(accept));
        self.ask(Request::Listen {
            listener,
            path: path.to_owned(),
        })?;
        Ok(listener)
    }

    /// Ends a listener.
    pub fn unlisten(&self, listener: ListenerId) -> Result<()> {
        lock(&self.shared.listeners).remove(&listener);
        self.ask(Request::Unlisten { listener })
    }

    /// Sends a line to a VM's control.
    pub fn qmp(&self, vm: VmId, line: String) -> Result<()> {
        self.ask(Request::Qmp { vm, line })
    }

    /// Ends a VM without waiting for anything, and forgets what it said.
    pub fn discard(&self, vm: VmId) {
        let running = lock(&self.shared.state)
            .vms
            .get(&vm)
            .is_some_and(|record| record.exited.is_none());
        if running && self.ask(Request::Kill { vm }).is_ok() {
            // A VM that does not end is the agent's to clear away at its own end.
            drop(self.wait(ANSWER, |state| state.vms.get(&vm)?.exited));
        }
        lock(&self.shared.state).vms.remove(&vm);
    }

    /// Reads a file of the agent's system.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        let id = self.send(Request::Read { path: path.into() })?;
        let answer = self.answer(id);
        let content = lock(&self.shared.state).parts.remove(&id);
        answer?;
        Ok(content.unwrap_or_default())
    }

    /// Writes a file of the agent's system.
    pub fn write(&self, path: &str, data: &[u8]) -> Result<()> {
        self.ask(Request::Write {
            path: path.into(),
            data: data.to_vec(),
        })
    }

    /// Asks the agent to end.
    pub fn power_off(&self) -> Result<()> {
        self.ask(Request::PowerOff)
    }

    /// Looks at what a VM has said until `look` finds something; `None` when
    /// `limit` has passed first.
    pub fn watch<T>(
        &self,
        vm: VmId,
        limit: Duration,
        mut look: impl FnMut(&mut Record) -> Option<T>,
    ) -> Result<Option<T>> {
        self.wait(limit, |state| state.vms.get_mut(&vm).and_then(&mut look))
    }

    fn next(&self) -> u32 {
        self.shared.next.fetch_add(1, Ordering::Relaxed)
    }

    fn ask(&self, request: Request) -> Result<()> {
        let id = self.send(request)?;
        self.answer(id)
    }

    fn send(&self, request: Request) -> Result<RequestId> {
        let id = RequestId(self.next());
        let call = Call::Request(Numbered { id, request });
        send(&mut *lock(&self.shared.stream), &call)
            .map_err(|error| anyhow!("the agent does not listen: {error}"))?;
        Ok(id)
    }

    fn answer(&self, id: RequestId) -> Result<()> {
        self.wait(ANSWER, |state| state.answers.remove(&id))?
            .ok_or_else(|| anyhow!("the agent gave no answer for {} s", ANSWER.as_secs()))?
            .map_err(|reason| anyhow!(reason))
    }

    fn wait<T>(
        &self,
        limit: Duration,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.shared.state);
        loop {
            if let Some(found) = look(&mut state) {
                return Ok(Some(found));
            }
            if state.closed {
                bail!("the machine has gone");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Shared {
    /// Reads events until the stream ends; an unreadable one ends it. Nothing here may
    /// send: the agent may be waiting for us to read.
    fn read(&self, mut input: impl Read) {
        while let Ok(Some(event)) = receive(&mut input) {
            match event {
                Event::Piece { stream, piece } => self.streams.receive(stream, piece),
                Event::Incoming { listener, stream } => self.incoming(listener, stream),
                event => {
                    lock(&self.state).take(event);
                    self.changed.notify_all();
                }
            }
        }
        lock(&self.state).closed = true;
        self.changed.notify_all();
        self.streams.close();
        lock(&self.listeners).clear();
    }

    fn incoming(&self, listener: ListenerId, stream: StreamId) {
        let accept = lock(&self.listeners).get(&listener).cloned();
        let streams = self.streams.clone();
        // Both ends count their streams by the same bound, so there is room here, too.
        let announced = streams.announce(stream);
        thread::spawn(move || match accept.map(|accept| accept()) {
            Some(Ok(end)) if announced.is_ok() => streams.join(stream, end),
            _ => streams.reset(stream),
        });
    }
}

impl State {
    fn take(&mut self, event: Event) {
        match event {
            Event::Hello { version } => self.hello = Some(version),
            Event::Answer { id, result } => {
                self.answers.insert(id, result);
            }
            Event::Part { id, data } => self.parts.entry(id).or_default().extend(data),
            Event::Console { vm, data, .. } => {
                self.with(vm, |record| record.console.extend(data));
            }
            Event::Complaint { vm, data } => self.with(vm, |record| record.complaints.extend(data)),
            Event::Qmp { vm, at, line } => self.with(vm, |record| {
                if let Ok(message) = serde_json::from_str(&line) {
                    record.qmp.push((at, message));
                }
            }),
            Event::Exited { vm, at, status } => {
                self.with(vm, |record| record.exited = Some(Exited { at, status }));
            }
            // Not of the state.
            Event::Incoming { .. } | Event::Piece { .. } => {}
        }
    }

    /// Events of a VM that was discarded are of no interest.
    fn with(&mut self, vm: VmId, change: impl FnOnce(&mut Record)) {
        if let Some(record) = self.vms.get_mut(&vm) {
            change(record);
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
