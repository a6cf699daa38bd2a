//! `cargo xtask run`: boots one appliance and shows its console.

mod console;
#[cfg(target_os = "linux")]
mod network;
mod on_qemu;
#[cfg(target_os = "linux")]
mod on_test_machine;
mod options;
#[cfg(target_os = "linux")]
mod session;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

#[cfg(target_os = "linux")]
pub use self::network::Passt;
pub use self::options::{Disk, Forward};
use self::{console::Console, options::Net};
use crate::{
    cli::{What, memory},
    guest::Symboliser,
    machine::{self, Choice, Ending, Kind, Vm},
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
    /// A disk for the guest, raw, VHDX or ISO; with `,ro` behind it read-only (can be repeated)
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    disks: Vec<Disk>,
    /// Network of the guest: `user` (this computer's, by passt), `tap:NAME` or `none`
    ///
    /// Without this option it is `user` if that works here, and else none.
    #[arg(long, value_name = "NET")]
    net: Option<Net>,
    /// A port of localhost that leads to one of the guest, as 8080:80 (can be repeated)
    #[arg(long = "forward", value_name = "[ADDRESS:]HOST:GUEST[/udp]")]
    forwards: Vec<Forward>,
    /// Sockets between programs here and the guest: they connect to PATH and say `CONNECT PORT`,
    /// and listen at PATH_PORT
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// Write every frame of the network to this file, for Wireshark or tcpdump
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// Name of the VM for `cargo xtask ctl`; without it that of the appliance
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Wait for a debugger at this TCP port of localhost before the first instruction
    #[arg(long, value_name = "PORT", num_args = 0..=1, default_missing_value = "1234")]
    gdb: Option<u16>,
    /// Boot the EFI file, under OVMF (on the machine `tcg`, so without Hyper-V)
    #[arg(long)]
    efi: bool,
    /// Boot the disk image, under OVMF (on the machine `tcg`, so without Hyper-V)
    #[arg(long, conflicts_with = "efi")]
    boot_disk: bool,
}

/// What `run` runs it on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Wish {
    /// The test machine, on this computer's KVM if it offers Hyper-V, else as `nested`
    Auto,
    /// The test machine on this computer's KVM, which must offer Hyper-V
    Kvm,
    /// The test machine on the KVM of an emulated Linux machine: works everywhere, slower
    Nested,
    /// QEMU in place of the test machine: of all devices only dynamic memory
    Qemu,
    /// QEMU's emulation alone: no Hyper-V; for the boot loader and for failing well
    Tcg,
}

impl Options {
    /// Whether the guest is started by firmware.
    fn by_firmware(&self) -> bool {
        self.efi || self.boot_disk
    }

    /// What was asked for and only the test machine has, if anything.
    fn of_test_machine(&self) -> Option<&'static str> {
        [
            (!self.disks.is_empty(), "--disk"),
            (!matches!(self.net, None | Some(Net::None)), "--net"),
            (!self.forwards.is_empty(), "--forward"),
            (self.vsock.is_some(), "--vsock"),
            (self.pcap.is_some(), "--pcap"),
            (self.name.is_some(), "--name"),
        ]
        .into_iter()
        .find_map(|(given, name)| given.then_some(name))
    }

    /// On what it will run.
    fn plan(&self) -> Result<Plan> {
        let wish = match self.machine {
            Wish::Auto | Wish::Tcg if self.by_firmware() => Wish::Tcg,
            _ if self.by_firmware() => bail!(
                "firmware runs on the machine `tcg` only: leave --machine out, or leave --efi and --boot-disk out"
            ),
            wish => wish,
        };
        let plan = match wish {
            Wish::Auto => Plan::TestMachine(None),
            Wish::Kvm => Plan::TestMachine(Some(Kind::Kvm)),
            Wish::Nested => Plan::TestMachine(Some(Kind::Nested)),
            Wish::Qemu => Plan::Qemu(None),
            Wish::Tcg => Plan::Qemu(Some(Kind::Emulated)),
        };
        if let (Plan::Qemu(_), Some(option)) = (plan, self.of_test_machine()) {
            bail!(
                "QEMU has no such device of Hyper-V: leave {option} out, or --machine (and --efi and --boot-disk)"
            );
        }
        if matches!(plan, Plan::TestMachine(_)) && self.gdb.is_some() {
            bail!("the test machine takes no debugger: add --machine qemu or --machine tcg");
        }
        Ok(plan)
    }

    fn words(&self) -> Vec<String> {
        self.cmdline.split_whitespace().map(str::to_owned).collect()
    }
}

/// On what it will run; without a kind the best that works here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    TestMachine(Option<Kind>),
    Qemu(Option<Kind>),
}

/// Runs it. The status tells how the guest ended.
pub fn run(options: &Options) -> Result<ExitCode> {
    let plan = options.plan()?;
    let workspace = Workspace::find()?;
    let mut packages = Packages::new(&workspace.store())?;
    match plan {
        #[cfg(not(target_os = "linux"))]
        Plan::TestMachine(_) => bail!("VMs are run on Linux only"),
        #[cfg(target_os = "linux")]
        Plan::TestMachine(kind) => on_test_machine::run(
            options,
            &workspace,
            &mut packages,
            choose("the test machine", kind),
        ),
        Plan::Qemu(kind) => on_qemu::run(options, &workspace, &mut packages, choose("QEMU", kind)),
    }
}

fn choose(monitor: &str, kind: Option<Kind>) -> Kind {
    let Choice { kind, reason } = machine::choose(kind);
    eprintln!("machine: {monitor} on {kind} ({reason})");
    kind
}

/// Shows the console until the VM ends; fails unless the guest powers off.
fn show(mut vm: Vm, symboliser: &Symboliser) -> Result<ExitCode> {
    let mut console = Console::new(symboliser);
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &str) -> Options {
        Line::try_parse_from(std::iter::once("run").chain(words.split_whitespace()))
            .unwrap()
            .options
    }

    fn refusal(words: &str) -> String {
        options(words).plan().unwrap_err().to_string()
    }

    #[test]
    fn the_test_machine_is_what_runs_it_unless_something_else_is_asked_for() {
        assert_eq!(options("").plan().unwrap(), Plan::TestMachine(None));
        assert_eq!(options("--machine qemu").plan().unwrap(), Plan::Qemu(None));
        for by_firmware in ["--efi", "--boot-disk", "--machine tcg --efi"] {
            let plan = options(by_firmware).plan().unwrap();
            assert_eq!(plan, Plan::Qemu(Some(Kind::Emulated)));
        }
    }

    #[test]
    fn disks_ports_and_sockets_are_read() {
        let options = options(
            "--disk a.img --disk b.iso,ro --forward 8080:80 --forward 53:53/udp --vsock v --pcap p --net user -c 2",
        );
        assert_eq!(options.disks.len(), 2);
        assert!(options.disks[1].read_only);
        assert_eq!(options.forwards.len(), 2);
        assert_eq!(options.of_test_machine(), Some("--disk"));
    }

    #[test]
    fn what_cannot_be_together_is_said_in_a_sentence() {
        assert!(refusal("--efi --machine nested").contains("`tcg` only"));
        assert!(refusal("--machine qemu --disk x").contains("leave --disk out"));
        assert!(refusal("--boot-disk --forward 1:1").contains("leave --forward out"));
        assert!(refusal("--gdb").contains("takes no debugger"));
        options("--machine qemu --net none").plan().unwrap();
    }
}
