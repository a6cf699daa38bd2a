//! `cargo xtask disk`: makes, describes and checks the disks of VMs.

#[cfg(test)]
mod interop;

use std::{
    fmt::Write,
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use vhdx::{Settings, Storage};
use vmbus_host::disk::{self, DiskFile, Format};

/// What to do with a disk.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a disk of zeros
    Create(Create),
    /// Say what a disk is
    Info {
        /// The disk's file
        file: PathBuf,
    },
    /// Check that a disk is sound; nothing is changed
    Check {
        /// The disk's file
        file: PathBuf,
    },
}

/// Options of `disk create`.
#[derive(Debug, Args)]
pub struct Create {
    /// The file to make; it must not exist. VHDX if its name ends in .vhdx, otherwise raw
    file: PathBuf,
    /// Size of the disk: bytes, or with K, M, G or T behind the number
    #[arg(long, value_parser = size)]
    size: u64,
    /// Allocate all blocks of a VHDX disk at once
    #[arg(long)]
    fixed: bool,
    /// Bytes that a VHDX disk allocates together: a power of two from 1M to 256M [default: 2M]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    block_size: Option<u64>,
    /// Bytes of a logical sector of a VHDX disk: 512 or 4096 [default: 512]
    #[arg(long, value_name = "BYTES")]
    sector: Option<u32>,
}

/// Does it. The exit status is 1 when a check found the disk damaged.
pub fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Create(options) => {
            create(options)?;
            println!("{}", describe(&options.file)?);
        }
        Command::Info { file } => print!("{}", info(file)?),
        Command::Check { file } => print!("{}", check(file)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn is_vhdx(file: &Path) -> bool {
    let extension = file.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("vhdx"))
}

fn create(options: &Create) -> Result<()> {
    let path = &options.file;
    if !is_vhdx(path) && (options.fixed || options.block_size.is_some() || options.sector.is_some())
    {
        bail!(
            "disk {} would be raw, as its name does not end in .vhdx: --fixed, --block-size and --sector are for VHDX",
            path.display()
        );
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("disk {} cannot be made", path.display()))?;
    let made = fill(Arc::new(file), options);
    if made.is_err() {
        // Half a disk is of no use; that it could not be removed would not help either.
        let _ = fs::remove_file(path);
    }
    made.with_context(|| format!("disk {} cannot be made", path.display()))
}

fn fill(storage: Arc<dyn Storage>, options: &Create) -> Result<()> {
    if !is_vhdx(&options.file) {
        if options.size == 0 || !options.size.is_multiple_of(512) {
            bail!("its size must be a multiple of 512 bytes and not 0");
        }
        storage.set_length(options.size)?;
        return Ok(storage.sync()?);
    }
    let mut settings = Settings::new(options.size);
    settings.fixed = options.fixed;
    if let Some(bytes) = options.block_size {
        settings.block_size = u32::try_from(bytes).unwrap_or(u32::MAX);
    }
    if let Some(bytes) = options.sector {
        settings.logical_sector = bytes;
    }
    vhdx::create(&storage, &settings).map_err(|error| match error {
        vhdx::Error::Unsupported(what) => anyhow::anyhow!("a VHDX file cannot have {what}"),
        other => other.into(),
    })
}

/// The file, locked for reading.
fn open(path: &Path) -> Result<DiskFile> {
    let options = disk::Options {
        read_only: true,
        ..disk::Options::default()
    };
    Ok(disk::open_file(path, options)?)
}

/// A disk in one line.
fn describe(path: &Path) -> Result<String> {
    let DiskFile {
        file,
        format,
        length,
        ..
    } = open(path)?;
    let name = path.display();
    Ok(match format {
        Format::Raw => format!("{name}: raw disk of {}", amount(length)),
        Format::Iso => format!("{name}: DVD image of {}", amount(length)),
        Format::Vhdx => {
            let report = report(path, &(Arc::new(file) as Arc<dyn Storage>))?;
            let kind = if report.parameters.fixed {
                "fixed"
            } else {
                "dynamic"
            };
            let size = amount(report.parameters.size);
            format!("{name}: {kind} VHDX disk of {size}")
        }
    })
}

fn report(path: &Path, storage: &Arc<dyn Storage>) -> Result<vhdx::Report> {
    vhdx::check(storage).map_err(|error| anyhow::anyhow!("disk {} {error}", path.display()))
}

/// What a disk is, several lines.
fn info(path: &Path) -> Result<String> {
    let mut text = describe(path)? + "\n";
    let DiskFile {
        file,
        format,
        length,
        ..
    } = open(path)?;
    if format == Format::Vhdx {
        let storage: Arc<dyn Storage> = Arc::new(file);
        let report = report(path, &storage)?;
        let parameters = report.parameters;
        let disk = vhdx::Vhdx::open(storage, true)?;
        let blocks = parameters.blocks();
        write!(
            text,
            "file            {length} bytes\n\
             disk            {} bytes\n\
             blocks          {} of {blocks} present, {} each\n\
             logical sector  {} bytes\n\
             physical sector {} bytes\n\
             identity        {}\n\
             file written    {}\n\
             data written    {}\n",
            parameters.size,
            report.present_blocks,
            amount(parameters.block_size.into()),
            parameters.logical_sector,
            parameters.physical_sector,
            parameters.identity,
            disk.file_write_id(),
            disk.data_write_id(),
        )?;
        for finding in report.findings {
            writeln!(text, "note            {finding}")?;
        }
    } else {
        writeln!(text, "file            {length} bytes")?;
    }
    Ok(text)
}

