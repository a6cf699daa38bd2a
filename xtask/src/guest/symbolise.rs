//! Turns addresses of a guest's report into functions and lines of source.

use std::{fs, ops::Range, path::Path, sync::LazyLock};

use addr2line::Loader;
use anyhow::{Context, Result, anyhow};
use object::{
    LittleEndian, Object, ObjectSection, SectionKind,
    read::elf::{ElfFile64, ProgramHeader},
};
use regex::Regex;

/// Looks addresses up in an unstripped ELF.
pub struct Symboliser {
    loader: Loader,
    /// Where the program's code is.
    code: Vec<Range<u64>>,
    /// Linked address less load address.
    offset: u64,
    frame: Regex,
}

impl Symboliser {
    /// Opens the ELF.
    pub fn open(symbols: &Path) -> Result<Self> {
        let read = || format!("cannot read {}", symbols.display());
        let bytes = fs::read(symbols).with_context(read)?;
        let elf = ElfFile64::<LittleEndian>::parse(&*bytes).with_context(read)?;
        let offset = elf
            .elf_program_headers()
            .iter()
            .find(|header| header.p_type(LittleEndian) == object::elf::PT_LOAD)
            .map_or(0, |header| {
                header
                    .p_vaddr(LittleEndian)
                    .wrapping_sub(header.p_paddr(LittleEndian))
            });
        let code = elf
            .sections()
            .filter(|section| section.kind() == SectionKind::Text)
            .map(|section| section.address()..section.address() + section.size())
            .collect();
        Ok(Self {
            code,
            offset,
            loader: Loader::new(symbols)
                .map_err(|error| anyhow!("cannot read {}: {error}", symbols.display()))?,
            frame: Regex::new(r"#(\d+) +0x([0-9a-fA-F]{16})\b")?,
        })
    }

    /// The lines that belong below a line of a report: one for each function,
    /// inlined ones first. Empty when the line names no address of the guest.
    ///
    /// A report's line holds `#N 0xADDRESS`. From number 1 on, addresses are
    /// return addresses: the call is the instruction before.
    pub fn below(&self, line: &str) -> Vec<String> {
        let Some(groups) = self.frame.captures(line) else {
            return Vec::new();
        };
        let is_call = groups[1].bytes().any(|digit| digit != b'0');
        let Ok(address) = u64::from_str_radix(&groups[2], 16) else {
            return Vec::new();
        };
        self.frames(address.saturating_sub(u64::from(is_call)))
            .iter()
            .map(|frame| format!("        {frame}"))
            .collect()
    }

    /// The function that an address belongs to, without inlining; `None` outside
    /// the program.
    pub fn function(&self, address: u64) -> Option<String> {
        if !self.has(address) {
            return None;
        }
        let name = self.loader.find_symbol(address)?;
        Some(tidy(&demangle(name)))
    }

    /// The function that executes at `address`, and behind it the inlined one,
    /// if the instruction is of one. An entry that still runs by physical
    /// addresses is looked up where it is linked. Unknown ones are given as
    /// numbers.
    pub fn function_of_instruction(&self, address: u64) -> String {
        let linked = if self.has(address) {
            address
        } else {
            address.wrapping_add(self.offset)
        };
        let Some(outer) = self.function(linked) else {
            return format!("{address:#x}");
        };
        match self.names(linked).first() {
            Some(inner) if *inner != outer => format!("{outer} ({inner})"),
            _ => outer,
        }
    }

