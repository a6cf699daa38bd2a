//! A host that sends anything in any order, and a guest that asks for anything at any time: the bus never panics
//! and its state stays sound.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU16;

use proptest::prelude::*;
use vmbus::bus::{Bus, Config, Event, GpaRange, OpenParameters};
use vmbus::hypervisor::PostError;
use vmbus::ids::{ChannelId, GpadlHandle, PageNumber, VpIndex};
use vmbus::protocol::monitor::MonitorPages;
use vmbus::protocol::sizes::{Direction, MESSAGES};
use vmbus::protocol::{MAX_PAYLOAD, Status, Version};
use vmbus_host::bus::Access;

use crate::world::{PROFILES, World, check_size};

/// Something that the host, the guest or the clock does.
#[derive(Clone, Debug)]
enum Step {
    /// Any bytes.
    Garbage(Vec<u8>),
    /// A message of this row of the table, with small numbers in its first fields, cut or padded.
    Message {
        row: usize,
        fields: [u32; 4],
        resize: i8,
    },
    /// A whole valid offer: channel, sub-channel index, and monitor bit.
    Offer(u16, u16, u8),
    /// A reply that fits what the guest posted last.
    Reply(bool),
    /// The guest fetches a message, and posts it or not.
    Post(Option<u8>),
    Events,
    Tick(u32),
    Connect,
    Unload,
    /// One GPADL: of which channel, and so many pages in each range.
    CreateGpadl(u32, Vec<u16>),
    Teardown(u32),
    Open(u32, u32),
    Close(u32),
    Release(u32),
    Modify(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let id = 0u32..6;
    prop_oneof![
        2 => proptest::collection::vec(any::<u8>(), 0..260).prop_map(Step::Garbage),
        6 => (0..MESSAGES.len(), [0u32..5, 0u32..5, 0u32..5, 0u32..5], -12i8..12)
            .prop_map(|(row, fields, resize)| Step::Message { row, fields, resize }),
        6 => (0u16..6, 0u16..3, any::<u8>())
            .prop_map(|(channel, index, bit)| Step::Offer(channel, index, bit)),
        12 => proptest::bool::weighted(0.8).prop_map(Step::Reply),
        12 => proptest::option::weighted(0.1, any::<u8>()).prop_map(Step::Post),
        3 => Just(Step::Events),
        3 => (0u32..200_000_000).prop_map(Step::Tick),
        1 => Just(Step::Connect),
        1 => Just(Step::Unload),
        4 => (id.clone(), proptest::collection::vec(0u16..80, 1..4))
            .prop_map(|(channel, ranges)| Step::CreateGpadl(channel, ranges)),
        3 => (0u32..8).prop_map(Step::Teardown),
        5 => (id.clone(), 0u32..8).prop_map(|(channel, ring)| Step::Open(channel, ring)),
        3 => id.clone().prop_map(Step::Close),
        3 => id.clone().prop_map(Step::Release),
        2 => id.prop_map(Step::Modify),
    ]
}

/// A message of a row of the table.
fn message_of(row: usize, fields: [u32; 4], resize: i8) -> Vec<u8> {
    let info = &MESSAGES[row];
    let size = info.sizes.last().unwrap().2;
    let mut message = info.kind.0.to_le_bytes().to_vec();
    message.extend([0; 4]);
    fields
        .iter()
        .for_each(|field| message.extend(field.to_le_bytes()));
    message.resize(
        size.saturating_add_signed(isize::from(resize))
            .min(MAX_PAYLOAD),
        0,
    );
    message
}

/// What the events say that there is.
#[derive(Default)]
struct Known {
    connected: bool,
    channels: BTreeSet<u32>,
    /// Offered or rescinded, but not released.
    numbers: BTreeSet<u32>,
    /// Openings without an outcome, by channel.
    opening: BTreeMap<u32, u32>,
    /// GPADLs without an outcome, and those that exist.
    creating: BTreeSet<u32>,
    created: BTreeSet<u32>,
}

struct Guest {
    bus: Bus,
    now: u64,
    known: Known,
    last_posted: Option<Vec<u8>>,
}

impl Guest {
    fn new() -> Self {
        let mut bus = Bus::new(Config::default());
        bus.set_monitor_pages(Some(MonitorPages {
            parent_to_child: PageNumber(0x100),
            child_to_parent: PageNumber(0x101),
        }));
        bus.connect(0);
        Self {
            bus,
            now: 0,
            known: Known::default(),
            last_posted: None,
        }
    }

