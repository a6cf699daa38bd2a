//! The kernel's ELF file: what it asks for, checked, and its segments.
//!
//! Sources: System V ABI, ELF-64 object files (chapters "ELF header", "Program header", "Note
//! section"); the `handover` crate for the note and the section that are Enlit's own.

use bootloader_api::BootloaderConfig;
use bootloader_api::info::TlsTemplate;
use core::fmt;
use core::ops::Range;
use elf::ElfBytes;
use elf::abi;
use elf::endian::LittleEndian;
use elf::file::Class;
use elf::note::Note;
use elf::parse::ParseError;
use elf::segment::{ProgramHeader, SegmentTable};

/// Size of the smallest page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// What may be done with a page. There is no way to say "written and executed".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read only.
    Read,
    /// Read and write.
    Write,
    /// Read and execute.
    Execute,
}

/// A kernel file in which everything that a hand-over needs was found and makes sense.
pub struct Kernel<'a> {
    file: ElfBytes<'a, LittleEndian>,
    headers: SegmentTable<'a, LittleEndian>,
    span: Range<u64>,
    entry: u64,
    config: BootloaderConfig,
}

impl<'a> Kernel<'a> {
    /// Reads a kernel file.
    ///
    /// # Errors
    ///
    /// [`ImageError`] says what is wrong with the file.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let file = ElfBytes::<LittleEndian>::minimal_parse(bytes).map_err(ImageError::Malformed)?;
        if file.ehdr.class != Class::ELF64 || file.ehdr.e_machine != abi::EM_X86_64 {
            return Err(ImageError::Machine);
        }
        if file.ehdr.e_type != abi::ET_EXEC {
            return Err(ImageError::NotFixed);
        }
        let headers = file.segments().ok_or(ImageError::NoSegments)?;
        let mut kernel = Self {
            file,
            headers,
            span: 0..0,
            entry: 0,
            config: BootloaderConfig::new_default(),
        };
        kernel.span = kernel.check_segments()?;
        kernel.entry = kernel.find_entry()?;
        kernel.config = kernel.find_config()?;
        Ok(kernel)
    }

    /// The virtual addresses from the first segment's page to the last one's end, page aligned.
    /// What lies between two segments belongs to none.
    pub fn span(&self) -> Range<u64> {
        self.span.clone()
    }

    /// Virtual address of the [`handover::Entry`].
    pub fn entry(&self) -> u64 {
        self.entry
    }

    /// What the kernel asks of its loader.
    pub fn config(&self) -> &BootloaderConfig {
        &self.config
    }

    /// The template of thread-local storage, if the kernel has one.
    pub fn tls_template(&self) -> Option<TlsTemplate> {
        self.headers
            .iter()
            .find(|header| header.p_type == abi::PT_TLS)
            .map(|header| TlsTemplate {
                start_addr: header.p_vaddr,
                file_size: header.p_filesz,
                mem_size: header.p_memsz,
            })
    }

    /// The segments to load, sorted by address; no two of them touch the same page.
    pub fn segments(&self) -> impl Iterator<Item = Segment<'a>> {
        // `parse` has seen every one of them succeed.
        self.checked_segments().filter_map(Result::ok)
    }

    /// Copies the segments to where they belong. `memory` stands for [`Self::span`], and is zero
    /// beforehand.
    ///
    /// # Panics
    ///
    /// If `memory` is shorter than the span.
    pub fn load(&self, memory: &mut [u8]) {
        for segment in self.segments() {
            let start = (segment.address - self.span.start) as usize;
            memory[start..start + segment.data.len()].copy_from_slice(segment.data);
        }
    }

    fn checked_segments(&self) -> impl Iterator<Item = Result<Segment<'a>, ImageError>> {
        self.headers
            .iter()
            .filter(|header| header.p_type == abi::PT_LOAD && header.p_memsz != 0)
            .map(|header| Segment::new(&self.file, &header))
    }

    /// Checks all segments and returns their span.
    fn check_segments(&self) -> Result<Range<u64>, ImageError> {
        let relocated = [abi::PT_DYNAMIC, abi::PT_INTERP];
        if self.headers.iter().any(|h| relocated.contains(&h.p_type)) {
            return Err(ImageError::NotFixed);
        }
        let mut span: Option<Range<u64>> = None;
        for segment in self.checked_segments() {
            let pages = segment?.pages();
            span = match span {
                Some(span) if pages.start < span.end => return Err(ImageError::SharedPage),
                Some(span) => Some(span.start..pages.end),
                None => Some(pages),
            };
        }
        span.ok_or(ImageError::NoSegments)
    }

    fn find_entry(&self) -> Result<u64, ImageError> {
        let mut entry = None;
        for header in self.headers.iter().filter(|h| h.p_type == abi::PT_NOTE) {
            for note in self
                .file
                .segment_data_as_notes(&header)
                .map_err(ImageError::Malformed)?
            {
                if let Note::Unknown(note) = note
                    && note.name == handover::NOTE_NAME
                    && note.n_type == u64::from(handover::NOTE_ENTRY)
                {
                    let address = note.desc.try_into().map_err(|_| ImageError::NoEntry)?;
                    entry = Some(u64::from_le_bytes(address));
                }
            }
        }
        let entry = entry.ok_or(ImageError::NoEntry)?;
        let code = self.segments().any(|segment| {
            let end = segment.address + segment.data.len() as u64;
            segment.rights == Rights::Execute && (segment.address..end).contains(&entry)
        });
        if code {
            Ok(entry)
        } else {
            Err(ImageError::EntryOutsideCode)
        }
    }

    fn find_config(&self) -> Result<BootloaderConfig, ImageError> {
        let section = self
            .file
            .section_header_by_name(handover::CONFIG_SECTION)
            .map_err(ImageError::Malformed)?
            .ok_or(ImageError::NoConfig)?;
        let (bytes, _) = self
            .file
            .section_data(&section)
            .map_err(ImageError::Malformed)?;
        let config = BootloaderConfig::deserialize(bytes).map_err(ImageError::Config)?;
        // `BootInfo` changes between versions of `bootloader_api`, and its reader cannot tell. The
        // version field is private; a configuration with our version in it is serialized alike.
        const VERSION: Range<usize> = 16..23;
        let ours = BootloaderConfig::new_default().serialize();
        if bytes.get(VERSION) != ours.get(VERSION) {
            return Err(ImageError::Config("made for another version"));
        }
        Ok(config)
    }
}

