//! Strips an ELF for booting: everything up to the last byte that is loaded
//! stays where it is; symbols and debug information behind it go. A new section
//! table names the sections that are left.

use anyhow::{Context, Result, ensure};
use object::{
    LittleEndian as LE, U16, U32, U64,
    elf::{self, FileHeader64, SectionHeader64},
    pod,
    read::elf::{FileHeader, ProgramHeader, SectionHeader},
};

/// Name of the section with the section names, its own included.
const NAMES: &[u8] = b".shstrtab";

/// A copy of `elf` without what is not loaded. Program headers stay as they
/// are; allocated sections keep their headers.
///
/// # Errors
/// When `elf` is no little-endian 64-bit ELF, or a broken one.
pub fn strip(elf: &[u8]) -> Result<Vec<u8>> {
    let header = FileHeader64::<LE>::parse(elf).context("this is no ELF file")?;
    let endian = header
        .endian()
        .context("this ELF file is of the wrong kind")?;
    let segments = header.program_headers(endian, elf)?;
    let sections = header.sections(endian, elf)?;
    let kept: Vec<_> = sections
        .iter()
        .enumerate()
        .filter(|(_, section)| section.sh_flags(endian) & u64::from(elf::SHF_ALLOC) != 0)
        .collect();

    let segment_ends = segments
        .iter()
        .map(|segment| segment.p_offset(endian) + segment.p_filesz(endian));
    let section_ends = kept
        .iter()
        .filter_map(|(_, section)| section.file_range(endian))
        .map(|(offset, size)| offset + size);
    let table_end =
        header.e_phoff(endian) + u64::from(header.e_phentsize(endian)) * segments.len() as u64;
    let end = segment_ends
        .chain(section_ends)
        .chain([table_end])
        .max()
        .unwrap_or(table_end);
    let mut stripped = elf
        .get(..usize::try_from(end)?)
        .context("a part of it lies outside the file")?
        .to_vec();

    // New section numbers: the empty one, the kept ones, the names.
    let number = |old: u32| {
        kept.iter()
            .position(|(index, _)| *index == old as usize)
            .map_or(0, |position| position as u32 + 1)
    };
    let mut names = vec![0];
    let mut table = vec![empty()];
    for (_, section) in &kept {
        let mut section = **section;
        let name = sections.section_name(endian, &section)?;
        section.sh_name = U32::new(LE, push_name(&mut names, name)?);
        section.sh_link = U32::new(LE, number(section.sh_link(endian)));
        table.push(section);
    }
    let own_name = push_name(&mut names, NAMES)?;
    table.push(SectionHeader64 {
        sh_name: U32::new(LE, own_name),
        sh_type: U32::new(LE, elf::SHT_STRTAB),
        sh_offset: U64::new(LE, stripped.len() as u64),
        sh_size: U64::new(LE, names.len() as u64),
        sh_addralign: U64::new(LE, 1),
        ..empty()
    });
    stripped.extend_from_slice(&names);
    stripped.resize(stripped.len().next_multiple_of(8), 0);
    let table_offset = stripped.len() as u64;
    stripped.extend_from_slice(pod::bytes_of_slice(&table));

    let mut new_header = *header;
    new_header.e_shoff = U64::new(LE, table_offset);
    new_header.e_shnum = U16::new(LE, u16::try_from(table.len())?);
    new_header.e_shstrndx = U16::new(LE, u16::try_from(table.len() - 1)?);
    let head = pod::bytes_of(&new_header);
    ensure!(
        stripped.len() >= head.len(),
        "it is shorter than its header"
    );
    stripped[..head.len()].copy_from_slice(head);
    Ok(stripped)
}

/// Adds a name; gives its place.
fn push_name(names: &mut Vec<u8>, name: &[u8]) -> Result<u32> {
    let place = u32::try_from(names.len())?;
    names.extend_from_slice(name);
    names.push(0);
    Ok(place)
}

/// The header that every section table begins with.
fn empty() -> SectionHeader64<LE> {
    let none = U64::new(LE, 0);
    let zero = U32::new(LE, 0);
    SectionHeader64 {
        sh_name: zero,
        sh_type: zero,
        sh_flags: none,
        sh_addr: none,
        sh_offset: none,
        sh_size: none,
        sh_link: zero,
        sh_info: zero,
        sh_addralign: none,
        sh_entsize: none,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This very test program is an ELF with everything that can be stripped.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_loaded_stays_and_the_rest_goes() {
        use object::{Object, ObjectSection, ObjectSegment};

        let before = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let after = strip(&before).unwrap();
        assert!(after.len() < before.len() / 2);
        let (before, after) = (
            object::File::parse(&*before).unwrap(),
            object::File::parse(&*after).unwrap(),
        );
        assert_eq!(before.entry(), after.entry());
        for (index, (old, new)) in before.segments().zip(after.segments()).enumerate() {
            assert_eq!(old.address(), new.address());
            assert_eq!(old.size(), new.size());
            assert_eq!(old.flags(), new.flags());
            // The first segment holds the ELF header, which has changed.
            let skip = if index == 0 {
                size_of::<FileHeader64<LE>>()
            } else {
                0
            };
            assert!(old.data().unwrap()[skip..] == new.data().unwrap()[skip..]);
        }
        for name in [".text", ".rodata", ".bss", ".dynamic", ".eh_frame"] {
            let (old, new) = (
                before.section_by_name(name).unwrap(),
                after.section_by_name(name).unwrap(),
            );
            assert_eq!(old.address(), new.address());
            assert!(old.data().unwrap() == new.data().unwrap());
        }
        for name in [".symtab", ".strtab", ".debug_info", ".debug_line"] {
            assert!(before.section_by_name(name).is_some());
            assert!(after.section_by_name(name).is_none());
        }
        // `.dynsym` keeps its link to `.dynstr`, whatever its number is now.
        assert_eq!(
            before.dynamic_symbols().count(),
            after.dynamic_symbols().count()
        );
    }

    #[test]
    fn stripping_twice_changes_nothing_more() {
        let once = strip(&crate::floor::elf()).unwrap();
        assert_eq!(strip(&once).unwrap(), once);
    }

    #[test]
    fn what_is_no_elf_is_refused() {
        assert!(strip(b"MZ no ELF").is_err());
        let mut cut = crate::floor::elf();
        cut.truncate(cut.len() - 1);
        assert!(strip(&cut).is_err());
    }
}
