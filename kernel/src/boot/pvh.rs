//! The PVH start info (spec boot.md B2).

use bootloader_api::BootInfo;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{DirectBoot, PhysicalMemory, hand_over};

const MAGIC: u32 = 0x336E_C578;

/// The start info structure, version 1. Version 0 ends before the memory map.
#[derive(FromBytes, IntoBytes, Immutable, Clone, Copy, Debug)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);

/// An entry of the memory map; the types are those of an E820 map.
#[derive(FromBytes, IntoBytes, Immutable, Clone, Copy, Debug)]
#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<MemoryMapEntry>() == 24);

/// Makes the hand-over from the start info at physical address `start_info`.
pub fn boot_info(
    memory: &impl PhysicalMemory,
    kernel: core::ops::Range<u64>,
    start_info: u64,
) -> (&'static mut BootInfo, &'static [u8]) {
    hand_over(memory, kernel, |direct| fill(memory, start_info, direct))
}

/// Reads what is there. Without the magic number nothing can be trusted: the map stays empty
/// and the kernel says that there is no memory.
fn fill(memory: &impl PhysicalMemory, start_info: u64, direct: &mut DirectBoot) {
    let info: StartInfo = memory.get(start_info);
    if info.magic != MAGIC {
        return;
    }
    direct.rsdp = Some(info.rsdp).filter(|&address| address != 0);
    direct.set_command_line(memory, info.command_line, handover::COMMAND_LINE_MAX);
    if info.version >= 1 {
        for i in 0..u64::from(info.memory_map_entries.min(4096)) {
            let address = info
                .memory_map
                .wrapping_add(i * size_of::<MemoryMapEntry>() as u64);
            let entry: MemoryMapEntry = memory.get(address);
            direct.map.add_e820(entry.address, entry.size, entry.kind);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Memory;
    use super::*;
    use bootloader_api::info::MemoryRegionKind;

    #[test]
    fn memory_command_line_and_root_pointer_are_read() {
        let mut memory = Memory::default();
        let info = StartInfo {
            magic: MAGIC,
            version: 1,
            flags: 0,
            module_count: 0,
            modules: 0,
            command_line: 0x2_0000,
            rsdp: 0xA_0000,
            memory_map: 0x7000,
            memory_map_entries: 2,
            reserved: 0,
        };
        memory.put(0x6000, info.as_bytes());
        memory.put(0x2_0000, b"log=debug mark=0x4e9\0rest");
        for (i, (address, size, kind)) in [(0u64, 0x9_FC00u64, 1u32), (0x10_0000, 0x700_0000, 1)]
            .into_iter()
            .enumerate()
        {
            let entry = MemoryMapEntry {
                address,
                size,
                kind,
                reserved: 0,
            };
            memory.put(0x7000 + 24 * i as u64, entry.as_bytes());
        }
        let mut direct = DirectBoot::new();
        fill(&memory, 0x6000, &mut direct);
        assert_eq!(direct.rsdp, Some(0xA_0000));
        assert_eq!(
            &direct.command_line[..direct.command_line_len],
            b"log=debug mark=0x4e9"
        );
        let regions = direct.map.as_slice();
        assert_eq!(regions.len(), 2);
        assert_eq!((regions[1].start, regions[1].end), (0x10_0000, 0x710_0000));
        assert_eq!(regions[1].kind, MemoryRegionKind::Usable);
    }

    #[test]
    fn a_wrong_magic_number_gives_nothing() {
        let mut direct = DirectBoot::new();
        fill(&Memory::default(), 0x6000, &mut direct);
        assert!(direct.map.as_slice().is_empty());
    }
}
