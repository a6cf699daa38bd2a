//! The corpus's seeds: inputs made from real exchanges and from one valid packet of each kind.

use vmbus::bus::{Bus, Config, Event, GpaRange, OpenParameters};
use vmbus::ids::{ChannelId, GpadlHandle, PageNumber, VpIndex};
use vmbus::protocol::Status;
use vmbus_host::bus::Event as HostEvent;
use vmbus_host::integration::{
    ANSWER_FLAGS, Component, Heartbeat, Host, Service, Shutdown, ShutdownRequest, TimeSync,
};

use crate::balloon::message;
use crate::host::{PROFILES, ProviderStep, RingStep, ServerStep, server};
use crate::ring::{Packet, Ranges};
use crate::{balloon, bus, ic, input, kmcl, netvsp, ring, rndis, storvsp, vhdx};

/// An input of the corpus.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Seed {
    /// The target that it is for.
    pub target: &'static str,
    /// Its file name.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

fn seed(target: &'static str, name: impl Into<String>, bytes: Vec<u8>) -> Seed {
    Seed {
        target,
        name: name.into(),
        bytes,
    }
}

/// Every seed.
pub fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for (number, profile) in (0..).zip(PROFILES) {
        let name = profile().name.to_lowercase();
        let Exchange {
            guest,
            host,
            messages,
        } = Exchange::record(number);
        let guest: Vec<_> = guest.iter().map(GuestStep::as_step).collect();
        seeds.push(seed(
            "bus_messages",
            format!("bring-up-{name}"),
            input(&guest),
        ));
        let posts: Vec<_> = host.iter().map(HostStep::as_step).collect();
        let mut bytes = vec![number];
        bytes.extend(input(&posts));
        seeds.push(seed("host_server", format!("bring-up-{name}"), bytes));
        if number == 1 {
            for message in messages {
                let kind = message.first().copied().unwrap_or(0);
                seeds.push(seed("protocol", format!("message-{kind}"), message));
            }
        }
    }
    seeds.sort_by(|a, b| (a.target, &a.name).cmp(&(b.target, &b.name)));
    seeds.dedup_by(|a, b| (a.target, &a.name) == (b.target, &b.name));
    seeds.extend(rings());
    seeds.extend(channels());
    seeds.extend(dynamic_memory());
    seeds.extend(integration());
    seeds.extend(key_values());
    seeds.extend(sockets());
    seeds.extend(storage());
    seeds.extend(network());
    seeds.extend(frames());
    seeds.extend(disks());
    seeds
}

/// A step of the guest's bus, with its message.
enum GuestStep {
    Plain(bus::Step<'static>),
    Receive(Vec<u8>),
}

impl GuestStep {
    fn as_step(&self) -> bus::Step<'_> {
        match self {
            Self::Plain(step) => step.clone(),
            Self::Receive(message) => bus::Step::Receive(message),
        }
    }
}

/// A step of the server, with its message.
enum HostStep {
    Plain(ServerStep<'static>),
    Post(u32, Vec<u8>),
}

impl HostStep {
    fn as_step(&self) -> ServerStep<'_> {
        match self {
            Self::Plain(step) => step.clone(),
            Self::Post(connection, message) => ServerStep::Post(*connection, message),
        }
    }
}

/// A guest and a host that speak with each other, from contact to unload.
#[derive(Default)]
struct Exchange {
    guest: Vec<GuestStep>,
    host: Vec<HostStep>,
    messages: Vec<Vec<u8>>,
}

