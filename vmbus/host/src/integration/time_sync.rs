//! Time synchronization: the host's wall clock, once after the negotiation to set the guest's by and then every five
//! seconds (spec ic.md 7).

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use vmbus::protocol::{Guid, interface};

use super::message::{GuestStatus, Version};
use super::reply::{Outcomes, Promise, Reply, promise};
use super::requests::Requests;
use super::{Component, Handle, Host, RequestError};

/// Time between samples: 5 s in units of 100 ns.
const PERIOD: u64 = 50_000_000;

/// The version from which a sample says at which reference time it was taken.
const V4_0: Version = Version(4, 0);

/// Flag: set the clock.
pub const SYNC: u8 = 1;
/// Flag: this is the time, for your information.
pub const SAMPLE: u8 = 2;

/// How long the guest may take to answer a sync: 30 s in units of 100 ns.
const TIME_LIMIT: u64 = 300_000_000;

/// The most answers whose status is kept.
const ANSWERS: usize = 256;

/// The host's wall clock.
pub trait HostClock: Send {
    /// What it shows when the guest's reference clock shows `reference`, about now: in units of 100 ns since
    /// 1601-01-01 UTC.
    fn wall(&self, reference: u64) -> u64;
}

/// A wall clock that keeps step with the reference clock.
#[derive(Clone, Copy, Debug)]
struct Reckoned {
    at_zero: u64,
}

impl HostClock for Reckoned {
    fn wall(&self, reference: u64) -> u64 {
        self.at_zero.wrapping_add(reference)
    }
}

/// The wall clock of the machine that the host runs on.
#[cfg(feature = "std")]
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

#[cfg(feature = "std")]
impl HostClock for SystemClock {
    fn wall(&self, _reference: u64) -> u64 {
        /// 1970-01-01 in units of 100 ns since 1601-01-01.
        const UNIX_EPOCH: u64 = 116_444_736_000_000_000;
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        // A clock from before 1970 is one that nobody has set.
        let since = since.map_or(0, |since| since.as_nanos() / 100);
        UNIX_EPOCH.saturating_add(u64::try_from(since).unwrap_or(u64::MAX))
    }
}

/// The time synchronization component.
pub struct TimeSync {
    clock: Box<dyn HostClock>,
    /// How far what the guest is told is ahead of the clock, in units of 100 ns.
    offset: i64,
    /// How long a message is under way, as the host tells it before version 4.0; units of 100 ns.
    pub round_trip: u64,
    /// Whether samples are sent every five seconds.
    samples: bool,
    version: Version,
    next: Option<u64>,
    /// Whether the next one says: set the clock.
    sync: bool,
    /// Those who asked for the clock to be set.
    requests: Requests<Promise<Result<(), RequestError>>>,
    outcomes: Outcomes,
    /// Bodies to send before anything else.
    scripted: VecDeque<Vec<u8>>,
    answers: Vec<u32>,
    counts: [u64; 2],
    last: Option<GuestStatus>,
}

/// What was told to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimeSyncStatus {
    /// How far what the guest is told is ahead of the host's clock, in units of 100 ns.
    pub offset: i64,
    /// Messages that said: set the clock.
    pub syncs: u64,
    /// Messages that said: this is the time, for your information.
    pub samples: u64,
    /// What the guest answered last.
    pub last_answer: Option<GuestStatus>,
}

impl TimeSync {
    /// A host whose wall clock shows `wall_at_zero` when the reference clock shows 0, and keeps step with it; units of
    /// 100 ns since 1601-01-01 UTC.
    pub fn new(wall_at_zero: u64) -> Self {
        Self::with_clock(Reckoned {
            at_zero: wall_at_zero,
        })
    }

    /// A host with this wall clock.
    pub fn with_clock(clock: impl HostClock + 'static) -> Self {
        Self {
            clock: Box::new(clock),
            offset: 0,
            round_trip: 0,
            samples: true,
            version: V4_0,
            next: None,
            sync: true,
            requests: Requests::new(16, TIME_LIMIT),
            outcomes: Outcomes::default(),
            scripted: VecDeque::new(),
            answers: Vec::new(),
            counts: [0; 2],
            last: None,
        }
    }

