//! The shell of a running Linux guest.

use std::time::Duration;

use anyhow::{Result, anyhow, bail, ensure};

use crate::machine::Vm;

/// Longest boot. Usually below half a minute on the nested machine.
const BOOT: Duration = Duration::from_secs(120);

/// Time limit of a usual command. Ten times of what any needs.
const LIMIT: Duration = Duration::from_secs(60);

/// What a command may take to be typed and answered, beyond its own limit.
const BEYOND: Duration = Duration::from_secs(30);

/// A Linux guest with its shell. Dropping it ends its VM.
pub struct Guest {
    vm: Vm,
    next: u32,
}

/// A command's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// How it ended.
    pub status: Status,
    /// What it printed, on both its streams.
    pub output: String,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// By itself, with this exit status.
    Exit(u8),
    /// By a signal.
    Signal(u8),
    /// By its time limit.
    Late,
}

impl Guest {
    /// Waits until Linux has come up.
    pub fn come_up(mut vm: Vm) -> Result<Self> {
        vm.expect("^=ready$", BOOT)?;
        Ok(Self { vm, next: 0 })
    }

    /// The VM that it runs in.
    pub fn vm(&mut self) -> &mut Vm {
        &mut self.vm
    }

    /// Runs a command that must succeed; gives what it printed, without the last line's end.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.run_ok(command, LIMIT)
    }

    /// The same, for a command that takes long.
    pub fn run_ok(&mut self, command: &str, limit: Duration) -> Result<String> {
        let done = self.run(command, limit)?;
        ensure!(
            done.status == Status::Exit(0),
            "in the guest, `{command}` ended with {:?} and said:\n{}",
            done.status,
            done.output
        );
        Ok(done.output.trim_end().to_owned())
    }

    /// Waits until a condition of the shell holds.
    pub fn until(&mut self, condition: &str, limit: Duration) -> Result<()> {
        let command = format!("until {condition}; do usleep 20000; done");
        let done = self.run(&command, limit)?;
        ensure!(
            done.status == Status::Exit(0),
            "in the guest, `{condition}` did not come true within {} s{}",
            limit.as_secs(),
            self.vm.last_words()
        );
        Ok(())
    }

    /// Starts a command and leaves it running; [`Guest::join`] with the same name gives its end.
    pub fn spawn(&mut self, name: &str, command: &str) -> Result<()> {
        self.sh(&format!(
            "rm -f /tmp/{name}.end\n\
             {{ ( {command}\n) >/tmp/{name}.out 2>&1; echo $? >/tmp/{name}.new; \
             mv /tmp/{name}.new /tmp/{name}.end; }} </dev/null >/dev/null 2>&1 &"
        ))
        .map(drop)
    }

    /// Waits for the end of a command that was left running.
    pub fn join(&mut self, name: &str, limit: Duration) -> Result<Done> {
        self.until(&format!("[ -e /tmp/{name}.end ]"), limit)?;
        let status = self.sh(&format!("cat /tmp/{name}.end"))?;
        Ok(Done {
            status: Status::Exit(status.trim().parse()?),
            output: self.sh(&format!("cat /tmp/{name}.out"))?,
        })
    }

    /// Runs a command, for so long at most.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Done> {
        self.next += 1;
        let id = self.next;
        let request = format!(
            "RUN {id} {} {}\n{command}",
            limit.as_millis(),
            command.len()
        );
        self.vm.input(request.as_bytes())?;
        let end = format!("\n=end {id}\n");
        let head = format!("=answer {id} ");
        let found = self.vm.take_console(limit + BEYOND, |console| {
            let start = find(console, head.as_bytes())?;
            let rest = console.get(start..)?;
            let line = rest.split(|byte| *byte == b'\n').next()?;
            let body = rest.get(line.len() + 1..)?;
            let line = String::from_utf8_lossy(line).into_owned();
            let words: Vec<_> = line.split_whitespace().collect();
            let length = words.get(3)?.parse::<usize>().ok()?;
            let output = body.get(..length)?;
            let after = body.get(length..)?.get(..end.len())?;
            let used = start + line.len() + 1 + length + end.len();
            let done = (after == end.as_bytes())
                .then(|| answer(&words, output))
                .flatten();
            Some((used, (line, done)))
        })?;
        match found {
            Some((_, Some(done))) => Ok(done),
            Some((line, None)) => bail!("the guest's shell answered what cannot be read: {line}"),
            None => Err(anyhow!(
                "the guest's shell did not answer `{command}` within {} s{}",
                (limit + BEYOND).as_secs(),
                self.vm.last_words()
            )),
        }
    }
}

/// Reads `=answer id status length total` and the output behind it.
fn answer(words: &[&str], output: &[u8]) -> Option<Done> {
    let [_, _, status, length, total] = words[..] else {
        return None;
    };
    let status = match status {
        "limit" => Status::Late,
        other => match other.strip_prefix("signal") {
            Some(signal) => Status::Signal(signal.parse().ok()?),
            None => Status::Exit(other.parse().ok()?),
        },
    };
    let mut output = String::from_utf8_lossy(output).into_owned();
    if length != total {
        output.push_str(&format!("\n[cut: {length} of {total} bytes]"));
    }
    Some(Done { status, output })
}

fn find(within: &[u8], what: &[u8]) -> Option<usize> {
    within.windows(what.len()).position(|part| part == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let read = |line: &str, output: &[u8]| {
            answer(&line.split_whitespace().collect::<Vec<_>>(), output)
        };
        let done = read("=answer 4 0 2 2", b"ok").unwrap();
        assert_eq!((done.status, done.output.as_str()), (Status::Exit(0), "ok"));
        assert_eq!(
            read("=answer 4 signal9 0 0", b"").unwrap().status,
            Status::Signal(9)
        );
        let late = read("=answer 4 limit 1 9", b"x").unwrap();
        assert_eq!(late.status, Status::Late);
        assert!(late.output.contains("cut: 1 of 9"));
        assert_eq!(read("=answer 4 failed 0 0", b""), None);
        assert_eq!(read("=answer 4 0 0", b""), None);
    }
}
