//! What the integration components have in common, from the guest's side (spec ic.md 1 to 4).
//!
//! The host asks, one request at a time; the guest answers with the same bytes and a few of them changed. [`Protocol`] does
//! that without input or output. [`Integration`] moves the bytes between a channel and it, and asks a
//! [`Service`] what to answer.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use spin::Mutex;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::standing::Standing;
use crate::kmcl::{
    Channel, ChannelBuilder, Client, ConfigError, Guid, IncomingPacket, ReceivedPacket,
};

/// Data pages per ring: what Linux gives these channels, control page not counted.
const RING_PAGES: usize = 3;

/// Answers that may be on their way. The host has one request under way, so a second is for hosts that do not keep to that.
const PACKETS: usize = 2;

/// Declares wire structs whose size is asserted.
macro_rules! wire {
    ($($(#[$doc:meta])* $visibility:vis $name:ident, $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)+ })+) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(
                Clone, Copy, Debug, ::zerocopy::FromBytes, ::zerocopy::IntoBytes, ::zerocopy::Immutable,
                ::zerocopy::KnownLayout, ::zerocopy::Unaligned,
            )]
            $visibility struct $name {
                $($(#[$field_doc])* pub $field: $type,)+
            }

            const _: () = assert!(size_of::<$name>() == $size);
        )+
    };
}
pub(super) use wire;

/// A version of the framework or of a component's messages, as it is on the wire.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub struct Version {
    major: U16,
    minor: U16,
}

const _: () = assert!(size_of::<Version>() == 4);

impl Version {
    /// Version `major`.`minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self {
            major: U16::new(major),
            minor: U16::new(minor),
        }
    }

    /// The number before the point.
    pub fn major(self) -> u16 {
        self.major.get()
    }

    /// The number behind the point.
    pub fn minor(self) -> u16 {
        self.minor.get()
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Version {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        (self.major(), self.minor()).cmp(&(other.major(), other.minor()))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The framework versions that are spoken (spec ic.md 4).
const FRAMEWORK: [Version; 2] = [Version::new(1, 0), Version::new(3, 0)];

wire! {
    /// In front of every message, behind the pipe's own header.
    Header, 20 {
        /// Version of the framework.
        framework: Version,
        /// What the message is: [`NEGOTIATE`], or the component's own type.
        kind: U16,
        /// Version of the component's messages.
        message: Version,
        /// Bytes that follow the header.
        body_size: U16,
        /// A [`Status`], in answers.
        status: U32,
        /// Chosen by the host, repeated by the guest.
        transaction: u8,
        /// [`TRANSACTION`], [`REQUEST`], [`RESPONSE`].
        flags: u8,
        /// 0.
        reserved: U16,
    }

    /// The body of a negotiation. Versions follow: first those of the framework.
    Negotiation, 8 {
        /// How many framework versions follow.
        frameworks: U16,
        /// How many message versions follow them.
        messages: U16,
        /// 0.
        reserved: U32,
    }
}

/// Message type: which versions do you speak?
const NEGOTIATE: u16 = 0;

/// Flag: part of a transaction; a request with it wants an answer.
const TRANSACTION: u8 = 1;
/// Flag: from the host.
const REQUEST: u8 = 2;
/// Flag: from the guest.
const RESPONSE: u8 = 4;

/// What an answer says about the request (spec ic.md 3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(pub u32);

impl Status {
    /// Done, or will be.
    pub const OK: Self = Self(0);
    /// Will not be done.
    pub const FAILURE: Self = Self(0x8000_4005);
    /// The guest cannot do that.
    pub const NOT_SUPPORTED: Self = Self(0x8007_0032);
    /// The request makes no sense.
    pub const INVALID_ARGUMENT: Self = Self(0x8007_0057);
}

/// What is fixed about a component.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Component {
    /// For logs and counters.
    pub name: &'static str,
    /// The class of its devices.
    pub interface: Guid,
    /// The type of its messages.
    pub kind: u16,
    /// The message versions that are spoken.
    pub versions: &'static [Version],
    /// Bytes of its longest body.
    pub longest_body: usize,
}

/// Bytes of the longest negotiation: the limit of other guests, 100 versions.
const LONGEST_NEGOTIATION: usize = size_of::<Negotiation>() + 100 * size_of::<Version>();

impl Component {
    /// Bytes of the longest message.
    pub fn longest_message(&self) -> usize {
        size_of::<Header>() + self.longest_body.max(LONGEST_NEGOTIATION)
    }
}

/// How far the protocol has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The channel is not open.
    Closed,
    /// The host has not asked for versions yet.
    Negotiating,
    /// Host and guest have agreed.
    Ready {
        /// The version of the framework.
        framework: Version,
        /// The version of the component's messages.
        message: Version,
    },
    /// The host offers no version that is spoken here.
    NoCommonVersion,
}

