//! Several requests and several channels at once: sub-channels, full rings, limits, closing with work under way.

use std::sync::Arc;

use vmbus_host::disk::Disk;
use vmbus_host::faults::{ChannelFault, ChannelRule, Direction};
use vmbus_host::storage::{Controller, Limits, Lun};
use vmbus_host::work::{Inline, Threads};

use crate::disk::{Held, TestDisk};
use crate::guest::*;
use crate::support::{SECOND, is_active};

fn limits(sub_channels: u16) -> Limits {
    Limits {
        sub_channels,
        ..Limits::default()
    }
}

fn with_disk(guest: Guest) -> (Guest, Arc<TestDisk>) {
    let disk = TestDisk::small();
    let lun = Lun::Disk(disk.clone());
    guest.controller.add_lun(0, lun).unwrap();
    (guest, disk)
}

#[test]
fn io_goes_over_every_sub_channel_and_each_answers_on_its_own() {
    for version in [0x0501, 0x0600, 0x0602] {
        let executor = Arc::new(Threads::new("disk", 3).unwrap());
        let (guest, disk) = with_disk(Guest::silent(limits(4), executor));
        let mut guest = guest.ready(version);
        guest.add_sub_channels(4);
        let chunks: Vec<_> = (0..40).map(|seed| pattern(16384, seed)).collect();
        let begin = |code, data: fn(&Vec<u8>) -> Data<'_>| -> Vec<_> {
            let begin = |(index, chunk): (usize, &Vec<u8>)| {
                let cdb = ten(code, index as u32 * 32, 32);
                (chunk.clone(), guest.start(index % 5, 0, &cdb, data(chunk)))
            };
            (0..).zip(&chunks).map(begin).collect()
        };
        for (_, pending) in begin(0x2A, |chunk| Data::Out(chunk)) {
            guest.finish(pending).good();
        }
        for (chunk, pending) in begin(0x28, |chunk| Data::In(chunk.len())) {
            assert_eq!(guest.finish(pending).good(), chunk);
        }
        let mut content = vec![0; 40 * 16384];
        disk.inner.read(0, &mut content).unwrap();
        assert_eq!(content, chunks.concat());
        let counts = guest.controller.counts();
        assert_eq!((counts.packets.commands, counts.in_flight), (80, 0));
        guest.vm.assert_well_behaved();
    }
}

#[test]
fn sub_channels_can_be_had_once_and_no_more_than_there_are() {
    let mut guest = Guest::silent(limits(2), Arc::new(Inline)).ready(0x0600);
    let ask = |count: u16| packet(64, CREATE_SUB_CHANNELS, &count.to_le_bytes());
    assert_eq!(guest.say(&ask(3)).0, INVALID_PARAMETER);
    assert_eq!(guest.say(&ask(0)).0, SUCCESS);
    guest.add_sub_channels(2);
    assert_eq!(guest.say(&ask(1)).0, INVALID_DEVICE_STATE);
    assert_eq!(guest.vm.vmbus.snapshot().offers.len(), 3);
    let (guest, _) = with_disk(guest);
    guest.controller.counts();
    // Only commands and resets on them.
    for operation in [
        BEGIN,
        END,
        QUERY_VERSION,
        QUERY_PROPERTIES,
        CREATE_SUB_CHANNELS,
    ] {
        let answer = guest.wait(guest.begin(1, &packet(64, operation, &[1, 0])));
        assert_eq!(answer[8..12], INVALID_DEVICE_STATE.to_le_bytes());
    }
    let answer = guest.wait(guest.begin(1, &packet(64, RESET_BUS, &[])));
    assert_eq!(answer[8..12], [0; 4]);
}

#[test]
fn versions_without_sub_channels_have_none() {
    for version in [0x0200, 0x0402] {
        let guest = Guest::silent(limits(2), Arc::new(Inline)).ready(version);
        let ask = packet(48, CREATE_SUB_CHANNELS, &1u16.to_le_bytes());
        assert_eq!(guest.say(&ask).0, INVALID_DEVICE_REQUEST);
    }
}

