//! Finds what in the log has to be replayed (MS-VHDX 2.3.2, 2.3.3).

use std::collections::BTreeMap;
use std::io;

use zerocopy::FromBytes;

use super::read;
use super::replay::{Change, Replay};
use crate::MAX_FILE;
use crate::error::{Error, Part, Result};
use crate::format::{DataSector, Descriptor, Guid, LogEntryHeader, SECTOR};
use crate::header::Headers;
use crate::region::Extent;
use crate::storage::Storage;

/// Each byte of the log may be read this often before the search gives up: entries can claim to hold each other.
const MAX_READS: u64 = 8;

/// An entry of the log that is whole.
#[derive(Clone, Copy, Debug)]
struct Entry {
    at: u64,
    length: u64,
    tail: u64,
    sequence: u64,
    descriptors: u32,
    flushed_length: u64,
    last_length: u64,
}

struct Search<'a> {
    storage: &'a dyn Storage,
    log: Extent,
    guid: Guid,
    /// What has been looked at: entries by place, `None` where there is none.
    seen: BTreeMap<u64, Option<Entry>>,
    /// Bytes that may still be read.
    budget: u64,
    /// Whether anything looked like an entry of this log.
    traces: bool,
}

fn damaged(why: &str) -> Error {
    Error::damaged(Part::Log, why)
}

/// What has to be replayed; `None` when the log is not in use.
///
/// # Errors
/// When the log is in use and damaged.
pub fn search(storage: &dyn Storage, headers: &Headers) -> Result<Option<Replay>> {
    let (offset, length) = headers.log_place();
    let log = Extent { offset, length };
    if headers.log().is_zero() {
        return Ok(None);
    }
    if length == 0 || log.end() > storage.length()? {
        return Err(damaged("it is in use and not within the file"));
    }
    let mut search = Search {
        storage,
        log,
        guid: headers.log(),
        seen: BTreeMap::new(),
        budget: MAX_READS * length,
        traces: false,
    };
    let entries = search.newest_sequence()?;
    let Some(newest) = entries.last() else {
        // A writer that named the log and had no time to write an entry has changed nothing else either.
        return if search.traces {
            Err(damaged("it is in use and no sequence of entries is whole"))
        } else {
            Ok(Some(Replay::new(log, 0)))
        };
    };
    if storage.length()? < newest.flushed_length {
        return Err(damaged(
            "the file is shorter than it was when the log was written",
        ));
    }
    if newest.last_length > MAX_FILE {
        return Err(damaged("the file would become too long"));
    }
    let mut replay = Replay::new(log, newest.last_length);
    for entry in &entries {
        search.collect(entry, &mut replay)?;
    }
    Ok(Some(replay))
}