impl Exchange {
    /// The life of a connection with the host of this number: contact, offers, a channel opened, moved and closed, one rescinded, unload.
    fn record(profile: u8) -> Self {
        let mut exchange = Self::default();
        let mut server = server(profile);
        let mut bus = Bus::new(Config::default());
        let now = 1;
        let (channel, ring) = (ChannelId(1), GpadlHandle(1));
        // Each round does one thing more and lets both sides finish.
        for round in 0..8 {
            let step = match round {
                0 => {
                    bus.connect(now);
                    bus::Step::Connect
                }
                1 => {
                    let pages = (0..40).map(PageNumber);
                    let range = GpaRange::whole_pages(pages).expect("whole pages");
                    let _ = bus.create_gpadl(now, channel, &[range]);
                    bus::Step::CreateGpadl(1, 40)
                }
                2 => {
                    let parameters = OpenParameters {
                        ring,
                        downstream_page: 2,
                        target_vp: VpIndex(0),
                        user_data: [0; 120],
                    };
                    let _ = bus.open(now, channel, &parameters);
                    bus::Step::Open(1, 1)
                }
                3 => {
                    let _ = bus.modify_target_vp(now, channel, VpIndex(1));
                    bus::Step::Modify(1)
                }
                4 => {
                    let _ = bus.close(channel);
                    bus::Step::Close(1)
                }
                5 => {
                    let _ = bus.teardown_gpadl(now, ring);
                    bus::Step::Teardown(1)
                }
                6 => {
                    server.rescind(ChannelId(2));
                    exchange.host.push(HostStep::Plain(ServerStep::Rescind(2)));
                    bus::Step::PostAll
                }
                _ => {
                    bus.unload(now);
                    bus::Step::Unload
                }
            };
            exchange.guest.push(GuestStep::Plain(step));
            exchange.settle(&mut bus, &mut server, now);
            if round == 6 {
                let _ = bus.release(ChannelId(2));
                exchange.guest.push(GuestStep::Plain(bus::Step::Release(2)));
                exchange.settle(&mut bus, &mut server, now);
            }
        }
        exchange
    }

    fn settle(&mut self, bus: &mut Bus, server: &mut vmbus_host::bus::Server, now: u64) {
        loop {
            let mut moved = false;
            while let Some(outgoing) = bus.poll_message() {
                moved = true;
                let bytes = outgoing.payload.to_vec();
                self.messages.push(bytes.clone());
                let status = server.post(now, outgoing.connection, &bytes);
                self.host.push(HostStep::Post(outgoing.connection.0, bytes));
                if status == vmbus_host::bus::HvStatus::SUCCESS {
                    self.guest.push(GuestStep::Plain(bus::Step::Post));
                } else {
                    bus.message_refused(now, vmbus::hypervisor::PostError::InvalidConnection);
                    self.guest.push(GuestStep::Plain(bus::Step::Refuse(0)));
                }
                server.run(now);
            }
            while let Some(event) = server.poll_event() {
                if let HostEvent::Opening(opening) = event {
                    server.finish_open(opening.channel, Status::SUCCESS);
                    let id = opening.channel.0;
                    let step = ServerStep::FinishOpen(id, Status::SUCCESS.0);
                    self.host.push(HostStep::Plain(step));
                }
            }
            while let Some(message) = server.poll_message(now) {
                moved = true;
                bus.receive(now, &message.payload);
                self.messages.push(message.payload.clone());
                self.guest.push(GuestStep::Receive(message.payload));
            }
            while let Some(event) = bus.poll_event() {
                assert!(!matches!(event, Event::Violation(_)), "{event:?}");
            }
            if !moved {
                return;
            }
        }
    }
}

/// One packet of each kind, by name.
fn packets() -> [(&'static str, Packet<'static>); 5] {
    let with = |ranges, transaction| Packet {
        payload: b"a packet of 24 bytes....",
        more: 0,
        transaction,
        ranges,
    };
    [
        ("in-band", with(Ranges::None, None)),
        ("request", with(Ranges::None, Some(5))),
        ("completion", with(Ranges::Completion, Some(0x1_0000_0001))),
        (
            "transfer-pages",
            with(Ranges::TransferPages(vec![(64, 0), (1500, 4096)]), Some(6)),
        ),
        (
            "gpa-direct",
            with(Ranges::GpaDirect(vec![(0, 4096), (4000, 300)]), Some(7)),
        ),
    ]
}

