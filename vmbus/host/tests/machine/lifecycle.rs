//! Opening and closing: the order of callbacks, every way to end, and memory that is given back in time.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use vmbus::ConnectionState;
use vmbus::kmcl::{ChannelBuilder, ChannelError, ConfigError, Refused, State};
use vmbus::protocol::{Guid, MessageType, Status};
use vmbus::ring::Outgoing;
use vmbus_host::bus::{Device, Fault, Profile, Rule};
use vmbus_host::provider::Manual;

use crate::support::{INSTANCE, INTERFACE, Journal, SECOND, Seen, Shelf, Vm, is_active, received};

#[test]
fn callbacks_run_in_their_order() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    assert_eq!(
        journal.take(),
        [Seen::Opened, Seen::Started, Seen::PostStarted]
    );
    assert_eq!(channel.channel().interface_instance(), Some(INSTANCE));
    assert!(vm.machine.is_open(id));
    channel.disable();
    vm.machine.settle();
    assert_eq!(journal.take(), [Seen::Suspend, Seen::Closed]);
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(channel.channel().interface_instance(), None);
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn dropping_the_owner_closes_the_channel() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    drop(vm.enable(&journal.builder(|_, packet| packet.complete(&[]))));
    vm.machine.settle();
    assert!(!vm.machine.is_open(id));
    assert_eq!(journal.take()[3..], [Seen::Suspend, Seen::Closed]);
}

#[test]
fn a_channel_waits_for_its_offer() {
    let vm = Vm::new(Profile::openvmm());
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    vm.connect();
    assert_eq!(channel.channel().state(), State::Enabled);
    vm.machine.add(Device::new(INSTANCE, INSTANCE), Manual);
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Enabled);
    vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
    vm.machine.settle();
    assert!(is_active(&channel));
}

#[test]
fn two_channels_take_two_devices() {
    let (vm, _) = Vm::with_device();
    let other = Guid::literal("00000000-0000-0000-0000-000000000001");
    vm.machine.add(Device::new(INTERFACE, other), Manual);
    vm.machine.settle();
    let builder = Journal::default().builder(|_, packet| packet.complete(&[]));
    let first = vm.enable(&builder.clone().instance(other));
    let second = vm.enable(&builder);
    let third = vm.enable(&builder);
    assert_eq!(first.channel().interface_instance(), Some(other));
    assert_eq!(second.channel().interface_instance(), Some(INSTANCE));
    assert_eq!(third.channel().state(), State::Enabled);
    let snapshot = vm.vmbus.snapshot();
    assert!(
        snapshot
            .offers
            .iter()
            .all(|info| info.driver.as_deref() == Some("test"))
    );
    assert_eq!(snapshot.channels.len(), 3);
}

#[test]
fn a_channel_can_be_enabled_again() {
    let (vm, _) = Vm::with_device();
    let journal = Journal::default();
    let builder = journal.builder(|_, packet| packet.complete(&[]));
    for _ in 0..20 {
        let channel = vm.enable(&builder);
        assert!(is_active(&channel));
        channel.disable();
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Disabled);
    }
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn closing_waits_for_the_packets_that_the_driver_holds() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let channel =
        vm.enable(&journal.builder(move |_, packet| holder.lock().unwrap().push(packet.hold())));
    vm.send_all(id, 0..2);
    journal.take();
    channel.disable();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Suspending);
    assert_eq!(journal.take(), [Seen::Suspend]);
    vm.send_all(id, 2..3);
    vm.machine.interrupt(id);
    vm.machine.settle();
    assert_eq!(journal.take(), [], "no packet after suspend");
    let packets: Vec<_> = shelf.lock().unwrap().drain(..).collect();
    for packet in packets {
        packet.complete(&[]);
        vm.machine.settle();
    }
    assert_eq!(journal.take(), [Seen::Closed]);
    assert_eq!(channel.channel().state(), State::Disabled);
}

#[test]
fn a_rescinded_channel_ends_and_does_not_come_back_by_itself() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    journal.take();
    vm.machine.rescind(id);
    vm.machine.settle();
    assert_eq!(journal.take(), [Seen::Suspend, Seen::Closed]);
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    vm.assert_well_behaved();
}