/// How a component stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ComponentStatus {
    /// How far the protocol has come.
    pub phase: Phase,
    /// Negotiations, this one included.
    pub negotiations: u64,
    /// Requests that reached the service.
    pub requests: u64,
    /// Messages that were answered with a failure before they reached it: of an unknown type, too short, too early.
    pub refused: u64,
    /// Messages that were not answered: without a header, not marked as requests, too long.
    pub ignored: u64,
}

impl ComponentStatus {
    /// The version of the component's messages in use.
    pub fn version(&self) -> Option<Version> {
        match self.phase {
            Phase::Ready { message, .. } => Some(message),
            _ => None,
        }
    }
}

/// The protocol of one component: negotiates, and sorts out what is a request to it.
#[derive(Debug)]
pub struct Protocol {
    component: &'static Component,
    status: ComponentStatus,
}

/// What a received message is.
#[derive(Debug)]
pub enum Received<'m> {
    /// The negotiation, or nothing for the service: it has become its own answer.
    Answer,
    /// A request to the service. Change the body where that is the answer, then [`answer`].
    Request {
        /// The version of the component's messages.
        version: Version,
        /// What the request says.
        body: &'m mut [u8],
    },
    /// Nothing that has an answer.
    Ignored,
}

impl Protocol {
    /// A protocol whose channel is not open.
    pub fn new(component: &'static Component) -> Self {
        Self {
            component,
            status: ComponentStatus {
                phase: Phase::Closed,
                negotiations: 0,
                requests: 0,
                refused: 0,
                ignored: 0,
            },
        }
    }

    /// How it stands.
    pub fn status(&self) -> ComponentStatus {
        self.status
    }

    /// The channel is open: the host begins.
    pub fn start(&mut self) {
        self.status.phase = Phase::Negotiating;
    }

    /// The channel is closed.
    pub fn stop(&mut self) {
        self.status.phase = Phase::Closed;
    }

    /// Counts a message that was too long to be answered.
    pub fn too_long(&mut self) {
        self.ignore("a message longer than any of its kind");
    }

