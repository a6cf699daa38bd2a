//! Sockets between guest and host, clause by clause (spec hvsock.md): a guest end in raw mode, streams in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmbus::hypervisor::Hypervisor;
use vmbus::ids::ConnectionId;
use vmbus::kmcl::{
    Channel, ChannelBuilder, EnabledChannel, PacketBuffer, RawError, RawPacket, State,
};
use vmbus::protocol::message::{OfferChannel, TlConnectRequest, TlConnectResult};
use vmbus::protocol::{Body, Guid, LEGACY_CONNECTION, MessageType, OfferFlags, Payload, Version};
use vmbus_host::bus::Profile;
use vmbus_host::hvsocket::{
    Backend, ConnectFault, HostConnection, Limits, MAX_DATA, MemoryEnd, Service, Sockets,
    SocketsHandle, Stream, memory_stream,
};
use vmbus_host::message_faults::MessageFault;

use crate::support::{SECOND, Vm};

/// The service that somebody listens on.
const SERVICE: Service = Service::port(5000);

/// The guest's end of its first connection.
const ENDPOINT: Guid = Service::port(1).0;

/// Bytes that a program's stream holds.
const STREAM: usize = 8192;

/// Those who listen at the host: the other ends of their streams, in order.
#[derive(Clone, Default)]
struct Listeners {
    ends: Arc<Mutex<Vec<MemoryEnd>>>,
    asked: Arc<Mutex<Vec<Service>>>,
}

impl Backend for Listeners {
    fn connect(&mut self, service: Service) -> Option<Box<dyn Stream>> {
        self.asked.lock().unwrap().push(service);
        if service != SERVICE {
            return None;
        }
        let (stream, end) = memory_stream(STREAM);
        self.ends.lock().unwrap().push(end);
        Some(Box::new(stream))
    }
}

/// What the guest has seen of a connection.
#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
    /// The guest's program does not read now.
    idle: bool,
    odd: Vec<Vec<u8>>,
}

/// The guest's end of a connection.
#[derive(Clone)]
pub struct Socket {
    channel: Arc<EnabledChannel>,
    seen: Arc<Mutex<Seen>>,
}

fn packet(data: &[u8]) -> Vec<u8> {
    let header = (data.len() as u64) << 32 | 1;
    [&header.to_le_bytes(), data].concat()
}

impl Socket {
    /// Waits for an offer with this service and endpoint.
    pub fn new(vm: &Vm, service: Guid, endpoint: Guid, pages: usize) -> Self {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let reading = seen.clone();
        let channel = ChannelBuilder::new(service)
            .instance(endpoint)
            .friendly_name("socket")
            .ring_pages(pages, pages)
            .queue_management_suppressed(move |channel| read(channel, &reading))
            .enable(vm.vmbus.client())
            .unwrap();
        Self {
            channel: Arc::new(channel),
            seen,
        }
    }

    fn raw(&self, payload: &[u8]) -> Result<(), RawError> {
        let packet = RawPacket::in_band(payload);
        self.channel.channel().raw(|rings| rings.write(&packet))
    }

    /// Sends as much as the ring has room for; gives the count.
    pub fn send(&self, data: &[u8]) -> usize {
        let mut sent = 0;
        for piece in data.chunks(1000) {
            match self.raw(&packet(piece)) {
                Ok(()) => sent += piece.len(),
                Err(RawError::Full { .. }) => break,
                Err(error) => panic!("{error}"),
            }
        }
        sent
    }

    fn finish(&self) {
        assert!(self.try_finish());
    }

    /// Whether there was room for it.
    pub fn try_finish(&self) -> bool {
        self.raw(&packet(&[])).is_ok()
    }

    pub fn seen_bytes(&self) -> Vec<u8> {
        self.seen.lock().unwrap().bytes.clone()
    }

    pub fn is_open(&self) -> bool {
        self.channel.channel().state() == State::Active
    }

    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.seen.lock().unwrap().bytes)
    }

    pub fn ended(&self) -> bool {
        self.seen.lock().unwrap().ended
    }

    /// The guest's program stops reading, or goes on.
    fn set_idle(&self, idle: bool) {
        self.seen.lock().unwrap().idle = idle;
        if !idle {
            read(self.channel.channel(), &self.seen);
        }
    }
}

