//! The two VMs that are compared: the same Linux with the same disk and network, once on our test machine by VMBus, once
//! on QEMU by virtio.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vmm::config::{Backend, Config, Device, Lun, Network, Scsi};

use super::{
    exits::{Counter, Exits, Threads},
    workload::{Amount, Direction, Done, Workload, fetch, fetched},
};
use crate::{
    machine::{Boot, Machine, Virtio, VmConfig},
    referee::{CMDLINE, Contents, Guest, shell},
};

/// Drivers of both worlds. Our first process makes the requests to disks, busybox does the rest.
pub const CONTENTS: Contents = Contents {
    kind: "bench-initrd",
    modules: &[
        "hv_vmbus",
        "hv_storvsc",
        "hv_netvsc",
        "sd_mod",
        "virtio_pci",
        "virtio_blk",
        "virtio_net",
    ],
    programs: &[],
    files: &[],
};

/// Names of the guest's files on the machine.
pub const KERNEL: &str = "linux.elf";
pub const INITRD: &str = "linux.initrd";

/// MiB of each guest's memory.
pub const MEMORY_MIB: u32 = 512;

/// Virtual processors of each guest. The nested machine has one processor itself.
pub const CPUS: u32 = 1;

/// MiB of each guest's disk.
pub const DISK_MIB: u32 = 128;

/// Bytes of the file that goes over the network.
const FILE_BYTES: u32 = 2 << 20;

/// Longest of what takes no time.
pub const SOON: Duration = Duration::from_secs(60);

/// Longest run of a workload: many times of what any takes.
const LONG: Duration = Duration::from_secs(300);

/// Port of the machine's HTTP server, for both guests.
const PORT: u16 = 8000;

/// Who hosts a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Our test machine.
    Enlit,
    /// QEMU.
    Qemu,
}

impl Host {
    /// Name of the guest's disk below /dev.
    fn device(self) -> &'static str {
        match self {
            Self::Enlit => "sda",
            Self::Qemu => "vda",
        }
    }

    /// The guest's network, without the last part (RFC 5737).
    fn network(self) -> &'static str {
        match self {
            Self::Enlit => "192.0.2",
            Self::Qemu => "198.51.100",
        }
    }

    fn tap(self) -> &'static str {
        match self {
            Self::Enlit => "tap-enlit",
            Self::Qemu => "tap-qemu",
        }
    }

    fn disk(self) -> &'static str {
        match self {
            Self::Enlit => "enlit.img",
            Self::Qemu => "qemu.img",
        }
    }

    /// Drivers that the guest is to use, by the names of their modules.
    fn drivers(self) -> [&'static str; 2] {
        match self {
            Self::Enlit => ["hv_storvsc", "hv_netvsc"],
            Self::Qemu => ["virtio_blk", "virtio_net"],
        }
    }
}

/// A workload's run.
#[derive(Debug, Clone)]
pub struct Run {
    pub done: Done,
    pub exits: Exits,
}

/// A guest that is ready for workloads.
pub struct Side<'a> {
    host: Host,
    machine: &'a Machine,
    guest: Guest,
    threads: Threads,
}

/// Prepares the machine for both: files for HTTP, and the server.
pub fn prepare(machine: &Machine) -> Result<()> {
    shell::run(
        machine,
        &format!(
            "mkdir -p www && {} && {}",
            files("www"),
            serve(&format!("0.0.0.0:{PORT}"), "www")
        ),
        LONG,
    )
    .map(drop)
}

impl<'a> Side<'a> {
    /// Boots the guest and makes it ready.
    pub fn start(host: Host, machine: &'a Machine, counter: &mut Counter) -> Result<Self> {
        let disk = host.disk();
        shell::run(
            machine,
            &format!("dd if=/dev/zero of={disk} bs=1M count={DISK_MIB}"),
            LONG,
        )?;
        let vm = match host {
            Host::Enlit => machine.run_vmm(&enlit()),
            Host::Qemu => machine.run(&qemu()),
        }?;
        let mut side = Self {
            host,
            machine,
            guest: Guest::come_up(vm)?,
            threads: counter.started()?,
        };
        side.make_ready()?;
        Ok(side)
    }

