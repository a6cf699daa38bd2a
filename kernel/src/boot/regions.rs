//! A memory map in the making: any entries in any order in, sorted disjoint regions out.

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};

/// The most regions a map can hold. QEMU gives at most 128 entries, Linux' zero page holds 128.
pub const MAX_REGIONS: usize = 160;

/// The number that `MemoryRegionKind::UnknownBios` carries for ACPI tables, as in an E820 map.
pub const E820_ACPI: u32 = 3;

/// The number that `MemoryRegionKind::UnknownBios` carries for ACPI non-volatile storage.
pub const E820_NVS: u32 = 4;

/// Sorted, disjoint regions. Entries beyond the capacity are dropped and counted.
#[derive(Debug)]
pub struct RegionMap {
    regions: [MemoryRegion; MAX_REGIONS],
    len: usize,
    dropped: usize,
}

impl RegionMap {
    /// A map with nothing in it.
    pub const fn new() -> Self {
        Self {
            // All zeros, so that a static map takes no room in the image's file.
            regions: [MemoryRegion {
                start: 0,
                end: 0,
                kind: MemoryRegionKind::Usable,
            }; MAX_REGIONS],
            len: 0,
            dropped: 0,
        }
    }

    /// The regions, in order.
    pub fn as_slice(&self) -> &[MemoryRegion] {
        &self.regions[..self.len]
    }

    /// The regions, to be handed over.
    pub fn as_mut_slice(&mut self) -> &mut [MemoryRegion] {
        &mut self.regions[..self.len]
    }

    /// How many entries found no room.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// Adds an entry of an E820-like map by its type number.
    ///
    /// Where entries overlap, the one that is not RAM wins.
    pub fn add_e820(&mut self, start: u64, len: u64, kind: u32) {
        let Some(end) = start.checked_add(len) else {
            return;
        };
        match kind {
            1 => self.add_where_free(start, end, MemoryRegionKind::Usable),
            other => self.set(start, end, MemoryRegionKind::UnknownBios(other)),
        }
    }

    /// Makes `start..end` a region of this kind, whatever was there.
    pub fn set(&mut self, start: u64, end: u64, kind: MemoryRegionKind) {
        if start >= end {
            return;
        }
        let mut index = 0;
        while index < self.len {
            let old = self.regions[index];
            if old.end <= start || old.start >= end {
                index += 1;
                continue;
            }
            // Replace the overlapped region by what is left of it on each side.
            self.remove(index);
            if old.start < start {
                self.insert(MemoryRegion { end: start, ..old });
                index += 1;
            }
            if old.end > end {
                self.insert(MemoryRegion { start: end, ..old });
                index += 1;
            }
        }
        self.insert(MemoryRegion { start, end, kind });
    }

    /// Adds those parts of `start..end` that no region covers yet.
    fn add_where_free(&mut self, mut start: u64, end: u64, kind: MemoryRegionKind) {
        while start < end {
            let covering = self
                .as_slice()
                .iter()
                .find(|r| r.start <= start && start < r.end);
            if let Some(region) = covering {
                start = region.end;
                continue;
            }
            let next = self.as_slice().iter().map(|r| r.start).find(|&s| s > start);
            let stop = next.map_or(end, |next| next.min(end));
            self.insert(MemoryRegion {
                start,
                end: stop,
                kind,
            });
            start = stop;
        }
    }

    /// Inserts a region that overlaps none, in order, merged with its neighbours of the same kind.
    fn insert(&mut self, region: MemoryRegion) {
        let at = self.as_slice().partition_point(|r| r.start < region.start);
        if at > 0 && joins(&self.regions[at - 1], &region) {
            self.regions[at - 1].end = region.end;
            if at < self.len && joins(&self.regions[at - 1], &self.regions[at]) {
                self.regions[at - 1].end = self.regions[at].end;
                self.remove(at);
            }
            return;
        }
        if at < self.len && joins(&region, &self.regions[at]) {
            self.regions[at].start = region.start;
            return;
        }
        if self.len == MAX_REGIONS {
            self.dropped += 1;
            return;
        }
        self.regions.copy_within(at..self.len, at + 1);
        self.regions[at] = region;
        self.len += 1;
    }

    fn remove(&mut self, index: usize) {
        self.regions.copy_within(index + 1..self.len, index);
        self.len -= 1;
    }
}

impl Default for RegionMap {
    fn default() -> Self {
        Self::new()
    }
}

fn joins(low: &MemoryRegion, high: &MemoryRegion) -> bool {
    low.end == high.start && low.kind == high.kind
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn kind_at(map: &RegionMap, address: u64) -> Option<MemoryRegionKind> {
        map.as_slice()
            .iter()
            .find(|r| r.start <= address && address < r.end)
            .map(|r| r.kind)
    }

    #[test]
    fn a_reserved_entry_cuts_ram_whatever_the_order() {
        for order in [[0, 1], [1, 0]] {
            let entries = [(0, 100, 1), (40, 20, 2)];
            let mut map = RegionMap::new();
            for i in order {
                let (start, len, kind) = entries[i];
                map.add_e820(start, len, kind);
            }
            assert_eq!(kind_at(&map, 39), Some(MemoryRegionKind::Usable));
            assert_eq!(kind_at(&map, 40), Some(MemoryRegionKind::UnknownBios(2)));
            assert_eq!(kind_at(&map, 60), Some(MemoryRegionKind::Usable));
            assert_eq!(map.as_slice().len(), 3);
        }
    }

    #[test]
    fn an_entry_that_wraps_is_ignored() {
        let mut map = RegionMap::new();
        map.add_e820(u64::MAX - 10, 20, 1);
        assert!(map.as_slice().is_empty());
    }

    #[test]
    fn too_many_entries_are_counted_not_written_past_the_end() {
        let mut map = RegionMap::new();
        for i in 0..(MAX_REGIONS as u64 + 7) {
            map.add_e820(i * 2, 1, 2);
        }
        assert_eq!(map.as_slice().len(), MAX_REGIONS);
        assert_eq!(map.dropped(), 7);
    }

    proptest! {
        #[test]
        fn regions_are_sorted_disjoint_and_right(entries in proptest::collection::vec((0u64..200, 0u64..60, 1u32..4), 0..25)) {
            let mut map = RegionMap::new();
            for &(start, len, kind) in &entries {
                map.add_e820(start, len, kind);
            }
            for pair in map.as_slice().windows(2) {
                prop_assert!(pair[0].end <= pair[1].start);
                prop_assert!(!joins(&pair[0], &pair[1]));
            }
            for address in 0..270 {
                let covering: Vec<u32> = entries.iter()
                    .filter(|(start, len, _)| (*start..start + len).contains(&address))
                    .map(|e| e.2).collect();
                let expected = match covering.iter().rev().find(|&&kind| kind != 1) {
                    Some(&kind) => Some(MemoryRegionKind::UnknownBios(kind)),
                    None if !covering.is_empty() => Some(MemoryRegionKind::Usable),
                    None => None,
                };
                prop_assert_eq!(kind_at(&map, address), expected);
            }
        }
    }
}
