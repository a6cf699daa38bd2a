//! Waiting at PASSIVE: from tasks, from callbacks, and where it is refused.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker};

use vmbus::ConnectionState;
use vmbus::ids::VpIndex;
use vmbus::kmcl::{
    Channel, ChannelBuilder, ChannelError, EnabledChannel, ExternalData, Level, Refused,
    RequestError, State, StateError, Timeout, WouldBlock,
};
use vmbus::protocol::{Guid, MessageType};
use vmbus::ring::PacketBuffer;
use vmbus_host::bus::{Device, Fault, Profile, Rule};
use vmbus_host::channel::HostChannel;
use vmbus_host::provider::{Manual, Provider};

use crate::support::{INSTANCE, INTERFACE, Journal, SECOND, Seen, Vm};

/// A host that answers every request with its data.
struct Echo;

impl Provider for Echo {
    fn serve(&mut self, _now: u64, channel: &mut HostChannel) {
        let mut packet = PacketBuffer::default();
        while let Ok(true) = channel.receive(&mut packet) {
            channel.release().unwrap();
            if packet.completion_requested() {
                channel
                    .complete(packet.transaction_id(), packet.payload())
                    .unwrap();
            }
        }
    }
}

fn with_echo() -> Vm {
    let vm = Vm::new(Profile::openvmm());
    vm.machine.add(Device::new(INTERFACE, INSTANCE), Echo);
    vm.connect();
    vm
}

#[test]
fn waiting_is_refused_at_dispatch_and_nothing_is_polled() {
    let (vm, _) = Vm::with_device();
    let client = vm.vmbus.client();
    let polled = AtomicBool::new(false);
    let future = poll_fn(|_| {
        polled.store(true, Ordering::SeqCst);
        Poll::Ready(())
    });
    let refused = vm.machine.at_dispatch(|| {
        assert_eq!(client.current_level(), Level::Dispatch);
        client.block_on(future)
    });
    assert_eq!(refused, Err(WouldBlock));
    assert!(!polled.load(Ordering::SeqCst));
    assert_eq!(client.current_level(), Level::Passive);
}

#[test]
fn a_task_waits_for_a_whole_opening() {
    let vm = with_echo();
    let client = vm.vmbus.client();
    let channel = ChannelBuilder::new(INTERFACE).enable(client).unwrap();
    let open = async {
        let mut seen = client.changes();
        while channel.channel().state() != State::Active {
            seen = client.changed(seen).await;
        }
    };
    client.block_on(open).unwrap();
    let disabled = client.block_on(channel.into_disabled()).unwrap().unwrap();
    assert_eq!(disabled.channel().state(), State::Disabled);
    assert_eq!(vm.machine.shared_runs(), 0);
}

#[test]
fn post_started_negotiates_with_synchronous_requests() {
    for passive in [false, true] {
        let vm = with_echo();
        let answers: Arc<Mutex<Vec<u8>>> = Arc::default();
        let journal = answers.clone();
        let mut builder = ChannelBuilder::new(INTERFACE).post_started(move |channel| {
            for step in 0..3 {
                let mut answer = [0; 16];
                let length = channel
                    .send_synchronous_request(
                        &[step; 8],
                        ExternalData::new(),
                        Timeout::After(SECOND),
                        &mut answer,
                    )
                    .unwrap();
                assert_eq!(length, 8);
                journal.lock().unwrap().push(answer[0]);
            }
        });
        if passive {
            builder = builder.incoming_processing_at_passive();
        }
        let channel = vm.enable(&builder);
        assert_eq!(*answers.lock().unwrap(), [0, 1, 2]);
        assert_eq!(channel.channel().state(), State::Active);
    }
}

