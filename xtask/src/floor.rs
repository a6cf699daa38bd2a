//! The floor guest: the least that QEMU boots by PVH. It says a word on COM1
//! and ends, and so shows what QEMU and its firmware cost every guest.

/// What it prints.
pub const WORD: &str = "floor";

/// What it writes to the debug-exit port.
pub const CODE: u8 = 0x2a;

/// Where it is loaded: the first byte above the first megabyte, whose pages
/// belong to the firmware.
const BASE: u32 = 0x10_0000;

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Three words, "Xen\0", a word, and padding: QEMU reads 8 bytes of it.
const NOTE: usize = 24;
const HEADERS: usize = ELF_HEADER + 2 * PROGRAM_HEADER + NOTE;

/// How the guest ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By the debug-exit port, with [`CODE`].
    DebugExit,
    /// Not at all: it halts with interrupts off.
    Halt,
}

/// The guest as an ELF file.
pub fn elf(end: End) -> Vec<u8> {
    let code = code(end);
    let entry = BASE + HEADERS as u32;
    let size = HEADERS as u64 + code.len() as u64;
    let mut file = Vec::new();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);

    // ELF header: 64 bits, little endian, version 1, System V.
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&2_u16.to_le_bytes()); // executable
    put(&62_u16.to_le_bytes()); // x86-64
    put(&1_u32.to_le_bytes()); // version
    put(&u64::from(entry).to_le_bytes());
    put(&(ELF_HEADER as u64).to_le_bytes()); // program headers
    put(&0_u64.to_le_bytes()); // no section headers
    put(&0_u32.to_le_bytes()); // flags
    for size in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 2, 64, 0, 0] {
        put(&size.to_le_bytes());
    }

    // One segment with the whole file, and the note inside it.
    let mut program_header = |kind: u32, flags: u32, offset: usize, size: u64, align: u64| {
        let address = u64::from(BASE) + offset as u64;
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        for field in [offset as u64, address, address, size, size, align] {
            put(&field.to_le_bytes());
        }
    };
    program_header(1, 5, 0, size, 4096);
    program_header(4, 4, HEADERS - NOTE, NOTE as u64, 4);

    // Note "Xen", type 18: the 32-bit entry.
    put(&4_u32.to_le_bytes());
    put(&4_u32.to_le_bytes());
    put(&18_u32.to_le_bytes());
    put(b"Xen\0");
    put(&entry.to_le_bytes());
    put(&[0; 4]);

    put(&code);
    file
}

/// 32-bit machine code. COM1's FIFO takes the word without being asked.
fn code(end: End) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for byte in WORD.bytes().chain(*b"\n") {
        code.extend([0xb0, byte, 0xee]); // mov al, byte; out dx, al
    }
    if end == End::DebugExit {
        code.extend([0x66, 0xba, 0xf4, 0x00]); // mov dx, 0xf4
        code.extend([0xb0, CODE, 0xee]); // mov al, CODE; out dx, al
    }
    code.extend([0xfa, 0xf4, 0xeb, 0xfd]); // cli; again: hlt; jmp again
    code
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSegment, read::elf::ElfFile64};

    use super::*;

    #[test]
    fn it_is_an_elf_with_a_pvh_entry_inside_its_segment() {
        let elf = elf(End::DebugExit);
        let file = ElfFile64::<object::Endianness>::parse(&*elf).unwrap();
        let segment = file.segments().next().unwrap();
        assert_eq!(segment.address(), u64::from(BASE));
        assert_eq!(segment.size(), elf.len() as u64);
        let code = (file.entry() - u64::from(BASE)) as usize;
        assert_eq!(&elf[code..code + 4], &[0x66, 0xba, 0xf8, 0x03]);
        let note = &elf[HEADERS - NOTE..HEADERS];
        assert_eq!(&note[12..16], b"Xen\0");
        assert_eq!(
            u64::from(u32::from_le_bytes(note[16..20].try_into().unwrap())),
            file.entry()
        );
    }
}
