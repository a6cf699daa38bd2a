//! Physical memory: through the entry code's tables, then through the direct map.

use core::ops::Range;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmbus::ids::PageNumber;
use vmbus::shared::SharedPages;

use x86_64::{PhysAddr, VirtAddr};

use super::image;
use super::paging::FrameSource;
use crate::boot::PhysicalMemory;
use crate::hyperv::{CodePage, Page};
use crate::memory::frames::Frames;
use crate::memory::{FRAME_SIZE, manager};

/// Virtual address of physical address 0 in the direct map of our own tables.
pub const DIRECT_MAP: u64 = 0xFFFF_8000_0000_0000;

/// Bytes of physical memory that the direct map has room for: 32 TiB.
pub const DIRECT_MAP_SIZE: u64 = 1 << 45;

/// Where physical memory is visible now.
static OFFSET: AtomicU64 = AtomicU64::new(0);

/// Says where physical memory is visible from now on.
///
/// # Safety
///
/// The tables in force map all RAM, writable, at `offset`.
pub unsafe fn set_offset(offset: u64) {
    OFFSET.store(offset, Ordering::Relaxed);
}

/// Says where the loader made physical memory visible.
///
/// # Panics
///
/// When our own tables are in force already.
pub fn set_loader_offset(offset: u64) {
    assert!(self::offset() != DIRECT_MAP, "the loader's tables are gone");
    // SAFETY: the contract of the hand-over; the entry code keeps it for a direct boot.
    unsafe { set_offset(offset) };
}

/// Where physical memory is visible now.
pub fn offset() -> u64 {
    OFFSET.load(Ordering::Relaxed)
}

/// The pointer through which `address` of physical memory can be reached, if it is mapped.
pub fn pointer<T>(address: u64) -> *mut T {
    ptr::with_exposed_provenance_mut(address.wrapping_add(offset()) as usize)
}

/// Fills a run of frames that belong to the caller with zeros.
///
/// # Safety
///
/// The frames are RAM that nothing else uses.
pub unsafe fn clear_frames(first: u64, count: u64) {
    let start = pointer::<u8>(first * FRAME_SIZE);
    // SAFETY: all RAM is mapped at `offset`, and the frames are the caller's.
    unsafe { ptr::write_bytes(start, 0, (count * FRAME_SIZE) as usize) };
}

/// Clears a frame that was just taken out of `frames`.
pub fn clear(_frames: &mut Frames<'static>, frame: u64) {
    // SAFETY: the set hands out each frame of RAM once, and nobody can have used it since.
    unsafe { clear_frames(frame, 1) };
}

/// Makes pages to share with the host of frames that the caller has taken; `release` gets the
/// first frame and their number back.
pub fn share(first: u64, count: usize, release: fn(NonNull<u8>, PageNumber, usize)) -> SharedPages {
    // SAFETY: the caller has taken the frames and gives them up to the result.
    unsafe { clear_frames(first, count as u64) };
    let Some(start) = NonNull::new(pointer::<u8>(first * FRAME_SIZE)) else {
        unreachable!("the direct map does not begin at address zero")
    };
    // SAFETY: RAM in the direct map, which nothing else uses until it is released.
    unsafe { SharedPages::from_raw(start, PageNumber(first), count, release) }
}

/// Makes a page of the hypervisor's interface of a frame that the caller has taken for good.
pub fn hypervisor_page(frame: u64) -> Page {
    let address = VirtAddr::from_ptr(pointer::<u8>(frame * FRAME_SIZE));
    // SAFETY: RAM in the direct map that nothing else uses.
    unsafe { Page::new(address, PhysAddr::new(frame * FRAME_SIZE)) }
}

/// The image's page for the hypervisor's code, whose physical address the caller has looked up. Once only.
pub fn hypercall_page(physical: u64) -> Option<CodePage> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return None;
    }
    let address = VirtAddr::new(image::hypercall_page_address());
    // SAFETY: the image keeps the page for this alone; it is mapped executable and not writable,
    // there and in the direct map.
    Some(unsafe { CodePage::new(address, PhysAddr::new(physical)) })
}

/// The piece of memory that the kernel's first tables, its frame set and its main stack come from.
#[derive(Debug)]
pub struct BootMemory {
    start: u64,
    next: u64,
    end: u64,
}

impl BootMemory {
    /// Claims `frames`, the first of them for `storage_words` words of storage. `None` when
    /// there are too few, or when it was called before.
    pub fn claim(frames: Range<u64>, storage_words: usize) -> Option<Self> {
        static CLAIMED: AtomicBool = AtomicBool::new(false);
        let storage = (storage_words as u64 * 8).div_ceil(FRAME_SIZE);
        let next = frames
            .start
            .checked_add(storage)
            .filter(|&next| next < frames.end)?;
        if CLAIMED.swap(true, Ordering::Relaxed) {
            return None;
        }
        Some(Self {
            start: frames.start,
            next,
            end: frames.end,
        })
    }

    /// The frames that are in use for good.
    pub fn in_use(&self) -> Range<u64> {
        self.start..self.next
    }

    /// The storage, through the tables in force, which are our own.
    pub fn into_storage(self, words: usize) -> &'static mut [u64] {
        debug_assert_eq!(offset(), DIRECT_MAP);
        let start = pointer::<u64>(self.start * FRAME_SIZE);
        let room = ((self.next - self.start) * FRAME_SIZE / 8) as usize;
        // SAFETY: `claim` set these frames aside once and for all, with room for the words
        // that it was told; any bytes are words.
        unsafe { core::slice::from_raw_parts_mut(start, words.min(room)) }
    }
}

impl FrameSource for BootMemory {
    fn frame(&mut self) -> Option<u64> {
        let frame = self.next;
        (frame < self.end).then(|| {
            self.next += 1;
            frame
        })
    }
}

/// Physical memory below 4 GiB, seen at its own addresses through the entry code's tables.
pub struct LowMemory;

impl PhysicalMemory for LowMemory {
    fn read(&self, address: u64, destination: &mut [u8]) {
        let end = address.saturating_add(destination.len() as u64);
        if address < 0x400 && destination.len() > address as usize || end > 1 << 32 {
            destination.fill(0);
            return;
        }
        let source: *const u8 = ptr::with_exposed_provenance(address as usize);
        for (i, byte) in destination.iter_mut().enumerate() {
            // SAFETY: the entry code's tables map the low 4 GiB at their own addresses, and
            // any byte there may be read (what is not RAM reads as something).
            *byte = unsafe { source.wrapping_add(i).read_volatile() };
        }
    }
}

/// Physical memory in the direct map; what is not mapped yet becomes mapped, read-only.
pub struct Mapped;

impl PhysicalMemory for Mapped {
    fn read(&self, address: u64, destination: &mut [u8]) {
        let end = address.saturating_add(destination.len() as u64);
        if manager::map_physical(address..end, false).is_none() {
            destination.fill(0);
            return;
        }
        let source = pointer::<u8>(address);
        for (i, byte) in destination.iter_mut().enumerate() {
            // SAFETY: mapped above, for good; any byte there may be read.
            *byte = unsafe { source.wrapping_add(i).read_volatile() };
        }
    }
}
