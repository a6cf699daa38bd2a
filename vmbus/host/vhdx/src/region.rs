//! The region tables: where the BAT and the metadata are (MS-VHDX 2.2.3).

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::MIB;
use crate::error::{Error, Part, Result};
use crate::format::{
    BAT_REGION, MAX_ENTRIES, METADATA_REGION, REGION_TABLES, RegionEntry, RegionTableHeader, TABLE,
    is_sealed, read_structure, seal,
};
use crate::storage::Storage;

/// A run of bytes of the file, from and to a multiple of 1 MiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub length: u64,
}

impl Extent {
    /// Where it ends.
    pub fn end(self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// The regions of a file.
#[derive(Debug)]
pub struct Regions {
    /// The block allocation table.
    pub bat: Extent,
    /// The metadata.
    pub metadata: Extent,
    /// All regions, those that are not known and the log included, in order; none overlaps another.
    pub all: Vec<Extent>,
}

fn damaged(why: impl Into<String>) -> Error {
    Error::damaged(Part::RegionTables, why)
}

/// Whether each of the two tables is valid.
pub fn valid(storage: &dyn Storage) -> Result<[bool; 2]> {
    let mut valid = [false; 2];
    for (valid, offset) in valid.iter_mut().zip(REGION_TABLES) {
        *valid = is_sealed(&read_structure(storage, offset, TABLE)?, b"regi");
    }
    Ok(valid)
}

/// Reads the first table that is valid, in a file of this length with its log there.
pub fn read(storage: &dyn Storage, log: Extent) -> Result<Regions> {
    let mut table = Vec::new();
    for offset in REGION_TABLES {
        table = read_structure(storage, offset, TABLE)?;
        if is_sealed(&table, b"regi") {
            break;
        }
        table.clear();
    }
    let (header, rest) = RegionTableHeader::read_from_prefix(&table)
        .map_err(|_| damaged("neither of the two is valid"))?;
    let count = header.entries.get() as usize;
    if count > MAX_ENTRIES {
        return Err(damaged(format!("{count} entries are too many")));
    }
    let (mut bat, mut metadata) = (None, None);
    let mut all = vec![log];
    let length = storage.length()?;
    if log.end() > length {
        let why = "the log lies beyond the end of the file";
        return Err(Error::damaged(Part::Headers, why));
    }
    for entry in rest.chunks_exact(size_of::<RegionEntry>()).take(count) {
        let entry =
            RegionEntry::read_from_bytes(entry).map_err(|_| damaged("an entry is cut short"))?;
        let id = entry.id.uuid();
        let extent = Extent {
            offset: entry.offset.get(),
            length: entry.length.get().into(),
        };
        let aligned = extent.offset.is_multiple_of(MIB) && extent.length.is_multiple_of(MIB);
        if !aligned || extent.offset < MIB || extent.length == 0 {
            return Err(damaged(format!("region {id} is not in whole MiB")));
        }
        if extent.end() > length {
            let why = format!("region {id} lies beyond the end of the file");
            return Err(damaged(why));
        }
        let known = match id {
            BAT_REGION => &mut bat,
            METADATA_REGION => &mut metadata,
            _ if entry.flags.get() & 1 != 0 => return Err(Error::UnknownRegion(id)),
            _ => &mut None,
        };
        if known.replace(extent).is_some() {
            return Err(damaged(format!("region {id} is there twice")));
        }
        all.push(extent);
    }
    all.sort_unstable();
    if all.windows(2).any(|pair| pair[0].end() > pair[1].offset) {
        return Err(damaged("regions or log overlap"));
    }
    Ok(Regions {
        bat: bat.ok_or_else(|| damaged("no block allocation table is named"))?,
        metadata: metadata.ok_or_else(|| damaged("no metadata region is named"))?,
        all,
    })
}

/// A table that names these two regions.
pub fn build(bat: Extent, metadata: Extent) -> Vec<u8> {
    let entry = |id: Uuid, extent: Extent| RegionEntry {
        id: id.into(),
        offset: extent.offset.into(),
        length: u32::try_from(extent.length).unwrap_or(u32::MAX).into(),
        flags: 1.into(),
    };
    let header = RegionTableHeader {
        signature: *b"regi",
        checksum: 0.into(),
        entries: 2.into(),
        reserved: 0.into(),
    };
    let mut table = header.as_bytes().to_vec();
    table.extend_from_slice(entry(BAT_REGION, bat).as_bytes());
    table.extend_from_slice(entry(METADATA_REGION, metadata).as_bytes());
    table.resize(TABLE, 0);
    seal(&mut table);
    table
}
