//! The order of events, from the firmware's call to the kernel's entry.

use boot::command_line::{self, CommandLine, CommandLineError};
use boot::image::{ImageError, Kernel, PAGE_SIZE};
use boot::layout::{Layout, LayoutError, Placement};
use boot::memory_map::{physical_memory, regions};
use boot::paging::{MapError, PageTables, tables_needed};
use bootloader_api::BootInfo;
use bootloader_api::info::{MemoryRegion, Optional};
use core::fmt::{self, Write};
use core::ops::Range;
use core::panic::PanicInfo;
use handover::COMMAND_LINE_MAX;
use uefi::mem::memory_map::{MemoryMap, MemoryType};
use uefi::proto::loaded_image::LoadedImage;
use uefi::proto::media::file::{File, FileAttribute, FileMode};
use uefi::runtime::ResetType;
use uefi::table::cfg::ConfigTableEntry;
use uefi::{CStr16, Status, boot as services, cstr16, entry, runtime, system};
use x86_64::PhysAddr;
use x86_64::structures::paging::PageTable;

use crate::machine::{self, Context, Screen};

/// The kernel, as the build script found and checked it.
///
/// It is copied to where it runs rather than mapped in place: the firmware may hold this file's
/// pages read-only, a kernel's `.data` and `.bss` need pages of their own anyway, and what
/// the copy leaves behind goes back to the kernel as usable memory.
static KERNEL: &[u8] = include_bytes!(env!("ENLIT_KERNEL_FILE"));

/// Where the command line is looked for if the load options have none.
const COMMAND_LINE_FILE: &CStr16 = cstr16!(r"\EFI\BOOT\CMDLINE.TXT");

/// A longer file cannot hold a command line, whatever white space and byte order mark it has.
const FILE_MAX: usize = COMMAND_LINE_MAX + 64;

/// Pieces that the memory map may gain between its first reading and its last, which is a few
/// allocations of the firmware later.
const SPARE_REGIONS: usize = 64;

#[entry]
fn main() -> Status {
    match load() {
        Ok(loaded) => hand_over(loaded),
        Err(failure) => {
            say(format_args!("Enlit cannot start: {failure}."));
            failure.status()
        }
    }
}

/// Prints a line on the firmware's console. If there is none, nobody can be told.
fn say(line: fmt::Arguments<'_>) {
    if !machine::has_console() {
        return;
    }
    system::with_stdout(|console| {
        let _ = console.write_fmt(line);
        let _ = console.write_str("\r\n");
    });
}

/// All that the kernel is to find, but for the final memory map.
struct Loaded {
    kernel: Kernel<'static>,
    layout: Layout,
    placement: Placement,
    screen: Option<Screen>,
    rsdp: Option<u64>,
    context: Context,
    /// Physical ranges that are not free when the kernel starts.
    in_use: [Range<u64>; 3],
    /// Memory for the `BootInfo`.
    info: &'static mut [u8],
    /// Memory for the memory map.
    regions: &'static mut [MemoryRegion],
}

fn load() -> Result<Loaded, Failure> {
    let kernel = Kernel::parse(KERNEL)?;
    let processor = machine::processor().map_err(Failure::Processor)?;
    let command_line = command_line()?;
    let screen = machine::screen(wanted_resolution(&kernel));
    let rsdp = rsdp();

    let map = services::memory_map(MemoryType::LOADER_DATA).map_err(|_| Failure::MemoryMap)?;
    let framebuffer = screen.as_ref().map(Screen::range);
    let physical = physical_memory(map.entries(), framebuffer);
    let physical_len = physical.clone().map(|(range, _)| range.end).max();
    let code = machine::switch_code();
    let layout = Layout::plan(
        kernel.config(),
        [kernel.span(), code.clone()],
        physical_len.unwrap_or(0),
    )?;

    // All that the kernel finds in use lies in two runs of pages and in the code of the switch. The
    // page tables come second, because their number depends on where the first run lies.
    let image_len = kernel.span().end - kernel.span().start;
    let region_count = map.len() + SPARE_REGIONS;
    let (run, [image, stack, info, text, regions]) = allocate([
        image_len,
        layout.stack.end - layout.stack.start,
        size_of::<BootInfo>() as u64,
        COMMAND_LINE_MAX as u64,
        (region_count * size_of::<MemoryRegion>()) as u64,
    ])?;
    kernel.load(image);
    text[..command_line.len()].copy_from_slice(command_line.as_bytes());

    let placement = Placement {
        image: physical_address(image),
        stack: physical_address(stack),
        code: code.clone(),
    };
    let mappings = || layout.mappings(&kernel, &placement, physical.clone());
    let table_count = tables_needed(mappings(), processor.giant_pages);
    let (table_run, [tables]) = allocate([table_count.saturating_mul(PAGE_SIZE)])?;
    let root = PhysAddr::new(physical_address(tables));
    let tables = machine::fill(tables, PageTable::new);
    let mut tables = PageTables::new(tables, root, processor.giant_pages);
    for mapping in mappings() {
        tables.map(mapping)?;
    }
    let context = Context {
        root: tables.root(),
        stack: layout.stack.end,
        entry: kernel.entry(),
        boot_info: layout.physical_memory + physical_address(info),
        command_line: layout.physical_memory + physical_address(text),
        command_line_len: command_line.len() as u64,
    };
    Ok(Loaded {
        in_use: [run, table_run, code],
        regions: machine::fill(regions, MemoryRegion::empty),
        info,
        context,
        rsdp,
        screen,
        placement,
        layout,
        kernel,
    })
}

