//! Random steps of both ends: whatever happens, order is kept and every packet ends exactly once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmbus::ids::ChannelId;
use vmbus::kmcl::{EnabledChannel, IncomingPacket, Level, State};
use vmbus::ring::{Kind, Outgoing, PacketBuffer};
use vmbus_host::bus::Device;
use vmbus_host::machine::Manual;

use crate::support::{INSTANCE, INTERFACE, Journal, Vm, number};

#[derive(Clone, Debug)]
enum Step {
    /// The host sends packets of this many words; every `asks`-th wants an answer.
    HostSend {
        count: u64,
        words: usize,
        asks: u64,
    },
    /// The host reads up to so many packets, and gives their room back.
    HostRead(usize),
    /// The host answers what it has read, newest first, twice if so.
    HostAnswer {
        twice: bool,
    },
    /// The guest sends packets of this many words.
    GuestSend {
        count: u64,
        words: usize,
        transaction: bool,
    },
    /// The guest completes the packet that it has held for so long.
    Complete(usize),
    Interrupt,
    Settle,
    Passive(bool),
    Quota(u32),
    /// The driver closes and opens the channel.
    Reopen,
    /// The host takes the device away and offers it anew.
    Rescind,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u64..6, 1usize..60, 1u64..4)
            .prop_map(|(count, words, asks)| Step::HostSend { count, words, asks }),
        6 => (1usize..8).prop_map(Step::HostRead),
        3 => any::<bool>().prop_map(|twice| Step::HostAnswer { twice }),
        6 => (1u64..6, 1usize..60, any::<bool>())
            .prop_map(|(count, words, transaction)| Step::GuestSend { count, words, transaction }),
        5 => (0usize..8).prop_map(Step::Complete),
        2 => Just(Step::Interrupt),
        4 => Just(Step::Settle),
        1 => any::<bool>().prop_map(Step::Passive),
        1 => (1u32..8).prop_map(Step::Quota),
        1 => Just(Step::Reopen),
        1 => Just(Step::Rescind),
    ]
}

/// What happened to the packets of one opening of the channel.
#[derive(Default)]
struct Tally {
    /// Numbers of the host's packets, as the guest got them.
    delivered: Vec<u64>,
    /// How often each of the guest's packets ended.
    ended: BTreeMap<u64, u32>,
    held: Vec<IncomingPacket>,
    batches: Vec<u32>,
}

struct World {
    vm: Vm,
    id: ChannelId,
    channel: EnabledChannel,
    tally: Arc<Mutex<Tally>>,
    /// Numbers that the host has sent, and that the guest has.
    host_sent: u64,
    guest_sent: u64,
    /// Numbers of the guest's packets, as the host got them.
    host_received: Vec<u64>,
    /// Transactions that the host may answer.
    to_answer: Vec<u64>,
    /// Answers that the host waits for, and how many it got.
    asked: BTreeMap<u64, u32>,
}

impl World {
    fn new() -> Self {
        let (vm, id) = Vm::with_device();
        let tally = Arc::new(Mutex::new(Tally::default()));
        let channel = Self::open(&vm, &tally);
        Self {
            vm,
            id,
            channel,
            tally,
            host_sent: 0,
            guest_sent: 0,
            host_received: Vec::new(),
            to_answer: Vec::new(),
            asked: BTreeMap::new(),
        }
    }

    fn open(vm: &Vm, tally: &Arc<Mutex<Tally>>) -> EnabledChannel {
        let (packets, batches) = (tally.clone(), tally.clone());
        let builder = Journal::default()
            .builder(|_, _| {})
            .ring_pages(1, 1)
            .transaction_quota(8)
            .batch_budget(5)
            .maximum_packet_count(12)
            .process_packet_callbacks(
                move |_, packet| {
                    let n = packet
                        .payload()
                        .first_chunk()
                        .map_or(1, |bytes| u64::from_le_bytes(*bytes));
                    if n % 7 == 3 && packet.level() == Level::Dispatch {
                        return packet.defer_to_passive();
                    }
                    let mut tally = packets.lock().unwrap();
                    tally.delivered.push(n);
                    if n.is_multiple_of(3) {
                        tally.held.push(packet.hold());
                    } else {
                        drop(tally);
                        packet.complete(&n.to_le_bytes());
                    }
                },
                move |_, count| batches.lock().unwrap().batches.push(count),
            );
        vm.enable(&builder)
    }

