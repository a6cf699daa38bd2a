//! What a configuration may not say: found before anything is opened or started.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use vmbus_host::network::{MAX_MTU, MAX_QUEUES, MIN_MTU};
use vmbus_host::storage::MAX_LUN;

use super::device::{Backend, Device, Kind, Medium, Network, Scsi, Vsock};
use super::text::MacAddress;
use super::{CPUS, Config, MEMORY_MIB};

/// Channels of one device.
const QUEUES: RangeInclusive<u16> = 1..=MAX_QUEUES;

/// Largest packets that a network adapter can be set to, in bytes.
const MTU: RangeInclusive<u32> = MIN_MTU..=MAX_MTU;

/// Bytes of a Unix socket's path, the final zero not counted (`man 7 unix`).
const SOCKET_PATH: usize = 107;

/// What follows the path of a vsock device: the longest port.
const LONGEST_PORT: usize = "_4294967295".len();

/// Bytes of a network interface's name, the final zero not counted (`man 7 netdevice`).
const INTERFACE_NAME: usize = 15;

/// A mistake in a configuration.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Mistake {
    /// Too little memory, or too much.
    #[error("a VM has {} to {} MiB of memory, not {mib}", MEMORY_MIB.start(), MEMORY_MIB.end())]
    Memory {
        /// What was asked for.
        mib: u32,
    },
    /// Too many virtual processors, or none.
    #[error("a VM has {} to {} virtual processors, not {cpus}", CPUS.start(), CPUS.end())]
    Cpus {
        /// What was asked for.
        cpus: u32,
    },
    /// A file is not there.
    #[error("the {what} {} does not exist", file.display())]
    Missing {
        /// What it is for.
        what: String,
        /// The file.
        file: PathBuf,
    },
    /// It is something else than a file.
    #[error("the {what} {} is not a file", file.display())]
    NoFile {
        /// What it is for.
        what: String,
        /// The file.
        file: PathBuf,
    },
    /// The folder that a file or a socket is to be made in is not there.
    #[error("there is no folder {} for the {what} {}", folder.display(), file.display())]
    NoFolder {
        /// What it is for.
        what: String,
        /// The file.
        file: PathBuf,
        /// Its folder.
        folder: PathBuf,
    },
    /// Two devices have the same name.
    #[error("two devices are named `{name}`: each needs a name of its own")]
    SameName {
        /// The name.
        name: String,
    },
    /// A name that cannot be typed.
    #[error("`{name}` is no name for a device: 1 to 32 letters, digits, `-`, `_` or `.`")]
    BadName {
        /// The name.
        name: String,
    },
    /// Two devices of a kind that a VM has once.
    #[error("the VM has more than one {} device: it can have one", kind.name())]
    Twice {
        /// The kind.
        kind: Kind,
    },
    /// Too many channels, or none.
    #[error("`{device}` has {} to {} queues, not {queues}", QUEUES.start(), QUEUES.end())]
    Queues {
        /// The device.
        device: String,
        /// What was asked for.
        queues: u16,
    },
    /// A LUN that no controller has.
    #[error("`{controller}` has LUNs 0 to {MAX_LUN}, not {lun}")]
    NoSuchLun {
        /// The controller.
        controller: String,
        /// The number.
        lun: u8,
    },
    /// Two disks at one place.
    #[error("`{controller}` has LUN {lun} twice")]
    SameLun {
        /// The controller.
        controller: String,
        /// The number.
        lun: u8,
    },
    /// A disk of nothing, or of two things.
    #[error("LUN {lun} of `{controller}` needs either a `file` or `memory-mib`")]
    NoMedium {
        /// The controller.
        controller: String,
        /// The number.
        lun: u8,
    },
    /// A disk without a single byte.
    #[error("LUN {lun} of `{controller}` is a disk of 0 MiB")]
    EmptyDisk {
        /// The controller.
        controller: String,
        /// The number.
        lun: u8,
    },
    /// Two writers of one file.
    #[error("the disk {} is used twice, and not read-only: two disks cannot write to one file", file.display())]
    SameDisk {
        /// The file.
        file: PathBuf,
    },
    /// A packet size that no adapter has.
    #[error("`{device}` has an MTU of {} to {}, not {mtu}", MTU.start(), MTU.end())]
    Mtu {
        /// The device.
        device: String,
        /// What was asked for.
        mtu: u32,
    },
    /// The address of a group, or of nobody.
    #[error("`{device}` cannot have the address {mac}: it is that of a group, or of nobody")]
    NoUnicast {
        /// The device.
        device: String,
        /// The address.
        mac: MacAddress,
    },
    /// Two adapters with one address.
    #[error("`{first}` and `{second}` have the same address {mac}")]
    SameMac {
        /// The one.
        first: String,
        /// The other.
        second: String,
        /// The address.
        mac: MacAddress,
    },
    /// No interface can be named so.
    #[error(
        "`{name}` is no name for a network interface: 1 to {INTERFACE_NAME} characters, no `/` and no blank"
    )]
    InterfaceName {
        /// The name.
        name: String,
    },
    /// A wire with one end, or with more than two.
    #[error("the wire `{wire}` has the ends {}: a wire joins two adapters", ends.join(", "))]
    Wire {
        /// The wire.
        wire: String,
        /// The adapters on it.
        ends: Vec<String>,
    },
    /// A path that is too long for a socket.
    #[error("the path {} is too long for a socket: at most {limit} bytes here", path.display())]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// How long it may be.
        limit: usize,
    },
    /// Two devices write to the same place.
    #[error("{} is used twice: by `{first}` and by `{second}`", path.display())]
    SamePath {
        /// The one.
        first: String,
        /// The other.
        second: String,
        /// The path.
        path: PathBuf,
    },
}

