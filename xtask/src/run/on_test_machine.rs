//! `run` on the test machine, with disks, network and sockets.

use std::{path::Path, process::ExitCode, sync::Arc};

use anyhow::{Context, Result, anyhow, bail};
use vmbus_host::disk;
use vmm::config::{
    Backend, Balloon, CPUS, Config, Device, Lun, MEMORY_MIB, Network, OnReboot, Plain, Scsi, Vsock,
};

use super::{
    Options, console,
    network::{Passt, check_ports},
    options::Net,
    session::{Names, Session},
    show,
};
use crate::{
    guest::{self, Symboliser},
    machine::{Access, Clock, Kind, Machine, Purpose},
    packages::Packages,
    progress,
    workspace::Workspace,
};

/// The one SCSI controller; disks are added to it while the VM runs, too.
pub const CONTROLLER: &str = "scsi0";

/// The one network adapter.
pub const ADAPTER: &str = "net0";

/// Most channels of a device: more have shown no use.
const QUEUES: u32 = 4;

/// The guest's kernel, as the machine knows it.
const KERNEL: &str = "guest.elf";

/// Runs it.
pub fn run(
    options: &Options,
    workspace: &Workspace,
    packages: &mut Packages,
    kind: Kind,
) -> Result<ExitCode> {
    // What can be wrong is looked at before anything is built or started.
    check(options, kind)?;
    let session = Session::reserve(
        workspace,
        options.name.as_deref().unwrap_or(&options.what.package),
    )?;
    let passt = passt(options, packages)?;
    let guest = guest::build(workspace, &options.what.package, options.what.profile())?;
    let machine = Machine::start_for(Purpose::TestMachine, workspace, packages, kind, Clock::Wall)?;
    machine.put(KERNEL, &guest.read()?)?;
    let mut names = Names::default();
    let config = config(options, &machine, passt.as_ref(), &mut names)?;
    // What the machine complains of is called as the user calls it.
    let mut vm = machine
        .run_vmm(&config)
        .map_err(|error| anyhow!("{}", names.outside(&format!("{error:#}"))))?;
    console::type_input(vm.take_input()?);
    let _control = session.serve(vm.control(), machine.ways(), Arc::new(names))?;
    show(vm, &Symboliser::open(&guest.symbols)?)
}

fn check(options: &Options, kind: Kind) -> Result<()> {
    if !MEMORY_MIB.contains(&options.memory) {
        bail!(
            "a VM has {} to {} MiB of memory, not {}",
            MEMORY_MIB.start(),
            MEMORY_MIB.end(),
            options.memory
        );
    }
    if !CPUS.contains(&options.cpus) {
        bail!(
            "a VM has {} to {} virtual processors, not {}",
            CPUS.start(),
            CPUS.end(),
            options.cpus
        );
    }
    for (index, disk) in options.disks.iter().enumerate() {
        if options
            .disks
            .iter()
            .take(index)
            .any(|other| other.file == disk.file)
        {
            bail!("disk {} is given twice", disk.file.display());
        }
        access(&disk.file, disk.read_only)?;
    }
    match &options.net {
        Some(Net::Tap(name)) if kind == Kind::Nested => bail!(
            "the TAP interface {name} cannot be reached from the nested machine: use --net user"
        ),
        Some(Net::Tap(_) | Net::None) if !options.forwards.is_empty() => {
            bail!("ports are forwarded by --net user only")
        }
        Some(Net::None) if options.pcap.is_some() => {
            bail!("--pcap needs a network, and --net none leaves it out")
        }
        _ => {}
    }
    check_ports(&options.forwards)
}

/// Opens a disk and lets go of it again, so that what is wrong with it is said at once;
/// tells how it is to be shared.
pub fn access(file: &Path, read_only: bool) -> Result<Access> {
    let options = disk::Options {
        read_only,
        ..disk::Options::default()
    };
    let disk = disk::open(file, options)?;
    Ok(if disk.read_only() {
        Access::Read
    } else {
        Access::Write
    })
}

/// The user's network, if it is wanted; if it was not asked for, only if it works.
fn passt(options: &Options, packages: &mut Packages) -> Result<Option<Passt>> {
    let asked_for = options.net == Some(Net::User)
        || !options.forwards.is_empty()
        || (options.net.is_none() && options.pcap.is_some());
    if !asked_for && options.net.is_some() {
        return Ok(None);
    }
    let mut start = || -> Result<Passt> {
        let program = packages.passt()?;
        let _step = progress::step("starting passt");
        Passt::start(&program, &options.forwards)
    };
    match start() {
        Ok(passt) => Ok(Some(passt)),
        Err(error) if asked_for => Err(error.context("there is no user network")),
        Err(error) => {
            eprintln!("no network: {error:#}");
            Ok(None)
        }
    }
}

fn config(
    options: &Options,
    machine: &Machine,
    passt: Option<&Passt>,
    names: &mut Names,
) -> Result<Config> {
    let queues = u16::try_from(options.cpus.min(QUEUES)).context("too many queues")?;
    let mut config = Config::new(KERNEL);
    config.cmdline = options.words().join(" ");
    config.memory_mib = options.memory;
    config.cpus = options.cpus;
    config.on_reboot = OnReboot::Reset;
    config.devices = vec![
        Device::Heartbeat(Plain::default()),
        Device::Shutdown(Plain::default()),
        Device::TimeSync(Plain::default()),
        Device::Kvp(Plain::default()),
        Device::Balloon(Balloon::default()),
    ];

    let mut luns = Vec::new();
    for (lun, disk) in (0..).zip(&options.disks) {
        let access = access(&disk.file, disk.read_only)?;
        let inside = machine.share(&disk.file, access)?;
        names.add(&disk.file, &inside);
        names.insert(CONTROLLER, lun, &inside);
        luns.push(Lun {
            lun,
            file: Some(inside.into()),
            memory_mib: None,
            read_only: disk.read_only,
        });
    }
    config.devices.push(Device::Scsi(Scsi {
        name: CONTROLLER.into(),
        queues,
        luns,
    }));

    let backend = match (&options.net, passt) {
        (Some(Net::Tap(name)), _) => Some(Backend::Tap(name.clone())),
        (_, Some(passt)) => Some(Backend::Passt(machine.reach(passt.socket())?.into())),
        _ => None,
    };
    if let Some(backend) = backend {
        let pcap = match &options.pcap {
            Some(file) => {
                let inside = machine.share(file, Access::Create)?;
                names.add(file, &inside);
                Some(inside.into())
            }
            None => None,
        };
        config.devices.push(Device::Net(Network {
            name: ADAPTER.into(),
            mac: None,
            mtu: 1500,
            queues,
            backend,
            pcap,
        }));
    }
    if let Some(path) = &options.vsock {
        let inside = machine.guest_sockets(path)?;
        names.add(path, &inside);
        config.devices.push(Device::Vsock(Vsock {
            name: None,
            path: inside.into(),
        }));
    }
    Ok(config)
}
