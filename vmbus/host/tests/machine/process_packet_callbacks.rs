//! `VmbChannelInitSetProcessPacketCallbacks`, clause by clause, as [`ChannelBuilder::process_packet_callbacks`] has it.
//!
//! The same clauses through the C table are in `tests/abi/seed.rs`, with the statuses that only C has.

use std::sync::{Arc, Mutex};

use vmbus::kmcl::{Channel, ChannelBuilder, ChannelDriver, ConfigError, ReceivedPacket, State};
use vmbus::ring::Outgoing;

use crate::support::{INTERFACE, Journal, Seen, Shelf, Vm, is_active, number};

/// What ran: a packet, or the end of a batch with its count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Ran {
    Packet(u64),
    Complete(u32),
}

type Order = Arc<Mutex<Vec<Ran>>>;

/// A builder with both callbacks, which note what they see, and complete at once.
fn noting(order: &Order) -> ChannelBuilder {
    let (packets, completes) = (order.clone(), order.clone());
    ChannelBuilder::new(INTERFACE).process_packet_callbacks(
        move |_, packet| {
            let n = number(packet.payload());
            packets.lock().unwrap().push(Ran::Packet(n));
            packet.complete(&[]);
        },
        move |_, count| completes.lock().unwrap().push(Ran::Complete(count)),
    )
}

fn take(order: &Order) -> Vec<Ran> {
    std::mem::take(&mut *order.lock().unwrap())
}

#[test]
fn it_sets_a_process_packet_and_a_processing_complete_callback() {
    let (vm, id) = Vm::with_device();
    let order = Order::default();
    let channel = vm.enable(&noting(&order));
    assert!(is_active(&channel));
    vm.send_all(id, [7]);
    assert_eq!(take(&order), [Ran::Packet(7), Ran::Complete(1)]);
}

#[test]
fn the_processing_complete_callback_is_optional() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let seen = journal.clone();
    let builder = ChannelBuilder::new(INTERFACE).process_packet(move |_, packet| {
        seen.packet(&packet);
        packet.complete(&[]);
    });
    let channel = vm.enable(&builder);
    vm.send_all(id, 0..3);
    assert_eq!(journal.take_numbers(), [0, 1, 2]);
    assert_eq!(channel.channel().counters().batches, 1);
}

#[test]
fn it_succeeds_on_a_disabled_channel_that_was_made_before() {
    let (vm, id) = Vm::with_device();
    let order = Order::default();
    let disabled = ChannelBuilder::new(INTERFACE)
        .build(vm.vmbus.client())
        .unwrap();
    assert_eq!(disabled.channel().state(), State::Disabled);
    let (packets, completes) = (order.clone(), order.clone());
    let builder = disabled.into_builder().process_packet_callbacks(
        move |_, packet| {
            let n = number(packet.payload());
            packets.lock().unwrap().push(Ran::Packet(n));
            packet.complete(&[]);
        },
        move |_, count| completes.lock().unwrap().push(Ran::Complete(count)),
    );
    let _channel = vm.enable(&builder);
    vm.send_all(id, [1]);
    assert_eq!(take(&order), [Ran::Packet(1), Ran::Complete(1)]);
}

/// The Rust form of "in a state in which it cannot be configured": an enabled channel has no setter, and gives its
/// builder back only when it has ended. A builder that is changed meanwhile changes nothing of it.
#[test]
fn what_is_set_after_enabling_does_not_reach_the_channel() {
    let (vm, id) = Vm::with_device();
    let (first, second) = (Order::default(), Order::default());
    let builder = noting(&first);
    let channel = vm.enable(&builder);
    let other = second.clone();
    let changed = builder.process_packet(move |_, packet| {
        other
            .lock()
            .unwrap()
            .push(Ran::Packet(number(packet.payload())));
        packet.complete(&[]);
    });
    vm.send_all(id, [1]);
    assert_eq!(take(&first), [Ran::Packet(1), Ran::Complete(1)]);
    let client = vm.vmbus.client();
    client
        .block_on(channel.into_disabled())
        .unwrap()
        .expect("called from no callback");
    let _channel = vm.enable(&changed);
    vm.send_all(id, [2]);
    assert_eq!(take(&first), []);
    assert_eq!(take(&second), [Ran::Packet(2)]);
}

