//! The VMs that Linux boots in.

use anyhow::{Error, Result};
use vhdx::Settings;
use vmm::config::{Backend, Balloon, Config, Device, Lun, Network, Plain, Scsi, Vsock};

use super::files::Files;
use crate::machine::Kind;

/// The SCSI controller.
pub const CONTROLLER: &str = "disk0";

/// LUN of a raw file.
pub const RAW: u8 = 0;
/// LUN of a fixed VHDX.
pub const FIXED: u8 = 1;
/// LUN of a dynamic VHDX.
pub const DYNAMIC: u8 = 2;
/// LUN of a disk in memory.
pub const MEMORY: u8 = 3;
/// LUN of the read-only raw file with the source.
pub const SOURCE: u8 = 4;
/// LUN of a DVD.
pub const DISC: u8 = 5;
/// LUN of a dynamic VHDX with sectors of 4096 bytes.
pub const LARGE: u8 = 6;

/// The files of those that are VHDX.
pub const VHDX: [(u8, &str); 3] = [
    (FIXED, "fixed.vhdx"),
    (DYNAMIC, "dynamic.vhdx"),
    (LARGE, "large.vhdx"),
];

/// Two network adapters on one wire.
pub const WIRED: [&str; 2] = ["net0", "net1"];

/// A network adapter in the user's own network.
pub const USER: &str = "user";

/// A network adapter on a TAP device, where the machine has one.
pub const TAPPED: &str = "tapped";

/// The TAP device, which goes with the VM.
pub const TAP: &str = "tap-judge";

/// The address of the first on the wire.
pub const ADDRESS: &str = "00:15:5d:0e:71:17";

/// The socket by which programs of this computer find the guest's.
pub const SOCKETS: &str = "vsock";

/// Virtual processors, and channels of each device that can have several.
const CPUS: u32 = 4;

/// MiB of memory.
const MEMORY_MIB: u32 = 384;

/// MiB that can be added at run time.
const HOT_ADD_MIB: u32 = 256;

/// MiB of the disk in memory.
const MEMORY_DISK_MIB: u32 = 260;

/// A VM with disks of every kind.
pub fn disks(files: &Files) -> Result<Config> {
    let large = Settings {
        logical_sector: 4096,
        ..Settings::new(256 << 20)
    };
    let fixed = Settings {
        fixed: true,
        ..Settings::new(64 << 20)
    };
    machine(vec![
        files.raw(RAW, "raw.img", 96)?,
        files.vhdx(FIXED, VHDX[0].1, &fixed)?,
        files.vhdx(DYNAMIC, VHDX[1].1, &Settings::new(1 << 30))?,
        memory_disk(MEMORY_DISK_MIB),
        files.source(SOURCE)?,
        files.disc(DISC)?,
        files.vhdx(LARGE, VHDX[2].1, &large)?,
    ])
}

/// A VM with a device of each kind.
pub fn everything_else(files: &Files) -> Result<Config> {
    let mut config = machine(vec![memory_disk(16)])?;
    let queues = u16::try_from(CPUS)?;
    let card = |name: &str, mac: Option<&str>| -> Result<Device> {
        Ok(Device::Net(Network {
            name: name.into(),
            mac: mac.map(str::parse).transpose().map_err(Error::msg)?,
            mtu: 9000,
            queues,
            backend: Backend::Wire("wire".into()),
            pcap: None,
        }))
    };
    config.devices.extend([
        card(WIRED[0], Some(ADDRESS))?,
        card(WIRED[1], None)?,
        Device::Net(Network {
            name: USER.into(),
            mac: None,
            mtu: 1500,
            queues: 1,
            backend: files.user_network()?,
            pcap: None,
        }),
        Device::TimeSync(Plain::default()),
        Device::Kvp(Plain::default()),
        Device::Balloon(Balloon {
            name: None,
            hot_add_mib: HOT_ADD_MIB,
        }),
        Device::Vsock(Vsock {
            name: None,
            path: files.machine().guest_sockets(&files.path(SOCKETS))?.into(),
        }),
    ]);
    if files.machine().kind() == Kind::Nested {
        config.devices.push(Device::Net(Network {
            name: TAPPED.into(),
            mac: None,
            mtu: 1500,
            queues: 1,
            backend: Backend::Tap(TAP.into()),
            pcap: None,
        }));
    }
    Ok(config)
}

/// What both have.
fn machine(luns: Vec<Lun>) -> Result<Config> {
    let mut config = Config::new("");
    config.memory_mib = MEMORY_MIB;
    config.cpus = CPUS;
    config.devices = vec![
        Device::Scsi(Scsi {
            name: CONTROLLER.into(),
            queues: u16::try_from(CPUS)?,
            luns,
        }),
        Device::Heartbeat(Plain::default()),
        Device::Shutdown(Plain::default()),
    ];
    Ok(config)
}

fn memory_disk(mib: u32) -> Lun {
    Lun {
        lun: MEMORY,
        file: None,
        memory_mib: Some(mib),
        read_only: false,
    }
}