fn rings() -> Vec<Seed> {
    use ring::Step;
    let mut seeds = Vec::new();
    for (name, packet) in packets() {
        let once = [
            Step::Packet(packet.clone()),
            Step::Publish,
            Step::Peek,
            Step::Read,
            Step::Release,
        ];
        for target in ["ring_reader", "ring_writer"] {
            seeds.push(seed(target, name, input(&once)));
        }
        // Round the end of the ring, with somebody who waits for room.
        let long = Packet {
            more: 2000,
            ..packet.clone()
        };
        let mut around = Vec::new();
        for _ in 0..6 {
            around.extend([
                Step::Mask(true),
                Step::Packet(long.clone()),
                Step::WaitFor(3000),
                Step::Read,
                Step::Release,
                Step::Mask(false),
                Step::StopWaiting,
            ]);
        }
        for target in ["ring_reader", "ring_writer"] {
            seeds.push(seed(target, format!("{name}-around"), input(&around)));
        }
        let steps = [
            RingStep::Send(packet),
            RingStep::Mask(true),
            RingStep::WaitForRoom(100),
            RingStep::Mask(false),
        ];
        let mut bytes = vec![3];
        bytes.extend(input(&steps));
        seeds.push(seed("host_ring", name, bytes));
    }
    let lies = [
        Step::Packet(Packet::data(&[1; 40])),
        Step::Publish,
        // A length beyond the producer's offset, then offsets beyond the ring.
        Step::Bytes(4096 + 4, &[0xFF, 0xFF]),
        Step::Read,
        Step::Control(0, 8),
        Step::Read,
        Step::Control(1, 0xFFFF_FFF8),
        Step::WaitFor(64),
    ];
    for target in ["ring_reader", "ring_writer"] {
        seeds.push(seed(target, "lies", input(&lies)));
    }
    // A packet of 40 bytes as a guest writes it: in-band, 16 bytes to the data, 40 long, an answer wanted.
    let written = [
        RingStep::Bytes(4096, &[6, 0, 2, 0, 5, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0]),
        RingStep::Offset(false, false, 48),
        RingStep::Receive,
        RingStep::Release,
    ];
    let mut bytes = vec![2];
    bytes.extend(input(&written));
    seeds.push(seed("host_ring", "written-by-a-guest", bytes));
    seeds
}

