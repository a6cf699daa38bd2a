//! The Linux zero page, `boot_params` (spec boot.md B4).

use bootloader_api::BootInfo;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{DirectBoot, PhysicalMemory, hand_over};

/// Offsets of the fields used.
mod field {
    pub(super) const RSDP: u64 = 0x070;
    pub(super) const COMMAND_LINE_HIGH: u64 = 0x0C8;
    pub(super) const E820_COUNT: u64 = 0x1E8;
    pub(super) const HEADER_MAGIC: u64 = 0x202;
    pub(super) const COMMAND_LINE: u64 = 0x228;
    pub(super) const E820: u64 = 0x2D0;
}

/// "HdrS", little endian.
const HEADER_MAGIC: u32 = 0x5372_6448;

/// The zero page has room for this many E820 entries.
const E820_MAX: u8 = 128;

/// An E820 entry: 20 bytes, so it is packed.
#[derive(FromBytes, IntoBytes, Immutable, Clone, Copy, Debug)]
#[repr(C, packed)]
struct E820Entry {
    address: u64,
    size: u64,
    kind: u32,
}

const _: () = assert!(size_of::<E820Entry>() == 20);

/// Makes the hand-over from the zero page at physical address `boot_params`.
pub fn boot_info(
    memory: &impl PhysicalMemory,
    kernel: core::ops::Range<u64>,
    boot_params: u64,
) -> (&'static mut BootInfo, &'static [u8]) {
    hand_over(memory, kernel, |direct| fill(memory, boot_params, direct))
}

fn fill(memory: &impl PhysicalMemory, boot_params: u64, direct: &mut DirectBoot) {
    let at = |offset: u64| boot_params.wrapping_add(offset);
    if memory.get::<u32>(at(field::HEADER_MAGIC)) != HEADER_MAGIC {
        return;
    }
    // The field came with protocol 2.14; before, it was zero. The version says nothing about it:
    // Firecracker fills the field and leaves the version zero. OpenVMM leaves both.
    direct.rsdp = Some(memory.get::<u64>(at(field::RSDP))).filter(|&address| address != 0);
    let low = u64::from(memory.get::<u32>(at(field::COMMAND_LINE)));
    let high = u64::from(memory.get::<u32>(at(field::COMMAND_LINE_HIGH)));
    direct.set_command_line(memory, high << 32 | low, handover::COMMAND_LINE_MAX);
    for i in 0..u64::from(memory.get::<u8>(at(field::E820_COUNT)).min(E820_MAX)) {
        let entry: E820Entry = memory.get(at(field::E820 + i * size_of::<E820Entry>() as u64));
        direct.map.add_e820(entry.address, entry.size, entry.kind);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::Memory;
    use super::*;

    fn zero_page(rsdp: u64) -> Memory {
        let mut memory = Memory::default();
        memory.put(0x2000 + field::HEADER_MAGIC, &HEADER_MAGIC.to_le_bytes());
        memory.put(0x2000 + field::RSDP, &rsdp.to_le_bytes());
        memory.put(0x2000 + field::COMMAND_LINE, &0x3000u32.to_le_bytes());
        memory.put(0x3000, b"words of the monitor log=info\0");
        memory.put(0x2000 + field::E820_COUNT, &[2]);
        for (i, entry) in [
            E820Entry {
                address: 0,
                size: 0x1_9000,
                kind: 1,
            },
            E820Entry {
                address: 0x10_0000,
                size: 0x400_0000,
                kind: 1,
            },
        ]
        .into_iter()
        .enumerate()
        {
            memory.put(0x2000 + field::E820 + 20 * i as u64, entry.as_bytes());
        }
        memory
    }

    #[test]
    fn an_openvmm_zero_page_is_read() {
        let mut direct = DirectBoot::new();
        fill(&zero_page(0), 0x2000, &mut direct);
        assert_eq!(
            direct.rsdp, None,
            "OpenVMM says no address: it is found by scan"
        );
        let line = &direct.command_line[..direct.command_line_len];
        assert_eq!(line, b"words of the monitor log=info");
        assert_eq!(direct.map.as_slice().len(), 2);
        assert_eq!(direct.map.as_slice()[1].end, 0x410_0000);
    }

    #[test]
    fn the_root_pointer_counts_whatever_the_version() {
        let mut direct = DirectBoot::new();
        fill(&zero_page(0xE_0000), 0x2000, &mut direct);
        assert_eq!(direct.rsdp, Some(0xE_0000));
    }

    #[test]
    fn without_the_header_nothing_is_believed() {
        let mut direct = DirectBoot::new();
        fill(&Memory::default(), 0x2000, &mut direct);
        assert!(direct.map.as_slice().is_empty());
    }
}
