//! Where the loader touches the machine. All of its `unsafe` code is in this file.

#![allow(unsafe_code)]

use boot::framebuffer::{choose, pixel_format};
use boot::image::PAGE_SIZE;
use bootloader_api::BootInfo;
use bootloader_api::info::{FrameBuffer, FrameBufferInfo, MemoryRegion, MemoryRegions};
use core::arch::global_asm;
use core::arch::x86_64::__cpuid;
use core::mem::MaybeUninit;
use core::ops::Range;
use core::slice;
use uefi::boot::{
    self as services, AllocateType, OpenProtocolAttributes, OpenProtocolParams, ScopedProtocol,
    SearchType,
};
use uefi::mem::memory_map::{MemoryMapOwned, MemoryType};
use uefi::proto::console::gop::GraphicsOutput;
use uefi::{Handle, Status, table};
use x86_64::PhysAddr;
use x86_64::registers::control::{Cr4, Cr4Flags};

/// What the page tables must know of the processor.
pub(crate) struct Processor {
    /// Whether it has pages of 1 GiB.
    pub(crate) giant_pages: bool,
}

/// Looks at the processor.
///
/// # Errors
///
/// The reason, if the kernel could not run on it.
pub(crate) fn processor() -> Result<Processor, &'static str> {
    const EXTENDED: u32 = 0x8000_0001;
    const NO_EXECUTE: u32 = 1 << 20;
    const GIANT_PAGES: u32 = 1 << 26;

    // AMD64 Architecture Programmer's Manual, volume 3, appendix E: a processor in long mode has
    // this leaf.
    let features = __cpuid(EXTENDED).edx;
    if features & NO_EXECUTE == 0 {
        return Err(
            "the processor cannot forbid execution (NX), which the kernel's protection needs",
        );
    }
    if Cr4::read().contains(Cr4Flags::L5_PAGING) {
        // It cannot be turned off in long mode.
        return Err("the firmware uses five-level paging, with which the kernel cannot start");
    }
    Ok(Processor {
        giant_pages: features & GIANT_PAGES != 0,
    })
}

/// Whether the firmware's console can be used: not after boot services have ended.
pub(crate) fn has_console() -> bool {
    table::system_table_raw().is_some_and(|table| {
        // SAFETY: the firmware passed the table to the entry point, where the `uefi` crate keeps
        // it, and leaves it readable as long as the loader runs.
        let table = unsafe { table.as_ref() };
        !table.boot_services.is_null() && !table.stdout.is_null()
    })
}

/// Allocates zeroed pages, anywhere. They are for the kernel and are never freed.
pub(crate) fn allocate(pages: u64) -> Option<&'static mut [u8]> {
    let count = usize::try_from(pages).ok()?;
    let len = usize::try_from(pages.checked_mul(PAGE_SIZE)?).ok()?;
    let memory =
        services::allocate_pages(AllocateType::AnyPages, MemoryType::LOADER_DATA, count).ok()?;
    // SAFETY: the firmware has just given away `len` bytes at this address, writable and mapped
    // at their physical address.
    unsafe { memory.write_bytes(0, len) };
    // SAFETY: they are initialized, nobody else has them, and nobody frees them.
    Some(unsafe { slice::from_raw_parts_mut(memory.as_ptr(), len) })
}

/// Fills memory with values, as many as fit, and gives it out as such.
///
/// # Panics
///
/// If the memory is not aligned for `T`.
pub(crate) fn fill<T>(memory: &'static mut [u8], value: impl Fn() -> T) -> &'static mut [T] {
    let places = places(memory);
    for place in &mut *places {
        place.write(value());
    }
    // SAFETY: all of them have just been written.
    unsafe { places.assume_init_mut() }
}

/// Writes a value to the beginning of memory.
///
/// # Panics
///
/// If the memory is not aligned for `T` or too small.
pub(crate) fn place<T: 'static>(memory: &'static mut [u8], value: T) {
    places(memory)[0].write(value);
}