impl Search<'_> {
    /// The entries of the valid sequence with the highest number.
    fn newest_sequence(&mut self) -> Result<Vec<Entry>> {
        let mut newest: Vec<Entry> = Vec::new();
        let mut from = 0;
        while from < self.log.length {
            let sequence = self.sequence(from)?;
            from += SECTOR;
            let Some(head) = sequence.last() else {
                continue;
            };
            let Some(tail) = sequence.iter().position(|entry| entry.at == head.tail) else {
                continue;
            };
            if newest
                .last()
                .is_none_or(|entry| entry.sequence < head.sequence)
            {
                newest = sequence[tail..].to_vec();
            }
            // Round the end of the log this ends the search.
            from = from.max(sequence.iter().map(|entry| entry.length).sum::<u64>() + from - SECTOR);
        }
        Ok(newest)
    }

    /// The entries from here on that follow one another.
    fn sequence(&mut self, from: u64) -> Result<Vec<Entry>> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut total = 0;
        loop {
            let at = (from + total) % self.log.length;
            let Some(entry) = self.entry(at)? else { break };
            let follows = entries
                .last()
                .is_none_or(|last| last.sequence.checked_add(1) == Some(entry.sequence));
            if !follows || total + entry.length > self.log.length {
                break;
            }
            total += entry.length;
            entries.push(entry);
        }
        Ok(entries)
    }

    /// The entry at this place, if one is there and whole.
    fn entry(&mut self, at: u64) -> Result<Option<Entry>> {
        if let Some(entry) = self.seen.get(&at) {
            return Ok(*entry);
        }
        let entry = self.look(at)?;
        self.seen.insert(at, entry);
        Ok(entry)
    }

    fn look(&mut self, at: u64) -> Result<Option<Entry>> {
        let mut sector = [0; SECTOR as usize];
        read(self.storage, self.log, at, &mut sector)?;
        let Ok((header, _)) = LogEntryHeader::read_from_prefix(&sector) else {
            return Ok(None);
        };
        if header.signature != *b"loge" || header.log != self.guid {
            return Ok(None);
        }
        self.traces = true;
        let entry = Entry {
            at,
            length: header.length.get().into(),
            tail: header.tail.get().into(),
            sequence: header.sequence.get(),
            descriptors: header.descriptors.get(),
            flushed_length: header.flushed_length.get(),
            last_length: header.last_length.get(),
        };
        let sound = (1..=self.log.length / SECTOR).contains(&(entry.length / SECTOR))
            && entry.length.is_multiple_of(SECTOR)
            && entry.tail < self.log.length
            && entry.sequence != 0
            && descriptor_sectors(entry.descriptors) * SECTOR <= entry.length;
        if !sound {
            return Ok(None);
        }
        self.budget = self
            .budget
            .checked_sub(entry.length)
            .ok_or_else(|| damaged("its entries overlap"))?;
        let whole = self.checksum(&entry)? == header.checksum.get()
            && self.descriptors(&entry, &mut |_| Ok(true))?;
        Ok(whole.then_some(entry))
    }

    fn checksum(&self, entry: &Entry) -> io::Result<u32> {
        let mut sum = 0;
        let mut sector = [0; SECTOR as usize];
        for at in (0..entry.length).step_by(SECTOR as usize) {
            read(self.storage, self.log, entry.at + at, &mut sector)?;
            if at == 0 {
                sector[4..8].fill(0);
            }
            sum = crc32c::crc32c_append(sum, &sector);
        }
        Ok(sum)
    }

    /// Calls `each` with what every descriptor of an entry changes. Whether all was as it has to be, and `each` content.
    fn descriptors(
        &self,
        entry: &Entry,
        each: &mut dyn FnMut(Change) -> Result<bool>,
    ) -> Result<bool> {
        let mut data_at = descriptor_sectors(entry.descriptors) * SECTOR;
        let mut sector = [0; SECTOR as usize];
        let mut data = [0; SECTOR as usize];
        // The header takes the place of two descriptors.
        for number in 2..u64::from(entry.descriptors) + 2 {
            const SIZE: u64 = size_of::<Descriptor>() as u64;
            let within = number * SIZE;
            if number == 2 || within.is_multiple_of(SECTOR) {
                let at = within / SECTOR * SECTOR;
                read(self.storage, self.log, entry.at + at, &mut sector)?;
            }
            let bytes = &sector[(within % SECTOR) as usize..];
            let Ok((descriptor, _)) = Descriptor::read_from_prefix(bytes) else {
                return Ok(false);
            };
            if descriptor.sequence.get() != entry.sequence {
                return Ok(false);
            }
            let offset = descriptor.offset.get();
            let change = match &descriptor.signature {
                b"zero" => Change::Zero(Extent {
                    offset,
                    length: u64::from_le_bytes(descriptor.leading),
                }),
                b"desc" => {
                    if data_at + SECTOR > entry.length {
                        return Ok(false);
                    }
                    read(self.storage, self.log, entry.at + data_at, &mut data)?;
                    let Ok(parts) = DataSector::ref_from_bytes(&data) else {
                        return Ok(false);
                    };
                    let (high, low) = (parts.sequence_high.get(), parts.sequence_low.get());
                    let sequence = u64::from(high) << 32 | u64::from(low);
                    if parts.signature != *b"data" || sequence != entry.sequence {
                        return Ok(false);
                    }
                    let log_at = (entry.at + data_at) % self.log.length;
                    data_at += SECTOR;
                    Change::Data {
                        offset,
                        log_at,
                        leading: descriptor.leading,
                        trailing: descriptor.trailing,
                    }
                }
                _ => return Ok(false),
            };
            let extent = change.extent();
            if !extent.offset.is_multiple_of(SECTOR) || !extent.length.is_multiple_of(SECTOR) {
                return Ok(false);
            }
            if !each(change)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Adds what an entry changes to the replay.
    fn collect(&self, entry: &Entry, replay: &mut Replay) -> Result<()> {
        let end = self.storage.length()?.max(replay.length());
        let whole = self.descriptors(entry, &mut |change| {
            let extent = change.extent();
            // Headers and the log itself are never changed through the log.
            let of_log = extent.offset < self.log.end() && self.log.offset < extent.end();
            if extent.offset < crate::format::REGION_TABLES[0] || extent.end() > end || of_log {
                return Err(damaged("it would change what a log cannot change"));
            }
            replay.add(change);
            Ok(true)
        })?;
        if whole {
            Ok(())
        } else {
            Err(damaged("it changed while it was read"))
        }
    }
}

/// Sectors that an entry's header and descriptors take.
fn descriptor_sectors(descriptors: u32) -> u64 {
    let bytes = size_of::<LogEntryHeader>() as u64
        + u64::from(descriptors) * size_of::<Descriptor>() as u64;
    bytes.div_ceil(SECTOR)
}
