//! The global allocator over the heap's addresses.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;

use super::paging::HEAP;
use crate::memory::heap;
use crate::sync::Lock;

struct Allocator(Lock<Heap>);

#[global_allocator]
static ALLOCATOR: Allocator = Allocator(Lock::new(Heap::empty()));

/// Bytes in use and bytes mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Usage {
    /// Allocated.
    pub used: usize,
    /// Mapped.
    pub size: usize,
}

/// How much of the heap is in use.
pub fn usage() -> Usage {
    let heap = ALLOCATOR.0.lock();
    Usage {
        used: heap.used(),
        size: heap.size(),
    }
}

/// Begins the heap with this many bytes, which the caller has mapped.
pub(crate) fn init(bytes: usize) {
    // SAFETY: the area is mapped and used for nothing else; called once.
    unsafe {
        ALLOCATOR
            .0
            .lock()
            .init(ptr::with_exposed_provenance_mut(HEAP as usize), bytes);
    };
}

// SAFETY: linked_list_allocator's heap, under a lock.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut allocator = self.0.lock();
        if let Ok(memory) = allocator.allocate_first_fit(layout) {
            return memory.as_ptr();
        }
        if allocator.size() == 0 {
            return ptr::null_mut();
        }
        let Some(bytes) = heap::grow(allocator.top() as u64, layout) else {
            return ptr::null_mut();
        };
        // SAFETY: `grow` has mapped that much behind the top.
        unsafe { allocator.extend(bytes) };
        allocator
            .allocate_first_fit(layout)
            .map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if let Some(memory) = NonNull::new(memory) {
            // SAFETY: by the caller's promise it came from `alloc` with this layout.
            unsafe { self.0.lock().deallocate(memory, layout) };
        }
    }
}
