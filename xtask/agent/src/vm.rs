//! A VM's process: how it is started and ended, and how what it says gets told.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::{ChildStdin, Command, Stdio},
    sync::mpsc,
    thread,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{
    priority,
    protocol::{CHUNK, CONTROL_FD, Event, VmId},
    server::Out,
    streams::End,
};

/// A VM's process. The thread that started it waits for it, so that a
/// parent-death signal, which follows the thread, means the whole agent.
pub(crate) struct Running {
    control: UnixStream,
    input: Option<ChildStdin>,
    process: OwnedFd,
    waiter: thread::JoinHandle<()>,
}

/// What is started.
pub(crate) struct Program {
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
    /// See [`crate::protocol::Request::Start`].
    pub(crate) first_thread_first: bool,
}

impl Running {
    pub(crate) fn start(
        vm: VmId,
        program: &Program,
        directory: &Path,
        out: &Out,
    ) -> io::Result<Self> {
        let (first, rest) = program
            .words
            .split_first()
            .ok_or_else(|| io::Error::other("no program given"))?;
        let (control, far_end) = UnixStream::pair()?;
        let mut command = Command::new(first);
        command
            .args(rest)
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .fd_mappings(vec![FdMapping {
                parent_fd: OwnedFd::from(far_end),
                child_fd: CONTROL_FD,
            }])
            .map_err(io::Error::other)?;

        let monitor = control.try_clone()?;
        let out = out.clone();
        let first_thread_first = program.first_thread_first;
        let (started, has_started) = mpsc::channel();
        let waiter = thread::spawn(move || {
            let child = command.spawn().and_then(|child| {
                // Only in a machine of our own.
                if first_thread_first && std::process::id() == 1 {
                    priority::prefer(child.id())?;
                }
                Ok(child)
            });
            // The command owns the control's far end; with it gone, the program's
            // end is the only one and the reader sees the program go.
            drop(command);
            let mut child = match child.and_then(|child| Ok((pidfd(&child)?, child))) {
                Ok((process, mut child)) => {
                    drop(started.send(Ok((process, child.stdin.take()))));
                    child
                }
                Err(error) => {
                    drop(started.send(Err(error)));
                    return;
                }
            };
            let stdout = child.stdout.take();
            let stderr = child.stderr.take();
            let readers = [
                stdout.map(|pipe| forward_console(vm, pipe, out.clone())),
                stderr.map(|pipe| forward_complaints(vm, pipe, out.clone())),
                Some(forward_qmp(vm, monitor, out.clone())),
            ];
            // The pipes end when the process does, so what it said comes first.
            for reader in readers.into_iter().flatten() {
                drop(reader.join());
            }
            let status = child.wait().ok().and_then(|status| status.code());
            drop(out.event(&Event::Exited {
                vm,
                at: out.now(),
                status,
            }));
        });
        let (process, input) = has_started
            .recv()
            .map_err(|_| io::Error::other("its thread has died"))??;
        Ok(Self {
            control,
            input,
            process,
            waiter,
        })
    }

    /// Says one line to the control.
    pub(crate) fn say(&self, line: &str) -> io::Result<()> {
        (&self.control).write_all(format!("{line}\n").as_bytes())
    }

    /// The standard input, for a stream; once.
    pub(crate) fn take_input(&mut self) -> Result<End, String> {
        let input = self
            .input
            .take()
            .ok_or("the VM's console input has a stream already")?;
        Ok(End {
            reader: Box::new(io::empty()),
            writer: Box::new(input),
            finish: Box::new(|| ()),
            // A write that waits ends with the process that does not read.
            abort: Box::new(|| ()),
        })
    }

    /// Ends the process; [`Event::Exited`] follows.
    pub(crate) fn kill(&self) {
        // It fails for a process that has ended already, which is what is wanted.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Ends the process and waits until all that it said is told.
    pub(crate) fn end(self) {
        self.kill();
        drop(self.waiter.join());
    }
}

fn pidfd(child: &std::process::Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other("it has no process id"))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn forward_console(vm: VmId, pipe: impl Read + Send + 'static, out: Out) -> thread::JoinHandle<()> {
    forward(pipe, move |data| {
        out.event(&Event::Console {
            vm,
            at: out.now(),
            data,
        })
    })
}

fn forward_complaints(
    vm: VmId,
    pipe: impl Read + Send + 'static,
    out: Out,
) -> thread::JoinHandle<()> {
    forward(pipe, move |data| out.event(&Event::Complaint { vm, data }))
}

/// Reads to the end even when nobody listens any more: a full pipe would hold
/// up the process.
fn forward(
    mut pipe: impl Read + Send + 'static,
    say: impl Fn(Vec<u8>) -> io::Result<()> + Send + 'static,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            drop(say(buffer.get(..length).unwrap_or_default().to_vec()));
        }
    })
}

fn forward_qmp(vm: VmId, monitor: UnixStream, out: Out) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(monitor).lines() {
            let Ok(line) = line else { return };
            drop(out.event(&Event::Qmp {
                vm,
                at: out.now(),
                line,
            }));
        }
    })
}