fn read(channel: &Channel, seen: &Mutex<Seen>) {
    let mut seen = seen.lock().unwrap();
    if seen.idle {
        return;
    }
    let mut packet = PacketBuffer::default();
    // A channel that is not open has nothing to read.
    let _ = channel.raw(|rings| {
        while rings.read(&mut packet)? {
            let payload = packet.payload();
            let word = u64::from_le_bytes(*payload.first_chunk().unwrap());
            let length = (word >> 32) as usize;
            match payload.get(8..8 + length) {
                Some([]) => seen.ended = true,
                Some(data) if word & 0xFFFF_FFFF == 1 => seen.bytes.extend_from_slice(data),
                _ => seen.odd.push(payload.to_vec()),
            }
        }
        Ok(())
    });
}

/// Posts a message on the connection that the guest's others go by.
fn post(vm: &Vm, payload: &[u8]) {
    let named = vm
        .machine
        .server(|server| server.profile().named_connection);
    let old = vm.machine.server(|server| server.version()) < Some(Version::V5_0);
    let connection: ConnectionId = if old { LEGACY_CONNECTION } else { named };
    vm.machine.post_message(connection, payload).unwrap();
    vm.machine.settle();
}

/// The guest asks for a connection.
pub fn request(vm: &Vm, service: Guid, endpoint: Guid) {
    let mut message = Payload::new(&TlConnectRequest { endpoint, service });
    message.append(&[0; 16]);
    post(vm, &message);
}

/// The instance of the first offer that the guest has.
pub fn offered_endpoint(vm: &Vm) -> Option<Guid> {
    let offers = vm.vmbus.snapshot().offers;
    offers.first().map(|info| info.offer.instance)
}

struct Setup {
    vm: Vm,
    listeners: Listeners,
    handle: SocketsHandle,
}

impl Setup {
    fn new() -> Self {
        Self::with(Profile::hyper_v(), Limits::default())
    }

    fn with(profile: Profile, limits: Limits) -> Self {
        let vm = Vm::new(profile);
        let listeners = Listeners::default();
        let sockets = Sockets::new(listeners.clone(), limits);
        let handle = sockets.handle();
        vm.machine.host(|host| host.set_connector(sockets));
        vm.connect();
        Self {
            vm,
            listeners,
            handle,
        }
    }

    fn post(&self, payload: &[u8]) {
        post(&self.vm, payload);
    }

    fn request(&self, service: Guid, endpoint: Guid) {
        request(&self.vm, service, endpoint);
    }

    /// A connection of the guest, open at both ends.
    fn connected(&self) -> (Socket, MemoryEnd) {
        self.connected_with(6)
    }

    fn connected_with(&self, pages: usize) -> (Socket, MemoryEnd) {
        let number = self.handle.counts().from_guest as u32 + 1;
        let endpoint = Service::port(number).0;
        let socket = Socket::new(&self.vm, SERVICE.0, endpoint, pages);
        self.request(SERVICE.0, endpoint);
        assert!(socket.is_open());
        let end = self.listeners.ends.lock().unwrap().pop().unwrap();
        (socket, end)
    }

    /// The offers that the guest has now, by instance.
    fn offers(&self) -> BTreeMap<Guid, OfferFacts> {
        let offers = self.vm.vmbus.snapshot().offers;
        let facts = offers.into_iter().map(|info| {
            let facts = OfferFacts {
                interface: info.offer.interface,
                flags: info.offer.flags,
                user_data: info.offer.user_data,
            };
            (info.offer.instance, facts)
        });
        facts.collect()
    }

    fn settle(&self) {
        self.vm.machine.settle();
    }

    fn assert_well_behaved(&self) {
        assert_eq!(self.handle.complaints(), [] as [&str; 0]);
        self.vm.assert_well_behaved();
    }
}

