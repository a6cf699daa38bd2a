//! Opens a disk by the name of its file: says what it is, locks it, and says in a sentence what stands against it.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use alloc::borrow::ToOwned;

use uuid::Uuid;
use vhdx::Storage;

use super::{Disk, Iso, RawDisk, Vhdx};

/// How a disk is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options {
    /// Nothing is written; others may have it open read-only at the same time.
    pub read_only: bool,
    /// Bytes of a raw disk's logical sector: 512 or 4096. The other formats say it themselves.
    pub sector: u32,
    /// What the file is; `None`: what its content says.
    pub format: Option<Format>,
}

impl Default for Options {
    /// For reading and writing, sectors of 512 bytes, the format by the content.
    fn default() -> Self {
        Self {
            read_only: false,
            sector: 512,
            format: None,
        }
    }
}

/// What the file of a disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// The disk's bytes.
    Raw,
    /// VHDX, fixed or dynamic.
    Vhdx,
    /// A DVD's image, always read-only.
    Iso,
}

/// Why a disk is not opened: one sentence with the file's name.
#[derive(Debug)]
pub struct OpenError {
    /// The file.
    pub file: PathBuf,
    /// What stands against it.
    pub why: Why,
}

/// What stands against a file as a disk.
#[derive(Debug)]
pub enum Why {
    /// It does not exist.
    Missing,
    /// It is a directory.
    Directory,
    /// It is neither a file nor a block device.
    Special,
    /// This user may not read it.
    NoPermission,
    /// This user may read and not write it.
    NotWritable,
    /// Another process uses it.
    InUse,
    /// It has no bytes.
    Empty,
    /// It has part of a sector.
    NotWhole {
        /// Its length in bytes.
        length: u64,
        /// Bytes of a sector.
        sector: u32,
    },
    /// It is called `.vhdx` and is none.
    OnlyNamedVhdx,
    /// It is a VHDX file that cannot be used.
    Vhdx(vhdx::Error),
    /// Its file system does not lock.
    NoLocks(io::Error),
    /// The system does not open or read it.
    Io(io::Error),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {} ", self.file.display())?;
        match &self.why {
            Why::Missing => f.write_str("does not exist"),
            Why::Directory => f.write_str("is a directory"),
            Why::Special => f.write_str("is neither a file nor a block device"),
            Why::NoPermission => f.write_str("may not be read by this user"),
            Why::NotWritable => f.write_str("may not be written to by this user"),
            Why::InUse => f.write_str("is in use by another process"),
            Why::Empty => f.write_str("is empty"),
            Why::NotWhole { length, sector } => write!(
                f,
                "has {length} bytes, which is not a multiple of its sectors of {sector} bytes"
            ),
            Why::OnlyNamedVhdx => f.write_str("is called .vhdx and is no VHDX file"),
            Why::Vhdx(error) => write!(f, "{error}"),
            Why::NoLocks(error) => write!(f, "cannot be locked where it lies: {error}"),
            Why::Io(error) => write!(f, "cannot be opened: {error}"),
        }
    }
}

impl std::error::Error for OpenError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.why {
            Why::Vhdx(error) => Some(error),
            Why::NoLocks(error) | Why::Io(error) => Some(error),
            _ => None,
        }
    }
}

/// Opens a disk. What it is tells its content; a file called `.vhdx` has to be one.
///
/// As long as it is open, a disk that is written to is nobody else's, and one that is read nobody writes to: the file is locked
/// (flock), exclusively or shared.
///
/// # Errors
/// What stands against it.
pub fn open(path: &Path, options: Options) -> Result<Arc<dyn Disk>, OpenError> {
    attempt(path, options).map_err(|why| OpenError {
        file: path.to_owned(),
        why,
    })
}

/// A disk's file, locked and not yet looked into further.
#[derive(Debug)]
pub struct DiskFile {
    /// The file; it is locked as long as it is open.
    pub file: File,
    /// What it is.
    pub format: Format,
    /// Its length in bytes, not 0.
    pub length: u64,
    /// Whether it is open, and locked, for reading only.
    pub read_only: bool,
}