#[test]
fn a_rescind_ends_the_wait_of_post_started() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let outcome: Arc<Mutex<Option<RequestError>>> = Arc::default();
    let (told, machine) = (outcome.clone(), vm.machine.clone());
    let channel = vm.enable(
        &journal
            .builder(|_, packet| packet.complete(&[]))
            .post_started(move |channel| {
                machine.rescind(id);
                let result = channel.send_synchronous_request(
                    &[0; 8],
                    ExternalData::new(),
                    Timeout::Never,
                    &mut [],
                );
                *told.lock().unwrap() = result.err();
            }),
    );
    assert_eq!(
        *outcome.lock().unwrap(),
        Some(RequestError::Removed(ChannelError::Rescinded))
    );
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(
        journal.take(),
        [Seen::Opened, Seen::Started, Seen::Suspend, Seen::Closed]
    );
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn a_callback_cannot_wait_for_its_own_channel() {
    let (vm, id) = Vm::with_device();
    let checked = Arc::new(AtomicU32::new(0));
    let builder = ChannelBuilder::new(INTERFACE).incoming_processing_at_passive();
    macro_rules! check {
        () => {{
            let checked = checked.clone();
            move |channel: &Channel| {
                assert_eq!(channel.pause().err(), Some(StateError::InCallback));
                assert_eq!(channel.start(), Err(StateError::InCallback));
                checked.fetch_add(1, Ordering::SeqCst);
            }
        }};
    }
    let (opened, packet) = (check!(), check!());
    let builder = builder
        .opened(move |channel| {
            opened(channel);
            Ok(())
        })
        .started(check!())
        .post_started(check!())
        .suspend(check!())
        .closed(check!())
        .process_packet(move |channel, received| {
            packet(channel);
            received.complete(&[]);
        });
    let channel = vm.enable(&builder);
    vm.send(id, &[0; 8]);
    vm.machine.settle();
    channel.disable();
    vm.machine.settle();
    assert_eq!(checked.load(Ordering::SeqCst), 6);
    assert_eq!(channel.channel().state(), State::Disabled);
}

#[test]
fn a_channel_is_closed_only_after_the_callback_that_waits_has_returned() {
    // A packet callback at PASSIVE waits for another channel, and meanwhile its own is to end.
    let vm = with_echo();
    let echo = vm.enable(&ChannelBuilder::new(INTERFACE));
    let instance = Guid::literal("00000000-0000-0000-0000-000000000007");
    let device = Device::new(INTERFACE, instance);
    let id = vm.machine.add(device, Manual).unwrap();
    vm.machine.settle();
    let journal = Journal::default();
    let (other, notes, machine) = (echo.channel().clone(), journal.clone(), vm.machine.clone());
    let builder = journal
        .builder(move |_, packet| {
            machine.rescind(id);
            let mut answer = [0; 8];
            other
                .send_synchronous_request(&[9; 8], ExternalData::new(), Timeout::Never, &mut answer)
                .unwrap();
            assert_eq!(answer, [9; 8]);
            notes.note(Seen::Complete(99));
            packet.complete(&[]);
        })
        .incoming_processing_at_passive();
    let channel = vm.enable(&builder.instance(instance));
    journal.take();
    vm.send(id, &[0; 8]);
    vm.machine.settle();
    let seen = journal.take();
    assert!(
        matches!(
            seen[..],
            [
                Seen::Packet(_, Level::Passive),
                Seen::Complete(99),
                Seen::Complete(1),
                Seen::Suspend,
                Seen::Closed
            ]
        ),
        "{seen:?}"
    );
    assert_eq!(channel.channel().state(), State::Disabled);
    vm.assert_well_behaved();
}

#[test]
fn a_wait_sleeps_until_somebody_wakes_it_or_its_time_is_over() {
    let (vm, _) = Vm::with_device();
    let client = vm.vmbus.client();
    let channel = vm.enable(&ChannelBuilder::new(INTERFACE));
    let end = client.now() + 100 * SECOND;
    let mut request = pin!(channel.channel().request(
        &[0; 8],
        ExternalData::new(),
        Timeout::At(end)
    ));
    let mut polls = 0;
    let counted = poll_fn(|context| {
        polls += 1;
        request.as_mut().poll(context)
    });
    let outcome = client.block_on(counted).unwrap();
    assert!(matches!(outcome, Err(RequestError::Cancelled)));
    assert!(client.now() >= end);
    assert!(polls <= 3, "polled {polls} times");
}

