//! In steady state packets travel without a single allocation.

#![allow(clippy::unwrap_used)]

use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use vmbus::Vmbus;
use vmbus::bus::Config;
use vmbus::kmcl::{
    ChannelBuilder, ExternalData, Level, OutgoingPacket, PageNumber, SharedPages, Timeout,
};
use vmbus::protocol::Guid;
use vmbus::ring::{Outgoing, PacketBuffer};
use vmbus_host::bus::{Device, Profile};
use vmbus_host::channel::HostChannel;
use vmbus_host::machine::Machine;
use vmbus_host::provider::Manual;

const INTERFACE: Guid = Guid::literal("11111111-2222-3333-4444-555555555555");

/// Reads everything, answers what wants an answer, and sends a packet of its own that wants one.
fn host_turn(host: &mut HostChannel, packet: &mut PacketBuffer) {
    while host.receive(packet).unwrap() {
        if packet.completion_requested() {
            let answer = Outgoing::completion(packet.transaction_id(), &[7; 16]);
            host.push(&answer).unwrap();
        }
    }
    host.release().unwrap();
    for _ in 0..4 {
        let event = Outgoing::in_band([&[1; 100], &[]]);
        host.push(&event.with_completion(9)).unwrap();
    }
    host.publish().unwrap();
}

#[test]
fn packets_both_ways_allocate_nothing_once_they_have_flowed() {
    let machine = Machine::new(Profile::openvmm());
    let vmbus = Vmbus::new(machine.clone(), Config::default());
    machine.attach(vmbus.clone());
    let id = machine
        .add(Device::new(INTERFACE, INTERFACE), Manual)
        .unwrap();
    vmbus.connect();
    machine.settle();

    // Packets that have come back are sent again.
    let idle: Arc<Mutex<Vec<OutgoingPacket>>> = Arc::new(Mutex::new(Vec::with_capacity(16)));
    let channel = ChannelBuilder::new(INTERFACE)
        .ring_pages(1, 1)
        .process_packet_callbacks(|_, packet| packet.complete(&[2; 40]), |_, _| {})
        .enable(vmbus.client())
        .unwrap();
    machine.settle();
    for _ in 0..8 {
        let mut packet = channel.channel().allocate_packet().unwrap();
        let back = idle.clone();
        packet.set_completion_routine(Arc::new(move |packet, _| {
            back.lock().unwrap().push(packet);
        }));
        idle.lock().unwrap().push(packet);
    }

    let mut buffer = PacketBuffer::default();
    let mut round = || {
        // More than fits, so that some wait for room.
        loop {
            let packet = idle.lock().unwrap().pop();
            let Some(packet) = packet else {
                break;
            };
            packet.send_transaction(&[3; 700]).unwrap();
        }
        // The queue is served as from the interrupt.
        machine
            .channel(id, |host| host_turn(host, &mut buffer))
            .unwrap();
        machine
            .channel(id, |host| host_turn(host, &mut buffer))
            .unwrap();
    };
    for _ in 0..10 {
        round();
    }
    let one = allocation_counter::measure(|| drop(std::hint::black_box(Box::new(1))));
    assert_eq!(one.count_total, 1, "the counter counts");
    let info = allocation_counter::measure(|| {
        for _ in 0..1000 {
            round();
        }
    });
    let counters = channel.channel().counters();
    assert!(counters.packets_received > 8000, "{counters:?}");
    assert!(counters.completions_received > 4000, "{counters:?}");
    assert!(counters.ring_full_waits > 500, "{counters:?}");
    assert_eq!(info.count_total, 0, "{counters:?}");
}

