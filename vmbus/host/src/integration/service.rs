//! One component at the host: negotiates, sends one request at a time and checks the answers (spec ic.md 2 to 4).

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32};

use super::message::{
    ANSWER_FLAGS, GuestStatus, HEADER, Header, LAYOUT, NEGOTIATE, PIPE_HEADER, REQUEST_FLAGS,
    Version, message,
};
use super::{Component, Host, RequestError};
use crate::complaints::Complaints;
use crate::message_faults::{MessageFault, MessageFaults};

/// The framework versions of both hosts.
const FRAMEWORK: [Version; 2] = [Version(1, 0), Version(3, 0)];

/// The most odd answers that are kept for whoever sent odd messages.
const RAW_ANSWERS: usize = 256;

/// How far host and guest have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// The channel is closed.
    Closed,
    /// The guest has yet to answer the negotiation.
    Negotiating,
    /// Both speak these versions.
    Ready {
        /// Of the framework.
        framework: Version,
        /// Of the component's messages.
        message: Version,
    },
    /// The guest knows none of the offered versions.
    NoCommonVersion,
    /// The guest has answered the negotiation with this status.
    Failed(GuestStatus),
}

/// A request that the guest has yet to answer.
#[derive(Debug)]
struct Awaited {
    kind: u16,
    transaction: u8,
    /// As it was made, without fault.
    message: Vec<u8>,
    patience: Patience,
}

/// How long the host waits for an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Patience {
    /// For ever: the guest reads nothing else before it has answered.
    Endless,
    /// The message was sent with a fault, so an answer that can be understood may never come.
    Short,
    /// Until this time.
    Until(u64),
}

/// How long the host waits for the answer to a message that had a fault: 5 s in units of 100 ns.
const SHORT: u64 = 50_000_000;

/// One component at the host.
pub struct Service<C> {
    /// What it is about.
    pub component: C,
    /// The framework versions to offer.
    pub framework: Vec<Version>,
    /// The message versions to offer.
    pub messages: Vec<Version>,
    /// Changes each message before it goes, headers included: for tests that play an odd host.
    pub alter: Option<fn(&mut Vec<u8>)>,
    stage: Stage,
    awaited: Option<Awaited>,
    /// Transaction ids of requests that the host has given up.
    abandoned: Vec<u8>,
    transaction: u8,
    output: VecDeque<Vec<u8>>,
    /// There was no room for the first of them.
    stuck: bool,
    negotiations: u64,
    /// Odd messages have gone out, so odd answers may come.
    odd: bool,
    raw_answers: Vec<Vec<u8>>,
    faults: MessageFaults,
    complaints: Complaints,
}

impl<C: Component> Service<C> {
    /// A component with the versions that this host offers.
    pub fn new(host: Host, component: C) -> Self {
        Self {
            component,
            framework: FRAMEWORK.into(),
            messages: C::versions(host).into(),
            alter: None,
            stage: Stage::Closed,
            awaited: None,
            abandoned: Vec::new(),
            transaction: 0,
            output: VecDeque::new(),
            stuck: false,
            negotiations: 0,
            odd: false,
            raw_answers: Vec::new(),
            faults: MessageFaults::new(),
            complaints: Complaints::new(),
        }
    }

    /// How far host and guest have come.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// The message version in use.
    pub fn version(&self) -> Option<Version> {
        match self.stage {
            Stage::Ready { message, .. } => Some(message),
            _ => None,
        }
    }

    /// How many negotiations the guest has answered.
    pub fn negotiations(&self) -> u64 {
        self.negotiations
    }

    /// Whether a request waits for its answer.
    pub fn is_waiting(&self) -> bool {
        self.awaited.is_some()
    }

    /// What the guest did that no guest may do: the first of it.
    pub fn complaints(&self) -> &[&'static str] {
        self.complaints.first()
    }

    /// How often the guest did what no guest may do.
    pub fn complaint_count(&self) -> u64 {
        self.complaints.total()
    }

    /// The next `count` messages to the guest have this fault, behind those asked for before.
    pub fn inject(&mut self, fault: MessageFault, count: u32) {
        self.faults.inject(fault, count);
    }

    /// Nothing goes wrong with messages any more.
    pub fn heal(&mut self) {
        self.faults.clear();
    }

    /// The message version in use, or why the guest cannot be asked now.
    pub fn ready(&self) -> Result<Version, RequestError> {
        match self.stage {
            Stage::Ready { message, .. } => Ok(message),
            Stage::Closed => Err(RequestError::NotOpen),
            Stage::Negotiating => Err(RequestError::Negotiating),
            Stage::NoCommonVersion => Err(RequestError::NoCommonVersion),
            Stage::Failed(status) => Err(RequestError::Negotiation(status)),
        }
    }

