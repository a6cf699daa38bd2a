//! Dynamic memory: how much the guest should have, and what becomes of what it gives.

use std::sync::Arc;

use vmbus::ids::PageNumber;
use vmbus::protocol::{Guid, interface};
use vmbus_host::bus;
use vmbus_host::dynamic_memory::{DynamicMemory, MemoryEvent};
use vmbus_host::host::Host;
use vmbus_host::machine::SharedDynamicMemory;
use vmbus_host::provider::Provider;
use vmbus_host::sync::Mutex;

use super::observed::Observed;
use super::{Counters, Devices, Part, counted};
use crate::config::{self, Kind};
use crate::control::{BalloonState, Event, Failure};
use crate::runner::{Events, Vm};

/// Pages of a MiB.
const PAGES_PER_MIB: u64 = 256;

/// Hyper-V has one such device, always with this instance.
const INSTANCE: Guid = Guid::literal("1eccfd72-4b41-45ef-b73a-4a6e44c12924");

/// Dynamic memory.
pub struct Balloon {
    memory: Arc<Mutex<DynamicMemory>>,
    target_mib: Arc<Mutex<u64>>,
    /// Pages that the VM was given beyond what it started with.
    added: Mutex<u64>,
    events: Events,
}

impl Balloon {
    pub(super) fn new(_config: &config::Balloon, memory_mib: u32, events: Events) -> Self {
        let mib = u64::from(memory_mib);
        let memory = DynamicMemory::new(mib * PAGES_PER_MIB);
        Self {
            memory: Arc::new(Mutex::new(memory)),
            target_mib: Arc::new(Mutex::new(mib)),
            added: Mutex::new(0),
            events,
        }
    }

    /// Sets how much memory the guest should have, in MiB.
    fn set_target(&self, mib: u32) {
        let mib = u64::from(mib);
        *self.target_mib.lock() = mib;
        self.memory.lock().set_target(mib * PAGES_PER_MIB);
    }

    /// Gives the guest so many more MiB than it started with.
    ///
    /// # Errors
    /// When the VM has no room for them.
    fn hot_add(&self, vm: &dyn Vm, mib: u32) -> Result<(), Failure> {
        let count = u64::from(mib) * PAGES_PER_MIB;
        let room = vm.hot_add_range();
        let mut added = self.added.lock();
        let first = room.start.0 + *added;
        let end = first.checked_add(count).filter(|end| *end <= room.end.0);
        if end.is_none() || mib == 0 {
            let left = (room.end.0 - first) / PAGES_PER_MIB;
            let desc = format!("the VM has room for {left} MiB more, not for {mib}");
            return Err(Failure::generic(desc));
        }
        let mut memory = self.memory.lock();
        memory
            .check_hot_add((first, count))
            .map_err(|error| Failure::generic(error.to_string()))?;
        let pages = usize::try_from(count).unwrap_or(usize::MAX);
        vm.hot_add_memory(PageNumber(first), pages)
            .map_err(|error| Failure::generic(format!("memory cannot be added: {error}")))?;
        *added += count;
        let reply = memory.hot_add((first, count));
        drop(memory);
        match reply.take() {
            Some(Err(error)) => Err(Failure::generic(error.to_string())),
            // The guest's answer shows in the state.
            _ => Ok(()),
        }
    }

    /// How it stands.
    pub fn state(&self) -> BalloonState {
        let target = *self.target_mib.lock();
        state(&self.memory.lock(), target)
    }
}

fn state(memory: &DynamicMemory, target_mib: u64) -> BalloonState {
    let (_, report) = memory.reports();
    BalloonState {
        actual_mib: memory.actual() / PAGES_PER_MIB,
        target_mib,
        removed_pages: memory.removed_pages(),
        version: memory
            .version()
            .map(|version| format!("{}.{}", version >> 16, version & 0xFFFF)),
        available_pages: report.map(|report| report.available),
        committed_pages: report.map(|report| report.committed),
    }
}

impl Part for Balloon {
    fn offer(&self) -> Option<(bus::Device, Box<dyn Provider>)> {
        let device = bus::Device::new(interface::DYNAMIC_MEMORY, INSTANCE);
        let (memory, target) = (self.memory.clone(), self.target_mib.clone());
        let events = self.events.clone();
        let mut seen = Seen::default();
        let look = move || {
            let target = *target.lock();
            let memory = memory.lock();
            let actual = memory.actual();
            if seen.actual.replace(actual).is_some_and(|was| was != actual) {
                events.push(Event::Balloon(state(&memory, target)));
            }
        };
        let shared = SharedDynamicMemory(self.memory.clone());
        Some((device, Box::new(Observed::by(shared, look))))
    }

    fn counters(&self) -> Counters {
        let memory = self.memory.lock();
        counted([
            ("pages", memory.actual()),
            ("removed-pages", state(&memory, 0).removed_pages),
            ("status-reports", memory.reports().0),
            ("balloon-responses", memory.balloon_responses()),
            ("complaints", memory.complaint_count()),
        ])
    }

    fn begin(&mut self, _host: &mut Host, vm: &Arc<dyn Vm>) -> Result<(), Failure> {
        *self.added.lock() = 0;
        let mut memory = self.memory.lock();
        memory.restart();
        let owner = Arc::clone(vm);
        memory.observe(move |event| {
            if let MemoryEvent::Taken((first, count)) = event {
                owner.discard(PageNumber(first), count);
            }
        });
        Ok(())
    }

    fn finish(&mut self) {
        self.memory.lock().observe(|_| {});
    }
}

/// What was seen of it last.
#[derive(Default)]
struct Seen {
    /// How many pages it had.
    actual: Option<u64>,
}

impl Devices {
    /// Sets how much memory the guest should have.
    ///
    /// # Errors
    /// When the machine has no dynamic memory.
    pub fn set_balloon(&self, host: &mut Host, target_mib: u32) -> Result<(), Failure> {
        self.balloon()?.set_target(target_mib);
        self.wake(host, Kind::Balloon);
        Ok(())
    }

    /// Gives the guest so many more MiB than it started with.
    ///
    /// # Errors
    /// When the machine has no dynamic memory, or the VM no room.
    pub fn hot_add(&self, host: &mut Host, vm: &dyn Vm, mib: u32) -> Result<(), Failure> {
        self.balloon()?.hot_add(vm, mib)?;
        self.wake(host, Kind::Balloon);
        Ok(())
    }
}
