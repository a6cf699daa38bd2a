//! Entry by Linux's 64-bit boot protocol (Linux, Documentation/arch/x86/boot.rst; spec boot.md B3, B4).

use std::fs::File;
use std::io::{Read, Seek};

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::pvh::{CODE, DATA, EXTENSION_TYPE, PROTECTED, segment, task_state};
use super::{COMMAND_LINE, Loaded, MAX_COMMAND_LINE, Start};
use crate::platform::layout::{ACPI, HIGH_RAM_START};

const DESCRIPTORS: GuestAddress = GuestAddress(0x500);
const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// The page tables: one of the fourth level, one of the third, four of the second, which map 4 GiB.
const TABLES: u64 = 0x9000;
const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 2 << 20;
const ENTRIES: u64 = 512;

/// Where the 64-bit entry of a bzImage is, from its start.
const BZIMAGE_ENTRY: u64 = 0x200;
/// In the extended load flags: there is such an entry.
const HAS_64_BIT_ENTRY: u16 = 1;
/// The first version of the protocol with these flags.
const LEAST_VERSION: u16 = 0x020C;

/// No segment, 64-bit code, data, and a task state.
const DESCRIPTOR_TABLE: [u64; 4] = [
    0,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x0000_8B00_0000_0067,
];

/// Puts the kernel into memory, whether it is an ELF file or a bzImage.
pub fn load(memory: &GuestMemoryMmap, file: &mut File) -> Result<KernelLoaderResult, String> {
    let mut magic = [0; 4];
    // A shorter file is no kernel, and the loader says so.
    let _ = file.read(&mut magic).and_then(|_| file.rewind());
    let start = Some(GuestAddress(HIGH_RAM_START));
    if magic == *b"\x7fELF" {
        return Elf::load(memory, None, file, start).map_err(|error| error.to_string());
    }
    let loaded = BzImage::load(memory, None, file, start)
        .map_err(|_| "it is neither an ELF file nor a bzImage")?;
    let header = loaded.setup_header.ok_or("it has no setup header")?;
    if header.version < LEAST_VERSION || header.xloadflags & HAS_64_BIT_ENTRY == 0 {
        return Err("it has no 64-bit entry".into());
    }
    Ok(loaded)
}

/// Where the memory ends that the kernel needs before it knows what there is.
pub fn end_of(kernel: &KernelLoaderResult) -> u64 {
    let unpacked = kernel.setup_header.map_or(0, |header| {
        let start = header.pref_address.max(kernel.kernel_load.0);
        start.saturating_add(header.init_size.into())
    });
    kernel.kernel_end.max(unpacked)
}

/// Writes what the kernel is told; gives how it starts.
pub fn prepare(memory: &GuestMemoryMmap, loaded: &Loaded<'_>) -> Result<Start, String> {
    let kernel = &loaded.kernel;
    let entry = match kernel.setup_header {
        Some(_) => kernel.kernel_load.0 + BZIMAGE_ENTRY,
        None => kernel.kernel_load.0,
    };
    let parameters = BootParams::new(&zero_page(loaded), ZERO_PAGE);
    LinuxBootConfigurator::write_bootparams(&parameters, memory)
        .map_err(|error| error.to_string())?;
    let descriptors = DESCRIPTOR_TABLE.map(u64::to_le_bytes);
    memory
        .write_slice(descriptors.as_flattened(), DESCRIPTORS)
        .and_then(|()| {
            let tables = page_tables();
            memory.write_slice(&tables, GuestAddress(TABLES))
        })
        .map_err(|error| error.to_string())?;
    Ok(Start::Linux {
        entry,
        zero_page: ZERO_PAGE.0,
    })
}

fn zero_page(loaded: &Loaded<'_>) -> boot_params {
    /// A loader without a number of its own.
    const OTHER_LOADER: u8 = 0xFF;
    let mut page = boot_params {
        acpi_rsdp_addr: ACPI.start,
        ..Default::default()
    };
    page.hdr = loaded.kernel.setup_header.unwrap_or_default();
    page.hdr.boot_flag = 0xAA55;
    page.hdr.header = u32::from_le_bytes(*b"HdrS");
    page.hdr.type_of_loader = OTHER_LOADER;
    page.hdr.cmd_line_ptr = COMMAND_LINE.0 as u32;
    if loaded.kernel.setup_header.is_none() {
        page.hdr.version = LEAST_VERSION;
        page.hdr.kernel_alignment = 0x100_0000;
        page.hdr.cmdline_size = MAX_COMMAND_LINE.max(loaded.command_line_length) as u32;
    }
    if let Some(initrd) = loaded.initrd {
        page.hdr.ramdisk_image = initrd.address as u32;
        page.hdr.ramdisk_size = initrd.size as u32;
    }
    let map = loaded.layout.memory_map();
    let mut table = page.e820_table;
    for (slot, entry) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.range.start,
            size: entry.range.end - entry.range.start,
            r#type: entry.kind as u32,
        };
        page.e820_entries += 1;
    }
    page.e820_table = table;
    page
}