/// Leaves the firmware behind. From here on there is no way back, and nothing that can fail.
fn hand_over(loaded: Loaded) -> ! {
    let Loaded { kernel, layout, .. } = loaded;
    let map = machine::exit_boot_services();
    let mut count = 0;
    // Were there more regions than places, the kernel would lack the last ones, and not be misled.
    for (place, region) in loaded
        .regions
        .iter_mut()
        .zip(regions(map.entries(), &loaded.in_use))
    {
        *place = region;
        count += 1;
    }
    let mut boot_info = machine::boot_info(&mut loaded.regions[..count], layout.physical_memory);
    boot_info.framebuffer = loaded
        .screen
        .map(|screen| screen.hand_over(layout.physical_memory))
        .into();
    boot_info.physical_memory_offset = Optional::Some(layout.physical_memory);
    boot_info.rsdp_addr = loaded.rsdp.into();
    boot_info.tls_template = kernel.tls_template().into();
    boot_info.kernel_addr = loaded.placement.image;
    boot_info.kernel_len = kernel.span().end - kernel.span().start;
    boot_info.kernel_image_offset = kernel.span().start;
    boot_info.kernel_stack_bottom = layout.stack.start;
    boot_info.kernel_stack_len = layout.stack.end - layout.stack.start;
    machine::place(loaded.info, boot_info);
    machine::switch(&loaded.context)
}

/// Before the switch, memory lies at its physical address.
fn physical_address(memory: &[u8]) -> u64 {
    memory.as_ptr() as u64
}