    /// Handles a message of the host: all that the pipe gave, without the pipe's header.
    ///
    /// A body ends where the message ends, as it does for other guests; one that is shorter than its header says is refused.
    pub fn receive<'m>(&mut self, message: &'m mut [u8]) -> Received<'m> {
        let Ok((header, body)) = Header::mut_from_prefix(message) else {
            return self.ignore("a message without a header");
        };
        if header.flags & (TRANSACTION | REQUEST | RESPONSE) != TRANSACTION | REQUEST {
            return self.ignore("a message that is no request");
        }
        if usize::from(header.body_size.get()) > body.len() {
            return self.refuse(header, Status::INVALID_ARGUMENT, "a truncated message");
        }
        match (header.kind.get(), self.status.phase) {
            (NEGOTIATE, _) => self.negotiate(header, body),
            (kind, Phase::Ready { message, .. }) if kind == self.component.kind => {
                self.status.requests += 1;
                Received::Request {
                    version: message,
                    body,
                }
            }
            (kind, _) if kind == self.component.kind => {
                self.refuse(header, Status::FAILURE, "a request without a version")
            }
            _ => self.refuse(
                header,
                Status::NOT_SUPPORTED,
                "a message of an unknown type",
            ),
        }
    }

    /// Picks versions: may come at any time, and whatever was agreed before is no more.
    fn negotiate(&mut self, header: &mut Header, body: &mut [u8]) -> Received<'static> {
        self.status.phase = Phase::Negotiating;
        let Ok((negotiation, lists)) = Negotiation::mut_from_prefix(body) else {
            return self.refuse(header, Status::INVALID_ARGUMENT, "a short negotiation");
        };
        let counts = [negotiation.frameworks, negotiation.messages];
        let [frameworks, messages] = counts.map(|count| usize::from(count.get()));
        let Ok((versions, _)) =
            <[Version]>::mut_from_prefix_with_elems(lists, frameworks + messages)
        else {
            return self.refuse(
                header,
                Status::INVALID_ARGUMENT,
                "a negotiation with more versions than it has room for",
            );
        };
        self.status.negotiations += 1;
        let (for_framework, for_messages) = versions.split_at(frameworks);
        let picked =
            highest(&FRAMEWORK, for_framework).zip(highest(self.component.versions, for_messages));
        match (picked, versions) {
            (Some((framework, message)), [first, second, ..]) => {
                (*first, *second) = (framework, message);
                negotiation.frameworks = U16::new(1);
                negotiation.messages = U16::new(1);
                header.body_size =
                    U16::new((size_of::<Negotiation>() + 2 * size_of::<Version>()) as u16);
                self.status.phase = Phase::Ready { framework, message };
            }
            _ => {
                negotiation.frameworks = U16::ZERO;
                negotiation.messages = U16::ZERO;
                self.status.phase = Phase::NoCommonVersion;
                log::warn!("{}: the host offers no known version", self.component.name);
            }
        }
        mark(header, Status::OK);
        Received::Answer
    }

    fn refuse(
        &mut self,
        header: &mut Header,
        status: Status,
        what: &'static str,
    ) -> Received<'static> {
        self.status.refused += 1;
        log::debug!("{}: refused {what}", self.component.name);
        mark(header, status);
        Received::Answer
    }

    fn ignore(&mut self, what: &'static str) -> Received<'static> {
        self.status.ignored += 1;
        log::debug!("{}: ignored {what}", self.component.name);
        Received::Ignored
    }
}

/// The highest version that is in both lists.
fn highest(known: &[Version], offered: &[Version]) -> Option<Version> {
    let both = known.iter().filter(|version| offered.contains(version));
    both.max().copied()
}

/// Turns a request into its answer.
pub fn answer(message: &mut [u8], status: Status) {
    if let Ok((header, _)) = Header::mut_from_prefix(message) {
        mark(header, status);
    }
}

fn mark(header: &mut Header, status: Status) {
    header.flags = TRANSACTION | RESPONSE;
    header.status = U32::new(status.0);
}

/// What a component does with requests. All of it runs at PASSIVE and must not call the [`Integration`].
pub trait Service: Send + Sync {
    /// Which component it is.
    fn component(&self) -> &'static Component;

    /// Handles a request that was received at `now`, in reference time. What it leaves in `body` goes back to the host.
    fn request(&self, now: u64, version: Version, body: &mut [u8]) -> Reply;

    /// The request that was to be answered later is void: the channel closes.
    fn withdrawn(&self) {}
}

/// When a request is answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    /// At once.
    Now(Status),
    /// By [`Integration::answer`].
    Later,
}

/// The driver of one component: a channel and its [`Protocol`].
pub struct Integration {
    state: Arc<State>,
    channel: Standing,
}

/// What the callbacks share with the driver; used at PASSIVE only.
struct State {
    service: Arc<dyn Service>,
    work: Mutex<Work>,
}

