//! The metadata region: sizes, sectors and identity of the virtual disk (MS-VHDX 2.6).

use std::collections::BTreeSet;

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{Error, Part, Result};
use crate::format::{
    DISK_SIZE, FILE_PARAMETERS, LOGICAL_SECTOR, MAX_ENTRIES, MetadataEntry, MetadataHeader,
    PAGE_83, PARENT_LOCATOR, PHYSICAL_SECTOR, TABLE, read_structure,
};
use crate::region::Extent;
use crate::storage::Storage;
use crate::{MAX_DISK, MIB};

/// The signature of the metadata table.
const SIGNATURE: [u8; 8] = *b"metadata";

/// The most items of the user's (2.6.1.2).
const MAX_USER_ITEMS: usize = 1024;

/// What a virtual disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameters {
    /// Bytes of the virtual disk, whole logical sectors.
    pub size: u64,
    /// Bytes that are allocated together: a power of two from 1 MiB to 256 MiB.
    pub block_size: u32,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector: u32,
    /// Bytes of a physical sector: 512 or 4096.
    pub physical_sector: u32,
    /// Whether all blocks are allocated and stay so.
    pub fixed: bool,
    /// The disk's identity for SCSI page 83h.
    pub identity: Uuid,
}

fn damaged(why: impl Into<String>) -> Error {
    Error::damaged(Part::Metadata, why)
}

impl Parameters {
    /// Number of blocks; the last one may be longer than the disk.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size.into())
    }

    /// Number of blocks that share an entry for their sector bitmap (2.5).
    pub fn chunk_ratio(&self) -> u64 {
        (u64::from(self.logical_sector) << 23) / u64::from(self.block_size)
    }

    /// Number of entries of the BAT of a disk without a parent (2.5).
    pub fn entries(&self) -> u64 {
        let blocks = self.blocks();
        blocks + blocks.saturating_sub(1) / self.chunk_ratio()
    }

    /// Which rule these break, if any.
    pub(crate) fn broken(&self) -> Option<String> {
        let block = u64::from(self.block_size);
        let sector = u64::from(self.logical_sector);
        if !self.block_size.is_power_of_two() || !(MIB..=256 * MIB).contains(&block) {
            Some(format!("a block size of {block} bytes"))
        } else if ![512, 4096].contains(&sector) {
            Some(format!("logical sectors of {sector} bytes"))
        } else if ![512, 4096].contains(&self.physical_sector) {
            let sector = self.physical_sector;
            Some(format!("physical sectors of {sector} bytes"))
        } else if self.size == 0 || !self.size.is_multiple_of(sector) || self.size > MAX_DISK {
            Some(format!("a disk size of {} bytes", self.size))
        } else {
            None
        }
    }
}

/// The items as far as they have been read.
#[derive(Default)]
struct Items {
    file: Option<(u32, u32)>,
    size: Option<u64>,
    identity: Option<[u8; 16]>,
    logical: Option<u32>,
    physical: Option<u32>,
}

/// Reads the items of this region.
pub fn read(storage: &dyn Storage, region: Extent) -> Result<Parameters> {
    let table = read_structure(storage, region.offset, TABLE)?;
    let (header, rest) =
        MetadataHeader::read_from_prefix(&table).map_err(|_| damaged("the table is cut short"))?;
    if header.signature != SIGNATURE {
        return Err(damaged("the table has no signature"));
    }
    let count = usize::from(header.entries.get());
    if count > MAX_ENTRIES {
        return Err(damaged(format!("{count} items are too many")));
    }
    let mut items = Items::default();
    let mut seen = BTreeSet::new();
    let mut places = Vec::new();
    for entry in rest.chunks_exact(size_of::<MetadataEntry>()).take(count) {
        let entry =
            MetadataEntry::read_from_bytes(entry).map_err(|_| damaged("an entry is cut short"))?;
        let user = entry.flags.get() & 1 != 0;
        let id = entry.id.uuid();
        if !seen.insert((user, id)) {
            return Err(damaged(format!("item {id} is there twice")));
        }
        let (offset, length) = (entry.offset.get().into(), u64::from(entry.length.get()));
        let place = Extent { offset, length };
        let empty = offset == 0 && length == 0;
        let within = offset >= TABLE as u64 && place.end() <= region.length && length <= MIB;
        if !empty && !within {
            return Err(damaged(format!("item {id} lies outside the region")));
        }
        places.push(place);
        if user {
            continue;
        }
        items.take(storage, region, id, place, entry.flags.get() & 4 != 0)?;
    }
    if seen.iter().filter(|(user, _)| *user).count() > MAX_USER_ITEMS {
        return Err(damaged("too many items are the user's"));
    }
    places.retain(|place| place.length > 0);
    places.sort_unstable();
    if places.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
        return Err(damaged("items overlap"));
    }
    items.parameters()
}

