//! SCSI controllers and their disks.

use std::path::Path;
use std::sync::Arc;

use vmbus::protocol::{Guid, interface};
use vmbus_host::bus;
use vmbus_host::disk::{Disk, Geometry, MemoryDisk};
use vmbus_host::provider::Provider;
use vmbus_host::storage::scsi::{Kind as UnitKind, Medium as UnitMedium};
use vmbus_host::storage::{Controller, Limits, Lun, Storvsp};
use vmbus_host::work::Executor;

use super::{Body, Counters, Devices, Part, Workshop, device_is_no, instance};
use crate::config::{self, Kind, Medium};
use crate::control::{DiskAdd, DiskEject, Failure};

/// Bytes of a MiB.
const MIB: u64 = 1 << 20;

/// A SCSI controller.
pub(super) struct Scsi {
    instance: Guid,
    controller: Arc<Controller>,
    executor: Arc<dyn Executor>,
}

/// A disk that is open, and belongs to no controller yet.
pub struct OpenDisk {
    disk: Arc<dyn Disk>,
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
                Ok(Self {
                    disk: Arc::new(disk),
                    is_dvd: false,
                })
            }
            Some(Medium::Memory(_)) => Err(Failure::generic("a disk of 0 MiB is none")),
            None => Err(Failure::generic(
                "a disk needs either a `file` or `memory-mib`",
            )),
        }
    }
}

impl OpenDisk {
    fn file(file: &Path, _read_only: bool) -> Result<Self, Failure> {
        let desc = format!(
            "{} cannot be opened: only disks in memory can",
            file.display()
        );
        Err(Failure::generic(desc))
    }

    /// As a unit of a controller.
    fn unit(self) -> Lun {
        if self.is_dvd {
            Lun::Dvd {
                identity: self.disk.identity(),
                medium: Some(self.disk),
            }
        } else {
            Lun::Disk(self.disk)
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
        if opened.is_dvd && empty {
            let changed = self.controller.change_medium(lun, Some(opened.disk), false);
            return changed.map(drop).map_err(Failure::generic);
        }
        let added = self.controller.add_lun(lun, opened.unit());
        added.map_err(Failure::generic)
    }

    /// Takes a disk out; of a drive with a medium in it, the medium.
    fn eject(&self, lun: u8, force: bool) -> Result<(), Failure> {
        let units = self.controller.luns();
        let full = units.iter().any(|&(number, kind, medium)| {
            number == lun && kind == UnitKind::Dvd && medium == UnitMedium::Present
        });
        if full {
            let changed = self.controller.change_medium(lun, None, force);
            changed.map(drop).map_err(Failure::generic)
        } else {
            let removed = self.controller.remove_lun(lun);
            removed.map(drop).map_err(Failure::generic)
        }
    }
}

impl Part for Scsi {
    fn offer(&self) -> bus::Device {
        bus::Device::new(interface::SCSI_CONTROLLER, self.instance)
    }

    fn provider(&self) -> Box<dyn Provider> {
        let (controller, executor) = (self.controller.clone(), self.executor.clone());
        Box::new(Storvsp::new(controller, executor))
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
        counters
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
