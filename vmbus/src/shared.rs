//! Memory that the host reads and writes at the same time as the guest: the only `unsafe` in
//! the stack outside the C table.
//!
//! Nothing hands out a Rust reference to shared bytes, because the host may change them at any moment:
//! bytes are copied in and out by relaxed atomic accesses or by the processor's string instructions, and fields
//! are accessed as atomics. Every access is checked against the length; one that does not fit is
//! refused, not truncated.

#![allow(unsafe_code)]

use alloc::sync::{Arc, Weak};
use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use crate::ids::{PAGE_SIZE, PageNumber};

/// A run of pages shared with the host: contiguous in guest physical memory and in virtual memory.
///
/// Cloning makes a second handle to the same pages. They are given back when the last
/// handle goes.
#[derive(Clone)]
pub struct SharedPages(Arc<Run>);

/// A handle to pages that may have been given back meanwhile.
#[derive(Clone)]
pub struct WeakPages(Weak<Run>);

impl WeakPages {
    /// The pages, if they have not been given back.
    pub fn upgrade(&self) -> Option<SharedPages> {
        self.0.upgrade().map(SharedPages)
    }
}

struct Run {
    start: NonNull<u8>,
    first: PageNumber,
    count: usize,
    owner: Owner,
}

/// Who has the pages in the end.
enum Owner {
    /// This gives them back to whoever they came from.
    Release(fn(start: NonNull<u8>, first: PageNumber, count: usize)),
    /// They are a part of these.
    Slice {
        /// Never read: it keeps the memory.
        _of: SharedPages,
    },
}

// SAFETY: a run is plain memory that no reference points to; all accesses go through
// atomics, so any thread may make them.
unsafe impl Send for Run {}
// SAFETY: as above.
unsafe impl Sync for Run {}

impl Drop for Run {
    fn drop(&mut self) {
        if let Owner::Release(release) = self.owner {
            release(self.start, self.first, self.count);
        }
    }
}

/// An access beyond the end of shared memory, or not aligned to its size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfBounds;

impl fmt::Display for OutOfBounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("access outside shared memory")
    }
}

impl core::error::Error for OutOfBounds {}

impl SharedPages {
    /// Wraps `count` pages at `start`, whose guest physical pages begin at `first`.
    ///
    /// # Safety
    ///
    /// The pages are mapped readable and writable, `start` is page-aligned, no reference to them exists or comes to
    /// exist, and they stay so until `release` is called with the same values.
    pub unsafe fn from_raw(
        start: NonNull<u8>,
        first: PageNumber,
        count: usize,
        release: fn(NonNull<u8>, PageNumber, usize),
    ) -> Self {
        Self(Arc::new(Run {
            start,
            first,
            count,
            owner: Owner::Release(release),
        }))
    }