/// What a check says of a disk that is sound.
/// What `disk check` says of a sound disk.
///
/// # Errors
/// What is wrong with it.
pub fn check(path: &Path) -> Result<String> {
    let DiskFile { file, format, .. } = open(path)?;
    let name = path.display();
    if format != Format::Vhdx {
        // What there is to check, opening it checks.
        disk::open(
            path,
            disk::Options {
                read_only: true,
                ..disk::Options::default()
            },
        )?;
        return Ok(format!(
            "{name}: whole sectors, and nothing else to check\n"
        ));
    }
    let report = report(path, &(Arc::new(file) as Arc<dyn Storage>))?;
    let mut text = String::new();
    for finding in &report.findings {
        writeln!(text, "{name}: note: {finding}")?;
    }
    let (present, blocks) = (report.present_blocks, report.parameters.blocks());
    writeln!(text, "{name}: sound, {present} of {blocks} blocks present")?;
    Ok(text)
}

/// Sizes: `512`, `64K`, `2M`, `8G`, `1T`; in bytes.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| {
            "a size is a number of bytes, or a number with K, M, G or T behind it".into()
        })
}

/// Bytes, in the largest unit that says it exactly.
fn amount(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units
        .iter()
        .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    match unit {
        Some((name, shift)) => format!("{} {name}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(directory: &tempfile::TempDir, name: &str, bytes: u64) -> Create {
        Create {
            file: directory.path().join(name),
            size: bytes,
            fixed: false,
            block_size: None,
            sector: None,
        }
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("512"), Ok(512));
        assert_eq!(size("4k"), Ok(4096));
        assert_eq!(size("2M"), Ok(2 << 20));
        assert_eq!(size("8G"), Ok(8 << 30));
        assert_eq!(size("64T"), Ok(64 << 40));
        for wrong in ["", "G", "-1", "8X", "8 G", "99999999T", "é"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(amount(0), "0 bytes");
        assert_eq!(amount(8 << 30), "8 GiB");
        assert_eq!(amount(1536), "1536 bytes");
        assert_eq!(amount(5 << 10), "5 KiB");
    }

    #[test]
    fn a_disk_is_made_described_and_checked() {
        let directory = tempfile::tempdir().unwrap();
        let dynamic = options(&directory, "a.vhdx", 8 << 30);
        create(&dynamic).unwrap();
        let text = info(&dynamic.file).unwrap();
        assert!(text.contains("dynamic VHDX disk of 8 GiB\n"), "{text}");
        assert!(text.contains("0 of 4096 present, 2 MiB each"), "{text}");
        assert!(text.contains("logical sector  512 bytes"), "{text}");
        let text = check(&dynamic.file).unwrap();
        assert!(
            text.ends_with("sound, 0 of 4096 blocks present\n"),
            "{text}"
        );
        let fixed = Create {
            fixed: true,
            block_size: Some(1 << 20),
            sector: Some(4096),
            ..options(&directory, "b.VHDX", 4 << 20)
        };
        create(&fixed).unwrap();
        let text = info(&fixed.file).unwrap();
        assert!(text.contains("fixed VHDX disk of 4 MiB\n"), "{text}");
        assert!(text.contains("4 of 4 present, 1 MiB each"), "{text}");
        assert!(text.contains("logical sector  4096 bytes"), "{text}");
        let raw = options(&directory, "c.raw", 1536);
        create(&raw).unwrap();
        assert_eq!(fs::metadata(&raw.file).unwrap().len(), 1536);
        let text = info(&raw.file).unwrap();
        assert!(text.contains("raw disk of 1536 bytes\n"), "{text}");
        let text = check(&raw.file).unwrap();
        assert!(text.ends_with("nothing else to check\n"), "{text}");
    }

    #[test]
    fn what_cannot_be_made_or_read_is_one_sentence_and_leaves_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let refused = |options: &Create| {
            let error = format!("{:#}", create(options).unwrap_err());
            let name = options.file.display().to_string();
            assert!(error.starts_with(&format!("disk {name} ")), "{error}");
            error
        };
        let odd = options(&directory, "odd.vhdx", 1000);
        let error = refused(&odd);
        assert!(
            error.ends_with("a VHDX file cannot have a disk size of 1000 bytes"),
            "{error}"
        );
        assert!(!odd.file.exists());
        let blocks = Create {
            block_size: Some(1 << 40),
            ..options(&directory, "blocks.vhdx", 1 << 30)
        };
        let error = refused(&blocks);
        assert!(error.contains("cannot have a block size of"), "{error}");
        let error = refused(&options(&directory, "odd.raw", 1000));
        assert!(
            error.ends_with("a multiple of 512 bytes and not 0"),
            "{error}"
        );
        let raw = Create {
            fixed: true,
            ..options(&directory, "fixed.raw", 512)
        };
        assert!(refused(&raw).contains("--fixed"));
        let twice = options(&directory, "twice.raw", 512);
        create(&twice).unwrap();
        let error = refused(&twice);
        assert!(error.contains("exists"), "{error}");
        assert!(twice.file.exists(), "what was there stays");
        fs::write(&odd.file, [b'x'; 512]).unwrap();
        for says in [info(&odd.file), check(&odd.file)] {
            let error = format!("{:#}", says.unwrap_err());
            assert!(
                error.ends_with("is called .vhdx and is no VHDX file"),
                "{error}"
            );
        }
        fs::write(&odd.file, b"vhdxfile").unwrap();
        let error = format!("{:#}", check(&odd.file).unwrap_err());
        assert!(
            error.contains("odd.vhdx is damaged in its headers"),
            "{error}"
        );
    }
}
