//! Finding the ACPI root pointer where nobody said its address (spec boot.md B3, B5).

use super::PhysicalMemory;

/// Where a scan looks: the first KiB of the extended BIOS data area, then the BIOS area.
const BIOS_AREA: core::ops::Range<u64> = 0xE_0000..0x10_0000;

/// BIOS data area: segment of the extended BIOS data area (u16).
const EBDA_POINTER: u64 = 0x40E;

/// The physical address of a valid RSDP, if there is one.
pub fn scan(memory: &impl PhysicalMemory) -> Option<u64> {
    let ebda = u64::from(memory.get::<u16>(EBDA_POINTER)) << 4;
    let in_ebda = if (0x8_0000..0xA_0000).contains(&ebda) {
        (ebda..ebda + 1024)
            .step_by(16)
            .find(|&address| is_rsdp(memory, address))
    } else {
        None
    };
    in_ebda.or_else(|| {
        BIOS_AREA
            .step_by(16)
            .find(|&address| is_rsdp(memory, address))
    })
}

/// Whether the signature is there and the first 20 bytes sum to zero (ACPI 6.5, section 5.2.5.3).
fn is_rsdp(memory: &impl PhysicalMemory, address: u64) -> bool {
    if memory.get::<[u8; 8]>(address) != *b"RSD PTR " {
        return false;
    }
    memory
        .get::<[u8; 20]>(address)
        .iter()
        .fold(0u8, |sum, &byte| sum.wrapping_add(byte))
        == 0
}

#[cfg(test)]
mod tests {
    use super::super::fake::Memory;
    use super::*;

    fn rsdp() -> [u8; 20] {
        let mut bytes = [0; 20];
        bytes[..8].copy_from_slice(b"RSD PTR ");
        bytes[16] = 0x55;
        let sum = bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        bytes[8] = 0u8.wrapping_sub(sum);
        bytes
    }

    #[test]
    fn found_in_the_bios_area() {
        let mut memory = Memory::default();
        memory.put(0xE_0000, b"RSD PTR but a wrong sum");
        memory.put(0xF_5AD0, &rsdp());
        assert_eq!(scan(&memory), Some(0xF_5AD0));
    }

    #[test]
    fn the_extended_bios_data_area_comes_first() {
        let mut memory = Memory::default();
        memory.put(EBDA_POINTER, &0x9FC0u16.to_le_bytes());
        memory.put(0x9_FC20, &rsdp());
        memory.put(0xF_5AD0, &rsdp());
        assert_eq!(scan(&memory), Some(0x9_FC20));
    }

    #[test]
    fn nothing_found_is_none() {
        assert_eq!(scan(&Memory::default()), None);
    }
}