impl Config {
    /// Looks for mistakes.
    pub fn check(&self) -> Result<(), Mistake> {
        if !MEMORY_MIB.contains(&self.memory_mib) {
            let mib = self.memory_mib;
            return Err(Mistake::Memory { mib });
        }
        if !CPUS.contains(&self.cpus) {
            return Err(Mistake::Cpus { cpus: self.cpus });
        }
        check_file("kernel", &self.kernel)?;
        if let Some(initrd) = &self.initrd {
            check_file("initrd", initrd)?;
        }
        let mut seen = Seen::default();
        for device in &self.devices {
            seen.check(device)?;
        }
        match seen.wires.iter().find(|(_, ends)| ends.len() != 2) {
            Some((wire, ends)) => Err(Mistake::Wire {
                wire: (*wire).into(),
                ends: ends.iter().map(|&end| end.into()).collect(),
            }),
            None => Ok(()),
        }
    }
}

/// What the devices so far have taken.
#[derive(Default)]
struct Seen<'a> {
    names: BTreeSet<&'a str>,
    kinds: BTreeSet<Kind>,
    macs: BTreeMap<MacAddress, &'a str>,
    /// Wires, and the adapters on them.
    wires: BTreeMap<&'a str, Vec<&'a str>>,
    /// Disk files, and whether each is written to.
    disks: BTreeMap<PathBuf, bool>,
    /// Files and sockets that are made, and by whom.
    made: BTreeMap<&'a Path, &'a str>,
}

impl<'a> Seen<'a> {
    fn check(&mut self, device: &'a Device) -> Result<(), Mistake> {
        let (name, kind) = (device.name(), device.kind());
        if !is_name(name) {
            return Err(Mistake::BadName { name: name.into() });
        }
        if !self.kinds.insert(kind) && !kind.can_repeat() {
            return Err(Mistake::Twice { kind });
        }
        if !self.names.insert(name) {
            return Err(Mistake::SameName { name: name.into() });
        }
        match device {
            Device::Scsi(scsi) => self.check_scsi(scsi),
            Device::Net(net) => self.check_network(net),
            Device::Vsock(vsock) => self.check_vsock(name, vsock),
            Device::Heartbeat(_)
            | Device::Shutdown(_)
            | Device::TimeSync(_)
            | Device::Kvp(_)
            | Device::Balloon(_) => Ok(()),
        }
    }