    /// Pages from the heap that only pretend to lie at `first`: for tests, where guest and host
    /// share one process. `None` when the heap has no room.
    pub fn from_heap(first: PageNumber, count: usize) -> Option<Self> {
        let layout = heap_layout(count)?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc::alloc::alloc_zeroed(layout) })?;
        let release = |start: NonNull<u8>, _: PageNumber, count: usize| {
            if let Some(layout) = heap_layout(count) {
                // SAFETY: allocated above with the same layout.
                unsafe { alloc::alloc::dealloc(start.as_ptr(), layout) };
            }
        };
        // SAFETY: freshly allocated with page alignment; only `release` frees it.
        Some(unsafe { Self::from_raw(start, first, count, release) })
    }

    /// `count` of these pages, from page `index` on, as a run of their own that keeps all of them. `None` when there are
    /// not that many.
    pub fn slice(&self, index: usize, count: usize) -> Option<Self> {
        let end = index.checked_add(count)?;
        if end > self.page_count() {
            return None;
        }
        let start = self.check(index * PAGE_SIZE, count * PAGE_SIZE).ok()?;
        Some(Self(Arc::new(Run {
            start: NonNull::new(start)?,
            first: PageNumber(self.0.first.0.wrapping_add(index as u64)),
            count,
            owner: Owner::Slice { _of: self.clone() },
        })))
    }

    /// Whether these pages are a part of others: nobody can tell by their handles who still uses them.
    pub fn is_slice(&self) -> bool {
        matches!(self.0.owner, Owner::Slice { .. })
    }

    /// Where the first page is mapped: for code that hands the memory to C. Nobody may make a reference to it.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.0.start
    }

    /// The number of pages.
    pub fn page_count(&self) -> usize {
        self.0.count
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.0.count * PAGE_SIZE
    }

    /// Whether there are no pages at all.
    pub fn is_empty(&self) -> bool {
        self.0.count == 0
    }

    /// The first page's number in guest physical memory; the others follow it.
    pub fn first_page(&self) -> PageNumber {
        self.0.first
    }

    /// How many handles to these pages exist, this one included. For checks that nobody gives memory
    /// back too early.
    pub fn handle_count(&self) -> usize {
        Arc::strong_count(&self.0)
    }

    /// A handle that does not keep the pages.
    pub fn downgrade(&self) -> WeakPages {
        WeakPages(Arc::downgrade(&self.0))
    }

    /// The page numbers, in order.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = PageNumber> + Clone + use<> {
        let first = self.0.first.0;
        (0..self.0.count).map(move |i| PageNumber(first.wrapping_add(i as u64)))
    }

    /// Copies `destination.len()` bytes out, from `offset`.
    #[inline]
    pub fn read(&self, offset: usize, destination: &mut [u8]) -> Result<(), OutOfBounds> {
        let source = self.check(offset, destination.len())?;
        // SAFETY: `check` made sure that the bytes lie in the run, whose memory stays
        // mapped as long as `self`; private memory cannot overlap it.
        unsafe { copy_out(source, destination) };
        Ok(())
    }

    /// Copies `source` in, at `offset`.
    #[inline]
    pub fn write(&self, offset: usize, source: &[u8]) -> Result<(), OutOfBounds> {
        let destination = self.check(offset, source.len())?;
        // SAFETY: as in `read`.
        unsafe { copy_in(source, destination) };
        Ok(())
    }

    /// Sets every byte to zero.
    pub fn clear(&self) {
        for offset in (0..self.len()).step_by(8) {
            if let Ok(word) = self.atomic_u64(offset) {
                word.store(0, Ordering::Relaxed);
            }
        }
    }

    /// The 32-bit field at `offset`, which must be a multiple of 4.
    #[inline]
    pub fn atomic_u32(&self, offset: usize) -> Result<&AtomicU32, OutOfBounds> {
        if !offset.is_multiple_of(4) {
            return Err(OutOfBounds);
        }
        let field = self.check(offset, 4)?;
        // SAFETY: in bounds, aligned (runs are page-aligned), alive as long as `self`, and
        // only ever accessed atomically.
        Ok(unsafe { AtomicU32::from_ptr(field.cast()) })
    }

    /// The 64-bit field at `offset`, which must be a multiple of 8.
    #[inline]
    pub fn atomic_u64(&self, offset: usize) -> Result<&AtomicU64, OutOfBounds> {
        if !offset.is_multiple_of(8) {
            return Err(OutOfBounds);
        }
        let field = self.check(offset, 8)?;
        // SAFETY: as in `atomic_u32`.
        Ok(unsafe { AtomicU64::from_ptr(field.cast()) })
    }

    /// A pointer to `len` bytes at `offset`, if the run has them.
    #[inline]
    fn check(&self, offset: usize, len: usize) -> Result<*mut u8, OutOfBounds> {
        let end = offset.checked_add(len).ok_or(OutOfBounds)?;
        if end > self.len() {
            return Err(OutOfBounds);
        }
        // SAFETY: `offset` is at most the length of the run, so the result stays in it or
        // one past its end.
        Ok(unsafe { self.0.start.as_ptr().add(offset) })
    }
}

impl fmt::Debug for SharedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedPages")
            .field("first", &self.0.first)
            .field("count", &self.0.count)
            .finish()
    }
}

impl fmt::Debug for WeakPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeakPages")
    }
}

fn heap_layout(count: usize) -> Option<core::alloc::Layout> {
    let size = count.checked_mul(PAGE_SIZE).filter(|&size| size > 0)?;
    core::alloc::Layout::from_size_align(size, PAGE_SIZE).ok()
}

/// From how many bytes on a string instruction copies faster than a loop over words, as measured. The start of one
/// costs some tens of cycles; `cargo xtask bench ring` shows whether the choice is right.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const STRING_COPY: usize = 512;

/// Copies shared bytes into private memory. What the host changes meanwhile makes the copy a mixture, never more.
///
/// # Safety
///
/// `source` is valid for reads of `destination.len()` bytes that are accessed only atomically, or not by Rust code.
#[inline]
unsafe fn copy_out(source: *mut u8, destination: &mut [u8]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if destination.len() >= STRING_COPY {
        // SAFETY: the caller's promise, and a slice is valid for writes of its length; the two
        // do not overlap, because no slice lies in shared memory.
        unsafe { copy_string(source, destination.as_mut_ptr(), destination.len()) };
        return;
    }
    let (words, tail) = destination.as_chunks_mut::<8>();
    if source.addr().is_multiple_of(8) && tail.is_empty() {
        for (index, word) in words.iter_mut().enumerate() {
            // SAFETY: in bounds, by the caller's promise, and aligned.
            let value = unsafe { AtomicU64::from_ptr(source.cast::<u64>().wrapping_add(index)) };
            *word = value.load(Ordering::Relaxed).to_ne_bytes();
        }
        return;
    }
    for (index, byte) in destination.iter_mut().enumerate() {
        // SAFETY: in bounds, by the caller's promise.
        let value = unsafe { AtomicU8::from_ptr(source.wrapping_add(index)) };
        *byte = value.load(Ordering::Relaxed);
    }
}