/// Maps 4 GiB where they are.
fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let mut tables = vec![0_u64; 6 * ENTRIES as usize];
    let table = |index: u64| (TABLES + index * PAGE) | PRESENT_WRITABLE;
    tables[0] = table(1);
    for index in 0..4_u64 {
        tables[(ENTRIES + index) as usize] = table(2 + index);
    }
    for (entry, address) in tables[2 * ENTRIES as usize..].iter_mut().zip(0..) {
        *entry = (address * LARGE_PAGE) | PRESENT_WRITABLE | LARGE;
    }
    tables.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// 64-bit mode, RSI = zero page.
pub fn set_registers(vp: &VcpuFd, entry: u64, zero_page: u64) -> Result<(), kvm_ioctls::Error> {
    const PAGING: u64 = 1 << 31;
    const PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
    const LONG_MODE_ENABLED_AND_ACTIVE: u64 = 1 << 8 | 1 << 10;
    let mut special = vp.get_sregs()?;
    special.gdt.base = DESCRIPTORS.0;
    special.gdt.limit = (size_of_val(&DESCRIPTOR_TABLE) - 1) as u16;
    special.cs = segment(0x8, CODE, true);
    let data = segment(0x10, DATA, false);
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.tr = task_state();
    special.cr0 = PROTECTED | EXTENSION_TYPE | PAGING;
    special.cr3 = TABLES;
    special.cr4 = PHYSICAL_ADDRESS_EXTENSION;
    special.efer = LONG_MODE_ENABLED_AND_ACTIVE;
    vp.set_sregs(&special)?;
    vp.set_regs(&kvm_regs {
        rip: entry,
        rsi: zero_page,
        rflags: 2,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{boot, elf};
    use super::super::{Entry, Start};
    use super::*;

    #[test]
    fn the_zero_page_tells_of_memory_initrd_and_command_line() {
        let booted = boot(&elf(None), Some(&[9; 100]), "quiet", Entry::Linux);
        let start = *booted.result.as_ref().unwrap();
        assert_eq!(
            start,
            Start::Linux {
                entry: 0x20_0000,
                zero_page: 0x7000
            }
        );
        let word = |at: u64| u32::from_le_bytes(booted.bytes(0x7000 + at));
        assert_eq!(booted.number(0x7070), 0xE_0000, "the root of ACPI's tables");
        assert_eq!(booted.bytes(0x71E8), [3], "ranges of memory");
        assert_eq!(booted.bytes(0x71EF), [0], "the sentinel");
        assert_eq!(booted.bytes(0x71FE), [0x55, 0xAA]);
        assert_eq!(&booted.bytes(0x7202), b"HdrS");
        assert_eq!(booted.bytes(0x7210), [0xFF], "the loader's type");
        assert_eq!(&booted.bytes(word(0x228).into()), b"quiet\0");
        assert_eq!(word(0x21C), 100);
        assert_eq!(booted.bytes(word(0x218).into()), [9; 100]);
        assert_eq!(
            [booted.number(0x72D0), booted.number(0x72D8)],
            [0, 0xA_0000]
        );
        assert_eq!(word(0x2E0), 1);
        assert_eq!(booted.number(0x72E4), 0xC_0000, "entries of 20 bytes");
    }

    #[test]
    fn the_page_tables_map_4_gib_where_they_are() {
        let bytes = page_tables();
        let entry = |index: u64| {
            let at = index as usize * 8;
            u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        for address in [0, LARGE_PAGE, 0x2_3400_0000 >> 2, 0xFFE0_0000_u64] {
            let address = address / LARGE_PAGE * LARGE_PAGE;
            let table = |entry: u64| (entry - TABLES) / PAGE * ENTRIES;
            let third = table(entry(address >> 39)) + (address >> 30 & 511);
            let second = table(entry(third)) + (address >> 21 & 511);
            assert_eq!(entry(second), address | 0x83);
        }
    }

    #[test]
    fn a_bzimage_is_entered_behind_its_start() {
        let mut file = vec![0; 0x400];
        file[0x1F1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x020F_u16.to_le_bytes());
        file[0x211] = 1;
        file[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
        file[0x236] = 1;
        file[0x260..0x264].copy_from_slice(&0x20_0000_u32.to_le_bytes());
        file.extend(b"packed");
        let booted = boot(&file, None, "", Entry::Linux);
        let start = *booted.result.as_ref().unwrap();
        assert_eq!(
            start,
            Start::Linux {
                entry: 0x10_0200,
                zero_page: 0x7000
            }
        );
        assert_eq!(&booted.bytes(0x10_0000), b"packed");
        let mut old = file.clone();
        old[0x236] = 0;
        let error = boot(&old, None, "", Entry::Linux).result.unwrap_err();
        assert!(error.to_string().contains("64-bit entry"), "{error}");
        // It does not say how much it unpacks to less than there is.
        file[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes());
        let error = boot(&file, None, "", Entry::Linux).result.unwrap_err();
        assert!(error.to_string().contains("does not fit"), "{error}");
    }
}