/// Opens and locks a disk's file as [`open`] does, and leaves what is in it to the caller.
///
/// # Errors
/// As of [`open`], as far as the file's inside does not matter.
pub fn open_file(path: &Path, options: Options) -> Result<DiskFile, OpenError> {
    locked(path, options).map_err(|why| OpenError {
        file: path.to_owned(),
        why,
    })
}

fn attempt(path: &Path, options: Options) -> Result<Arc<dyn Disk>, Why> {
    let DiskFile {
        file,
        format,
        length,
        read_only,
    } = locked(path, options)?;
    let sector = match format {
        Format::Raw => options.sector,
        Format::Iso => Iso::SECTOR,
        Format::Vhdx => {
            let disk = Vhdx::open(Arc::new(file), read_only).map_err(Why::Vhdx)?;
            return Ok(Arc::new(disk));
        }
    };
    if !length.is_multiple_of(sector.into()) {
        return Err(Why::NotWhole { length, sector });
    }
    let identity = identity(path);
    Ok(match format {
        Format::Iso => Arc::new(Iso::new(file, identity).map_err(Why::Io)?),
        _ => {
            let disk = RawDisk::new(file, sector, identity, read_only).map_err(Why::Io)?;
            Arc::new(match options.format {
                None => disk.staying_raw(),
                Some(_) => disk,
            })
        }
    })
}

fn locked(path: &Path, options: Options) -> Result<DiskFile, Why> {
    kind(path)?;
    let mut file = File::open(path).map_err(refused(Why::NoPermission))?;
    let length = file.seek(SeekFrom::End(0)).map_err(Why::Io)?;
    if length == 0 {
        return Err(Why::Empty);
    }
    let format = match options.format {
        Some(format) => format,
        None => detect(path, &file, length)?,
    };
    let read_only = options.read_only || format == Format::Iso;
    if !read_only {
        let open = OpenOptions::new().read(true).write(true).open(path);
        file = open.map_err(refused(Why::NotWritable))?;
    }
    lock(&file, read_only)?;
    Ok(DiskFile {
        file,
        format,
        length,
        read_only,
    })
}

/// Refuses what is no file before it is opened: opening a pipe would wait for its other end.
fn kind(path: &Path) -> Result<(), Why> {
    let metadata = path.metadata().map_err(refused(Why::NoPermission))?;
    let kind = metadata.file_type();
    #[cfg(unix)]
    let is_device = std::os::unix::fs::FileTypeExt::is_block_device(&kind);
    #[cfg(not(unix))]
    let is_device = false;
    if kind.is_dir() {
        Err(Why::Directory)
    } else if kind.is_file() || is_device {
        Ok(())
    } else {
        Err(Why::Special)
    }
}

fn refused(permission: Why) -> impl FnOnce(io::Error) -> Why {
    move |error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Why::Missing,
        io::ErrorKind::IsADirectory => Why::Directory,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => permission,
        _ => Why::Io(error),
    }
}

fn lock(file: &File, shared: bool) -> Result<(), Why> {
    let locked = if shared {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => Why::InUse,
        TryLockError::Error(error) => Why::NoLocks(error),
    })
}

/// What the content says.
fn detect(path: &Path, file: &File, length: u64) -> Result<Format, Why> {
    let holds = |at: u64, signature: &[u8]| {
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..signature.len()];
        if at + bytes.len() as u64 > length {
            return Ok(false);
        }
        file.read_at(at, bytes).map_err(Why::Io)?;
        Ok(bytes == signature)
    };
    let called = |name: &str| {
        let extension = path.extension().and_then(OsStr::to_str);
        extension.is_some_and(|extension| extension.eq_ignore_ascii_case(name))
    };
    if holds(0, &vhdx::SIGNATURE)? {
        Ok(Format::Vhdx)
    } else if called("vhdx") {
        Err(Why::OnlyNamedVhdx)
    } else if holds(Iso::SIGNATURE_AT, &Iso::SIGNATURE)? {
        Ok(Format::Iso)
    } else {
        Ok(Format::Raw)
    }
}

/// What names a disk whose content does not: made from where it lies.
fn identity(path: &Path) -> [u8; 16] {
    let place = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    *Uuid::new_v5(&Uuid::NAMESPACE_URL, place.as_os_str().as_encoded_bytes()).as_bytes()
}