    fn make_ready(&mut self) -> Result<()> {
        let host = self.host;
        for driver in host.drivers() {
            let loaded = format!("[ -e /sys/module/{driver} ]");
            let missing = || format!("the guest has not loaded {driver}");
            self.guest.sh(&loaded).with_context(missing)?;
        }
        let (network, tap) = (host.network(), host.tap());
        shell::run(
            self.machine,
            &format!("ip address add {network}.1/24 dev {tap} && ip link set {tap} up"),
            LONG,
        )?;
        let guest = &mut self.guest;
        guest.until(&format!("[ -b /dev/{} ]", host.device()), SOON)?;
        guest.until("[ -e /sys/class/net/eth0 ]", SOON)?;
        guest.sh(&format!(
            "ip address add {network}.2/24 dev eth0 && ip link set eth0 up"
        ))?;
        guest.until(&format!("ping -c 1 -W 1 {network}.1 >/dev/null"), SOON)?;
        // First touches of memory are exits. What is touched now stays.
        guest.run_ok(
            "mkdir -p /tmp/memory && mount -t tmpfs -o size=100% none /tmp/memory && \
             free=$(sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) && \
             dd if=/dev/zero of=/tmp/memory/all bs=1M count=$((free / 1024 - 24)) && umount /tmp/memory",
            LONG,
        )?;
        guest.run_ok(
            &format!(
                "mkdir -p /tmp/www && {} && {}",
                files("/tmp/www"),
                serve(&format!("{network}.2:80"), "/tmp/www")
            ),
            LONG,
        )?;
        Ok(())
    }

    /// Runs a workload and counts its exits.
    pub fn run(&mut self, workload: Workload, amount: Amount, counter: &Counter) -> Result<Run> {
        let network = self.host.network();
        counter.clear()?;
        let done = match workload {
            Workload::Disk(disk) => {
                let command = disk.command(self.host.device(), amount);
                let said = self.guest.run_ok(&command, LONG)?;
                disk.read(&said)?
            }
            Workload::Network(direction) => {
                let file = match amount {
                    Amount::Least => "least",
                    Amount::Full { .. } => "file",
                };
                let said = match direction {
                    Direction::HostToGuest => {
                        let command = fetch(&format!("{network}.1:{PORT}"), file);
                        self.guest.run_ok(&command, LONG)?
                    }
                    Direction::GuestToHost => {
                        let command = fetch(&format!("{network}.2:80"), file);
                        shell::run(self.machine, &command, LONG)?
                    }
                };
                fetched(&said)?
            }
        };
        let exits = counter.read(&self.threads)?;
        Ok(Run { done, exits })
    }

    /// The kernel's release.
    pub fn release(&mut self) -> Result<String> {
        self.guest.sh("uname -r")
    }

    /// The exits to our own monitor so far, by its own names for them; none for QEMU.
    pub fn own_exits(&mut self) -> Result<BTreeMap<String, u64>> {
        if self.host == Host::Qemu {
            return Ok(BTreeMap::new());
        }
        let answer = self.guest.vm().ctl("query-exits", json!({}))?;
        Ok(own(&answer))
    }
}

/// The exits to our own monitor in its answer; what begins with `kvm` are the kernel's.
fn own(answer: &Value) -> BTreeMap<String, u64> {
    let reasons = answer["reasons"].as_object().into_iter().flatten();
    reasons
        .filter(|(name, _)| !name.starts_with("kvm "))
        .filter_map(|(name, count)| Some((name.clone(), count.as_u64()?)))
        .collect()
}

fn enlit() -> Config {
    let host = Host::Enlit;
    let mut config = Config::new(KERNEL);
    config.initrd = Some(INITRD.into());
    config.cmdline = CMDLINE.to_owned();
    config.memory_mib = MEMORY_MIB;
    config.cpus = CPUS;
    config.devices = vec![
        Device::Scsi(Scsi {
            name: "disk0".into(),
            queues: 1,
            luns: vec![Lun {
                lun: 0,
                file: Some(host.disk().into()),
                memory_mib: None,
                read_only: false,
            }],
        }),
        Device::Net(Network {
            name: "net0".into(),
            mac: None,
            mtu: 1500,
            queues: 1,
            backend: Backend::Tap(host.tap().into()),
            pcap: None,
        }),
    ];
    config
}

fn qemu() -> VmConfig {
    let host = Host::Qemu;
    let mut config = VmConfig::new(Boot::Kernel {
        file: KERNEL.into(),
        initrd: Some(INITRD.into()),
    });
    config.cmdline = CMDLINE.split_whitespace().map(str::to_owned).collect();
    config.memory = MEMORY_MIB;
    config.cpus = CPUS;
    config.virtio = Some(Virtio {
        disk: host.disk().into(),
        tap: host.tap().into(),
    });
    config
}

/// The shell's command for the files that are fetched.
fn files(directory: &str) -> String {
    format!(
        "dd if=/dev/zero of={directory}/file bs={FILE_BYTES} count=1 && printf x >{directory}/least"
    )
}

/// The shell's command for an HTTP server, which keeps nothing of the command open.
fn serve(address: &str, directory: &str) -> String {
    format!("httpd -p {address} -h {directory} </dev/null >/dev/null 2>&1 3>&-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_counts_is_not_the_monitors() {
        let answer = json!({ "total": 12, "reasons": { "hypercall 0x5c": 3, "kvm exits": 9 } });
        assert_eq!(own(&answer), BTreeMap::from([("hypercall 0x5c".into(), 3)]));
        assert!(own(&json!({})).is_empty());
    }
}
