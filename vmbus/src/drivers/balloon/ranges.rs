//! The pages that the host has: runs, sorted and merged, in bounded memory.

use alloc::vec::Vec;
use core::fmt;

/// A run of pages of 4096 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageRange {
    /// The number of the first page.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

impl PageRange {
    /// The page behind the last one; `None` beyond the end of numbers.
    pub fn end(&self) -> Option<u64> {
        self.first.checked_add(self.count)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages at page {:#x}", self.count, self.first)
    }
}

/// The most runs that are kept: some 64 KiB of heap, however memory is cut up.
pub const MAX_RUNS: usize = 4096;

/// Why a range was not taken in or out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RangeError {
    /// The range is empty or ends beyond the end of numbers.
    Impossible,
    /// Some of the pages are in the set already.
    Overlap,
    /// Some of the pages are not in the set.
    NotHeld,
    /// There would be too many runs, or the heap has no room for one more.
    Full,
}

impl fmt::Display for RangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Impossible => "there are no such pages",
            Self::Overlap => "some of them are held already",
            Self::NotHeld => "some of them were never given",
            Self::Full => "they would be too scattered to keep track of",
        })
    }
}

/// A set of pages as sorted runs that do not touch.
#[derive(Debug, Default)]
pub struct RangeSet {
    runs: Vec<PageRange>,
    pages: u64,
}

impl RangeSet {
    /// No pages.
    pub const fn new() -> Self {
        Self {
            runs: Vec::new(),
            pages: 0,
        }
    }

    /// Pages in the set.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The runs, in order.
    pub fn runs(&self) -> &[PageRange] {
        &self.runs
    }

    /// Adds pages, none of which may be in the set.
    pub fn insert(&mut self, range: PageRange) -> Result<(), RangeError> {
        let end = self.check(range)?;
        // The first run that ends behind the start of the range.
        let at = self
            .runs
            .partition_point(|run| run.first + run.count <= range.first);
        let next = self.runs.get(at).copied();
        if next.is_some_and(|next| next.first < end) {
            return Err(RangeError::Overlap);
        }
        let before = at.checked_sub(1).and_then(|at| self.runs.get(at)).copied();
        let joins_before = before.is_some_and(|before| before.first + before.count == range.first);
        let joins_next = next.is_some_and(|next| next.first == end);
        match (joins_before, joins_next) {
            (true, true) => {
                let next = self.runs.remove(at);
                self.grow(at - 1, range.count + next.count);
            }
            (true, false) => self.grow(at - 1, range.count),
            (false, true) => {
                if let Some(next) = self.runs.get_mut(at) {
                    next.first = range.first;
                    next.count += range.count;
                }
            }
            (false, false) => {
                // One place is left for a removal that cuts a run in two.
                if self.runs.len() + 1 >= MAX_RUNS || self.runs.try_reserve(2).is_err() {
                    return Err(RangeError::Full);
                }
                self.runs.insert(at, range);
            }
        }
        self.pages += range.count;
        Ok(())
    }

    /// Takes pages out, all of which must be in the set.
    pub fn remove(&mut self, range: PageRange) -> Result<(), RangeError> {
        let end = self.check(range)?;
        let at = self
            .runs
            .partition_point(|run| run.first + run.count <= range.first);
        let Some(run) = self.runs.get(at).copied() else {
            return Err(RangeError::NotHeld);
        };
        let run_end = run.first + run.count;
        // Runs never touch, so pages in one piece lie in one run.
        if range.first < run.first || end > run_end {
            return Err(RangeError::NotHeld);
        }
        let left = PageRange {
            first: run.first,
            count: range.first - run.first,
        };
        let right = PageRange {
            first: end,
            count: run_end - end,
        };
        match (left.count, right.count) {
            (0, 0) => {
                self.runs.remove(at);
            }
            (0, _) => self.runs[at] = right,
            (_, 0) => self.runs[at] = left,
            (_, _) => {
                if self.runs.len() >= MAX_RUNS || self.runs.try_reserve(1).is_err() {
                    return Err(RangeError::Full);
                }
                self.runs[at] = left;
                self.runs.insert(at + 1, right);
            }
        }
        self.pages -= range.count;
        Ok(())
    }

    fn check(&self, range: PageRange) -> Result<u64, RangeError> {
        match range.end() {
            Some(end) if range.count > 0 => Ok(end),
            _ => Err(RangeError::Impossible),
        }
    }

    fn grow(&mut self, at: usize, pages: u64) {
        if let Some(run) = self.runs.get_mut(at) {
            run.count += pages;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange { first, count }
    }

    #[test]
    fn a_set_cut_into_single_pages_stays_within_its_memory() {
        let mut set = RangeSet::new();
        let mut taken = 0;
        while set.insert(range(taken * 2, 1)).is_ok() {
            taken += 1;
        }
        assert_eq!(taken as usize, MAX_RUNS - 1);
        assert!(set.runs.capacity() <= 2 * MAX_RUNS);
        assert_eq!(set.insert(range(1 << 30, 1)), Err(RangeError::Full));
        set.insert(range(1, 1))
            .expect("what joins two runs makes room");
        set.insert(range(1 << 30, 3)).unwrap();
        set.remove(range((1 << 30) + 1, 1))
            .expect("a removal that cuts a run has its place");
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let mut set = RangeSet::new();
        for bad in [range(0, 0), range(u64::MAX, 2), range(1, u64::MAX)] {
            assert_eq!(set.insert(bad), Err(RangeError::Impossible));
            assert_eq!(set.remove(bad), Err(RangeError::Impossible));
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_pages(
            steps in proptest::collection::vec((any::<bool>(), 0u64..100, 1u64..20), 0..300),
        ) {
            let mut set = RangeSet::new();
            let mut model = BTreeSet::new();
            for (add, first, count) in steps {
                let pages = first..first + count;
                if add {
                    let free = pages.clone().all(|page| !model.contains(&page));
                    prop_assert_eq!(set.insert(range(first, count)).is_ok(), free);
                    if free {
                        model.extend(pages);
                    }
                } else {
                    let held = pages.clone().all(|page| model.contains(&page));
                    prop_assert_eq!(set.remove(range(first, count)).is_ok(), held);
                    if held {
                        model.retain(|page| !pages.contains(page));
                    }
                }
                prop_assert_eq!(set.pages(), model.len() as u64);
                let listed: BTreeSet<u64> = set
                    .runs()
                    .iter()
                    .flat_map(|run| run.first..run.first + run.count)
                    .collect();
                prop_assert_eq!(&listed, &model);
                for pair in set.runs().windows(2) {
                    prop_assert!(pair[0].first + pair[0].count < pair[1].first);
                }
            }
        }
    }
}
