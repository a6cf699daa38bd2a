//! The block allocation table: for each block of the disk its state and its place in the file (MS-VHDX 2.5).

use std::collections::{BTreeMap, BTreeSet};

use crate::MIB;
use crate::error::{Error, Part, Result};
use crate::format::SECTOR;
use crate::metadata::Parameters;
use crate::region::Extent;
use crate::space::Space;
use crate::storage::Storage;

/// Entries in a page, which is what goes through the log at once.
const PER_PAGE: u64 = SECTOR / 8;

type Page = Box<[u64; PER_PAGE as usize]>;

/// The state of a block of a disk without a parent (2.5.1.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Never written: reads as zeros.
    NotPresent,
    /// Content is anything; reads as zeros here.
    Undefined,
    /// Zeros.
    Zero,
    /// Given back by UNMAP: reads as zeros here.
    Unmapped,
    /// The content is in the file.
    Present,
}

/// A block's entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The block's state.
    pub state: State,
    /// Its place in the file; 0 for none. A block that is not present may still hold one, which is nobody else's.
    pub offset: u64,
}

impl Entry {
    fn encode(self) -> u64 {
        let state = match self.state {
            State::NotPresent => 0,
            State::Undefined => 1,
            State::Zero => 2,
            State::Unmapped => 3,
            State::Present => 6,
        };
        self.offset | state
    }

    /// The entry of this number; what it says against the format otherwise.
    fn decode(raw: u64) -> Result<Self, &'static str> {
        let state = match raw & 7 {
            0 => State::NotPresent,
            1 => State::Undefined,
            2 => State::Zero,
            3 => State::Unmapped,
            6 => State::Present,
            7 => return Err("is partly in a parent, and the disk has none"),
            _ => return Err("has a state that is reserved"),
        };
        Ok(Self {
            state,
            offset: raw & !(MIB - 1),
        })
    }
}

/// The table. Pages of zeros, where no block is present, are not kept.
#[derive(Debug)]
pub struct Bat {
    region: Extent,
    parameters: Parameters,
    pages: BTreeMap<u64, Page>,
    /// Pages that differ from what is in the file or its log.
    dirty: BTreeSet<u64>,
    /// Number of blocks that are present.
    present: u64,
}

fn damaged(why: String) -> Error {
    Error::damaged(Part::Bat, why)
}

