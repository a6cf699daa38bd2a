//! Page frames: which are free, in a bitmap with a count per block of 2 MiB.
//!
//! One bit per frame tells whether it is free, one counter per block of 512 frames how many are, so that a search
//! skips full blocks and finds whole free ones at once. The memory for both comes from the
//! caller: [`Frames::storage_words`] says how much, 1/32768 of the memory managed.

use core::ops::Range;

/// Frames in a block: 512 frames of 4 KiB are 2 MiB, a large page and the balloon's unit.
pub const BLOCK: u64 = 512;

/// Bitmap words per block.
const WORDS: usize = (BLOCK / 64) as usize;

/// The frames `0..end`, free or not.
///
/// Frame numbers are physical addresses divided by 4096. A new set has nothing free: RAM is added with
/// [`add`](Self::add).
pub struct Frames<'a> {
    /// Bit set = free. `WORDS` words per block.
    free: &'a mut [u64],
    /// Free frames in each block.
    counts: &'a mut [u64],
    total: u64,
    available: u64,
    /// Where the next search begins, in blocks: behind what was taken last.
    hint: usize,
    /// No block from here on is wholly free.
    whole_end: usize,
    /// No block from here on is partly free.
    loose_end: usize,
}

impl<'a> Frames<'a> {
    /// How many 64-bit words of storage the frames `0..end` need.
    pub const fn storage_words(end: u64) -> usize {
        end.div_ceil(BLOCK) as usize * (WORDS + 1)
    }

    /// A set with nothing in it, in `storage` (of at least [`storage_words`](Self::storage_words)
    /// words; more is ignored).
    pub fn new(end: u64, storage: &'a mut [u64]) -> Self {
        let blocks = (end.div_ceil(BLOCK) as usize).min(storage.len() / (WORDS + 1));
        storage.fill(0);
        let (free, rest) = storage.split_at_mut(blocks * WORDS);
        Self {
            free,
            counts: &mut rest[..blocks],
            total: 0,
            available: 0,
            hint: 0,
            whole_end: 0,
            loose_end: 0,
        }
    }

    /// Frames that were ever added.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Frames that are free now.
    pub fn available(&self) -> u64 {
        self.available
    }

    /// Adds frames that are RAM and free. Frames beyond the end are ignored.
    pub fn add(&mut self, range: Range<u64>) {
        let before = self.available;
        self.mark(range, true);
        self.total += self.available - before;
    }

    /// Takes frames out of the set that are in use for good. Frames that are not in it are ignored.
    pub fn remove(&mut self, range: Range<u64>) {
        let before = self.available;
        self.mark(range, false);
        self.total -= before - self.available;
    }

    /// Gives back frames that [`take`](Self::take) or [`take_block`](Self::take_block) gave out.
    ///
    /// Answers `false`, and changes nothing, when one of them is free already.
    #[must_use]
    pub fn give_back(&mut self, range: Range<u64>) -> bool {
        if range.end > self.end() || self.run_has(&range, true) {
            return false;
        }
        self.mark(range, true);
        true
    }

    /// Takes `count` contiguous frames that begin at a multiple of `align` (a power of two).
    pub fn take(&mut self, count: u64, align: u64) -> Option<u64> {
        if count == 0 || count > self.available || !align.is_power_of_two() {
            return None;
        }
        let first = if count == 1 && align == 1 {
            self.find_one()
        } else {
            // Runs keep to the front, single frames wander: large runs stay possible.
            self.find_run(count, align)
        }?;
        self.mark(first..first + count, false);
        Some(first)
    }

    /// Takes a whole block of 512 frames, aligned to its size.
    pub fn take_block(&mut self) -> Option<u64> {
        let block = self.counts[..self.whole_end]
            .iter()
            .rposition(|&count| count == BLOCK);
        self.whole_end = block.unwrap_or(0);
        let first = block? as u64 * BLOCK;
        self.mark(first..first + BLOCK, false);
        Some(first)
    }

    /// Takes one frame of a block that is broken already, if there is one: leaves whole blocks
    /// whole.
    pub fn take_loose(&mut self) -> Option<u64> {
        let block = self.counts[..self.loose_end]
            .iter()
            .rposition(|&count| count > 0 && count < BLOCK);
        self.loose_end = block.map_or(0, |block| block + 1);
        let first = match block {
            Some(block) => self.first_free_in(block)?,
            None => self.find_one()?,
        };
        self.mark(first..first + 1, false);
        Some(first)
    }

    fn end(&self) -> u64 {
        self.counts.len() as u64 * BLOCK
    }

    fn find_one(&mut self) -> Option<u64> {
        let blocks = self.counts.len();
        let block = (self.hint..blocks)
            .chain(0..self.hint)
            .find(|&b| self.counts[b] > 0)?;
        self.hint = block;
        self.first_free_in(block)
    }

    fn first_free_in(&self, block: usize) -> Option<u64> {
        let words = &self.free[block * WORDS..(block + 1) * WORDS];
        let word = words.iter().position(|&word| word != 0)?;
        Some((block * WORDS + word) as u64 * 64 + u64::from(words[word].trailing_zeros()))
    }

    fn find_run(&self, count: u64, align: u64) -> Option<u64> {
        let mut first = 0u64;
        while let Some(last) = first.checked_add(count).filter(|&last| last <= self.end()) {
            match self.last_taken_in(first..last) {
                None => return Some(first),
                // Nothing that covers the taken frame can do: go on behind it, and behind its
                // whole block when nothing in there is free.
                Some(taken) => {
                    let block = taken / BLOCK;
                    let empty = self.counts.get(block as usize) == Some(&0);
                    let next = if empty {
                        (block + 1) * BLOCK
                    } else {
                        taken + 1
                    };
                    first = next.next_multiple_of(align);
                }
            }
        }
        None
    }