    /// Negotiates anew, whatever is under way; an answer that is still to come is dropped.
    pub fn renegotiate(&mut self) {
        self.component.stopped();
        self.abandon();
        self.output.clear();
        self.begin();
    }

    /// Sends these bytes as a packet, pipe header included, without waiting for an answer to them: for tests that play an odd
    /// host. The guest's next answers that belong to nothing else are kept.
    pub fn send_raw(&mut self, message: Vec<u8>) {
        self.odd = true;
        self.output.push_back(message);
    }

    /// What the guest has answered to [`send_raw`](Self::send_raw): without the pipe header.
    pub fn take_raw_answers(&mut self) -> Vec<Vec<u8>> {
        core::mem::take(&mut self.raw_answers)
    }

    /// The guest has opened the channel.
    pub fn opened(&mut self) {
        self.closed();
        self.begin();
    }

    /// The guest has closed the channel.
    pub fn closed(&mut self) {
        self.component.stopped();
        self.stage = Stage::Closed;
        self.awaited = None;
        self.abandoned.clear();
        self.output.clear();
        self.stuck = false;
    }

    /// When [`poll_message`](Self::poll_message) has something to say.
    pub fn deadline(&self) -> Option<u64> {
        let message = match (self.stage, &self.awaited) {
            // Not before the guest has read something.
            _ if self.stuck => None,
            _ if !self.output.is_empty() => Some(0),
            (Stage::Ready { .. }, None) => self.component.deadline(),
            _ => None,
        };
        let patience = self
            .awaited
            .as_ref()
            .and_then(|awaited| match awaited.patience {
                Patience::Endless => None,
                Patience::Short => Some(0),
                Patience::Until(until) => Some(until),
            });
        let others = self.component.expiry().into_iter().chain(patience);
        message.into_iter().chain(others).min()
    }

    /// The next message for the guest.
    pub fn poll_message(&mut self, now: u64) -> Option<Vec<u8>> {
        self.stuck = false;
        self.component.expire(now);
        self.lose_patience(now);
        if self.output.is_empty()
            && self.awaited.is_none()
            && let Stage::Ready { framework, message } = self.stage
            && let Some(body) = self.component.request(now)
        {
            self.ask(C::KIND, framework, message, &body);
        }
        self.output.pop_front()
    }

    /// Puts back a message for which there was no room.
    pub fn unsent(&mut self, message: Vec<u8>) {
        self.stuck = true;
        self.output.push_front(message);
    }

    /// Handles a packet of the guest.
    pub fn receive(&mut self, now: u64, packet: &[u8]) {
        let Ok((pipe, rest)) = <[U32; 2]>::read_from_prefix(packet) else {
            return self.complain("a packet without a pipe header");
        };
        let Some(content) = rest.get(..pipe[1].get() as usize) else {
            return self.complain("a pipe message shorter than it says");
        };
        let Some(message) = packet.get(..PIPE_HEADER + content.len()) else {
            return self.complain("a pipe message shorter than it says");
        };
        if pipe[0].get() != 1 || packet.len() >= message.len() + 8 {
            return self.complain("a pipe header that does not fit its packet");
        }
        let Ok((header, body)) = Header::read_from_prefix(message) else {
            return self.complain("a message without a header");
        };
        if self.abandoned.contains(&header.transaction) {
            self.abandoned.retain(|&id| id != header.transaction);
            return;
        }
        match self.awaited.take() {
            Some(awaited) if awaited.transaction == header.transaction => {
                self.answered(now, awaited, &header, message, body);
            }
            awaited => {
                self.awaited = awaited;
                if self.odd {
                    if self.raw_answers.len() < RAW_ANSWERS {
                        self.raw_answers.push(content.into());
                    }
                } else {
                    self.complain("an answer to nothing, or with another transaction id");
                }
            }
        }
    }

    fn answered(
        &mut self,
        now: u64,
        awaited: Awaited,
        header: &Header,
        message: &[u8],
        body: &[u8],
    ) {
        if let Some(what) = odd(&awaited, header, message, body) {
            return self.odd_answer(awaited, what);
        }
        let status = header.status.get();
        if awaited.kind == NEGOTIATE {
            self.negotiated(now, status, body);
        } else {
            let request = awaited.message.get(HEADER..).unwrap_or_default();
            if let Err(complaint) = self.component.answered(now, request, status, body) {
                self.complain(complaint);
            }
        }
    }