struct OfferFacts {
    interface: Guid,
    flags: OfferFlags,
    user_data: [u8; 120],
}

/// Bytes that differ.
pub fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|at| (at * 7 + at / 251) as u8).collect()
}

// Guest to host

#[test]
fn a_guests_request_is_answered_by_an_offer_with_its_endpoint_as_instance() {
    let setup = Setup::new();
    setup.request(SERVICE.0, ENDPOINT);
    let offers = setup.offers();
    let offer = &offers[&ENDPOINT];
    assert_eq!(offer.interface, SERVICE.0);
    assert_eq!(offer.flags.0, 0x2011);
    let mut data = [0; 120];
    data[6] = 1;
    assert_eq!(
        offer.user_data, data,
        "a pipe of bytes, asked for by the guest, RS5"
    );
    setup.assert_well_behaved();
}

#[test]
fn the_offer_of_a_guest_before_5_2_says_version_0() {
    let setup = Setup::with(Profile::hyper_v_up_to(Version::V5_1), Limits::default());
    setup.request(SERVICE.0, ENDPOINT);
    assert_eq!(setup.offers()[&ENDPOINT].user_data, [0; 120]);
}

#[test]
fn a_request_without_silo_is_taken_by_every_version() {
    for version in [Version::V4_0, Version::V5_0, Version::V5_3] {
        let setup = Setup::with(Profile::hyper_v_up_to(version), Limits::default());
        let request = TlConnectRequest {
            endpoint: ENDPOINT,
            service: SERVICE.0,
        };
        setup.post(&Payload::new(&request));
        assert!(setup.offers().contains_key(&ENDPOINT), "{version:?}");
        setup.assert_well_behaved();
    }
}

#[test]
fn nobody_listening_is_refused_from_4_1_and_not_answered_before() {
    for (version, told) in [(Version::V4_0, false), (Version::V4_1, true)] {
        let setup = Setup::with(Profile::hyper_v_up_to(version), Limits::default());
        let service = Service::port(7).0;
        setup.vm.machine.detach();
        setup.request(service, ENDPOINT);
        let message = setup.vm.machine.host(|host| host.poll_message(u64::MAX));
        let refused = message.map(|message| {
            let (result, _) = TlConnectResult::parse(&message.payload).unwrap();
            (result.endpoint, result.service, result.status.get())
        });
        assert_eq!(refused, told.then_some((ENDPOINT, service, 0xC000_0236)));
        assert_eq!(setup.handle.counts().refused, 1);
        assert_eq!(*setup.listeners.asked.lock().unwrap(), [Service::port(7)]);
    }
}

#[test]
fn a_host_without_connector_refuses() {
    let vm = Vm::new(Profile::openvmm());
    vm.connect();
    vm.machine.detach();
    let request = TlConnectRequest {
        endpoint: ENDPOINT,
        service: SERVICE.0,
    };
    vm.machine
        .post_message(LEGACY_CONNECTION, &Payload::new(&request))
        .unwrap();
    vm.machine.settle();
    let message = vm.machine.host(|host| host.poll_message(u64::MAX)).unwrap();
    assert_eq!(message.payload[0], 23);
}

#[test]
fn bytes_go_both_ways() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.send(b"hello from the guest");
    setup.settle();
    assert_eq!(end.receive(100), b"hello from the guest");
    end.send(b"hello from the host");
    setup.settle();
    assert_eq!(socket.take(), b"hello from the host");
    let counts = setup.handle.counts();
    assert_eq!((counts.bytes_from_guest, counts.bytes_to_guest), (20, 19));
    assert_eq!(counts.connections, 1);
    setup.assert_well_behaved();
}

#[test]
fn bytes_that_the_program_sent_before_the_guest_opened_arrive() {
    let setup = Setup::new();
    setup.request(SERVICE.0, ENDPOINT);
    let end = setup.listeners.ends.lock().unwrap().pop().unwrap();
    end.send(b"early");
    let socket = Socket::new(&setup.vm, SERVICE.0, ENDPOINT, 6);
    setup.settle();
    assert_eq!(socket.take(), b"early");
}

