//! The machine on which guests run: this computer's KVM, the nested machine, or
//! plain emulation. Which one it is makes no difference to those who start VMs, on QEMU
//! or on our own monitor, the test machine `enlit-vmm`.

mod config;
mod cpio;
#[cfg(not(target_os = "linux"))]
mod elsewhere;
#[cfg(target_os = "linux")]
mod files;
mod link;
mod linux;
#[cfg(target_os = "linux")]
mod local;
#[cfg(target_os = "linux")]
mod nested;
#[cfg(target_os = "linux")]
pub mod process;
#[cfg(target_os = "linux")]
mod reach;
#[cfg(target_os = "linux")]
mod sockets;
mod vm;

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::OnceLock,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use agent::protocol::CONTROL_FD;
use anyhow::{Context, Result, ensure};
use vmm::config::Config;

#[cfg(not(target_os = "linux"))]
pub use self::elsewhere::process;
#[cfg(not(target_os = "linux"))]
use self::elsewhere::{files, local, nested, reach};
use self::{config::Accelerator, link::Link, vm::Start};
pub use self::{
    config::{Boot, Virtio, VmConfig, debug_exit_word},
    cpio::Archive,
    files::Access,
    linux::Linux,
    reach::Reach,
    vm::{Control, Ending, Vm},
};
use crate::{
    guest,
    packages::{Packages, Qemu},
    workspace::Workspace,
};

/// Where guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// This computer's KVM, which has Hyper-V enlightenments.
    Kvm,
    /// The KVM of an emulated Linux machine.
    Nested,
    /// QEMU's emulation: no Hyper-V.
    Emulated,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "this computer's KVM",
            Self::Nested => "the nested machine (KVM of an emulated Linux)",
            Self::Emulated => "QEMU's emulation, without Hyper-V",
        })
    }
}

/// The clock by which the nested machine's processor runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The computer's own.
    Wall,
    /// One instruction is one nanosecond.
    Instructions,
}

/// A kind and why it was chosen, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The kind.
    pub kind: Kind,
    /// Why.
    pub reason: String,
}

/// What is asked for: a kind, or the best there is.
pub fn choose(wish: Option<Kind>) -> Choice {
    match wish {
        Some(kind) => Choice {
            kind,
            reason: "as asked for".into(),
        },
        None => choose_by(local::hyperv_capability()),
    }
}

fn choose_by(capability: Result<(), String>) -> Choice {
    match capability {
        Ok(()) => Choice {
            kind: Kind::Kvm,
            reason: "/dev/kvm offers Hyper-V".into(),
        },
        Err(reason) => Choice {
            kind: Kind::Nested,
            reason,
        },
    }
}

/// What a machine is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// VMs on QEMU, and on the test machine where there is KVM.
    Any,
    /// VMs on the test machine only: there is less to fetch and to boot.
    TestMachine,
}

/// A machine that is ready to start VMs.
pub struct Machine {
    link: Link,
    kind: Kind,
    workspace: Workspace,
    /// How to start QEMU, if it is there.
    qemu: Option<Vec<String>>,
    /// How to start the test machine, once it was.
    vmm: OnceLock<String>,
    /// Number of the next configuration file.
    next: AtomicU32,
    ovmf: Option<PathBuf>,
    reach: Reach,
    // Dropped last to first of this list, after the link has said goodbye.
    end: End,
}

/// What ends with the machine.
enum End {
    Local { agent: local::Agent },
    Nested { _outer: nested::Outer },
}

impl Machine {
    /// Gets what the machine needs and starts it.
    pub fn start(
        workspace: &Workspace,
        packages: &mut Packages,
        kind: Kind,
        clock: Clock,
    ) -> Result<Self> {
        Self::start_for(Purpose::Any, workspace, packages, kind, clock)
    }

