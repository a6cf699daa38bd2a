//! Shutdown: the host's user asks the guest to power off, to restart or to hibernate (spec ic.md 6).

use alloc::string::String;
use alloc::vec::Vec;

use vmbus::protocol::{Guid, interface};

use super::message::{GuestStatus, Version};
use super::reply::{Outcomes, Promise, Reply, promise};
use super::requests::Requests;
use super::{Component, Handle, Host, RequestError};

/// Bytes of a request's body.
const BODY: usize = 2060;

/// Units of UTF-16 that the text may have, its end not counted.
const TEXT: usize = 1023;

/// A planned shutdown, as hosts code it.
pub const PLANNED: u32 = 0x8000_0000;

/// How long the guest may take to say yes or no: 30 s in units of 100 ns.
const TIME_LIMIT: u64 = 300_000_000;

/// Flag: whatever is still running.
const FORCE: u32 = 1;

/// What the guest is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Switch itself off.
    PowerOff,
    /// Start anew; from version 3.1.
    Reboot,
    /// Keep its memory on disk and switch itself off; from version 3.2.
    Hibernate,
}

impl Action {
    /// The version that has this action.
    const fn since(self) -> Version {
        match self {
            Self::PowerOff => Version(1, 0),
            Self::Reboot => Version(3, 1),
            Self::Hibernate => Version(3, 2),
        }
    }

    const fn flags(self) -> u32 {
        match self {
            Self::PowerOff => 0,
            Self::Reboot => 2,
            Self::Hibernate => 4,
        }
    }
}

/// What the host asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShutdownRequest {
    /// Why.
    pub reason: u32,
    /// How long the guest may take, in seconds.
    pub timeout_seconds: u32,
    /// Bit 0 force, bit 1 restart, bit 2 hibernate.
    pub flags: u32,
    /// For the guest's log.
    pub text: String,
}

impl ShutdownRequest {
    /// A planned request with these flags.
    pub fn new(flags: u32) -> Self {
        Self {
            reason: PLANNED,
            timeout_seconds: 0,
            flags,
            text: String::new(),
        }
    }

    /// A planned request for this; `force` is for programs that do not end by themselves.
    pub fn to(action: Action, force: bool) -> Self {
        Self::new(action.flags() | if force { FORCE } else { 0 })
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(BODY);
        for word in [self.reason, self.timeout_seconds, self.flags] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        for unit in self.text.encode_utf16() {
            body.extend_from_slice(&unit.to_le_bytes());
        }
        body.resize(BODY, 0);
        body
    }
}

/// The shutdown component.
#[derive(Debug)]
pub struct Shutdown {
    requests: Requests<Asked>,
    outcomes: Outcomes,
    answer: Option<u32>,
}

#[derive(Debug)]
struct Asked {
    request: ShutdownRequest,
    promise: Promise<Result<(), RequestError>>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// One that asks for nothing.
    pub fn new() -> Self {
        Self {
            // A second request may correct the first; more make no sense.
            requests: Requests::new(2, TIME_LIMIT),
            outcomes: Outcomes::default(),
            answer: None,
        }
    }

    /// How long the guest may take to answer, in units of 100 ns.
    pub fn set_time_limit(&mut self, limit: u64) {
        self.requests.time_limit = limit;
    }

    /// Asks the guest, as soon as no other request is under way, whatever its version.
    pub fn ask(&mut self, request: ShutdownRequest) -> Reply<Result<(), RequestError>> {
        if request.text.encode_utf16().count() > TEXT {
            return Reply::ready(Err(RequestError::TooLong {
                what: "the text for the guest's log",
                limit: TEXT,
            }));
        }
        let (promise, reply) = promise();
        self.answer = None;
        match self.requests.push(Asked { request, promise }) {
            Ok(()) => reply,
            Err(_) => Reply::ready(Err(RequestError::Busy)),
        }
    }

    /// The status that the guest has answered the last request with.
    pub fn answer(&self) -> Option<u32> {
        self.answer
    }
}

impl Handle<Shutdown> {
    /// Asks the guest. The reply comes when it has said yes or no; then it acts, which shows in other ways.
    pub fn request(&self, action: Action, force: bool) -> Reply<Result<(), RequestError>> {
        self.act(|service| {
            let speaks = match service.ready() {
                Ok(version) => version,
                Err(error) => return Reply::ready(Err(error)),
            };
            let needs = action.since();
            if speaks < needs {
                return Reply::ready(Err(RequestError::TooOld { speaks, needs }));
            }
            service.component.ask(ShutdownRequest::to(action, force))
        })
    }
}

impl Component for Shutdown {
    const KIND: u16 = 3;
    const INTERFACE: Guid = interface::SHUTDOWN;
    const INSTANCE: Guid = Guid::literal("b6650ff7-33bc-4840-8048-e0676786f393");

    fn versions(_host: Host) -> &'static [Version] {
        &[Version(1, 0), Version(3, 0), Version(3, 1), Version(3, 2)]
    }

    fn ready(&mut self, _now: u64, _version: Version) {}

    fn request(&mut self, _now: u64) -> Option<Vec<u8>> {
        Some(self.requests.next()?.request.body())
    }

    fn answered(
        &mut self,
        _now: u64,
        request: &[u8],
        status: u32,
        answer: &[u8],
    ) -> Result<(), &'static str> {
        if let Some(asked) = self.requests.answered() {
            let status = GuestStatus(status);
            let outcome = if status.is_ok() {
                Ok(())
            } else {
                Err(RequestError::Guest(status))
            };
            self.answer = Some(status.0);
            self.outcomes.add(asked.promise, outcome);
        }
        if request == answer {
            Ok(())
        } else {
            Err("a shutdown request that comes back changed")
        }
    }

    fn deadline(&self) -> Option<u64> {
        self.requests.is_waiting().then_some(0)
    }

    fn stopped(&mut self) {
        for asked in self.requests.drain() {
            self.outcomes.add(asked.promise, Err(RequestError::Closed));
        }
    }

    fn unanswered(&mut self, why: RequestError) {
        if let Some(asked) = self.requests.answered() {
            self.outcomes.add(asked.promise, Err(why));
        }
    }

    fn expiry(&self) -> Option<u64> {
        self.requests.expiry()
    }

    fn expire(&mut self, now: u64) {
        for asked in self.requests.expire(now) {
            self.outcomes
                .add(asked.promise, Err(RequestError::TimedOut));
        }
    }

    fn outcomes(&mut self) -> Outcomes {
        core::mem::take(&mut self.outcomes)
    }
}
