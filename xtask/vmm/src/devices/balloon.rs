//! Dynamic memory: how much the guest should have, and what becomes of what it gives.

use std::sync::Arc;

use vmbus::ids::PageNumber;
use vmbus::protocol::{Guid, interface};
use vmbus_host::bus;
use vmbus_host::dynamic_memory::DynamicMemory;
use vmbus_host::machine::SharedDynamicMemory;
use vmbus_host::provider::Provider;
use vmbus_host::sync::Mutex;

use super::Part;
use super::observed::Observed;
use crate::config;
use crate::control::{BalloonState, Event};
use crate::runner::{Events, Vm};

/// Pages of a MiB.
const PAGES_PER_MIB: u64 = 256;

/// Hyper-V has one such device, always with this instance.
const INSTANCE: Guid = Guid::literal("1eccfd72-4b41-45ef-b73a-4a6e44c12924");

/// Dynamic memory.
pub struct Balloon {
    memory: Arc<Mutex<DynamicMemory>>,
    target_mib: Arc<Mutex<u64>>,
    vm: Arc<Mutex<Option<Arc<dyn Vm>>>>,
    events: Events,
}

impl Balloon {
    pub(super) fn new(_config: &config::Balloon, memory_mib: u32, events: Events) -> Self {
        let mib = u64::from(memory_mib);
        let memory = DynamicMemory::new(mib * PAGES_PER_MIB);
        Self {
            memory: Arc::new(Mutex::new(memory)),
            target_mib: Arc::new(Mutex::new(mib)),
            vm: Arc::default(),
            events,
        }
    }

    /// Sets how much memory the guest should have, in MiB.
    pub fn set_target(&self, mib: u32) {
        let mib = u64::from(mib);
        *self.target_mib.lock() = mib;
        self.memory.lock().set_target(mib * PAGES_PER_MIB);
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
        removed_pages: memory.removed().iter().map(|(_, count)| count).sum(),
        version: memory
            .version()
            .map(|version| format!("{}.{}", version >> 16, version & 0xFFFF)),
        available_pages: report.map(|report| report.available),
        committed_pages: report.map(|report| report.committed),
    }
}

impl Part for Balloon {
    fn offer(&self) -> bus::Device {
        bus::Device::new(interface::DYNAMIC_MEMORY, INSTANCE)
    }

    fn provider(&self) -> Box<dyn Provider> {
        let (memory, target) = (self.memory.clone(), self.target_mib.clone());
        let (vm, events) = (self.vm.clone(), self.events.clone());
        let mut seen = Seen::default();
        let look = move || {
            let target = *target.lock();
            let memory = memory.lock();
            if let Some(vm) = &*vm.lock() {
                for &(first, count) in memory.removed().get(seen.removed..).unwrap_or_default() {
                    vm.discard(PageNumber(first), count);
                }
            }
            seen.removed = memory.removed().len();
            let actual = memory.actual();
            if seen.actual.replace(actual).is_some_and(|was| was != actual) {
                events.push(Event::Balloon(state(&memory, target)));
            }
        };
        let shared = SharedDynamicMemory(self.memory.clone());
        Box::new(Observed::by(shared, look))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let memory = self.memory.lock();
        vec![
            ("pages", memory.actual()),
            ("removed-pages", state(&memory, 0).removed_pages),
            ("status-reports", memory.reports().0),
            ("balloon-responses", memory.balloon_responses()),
            ("complaints", memory.complaints().len() as u64),
        ]
    }

    fn begin(&mut self, vm: &Arc<dyn Vm>) {
        *self.vm.lock() = Some(Arc::clone(vm));
    }

    fn finish(&mut self) {
        *self.vm.lock() = None;
    }
}

/// What was seen of it last.
#[derive(Default)]
struct Seen {
    /// How many runs the guest had given away.
    removed: usize,
    /// How many pages it had.
    actual: Option<u64>,
}