#[test]
fn answers_that_find_no_room_are_kept_and_sent_later() {
    let controller = Controller::new(Limits {
        depth: 500,
        ..Limits::default()
    });
    let guest = Guest::on(controller, Arc::new(Inline), 3);
    let (guest, _) = with_disk(guest);
    let guest = guest.ready(0x0602);
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    // At DISPATCH no interrupt comes, and the guest's ring fills.
    let pending: Vec<_> = guest.vm.machine.at_dispatch(|| {
        let begin = |_| {
            let pending = guest.start(0, 0, &inquiry, Data::In(36));
            guest.vm.machine.step_host();
            pending
        };
        (0..400).map(begin).collect()
    });
    let full = guest.controller.counts().packets.ring_full;
    assert_ne!(full, 0, "the ring was never full");
    for pending in pending {
        assert_eq!(guest.finish(pending).good().len(), 36);
    }
    let counts = guest.controller.counts().packets;
    assert_eq!(counts.answers, counts.packets);
    guest.vm.assert_well_behaved();
}

#[test]
fn no_more_commands_are_under_way_than_the_limit_says() {
    let held = Held::default();
    let limits = Limits {
        depth: 4,
        ..Limits::default()
    };
    let (guest, _) = with_disk(Guest::silent(limits, Arc::new(held.clone())));
    let guest = guest.ready(0x0602);
    let read = ten(0x28, 0, 1);
    let mut pending: Vec<_> = (0..20)
        .map(|_| guest.start(0, 0, &read, Data::In(512)))
        .collect();
    guest.vm.machine.settle();
    let mut done = 0;
    while done < 20 {
        let waiting = held.len();
        assert_eq!(waiting, (20 - done).min(4));
        assert_eq!(guest.controller.counts().in_flight, waiting as u64);
        held.run_one(waiting - 1);
        guest.vm.machine.settle();
        done += 1;
    }
    for pending in &mut pending {
        guest.poll(pending).unwrap().good();
    }
    assert_ne!(guest.controller.counts().packets.held_back, 0);
}

#[test]
fn work_under_way_touches_no_memory_of_a_closed_channel_and_holds_back_the_next_guest() {
    use vmbus::hypervisor::Hypervisor;
    let held = Held::default();
    let (guest, disk) = with_disk(Guest::silent(limits(0), Arc::new(held.clone())));
    let mut guest = guest.ready(0x0602);
    disk.inner.write(0, &pattern(4096, 1)).unwrap();
    let memory = guest.vm.machine.share_pages(1).unwrap();
    let packet = srb(0x0602, 0, &ten(0x28, 0, 8), Data::In(4096));
    let read = guest.lend_pages(&packet, memory.pages().collect(), 4096);
    guest.vm.machine.settle();
    assert_eq!(held.len(), 1);
    drop(read);
    let channel = guest.channels.remove(0);
    channel.disable();
    guest.vm.machine.settle();
    let disabled = channel.into_disabled();
    let disabled = guest.vm.vmbus.client().block_on(disabled).unwrap().unwrap();
    let channel = disabled.enable().unwrap();
    guest.vm.machine.settle();
    assert!(is_active(&channel));
    guest.channels.push(channel);
    // The next guest waits until the last one's work has ended.
    let mut begin = guest.begin(0, &self::packet(64, BEGIN, &[]));
    guest.vm.machine.advance(SECOND);
    assert!(guest.poll(&mut begin).is_none());
    held.run_one(0);
    assert_eq!(guest.poll(&mut begin).unwrap().status, SUCCESS);
    let mut content = [1; 4096];
    memory.read(0, &mut content).unwrap();
    assert_eq!(
        content, [0; 4096],
        "the host wrote after the channel was closed"
    );
    guest.vm.assert_well_behaved();
}

