//! A look at the firmware's ACPI tables before the `acpi` crate reads them.
//!
//! The crate trusts the lengths in them. They come from the host, so every length that it will follow is checked
//! here first (ACPI 6.5, section 5.2).

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::boot::PhysicalMemory;

/// No table that matters here is longer.
const MAX_LENGTH: u32 = 1 << 20;

/// The most tables that a root table may name.
const MAX_TABLES: u32 = 256;

/// The header of every table.
#[derive(FromBytes, IntoBytes, Immutable, Clone, Copy, Debug)]
#[repr(C)]
struct Header {
    signature: [u8; 4],
    length: u32,
    revision: u8,
    checksum: u8,
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: u32,
    creator_id: u32,
    creator_revision: u32,
}

const _: () = assert!(size_of::<Header>() == HEADER as usize);

const HEADER: u32 = 36;

/// What is wrong with the tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The root pointer is not one, or of a form that does not exist.
    RootPointer,
    /// A table lies where no memory can be.
    Address(u64),
    /// A table's length is impossible.
    Length {
        /// The table's name.
        signature: [u8; 4],
        /// What it says.
        length: u32,
    },
    /// An entry of the MADT does not fit into it.
    Entry {
        /// Where in the table.
        offset: u32,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RootPointer => f.write_str("the root pointer is not valid"),
            Self::Address(address) => write!(f, "a table at {address:#x} cannot be"),
            Self::Length { signature, length } => {
                write!(
                    f,
                    "table {} cannot be {length} bytes long",
                    signature.escape_ascii()
                )
            }
            Self::Entry { offset } => {
                write!(
                    f,
                    "the MADT's entry at offset {offset} does not fit into it"
                )
            }
        }
    }
}

/// Follows every length and address that the `acpi` crate will follow, from the root pointer at
/// `rsdp`. Memory above `end` does not exist.
pub fn check(memory: &impl PhysicalMemory, rsdp: u64, end: u64) -> Result<(), Fault> {
    let checker = Checker { memory, end };
    checker.reach(rsdp, HEADER)?;
    if memory.get::<[u8; 8]>(rsdp) != *b"RSD PTR " {
        return Err(Fault::RootPointer);
    }
    let (root, entry_size) = if memory.get::<u8>(rsdp + 15) == 0 {
        (u64::from(memory.get::<u32>(rsdp + 16)), 4)
    } else {
        if memory.get::<u32>(rsdp + 20) != HEADER {
            return Err(Fault::RootPointer);
        }
        (memory.get::<u64>(rsdp + 24), 8)
    };
    let header = checker.header(root)?;
    let entries = (header.length - HEADER) / entry_size;
    if entries > MAX_TABLES {
        return Err(length(&header));
    }
    for i in 0..entries {
        let at = root + u64::from(HEADER + i * entry_size);
        let table = match entry_size {
            4 => u64::from(memory.get::<u32>(at)),
            _ => memory.get::<u64>(at),
        };
        let header = checker.header(table)?;
        match &header.signature {
            b"FACP" => checker.fadt(table, &header)?,
            b"APIC" => checker.madt(table, &header)?,
            _ => {}
        }
    }
    Ok(())
}

struct Checker<'a, M> {
    memory: &'a M,
    end: u64,
}

impl<M: PhysicalMemory> Checker<'_, M> {
    /// Whether memory can be there.
    fn reach(&self, address: u64, length: u32) -> Result<(), Fault> {
        let end = address.checked_add(u64::from(length));
        match end {
            Some(end) if address != 0 && end <= self.end => Ok(()),
            _ => Err(Fault::Address(address)),
        }
    }

    fn header(&self, address: u64) -> Result<Header, Fault> {
        self.reach(address, HEADER)?;
        let header: Header = self.memory.get(address);
        if !(HEADER..=MAX_LENGTH).contains(&header.length) {
            return Err(length(&header));
        }
        self.reach(address, header.length)?;
        Ok(header)
    }

    fn fadt(&self, address: u64, header: &Header) -> Result<(), Fault> {
        // The table of ACPI 1.0 ends here.
        if header.length < 116 {
            return Err(length(header));
        }
        let mut dsdt = u64::from(self.memory.get::<u32>(address + 40));
        if header.length >= 148 {
            let extended = self.memory.get::<u64>(address + 140);
            if extended != 0 {
                dsdt = extended;
            }
        }
        self.header(dsdt).map(|_| ())
    }

    fn madt(&self, address: u64, header: &Header) -> Result<(), Fault> {
        let mut offset = 44;
        if header.length < offset {
            return Err(length(header));
        }
        while offset < header.length {
            let rest = header.length - offset;
            let [kind, size] = match rest {
                1 => return Err(Fault::Entry { offset }),
                _ => self.memory.get::<[u8; 2]>(address + u64::from(offset)),
            };
            // Section 5.2.12: the entries that the crate knows have these lengths.
            let least = match kind {
                0 | 3 | 8 => 8,
                1 | 5 | 10 => 12,
                2 => 10,
                4 => 6,
                6 | 7 | 9 => 16,
                11 => 80,
                12 => 24,
                13 => 24,
                14 => 16,
                15 => 20,
                16 => 16,
                _ => 2,
            };
            if size < least || u32::from(size) > rest {
                return Err(Fault::Entry { offset });
            }
            offset += u32::from(size);
        }
        Ok(())
    }
}

