//! What the contract says, asked of the machine.

#![allow(clippy::multiple_unsafe_ops_per_block)]

use bootloader_api::BootInfo;
use bootloader_api::info::{FrameBuffer, MemoryRegion, MemoryRegionKind, Optional};
use core::cell::Cell;
use core::fmt::Write;
use core::ops::Range;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3};
use x86_64::registers::model_specific::{Efer, EferFlags};
use x86_64::registers::rflags::{self, RFlags};
use x86_64::structures::paging::{PageTable, PageTableFlags as Flags};

use crate::machine::{STACK_SIZE, Serial, exit};

const PAGE: u64 = 4096;
const KIB: u64 = 1024;

unsafe extern "C" {
    safe static probe_text_start: u8;
    safe static probe_text_end: u8;
    safe static probe_rodata_start: u8;
    safe static probe_rodata_end: u8;
    safe static probe_data_start: u8;
    safe static probe_data_end: u8;
}

/// In `.bss`, and so large that it takes several page tables: must be zero.
static mut ZEROED: [u64; 1 << 20] = [0; 1 << 20];

/// In `.data`: must be what the file says, and writable.
static mut WRITTEN: u64 = 0x0123_4567_89AB_CDEF;

/// The virtual addresses of a section, in whole pages.
fn pages(start: &u8, end: &u8) -> Range<u64> {
    &raw const *start as u64..(&raw const *end as u64).next_multiple_of(PAGE)
}

/// Goes through the contract and ends the machine.
pub(crate) extern "sysv64" fn run(
    boot_info: &'static mut BootInfo,
    command_line: *const u8,
    command_line_len: usize,
    stack_pointer: u64,
) -> ! {
    let framebuffer = boot_info.framebuffer.take();
    let boot_info: &'static BootInfo = boot_info;
    let probe = Probe {
        offset: boot_info
            .physical_memory_offset
            .into_option()
            .expect("physical memory is mapped"),
        regions: &boot_info.memory_regions,
        failures: Cell::new(0),
    };
    probe.processor();
    probe.stack(boot_info, stack_pointer);
    probe.image(boot_info);
    probe.tables();
    probe.memory_map();
    probe.devices(boot_info, framebuffer);
    probe.belongings(boot_info, command_line as u64);
    probe.command_line(command_line, command_line_len);
    // The first bytes of the output's last line tell the verdict.
    let well = probe.failures.get() == 0;
    if well {
        let _ = writeln!(Serial, "handover ok");
    } else {
        let _ = writeln!(Serial, "handover broken: {} failures", probe.failures.get());
    }
    exit(well)
}

/// A piece of the address space that one entry of the page tables maps.
#[derive(Clone, Copy)]
struct Leaf {
    virt: u64,
    phys: u64,
    size: u64,
    flags: Flags,
}

impl Leaf {
    fn writable(&self) -> bool {
        self.flags.contains(Flags::WRITABLE)
    }

    fn executable(&self) -> bool {
        !self.flags.contains(Flags::NO_EXECUTE)
    }

    fn cached(&self) -> bool {
        !self.flags.contains(Flags::NO_CACHE)
    }
}

struct Probe {
    offset: u64,
    regions: &'static [MemoryRegion],
    failures: Cell<u32>,
}

impl Probe {
    fn check(&self, what: &str, holds: bool) {
        if !holds {
            self.failures.set(self.failures.get() + 1);
            let _ = writeln!(Serial, "wrong: {what}");
        }
    }

    fn processor(&self) {
        self.check(
            "CR0.WP is set",
            Cr0::read().contains(Cr0Flags::WRITE_PROTECT),
        );
        self.check(
            "EFER.NXE is set",
            Efer::read().contains(EferFlags::NO_EXECUTE_ENABLE),
        );
        let flags = rflags::read();
        self.check(
            "interrupts are off",
            !flags.contains(RFlags::INTERRUPT_FLAG),
        );
        self.check(
            "the direction flag is clear",
            !rflags::read_raw() & 1 << 10 != 0,
        );
    }

    fn stack(&self, boot_info: &BootInfo, stack_pointer: u64) {
        let bottom = boot_info.kernel_stack_bottom;
        let len = boot_info.kernel_stack_len;
        self.check("the stack is as large as asked for", len >= STACK_SIZE);
        self.check(
            "the stack pointer is that of a function just called",
            stack_pointer % 16 == 8,
        );
        self.check(
            "the stack pointer is at the top",
            stack_pointer + 8 == bottom + len,
        );
        self.check(
            "the page below the stack is unmapped",
            self.leaf(bottom - PAGE).is_none(),
        );
        self.check("the null page is unmapped", self.leaf(0).is_none());
        for page in (bottom..bottom + len).step_by(PAGE as usize) {
            let leaf = self.leaf(page);
            self.check(
                "the stack is writable and not executable",
                leaf.is_some_and(|leaf| leaf.writable() && !leaf.executable()),
            );
        }
        self.used("the stack", bottom..bottom + len);
    }