fn channels() -> Vec<Seed> {
    use kmcl::Step;
    let mut seeds = Vec::new();
    for flags in [0, 1, 2, 0x40, 0x80] {
        let mut steps: Vec<_> = packets().map(|(_, packet)| Step::Send(packet)).into();
        if flags == 0x40 {
            // Messages with a pipe header: type 1, 8 bytes.
            let payload = &[1, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
            steps.insert(0, Step::Send(Packet::data(payload)));
        }
        for choice in [0u8, 1, 2, 7] {
            let payload: &'static [u8] =
                [&[0; 8], &[1; 8], &[2; 8], &[7; 8]][usize::from(choice.min(3))];
            steps.push(Step::Send(Packet::data(payload)));
        }
        steps.extend([
            Step::GuestSend(0, 100),
            Step::GuestSend(1, 100),
            Step::GuestSend(2, 100),
            Step::Settle,
            Step::Receive(10),
            Step::Answer(true),
            Step::Finish(0),
            Step::Settle,
        ]);
        seeds.push(seed("kmcl_channel", format!("traffic-{flags:02x}"), {
            let mut bytes = vec![flags];
            bytes.extend(input(&steps));
            bytes
        }));
    }
    let full: Vec<_> = (0..6)
        .map(|_| Step::GuestSend(1, 1500))
        .chain([
            Step::WaitForRoom(3000),
            Step::Receive(2),
            Step::Settle,
            Step::Answer(false),
            Step::Rescind,
            Step::GuestSend(0, 8),
            Step::Reopen,
        ])
        .collect();
    let lies = [
        Step::GuestSend(1, 64),
        Step::Control(true, 0, 4096),
        Step::Interrupt(1),
        Step::Settle,
        Step::Reopen,
        Step::Send(Packet::data(&[0xFF; 8])),
        Step::Complete(0x1_0000_0001, b"twice"),
        Step::Settle,
        // OFFER_CHANNEL, RESCIND_CHANNEL_OFFER and GPADL_TORNDOWN of the open channel.
        Step::Message(&[2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
        Step::Message(&[12, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]),
        Step::Settle,
    ];
    for (name, steps) in [("full", &full[..]), ("lies", &lies)] {
        let mut bytes = vec![1];
        bytes.extend(input(steps));
        seeds.push(seed("kmcl_channel", name, bytes));
    }
    seeds
}

/// What a driver asks of a disk and of a drive, and then what it does with several at once.
fn storage() -> Vec<Seed> {
    use storvsp::{Lent, Step};
    let page = Lent::Own(0, 4096);
    let to_guest = |lun, cdb, length| Step::Command(lun, cdb, 1, length, page);
    let from_guest = |lun, cdb, length| Step::Command(lun, cdb, 0, length, page);
    let disk = [
        Step::Initialise(4),
        to_guest(0, &[0xA0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0], 4096),
        to_guest(0, &[0x12, 0, 0, 0, 36, 0], 36),
        to_guest(0, &[0x12, 1, 0x83, 0, 255, 0], 255),
        to_guest(0, &[0x12, 1, 0xB0, 0, 64, 0], 64),
        Step::Command(0, &[0; 6], 2, 0, Lent::Nothing),
        to_guest(0, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8),
        to_guest(
            0,
            &[0x9E, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0],
            32,
        ),
        to_guest(0, &[0x1A, 0, 0x3F, 0, 192, 0], 192),
        from_guest(0, &[0x15, 0x10, 0, 0, 24, 0], 24),
        from_guest(0, &[0x2A, 8, 0, 0, 0, 1, 0, 0, 8, 0], 4096),
        Step::Work(0),
        to_guest(0, &[0x28, 0, 0, 0, 0, 1, 0, 0, 8, 0], 4096),
        to_guest(0, &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 1, 0, 0], 512),
        from_guest(0, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], 24),
        Step::Command(0, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], 2, 0, Lent::Nothing),
        from_guest(0, &[0x2F, 2, 0, 0, 0, 1, 0, 0, 8, 0], 4096),
        to_guest(0, &[3, 0, 0, 0, 18, 0], 18),
    ];
    let drive = [
        Step::Initialise(3),
        to_guest(1, &[0x12, 0, 0, 0, 36, 0], 36),
        to_guest(1, &[0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0], 8),
        to_guest(1, &[0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 128, 0], 128),
        to_guest(1, &[0x46, 0, 0, 0, 0, 0, 0, 0, 128, 0], 128),
        to_guest(1, &[0x43, 0, 0, 0, 0, 0, 0, 0, 12, 0x40], 12),
        to_guest(1, &[0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0], 34),
        to_guest(1, &[0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0], 4096),
        Step::Command(1, &[0x1E, 0, 0, 0, 1, 0], 2, 0, Lent::Nothing),
        Step::Command(1, &[0x1B, 0, 0, 0, 2, 0], 2, 0, Lent::Nothing),
        Step::Medium(1, false),
        Step::Command(1, &[0; 6], 2, 0, Lent::Nothing),
        Step::Medium(1, true),
        Step::Command(1, &[0; 6], 2, 0, Lent::Nothing),
    ];
    let write = from_guest(0, &[0x2A, 0, 0, 0, 0, 1, 0, 0, 8, 0], 4096);
    let on_second = from_guest(0x10, &[0x2A, 0, 0, 0, 0, 1, 0, 0, 8, 0], 4096);
    let several = [
        Step::Initialise(2),
        Step::OpenSubChannel(0),
        Step::OpenSubChannel(1),
        write.clone(),
        on_second.clone(),
        write.clone(),
        Step::Work(1),
        // RESET_BUS, END_INITIALIZATION once more, and a packet that is too short.
        Step::Packet(0, &[6, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], Lent::Nothing),
        Step::Packet(1, &[8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], Lent::Nothing),
        Step::Packet(2, &[3, 0, 0, 0], Lent::Foreign(1 << 40, 4096)),
        Step::Work(0),
        Step::Add(5, true),
        Step::Remove(0),
        write,
        Step::Add(0, false),
        on_second,
    ];
    vec![
        seed("storvsp", "disk", input(&disk)),
        seed("storvsp", "drive", input(&drive)),
        seed("storvsp", "several", input(&several)),
    ]
}

