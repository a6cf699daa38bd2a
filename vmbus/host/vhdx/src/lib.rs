//! VHDX, the disk format of Hyper-V: fixed and dynamic disks are opened, read, written, created and checked.
//!
//! Facts: [MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format"; chapters are named where they are used.
//!
//! What a power failure can do to a file is thought of in terms of [`Storage`]: between two [`Storage::sync`]s it may lose any
//! of the writes, and tear the others. After any such failure [`Vhdx::open`] finds a valid disk with everything that was written
//! before the last [`Vhdx::flush`] that returned.
//!
//! Nothing in a file is believed: any bytes give a disk or an [`Error`], and what is kept in memory is bounded by what the
//! file really holds.

#![forbid(unsafe_code)]

mod bat;
mod check;
mod create;
mod disk;
mod error;
mod format;
mod header;
mod log;
mod metadata;
mod opening;
mod region;
mod space;
mod storage;

pub use check::{Finding, Report, check};
pub use create::{Settings, create};
pub use disk::Vhdx;
pub use error::{Error, Part, Result};
pub use metadata::Parameters;
pub use storage::{MemoryStorage, Storage, punch_hole};
pub use uuid::Uuid;

/// The first bytes of every VHDX file (MS-VHDX 2.2.1).
pub const SIGNATURE: [u8; 8] = *b"vhdxfile";

/// 2^20 bytes: the unit of places in a VHDX file.
pub const MIB: u64 = 1 << 20;

/// The largest virtual disk: 64 TiB (MS-VHDX 2.6.2.2).
pub const MAX_DISK: u64 = 64 << 40;

/// The largest file that is opened: twice the largest disk. Bounds what is kept about its space.
pub const MAX_FILE: u64 = 2 * MAX_DISK;
