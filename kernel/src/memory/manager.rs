//! The machine's memory: takes it over from whoever booted, and hands out frames and mappings.

use core::fmt;
use core::ops::Range;

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use vmbus::hypervisor::OutOfMemory;
use vmbus::shared::SharedPages;

use super::FRAME_SIZE;
use super::frames::Frames;
use crate::arch::image;
use crate::arch::paging::{self, AddressSpace, FrameSource, NewTables};
use crate::arch::physical::{self, BootMemory, DIRECT_MAP_SIZE};
use crate::boot::regions::{MAX_REGIONS, RegionMap};
use crate::hyperv::{CodePage, Page};
use crate::println;
use crate::sync::Lock;

/// Frames below this are left alone: the firmware's data, and where other VPs will start.
const LOW_MEMORY: u64 = 0x1_0000;

/// Bytes of the main stack, on which `main` and all tasks run.
pub(crate) const MAIN_STACK: u64 = 64 * 1024;

/// The memory map, copied from the loader's.
static MAP: Lock<RegionMap> = Lock::new(RegionMap::new());

static MEMORY: Lock<Option<Memory>> = Lock::new(None);

struct Memory {
    frames: Frames<'static>,
    space: AddressSpace,
    next_stack: u64,
    ram: u64,
}

/// How much memory there is, in frames of 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Figures {
    /// RAM that the memory map named, whoever uses it.
    pub ram: u64,
    /// Frames that the kernel manages.
    pub managed: u64,
    /// Frames that are free.
    pub free: u64,
}

/// Why memory could not be taken over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// The memory map names no usable memory that the kernel can begin with.
    NoMemory,
    /// There is too little of it for the kernel's tables and stacks.
    TooLittle {
        /// Bytes in the largest usable piece.
        bytes: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoMemory => {
                f.write_str("the memory map has no usable memory below 4 GiB: the VM cannot run")
            }
            Self::TooLittle { bytes } => write!(
                f,
                "{} KiB of usable memory are too little to start: give the VM more",
                bytes / 1024
            ),
        }
    }
}

/// Memory half taken over: our own tables are built but not in force.
pub struct TakeOver {
    boot: BootMemory,
    storage_words: usize,
}

/// The first half, on the tables that the kernel was started with.
///
/// `regions` may lie in memory that the new tables do not map; it is copied.
pub fn prepare(regions: &[MemoryRegion]) -> Result<(NewTables, TakeOver), Error> {
    let mut map = MAP.lock();
    for region in regions {
        map.set(region.start, region.end, region.kind);
    }
    // A direct boot's temporary tables reach to 4 GiB.
    let reach = (1 << 32) / FRAME_SIZE;
    let piece = map
        .as_slice()
        .iter()
        .filter(|region| region.kind == MemoryRegionKind::Usable)
        .map(managed_frames)
        .map(|frames| frames.start..frames.end.min(reach))
        .max_by_key(|frames| frames.end.saturating_sub(frames.start))
        .filter(|frames| !frames.is_empty())
        .ok_or(Error::NoMemory)?;
    let too_little = Error::TooLittle {
        bytes: (piece.end - piece.start) * FRAME_SIZE,
    };

    let storage_words = Frames::storage_words(end_of_ram(&map));
    let mut boot = BootMemory::claim(piece, storage_words).ok_or(too_little)?;
    let tables = paging::build(&mut boot, map.as_slice(), MAIN_STACK).map_err(|_| too_little)?;
    Ok((
        tables,
        TakeOver {
            boot,
            storage_words,
        },
    ))
}

/// The second half, on our own tables: whatever is not in use becomes free.
pub fn complete(take_over: TakeOver, tables: &NewTables) {
    let map = MAP.lock();
    if map.dropped() > 0 {
        println!(
            "enlit: the memory map has more than {MAX_REGIONS} regions; {} are left out",
            map.dropped()
        );
    }
    let TakeOver {
        boot,
        storage_words,
    } = take_over;
    let in_use = boot.in_use();
    let mut frames = Frames::new(end_of_ram(&map), boot.into_storage(storage_words));
    let mut ram = 0;
    for region in map.as_slice().iter().filter(|region| is_ram(region)) {
        ram += (region.end - region.start) / FRAME_SIZE;
        // What the loader used is free too: its tables and its stack are behind us.
        frames.add(managed_frames(region));
    }
    frames.remove(in_use);
    let space = AddressSpace::take();
    for frame in space.image_frames() {
        frames.remove(frame..frame + 1);
    }
    *MEMORY.lock() = Some(Memory {
        frames,
        space,
        next_stack: tables.next_stack,
        ram,
    });
}

/// How much memory there is now.
pub fn figures() -> Figures {
    with(|memory| Figures {
        ram: memory.ram,
        managed: memory.frames.total(),
        free: memory.frames.available(),
    })
    .unwrap_or(Figures {
        ram: 0,
        managed: 0,
        free: 0,
    })
}

