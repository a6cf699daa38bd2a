//! The host's end of the integration components (spec ic.md): what they have in common.
//!
//! A [`Service`] negotiates, sends one request at a time and checks the answers; what it asks is the matter of its
//! [`Component`]. Neither does I/O: both eat messages and times and make messages. [`offer`] puts one on a
//! [`Machine`](crate::machine::Machine).

mod heartbeat;
mod shutdown;
mod time_sync;

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use vmbus::ids::ChannelId;
use vmbus::protocol::{Guid, Status};
use vmbus::ring::{Outgoing, PacketBuffer};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use heartbeat::{Contact, Heartbeat};
pub use shutdown::{PLANNED, Shutdown, ShutdownRequest};
pub use time_sync::{SAMPLE, SYNC, TimeSync};

use crate::bus::Device;
use crate::channel::HostChannel;
use crate::machine::Machine;
use crate::provider::Provider;
use crate::sync::Mutex;

/// A version: of the framework, or of a component's messages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u16, pub u16);

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Whose habits a host has (spec ic.md 11).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Host {
    /// Offers every component in every version.
    HyperV,
    /// Offers few components, and time sync in its newest version only.
    OpenVmm,
}

/// The framework versions of both hosts.
const FRAMEWORK: [Version; 2] = [Version(1, 0), Version(3, 0)];

/// Message type of the negotiation.
const NEGOTIATE: u16 = 0;

/// Flags of a request: transaction, request.
pub const REQUEST_FLAGS: u8 = 3;

/// Flags of an answer: transaction, response.
pub const ANSWER_FLAGS: u8 = 5;

/// In front of every message: the pipe's header and the component's (spec ic.md 3).
#[repr(C)]
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
struct Header {
    pipe_kind: U32,
    pipe_length: U32,
    framework: [U16; 2],
    kind: U16,
    message: [U16; 2],
    body_size: U16,
    status: U32,
    transaction: u8,
    flags: u8,
    reserved: U16,
}

/// Bytes of the headers in front of a body.
pub const HEADER: usize = size_of::<Header>();

const _: () = assert!(HEADER == 28);

/// Bytes of the pipe's own header.
const PIPE_HEADER: usize = 8;

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
}

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
    Failed(u32),
}

/// A request that the guest has yet to answer.
#[derive(Debug)]
struct Awaited {
    kind: u16,
    transaction: u8,
    /// As it was sent.
    message: Vec<u8>,
}

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
    raw_sent: bool,
    raw_answers: Vec<Vec<u8>>,
    complaints: Vec<&'static str>,
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
            raw_sent: false,
            raw_answers: Vec::new(),
            complaints: Vec::new(),
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

    /// What the guest did that no guest may do.
    pub fn complaints(&self) -> &[&'static str] {
        &self.complaints
    }

    /// Negotiates anew, whatever is under way; an answer that is still to come is dropped.
    pub fn renegotiate(&mut self) {
        self.component.stopped();
        if let Some(awaited) = self.awaited.take() {
            self.abandoned.push(awaited.transaction);
        }
        self.output.clear();
        self.begin();
    }

    /// Sends these bytes as a packet, pipe header included, without waiting for an answer to them: for tests that play an odd
    /// host. The guest's next answers that belong to nothing else are kept.
    pub fn send_raw(&mut self, message: Vec<u8>) {
        self.raw_sent = true;
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
        match (self.stage, &self.awaited) {
            // Not before the guest has read something.
            _ if self.stuck => None,
            _ if !self.output.is_empty() => Some(0),
            (Stage::Ready { .. }, None) => self.component.deadline(),
            _ => None,
        }
    }

    /// The next message for the guest.
    pub fn poll_message(&mut self, now: u64) -> Option<Vec<u8>> {
        self.stuck = false;
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
                self.answered(now, &awaited, &header, message, body);
            }
            awaited => {
                self.awaited = awaited;
                if self.raw_sent {
                    self.raw_answers.push(content.into());
                } else {
                    self.complain("an answer to nothing, or with another transaction id");
                }
            }
        }
    }

    fn answered(
        &mut self,
        now: u64,
        awaited: &Awaited,
        header: &Header,
        message: &[u8],
        body: &[u8],
    ) {
        if header.flags != ANSWER_FLAGS {
            return self.complain("an answer without the flags of one");
        }
        if header.kind.get() != awaited.kind {
            return self.complain("an answer of another message type");
        }
        if message.len() != awaited.message.len() {
            return self.complain("an answer of another length");
        }
        if usize::from(header.body_size.get()) > body.len() {
            return self.complain("an answer whose body is shorter than it says");
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

    fn negotiated(&mut self, now: u64, status: u32, body: &[u8]) {
        self.negotiations += 1;
        if status != 0 {
            self.stage = Stage::Failed(status);
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
        self.output.push_back(bytes.clone());
        self.awaited = Some(Awaited {
            kind,
            transaction: self.transaction,
            message: bytes,
        });
    }

    fn complain(&mut self, what: &'static str) {
        self.complaints.push(what);
    }
}

impl<C> fmt::Debug for Service<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service")
            .field("stage", &self.stage)
            .field("complaints", &self.complaints)
            .finish_non_exhaustive()
    }
}

/// A packet as the host sends it: pipe header, component header, body.
pub fn message(
    kind: u16,
    framework: Version,
    version: Version,
    transaction: u8,
    flags: u8,
    body: &[u8],
) -> Vec<u8> {
    let header = Header {
        pipe_kind: U32::new(1),
        pipe_length: U32::new((HEADER - PIPE_HEADER + body.len()) as u32),
        framework: [U16::new(framework.0), U16::new(framework.1)],
        kind: U16::new(kind),
        message: [U16::new(version.0), U16::new(version.1)],
        body_size: U16::new(body.len() as u16),
        status: U32::ZERO,
        transaction,
        flags,
        reserved: U16::ZERO,
    };
    let mut bytes = Vec::from(header.as_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A service behind a lock, so that a test can look at it while it serves.
#[derive(Debug)]
pub struct Shared<C>(pub Arc<Mutex<Service<C>>>);

impl<C: Component> Provider for Shared<C> {
    fn opened(&mut self, _channel: &mut HostChannel) -> Status {
        self.0.lock().opened();
        Status::SUCCESS
    }

    fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        let mut service = self.0.lock();
        let mut packet = PacketBuffer::default();
        while let Ok(true) = channel.receive(&mut packet) {
            service.receive(now, packet.payload());
        }
        let _ = channel.release();
        while let Some(message) = service.poll_message(now) {
            if channel.send(&Outgoing::in_band([&message, &[]])).is_err() {
                return service.unsent(message);
            }
        }
    }

    fn closed(&mut self) {
        self.0.lock().closed();
    }

    fn deadline(&self) -> Option<u64> {
        self.0.lock().deadline()
    }
}

/// Offers a component on a machine. What is asked of the service from outside goes to the guest when the machine next
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
    let device = Device::new(C::INTERFACE, C::INSTANCE);
    machine.add(device, Shared(service.clone()))
}