/// A second device of [`INTERFACE`], served by the test.
const OTHER: Guid = Guid::literal("00000000-0000-0000-0000-000000000009");

fn request_for_ever(channel: &Channel) -> Option<RequestError> {
    let none = ExternalData::new();
    let result = channel.send_synchronous_request(&[0; 8], none, Timeout::Never, &mut []);
    result.err()
}

#[test]
fn an_unload_ends_the_wait_of_post_started() {
    let (vm, _) = Vm::with_device();
    let outcome: Arc<Mutex<Option<RequestError>>> = Arc::default();
    let (told, stack) = (outcome.clone(), vm.vmbus.clone());
    let channel = vm.enable(
        &ChannelBuilder::new(INTERFACE).post_started(move |channel| {
            stack.begin_unload();
            *told.lock().unwrap() = request_for_ever(channel);
        }),
    );
    vm.machine.settle();
    assert_eq!(
        *outcome.lock().unwrap(),
        Some(RequestError::Removed(ChannelError::Unloaded))
    );
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(
        vm.vmbus.connection(),
        ConnectionState::Unloaded { acknowledged: true }
    );
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn a_new_contact_ends_every_wait_for_the_old_one() {
    let (vm, _) = Vm::with_device();
    let outcome: Arc<Mutex<Option<RequestError>>> = Arc::default();
    let (told, stack, machine) = (outcome.clone(), vm.vmbus.clone(), vm.machine.clone());
    let channel = vm.enable(
        &ChannelBuilder::new(INTERFACE).post_started(move |channel| {
            machine.server(|server| {
                server.inject(Rule::once(MessageType::GPADL_CREATED, Fault::Drop));
            });
            let client = channel.client();
            let seen = client.changes();
            let creating = channel.allocate_gpadl(1).unwrap();
            client.block_on(client.changed(seen)).unwrap();
            stack.connect();
            assert!(client.block_on(creating).unwrap().is_err());
            *told.lock().unwrap() = request_for_ever(channel);
        }),
    );
    vm.machine.settle();
    assert_eq!(
        *outcome.lock().unwrap(),
        Some(RequestError::Removed(ChannelError::Unloaded))
    );
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(vm.machine.shared_runs(), 0);
}

#[test]
fn a_channel_of_the_old_connection_does_not_stand_in_the_way_of_the_new_one() {
    let (vm, id) = Vm::with_device();
    let next: Arc<OnceLock<EnabledChannel>> = Arc::default();
    let (waited, stack) = (next.clone(), vm.vmbus.clone());
    let old = vm.enable(&ChannelBuilder::new(INTERFACE).start_paused().post_started(
        move |channel| {
            stack.connect();
            let next = waited.get().unwrap().channel();
            let client = channel.client();
            let active = async {
                let mut seen = client.changes();
                while next.state() != State::Active {
                    seen = client.changed(seen).await;
                }
            };
            client.block_on(active).unwrap();
        },
    ));
    let journal = Journal::default();
    let enabled = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    next.set(enabled).unwrap();
    old.channel().start().unwrap();
    vm.machine.settle();
    assert_eq!(old.channel().state(), State::Disabled);
    journal.take();
    vm.send(id, &7u64.to_le_bytes());
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [7]);
    vm.assert_well_behaved();
}