#[test]
fn a_packet_of_the_most_data_passes_and_one_byte_more_ends_the_connection() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    let data = bytes(MAX_DATA);
    socket.raw(&packet(&data)).unwrap();
    setup.settle();
    let mut got = end.receive(STREAM);
    setup.settle();
    got.extend(end.receive(STREAM));
    assert_eq!(got, data);
    socket.raw(&packet(&bytes(MAX_DATA + 1))).unwrap();
    setup.settle();
    assert!(end.is_closed() && !socket.is_open());
    assert_eq!(
        setup.handle.complaints(),
        ["a pipe packet with more data than any may have"]
    );
}

#[test]
fn a_program_that_does_not_read_holds_the_guest_back_and_nothing_is_lost() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    let data = bytes(200_000);
    let mut sent = 0;
    loop {
        let now = socket.send(&data[sent..]);
        setup.settle();
        if now == 0 {
            break;
        }
        sent += now;
    }
    // The ring, the stream, and one packet between them.
    assert!(sent < 6 * 4096 + STREAM + 1000, "{sent}");
    let mut got = Vec::new();
    while got.len() < data.len() {
        got.extend(end.receive(3000));
        setup.settle();
        sent += socket.send(&data[sent..]);
        setup.settle();
    }
    assert!(got == data);
    setup.assert_well_behaved();
}

#[test]
fn a_guest_that_waits_for_room_is_signalled_when_it_is_there() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    while socket.send(&bytes(1000)) > 0 {
        setup.settle();
    }
    let awaited = socket
        .channel
        .channel()
        .raw(|rings| rings.wait_for_room(4096))
        .unwrap();
    assert!(!awaited);
    let batches = || socket.channel.channel().counters().batches;
    let before = batches();
    while end.receive(1000).len() == 1000 && batches() == before {
        setup.settle();
    }
    assert!(batches() > before, "the host has signalled room");
}

#[test]
fn a_guest_that_does_not_read_holds_the_program_back_and_nothing_is_lost() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.set_idle(true);
    let data = bytes(200_000);
    let mut sent = 0;
    loop {
        let now = end.send(&data[sent..]);
        setup.settle();
        if now == 0 {
            break;
        }
        sent += now;
    }
    assert!(sent < 6 * 4096 + STREAM + MAX_DATA, "{sent}");
    let mut got = Vec::new();
    while got.len() < data.len() {
        socket.set_idle(false);
        socket.set_idle(true);
        setup.settle();
        got.extend(socket.take());
        sent += end.send(&data[sent..]);
        setup.settle();
    }
    assert!(got == data);
    setup.assert_well_behaved();
}

#[test]
fn a_ring_of_one_page_is_enough() {
    let setup = Setup::new();
    let (socket, end) = setup.connected_with(1);
    let data = bytes(50_000);
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < data.len() {
        sent += end.send(&data[sent..]);
        setup.settle();
        got.extend(socket.take());
    }
    assert!(got == data);
    setup.assert_well_behaved();
}

// The end

#[test]
fn the_end_of_the_guests_bytes_leaves_the_other_way_open() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.send(b"last");
    socket.finish();
    setup.settle();
    assert!(!end.is_finished(), "not before the last byte is read");
    assert_eq!(end.receive(9), b"last");
    assert!(end.is_finished());
    end.send(b"answer");
    setup.vm.machine.advance(60 * SECOND);
    assert_eq!(socket.take(), b"answer");
    assert!(socket.is_open() && !end.is_closed() && !socket.ended());
    setup.assert_well_behaved();
}

#[test]
fn the_end_of_the_programs_bytes_leaves_the_other_way_open() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    end.send(b"last");
    end.finish();
    setup.settle();
    assert_eq!(socket.take(), b"last");
    assert!(socket.ended());
    socket.send(b"answer");
    setup.vm.machine.advance(60 * SECOND);
    assert_eq!(end.receive(9), b"answer");
    assert!(socket.is_open() && !end.is_closed());
    setup.assert_well_behaved();
}

