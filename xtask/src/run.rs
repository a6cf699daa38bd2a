//! `cargo xtask run`: boots one appliance and shows its console.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    cli::{What, Wish, memory},
    guest::{self, Symboliser},
    machine::{self, Boot, Clock, Ending, Kind, Machine, VmConfig},
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
    /// Boot the EFI file under OVMF instead of the kernel alone (needs --machine tcg)
    #[arg(long)]
    efi: bool,
}

/// Runs it. The status tells how the guest ended.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let mut packages = Packages::new(&workspace.store())?;
    let guest = guest::build(&workspace, &options.what.package, options.what.profile())?;
    let choice = machine::choose(if options.efi {
        Some(Kind::Emulated)
    } else {
        options.machine.into()
    });
    eprintln!("machine: {} ({})", choice.kind, choice.reason);
    let machine = Machine::start(&workspace, &mut packages, choice.kind, Clock::Wall)?;

    machine.put("guest.elf", &guest.read()?)?;
    let mut config = VmConfig::new(Boot::Kernel {
        file: "guest.elf".into(),
        initrd: None,
    });
    config.memory = options.memory;
    config.cpus = options.cpus;
    config.gdb = options.gdb;
    config.cmdline = options
        .cmdline
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let mut vm = machine.run(&config)?;
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