    fn check_scsi(&mut self, scsi: &Scsi) -> Result<(), Mistake> {
        let controller = || scsi.name.clone();
        check_queues(&scsi.name, scsi.queues)?;
        let mut luns = BTreeSet::new();
        for disk in &scsi.luns {
            let lun = disk.lun;
            if lun > MAX_LUN {
                let controller = controller();
                return Err(Mistake::NoSuchLun { controller, lun });
            }
            if !luns.insert(lun) {
                let controller = controller();
                return Err(Mistake::SameLun { controller, lun });
            }
            match disk.medium() {
                Some(Medium::File(file)) => {
                    check_file("disk", file)?;
                    // The same file by another name is the same file.
                    let place = file.canonicalize().unwrap_or_else(|_| file.clone());
                    let writes = !disk.read_only;
                    let before = self.disks.insert(place, writes);
                    if before.is_some_and(|wrote| wrote || writes) {
                        return Err(Mistake::SameDisk { file: file.clone() });
                    }
                }
                Some(Medium::Memory(0)) => {
                    let controller = controller();
                    return Err(Mistake::EmptyDisk { controller, lun });
                }
                Some(Medium::Memory(_)) => {}
                None => {
                    let controller = controller();
                    return Err(Mistake::NoMedium { controller, lun });
                }
            }
        }
        Ok(())
    }

    fn check_network(&mut self, net: &'a Network) -> Result<(), Mistake> {
        check_queues(&net.name, net.queues)?;
        if !MTU.contains(&net.mtu) {
            return Err(Mistake::Mtu {
                device: net.name.clone(),
                mtu: net.mtu,
            });
        }
        let mac = net.mac();
        if !mac.is_unicast() {
            let device = net.name.clone();
            return Err(Mistake::NoUnicast { device, mac });
        }
        if let Some(first) = self.macs.insert(mac, &net.name) {
            return Err(Mistake::SameMac {
                first: first.into(),
                second: net.name.clone(),
                mac,
            });
        }
        match &net.backend {
            Backend::Passt(socket) => {
                check_length(socket, SOCKET_PATH)?;
                if !socket.exists() {
                    return Err(Mistake::Missing {
                        what: format!("passt socket of `{}`", net.name),
                        file: socket.clone(),
                    });
                }
            }
            Backend::Tap(name) => {
                let fits = (1..=INTERFACE_NAME).contains(&name.len());
                if !fits || name.contains(|c: char| c == '/' || c.is_whitespace()) {
                    return Err(Mistake::InterfaceName { name: name.clone() });
                }
            }
            Backend::Wire(wire) => self.wires.entry(wire).or_default().push(&net.name),
            Backend::None | Backend::Loop => {}
        }
        if let Some(pcap) = &net.pcap {
            self.check_made("pcap file", pcap, &net.name)?;
        }
        Ok(())
    }

    fn check_vsock(&mut self, name: &'a str, vsock: &'a Vsock) -> Result<(), Mistake> {
        check_length(&vsock.path, SOCKET_PATH - LONGEST_PORT)?;
        self.check_made("vsock socket", &vsock.path, name)
    }

    /// A file or a socket that is made when the VM starts.
    fn check_made(&mut self, what: &str, file: &'a Path, by: &'a str) -> Result<(), Mistake> {
        let folder = file
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
            return Err(Mistake::NoFolder {
                what: what.into(),
                file: file.into(),
                folder: folder.into(),
            });
        }
        match self.made.insert(file, by) {
            None => Ok(()),
            Some(first) => Err(Mistake::SamePath {
                first: first.into(),
                second: by.into(),
                path: file.into(),
            }),
        }
    }
}

fn is_name(name: &str) -> bool {
    let typed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=32).contains(&name.len()) && name.chars().all(typed)
}

fn check_file(what: &str, file: &Path) -> Result<(), Mistake> {
    let (what, file) = (what.to_owned(), file.to_owned());
    match file.metadata() {
        Err(_) => Err(Mistake::Missing { what, file }),
        // A disk may be a device.
        Ok(metadata) if metadata.is_dir() => Err(Mistake::NoFile { what, file }),
        Ok(_) => Ok(()),
    }
}

fn check_queues(device: &str, queues: u16) -> Result<(), Mistake> {
    if QUEUES.contains(&queues) {
        return Ok(());
    }
    let device = device.to_owned();
    Err(Mistake::Queues { device, queues })
}

fn check_length(path: &Path, limit: usize) -> Result<(), Mistake> {
    if path.as_os_str().len() <= limit {
        return Ok(());
    }
    let path = path.to_owned();
    Err(Mistake::SocketPath { path, limit })
}