#[test]
fn an_offer_that_goes_before_it_is_open_is_waited_for_again() {
    // Each time the host's answer to one of the steps is late, and the rescind overtakes it.
    for message in [MessageType::GPADL_CREATED, MessageType::OPEN_CHANNEL_RESULT] {
        let (vm, id) = Vm::with_device();
        vm.machine
            .server(|server| server.inject(Rule::once(message, Fault::Delay(SECOND))));
        let journal = Journal::default();
        let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
        assert_eq!(channel.channel().state(), State::Enabled);
        vm.machine.rescind(id);
        vm.machine.advance(15 * SECOND);
        assert_eq!(channel.channel().state(), State::Enabled, "{message:?}");
        assert_eq!(journal.take(), []);
        assert_eq!(vm.machine.shared_runs(), 0, "{message:?}");
        vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
        vm.machine.settle();
        assert!(is_active(&channel), "{message:?}");
    }
}

#[test]
fn unloading_closes_channels_and_frees_their_memory() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    journal.take();
    vm.vmbus.begin_unload();
    vm.machine.settle();
    assert_eq!(journal.take(), [Seen::Suspend, Seen::Closed]);
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(
        vm.vmbus.connection(),
        ConnectionState::Unloaded { acknowledged: true }
    );
    assert!(!vm.machine.is_open(id));
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn unloading_does_not_wait_for_packets_that_the_driver_holds() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let channel =
        vm.enable(&journal.builder(move |_, packet| holder.lock().unwrap().push(packet.hold())));
    vm.send_all(id, 0..2);
    vm.vmbus.begin_unload();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    for packet in shelf.lock().unwrap().drain(..) {
        packet.complete(b"to nobody");
    }
    vm.machine.settle();
    vm.assert_well_behaved();
}

#[test]
fn memory_stays_lent_when_the_host_does_not_confirm_the_unload() {
    let (vm, _) = Vm::with_device();
    let _channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
    vm.machine.server(|server| {
        server.inject(Rule::always(MessageType::UNLOAD, Fault::Drop));
    });
    vm.vmbus.begin_unload();
    vm.machine.advance(100 * SECOND);
    assert_eq!(
        vm.vmbus.connection(),
        ConnectionState::Unloaded {
            acknowledged: false
        }
    );
    assert_eq!(
        vm.machine.shared_runs(),
        1,
        "the host may still write to it"
    );
}

#[test]
fn unloading_while_a_channel_is_being_opened() {
    for message in [MessageType::GPADL_CREATED, MessageType::OPEN_CHANNEL_RESULT] {
        let (vm, _) = Vm::with_device();
        vm.machine
            .server(|server| server.inject(Rule::once(message, Fault::Drop)));
        let channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
        vm.vmbus.begin_unload();
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Disabled);
        assert_eq!(vm.machine.shared_runs(), 0);
    }
}

#[test]
fn unloading_ends_channels_that_still_wait_for_an_offer() {
    let (vm, _) = Vm::with_device();
    let builder = Journal::default()
        .builder(|_, packet| packet.complete(&[]))
        .instance(Guid::ZERO);
    let channel = vm.enable(&builder);
    assert_eq!(channel.channel().state(), State::Enabled);
    vm.vmbus.begin_unload();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
}

#[test]
fn a_channel_that_is_disabled_while_it_opens_is_closed_again() {
    let journal = Journal::default();
    let builder = journal.builder(|_, packet| packet.complete(&[]));
    // At once: nothing has been asked of the host.
    let (vm, _) = Vm::with_device();
    let channel = builder.enable(vm.vmbus.client()).unwrap();
    channel.disable();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(journal.take(), []);
    for message in [MessageType::GPADL_CREATED, MessageType::OPEN_CHANNEL_RESULT] {
        let (vm, _) = Vm::with_device();
        vm.machine
            .server(|server| server.inject(Rule::once(message, Fault::Delay(SECOND))));
        let channel = vm.enable(&builder);
        channel.disable();
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Enabled);
        vm.machine.advance(2 * SECOND);
        assert_eq!(channel.channel().state(), State::Disabled, "{message:?}");
        assert_eq!(vm.machine.shared_runs(), 0);
        vm.assert_well_behaved();
    }
}

#[test]
fn a_guest_that_has_left_can_come_back() {
    let (vm, _) = Vm::with_device();
    let builder = Journal::default().builder(|_, packet| packet.complete(&[]));
    for _ in 0..3 {
        let channel = vm.enable(&builder);
        assert!(is_active(&channel));
        vm.vmbus.begin_unload();
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Disabled);
        assert_eq!(vm.machine.shared_runs(), 0);
        vm.connect();
    }
}