#[test]
fn it_is_meaningful_only_while_queue_management_is_not_suppressed() {
    let (vm, _) = Vm::with_device();
    let suppressed = noting(&Order::default()).queue_management_suppressed(|_| {});
    let refused = suppressed.build(vm.vmbus.client()).map(drop);
    assert_eq!(refused, Err(ConfigError::Raw));
}

#[test]
fn with_queue_management_suppressed_no_packet_is_processed() {
    let (vm, id) = Vm::with_device();
    let signals = Arc::new(Mutex::new(0));
    let counter = signals.clone();
    let builder = ChannelBuilder::new(INTERFACE).queue_management_suppressed(move |_| {
        *counter.lock().unwrap() += 1;
    });
    let channel = vm.enable(&builder);
    let before = *signals.lock().unwrap();
    vm.send_all(id, 0..3);
    assert_eq!(*signals.lock().unwrap(), before + 1);
    assert_eq!(channel.channel().counters().packets_received, 0);
}

#[test]
fn process_packet_runs_once_for_every_packet_received_and_in_order() {
    let (vm, id) = Vm::with_device();
    let order = Order::default();
    let _channel = vm.enable(&noting(&order));
    // More than the ring holds at one time, in batches of every length up to 20.
    let mut sent = 0;
    for length in (0..200).map(|round| round % 20 + 1) {
        vm.send_all(id, sent..sent + length);
        sent += length;
    }
    vm.machine.settle();
    let packets: Vec<_> = take(&order)
        .into_iter()
        .filter(|ran| matches!(ran, Ran::Packet(_)))
        .collect();
    assert_eq!(packets, (0..sent).map(Ran::Packet).collect::<Vec<_>>());
}

#[test]
fn processing_complete_runs_every_time_the_ring_goes_from_non_empty_to_empty() {
    let (vm, id) = Vm::with_device();
    let order = Order::default();
    let _channel = vm.enable(&noting(&order));
    for n in 0..10 {
        vm.send_all(id, [n]);
        assert_eq!(take(&order), [Ran::Packet(n), Ran::Complete(1)]);
    }
}

#[test]
fn processing_complete_does_not_run_while_the_ring_stays_empty() {
    let (vm, id) = Vm::with_device();
    let order = Order::default();
    let _channel = vm.enable(&noting(&order));
    for _ in 0..5 {
        vm.machine.interrupt(id);
        vm.machine.settle();
    }
    assert_eq!(take(&order), []);
}

#[test]
fn processing_complete_runs_after_the_last_process_packet_call_of_the_batch() {
    let (vm, id) = Vm::with_device();
    let order = Order::default();
    let _channel = vm.enable(&noting(&order));
    vm.send_all(id, 0..3);
    assert_eq!(
        take(&order),
        [
            Ran::Packet(0),
            Ran::Packet(1),
            Ran::Packet(2),
            Ran::Complete(3)
        ]
    );
}

#[test]
fn packets_that_come_while_a_batch_runs_belong_to_it() {
    let (vm, id) = Vm::with_device();
    let vm = Arc::new(vm);
    let order = Order::default();
    let (packets, completes, host) = (order.clone(), order.clone(), Arc::downgrade(&vm));
    let builder = ChannelBuilder::new(INTERFACE).process_packet_callbacks(
        move |_, packet| {
            let n = number(packet.payload());
            packets.lock().unwrap().push(Ran::Packet(n));
            packet.complete(&[]);
            if n < 3 {
                // The ring is empty only when the host has nothing more to say.
                let vm = host.upgrade().unwrap();
                vm.host(id, |host| {
                    let next = (n + 1).to_le_bytes();
                    host.send(&Outgoing::in_band([&next, &[]])).unwrap();
                });
            }
        },
        move |_, count| completes.lock().unwrap().push(Ran::Complete(count)),
    );
    let _channel = vm.enable(&builder);
    vm.send_all(id, [0]);
    assert_eq!(
        take(&order),
        [
            Ran::Packet(0),
            Ran::Packet(1),
            Ran::Packet(2),
            Ran::Packet(3),
            Ran::Complete(4)
        ]
    );
}

