//! One running VM: its console, its control, its end.

use std::{
    io::{self, PipeWriter, Write},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use agent::{
    protocol::{Target, VmId},
    streams::End,
};
use anyhow::{Context, Result, anyhow, bail};
use regex::bytes::Regex;
use serde_json::{Value, json};

use super::link::{Exited, Link, Record};

/// Longest wait for the answer to a command.
const MONITOR: Duration = Duration::from_secs(120);

/// A VM that was started. Dropping it ends it.
pub struct Vm {
    link: Link,
    id: VmId,
    control: Control,
    /// Leads to the console's input, once it was asked for.
    input: Option<PipeWriter>,
    /// Console bytes that `expect` has gone past.
    seen: usize,
    /// QMP messages that `event` has gone past.
    heard: usize,
}

/// How a VM is started.
pub(super) struct Start {
    /// What runs it, as failures name it.
    pub(super) name: &'static str,
    /// Program and leading arguments.
    pub(super) program: Vec<String>,
    /// Its further arguments.
    pub(super) arguments: Vec<String>,
    /// Whether its first thread goes before the others, as QEMU needs it.
    pub(super) first_thread_first: bool,
    /// Whether a debugger lets the VM go, and not we.
    pub(super) hold: bool,
}

/// The control of a VM, to be used from any thread: QEMU's monitor, or the test
/// machine's control, which speaks like it.
#[derive(Clone)]
pub struct Control {
    link: Link,
    id: VmId,
    next: Arc<AtomicU32>,
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off by ACPI.
    PoweredOff,
    /// The guest asked for a reset, or fell into a triple fault; one is not told
    /// from the other.
    Reset,
    /// The guest reported a crash through the crash registers.
    Panicked,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u8),
    /// What ran the VM ended by itself.
    Failed(Option<i32>),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest was reset"),
            Self::Panicked => write!(f, "the guest panicked"),
            Self::DebugExit(value) => write!(f, "the guest gave up with code {value}"),
            Self::Failed(Some(status)) => write!(f, "the VM's program failed with status {status}"),
            Self::Failed(None) => write!(f, "the VM's program was ended by a signal"),
        }
    }
}

impl Vm {
    /// Starts a program with a stopped VM, connects to its control so that no event is
    /// missed, then lets the VM go.
    pub(super) fn start(link: Link, start: Start) -> Result<Self> {
        let name = start.name;
        let id = link.start(start.program, start.arguments, start.first_thread_first)?;
        let mut vm = Self {
            control: Control {
                link: link.clone(),
                id,
                next: Arc::default(),
            },
            link,
            id,
            input: None,
            seen: 0,
            heard: 0,
        };
        let greeting = vm.watch(MONITOR, |record| {
            (!record.qmp.is_empty() || record.exited.is_some()).then_some(record.exited)
        })?;
        match greeting {
            Some(None) => {}
            Some(Some(_)) => {
                // By now all is told that it said.
                let said = vm.complaints();
                bail!("{name} does not start: {}", own_words(&said));
            }
            None => bail!("{name} starts, but its control does not come up"),
        }
        vm.heard = 1;
        vm.qmp("qmp_capabilities", json!({}))?;
        if !start.hold {
            vm.qmp("cont", json!({}))?;
        }
        Ok(vm)
    }

    /// Waits until the console's whole lines, after what the last `expect` found,
    /// match `pattern`; gives the text of each capture group (0 is the whole match).
    ///
    /// # Errors
    /// When `limit` passes, or the VM ends, without a match.
    pub fn expect(&mut self, pattern: &str, limit: Duration) -> Result<Vec<String>> {
        // Guests end lines with carriage return and line feed.
        let regex = Regex::new(&format!("(?mR){pattern}"))?;
        let seen = self.seen;
        let found = self.watch(limit, |record| {
            let rest = record.console.get(seen..).unwrap_or_default();
            // The line that is being printed may not match yet, or too early.
            let whole = match rest.iter().rposition(|byte| *byte == b'\n') {
                Some(end) if record.exited.is_none() => end + 1,
                None if record.exited.is_none() => 0,
                _ => rest.len(),
            };
            let rest = rest.get(..whole).unwrap_or_default();
            match regex.captures(rest) {
                Some(groups) => {
                    let end = groups.get(0).map_or(0, |whole| whole.end());
                    let texts = groups
                        .iter()
                        .map(|group| text(group.map_or(&b""[..], |group| group.as_bytes())))
                        .collect();
                    Some(Ok((end, texts)))
                }
                None => record.exited.map(Err),
            }
        })?;
        match found {
            Some(Ok((end, texts))) => {
                self.seen = seen + end;
                Ok(texts)
            }
            Some(Err(_)) => {
                let ending = self.ending()?;
                Err(anyhow!(
                    "{ending} before it printed {pattern:?}{}",
                    self.last_words()
                ))
            }
            None => Err(anyhow!(
                "the guest did not print {pattern:?} within {} s{}",
                limit.as_secs(),
                self.last_words()
            )),
        }
    }

