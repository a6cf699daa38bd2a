//! The host's end of the integration components (spec ic.md): what they have in common.
//!
//! A [`Service`] negotiates, sends one request at a time and checks the answers; what it asks is the matter of its
//! [`Component`]. Neither does I/O: both eat messages and times and make messages. A [`Handle`] puts one on a host, as the
//! provider of its channel, and is what any thread asks the guest through: it gives a [`Reply`] at once, and the
//! answer when the guest has given it.

mod error;
mod handle;
mod heartbeat;
pub mod kvp;
mod message;
pub(crate) mod reply;
mod requests;
mod service;
mod shutdown;
mod time_sync;

use alloc::vec::Vec;

use vmbus::protocol::Guid;

pub use error::RequestError;
pub use handle::{Handle, offer, offer_again};
pub use heartbeat::{ApplicationState, Contact, Heartbeat, HeartbeatStatus};
pub use kvp::Kvp;
pub use message::{ANSWER_FLAGS, GuestStatus, HEADER, REQUEST_FLAGS, Version, message};
pub use reply::{Outcomes, Reply};
pub use service::{Service, Stage};
pub use shutdown::{Action, PLANNED, Shutdown, ShutdownRequest};
#[cfg(feature = "std")]
pub use time_sync::SystemClock;
pub use time_sync::{HostClock, SAMPLE, SYNC, TimeSync, TimeSyncStatus};

/// Whose habits a host has (spec ic.md 11).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    /// Offers every component in every version.
    HyperV,
    /// Offers few components, and time sync in its newest version only.
    OpenVmm,
}

/// What one component asks, and what it makes of the answers.
pub trait Component: Send + 'static {
    /// Its message type.
    const KIND: u16;
    /// Its class.
    const INTERFACE: Guid;
    /// Which device it is.
    const INSTANCE: Guid;

    /// The message versions that a host offers; none if it has no such component.
    fn versions(host: Host) -> &'static [Version];

    /// Guest and host have agreed on a version.
    fn ready(&mut self, now: u64, version: Version);

    /// The body of the next request, if one is due.
    fn request(&mut self, now: u64) -> Option<Vec<u8>>;

    /// The guest's answer to a request. An error is what no guest may do.
    fn answered(
        &mut self,
        now: u64,
        request: &[u8],
        status: u32,
        answer: &[u8],
    ) -> Result<(), &'static str>;

    /// When [`request`](Self::request) has something to say.
    fn deadline(&self) -> Option<u64>;

    /// The channel is closed, or the negotiation begins anew.
    fn stopped(&mut self);

    /// No answer to the last request will come, and why.
    fn unanswered(&mut self, _why: RequestError) {}

    /// When [`expire`](Self::expire) has something to do, even while a request is under way.
    fn expiry(&self) -> Option<u64> {
        None
    }

    /// Ends what has taken too long.
    fn expire(&mut self, _now: u64) {}

    /// Answers for those who wait, to be given when no lock is held.
    fn outcomes(&mut self) -> Outcomes {
        Outcomes::default()
    }
}
