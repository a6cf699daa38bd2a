//! What a VM is made of: the JSON file that the test machine is started with.
//!
//! Reading it ([`Config::read`]) checks everything that can be known without opening a disk or touching KVM; each mistake is one
//! sentence that names the thing. Works on every system, so that `cargo xtask run` can write it there.

mod check;
mod device;
mod file;
mod text;

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmbus::protocol::Version;

pub use check::Mistake;
pub use device::{Backend, Balloon, Device, Kind, Lun, Medium, Network, Plain, Scsi, Vsock};
pub use file::ReadError;
pub use text::{MacAddress, VersionNumber};

use crate::platform::layout;

/// How many MiB of memory a VM can have.
pub const MEMORY_MIB: RangeInclusive<u32> = 16..=128 << 10;

const _: () = assert!(*MEMORY_MIB.start() as u64 == layout::MIN_MEMORY_MIB);
const _: () = assert!(*MEMORY_MIB.end() as u64 == layout::MAX_MEMORY_MIB);

/// How many virtual processors a VM can have.
pub const CPUS: RangeInclusive<u32> = 1..=64;

/// A VM.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Config {
    /// The kernel: a 64-bit ELF, or a Linux bzImage.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The guest's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Memory in MiB, one of [`MEMORY_MIB`].
    #[serde(default = "default_memory")]
    pub memory_mib: u32,
    /// Virtual processors, one of [`CPUS`].
    #[serde(default = "default_cpus")]
    pub cpus: u32,
    /// What happens when the guest asks for a reset.
    #[serde(default)]
    pub on_reboot: OnReboot,
    /// Whether the guest can hibernate (ACPI S4). Linux gives no memory away where it can, and takes none.
    #[serde(default, skip_serializing_if = "is_false")]
    pub hibernation: bool,
    /// How the kernel is entered. Without it an ELF is entered by its PVH note, a bzImage as Linux.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<Entry>,
    /// What VMBus is like.
    #[serde(default)]
    pub vmbus: Bus,
    /// Its devices, in the order in which they are offered.
    #[serde(default)]
    pub devices: Vec<Device>,
}

fn default_memory() -> u32 {
    256
}

fn default_cpus() -> u32 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What happens when the guest asks for a reset.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The VM ends.
    #[default]
    Exit,
    /// The guest starts anew.
    Reset,
}

/// How a kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// By its PVH note (spec boot.md).
    Pvh,
    /// By the 64-bit Linux boot protocol.
    Linux,
}

/// What VMBus is like.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Bus {
    /// The newest version that the host knows; without it as the profile says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub newest_version: Option<VersionNumber>,
    /// Whose habits the host has.
    #[serde(default)]
    pub profile: Profile,
}

/// Whose habits a host has (spec hosts.md).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Profile {
    /// What a guest finds most often, and nothing that must be polled.
    #[default]
    TestMachine,
    /// Microsoft's.
    HyperV,
    /// OpenVMM's.
    Openvmm,
    /// QEMU's.
    Qemu,
}

impl Config {
    /// A VM with this kernel, and all else as it is when the file says nothing.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            memory_mib: default_memory(),
            cpus: default_cpus(),
            on_reboot: OnReboot::default(),
            hibernation: false,
            entry: None,
            vmbus: Bus::default(),
            devices: Vec::new(),
        }
    }

    /// The device of this name, as [`Device::name`] gives it.
    pub fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name() == name)
    }
}

impl Bus {
    /// The newest version of the protocol that the guest may use, if it was limited.
    pub fn newest(&self) -> Option<Version> {
        self.newest_version.map(|version| version.0)
    }
}

#[cfg(test)]
mod tests;
