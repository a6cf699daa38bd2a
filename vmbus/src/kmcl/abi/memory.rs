//! Memory that drivers lend to the host: pages of the library's, MDLs that describe them, and page numbers.
//!
//! A driver in C gets pages that can be lent from `VmbAllocateSharedPages`. An MDL of such memory names the pages, so
//! the library keeps them for as long as the host may touch them, whatever the driver does meanwhile.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::ffi::c_void;
use core::ops::Range;

use super::arguments::{Argument, Memory, Out};
use super::device;
use super::handles::{BUSY, Published, Slots};
use super::types::{
    MDL, NTSTATUS, PDEVICE_OBJECT, PFN_NUMBER, PVOID, STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_PARAMETER, STATUS_INVALID_PARAMETER_1, STATUS_INVALID_PARAMETER_2,
    STATUS_INVALID_PARAMETER_3, STATUS_INVALID_PARAMETER_4, STATUS_INVALID_PARAMETER_5,
    STATUS_SUCCESS,
};
use crate::kmcl::{ExternalData, GpadlSource, Level, PAGE_SIZE, PageNumber, SharedPages};

/// The place has pages.
const LIVE: u8 = 2;

/// Elements that a chain of MDLs may have: more cannot be in a packet.
const LONGEST_CHAIN: usize = 65535;

static RUNS: Slots<Run> = Slots::new();

/// Pages that a driver has.
#[derive(Default)]
struct Run {
    pages: Published<SharedPages>,
}

/// Where pages are mapped.
pub(super) fn start_of(pages: &SharedPages) -> *mut c_void {
    pages.as_ptr().as_ptr().cast()
}

pub(super) fn allocate_shared_pages(device: PDEVICE_OBJECT, count: u32) -> PVOID {
    let allocate = || {
        let client = device::find(device)?;
        if count == 0 || client.current_level() == Level::Dispatch {
            return None;
        }
        let pages = client.inner().hypervisor.share_pages(count as usize).ok()?;
        let (_, generation, slot) = RUNS.claim(u32::MAX)?;
        let start = start_of(&pages);
        slot.value.pages.replace(Some(pages));
        slot.advance(generation, BUSY, LIVE);
        Some(start)
    };
    allocate().unwrap_or(core::ptr::null_mut())
}

/// The number of the run with these bytes, the run, and where in it they are.
fn find(buffer: usize, length: usize) -> Option<(u32, SharedPages, Range<usize>)> {
    RUNS.all().find_map(|(index, slot)| {
        let pages = slot.value.pages.get()?;
        let offset = buffer.checked_sub(start_of(&pages).addr())?;
        let end = offset.checked_add(length)?;
        (offset < pages.len() && end <= pages.len()).then_some((index, pages, offset..end))
    })
}

/// The pages in which these bytes lie, and where in them.
pub(super) fn find_bytes(buffer: &Memory, length: usize) -> Option<(SharedPages, Range<usize>)> {
    let (_, pages, range) = find(buffer.raw().addr(), length)?;
    Some((pages, range))
}

pub(super) fn free_shared_pages(pages: Memory) {
    let start = pages.raw();
    let freed = RUNS.all().any(|(index, slot)| {
        let (generation, _) = slot.current();
        let is_it = slot
            .value
            .pages
            .get()
            .is_some_and(|pages| start_of(&pages) == start);
        if !is_it || !slot.advance(generation, LIVE, BUSY) {
            return false;
        }
        let old = slot.value.pages.replace(None);
        RUNS.release(index, slot, generation);
        drop(old);
        true
    });
    if !freed && !start.is_null() {
        log::error!("driver bug: pages at {start:p} are given back, which are none");
    }
}

pub(super) fn initialize_mdl(
    mdl: Out<MDL>,
    mdl_size: u32,
    buffer: Memory,
    length: u32,
) -> NTSTATUS {
    if mdl.is_null() {
        return STATUS_INVALID_PARAMETER_1;
    }
    let Some((number, pages, _)) = find(buffer.raw().addr(), 0) else {
        return STATUS_INVALID_PARAMETER_3;
    };
    let Some((_, range)) =
        find_bytes(&buffer, length as usize).filter(|(_, range)| !range.is_empty())
    else {
        return STATUS_INVALID_PARAMETER_4;
    };
    let (first, end) = (range.start / PAGE_SIZE, range.end.div_ceil(PAGE_SIZE));
    let need = size_of::<MDL>() + (end - first) * size_of::<PFN_NUMBER>();
    if (mdl_size as usize) < need {
        return STATUS_INVALID_PARAMETER_2;
    }
    mdl.write(MDL {
        Next: core::ptr::null_mut(),
        StartVa: start_of(&pages).wrapping_byte_add(first * PAGE_SIZE),
        ByteCount: length,
        ByteOffset: (range.start % PAGE_SIZE) as u32,
        // A run of pages that 32 bits of bytes can count.
        PageCount: (end - first) as u32,
        Memory: number + 1,
    });
    let numbers = pages.pages().skip(first).take(end - first);
    numbers_of(&mdl).write_all(numbers.map(|page| page.0));
    STATUS_SUCCESS
}

/// The page numbers behind an MDL.
fn numbers_of(mdl: &Out<MDL>) -> Out<PFN_NUMBER> {
    let behind = mdl.raw().wrapping_add(1).cast::<PFN_NUMBER>();
    // SAFETY: whoever promises an MDL promises its page numbers, which stand right behind it.
    unsafe { behind.into_safe() }
}

/// The next element of a chain.
fn next_of(mdl: MDL) -> Out<MDL> {
    // SAFETY: whoever promises a chain promises all of its elements.
    unsafe { mdl.Next.into_safe() }
}