fn length(header: &Header) -> Fault {
    Fault::Length {
        signature: header.signature,
        length: header.length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::fake::Memory;
    use proptest::prelude::*;
    use std::vec::Vec;

    const END: u64 = 1 << 32;

    fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::from(signature);
        bytes.extend((HEADER + body.len() as u32).to_le_bytes());
        bytes.resize(HEADER as usize, 0);
        bytes.extend(body);
        bytes
    }

    /// Tables as QEMU lays them out: RSDT with FADT and MADT.
    fn machine() -> Memory {
        let mut memory = Memory::default();
        let mut rsdp = *b"RSD PTR \0QEMU  \0\0\x10\x10\0";
        rsdp[15] = 0;
        memory.put(0xF_0000, &rsdp[..]);
        memory.put(0xF_0010, &0x10_1000u32.to_le_bytes());
        let entries: Vec<u8> = [0x10_2000u32, 0x10_3000]
            .iter()
            .flat_map(|address| address.to_le_bytes())
            .collect();
        memory.put(0x10_1000, &table(b"RSDT", &entries));
        let mut fadt = [0; 208];
        fadt[4..8].copy_from_slice(&0x10_4000u32.to_le_bytes());
        memory.put(0x10_2000, &table(b"FACP", &fadt));
        let mut madt = std::vec![0; 8];
        madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        madt.extend([1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        memory.put(0x10_3000, &table(b"APIC", &madt));
        memory.put(0x10_4000, &table(b"DSDT", b"byte code"));
        memory
    }

    #[test]
    fn good_tables_pass() {
        assert_eq!(check(&machine(), 0xF_0000, END), Ok(()));
    }

    #[test]
    fn lengths_that_would_lead_astray_are_found() {
        for (at, bytes, fault) in [
            (
                0x10_1004,
                0u32,
                Fault::Length {
                    signature: *b"RSDT",
                    length: 0,
                },
            ),
            (
                0x10_1004,
                35,
                Fault::Length {
                    signature: *b"RSDT",
                    length: 35,
                },
            ),
            (
                0x10_1004,
                0x8000,
                Fault::Length {
                    signature: *b"RSDT",
                    length: 0x8000,
                },
            ),
            (
                0x10_2004,
                115,
                Fault::Length {
                    signature: *b"FACP",
                    length: 115,
                },
            ),
            (
                0x10_3004,
                40,
                Fault::Length {
                    signature: *b"APIC",
                    length: 40,
                },
            ),
            (
                0x10_4004,
                u32::MAX,
                Fault::Length {
                    signature: *b"DSDT",
                    length: u32::MAX,
                },
            ),
            (0x10_2028, 0xFFFF_FFF0, Fault::Address(0xFFFF_FFF0)),
            (0x10_1024, 0, Fault::Address(0)),
        ] {
            let mut memory = machine();
            memory.put(at, &bytes.to_le_bytes());
            assert_eq!(check(&memory, 0xF_0000, END), Err(fault));
        }
    }

    #[test]
    fn an_entry_of_length_zero_ends_the_walk() {
        let mut memory = machine();
        memory.put(0x10_3000 + 44, &[0, 0]);
        assert_eq!(
            check(&memory, 0xF_0000, END),
            Err(Fault::Entry { offset: 44 })
        );
    }

    proptest! {
        #[test]
        fn no_bytes_keep_it_busy(changes in proptest::collection::vec((0u64..0x140, 0u64..5, any::<u8>()), 1..12)) {
            let mut memory = machine();
            for (offset, place, byte) in changes {
                let base = [0xF_0000, 0x10_1000, 0x10_2000, 0x10_3000, 0x10_4000][place as usize];
                memory.put(base + offset, &[byte]);
            }
            // Ends, without a panic; what it says is not the point here.
            let _ = check(&memory, 0xF_0000, END);
        }
    }
}