#[test]
fn when_both_have_finished_and_all_is_read_the_channel_is_rescinded() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.set_idle(true);
    end.send(b"for later");
    end.finish();
    socket.finish();
    setup.settle();
    assert!(socket.is_open(), "the guest has not read everything");
    socket.set_idle(false);
    setup.vm.machine.advance(SECOND);
    assert_eq!(socket.take(), b"for later");
    assert!(socket.ended());
    assert!(!socket.is_open() && end.is_closed());
    assert!(setup.offers().is_empty());
    assert_eq!(setup.handle.counts().connections, 0);
    setup.assert_well_behaved();
}

#[test]
fn a_guest_that_has_finished_and_reads_no_more_is_given_up_after_a_while() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.set_idle(true);
    socket.finish();
    let mut at = 0;
    while end.send(&bytes(1000)[at..]) > 0 {
        at = 0;
        setup.settle();
    }
    setup.vm.machine.advance(9 * SECOND);
    assert!(socket.is_open());
    setup.vm.machine.advance(2 * SECOND);
    assert!(!socket.is_open() && end.is_closed());
    setup.assert_well_behaved();
}

#[test]
fn a_program_that_is_gone_ends_the_connection_when_the_guest_has_read_its_last_bytes() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.set_idle(true);
    end.send(b"goodbye");
    setup.settle();
    drop(end);
    socket.send(b"are you there?");
    setup.settle();
    assert!(socket.is_open());
    socket.set_idle(false);
    setup.vm.machine.advance(SECOND);
    assert_eq!(socket.take(), b"goodbye");
    assert!(socket.ended() && !socket.is_open());
    setup.assert_well_behaved();
}

#[test]
fn a_guest_that_closes_the_channel_ends_the_connection_and_the_offer() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.send(b"delivered");
    setup.settle();
    socket.channel.disable();
    setup.vm.machine.advance(20 * SECOND);
    assert!(end.is_closed());
    assert_eq!(end.receive(9), b"delivered");
    assert!(setup.offers().is_empty());
    assert_eq!(setup.handle.counts().connections, 0);
    setup.assert_well_behaved();
}

#[test]
fn a_device_taken_away_in_the_middle_ends_the_connection_at_both_ends() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    let id = setup.vm.vmbus.snapshot().offers[0].offer.channel;
    setup.vm.machine.rescind(id);
    setup.settle();
    assert!(end.is_closed() && !socket.is_open());
    assert_eq!(setup.handle.counts().connections, 0);
    setup.assert_well_behaved();
}

#[test]
fn connections_and_requests_end_with_the_guests_connection_to_the_bus() {
    let setup = Setup::new();
    let (_socket, end) = setup.connected();
    setup.request(SERVICE.0, Service::port(99).0);
    let pending = setup.listeners.ends.lock().unwrap().pop().unwrap();
    setup.vm.vmbus.begin_unload();
    setup.settle();
    assert!(end.is_closed() && pending.is_closed());
    // The next kernel is offered nothing of it.
    let offered = (1..100).filter(|id| {
        setup
            .vm
            .machine
            .server(|server| server.is_offered(vmbus::ids::ChannelId(*id)))
    });
    assert_eq!(offered.count(), 0);
    setup.assert_well_behaved();
}

// Host to guest

fn call(setup: &Setup, service: Service, greet: bool) -> MemoryEnd {
    let (stream, end) = memory_stream(STREAM);
    setup.handle.connect(HostConnection {
        service,
        stream: Box::new(stream),
        first: b"first".to_vec(),
        greet,
    });
    end
}

