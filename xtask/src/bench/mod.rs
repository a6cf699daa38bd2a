//! `cargo xtask bench`: what a boot costs, in counts that do not depend on how
//! fast the computer is, and what a packet costs.

mod boot;
mod host;
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
    /// Measure disk and network of the test machine with Linux, beside QEMU's virtio
    #[command(long_about = HOST)]
    Host(host::Options),
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

const HOST: &str = "\
Measure disk and network of the test machine with Linux, beside QEMU's virtio.

Debian's Linux boots twice on the nested machine: on the test machine, with its Hyper-V drivers, and on QEMU, \
with virtio-blk and virtio-net. Both have the same kernel, initial RAM file system, memory, processors, kind of \
disk and kind of network. Then both run the same workloads in turns: random and sequential requests to the disk, \
past the guest's page cache, and files over TCP both ways.

The tables show speeds, VM exits for each I/O or MiB, and the ratio of the two, ours to QEMU's; each \
ratio is of two runs that follow each other. Exits are counted by the trace of the KVM that runs both, by \
reason; console and interrupts of the host are left out, and so is what starting a workload costs by itself. \
Speeds are by the nested machine's clock, which counts one nanosecond for each instruction of guest and host together, so \
that nothing else that this computer does is in them; with --wall they are by the computer's own.";

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
        What::Host(options) => host::run(options),
        What::Memory(options) => memory::run(options),
        What::Ring(options) => ring::run(options),
    }
}