/// One segment to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Virtual address of its first byte.
    pub address: u64,
    /// The bytes that the file has for it; the rest is zero.
    pub data: &'a [u8],
    /// Bytes that it takes in memory, never less than the file has.
    pub size: u64,
    /// What its pages allow.
    pub rights: Rights,
}

impl<'a> Segment<'a> {
    fn new(file: &ElfBytes<'a, LittleEndian>, header: &ProgramHeader) -> Result<Self, ImageError> {
        let rights = match (
            header.p_flags & abi::PF_W != 0,
            header.p_flags & abi::PF_X != 0,
        ) {
            (false, false) => Rights::Read,
            (true, false) => Rights::Write,
            (false, true) => Rights::Execute,
            (true, true) => return Err(ImageError::WritableCode),
        };
        let data = file.segment_data(header).map_err(ImageError::Malformed)?;
        // The page after the last one has an address too, so that rounding up cannot overflow.
        let end = header.p_vaddr.checked_add(header.p_memsz);
        if header.p_filesz > header.p_memsz || end.is_none_or(|end| end > u64::MAX - PAGE_SIZE) {
            return Err(ImageError::Bounds);
        }
        Ok(Self {
            address: header.p_vaddr,
            data,
            size: header.p_memsz,
            rights,
        })
    }

    /// The virtual addresses of the pages that hold it.
    pub fn pages(&self) -> Range<u64> {
        let end = self.address + self.size;
        self.address & !(PAGE_SIZE - 1)..end.next_multiple_of(PAGE_SIZE)
    }
}

/// Why a file is no kernel that the loader can start.
#[derive(Debug)]
#[non_exhaustive]
pub enum ImageError {
    /// Not an ELF file, or a broken one.
    Malformed(ParseError),
    /// For another kind of processor.
    Machine,
    /// To be relocated or linked at start, which the loader does not do.
    NotFixed,
    /// Nothing to load.
    NoSegments,
    /// A segment outside of the address space, or smaller in memory than in the file.
    Bounds,
    /// A segment that is writable and executable.
    WritableCode,
    /// Segments that share a page, or are not sorted by address.
    SharedPage,
    /// No hand-over note.
    NoEntry,
    /// A hand-over entry that is not the address of code.
    EntryOutsideCode,
    /// No loader configuration.
    NoConfig,
    /// A loader configuration that `bootloader_api` does not understand.
    Config(&'static str),
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed(_) => "the kernel is not a sound ELF file",
            Self::Machine => "the kernel is not an x86-64 ELF file",
            Self::NotFixed => {
                "the kernel wants relocation: link it static and not position independent"
            }
            Self::NoSegments => "the kernel has nothing to load",
            Self::Bounds => "the kernel has a segment with impossible bounds",
            Self::WritableCode => "the kernel has a segment that is both writable and executable",
            Self::SharedPage => "the kernel's segments share a page or are out of order",
            Self::NoEntry => "the kernel has no hand-over note, so it is not an Enlit kernel",
            Self::EntryOutsideCode => "the kernel's hand-over entry lies outside of its code",
            Self::NoConfig => "the kernel has no .bootloader-config section",
            Self::Config(reason) => {
                return write!(
                    f,
                    "the kernel's .bootloader-config section is unusable: {reason}"
                );
            }
        })
    }
}

#[cfg(test)]
#[path = "image/tests.rs"] // The build script includes this file from elsewhere.
mod tests;
