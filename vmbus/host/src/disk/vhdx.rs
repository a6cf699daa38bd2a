//! A disk in a VHDX file.

use std::sync::Arc;

use alloc::format;

use vhdx::Storage;

use super::file::failure;
use super::{Disk, DiskError, Geometry};

/// A fixed or dynamic VHDX disk.
pub struct Vhdx {
    disk: vhdx::Vhdx,
}

impl Vhdx {
    /// Opens the disk in this storage, see [`vhdx::Vhdx::open`].
    ///
    /// # Errors
    /// See there.
    pub fn open(storage: Arc<dyn Storage>, read_only: bool) -> vhdx::Result<Self> {
        let disk = vhdx::Vhdx::open(storage, read_only)?;
        Ok(Self { disk })
    }
}

fn error(offset: u64) -> impl Fn(vhdx::Error) -> DiskError {
    move |error| match error {
        vhdx::Error::OutOfRange => DiskError::OutOfRange,
        vhdx::Error::ReadOnly => DiskError::ReadOnly,
        vhdx::Error::Io(error) => failure(&error, offset),
        other => DiskError::Failed(format!("the VHDX file {other}")),
    }
}

impl Disk for Vhdx {
    fn geometry(&self) -> Geometry {
        let parameters = self.disk.parameters();
        Geometry {
            sectors: parameters.size / u64::from(parameters.logical_sector),
            logical: parameters.logical_sector,
            physical: parameters.physical_sector.max(parameters.logical_sector),
        }
    }

    fn read_only(&self) -> bool {
        self.disk.is_read_only()
    }

    fn identity(&self) -> [u8; 16] {
        self.disk.parameters().identity.to_bytes_le()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.disk.read(offset, data).map_err(error(offset))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.disk.write(offset, data).map_err(error(offset))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.disk.flush().map_err(error(0))
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.unmap(offset, length).map_err(error(offset))
    }

    fn can_unmap(&self) -> bool {
        !self.disk.is_read_only() && !self.disk.parameters().fixed
    }

    fn unmap_granularity(&self) -> u64 {
        self.disk.parameters().block_size.into()
    }
}
