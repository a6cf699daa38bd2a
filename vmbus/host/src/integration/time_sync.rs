//! Time synchronization: the host's wall clock, once after the negotiation to set the guest's by and then every five
//! seconds (spec ic.md 7).

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use vmbus::protocol::{Guid, interface};

use super::{Component, Host, Version};

/// Time between samples: 5 s in units of 100 ns.
const PERIOD: u64 = 50_000_000;

/// The version from which a sample says at which reference time it was taken.
const V4_0: Version = Version(4, 0);

/// Flag: set the clock.
pub const SYNC: u8 = 1;
/// Flag: this is the time, for your information.
pub const SAMPLE: u8 = 2;

/// The time synchronization component.
#[derive(Debug)]
pub struct TimeSync {
    /// What the host's wall clock showed when the reference clock showed 0, in units of 100 ns since 1601.
    pub wall_at_zero: u64,
    /// How long a message is under way, as the host tells it before version 4.0; units of 100 ns.
    pub round_trip: u64,
    version: Version,
    next: Option<u64>,
    /// Whether the next one says: set the clock.
    sync: bool,
    /// Bodies to send before anything else.
    scripted: VecDeque<Vec<u8>>,
    answers: Vec<u32>,
}

impl TimeSync {
    /// A host whose wall clock shows `wall_at_zero` when the reference clock shows 0.
    pub fn new(wall_at_zero: u64) -> Self {
        Self {
            wall_at_zero,
            round_trip: 0,
            version: V4_0,
            next: None,
            sync: true,
            scripted: VecDeque::new(),
            answers: Vec::new(),
        }
    }

    /// What the host's wall clock shows.
    pub fn wall(&self, now: u64) -> u64 {
        self.wall_at_zero.wrapping_add(now)
    }

    /// Sends a sample that says: set the clock, as after a restore.
    pub fn sync(&mut self, now: u64) {
        self.sync = true;
        self.next = self.next.map(|_| now);
    }

    /// Sends this body before anything else: for tests that play an odd host.
    pub fn send_body(&mut self, body: Vec<u8>) {
        self.scripted.push_back(body);
    }

    /// The status of each answer, in order.
    pub fn answers(&self) -> &[u32] {
        &self.answers
    }

    /// The body of a sample in the version in use.
    pub fn body(&self, wall: u64, reference: u64, flags: u8) -> Vec<u8> {
        let mut body = Vec::from(wall.to_le_bytes());
        if self.version >= V4_0 {
            body.extend_from_slice(&reference.to_le_bytes());
            // No leap second, stratum 1, reserved.
            body.extend_from_slice(&[flags, 0, 1, 0, 0, 0, 0, 0]);
        } else {
            body.extend_from_slice(&[0; 8]);
            body.extend_from_slice(&self.round_trip.to_le_bytes());
            body.extend_from_slice(&[flags, 0, 0, 0]);
        }
        body
    }
}

impl Component for TimeSync {
    const KIND: u16 = 4;
    const INTERFACE: Guid = interface::TIME_SYNC;
    const INSTANCE: Guid = Guid::literal("2dd1ce17-079e-403c-b352-a1921ee207ee");

    fn versions(host: Host) -> &'static [Version] {
        match host {
            Host::HyperV => &[Version(1, 0), Version(3, 0), V4_0],
            Host::OpenVmm => &[V4_0],
        }
    }

    fn ready(&mut self, now: u64, version: Version) {
        self.version = version;
        self.sync = true;
        self.next = Some(now);
    }

    fn request(&mut self, now: u64) -> Option<Vec<u8>> {
        if let Some(body) = self.scripted.pop_front() {
            return Some(body);
        }
        if self.next.is_none_or(|next| now < next) {
            return None;
        }
        self.next = Some(now + PERIOD);
        let flags = if core::mem::take(&mut self.sync) {
            SYNC
        } else {
            SAMPLE
        };
        // The time is taken, and then the message is under way for a while.
        let taken = now.saturating_sub(self.round_trip / 2);
        Some(self.body(self.wall(taken), taken, flags))
    }

    fn answered(
        &mut self,
        _now: u64,
        request: &[u8],
        status: u32,
        answer: &[u8],
    ) -> Result<(), &'static str> {
        self.answers.push(status);
        if request == answer {
            Ok(())
        } else {
            Err("a sample that comes back changed")
        }
    }

    fn deadline(&self) -> Option<u64> {
        if self.scripted.is_empty() {
            self.next
        } else {
            Some(0)
        }
    }

    fn stopped(&mut self) {
        self.next = None;
        self.scripted.clear();
    }
}