/// Takes contiguous, cleared frames to share with the host. Dropping the last handle gives them back.
pub fn share_pages(count: usize) -> Result<SharedPages, OutOfMemory> {
    let first = take_frames(count as u64, 1).ok_or(OutOfMemory { pages: count })?;
    Ok(physical::share(first, count, |_, first, count| {
        give_back(first.0..first.0 + count as u64);
    }))
}

/// Takes a frame for good and makes it a page of the hypervisor's interface.
pub(crate) fn hypervisor_page() -> Option<Page> {
    take_frames(1, 1).map(physical::hypervisor_page)
}

/// The image's page for the hypervisor's code. `None` when it was taken before.
pub(crate) fn hypercall_page() -> Option<CodePage> {
    physical::hypercall_page(translate(image::hypercall_page_address())?)
}

/// Takes contiguous frames that begin at a multiple of `align` frames.
pub fn take_frames(count: u64, align: u64) -> Option<u64> {
    with(|memory| memory.frames.take(count, align))?
}

/// Takes a whole 2 MiB block, by its first frame.
pub fn take_block() -> Option<u64> {
    with(|memory| memory.frames.take_block())?
}

/// Takes one frame, from a broken block if there is one.
pub fn take_loose() -> Option<u64> {
    with(|memory| memory.frames.take_loose())?
}

/// Gives frames back. Frames that are free already are a bug of the caller's, which is reported.
pub fn give_back(frames: Range<u64>) {
    let done = with(|memory| memory.frames.give_back(frames.clone()));
    if done == Some(false) {
        log::error!("memory: frames {frames:x?} were given back twice; nothing is changed");
    }
}

/// Maps a new stack of this many bytes between two guard pages. The answer is its top.
pub fn map_stack(bytes: u64) -> Option<u64> {
    with(|memory| {
        let bottom = memory.next_stack;
        let top = bottom + bytes.next_multiple_of(FRAME_SIZE);
        map_pages(memory, bottom..top)?;
        memory.next_stack = top + FRAME_SIZE;
        Some(top)
    })?
}

/// Maps memory behind the heap's addresses. `None` when there is not enough.
pub(super) fn map_heap(range: Range<u64>) -> Option<()> {
    with(|memory| map_pages(memory, range))?
}

/// Makes firmware tables (or device registers) visible in the direct map.
pub fn map_physical(range: Range<u64>, device: bool) -> Option<()> {
    with(|memory| {
        memory
            .space
            .map_physical(&mut memory.frames, range, device)
            .ok()
    })?
}

/// Whether a virtual address is mapped; the answer says whether it is writable and executable.
/// `None` while somebody holds the lock: for reports.
pub fn try_rights(address: u64) -> Option<(bool, bool)> {
    MEMORY.try_lock()?.as_ref()?.space.rights(address)
}

/// Maps fresh memory, all of the range or none.
fn map_pages(memory: &mut Memory, range: Range<u64>) -> Option<()> {
    let pages = (range.end - range.start) / FRAME_SIZE;
    // A table for each 2 MiB begun, and one of each level above.
    let tables = pages / 512 + 4;
    if pages.checked_add(tables)? > memory.frames.available() {
        return None;
    }
    for address in range.step_by(FRAME_SIZE as usize) {
        let frame = memory.frames.take_loose()?;
        physical::clear(&mut memory.frames, frame);
        memory
            .space
            .map_page(&mut memory.frames, address, frame)
            .ok()?;
    }
    Some(())
}

fn with<R>(action: impl FnOnce(&mut Memory) -> R) -> Option<R> {
    MEMORY.lock().as_mut().map(action)
}

fn is_ram(region: &MemoryRegion) -> bool {
    matches!(
        region.kind,
        MemoryRegionKind::Usable | MemoryRegionKind::Bootloader
    )
}

/// The frames of a region that the kernel manages: whole ones above low memory.
fn managed_frames(region: &MemoryRegion) -> Range<u64> {
    let start = region.start.max(LOW_MEMORY).div_ceil(FRAME_SIZE);
    start..(region.end.min(DIRECT_MAP_SIZE) / FRAME_SIZE).max(start)
}

fn end_of_ram(map: &RegionMap) -> u64 {
    let ram = map.as_slice().iter().filter(|region| is_ram(region));
    let end = ram.map(|region| region.end / FRAME_SIZE).max().unwrap_or(0);
    end.min(DIRECT_MAP_SIZE / FRAME_SIZE)
}

impl FrameSource for Frames<'static> {
    fn frame(&mut self) -> Option<u64> {
        self.take_loose()
    }
}

/// The physical address behind a virtual one.
pub(crate) fn translate(address: u64) -> Option<u64> {
    with(|memory| memory.space.translate(address))?
}
