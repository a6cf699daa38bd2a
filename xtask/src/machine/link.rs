//! The client's end of an agent's stream: requests go out, answers and events
//! come in and are sorted by VM.

use std::{
    collections::HashMap,
    io::{Read, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use agent::protocol::{
    CHUNK, Event, Nanoseconds, Numbered, Request, RequestId, VERSION, VmId, receive, send,
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

struct Shared {
    stream: Mutex<Box<dyn Write + Send>>,
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
    /// QEMU's error output.
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
    /// QEMU's exit status; `None` when a signal ended it.
    pub status: Option<i32>,
}

impl Link {
    /// Takes over a stream and waits until the agent says hello.
    pub fn new(
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
        limit: Duration,
    ) -> Result<Self> {
        let link = Self {
            shared: Arc::new(Shared {
                stream: Mutex::new(Box::new(output)),
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
    pub fn put(&self, name: &str, content: &[u8]) -> Result<()> {
        let mut offset = 0;
        let mut chunks = content.chunks(CHUNK);
        // An empty file is a file, too.
        let mut chunk = Some(chunks.next().unwrap_or_default());
        while let Some(data) = chunk {
            self.ask(Request::Put {
                name: name.to_owned(),
                offset,
                data: data.to_vec(),
            })?;
            offset += data.len() as u64;
            chunk = chunks.next();
        }
        Ok(())
    }

    /// Starts a VM and gives it a name.
    pub fn start(&self, program: Vec<String>, arguments: Vec<String>) -> Result<VmId> {
        let vm = VmId(self.shared.next.fetch_add(1, Ordering::Relaxed));
        lock(&self.shared.state).vms.insert(vm, Record::default());
        self.ask(Request::Start {
            vm,
            program,
            arguments,
        })?;
        Ok(vm)
    }

    /// Sends a line to a VM's monitor.
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

    fn ask(&self, request: Request) -> Result<()> {
        let id = self.send(request)?;
        self.answer(id)
    }

    fn send(&self, request: Request) -> Result<RequestId> {
        let id = RequestId(self.shared.next.fetch_add(1, Ordering::Relaxed));
        send(&mut *lock(&self.shared.stream), &Numbered { id, request })
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
    /// Reads events until the stream ends; an unreadable one ends it.
    fn read(&self, mut input: impl Read) {
        while let Ok(Some(event)) = receive(&mut input) {
            lock(&self.state).take(event);
            self.changed.notify_all();
        }
        lock(&self.state).closed = true;
        self.changed.notify_all();
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
