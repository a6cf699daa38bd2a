//! The machine on which guests run: this computer's KVM, the nested machine, or
//! plain emulation. Which one it is makes no difference to those who start VMs.

mod config;
mod cpio;
#[cfg(not(target_os = "linux"))]
mod elsewhere;
mod link;
mod linux;
#[cfg(target_os = "linux")]
mod local;
#[cfg(target_os = "linux")]
mod nested;
#[cfg(target_os = "linux")]
pub mod process;
mod vm;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

#[cfg(not(target_os = "linux"))]
pub use self::elsewhere::process;
#[cfg(not(target_os = "linux"))]
use self::elsewhere::{local, nested};
use self::{config::Accelerator, link::Link};
pub use self::{
    config::{Boot, VmConfig, debug_exit_word},
    cpio::Archive,
    linux::Linux,
    vm::{Ending, Vm},
};
use crate::{guest, packages::Packages, workspace::Workspace};

/// Where guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// QEMU on this computer's KVM, which has Hyper-V enlightenments.
    Kvm,
    /// QEMU on the KVM of an emulated Linux machine.
    Nested,
    /// QEMU's emulation: no Hyper-V.
    Emulated,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "QEMU on this computer's KVM",
            Self::Nested => "the nested test machine (KVM of an emulated Linux)",
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

/// A machine that is ready to start VMs.
pub struct Machine {
    link: Link,
    kind: Kind,
    program: Vec<String>,
    ovmf: Option<PathBuf>,
    // Dropped last to first of this list, after the link has said goodbye.
    _end: End,
}

/// What ends with the machine.
enum End {
    Local { _agent: local::Agent },
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
        let qemu = packages.qemu()?;
        match kind {
            Kind::Kvm | Kind::Emulated => {
                let (agent, link) = local::Agent::start()?;
                Ok(Self {
                    link,
                    kind,
                    program: process::tied_to_us(qemu.command()),
                    ovmf: (kind == Kind::Emulated)
                        .then(|| packages.ovmf())
                        .transpose()?,
                    _end: End::Local { _agent: agent },
                })
            }
            Kind::Nested => {
                let linux = packages.linux()?;
                let agent = guest::build_agent(workspace)?;
                let image = nested::Image::prepare(&workspace.store(), &qemu, &linux, &agent)?;
                let (outer, link) = image.boot(&qemu, clock)?;
                Ok(Self {
                    link,
                    kind,
                    program: nested::Image::inner_qemu(),
                    ovmf: None,
                    _end: End::Nested { _outer: outer },
                })
            }
        }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Makes a file available to VMs under this name.
    pub fn put(&self, name: &str, content: &[u8]) -> Result<()> {
        self.link
            .put(name, content)
            .with_context(|| format!("cannot hand over {name}"))
    }

    /// The EFI firmware, on a machine that has one.
    pub fn ovmf(&self) -> Option<&Path> {
        self.ovmf.as_deref()
    }

    /// Starts a VM.
    pub fn run(&self, config: &VmConfig) -> Result<Vm> {
        let accelerator = match self.kind {
            Kind::Kvm | Kind::Nested => Accelerator::KvmHyperV,
            Kind::Emulated => Accelerator::Tcg,
        };
        Vm::start(
            self.link.clone(),
            self.program.clone(),
            config.arguments(accelerator),
            config.gdb.is_some(),
        )
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
