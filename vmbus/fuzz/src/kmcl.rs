//! A whole guest with one KMCL channel, its host keeping to no rule.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use vmbus::Vmbus;
use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    Channel, ChannelBuilder, EnabledChannel, ExternalData, IncomingPacket, Level, ReceivedPacket,
    SendFlags, SharedPages, State,
};
use vmbus::protocol::Guid;
use vmbus::ring::{Kind, Outgoing, PacketBuffer};
use vmbus_host::bus::Device;
use vmbus_host::channel::HostChannel;
use vmbus_host::machine::Machine;
use vmbus_host::provider::Manual;

use crate::guest::{SECOND, guest};
use crate::host::PROFILES;
use crate::ring::Packet;
use crate::steps;

const INTERFACE: Guid = Guid::literal("11111111-2222-3333-4444-555555555555");
const INSTANCE: Guid = Guid::literal("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee");

/// Something that host, guest or clock does.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// The host sends an honest packet.
    Send(Packet<'a>),
    /// It takes so many packets out.
    Receive(u8),
    /// It answers what it was asked: all of it, or all of it twice.
    Answer(bool),
    /// It answers any transaction.
    Complete(u64, &'a [u8]),
    /// It waits for room.
    WaitForRoom(u16),
    /// It writes bytes anywhere in the rings.
    Bytes(u16, &'a [u8]),
    /// It writes a number to a field of a control page: of which ring, which, what.
    Control(bool, u8, u32),
    /// It sets the event flag of any channel.
    Interrupt(u16),
    /// It posts any message.
    Message(&'a [u8]),
    /// It takes the device away, and offers it anew.
    Rescind,
    /// The guest sends: a message, a transaction, or one with external data.
    GuestSend(u8, u16),
    /// The driver completes a packet that it holds.
    Finish(u8),
    /// The driver wants packets at PASSIVE.
    Passive(bool),
    /// The driver changes its quota.
    Quota(u8),
    /// The driver disables the channel, and enables it anew.
    Reopen,
    /// Everybody runs until nobody has anything to do.
    Settle,
    /// Time goes by, in units of 100 ns.
    Advance(u32),
}

/// What the driver saw.
#[derive(Default)]
struct Tally {
    /// How often each of the guest's packets ended.
    ended: Vec<u32>,
    /// Packets that the driver holds.
    held: Vec<IncomingPacket>,
    /// Packets that were delivered for good, and of how many processing-complete told.
    delivered: u64,
    told: u64,
    /// Reasons for which channels ended out of order.
    failures: u32,
}

struct World {
    machine: Arc<Machine>,
    vmbus: Arc<Vmbus>,
    builder: ChannelBuilder,
    id: ChannelId,
    channel: EnabledChannel,
    tally: Arc<Mutex<Tally>>,
    lent: SharedPages,
    /// Transactions that the host may answer.
    asked: Vec<u64>,
    /// Whether the bus messages were the server's own so far.
    honest_bus: bool,
    /// Whether this channel was ended by the driver, or by the host in good order.
    ended: bool,
}

impl World {
    fn new(flags: u8) -> Self {
        let profile = PROFILES[usize::from(flags) % PROFILES.len()]();
        let (machine, vmbus) = guest(profile);
        let device = Device::new(INTERFACE, INSTANCE);
        let id = machine.add(device, Manual).expect("numbers are free");
        vmbus.connect();
        machine.settle();
        let tally = Arc::new(Mutex::new(Tally::default()));
        let builder = driver(&tally, flags);
        let channel = builder.enable(vmbus.client()).expect("a sound setting");
        machine.settle();
        Self {
            lent: SharedPages::from_heap(vmbus::ids::PageNumber(0x9000), 2)
                .expect("the heap has room"),
            machine,
            vmbus,
            builder,
            id,
            channel,
            tally,
            asked: Vec::new(),
            honest_bus: true,
            ended: false,
        }
    }

    fn host<R>(&self, with: impl FnOnce(&mut HostChannel) -> R) -> Option<R> {
        self.machine.channel(self.id, with)
    }

    fn play(&mut self, step: &Step<'_>) {
        match *step {
            Step::Send(ref packet) => {
                packet.push(|packet| {
                    self.host(|host| {
                        let _ = host.send(packet);
                    })
                });
            }
            Step::Receive(count) => self.receive(count),
            Step::Answer(twice) => {
                let asked = std::mem::take(&mut self.asked);
                self.host(|host| {
                    for id in asked {
                        for _ in 0..1 + usize::from(twice) {
                            let _ = host.push(&Outgoing::completion(id, b"answered"));
                        }
                    }
                    let _ = host.publish();
                });
            }
            Step::Complete(id, payload) => {
                self.host(|host| {
                    let _ = host.send(&Outgoing::completion(id, payload));
                });
            }
            Step::WaitForRoom(bytes) => {
                self.host(|host| {
                    let _ = host.publish();
                    let _ = host.wait_for_room(u32::from(bytes));
                });
            }
            Step::Bytes(offset, bytes) => {
                self.host(|host| {
                    let memory = host.memory();
                    let offset = usize::from(offset) % memory.len();
                    let room = (memory.len() - offset).min(bytes.len());
                    memory.write(offset, &bytes[..room]).expect("in bounds");
                });
            }
            Step::Control(incoming, field, value) => {
                self.host(|host| {
                    let pages = host.opening.downstream_page as usize;
                    let page = if incoming { pages * 4096 } else { 0 };
                    let field = [0, 4, 8, 12, 64][usize::from(field) % 5];
                    let bytes = value.to_le_bytes();
                    host.memory()
                        .write(page + field, &bytes)
                        .expect("in bounds");
                });
            }
            Step::Interrupt(channel) => self.machine.interrupt(ChannelId(u32::from(channel))),
            Step::Message(message) => {
                self.honest_bus = false;
                self.machine.at_dispatch(|| self.vmbus.on_message(message));
            }
            Step::Rescind => {
                self.ended |= self.machine.rescind(self.id);
                self.machine.settle();
                let device = Device::new(INTERFACE, INSTANCE);
                if let Some(id) = self.machine.add(device, Manual) {
                    self.id = id;
                }
            }
            Step::GuestSend(how, length) => self.guest_send(how, length),
            Step::Finish(which) => {
                let packet = {
                    let held = &mut self.tally.lock().expect("nobody panics").held;
                    if held.is_empty() {
                        return;
                    }
                    let which = usize::from(which) % held.len();
                    held.swap_remove(which)
                };
                packet.complete(b"finished");
            }
            Step::Passive(passive) => {
                let channel = self.channel.channel();
                channel.set_incoming_processing_at_passive(passive);
            }
            Step::Quota(quota) => {
                let channel = self.channel.channel();
                channel.set_transaction_quota(u32::from(quota));
            }
            Step::Reopen => {
                self.end();
                self.asked.clear();
                let client = self.vmbus.client();
                self.channel = self.builder.enable(client).expect("a sound setting");
                self.ended = false;
                self.machine.settle();
            }
            Step::Settle => self.machine.settle(),
            Step::Advance(by) => self.machine.advance(u64::from(by)),
        }
        self.check_reason();
    }

    /// A channel does not end without anybody saying why.
    fn check_reason(&self) {
        if self.channel.channel().state() == State::Disabled && self.honest_bus && !self.ended {
            assert_ne!(self.tally.lock().expect("nobody panics").failures, 0);
        }
    }

    fn receive(&mut self, count: u8) {
        let mut packet = PacketBuffer::default();
        let mut asked = Vec::new();
        self.host(|host| {
            for _ in 0..count {
                if !matches!(host.receive(&mut packet), Ok(true)) {
                    break;
                }
                if packet.kind() != Kind::COMPLETION && packet.completion_requested() {
                    asked.push(packet.transaction_id());
                }
            }
            let _ = host.release();
        });
        self.asked.append(&mut asked);
    }

    fn guest_send(&self, how: u8, length: u16) {
        let Ok(mut packet) = self.channel.channel().allocate_packet() else {
            return;
        };
        let tally = self.tally.clone();
        let number = {
            let ended = &mut tally.lock().expect("nobody panics").ended;
            ended.push(0);
            ended.len() - 1
        };
        packet.set_completion_routine(Arc::new(move |_, _| {
            tally.lock().expect("nobody panics").ended[number] += 1;
        }));
        let data = &[0x5A; 2048][..usize::from(length).min(2048)];
        let result = match how % 3 {
            0 => packet.send(data),
            1 => packet.send_transaction(data),
            _ => {
                let mut external = ExternalData::new();
                let range = 0..1 + usize::from(length) % self.lent.len();
                external
                    .push(self.lent.clone(), range)
                    .expect("one range of lent memory");
                packet.send_with_external_data(data, external, SendFlags::default())
            }
        };
        if result.is_err() {
            // The packet is the caller's again, and its routine does not run.
            let ended = &mut self.tally.lock().expect("nobody panics").ended;
            ended[number] += 1;
        }
    }

    /// The channel ends, and everything with it.
    fn end(&mut self) {
        self.ended = true;
        self.channel.disable();
        for _ in 0..4 {
            self.machine.settle();
            let held = std::mem::take(&mut self.tally.lock().expect("nobody panics").held);
            for packet in held {
                packet.complete(b"too late");
            }
            // A host that does not answer is waited for, not for ever.
            if !self.honest_bus {
                self.vmbus.begin_unload();
            }
            self.machine.advance(60 * SECOND);
        }
        assert_eq!(
            self.channel.channel().state(),
            State::Disabled,
            "the channel ends"
        );
        let tally = self.tally.lock().expect("nobody panics");
        for (number, count) in tally.ended.iter().enumerate() {
            assert_eq!(*count, 1, "packet {number} ends exactly once");
        }
        assert!(tally.told <= tally.delivered, "told of more than there was");
        drop(tally);
        let mut complaints = self.machine.complaints();
        if !self.honest_bus {
            // A guest that was lied to says what makes no sense to the server, but never runs for ever.
            complaints.retain(|complaint| complaint.contains("rest"));
        }
        assert_eq!(complaints, [] as [&str; 0]);
    }
}

/// A driver that does everything that a driver may do with a packet; the packet's first byte chooses. `flags` sets the channel up.
fn driver(tally: &Arc<Mutex<Tally>>, flags: u8) -> ChannelBuilder {
    let [packets, completes, failures] = std::array::from_fn(|_| tally.clone());
    let process = move |_: &Channel, packet: ReceivedPacket<'_>| {
        if let Some(pages) = packet.transfer_pages() {
            assert_eq!(pages.ranges().count(), pages.ranges().len());
        }
        let choice = packet.payload().first().copied().unwrap_or(0);
        if choice % 8 == 1 && packet.level() == Level::Dispatch {
            return packet.defer_to_passive();
        }
        let mut tally = packets.lock().expect("nobody panics");
        tally.delivered += 1;
        match choice % 8 {
            2 | 3 => tally.held.push(packet.hold()),
            7 if choice == 0xFF => {
                drop(tally);
                packet.fail("the driver does not like it");
            }
            7 => {
                drop(tally);
                drop(packet);
            }
            _ => {
                drop(tally);
                packet.complete(b"done");
            }
        }
    };
    let mut builder = ChannelBuilder::new(INTERFACE)
        .ring_pages(1, 1)
        .maximum_packet_size(2048)
        .maximum_packet_count(6)
        .maximum_external_data(3, 1)
        .transaction_quota(4)
        .batch_budget(5)
        .process_packet_callbacks(process, move |_, count| {
            completes.lock().expect("nobody panics").told += u64::from(count);
        })
        .failure(move |_, reason| {
            assert!(!reason.to_string().is_empty());
            failures.lock().expect("nobody panics").failures += 1;
        });
    if flags & 0x40 != 0 {
        builder = builder.pipe();
    }
    if flags & 0x80 != 0 {
        builder = builder.incoming_processing_at_passive();
    }
    builder
}

/// A driver's channel with a host that scribbles, lies and repeats itself. The guest does not panic or hang, each of its packets ends
/// exactly once, and the channel works on or fails with a reason. The first byte chooses the host and sets the channel up.
pub fn kmcl_channel(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else {
        return;
    };
    let mut world = World::new(*flags);
    steps(data).for_each(|step| world.play(&step));
    world.end();
    world.vmbus.begin_unload();
    world.machine.advance(60 * SECOND);
    if world.honest_bus {
        assert_eq!(world.machine.shared_runs(), 0, "the memory comes back");
    }
}