/// Copies private bytes into shared memory.
///
/// # Safety
///
/// `destination` is valid for writes of `source.len()` bytes that are accessed only atomically, or not by Rust code.
#[inline]
unsafe fn copy_in(source: &[u8], destination: *mut u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if source.len() >= STRING_COPY {
        // SAFETY: as in `copy_out`.
        unsafe { copy_string(source.as_ptr(), destination, source.len()) };
        return;
    }
    let (words, tail) = source.as_chunks::<8>();
    if destination.addr().is_multiple_of(8) && tail.is_empty() {
        for (index, word) in words.iter().enumerate() {
            // SAFETY: in bounds, by the caller's promise, and aligned.
            let place =
                unsafe { AtomicU64::from_ptr(destination.cast::<u64>().wrapping_add(index)) };
            place.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
        }
        return;
    }
    for (index, byte) in source.iter().enumerate() {
        // SAFETY: in bounds, by the caller's promise.
        let place = unsafe { AtomicU8::from_ptr(destination.wrapping_add(index)) };
        place.store(*byte, Ordering::Relaxed);
    }
}

/// Copies with the processor's string instructions, which no compiler looks into.
///
/// One end is memory that the host may change or read at the same time. For accesses of Rust code that would be a data
/// race; assembly is outside of the language's memory model, and on the processor each byte is read and written once or, after
/// an interruption of the instruction, goes on where it stopped. It needs no vector registers, which the kernel has not. Like
/// the relaxed accesses of the loops it orders nothing: the offsets in the control page do that, and the compiler moves
/// no memory access across the block.
///
/// # Safety
///
/// `source` is valid for reads and `destination` for writes of `length` bytes, they do not overlap, and no reference of Rust
/// code is alive to the shared one.
#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn copy_string(source: *const u8, destination: *mut u8, length: usize) {
    // SAFETY: by the caller's promise; `rep movsq` moves `length / 8` words forward, since the direction flag is clear in
    // Rust code, and `rep movsb` the rest.
    unsafe {
        core::arch::asm!(
            "rep movsq",
            "mov ecx, {tail:e}",
            "rep movsb",
            tail = in(reg) length % 8,
            inout("rcx") length / 8 => _,
            inout("rsi") source => _,
            inout("rdi") destination => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accesses_past_the_end_are_refused() {
        let pages = SharedPages::from_heap(PageNumber(7), 1).unwrap();
        let mut byte = [0];
        assert_eq!(pages.read(4095, &mut byte), Ok(()));
        assert_eq!(pages.read(4096, &mut byte), Err(OutOfBounds));
        assert_eq!(pages.read(usize::MAX, &mut byte), Err(OutOfBounds));
        assert_eq!(pages.write(4090, &[0; 7]), Err(OutOfBounds));
        assert!(pages.atomic_u32(4092).is_ok());
        assert!(pages.atomic_u32(4094).is_err());
        assert!(pages.atomic_u64(4092).is_err());
    }

    #[test]
    fn a_slice_is_a_part_of_the_same_memory_and_keeps_all_of_it() {
        let pages = SharedPages::from_heap(PageNumber(7), 4).unwrap();
        let slice = pages.slice(1, 2).unwrap();
        assert_eq!(slice.first_page(), PageNumber(8));
        assert_eq!((slice.page_count(), slice.is_slice()), (2, true));
        assert!(!pages.is_slice());
        pages.write(PAGE_SIZE, b"seen").unwrap();
        let weak = pages.downgrade();
        drop(pages);
        let mut seen = [0; 4];
        slice.read(0, &mut seen).unwrap();
        assert_eq!(&seen, b"seen");
        assert_eq!(slice.read(2 * PAGE_SIZE, &mut seen), Err(OutOfBounds));
        assert!(weak.upgrade().is_some());
        drop(slice);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn a_slice_beyond_the_end_is_refused() {
        let pages = SharedPages::from_heap(PageNumber(7), 4).unwrap();
        assert!(pages.slice(4, 0).is_some());
        assert!(pages.slice(3, 2).is_none());
        assert!(pages.slice(usize::MAX, 2).is_none());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(offset in 0usize..5000, data in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let pages = SharedPages::from_heap(PageNumber(0), 2).unwrap();
            let mut back = std::vec![0; data.len()];
            if offset + data.len() <= pages.len() {
                pages.write(offset, &data).unwrap();
                pages.read(offset, &mut back).unwrap();
                prop_assert_eq!(back, data);
            } else {
                prop_assert!(pages.write(offset, &data).is_err());
            }
        }
    }
}