#[test]
fn a_program_reaches_a_guest_that_listens_and_is_told_so() {
    let setup = Setup::new();
    let end = call(&setup, SERVICE, true);
    setup.settle();
    let offers = setup.offers();
    let (endpoint, offer) = offers.first_key_value().unwrap();
    assert_eq!(offer.interface, SERVICE.0);
    assert_eq!(offer.flags.0, 0x2011);
    assert_eq!(
        offer.user_data[..8],
        [0, 0, 0, 0, 1, 0, 1, 0],
        "asked for by the host"
    );
    assert!(end.receive(99).is_empty(), "the guest has not opened it");
    let port = Service(*endpoint).port_number().unwrap();
    let socket = Socket::new(&setup.vm, SERVICE.0, *endpoint, 6);
    setup.settle();
    assert_eq!(end.receive(99), format!("OK {port}\n").into_bytes());
    assert_eq!(socket.take(), b"first");
    socket.send(b"welcome");
    end.send(b" second");
    setup.settle();
    assert_eq!(end.receive(99), b"welcome");
    assert_eq!(socket.take(), b" second");
    setup.assert_well_behaved();
}

#[test]
fn a_service_that_is_no_port_is_answered_with_a_guid() {
    let setup = Setup::new();
    let service = Service(Guid::literal("11111111-2222-3333-4444-555555555555"));
    let end = call(&setup, service, true);
    setup.settle();
    let endpoint = *setup.offers().first_key_value().unwrap().0;
    let _socket = Socket::new(&setup.vm, service.0, endpoint, 6);
    setup.settle();
    assert_eq!(end.receive(99), format!("OK {endpoint}\n").into_bytes());
}

#[test]
fn a_guest_that_does_not_open_in_time_ends_it_for_the_program() {
    let setup = Setup::new();
    let end = call(&setup, SERVICE, true);
    setup.vm.machine.advance(4 * SECOND);
    assert!(!end.is_closed());
    assert_eq!(setup.offers().len(), 1);
    setup.vm.machine.advance(2 * SECOND);
    assert!(end.is_closed());
    assert!(end.receive(99).is_empty());
    assert!(setup.offers().is_empty(), "rescinded");
    assert_eq!(setup.handle.counts().expired, 1);
    setup.assert_well_behaved();
}

#[test]
fn a_guest_that_is_not_on_the_bus_or_too_old_is_not_reached() {
    let setup = Setup::with(Profile::hyper_v_up_to(Version::V3_0), Limits::default());
    let end = call(&setup, SERVICE, false);
    setup.settle();
    assert!(end.is_closed());
    let setup = Setup::new();
    setup.vm.vmbus.begin_unload();
    setup.settle();
    let end = call(&setup, SERVICE, false);
    setup.settle();
    assert!(end.is_closed());
    assert_eq!(setup.handle.counts().dropped, 1);
}

// Limits and hostile guests

#[test]
fn many_connections_are_open_at_once_and_one_too_many_is_refused() {
    let limits = Limits {
        connections: 20,
        ..Limits::default()
    };
    let setup = Setup::with(Profile::openvmm(), limits);
    let sockets: Vec<_> = (0..20).map(|_| setup.connected_with(1)).collect();
    for (at, (socket, end)) in sockets.iter().enumerate() {
        socket.send(&[at as u8]);
        end.send(&[at as u8, 1]);
    }
    setup.settle();
    for (at, (socket, end)) in sockets.iter().enumerate() {
        assert_eq!(end.receive(9), [at as u8]);
        assert_eq!(socket.take(), [at as u8, 1]);
    }
    setup.request(SERVICE.0, Service::port(1000).0);
    assert_eq!(setup.handle.counts().refused, 1);
    let end = call(&setup, SERVICE, false);
    setup.settle();
    assert!(end.is_closed());
    // Room again.
    drop(sockets);
    setup.vm.machine.advance(20 * SECOND);
    assert_eq!(setup.handle.counts().connections, 0);
    setup.request(SERVICE.0, Service::port(1000).0);
    assert_eq!(setup.handle.counts().connections, 1);
}

#[test]
fn the_same_endpoint_twice_is_refused() {
    let setup = Setup::new();
    setup.request(SERVICE.0, ENDPOINT);
    setup.request(SERVICE.0, ENDPOINT);
    let counts = setup.handle.counts();
    assert_eq!((counts.connections, counts.refused), (1, 1));
}

