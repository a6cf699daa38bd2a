//! Disks that are a file's or a block device's bytes: raw disks and ISO images.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use alloc::string::ToString;

use vhdx::{Storage, punch_hole};

use super::{Disk, DiskError, Geometry};

/// A disk that is the bytes of a file or block device, nothing before or after them.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    geometry: Geometry,
    identity: [u8; 16],
    read_only: bool,
    can_unmap: bool,
    /// Its content has told what it is, and is to tell the same at the next opening.
    stays_raw: bool,
}

impl RawDisk {
    /// The disk in an open file, whose length it has from now on; what does not fill a sector is left out. The file is open for
    /// writing unless `read_only`.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub fn new(
        mut file: File,
        logical: u32,
        identity: [u8; 16],
        read_only: bool,
    ) -> io::Result<Self> {
        // A block device has no length in its metadata.
        let length = file.seek(SeekFrom::End(0))?;
        let can_unmap = !read_only && can_punch(&file, length);
        let geometry = Geometry {
            sectors: length / u64::from(logical),
            logical,
            physical: physical(&file).max(logical),
        };
        Ok(Self {
            file,
            geometry,
            identity,
            read_only,
            can_unmap,
            stays_raw: false,
        })
    }

    /// The same disk, which refuses to become a VHDX file: a guest that may write itself one would choose the size of its disk
    /// when the file is opened by its content again.
    #[must_use]
    pub fn staying_raw(self) -> Self {
        Self {
            stays_raw: true,
            ..self
        }
    }

    fn writable(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        if self.read_only {
            return Err(DiskError::ReadOnly);
        }
        self.geometry.check(offset, length)
    }
}

/// Bytes of a physical sector: what the block device says, and pages of the host's memory for a file.
fn physical(file: &File) -> u32 {
    const PAGE: u32 = 4096;
    #[cfg(target_os = "linux")]
    if let Ok(size @ (512 | PAGE)) = rustix::fs::ioctl_blkpbszget(file) {
        return size;
    }
    let _ = file;
    PAGE
}

/// Whether holes can be made here, found out beyond the end, where there is nothing to lose.
fn can_punch(file: &File, length: u64) -> bool {
    const PAGE: u64 = 4096;
    match punch_hole(file, length.next_multiple_of(PAGE), PAGE) {
        Ok(can) => can,
        // A block device has no beyond, but it takes holes.
        Err(error) => error.kind() == io::ErrorKind::InvalidInput,
    }
}

/// An error of the host's as the disk's, for a request that began here.
pub(super) fn failure(error: &io::Error, offset: u64) -> DiskError {
    /// Linux: what a medium answers that cannot be read.
    const EIO: i32 = 5;
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DiskError::NoSpace,
        io::ErrorKind::UnexpectedEof => DiskError::Medium(offset),
        _ if error.raw_os_error() == Some(EIO) => DiskError::Medium(offset),
        _ => DiskError::Failed(error.to_string()),
    }
}

impl Disk for RawDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn identity(&self) -> [u8; 16] {
        self.identity
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.geometry.check(offset, data.len() as u64)?;
        let result = self.file.read_at(offset, data);
        result.map_err(|error| failure(&error, offset))
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.writable(offset, data.len() as u64)?;
        if self.stays_raw && offset == 0 && data.starts_with(&vhdx::SIGNATURE) {
            return Err(DiskError::ReadOnly);
        }
        let result = self.file.write_at(offset, data);
        result.map_err(|error| failure(&error, offset))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync().map_err(|error| failure(&error, 0))
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.writable(offset, length)?;
        if self.can_unmap {
            let result = punch_hole(&self.file, offset, length);
            result.map_err(|error| failure(&error, offset))?;
        }
        Ok(())
    }

    fn can_unmap(&self) -> bool {
        self.can_unmap
    }
}

/// A DVD's image: read-only, in sectors of 2048 bytes.
#[derive(Debug)]
pub struct Iso {
    image: RawDisk,
}

impl Iso {
    /// Bytes of a sector.
    pub const SECTOR: u32 = 2048;

    /// Where ISO 9660 has the name of its standard: sector 16, behind the type (ECMA-119, 8.1).
    pub(super) const SIGNATURE_AT: u64 = 16 * Self::SECTOR as u64 + 1;

    /// The name of the standard.
    pub(super) const SIGNATURE: [u8; 5] = *b"CD001";

    /// The image in an open file.
    ///
    /// # Errors
    /// When the file cannot be asked.
    pub fn new(file: File, identity: [u8; 16]) -> io::Result<Self> {
        let mut image = RawDisk::new(file, Self::SECTOR, identity, true)?;
        image.geometry.physical = Self::SECTOR;
        Ok(Self { image })
    }
}

impl Disk for Iso {
    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn identity(&self) -> [u8; 16] {
        self.image.identity()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.image.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        self.image.write(offset, data)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.image.flush()
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.image.unmap(offset, length)
    }

    fn can_unmap(&self) -> bool {
        false
    }
}
