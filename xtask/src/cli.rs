//! The command line: commands, options and their manual.

use std::{
    io::{self, BufRead},
    process::ExitCode,
};

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    bench, ctl, disk, fuzz,
    guest::{self, Profile, Symboliser},
    header, image,
    machine::{Kind, process},
    miri, run, sim, suite,
    workspace::Workspace,
};

/// Build, image, run, test and measure Enlit appliances.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build an appliance, boot it in a VM with Hyper-V, show its console
    #[command(long_about = RUN)]
    Run(run::Options),
    /// Tell a running VM to shut down, to add a disk, to count, to go wrong, ...
    #[command(long_about = CTL)]
    Ctl(ctl::Options),
    /// Run all tests: unit tests on this computer, then guests in VMs
    #[command(long_about = TEST)]
    Test(suite::Options),
    /// Build an appliance: its kernel ELF, stripped for booting
    #[command(long_about = BUILD)]
    Build(What),
    /// Make the files that a VM boots from: EFI application and disk image
    #[command(long_about = IMAGE)]
    Image(image::Options),
    /// Add functions and source lines to a guest's report, read from standard input
    #[command(long_about = SYMBOLISE)]
    Symbolise(What),
    /// Write the C header for VMBus drivers anew, from its declarations in Rust
    Header,
    /// Make, describe and check the disks of VMs: raw and VHDX
    #[command(subcommand, long_about = DISK)]
    Disk(disk::Command),
    /// Measure what a boot costs
    Bench(bench::Options),
    /// Feed made-up bytes to everything that parses what a host or a guest wrote
    #[command(long_about = FUZZ)]
    Fuzz(fuzz::Options),
    /// Run the tests of the unsafe code under Miri
    #[command(long_about = MIRI)]
    Miri(miri::Options),
    /// Simulate VMBus: guest and host in one process, every step decided by a seed
    #[command(long_about = SIM)]
    Sim(sim::Options),
}

const RUN: &str = "\
Build an appliance, boot it in a VM with Hyper-V, show its console.

It runs on the test machine, Enlit's own monitor on KVM with the devices of a Generation 2 VM. If this \
computer's /dev/kvm offers Hyper-V, it runs there; otherwise QEMU emulates a small Linux machine whose \
KVM does (the nested machine; it takes about ten seconds to boot), and files and ports are this \
computer's all the same. Software that is missing is fetched once through apt and \
unpacked below target/enlit; the system is left as it is, and root is not needed.

Standard input is typed at the guest's serial console. Addresses in a panic report are followed by \
the functions and lines that they belong to. `cargo xtask ctl` talks to the VM while it runs. When the \
guest asks for a restart, it restarts.

Ctrl-C ends the VM and everything around it. The exit status is 0 when the guest powers off, 1 when \
it panics or gives up, and 130 after Ctrl-C.";

const CTL: &str = "\
Tell a running VM to shut down, to add a disk, to count, to go wrong, ...

The VM is the one that `cargo xtask run` has started in this work tree; with several, --vm says which. \
A command that fails says why in one sentence and ends with status 1.";

const TEST: &str = "\
Run all tests: unit tests on this computer, then guests in VMs.

Each VM test boots a guest, waits for what it prints and does, and has a time limit. One line per \
test says what was checked. The last line counts: `N passed, N failed`.

QEMU has known faults: its emulator can deliver an interrupt twice, its VMBus can end in an \
assertion. A VM test that fails with evidence of one of them is repeated once, which is said and \
counted.";

const BUILD: &str = "\
Build an appliance: its kernel ELF, stripped for booting.

Prints two files with their sizes: the ELF with symbols and line numbers, and the stripped copy that \
is booted (QEMU `-kernel`, or any VMM that starts an ELF by PVH or by the 64-bit Linux protocol).";

const IMAGE: &str = "\
Make the files that a VM boots from: EFI application and disk image.

NAME.efi is the whole appliance in one EFI application. NAME.img is a raw disk (GPT, 512-byte \
sectors) whose EFI system partition holds it as \\EFI\\BOOT\\BOOTX64.EFI, where firmware looks by \
itself; --cmdline puts the guest's command line beside it as CMDLINE.TXT. The same input gives the \
same bytes.";

const SYMBOLISE: &str = "\
Add functions and source lines to a guest's report, read from standard input.

Copies standard input to standard output. Below each line with `#N 0xADDRESS` follow the functions \
that the address belongs to, inlined ones first. The appliance must be the one that ran: same \
sources, same profile. `cargo xtask run` does this by itself.";

const DISK: &str = "\
Make, describe and check the disks of VMs: raw and VHDX.

A file whose name ends in .vhdx becomes a VHDX disk, dynamic unless --fixed is given; any other name a raw one. A disk \
that a VM writes to is locked and neither described nor checked; read-only ones can be.";

const FUZZ: &str = "\
Feed made-up bytes to everything that parses what a host or a guest wrote.

