//! Sets of pages as runs that do not overlap.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// A run of pages: first, count.
pub type Run = (u64, u64);

/// A set of pages. However a guest cuts them up, to add a run costs no search through the others.
#[derive(Debug, Default)]
pub(super) struct Runs {
    runs: BTreeMap<u64, u64>,
    pages: u64,
}

impl Runs {
    pub(super) const fn new() -> Self {
        Self {
            runs: BTreeMap::new(),
            pages: 0,
        }
    }

    /// Pages in the set.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// The runs, by their first page.
    pub(super) fn to_vec(&self) -> Vec<Run> {
        self.runs
            .iter()
            .map(|(first, count)| (*first, *count))
            .collect()
    }

    pub(super) fn clear(&mut self) {
        self.runs.clear();
        self.pages = 0;
    }

    /// Adds a run. Returns `false`, and does nothing, when it is empty, ends beyond all numbers or overlaps another.
    pub(super) fn insert(&mut self, (first, count): Run) -> bool {
        let Some(end) = first.checked_add(count).filter(|end| *end > first) else {
            return false;
        };
        let before = self.runs.range(..end).next_back();
        if before.is_some_and(|(other, length)| other + length > first) {
            return false;
        }
        self.runs.insert(first, count);
        self.pages += count;
        true
    }

    /// Adds a run that may touch others and becomes one with them.
    pub(super) fn join(&mut self, (first, count): Run) -> bool {
        let before = self.runs.range(..first).next_back();
        let before = before.map(|(first, count)| (*first, *count));
        let before = before.filter(|(other, length)| other + length == first);
        let after = first.checked_add(count).and_then(|end| {
            let length = self.runs.get(&end)?;
            Some((end, *length))
        });
        if !self.insert((first, count)) {
            return false;
        }
        let (mut whole, mut pages) = (first, count);
        for (other, length) in before.into_iter().chain(after) {
            self.runs.remove(&other);
            whole = whole.min(other);
            pages += length;
        }
        self.runs.remove(&first);
        self.runs.insert(whole, pages);
        true
    }

    /// Whether all pages of a run are in one run of the set.
    pub(super) fn contain(&self, (first, count): Run) -> bool {
        let run = self.runs.range(..=first).next_back();
        let end = first.checked_add(count);
        run.is_some_and(|(other, length)| end.is_some_and(|end| end <= other + length))
    }

    /// Takes up to `limit` pages of the last run.
    pub(super) fn take_last(&mut self, limit: u64) -> Option<Run> {
        let (first, count) = self.runs.pop_last()?;
        let taken = count.min(limit);
        if taken < count {
            self.runs.insert(first + taken, count - taken);
        }
        self.pages -= taken;
        (taken > 0).then_some((first, taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_overlap_are_not_added() {
        let mut runs = Runs::new();
        assert!(runs.insert((10, 10)));
        for run in [
            (10, 1),
            (5, 6),
            (19, 5),
            (0, 100),
            (12, 3),
            (7, 0),
            (u64::MAX, 2),
        ] {
            assert!(!runs.insert(run), "{run:?}");
        }
        assert!(runs.insert((20, 1)) && runs.insert((9, 1)));
        assert_eq!(runs.pages(), 12);
        assert_eq!(runs.to_vec(), [(9, 1), (10, 10), (20, 1)]);
    }

    #[test]
    fn joined_runs_are_one() {
        let mut runs = Runs::new();
        assert!(runs.join((0, 10)) && runs.join((20, 10)) && runs.join((10, 10)));
        assert_eq!(runs.to_vec(), [(0, 30)]);
        assert_eq!(runs.pages(), 30);
        assert!(runs.contain((5, 25)) && !runs.contain((5, 26)) && !runs.contain((30, 1)));
        assert!(!runs.contain((29, u64::MAX)));
        assert!(!runs.join((29, 5)));
    }

    #[test]
    fn the_last_run_is_taken_in_pieces() {
        let mut runs = Runs::new();
        runs.insert((0, 4));
        runs.insert((10, 4));
        assert_eq!(runs.take_last(3), Some((10, 3)));
        assert_eq!(runs.take_last(3), Some((13, 1)));
        assert_eq!(runs.take_last(9), Some((0, 4)));
        assert_eq!(runs.take_last(9), None);
        assert_eq!(runs.pages(), 0);
    }
}