    fn play(&mut self, step: &Step) {
        match *step {
            Step::HostSend { count, words, asks } => {
                let (first, id) = (self.host_sent, self.id);
                let mut sent = Vec::new();
                self.vm.machine.channel(id, |host| {
                    for n in first..first + count {
                        let mut payload = vec![0; words * 8];
                        payload[..8].copy_from_slice(&n.to_le_bytes());
                        let packet = Outgoing::in_band([&payload, &[]]);
                        let wants = n.is_multiple_of(asks);
                        let packet = if wants {
                            packet.with_completion(n)
                        } else {
                            packet
                        };
                        if host.push(&packet).is_err() {
                            break;
                        }
                        sent.push((n, wants));
                    }
                    host.publish().unwrap();
                });
                self.host_sent += sent.len() as u64;
                let wanted = sent.iter().filter(|(_, wants)| *wants);
                self.asked.extend(wanted.map(|(n, _)| (*n, 0)));
            }
            Step::HostRead(count) => self.host_read(count),
            Step::HostAnswer { twice } => {
                let (to_answer, id) = (&mut self.to_answer, self.id);
                self.vm.machine.channel(id, |host| {
                    while let Some(transaction) = to_answer.pop() {
                        let answer = Outgoing::completion(transaction, b"answered");
                        if host.push(&answer).is_err() {
                            to_answer.push(transaction);
                            break;
                        }
                        if twice {
                            let _ = host.push(&answer);
                        }
                    }
                    host.publish().unwrap();
                });
            }
            Step::GuestSend {
                count,
                words,
                transaction,
            } => {
                for _ in 0..count {
                    let Ok(mut packet) = self.channel.channel().allocate_packet() else {
                        return;
                    };
                    let (n, tally) = (self.guest_sent, self.tally.clone());
                    packet.set_completion_routine(Arc::new(move |_, _| {
                        *tally.lock().unwrap().ended.entry(n).or_default() += 1;
                    }));
                    let mut payload = vec![0; words * 8];
                    payload[..8].copy_from_slice(&n.to_le_bytes());
                    let result = if transaction {
                        packet.send_transaction(&payload)
                    } else {
                        packet.send(&payload)
                    };
                    if result.is_ok() {
                        self.guest_sent += 1;
                    }
                }
            }
            Step::Complete(at) => {
                let mut tally = self.tally.lock().unwrap();
                if at < tally.held.len() {
                    let packet = tally.held.remove(at);
                    drop(tally);
                    let n = number(packet.payload());
                    packet.complete(&n.to_le_bytes());
                }
            }
            Step::Interrupt => self.vm.machine.interrupt(self.id),
            Step::Settle => self.vm.machine.settle(),
            Step::Passive(passive) => {
                let channel = self.channel.channel();
                channel.set_incoming_processing_at_passive(passive);
            }
            Step::Quota(quota) => self.channel.channel().set_transaction_quota(quota),
            Step::Reopen => self.end(false),
            Step::Rescind => self.end(true),
        }
    }

    fn host_read(&mut self, count: usize) {
        let mut packet = PacketBuffer::default();
        let (received, asked, to_answer) = (
            &mut self.host_received,
            &mut self.asked,
            &mut self.to_answer,
        );
        self.vm.machine.channel(self.id, |host| {
            for _ in 0..count {
                if !host.receive(&mut packet).unwrap() {
                    break;
                }
                if packet.kind() == Kind::COMPLETION {
                    let n = packet.transaction_id();
                    assert_eq!(
                        number(packet.payload()),
                        n,
                        "the answer is that packet's own"
                    );
                    *asked.get_mut(&n).expect("an answer that was asked for") += 1;
                } else {
                    received.push(number(packet.payload()));
                    if packet.completion_requested() {
                        to_answer.push(packet.transaction_id());
                    }
                }
            }
            host.release().unwrap();
        });
    }

    /// Everything that can still happen happens, and all is as it must be.
    fn settle_and_check(&mut self) {
        for _ in 0..1000 {
            self.vm.machine.settle();
            let held = std::mem::take(&mut self.tally.lock().unwrap().held);
            let before = (held.len(), self.host_received.len(), self.answers());
            for packet in held {
                let n = number(packet.payload());
                packet.complete(&n.to_le_bytes());
            }
            self.host_read(usize::MAX);
            self.play(&Step::HostAnswer { twice: false });
            self.vm.machine.settle();
            let tally = self.tally.lock().unwrap();
            let after = (tally.held.len(), self.host_received.len(), self.answers());
            if before == after && after.0 == 0 && self.to_answer.is_empty() {
                break;
            }
        }
        let tally = self.tally.lock().unwrap();
        assert_eq!(tally.delivered, (0..self.host_sent).collect::<Vec<_>>());
        assert_eq!(
            self.host_received,
            (0..self.guest_sent).collect::<Vec<_>>(),
            "no packet is lost or overtaken"
        );
        assert!(
            self.asked.values().all(|&count| count == 1),
            "each packet is answered once: {:?}",
            self.asked
        );
        self.check_ends(&tally);
        assert_eq!(
            tally.batches.iter().map(|&n| u64::from(n)).sum::<u64>(),
            self.host_sent,
            "processing-complete tells of every packet"
        );
        assert!(tally.batches.iter().all(|&n| n > 0));
    }

    fn answers(&self) -> u32 {
        self.asked.values().sum()
    }

    fn check_ends(&self, tally: &Tally) {
        for n in 0..self.guest_sent {
            assert_eq!(
                tally.ended.get(&n),
                Some(&1),
                "packet {n} ends exactly once"
            );
        }
    }

