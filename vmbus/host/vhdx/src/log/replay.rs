//! What a log changes, put over the file for reading or into it for good.

use std::collections::BTreeMap;
use std::io;

use super::read;
use crate::error::Result;
use crate::format::SECTOR;
use crate::region::Extent;
use crate::storage::Storage;

/// What one descriptor changes.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// These bytes become zeros.
    Zero(Extent),
    /// A sector gets the content that is in the log.
    Data {
        /// The sector's place in the file.
        offset: u64,
        /// Where in the log its content is.
        log_at: u64,
        /// Its first bytes, which are not there.
        leading: [u8; 8],
        /// Its last bytes, which are not there.
        trailing: [u8; 4],
    },
}

impl Change {
    /// What is changed.
    pub fn extent(&self) -> Extent {
        match *self {
            Self::Zero(extent) => extent,
            Self::Data { offset, .. } => Extent {
                offset,
                length: SECTOR,
            },
        }
    }
}

/// What a whole log changes.
#[derive(Clone, Debug)]
pub struct Replay {
    log: Extent,
    /// The file's least length afterwards.
    length: u64,
    /// The changes by their start; none overlaps another.
    changes: BTreeMap<u64, Change>,
}

impl Replay {
    /// A replay that changes only the length.
    pub fn new(log: Extent, length: u64) -> Self {
        Self {
            log,
            length,
            changes: BTreeMap::new(),
        }
    }

    /// The file's least length afterwards.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Puts a change over those before it.
    pub fn add(&mut self, change: Change) {
        let new = change.extent();
        if new.length == 0 {
            return;
        }
        // Only zeros can reach in from before.
        let before = self.changes.range(..new.offset).next_back();
        if let Some((&start, &Change::Zero(zero))) = before
            && zero.end() > new.offset
        {
            self.zeros(start, new.offset);
            self.zeros(new.end(), zero.end());
        }
        while let Some((&start, &old)) = self.changes.range(new.offset..new.end()).next() {
            self.changes.remove(&start);
            self.zeros(new.end(), old.extent().end());
        }
        self.changes.insert(new.offset, change);
    }

    fn zeros(&mut self, offset: u64, end: u64) {
        if offset < end {
            let length = end - offset;
            let zero = Change::Zero(Extent { offset, length });
            self.changes.insert(offset, zero);
        }
    }

    fn sector(&self, storage: &dyn Storage, change: &Change) -> io::Result<[u8; SECTOR as usize]> {
        let mut sector = [0; SECTOR as usize];
        if let Change::Data {
            log_at,
            leading,
            trailing,
            ..
        } = change
        {
            read(storage, self.log, *log_at, &mut sector)?;
            sector[..8].copy_from_slice(leading);
            sector[SECTOR as usize - 4..].copy_from_slice(trailing);
        }
        Ok(sector)
    }

    /// Makes the changes. They are durable after the next sync.
    pub fn apply(&self, storage: &dyn Storage) -> Result<()> {
        if storage.length()? < self.length {
            storage.set_length(self.length)?;
        }
        for change in self.changes.values() {
            match change {
                Change::Zero(extent) => storage.zero(extent.offset, extent.length)?,
                Change::Data { offset, .. } => {
                    storage.write_at(*offset, &self.sector(storage, change)?)?;
                }
            }
        }
        Ok(())
    }
}

/// A storage as it would be after a replay; read-only.
pub struct Replayed<S> {
    /// The storage, as it is.
    pub storage: S,
    /// What its log changes.
    pub replay: Replay,
}

impl<S: Storage> Storage for Replayed<S> {
    fn length(&self) -> io::Result<u64> {
        Ok(self.storage.length()?.max(self.replay.length))
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        if end > self.length()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let there = self.storage.length()?.clamp(offset, end) - offset;
        let (stored, beyond) = data.split_at_mut(there as usize);
        self.storage.read_at(offset, stored)?;
        beyond.fill(0);
        let changes = &self.replay.changes;
        let before = changes.range(..offset).next_back();
        for (_, change) in before.into_iter().chain(changes.range(offset..end)) {
            let extent = change.extent();
            let (from, to) = (extent.offset.max(offset), extent.end().min(end));
            if from >= to {
                continue;
            }
            let into = &mut data[(from - offset) as usize..(to - offset) as usize];
            match change {
                Change::Zero(_) => into.fill(0),
                Change::Data { .. } => {
                    let sector = self.replay.sector(&self.storage, change)?;
                    let within = (from - extent.offset) as usize..(to - extent.offset) as usize;
                    into.copy_from_slice(&sector[within]);
                }
            }
        }
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn set_length(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync(&self) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemoryStorage;

    #[test]
    fn later_changes_lie_over_earlier_ones() {
        let storage = MemoryStorage::with_content(&[7; 16 * SECTOR as usize]);
        // A log of one sector, the last one, with data for one.
        let log = Extent {
            offset: 15 * SECTOR,
            length: SECTOR,
        };
        let zero = |first, count| {
            Change::Zero(Extent {
                offset: first * SECTOR,
                length: count * SECTOR,
            })
        };
        let data = |sector| Change::Data {
            offset: sector * SECTOR,
            log_at: 0,
            leading: [1; 8],
            trailing: [2; 4],
        };
        let mut replay = Replay::new(log, 17 * SECTOR);
        for change in [
            data(1),
            zero(0, 6),
            data(2),
            data(4),
            zero(3, 2),
            zero(9, 0),
        ] {
            replay.add(change);
        }
        let replayed = Replayed {
            storage: storage.copy(),
            replay: replay.clone(),
        };
        replay.apply(&storage).unwrap();
        let (mut good, mut view) = (vec![1; 17 * SECTOR as usize], vec![2; 17 * SECTOR as usize]);
        storage.read_at(0, &mut good).unwrap();
        replayed.read_at(0, &mut view).unwrap();
        assert!(good == view, "reading over and writing into give the same");
        let firsts: Vec<_> = good
            .chunks(SECTOR as usize)
            .map(|sector| sector[0])
            .collect();
        assert_eq!(firsts, [0, 0, 1, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0]);
        let mut part = [9; 6];
        replayed.read_at(3 * SECTOR - 5, &mut part).unwrap();
        assert_eq!(part, [7, 2, 2, 2, 2, 0]);
    }
}
