//! The Linux referee's shell: runs commands that a test types on the serial port, and answers
//! each in a frame that cannot be mistaken for anything else.
//!
//! A request is a line `RUN id limit length` (the limit in milliseconds) and `length` bytes for
//! `sh -c`. The answer is a line `=answer id status length total` and `length` bytes, what the
//! command printed; `total` is larger when some was cut. The status is the exit status, `signal`
//! and a number, or `limit` for a command that had to be killed. A line `=end id` follows.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process_group, pidfd_open, wait},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use crate::init::{load_modules, mount_all};

/// The console. Its bytes are dear: each is an exit.
const PORT: &str = "/dev/ttyS0";

/// What a command prints goes here, so that one that leaves others running ends all the same.
const OUTPUT: &str = "/tmp/output";

/// Most bytes of output in an answer.
const LONGEST: usize = 32 << 10;

/// Longest command in bytes.
const LONGEST_COMMAND: usize = 64 << 10;

/// Only what ends the kernel is printed: anything else could come in the middle of an answer.
const QUIET: &str = "1 4 1 7";

/// How long a killed command may take to go. One that waits for a device may never go.
const AFTER_KILL: Duration = Duration::from_millis(500);

pub(crate) fn role() -> io::Result<()> {
    mount_all(&[
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("debugfs", "/sys/kernel/debug"),
    ])?;
    let installed = Command::new("/bin/busybox")
        .args(["--install", "-s", "/bin"])
        .status()?;
    if !installed.success() {
        return Err(io::Error::other(format!("busybox: {installed}")));
    }
    // Which drivers there are is for the tests to find out.
    if let Err(error) = load_modules() {
        eprintln!("error: {error}");
    }
    fs::write("/proc/sys/kernel/printk", QUIET)?;
    let port = fs::OpenOptions::new().read(true).write(true).open(PORT)?;
    let mut settings = tcgetattr(&port)?;
    settings.make_raw();
    tcsetattr(&port, OptionalActions::Now, &settings)?;
    (&port).write_all(b"=ready\n")?;
    let mut input = BufReader::new(&port);
    loop {
        let request = Request::read(&mut input)?;
        (&port).write_all(&request.answer())?;
        clear_away();
    }
}

struct Request {
    id: u32,
    limit: Duration,
    command: String,
}

impl Request {
    fn read(input: &mut impl BufRead) -> io::Result<Self> {
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            return Err(io::Error::other("the console has gone"));
        }
        let wrong = || io::Error::other(format!("no request: {line:?}"));
        let words: Vec<_> = line.split_whitespace().collect();
        let ["RUN", id, limit, length] = words[..] else {
            return Err(wrong());
        };
        let length: usize = length.parse().map_err(|_| wrong())?;
        if length > LONGEST_COMMAND {
            return Err(wrong());
        }
        let mut command = vec![0; length];
        input.read_exact(&mut command)?;
        Ok(Self {
            id: id.parse().map_err(|_| wrong())?,
            limit: Duration::from_millis(limit.parse().map_err(|_| wrong())?),
            command: String::from_utf8_lossy(&command).into_owned(),
        })
    }

    /// Runs the command; gives the whole answer.
    fn answer(&self) -> Vec<u8> {
        let (status, output) = match self.run() {
            Ok(done) => done,
            Err(error) => ("failed".into(), error.to_string().into_bytes()),
        };
        let id = self.id;
        let shown = output.get(..LONGEST).unwrap_or(&output);
        let mut answer =
            format!("=answer {id} {status} {} {}\n", shown.len(), output.len()).into_bytes();
        answer.extend_from_slice(shown);
        answer.extend_from_slice(format!("\n=end {id}\n").as_bytes());
        answer
    }

    fn run(&self) -> io::Result<(String, Vec<u8>)> {
        let output = fs::File::create(OUTPUT)?;
        let mut child = Command::new("/bin/sh")
            .args(["-c", &self.command])
            .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()?;
        let status = wait_for(&mut child, self.limit)?;
        Ok((status, fs::read(OUTPUT)?))
    }
}

/// Waits for the end of a command, and ends it with all that it started when it is late.
fn wait_for(child: &mut Child, limit: Duration) -> io::Result<String> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("it has no process id"))?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let ends_within = |limit: Duration| -> io::Result<bool> {
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        let mut waited = [PollFd::new(&process, PollFlags::IN)];
        Ok(poll(&mut waited, Some(&limit))? > 0)
    };
    if !ends_within(limit)? {
        kill_process_group(pid, Signal::KILL)?;
        if ends_within(AFTER_KILL)? {
            child.wait()?;
        }
        return Ok("limit".into());
    }
    let status = child.wait()?;
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => code.to_string(),
        (None, signal) => format!("signal{}", signal.unwrap_or_default()),
    })
}

/// Takes note of the end of processes that have no parent any more, as a first process must.
fn clear_away() {
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_carries_any_bytes_and_the_next_follows_at_once() {
        let mut input = &b"RUN 7 1500 10\necho 'a\nb'RUN 8 1 0\n"[..];
        let first = Request::read(&mut input).unwrap();
        assert_eq!((first.id, first.limit.as_millis()), (7, 1500));
        assert_eq!(first.command, "echo 'a\nb'");
        assert_eq!(Request::read(&mut input).unwrap().id, 8);
        for wrong in ["", "RUN\n", "RUN 1 2 999999\n", "STOP 1 2 3\n"] {
            assert!(Request::read(&mut wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_command_ends_by_itself_or_by_its_limit() {
        let run = |command: &str, limit| {
            let mut child = Command::new("/bin/sh")
                .args(["-c", command])
                .process_group(0)
                .spawn()
                .unwrap();
            wait_for(&mut child, Duration::from_millis(limit)).unwrap()
        };
        assert_eq!(run("exit 3", 10_000), "3");
        assert_eq!(run("kill -9 $$", 10_000), "signal9");
        assert_eq!(run("while :; do :; done", 50), "limit");
    }
}