/// What a driver does with a card: frames both ways with offloads, sub-channels, changes of link and MTU; then what none
/// should do.
fn network() -> Vec<Seed> {
    use netvsp::{Frame, How, Step};
    let frame = |sort, data, tasks| Frame {
        sort,
        data,
        spice: 3,
        count: 0,
        tasks,
    };
    let (section, pages) = (How::Section(1), How::Pages(100));
    let plain = frame(2, 200, [None; 3]);
    let large = frame(1, 20_000, [Some(0b10101), Some(1400), None]);
    let traffic = [
        Step::SetUp(0, 1514, 24),
        Step::Frame(0, section, plain),
        Step::Frame(0, pages, frame(1, 900, [Some(0b10101), None, None])),
        Step::Frame(0, How::Mixed(2, 60), large),
        Step::Frame(0, section, frame(3, 900, [Some(0b110), None, Some(0x55)])),
        Step::Inbound(1, 1400, 1, 0, 40),
        Step::Inbound(5, 100, 1, 2, 3),
        Step::Control(4, 31, &[]),
        // NDIS's parameters of offloads: everything on.
        Step::Control(
            5,
            41,
            &[
                0x80, 2, 24, 0, 4, 4, 4, 4, 4, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            ],
        ),
        Step::Inbound(1, 1000, 7, 0, 2),
        Step::Link(false),
        Step::Frame(0, section, plain),
        Step::Link(true),
        Step::Mtu(9000),
        Step::Revoke(false),
        Step::Revoke(true),
        Step::Close(0),
        Step::Open(0),
        Step::SetUp(4, 1514, 24),
        Step::Frame(0, section, plain),
    ];
    let channels = [
        Step::SetUp(0, 2600, 24),
        Step::Say(133, [1, 2]),
        Step::Open(1),
        Step::Open(2),
        Step::Frame(1, section, plain),
        Step::Frame(2, pages, large),
        Step::Inbound(3, 2400, 3, 0, 20),
        Step::Close(2),
        Step::Open(2),
        Step::Close(0),
        Step::Open(0),
    ];
    let late = [
        Step::SetUp(2, 1514, 20),
        Step::Hold(true),
        Step::Inbound(1, 300, 1, 0, 40),
        Step::Complete(0),
        Step::CompleteFalsely(0, 1 << 40),
        Step::Stall(0, true),
        Step::Network(1),
        Step::Frame(0, pages, large),
        Step::Frame(0, pages, plain),
        Step::Inbound(0, 300, 1, 0, 63),
        Step::Advance(2_000_000),
        Step::Network(4),
        Step::Frame(0, pages, large),
        Step::Network(2),
        Step::Stall(0, false),
        Step::Revoke(false),
        Step::LendReceive(17),
        Step::TakeBack(true),
        Step::TakeBack(false),
    ];
    let wrong = [
        Step::Say(107, [0, 0]),
        Step::Close(0),
        Step::Open(0),
        Step::SetUp(5, 0, 10),
        Step::Message(0, false, &[100, 0, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0]),
        Step::Close(0),
        Step::Open(0),
        Step::SetUp(1, 1514, 20),
        Step::Rndis(0, How::Lie(77, 40), 0, &[1; 60]),
        Step::Rndis(0, How::Foreign(1 << 40), 0, &[1; 60]),
        Step::Rndis(0, pages, 1, &[3, 0, 0, 0, 8, 0, 0, 0]),
        Step::Frame(0, section, plain),
        Step::Message(0, true, &[129, 0, 0, 0, 1, 0, 0, 0]),
    ];
    vec![
        seed("netvsp", "traffic", input(&traffic)),
        seed("netvsp", "channels", input(&channels)),
        seed("netvsp", "late", input(&late)),
        seed("netvsp", "wrong", input(&wrong)),
    ]
}