    fn drain_events(&mut self) {
        let mut violations = 0;
        while let Some(event) = self.bus.poll_event() {
            let known = &mut self.known;
            match event {
                Event::Connected { .. } => {
                    *known = Known {
                        connected: true,
                        ..Known::default()
                    };
                }
                Event::ConnectFailed(error) => {
                    assert!(!error.to_string().is_empty());
                    *known = Known::default();
                }
                Event::Unloaded { .. } => *known = Known::default(),
                Event::Offered(offer) => {
                    assert!((1..=2047).contains(&offer.channel.0));
                    assert!(known.numbers.insert(offer.channel.0), "offered twice");
                    known.channels.insert(offer.channel.0);
                }
                Event::AllOffersDelivered => {}
                Event::Rescinded(channel) => {
                    assert!(
                        known.channels.remove(&channel.0),
                        "rescinded without an offer"
                    );
                    assert_eq!(
                        known.opening.get(&channel.0),
                        None,
                        "the outcome comes first"
                    );
                }
                Event::GpadlCreated { handle, result } => {
                    assert!(
                        known.creating.remove(&handle.0),
                        "an outcome without a question"
                    );
                    if result.is_ok() {
                        known.created.insert(handle.0);
                    }
                }
                Event::GpadlTornDown(handle) => {
                    let known = known.created.remove(&handle.0) || known.creating.remove(&handle.0);
                    assert!(known, "torn down without a GPADL");
                }
                Event::Opened { channel, .. } => {
                    assert!(
                        known.opening.remove(&channel.0).is_some(),
                        "an outcome without a question"
                    );
                }
                Event::TargetVpModified { .. } => {}
                Event::Violation(violation) => {
                    violations += 1;
                    assert!(!violation.to_string().is_empty());
                }
            }
        }
        assert!(violations <= 32, "violations are bounded");
        for offer in self.bus.offers() {
            // The first of those that claim to be the same is found, and no other.
            let (interface, instance) = (offer.interface, offer.instance);
            let found = self.bus.offer(interface, instance, offer.sub_channel_index);
            assert!(found.is_some_and(|found| found.channel <= offer.channel));
            assert!(offer.monitor_id.is_none_or(|bit| bit.number() < 128));
        }
        let offered: BTreeSet<_> = self.bus.offers().map(|offer| offer.channel.0).collect();
        assert_eq!(offered, self.known.channels, "offers and events agree");
        if self.bus.version().is_none() && self.known.connected {
            // Negotiation was taken up again, which may only be before the first offer.
            assert!(self.known.numbers.is_empty());
            self.known.connected = false;
        }
        assert_eq!(self.bus.version().is_some(), self.known.connected);
    }

    /// The host's answer to the message posted last.
    fn reply(&mut self, good: bool) {
        let Some(request) = self.last_posted.take() else {
            return;
        };
        let word = |at: usize| request.get(at..at + 4).unwrap_or(&[0; 4]).to_vec();
        let status = u32::from(!good).to_le_bytes();
        let body: Vec<u8> = match request[0] {
            14 => [
                vec![u8::from(good), 0, 0, 0],
                vec![4, 0, 0, 0],
                vec![0xFF; 4],
            ]
            .concat(),
            3 => vec![],
            5 => [word(8), word(12), status.to_vec()].concat(),
            8 => [word(8), word(12), status.to_vec()].concat(),
            // The channel stands in the header only.
            9 => [word(8), word(12), status.to_vec()].concat(),
            11 => word(12),
            16 => vec![],
            22 => [word(8), status.to_vec()].concat(),
            _ => return,
        };
        let kind = match request[0] {
            9 => 10,
            22 => 24,
            8 => 10,
            kind => kind + 1,
        };
        let mut reply = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        reply.extend(body);
        self.bus.receive(self.now, &reply);
    }

