//! `cargo xtask bench`: what a boot costs, in counts that do not depend on how
//! fast the computer is, and what a packet costs.

mod boot;
mod memory;
mod meter;
mod referee;
mod ring;
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
    /// Time packets through ring and callbacks, beside a memcpy
    #[command(long_about = RING)]
    Ring(ring::Options),
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

const RING: &str = "\
Time packets through ring and callbacks, beside a memcpy.

Runs natively, both ends in one process and on one thread. Rows: `send` is allocate_packet and send of \
the library, `receive` the ring alone, `dispatch` an interrupt with the callbacks for each packet of a batch, \
`round trip` a transaction with the host's part of it, one at a time. `memcpy in` and `memcpy out` copy the same \
bytes to and from places that lie as packets do.

Each figure is a median of rounds, and each round a median of batches, with the first round left out. The \
command fails when anything is allocated after that. `signals` are those to the host, per packet. \
With --instructions, valgrind counts the instructions of small packets.";

/// Runs a benchmark.
pub fn run(options: &Options) -> Result<ExitCode> {
    match &options.what {
        What::Boot(options) => boot::run(options),
        What::Memory(options) => memory::run(options),
        What::Ring(options) => ring::run(options),
    }
}
