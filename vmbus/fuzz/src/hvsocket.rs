//! Sockets: the host's end over anything that a guest writes into the rings of a connection.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmbus::hypervisor::Hypervisor;
use vmbus::ids::ConnectionId;
use vmbus::kmcl::{ChannelBuilder, RawPacket};
use vmbus::protocol::message::TlConnectRequest;
use vmbus::protocol::{Guid, Payload};
use vmbus_host::bus::Profile;
use vmbus_host::hvsocket::{Backend, Limits, MemoryEnd, Service, Sockets, Stream, memory_stream};

use crate::guest::{SECOND, guest};
use crate::steps;

/// Something that the guest, a program of the host or the clock does.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// The guest writes a packet.
    Packet(&'a [u8]),
    /// The guest writes a packet in good order, with this data.
    Data(&'a [u8]),
    /// The guest writes bytes anywhere in the rings.
    Scribble(u16, &'a [u8]),
    /// The guest asks for one more connection, or for the same again.
    Request(u8),
    /// The program sends so many bytes.
    Send(u16),
    /// The program takes so many bytes.
    Receive(u16),
    /// The program has no more to send.
    Finish,
    /// Time goes by, in units of 100 ns.
    Advance(u32),
    /// The guest closes its end.
    Close,
}

/// Everybody that listens, on one service.
#[derive(Clone, Default)]
struct Listeners(Arc<Mutex<Vec<MemoryEnd>>>);

const SERVICE: Service = Service::port(5000);

/// The most connections in [`host_hvsocket`].
const CONNECTIONS: usize = 4;

/// How much time goes by in an input at most, beyond every time limit of a connection: the host looks every 10 ms at a guest
/// that does not read.
const TIME: u64 = 60 * SECOND;

impl Backend for Listeners {
    fn connect(&mut self, service: Service) -> Option<Box<dyn Stream>> {
        if service != SERVICE {
            return None;
        }
        let (stream, end) = memory_stream(4096);
        self.0.lock().expect("nobody panics").push(end);
        Some(Box::new(stream))
    }
}

/// A guest whose program writes anything: connections end, and their number stays within its limit.
pub fn host_hvsocket(data: &[u8]) {
    let (machine, vmbus) = guest(Profile::openvmm());
    let listeners = Listeners::default();
    let limits = Limits {
        connections: CONNECTIONS,
        ..Limits::default()
    };
    let sockets = Sockets::new(listeners.clone(), limits);
    let handle = sockets.handle();
    machine.host(|host| host.set_connector(sockets));
    vmbus.connect();
    machine.settle();
    let endpoint = Service::port(1).0;
    let channel = ChannelBuilder::new(SERVICE.0)
        .instance(endpoint)
        .ring_pages(2, 2)
        .queue_management_suppressed(|_| {})
        .enable(vmbus.client())
        .expect("a sound setting");
    let request = |endpoint: Guid| {
        let request = TlConnectRequest {
            endpoint,
            service: SERVICE.0,
        };
        // The host may be busy.
        let _ = machine.post_message(ConnectionId(1), &Payload::new(&request));
        machine.settle();
    };
    request(endpoint);
    let first = listeners.0.lock().expect("nobody panics").pop();
    let end = first.expect("the first is accepted");
    let write = |payload: &[u8]| {
        // There may be no room, or no channel any more.
        let packet = RawPacket::in_band(payload);
        let _ = channel.channel().raw(|rings| rings.write(&packet));
    };
    let mut left = TIME;
    for step in steps(data) {
        match step {
            Step::Packet(bytes) => write(bytes),
            Step::Data(bytes) => {
                let header = ((bytes.len() as u64) << 32 | 1).to_le_bytes();
                write(&[&header, bytes].concat());
            }
            Step::Scribble(at, bytes) => {
                let offers = vmbus.snapshot().offers;
                if let Some(info) = offers.first() {
                    machine.channel(info.offer.channel, |host| {
                        let at = usize::from(at) % host.memory().len();
                        // Some may lie behind the end.
                        let _ = host.memory().write(at, bytes);
                    });
                }
            }
            Step::Request(number) => request(Service::port(u32::from(number)).0),
            Step::Send(count) => drop(end.send(&vec![7; usize::from(count)])),
            Step::Receive(count) => drop(end.receive(usize::from(count))),
            Step::Finish => end.finish(),
            Step::Advance(by) => {
                let by = u64::from(by).min(left);
                left -= by;
                machine.advance(by);
            }
            Step::Close => channel.disable(),
        }
        machine.settle();
        listeners.0.lock().expect("nobody panics").clear();
        assert!(handle.counts().connections <= CONNECTIONS as u64);
    }
    vmbus.begin_unload();
    machine.advance(60 * SECOND);
    assert!(end.is_closed(), "the connection ends with the bus");
    assert_eq!(handle.counts().connections, 0);
}
