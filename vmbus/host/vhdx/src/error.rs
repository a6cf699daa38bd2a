//! Why a VHDX file is not opened, or a request to it fails.

use std::{fmt, io};

use uuid::Uuid;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong. As text it is the rest of a sentence that begins with the file's name.
#[derive(Debug)]
pub enum Error {
    /// Not the bytes that every VHDX file begins with.
    NotVhdx,
    /// The file breaks a rule of the format.
    Damaged {
        /// Where.
        part: Part,
        /// Which rule, as a clause.
        why: String,
    },
    /// A differencing disk: its content is partly in another file.
    Differencing,
    /// A later version of the format, or of its log.
    Version(u16),
    /// A region that must be understood and is not known.
    UnknownRegion(Uuid),
    /// A metadata item that must be understood and is not known.
    UnknownItem(Uuid),
    /// Sizes that the format allows and this crate does not handle, or that a new disk cannot have.
    Unsupported(String),
    /// A write to a disk that was opened read-only.
    ReadOnly,
    /// Not whole sectors, or beyond the end of the disk.
    OutOfRange,
    /// Writing stopped after an earlier failure that left unknown what is durable; to be opened anew.
    Stopped,
    /// The file itself cannot be read or written.
    Io(io::Error),
}

/// A part of a VHDX file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The two headers (MS-VHDX 2.2.2).
    Headers,
    /// The two region tables (2.2.3).
    RegionTables,
    /// The log (2.3).
    Log,
    /// The metadata region (2.6).
    Metadata,
    /// The block allocation table (2.5).
    Bat,
}

impl Error {
    pub(crate) fn damaged(part: Part, why: impl Into<String>) -> Self {
        Self::Damaged {
            part,
            why: why.into(),
        }
    }

    /// Whether the storage is full.
    pub fn is_no_space(&self) -> bool {
        matches!(self, Self::Io(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Headers => "headers",
            Self::RegionTables => "region tables",
            Self::Log => "log",
            Self::Metadata => "metadata",
            Self::Bat => "block allocation table",
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotVhdx => f.write_str("is no VHDX file"),
            Self::Damaged { part, why } => write!(f, "is damaged in its {part}: {why}"),
            Self::Differencing => f.write_str(
                "is a differencing disk, which is not supported: merge it into its parent first",
            ),
            Self::Version(version) => write!(f, "is of version {version}, which is not known"),
            Self::UnknownRegion(id) => write!(f, "has a required region {id} that is not known"),
            Self::UnknownItem(id) => {
                write!(f, "has a required metadata item {id} that is not known")
            }
            Self::Unsupported(why) => write!(f, "is not supported: {why}"),
            Self::ReadOnly => f.write_str("is open for reading only"),
            Self::OutOfRange => f.write_str("has no such sectors"),
            Self::Stopped => f.write_str("takes no more writes after an earlier failure"),
            Self::Io(error) => write!(f, "cannot be read or written: {error}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
