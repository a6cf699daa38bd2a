//! Kernel files made by hand, good ones and broken ones.

use super::*;
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

const CODE: u64 = 0xFFFF_FFFF_8020_0000;

/// The makings of a small kernel file.
struct Maker {
    e_type: u16,
    machine: u16,
    /// Type, flags, address, bytes in the file, size in memory.
    segments: Vec<(u32, u32, u64, Vec<u8>, u64)>,
    sections: Vec<(&'static str, Vec<u8>)>,
}

impl Maker {
    fn new() -> Self {
        Self {
            e_type: abi::ET_EXEC,
            machine: abi::EM_X86_64,
            segments: vec![
                (
                    abi::PT_LOAD,
                    abi::PF_R | abi::PF_X,
                    CODE,
                    vec![0xC3; 64],
                    64,
                ),
                (
                    abi::PT_LOAD,
                    abi::PF_R | abi::PF_W,
                    CODE + 0x2010,
                    vec![7; 16],
                    0x3000,
                ),
                (
                    abi::PT_NOTE,
                    abi::PF_R,
                    0,
                    note(handover::NOTE_NAME, handover::NOTE_ENTRY, CODE + 8),
                    0,
                ),
            ],
            sections: vec![(
                handover::CONFIG_SECTION,
                BootloaderConfig::new_default().serialize().to_vec(),
            )],
        }
    }