    /// New console bytes since the last call; waits for some. `None` when the VM
    /// has ended and all is read. An empty piece when `limit` passes first.
    pub fn console_piece(&mut self, limit: Duration) -> Result<Option<Vec<u8>>> {
        let seen = self.seen;
        let piece = self.watch(limit, |record| {
            let rest = record.console.get(seen..).unwrap_or_default();
            if !rest.is_empty() {
                Some(Some(rest.to_vec()))
            } else {
                record.exited.map(|_| None)
            }
        })?;
        match piece {
            Some(Some(bytes)) => {
                self.seen += bytes.len();
                Ok(Some(bytes))
            }
            Some(None) => Ok(None),
            None => Ok(Some(Vec::new())),
        }
    }

    /// Waits until `look` finds something in the console's bytes behind what was gone past
    /// before; it gives how many of them it has used, too. `None` when `limit` passes first.
    ///
    /// # Errors
    /// When the VM ends without it.
    pub fn take_console<T>(
        &mut self,
        limit: Duration,
        look: impl Fn(&[u8]) -> Option<(usize, T)>,
    ) -> Result<Option<T>> {
        let seen = self.seen;
        let found = self.watch(limit, |record| {
            match look(record.console.get(seen..).unwrap_or_default()) {
                Some(found) => Some(Some(found)),
                None => record.exited.map(|_| None),
            }
        })?;
        match found {
            Some(Some((used, found))) => {
                self.seen = seen + used;
                Ok(Some(found))
            }
            Some(None) => bail!("{}{}", self.ending()?, self.last_words()),
            None => Ok(None),
        }
    }

    /// The whole console so far.
    pub fn console(&self) -> String {
        self.now(|record| text(&record.console))
    }

    /// The console's last lines and the program's complaints, for a failure's message.
    pub fn last_words(&self) -> String {
        self.now(last_words)
    }

    /// What QEMU or the test machine itself complained about so far.
    pub fn complaints(&self) -> String {
        self.now(|record| text(&record.complaints).trim().to_owned())
    }

    /// Runs a command of the control and gives its result.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.ctl(command, arguments)
    }

    /// The same; the name for commands that only the test machine knows.
    pub fn ctl(&self, command: &str, arguments: Value) -> Result<Value> {
        self.control.run(command, arguments)
    }

    /// The control, for other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Types these bytes at the guest's console.
    ///
    /// # Errors
    /// When the VM has ended.
    pub fn input(&mut self, bytes: &[u8]) -> Result<()> {
        let input = match &mut self.input {
            Some(input) => input,
            none => none.insert(open_input(&self.link, self.id)?),
        };
        input
            .write_all(bytes)
            .context("the VM takes no console input any more")
    }

    /// The way to the guest's console, for another thread; instead of [`Self::input`].
    /// Writing waits while the guest does not read.
    pub fn take_input(&mut self) -> Result<PipeWriter> {
        match self.input.take() {
            Some(input) => Ok(input),
            None => open_input(&self.link, self.id),
        }
    }

    /// Waits for the next event of this name for which `fits` holds; gives its
    /// data. Events before it are passed over.
    pub fn event(
        &mut self,
        name: &str,
        limit: Duration,
        fits: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let heard = self.heard;
        let found = self.watch(limit, |record| {
            let position = record
                .qmp
                .iter()
                .enumerate()
                .skip(heard)
                .find(|(_, (_, message))| message["event"] == name && fits(&message["data"]));
            match position {
                Some((index, (_, message))) => Some(Some((index, message["data"].clone()))),
                None => record.exited.map(|_| None),
            }
        })?;
        match found {
            Some(Some((index, data))) => {
                self.heard = index + 1;
                Ok(data)
            }
            Some(None) => bail!("the VM ended before the event {name}{}", self.last_words()),
            None => bail!(
                "no event {name} within {} s{}",
                limit.as_secs(),
                self.last_words()
            ),
        }
    }

    /// Passes over all events so far: the next one waited for is a new one.
    pub fn forget_events(&mut self) {
        self.heard = self.now(|record| record.qmp.len());
    }

    /// Waits for the VM's end.
    pub fn wait(&mut self, limit: Duration) -> Result<Ending> {
        match self.watch(limit, |record| record.exited)? {
            Some(_) => self.ending(),
            None => bail!("the VM did not end within {} s", limit.as_secs()),
        }
    }

    /// How the VM ended. It must have.
    fn ending(&self) -> Result<Ending> {
        self.now(|record| record.exited.map(|exited| classify(record, exited)))
            .ok_or_else(|| anyhow!("the VM has not ended"))
    }

    fn watch<T>(
        &self,
        limit: Duration,
        look: impl FnMut(&mut Record) -> Option<T>,
    ) -> Result<Option<T>> {
        self.link.watch(self.id, limit, look)
    }

    /// Looks once. A VM's record is there as long as the VM is.
    fn now<T: Default>(&self, look: impl Fn(&Record) -> T) -> T {
        self.watch(Duration::ZERO, |record| Some(look(record)))
            .ok()
            .flatten()
            .unwrap_or_default()
    }
}

