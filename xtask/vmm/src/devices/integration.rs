//! What the integration components have in common: a handle that asks the guest, and counters.

use vmbus_host::bus;
use vmbus_host::integration::{Component, Handle, Host, RequestError};
use vmbus_host::message_faults;
use vmbus_host::provider::Provider;

use super::{Counters, Part};
use crate::control::{Failure, Fault, MessageFault};

/// An integration component.
pub(super) struct Integration<C> {
    /// What asks the guest.
    pub(super) handle: Handle<C>,
    /// What it counts besides what all do.
    more: fn(&C) -> Counters,
}

impl<C: Component> Integration<C> {
    /// A component in every version that Hyper-V has.
    pub(super) fn new(component: C, more: fn(&C) -> Counters) -> Self {
        Self {
            handle: Handle::new(Host::HyperV, component),
            more,
        }
    }
}

impl<C: Component> Part for Integration<C> {
    fn offer(&self) -> Option<(bus::Device, Box<dyn Provider>)> {
        Some((Handle::<C>::device(), Box::new(self.handle.clone())))
    }

    fn counters(&self) -> Counters {
        let service = self.handle.lock();
        let mut counters = (self.more)(&service.component);
        counters.insert("negotiations".into(), service.negotiations());
        counters.insert("complaints".into(), service.complaint_count());
        counters
    }

    fn inject(&self, fault: &Fault) -> Result<bool, Failure> {
        let Fault::Message { what, messages } = *fault else {
            return Ok(false);
        };
        self.handle.inject(of_messages(what), messages);
        Ok(true)
    }

    fn clear_faults(&self) {
        self.handle.heal();
    }
}

/// The fault in the terms of those who make messages.
pub(super) fn of_messages(what: MessageFault) -> message_faults::MessageFault {
    match what {
        MessageFault::WrongId => message_faults::MessageFault::WrongId,
        MessageFault::WrongType => message_faults::MessageFault::WrongType,
        MessageFault::Short => message_faults::MessageFault::Short,
        MessageFault::Oversized => message_faults::MessageFault::Oversized,
        MessageFault::Overstated => message_faults::MessageFault::Overstated,
        MessageFault::Lost => message_faults::MessageFault::Lost,
        MessageFault::Twice => message_faults::MessageFault::Twice,
    }
}

/// Why a request to the guest came to nothing.
pub(super) fn failure(device: &str, error: RequestError) -> Failure {
    use crate::control::Class;
    let class = match error {
        RequestError::NotOpen
        | RequestError::Negotiating
        | RequestError::NoCommonVersion
        | RequestError::Negotiation(_)
        | RequestError::Closed => Class::DeviceNotActive,
        _ => Class::GenericError,
    };
    Failure::new(class, format!("{device}: {error}"))
}
