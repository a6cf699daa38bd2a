//! SCSI controllers and their disks.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmbus::protocol::{Guid, interface};
use vmbus_host::bus;

use vmbus_host::disk::{
    self, Disk, Effect, FaultyDisk, Geometry, MemoryDisk, Operations, Options, When,
};
use vmbus_host::provider::Provider;
use vmbus_host::storage::scsi::{Kind as UnitKind, Medium as UnitMedium};
use vmbus_host::storage::{Controller, Limits, Lun, Storvsp};
use vmbus_host::sync::Mutex;
use vmbus_host::work::Executor;

use super::{Body, Counters, Devices, Part, Workshop, device_is_no, instance};
use crate::config::{self, Kind, Medium};
use crate::control::{DiskAdd, DiskEject, DiskFailure, DiskOperation, Failure, Fault};

/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// Bytes of a sector of a DVD, and of nothing else.
const DVD_SECTOR: u32 = 2048;

/// What chances of failing come from: the same in each run.
const SEED: u64 = 1;

/// A SCSI controller.
pub(super) struct Scsi {
    instance: Guid,
    controller: Arc<Controller>,
    executor: Arc<dyn Executor>,
    /// What fails on request, by number.
    disks: Mutex<BTreeMap<u8, Arc<FaultyDisk>>>,
}

/// A disk that is open, and belongs to no controller yet.
pub struct OpenDisk {
    disk: Arc<FaultyDisk>,
    is_dvd: bool,
}

impl OpenDisk {
    /// Opens what is named. It may take a while.
    ///
    /// # Errors
    /// One sentence that names the file.
    pub fn open(disk: &DiskAdd) -> Result<Self, Failure> {
        let lun = config::Lun {
            lun: disk.lun,
            file: disk.file.clone(),
            memory_mib: disk.memory_mib,
            read_only: disk.read_only,
        };
        Self::of(&disk.controller, &lun)
    }

    fn of(controller: &str, lun: &config::Lun) -> Result<Self, Failure> {
        match lun.medium() {
            Some(Medium::File(file)) => Self::file(file, lun.read_only),
            Some(Medium::Memory(mib)) if mib > 0 => {
                let name = format!("{controller}/{}", lun.lun);
                let disk = MemoryDisk::new(Geometry::of_bytes(u64::from(mib) * MIB))
                    .with_identity(instance::of(Kind::Scsi, &name).0);
                let disk = if lun.read_only {
                    disk.into_read_only()
                } else {
                    disk
                };
                Ok(Self::whole(Arc::new(disk)))
            }
            Some(Medium::Memory(_)) => Err(Failure::generic("a disk of 0 MiB is none")),
            None => Err(Failure::generic(
                "a disk needs either a `file` or `memory-mib`",
            )),
        }
    }
}

impl OpenDisk {
    fn file(file: &Path, read_only: bool) -> Result<Self, Failure> {
        let options = Options {
            read_only,
            ..Options::default()
        };
        let disk = disk::open(file, options).map_err(Failure::generic)?;
        Ok(Self::whole(disk))
    }

    /// Every disk can be made to fail.
    fn whole(disk: Arc<dyn Disk>) -> Self {
        Self {
            is_dvd: disk.geometry().logical == DVD_SECTOR,
            disk: Arc::new(FaultyDisk::new(disk, SEED)),
        }
    }

    /// As a unit of a controller.
    fn unit(&self) -> Lun {
        let disk = Arc::clone(&self.disk) as Arc<dyn Disk>;
        if self.is_dvd {
            Lun::Dvd {
                identity: disk.identity(),
                medium: Some(disk),
            }
        } else {
            Lun::Disk(disk)
        }
    }
}

impl Scsi {
    /// A controller with the disks of its configuration.
    ///
    /// # Errors
    /// One sentence for the first disk that cannot be opened.
    pub(super) fn new(config: &config::Scsi, workshop: &mut Workshop) -> Result<Self, Failure> {
        let scsi = Self {
            instance: instance::of(Kind::Scsi, &config.name),
            controller: Controller::new(Limits {
                sub_channels: config.queues.saturating_sub(1),
                ..Limits::default()
            }),
            executor: workshop.disks()?,
            disks: Mutex::default(),
        };
        for lun in &config.luns {
            scsi.add(lun.lun, OpenDisk::of(&config.name, lun)?)?;
        }
        Ok(scsi)
    }

    /// Adds a disk, or puts a DVD into an empty drive.
    fn add(&self, lun: u8, opened: OpenDisk) -> Result<(), Failure> {
        let units = self.controller.luns();
        let empty = units.iter().any(|&(number, kind, medium)| {
            number == lun && kind == UnitKind::Dvd && medium != UnitMedium::Present
        });
        let controller = &self.controller;
        if opened.is_dvd && empty {
            let disk = Arc::clone(&opened.disk) as Arc<dyn Disk>;
            controller
                .change_medium(lun, Some(disk), false)
                .map_err(Failure::generic)?;
        } else {
            controller
                .add_lun(lun, opened.unit())
                .map_err(Failure::generic)?;
        }
        self.disks.lock().insert(lun, opened.disk);
        Ok(())
    }

