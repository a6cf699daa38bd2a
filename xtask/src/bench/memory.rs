//! `bench memory`: the least memory that an appliance boots in.

use std::{process::ExitCode, time::Duration};

use anyhow::{Result, bail};
use clap::Args;

use crate::{
    cli::{What, Wish},
    console, guest,
    machine::{self, Boot, Clock, Machine, VmConfig},
    packages::Packages,
    progress,
    workspace::Workspace,
};

/// Options of `bench memory`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    what: What,
    /// Machine to boot it on
    #[arg(long, value_enum, default_value = "auto")]
    machine: Wish,
}

/// An appliance that needs more than this many MiB is no case for bisection.
const MOST: u32 = 256;

/// A guest that has too little memory says so or dies; one that does neither is
/// given up after this time.
const PATIENCE: Duration = Duration::from_secs(60);

/// Finds it.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let mut packages = Packages::new(&workspace.store())?;
    let guest = guest::build(&workspace, &options.what.package, options.what.profile())?;
    let choice = machine::choose(options.machine.into());
    eprintln!("machine: {} ({})", choice.kind, choice.reason);
    let machine = Machine::start(&workspace, &mut packages, choice.kind, Clock::Wall)?;
    machine.put("guest.elf", &guest.read()?)?;
    let least = bisect(1, MOST, |memory| {
        let _step = progress::step(&format!("booting with {memory} MiB"));
        let boots = boots(&machine, memory);
        println!(
            "{memory:>4} MiB: {}",
            if boots {
                "comes up"
            } else {
                "does not come up"
            }
        );
        boots
    });
    match least {
        Some(memory) => println!("least memory: {memory} MiB"),
        None => bail!("{} does not come up in {MOST} MiB", options.what.package),
    }
    Ok(ExitCode::SUCCESS)
}

fn boots(machine: &Machine, memory: u32) -> bool {
    let mut config = VmConfig::new(Boot::Kernel {
        file: "guest.elf".into(),
        initrd: None,
    });
    config.memory = memory;
    // QEMU itself may refuse a very small VM, which is an answer, too.
    machine
        .run(&config)
        .and_then(|mut vm| vm.expect(console::READY, PATIENCE))
        .is_ok()
}

/// The least number from `low` to `high` for which `fits` holds, if it holds for
/// `high` and for all from some number on.
pub fn bisect(mut low: u32, mut high: u32, mut fits: impl FnMut(u32) -> bool) -> Option<u32> {
    if !fits(high) {
        return None;
    }
    while low < high {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Some(high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_edge_is_found_wherever_it_is() {
        for edge in [1, 2, 7, 8, 255, 256] {
            assert_eq!(bisect(1, 256, |n| n >= edge), Some(edge));
        }
        assert_eq!(bisect(1, 256, |_| false), None);
    }
}