    fn image(&self, boot_info: &BootInfo) {
        let text = pages(&probe_text_start, &probe_text_end);
        let rodata = pages(&probe_rodata_start, &probe_rodata_end);
        let data = pages(&probe_data_start, &probe_data_end);
        for (what, range, writable, executable) in [
            ("text", text.clone(), false, true),
            ("rodata", rodata.clone(), false, false),
            ("data", data.clone(), true, false),
        ] {
            for page in range.clone().step_by(PAGE as usize) {
                let right = self.leaf(page).is_some_and(|leaf| {
                    leaf.writable() == writable
                        && leaf.executable() == executable
                        && leaf.cached()
                        && leaf.size == PAGE
                        && leaf.phys
                            == boot_info.kernel_addr + (page - boot_info.kernel_image_offset)
                });
                self.check(what, right);
            }
            self.used(what, range);
        }
        self.check(
            "what is between segments is unmapped",
            self.leaf(rodata.end).is_none(),
        );
        self.check(
            "what is behind the image is unmapped",
            self.leaf(data.end).is_none(),
        );
        self.check(
            "the image begins with its text",
            boot_info.kernel_image_offset == text.start,
        );
        self.check(
            "the image's length is right",
            boot_info.kernel_len == data.end - text.start,
        );
        // SAFETY: nobody else runs.
        unsafe {
            // The compiler must not know that nobody writes there.
            let zeroed = core::hint::black_box(&raw mut ZEROED);
            self.check(".bss is zero", (*zeroed).iter().all(|&word| word == 0));
            let written = &raw mut WRITTEN;
            self.check(
                ".data is as in the file",
                written.read_volatile() == 0x0123_4567_89AB_CDEF,
            );
            written.write_volatile(1);
            self.check(".data can be written", written.read_volatile() == 1);
        }
    }

    fn tables(&self) {
        let text = pages(&probe_text_start, &probe_text_end);
        let mut identity = 0;
        self.each_leaf(&mut |leaf| {
            self.check(
                "nothing is writable and executable",
                !(leaf.writable() && leaf.executable()),
            );
            if leaf.executable() && !text.contains(&leaf.virt) {
                identity += 1;
                self.check(
                    "code that is not ours is a page of the switch",
                    leaf.virt == leaf.phys && leaf.size == PAGE,
                );
                self.check(
                    "the switch is in use",
                    self.kind(leaf.phys) == Some(MemoryRegionKind::Bootloader),
                );
            } else {
                self.check("the lower half is empty", leaf.virt >> 63 == 1);
            }
        });
        self.check(
            "the switch takes a page or two",
            (1..=2).contains(&identity),
        );
    }

    fn memory_map(&self) {
        for pair in self.regions.windows(2) {
            self.check(
                "regions are sorted and disjoint",
                pair[0].end <= pair[1].start,
            );
            self.check(
                "regions are merged",
                pair[0].end < pair[1].start || pair[0].kind != pair[1].kind,
            );
        }
        let mut usable = 0;
        for region in self.regions {
            self.check(
                "regions are of whole pages",
                region.start < region.end && (region.start | region.end).is_multiple_of(PAGE),
            );
            if region.kind == MemoryRegionKind::Usable {
                usable += region.end - region.start;
                self.usable(region);
            }
        }
        self.check("there is usable memory", usable >= 16 * KIB * KIB);
        let _ = writeln!(
            Serial,
            "{} regions, {} KiB usable, {} KiB in use",
            self.regions.len(),
            usable / KIB,
            self.regions
                .iter()
                .filter(|region| region.kind == MemoryRegionKind::Bootloader)
                .map(|region| region.end - region.start)
                .sum::<u64>()
                / KIB,
        );
    }

    /// Usable memory is mapped, and really memory at its edges.
    fn usable(&self, region: &MemoryRegion) {
        let mut phys = region.start;
        while phys < region.end {
            let Some(leaf) = self.leaf(self.offset + phys) else {
                self.check("usable memory is mapped", false);
                return;
            };
            self.check(
                "usable memory is mapped where it belongs, writable and cached",
                self.offset + phys - leaf.virt == phys - leaf.phys
                    && leaf.writable()
                    && leaf.cached(),
            );
            phys = leaf.phys + leaf.size;
        }
        for word in [region.start, region.end - 8] {
            let address = (self.offset + word) as *mut u64;
            // SAFETY: mapped and usable, as just seen and said.
            let holds = unsafe {
                address.write_volatile(!word);
                address.read_volatile() == !word
            };
            self.check("usable memory holds what is written", holds);
        }
    }

