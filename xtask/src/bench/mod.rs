//! `cargo xtask bench`: what a boot costs, in counts that do not depend on how
//! fast the computer is.

mod boot;
mod memory;
mod meter;
mod referee;
mod svg;
mod trace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand};

/// Options of `bench`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Count the VM exits of a boot, beside Linux and the least possible guest
    #[command(long_about = BOOT)]
    Boot(boot::Options),
    /// Find the least memory that an appliance boots in
    #[command(long_about = MEMORY)]
    Memory(memory::Options),
}

const BOOT: &str = "\
Count the VM exits of a boot, beside Linux and the least possible guest.

Boots the appliance several times on the nested machine, where KVM's own trace is ours to read, and \
counts exits by kind: from kernel entry to the open balloon device, and on to `main`. The same is \
counted for the Debian Linux kernel of the nested machine, up to its own hv_balloon, and for the \
floor guest (a few bytes that print a word), which shows what QEMU and its firmware cost by \
themselves. Console bytes and interrupts of the host are counted apart.

Every exit of the run with the median count is explained: function, and what it asked of the host.

Times mean little on the nested machine. With --icount the emulated processor counts one nanosecond \
for each instruction, so times are instructions; the host's part of the work (KVM's and QEMU's) is \
in them.";

const MEMORY: &str = "\
Find the least memory that an appliance boots in.

Boots with less and less memory, by bisection, until it no longer comes up.";

/// Runs a benchmark.
pub fn run(options: &Options) -> Result<ExitCode> {
    match &options.what {
        What::Boot(options) => boot::run(options),
        What::Memory(options) => memory::run(options),
    }
}
