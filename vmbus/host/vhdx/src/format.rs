//! The format's structures, byte for byte, and its checksum.

use std::io;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::storage::Storage;

/// Headers, log sectors and pages of the BAT are written in this unit.
pub const SECTOR: u64 = 4096;

/// Where the two headers are (MS-VHDX 2.2.2).
pub const HEADERS: [u64; 2] = [64 << 10, 128 << 10];

/// Where the two region tables are (2.2.3).
pub const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];

/// Bytes of a region table and of the metadata table.
pub const TABLE: usize = 64 << 10;

/// The most entries in a region table or metadata table (2.2.3.1, 2.6.1.1).
pub const MAX_ENTRIES: usize = 2047;

/// Regions (2.2.3.2).
pub const BAT_REGION: Uuid = Uuid::from_u128(0x2dc27766_f623_4200_9d64_115e9bfd4a08);
/// See [`BAT_REGION`].
pub const METADATA_REGION: Uuid = Uuid::from_u128(0x8b7ca206_4790_4b9a_b8fe_575f050f886e);

/// Metadata items (2.6.2).
pub const FILE_PARAMETERS: Uuid = Uuid::from_u128(0xcaa16737_fa36_4d43_b3b6_33f0aa44e76b);
/// See [`FILE_PARAMETERS`].
pub const DISK_SIZE: Uuid = Uuid::from_u128(0x2fa54224_cd1b_4876_b211_5dbed83bf4b8);
/// See [`FILE_PARAMETERS`].
pub const PAGE_83: Uuid = Uuid::from_u128(0xbeca12ab_b2e6_4523_93ef_c309e000c746);
/// See [`FILE_PARAMETERS`].
pub const LOGICAL_SECTOR: Uuid = Uuid::from_u128(0x8141bf1d_a96f_4709_ba47_f233a8faab5f);
/// See [`FILE_PARAMETERS`].
pub const PHYSICAL_SECTOR: Uuid = Uuid::from_u128(0xcda348c7_445d_4471_9cc9_e9885251c556);
/// See [`FILE_PARAMETERS`]; only in differencing disks.
pub const PARENT_LOCATOR: Uuid = Uuid::from_u128(0xa8d35f2d_b30b_454d_abf7_d3d84834ab0c);

/// A GUID as it is stored: the first three fields little endian.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// The same, as the crate's type.
    pub fn uuid(self) -> Uuid {
        Uuid::from_bytes_le(self.0)
    }

    /// Whether it is all zeros.
    pub fn is_zero(self) -> bool {
        self.0 == [0; 16]
    }
}

impl From<Uuid> for Guid {
    fn from(uuid: Uuid) -> Self {
        Self(uuid.to_bytes_le())
    }
}

/// A header (MS-VHDX 2.2.2), without the reserved bytes up to 4 KiB.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Header {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub sequence: U64,
    pub file_write: Guid,
    pub data_write: Guid,
    pub log: Guid,
    pub log_version: U16,
    pub version: U16,
    pub log_length: U32,
    pub log_offset: U64,
}
const _: () = assert!(size_of::<Header>() == 80);

/// What a region table begins with (2.2.3.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RegionTableHeader {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub entries: U32,
    pub reserved: U32,
}
const _: () = assert!(size_of::<RegionTableHeader>() == 16);

/// An entry of a region table (2.2.3.2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RegionEntry {
    pub id: Guid,
    pub offset: U64,
    pub length: U32,
    /// Bit 0: required.
    pub flags: U32,
}
const _: () = assert!(size_of::<RegionEntry>() == 32);

/// What the metadata region begins with (2.6.1.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MetadataHeader {
    pub signature: [u8; 8],
    pub reserved: U16,
    pub entries: U16,
    pub reserved2: [u8; 20],
}
const _: () = assert!(size_of::<MetadataHeader>() == 32);

/// An entry of the metadata table (2.6.1.2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct MetadataEntry {
    pub id: Guid,
    /// From the start of the region.
    pub offset: U32,
    pub length: U32,
    /// Bit 0: the user's, bit 1: of the virtual disk, bit 2: required.
    pub flags: U32,
    pub reserved: U32,
}
const _: () = assert!(size_of::<MetadataEntry>() == 32);

/// What a log entry begins with (2.3.1.1).
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct LogEntryHeader {
    pub signature: [u8; 4],
    pub checksum: U32,
    pub length: U32,
    /// Where the oldest entry that is still needed begins, in the log.
    pub tail: U32,
    pub sequence: U64,
    pub descriptors: U32,
    pub reserved: U32,
    pub log: Guid,
    /// A length of the file that was durable when this was written.
    pub flushed_length: U64,
    /// A length of the file that holds all that is allocated.
    pub last_length: U64,
}
const _: () = assert!(size_of::<LogEntryHeader>() == 64);

/// A descriptor of a log entry (2.3.1.2, 2.3.1.3).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Descriptor {
    /// `desc` or `zero`.
    pub signature: [u8; 4],
    /// `desc`: the last 4 bytes of the sector.
    pub trailing: [u8; 4],
    /// `desc`: the first 8 bytes of the sector. `zero`: how many bytes become zeros.
    pub leading: [u8; 8],
    pub offset: U64,
    pub sequence: U64,
}
const _: () = assert!(size_of::<Descriptor>() == 32);

/// A sector's bytes in the log, less those in its descriptor (2.3.1.4).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct DataSector {
    pub signature: [u8; 4],
    pub sequence_high: U32,
    pub data: [u8; 4084],
    pub sequence_low: U32,
}
const _: () = assert!(size_of::<DataSector>() as u64 == SECTOR);

/// CRC-32C over a structure whose checksum is in bytes 4 to 8, which count as zeros.
pub fn checksum(structure: &[u8]) -> u32 {
    let (start, rest) = structure.split_at(structure.len().min(4));
    let sum = crc32c::crc32c_append(crc32c::crc32c(start), &[0; 4]);
    crc32c::crc32c_append(sum, rest.get(4..).unwrap_or_default())
}

/// Puts the checksum into a structure.
pub fn seal(structure: &mut [u8]) {
    let sum = checksum(structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// Whether a structure has its signature and its checksum.
pub fn is_sealed(structure: &[u8], signature: &[u8; 4]) -> bool {
    structure.starts_with(signature)
        && structure.get(4..8) == Some(&checksum(structure).to_le_bytes())
}

/// Reads a structure of up to [`TABLE`] bytes; zeros where the file has ended.
pub fn read_structure(storage: &dyn Storage, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let there = storage.length()?.saturating_sub(offset);
    let there = usize::try_from(there).map_or(length, |there| there.min(length));
    if there > 0 {
        storage.read_at(offset, &mut bytes[..there])?;
    }
    Ok(bytes)
}