#[test]
fn requests_that_nobody_opens_do_not_pile_up() {
    let limits = Limits {
        connections: 8,
        ..Limits::default()
    };
    let setup = Setup::with(Profile::hyper_v(), limits);
    for round in 0..5 {
        for number in 0..20 {
            setup.request(SERVICE.0, Service::port(100 * round + number).0);
        }
        assert!(setup.offers().len() <= 8);
        setup.vm.machine.advance(6 * SECOND);
        assert!(setup.offers().is_empty());
    }
    assert_eq!(setup.handle.counts().expired, 40);
}

#[test]
fn what_is_no_packet_of_a_pipe_ends_the_connection() {
    let whole = packet(b"data");
    let mut long = packet(b"data");
    long.extend([0; 16]);
    let odd: [&[u8]; 5] = [
        &[],
        &[2, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4],
        &[1, 0, 0, 0, 200, 0, 0, 0, 1, 2, 3, 4],
        &[1, 0, 0, 0, 255, 255, 255, 255, 1, 2, 3, 4],
        &long,
    ];
    for payload in odd {
        let setup = Setup::new();
        let (socket, end) = setup.connected();
        socket.raw(&whole).unwrap();
        socket.raw(payload).unwrap();
        setup.settle();
        assert!(end.is_closed() && !socket.is_open(), "{payload:?}");
        assert_eq!(setup.handle.complaints().len(), 1);
    }
}

#[test]
fn data_behind_the_end_and_packets_of_other_kinds_end_the_connection() {
    let setup = Setup::new();
    let (socket, end) = setup.connected();
    socket.finish();
    socket.send(b"more");
    setup.settle();
    assert!(end.is_closed() && !socket.is_open());
    let (socket, end) = setup.connected();
    let completion = RawPacket::completion(1, b"12345678");
    socket
        .channel
        .channel()
        .raw(|rings| rings.write(&completion))
        .unwrap();
    setup.settle();
    assert!(end.is_closed() && !socket.is_open());
    assert_eq!(
        setup.handle.complaints(),
        [
            "data on a socket behind its end",
            "a packet on a socket that is not in band"
        ]
    );
}

#[test]
fn other_connections_go_on_when_one_is_broken() {
    let setup = Setup::new();
    let (broken, _) = setup.connected();
    let (socket, end) = setup.connected();
    broken.raw(b"garbage!").unwrap();
    setup.settle();
    assert!(!broken.is_open());
    socket.send(b"fine");
    setup.settle();
    assert_eq!(end.receive(9), b"fine");
}

// Faults on request

#[test]
fn faults_hit_the_packets_that_they_were_asked_for() {
    type Expected = fn(&Seen) -> bool;
    let cases: [(MessageFault, Expected); 5] = [
        (MessageFault::Lost, |seen| {
            seen.bytes.is_empty() && seen.odd.is_empty()
        }),
        (MessageFault::Twice, |seen| seen.bytes == b"datadata"),
        (MessageFault::WrongType, |seen| seen.odd.len() == 1),
        (MessageFault::Overstated, |seen| seen.odd.len() == 1),
        (MessageFault::Oversized, |seen| seen.bytes == b"data"),
    ];
    for (fault, expected) in cases {
        let setup = Setup::new();
        let (socket, end) = setup.connected();
        setup.handle.inject(fault, 1);
        end.send(b"data");
        setup.settle();
        assert!(expected(&socket.seen.lock().unwrap()), "{fault}");
        socket.seen.lock().unwrap().bytes.clear();
        end.send(b"healthy");
        setup.settle();
        assert_eq!(socket.take(), b"healthy", "{fault}");
    }
}

#[test]
fn connecting_can_be_made_to_fail() {
    let setup = Setup::new();
    setup.handle.inject_connect(ConnectFault::NoAnswer);
    setup.request(SERVICE.0, ENDPOINT);
    assert!(setup.offers().is_empty());
    assert_eq!(setup.handle.counts().refused, 0);
    setup.handle.inject_connect(ConnectFault::Refuse);
    setup.request(SERVICE.0, ENDPOINT);
    assert_eq!(setup.handle.counts().refused, 1);
    setup.handle.inject_connect(ConnectFault::WrongEndpoint);
    setup.request(SERVICE.0, ENDPOINT);
    let offers = setup.offers();
    assert!(!offers.contains_key(&ENDPOINT) && offers.len() == 1);
    setup.handle.inject_connect(ConnectFault::Refuse);
    setup.handle.heal();
    setup.request(SERVICE.0, ENDPOINT);
    assert!(setup.offers().contains_key(&ENDPOINT));
}