/// Allocates one zeroed run of pages, anywhere, and cuts it into parts of at least the given sizes
/// in bytes, each of whole pages. Returns the run's physical addresses too.
fn allocate<const N: usize>(
    sizes: [u64; N],
) -> Result<(Range<u64>, [&'static mut [u8]; N]), Failure> {
    let sizes = sizes.map(|size| size.div_ceil(PAGE_SIZE));
    let pages = sizes
        .iter()
        .fold(0, |sum: u64, &size| sum.saturating_add(size));
    let mut rest = machine::allocate(pages).ok_or(Failure::NoMemory(pages))?;
    let start = physical_address(rest);
    let run = start..start + rest.len() as u64;
    let parts = sizes.map(|size| {
        let (part, behind) = core::mem::take(&mut rest).split_at_mut((size * PAGE_SIZE) as usize);
        rest = behind;
        part
    });
    Ok((run, parts))
}

/// The command line: from the load options if they have one, else from the file, else empty.
fn command_line() -> Result<CommandLine, Failure> {
    match load_options_line() {
        Ok(Some(line)) => return Ok(line),
        Ok(None) => (),
        // A boot entry may keep data of the firmware's own there. That is no reason not to start.
        Err(CommandLineError::NotText) => {
            say(format_args!(
                "Enlit: the load options are not text and are left alone."
            ));
        }
        Err(error) => return Err(Failure::CommandLine("in the load options", error)),
    }
    let mut buffer = [0; FILE_MAX];
    let contents = read_command_line_file(&mut buffer).map_err(Failure::File)?;
    command_line::from_file(contents)
        .map_err(|error| Failure::CommandLine(r"in \EFI\BOOT\CMDLINE.TXT", error))
}

fn load_options_line() -> Result<Option<CommandLine>, CommandLineError> {
    let image = services::open_protocol_exclusive::<LoadedImage>(services::image_handle());
    match image.as_ref().map(|image| image.load_options_as_bytes()) {
        Ok(Some(options)) => command_line::from_load_options(options),
        _ => Ok(None),
    }
}

/// Reads the command line file from the volume that the application was started from. Nothing is read
/// where there is no such file, or no volume (a network start).
fn read_command_line_file(buffer: &mut [u8]) -> Result<&[u8], Status> {
    let Ok(mut volume) = services::get_image_file_system(services::image_handle()) else {
        return Ok(&[]);
    };
    let file = volume
        .open_volume()
        .and_then(|mut root| root.open(COMMAND_LINE_FILE, FileMode::Read, FileAttribute::empty()));
    let file = match file {
        Ok(file) => file,
        Err(error) if error.status() == Status::NOT_FOUND => return Ok(&[]),
        Err(error) => return Err(error.status()),
    };
    // A directory of that name is no file.
    let Some(mut file) = file.into_regular_file() else {
        return Ok(&[]);
    };
    let len = file.read(buffer).map_err(|error| error.status())?;
    Ok(&buffer[..len])
}

/// What the kernel would like the screen to have at least. The field is deprecated for want of
/// loaders that look at it; this one does.
#[allow(deprecated)]
fn wanted_resolution(kernel: &Kernel<'_>) -> (usize, usize) {
    let wish = kernel.config().frame_buffer;
    let pixels = |wish: Option<u64>| wish.map_or(0, |pixels| pixels as usize);
    (
        pixels(wish.minimum_framebuffer_width),
        pixels(wish.minimum_framebuffer_height),
    )
}

/// Physical address of the ACPI root pointer: of revision 2 if there is one, else of revision 1.
fn rsdp() -> Option<u64> {
    system::with_config_table(|tables| {
        [ConfigTableEntry::ACPI2_GUID, ConfigTableEntry::ACPI_GUID]
            .iter()
            .find_map(|guid| tables.iter().find(|table| table.guid == *guid))
            .map(|table| table.address as u64)
    })
}

/// Why the kernel does not start.
#[derive(Debug)]
enum Failure {
    Image(ImageError),
    Processor(&'static str),
    CommandLine(&'static str, CommandLineError),
    File(Status),
    MemoryMap,
    Layout(LayoutError),
    NoMemory(u64),
    Map(MapError),
}

impl Failure {
    /// What the firmware is told.
    fn status(&self) -> Status {
        match self {
            Self::Image(_) | Self::Layout(_) | Self::Map(_) => Status::LOAD_ERROR,
            Self::Processor(_) => Status::UNSUPPORTED,
            Self::CommandLine(..) => Status::INVALID_PARAMETER,
            Self::File(status) => *status,
            Self::MemoryMap | Self::NoMemory(_) => Status::OUT_OF_RESOURCES,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(error) => error.fmt(f),
            Self::Processor(reason) => f.write_str(reason),
            Self::CommandLine(place, error) => write!(f, "the command line {place} is {error}"),
            Self::File(status) => write!(
                f,
                r"\EFI\BOOT\CMDLINE.TXT cannot be read (EFI status {:#x})",
                status.0
            ),
            Self::MemoryMap => f.write_str("the firmware does not tell its memory map"),
            Self::Layout(error) => error.fmt(f),
            Self::NoMemory(pages) => write!(
                f,
                "the firmware has no {} KiB of memory in one piece: give the machine more",
                pages.saturating_mul(PAGE_SIZE / 1024)
            ),
            Self::Map(error) => error.fmt(f),
        }
    }
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

impl From<LayoutError> for Failure {
    fn from(error: LayoutError) -> Self {
        Self::Layout(error)
    }
}

impl From<MapError> for Failure {
    fn from(error: MapError) -> Self {
        Self::Map(error)
    }
}

/// A defect of the loader itself. With the firmware it ends like any other failure; without it,
/// all that is left is to end the machine.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    if machine::has_console() {
        say(format_args!("Enlit's loader is broken: {info}"));
        machine::give_up(Status::ABORTED);
    }
    runtime::reset(ResetType::SHUTDOWN, Status::ABORTED, None);
}
