//! Pause and start: what waits meanwhile, and in which order it goes on. What each call says in each state is in the
//! state table.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use vmbus::kmcl::{Level, State};

use crate::support::{Journal, Seen, Shelf, Vm, is_active, number, received};

#[test]
fn packets_that_come_during_a_pause_wait_in_the_ring_for_the_start() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    let client = vm.vmbus.client();
    client.block_on(channel.channel().pause().unwrap()).unwrap();
    journal.take();
    vm.send_all(id, 0..3);
    vm.machine.interrupt(id);
    vm.machine.settle();
    assert_eq!(journal.take(), []);
    assert_eq!(channel.channel().state(), State::Paused);
    channel.channel().start().unwrap();
    vm.machine.settle();
    let packet = |n: u64| Seen::Packet(n.to_le_bytes().to_vec(), Level::Passive);
    assert_eq!(
        journal.take(),
        [
            Seen::Started,
            packet(0),
            packet(1),
            packet(2),
            Seen::Complete(3),
            Seen::PostStarted
        ]
    );
    vm.send_all(id, [3]);
    assert_eq!(journal.take_numbers(), [3], "interrupts come as before");
    vm.assert_well_behaved();
}

#[test]
fn packets_sent_during_a_pause_go_in_their_order_at_the_start() {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
    let client = vm.vmbus.client();
    client.block_on(channel.channel().pause().unwrap()).unwrap();
    for n in 0..5u64 {
        channel.channel().send_message(&n.to_le_bytes()).unwrap();
    }
    vm.machine.settle();
    assert_eq!(vm.host(id, received), []);
    channel.channel().start().unwrap();
    vm.machine.settle();
    let sent = vm.host(id, received);
    let numbers: Vec<_> = sent.iter().map(|(_, payload)| number(payload)).collect();
    assert_eq!(numbers, [0, 1, 2, 3, 4]);
}

#[test]
fn a_pause_is_over_when_the_driver_holds_nothing_and_the_suspend_callback_has_run() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let channel =
        vm.enable(&journal.builder(move |_, packet| holder.lock().unwrap().push(packet.hold())));
    vm.send_all(id, 0..2);
    journal.take();
    let mut context = Context::from_waker(Waker::noop());
    let mut paused = pin!(channel.channel().pause().unwrap());
    vm.machine.settle();
    assert_eq!(journal.take(), [Seen::Suspend]);
    for packet in std::mem::take(&mut *shelf.lock().unwrap()) {
        assert_eq!(paused.as_mut().poll(&mut context), Poll::Pending);
        assert_eq!(channel.channel().state(), State::Suspending);
        packet.complete(&[]);
        vm.machine.settle();
    }
    assert_eq!(paused.as_mut().poll(&mut context), Poll::Ready(()));
    assert_eq!(channel.channel().state(), State::Paused);
}

#[test]
fn pausing_and_starting_many_times_loses_nothing() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    for round in 0..50 {
        drop(channel.channel().pause().unwrap());
        // Every third time before the pause has begun.
        if round % 3 > 0 {
            vm.machine.settle();
        }
        vm.send_all(id, [round]);
        channel.channel().start().unwrap();
        vm.machine.settle();
        assert!(is_active(&channel));
    }
    assert_eq!(journal.take_numbers(), (0..50).collect::<Vec<_>>());
    vm.assert_well_behaved();
}