    /// The same, with what the purpose needs.
    pub fn start_for(
        purpose: Purpose,
        workspace: &Workspace,
        packages: &mut Packages,
        kind: Kind,
        clock: Clock,
    ) -> Result<Self> {
        let any = purpose == Purpose::Any;
        if !any {
            // While nothing else wants the processor; it will be at hand when a VM starts.
            guest::build_vmm(workspace)?;
        }
        let (link, qemu, ovmf, end) = match kind {
            Kind::Kvm | Kind::Emulated => {
                let qemu = any.then(|| packages.qemu()).transpose()?;
                let ovmf = (kind == Kind::Emulated)
                    .then(|| packages.ovmf())
                    .transpose()?;
                let (agent, link) = local::Agent::start()?;
                let qemu = qemu.map(|qemu| process::tied_to_us(qemu.command()));
                (link, qemu, ovmf, End::Local { agent })
            }
            Kind::Nested => {
                let outer: Qemu = packages.qemu()?;
                let linux = packages.linux()?;
                let agent = guest::build_agent(workspace)?;
                let inner = any.then_some(&outer);
                let image = nested::Image::prepare(&workspace.store(), inner, &linux, &agent)?;
                let (machine, link) = image.boot(&outer, clock)?;
                let qemu = any.then(nested::Image::inner_qemu);
                (link, qemu, None, End::Nested { _outer: machine })
            }
        };
        let reach = match &end {
            End::Local { .. } => Reach::here(),
            End::Nested { .. } => Reach::nested(link.clone()),
        };
        Ok(Self {
            reach,
            link,
            kind,
            workspace: workspace.clone(),
            qemu,
            vmm: OnceLock::new(),
            next: AtomicU32::new(0),
            ovmf,
            end,
        })
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Makes a file available to VMs under this name.
    pub fn put(&self, name: &str, content: &[u8]) -> Result<()> {
        self.link
            .put(name, content, false)
            .with_context(|| format!("cannot hand over {name}"))
    }

    /// The same for a program, which [`command`](Self::command) can run as `./NAME`.
    pub fn put_program(&self, name: &str, content: &[u8]) -> Result<()> {
        self.link
            .put(name, content, true)
            .with_context(|| format!("cannot hand over {name}"))
    }

    /// Runs a command on the system that runs the VMs, in the directory of what was
    /// [`put`](Self::put); gives what it printed.
    ///
    /// # Errors
    /// When it fails, or has not ended when `limit` has passed.
    pub fn command(&self, words: &[&str], limit: Duration) -> Result<String> {
        let program = words.iter().map(|&word| word.to_owned()).collect();
        let id = self.link.start(program, Vec::new(), false)?;
        let ended = self.link.watch(id, limit, |record| {
            let status = record.exited?.status;
            Some((status, record.console.clone(), record.complaints.clone()))
        });
        self.link.discard(id);
        let line = words.join(" ");
        let (status, said, complaints) =
            ended?.with_context(|| format!("`{line}` did not end within {} s", limit.as_secs()))?;
        ensure!(
            status == Some(0),
            "`{line}` failed: {}",
            String::from_utf8_lossy(&complaints).trim()
        );
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// The path by which a VM on the test machine finds a file of this computer, for its
    /// configuration or a command. Reads, writes and flushes are those of the file.
    ///
    /// # Errors
    /// In the nested case the file is opened and locked here.
    pub fn share(&self, file: &Path, access: Access) -> Result<String> {
        self.reach.file(file, access)
    }

    /// The path at which a VM on the test machine connects to this Unix socket of this
    /// computer.
    pub fn reach(&self, socket: &Path) -> Result<String> {
        self.reach.socket(socket)
    }

    /// The path for a VM's device of sockets, if programs of this computer are to find its
    /// guest at `path`: they connect to `path`, and listen at `path_PORT`.
    pub fn guest_sockets(&self, path: &Path) -> Result<String> {
        self.reach.guest_sockets(path)
    }

    /// All these ways, for other threads.
    pub fn ways(&self) -> Reach {
        self.reach.clone()
    }

    /// Connects to a Unix socket of the system that runs the VMs, relative to where
    /// [`put`](Self::put) puts files.
    #[cfg(target_os = "linux")]
    pub fn connect(&self, path: &str) -> Result<std::os::unix::net::UnixStream> {
        let here = match &self.end {
            End::Local { agent } => agent.directory(),
            End::Nested { .. } => Path::new("/"),
        };
        self.reach.connect(here, path)
    }

    /// The EFI firmware, on a machine that has one.
    pub fn ovmf(&self) -> Option<&Path> {
        self.ovmf.as_deref()
    }

    /// Starts a VM on QEMU.
    pub fn run(&self, config: &VmConfig) -> Result<Vm> {
        let accelerator = match self.kind {
            Kind::Kvm | Kind::Nested => Accelerator::KvmHyperV,
            Kind::Emulated => Accelerator::Tcg,
        };
        let program = self.qemu.clone().context("this machine has no QEMU")?;
        Vm::start(
            self.link.clone(),
            Start {
                name: "QEMU",
                program,
                arguments: config.arguments(accelerator),
                // It is for the sake of QEMU's VMBus.
                first_thread_first: config.virtio.is_none(),
                hold: config.gdb.is_some(),
            },
        )
    }

    /// Starts a VM on the test machine. Relative paths of the configuration name what was
    /// [`put`](Self::put).
    pub fn run_vmm(&self, config: &Config) -> Result<Vm> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let file = format!("vm-{number}.json");
        self.put(&file, &serde_json::to_vec_pretty(config)?)?;
        Vm::start(
            self.link.clone(),
            Start {
                name: "the test machine",
                program: self.vmm_command()?,
                arguments: vec![file, "--control-fd".into(), CONTROL_FD.to_string()],
                first_thread_first: false,
                hold: false,
            },
        )
    }

    /// How to start the test machine; builds it at the first time, and brings it to where
    /// it runs.
    fn vmm_command(&self) -> Result<Vec<String>> {
        let program = match self.vmm.get() {
            Some(program) => program.clone(),
            None => {
                let built = guest::build_vmm(&self.workspace)?;
                let program = match &self.end {
                    End::Local { .. } => built.display().to_string(),
                    End::Nested { .. } => {
                        let name = "enlit-vmm";
                        let content = std::fs::read(&built)
                            .with_context(|| format!("cannot read {}", built.display()))?;
                        self.link.put(name, &content, true)?;
                        format!("./{name}")
                    }
                };
                self.vmm.get_or_init(|| program).clone()
            }
        };
        let words = vec![program];
        Ok(match &self.end {
            End::Local { .. } => process::tied_to_us(words),
            End::Nested { .. } => words,
        })
    }

    /// Reads a file of the system that runs the VMs.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        self.link.read(path)
    }

    /// Writes a file of the system that runs the VMs.
    pub fn write(&self, path: &str, data: &str) -> Result<()> {
        self.link.write(path, data.as_bytes())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if !self.link.is_closed() {
            // A machine that does not listen is ended with its process.
            drop(self.link.power_off());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_is_taken_only_with_the_capability() {
        assert_eq!(choose_by(Ok(())).kind, Kind::Kvm);
        let choice = choose_by(Err("there is no /dev/kvm".into()));
        assert_eq!(choice.kind, Kind::Nested);
        assert_eq!(choice.reason, "there is no /dev/kvm");
    }

    #[test]
    fn a_forced_machine_is_taken_as_it_is() {
        assert_eq!(choose(Some(Kind::Emulated)).kind, Kind::Emulated);
    }
}
