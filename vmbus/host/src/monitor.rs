//! The host's eye on the monitor page that the guest writes (spec vmbus.md 5.3).

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use vmbus::ids::ConnectionId;
use vmbus::protocol::monitor::{GROUPS, MonitorId, MonitorPages, Parameter};
use vmbus::shared::{OutOfBounds, SharedPages};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32};

use crate::memory::GuestMemory;

/// What the host sees of the page, and when it looks.
#[derive(Debug)]
pub struct Watch {
    page: SharedPages,
    /// Bits that are set, and when they are due.
    due: BTreeMap<MonitorId, u64>,
}

impl Watch {
    /// Begins to look at the guest's page. `None` when one of the pages is not shared.
    pub fn new(memory: &GuestMemory, pages: MonitorPages) -> Option<Self> {
        memory.find(pages.parent_to_child)?;
        let page = memory.view(&[pages.child_to_parent])?;
        let watch = Self {
            page,
            due: BTreeMap::new(),
        };
        watch.enable((1 << GROUPS) - 1).is_ok().then_some(watch)
    }

    /// Looks at these groups from now on, and at no others.
    pub fn enable(&self, groups: u32) -> Result<(), OutOfBounds> {
        let state = self.page.atomic_u32(MonitorId::TRIGGER_STATE)?;
        state.store(groups, Ordering::SeqCst);
        Ok(())
    }

    /// Says what a bit stands for, and how long it may wait.
    pub fn set_up(
        &self,
        id: MonitorId,
        connection: ConnectionId,
        latency: u16,
    ) -> Result<(), OutOfBounds> {
        let parameter = Parameter {
            connection: U32::new(connection.0),
            flag: U16::ZERO,
            reserved: U16::ZERO,
        };
        self.page
            .write(id.parameter_offset(), parameter.as_bytes())?;
        self.page.write(id.latency_offset(), &latency.to_le_bytes())
    }

    /// How long a bit may wait now, in units of 100 ns.
    pub fn latency(&self, id: MonitorId) -> Result<u16, OutOfBounds> {
        let mut latency = [0; 2];
        self.page.read(id.latency_offset(), &mut latency)?;
        Ok(u16::from_le_bytes(latency))
    }

    /// The page: for tests that play a broken host.
    pub fn page(&self) -> &SharedPages {
        &self.page
    }

    /// Looks at the page: takes the bits that are due by `now`.
    pub fn poll(&mut self, now: u64) -> Result<Vec<MonitorId>, OutOfBounds> {
        let state = self.page.atomic_u32(MonitorId::TRIGGER_STATE)?;
        let state = state.load(Ordering::SeqCst);
        let mut taken = Vec::new();
        for id in (0..=u8::MAX).map_while(MonitorId::new) {
            let pending = self.page.atomic_u32(id.pending_offset())?;
            let is_set = pending.load(Ordering::SeqCst) & id.mask() != 0;
            if !is_set || state & id.enable_mask() == 0 {
                self.due.remove(&id);
                continue;
            }
            let latency = u64::from(self.latency(id)?);
            let due = *self.due.entry(id).or_insert(now.saturating_add(latency));
            if due <= now {
                pending.fetch_and(!id.mask(), Ordering::SeqCst);
                self.due.remove(&id);
                taken.push(id);
            }
        }
        Ok(taken)
    }

    /// When the next of the bits that were seen is due.
    pub fn deadline(&self) -> Option<u64> {
        self.due.values().min().copied()
    }
}