    /// Takes a disk out; of a drive with a medium in it, the medium.
    fn eject(&self, lun: u8, force: bool) -> Result<(), Failure> {
        let units = self.controller.luns();
        let full = units.iter().any(|&(number, kind, medium)| {
            number == lun && kind == UnitKind::Dvd && medium == UnitMedium::Present
        });
        if full {
            let changed = self.controller.change_medium(lun, None, force);
            changed.map(drop).map_err(Failure::generic)?;
        } else {
            let removed = self.controller.remove_lun(lun);
            removed.map(drop).map_err(Failure::generic)?;
        }
        // Its file is free for others when the last command is over.
        self.disks.lock().remove(&lun);
        Ok(())
    }

    /// The disk of this number.
    fn disk(&self, lun: u8) -> Result<Arc<FaultyDisk>, Failure> {
        let disk = self.disks.lock().get(&lun).cloned();
        disk.ok_or_else(|| Failure::generic(format!("there is no disk at LUN {lun}")))
    }
}

impl Part for Scsi {
    fn offer(&self) -> Option<(bus::Device, Box<dyn Provider>)> {
        let device = bus::Device::new(interface::SCSI_CONTROLLER, self.instance);
        let (controller, executor) = (self.controller.clone(), self.executor.clone());
        Some((device, Box::new(Storvsp::new(controller, executor))))
    }

    fn counters(&self) -> Counters {
        let counts = self.controller.counts();
        let mut counters: Counters = counts
            .packets
            .each()
            .map(|(name, count)| (name.into(), count))
            .collect();
        counters.insert("in-flight".into(), counts.in_flight);
        for (lun, unit) in &counts.units {
            let unit = unit
                .each()
                .map(|(name, count)| (format!("lun-{lun}-{name}"), count));
            counters.extend(unit);
        }
        for (lun, disk) in &*self.disks.lock() {
            counters.insert(format!("lun-{lun}-faults"), disk.struck());
        }
        counters
    }

    fn inject(&self, fault: &Fault) -> Result<bool, Failure> {
        let (lun, fault) = match *fault {
            Fault::SlowDisk {
                lun,
                operation,
                milliseconds,
                requests,
            } => {
                let effect = Effect::Delay(Duration::from_millis(milliseconds));
                (lun, disk_fault(operation, requests, effect))
            }
            Fault::FailingDisk {
                lun,
                operation,
                error,
                offset,
                length,
                requests,
            } => {
                let effect = Effect::Fail(match error {
                    DiskFailure::Medium => disk::Failure::Medium,
                    DiskFailure::NotReady => disk::Failure::NotReady,
                    DiskFailure::NoSpace => disk::Failure::NoSpace,
                });
                let part = offset.is_some() || length.is_some();
                let start = offset.unwrap_or(0);
                let end = length.map_or(u64::MAX, |length| start.saturating_add(length));
                let fault = disk::Fault {
                    range: part.then_some(start..end),
                    ..disk_fault(operation, requests, effect)
                };
                (lun, fault)
            }
            Fault::TornWrites { lun, requests } => {
                let torn = disk_fault(DiskOperation::Write, requests, Effect::Tear);
                (lun, torn)
            }
            _ => return Ok(false),
        };
        self.disk(lun)?.add(fault);
        Ok(true)
    }

    fn clear_faults(&self) {
        self.disks.lock().values().for_each(|disk| disk.clear());
    }
}

/// A fault of all of a disk.
fn disk_fault(operation: DiskOperation, requests: Option<u64>, effect: Effect) -> disk::Fault {
    disk::Fault {
        operations: match operation {
            DiskOperation::Read => Operations::READS,
            DiskOperation::Write => Operations::WRITES,
            DiskOperation::Flush => Operations::FLUSHES,
            DiskOperation::Any => Operations::ALL,
        },
        range: None,
        when: requests.map_or(When::Always, When::Next),
        effect,
    }
}

impl Devices {
    /// Adds a disk to a controller.
    ///
    /// # Errors
    /// When there is no such controller, or the number is taken.
    pub fn add_disk(&mut self, controller: &str, lun: u8, disk: OpenDisk) -> Result<(), Failure> {
        self.controller(controller)?.add(lun, disk)
    }

    /// Takes a disk out of a controller.
    ///
    /// # Errors
    /// When there is no such disk, or the guest holds on to it.
    pub fn eject_disk(&mut self, disk: &DiskEject) -> Result<(), Failure> {
        self.controller(&disk.controller)?
            .eject(disk.lun, disk.force)
    }

    fn controller(&mut self, name: &str) -> Result<&mut Scsi, Failure> {
        let device = self.find(name)?;
        match &mut device.body {
            Body::Scsi(scsi) => Ok(scsi),
            _ => Err(device_is_no(name, "SCSI controller")),
        }
    }
}