impl Control {
    /// Runs a command and gives its result.
    ///
    /// # Errors
    /// What the control gives as the reason, or that the VM has ended.
    pub fn run(&self, command: &str, arguments: Value) -> Result<Value> {
        let answer = self.answer(command, arguments)?;
        match answer.get("return") {
            Some(value) => Ok(value.clone()),
            None => bail!(
                "`{command}` failed: {}",
                answer["error"]["desc"]
                    .as_str()
                    .unwrap_or("no reason given")
            ),
        }
    }

    /// Runs a command and gives the whole answer: `return` or `error`, and `id`.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn answer(&self, command: &str, arguments: Value) -> Result<Value> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        let mut looked = 0;
        self.link
            .qmp(self.id, line)
            .with_context(|| format!("cannot send `{command}`"))?;
        let answer = self.link.watch(self.id, MONITOR, |record| {
            let found = record
                .qmp
                .iter()
                .skip(looked)
                .find(|(_, message)| message["id"] == id && message.get("event").is_none());
            looked = record.qmp.len();
            match found {
                Some((_, answer)) => Some(Ok(answer.clone())),
                None => record
                    .exited
                    .map(|exited| Err((classify(record, exited), last_words(record)))),
            }
        })?;
        match answer {
            Some(Ok(answer)) => Ok(answer),
            Some(Err((ending, words))) => bail!("{ending} before it answered `{command}`{words}"),
            None => bail!("there was no answer to `{command}`"),
        }
    }
}

/// Opens the stream to a VM's console input.
fn open_input(link: &Link, id: VmId) -> Result<PipeWriter> {
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    link.open(
        Target::Input(id),
        End {
            reader: Box::new(reader),
            writer: Box::new(io::sink()),
            finish: Box::new(|| ()),
            // The reader ends when the writer is dropped; nothing else waits.
            abort: Box::new(|| ()),
        },
    )?;
    Ok(writer)
}

/// The console's last lines and the program's complaints, for a failure's message.
fn last_words(record: &Record) -> String {
    let (console, complaints) = (text(&record.console), text(&record.complaints));
    let lines: Vec<_> = console.lines().collect();
    let last = lines
        .get(lines.len().saturating_sub(8)..)
        .unwrap_or_default();
    let mut words = String::from("; its last lines:");
    for line in last.iter().copied().chain(complaints.trim().lines()) {
        words.push_str("\n        ");
        words.push_str(line);
    }
    words
}

/// What a program said, without the word that it begins its failures with.
fn own_words(said: &str) -> &str {
    let said = ["error: ", "enlit-vmm: "]
        .iter()
        .find_map(|word| said.strip_prefix(word))
        .unwrap_or(said);
    if said.is_empty() {
        "it gives no reason"
    } else {
        said
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.link.discard(self.id);
    }
}

fn classify(record: &Record, exited: Exited) -> Ending {
    let last = |name: &str| {
        record
            .qmp
            .iter()
            .rev()
            .map(|(_, message)| message)
            .find(|message| message["event"] == name)
    };
    if last("GUEST_PANICKED").is_some() {
        return Ending::Panicked;
    }
    let reason = last("SHUTDOWN").and_then(|message| message["data"]["reason"].as_str());
    match (reason, exited.status) {
        (Some("guest-shutdown"), Some(0)) => Ending::PoweredOff,
        (Some("guest-reset"), Some(0)) => Ending::Reset,
        // QEMU's own failures have status 1, which the port gives for 0, too; but
        // then there is a complaint.
        (_, Some(status)) if status & 1 == 1 && record.complaints.is_empty() => {
            u8::try_from(status >> 1).map_or(Ending::Failed(Some(status)), Ending::DebugExit)
        }
        (_, status) => Ending::Failed(status),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\r', "")
}

#[cfg(test)]
mod tests {
    use agent::protocol::Nanoseconds;

    use super::*;

    fn record(messages: &[Value], complaints: &str) -> Record {
        Record {
            qmp: messages
                .iter()
                .map(|message| (Nanoseconds(0), message.clone()))
                .collect(),
            complaints: complaints.into(),
            ..Record::default()
        }
    }

    fn ended(status: i32) -> Exited {
        Exited {
            at: Nanoseconds(0),
            status: Some(status),
        }
    }

    #[test]
    fn endings_are_told_apart() {
        let shutdown = |reason: &str| json!({"event": "SHUTDOWN", "data": {"reason": reason}});
        let panicked = json!({"event": "GUEST_PANICKED", "data": {}});
        let of = |messages: &[Value], status| classify(&record(messages, ""), ended(status));
        assert_eq!(of(&[shutdown("guest-shutdown")], 0), Ending::PoweredOff);
        assert_eq!(of(&[shutdown("guest-reset")], 0), Ending::Reset);
        assert_eq!(
            of(&[panicked, shutdown("guest-panic")], 1),
            Ending::Panicked
        );
        assert_eq!(of(&[], 35), Ending::DebugExit(17));
        assert_eq!(of(&[], 0), Ending::Failed(Some(0)));
        assert_eq!(
            classify(&record(&[], "qemu: no such device"), ended(1)),
            Ending::Failed(Some(1))
        );
    }
}
