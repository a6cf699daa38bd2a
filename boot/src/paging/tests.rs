//! Tables built on the host and read back the way the processor does.

use super::*;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

const BASE: u64 = 0x1234_5000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What the processor finds for an address: the physical address, the flags and the page's size.
fn translate(tables: &[PageTable], virt: u64) -> Option<(u64, PageTableFlags, u64)> {
    let mut table = 0;
    let mut level = Level::Root;
    loop {
        let entry = &tables[table][level.index(virt)];
        let flags = entry.flags();
        if !flags.contains(PageTableFlags::PRESENT) {
            return None;
        }
        if level == Level::Page || flags.contains(PageTableFlags::HUGE_PAGE) {
            let phys = entry.addr().as_u64() + virt % level.size();
            return Some((phys, flags, level.size()));
        }
        table = ((entry.addr().as_u64() - BASE) / PAGE_SIZE) as usize;
        level = level.below();
    }
}

fn memory(virt: u64, phys: u64, len: u64) -> Mapping {
    Mapping {
        virt,
        phys,
        len,
        rights: Rights::Write,
        caching: Caching::Memory,
    }
}

fn build(mappings: &[Mapping], giant_pages: bool) -> Result<Vec<PageTable>, MapError> {
    let count = tables_needed(mappings.iter().copied(), giant_pages) as usize;
    let mut storage = vec![PageTable::new(); count];
    let mut tables = PageTables::new(&mut storage, PhysAddr::new(BASE), giant_pages);
    assert_eq!(tables.root().as_u64(), BASE);
    for mapping in mappings {
        tables.map(*mapping)?;
    }
    Ok(storage)
}

#[test]
fn rights_are_exact() {
    let page = |number: u64, rights, caching| Mapping {
        rights,
        caching,
        ..memory(
            0xFFFF_FFFF_8000_0000 + number * PAGE_SIZE,
            number * PAGE_SIZE,
            PAGE_SIZE,
        )
    };
    let tables = build(
        &[
            page(1, Rights::Read, Caching::Memory),
            page(2, Rights::Write, Caching::Memory),
            page(3, Rights::Execute, Caching::Memory),
            page(4, Rights::Write, Caching::Device),
        ],
        true,
    )
    .unwrap();
    let flags = |number: u64| {
        translate(&tables, 0xFFFF_FFFF_8000_0000 + number * PAGE_SIZE).map(|(_, flags, _)| flags)
    };
    let present = PageTableFlags::PRESENT;
    let (write, no_execute) = (PageTableFlags::WRITABLE, PageTableFlags::NO_EXECUTE);
    assert_eq!(flags(0), None);
    assert_eq!(flags(1), Some(present | no_execute));
    assert_eq!(flags(2), Some(present | no_execute | write));
    assert_eq!(flags(3), Some(present));
    assert_eq!(
        flags(4),
        Some(present | no_execute | write | PageTableFlags::NO_CACHE)
    );
    assert_eq!(flags(5), None);
}

#[test]
fn the_largest_page_that_fits_is_taken() {
    let mapping = memory(0xFFFF_8000_0000_0000 + MIB, MIB, 3 * GIB);
    let sizes = |giant_pages| {
        let tables = build(&[mapping], giant_pages).unwrap();
        [MIB, 2 * MIB, GIB, 3 * GIB, 3 * GIB + MIB - PAGE_SIZE].map(|offset| {
            translate(&tables, 0xFFFF_8000_0000_0000 + offset)
                .unwrap()
                .2
        })
    };
    assert_eq!(sizes(true), [PAGE_SIZE, 2 * MIB, GIB, PAGE_SIZE, PAGE_SIZE]);
    assert_eq!(
        sizes(false),
        [PAGE_SIZE, 2 * MIB, 2 * MIB, PAGE_SIZE, PAGE_SIZE]
    );
}

#[test]
fn an_address_is_mapped_once() {
    let at = 0xFFFF_8000_0000_0000;
    let twice = [memory(at, 0, GIB), memory(at + MIB, 0, PAGE_SIZE)];
    assert!(matches!(build(&twice, true), Err(MapError::Occupied(_))));
    let under = [memory(at + MIB, 0, PAGE_SIZE), memory(at, 0, GIB)];
    assert!(matches!(build(&under, true), Err(MapError::Occupied(_))));
}

#[test]
fn impossible_addresses_are_refused() {
    for mapping in [
        memory(0x800, 0, PAGE_SIZE),
        memory(0, 0x800, PAGE_SIZE),
        memory(0, 0, 0x800),
        memory(0x7FFF_FFFF_F000, 0, 2 * PAGE_SIZE),
        memory(0x8000_0000_0000, 0, PAGE_SIZE),
        memory(0, 0, !(PAGE_SIZE - 1)),
        memory(u64::MAX - 4095, 0, 2 * PAGE_SIZE),
        memory(0, 1 << 52, PAGE_SIZE),
    ] {
        let mut storage = vec![PageTable::new(); 16];
        let mut tables = PageTables::new(&mut storage, PhysAddr::new(BASE), true);
        assert_eq!(
            tables.map(mapping),
            Err(MapError::Address(mapping.virt)),
            "{mapping:x?}"
        );
    }
}

#[test]
fn the_last_page_of_the_address_space_can_be_mapped() {
    let mapping = memory(u64::MAX - 4095, 0x7000, PAGE_SIZE);
    let tables = build(&[mapping], true).unwrap();
    assert_eq!(translate(&tables, u64::MAX).unwrap().0, 0x7FFF);
}

proptest! {
    /// Every address in a mapping is found, no address beside it is, and the count set aside is enough.
    #[test]
    fn what_is_mapped_is_found(
        virt in 0_u64..1 << 23, phys in 0_u64..1 << 23, align in 0_u32..=18,
        count in 1_u64..8, ragged in 0_u64..1500,
        giant_pages: bool, high: bool, probes in prop::collection::vec(any::<prop::sample::Index>(), 8),
    ) {
        let (virt, phys) = (virt >> align << align, phys >> align << align);
        let pages = (count << align) + ragged;
        let half = if high { 0xFFFF_8000_0000_0000 } else { 0 };
        let mapping = memory(half + virt * PAGE_SIZE, phys * PAGE_SIZE, pages * PAGE_SIZE);
        let tables = build(&[mapping], giant_pages).unwrap();
        let edges = [0, mapping.len - 1].into_iter();
        for offset in edges.chain(probes.iter().map(|probe| probe.index(mapping.len as usize) as u64)) {
            let found = translate(&tables, mapping.virt + offset).map(|(phys, ..)| phys);
            prop_assert_eq!(found, Some(mapping.phys + offset));
        }
        prop_assert_eq!(translate(&tables, mapping.virt + mapping.len), None);
        if mapping.virt != half {
            prop_assert_eq!(translate(&tables, mapping.virt - 1), None);
        }
    }
}