#[test]
fn a_channel_that_is_opened_again_begins_anew_without_its_sub_channels() {
    let (guest, disk) = with_disk(Guest::silent(limits(2), Arc::new(Inline)));
    let mut guest = guest.ready(0x0602);
    guest.add_sub_channels(2);
    for _ in 0..3 {
        while guest.channels.len() > 1 {
            guest.channels.pop().unwrap().disable();
        }
        let channel = guest.channels.pop().unwrap();
        channel.disable();
        guest.vm.machine.settle();
        assert_eq!(guest.vm.vmbus.snapshot().offers.len(), 1);
        let disabled = channel.into_disabled();
        let disabled = guest.vm.vmbus.client().block_on(disabled).unwrap().unwrap();
        let channel = disabled.enable().unwrap();
        guest.vm.machine.settle();
        guest.channels.push(channel);
        let early = guest.say(&srb(0x0602, 0, &[0; 6], Data::None));
        assert_eq!(early.0, INVALID_DEVICE_STATE);
        guest.initialise(0x0501);
        guest.add_sub_channels(2);
        let data = pattern(512, 7);
        let write = guest.start(2, 0, &ten(0x2A, 0, 1), Data::Out(&data));
        guest.finish(write).good();
        let mut content = [0; 512];
        disk.inner.read(0, &mut content).unwrap();
        assert_eq!(content, *data);
    }
    guest.vm.assert_well_behaved();
}

#[test]
fn a_controller_that_is_taken_away_and_offered_again_serves_the_same_units() {
    use vmbus_host::storage::Storvsp;
    let held = Held::default();
    let executor = Arc::new(held.clone());
    let (guest, _) = with_disk(Guest::silent(limits(1), executor.clone()));
    let mut guest = guest.ready(0x0602);
    guest.add_sub_channels(1);
    let data = pattern(4096, 1);
    for channel in [0, 1] {
        drop(guest.start(channel, 0, &ten(0x2A, 0, 8), Data::Out(&data)));
    }
    guest.vm.machine.settle();
    assert_eq!(held.len(), 2);
    guest.vm.machine.rescind(guest.id);
    held.run_all();
    guest.vm.machine.advance(40 * SECOND);
    let provider = Storvsp::new(guest.controller.clone(), executor);
    let device = Storvsp::device(INSTANCE);
    let id = guest.vm.machine.add(device, provider).unwrap();
    guest.vm.machine.settle();
    let mut channels = guest.channels.drain(..);
    let channel = channels.next().unwrap().into_disabled();
    drop(channels);
    let disabled = guest.vm.vmbus.client().block_on(channel).unwrap().unwrap();
    let channel = disabled.enable().unwrap();
    guest.vm.machine.settle();
    assert!(is_active(&channel));
    guest.channels.push(channel);
    guest.id = id;
    let guest = guest.ready(0x0600);
    guest.command(&[0; 6], Data::None).good();
    assert_eq!(guest.controller.counts().units[0].1.written_bytes, 0);
    guest.vm.assert_well_behaved();
}

#[test]
fn a_broken_ring_ends_the_service_of_its_channel_only() {
    use std::sync::atomic::Ordering;
    let (guest, _) = with_disk(Guest::silent(limits(1), Arc::new(Inline)));
    let mut guest = guest.ready(0x0602);
    guest.add_sub_channels(1);
    guest.vm.host(guest.id, |channel| {
        // The guest's producer offset.
        let offset = channel.memory().atomic_u32(0).unwrap();
        offset.store(3, Ordering::SeqCst);
    });
    guest.vm.machine.wake_provider(guest.id);
    guest.vm.machine.settle();
    assert_eq!(guest.controller.counts().packets.broken_rings, 1);
    let ready = guest.start(1, 0, &[0; 6], Data::None);
    guest.finish(ready).good();
}

#[test]
fn a_ring_that_stands_still_holds_nobody_up_and_goes_on_when_the_faults_are_cleared() {
    let guest = Guest::with_disk(TestDisk::small());
    let faults = guest.vm.machine.host(|host| host.faults(guest.id)).unwrap();
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        let rule = ChannelRule::always(direction, ChannelFault::Stall);
        faults.inject(rule).unwrap();
        let mut pending = guest.start(0, 0, &ten(0x28, 0, 1), Data::In(512));
        guest.vm.machine.advance(SECOND);
        assert_eq!(guest.poll(&mut pending), None);
        faults.clear();
        guest.finish(pending).good();
    }
    guest.vm.assert_well_behaved();
}
