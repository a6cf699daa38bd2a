//! What the host's thread needs of the VM below it.

use std::collections::BTreeMap;
use std::ops::Range;

use vmbus::ids::{ConnectionId, PageNumber, VpIndex};
use vmbus_host::bus::Message;
use vmbus_host::memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use crate::Error;

/// A VM without a host.
pub trait Vm: Send + Sync {
    /// The partition's reference time, in units of 100 ns.
    fn reference_time(&self) -> u64;

    /// Sets an event flag on a VP and interrupts it. `false`: its SynIC takes no events.
    fn set_event_flag(&self, vp: VpIndex, sint: u8, flag: u16) -> bool;

    /// Takes a message for delivery. `false`: the one before it is still on its way; try again when
    /// [`Runner::message_delivered`](super::Runner::message_delivered) was called.
    fn deliver_message(&self, message: &Message) -> bool;

    /// Has `event` written to when the guest signals `connection`; `None` ends that.
    ///
    /// # Errors
    /// When the system has no room. The guest's signals then come by
    /// [`Runner::signal_event`](super::Runner::signal_event).
    fn route_signal(&self, connection: ConnectionId, event: Option<&EventFd>) -> Result<(), Error>;

    /// The guest's memory.
    fn memory(&self) -> GuestMemory;

    /// Lets the virtual processors run.
    fn resume(&self);

    /// Halts the virtual processors: none runs guest code when this returns.
    fn pause(&self);

    /// Where memory can be added.
    fn hot_add_range(&self) -> Range<PageNumber>;

    /// Adds memory.
    ///
    /// # Errors
    /// When the system has none, or the guest has it already.
    fn hot_add_memory(&self, first: PageNumber, count: usize) -> Result<(), Error>;

    /// Gives the system the memory behind pages that the guest does not use.
    fn discard(&self, first: PageNumber, count: u64);

    /// Gives input to the guest's serial port. Returns how many bytes there was room for; for more,
    /// [`Runner::console_drained`](super::Runner::console_drained) is called.
    fn console_input(&self, bytes: &[u8]) -> usize;

    /// How often the virtual processors have left the guest.
    fn exits(&self) -> Exits;
}

/// How often virtual processors have left their guest, by reason.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Exits {
    /// For something that the VMM had to do.
    pub here: BTreeMap<String, u64>,
    /// What KVM has counted, by its own names; many of its numbers are parts of others.
    pub kernel: BTreeMap<String, u64>,
}

/// How a VM has ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The guest has powered off.
    PowerOff,
    /// The guest has saved itself and powered off.
    Hibernated,
    /// The guest has asked for a reset.
    Reset,
    /// A processor took a triple fault, which resets the machine.
    TripleFault,
    /// The guest has reported a crash.
    Crashed,
    /// The guest gave up and left this value.
    DebugExit(u32),
    /// `quit`.
    Quit,
    /// The VM cannot go on, and why.
    Failed(String),
}

/// A crash that the guest has reported.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Crash {
    /// The five crash registers.
    pub parameters: [u64; 5],
    /// The text that it left, if it did.
    pub message: Option<String>,
}