    fn take(&mut self, step: Step) {
        let now = self.now;
        match step {
            Step::Garbage(bytes) => self.bus.receive(now, &bytes),
            Step::Message {
                row,
                fields,
                resize,
            } => {
                let info = &MESSAGES[row];
                let message = message_of(row, fields, resize);
                let before = self.bus.violations();
                self.bus.receive(now, &message);
                if info.direction == Direction::ToHost {
                    assert_eq!(self.bus.violations(), before + 1);
                }
            }
            Step::Offer(channel, index, bit) => {
                let mut offer = vec![0; 196];
                offer[0] = 1;
                offer[180..182].copy_from_slice(&index.to_le_bytes());
                offer[184..186].copy_from_slice(&channel.to_le_bytes());
                (offer[188], offer[189]) = (bit, 1);
                self.bus.receive(now, &offer);
            }
            Step::Reply(good) => self.reply(good),
            Step::Post(refusal) => {
                let version = self.bus.version();
                let Some(outgoing) = self.bus.poll_message() else {
                    return;
                };
                check_size(&outgoing.payload, version);
                match refusal {
                    None => self.last_posted = Some(outgoing.payload.to_vec()),
                    Some(how) => self.bus.message_refused(
                        now,
                        match how % 3 {
                            0 => PostError::InvalidConnection,
                            1 => PostError::Busy,
                            _ => PostError::Status(6),
                        },
                    ),
                }
            }
            Step::Events => self.drain_events(),
            Step::Tick(by) => {
                self.now += u64::from(by);
                self.bus.tick(self.now);
                let deadline = self.bus.deadline();
                assert!(
                    deadline.is_none_or(|at| at > self.now),
                    "what was due is done"
                );
            }
            Step::Connect => {
                self.drain_events();
                self.bus.connect(now);
                self.known = Known::default();
                assert_eq!(self.bus.offers().count(), 0);
            }
            Step::Unload => {
                self.drain_events();
                self.bus.unload(now);
                self.known = Known::default();
                assert_eq!(self.bus.version(), None);
            }
            Step::CreateGpadl(channel, counts) => {
                self.drain_events();
                let range = |count| GpaRange::whole_pages((0..u64::from(count)).map(PageNumber));
                let ranges: Result<Vec<_>, _> = counts.into_iter().map(range).collect();
                let Ok(ranges) = ranges else {
                    return;
                };
                if let Ok(handle) = self.bus.create_gpadl(now, ChannelId(channel), &ranges) {
                    assert!(self.known.channels.contains(&channel));
                    assert_ne!(handle.0, 0);
                    assert!(
                        !self.known.created.contains(&handle.0),
                        "handles are unique"
                    );
                    assert!(self.known.creating.insert(handle.0), "handles are unique");
                }
            }
            Step::Teardown(nth) => {
                self.drain_events();
                let gpadls: Vec<_> = self
                    .known
                    .created
                    .union(&self.known.creating)
                    .copied()
                    .collect();
                let handle = gpadls.get(nth as usize).copied().unwrap_or(nth);
                let result = self.bus.teardown_gpadl(now, GpadlHandle(handle));
                assert!(result.is_err() || gpadls.contains(&handle));
            }
            Step::Open(channel, nth) => {
                self.drain_events();
                let created: Vec<_> = self.known.created.iter().copied().collect();
                let parameters = OpenParameters {
                    ring: GpadlHandle(created.get(nth as usize).copied().unwrap_or(nth)),
                    downstream_page: 2,
                    target_vp: VpIndex(0),
                    user_data: [0; 120],
                };
                if self.bus.open(now, ChannelId(channel), &parameters).is_ok() {
                    assert!(self.known.channels.contains(&channel));
                    assert_eq!(self.known.opening.insert(channel, 1), None);
                }
            }
            Step::Close(channel) => {
                let _ = self.bus.close(ChannelId(channel));
            }
            Step::Release(channel) => {
                self.drain_events();
                if self.bus.release(ChannelId(channel)).is_ok() {
                    assert!(self.known.numbers.remove(&channel));
                    assert!(!self.known.channels.contains(&channel), "it was rescinded");
                    assert_eq!(self.known.opening.get(&channel), None);
                }
            }
            Step::Modify(channel) => {
                let _ = self
                    .bus
                    .modify_target_vp(now, ChannelId(channel), VpIndex(1));
            }
        }
        if self.bus.version().is_none() && self.bus.deadline().is_none() {
            assert!(
                self.bus.poll_message().is_none(),
                "at rest there is nothing to post"
            );
        }
    }

