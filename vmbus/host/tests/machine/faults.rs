//! Faults on request: each reaches the guest as what it is, and the channel works again when they are cleared.

use std::sync::{Arc, Mutex};

use vmbus::ids::ChannelId;
use vmbus::kmcl::{ChannelError, EnabledChannel, OutgoingPacket, PacketError, State};
use vmbus::ring::{Outgoing, PacketBuffer};
use vmbus_host::bus::{Device, Profile};
use vmbus_host::channel::HostChannel;
use vmbus_host::faults::{ChannelFault, ChannelFaults, ChannelRule, Direction, WrongDirection};
use vmbus_host::provider::Provider;

use crate::support::{INSTANCE, INTERFACE, Journal, SECOND, Seen, Vm, is_active};

/// Completes each packet with its own data, and sends that data back in a packet, too.
struct Echo;

impl Provider for Echo {
    fn serve(&mut self, _now: u64, channel: &mut HostChannel) {
        let mut packet = PacketBuffer::default();
        while let Ok(true) = channel.receive(&mut packet) {
            let data = packet.payload().to_vec();
            let _ = channel.complete(packet.transaction_id(), &data);
            let _ = channel.send(&Outgoing::in_band([&data, &[]]));
        }
        let _ = channel.release();
    }
}

type Results = Arc<Mutex<Vec<Result<Vec<u8>, PacketError>>>>;

struct World {
    vm: Vm,
    id: ChannelId,
    faults: ChannelFaults,
    channel: EnabledChannel,
    journal: Journal,
    results: Results,
}

impl World {
    fn new() -> Self {
        let vm = Vm::new(Profile::openvmm());
        let device = Device::new(INTERFACE, INSTANCE);
        let id = vm.machine.add(device, Echo).unwrap();
        vm.connect();
        let journal = Journal::default();
        let channel = vm.enable(&journal.builder(|_, _| ()));
        let faults = vm.machine.host(|host| host.faults(id)).unwrap();
        journal.take();
        Self {
            vm,
            id,
            faults,
            channel,
            journal,
            results: Results::default(),
        }
    }

    fn inject(&self, direction: Direction, fault: ChannelFault) {
        let rule = ChannelRule::once(direction, fault);
        self.faults.inject(rule).unwrap();
    }

    fn ask(&self, data: &[u8]) {
        let mut packet = self.channel.channel().allocate_packet().unwrap();
        let results = self.results.clone();
        let note = move |_: OutgoingPacket, result: Result<&[u8], _>| {
            results.lock().unwrap().push(result.map(<[u8]>::to_vec));
        };
        packet.set_completion_routine(Arc::new(note));
        packet.send_transaction(data).unwrap();
        self.vm.machine.settle();
    }

    fn results(&self) -> Vec<Result<Vec<u8>, PacketError>> {
        std::mem::take(&mut self.results.lock().unwrap())
    }

    fn packets(&self) -> Vec<Vec<u8>> {
        let seen = self.journal.take().into_iter();
        seen.filter_map(|seen| match seen {
            Seen::Packet(data, _) => Some(data),
            _ => None,
        })
        .collect()
    }

    /// Everything goes well.
    fn assert_whole(&self) {
        self.ask(b"all well");
        assert_eq!(self.results(), [Ok(b"all well".to_vec())]);
        assert_eq!(self.packets(), [b"all well"]);
        self.vm.assert_well_behaved();
    }
}

#[test]
fn a_lost_packet_of_the_guest_gets_no_completion_and_gives_its_room_back() {
    let world = World::new();
    world.inject(Direction::FromGuest, ChannelFault::Drop);
    world.ask(b"lost    ");
    assert_eq!(world.results(), []);
    assert_eq!(world.faults.hits(), 1);
    world.assert_whole();
}

#[test]
fn a_lost_packet_of_the_host_is_not_seen() {
    let world = World::new();
    world.inject(Direction::ToGuest, ChannelFault::Drop);
    world.ask(b"no reply");
    assert_eq!(world.results(), []);
    assert_eq!(world.packets(), [b"no reply"]);
    world.assert_whole();
}