#[test]
fn contexts_deferral_and_packets_held_for_long_allocate_nothing_once_they_have_flowed() {
    let machine = Machine::new(Profile::openvmm());
    let vmbus = Vmbus::new(machine.clone(), Config::default());
    machine.attach(vmbus.clone());
    let id = machine
        .add(Device::new(INTERFACE, INTERFACE), Manual)
        .unwrap();
    vmbus.connect();
    machine.settle();

    let shelf = Arc::new(Mutex::new(Vec::with_capacity(16)));
    let held = shelf.clone();
    let channel = ChannelBuilder::new(INTERFACE)
        .client_context_size(100)
        .transaction_quota(8)
        .allowable_dpc_cpu_usage(50)
        .process_packet_callbacks(
            move |_, mut packet| {
                let first = packet.payload().first() == Some(&1);
                if first && packet.level() == Level::Dispatch {
                    packet.client_context().fill(3);
                    packet.defer_to_passive();
                } else {
                    assert_eq!(packet.client_context()[99] == 3, first);
                    held.lock().unwrap().push(packet.hold());
                }
            },
            |_, _| {},
        )
        .enable(vmbus.client())
        .unwrap();
    machine.settle();
    let mut buffer = PacketBuffer::default();
    let mut round = || {
        machine
            .channel(id, |host| {
                for kind in [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0] {
                    let payload = [kind; 200];
                    let packet = Outgoing::in_band([&payload, &[]]);
                    host.push(&packet.with_completion(5)).unwrap();
                }
                host.publish().unwrap();
            })
            .unwrap();
        vmbus.run_work();
        for _ in 0..3 {
            loop {
                let packet = shelf.lock().unwrap().pop();
                let Some(packet) = packet else {
                    break;
                };
                packet.complete(&[1; 300]);
            }
            vmbus.run_work();
            machine
                .channel(id, |host| {
                    while host.receive(&mut buffer).unwrap() {}
                    host.release().unwrap();
                })
                .unwrap();
        }
    };
    for _ in 0..10 {
        round();
    }
    let info = allocation_counter::measure(|| {
        for _ in 0..1000 {
            round();
        }
    });
    let counters = channel.channel().counters();
    assert!(counters.packets_received >= 12_000, "{counters:?}");
    assert!(counters.deferrals >= 1000, "{counters:?}");
    assert!(counters.quota_stops >= 1000, "{counters:?}");
    assert_eq!(info.count_total, 0, "{counters:?}");
}

#[test]
fn requests_allocate_nothing_once_they_have_flowed() {
    let machine = Machine::new(Profile::openvmm());
    let vmbus = Vmbus::new(machine.clone(), Config::default());
    machine.attach(vmbus.clone());
    let id = machine
        .add(Device::new(INTERFACE, INTERFACE), Manual)
        .unwrap();
    vmbus.connect();
    machine.settle();
    let channel = ChannelBuilder::new(INTERFACE)
        .ring_pages(1, 1)
        .maximum_packet_count(4)
        .maximum_external_data(4096, 1)
        .enable(vmbus.client())
        .unwrap();
    machine.settle();

    let page = SharedPages::from_heap(PageNumber(7), 1).unwrap();
    let mut lent = ExternalData::new();
    lent.push(page, 0..4096).unwrap();
    let mut buffer = PacketBuffer::default();
    let mut context = Context::from_waker(Waker::noop());
    let mut ids = Vec::with_capacity(4);
    let mut round = || {
        let external = mem::take(&mut lent);
        let timeout = Timeout::After(1000);
        let mut answered = channel.channel().request(&[1; 600], external, timeout);
        // One that nobody waits for in the end, and one that goes at once.
        let late = channel
            .channel()
            .request(&[2; 8], ExternalData::new(), timeout);
        channel.channel().try_send(&[3; 8]).unwrap();
        assert!(Pin::new(&mut answered).poll(&mut context).is_pending());
        drop(late);
        machine
            .channel(id, |host| {
                while host.receive(&mut buffer).unwrap() {
                    if buffer.completion_requested() {
                        ids.push(buffer.transaction_id());
                    }
                }
                host.release().unwrap();
                for id in ids.drain(..) {
                    host.push(&Outgoing::completion(id, &[4; 100])).unwrap();
                }
                host.publish().unwrap();
            })
            .unwrap();
        let Poll::Ready(Ok(mut answer)) = Pin::new(&mut answered).poll(&mut context) else {
            panic!("there is an answer");
        };
        assert_eq!(answer[..100], [4; 100]);
        lent = answer.take_external_data();
    };
    for _ in 0..10 {
        round();
    }
    let info = allocation_counter::measure(|| {
        for _ in 0..1000 {
            round();
        }
    });
    let counters = channel.channel().counters();
    assert_eq!(counters.late_completions, 1010, "{counters:?}");
    assert_eq!(info.count_total, 0, "{counters:?}");
}
