//! Writes entries of the log.

use std::io;

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::MIB;
use crate::format::{DataSector, Descriptor, Guid, LogEntryHeader, SECTOR, seal};
use crate::region::Extent;
use crate::storage::Storage;

/// The most sectors of an entry: their descriptors and the header fill one sector. Two such entries fit into a log of 1 MiB, so
/// that a new one never destroys the one before it.
pub const MAX_SECTORS: usize = 126;
const _: () = assert!(2 * (MAX_SECTORS as u64 + 1) * SECTOR <= MIB);

/// The log of one session of writing.
#[derive(Debug)]
pub struct LogWriter {
    log: Extent,
    guid: Guid,
    /// The number of the next entry.
    sequence: u64,
    /// Where it goes.
    at: u64,
}

impl LogWriter {
    /// A log under a new name, empty.
    pub fn new(log: Extent) -> Self {
        Self {
            log,
            guid: Uuid::new_v4().into(),
            sequence: 1,
            at: 0,
        }
    }

    /// The name of the log, for the header.
    pub fn guid(&self) -> Guid {
        self.guid
    }

    /// Writes an entry that gives these sectors of the file this content, and makes all entries before it unnecessary: what they
    /// changed has to be durable in its place. `length` is the file's length, and durable.
    pub fn write(
        &mut self,
        storage: &dyn Storage,
        sectors: &[(u64, Box<[u8; SECTOR as usize]>)],
        length: u64,
    ) -> io::Result<()> {
        debug_assert!(sectors.len() <= MAX_SECTORS);
        let bytes = (1 + sectors.len()) * SECTOR as usize;
        let (high, low) = ((self.sequence >> 32) as u32, self.sequence as u32);
        let header = LogEntryHeader {
            signature: *b"loge",
            checksum: 0.into(),
            length: (bytes as u32).into(),
            tail: (self.at as u32).into(),
            sequence: self.sequence.into(),
            descriptors: (sectors.len() as u32).into(),
            reserved: 0.into(),
            log: self.guid,
            flushed_length: length.into(),
            last_length: length.into(),
        };
        let mut entry = header.as_bytes().to_vec();
        for (offset, content) in sectors {
            let (mut leading, mut trailing) = ([0; 8], [0; 4]);
            leading.copy_from_slice(&content[..8]);
            trailing.copy_from_slice(&content[SECTOR as usize - 4..]);
            let descriptor = Descriptor {
                signature: *b"desc",
                trailing,
                leading,
                offset: (*offset).into(),
                sequence: self.sequence.into(),
            };
            entry.extend_from_slice(descriptor.as_bytes());
        }
        entry.resize(SECTOR as usize, 0);
        for (_, content) in sectors {
            let mut data = [0; 4084];
            data.copy_from_slice(&content[8..SECTOR as usize - 4]);
            let sector = DataSector {
                signature: *b"data",
                sequence_high: high.into(),
                data,
                sequence_low: low.into(),
            };
            entry.extend_from_slice(sector.as_bytes());
        }
        seal(&mut entry);
        // Round the end of the log in two writes.
        let before_end = (self.log.length - self.at).min(entry.len() as u64) as usize;
        let (first, second) = entry.split_at(before_end);
        storage.write_at(self.log.offset + self.at, first)?;
        if !second.is_empty() {
            storage.write_at(self.log.offset, second)?;
        }
        self.at = (self.at + entry.len() as u64) % self.log.length;
        self.sequence += 1;
        Ok(())
    }
}
