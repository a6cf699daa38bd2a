//! The heap: linked_list_allocator over an area that grows by whole pages when it is full.

use core::alloc::Layout;

use super::{FRAME_SIZE, manager};
use crate::arch::heap as area;
use crate::arch::paging::HEAP;

/// Bytes mapped at first.
const INITIAL: u64 = 64 * 1024;

/// The least that it grows by.
const STEP: u64 = 64 * 1024;

/// Maps the first part. `None` when there is not enough memory.
pub fn init() -> Option<()> {
    manager::map_heap(HEAP..HEAP + INITIAL)?;
    area::init(INITIAL as usize);
    Some(())
}

/// Maps more, enough for `layout`, behind the heap that ends at `end`. The answer is by how many bytes it grew.
pub(crate) fn grow(end: u64, layout: Layout) -> Option<usize> {
    let need = (layout.size() as u64)
        .checked_add(layout.align() as u64)?
        .checked_add(FRAME_SIZE)?;
    let bytes = need.max(STEP).checked_next_multiple_of(FRAME_SIZE)?;
    // Never take the last frames: page tables and rings need some too.
    if bytes / FRAME_SIZE + 16 > manager::figures().free {
        return None;
    }
    manager::map_heap(end..end.checked_add(bytes)?)?;
    Some(bytes as usize)
}