    /// What the guest is told when the reference clock shows `now`.
    pub fn wall(&self, now: u64) -> u64 {
        self.clock.wall(now).wrapping_add_signed(self.offset)
    }

    /// Steps the host's clock, as its user does: the guest is told with the next sample.
    pub fn step(&mut self, by: i64) {
        self.offset = self.offset.saturating_add(by);
    }

    /// Sends a sample that says: set the clock, as after a restore.
    pub fn sync(&mut self, now: u64) {
        self.sync = true;
        self.next = Some(now).filter(|_| self.next.is_some());
    }

    /// Has the next message say: set the clock. The reply comes with the guest's answer.
    fn request_sync(&mut self) -> Reply<Result<(), RequestError>> {
        let (promise, reply) = promise();
        match self.requests.push(promise) {
            Ok(()) => reply,
            Err(_) => Reply::ready(Err(RequestError::Busy)),
        }
    }

    /// Sends this body before anything else: for tests that play an odd host.
    pub fn send_body(&mut self, body: Vec<u8>) {
        self.scripted.push_back(body);
    }

    /// What was told to the guest.
    pub fn status(&self) -> TimeSyncStatus {
        let [syncs, samples] = self.counts;
        TimeSyncStatus {
            offset: self.offset,
            syncs,
            samples,
            last_answer: self.last,
        }
    }

    /// The status of each answer, in order, of the first some hundred.
    pub fn answers(&self) -> &[u32] {
        &self.answers
    }

    /// When the next message goes by itself.
    fn due(&self) -> Option<u64> {
        self.next.filter(|_| self.samples || self.sync)
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

impl Handle<TimeSync> {
    /// Tells the guest to set its clock now. The reply comes with its answer.
    pub fn sync_now(&self) -> Reply<Result<(), RequestError>> {
        self.act(|service| match service.ready() {
            Ok(_) => service.component.request_sync(),
            Err(error) => Reply::ready(Err(error)),
        })
    }

    /// Steps the host's clock by so many units of 100 ns; the guest is told with the next sample, or with
    /// [`sync_now`](Self::sync_now).
    pub fn step(&self, by: i64) {
        self.lock().component.step(by);
    }

    /// Whether samples are sent every five seconds.
    pub fn set_samples(&self, on: bool) {
        self.act(|service| service.component.samples = on);
    }

    /// What was told to the guest.
    pub fn status(&self) -> TimeSyncStatus {
        self.lock().component.status()
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
        let asked = self.requests.next().is_some();
        if !asked && self.due().is_none_or(|due| now < due) {
            return None;
        }
        self.next = Some(now.saturating_add(PERIOD));
        let sync = core::mem::take(&mut self.sync) || asked;
        let count = if sync { 0 } else { 1 };
        if let Some(count) = self.counts.get_mut(count) {
            *count += 1;
        }
        let flags = if sync { SYNC } else { SAMPLE };
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
        let status = GuestStatus(status);
        self.last = Some(status);
        if self.answers.len() < ANSWERS {
            self.answers.push(status.0);
        }
        if let Some(promise) = self.requests.answered() {
            let outcome = if status.is_ok() {
                Ok(())
            } else {
                Err(RequestError::Guest(status))
            };
            self.outcomes.add(promise, outcome);
        }
        if request == answer {
            Ok(())
        } else {
            Err("a sample that comes back changed")
        }
    }

    fn deadline(&self) -> Option<u64> {
        if self.scripted.is_empty() && !self.requests.is_waiting() {
            self.due()
        } else {
            Some(0)
        }
    }

    fn stopped(&mut self) {
        self.next = None;
        self.scripted.clear();
        for promise in self.requests.drain() {
            self.outcomes.add(promise, Err(RequestError::Closed));
        }
    }

    fn unanswered(&mut self, why: RequestError) {
        if let Some(promise) = self.requests.answered() {
            self.outcomes.add(promise, Err(why));
        }
    }

    fn expiry(&self) -> Option<u64> {
        self.requests.expiry()
    }

    fn expire(&mut self, now: u64) {
        for promise in self.requests.expire(now) {
            self.outcomes.add(promise, Err(RequestError::TimedOut));
        }
    }

    fn outcomes(&mut self) -> Outcomes {
        core::mem::take(&mut self.outcomes)
    }
}

impl fmt::Debug for TimeSync {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.status().fmt(f)
    }
}