impl Bat {
    /// Reads the table and takes the blocks' places into use.
    ///
    /// # Errors
    /// When an entry cannot be, or two claim the same place.
    pub fn read(
        storage: &dyn Storage,
        region: Extent,
        parameters: Parameters,
        space: &mut Space,
    ) -> Result<Self> {
        let entries = parameters.entries();
        if region.length / 8 < entries {
            let why = format!("its region has no room for {entries} entries");
            return Err(damaged(why));
        }
        let mut bat = Self {
            region,
            parameters,
            pages: BTreeMap::new(),
            dirty: BTreeSet::new(),
            present: 0,
        };
        let length = storage.length()?;
        let mut held = Vec::new();
        let mut bytes = vec![0; 16 * SECTOR as usize];
        let pages = entries.div_ceil(PER_PAGE);
        for first in (0..pages).step_by(16) {
            let count = (pages - first).min(16);
            let bytes = &mut bytes[..(count * SECTOR) as usize];
            storage.read_at(region.offset + first * SECTOR, bytes)?;
            for (number, bytes) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
                if bytes.iter().any(|byte| *byte != 0) {
                    bat.take_page(number, bytes, length, space, &mut held)?;
                }
            }
        }
        // Only when all present blocks are known: a place that is held and in use elsewhere is nobody's.
        for (block, offset) in held {
            let extent = bat.extent(offset);
            if extent.end() > length || !space.take(extent) {
                let state = bat.entry(block).state;
                bat.put(block, Entry { state, offset: 0 });
            }
        }
        Ok(bat)
    }

    fn take_page(
        &mut self,
        number: u64,
        bytes: &[u8],
        length: u64,
        space: &mut Space,
        held: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        let mut page: Page = Box::new([0; PER_PAGE as usize]);
        for (raw, bytes) in page.iter_mut().zip(bytes.as_chunks().0) {
            *raw = u64::from_le_bytes(*bytes);
        }
        for (index, raw) in (number * PER_PAGE..).zip(page.iter_mut()) {
            // Entries of sector bitmaps say nothing without a parent; some programs leave values there.
            let Some(block) = self.block_of(index) else {
                continue;
            };
            let entry =
                Entry::decode(*raw).map_err(|why| damaged(format!("block {block} {why}")))?;
            match entry.state {
                State::Present => {
                    self.present += 1;
                    let start = block * u64::from(self.parameters.block_size);
                    let needed = self.parameters.size.saturating_sub(start);
                    let needed = needed.min(self.parameters.block_size.into());
                    if entry
                        .offset
                        .checked_add(needed)
                        .is_none_or(|end| end > length)
                    {
                        let why = format!("block {block} lies beyond the end of the file");
                        return Err(damaged(why));
                    }
                    if !space.take(self.extent(entry.offset)) {
                        let why = format!("block {block} lies where something else is");
                        return Err(damaged(why));
                    }
                }
                State::NotPresent => *raw = 0,
                _ if entry.offset != 0 => held.push((block, entry.offset)),
                _ => {}
            }
        }
        self.pages.insert(number, page);
        Ok(())
    }

    fn extent(&self, offset: u64) -> Extent {
        Extent {
            offset,
            length: self.parameters.block_size.into(),
        }
    }

    /// Where a block's entry is.
    fn index_of(&self, block: u64) -> u64 {
        block + block / self.parameters.chunk_ratio()
    }

    /// Whose entry this is; none for a sector bitmap's, and behind the last block.
    fn block_of(&self, index: u64) -> Option<u64> {
        let ratio = self.parameters.chunk_ratio();
        let (chunk, within) = (index / (ratio + 1), index % (ratio + 1));
        let block = chunk * ratio + within;
        (within < ratio && block < self.parameters.blocks()).then_some(block)
    }

    /// A block's entry.
    pub fn entry(&self, block: u64) -> Entry {
        let index = self.index_of(block);
        let page = self.pages.get(&(index / PER_PAGE));
        let raw = page.map_or(0, |page| page[(index % PER_PAGE) as usize]);
        // What is kept has been looked at.
        Entry::decode(raw).unwrap_or(Entry {
            state: State::NotPresent,
            offset: 0,
        })
    }

    /// Where the page of a block's entry is in the file, when it has been zeros until now: it may be a hole there.
    pub fn hole(&self, block: u64) -> Option<u64> {
        let number = self.index_of(block) / PER_PAGE;
        let is_kept = self.pages.contains_key(&number);
        (!is_kept).then_some(self.region.offset + number * SECTOR)
    }

    fn put(&mut self, block: u64, entry: Entry) -> u64 {
        let index = self.index_of(block);
        let number = index / PER_PAGE;
        let page = self
            .pages
            .entry(number)
            .or_insert_with(|| Box::new([0; PER_PAGE as usize]));
        page[(index % PER_PAGE) as usize] = entry.encode();
        number
    }

    /// Changes a block's entry.
    pub fn set(&mut self, block: u64, entry: Entry) {
        let was = self.entry(block).state == State::Present;
        self.present += u64::from(entry.state == State::Present);
        self.present -= u64::from(was);
        let page = self.put(block, entry);
        self.dirty.insert(page);
    }

    /// Number of blocks that are present.
    pub fn present(&self) -> u64 {
        self.present
    }

    /// The present blocks among these, with their places.
    pub fn present_among(&self, blocks: std::ops::Range<u64>) -> Vec<(u64, u64)> {
        if blocks.is_empty() {
            return Vec::new();
        }
        let (first, last) = (self.index_of(blocks.start), self.index_of(blocks.end - 1));
        let pages = self.pages.range(first / PER_PAGE..=last / PER_PAGE);
        let indices = pages.flat_map(|(number, _)| number * PER_PAGE..(number + 1) * PER_PAGE);
        indices
            .filter_map(|index| self.block_of(index))
            .filter(|block| blocks.contains(block))
            .map(|block| (block, self.entry(block)))
            .filter(|(_, entry)| entry.state == State::Present)
            .map(|(block, entry)| (block, entry.offset))
            .collect()
    }

    /// Number of pages that have been changed and not been taken by [`take_dirty`](Self::take_dirty).
    pub fn dirty(&self) -> usize {
        self.dirty.len()
    }

    /// The changed pages, with their places in the file; from now on they count as unchanged.
    pub fn take_dirty(&mut self) -> Vec<(u64, Box<[u8; SECTOR as usize]>)> {
        let dirty = std::mem::take(&mut self.dirty);
        let pages = dirty.into_iter().filter_map(|number| {
            let page = self.pages.get(&number)?;
            let mut bytes = Box::new([0; SECTOR as usize]);
            for (bytes, raw) in bytes.as_chunks_mut().0.iter_mut().zip(page.iter()) {
                *bytes = raw.to_le_bytes();
            }
            Some((self.region.offset + number * SECTOR, bytes))
        });
        pages.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_number_and_the_others_are_refused() {
        let states = [
            (0, State::NotPresent),
            (1, State::Undefined),
            (2, State::Zero),
            (3, State::Unmapped),
            (6, State::Present),
        ];
        for (number, state) in states {
            let raw = (7 * MIB) | number;
            let entry = Entry {
                state,
                offset: 7 * MIB,
            };
            assert_eq!(Entry::decode(raw), Ok(entry));
            assert_eq!(entry.encode(), raw);
        }
        for number in [4, 5, 7] {
            assert!(Entry::decode(number).is_err(), "{number}");
        }
    }
}
