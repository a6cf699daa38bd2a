//! Page tables of our own: the image with W^X, a direct map of physical memory that cannot be
//! executed, stacks between guard pages, and nothing at address zero.
//!
//! | from | what |
//! |---|---|
//! | `0xFFFF_8000_0000_0000` | direct map: 32 TiB of physical memory, writable, never executable; the image's code and constants read-only here too |
//! | `0xFFFF_A000_0000_0000` | stacks, an unmapped page below and above each |
//! | `0xFFFF_B000_0000_0000` | heap |
//! | `0xFFFF_FFFF_8020_0000` | the image |

use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use x86_64::registers::control::Cr3;
use x86_64::structures::paging::mapper::{MapToError, MappedFrame, TranslateResult};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags, PhysFrame,
    Size1GiB, Size2MiB, Size4KiB, Translate,
};
use x86_64::{PhysAddr, VirtAddr};

use super::image::{self, Rights};
use super::physical::{self, DIRECT_MAP, DIRECT_MAP_SIZE};
use crate::memory::FRAME_SIZE;

/// Where stacks are mapped.
pub const STACKS: u64 = 0xFFFF_A000_0000_0000;

/// Where the heap is mapped.
pub const HEAP: u64 = 0xFFFF_B000_0000_0000;

/// Whether an address lies among the stacks: a fault there has hit a guard page.
pub(crate) fn is_stack_guard(address: u64) -> bool {
    (STACKS..HEAP).contains(&address)
}

const WRITABLE: PageTableFlags = PageTableFlags::PRESENT
    .union(PageTableFlags::WRITABLE)
    .union(PageTableFlags::NO_EXECUTE);
const READ_ONLY: PageTableFlags = PageTableFlags::PRESENT.union(PageTableFlags::NO_EXECUTE);

/// Where frames for tables come from.
pub trait FrameSource {
    /// One frame of RAM, by number, not cleared.
    fn frame(&mut self) -> Option<u64>;
}

struct Tables<'a, S>(&'a mut S);

// SAFETY: the sources hand out each frame once.
unsafe impl<S: FrameSource> FrameAllocator<Size4KiB> for Tables<'_, S> {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let number = self.0.frame()?;
        // SAFETY: the frame is ours now.
        unsafe { physical::clear_frames(number, 1) };
        Some(PhysFrame::containing_address(PhysAddr::new(
            number * FRAME_SIZE,
        )))
    }
}

/// What became of a page to be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mapping {
    /// It is mapped now.
    New,
    /// Something is mapped there already, or there is a table of smaller pages.
    InTheWay,
}

/// There was no frame left for a page or a table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfFrames;

/// Page tables that are not, or not only, in force.
pub struct AddressSpace {
    tables: OffsetPageTable<'static>,
}

impl AddressSpace {
    /// Our own tables, now in force. There is one such object.
    pub fn take() -> Self {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        assert!(
            !TAKEN.swap(true, Ordering::Relaxed),
            "the address space was taken before"
        );
        // SAFETY: nobody else has it.
        unsafe { Self::in_force() }
    }

    /// # Safety
    ///
    /// Nobody else reads or changes the tables in force meanwhile.
    unsafe fn in_force() -> Self {
        let (frame, _) = Cr3::read();
        // SAFETY: the top table is RAM, which is mapped at the offset; the rest by the caller.
        unsafe { Self::at(frame.start_address().as_u64()) }
    }

    /// The frames behind those parts of the image that stay.
    pub fn image_frames(&self) -> impl Iterator<Item = u64> {
        image::parts()
            .into_iter()
            .flat_map(|(part, _)| part.step_by(FRAME_SIZE as usize))
            .filter_map(|address| self.translate(address))
            .map(|physical| physical / FRAME_SIZE)
    }

    /// # Safety
    ///
    /// A page table at this physical address, which nothing else changes meanwhile.
    unsafe fn at(top: u64) -> Self {
        // SAFETY: by the caller's promise.
        let table = unsafe { &mut *physical::pointer::<PageTable>(top) };
        // SAFETY: all RAM, so all tables, are mapped at the offset.
        let tables = unsafe { OffsetPageTable::new(table, VirtAddr::new(physical::offset())) };
        Self { tables }
    }

    /// The physical address behind a virtual one.
    pub fn translate(&self, address: u64) -> Option<u64> {
        self.tables
            .translate_addr(VirtAddr::try_new(address).ok()?)
            .map(PhysAddr::as_u64)
    }

