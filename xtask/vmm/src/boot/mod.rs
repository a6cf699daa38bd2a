//! Direct boot: puts a kernel, its initial RAM disk, its command line and the firmware's tables into memory
//! (spec boot.md, part B).
//!
//! Below 1 MiB the loader has these places: descriptor tables at 0x500, start info at 0x6000, memory map or zero
//! page at 0x7000, page tables from 0x9000 on, command line at 0x20000, ACPI tables at 0xE0000.

mod linux;
mod pvh;

use std::fs::File;
use std::path::{Path, PathBuf};

use kvm_ioctls::VcpuFd;
use linux_loader::loader::KernelLoaderResult;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmbus::shared::SharedPages;

use crate::partition::Settings;
use crate::platform::acpi::{self, Machine};
use crate::platform::layout::{ACPI, HIGH_RAM_START, Layout};
use crate::{Error, sys};

const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// The longest command line with its end: more than Linux takes.
const MAX_COMMAND_LINE: usize = 4096;
const PAGE: u64 = 4096;
/// Linux looks for its initial RAM disk below here only.
const MAX_INITRD: u64 = 0x8000_0000;

/// What is booted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initial RAM disk's file.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub command_line: String,
    /// How the kernel is entered.
    pub entry: Entry,
}

/// How a kernel is entered.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Entry {
    /// By the address in its PVH note, in 32-bit mode.
    #[default]
    Pvh,
    /// By Linux's 64-bit boot protocol; the kernel is an ELF file or a bzImage.
    Linux,
}

/// How the first processor starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// See [`Entry::Pvh`].
    Pvh {
        /// The entry's address.
        entry: u32,
        /// The start info's.
        info: u32,
    },
    /// See [`Entry::Linux`].
    Linux {
        /// The entry's address.
        entry: u64,
        /// The zero page's.
        zero_page: u64,
    },
}

impl Start {
    /// Sets the processor's registers.
    pub fn apply(&self, vp: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        match *self {
            Self::Pvh { entry, info } => pvh::set_registers(vp, entry, info),
            Self::Linux { entry, zero_page } => linux::set_registers(vp, entry, zero_page),
        }
    }
}

/// A file in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Placed {
    address: u64,
    size: u64,
}

/// What the boot protocols pass on.
struct Loaded<'a> {
    kernel: KernelLoaderResult,
    layout: &'a Layout,
    initrd: Option<Placed>,
    /// Without its end.
    command_line_length: usize,
}

/// Puts everything into memory, which is `runs`; gives how the first processor starts.
pub fn load(
    image: &Image,
    layout: &Layout,
    settings: &Settings,
    runs: &[SharedPages],
) -> Result<Start, Error> {
    let with = |memory: &GuestMemoryMmap| load_into(memory, image, layout, settings);
    sys::mapping::with_loader_view(runs, with).unwrap_or_else(|| {
        Err(Error::DoesNotFit {
            file: image.kernel.clone(),
        })
    })
}

fn load_into(
    memory: &GuestMemoryMmap,
    image: &Image,
    layout: &Layout,
    settings: &Settings,
) -> Result<Start, Error> {
    let mut file = open(&image.kernel)?;
    let kernel = match image.entry {
        Entry::Pvh => pvh::load(memory, &mut file),
        Entry::Linux => linux::load(memory, &mut file),
    };
    let kernel = kernel.map_err(|reason| Error::Kernel {
        file: image.kernel.clone(),
        reason,
    })?;
    let end = linux::end_of(&kernel);
    if end > layout.low.end {
        return Err(Error::DoesNotFit {
            file: image.kernel.clone(),
        });
    }
    let initrd = match &image.initrd {
        Some(path) => Some(place(memory, path, end..layout.low.end)?),
        None => None,
    };
    let machine = Machine {
        layout,
        vps: settings.vps,
        hibernation: settings.hibernation,
    };
    let does_not_fit = || Error::DoesNotFit {
        file: image.kernel.clone(),
    };
    let tables = acpi::tables(&machine).ok_or_else(does_not_fit)?;
    let write = |bytes: &[u8], at| memory.write_slice(bytes, at).map_err(|_| does_not_fit());
    write(&tables, GuestAddress(ACPI.start))?;
    write(&command_line(&image.command_line)?, COMMAND_LINE)?;
    let loaded = Loaded {
        kernel,
        layout,
        initrd,
        command_line_length: image.command_line.len(),
    };
    match image.entry {
        Entry::Pvh => pvh::prepare(memory, &loaded),
        Entry::Linux => linux::prepare(memory, &loaded),
    }
    .map_err(|reason| Error::Kernel {
        file: image.kernel.clone(),
        reason,
    })
}

fn open(path: &Path) -> Result<File, Error> {
    let failed = |error| Error::File {
        file: path.to_owned(),
        error,
    };
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_dir() {
        return Err(failed(std::io::ErrorKind::IsADirectory.into()));
    }
    Ok(file)
}

/// The command line with the byte that ends it.
fn command_line(text: &str) -> Result<Vec<u8>, Error> {
    if text.len() >= MAX_COMMAND_LINE || text.contains('\0') {
        return Err(Error::CommandLine {
            length: text.len(),
            most: MAX_COMMAND_LINE - 1,
        });
    }
    Ok([text.as_bytes(), &[0]].concat())
}