    /// The channel ends in the middle of everything, and is opened again.
    fn end(&mut self, rescind: bool) {
        if rescind {
            assert!(self.vm.machine.rescind(self.id));
        } else {
            self.channel.disable();
        }
        self.vm.machine.settle();
        let held = std::mem::take(&mut self.tally.lock().unwrap().held);
        for packet in held {
            packet.complete(b"too late");
        }
        self.vm.machine.settle();
        assert_eq!(self.channel.channel().state(), State::Disabled);
        {
            let tally = self.tally.lock().unwrap();
            self.check_ends(&tally);
            let delivered = tally.delivered.len() as u64;
            assert_eq!(tally.delivered, (0..delivered).collect::<Vec<_>>());
            assert!(self.asked.values().all(|&count| count <= 1));
        }
        assert_eq!(self.vm.machine.shared_runs(), 0);
        if rescind {
            let device = Device::new(INTERFACE, INSTANCE);
            self.id = self.vm.machine.add(device, Manual).unwrap();
            self.vm.machine.settle();
        }
        self.tally = Arc::default();
        self.channel = Self::open(&self.vm, &self.tally);
        assert_eq!(self.channel.channel().state(), State::Active);
        self.host_sent = 0;
        self.guest_sent = 0;
        self.host_received.clear();
        self.to_answer.clear();
        self.asked.clear();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_packet_ends_exactly_once(steps in proptest::collection::vec(step(), 0..150)) {
        let mut world = World::new();
        for step in &steps {
            world.play(step);
        }
        world.settle_and_check();
        world.end(false);
        world.vm.assert_well_behaved();
    }
}

/// What a host can do that keeps to no rule.
#[derive(Clone, Debug)]
enum Attack {
    /// Bytes anywhere in the ring memory.
    Write {
        offset: usize,
        bytes: Vec<u8>,
    },
    /// A number in a field of either control page.
    Control {
        incoming: bool,
        field: usize,
        value: u32,
    },
    /// An honest packet.
    Send(u64),
    /// A completion of whatever id.
    Complete(u64),
    Interrupt,
    GuestSend(bool),
    Settle,
}

fn attack() -> impl Strategy<Value = Attack> {
    let byte = prop_oneof![Just(0u8), 0u8..12, any::<u8>()];
    let value = prop_oneof![
        any::<u32>(),
        (0u32..600).prop_map(|n| n * 8),
        Just(4096),
        Just(u32::MAX)
    ];
    prop_oneof![
        2 => (0usize..4 * 4096 - 64, proptest::collection::vec(byte, 1..64))
            .prop_map(|(offset, bytes)| Attack::Write { offset, bytes }),
        2 => (any::<bool>(), prop_oneof![Just(0usize), Just(4), Just(8), Just(12), Just(64)], value)
            .prop_map(|(incoming, field, value)| Attack::Control { incoming, field, value }),
        3 => any::<u64>().prop_map(Attack::Send),
        1 => prop_oneof![any::<u64>(), (0u64..4, 0u64..16).prop_map(|(g, s)| g << 32 | s)]
            .prop_map(Attack::Complete),
        4 => Just(Attack::Interrupt),
        4 => any::<bool>().prop_map(Attack::GuestSend),
        3 => Just(Attack::Settle),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// A host that writes anything anywhere at any time ends the channel at worst: nothing panics or hangs,
    /// every packet of the guest ends exactly once, and the memory comes back.
    #[test]
    fn a_lawless_host_ends_the_channel_at_worst(
        attacks in proptest::collection::vec(attack(), 0..80),
    ) {
        let mut world = World::new();
        for attack in attacks {
            let id = world.id;
            match attack {
                Attack::Write { offset, bytes } => {
                    world.vm.machine.channel(id, |host| {
                        host.memory().write(offset, &bytes).unwrap();
                    });
                }
                Attack::Control { incoming, field, value } => {
                    let page = if incoming { 2 * 4096 } else { 0 };
                    world.vm.machine.channel(id, |host| {
                        host.memory().write(page + field, &value.to_le_bytes()).unwrap();
                    });
                }
                Attack::Send(n) => {
                    world.vm.machine.channel(id, |host| {
                        let _ = host.send(&Outgoing::in_band([&n.to_le_bytes(), &[]]));
                    });
                }
                Attack::Complete(n) => {
                    world.vm.machine.channel(id, |host| {
                        let _ = host.send(&Outgoing::completion(n, &[]));
                    });
                }
                Attack::Interrupt => world.vm.machine.interrupt(id),
                Attack::GuestSend(transaction) => {
                    world.play(&Step::GuestSend { count: 1, words: 30, transaction });
                }
                Attack::Settle => world.vm.machine.settle(),
            }
        }
        world.vm.machine.settle();
        world.channel.disable();
        world.vm.machine.settle();
        let held = std::mem::take(&mut world.tally.lock().unwrap().held);
        for packet in held {
            packet.complete(&[]);
        }
        world.vm.machine.settle();
        prop_assert_eq!(world.channel.channel().state(), State::Disabled);
        world.check_ends(&world.tally.lock().unwrap());
        prop_assert_eq!(world.vm.machine.shared_runs(), 0);
        world.vm.assert_well_behaved();
    }
}