    /// With a silent host and a running clock every question has an outcome, unless the host keeps memory.
    fn finish(&mut self) {
        for _ in 0..200 {
            while self.bus.poll_message().is_some() {}
            self.drain_events();
            let Some(deadline) = self.bus.deadline() else {
                break;
            };
            self.now = self.now.max(deadline);
            self.bus.tick(self.now);
        }
        assert_eq!(self.bus.deadline(), None);
        assert!(
            self.known.opening.is_empty(),
            "every opening has an outcome"
        );
    }
}

proptest! {
    #[test]
    fn nothing_that_a_host_sends_breaks_the_bus(
        steps in proptest::collection::vec(step(), 0..250)
    ) {
        let mut guest = Guest::new();
        steps.into_iter().for_each(|step| guest.take(step));
        guest.finish();
    }

    /// The same from a connection with offers, where more of the state can be reached.
    #[test]
    fn nothing_that_a_host_sends_breaks_a_connection(
        steps in proptest::collection::vec(step(), 0..250)
    ) {
        let mut guest = Guest::new();
        guest.take(Step::Post(None));
        guest.take(Step::Reply(true));
        guest.take(Step::Post(None));
        (1..5).for_each(|channel| guest.take(Step::Offer(channel, channel - 1, 7)));
        guest.drain_events();
        prop_assert_eq!(guest.bus.version(), Some(Version::V6_0));
        steps.into_iter().for_each(|step| guest.take(step));
        guest.finish();
    }
}

/// What a guest may post: anything.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let message = (
        0..MESSAGES.len(),
        [0u32..5, 0u32..5, 0u32..5, 0u32..5],
        -12i8..12,
    );
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..240),
        5 => message.prop_map(|(row, fields, resize)| message_of(row, fields, resize)),
        2 => (0usize..30, 1u32..4, any::<u16>(), 0u16..3, proptest::collection::vec(any::<u8>(), 0..200))
            .prop_map(|(body, gpadl, bytes, count, data)| {
                // Mostly a header, sometimes a body.
                let kind = if body > 20 { 9u32 } else { 8 };
                let mut message = [kind.to_le_bytes(), [0; 4], 1u32.to_le_bytes(), gpadl.to_le_bytes()].concat();
                if kind == 8 {
                    message.extend((bytes % 400).to_le_bytes());
                    message.extend(count.to_le_bytes());
                }
                message.extend(data);
                message
            }),
    ]
}

proptest! {
    /// The host's end is a server on real machines: a hostile guest does not break it either.
    #[test]
    fn nothing_that_a_guest_sends_breaks_the_server(
        host in 0..PROFILES.len(),
        requests in proptest::collection::vec((0u8..12, request()), 0..200)
    ) {
        let mut world = World::connected(PROFILES[host]());
        let live = world.posted.last().unwrap().0;
        let mut mapped = Vec::new();
        for (what, request) in requests {
            let small = |at: usize, limit: u32| u32::from(request.get(at).copied().unwrap_or(1)) % limit;
            let channel = ChannelId(small(0, 4));
            match what {
                0 => {
                    world.server.rescind(channel);
                }
                1 => {
                    let index = NonZeroU16::MIN.saturating_add(small(1, 3) as u16);
                    world.server.add_sub_channel(channel, index);
                }
                2 => {
                    let handle = GpadlHandle(small(1, 4));
                    mapped.extend(world.server.gpadls().map(channel, handle, Access::ReadWrite));
                }
                3 => drop(mapped.pop()),
                _ => {}
            }
            // What has been mapped stays where it is, or is known to be gone.
            for mapped in &mapped {
                let handles = world.server.gpadls();
                let live = (1..4).filter_map(|handle| handles.get(GpadlHandle(handle)));
                let there = live.into_iter().any(|lent| lent.ranges() == mapped.ranges());
                prop_assert!(there || mapped.is_revoked());
            }
            world.server.post(world.now, live, &request);
            world.server.run(world.now);
            while let Some(message) = world.server.poll_message(world.now) {
                prop_assert!(message.payload.len() <= MAX_PAYLOAD);
            }
            while let Some(event) = world.server.poll_event() {
                if let vmbus_host::bus::Event::Opening(opening) = event {
                    prop_assert!((opening.downstream_page as usize) < opening.pages.len());
                    world.server.finish_open(opening.channel, Status::SUCCESS);
                }
            }
        }
    }
}
