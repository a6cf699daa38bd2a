//! Disks: what a provider of storage reads and writes.

#[cfg(feature = "std")]
mod faulty;
#[cfg(feature = "std")]
mod file;
mod memory;
#[cfg(feature = "std")]
mod open;
#[cfg(feature = "std")]
mod vhdx;

use alloc::string::String;
use core::fmt;

#[cfg(feature = "std")]
pub use faulty::{Effect, Failure, Fault, FaultyDisk, Gate, Operations, Pause, Sleep, When};
#[cfg(feature = "std")]
pub use file::{Iso, RawDisk};
pub use memory::MemoryDisk;
#[cfg(feature = "std")]
pub use open::{DiskFile, Format, OpenError, Options, Why, open, open_file};
#[cfg(feature = "std")]
pub use vhdx::Vhdx;

/// A disk of sectors. All methods may be called from several threads at once; requests that overlap and run at the same time have no
/// order among them.
///
/// Offsets and lengths are in bytes and multiples of the logical sector; anything else is [`DiskError::OutOfRange`].
pub trait Disk: Send + Sync {
    /// Size and sectors.
    fn geometry(&self) -> Geometry;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// What names this disk and no other, the same at every opening: what INQUIRY page 83h tells.
    fn identity(&self) -> [u8; 16];

    /// Whether a write may be lost in a power failure until the next [`flush`](Self::flush) has returned: what the caching mode page tells
    /// as WCE.
    fn write_cache(&self) -> bool {
        !self.read_only()
    }

    /// Reads from `offset` on. On an error nothing is said of what is in `data`.
    ///
    /// # Errors
    /// See [`DiskError`].
    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError>;

    /// Writes from `offset` on. On an error any of the sectors may have been written.
    ///
    /// # Errors
    /// See [`DiskError`].
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError>;

    /// Makes every write that has returned durable: it survives a power failure.
    ///
    /// # Errors
    /// See [`DiskError`]. Which of the writes since the last flush are durable is not known then.
    fn flush(&self) -> Result<(), DiskError>;

    /// Says that nobody needs the content of these sectors any more. Afterwards each reads as zeros or as before, until it is written.
    /// Durable like a write.
    ///
    /// # Errors
    /// See [`DiskError`].
    fn unmap(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Whether [`unmap`](Self::unmap) gives anything back.
    fn can_unmap(&self) -> bool;

    /// The least that [`unmap`](Self::unmap) gives back, in bytes, aligned to its size: a multiple of the logical sector.
    fn unmap_granularity(&self) -> u64 {
        self.geometry().logical.into()
    }
}

/// A disk's size and sectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Number of logical sectors.
    pub sectors: u64,
    /// Bytes in a logical sector, the unit of addresses: 512 or 4096, of a DVD 2048.
    pub logical: u32,
    /// Bytes in a physical sector, the unit that is written without reading: `logical` or more.
    pub physical: u32,
}

impl Geometry {
    /// A disk of this many bytes in sectors of 512; what does not fill a sector is left out.
    pub const fn of_bytes(bytes: u64) -> Self {
        Self {
            sectors: bytes / 512,
            logical: 512,
            physical: 512,
        }
    }

    /// The disk's size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.sectors.saturating_mul(self.logical as u64)
    }

    /// Whether these bytes are whole sectors of the disk.
    ///
    /// # Errors
    /// [`DiskError::OutOfRange`] if not.
    pub fn check(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let sector = u64::from(self.logical);
        let whole = offset.is_multiple_of(sector) && length.is_multiple_of(sector);
        let within = offset
            .checked_add(length)
            .is_some_and(|end| end <= self.bytes());
        if whole && within {
            Ok(())
        } else {
            Err(DiskError::OutOfRange)
        }
    }
}

/// Why a disk did not do it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DiskError {
    /// Not whole sectors, or beyond the end.
    OutOfRange,
    /// A write to a disk that takes none.
    ReadOnly,
    /// The sector at this byte offset, or one after it, cannot be read or written.
    Medium(u64),
    /// The disk does not answer now; later it may.
    NotReady,
    /// What the disk lies on is full.
    NoSpace,
    /// Something below the disk failed; a sentence for the host's own log.
    Failed(String),
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfRange => f.write_str("not whole sectors of the disk"),
            Self::ReadOnly => f.write_str("the disk is read-only"),
            Self::Medium(offset) => write!(f, "medium error at byte {offset}"),
            Self::NotReady => f.write_str("the disk is not ready"),
            Self::NoSpace => f.write_str("no space is left for the disk"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

impl core::error::Error for DiskError {}
