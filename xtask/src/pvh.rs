//! ELF files that QEMU starts by PVH, written from scratch.

/// A piece of memory that the file fills.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its physical address.
    pub address: u32,
    /// What is in the file.
    pub bytes: Vec<u8>,
    /// Bytes in memory; those that are not in the file are zero.
    pub size: u32,
}

impl Segment {
    /// A segment that is in the file from end to end.
    pub fn new(address: u32, bytes: Vec<u8>) -> Self {
        let size = bytes.len() as u32;
        Self {
            address,
            bytes,
            size,
        }
    }
}

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// Three words, "Xen\0", a word, and padding: QEMU reads 8 bytes of it.
const NOTE: usize = 24;

/// An executable of these segments that starts at `entry`, in 32-bit code.
pub fn elf(segments: &[Segment], entry: u32) -> Vec<u8> {
    let note = ELF_HEADER + PROGRAM_HEADER * (segments.len() + 1);
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
    let headers = segments.len() as u16 + 1;
    for size in [ELF_HEADER as u16, PROGRAM_HEADER as u16, headers, 64, 0, 0] {
        put(&size.to_le_bytes());
    }

    let mut program_header = |kind: u32, flags: u32, offset: usize, fields: [u64; 5]| {
        put(&kind.to_le_bytes());
        put(&flags.to_le_bytes());
        put(&(offset as u64).to_le_bytes());
        for field in fields {
            put(&field.to_le_bytes());
        }
    };
    let mut offset = note + NOTE;
    for segment in segments {
        // Virtual and physical address, size in the file and in memory, alignment.
        let address = u64::from(segment.address);
        let [in_file, in_memory] = [segment.bytes.len() as u64, u64::from(segment.size)];
        program_header(1, 7, offset, [address, address, in_file, in_memory, 1]);
        offset += segment.bytes.len();
    }
    program_header(4, 4, note, [0, 0, NOTE as u64, NOTE as u64, 4]);

    // Note "Xen", type 18: the 32-bit entry.
    put(&4_u32.to_le_bytes());
    put(&4_u32.to_le_bytes());
    put(&18_u32.to_le_bytes());
    put(b"Xen\0");
    put(&entry.to_le_bytes());
    put(&[0; 4]);

    for segment in segments {
        put(&segment.bytes);
    }
    file
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSegment, read::elf::ElfFile64};

    use super::*;

    #[test]
    fn it_is_an_elf_with_a_pvh_entry() {
        let elf = elf(
            &[
                Segment::new(0x10_0000, b"code".to_vec()),
                Segment {
                    address: 0x20_0000,
                    bytes: b"data".to_vec(),
                    size: 0x1000,
                },
            ],
            0x10_0002,
        );
        let file = ElfFile64::<object::Endianness>::parse(&*elf).unwrap();
        assert_eq!(file.entry(), 0x10_0002);
        let segments: Vec<_> = file
            .segments()
            .map(|segment| (segment.address(), segment.size(), segment.data().unwrap()))
            .collect();
        assert_eq!(
            segments,
            [
                (0x10_0000, 4, &b"code"[..]),
                (0x20_0000, 0x1000, &b"data"[..])
            ]
        );
        let note = &elf[ELF_HEADER + 3 * PROGRAM_HEADER..][..NOTE];
        assert_eq!(&note[12..16], b"Xen\0");
        assert_eq!(&note[16..20], &0x10_0002_u32.to_le_bytes());
    }
}
