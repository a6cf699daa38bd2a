//! Strips an ELF for booting: what is loaded stays where it is, byte for byte;
//! symbols, debug information and the sections that name them go.

use anyhow::{Context, Result};
use object::{build::elf::Builder, elf::SHF_ALLOC};

/// A copy of `elf` without what is not loaded. All allocated sections keep
/// their headers, and program headers stay as they are.
///
/// # Errors
/// When `elf` is no ELF file, or a broken one.
pub fn strip(elf: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(elf).context("this is no ELF file")?;
    for section in &mut builder.sections {
        let names = matches!(section.data, object::build::elf::SectionData::SectionString);
        section.delete = section.sh_flags & u64::from(SHF_ALLOC) == 0 && !names;
    }
    for symbol in &mut builder.symbols {
        symbol.delete = true;
    }
    builder.delete_orphans();
    let mut bytes = Vec::new();
    builder.write(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use object::{Object, ObjectSection, ObjectSegment};

    use super::*;

    /// This very test program is an ELF with everything that can be stripped.
    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_loaded_stays_and_the_rest_goes() {
        let before = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let after = strip(&before).unwrap();
        assert!(after.len() < before.len() / 2);
        let (before, after) = (
            object::File::parse(&*before).unwrap(),
            object::File::parse(&*after).unwrap(),
        );
        assert_eq!(before.entry(), after.entry());
        let segments = |file: &object::File| -> Vec<_> {
            file.segments()
                .map(|segment| {
                    let data = segment.data().unwrap().to_vec();
                    (segment.address(), segment.size(), segment.flags(), data)
                })
                .collect()
        };
        let (old, new) = (segments(&before), segments(&after));
        assert_eq!(old.len(), new.len());
        // The first segment holds the ELF header, which points to the section
        // headers and so differs.
        assert_eq!(old[1..], new[1..]);
        assert!(before.section_by_name(".symtab").is_some());
        assert!(after.section_by_name(".symtab").is_none());
        assert!(after.section_by_name(".debug_line").is_none());
        assert_eq!(
            before.section_by_name(".text").unwrap().data().unwrap(),
            after.section_by_name(".text").unwrap().data().unwrap()
        );
    }

    #[test]
    fn what_is_no_elf_is_refused() {
        assert!(strip(b"MZ no ELF").is_err());
    }
}
