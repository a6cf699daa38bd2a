//! One client of the control stream: bytes in, bytes out, and never a wait.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde_json::Value;
use vmm_sys_util::epoll::EventSet;

use crate::control::{Event, Failure, LONGEST_LINE, TimedEvent, Timestamp};

/// Bytes that may wait for a client. One that leaves more unread is cut off.
const WAITING: usize = 4 << 20;

/// Bytes that may wait for a client before events pass it by, but for milestones: a guest that makes many must not have it cut off.
const EVENTS_WAITING: usize = 1 << 20;

/// Bytes that are read at once, so that one client does not keep the others from being heard.
const AT_ONCE: usize = 64 << 10;

/// A client.
pub(super) struct Client {
    /// Of a socket or a pipe; not blocking.
    stream: File,
    input: Vec<u8>,
    output: Vec<u8>,
    /// How much of the output is written.
    written: usize,
    /// Events that have passed it by.
    lost: u64,
    /// It says no more.
    silent: bool,
    gone: bool,
}

impl Client {
    /// A client that has connected.
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        Self::inherited(stream.into())
    }

    /// A client at the other end of any stream.
    pub(super) fn inherited(stream: OwnedFd) -> io::Result<Self> {
        // This asks the descriptor, whatever it is of.
        let stream = UnixStream::from(stream);
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: File::from(OwnedFd::from(stream)),
            input: Vec::new(),
            output: Vec::new(),
            written: 0,
            lost: 0,
            silent: false,
            gone: false,
        })
    }

    /// The whole lines that have come, without their ends. One that is too long is an error, and the last thing heard.
    pub(super) fn hear(&mut self) -> Vec<Result<Vec<u8>, Failure>> {
        let mut lines = Vec::new();
        let mut buffer = [0; 4096];
        let mut read = 0;
        while !self.silent && read < AT_ONCE {
            let count = match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.silent = true;
                    break;
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.gone = true;
                    break;
                }
            };
            read += count;
            for &byte in buffer.get(..count).unwrap_or_default() {
                if byte == b'\n' {
                    let line = std::mem::take(&mut self.input);
                    if !line.trim_ascii().is_empty() {
                        lines.push(Ok(line));
                    }
                } else if self.input.len() < LONGEST_LINE {
                    self.input.push(byte);
                } else {
                    let desc = format!("a line is longer than {LONGEST_LINE} bytes");
                    lines.push(Err(Failure::generic(desc)));
                    self.silent = true;
                    break;
                }
            }
        }
        lines
    }

    /// Adds a line to what is written.
    pub(super) fn say(&mut self, line: &Value) {
        if self.output.len() - self.written > WAITING {
            self.gone = true;
        } else {
            self.output.extend_from_slice(line.to_string().as_bytes());
            self.output.push(b'\n');
        }
    }

    /// Adds an event to what is written, if the client keeps up.
    pub(super) fn tell(&mut self, event: &TimedEvent) {
        let waiting = self.output.len() - self.written;
        if waiting > EVENTS_WAITING && !event.event.is_milestone() {
            self.lost += 1;
        } else if let Ok(line) = serde_json::to_value(event) {
            // Numbers and text always have a form in JSON.
            self.say(&line);
        }
    }

    /// Writes what there is room for.
    pub(super) fn flush(&mut self) {
        self.write();
        if self.lost > 0 && !self.has_output() {
            let count = std::mem::take(&mut self.lost);
            self.tell(&TimedEvent {
                event: Event::EventsLost { count },
                timestamp: Timestamp::now(),
            });
            self.write();
        }
    }

    fn write(&mut self) {
        while !self.gone && self.has_output() {
            let rest = self.output.get(self.written..).unwrap_or_default();
            match self.stream.write(rest) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.gone = true,
            }
        }
        self.output.clear();
        self.written = 0;
    }

    pub(super) fn has_output(&self) -> bool {
        self.written < self.output.len()
    }

    /// What the poll should wake for.
    pub(super) fn interest(&self) -> EventSet {
        let mut set = EventSet::empty();
        set.set(EventSet::IN, !self.silent);
        set.set(EventSet::OUT, self.has_output());
        set
    }

    /// Nobody is there any more.
    pub(super) fn hang_up(&mut self) {
        self.gone = true;
    }

    /// Whether nobody is there.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether it says no more and has heard everything so far.
    pub(super) fn is_content(&self) -> bool {
        self.silent && !self.has_output()
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}