/// Puts a file at the end of a range, on a page of its own.
fn place(
    memory: &GuestMemoryMmap,
    path: &Path,
    range: std::ops::Range<u64>,
) -> Result<Placed, Error> {
    let mut file = open(path)?;
    let failed = |error| Error::File {
        file: path.to_owned(),
        error,
    };
    let size = file.metadata().map_err(failed)?.len();
    let end = range.end.min(MAX_INITRD);
    let address = end.checked_sub(size).map(|start| start / PAGE * PAGE);
    let address = address
        .filter(|start| *start >= range.start.max(HIGH_RAM_START))
        .ok_or_else(|| Error::DoesNotFit {
            file: path.to_owned(),
        })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
        .map_err(|error| failed(std::io::Error::other(error)))?;
    Ok(Placed { address, size })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vmbus::ids::PageNumber;

    use super::*;

    /// An ELF file with one segment of 8 bytes at 2 MiB, and a note of this name with the entry, if it has one.
    pub(super) fn elf(note: Option<&[u8; 4]>) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
        put(&[2, 0, 62, 0, 1, 0, 0, 0]);
        put(&0x20_0000_u64.to_le_bytes());
        put(&64_u64.to_le_bytes());
        put(&[0; 12]);
        let headers = if note.is_some() { 2_u16 } else { 1 };
        for size in [64, 56, headers, 64, 0, 0] {
            put(&size.to_le_bytes());
        }
        let mut header = |kind: u32, fields: [u64; 6]| {
            put(&kind.to_le_bytes());
            put(&[7, 0, 0, 0]);
            fields.iter().for_each(|field| put(&field.to_le_bytes()));
        };
        header(1, [0x200, 0x20_0000, 0x20_0000, 8, 16, 1]);
        if let Some(name) = note {
            header(4, [0x100, 0, 0, 20, 20, 4]);
            file.resize(0x100, 0);
            file.extend([4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
            file.extend(name);
            file.extend(0x20_0004_u32.to_le_bytes());
        }
        file.resize(0x200, 0);
        file.extend(b"the code");
        file
    }

    pub(super) struct Booted {
        pub result: Result<Start, Error>,
        pub runs: Vec<SharedPages>,
    }

    impl Booted {
        pub fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
            let mut bytes = [0; N];
            self.runs[0].read(address as usize, &mut bytes).unwrap();
            bytes
        }

        pub fn number(&self, address: u64) -> u64 {
            u64::from_le_bytes(self.bytes(address))
        }
    }

    /// Loads these files into 16 MiB.
    pub(super) fn boot(kernel: &[u8], initrd: Option<&[u8]>, line: &str, entry: Entry) -> Booted {
        let write = |content: &[u8]| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(content).unwrap();
            file
        };
        let kernel = write(kernel);
        let initrd = initrd.map(write);
        let image = Image {
            kernel: kernel.path().to_owned(),
            initrd: initrd.as_ref().map(|file| file.path().to_owned()),
            command_line: line.to_owned(),
            entry,
        };
        let settings = Settings {
            memory_mib: 16,
            ..Settings::default()
        };
        let layout = Layout::new(16, 0).unwrap();
        let runs = vec![sys::mapping::map(PageNumber(0), 4096).unwrap()];
        Booted {
            result: load(&image, &layout, &settings, &runs),
            runs,
        }
    }

    #[test]
    fn a_kernel_without_a_pvh_note_is_refused_in_one_sentence() {
        for file in [elf(None), elf(Some(b"GNU\0"))] {
            let error = boot(&file, None, "", Entry::Pvh)
                .result
                .unwrap_err()
                .to_string();
            assert!(error.contains("PVH note"), "{error}");
            assert!(!error.contains('\n'));
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused_in_one_sentence() {
        for entry in [Entry::Pvh, Entry::Linux] {
            for file in [
                &b""[..],
                b"#!/bin/sh\n",
                &[0; 4096],
                &elf(Some(b"Xen\0"))[..0x120],
            ] {
                let error = boot(file, None, "", entry).result.unwrap_err().to_string();
                assert!(
                    error.contains("is no kernel to start") && !error.contains('\n'),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn files_that_are_not_there_or_too_large_are_named() {
        let image = |kernel: &Path, initrd: Option<&Path>| Image {
            kernel: kernel.to_owned(),
            initrd: initrd.map(Path::to_owned),
            command_line: String::new(),
            entry: Entry::Pvh,
        };
        let layout = Layout::new(16, 0).unwrap();
        let runs = vec![sys::mapping::map(PageNumber(0), 4096).unwrap()];
        let load = |image| {
            let error = load(&image, &layout, &Settings::default(), &runs).unwrap_err();
            error.to_string()
        };
        let missing = Path::new("no/such/file");
        assert!(load(image(missing, None)).starts_with("cannot read no/such/file: "));
        assert!(load(image(Path::new("."), None)).contains("directory"));
        let mut kernel = tempfile::NamedTempFile::new().unwrap();
        kernel.write_all(&elf(Some(b"Xen\0"))).unwrap();
        assert!(
            load(image(kernel.path(), Some(missing))).starts_with("cannot read no/such/file: ")
        );
        let initrd = tempfile::NamedTempFile::new().unwrap();
        initrd.as_file().set_len(15 << 20).unwrap();
        let error = load(image(kernel.path(), Some(initrd.path())));
        assert!(error.contains("does not fit"), "{error}");
    }

    #[test]
    fn command_lines_that_cannot_be_passed_on_are_refused() {
        let kernel = elf(Some(b"Xen\0"));
        for line in ["a".repeat(4096).as_str(), "a\0b"] {
            let error = boot(&kernel, None, line, Entry::Pvh).result.unwrap_err();
            assert!(error.to_string().contains("command line"), "{error}");
        }
        let longest = "a".repeat(4095);
        let booted = boot(&kernel, None, &longest, Entry::Pvh);
        booted.result.as_ref().unwrap();
        assert_eq!(booted.bytes(0x2_0FFE), *b"a\0");
    }
}
