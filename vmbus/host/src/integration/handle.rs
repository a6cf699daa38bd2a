//! A component behind a lock: the provider of its channel, and the handle that any thread has to it.

use alloc::sync::Arc;
use core::fmt;

use crate::sync::{Mutex, MutexGuard};
use vmbus::ids::ChannelId;
use vmbus::protocol::Status;
use vmbus::ring::{Outgoing, PacketBuffer, PushError};

use super::{Component, Host, Service, Stage, Version};
use crate::bus::Device;
use crate::channel::HostChannel;
use crate::machine::Machine;
use crate::message_faults::MessageFault;
use crate::provider::{Link, Provider};

/// Packets that are taken before others have their turn: more than a guest in good order ever has under way.
const BUDGET: usize = 64;

/// A component of a host. Clones are the same; one is the provider of the channel, others are in the hands of who asks.
pub struct Handle<C>(Arc<Inner<C>>);

struct Inner<C> {
    service: Arc<Mutex<Service<C>>>,
    link: Mutex<Option<Link>>,
}

impl<C> Clone for Handle<C> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<C: Component> Handle<C> {
    /// A component with the versions that this host offers.
    pub fn new(host: Host, component: C) -> Self {
        Self::of(Arc::new(Mutex::new(Service::new(host, component))))
    }

    /// The handle of a service that a test has, too.
    pub fn of(service: Arc<Mutex<Service<C>>>) -> Self {
        Self(Arc::new(Inner {
            service,
            link: Mutex::new(None),
        }))
    }

    /// The device to offer.
    pub const fn device() -> Device {
        Device::new(C::INTERFACE, C::INSTANCE)
    }

    /// How far host and guest have come.
    pub fn stage(&self) -> Stage {
        self.lock().stage()
    }

    /// The message version in use.
    pub fn version(&self) -> Option<Version> {
        self.lock().version()
    }

    /// The next `count` messages to the guest have this fault.
    pub fn inject(&self, fault: MessageFault, count: u32) {
        self.act(|service| service.inject(fault, count));
    }

    /// Nothing goes wrong with messages any more.
    pub fn heal(&self) {
        self.act(Service::heal);
    }

    /// Negotiates anew, as a host does after a restore.
    pub fn renegotiate(&self) {
        self.act(|service| {
            if service.stage() != Stage::Closed {
                service.renegotiate();
            }
        });
    }

    /// The service. Whoever changes it through this has to wake the host.
    pub fn lock(&self) -> MutexGuard<'_, Service<C>> {
        self.0.service.lock()
    }

    /// Does something with the service, gives the answers that it made to who waits for them, and has the host look.
    pub(super) fn act<R>(&self, with: impl FnOnce(&mut Service<C>) -> R) -> R {
        let result = self.quietly(with);
        self.wake();
        result
    }

    fn wake(&self) {
        let link = self.0.link.lock().clone();
        if let Some(link) = link {
            link.wake();
        }
    }

    fn quietly<R>(&self, with: impl FnOnce(&mut Service<C>) -> R) -> R {
        let mut service = self.lock();
        let result = with(&mut service);
        let outcomes = service.component.outcomes();
        drop(service);
        outcomes.deliver();
        result
    }
}

impl<C: Component> Provider for Handle<C> {
    fn attached(&mut self, link: Link) {
        *self.0.link.lock() = Some(link);
    }

    fn opened(&mut self, _channel: &mut HostChannel) -> Status {
        self.quietly(Service::opened);
        Status::SUCCESS
    }

    fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        let mut flooded = false;
        self.quietly(|service| {
            let mut packet = PacketBuffer::default();
            let mut count = 0;
            // A packet that came before the room of the last one was given back brings no signal: look once more.
            while let Ok(true) = channel.receive(&mut packet) {
                service.receive(now, packet.payload());
                if channel.release().is_err() {
                    break;
                }
                count += 1;
                if count == BUDGET {
                    flooded = true;
                    break;
                }
            }
            while let Some(message) = service.poll_message(now) {
                match channel.send(&Outgoing::in_band([&message, &[]])) {
                    Ok(()) => {}
                    Err(PushError::Full { .. }) => return service.unsent(message),
                    // Longer than the guest's ring, or the ring is broken: it will never go.
                    Err(PushError::TooLarge { .. } | PushError::Ring(_)) => {}
                }
            }
        });
        if flooded {
            self.wake();
        }
    }

    fn closed(&mut self) {
        self.quietly(Service::closed);
    }

    fn deadline(&self) -> Option<u64> {
        self.lock().deadline()
    }
}

impl<C: Component> fmt::Debug for Handle<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lock().fmt(f)
    }
}

/// Offers a component on a machine. What is asked of the service itself goes to the guest when the machine next
/// settles. `None` when no channel number is free.
pub fn offer<C: Component>(
    machine: &Machine,
    host: Host,
    component: C,
) -> Option<(ChannelId, Arc<Mutex<Service<C>>>)> {
    let service = Arc::new(Mutex::new(Service::new(host, component)));
    let id = offer_again(machine, &service)?;
    Some((id, service))
}

/// Offers a component again whose first device was rescinded.
pub fn offer_again<C: Component>(
    machine: &Machine,
    service: &Arc<Mutex<Service<C>>>,
) -> Option<ChannelId> {
    machine.add(Handle::<C>::device(), Handle::of(service.clone()))
}
