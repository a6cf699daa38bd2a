//! The devices of a VM, as the configuration names them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::text::MacAddress;

/// A device on VMBus.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Device {
    /// A SCSI controller with its disks.
    Scsi(Scsi),
    /// A network adapter.
    Net(Network),
    /// Asks the guest every two seconds whether it is alive.
    Heartbeat(Plain),
    /// Asks the guest to power off, to restart or to hibernate.
    Shutdown(Plain),
    /// Tells the guest the time.
    TimeSync(Plain),
    /// Keys and values for the guest, and from it.
    Kvp(Plain),
    /// Dynamic memory.
    Balloon(Balloon),
    /// Sockets between host and guest.
    Vsock(Vsock),
}

/// What sort of device it is; its name in the configuration.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// SCSI controller.
    Scsi,
    /// Network adapter.
    Net,
    /// Heartbeat.
    Heartbeat,
    /// Shutdown.
    Shutdown,
    /// Time synchronization.
    TimeSync,
    /// Key-value pairs.
    Kvp,
    /// Dynamic memory.
    Balloon,
    /// Sockets.
    Vsock,
}

/// A device without settings.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Plain {
    /// Its name; without one that of its kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A SCSI controller.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Scsi {
    /// Its name.
    pub name: String,
    /// Channels that the guest may have, the primary one included.
    #[serde(default = "one")]
    pub queues: u16,
    /// Its disks at the start.
    #[serde(default)]
    pub luns: Vec<Lun>,
}

/// A disk of a controller.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Lun {
    /// Its number, 0 to 63.
    pub lun: u8,
    /// A file: raw, VHDX or ISO, as its content says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Instead of a file: so many MiB of zeros that are gone with the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u32>,
    /// Whether the guest can only read it.
    #[serde(default)]
    pub read_only: bool,
}

/// What holds a disk's data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Medium<'a> {
    /// A file.
    File(&'a PathBuf),
    /// So many MiB of memory.
    Memory(u32),
}

impl Lun {
    /// What holds the data; `None` when the configuration names nothing or both.
    pub fn medium(&self) -> Option<Medium<'_>> {
        match (&self.file, self.memory_mib) {
            (Some(file), None) => Some(Medium::File(file)),
            (None, Some(mib)) => Some(Medium::Memory(mib)),
            _ => None,
        }
    }
}

/// A network adapter.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its address; without one it is made from the name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Bytes of the largest packet in a frame.
    #[serde(default = "default_mtu")]
    pub mtu: u32,
    /// Channels that the guest may have, the primary one included.
    #[serde(default = "one")]
    pub queues: u16,
    /// What is at the other end of the cable.
    #[serde(default)]
    pub backend: Backend,
    /// Where to write every frame, in the form of pcap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pcap: Option<PathBuf>,
}

/// What is at the other end of a network adapter's cable.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// Nobody: no link.
    #[default]
    None,
    /// The adapter itself: each frame comes back.
    Loop,
    /// passt, by the Unix socket that it listens at.
    Passt(PathBuf),
    /// The TAP interface of this name.
    Tap(String),
    /// The other adapter of this VM that is on the wire of this name.
    Wire(String),
}

/// Dynamic memory.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Balloon {
    /// Its name; without one that of its kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// MiB that the guest can be given at run time, beyond what it starts with.
    #[serde(default)]
    pub hot_add_mib: u32,
}

/// Sockets between host and guest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Vsock {
    /// Its name; without one that of its kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Where the sockets are: connections to PATH say `CONNECT port` and reach the guest, the guest's connections
    /// to a port reach PATH_port (spec hvsock.md 8).
    pub path: PathBuf,
}

fn one() -> u16 {
    1
}

fn default_mtu() -> u32 {
    1500
}

impl Device {
    /// What sort it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Scsi(_) => Kind::Scsi,
            Self::Net(_) => Kind::Net,
            Self::Heartbeat(_) => Kind::Heartbeat,
            Self::Shutdown(_) => Kind::Shutdown,
            Self::TimeSync(_) => Kind::TimeSync,
            Self::Kvp(_) => Kind::Kvp,
            Self::Balloon(_) => Kind::Balloon,
            Self::Vsock(_) => Kind::Vsock,
        }
    }

    /// Its name: what the configuration says, else its kind.
    pub fn name(&self) -> &str {
        let given = match self {
            Self::Scsi(scsi) => Some(&scsi.name),
            Self::Net(net) => Some(&net.name),
            Self::Heartbeat(plain)
            | Self::Shutdown(plain)
            | Self::TimeSync(plain)
            | Self::Kvp(plain) => plain.name.as_ref(),
            Self::Balloon(balloon) => balloon.name.as_ref(),
            Self::Vsock(vsock) => vsock.name.as_ref(),
        };
        given.map_or(self.kind().name(), String::as_str)
    }
}

impl Kind {
    /// As the configuration writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scsi => "scsi",
            Self::Net => "net",
            Self::Heartbeat => "heartbeat",
            Self::Shutdown => "shutdown",
            Self::TimeSync => "time-sync",
            Self::Kvp => "kvp",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
        }
    }

    /// Whether a VM can have several of them.
    pub const fn can_repeat(self) -> bool {
        matches!(self, Self::Scsi | Self::Net)
    }
}

impl Network {
    /// Its address: what the configuration says, else one made from the name.
    pub fn mac(&self) -> MacAddress {
        self.mac.unwrap_or_else(|| MacAddress::of_name(&self.name))
    }
}
