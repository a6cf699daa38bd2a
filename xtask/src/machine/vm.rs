//! One running VM: its console, its monitor, its end.

use std::time::Duration;

use agent::protocol::VmId;
use anyhow::{Context, Result, anyhow, bail};
use regex::bytes::Regex;
use serde_json::{Value, json};

use super::link::{Exited, Link, Record};

/// Longest wait for the monitor's answer to a command.
const MONITOR: Duration = Duration::from_secs(60);

/// A VM that was started. Dropping it ends it.
pub struct Vm {
    link: Link,
    id: VmId,
    /// Console bytes that `expect` has gone past.
    seen: usize,
    /// QMP messages that `event` has gone past.
    heard: usize,
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off by ACPI.
    PoweredOff,
    /// The guest asked for a reset, or fell into a triple fault; QEMU does not
    /// tell one from the other.
    Reset,
    /// The guest reported a crash through the crash registers.
    Panicked,
    /// The guest wrote this value to the debug-exit port.
    DebugExit(u8),
    /// QEMU ended by itself.
    Failed(Option<i32>),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest was reset"),
            Self::Panicked => write!(f, "the guest panicked"),
            Self::DebugExit(value) => write!(f, "the guest gave up with code {value}"),
            Self::Failed(Some(status)) => write!(f, "QEMU failed with status {status}"),
            Self::Failed(None) => write!(f, "QEMU was ended by a signal"),
        }
    }
}

impl Vm {
    /// Starts QEMU with a stopped VM, connects to the monitor so that no event is
    /// missed, then lets the VM go.
    /// With `hold`, letting it go is left to a debugger.
    pub(super) fn start(
        link: Link,
        program: Vec<String>,
        arguments: Vec<String>,
        hold: bool,
    ) -> Result<Self> {
        let id = link.start(program, arguments)?;
        let mut vm = Self {
            link,
            id,
            seen: 0,
            heard: 0,
        };
        let greeting = vm.watch(MONITOR, |record| {
            (!record.qmp.is_empty() || record.exited.is_some()).then_some(record.exited)
        })?;
        match greeting {
            Some(None) => {}
            Some(Some(_)) => bail!("QEMU does not start: {}", vm.complaints()),
            None => bail!("QEMU's monitor does not come up"),
        }
        vm.heard = 1;
        vm.qmp("qmp_capabilities", json!({}))?;
        if !hold {
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

    /// The whole console so far.
    pub fn console(&self) -> String {
        self.now(|record| text(&record.console))
    }

    /// The console's last lines and QEMU's complaints, for a failure's message.
    pub fn last_words(&self) -> String {
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        let last = lines
            .get(lines.len().saturating_sub(8)..)
            .unwrap_or_default();
        let mut words = String::from("; its last lines:");
        for line in last.iter().copied().chain(self.complaints().lines()) {
            words.push_str("\n        ");
            words.push_str(line);
        }
        words
    }

    /// What QEMU itself complained about so far.
    pub fn complaints(&self) -> String {
        self.now(|record| text(&record.complaints).trim().to_owned())
    }

    /// Runs a monitor command and gives its result.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Result<Value> {
        // Messages before this one are no answer to it; one command runs at a time.
        let from = self.now(|record| record.qmp.len());
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        self.link
            .qmp(self.id, line)
            .with_context(|| format!("cannot send `{command}`"))?;
        let answer = self.watch(MONITOR, |record| {
            let answer = record.qmp.get(from..)?.iter().find_map(|(_, message)| {
                (message.get("return").is_some() || message.get("error").is_some())
                    .then(|| message.clone())
            });
            match answer {
                Some(answer) => Some(Some(answer)),
                None => record.exited.map(|_| None),
            }
        })?;
        match answer {
            Some(Some(answer)) => match answer.get("return") {
                Some(value) => Ok(value.clone()),
                None => bail!(
                    "`{command}` failed: {}",
                    answer["error"]["desc"]
                        .as_str()
                        .unwrap_or("no reason given")
                ),
            },
            Some(None) => bail!(
                "{} before it answered `{command}`{}",
                self.ending()?,
                self.last_words()
            ),
            None => bail!("the monitor gave no answer to `{command}`"),
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