    /// Whether the page of an address may be read, and whether it may be written and executed.
    pub fn rights(&self, address: u64) -> Option<(bool, bool)> {
        match self.tables.translate(VirtAddr::try_new(address).ok()?) {
            TranslateResult::Mapped {
                frame: MappedFrame::Size4KiB(_),
                flags,
                ..
            }
            | TranslateResult::Mapped {
                frame: MappedFrame::Size2MiB(_),
                flags,
                ..
            }
            | TranslateResult::Mapped {
                frame: MappedFrame::Size1GiB(_),
                flags,
                ..
            } => Some((
                flags.contains(PageTableFlags::WRITABLE),
                !flags.contains(PageTableFlags::NO_EXECUTE),
            )),
            _ => None,
        }
    }

    fn map<P: PageSize>(
        &mut self,
        source: &mut impl FrameSource,
        address: u64,
        physical: u64,
        flags: PageTableFlags,
    ) -> Result<Mapping, OutOfFrames>
    where
        OffsetPageTable<'static>: Mapper<P>,
    {
        let page = Page::<P>::containing_address(VirtAddr::new(address));
        let frame = PhysFrame::containing_address(PhysAddr::new(physical));
        // Tables above allow what any page below may allow.
        let parents = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
        // SAFETY: callers map frames that belong to the mapping's purpose, at addresses that
        // this module's table of areas gives to it.
        let result = unsafe {
            self.tables
                .map_to_with_table_flags(page, frame, flags, parents, &mut Tables(source))
        };
        match result {
            // A page that was missing is in no TLB, so nothing is flushed.
            Ok(flush) => {
                flush.ignore();
                Ok(Mapping::New)
            }
            Err(MapToError::FrameAllocationFailed) => Err(OutOfFrames),
            // There is a page, or a table of smaller pages, already.
            Err(MapToError::PageAlreadyMapped(_) | MapToError::ParentEntryHugePage) => {
                Ok(Mapping::InTheWay)
            }
        }
    }

    /// Maps a page of memory at a virtual address, writable and not executable.
    pub fn map_page(
        &mut self,
        source: &mut impl FrameSource,
        address: u64,
        frame: u64,
    ) -> Result<(), OutOfFrames> {
        self.map::<Size4KiB>(source, address, frame * FRAME_SIZE, WRITABLE)
            .map(|_| ())
    }

    /// Makes physical addresses visible in the direct map that are no RAM: read-only tables of
    /// the firmware, or device registers (`device`: writable and uncached).
    pub fn map_physical(
        &mut self,
        source: &mut impl FrameSource,
        range: Range<u64>,
        device: bool,
    ) -> Result<(), OutOfFrames> {
        let flags = if device {
            WRITABLE | PageTableFlags::NO_CACHE | PageTableFlags::WRITE_THROUGH
        } else {
            READ_ONLY
        };
        if range.end > DIRECT_MAP_SIZE {
            return Err(OutOfFrames);
        }
        let first = range.start / FRAME_SIZE;
        for page in first..range.end.div_ceil(FRAME_SIZE) {
            let physical = page * FRAME_SIZE;
            if self.translate(DIRECT_MAP + physical).is_none() {
                self.map::<Size4KiB>(source, DIRECT_MAP + physical, physical, flags)?;
            }
        }
        Ok(())
    }
}

/// Tables that are built but not in force.
#[derive(Clone, Copy, Debug)]
pub struct NewTables {
    /// Physical address of the top table.
    top: u64,
    /// Top of the main stack.
    stack_top: u64,
    /// Where the next stack may begin.
    pub next_stack: u64,
}

/// Builds tables of our own for this memory map, on the tables in force, with a main stack of
/// `stack` bytes.
pub fn build(
    source: &mut impl FrameSource,
    regions: &[MemoryRegion],
    stack: u64,
) -> Result<NewTables, OutOfFrames> {
    let top = source.frame().ok_or(OutOfFrames)?;
    // SAFETY: the frame is ours.
    unsafe { physical::clear_frames(top, 1) };
    let top = top * FRAME_SIZE;
    // SAFETY: while booting nothing else changes tables.
    let old = unsafe { AddressSpace::in_force() };
    // SAFETY: these tables are known to nobody else.
    let mut new = unsafe { AddressSpace::at(top) };

    let bottom = STACKS + FRAME_SIZE;
    for address in (bottom..bottom + stack).step_by(FRAME_SIZE as usize) {
        let frame = source.frame().ok_or(OutOfFrames)?;
        new.map_page(source, address, frame)?;
    }
    for (part, rights) in image::parts() {
        let flags = match rights {
            Rights::Code => PageTableFlags::PRESENT,
            Rights::Constants => READ_ONLY,
            Rights::Variables => WRITABLE,
        };
        for address in part.step_by(FRAME_SIZE as usize) {
            let physical = old.translate(address).ok_or(OutOfFrames)?;
            new.map::<Size4KiB>(source, address, physical, flags)?;
        }
    }

    let read_only = read_only_memory(&old).ok_or(OutOfFrames)?;
    let huge = has_gigabyte_pages();
    for region in regions.iter().filter(|region| is_memory(region.kind)) {
        map_direct(&mut new, source, &read_only, region.start..region.end, huge)?;
    }
    let stack_top = bottom + stack;
    Ok(NewTables {
        top,
        stack_top,
        next_stack: stack_top + FRAME_SIZE,
    })
}

