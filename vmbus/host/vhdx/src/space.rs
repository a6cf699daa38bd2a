//! Which parts of the file are in use, and where a new block goes.

use crate::MIB;
use crate::error::{Error, Result};
use crate::{MAX_FILE, region::Extent};

/// The file's space, in units of 1 MiB.
#[derive(Debug)]
pub struct Space {
    /// A bit for each MiB, set when it is in use.
    used: Vec<u64>,
    /// Where a new block goes when no room is left before: the end of the file.
    end: u64,
    /// Up to here no free room of a block's size is left, except for `free`.
    searched: u64,
    /// Places of blocks that were given back.
    free: Vec<u64>,
    /// MiB of a block.
    block: u64,
}

/// A place for a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Beyond the end of the file: zeros once the file is that long.
    New(u64),
    /// Within the file; anything may be there.
    Used(u64),
}

impl Space {
    /// The space of a file of this length, for blocks of this size; the first MiB, with the headers, is in use.
    pub fn new(length: u64, block_size: u32) -> Self {
        let block = u64::from(block_size) / MIB;
        let end = length.div_ceil(MIB);
        // A last block may go beyond the end of the file.
        let words = usize::try_from((end + block).div_ceil(64)).unwrap_or(0);
        let mut space = Self {
            used: vec![0; words],
            end: end.max(1),
            searched: 1,
            free: Vec::new(),
            block,
        };
        space.set(0);
        space
    }

    fn is_used(&self, mib: u64) -> bool {
        let word = usize::try_from(mib / 64)
            .ok()
            .and_then(|word| self.used.get(word));
        word.is_some_and(|word| word >> (mib % 64) & 1 != 0)
    }

    fn set(&mut self, mib: u64) {
        let word = usize::try_from(mib / 64).ok();
        if let Some(word) = word.and_then(|word| self.used.get_mut(word)) {
            *word |= 1 << (mib % 64);
        }
    }

    /// Takes an extent of the file into use. Whether all of it was free.
    pub fn take(&mut self, extent: Extent) -> bool {
        let units = extent.offset / MIB..extent.end().div_ceil(MIB);
        let was_free = !units.clone().any(|mib| self.is_used(mib));
        if was_free {
            self.end = self.end.max(units.end);
            units.for_each(|mib| self.set(mib));
        }
        was_free
    }

    /// A place for a block.
    pub fn allocate(&mut self) -> Result<Place> {
        if let Some(offset) = self.free.pop() {
            return Ok(Place::Used(offset));
        }
        // Each MiB is looked at once in a disk's life.
        let mut run = 0;
        while self.searched < self.end {
            run = if self.is_used(self.searched) {
                0
            } else {
                run + 1
            };
            self.searched += 1;
            if run == self.block {
                return Ok(Place::Used((self.searched - run) * MIB));
            }
        }
        let offset = self.end * MIB;
        let end = self.end + self.block;
        if end * MIB > MAX_FILE {
            return Err(Error::Unsupported("the file would be too long".into()));
        }
        (self.end, self.searched) = (end, end);
        Ok(Place::New(offset))
    }

    /// Gives back a block's place.
    pub fn release(&mut self, offset: u64) {
        self.free.push(offset);
    }

    /// Where the last place ends, in bytes.
    pub fn end(&self) -> u64 {
        self.end * MIB
    }

    /// Bytes within the file that nothing uses.
    pub fn unused(&self) -> u64 {
        let used: u64 = self
            .used
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        self.end.saturating_sub(used) * MIB
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_within_the_file_comes_first_and_each_place_is_given_once() {
        let mut space = Space::new(10 * MIB, 2 << 20);
        let taken = |offset, length| Extent {
            offset: offset * MIB,
            length: length * MIB,
        };
        assert!(space.take(taken(3, 2)));
        assert!(!space.take(taken(4, 2)), "4 is in use");
        assert!(space.take(taken(8, 1)));
        for expected in [
            Place::Used(MIB),
            Place::Used(5 * MIB),
            Place::New(10 * MIB),
            Place::New(12 * MIB),
        ] {
            assert_eq!(space.allocate().unwrap(), expected);
        }
        space.release(5 * MIB);
        assert_eq!(space.allocate().unwrap(), Place::Used(5 * MIB));
        assert_eq!(space.allocate().unwrap(), Place::New(14 * MIB));
    }
}