Each target of vmbus/fuzz runs with libFuzzer and AddressSanitizer from the corpus in the tree, as many \
at a time as there are processors. One line per target: inputs tried, coverage counters hit, size of the corpus. \
An input that fails is kept; its path and the command that plays it again are printed. New inputs \
that reach new code are kept below target/ and used again the next time.

The nightly toolchain that vmbus/fuzz/rust-toolchain.toml names is installed through rustup when it is missing.";

const MIRI: &str = "\
Run the tests of the unsafe code under Miri.

Miri interprets the tests of shared memory, rings and channels, and reports undefined behaviour and data races. \
It is slow, so the property tests try fewer cases. The nightly toolchain that vmbus/fuzz/rust-toolchain.toml names is \
installed through rustup when it is missing.";
const SIM: &str = "\
Simulate VMBus: guest and host in one process, every step decided by a seed.

At each step the seed picks something that a driver does, something that the host does, a delivery, a move \
of the clock or a fault; wherever the guest calls the machine below it, and in every callback, it picks again. An \
oracle checks that order is kept, that every packet ends exactly once, that memory stays until the host has \
let go, and that nothing is left behind when the faults stop. The same seed and number of steps give the same \
run, and the last line tells a hash of it.

When anything is wrong, the seed, the step, the last actions and the command to replay them are printed, and the \
exit status is not 0. Without --seed a fresh one is taken.";

/// Which appliance, and how it is built.
#[derive(Debug, Clone, Args)]
pub struct What {
    /// Appliance to build: a package of this work tree
    #[arg(short, long, value_name = "NAME", default_value = "hello")]
    pub package: String,
    /// Build as shipped (the default)
    #[arg(long, overrides_with = "debug")]
    pub release: bool,
    /// Build with checks, without optimisation
    #[arg(long)]
    pub debug: bool,
}

impl What {
    /// The profile asked for.
    pub fn profile(&self) -> Profile {
        if self.debug {
            Profile::Debug
        } else {
            Profile::Release
        }
    }
}

/// A machine by its name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Wish {
    /// The best that works here: `qemu` if possible, otherwise `nested`
    Auto,
    /// QEMU on this computer's KVM, which must offer Hyper-V
    Qemu,
    /// QEMU on the KVM of an emulated Linux machine: works everywhere, slower
    Nested,
    /// QEMU's emulation alone: no Hyper-V; for the boot loader and for failing well
    Tcg,
}

impl From<Wish> for Option<Kind> {
    fn from(wish: Wish) -> Self {
        match wish {
            Wish::Auto => None,
            Wish::Qemu => Some(Kind::Kvm),
            Wish::Nested => Some(Kind::Nested),
            Wish::Tcg => Some(Kind::Emulated),
        }
    }
}

/// Runs the command; prints a failure as one sentence.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = process::handle_interrupts()
        .map_err(Into::into)
        .and_then(|()| carry_out(cli.command));
    match result {
        Ok(code) => code,
        Err(_) if process::was_interrupted() => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn carry_out(command: Command) -> Result<ExitCode> {
    match command {
        Command::Run(options) => run::run(&options),
        Command::Ctl(options) => ctl::run(&options),
        Command::Test(options) => suite::run(&options),
        Command::Build(what) => build(&what),
        Command::Image(options) => image::run(&options),
        Command::Symbolise(what) => symbolise(&what),
        Command::Header => header::run(),
        Command::Disk(command) => disk::run(&command),
        Command::Bench(options) => bench::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Miri(options) => miri::run(&options),
        Command::Sim(options) => sim::run(&options),
    }
}

fn build(what: &What) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let guest = guest::build(&workspace, &what.package, what.profile())?;
    for path in [&guest.symbols, &guest.stripped] {
        println!("{:>9} bytes  {}", path.metadata()?.len(), path.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn symbolise(what: &What) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let guest = guest::build(&workspace, &what.package, what.profile())?;
    let symboliser = Symboliser::open(&guest.symbols)?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        println!("{line}");
        for below in symboliser.below(&line) {
            println!("{below}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Memory sizes: `64`, `64M`, `4G`; in MiB.
pub fn memory(text: &str) -> Result<u32, String> {
    let (digits, factor) = match text.strip_suffix(['G', 'g']) {
        Some(digits) => (digits, 1024),
        None => (text.trim_end_matches(['M', 'm']), 1),
    };
    digits
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor))
        .filter(|&mib| mib > 0)
        .ok_or_else(|| "a size is a number of MiB, or a number with M or G behind it".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_has_units() {
        assert_eq!(memory("64"), Ok(64));
        assert_eq!(memory("64M"), Ok(64));
        assert_eq!(memory("4G"), Ok(4096));
        for wrong in ["", "0", "G", "-1", "4T", "5000000G"] {
            assert!(memory(wrong).is_err(), "{wrong}");
        }
    }
}