/// Messages, objects, and each sort of frame with each thing that is done with frames.
fn frames() -> Vec<Seed> {
    use rndis::{Made, Step};
    let mut done = vec![
        Step::Deliver([Some(8), Some(0x55), Some(7)], &[1; 60]),
        Step::Deliver([None; 3], &[]),
    ];
    for sort in 0..crate::frames::SORTS {
        let made = Made(sort, 3000, 2, 200, b"changed");
        done.extend([
            Step::Arrive(sort, 100, 4),
            Step::Checksums(made, 0b11101),
            Step::Segment(made, 1000),
            Step::Whole(made),
            Step::Tag(made, 0xA5A5),
        ]);
    }
    // Receive side scaling: the object, four entries of the table, the key; then the same table without a key.
    let mut scaling = vec![0x89, 3, 44, 0, 0, 0, 0, 0, 1, 0x17, 0, 0, 16, 0, 0, 0];
    scaling.extend([44, 0, 0, 0, 40, 0, 0, 0, 60, 0, 0, 0]);
    scaling.resize(44, 0);
    for queue in [0, 1, 2, 1u32] {
        scaling.extend(queue.to_le_bytes());
    }
    scaling.extend([0x6D; 40]);
    let mut again = scaling.clone();
    again[4] = 8;
    let address: Vec<u8> = [20u32, 28, 2, 48, 24]
        .iter()
        .flat_map(|field| field.to_le_bytes())
        .chain(
            "NetworkAddress0200000000AB"
                .encode_utf16()
                .flat_map(u16::to_le_bytes),
        )
        .collect();
    let mut objects = vec![
        Step::Channels(3),
        Step::Set(23, &scaling),
        Step::Set(23, &again),
        Step::Set(25, &address),
        Step::Set(13, &[0x0B, 0, 0, 0]),
        Step::Set(34, &[1, 0, 0x5E, 0, 0, 1]),
        Step::Arrive(1, 100, 4),
        Step::Arrive(3, 100, 3),
    ];
    objects.extend((0..43).map(|object| Step::Query(object, &[])));
    let query = [4, 0, 0, 0, 28, 0, 0, 0, 1, 0, 0, 0, 7, 1, 1, 0];
    let query = [&query[..], &[0; 12]].concat();
    objects.push(Step::Messages(&query));
    objects.push(Step::Nvsp(&[133, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0]));
    let chosen = |steps: &[Step<'_>]| [vec![0], input(steps)].concat();
    vec![
        seed("rndis", "frames", chosen(&done)),
        seed("rndis", "objects", chosen(&objects)),
    ]
}

/// Each operation in each version, answered.
fn key_values() -> Vec<Seed> {
    use crate::kvp::Step;
    let entry = [
        [1, 0, 0, 0, 4, 0, 0, 0, 4, 0, 0, 0].as_slice(),
        &[b'k', 0, 0, 0],
    ]
    .concat();
    (0..3u8)
        .map(|version| {
            let mut steps = vec![Step::Open(true), Step::Agree(version)];
            for what in [0, 6, 12, 18, 21, 26, 31] {
                steps.push(Step::Ask(what));
                steps.push(Step::Answer(0, 8, &entry));
            }
            steps.push(Step::Answer(0x8007_0103, 0, &[]));
            steps.push(Step::Ask(0));
            steps.push(Step::Advance(u32::MAX));
            steps.push(Step::Open(false));
            let name = format!("version-{}", 3 + version);
            seed("host_kvp", name, input(&steps))
        })
        .collect()
}

/// Connections that come to a good end, and to others.
fn sockets() -> Vec<Seed> {
    use crate::hvsocket::Step;
    let good = [
        Step::Data(b"hello"),
        Step::Send(3000),
        Step::Receive(100),
        Step::Data(b""),
        Step::Send(9000),
        Step::Receive(9000),
        Step::Finish,
        Step::Advance(200_000_000),
    ];
    let bad = [
        Step::Request(1),
        Step::Request(2),
        Step::Scribble(0, &[0xF8, 0xFF]),
        Step::Packet(&[2, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4]),
        Step::Data(b"more"),
        Step::Advance(100_000_000),
        Step::Close,
    ];
    vec![
        seed("host_hvsocket", "good", input(&good)),
        seed("host_hvsocket", "bad", input(&bad)),
    ]
}

fn dynamic_memory() -> Vec<Seed> {
    use balloon::Step;
    let up = [
        Step::Open(true),
        Step::Send(true),
        Step::Agree,
        Step::Send(true),
        Step::Agree,
        Step::Balloon(1500),
        Step::Send(true),
        Step::Send(true),
        Step::Unballoon(0),
        Step::Unballoon(0),
        Step::Send(true),
        Step::Tick(20_000_000),
        Step::Send(false),
    ];
    let hot_add = message(10, 3, &[0; 16]);
    let odd = [
        Step::Open(true),
        Step::Send(true),
        Step::Agree,
        Step::Send(true),
        Step::Agree,
        Step::Receive(&hot_add),
        Step::Send(true),
        Step::Balloon(u32::MAX),
        Step::Send(false),
        Step::Open(false),
    ];
    let messages = [
        message(1, 1, &[0, 0, 2, 0, 0, 0, 0, 0]),
        message(3, 2, &[0xFF; 24]),
        message(5, 3, &[1; 40]),
        message(7, 0, &[0, 0, 0, 0, 2, 0, 0, 0, 16, 0, 0, 0, 0, 0x10, 0, 0]),
        message(9, 1, &[]),
    ];
    let mut steps = vec![ProviderStep::Open(true)];
    steps.extend(
        messages
            .iter()
            .map(|message| ProviderStep::Receive(message)),
    );
    steps.insert(4, ProviderStep::Target(1 << 19));
    steps.insert(5, ProviderStep::Tick(u32::MAX));
    vec![
        seed("balloon", "up-and-down", input(&up)),
        seed("balloon", "odd", input(&odd)),
        seed("host_providers", "up-and-down", input(&steps)),
    ]
}

/// What a service sends first: its negotiation, and the request after a guest has agreed to the first of its versions.
fn asked<C: Component>(host: Host, component: C) -> Option<[Vec<u8>; 2]> {
    if C::versions(host).is_empty() {
        return None;
    }
    let mut service = Service::new(host, component);
    service.opened();
    let negotiation = service.poll_message(1).unwrap_or_default();
    service.receive(1, &agreed(&negotiation));
    let request = service.poll_message(u64::MAX / 2).unwrap_or_default();
    Some([negotiation, request])
}

/// The answer to a negotiation that takes the first version of each list (spec ic.md 4).
fn agreed(negotiation: &[u8]) -> Vec<u8> {
    let mut answer = negotiation.to_vec();
    let frameworks = usize::from(negotiation[28]);
    answer.copy_within(36 + 4 * frameworks..40 + 4 * frameworks, 40);
    answer[18..20].copy_from_slice(&[16, 0]);
    answer[25] = ANSWER_FLAGS;
    answer[28..32].copy_from_slice(&[1, 0, 1, 0]);
    answer
}

fn integration() -> Vec<Seed> {
    use ic::{ServiceStep, Step};
    let mut seeds = Vec::new();
    for (bit, host, name) in [
        (0u8, Host::HyperV, "hyper-v"),
        (0x80, Host::OpenVmm, "openvmm"),
    ] {
        let mut shutdown = Shutdown::new();
        shutdown.ask(ShutdownRequest::new(0));
        let components = [
            ("heartbeat", asked(host, Heartbeat::new(1))),
            ("shutdown", asked(host, shutdown)),
            ("time-sync", asked(host, TimeSync::new(1 << 57))),
        ];
        for (choice, (component, messages)) in (0..).zip(&components) {
            let Some([negotiation, request]) = messages else {
                continue;
            };
            let answer = agreed(negotiation);
            let steps = [
                ServiceStep::Open(true),
                ServiceStep::Receive(&answer),
                ServiceStep::Advance(600_000_000),
                ServiceStep::Answer(0, 0, &[]),
                ServiceStep::Renegotiate,
                ServiceStep::Answer(0x8000_4005, 28, &[0, 0, 0, 0]),
                ServiceStep::Open(false),
            ];
            let mut bytes = vec![bit | choice];
            bytes.extend(input(&steps));
            seeds.push(seed("host_ic", format!("{component}-{name}"), bytes));
            if choice == 0 {
                continue;
            }
            let which = choice == 1;
            let steps = [
                Step::SendRaw(which, negotiation),
                Step::SendRaw(which, request),
                Step::Decide(true),
                Step::Advance(50_000_000),
                Step::SendRaw(which, request),
                Step::Decide(false),
                Step::Send(which, &[0; 20]),
                Step::Again(which),
                Step::SendRaw(which, negotiation),
            ];
            seeds.push(seed("ic", format!("{component}-{name}"), input(&steps)));
        }
    }
    seeds
}

/// Disks that are used, and disks whose parts are changed: see [`vhdx::Step`] for the numbers of the parts.
fn disks() -> Vec<Seed> {
    use vhdx::Step;
    let used = [
        Step::Write(2040, 16, 3),
        Step::Flush,
        Step::Write(2040, 16, 4),
        Step::Read(2030, 40),
        Step::Crash,
        Step::Unmap(0, 4096),
        Step::Write(6000, 1, 5),
        Step::Flush,
        Step::Write(0, 200, 6),
        Step::Open(true),
        Step::Read(0, 255),
        Step::Open(false),
        Step::Write(10_240, 3, 7),
    ];
    let mut seeds = Vec::new();
    for (choice, name) in [(0, "dynamic"), (1, "log-in-use"), (2, "fixed")] {
        let mut bytes = vec![choice];
        bytes.extend(input(&used));
        seeds.push(seed("vhdx", format!("used-{name}"), bytes));
    }
    // Fields of each part: the log's GUID and length, an entry of the region table and of the metadata, the sizes, blocks.
    let changes: [(&str, &[Step<'static>]); 6] = [
        (
            "headers",
            &[
                Step::Bytes(1, 48, &[1; 16]),
                Step::Seal(1),
                Step::Bytes(2, 68, &[0, 0, 32, 0]),
                Step::Seal(2),
            ],
        ),
        (
            "region-table",
            &[Step::Bytes(3, 32, &[0, 0, 64, 0]), Step::Seal(3)],
        ),
        (
            "log",
            &[
                Step::Bytes(5, 72, &[0, 0, 48]),
                Step::Bytes(5, 24, &[1]),
                Step::Seal(5),
            ],
        ),
        ("metadata", &[Step::Bytes(6, 48, &[8, 0, 1, 0, 4])]),
        ("items", &[Step::Bytes(7, 0, &[0, 0, 0, 16])]),
        (
            "blocks",
            &[
                Step::Length(16 << 20),
                Step::Bytes(8, 0, &[6, 0, 64, 0, 0, 0, 0, 0, 3, 0, 80]),
            ],
        ),
    ];
    let after = [
        Step::Open(true),
        Step::Read(0, 16),
        Step::Open(false),
        Step::Write(0, 16, 1),
        Step::Unmap(0, 5000),
        Step::Flush,
    ];
    for (name, steps) in changes {
        let mut bytes = vec![1];
        bytes.extend(input(steps));
        bytes.extend(input(&after));
        seeds.push(seed("vhdx", format!("changed-{name}"), bytes));
    }
    let mut bytes = vec![3];
    bytes.extend(b"vhdxfile");
    seeds.push(seed("vhdx", "signature", bytes));
    seeds
}