/// The physical addresses of the image's code and constants. Each segment lies in one piece
/// (`handover`).
fn read_only_memory(old: &AddressSpace) -> Option<[Range<u64>; 2]> {
    let [(code, _), (constants, _), _] = image::parts();
    let physical = |part: Range<u64>| {
        let start = old.translate(part.start)?;
        Some(start..start + (part.end - part.start))
    };
    Some([physical(code)?, physical(constants)?])
}

/// Whether a region is memory that the kernel reads as such.
fn is_memory(kind: MemoryRegionKind) -> bool {
    use crate::boot::regions::{E820_ACPI, E820_NVS};
    match kind {
        MemoryRegionKind::Usable | MemoryRegionKind::Bootloader => true,
        MemoryRegionKind::UnknownBios(kind) => kind == E820_ACPI || kind == E820_NVS,
        // ACPI reclaim and NVS memory (UEFI 2.10, section 7.2.3).
        MemoryRegionKind::UnknownUefi(kind) => kind == 9 || kind == 10,
        _ => false,
    }
}

/// Maps a range of memory in the direct map, with the largest pages that its middle allows.
fn map_direct(
    new: &mut AddressSpace,
    source: &mut impl FrameSource,
    read_only: &[Range<u64>; 2],
    range: Range<u64>,
    huge: bool,
) -> Result<(), OutOfFrames> {
    let mut at = range.start / FRAME_SIZE * FRAME_SIZE;
    // What does not fit into the window stays unused: `memory::manager` leaves it out too.
    let end = range.end.min(DIRECT_MAP_SIZE).next_multiple_of(FRAME_SIZE);
    while at < end {
        let address = DIRECT_MAP + at;
        let fits = |size: u64| {
            at.is_multiple_of(size) && end - at >= size && !touches(read_only, at..at + size)
        };
        let large = WRITABLE | PageTableFlags::HUGE_PAGE;
        // Where a neighbour's border has left smaller pages, smaller pages go on.
        if huge
            && fits(Size1GiB::SIZE)
            && new.map::<Size1GiB>(source, address, at, large)? == Mapping::New
        {
            at += Size1GiB::SIZE;
        } else if fits(Size2MiB::SIZE)
            && new.map::<Size2MiB>(source, address, at, large)? == Mapping::New
        {
            at += Size2MiB::SIZE;
        } else {
            let read_only = touches(read_only, at..at + FRAME_SIZE);
            let flags = if read_only { READ_ONLY } else { WRITABLE };
            // In the way can only be a neighbour's page that shares this frame.
            new.map::<Size4KiB>(source, address, at, flags)?;
            at += FRAME_SIZE;
        }
    }
    Ok(())
}

/// Whether two sets of addresses meet.
fn touches(ranges: &[Range<u64>], range: Range<u64>) -> bool {
    ranges
        .iter()
        .any(|other| other.start < range.end && range.start < other.end)
}

fn has_gigabyte_pages() -> bool {
    // CPUID 0x80000001 EDX bit 26 (AMD64 Architecture Programmer's Manual 3, appendix E.4).
    core::arch::x86_64::__cpuid(0x8000_0001).edx & (1 << 26) != 0
}

/// Puts tables of our own in force and goes on in `next`, on the main stack.
pub fn switch(tables: NewTables, next: extern "sysv64" fn() -> !) -> ! {
    // SAFETY: `build` mapped all RAM there; until the switch nothing touches physical memory.
    unsafe { physical::set_offset(DIRECT_MAP) };
    // SAFETY: `build` mapped the image, so the next instruction, and the stack.
    unsafe {
        core::arch::asm!(
            "mov cr3, {top}",
            "mov rsp, {stack}",
            "xor ebp, ebp",
            "push rbp", // the stack as a call leaves it
            "jmp {next}",
            top = in(reg) tables.top,
            stack = in(reg) tables.stack_top,
            next = in(reg) next,
            options(noreturn),
        )
    }
}