fn places<T>(memory: &'static mut [u8]) -> &'static mut [MaybeUninit<T>] {
    let places = memory.as_mut_ptr().cast::<MaybeUninit<T>>();
    assert!(places.is_aligned(), "misaligned memory");
    let count = memory.len() / size_of::<T>();
    // SAFETY: aligned, within `memory`, which is borrowed for good, and without a claim on contents.
    unsafe { slice::from_raw_parts_mut(places, count) }
}

/// The screen as the firmware leaves it.
pub(crate) struct Screen {
    address: u64,
    info: FrameBufferInfo,
}

impl Screen {
    /// Physical addresses of its memory.
    pub(crate) fn range(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.info.byte_len as u64)
    }

    /// The screen for the kernel, which sees physical memory at `physical_memory`.
    pub(crate) fn hand_over(self, physical_memory: u64) -> FrameBuffer {
        // SAFETY: the kernel's page tables map `range` there, and after boot services nobody else
        // draws on it.
        unsafe { FrameBuffer::new(physical_memory + self.address, self.info) }
    }
}

/// Finds the screen, and sets a mode with at least the `wanted` width and height in pixels, if there
/// is such a mode. A machine may well have no screen.
pub(crate) fn screen(wanted: (usize, usize)) -> Option<Screen> {
    let handles =
        services::locate_handle_buffer(SearchType::from_proto::<GraphicsOutput>()).ok()?;
    handles.iter().find_map(|&handle| {
        let mut output = graphics_output(handle)?;
        let current = output.current_mode_info().resolution();
        let better = choose(
            wanted,
            current,
            output.modes().map(|mode| mode.info().resolution()),
        );
        if let Some(mode) = better.and_then(|index| output.modes().nth(index)) {
            // If the firmware will not, the current mode is still good.
            let _ = output.set_mode(&mode);
        }
        describe(&mut output)
    })
}

/// Opens an output without taking it from the firmware's console, which still may have to tell of a
/// failure.
fn graphics_output(handle: Handle) -> Option<ScopedProtocol<GraphicsOutput>> {
    let params = OpenProtocolParams {
        handle,
        agent: services::image_handle(),
        controller: None,
    };
    // SAFETY: outputs come and go only by events that cannot fall into the few calls that it is open for.
    unsafe { services::open_protocol(params, OpenProtocolAttributes::GetProtocol) }.ok()
}

/// What the kernel needs to know of an output. `None` if it has no memory to draw in.
fn describe(output: &mut GraphicsOutput) -> Option<Screen> {
    let mode = output.current_mode_info();
    let (format, bytes_per_pixel) = pixel_format(mode.pixel_format(), mode.pixel_bitmask())?;
    let (width, height) = mode.resolution();
    let mut memory = output.frame_buffer();
    let info = FrameBufferInfo {
        byte_len: memory.size(),
        width,
        height,
        pixel_format: format,
        bytes_per_pixel,
        stride: mode.stride(),
    };
    let address = memory.as_mut_ptr() as u64;
    (address != 0 && info.byte_len != 0).then_some(Screen { address, info })
}

/// Ends boot services and returns the final memory map. Resets the machine if the firmware refuses.
pub(crate) fn exit_boot_services() -> MemoryMapOwned {
    // SAFETY: no protocol is open and no event registered; what comes after uses the map alone.
    unsafe { services::exit_boot_services(Some(MemoryType::LOADER_DATA)) }
}

/// Returns to the firmware from anywhere. Comes back only if the firmware refuses.
pub(crate) fn give_up(status: Status) {
    // SAFETY: nothing on the way out needs to be cleaned up.
    let _refused =
        unsafe { services::exit(services::image_handle(), status, 0, core::ptr::null_mut()) };
}

