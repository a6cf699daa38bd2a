//! The guest's memory in this process: anonymous mappings that shared pages own.

use std::io;
use std::ptr::{self, NonNull};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus::shared::SharedPages;

const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Maps `count` pages of zeros that are the guest's pages from `first` on. The host gives a page memory when it is first
/// touched. They are unmapped when the last handle goes.
pub fn map(first: PageNumber, count: usize) -> io::Result<SharedPages> {
    let length = count
        .checked_mul(PAGE_SIZE)
        .filter(|&length| length > 0)
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: a new anonymous mapping at a place of the kernel's choice touches nothing that exists.
    let start = unsafe { libc::mmap(ptr::null_mut(), length, PROTECTION, FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = NonNull::new(start.cast()).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: just mapped with page alignment, readable and writable; nobody else knows it, and only `unmap` ends it.
    Ok(unsafe { SharedPages::from_raw(start, first, count, unmap) })
}

fn unmap(start: NonNull<u8>, _: PageNumber, count: usize) {
    // SAFETY: the values of `map`; no handle is left, so nobody reaches the memory any more.
    unsafe { libc::munmap(start.as_ptr().cast(), count * PAGE_SIZE) };
}

/// Gives the memory behind `count` pages from `index` on back to the host; they read as zeros from now on. Pages
/// outside of the run are refused.
pub fn discard(pages: &SharedPages, index: usize, count: usize) -> io::Result<()> {
    let end = index.checked_add(count);
    if end.is_none_or(|end| end > pages.page_count()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: `index` lies in the run, or is its end.
    let start = unsafe { pages.as_ptr().add(index * PAGE_SIZE) };
    let length = count * PAGE_SIZE;
    // SAFETY: the range lies in our own private anonymous mapping, which stays mapped; its bytes are only
    // accessed as ones that may change at any moment.
    match unsafe { libc::madvise(start.as_ptr().cast(), length, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the pages the guest's memory at their page numbers. The caller keeps a handle to them for as long as the VM exists.
pub fn give_to_guest(vm: &VmFd, slot: u32, pages: &SharedPages) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: pages.first_page().0 * PAGE_SIZE as u64,
        memory_size: pages.len() as u64,
        userspace_addr: pages.as_ptr().addr().get() as u64,
    };
    // SAFETY: the range is one mapping that nobody has Rust references to. The caller keeps it mapped.
    unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
}

/// The same memory as the loaders of rust-vmm take it. `None` when the runs overlap. The view must go before the pages.
pub fn with_loader_view<R>(
    runs: &[SharedPages],
    with: impl FnOnce(&GuestMemoryMmap) -> R,
) -> Option<R> {
    let mut regions = Vec::new();
    for pages in runs {
        let start = pages.as_ptr().as_ptr();
        // SAFETY: the mapping exists as long as `runs`, which the view does not outlive; it does not own the memory.
        let region =
            unsafe { MmapRegion::build_raw(start, pages.len(), PROTECTION, FLAGS) }.ok()?;
        let address = GuestAddress(pages.first_page().0 * PAGE_SIZE as u64);
        regions.push(GuestRegionMmap::new(region, address)?);
    }
    let view = GuestMemoryMmap::from_regions(regions).ok()?;
    Some(with(&view))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_pages_read_as_zeros_and_others_keep_their_bytes() {
        let pages = map(PageNumber(0x100), 3).unwrap();
        for page in 0..3 {
            pages.write(page * PAGE_SIZE, b"content").unwrap();
        }
        discard(&pages, 1, 1).unwrap();
        let read = |page: usize| {
            let mut bytes = [0; 7];
            pages.read(page * PAGE_SIZE, &mut bytes).unwrap();
            bytes
        };
        assert_eq!([&read(0), &read(2)], [b"content"; 2]);
        assert_eq!(read(1), [0; 7]);
    }

    #[test]
    fn pages_outside_of_a_run_are_not_discarded() {
        let pages = map(PageNumber(0), 2).unwrap();
        for (index, count) in [(1, 2), (3, 0), (usize::MAX, 2)] {
            assert!(discard(&pages, index, count).is_err());
        }
        assert!(discard(&pages, 2, 0).is_ok());
    }

    #[test]
    fn no_memory_at_all_cannot_be_mapped() {
        assert!(map(PageNumber(0), 0).is_err());
    }
}