/// Which part of a chain of MDLs.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    /// From this byte on.
    pub(super) offset: u32,
    /// So many bytes; 0 for all that follow.
    pub(super) length: u32,
    /// Whether the first element may be read up to the end of its last page, and no other is used.
    pub(super) forced: bool,
}

impl Piece {
    pub(super) const ALL: Self = Self {
        offset: 0,
        length: 0,
        forced: false,
    };
}

/// Calls `each` for every element of a chain, with its page numbers and the bytes that it has in its pages.
fn walk(
    chain: &Out<MDL>,
    forced: bool,
    mut each: impl FnMut(&MDL, &Out<PFN_NUMBER>, Range<usize>) -> Result<(), NTSTATUS>,
) -> Result<(), NTSTATUS> {
    let mut element = chain.read().ok_or(STATUS_INVALID_PARAMETER)?;
    let mut numbers = numbers_of(chain);
    for _ in 0..LONGEST_CHAIN {
        let start = element.ByteOffset as usize;
        let mut end = start + element.ByteCount as usize;
        if forced {
            end = end.next_multiple_of(PAGE_SIZE);
        }
        if start >= PAGE_SIZE || end.div_ceil(PAGE_SIZE) > element.PageCount as usize {
            return Err(STATUS_INVALID_PARAMETER);
        }
        each(&element, &numbers, start..end)?;
        let next = next_of(element);
        if forced || next.is_null() {
            return Ok(());
        }
        element = next.read().ok_or(STATUS_INVALID_PARAMETER)?;
        numbers = numbers_of(&next);
    }
    Err(STATUS_INVALID_PARAMETER)
}

/// Adds the ranges of a piece of a chain, each element one range.
pub(super) fn describe_mdl(
    chain: &Out<MDL>,
    piece: &Piece,
    into: &mut ExternalData,
) -> Result<(), NTSTATUS> {
    walk(chain, piece.forced, |mdl, numbers, range| {
        push(into, mdl, numbers, range)
    })?;
    let start = piece.offset as usize;
    let end = match piece.length {
        0 => into.len(),
        length => start.saturating_add(length as usize),
    };
    into.narrow(start..end)
        .map_err(|_| STATUS_INVALID_PARAMETER)
}

/// A piece of a chain as the memory of a GPADL. INVALID_PARAMETER_3: no chain, or no memory of the library's; _4 and _5: offset
/// or length lie outside of it.
pub(super) fn pieces_of_mdl(chain: &Out<MDL>, piece: &Piece) -> Result<GpadlSource, NTSTATUS> {
    let start = piece.offset as usize;
    let end = match piece.length {
        0 => usize::MAX,
        length => start.saturating_add(length as usize),
    };
    let mut pieces = Vec::new();
    let mut before = 0usize;
    walk(chain, false, |mdl, _, range| {
        let length = range.len();
        let from = start.saturating_sub(before).min(length);
        let to = end.saturating_sub(before).min(length);
        before += length;
        if from < to {
            let (pages, offset) = known(mdl, &range).ok_or(STATUS_INVALID_PARAMETER)?;
            let base = offset + range.start;
            pieces.push((pages, base + from..base + to));
        }
        Ok(())
    })
    .map_err(|_| STATUS_INVALID_PARAMETER_3)?;
    if start >= before {
        Err(STATUS_INVALID_PARAMETER_4)
    } else if piece.length != 0 && end > before {
        Err(STATUS_INVALID_PARAMETER_5)
    } else {
        Ok(GpadlSource::Pieces(pieces))
    }
}

/// The library's pages that an MDL names, and where in them its own pages begin.
fn known(mdl: &MDL, range: &Range<usize>) -> Option<(SharedPages, usize)> {
    let number = mdl.Memory.checked_sub(1)?;
    let pages = RUNS.get(number)?.value.pages.get()?;
    let offset = mdl.StartVa.addr().checked_sub(start_of(&pages).addr())?;
    (offset.checked_add(range.end)? <= pages.len()).then_some((pages, offset))
}

/// Adds the bytes `range` of one MDL's pages.
fn push(
    into: &mut ExternalData,
    mdl: &MDL,
    numbers: &Out<PFN_NUMBER>,
    range: Range<usize>,
) -> Result<(), NTSTATUS> {
    let pushed = match known(mdl, &range) {
        Some((pages, offset)) => into.push(pages, offset + range.start..offset + range.end),
        // Pages that the library does not know: the driver keeps them where they are.
        None => {
            let pages = read_numbers(numbers, mdl.PageCount)?;
            into.push_page_list(pages, range, Arc::new(()))
        }
    };
    pushed.map_err(|_| STATUS_INVALID_PARAMETER)
}

/// Whole pages by their numbers.
pub(super) fn describe_pages(
    pages: &Out<PFN_NUMBER>,
    count: u32,
) -> Result<ExternalData, NTSTATUS> {
    if pages.is_null() || count == 0 {
        return Err(STATUS_INVALID_PARAMETER);
    }
    ExternalData::whole_pages(read_numbers(pages, count)?, Arc::new(()))
        .map_err(|_| STATUS_INVALID_PARAMETER)
}

/// A list of page numbers, copied.
pub(super) fn read_numbers(
    numbers: &Out<PFN_NUMBER>,
    count: u32,
) -> Result<Vec<PageNumber>, NTSTATUS> {
    let mut pages = Vec::new();
    pages
        .try_reserve_exact(count as usize)
        .map_err(|_| STATUS_INSUFFICIENT_RESOURCES)?;
    numbers.for_each(count as usize, |number| pages.push(PageNumber(number)));
    Ok(pages)
}