#[test]
fn a_completion_routine_cannot_wait_for_the_end_of_its_channel() {
    let (vm, _) = Vm::with_device();
    let owner: Arc<OnceLock<EnabledChannel>> = Arc::default();
    owner
        .set(vm.enable(&ChannelBuilder::new(INTERFACE)))
        .unwrap();
    let channel = owner.get().unwrap().channel();
    let outcome: Arc<Mutex<Option<Result<(), StateError>>>> = Arc::default();
    let (told, waited) = (outcome.clone(), owner.clone());
    let mut packet = channel.allocate_packet().unwrap();
    packet.set_completion_routine(Arc::new(move |packet, result| {
        assert!(result.is_err());
        let client = packet.channel().client();
        let over = client.block_on(waited.get().unwrap().disabled());
        *told.lock().unwrap() = over.ok();
    }));
    packet.send_transaction(&[0; 8]).unwrap();
    owner.get().unwrap().disable();
    vm.machine.settle();
    assert_eq!(*outcome.lock().unwrap(), Some(Err(StateError::InCallback)));
    assert_eq!(channel.state(), State::Disabled);
}

#[test]
fn an_interrupt_during_a_callback_is_not_that_callback() {
    let (vm, _) = Vm::with_device();
    let id = vm.machine.add(Device::new(INTERFACE, OTHER), Manual);
    let id = id.unwrap();
    vm.machine.settle();
    let outcome: Arc<Mutex<Option<StateError>>> = Arc::default();
    let (told, machine) = (outcome.clone(), vm.machine.clone());
    let first = vm.enable(
        &ChannelBuilder::new(INTERFACE)
            .instance(INSTANCE)
            .start_paused()
            .post_started(move |_| {
                machine.channel(id, |host| {
                    let packet = vmbus::ring::Outgoing::in_band([&[0; 8], &[]]);
                    host.send(&packet).unwrap();
                });
            }),
    );
    let paused = first.channel().clone();
    let _second = vm.enable(
        &ChannelBuilder::new(INTERFACE)
            .instance(OTHER)
            .process_packet(move |_, packet| {
                assert_eq!(packet.level(), Level::Dispatch);
                *told.lock().unwrap() = paused.pause().err();
                packet.complete(&[]);
            }),
    );
    first.channel().start().unwrap();
    vm.machine.settle();
    assert_eq!(*outcome.lock().unwrap(), None);
    assert_eq!(first.channel().state(), State::Paused);
}

#[test]
fn a_channel_has_ended_when_its_last_callback_has() {
    let (vm, _) = Vm::with_device();
    let id = vm.machine.add(Device::new(INTERFACE, OTHER), Manual);
    let id = id.unwrap();
    vm.machine.settle();
    let owner: Arc<OnceLock<EnabledChannel>> = Arc::default();
    let over: Arc<Mutex<Option<bool>>> = Arc::default();
    let (told, waited) = (over.clone(), owner.clone());
    // On another VP, while the failure callback runs on the first.
    let other = ChannelBuilder::new(INTERFACE).instance(OTHER);
    let _other = vm.enable(
        &other
            .target_vp(VpIndex(1))
            .process_packet(move |_, packet| {
                let disabled = pin!(waited.get().unwrap().disabled());
                let polled = disabled.poll(&mut Context::from_waker(Waker::noop()));
                *told.lock().unwrap() = Some(polled.is_ready());
                packet.complete(&[]);
            }),
    );
    let machine = vm.machine.clone();
    let refusing = ChannelBuilder::new(INTERFACE)
        .opened(|_| Err(Refused("no")))
        .failure(move |_, _| {
            machine.channel(id, |host| {
                let packet = vmbus::ring::Outgoing::in_band([&[0; 8], &[]]);
                host.send(&packet).unwrap();
            });
        });
    owner
        .set(refusing.enable(vm.vmbus.client()).unwrap())
        .unwrap();
    vm.machine.settle();
    assert_eq!(*over.lock().unwrap(), Some(false));
    let disabled = vm.vmbus.client().block_on(owner.get().unwrap().disabled());
    assert_eq!(disabled, Ok(Ok(())));
}