    /// An answer that no guest may give, unless the message had a fault: then another may come yet.
    fn odd_answer(&mut self, awaited: Awaited, what: &'static str) {
        if awaited.patience != Patience::Endless {
            self.awaited = Some(awaited);
            return;
        }
        self.complain(what);
        if awaited.kind != NEGOTIATE {
            self.component.unanswered(RequestError::Malformed(what));
        }
    }

    fn negotiated(&mut self, now: u64, status: u32, body: &[u8]) {
        self.negotiations += 1;
        if status != 0 {
            self.stage = Stage::Failed(GuestStatus(status));
            return;
        }
        let Ok(([frameworks, messages, reserved @ ..], versions)) =
            <[U16; 4]>::read_from_prefix(body)
        else {
            return self.complain("a short answer to the negotiation");
        };
        if reserved != [U16::ZERO; 2] {
            self.complain("an answer to the negotiation with garbage in it");
        }
        if (frameworks.get(), messages.get()) == (0, 0) {
            self.stage = Stage::NoCommonVersion;
            return;
        }
        if (frameworks.get(), messages.get()) != (1, 1) {
            return self.complain("an answer to the negotiation that names more than one version");
        }
        let Ok((picked, _)) = <[[U16; 2]; 2]>::read_from_prefix(versions) else {
            return self.complain("a short answer to the negotiation");
        };
        let [framework, message] = picked.map(|[major, minor]| Version(major.get(), minor.get()));
        if !self.framework.contains(&framework) || !self.messages.contains(&message) {
            return self.complain("the guest picked a version that was not offered");
        }
        self.stage = Stage::Ready { framework, message };
        self.component.ready(now, message);
    }

    fn begin(&mut self) {
        self.stage = Stage::Negotiating;
        let (frameworks, messages) = (self.framework.len() as u16, self.messages.len() as u16);
        let mut body = Vec::new();
        for word in [frameworks, messages, 0, 0] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        for version in self.framework.iter().chain(&self.messages) {
            body.extend_from_slice(&version.0.to_le_bytes());
            body.extend_from_slice(&version.1.to_le_bytes());
        }
        self.ask(NEGOTIATE, Version(0, 0), Version(0, 0), &body);
    }

    fn ask(&mut self, kind: u16, framework: Version, version: Version, body: &[u8]) {
        self.transaction = self.transaction.wrapping_add(1);
        let mut bytes = message(
            kind,
            framework,
            version,
            self.transaction,
            REQUEST_FLAGS,
            body,
        );
        if let Some(alter) = self.alter {
            alter(&mut bytes);
        }
        let patience = if self.faults.is_empty() {
            Patience::Endless
        } else {
            self.odd = true;
            Patience::Short
        };
        let (faults, output) = (&mut self.faults, &mut self.output);
        faults.apply(&LAYOUT, bytes.clone(), |bytes| output.push_back(bytes));
        self.awaited = Some(Awaited {
            kind,
            transaction: self.transaction,
            message: bytes,
            patience,
        });
    }

    /// Gives up a message that was sent with a fault, when its time is over.
    fn lose_patience(&mut self, now: u64) {
        let Some(awaited) = &mut self.awaited else {
            return;
        };
        match awaited.patience {
            Patience::Short => awaited.patience = Patience::Until(now.saturating_add(SHORT)),
            Patience::Until(until) if until <= now => {
                let negotiating = awaited.kind == NEGOTIATE;
                self.abandon();
                if negotiating {
                    self.begin();
                } else {
                    self.component.unanswered(RequestError::TimedOut);
                }
            }
            Patience::Until(_) | Patience::Endless => {}
        }
    }

    /// Forgets the message that waits for an answer; one that comes after all is dropped.
    fn abandon(&mut self) {
        if let Some(awaited) = self.awaited.take()
            && !self.abandoned.contains(&awaited.transaction)
        {
            self.abandoned.push(awaited.transaction);
        }
    }

    fn complain(&mut self, what: &'static str) {
        self.complaints.add(what);
    }
}

/// What is wrong with an answer's header, if something is.
fn odd(awaited: &Awaited, header: &Header, message: &[u8], body: &[u8]) -> Option<&'static str> {
    if header.flags != ANSWER_FLAGS {
        Some("an answer without the flags of one")
    } else if header.kind.get() != awaited.kind {
        Some("an answer of another message type")
    } else if message.len() != awaited.message.len() {
        Some("an answer of another length")
    } else if usize::from(header.body_size.get()) > body.len() {
        Some("an answer whose body is shorter than it says")
    } else {
        None
    }
}

impl<C: Component> fmt::Debug for Service<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("stage", &self.stage)
            .field("complaints", &self.complaints())
            .finish_non_exhaustive()
    }
}