struct Work {
    protocol: Protocol,
    /// The message under way. Nothing comes before it is answered: the channel's quota is 1.
    message: Vec<u8>,
    /// The packet of a request that is answered later.
    held: Option<IncomingPacket>,
}

impl Integration {
    /// Enables the driver: it serves the host's device, now or when it is offered. Called at PASSIVE.
    pub fn new(client: &Client, service: Arc<dyn Service>) -> Result<Self, ConfigError> {
        let component = service.component();
        let longest = component.longest_message();
        let state = Arc::new(State {
            service,
            work: Mutex::new(Work {
                protocol: Protocol::new(component),
                message: Vec::with_capacity(longest),
                held: None,
            }),
        });
        let [for_start, for_packets, for_suspend, for_close] = [(); 4].map(|()| state.clone());
        let builder = ChannelBuilder::new(component.interface)
            .friendly_name(component.name)
            .pipe()
            .ring_pages(RING_PAGES, RING_PAGES)
            .maximum_packet_size(longest)
            .maximum_packet_count(PACKETS)
            .transaction_quota(1)
            .incoming_processing_at_passive()
            .started(move |_| for_start.work.lock().protocol.start())
            .process_packet_callbacks(
                move |channel, packet| for_packets.receive(channel, packet),
                |_, _| {},
            )
            .suspend(move |_| for_suspend.withdraw())
            .closed(move |_| for_close.work.lock().protocol.stop());
        let channel = Standing::new(client, component.interface, builder)?;
        Ok(Self { state, channel })
    }

    /// Answers the request that is to be answered later. Returns whether there was one and the host gets the answer. At PASSIVE.
    pub fn answer(&self, status: Status) -> bool {
        self.state.answer(&self.channel.channel(), status)
    }

    /// How it stands. At PASSIVE.
    pub fn status(&self) -> ComponentStatus {
        self.state.work.lock().protocol.status()
    }

    /// The channel.
    pub fn channel(&self) -> &Standing {
        &self.channel
    }
}

impl State {
    fn receive(&self, channel: &Channel, packet: ReceivedPacket<'_>) {
        let now = channel.client().now();
        let mut work = self.work.lock();
        let Work {
            protocol,
            message,
            held,
        } = &mut *work;
        message.clear();
        if packet.payload().len() > self.service.component().longest_message() {
            protocol.too_long();
            return packet.complete(&[]);
        }
        message.extend_from_slice(packet.payload());
        match protocol.receive(message) {
            Received::Answer => {}
            Received::Request { version, body } => match self.service.request(now, version, body) {
                Reply::Now(status) => answer(message, status),
                Reply::Later => {
                    *held = Some(packet.hold());
                    return;
                }
            },
            Received::Ignored => return packet.complete(&[]),
        }
        match channel.send_message(message) {
            Ok(()) => packet.complete(&[]),
            Err(_) => packet.fail("the host does not read its answers"),
        }
    }

    fn answer(&self, channel: &Channel, status: Status) -> bool {
        let mut work = self.work.lock();
        let Some(packet) = work.held.take() else {
            return false;
        };
        answer(&mut work.message, status);
        let sent = channel.send_message(&work.message);
        // The next one may come at once.
        drop(work);
        packet.complete(&[]);
        sent.is_ok()
    }

    fn withdraw(&self) {
        let held = self.work.lock().held.take();
        if let Some(packet) = held {
            self.service.withdrawn();
            packet.complete(&[]);
        }
    }
}

