//! `run` on QEMU.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use super::{Options, console, show};
use crate::{
    guest::{self, Symboliser},
    image::Image,
    machine::{Boot, Clock, Kind, Machine, VmConfig, debug_exit_word},
    packages::Packages,
    workspace::Workspace,
};

/// Runs it.
pub fn run(
    options: &Options,
    workspace: &Workspace,
    packages: &mut Packages,
    kind: Kind,
) -> Result<ExitCode> {
    let (package, profile) = (&options.what.package, options.what.profile());
    let image = options
        .by_firmware()
        .then(|| {
            let words = format!("{} {}", options.cmdline, debug_exit_word());
            Image::build(workspace, package, profile, Some(words.trim()))
        })
        .transpose()?;
    let guest = match &image {
        Some(image) => image.guest.clone(),
        None => guest::build(workspace, package, profile)?,
    };
    if options.gdb.is_some() && kind == Kind::Nested {
        bail!(
            "a debugger cannot reach into the nested machine: add --machine tcg (without Hyper-V), or use a computer whose /dev/kvm offers Hyper-V"
        );
    }
    let machine = Machine::start(workspace, packages, kind, Clock::Wall)?;

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
    config.cmdline = options.words();
    let mut vm = machine.run(&config)?;
    if let Some(port) = options.gdb {
        eprintln!(
            "waiting for a debugger: gdb {} -ex 'target remote localhost:{port}'",
            guest.symbols.display()
        );
    }
    console::type_input(vm.take_input()?);
    show(vm, &Symboliser::open(&guest.symbols)?)
}
