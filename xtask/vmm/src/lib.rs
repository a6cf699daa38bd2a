//! The test machine: a small VMM on KVM whose VMs look like Generation 2 VMs of Hyper-V.
//!
//! [`Partition`](partition::Partition) is the VM without a host: processors, memory, SynIC, firmware tables and the
//! serial port. What lives on the VMBus is [`vmbus_host`]'s, and the partition's owner brings the two together.

#![deny(unsafe_code)]

#[cfg(target_os = "linux")]
pub mod boot;
pub mod config;
pub mod control;
#[cfg(target_os = "linux")]
pub mod devices;
#[cfg(target_os = "linux")]
pub mod machine;
#[cfg(target_os = "linux")]
pub mod partition;
pub mod platform;
#[cfg(target_os = "linux")]
pub mod program;
#[cfg(target_os = "linux")]
pub mod runner;
#[cfg(target_os = "linux")]
mod sys;

use std::path::PathBuf;

/// Why there is no VM. Each is one sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM cannot be opened.
    #[error("this computer has no usable KVM: {0}")]
    NoKvm(std::io::Error),
    /// KVM lacks something that the test machine cannot do without.
    #[error(
        "this computer's KVM lacks {0}, which the test machine needs (Linux 5.10 or newer with CONFIG_KVM_HYPERV has it)"
    )]
    Lacks(&'static str),
    /// A call of KVM failed.
    #[error("KVM cannot {what}: {error}")]
    Kvm {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        error: std::io::Error,
    },
    /// The amount of memory is out of range.
    #[error(
        "a VM cannot have {mib} MiB of memory: {} to {} MiB are possible, hot-added memory included",
        platform::layout::MIN_MEMORY_MIB,
        platform::layout::MAX_MEMORY_MIB
    )]
    Memory {
        /// What was asked for.
        mib: u64,
    },
    /// Memory was to be added where no memory can be.
    #[error(
        "{count} pages of memory cannot be added at page {first}: the VM has no place for them there"
    )]
    NotForMemory {
        /// The first page.
        first: vmbus::ids::PageNumber,
        /// How many.
        count: usize,
    },
    /// The host has no memory for the guest.
    #[error("there is no room for {mib} MiB of guest memory: {error}")]
    NoMemory {
        /// How much was needed.
        mib: u64,
        /// What the system said.
        error: std::io::Error,
    },
    /// The guest's console has nowhere to go.
    #[error("the guest's console cannot go to standard output: {0}")]
    NoConsole(std::io::Error),
    /// The number of processors is out of range.
    #[error("a VM cannot have {wanted} processors: 1 to {most} are possible here")]
    Processors {
        /// What was asked for.
        wanted: u32,
        /// The most.
        most: u32,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {error}", file.display())]
    File {
        /// Its path.
        file: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The kernel cannot be started in the way that was asked for.
    #[error("{} is no kernel to start: {reason}", file.display())]
    Kernel {
        /// Its path.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Kernel and initial RAM disk do not fit into the memory.
    #[error("{} does not fit into the VM's memory", file.display())]
    DoesNotFit {
        /// The file that does not.
        file: PathBuf,
    },
    /// The command line is too long or cannot be passed on.
    #[error("the command line has {length} bytes; at most {most} are possible, and none of them 0")]
    CommandLine {
        /// Its length.
        length: usize,
        /// The most.
        most: usize,
    },
}
