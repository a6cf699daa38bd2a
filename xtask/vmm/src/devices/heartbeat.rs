//! Heartbeat: whether the guest is alive.

use vmbus_host::integration::{self, Contact, Heartbeat};

use super::counted;
use super::integration::Integration;
use crate::control::{self, HeartbeatState};

pub(super) fn build() -> Integration<Heartbeat> {
    // Where hosts begin is not public; a number that no guest can guess shows those that do.
    let component = Heartbeat::new(0x1000);
    Integration::new(component, |heartbeat| {
        counted([
            ("sent", heartbeat.sent()),
            ("answered", heartbeat.answered()),
        ])
    })
}

impl Integration<Heartbeat> {
    /// What the host knows of the guest's life at this reference time.
    pub(super) fn state(&self, now: u64) -> HeartbeatState {
        let integration::HeartbeatStatus {
            contact,
            application,
            missed,
            sent,
            answered,
        } = self.handle.status(now);
        HeartbeatState {
            contact: match contact {
                Contact::Never => control::Contact::Never,
                Contact::Ok => control::Contact::Ok,
                Contact::Lost => control::Contact::Lost,
            },
            application: application.to_string(),
            missed,
            sent,
            answered,
        }
    }
}