#[test]
fn a_delayed_packet_comes_later_and_others_overtake_it() {
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        let world = World::new();
        world.inject(direction, ChannelFault::Delay(SECOND));
        world.ask(b"slow one");
        assert_eq!(world.results(), []);
        world.ask(b"fast one");
        assert_eq!(world.results(), [Ok(b"fast one".to_vec())]);
        world.vm.machine.advance(SECOND + 1);
        assert_eq!(world.results(), [Ok(b"slow one".to_vec())]);
        world.packets();
        world.assert_whole();
    }
}

#[test]
fn packets_come_short_or_long_or_spoilt() {
    let world = World::new();
    world.inject(Direction::ToGuest, ChannelFault::Truncate(0));
    world.ask(b"whole...");
    assert_eq!(world.results(), [Ok(vec![])]);
    world.inject(Direction::ToGuest, ChannelFault::Extend(8));
    world.ask(b"whole...");
    assert_eq!(
        world.results(),
        [Ok(b"whole...\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF".to_vec())]
    );
    let spoil = ChannelFault::Spoil { at: 1, bits: 0x20 };
    world.inject(Direction::ToGuest, spoil);
    world.ask(b"whole...");
    assert_eq!(world.results(), [Ok(b"wHole...".to_vec())]);
    world.packets();
    world.assert_whole();
}

#[test]
fn a_completion_with_a_wrong_id_completes_nothing() {
    let world = World::new();
    world.inject(Direction::ToGuest, ChannelFault::TransactionId(1 << 63));
    world.ask(b"whose? ?");
    assert!(world.results().iter().all(Result::is_err));
}

#[test]
fn a_ring_with_nonsense_in_it_ends_the_guest_s_channel_and_leaves_the_host_up() {
    let world = World::new();
    world.inject(Direction::ToGuest, ChannelFault::CorruptRing);
    world.ask(b"trouble.");
    assert!(!is_active(&world.channel));
    let seen = world.journal.take();
    let failed = |seen: &Seen| matches!(seen, Seen::Failure(_));
    assert!(seen.iter().any(failed), "{seen:?}");
    world.vm.assert_well_behaved();
}

#[test]
fn a_ring_that_stands_still_goes_on_when_the_faults_are_cleared() {
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        let world = World::new();
        let rule = ChannelRule::always(direction, ChannelFault::Stall);
        world.faults.inject(rule).unwrap();
        world.ask(b"patience");
        world.vm.machine.advance(SECOND);
        assert_eq!(world.results(), []);
        world.faults.clear();
        world.vm.machine.settle();
        assert_eq!(world.results(), [Ok(b"patience".to_vec())]);
        world.packets();
        world.assert_whole();
    }
}

#[test]
fn a_channel_can_be_taken_away_in_the_middle_of_a_transfer() {
    let world = World::new();
    world.inject(Direction::FromGuest, ChannelFault::Rescind);
    world.ask(b"too late");
    assert_eq!(
        world.results(),
        [Err(PacketError::Removed(ChannelError::Rescinded))]
    );
    assert_eq!(world.channel.channel().state(), State::Disabled);
    assert!(!world.vm.machine.is_open(world.id));
    world.vm.assert_well_behaved();
}

#[test]
fn rules_count_packets() {
    let world = World::new();
    let rule = ChannelRule {
        direction: Direction::FromGuest,
        skip: 1,
        count: Some(2),
        fault: ChannelFault::Drop,
    };
    world.faults.inject(rule).unwrap();
    for data in [b"1       ", b"2       ", b"3       ", b"4       "] {
        world.ask(data);
    }
    let expected = [b"1       ", b"4       "].map(|data| Ok(data.to_vec()));
    assert_eq!(world.results(), expected);
    assert_eq!(world.faults.clear(), 2);
}

#[test]
fn a_fault_that_cannot_happen_that_way_is_refused() {
    let faults = ChannelFaults::default();
    let fault = ChannelFault::Truncate(4);
    let rule = ChannelRule::once(Direction::FromGuest, fault);
    assert_eq!(faults.inject(rule), Err(WrongDirection(fault)));
}