#[test]
fn a_new_contact_ends_the_channels_of_the_old_one() {
    let (vm, _) = Vm::with_device();
    let builder = Journal::default().builder(|_, packet| packet.complete(&[]));
    let channel = vm.enable(&builder);
    vm.connect();
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(vm.machine.shared_runs(), 0);
    assert!(is_active(&vm.enable(&builder)));
    vm.assert_well_behaved();
}

#[test]
fn an_opened_callback_can_refuse() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let builder = journal
        .builder(|_, packet| packet.complete(&[]))
        .opened(|_| Err(Refused("not my version")));
    let channel = vm.enable(&builder);
    assert_eq!(
        journal.take(),
        [Seen::Failure(ChannelError::Refused(Refused(
            "not my version"
        )))],
        "no closed callback for what was never opened"
    );
    assert_eq!(channel.channel().state(), State::Disabled);
    assert!(!vm.machine.is_open(id));
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn what_the_host_refuses_is_told() {
    let journal = Journal::default();
    let builder = journal.builder(|_, packet| packet.complete(&[]));

    let (vm, _) = Vm::with_device();
    vm.machine.set_open_status(Status::UNSUCCESSFUL);
    let _channel = vm.enable(&builder);
    assert!(matches!(
        journal.take()[..],
        [Seen::Failure(ChannelError::Open(_))]
    ));
    assert_eq!(vm.machine.shared_runs(), 0);

    let (vm, _) = Vm::with_device();
    vm.machine
        .server(|server| server.refusals.gpadls = Some(Status::UNSUCCESSFUL));
    let _channel = vm.enable(&builder);
    assert!(matches!(
        journal.take()[..],
        [Seen::Failure(ChannelError::Gpadl(_))]
    ));
    assert_eq!(vm.machine.shared_runs(), 0);

    let (vm, _) = Vm::with_device();
    vm.machine.set_free_pages(9);
    let _channel = vm.enable(&builder);
    assert!(matches!(
        journal.take()[..],
        [Seen::Failure(ChannelError::NoMemory(_))]
    ));
}

#[test]
fn a_host_that_does_not_answer_is_given_up() {
    for message in [MessageType::GPADL_CREATED, MessageType::OPEN_CHANNEL_RESULT] {
        let (vm, _) = Vm::with_device();
        vm.machine
            .server(|server| server.inject(Rule::always(message, Fault::Drop)));
        let journal = Journal::default();
        let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
        vm.machine.advance(60 * SECOND);
        assert_eq!(channel.channel().state(), State::Disabled);
        assert!(matches!(
            journal.take()[..],
            [Seen::Failure(
                ChannelError::Gpadl(_) | ChannelError::Open(_)
            )]
        ));
    }
}

#[test]
fn impossible_settings_are_refused() {
    let (vm, _) = Vm::with_device();
    let enable = |builder: ChannelBuilder| builder.enable(vm.vmbus.client()).unwrap_err();
    let new = || ChannelBuilder::new(INTERFACE);
    assert_eq!(
        enable(new().maximum_packet_size(0)),
        ConfigError::Zero("maximum packet size")
    );
    assert_eq!(
        enable(new().transaction_quota(0)),
        ConfigError::Zero("transaction quota")
    );
    for (builder, what) in [
        (new().transaction_quota(u32::MAX), "transaction quota"),
        (
            new().maximum_packet_count(u32::MAX as usize),
            "maximum packet count",
        ),
    ] {
        let count = u32::MAX as usize;
        assert_eq!(enable(builder), ConfigError::TooManyPackets { what, count });
    }
    assert_eq!(
        enable(new().ring_pages(0, 1)),
        ConfigError::Zero("incoming ring page count")
    );
    assert_eq!(
        enable(new().pipe().maximum_packet_size(16385).ring_pages(8, 8)),
        ConfigError::PipePacketSize(16385)
    );
    assert_eq!(
        enable(new().ring_pages(1, 1).maximum_packet_size(4096)),
        ConfigError::RingTooSmall {
            need: 4128,
            limit: 4080
        }
    );
    assert_eq!(
        enable(new().ring_pages(8000, 8000)),
        ConfigError::RingTooLarge { pages: 16002 }
    );
}