    /// Names of the functions at an address, from the innermost inlined one out.
    fn names(&self, address: u64) -> Vec<String> {
        let mut names = Vec::new();
        if let Ok(mut frames) = self.loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                names.extend(
                    frame
                        .function
                        .and_then(|function| Some(tidy(&function.demangle().ok()?))),
                );
            }
        }
        names
    }

    /// Function and place for an address, from the innermost inlined function
    /// out.
    pub fn frames(&self, address: u64) -> Vec<String> {
        if !self.has(address) {
            return Vec::new();
        }
        let mut found = Vec::new();
        if let Ok(mut frames) = self.loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let name = frame
                    .function
                    .and_then(|function| Some(tidy(&function.demangle().ok()?)));
                let place = frame.location.and_then(|location| {
                    let (file, line) = (location.file?, location.line.unwrap_or(0));
                    Some(format!("{}:{line}", in_workspace(file)))
                });
                found.push((name, place));
            }
        }
        // Line tables do not name a function that nothing was inlined into; symbols do.
        match found.last_mut() {
            Some((name, _)) if name.is_none() => *name = self.function(address),
            Some(_) => {}
            None => found.push((self.function(address), None)),
        }
        let line = |frame| match frame {
            (Some(name), Some(place)) => Some(format!("{name} at {place}")),
            (only, None) | (None, only) => only,
        };
        found.into_iter().filter_map(line).collect()
    }

    fn has(&self, address: u64) -> bool {
        self.code.iter().any(|range| range.contains(&address))
    }
}

/// The path of a source file from the top of the work tree, if it lies there.
fn in_workspace(file: &str) -> &str {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .and_then(|root| Path::new(file).strip_prefix(root).ok())
        .and_then(Path::to_str)
        .unwrap_or(file)
}

fn demangle(name: &str) -> String {
    rustc_demangle::demangle(name).to_string()
}

/// What the newer mangling puts behind a crate's name.
static CRATE_HASH: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\[[0-9a-f]{13,16}\]").unwrap_or_else(|_| unreachable!()));

/// A name without the compiler's hashes.
fn tidy(name: &str) -> String {
    let name = CRATE_HASH.replace_all(name, "");
    match name.rsplit_once("::h") {
        Some((front, hash)) if hash.len() == 16 && hash.bytes().all(|c| c.is_ascii_hexdigit()) => {
            front.to_owned()
        }
        _ => name.into_owned(),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[inline(never)]
    fn a_function_of_this_test() -> u64 {
        // Any body that is this function's own.
        std::hint::black_box(0x5eed)
    }

    /// Looks into this very test program; a position-independent one, so file
    /// addresses are the running ones less the load address.
    #[test]
    fn an_address_leads_to_its_function_and_line() {
        assert_eq!(a_function_of_this_test(), 0x5eed);
        let program = std::env::current_exe().unwrap();
        let symboliser = Symboliser::open(&program).unwrap();
        let bytes = fs::read(&program).unwrap();
        let file = object::File::parse(&*bytes).unwrap();
        use object::ObjectSymbol;
        let address = file
            .symbols()
            .find(|symbol| {
                symbol
                    .name()
                    .is_ok_and(|name| name.contains("a_function_of_this_test"))
            })
            .unwrap()
            .address();
        let report = format!("  #0 {address:#018x}");
        let below = symboliser.below(&report);
        assert!(
            below[0].contains("a_function_of_this_test at "),
            "{below:?}"
        );
        assert!(below[0].contains("symbolise.rs:"), "{below:?}");
        // As a return address the first byte belongs to what stands before.
        let below = symboliser.below(&format!("  #1 {address:#018x}"));
        assert!(
            !below
                .iter()
                .any(|line| line.contains("a_function_of_this_test"))
        );
    }

    #[test]
    fn other_lines_stay_as_they_are() {
        let symboliser = Symboliser::open(&std::env::current_exe().unwrap()).unwrap();
        assert!(symboliser.below("memory 0x0000000000001000").is_empty());
        assert!(symboliser.below("  #0 0xfffffffffffffff0").is_empty());
    }

    #[test]
    fn hashes_are_cut_off_names() {
        assert_eq!(tidy("a::b::h0123456789abcdef"), "a::b");
        assert_eq!(tidy("a::hello"), "a::hello");
        assert_eq!(tidy("core[bb170dea1013a3a3]::fmt"), "core::fmt");
    }
}
