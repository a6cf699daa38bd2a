//! Entry by PVH (Xen, docs/misc/hvmlite.markdown; spec boot.md B2).

use std::fs::File;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{COMMAND_LINE, Loaded, Start};
use crate::platform::layout::{ACPI, HIGH_RAM_START};

const DESCRIPTORS: GuestAddress = GuestAddress(0x500);
const INFO: GuestAddress = GuestAddress(0x6000);
const MODULES: GuestAddress = GuestAddress(0x6040);
const MEMORY_MAP: GuestAddress = GuestAddress(0x7000);
const MAGIC: u32 = 0x336E_C578;

/// No segment, 32-bit code, data, and a task state: the guest brings its own before it loads a selector.
const DESCRIPTOR_TABLE: [u64; 4] = [
    0,
    0x00CF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x0000_8B00_0000_0067,
];

/// Puts the ELF file's segments into memory.
pub fn load(memory: &GuestMemoryMmap, file: &mut File) -> Result<KernelLoaderResult, String> {
    let start = Some(GuestAddress(HIGH_RAM_START));
    let loaded = Elf::load(memory, None, file, start).map_err(|error| error.to_string())?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(_) => Ok(loaded),
        _ => Err("it has no PVH note, which says where a kernel is entered".into()),
    }
}

/// Writes what the kernel is told; gives how it starts.
pub fn prepare(memory: &GuestMemoryMmap, loaded: &Loaded<'_>) -> Result<Start, String> {
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.kernel.pvh_boot_cap else {
        return Err("it has no PVH note".into());
    };
    let entry = u32::try_from(entry.0).map_err(|_| "its entry lies above 4 GiB")?;
    let map: Vec<_> = loaded
        .layout
        .memory_map()
        .into_iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.range.start,
            size: entry.range.end - entry.range.start,
            type_: entry.kind as u32,
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = loaded
        .initrd
        .iter()
        .map(|initrd| hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..Default::default()
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES.0 },
        cmdline_paddr: COMMAND_LINE.0,
        rsdp_paddr: ACPI.start,
        memmap_paddr: MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut parameters = BootParams::new(&info, INFO);
    parameters.set_sections(&map, MEMORY_MAP);
    parameters.set_modules(&modules, MODULES);
    PvhBootConfigurator::write_bootparams(&parameters, memory)
        .map_err(|error| error.to_string())?;
    let descriptors = DESCRIPTOR_TABLE.map(u64::to_le_bytes);
    memory
        .write_slice(descriptors.as_flattened(), DESCRIPTORS)
        .map_err(|error| error.to_string())?;
    Ok(Start::Pvh {
        entry,
        info: INFO.0 as u32,
    })
}

/// A flat segment.
pub(super) fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The task state segment that a processor has after a jump into protected mode: 32-bit, busy.
pub(super) fn task_state() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 11,
        present: 1,
        ..Default::default()
    }
}

/// Types of code and data segments that were accessed.
pub(super) const CODE: u8 = 11;
pub(super) const DATA: u8 = 3;

/// Bits of CR0: protection, and the coprocessor's type.
pub(super) const PROTECTED: u64 = 1;
pub(super) const EXTENSION_TYPE: u64 = 1 << 4;

/// 32-bit protected mode, no paging, EBX = start info.
pub fn set_registers(vp: &VcpuFd, entry: u32, info: u32) -> Result<(), kvm_ioctls::Error> {
    let mut special = vp.get_sregs()?;
    special.gdt.base = DESCRIPTORS.0;
    special.gdt.limit = (size_of_val(&DESCRIPTOR_TABLE) - 1) as u16;
    special.cs = segment(0x8, CODE, false);
    let data = segment(0x10, DATA, false);
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.tr = task_state();
    special.cr0 = PROTECTED | EXTENSION_TYPE;
    (special.cr3, special.cr4, special.efer) = (0, 0, 0);
    vp.set_sregs(&special)?;
    vp.set_regs(&kvm_regs {
        rip: entry.into(),
        rbx: info.into(),
        rflags: 2,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{boot, elf};
    use super::super::{Entry, Start};

    #[test]
    fn the_kernel_is_told_of_memory_modules_and_tables() {
        let initrd = [7; 5000];
        let booted = boot(&elf(Some(b"Xen\0")), Some(&initrd), "log=debug", Entry::Pvh);
        let start = *booted.result.as_ref().unwrap();
        assert_eq!(
            start,
            Start::Pvh {
                entry: 0x20_0004,
                info: 0x6000
            }
        );
        assert_eq!(&booted.bytes(0x20_0000), b"the code");
        assert_eq!(
            booted.number(0x6000),
            1 << 32 | 0x336E_C578,
            "magic, version"
        );
        assert_eq!(booted.number(0x6008), 1 << 32, "no flags, one module");
        let line = booted.number(0x6018);
        assert_eq!(&booted.bytes(line), b"log=debug\0");
        let root = booted.number(0x6020);
        assert_eq!(&booted.bytes(root), b"RSD PTR ");
        let module = booted.number(0x6010);
        let [address, size] = [booted.number(module), booted.number(module + 8)];
        assert_eq!((address % 4096, size), (0, 5000));
        assert_eq!(booted.bytes(address), initrd);
        let (map, entries) = (booted.number(0x6028), booted.number(0x6030));
        let entry = |index: u64| {
            let at = map + index * 24;
            [
                booted.number(at),
                booted.number(at + 8),
                booted.number(at + 16),
            ]
        };
        assert_eq!(entries, 3);
        assert_eq!(entry(0), [0, 0xA_0000, 1]);
        assert_eq!(entry(1), [0xC_0000, 0x4_0000, 2]);
        assert_eq!(entry(2), [0x10_0000, 15 << 20, 1]);
    }

    #[test]
    fn a_kernel_without_modules_is_told_so() {
        let booted = boot(&elf(Some(b"Xen\0")), None, "", Entry::Pvh);
        assert!(booted.result.is_ok());
        assert_eq!((booted.number(0x6008), booted.number(0x6010)), (0, 0));
    }
}