impl Items {
    fn take(
        &mut self,
        storage: &dyn Storage,
        region: Extent,
        id: Uuid,
        place: Extent,
        required: bool,
    ) -> Result<()> {
        let bytes = |length: usize| {
            if place.length != length as u64 {
                return Err(damaged(format!("item {id} has a wrong length")));
            }
            Ok(read_structure(
                storage,
                region.offset + place.offset,
                length,
            )?)
        };
        let short = |at: usize, bytes: &[u8]| {
            let field = bytes
                .get(at..at + 4)
                .and_then(|field| field.try_into().ok());
            field.map(u32::from_le_bytes)
        };
        match id {
            FILE_PARAMETERS => {
                let bytes = bytes(8)?;
                self.file = short(0, &bytes).zip(short(4, &bytes));
            }
            DISK_SIZE => self.size = bytes(8)?.try_into().ok().map(u64::from_le_bytes),
            PAGE_83 => self.identity = bytes(16)?.try_into().ok(),
            LOGICAL_SECTOR => self.logical = short(0, &bytes(4)?),
            PHYSICAL_SECTOR => self.physical = short(0, &bytes(4)?),
            // Looked at only in a differencing disk, which is refused.
            PARENT_LOCATOR => {}
            _ if required => return Err(Error::UnknownItem(id)),
            _ => {}
        }
        Ok(())
    }

    fn parameters(self) -> Result<Parameters> {
        let missing = |what: &str| damaged(format!("the {what} is missing"));
        let (block_size, flags) = self.file.ok_or_else(|| missing("block size"))?;
        if flags & 2 != 0 {
            return Err(Error::Differencing);
        }
        let parameters = Parameters {
            size: self.size.ok_or_else(|| missing("disk's size"))?,
            block_size,
            logical_sector: self.logical.ok_or_else(|| missing("logical sector size"))?,
            physical_sector: self
                .physical
                .ok_or_else(|| missing("physical sector size"))?,
            fixed: flags & 1 != 0,
            identity: self
                .identity
                .map(Uuid::from_bytes_le)
                .ok_or_else(|| missing("disk's identity"))?,
        };
        match parameters.broken() {
            Some(what) => Err(damaged(format!("{what} cannot be"))),
            None => Ok(parameters),
        }
    }
}

/// The metadata of a new disk: the table and, after it, the items.
pub fn build(parameters: &Parameters) -> Vec<u8> {
    /// The item is part of the virtual disk and has to be known.
    const DISK: u32 = 6;
    const REQUIRED: u32 = 4;
    let mut file = parameters.block_size.to_le_bytes().to_vec();
    file.extend(u32::from(parameters.fixed).to_le_bytes());
    let items = [
        (FILE_PARAMETERS, REQUIRED, file),
        (DISK_SIZE, DISK, parameters.size.to_le_bytes().to_vec()),
        (PAGE_83, DISK, parameters.identity.to_bytes_le().to_vec()),
        (
            LOGICAL_SECTOR,
            DISK,
            parameters.logical_sector.to_le_bytes().to_vec(),
        ),
        (
            PHYSICAL_SECTOR,
            DISK,
            parameters.physical_sector.to_le_bytes().to_vec(),
        ),
    ];
    let header = MetadataHeader {
        signature: SIGNATURE,
        reserved: 0.into(),
        entries: (items.len() as u16).into(),
        reserved2: [0; 20],
    };
    let mut table = header.as_bytes().to_vec();
    let mut content = Vec::new();
    for (id, flags, bytes) in items {
        let entry = MetadataEntry {
            id: id.into(),
            offset: ((TABLE + content.len()) as u32).into(),
            length: (bytes.len() as u32).into(),
            flags: flags.into(),
            reserved: 0.into(),
        };
        table.extend_from_slice(entry.as_bytes());
        content.extend(bytes);
    }
    table.resize(TABLE, 0);
    table.extend(content);
    table
}
