//! The firmware's memory map, read in the two ways that a hand-over needs: which memory the kernel
//! may use, and what the mapping of physical memory has to cover.
//!
//! Source: UEFI specification 2.10, section 7.2 (memory types and attributes).

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use core::ops::Range;
use uefi::mem::memory_map::{MemoryAttribute, MemoryDescriptor, MemoryType};

use crate::image::PAGE_SIZE;
use crate::paging::Caching;
use crate::ranges::resolve;

/// The first 4 GiB are always mapped: the local APIC, the I/O APIC and other devices live there
/// and stand in no memory map.
pub const LOW_MEMORY: Range<u64> = 0..1 << 32;

/// How a piece of memory is called in the kernel's memory map. Later ones win where the firmware
/// (or the loader, with what it has in use) names an address twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Usable,
    Firmware(u32),
    Loader,
}

/// The memory map for the kernel: sorted, disjoint, merged.
///
/// Boot services' memory and the loader's own count as usable, except for `in_use` (physical
/// ranges), for the call comes after boot services have ended and the loader is done with all else.
pub fn regions<'a>(
    descriptors: impl Iterator<Item = &'a MemoryDescriptor> + Clone,
    in_use: &[Range<u64>],
) -> impl Iterator<Item = MemoryRegion> {
    let firmware = descriptors.map(|descriptor| (range(descriptor), kind(descriptor)));
    let loader = in_use.iter().map(|range| (range.clone(), Kind::Loader));
    resolve(firmware.chain(loader)).map(|(range, kind)| MemoryRegion {
        start: range.start,
        end: range.end,
        kind: match kind {
            Kind::Usable => MemoryRegionKind::Usable,
            Kind::Firmware(memory_type) => MemoryRegionKind::UnknownUefi(memory_type),
            Kind::Loader => MemoryRegionKind::Bootloader,
        },
    })
}

/// What the mapping of physical memory covers, sorted and disjoint: the first 4 GiB, all memory of
/// the map wherever it lies, and the framebuffer.
///
/// What the firmware calls capable of write-back caching is memory. All else is taken for a device.
pub fn physical_memory<'a>(
    descriptors: impl Iterator<Item = &'a MemoryDescriptor> + Clone,
    framebuffer: Option<Range<u64>>,
) -> impl Iterator<Item = (Range<u64>, Caching)> + Clone {
    let devices = framebuffer
        .map(|range| {
            let start = range.start & !(PAGE_SIZE - 1);
            start..range.end.saturating_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1)
        })
        .into_iter()
        .chain([LOW_MEMORY])
        .map(|range| (range, Caching::Device));
    let memory = descriptors
        .filter(|descriptor| is_memory(descriptor))
        .map(|descriptor| (range(descriptor), Caching::Memory));
    resolve(devices.chain(memory))
}

/// The physical addresses of a descriptor. A broken one, past the end of the address space, is cut.
fn range(descriptor: &MemoryDescriptor) -> Range<u64> {
    let len = descriptor.page_count.saturating_mul(PAGE_SIZE);
    descriptor.phys_start..descriptor.phys_start.saturating_add(len)
}

fn kind(descriptor: &MemoryDescriptor) -> Kind {
    // Memory set apart for a purpose (attribute SP) or for the firmware's run time (RUNTIME) is
    // not ours to hand out, whatever its type.
    let set_apart = MemoryAttribute::SPECIAL_PURPOSE | MemoryAttribute::RUNTIME;
    let free = matches!(
        descriptor.ty,
        MemoryType::CONVENTIONAL
            | MemoryType::LOADER_CODE
            | MemoryType::LOADER_DATA
            | MemoryType::BOOT_SERVICES_CODE
            | MemoryType::BOOT_SERVICES_DATA
    );
    if free && !descriptor.att.intersects(set_apart) {
        Kind::Usable
    } else {
        Kind::Firmware(descriptor.ty.0)
    }
}

