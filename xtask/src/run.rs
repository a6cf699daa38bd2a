//! `cargo xtask run`: boots one appliance and shows its console.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{
    cli::{What, Wish, memory},
    guest::{self, Symboliser},
    image::Image,
    machine::{self, Boot, Clock, Ending, Kind, Machine, VmConfig, debug_exit_word},
    packages::Packages,
    workspace::Workspace,
};

/// Options of `run`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    what: What,
    /// Machine to run it on
    #[arg(long, value_enum, default_value = "auto")]
    machine: Wish,
    /// Memory in MiB, or with M or G behind the number
    #[arg(short, long, value_name = "SIZE", value_parser = memory, default_value = "256")]
    memory: u32,
    /// Virtual processors
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255))]
    cpus: u32,
    /// Command line of the guest: words `key=value`
    #[arg(
        long,
        value_name = "WORDS",
        default_value = "",
        allow_hyphen_values = true
    )]
    cmdline: String,
    /// Wait for a debugger at this TCP port of localhost before the first instruction
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "1234")]
    gdb: Option<u16>,
    /// Boot the EFI file, under OVMF (on the machine `tcg`, so without Hyper-V)
    #[arg(long)]
    efi: bool,
    /// Boot the disk image, under OVMF (on the machine `tcg`, so without Hyper-V)
    #[arg(long, conflicts_with = "efi")]
    disk: bool,
}

/// Runs it. The status tells how the guest ended.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let mut packages = Packages::new(&workspace.store())?;
    let by_firmware = options.efi || options.disk;
    let wish = match options.machine.into() {
        None | Some(Kind::Emulated) if by_firmware => Some(Kind::Emulated),
        Some(_) if by_firmware => bail!(
            "firmware runs on the machine `tcg` only: leave --machine out, or leave --efi and --disk out"
        ),
        wish => wish,
    };
    let (package, profile) = (&options.what.package, options.what.profile());
    let image = by_firmware
        .then(|| {
            let words = format!("{} {}", options.cmdline, debug_exit_word());
            Image::build(&workspace, package, profile, Some(words.trim()))
        })
        .transpose()?;
    let guest = match &image {
        Some(image) => image.guest.clone(),
        None => guest::build(&workspace, package, profile)?,
    };
    let choice = machine::choose(wish);
    eprintln!("machine: {} ({})", choice.kind, choice.reason);
    if options.gdb.is_some() && choice.kind == Kind::Nested {
        bail!(
            "a debugger cannot reach into the nested machine: add --machine tcg (without Hyper-V), or use a computer whose /dev/kvm offers Hyper-V"
        );
    }
    let machine = Machine::start(&workspace, &mut packages, choice.kind, Clock::Wall)?;

    let firmware = || -> Result<String> {
        let path = machine.ovmf().context("there is no OVMF here")?;
        Ok(path.display().to_string())
    };
    let boot = match &image {
        Some(image) if options.efi => {
            machine.put("guest.efi", &image.efi)?;
            Boot::Efi {
                file: "guest.efi".into(),
                firmware: firmware()?,
            }
        }
        Some(image) => {
            machine.put("guest.img", &image.disk)?;
            Boot::Disk {
                file: "guest.img".into(),
                firmware: firmware()?,
            }
        }
        None => {
            machine.put("guest.elf", &guest.read()?)?;
            Boot::Kernel {
                file: "guest.elf".into(),
                initrd: None,
            }
        }
    };
    let mut config = VmConfig::new(boot);
    config.memory = options.memory;
    config.cpus = options.cpus;
    config.gdb = options.gdb;
    config.cmdline = options
        .cmdline
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let mut vm = machine.run(&config)?;
    if let Some(port) = options.gdb {
        eprintln!(
            "waiting for a debugger: gdb {} -ex 'target remote localhost:{port}'",
            guest.symbols.display()
        );
    }
    let symboliser = Symboliser::open(&guest.symbols)?;
    let mut console = Console::new(&symboliser);
    while let Some(piece) = vm.console_piece(Duration::from_secs(3600))? {
        console.show(&piece)?;
    }
    console.end()?;
    let ending = vm.wait(Duration::from_secs(60))?;
    let complaints = vm.complaints();
    if !complaints.is_empty() {
        eprintln!("{complaints}");
    }
    match ending {
        Ending::PoweredOff => Ok(ExitCode::SUCCESS),
        other => bail!("{other}"),
    }
}

/// The guest's console on standard output, with symbols below report lines.
struct Console<'a> {
    symboliser: &'a Symboliser,
    line: Vec<u8>,
}

impl<'a> Console<'a> {
    fn new(symboliser: &'a Symboliser) -> Self {
        Self {
            symboliser,
            line: Vec::new(),
        }
    }

    /// Shows bytes at once; a line's symbols follow its end.
    fn show(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        for &byte in bytes {
            out.write_all(&[byte])?;
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.line);
                for below in self.symboliser.below(&line) {
                    writeln!(out, "{below}")?;
                }
                self.line.clear();
            } else {
                self.line.push(byte);
            }
        }
        out.flush()
    }

    /// Ends a line that the guest left open.
    fn end(&mut self) -> io::Result<()> {
        if self.line.is_empty() {
            Ok(())
        } else {
            self.show(b"\n")
        }
    }
}