/// Begins the boot information with its memory map, which the kernel sees through its mapping of
/// physical memory.
pub(crate) fn boot_info(regions: &'static mut [MemoryRegion], physical_memory: u64) -> BootInfo {
    let len = regions.len();
    let address = (physical_memory + regions.as_mut_ptr() as u64) as *mut MemoryRegion;
    // SAFETY: `regions` was given up for good, and the kernel's page tables map it at this address.
    // Nothing looks behind it before they are in force.
    let regions: &'static mut [MemoryRegion] = unsafe { slice::from_raw_parts_mut(address, len) };
    BootInfo::new(MemoryRegions::from(regions))
}

/// All that [`switch`] gives the processor.
#[repr(C)]
pub(crate) struct Context {
    /// Root of the kernel's page tables.
    pub(crate) root: PhysAddr,
    /// First address above the kernel's stack.
    pub(crate) stack: u64,
    /// The kernel's [`handover::Entry`].
    pub(crate) entry: u64,
    /// Virtual address of the `BootInfo`.
    pub(crate) boot_info: u64,
    /// Virtual address of the command line.
    pub(crate) command_line: u64,
    /// Its length in bytes.
    pub(crate) command_line_len: u64,
}

// The way into the kernel. From the load of CR3 on, only this code's own pages are where they were;
// so the context is in registers by then.
//
// Before it, whatever would break the switch goes out of CR4: global pages would keep the firmware's
// translations alive, process-context identifiers change what CR3 means, and a shadow stack (CET)
// would not be mapped. CR0.WP and EFER.NXE come on, as the contract wants.
//
// The return address 0 ends a backtrace, and leaves the stack as a call would.
global_asm!(
    ".balign 16",
    "enlit_switch:",
    "cli",
    "cld",
    "mov rax, cr4",
    "and rax, {cr4_keep}",
    "mov cr4, rax",
    "mov ecx, {efer}",
    "rdmsr",
    "or eax, {nxe}",
    "wrmsr",
    "mov rax, cr0",
    "or rax, {wp}",
    "mov cr0, rax",
    "mov rax, [rdi + {root}]",
    "mov r8, [rdi + {stack}]",
    "mov r9, [rdi + {entry}]",
    "mov rsi, [rdi + {command_line}]",
    "mov rdx, [rdi + {command_line_len}]",
    "mov rdi, [rdi + {boot_info}]",
    "mov cr3, rax",
    "mov rsp, r8",
    "xor ebp, ebp",
    "push rbp",
    "jmp r9",
    "enlit_switch_end:",
    // A sign-extended 32-bit constant: the upper half of CR4 stays as it is.
    cr4_keep = const !(1_i32 << 7 | 1 << 17 | 1 << 23), // PGE, PCIDE, CET
    efer = const 0xC000_0080_u32,
    nxe = const 1 << 11,
    wp = const 1 << 16,
    root = const core::mem::offset_of!(Context, root),
    stack = const core::mem::offset_of!(Context, stack),
    entry = const core::mem::offset_of!(Context, entry),
    boot_info = const core::mem::offset_of!(Context, boot_info),
    command_line = const core::mem::offset_of!(Context, command_line),
    command_line_len = const core::mem::offset_of!(Context, command_line_len),
);

unsafe extern "sysv64" {
    fn enlit_switch(context: &Context) -> !;
    safe static enlit_switch_end: u8;
}

/// The pages of the code that switches to the kernel, at addresses that are the same before and after.
pub(crate) fn switch_code() -> Range<u64> {
    let start = enlit_switch as *const () as u64;
    let end = &raw const enlit_switch_end as u64;
    start & !(PAGE_SIZE - 1)..end.next_multiple_of(PAGE_SIZE)
}

/// Enters the kernel.
pub(crate) fn switch(context: &Context) -> ! {
    // SAFETY: boot services have ended, so nobody but this processor's present code depends on its
    // state. The context names page tables that map `switch_code` where it is, and a stack, an entry
    // and arguments that are right under those tables.
    unsafe { enlit_switch(context) }
}