impl fmt::Debug for Integration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Integration")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const COMPONENT: Component = Component {
        name: "test",
        interface: Guid::literal("11111111-2222-3333-4444-555555555555"),
        kind: 7,
        versions: &[Version::new(1, 0), Version::new(3, 0), Version::new(3, 1)],
        longest_body: 100,
    };

    /// A message with the flags of a request.
    fn message(kind: u16, transaction: u8, body: &[u8]) -> Vec<u8> {
        let header = Header {
            framework: Version::new(3, 0),
            kind: U16::new(kind),
            message: Version::new(3, 0),
            body_size: U16::new(body.len() as u16),
            status: U32::new(0),
            transaction,
            flags: TRANSACTION | REQUEST,
            reserved: U16::ZERO,
        };
        let mut bytes = Vec::from(header.as_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    fn negotiation(framework: &[(u16, u16)], messages: &[(u16, u16)]) -> Vec<u8> {
        let counts = [framework.len() as u16, messages.len() as u16, 0, 0];
        let versions = framework.iter().chain(messages);
        let words = counts
            .into_iter()
            .chain(versions.flat_map(|&(major, minor)| [major, minor]));
        let body: Vec<u8> = words.flat_map(u16::to_le_bytes).collect();
        message(NEGOTIATE, 5, &body)
    }

    fn header(message: &[u8]) -> Header {
        Header::read_from_prefix(message).unwrap().0
    }

    fn started() -> Protocol {
        let mut protocol = Protocol::new(&COMPONENT);
        protocol.start();
        protocol
    }

    fn ready() -> Protocol {
        let mut protocol = started();
        protocol.receive(&mut negotiation(&[(3, 0)], &[(3, 0)]));
        assert_eq!(protocol.status().version(), Some(Version::new(3, 0)));
        protocol
    }

    fn is_answered(protocol: &mut Protocol, message: &mut [u8], status: Status) {
        let before = header(message);
        assert!(matches!(protocol.receive(message), Received::Answer));
        let after = header(message);
        assert_eq!(after.flags, 5);
        assert_eq!(after.status.get(), status.0);
        assert_eq!(after.transaction, before.transaction);
        assert_eq!(after.kind, before.kind);
    }

    #[test]
    fn the_highest_known_versions_of_the_lists_are_picked() {
        let mut protocol = started();
        // In no order, with some that nobody knows.
        let mut bytes = negotiation(&[(3, 0), (1, 0), (9, 0)], &[(3, 2), (3, 0), (3, 1), (1, 0)]);
        let length = bytes.len();
        is_answered(&mut protocol, &mut bytes, Status::OK);
        assert_eq!(bytes.len(), length);
        assert_eq!(header(&bytes).body_size.get(), 16);
        assert_eq!(
            bytes[20..36],
            [1, 0, 1, 0, 0, 0, 0, 0, 3, 0, 0, 0, 3, 0, 1, 0]
        );
        assert_eq!(
            protocol.status().phase,
            Phase::Ready {
                framework: Version::new(3, 0),
                message: Version::new(3, 1),
            }
        );
    }

    #[test]
    fn without_a_common_version_both_counts_are_zero() {
        for (framework, messages) in [
            (&[(2, 0)][..], &[(3, 0)][..]),
            (&[(3, 0)], &[(4, 0)]),
            (&[], &[(3, 0)]),
            (&[(3, 0)], &[]),
            (&[], &[]),
        ] {
            let mut protocol = ready();
            let mut bytes = negotiation(framework, messages);
            is_answered(&mut protocol, &mut bytes, Status::OK);
            assert_eq!(bytes[20..24], [0; 4]);
            assert_eq!(protocol.status().phase, Phase::NoCommonVersion);
            // And then there are no requests.
            is_answered(&mut protocol, &mut message(7, 1, &[]), Status::FAILURE);
        }
    }

    #[test]
    fn a_negotiation_may_come_again_and_starts_over() {
        let mut protocol = ready();
        protocol.receive(&mut negotiation(&[(1, 0)], &[(1, 0)]));
        assert_eq!(
            protocol.status().phase,
            Phase::Ready {
                framework: Version::new(1, 0),
                message: Version::new(1, 0),
            }
        );
        // One that is broken leaves nothing of what was agreed before.
        let mut broken = message(NEGOTIATE, 1, &[1, 0]);
        is_answered(&mut protocol, &mut broken, Status::INVALID_ARGUMENT);
        assert_eq!(protocol.status().phase, Phase::Negotiating);
        assert_eq!(protocol.status().negotiations, 2);
    }

    #[test]
    fn the_version_lists_must_fit_the_message() {
        for counts in [[3u16, 1], [0, 4], [u16::MAX, u16::MAX]] {
            let mut bytes = negotiation(&[(3, 0)], &[(3, 0), (1, 0)]);
            bytes[20..22].copy_from_slice(&counts[0].to_le_bytes());
            bytes[22..24].copy_from_slice(&counts[1].to_le_bytes());
            is_answered(&mut started(), &mut bytes, Status::INVALID_ARGUMENT);
        }
    }

    #[test]
    fn a_request_is_handed_on_with_its_version_and_answered_with_its_bytes() {
        let mut protocol = ready();
        let mut bytes = message(7, 0xC3, b"abc");
        match protocol.receive(&mut bytes) {
            Received::Request { version, body } => {
                assert_eq!(version, Version::new(3, 0));
                assert_eq!(body, b"abc");
                body[1] = b'x';
            }
            other => panic!("{other:?}"),
        }
        let mut expected = message(7, 0xC3, b"axc");
        expected[12..16].copy_from_slice(&0x8000_4005u32.to_le_bytes());
        expected[17] = 5;
        answer(&mut bytes, Status::FAILURE);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_message_of_an_unknown_type_is_not_supported() {
        for kind in [1, 6, 8, 0xFFFF] {
            let mut protocol = ready();
            is_answered(
                &mut protocol,
                &mut message(kind, 9, b"?"),
                Status::NOT_SUPPORTED,
            );
            assert_eq!(protocol.status().refused, 1);
            assert_eq!(protocol.status().requests, 0);
        }
    }

    #[test]
    fn a_request_before_the_negotiation_fails() {
        is_answered(&mut started(), &mut message(7, 1, &[]), Status::FAILURE);
    }

    #[test]
    fn a_message_shorter_than_it_says_is_an_invalid_argument() {
        let mut bytes = message(7, 1, b"abcd");
        bytes.pop();
        is_answered(&mut ready(), &mut bytes, Status::INVALID_ARGUMENT);
    }

    #[test]
    fn a_body_ends_where_the_message_ends() {
        let mut bytes = message(7, 1, b"ab");
        bytes.push(b'c');
        match ready().receive(&mut bytes) {
            Received::Request { body, .. } => assert_eq!(body, b"abc"),
            other => panic!("{other:?}"),
        };
    }

    #[test]
    fn what_is_no_request_has_no_answer() {
        for flags in [0, TRANSACTION, REQUEST, RESPONSE, TRANSACTION | RESPONSE, 7] {
            let mut protocol = ready();
            let mut bytes = message(7, 1, b"ab");
            bytes[17] = flags;
            assert!(matches!(protocol.receive(&mut bytes), Received::Ignored));
            assert_eq!(protocol.status().ignored, 1);
        }
        let mut protocol = ready();
        assert!(matches!(protocol.receive(&mut [0; 19]), Received::Ignored));
    }

    proptest! {
        /// Any bytes at all: nothing panics, and what is answered has an answer's flags and its own length.
        #[test]
        fn any_message_is_answered_handed_on_or_ignored(
            mut bytes in prop::collection::vec(any::<u8>(), 0..80),
            kind in 0..9u16,
            flags in 0..8u8,
        ) {
            let mut protocol = ready();
            if let Ok((header, _)) = Header::mut_from_prefix(&mut bytes) {
                header.kind = U16::new(kind);
                header.flags = flags;
                header.body_size = U16::new(header.body_size.get() % 64);
            }
            let answered = match protocol.receive(&mut bytes) {
                Received::Answer => true,
                Received::Request { .. } | Received::Ignored => false,
            };
            prop_assert!(!answered || header(&bytes).flags == 5);
        }
    }
}
