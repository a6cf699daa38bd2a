//! What the stack needs of the machine below it: one trait.

use core::fmt;

use crate::ids::{ConnectionId, VpIndex};
use crate::protocol::Guid;
use crate::shared::SharedPages;

/// The machine below the VMBus stack: hypercalls, memory, time and interrupt level.
///
/// The kernel implements it over the hypercall page; tests implement it over a host in the same
/// process. Every method may be called at PASSIVE and at DISPATCH unless it says otherwise.
pub trait Hypervisor: Send + Sync {
    /// Posts one message of type 1 to the host (HvCallPostMessage, TLFS chapter Inter-Partition
    /// Communication). `payload` holds at most 240 bytes.
    ///
    /// The implementation retries the statuses that only mean "busy" (INSUFFICIENT_BUFFERS,
    /// INSUFFICIENT_MEMORY, TIMEOUT) a bounded number of times with back-off before it
    /// returns [`PostError::Busy`]. Called at PASSIVE.
    fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> Result<(), PostError>;

    /// Signals flag `flag` of an event connection (HvCallSignalEvent, fast form).
    fn signal_event(&self, connection: ConnectionId, flag: u16);

    /// Takes `count` physically contiguous, zeroed pages that the host may read and write.
    /// Dropping the result gives them back. Called at PASSIVE.
    fn share_pages(&self, count: usize) -> Result<SharedPages, OutOfMemory>;

    /// Partition reference time in units of 100 ns. Never goes back.
    fn reference_time(&self) -> u64;

    /// The VP that runs this code.
    fn current_vp(&self) -> VpIndex;

    /// Raises this VP to DISPATCH (interrupts off) and returns the level to go back to.
    fn raise_to_dispatch(&self) -> Level;

    /// Goes back to `level`, as [`raise_to_dispatch`](Self::raise_to_dispatch) returned it.
    fn lower(&self, level: Level);

    /// The level of the code that asks.
    fn current_level(&self) -> Level {
        let level = self.raise_to_dispatch();
        self.lower(level);
        level
    }

    /// Sleeps until an interrupt has been handled, or until reference time `until`. Returns at once when work has been
    /// [requested](Self::request_work), by whichever VP, since the last call; a request wakes the sleeper too. Called at PASSIVE, by code that
    /// waits and serves the stack meanwhile.
    fn wait_for_interrupt(&self, until: Option<u64>);

    /// Guest physical address of `bytes` of address space for the memory-mapped registers of the device with
    /// this instance GUID; the same for every call. `None` when the machine has none to give.
    fn mmio_space(&self, instance: Guid, bytes: u64) -> Option<u64> {
        let _ = (instance, bytes);
        None
    }

    /// Asks for `Vmbus::run_work` to be called soon, at PASSIVE. Cheap when
    /// that has been asked for already. The call sees everything that was done before any of the requests that it answers:
    /// note a request down by a read-modify-write with release, not by a store.
    fn request_work(&self);
}

/// The level at which code runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Task or work-queue context: interrupts on, may block.
    Passive,
    /// Interrupt context: interrupts off, may not block, allocates only within bounds.
    Dispatch,
}

/// Why a message was not posted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PostError {
    /// The host knows no such connection (HV_STATUS_INVALID_CONNECTION_ID, 0x12): for a first
    /// INITIATE_CONTACT it means that the host is too old for that connection id.
    InvalidConnection,
    /// The host stayed busy through all retries.
    Busy,
    /// Any other hypervisor status.
    Status(u16),
}

impl fmt::Display for PostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidConnection => f.write_str("the host has no such message connection"),
            Self::Busy => f.write_str("the host accepted no message within the retry limit"),
            Self::Status(status) => write!(f, "HvCallPostMessage failed with status {status:#06x}"),
        }
    }
}

impl core::error::Error for PostError {}

/// No contiguous run of pages of the asked length is free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfMemory {
    /// How many pages were asked for.
    pub pages: usize,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no {} contiguous pages are free", self.pages)
    }
}

impl core::error::Error for OutOfMemory {}