    fn make(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let start = 64 + 56 * self.segments.len();
        let mut add = |bytes: &[u8]| {
            let offset = (start + body.len()) as u64;
            body.extend_from_slice(bytes);
            offset
        };
        let mut headers = Vec::new();
        for (p_type, flags, address, bytes, size) in &self.segments {
            let offset = add(bytes);
            let align = if *p_type == abi::PT_NOTE {
                4
            } else {
                PAGE_SIZE
            };
            headers.extend(p_type.to_le_bytes());
            headers.extend(flags.to_le_bytes());
            for field in [offset, *address, *address, bytes.len() as u64, *size, align] {
                headers.extend(field.to_le_bytes());
            }
        }
        let mut names = vec![0];
        let mut sections = vec![0; 64];
        let mut section = |name: &str,
                           names: &mut Vec<u8>,
                           kind: u32,
                           bytes: &[u8],
                           add: &mut dyn FnMut(&[u8]) -> u64| {
            let name_offset = names.len() as u32;
            names.extend(name.as_bytes());
            names.push(0);
            let bytes = if kind == abi::SHT_STRTAB {
                names.clone()
            } else {
                bytes.to_vec()
            };
            sections.extend(name_offset.to_le_bytes());
            sections.extend(kind.to_le_bytes());
            for field in [0, 0, add(&bytes), bytes.len() as u64, 0, 1, 0] {
                sections.extend(field.to_le_bytes());
            }
        };
        for (name, bytes) in &self.sections {
            section(name, &mut names, abi::SHT_PROGBITS, bytes, &mut add);
        }
        section(".shstrtab", &mut names, abi::SHT_STRTAB, &[], &mut add);
        let section_offset = add(&sections);

        let mut file = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        file.extend(self.e_type.to_le_bytes());
        file.extend(self.machine.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        for field in [0, 64, section_offset] {
            file.extend(u64::to_le_bytes(field));
        }
        file.extend(0_u32.to_le_bytes());
        let section_count = self.sections.len() as u16 + 2;
        for field in [
            64,
            56,
            self.segments.len() as u16,
            64,
            section_count,
            section_count - 1,
        ] {
            file.extend(field.to_le_bytes());
        }
        file.extend(headers);
        file.extend(body);
        file
    }
}

fn note(name: &[u8], kind: u32, address: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((name.len() as u32).to_le_bytes());
    bytes.extend(8_u32.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(name);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(address.to_le_bytes());
    bytes
}

macro_rules! assert_refused {
    ($maker:expr, $error:pat) => {
        match Kernel::parse(&$maker.make()).map(|_| ()) {
            Err($error) => (),
            other => panic!("{other:?}"),
        }
    };
}

#[test]
fn a_good_kernel_is_understood_and_loaded() {
    let file = Maker::new().make();
    let kernel = Kernel::parse(&file).unwrap();
    assert_eq!(kernel.entry(), CODE + 8);
    assert_eq!(kernel.span(), CODE..CODE + 0x6000);
    assert_eq!(kernel.config(), &BootloaderConfig::new_default());
    assert_eq!(kernel.tls_template(), None);
    let segments: Vec<_> = kernel.segments().collect();
    assert_eq!(segments[0].rights, Rights::Execute);
    assert_eq!(segments[1].rights, Rights::Write);
    assert_eq!(segments[1].pages(), CODE + 0x2000..CODE + 0x6000);

    let mut memory = vec![0; 0x6000];
    kernel.load(&mut memory);
    assert_eq!(memory[..64], [0xC3; 64]);
    assert!(memory[64..0x2010].iter().all(|&byte| byte == 0));
    assert_eq!(memory[0x2010..0x2020], [7; 16]);
    assert!(memory[0x2020..].iter().all(|&byte| byte == 0));
}

#[test]
fn other_files_are_refused() {
    assert!(matches!(
        Kernel::parse(b"MZ\x90\0"),
        Err(ImageError::Malformed(_))
    ));
    assert_refused!(
        Maker {
            machine: abi::EM_AARCH64,
            ..Maker::new()
        },
        ImageError::Machine
    );
    assert_refused!(
        Maker {
            e_type: abi::ET_DYN,
            ..Maker::new()
        },
        ImageError::NotFixed
    );
    assert_refused!(
        Maker {
            sections: vec![],
            ..Maker::new()
        },
        ImageError::NoConfig
    );
}

#[test]
fn a_dynamic_kernel_is_refused() {
    let mut maker = Maker::new();
    maker
        .segments
        .push((abi::PT_DYNAMIC, abi::PF_R, CODE, vec![0; 16], 16));
    assert_refused!(maker, ImageError::NotFixed);
}

#[test]
fn writable_code_is_refused() {
    let mut maker = Maker::new();
    maker.segments[0].1 |= abi::PF_W;
    assert_refused!(maker, ImageError::WritableCode);
}

#[test]
fn segments_must_not_share_a_page_nor_leave_the_address_space() {
    let mut maker = Maker::new();
    maker.segments[1].2 = CODE + 0x800;
    assert_refused!(maker, ImageError::SharedPage);
    maker.segments[1].2 = CODE - 0x10_0000;
    assert_refused!(maker, ImageError::SharedPage);
    maker.segments[1].2 = u64::MAX - 0x100;
    assert_refused!(maker, ImageError::Bounds);
    maker = Maker::new();
    maker.segments[0].4 = 32;
    assert_refused!(maker, ImageError::Bounds);
}

#[test]
fn the_entry_must_be_named_and_be_code() {
    let mut maker = Maker::new();
    maker.segments[2].3 = note(b"Xen\0", 18, CODE);
    assert_refused!(maker, ImageError::NoEntry);
    maker.segments[2].3 = note(handover::NOTE_NAME, handover::NOTE_ENTRY, CODE + 0x2010);
    assert_refused!(maker, ImageError::EntryOutsideCode);
    maker.segments[2].3 = note(handover::NOTE_NAME, handover::NOTE_ENTRY, CODE + 64);
    assert_refused!(maker, ImageError::EntryOutsideCode);
}

#[test]
fn the_configuration_must_be_of_this_version() {
    let mut maker = Maker::new();
    maker.sections[0].1[18] ^= 1;
    assert_refused!(maker, ImageError::Config("made for another version"));
    maker.sections[0].1[0] ^= 1;
    assert_refused!(maker, ImageError::Config(_));
    maker.sections[0].1.pop();
    assert_refused!(maker, ImageError::Config(_));
}

proptest! {
    /// Whatever is done to a file: it is refused, or it can be loaded within its span.
    #[test]
    fn a_damaged_file_is_refused_or_loads(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        len in any::<prop::sample::Index>(),
        cut in prop::bool::weighted(0.2),
    ) {
        let mut file = Maker::new().make();
        for (index, byte) in damage {
            let index = index.index(file.len());
            file[index] = byte;
        }
        if cut {
            file.truncate(len.index(file.len()));
        }
        if let Ok(kernel) = Kernel::parse(&file) {
            let span = kernel.span();
            for segment in kernel.segments() {
                prop_assert!(span.start <= segment.address);
                prop_assert!(segment.pages().end <= span.end);
            }
            if span.end - span.start < 1 << 24 {
                kernel.load(&mut vec![0; (span.end - span.start) as usize]);
            }
        }
    }
}
