//! The agent's working half: serves one client over one stream.

use std::{
    collections::HashMap,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::Instant,
};

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::priority;
use crate::protocol::{
    CHUNK, Event, Nanoseconds, Numbered, Request, RequestId, VERSION, VmId, receive, send,
};

/// File descriptor on which QEMU finds its QMP monitor's stream.
const QMP_FD: i32 = 3;

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
    let mut server = Server {
        out: Out {
            stream: Arc::new(Mutex::new(Box::new(output))),
            start: Instant::now(),
        },
        directory: directory.to_owned(),
        vms: HashMap::new(),
    };
    server.out.event(&Event::Hello { version: VERSION })?;
    let ending = server.run(&mut input);
    for (_, vm) in server.vms.drain() {
        vm.end();
    }
    ending
}

struct Server {
    out: Out,
    directory: PathBuf,
    vms: HashMap<VmId, Running>,
}

impl Server {
    fn run(&mut self, input: &mut impl Read) -> io::Result<Ending> {
        while let Some(Numbered { id, request }) = receive(input)? {
            if request == Request::PowerOff {
                self.answer(id, Ok(()))?;
                return Ok(Ending::PowerOff);
            }
            let result = self.carry_out(id, request);
            self.answer(id, result)?;
        }
        Ok(Ending::Closed)
    }

    fn answer(&self, id: RequestId, result: Result<(), String>) -> io::Result<()> {
        self.out.event(&Event::Answer { id, result })
    }

    fn carry_out(&mut self, id: RequestId, request: Request) -> Result<(), String> {
        match request {
            Request::Put { name, offset, data } => self
                .put(&name, offset, &data)
                .map_err(|error| format!("cannot write {name}: {error}")),
            Request::Start {
                vm,
                program,
                arguments,
            } => self.start(vm, &program, &arguments),
            Request::Qmp { vm, line } => self
                .vm(vm)?
                .say(&line)
                .map_err(|error| format!("the QMP monitor does not listen: {error}")),
            Request::Kill { vm } => {
                self.vm(vm)?.kill();
                Ok(())
            }
            Request::Read { path } => self
                .read(id, &path)
                .map_err(|error| format!("cannot read {path}: {error}")),
            Request::Write { path, data } => fs::OpenOptions::new()
                .write(true)
                .truncate(true)
                .open(&path)
                .and_then(|mut file| file.write_all(&data))
                .map_err(|error| format!("cannot write {path}: {error}")),
            Request::PowerOff => Ok(()),
        }
    }

    fn vm(&self, vm: VmId) -> Result<&Running, String> {
        self.vms
            .get(&vm)
            .ok_or_else(|| format!("there is no VM {}", vm.0))
    }

    fn put(&self, name: &str, offset: u64, data: &[u8]) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(io::Error::other("not a plain file name"));
        }
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(offset == 0)
            .open(self.directory.join(name))?;
        file.write_all_at(data, offset)
    }

    fn read(&self, id: RequestId, path: &str) -> io::Result<()> {
        let mut file = fs::File::open(path)?;
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = file.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            self.out.event(&Event::Part {
                id,
                data: buffer.get(..length).unwrap_or_default().to_vec(),
            })?;
        }
    }

    fn start(&mut self, vm: VmId, program: &[String], arguments: &[String]) -> Result<(), String> {
        if self.vms.contains_key(&vm) {
            return Err(format!("VM {} exists already", vm.0));
        }
        let running = Running::start(vm, program, arguments, &self.directory, &self.out)
            .map_err(|error| format!("cannot start QEMU: {error}"))?;
        self.vms.insert(vm, running);
        Ok(())
    }
}

/// Where events go; every thread of the agent has one.
#[derive(Clone)]
struct Out {
    stream: Arc<Mutex<Box<dyn Write + Send>>>,
    start: Instant,
}

impl Out {
    fn event(&self, event: &Event) -> io::Result<()> {
        send(&mut *lock(&self.stream), event)
    }

    fn now(&self) -> Nanoseconds {
        Nanoseconds(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// A VM's process. The thread that started it waits for it, so that a
/// parent-death signal, which follows the thread, means the whole agent.
struct Running {
    qmp: UnixStream,
    process: OwnedFd,
    waiter: thread::JoinHandle<()>,
}

impl Running {
    fn start(
        vm: VmId,
        program: &[String],
        arguments: &[String],
        directory: &Path,
        out: &Out,
    ) -> io::Result<Self> {
        let (first, rest) = program
            .split_first()
            .ok_or_else(|| io::Error::other("no program given"))?;
        let (qmp, far_end) = UnixStream::pair()?;
        let mut command = Command::new(first);
        command
            .args(rest)
            .args(arguments)
            .arg("-chardev")
            .arg(format!("socket,id=qmp,fd={QMP_FD}"))
            .args(["-mon", "chardev=qmp,mode=control"])
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .fd_mappings(vec![FdMapping {
                parent_fd: OwnedFd::from(far_end),
                child_fd: QMP_FD,
            }])
            .map_err(io::Error::other)?;

        let monitor = qmp.try_clone()?;
        let out = out.clone();
        let (started, has_started) = mpsc::channel();
        let waiter = thread::spawn(move || {
            let child = command.spawn().and_then(|child| {
                // As the first process: in the test machine.
                if std::process::id() == 1 {
                    priority::prefer(child.id())?;
                }
                Ok(child)
            });
            // The command owns the monitor's far end; with it gone, QEMU's end is
            // the only one and the reader sees QEMU go.
            drop(command);
            let mut child = match child.and_then(|child| Ok((pidfd(&child)?, child))) {
                Ok((process, child)) => {
                    drop(started.send(Ok(process)));
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
        let process = has_started
            .recv()
            .map_err(|_| io::Error::other("its thread has died"))??;
        Ok(Self {
            qmp,
            process,
            waiter,
        })
    }

    fn say(&self, line: &str) -> io::Result<()> {
        (&self.qmp).write_all(format!("{line}\n").as_bytes())
    }

    fn kill(&self) {
        // It fails for a process that has ended already, which is what is wanted.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    fn end(self) {
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

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked holding it left a whole value behind: each critical
    // section is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