#[test]
fn a_packet_held_beyond_the_channels_end_is_not_answered_on_the_next_opening() {
    let (vm, id) = Vm::with_device();
    let shelf = Shelf::default();
    let kept = shelf.clone();
    let channel = vm.enable(
        &Journal::default().builder(move |_, packet| kept.lock().unwrap().push(packet.hold())),
    );
    vm.host(id, |host| {
        let packet = Outgoing::in_band([b"question", &[]]).with_completion(7);
        host.send(&packet).unwrap();
    });
    vm.machine.settle();
    // Nobody waits for the driver when the guest leaves.
    vm.vmbus.begin_unload();
    vm.machine.settle();
    let client = vm.vmbus.client();
    let disabled = client.block_on(channel.into_disabled()).unwrap().unwrap();
    vm.connect();
    let channel = disabled.enable().unwrap();
    vm.machine.settle();
    assert!(is_active(&channel));
    let packets = std::mem::take(&mut *shelf.lock().unwrap());
    assert_eq!(packets.len(), 1);
    for packet in packets {
        packet.complete(b"too late");
    }
    vm.machine.settle();
    assert_eq!(vm.host(id, received), [], "the host did not ask here");
    vm.assert_well_behaved();
}

struct Counter(AtomicU32);

impl Wake for Counter {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn async_code_is_woken_by_changes() {
    let (vm, _) = Vm::with_device();
    let channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
    let counter = Arc::new(Counter(AtomicU32::new(0)));
    let waker = Waker::from(counter.clone());
    let mut context = Context::from_waker(&waker);
    let mut disabled = pin!(channel.disabled());
    assert_eq!(disabled.as_mut().poll(&mut context), Poll::Pending);
    vm.machine.settle();
    assert_eq!(counter.0.load(Ordering::SeqCst), 0, "nothing has changed");
    channel.disable();
    vm.machine.settle();
    assert!(counter.0.load(Ordering::SeqCst) > 0);
    assert_eq!(disabled.as_mut().poll(&mut context), Poll::Ready(Ok(())));
}

#[test]
fn who_waits_for_a_pause_that_is_taken_back_is_woken() {
    let (vm, _) = Vm::with_device();
    let channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
    let counter = Arc::new(Counter(AtomicU32::new(0)));
    let waker = Waker::from(counter.clone());
    let mut context = Context::from_waker(&waker);
    let mut paused = pin!(channel.channel().pause().unwrap());
    assert_eq!(paused.as_mut().poll(&mut context), Poll::Pending);
    channel.channel().start().unwrap();
    vm.machine.settle();
    assert!(is_active(&channel), "it was never paused");
    assert!(counter.0.load(Ordering::SeqCst) > 0);
    assert_eq!(paused.as_mut().poll(&mut context), Poll::Ready(()));
}

#[test]
fn an_idle_bus_asks_for_nothing() {
    let (vm, _) = Vm::with_device();
    let _channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
    let (work, signals) = (vm.machine.work_requests(), vm.machine.signals());
    assert_eq!(vm.vmbus.deadline(), None);
    vm.machine.advance(100 * SECOND);
    assert_eq!(vm.machine.work_requests(), work);
    assert_eq!(vm.machine.signals(), signals);
}

#[test]
fn a_packet_of_an_earlier_connection_is_not_answered_on_the_next() {
    let (vm, id) = Vm::with_device();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let builder =
        Journal::default().builder(move |_, packet| holder.lock().unwrap().push(packet.hold()));
    let channel = vm.enable(&builder);
    vm.host(id, |host| {
        let packet = Outgoing::in_band([&[0; 8], &[]]).with_completion(77);
        host.send(&packet).unwrap();
    });
    vm.vmbus.begin_unload();
    vm.machine.settle();
    let client = vm.vmbus.client();
    let disabled = client.block_on(channel.into_disabled()).unwrap().unwrap();
    vm.connect();
    let channel = disabled.enable().unwrap();
    vm.machine.settle();
    assert!(is_active(&channel));
    for packet in shelf.lock().unwrap().drain(..) {
        assert!(packet.completion_requested());
        packet.complete(&[1; 8]);
    }
    vm.machine.settle();
    assert_eq!(vm.host(id, received), []);
    channel.disable();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    vm.assert_well_behaved();
}
