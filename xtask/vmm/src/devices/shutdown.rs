//! Shutdown: the guest is asked to power off, to restart or to hibernate.

use vmbus_host::integration::{Action, Handle, RequestError, Shutdown};

use super::Counters;
use super::integration::{Integration, failure};
use crate::control::{self, Event, Failure, ShutdownKind};
use crate::runner::Events;

pub(super) fn build() -> Integration<Shutdown> {
    Integration::new(Shutdown::new(), |_| Counters::new())
}

/// Asks the guest. Its answer is an event.
///
/// # Errors
/// When it cannot be asked.
pub(super) fn ask(
    handle: &Handle<Shutdown>,
    arguments: &control::Shutdown,
    events: &Events,
) -> Result<(), Failure> {
    let action = match arguments.kind {
        ShutdownKind::PowerOff => Action::PowerOff,
        ShutdownKind::Reboot => Action::Reboot,
        ShutdownKind::Hibernate => Action::Hibernate,
    };
    let reply = handle.request(action, arguments.force);
    // What cannot be asked is refused at once.
    match reply.take() {
        Some(Ok(())) => events.push(answered(Ok(()))),
        Some(Err(error @ RequestError::Guest(_))) => events.push(answered(Err(error))),
        Some(Err(error)) => return Err(failure("shutdown", error)),
        None => {
            let events = events.clone();
            reply.then(move |result| events.push(answered(result)));
        }
    }
    Ok(())
}

fn answered(result: Result<(), RequestError>) -> Event {
    let (accepted, status, reason) = match result {
        Ok(()) => (true, Some(0), None),
        Err(RequestError::Guest(status)) => (false, Some(status.0), Some(status.to_string())),
        Err(error) => (false, None, Some(error.to_string())),
    };
    Event::ShutdownAnswered {
        accepted,
        status,
        reason,
    }
}