    fn devices(&self, boot_info: &BootInfo, framebuffer: Option<FrameBuffer>) {
        let lapic = self.offset + 0xFEE0_0000;
        self.check(
            "the local APIC is mapped and not cached",
            self.leaf(lapic)
                .is_some_and(|leaf| leaf.writable() && !leaf.cached()),
        );
        // SAFETY: mapped, as just seen.
        let version = unsafe { ((lapic + 0x30) as *const u32).read_volatile() };
        self.check(
            "the local APIC answers",
            matches!(version & 0xFF, 0x10..=0x1F),
        );

        match boot_info.rsdp_addr {
            Optional::Some(address) => {
                // SAFETY: the contract says that memory of the firmware is mapped.
                let signature = unsafe { *((self.offset + address) as *const [u8; 8]) };
                self.check("the RSDP is one", &signature == b"RSD PTR ");
            }
            Optional::None => self.check("there is an RSDP", false),
        }

        match framebuffer {
            Some(mut framebuffer) => {
                let info = framebuffer.info();
                let enough = info.stride * info.height * info.bytes_per_pixel <= info.byte_len;
                self.check("the framebuffer has room for its pixels", enough);
                let memory = framebuffer.buffer_mut();
                for index in [0, memory.len() - 1] {
                    memory[index] = 0x5A;
                    self.check(
                        "the framebuffer holds what is written",
                        memory[index] == 0x5A,
                    );
                }
                let _ = writeln!(Serial, "framebuffer {}x{}", info.width, info.height);
            }
            None => {
                let _ = writeln!(Serial, "no framebuffer");
            }
        }
    }

    /// What the loader made lies in memory that the map calls in use.
    fn belongings(&self, boot_info: &BootInfo, command_line: u64) {
        let at = &raw const *boot_info as u64;
        self.used("the BootInfo", at..at + size_of::<BootInfo>() as u64);
        let regions = self.regions.as_ptr_range();
        self.used("the memory map", regions.start as u64..regions.end as u64);
        self.used("the command line", command_line..command_line + 1);
        let root = Cr3::read().0.start_address().as_u64();
        self.check(
            "the root table is in use",
            self.kind(root) == Some(MemoryRegionKind::Bootloader),
        );
        self.each_table(&mut |phys| {
            self.check(
                "page tables are in use",
                self.kind(phys) == Some(MemoryRegionKind::Bootloader),
            );
        });
    }

    fn command_line(&self, address: *const u8, len: usize) {
        // SAFETY: the contract.
        let bytes = unsafe { core::slice::from_raw_parts(address, len) };
        match str::from_utf8(bytes) {
            Ok(text) => {
                let _ = writeln!(Serial, "command line [{text}]");
            }
            Err(_) => self.check("the command line is UTF-8", false),
        }
    }

    /// Checks that the memory behind virtual addresses is marked as in use.
    fn used(&self, what: &str, range: Range<u64>) {
        let first = range.start & !(PAGE - 1);
        for page in (first..range.end).step_by(PAGE as usize) {
            let kind = self
                .leaf(page)
                .and_then(|leaf| self.kind(leaf.phys + (page - leaf.virt)));
            if kind != Some(MemoryRegionKind::Bootloader) {
                self.check(what, false);
                self.check("the former is in use", false);
            }
        }
    }

    fn kind(&self, phys: u64) -> Option<MemoryRegionKind> {
        self.regions
            .iter()
            .find(|region| (region.start..region.end).contains(&phys))
            .map(|region| region.kind)
    }

    fn table(&self, phys: u64) -> &PageTable {
        // SAFETY: the contract maps all physical memory, the page tables among it.
        unsafe { &*((self.offset + phys) as *const PageTable) }
    }

    fn root(&self) -> &PageTable {
        self.table(Cr3::read().0.start_address().as_u64())
    }

    /// The entry in force for a virtual address.
    fn leaf(&self, virt: u64) -> Option<Leaf> {
        let mut table = self.root();
        for shift in [39, 30, 21, 12] {
            let entry = &table[(virt >> shift) as usize % 512];
            let flags = entry.flags();
            if !flags.contains(Flags::PRESENT) {
                return None;
            }
            let phys = entry.addr().as_u64();
            if shift == 12 || flags.contains(Flags::HUGE_PAGE) {
                let size = 1 << shift;
                return Some(Leaf {
                    virt: virt & !(size - 1),
                    phys,
                    size,
                    flags,
                });
            }
            table = self.table(phys);
        }
        None
    }

    fn each_leaf(&self, visit: &mut dyn FnMut(Leaf)) {
        self.walk(self.root(), 39, 0, visit, &mut |_| ());
    }

    fn each_table(&self, visit: &mut dyn FnMut(u64)) {
        self.walk(self.root(), 39, 0, &mut |_| (), visit);
    }

    fn walk(
        &self,
        table: &PageTable,
        shift: u32,
        base: u64,
        leaf: &mut dyn FnMut(Leaf),
        below: &mut dyn FnMut(u64),
    ) {
        for (index, entry) in table.iter().enumerate() {
            let flags = entry.flags();
            if !flags.contains(Flags::PRESENT) {
                continue;
            }
            let mut virt = base | (index as u64) << shift;
            if shift == 39 && index >= 256 {
                virt |= 0xFFFF << 48;
            }
            let phys = entry.addr().as_u64();
            if shift == 12 || flags.contains(Flags::HUGE_PAGE) {
                let size = 1 << shift;
                leaf(Leaf {
                    virt,
                    phys,
                    size,
                    flags,
                });
            } else {
                below(phys);
                self.walk(self.table(phys), shift - 9, virt, leaf, below);
            }
        }
    }
}
