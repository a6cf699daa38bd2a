//! What a guest did that no guest may do: kept for whoever looks, in bounded memory.

use alloc::vec::Vec;

/// The most sentences that are kept: a hostile guest must not grow the host.
const KEPT: usize = 64;

/// The first things that a guest did wrong, and how many there were in all.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    kept: Vec<&'static str>,
    total: u64,
}

impl Complaints {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self {
            kept: Vec::new(),
            total: 0,
        }
    }

    /// Notes one more.
    pub(crate) fn add(&mut self, what: &'static str) {
        self.total += 1;
        if self.kept.len() < KEPT {
            self.kept.push(what);
        }
    }

    /// The first of them, in order.
    pub(crate) fn first(&self) -> &[&'static str] {
        &self.kept
    }

    /// How many there were.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_kept_and_all_are_counted() {
        let mut complaints = Complaints::new();
        (0..1000).for_each(|_| complaints.add("again"));
        assert_eq!(complaints.first().len(), KEPT);
        assert_eq!(complaints.total(), 1000);
    }
}