#[test]
fn packets_that_the_driver_keeps_count_in_their_batch() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let _channel =
        vm.enable(&journal.builder(move |_, packet| holder.lock().unwrap().push(packet.hold())));
    vm.send_all(id, 0..3);
    assert_eq!(journal.take_completes(), [3]);
    for packet in shelf.lock().unwrap().drain(..) {
        packet.complete(&[]);
    }
    vm.machine.settle();
    assert_eq!(journal.take(), [], "completing is no processing");
}

#[test]
fn the_last_registration_wins() {
    let (vm, id) = Vm::with_device();
    let (first, second) = (Order::default(), Order::default());
    let other = second.clone();
    let builder = noting(&first).process_packet(move |_, packet| {
        other
            .lock()
            .unwrap()
            .push(Ran::Packet(number(packet.payload())));
        packet.complete(&[]);
    });
    let _channel = vm.enable(&builder);
    vm.send_all(id, [1]);
    assert_eq!(take(&first), [], "the pair is replaced as a pair");
    assert_eq!(take(&second), [Ran::Packet(1)]);
}

/// A driver that is the context of its callbacks, as with the Ex form.
#[derive(Default)]
struct Device {
    order: Order,
}

impl ChannelDriver for Device {
    fn process_packet(&self, _: &Channel, packet: ReceivedPacket<'_>) {
        let n = number(packet.payload());
        self.order.lock().unwrap().push(Ran::Packet(n));
        packet.complete(&[]);
    }

    fn processing_complete(&self, _: &Channel, packets: u32) {
        self.order.lock().unwrap().push(Ran::Complete(packets));
    }
}

#[test]
fn the_context_of_the_ex_form_comes_with_every_call() {
    let (vm, id) = Vm::with_device();
    let device = Arc::new(Device::default());
    let _channel = vm.enable(&ChannelBuilder::new(INTERFACE).driver(device.clone()));
    vm.send_all(id, 0..2);
    assert_eq!(
        take(&device.order),
        [Ran::Packet(0), Ran::Packet(1), Ran::Complete(2)]
    );
}

#[test]
fn without_callbacks_packets_are_completed_unseen() {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(&ChannelBuilder::new(INTERFACE));
    vm.host(id, |host| {
        host.request(b"question").unwrap();
    });
    assert_eq!(vm.host(id, |host| host.receive_all().unwrap().len()), 1);
    assert_eq!(channel.channel().outstanding_packets(), 0);
    assert_eq!(channel.channel().counters().uncompleted_drops, 0);
}

#[test]
fn the_first_packet_may_come_before_post_started_but_never_before_started_has_ended() {
    let (vm, id) = Vm::with_device();
    let vm = Arc::new(vm);
    let journal = Journal::default();
    let host = Arc::downgrade(&vm);
    let started = journal.clone();
    let builder = journal
        .builder(|_, packet| packet.complete(&[]))
        .started(move |_| {
            host.upgrade().unwrap().send_all(id, [1]);
            started.note(Seen::Started);
        });
    let _channel = vm.enable(&builder);
    let seen: Vec<_> = journal
        .take()
        .into_iter()
        .map(|seen| match seen {
            Seen::Packet(..) => "packet",
            Seen::Started => "started",
            Seen::PostStarted => "post-started",
            Seen::Opened => "opened",
            _ => "complete",
        })
        .collect();
    assert_eq!(
        seen,
        ["opened", "started", "packet", "complete", "post-started"]
    );
}
