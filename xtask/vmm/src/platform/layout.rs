//! Where things lie in guest physical address space, as in a Generation 2 VM (spec boot.md A4, A6).

use std::ops::Range;

use crate::Error;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The low MMIO gap: 128 MiB below 4 GiB.
pub const LOW_GAP: Range<u64> = 0xF800_0000..0x1_0000_0000;

/// What of the low gap is for devices of the VMBus: what lies below the I/O APIC.
pub const LOW_MMIO: Range<u64> = 0xF800_0000..0xFEC0_0000;

/// The I/O APIC's registers.
pub const IO_APIC: u64 = 0xFEC0_0000;

/// The local APIC's registers.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;

/// Where the usable memory below the legacy hole ends.
pub const LOW_RAM_END: u64 = 0xA_0000;

/// What is reserved for firmware below 1 MiB. The ACPI tables are in it.
pub const FIRMWARE: Range<u64> = 0xC_0000..0x10_0000;

/// Where the ACPI tables begin, the root pointer first: where guests that are told nothing look for it.
pub const ACPI: Range<u64> = 0xE_0000..0x10_0000;

/// Where memory that is not the loader's begins.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// The usual place of the high MMIO gap.
const HIGH_MMIO_START: u64 = 0xF_E000_0000;

/// Its size.
const HIGH_MMIO_SIZE: u64 = 512 * MIB;

/// Memory is hot-added in blocks of this size: what Linux and Windows take.
const HOT_ADD_BLOCK: u64 = 128 * MIB;

/// The least memory that a VM can have.
pub const MIN_MEMORY_MIB: u64 = 16;

/// The most memory that a VM can have, hot-added memory included: what the MTRRs have ranges for.
pub const MAX_MEMORY_MIB: u64 = 128 * 1024;

/// Address ranges of one VM.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Memory below the low gap, from address 0 on.
    pub low: Range<u64>,
    /// Memory above 4 GiB, if there is any.
    pub high: Option<Range<u64>>,
    /// Where memory can be added while the VM runs.
    pub hot_add: Range<u64>,
    /// The high MMIO gap.
    pub high_mmio: Range<u64>,
}

impl Layout {
    /// The layout of a VM with this much memory in MiB, to which as much again as `hot_add_mib` can be added.
    pub fn new(memory_mib: u64, hot_add_mib: u64) -> Result<Self, Error> {
        let total = memory_mib.saturating_add(hot_add_mib);
        if memory_mib < MIN_MEMORY_MIB || total > MAX_MEMORY_MIB {
            return Err(Error::Memory { mib: memory_mib });
        }
        let bytes = memory_mib * MIB;
        let low = 0..bytes.min(LOW_GAP.start);
        let rest = bytes - low.end;
        let high = (rest > 0).then(|| LOW_GAP.end..LOW_GAP.end + rest);
        let end = high.as_ref().map_or(LOW_GAP.end, |high| high.end);
        let hot_add_start = end.next_multiple_of(HOT_ADD_BLOCK);
        let hot_add = hot_add_start..hot_add_start + hot_add_mib * MIB;
        let high_mmio = HIGH_MMIO_START.max(hot_add.end.next_multiple_of(GIB));
        Ok(Self {
            low,
            high,
            hot_add,
            high_mmio: high_mmio..high_mmio + HIGH_MMIO_SIZE,
        })
    }

    /// The ranges that are memory from the start.
    pub fn ram(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        [Some(self.low.clone()), self.high.clone()]
            .into_iter()
            .flatten()
    }

    /// What the guest is told of its memory. The legacy hole is not mentioned.
    pub fn memory_map(&self) -> Vec<MapEntry> {
        let ram = |range| MapEntry {
            range,
            kind: MapKind::Ram,
        };
        let mut map = vec![
            ram(0..LOW_RAM_END),
            MapEntry {
                range: FIRMWARE,
                kind: MapKind::Reserved,
            },
            ram(HIGH_RAM_START..self.low.end),
        ];
        map.extend(self.high.clone().map(ram));
        map
    }
}

/// A range of the memory map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MapEntry {
    /// Addresses.
    pub range: Range<u64>,
    /// What is there.
    pub kind: MapKind,
}

/// What is at a range of the memory map; the numbers are those of E820 and of PVH.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum MapKind {
    /// Memory to use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_fills_the_place_below_the_low_gap_and_goes_on_above_it() {
        let small = Layout::new(256, 0).unwrap();
        assert_eq!((small.low, small.high), (0..256 * MIB, None));
        let large = Layout::new(6144, 0).unwrap();
        assert_eq!(large.low, 0..LOW_GAP.start);
        let high = large.high.unwrap();
        assert_eq!(high.start, 4 * GIB);
        assert_eq!(large.low.end + (high.end - high.start), 6144 * MIB);
        assert_eq!(Layout::new(3968, 0).unwrap().high, None);
    }

    #[test]
    fn the_map_is_in_order_and_has_no_overlaps() {
        for mib in [16, 256, 3967, 3968, 3969, 80_000] {
            let layout = Layout::new(mib, 1024).unwrap();
            let map = layout.memory_map();
            for pair in map.windows(2) {
                assert!(pair[0].range.end <= pair[1].range.start, "{map:?}");
            }
            let last = map.last().unwrap().range.end;
            assert!(last <= layout.hot_add.start);
            assert!(layout.hot_add.end <= layout.high_mmio.start);
            assert!(layout.hot_add.start.is_multiple_of(HOT_ADD_BLOCK));
            let usable: u64 = map
                .iter()
                .filter(|entry| entry.kind == MapKind::Ram)
                .map(|entry| entry.range.end - entry.range.start)
                .sum();
            assert_eq!(usable, mib * MIB - (HIGH_RAM_START - LOW_RAM_END));
        }
    }

    #[test]
    fn too_little_and_too_much_memory_are_refused() {
        for (mib, more) in [
            (15, 0),
            (MAX_MEMORY_MIB + 1, 0),
            (16, MAX_MEMORY_MIB),
            (u64::MAX, 1),
        ] {
            let error = Layout::new(mib, more).unwrap_err();
            assert!(error.to_string().contains("MiB"), "{error}");
        }
    }
}
