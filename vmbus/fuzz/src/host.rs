//! The host's end of VMBus, over bytes of a guest: it serves real machines, so a hostile guest must not break it.

use serde::{Deserialize, Serialize};
use vmbus::ids::{ChannelId, ConnectionId, GpadlHandle, PAGE_SIZE, PageNumber, VpIndex};
use vmbus::protocol::{Guid, MAX_PAYLOAD, Status, interface};
use vmbus::ring::PacketBuffer;
use vmbus::shared::SharedPages;
use vmbus_host::bus::{Device, Event, Opening, Profile, Server};
use vmbus_host::channel::HostChannel;
use vmbus_host::dynamic_memory::DynamicMemory;

use crate::ring::{Packet, check_packet};
use crate::steps;

/// Something that happens to the bus server.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum ServerStep<'a> {
    /// The guest posts a message on a connection.
    Post(u32, &'a [u8]),
    /// Time goes by, in units of 100 ns.
    Run(u32),
    /// The device answers an opening, with this status.
    FinishOpen(u32, u32),
    /// A new device.
    Add(u8),
    /// A device goes away.
    Rescind(u32),
}

/// The hosts whose habits the server has.
pub(crate) const PROFILES: [fn() -> Profile; 3] =
    [Profile::qemu, Profile::openvmm, Profile::hyper_v];

/// A server with two devices.
pub(crate) fn server(profile: u8) -> Server {
    let mut server = Server::new(PROFILES[usize::from(profile) % PROFILES.len()]());
    for interface in [interface::SCSI_CONTROLLER, interface::DYNAMIC_MEMORY] {
        server.add(Device::new(interface, Guid([interface.0[0]; 16])));
    }
    server
}

/// The bus server over messages of a guest. The first byte chooses the host.
pub fn host_server(data: &[u8]) {
    let Some((profile, data)) = data.split_first() else {
        return;
    };
    let mut server = server(*profile);
    let mut now = 0;
    for step in steps(data) {
        match step {
            ServerStep::Post(connection, message) => {
                server.post(now, ConnectionId(connection), message);
            }
            ServerStep::Run(by) => now += u64::from(by),
            ServerStep::FinishOpen(channel, status) => {
                server.finish_open(ChannelId(channel), Status(status));
            }
            ServerStep::Add(kind) => {
                let mut device = Device::new(interface::NETWORK, Guid([kind; 16]));
                device.late = kind % 2 == 1;
                server.add(device);
            }
            ServerStep::Rescind(channel) => {
                server.rescind(ChannelId(channel));
            }
        }
        server.run(now);
        while let Some(message) = server.poll_message(now) {
            assert!(message.payload.len() <= MAX_PAYLOAD);
        }
        while let Some(event) = server.poll_event() {
            if let Event::Opening(opening) = event {
                assert!(
                    (opening.downstream_page as usize) < opening.pages.len(),
                    "the rings lie in the GPADL"
                );
            }
        }
    }
}

/// Something that happens to the host's end of a channel.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum RingStep<'a> {
    /// The guest writes bytes anywhere.
    Bytes(u16, &'a [u8]),
    /// The guest moves an offset: of which ring, which one, where to.
    Offset(bool, bool, u32),
    Receive,
    Release,
    Send(Packet<'a>),
    WaitForRoom(u32),
    Mask(bool),
}

/// Pages of the rings in [`host_ring`].
const RING_PAGES: usize = 6;

/// The host's end of a channel over memory that the guest scribbles on. The first byte says where the second ring begins.
pub fn host_ring(data: &[u8]) {
    let Some((downstream, data)) = data.split_first() else {
        return;
    };
    let memory = SharedPages::from_heap(PageNumber(0x100), RING_PAGES).expect("the heap has room");
    let opening = Opening {
        channel: ChannelId(1),
        ring: GpadlHandle(1),
        pages: memory.pages().collect(),
        downstream_page: u32::from(*downstream),
        target_vp: VpIndex(0),
        event_flag: 1,
        connection: ConnectionId(0x1_0001),
        user_data: [0; 120],
    };
    let Ok(mut channel) = HostChannel::new(opening, memory.clone()) else {
        assert!(!(2..=4).contains(downstream), "these are two rings");
        return;
    };
    assert!((2..=4).contains(downstream), "each ring has two pages");
    let mut packet = PacketBuffer::default();
    for step in steps(data) {
        match step {
            RingStep::Bytes(offset, bytes) => {
                let offset = usize::from(offset) % memory.len();
                let room = memory.len() - offset;
                memory
                    .write(offset, &bytes[..bytes.len().min(room)])
                    .expect("in bounds");
            }
            RingStep::Offset(down, consumer, value) => {
                let page = if down { usize::from(*downstream) } else { 0 };
                memory
                    .write(
                        page * PAGE_SIZE + 4 * usize::from(consumer),
                        &value.to_le_bytes(),
                    )
                    .expect("in bounds");
            }
            RingStep::Receive => {
                if let Ok(true) = channel.receive(&mut packet) {
                    check_packet(&packet, (RING_PAGES * PAGE_SIZE) as u32);
                }
            }
            RingStep::Release => {
                let _ = channel.release();
            }
            RingStep::Send(packet) => {
                let _ = packet.push(|packet| channel.send(packet));
            }
            RingStep::WaitForRoom(bytes) => {
                let _ = channel.wait_for_room(bytes);
            }
            RingStep::Mask(true) => {
                let _ = channel.mask();
            }
            RingStep::Mask(false) => {
                let _ = channel.unmask();
            }
        }
        let _ = channel.take_interrupt();
    }
}

/// Something that happens to a provider.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum ProviderStep<'a> {
    /// The guest opens or closes the channel.
    Open(bool),
    /// A message from the guest.
    Receive(&'a [u8]),
    /// Time goes by, in units of 100 ns.
    Tick(u32),
    /// The user wants the guest to have so many pages.
    Target(u32),
    /// The user adds memory: which unit of 128 MiB behind what the guest has.
    HotAdd(u8),
}

/// Pages of 128 MiB.
const UNIT: u64 = 1 << 15;

/// The most units of memory that are added.
const UNITS: u64 = 16;

/// Pages of the guest in [`host_providers`].
const RAM: u64 = 1 << 20;

/// The providers over messages of a guest: they complain, and go on.
pub fn host_providers(data: &[u8]) {
    let mut provider = DynamicMemory::new(RAM);
    let mut now = 0;
    for step in steps(data) {
        match step {
            ProviderStep::Open(true) => provider.opened(),
            ProviderStep::Open(false) => provider.closed(),
            ProviderStep::Receive(message) => provider.receive(now, message),
            ProviderStep::Tick(by) => {
                now += u64::from(by);
                provider.tick(now);
                assert!(provider.deadline().is_none_or(|at| at > now));
            }
            ProviderStep::Target(pages) => {
                provider.set_target(u64::from(pages).min(RAM));
            }
            ProviderStep::HotAdd(unit) => {
                let first = RAM + u64::from(unit) % UNITS * UNIT;
                drop(provider.hot_add((first, UNIT)));
            }
        }
        while provider.poll_message().is_some() {}
        assert!(provider.actual() <= RAM + UNITS * UNIT);
        assert!(provider.actual() + provider.removed_pages() >= RAM);
    }
}
