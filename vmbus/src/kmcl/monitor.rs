//! Monitored notification (MNF): a signal that is a bit in shared memory instead of a hypercall.
//!
//! The receiver looks at the bits of its page as often as each bit's latency says. That costs the sender next to
//! nothing and delays the signal; a hypercall comes at once and is always accepted, also for a channel that has a bit
//! (spec vmbus.md 5.1). So a channel signals through the page only where the driver chose it
//! ([`ChannelBuilder::monitored_notification`](super::ChannelBuilder::monitored_notification)), the stack has such pages
//! ([`Config::monitor_pages`](crate::bus::Config::monitor_pages)) and the host gave the channel a bit.

use core::fmt;
use core::sync::atomic::Ordering;

use super::State;
use super::channel::{Channel, Shared};
use super::client::Inner;
use crate::hypervisor::{Hypervisor, OutOfMemory};
use crate::protocol::monitor::{MonitorId, MonitorPages};
use crate::shared::{OutOfBounds, SharedPages};
use crate::sync::DispatchLock;

/// The two pages of the stack, which the host has from contact to unload.
pub(crate) struct MonitorMemory {
    parent_to_child: SharedPages,
    child_to_parent: SharedPages,
}

impl MonitorMemory {
    pub(crate) fn share(hypervisor: &dyn Hypervisor) -> Result<Self, OutOfMemory> {
        Ok(Self {
            parent_to_child: hypervisor.share_pages(1)?,
            child_to_parent: hypervisor.share_pages(1)?,
        })
    }

    /// Empties both, as a host expects them.
    pub(crate) fn clear(&self) {
        self.parent_to_child.clear();
        self.child_to_parent.clear();
    }

    pub(crate) fn pages(&self) -> MonitorPages {
        MonitorPages {
            parent_to_child: self.parent_to_child.first_page(),
            child_to_parent: self.child_to_parent.first_page(),
        }
    }
}

/// A channel's bit, while it has one.
#[derive(Default)]
pub(super) struct Monitor(DispatchLock<Option<Bit>>);

/// A bit of the page that the guest writes.
struct Bit {
    page: SharedPages,
    id: MonitorId,
}

/// Why the latency of a channel's signals cannot be set.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LatencyError {
    /// The channel signals by hypercalls, which have no latency to set (spec kmcl.md 6.1, 27).
    NotMonitored,
    /// The channel is not open.
    NotOpen(State),
}

impl fmt::Display for LatencyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMonitored => f.write_str("the channel has no monitored notification"),
            Self::NotOpen(state) => write!(f, "the channel is {state}, not open"),
        }
    }
}

impl core::error::Error for LatencyError {}

impl Monitor {
    /// Gives the channel the bit that the host gave it, or none. At PASSIVE.
    pub(super) fn bind(&self, client: &Inner, id: Option<MonitorId>) {
        let memory = client.monitor.lock();
        let page = memory.as_ref().map(|memory| memory.child_to_parent.clone());
        drop(memory);
        let bit = page.zip(id).map(|(page, id)| Bit { page, id });
        let before = core::mem::replace(&mut *self.0.lock(&*client.hypervisor), bit);
        // Dropped here, where the lock is open: it may be the last handle to the page.
        drop(before);
    }

    /// Sets the bit. `false`: nobody looks at it, or there is none, and the host must be signalled otherwise.
    pub(super) fn signal(&self, hypervisor: &dyn Hypervisor) -> bool {
        let bit = self.0.lock(hypervisor);
        bit.as_ref().is_some_and(|bit| bit.signal() == Ok(true))
    }
}

impl Bit {
    /// Whether the host looks at the group of this bit.
    fn is_enabled(&self) -> Result<bool, OutOfBounds> {
        let state = self.page.atomic_u32(MonitorId::TRIGGER_STATE)?;
        Ok(state.load(Ordering::SeqCst) & self.id.enable_mask() != 0)
    }

    fn signal(&self) -> Result<bool, OutOfBounds> {
        if !self.is_enabled()? {
            return Ok(false);
        }
        let pending = self.page.atomic_u32(self.id.pending_offset())?;
        pending.fetch_or(self.id.mask(), Ordering::SeqCst);
        // A host that stops to look clears the state first and looks at the bits after; so the other way here. At
        // worst it is signalled twice.
        self.is_enabled()
    }

    fn set_latency(&self, latency: u16) -> Result<u16, OutOfBounds> {
        let offset = self.id.latency_offset();
        let mut before = [0; 2];
        self.page.read(offset, &mut before)?;
        self.page.write(offset, &latency.to_le_bytes())?;
        Ok(u16::from_le_bytes(before))
    }
}

impl Shared {
    /// Signals the host through the monitor page, if that is chosen and possible.
    pub(super) fn signal_monitored(&self) -> bool {
        let done = self.config.monitored && self.monitor.signal(&*self.client.hypervisor);
        if done {
            self.counters.signals_monitored.add(1);
        }
        done
    }
}

impl Channel {
    /// Sets how long the host may leave a signal of this channel unseen, in units of 100 ns, and returns what it was
    /// (`VmbChannelSetInterruptLatency`). From the opened callback to the closed callback, both inclusive; at PASSIVE or
    /// DISPATCH. The host reads the value whenever it wants to.
    ///
    /// # Errors
    ///
    /// [`LatencyError::NotOpen`] outside of that time, [`LatencyError::NotMonitored`] when the channel signals by
    /// hypercalls: the driver did not choose monitored notification, or the host gave the channel no bit.
    pub fn set_interrupt_latency(&self, latency: u16) -> Result<u16, LatencyError> {
        let shared = self.shared();
        let state = self.state();
        if let State::Disabled | State::Enabled = state {
            return Err(LatencyError::NotOpen(state));
        }
        if !shared.config.monitored {
            return Err(LatencyError::NotMonitored);
        }
        let bit = shared.monitor.0.lock(&*shared.client.hypervisor);
        bit.as_ref()
            .and_then(|bit| bit.set_latency(latency).ok())
            .ok_or(LatencyError::NotMonitored)
    }
}