/// Something that guest, program or clock does.
#[derive(Clone, Debug)]
enum Step {
    Raw(Vec<u8>),
    Send(usize),
    Finish,
    Idle(bool),
    ProgramSend(usize),
    ProgramReceive(usize),
    ProgramFinish,
    Scribble(u16, Vec<u8>),
    Request(u32),
    Close,
    Advance(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => proptest::collection::vec(any::<u8>(), 0..40).prop_map(Step::Raw),
        6 => (0usize..20_000).prop_map(Step::Send),
        1 => Just(Step::Finish),
        2 => any::<bool>().prop_map(Step::Idle),
        6 => (0usize..20_000).prop_map(Step::ProgramSend),
        6 => (0usize..20_000).prop_map(Step::ProgramReceive),
        1 => Just(Step::ProgramFinish),
        1 => (any::<u16>(), proptest::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, bytes)| Step::Scribble(at, bytes)),
        2 => (0u32..4).prop_map(Step::Request),
        1 => Just(Step::Close),
        3 => (0u64..20 * SECOND).prop_map(Step::Advance),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whatever_a_guest_does_the_host_stays_within_its_limits_and_connections_end(
        steps in proptest::collection::vec(step(), 0..60),
    ) {
        let setup = Setup::new();
        let (socket, end) = setup.connected();
        for step in steps {
            match step {
                Step::Raw(bytes) => drop(socket.raw(&bytes)),
                Step::Send(count) => drop(socket.raw(&packet(&bytes(count)))),
                Step::Finish => drop(socket.raw(&packet(&[]))),
                Step::Idle(idle) => socket.seen.lock().unwrap().idle = idle,
                Step::ProgramSend(count) => {
                    end.send(&bytes(count));
                }
                Step::ProgramReceive(count) => {
                    end.receive(count);
                }
                Step::ProgramFinish => end.finish(),
                Step::Scribble(at, bytes) => {
                    let offers = setup.vm.vmbus.snapshot().offers;
                    if let Some(info) = offers.first() {
                        setup.vm.machine.channel(info.offer.channel, |host| {
                            let at = usize::from(at) % host.memory().len();
                            let _ = host.memory().write(at, &bytes);
                        });
                    }
                }
                Step::Request(number) => setup.request(SERVICE.0, Service::port(number + 50).0),
                Step::Close => socket.channel.disable(),
                Step::Advance(by) => setup.vm.machine.advance(by),
            }
            setup.settle();
            setup.listeners.ends.lock().unwrap().clear();
            prop_assert!(setup.handle.counts().connections <= 5);
        }
        setup.vm.vmbus.begin_unload();
        setup.vm.machine.advance(60 * SECOND);
        prop_assert!(end.is_closed());
        prop_assert_eq!(setup.handle.counts().connections, 0);
        let restless = "guest and host never come to rest";
        prop_assert!(!setup.vm.machine.complaints().contains(&restless));
    }
}

#[test]
fn the_offers_message_has_the_layout_of_the_sheet() {
    let setup = Setup::new();
    setup.vm.machine.detach();
    setup.request(SERVICE.0, ENDPOINT);
    let message = setup
        .vm
        .machine
        .host(|host| host.poll_message(u64::MAX))
        .unwrap();
    let (offer, _) = OfferChannel::parse(&message.payload).unwrap();
    assert_eq!(OfferChannel::TYPE, MessageType::OFFER_CHANNEL);
    assert_eq!((offer.interface, offer.instance), (SERVICE.0, ENDPOINT));
    assert_eq!(offer.sub_channel_index.get(), 0);
}
