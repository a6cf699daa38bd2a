//! Makes new disks.

use std::sync::Arc;

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::format::{REGION_TABLES, TABLE};
use crate::header::Headers;
use crate::metadata::{self, Parameters};
use crate::region::{self, Extent};
use crate::storage::Storage;
use crate::{MIB, SIGNATURE};

/// What a new disk is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Bytes of the disk: whole logical sectors, at most 64 TiB.
    pub size: u64,
    /// Whether all blocks are allocated at once.
    pub fixed: bool,
    /// Bytes that are allocated together: a power of two from 1 MiB to 256 MiB.
    pub block_size: u32,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector: u32,
    /// Bytes of a physical sector: 512 or 4096.
    pub physical_sector: u32,
    /// The disk's identity.
    pub identity: Uuid,
}

impl Settings {
    /// A dynamic disk as Hyper-V makes it: blocks of 2 MiB in a disk of logical sectors of 512 and physical ones of 4096 bytes
    /// (spec boot.md A2), with an identity of its own.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            fixed: false,
            block_size: 2 << 20,
            logical_sector: 512,
            physical_sector: 4096,
            identity: Uuid::new_v4(),
        }
    }
}

/// Where the log goes, and its length.
const LOG: Extent = Extent {
    offset: MIB,
    length: MIB,
};

/// Where the metadata go.
const METADATA: Extent = Extent {
    offset: 2 * MIB,
    length: MIB,
};

/// Makes a disk of zeros in an empty storage; durable when this returns.
///
/// # Errors
/// When the settings make no disk, the storage is not empty or does not take it.
pub fn create(storage: &Arc<dyn Storage>, settings: &Settings) -> Result<()> {
    let parameters = Parameters {
        size: settings.size,
        block_size: settings.block_size,
        logical_sector: settings.logical_sector,
        physical_sector: settings.physical_sector,
        fixed: settings.fixed,
        identity: settings.identity,
    };
    if let Some(what) = parameters.broken() {
        return Err(Error::Unsupported(what));
    }
    if settings.physical_sector < settings.logical_sector {
        let why = "physical sectors that are shorter than logical ones";
        return Err(Error::Unsupported(why.into()));
    }
    if storage.length()? != 0 {
        return Err(Error::Unsupported("a file that is not empty".into()));
    }
    let bat = Extent {
        offset: METADATA.end(),
        length: (parameters.entries() * 8).next_multiple_of(MIB),
    };
    let block = u64::from(settings.block_size);
    if settings.fixed {
        let end = bat.end() + parameters.blocks() * block;
        storage.reserve(end)?;
        write_fixed(storage, &parameters, bat)?;
    } else {
        storage.set_length(bat.end())?;
    }
    // What the log is written to must be there when the storage is full.
    storage.write_at(LOG.offset, &vec![0; LOG.length as usize])?;
    storage.write_at(METADATA.offset, &metadata::build(&parameters))?;
    let table = region::build(bat, METADATA);
    debug_assert_eq!(table.len(), TABLE);
    for offset in REGION_TABLES {
        storage.write_at(offset, &table)?;
    }
    let mut identifier = SIGNATURE.to_vec();
    let creator = concat!("Enlit ", env!("CARGO_PKG_VERSION"));
    identifier.extend(creator.encode_utf16().flat_map(u16::to_le_bytes));
    storage.write_at(0, &identifier)?;
    storage.sync()?;
    // Without a header the file is no disk yet.
    Headers::new(LOG.offset, LOG.length as u32).update(storage, |_| ())
}

/// The BAT of a fixed disk: all blocks in order behind it.
fn write_fixed(storage: &dyn Storage, parameters: &Parameters, bat: Extent) -> Result<()> {
    let block_size = u64::from(parameters.block_size);
    let ratio = parameters.chunk_ratio();
    let mut bytes = Vec::with_capacity(MIB as usize);
    let mut at = bat.offset;
    for block in 0..parameters.blocks() {
        if block > 0 && block % ratio == 0 {
            // The chunk's sector bitmap, which is not there.
            bytes.extend([0; 8]);
        }
        let entry = (bat.end() + block * block_size) | 6;
        bytes.extend(entry.to_le_bytes());
        if bytes.len() >= MIB as usize {
            storage.write_at(at, &bytes)?;
            at += bytes.len() as u64;
            bytes.clear();
        }
    }
    Ok(storage.write_at(at, &bytes)?)
}