    /// The last frame of the range that is not free.
    fn last_taken_in(&self, range: Range<u64>) -> Option<u64> {
        let mut end = range.end;
        while end > range.start {
            let word = ((end - 1) / 64) as usize;
            let start = (word as u64 * 64).max(range.start);
            let taken = !self.free[word] & mask(start..end);
            if taken != 0 {
                return Some(word as u64 * 64 + 63 - u64::from(taken.leading_zeros()));
            }
            end = start;
        }
        None
    }

    /// Whether any frame of the range is in this state.
    fn run_has(&self, range: &Range<u64>, free: bool) -> bool {
        words(range.clone()).any(|(word, bits)| {
            let state = if free {
                self.free[word]
            } else {
                !self.free[word]
            };
            state & bits != 0
        })
    }

    fn mark(&mut self, range: Range<u64>, free: bool) {
        let range = range.start..range.end.min(self.end());
        for (word, bits) in words(range) {
            let old = self.free[word];
            let new = if free { old | bits } else { old & !bits };
            self.free[word] = new;
            let changed = u64::from((old ^ new).count_ones());
            let count = &mut self.counts[word / WORDS];
            if free {
                *count += changed;
                self.available += changed;
            } else {
                *count -= changed;
                self.available -= changed;
            }
            let end = word / WORDS + 1;
            if *count == BLOCK {
                self.whole_end = self.whole_end.max(end);
            } else if *count > 0 {
                self.loose_end = self.loose_end.max(end);
            }
        }
    }
}

/// The bitmap words that a range of frames touches, with the bits of the range in each.
fn words(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let first = range.start / 64;
    let last = if range.is_empty() {
        first
    } else {
        range.end.div_ceil(64)
    };
    (first..last).map(move |word| {
        let start = (word * 64).max(range.start);
        let end = (word * 64 + 64).min(range.end);
        (word as usize, mask(start..end))
    })
}

/// The bits of a range of frames that lies in one word.
fn mask(range: Range<u64>) -> u64 {
    let ones = u64::MAX >> (64 - (range.end - range.start));
    ones << (range.start % 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn storage_is_a_32768th_of_the_memory_and_a_bit() {
        let frames = (4u64 << 30) / 4096;
        let bytes = Frames::storage_words(frames) * 8;
        assert_eq!(bytes, 128 * 1024 + 16 * 1024);
    }

    #[test]
    fn runs_start_where_asked() {
        let mut storage = vec![0; Frames::storage_words(4096)];
        let mut frames = Frames::new(4096, &mut storage);
        frames.add(3..4096);
        assert_eq!(frames.take(10, 8), Some(8));
        assert_eq!(frames.take(512, 512), Some(512));
        assert_eq!(frames.take_block(), Some(4096 - 512));
        assert_eq!(frames.take(4096, 1), None);
        assert!(frames.give_back(512..1024));
        assert!(!frames.give_back(512..1024), "given back twice");
        assert_eq!(frames.take(512, 512), Some(512));
    }

    #[test]
    fn loose_frames_spare_whole_blocks() {
        let mut storage = vec![0; Frames::storage_words(2048)];
        let mut frames = Frames::new(2048, &mut storage);
        frames.add(0..2048);
        assert!(frames.take(1, 1).is_some());
        for _ in 0..511 {
            assert!(frames.take_loose().is_some_and(|frame| frame < 512));
        }
        assert!(frames.take_loose().is_some_and(|frame| frame >= 512));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take { count: u64, align: u64 },
        Block,
        Loose,
        GiveBack(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1u64..700, 0u32..10).prop_map(|(count, align)| Step::Take {
                count,
                align: 1 << align
            }),
            Just(Step::Take { count: 1, align: 1 }),
            Just(Step::Block),
            Just(Step::Loose),
            any::<usize>().prop_map(Step::GiveBack),
        ]
    }

    proptest! {
        #[test]
        fn no_frame_is_given_out_twice(
            holes in proptest::collection::vec((0u64..3000, 1u64..40), 0..10),
            steps in proptest::collection::vec(step(), 1..80),
        ) {
            let mut storage = vec![0; Frames::storage_words(3000)];
            let mut frames = Frames::new(3000, &mut storage);
            let mut model: BTreeSet<u64> = (0..3000).collect();
            for (start, len) in holes {
                model.retain(|f| !(start..start + len).contains(f));
            }
            for &frame in &model {
                frames.add(frame..frame + 1);
            }
            let total = model.len() as u64;
            let mut held: Vec<Range<u64>> = Vec::new();
            for step in steps {
                let (got, count, align) = match step {
                    Step::Take { count, align } => (frames.take(count, align), count, align),
                    Step::Block => (frames.take_block(), BLOCK, BLOCK),
                    Step::Loose => (frames.take_loose(), 1, 1),
                    Step::GiveBack(i) => {
                        if !held.is_empty() {
                            let range = held.swap_remove(i % held.len());
                            model.extend(range.clone());
                            prop_assert!(frames.give_back(range));
                        }
                        (None, 0, 1)
                    }
                };
                if let Some(first) = got {
                    prop_assert_eq!(first % align, 0);
                    for frame in first..first + count {
                        prop_assert!(model.remove(&frame), "frame {} was not free", frame);
                    }
                    held.push(first..first + count);
                } else if count > 0 {
                    let possible = (0..3000u64.saturating_sub(count - 1))
                        .filter(|first| first % align == 0)
                        .any(|first| (first..first + count).all(|f| model.contains(&f)));
                    prop_assert!(!possible, "a run of {} was there", count);
                }
                prop_assert_eq!(frames.available(), model.len() as u64);
                prop_assert_eq!(frames.total(), total);
            }
        }
    }
}
