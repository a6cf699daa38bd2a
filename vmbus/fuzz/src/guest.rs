//! A guest on a machine, for inputs that play a whole host.

use std::sync::{Arc, Weak};

use vmbus::Vmbus;
use vmbus::bus::Config;
use vmbus::ids::ChannelId;
use vmbus_host::bus::Profile;
use vmbus_host::machine::{Guest, Machine};

/// One second in units of 100 ns.
pub(crate) const SECOND: u64 = 10_000_000;

/// The guest, as the machine knows it: not its owner, or neither would ever be freed.
struct GuestEnd(Weak<Vmbus>);

impl Guest for GuestEnd {
    fn on_message(&self, payload: &[u8]) -> bool {
        self.0
            .upgrade()
            .is_none_or(|vmbus| vmbus.on_message(payload))
    }

    fn on_event(&self, channel: ChannelId) {
        if let Some(vmbus) = self.0.upgrade() {
            vmbus.on_event(channel);
        }
    }

    fn run_work(&self) {
        if let Some(vmbus) = self.0.upgrade() {
            vmbus.run_work();
        }
    }

    fn deadline(&self) -> Option<u64> {
        self.0.upgrade()?.deadline()
    }
}

/// A guest that is not connected yet, on a machine with this host.
pub(crate) fn guest(profile: Profile) -> (Arc<Machine>, Arc<Vmbus>) {
    let machine = Machine::new(profile);
    let vmbus = Vmbus::new(machine.clone(), Config::default());
    machine.attach(Arc::new(GuestEnd(Arc::downgrade(&vmbus))));
    (machine, vmbus)
}
