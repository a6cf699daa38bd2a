//! Address ranges that overlap, resolved into sorted, disjoint and merged ones.

use core::ops::Range;

/// Resolves ranges in any order, overlapping or not, into pieces that are sorted by address and
/// disjoint. Where several ranges cover an address, the greatest value wins. Neighbours of equal
/// value come out as one piece. Empty ranges count for nothing.
///
/// Needs no memory and time quadratic in the number of ranges, of which a firmware has a few hundred.
pub fn resolve<I, V>(ranges: I) -> impl Iterator<Item = (Range<u64>, V)> + Clone
where
    I: Iterator<Item = (Range<u64>, V)> + Clone,
    V: Ord + Copy,
{
    let ranges = ranges.filter(|(range, _)| !range.is_empty());
    let mut position = 0;
    core::iter::from_fn(move || {
        let start = ranges
            .clone()
            .filter(|(range, _)| range.end > position)
            .map(|(range, _)| range.start.max(position))
            .min()?;
        let value = value_at(ranges.clone(), start)?;
        let mut end = start;
        // The value can only change where some range begins or ends.
        while value_at(ranges.clone(), end) == Some(value) {
            end = ranges
                .clone()
                .flat_map(|(range, _)| [range.start, range.end])
                .filter(|&edge| edge > end)
                .min()?;
        }
        position = end;
        Some((start..end, value))
    })
}

/// The greatest value among the ranges that cover `address`.
fn value_at<V: Ord>(ranges: impl Iterator<Item = (Range<u64>, V)>, address: u64) -> Option<V> {
    ranges
        .filter(|(range, _)| range.contains(&address))
        .map(|(_, value)| value)
        .max()
}

/// Whether two ranges have an address in common.
pub fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn resolved(ranges: &[(Range<u64>, u8)]) -> Vec<(Range<u64>, u8)> {
        resolve(ranges.iter().cloned()).collect()
    }

    #[test]
    fn the_greater_value_cuts_the_lesser() {
        assert_eq!(
            resolved(&[(20..30, 2), (0..100, 1)]),
            [(0..20, 1), (20..30, 2), (30..100, 1)]
        );
    }

    #[test]
    fn neighbours_of_equal_value_merge_and_gaps_stay() {
        assert_eq!(
            resolved(&[(10..20, 1), (0..10, 1), (30..40, 1)]),
            [(0..20, 1), (30..40, 1)]
        );
    }

    #[test]
    fn the_last_address_is_an_edge_like_any_other() {
        assert_eq!(resolved(&[(5..u64::MAX, 1)]), [(5..u64::MAX, 1)]);
        assert_eq!(resolved(&[(7..7, 1)]), []);
    }

    proptest! {
        #[test]
        fn every_address_keeps_its_greatest_value(
            input in prop::collection::vec((0_u64..64, 0_u64..16, 0_u8..4), 0..12)
        ) {
            let ranges: Vec<_> = input.iter().map(|&(start, len, value)| (start..start + len, value)).collect();
            let pieces = resolved(&ranges);
            for pair in pieces.windows(2) {
                prop_assert!(pair[0].0.end <= pair[1].0.start);
                prop_assert!(pair[0].0.end < pair[1].0.start || pair[0].1 != pair[1].1);
            }
            for address in 0..96 {
                let expected = ranges.iter().filter(|(r, _)| r.contains(&address)).map(|(_, v)| *v).max();
                let actual: Vec<_> = pieces.iter().filter(|(r, _)| r.contains(&address)).map(|(_, v)| *v).collect();
                prop_assert_eq!(actual, expected.into_iter().collect::<Vec<_>>());
            }
        }
    }
}
