//! Heartbeat: a number every two seconds, which the guest gives back plus one (spec ic.md 5).

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use vmbus::protocol::{Guid, interface};

use super::message::Version;
use super::{Component, Handle, Host};

/// Time between heartbeats: 2 s in units of 100 ns.
const PERIOD: u64 = 20_000_000;

/// The heartbeat component.
#[derive(Debug)]
pub struct Heartbeat {
    /// Bytes of a request's body: 16 or 40, as hosts have them.
    pub body_size: usize,
    next: Option<u64>,
    sequence: u64,
    sent: u64,
    answered: u64,
    last_answer: Option<u64>,
    /// When the request that waits for its answer was sent.
    asked: Option<u64>,
    application: ApplicationState,
}

/// What the host shows to its user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Contact {
    /// The guest has never answered.
    Never,
    /// The guest answers.
    Ok,
    /// The guest has answered, and does not any more.
    Lost,
}

/// How the guest's applications are, as the guest says (spec ic.md 5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ApplicationState(pub u32);

impl ApplicationState {
    /// Nobody in the guest says.
    pub const UNKNOWN: Self = Self(0);
    /// All is well.
    pub const HEALTHY: Self = Self(1);
    /// Something is wrong.
    pub const CRITICAL: Self = Self(2);
    /// They have stopped.
    pub const STOPPED: Self = Self(3);
}

impl fmt::Display for ApplicationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UNKNOWN => f.write_str("unknown"),
            Self::HEALTHY => f.write_str("healthy"),
            Self::CRITICAL => f.write_str("critical"),
            Self::STOPPED => f.write_str("stopped"),
            Self(other) => write!(f, "state {other}"),
        }
    }
}

/// What the host knows of the guest's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeartbeatStatus {
    /// Whether the guest answers.
    pub contact: Contact,
    /// How its applications are.
    pub application: ApplicationState,
    /// Heartbeats that should have been answered by now, since the last that was.
    pub missed: u64,
    /// How many heartbeats were sent.
    pub sent: u64,
    /// How many were answered as they have to be.
    pub answered: u64,
}

impl Heartbeat {
    /// One whose first number is `sequence`.
    pub fn new(sequence: u64) -> Self {
        Self {
            body_size: 40,
            next: None,
            sequence,
            sent: 0,
            answered: 0,
            last_answer: None,
            asked: None,
            application: ApplicationState::UNKNOWN,
        }
    }

    /// How many heartbeats were sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// How many were answered as they have to be.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Whether the guest is alive, as far as the host can tell: three periods may pass without an answer.
    pub fn contact(&self, now: u64) -> Contact {
        match self.last_answer {
            None => Contact::Never,
            Some(at) if now <= at.saturating_add(3 * PERIOD) => Contact::Ok,
            Some(_) => Contact::Lost,
        }
    }

    /// All that the host knows at `now`, in reference time.
    pub fn status(&self, now: u64) -> HeartbeatStatus {
        let waited = self.asked.map_or(0, |at| now.saturating_sub(at));
        HeartbeatStatus {
            contact: self.contact(now),
            application: self.application,
            missed: waited / PERIOD,
            sent: self.sent,
            answered: self.answered,
        }
    }
}

impl Handle<Heartbeat> {
    /// All that the host knows at `now`, in reference time.
    pub fn status(&self, now: u64) -> HeartbeatStatus {
        self.lock().component.status(now)
    }
}

impl Component for Heartbeat {
    const KIND: u16 = 1;
    const INTERFACE: Guid = interface::HEARTBEAT;
    const INSTANCE: Guid = Guid::literal("fd149e91-82e0-4a7d-afa6-2a4166cbd7c0");

    fn versions(host: Host) -> &'static [Version] {
        match host {
            Host::HyperV => &[Version(1, 0), Version(3, 0), Version(3, 1)],
            Host::OpenVmm => &[],
        }
    }

    fn ready(&mut self, now: u64, _version: Version) {
        self.next = Some(now);
    }

    fn request(&mut self, now: u64) -> Option<Vec<u8>> {
        if self.next.is_none_or(|next| now < next) {
            return None;
        }
        self.next = Some(now.saturating_add(PERIOD));
        self.asked = Some(now);
        self.sent += 1;
        // What is reserved is not zero: the guest has to give it back as it is.
        let mut body: Vec<u8> = vec![0xA5; self.body_size];
        let sequence = self.sequence.to_le_bytes();
        for (byte, value) in body.iter_mut().zip(sequence.into_iter().chain([0; 4])) {
            *byte = value;
        }
        Some(body)
    }

    fn answered(
        &mut self,
        now: u64,
        request: &[u8],
        status: u32,
        answer: &[u8],
    ) -> Result<(), &'static str> {
        self.asked = None;
        if status != 0 {
            return Err("a heartbeat that is answered with a failure");
        }
        let (Some((asked, request)), Some((got, answer))) = (
            request.split_first_chunk::<8>(),
            answer.split_first_chunk::<8>(),
        ) else {
            return Err("a heartbeat without a number");
        };
        let (asked, got) = (u64::from_le_bytes(*asked), u64::from_le_bytes(*got));
        if got != asked.wrapping_add(1) {
            return Err("a heartbeat with the wrong number");
        }
        // Behind the number the guest may say how its applications are; nothing else is its own.
        let (application, request, answer) = match (
            request.split_first_chunk::<4>(),
            answer.split_first_chunk::<4>(),
        ) {
            (Some((_, request)), Some((application, answer))) => {
                (u32::from_le_bytes(*application), request, answer)
            }
            _ => (0, request, answer),
        };
        if request != answer {
            return Err("a heartbeat with other bytes changed");
        }
        self.application = ApplicationState(application);
        self.sequence = got;
        self.answered += 1;
        self.last_answer = Some(now);
        Ok(())
    }

    fn deadline(&self) -> Option<u64> {
        self.next
    }

    fn stopped(&mut self) {
        self.next = None;
        self.asked = None;
        self.application = ApplicationState::UNKNOWN;
    }
}