fn is_memory(descriptor: &MemoryDescriptor) -> bool {
    let device = matches!(
        descriptor.ty,
        MemoryType::MMIO | MemoryType::MMIO_PORT_SPACE
    );
    !device && descriptor.att.contains(MemoryAttribute::WRITE_BACK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec;
    use std::vec::Vec;

    fn descriptor(ty: MemoryType, start: u64, pages: u64) -> MemoryDescriptor {
        MemoryDescriptor {
            ty,
            phys_start: start,
            virt_start: 0,
            page_count: pages,
            att: MemoryAttribute::WRITE_BACK,
            ..MemoryDescriptor::default()
        }
    }

    fn region(start: u64, end: u64, kind: MemoryRegionKind) -> MemoryRegion {
        MemoryRegion { start, end, kind }
    }

    #[test]
    fn what_boot_services_leave_is_usable_except_what_is_in_use() {
        let map = [
            descriptor(MemoryType::LOADER_DATA, 0x4000, 4),
            descriptor(MemoryType::CONVENTIONAL, 0x1000, 3),
            descriptor(MemoryType::ACPI_RECLAIM, 0x8000, 1),
            descriptor(MemoryType::BOOT_SERVICES_CODE, 0x9000, 1),
            descriptor(MemoryType::RUNTIME_SERVICES_DATA, 0xA000, 1),
        ];
        let in_use = vec![Range {
            start: 0x5000,
            end: 0x6000,
        }];
        let regions: Vec<_> = regions(map.iter(), &in_use).collect();
        assert_eq!(
            regions,
            [
                region(0x1000, 0x5000, MemoryRegionKind::Usable),
                region(0x5000, 0x6000, MemoryRegionKind::Bootloader),
                region(0x6000, 0x8000, MemoryRegionKind::Usable),
                region(0x8000, 0x9000, MemoryRegionKind::UnknownUefi(9)),
                region(0x9000, 0xA000, MemoryRegionKind::Usable),
                region(0xA000, 0xB000, MemoryRegionKind::UnknownUefi(6)),
            ]
        );
    }

    #[test]
    fn memory_set_apart_is_not_usable() {
        let mut special = descriptor(MemoryType::CONVENTIONAL, 0, 1);
        special.att |= MemoryAttribute::SPECIAL_PURPOSE;
        assert_eq!(
            regions([&special].into_iter(), &[]).collect::<Vec<_>>(),
            [region(0, 0x1000, MemoryRegionKind::UnknownUefi(7))]
        );
    }

    #[test]
    fn a_descriptor_past_the_end_of_the_address_space_is_cut() {
        let broken = descriptor(MemoryType::CONVENTIONAL, 0x1000, u64::MAX);
        let regions: Vec<_> = regions([&broken].into_iter(), &[]).collect();
        assert_eq!(
            regions,
            [region(0x1000, u64::MAX, MemoryRegionKind::Usable)]
        );
    }

    #[test]
    fn the_mapping_covers_low_addresses_high_memory_and_the_framebuffer() {
        let mut device = descriptor(MemoryType::RESERVED, 0x2_0000_0000, 1);
        device.att = MemoryAttribute::UNCACHEABLE;
        let map = [
            descriptor(MemoryType::CONVENTIONAL, 0x10_0000, 0x100),
            descriptor(MemoryType::CONVENTIONAL, 0x1_0000_0000, 0x100),
            device,
        ];
        let pieces: Vec<_> =
            physical_memory(map.iter(), Some(0x3_0000_0800..0x3_0000_1800)).collect();
        assert_eq!(
            pieces,
            vec![
                (0..0x10_0000, Caching::Device),
                (0x10_0000..0x20_0000, Caching::Memory),
                (0x20_0000..0x1_0000_0000, Caching::Device),
                (0x1_0000_0000..0x1_0010_0000, Caching::Memory),
                (0x3_0000_0000..0x3_0000_2000, Caching::Device),
            ]
        );
    }

    proptest! {
        /// The kernel may trust the map: no address is usable that anyone else may still need.
        #[test]
        fn usable_memory_is_nobody_elses(
            input in prop::collection::vec((0_u32..16, 0_u64..64, 1_u64..16), 0..24),
            used in prop::collection::vec((0_u64..64, 1_u64..8), 0..3),
        ) {
            let map: Vec<_> = input.iter()
                .map(|&(ty, start, pages)| descriptor(MemoryType(ty), start * PAGE_SIZE, pages))
                .collect();
            let used: Vec<_> = used.iter()
                .map(|&(start, pages)| start * PAGE_SIZE..(start + pages) * PAGE_SIZE)
                .collect();
            let regions: Vec<_> = regions(map.iter(), &used).collect();
            for pair in regions.windows(2) {
                prop_assert!(pair[0].end <= pair[1].start);
            }
            for page in (0..96 * PAGE_SIZE).step_by(PAGE_SIZE as usize) {
                let named: Vec<_> = map.iter().filter(|d| range(d).contains(&page)).map(kind).collect();
                let in_use = used.iter().any(|range| range.contains(&page));
                let usable = regions.iter()
                    .any(|r| r.kind == MemoryRegionKind::Usable && (r.start..r.end).contains(&page));
                let free = !named.is_empty() && named.iter().all(|&kind| kind == Kind::Usable);
                prop_assert_eq!(usable, free && !in_use);
            }
        }
    }
}
