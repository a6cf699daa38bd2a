//! Each clause of how packets reach a driver.

use std::sync::{Arc, Mutex};

use vmbus::kmcl::{ChannelError, Level, State};
use vmbus::ring::{Kind, Outgoing, PacketBuffer, RingError};

use crate::support::{Journal, SECOND, Seen, Shelf, Vm, is_active, number, received};

/// A guest whose test device is open, with its journal. Packets are completed at once.
macro_rules! open {
    ($vm:ident, $id:ident, $journal:ident, $channel:ident) => {
        open!($vm, $id, $journal, $channel, |builder| builder)
    };
    ($vm:ident, $id:ident, $journal:ident, $channel:ident, |$builder:ident| $change:expr) => {
        let ($vm, $id) = Vm::with_device();
        let $journal = Journal::default();
        let $builder = $journal.builder(|_, packet| packet.complete(&[]));
        let $channel = $vm.enable(&$change);
        assert!(is_active(&$channel));
        $journal.take();
    };
}

#[test]
fn process_packet_runs_for_every_packet_received() {
    open!(vm, id, journal, channel);
    for round in 0..200 {
        vm.send_all(id, round * 10..round * 10 + 10);
        assert_eq!(
            journal.take_numbers(),
            (round * 10..round * 10 + 10).collect::<Vec<_>>()
        );
    }
    assert_eq!(channel.channel().counters().packets_received, 2000);
    vm.assert_well_behaved();
}

#[test]
fn process_packet_runs_in_the_interrupt_handler() {
    open!(vm, id, journal, channel);
    let work = vm.machine.work_requests();
    vm.send(id, b"12345678");
    assert_eq!(
        journal.take(),
        [
            Seen::Packet(b"12345678".to_vec(), Level::Dispatch),
            Seen::Complete(1)
        ],
        "without the work queue"
    );
    assert_eq!(vm.machine.work_requests(), work);
    assert!(is_active(&channel));
}

#[test]
fn processing_complete_runs_once_each_time_the_ring_goes_from_non_empty_to_empty() {
    open!(vm, id, journal, channel);
    vm.send_all(id, 0..3);
    let seen = journal.take();
    assert_eq!(seen.len(), 4, "after the last process-packet of the batch");
    assert_eq!(seen.last(), Some(&Seen::Complete(3)));
    vm.send_all(id, 3..4);
    assert_eq!(journal.take_completes(), [1]);
    assert!(is_active(&channel));
}

#[test]
fn processing_complete_never_runs_without_packets() {
    open!(vm, id, journal, channel);
    for _ in 0..3 {
        vm.machine.interrupt(id);
    }
    assert_eq!(journal.take(), []);
    assert_eq!(channel.channel().counters().spurious_events, 3);
}

#[test]
fn completions_do_not_count_as_packets() {
    open!(vm, id, journal, channel);
    let packet = channel.channel().allocate_packet().unwrap();
    packet.send_transaction(b"question").unwrap();
    let request = vm.host(id, received);
    let transaction = request[0].0.unwrap();
    vm.host(id, |host| {
        host.send(&Outgoing::completion(transaction, b"answer"))
            .unwrap();
    });
    assert_eq!(journal.take(), []);
    assert_eq!(channel.channel().counters().completions_received, 1);
}

#[test]
fn a_packet_between_the_last_look_and_the_unmasking_is_found() {
    let (vm, id) = Vm::with_device();
    let vm = Arc::new(vm);
    let journal = Journal::default();
    let late = Arc::new(Mutex::new(true));
    let (completes, host) = (journal.clone(), Arc::downgrade(&vm));
    let packets = journal.clone();
    let builder = journal.builder(|_, _| {}).process_packet_callbacks(
        move |_, packet| {
            packets.packet(&packet);
            packet.complete(&[]);
        },
        move |_, count| {
            completes.note(Seen::Complete(count));
            // The ring has been seen empty, and is still masked: no interrupt comes for this one.
            if std::mem::take(&mut *late.lock().unwrap()) {
                let vm = host.upgrade().unwrap();
                vm.host(id, |host| {
                    host.send(&Outgoing::in_band([b"too late", &[]])).unwrap();
                    assert!(host.take_interrupt().is_none(), "the guest has masked");
                });
            }
        },
    );
    let channel = vm.enable(&builder);
    journal.take();
    vm.send(id, b"in time!");
    assert_eq!(
        journal.take(),
        [
            Seen::Packet(b"in time!".to_vec(), Level::Dispatch),
            Seen::Complete(1),
            Seen::Packet(b"too late".to_vec(), Level::Dispatch),
            Seen::Complete(1),
        ]
    );
    assert!(is_active(&channel));
}

#[test]
fn an_interrupt_during_a_passive_batch_is_neither_lost_nor_waited_for() {
    let (vm, id) = Vm::with_device();
    let vm = Arc::new(vm);
    let journal = Journal::default();
    let host = Arc::downgrade(&vm);
    let builder = journal
        .builder(move |_, packet| {
            let n = number(packet.payload());
            packet.complete(&[]);
            if n == 1 {
                let vm = host.upgrade().unwrap();
                vm.send_all(id, [2]);
                // On the very VP whose batch is running.
                vm.machine.interrupt(id);
                vm.machine.interrupt(id);
            }
        })
        .incoming_processing_at_passive();
    let channel = vm.enable(&builder);
    journal.take();
    vm.send_all(id, [1]);
    assert_eq!(journal.take(), [], "nothing at DISPATCH");
    vm.machine.settle();
    let passive = |n: u64| Seen::Packet(n.to_le_bytes().to_vec(), Level::Passive);
    let seen = journal.take();
    let packets: Vec<_> = seen
        .iter()
        .filter(|seen| matches!(seen, Seen::Packet(..)))
        .cloned()
        .collect();
    assert_eq!(packets, [passive(1), passive(2)]);
    assert!(is_active(&channel));
}

#[test]
fn an_interrupt_for_room_during_a_passive_batch_is_not_lost() {
    let (vm, id) = Vm::with_device();
    let vm = Arc::new(vm);
    let host = Arc::downgrade(&vm);
    let builder = Journal::default()
        .builder(move |_, packet| {
            packet.complete(&[]);
            let vm = host.upgrade().unwrap();
            let signals = vm.host(id, |host| {
                received(host);
                host.take_interrupt()
            });
            assert!(signals.is_some(), "the guest waits for room");
            // The batch has looked at the send queue already, and will find the ring empty.
            vm.machine.interrupt(id);
        })
        .ring_pages(1, 1)
        .maximum_packet_size(2000)
        .incoming_processing_at_passive();
    let channel = vm.enable(&builder);
    for _ in 0..3 {
        channel.channel().send_message(&[0; 1900]).unwrap();
    }
    vm.machine.settle();
    assert_eq!(channel.channel().counters().packets_sent, 2);
    vm.send_all(id, [1]);
    vm.machine.settle();
    assert_eq!(channel.channel().counters().packets_sent, 3);
}

#[test]
fn the_quota_stops_delivery_and_a_completion_goes_on() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let builder = journal
        .builder(move |_, packet| holder.lock().unwrap().push(packet.hold()))
        .transaction_quota(2);
    let channel = vm.enable(&builder);
    journal.take();
    vm.send_all(id, 0..5);
    assert_eq!(
        journal.take_numbers(),
        [0, 1],
        "two are held, so no third is delivered"
    );
    assert_eq!(channel.channel().outstanding_packets(), 2);
    assert_eq!(channel.channel().counters().quota_stops, 1);
    vm.machine.interrupt(id);
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [] as [u64; 0], "whatever happens");

    let last = shelf.lock().unwrap().pop().unwrap();
    assert_eq!(number(last.payload()), 1, "the copy lives on");
    last.complete(&[]);
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [2]);
    shelf.lock().unwrap().clear();
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [3, 4]);
    assert_eq!(
        channel.channel().counters().uncompleted_drops,
        2,
        "clearing the shelf was a bug, and is counted as one"
    );
}

#[test]
fn processing_complete_runs_when_the_quota_stops_a_batch() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let builder = journal
        .builder(move |_, packet| holder.lock().unwrap().push(packet.hold()))
        .transaction_quota(2);
    let _channel = vm.enable(&builder);
    journal.take();
    vm.send_all(id, 0..5);
    assert_eq!(journal.take_completes(), [2]);
    for packet in shelf.lock().unwrap().drain(..) {
        packet.complete(&[]);
    }
}

#[test]
fn raising_the_quota_alone_does_not_restart_delivery() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let builder = journal
        .builder(move |_, packet| holder.lock().unwrap().push(packet.hold()))
        .transaction_quota(4);
    let channel = vm.enable(&builder);
    channel.channel().set_transaction_quota(1);
    journal.take();
    vm.send_all(id, 0..3);
    assert_eq!(journal.take_numbers(), [0]);
    channel.channel().set_transaction_quota(4);
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [] as [u64; 0]);
    let held = shelf.lock().unwrap().pop().unwrap();
    held.complete(&[]);
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [1, 2]);
    for packet in shelf.lock().unwrap().drain(..) {
        packet.complete(&[]);
    }
}

#[test]
fn a_spent_budget_moves_the_channel_to_the_work_queue() {
    open!(vm, id, journal, channel, |builder| builder.batch_budget(4));
    vm.send_all(id, 0..10);
    let levels = |seen: Vec<Seen>| -> Vec<Level> {
        seen.into_iter()
            .filter_map(|seen| match seen {
                Seen::Packet(_, level) => Some(level),
                _ => None,
            })
            .collect()
    };
    assert_eq!(levels(journal.take()), [Level::Dispatch; 4]);
    vm.machine.settle();
    assert_eq!(levels(journal.take()), [Level::Passive; 6]);
    assert_eq!(channel.channel().counters().budget_stops, 2);
}

#[test]
fn a_deferred_packet_comes_again_at_passive_before_all_others() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let builder = journal.builder(|_, packet| {
        if number(packet.payload()) == 1 && packet.level() == Level::Dispatch {
            packet.defer_to_passive();
        } else {
            packet.complete(&[]);
        }
    });
    let channel = vm.enable(&builder);
    journal.take();
    vm.send_all(id, 0..3);
    let packet = |n: u64, level| Seen::Packet(n.to_le_bytes().to_vec(), level);
    assert_eq!(
        journal.take(),
        [
            packet(0, Level::Dispatch),
            packet(1, Level::Dispatch),
            Seen::Complete(1)
        ],
        "a deferred delivery does not count"
    );
    // More come in the meantime: order is kept.
    vm.send_all(id, 3..4);
    vm.machine.interrupt(id);
    assert_eq!(journal.take(), []);
    vm.machine.settle();
    assert_eq!(
        journal.take(),
        [
            packet(1, Level::Passive),
            packet(2, Level::Passive),
            packet(3, Level::Passive),
            Seen::Complete(3)
        ]
    );
    assert_eq!(channel.channel().counters().deferrals, 1);
    assert_eq!(channel.channel().outstanding_packets(), 0);
}

#[test]
fn passive_processing_can_be_switched_on_and_off() {
    open!(vm, id, journal, channel);
    channel.channel().set_incoming_processing_at_passive(true);
    vm.send_all(id, [1]);
    assert_eq!(journal.take(), []);
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [1]);
    channel.channel().set_incoming_processing_at_passive(false);
    vm.send_all(id, [2]);
    assert_eq!(journal.take_numbers(), [2]);
}

#[test]
fn doubled_events_do_no_harm() {
    open!(vm, id, journal, channel);
    for n in 0..100 {
        vm.send_all(id, [n]);
        vm.machine.interrupt(id);
        vm.machine.interrupt(id);
    }
    assert_eq!(journal.take_numbers(), (0..100).collect::<Vec<_>>());
    assert_eq!(channel.channel().counters().spurious_events, 200);
}

#[test]
fn events_for_channels_that_are_not_open_are_counted() {
    let (vm, id) = Vm::with_device();
    vm.machine.interrupt(id);
    vm.machine.interrupt(vmbus::ids::ChannelId(2047));
    vm.machine.interrupt(vmbus::ids::ChannelId(u32::MAX));
    assert_eq!(vm.vmbus.snapshot().unclaimed_events, 3);
}

#[test]
fn the_answer_goes_to_the_host_when_it_asked_for_one() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let builder = journal.builder(|_, packet| packet.complete(b"12345678"));
    let _channel = vm.enable(&builder);
    vm.host(id, |host| {
        let packet = Outgoing::in_band([b"question", &[]]);
        host.push(&packet.with_completion(0x77)).unwrap();
        host.push(&packet).unwrap();
        host.publish().unwrap();
    });
    vm.host(id, |host| {
        let mut packet = PacketBuffer::default();
        assert!(host.receive(&mut packet).unwrap());
        assert_eq!(packet.kind(), Kind::COMPLETION);
        assert_eq!(packet.transaction_id(), 0x77);
        assert_eq!(packet.payload(), b"12345678");
        assert!(!host.receive(&mut packet).unwrap(), "and only then");
    });
}

#[test]
fn a_packet_that_the_driver_drops_completes_all_the_same() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| drop(packet)));
    vm.host(id, |host| {
        let packet = Outgoing::in_band([b"question", &[]]);
        host.send(&packet.with_completion(5)).unwrap();
    });
    vm.host(id, |host| {
        let mut packet = PacketBuffer::default();
        assert!(host.receive(&mut packet).unwrap());
        assert_eq!(packet.transaction_id(), 5);
    });
    assert_eq!(channel.channel().counters().uncompleted_drops, 1);
}

#[test]
fn the_host_is_told_of_room_that_it_waits_for() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    // Lets packets pile up: the guest is busy at DISPATCH.
    let signals = vm.machine.at_dispatch(|| {
        vm.host(id, |host| {
            while host.push(&Outgoing::in_band([&[1; 1000], &[]])).is_ok() {}
            host.publish().unwrap();
            assert!(!host.wait_for_room(1024).unwrap());
        });
        vm.machine.signals()
    });
    assert_eq!(channel.channel().counters().packets_received, 15);
    assert_eq!(
        vm.machine.signals(),
        signals + 1,
        "once for the whole batch"
    );
}

#[test]
fn the_client_context_is_zeroed_for_each_delivery_and_aligned() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let contexts = seen.clone();
    let builder = journal
        .builder(move |_, mut packet| {
            let context = packet.client_context();
            assert_eq!(context.as_ptr().align_offset(16), 0);
            contexts.lock().unwrap().push(context.to_vec());
            context.fill(0xAA);
            packet.complete(&[]);
        })
        .client_context_size(40);
    let _channel = vm.enable(&builder);
    vm.send_all(id, 0..3);
    assert_eq!(*seen.lock().unwrap(), vec![vec![0; 40]; 3]);
}

#[test]
fn the_client_context_stays_with_a_packet_that_is_deferred_and_held() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let builder = journal
        .builder(move |_, mut packet| {
            if packet.level() == Level::Dispatch {
                packet.client_context().copy_from_slice(b"first");
                packet.defer_to_passive();
            } else {
                assert_eq!(packet.client_context(), b"first");
                packet.client_context().copy_from_slice(b"again");
                holder.lock().unwrap().push(packet.hold());
            }
        })
        .client_context_size(5);
    let _channel = vm.enable(&builder);
    vm.send_all(id, [1]);
    vm.machine.settle();
    let mut held = shelf.lock().unwrap().pop().unwrap();
    assert_eq!(held.client_context(), b"again");
    held.complete(&[]);
}

#[test]
fn without_a_size_there_is_no_client_context() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let builder = journal.builder(|_, mut packet| {
        assert_eq!(packet.client_context(), []);
        packet.complete(&[]);
    });
    let _channel = vm.enable(&builder);
    vm.send_all(id, [1]);
    assert_eq!(journal.take_numbers(), [1]);
}

#[test]
fn a_failed_packet_is_consumed_without_a_completion_and_delivery_stops_until_the_channel_is_enabled_again()
 {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let builder = journal.builder(|_, packet| {
        if number(packet.payload()) == 2 {
            packet.fail("nonsense");
        } else {
            packet.complete(&[]);
        }
    });
    let channel = vm.enable(&builder);
    journal.take();
    vm.host(id, |host| {
        for n in 1..5u64 {
            let payload = n.to_le_bytes();
            let packet = Outgoing::in_band([&payload, &[]]);
            host.push(&packet.with_completion(n)).unwrap();
        }
        host.publish().unwrap();
    });
    assert_eq!(journal.take_numbers(), [1, 2], "none after the failed one");
    assert_eq!(channel.channel().outstanding_packets(), 0);
    vm.host(id, |host| {
        let mut packet = PacketBuffer::default();
        assert!(host.receive(&mut packet).unwrap());
        assert_eq!(packet.transaction_id(), 1);
        assert!(!host.receive(&mut packet).unwrap(), "no answer to 2");
    });
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    let failure = Seen::Failure(ChannelError::Packet("nonsense"));
    assert_eq!(journal.take(), [Seen::Suspend, Seen::Closed, failure]);

    let again = vm.enable(&builder);
    assert!(is_active(&again));
    vm.send_all(id, [7]);
    assert_eq!(journal.take_numbers(), [7]);
}

/// A channel that is being suspended because of a packet that its driver holds, and a request of its own.
fn suspending(
    journal: &Journal,
) -> (
    Vm,
    vmbus::ids::ChannelId,
    vmbus::kmcl::EnabledChannel,
    Shelf,
    u64,
) {
    let (vm, id) = Vm::with_device();
    let shelf = Shelf::default();
    let holder = shelf.clone();
    let builder = journal.builder(move |_, packet| holder.lock().unwrap().push(packet.hold()));
    let channel = vm.enable(&builder);
    vm.send_all(id, [1]);
    let mut packet = channel.channel().allocate_packet().unwrap();
    let note = journal.clone();
    packet.set_completion_routine(Arc::new(move |_, answer| {
        note.note(Seen::Packet(
            answer.unwrap_or_default().to_vec(),
            Level::Passive,
        ));
    }));
    packet.send_transaction(b"question").unwrap();
    let transaction = vm.host(id, received)[0].0.unwrap();
    journal.take();
    channel.disable();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Suspending);
    assert_eq!(journal.take(), [Seen::Suspend]);
    (vm, id, channel, shelf, transaction)
}

#[test]
fn completions_are_still_taken_while_the_channel_is_suspending() {
    let journal = Journal::default();
    let (vm, id, channel, shelf, transaction) = suspending(&journal);
    vm.host(id, |host| {
        host.send(&Outgoing::completion(transaction, b"the end!"))
            .unwrap();
    });
    vm.machine.settle();
    let answer = Seen::Packet(b"the end!".to_vec(), Level::Passive);
    assert_eq!(journal.take(), [answer]);
    shelf.lock().unwrap().pop().unwrap().complete(&[]);
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    vm.assert_well_behaved();
}

#[test]
fn a_data_packet_stays_in_the_ring_while_the_channel_is_suspending_and_so_does_what_follows_it() {
    let journal = Journal::default();
    let (vm, id, channel, shelf, transaction) = suspending(&journal);
    vm.send_all(id, [2]);
    vm.host(id, |host| {
        host.send(&Outgoing::completion(transaction, b"the end!"))
            .unwrap();
    });
    vm.machine.interrupt(id);
    vm.machine.settle();
    assert_eq!(journal.take(), []);
    shelf.lock().unwrap().pop().unwrap().complete(&[]);
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    let nothing = Seen::Packet(vec![], Level::Passive);
    assert_eq!(
        journal.take(),
        [Seen::Closed, nothing],
        "the request has failed"
    );
}

#[test]
fn a_paused_channel_takes_completions_until_a_data_packet_stands_before_them() {
    open!(vm, id, journal, channel);
    let channel = channel.channel();
    let ask = |payload: &[u8]| {
        let mut packet = channel.allocate_packet().unwrap();
        let note = journal.clone();
        packet.set_completion_routine(Arc::new(move |_, answer| {
            note.note(Seen::Packet(answer.unwrap().to_vec(), Level::Passive));
        }));
        packet.send_transaction(payload).unwrap();
        vm.host(id, received)[0].0.unwrap()
    };
    let (first, second) = (ask(b"question"), ask(b"another!"));
    let _paused = channel.pause().unwrap();
    vm.machine.settle();
    assert_eq!(channel.state(), State::Paused);
    journal.take();
    vm.host(id, |host| {
        host.push(&Outgoing::completion(first, &1u64.to_le_bytes()))
            .unwrap();
        host.push(&Outgoing::in_band([&2u64.to_le_bytes(), &[]]))
            .unwrap();
        host.push(&Outgoing::completion(second, &3u64.to_le_bytes()))
            .unwrap();
        host.publish().unwrap();
    });
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [1], "the data packet stays");
    channel.start().unwrap();
    vm.machine.settle();
    assert_eq!(journal.take_numbers(), [2, 3], "in order, after the resume");
    vm.assert_well_behaved();
}

/// Whose packets take a millisecond each.
fn slow(
    percent: Option<u8>,
) -> (
    Arc<Vm>,
    vmbus::ids::ChannelId,
    Journal,
    vmbus::kmcl::EnabledChannel,
) {
    let (vm, id) = Vm::with_device();
    let vm = Arc::new(vm);
    let journal = Journal::default();
    let clock = Arc::downgrade(&vm);
    let mut builder = journal.builder(move |_, packet| {
        clock.upgrade().unwrap().machine.pass(SECOND / 1000);
        packet.complete(&[]);
    });
    if let Some(percent) = percent {
        builder = builder.allowable_dpc_cpu_usage(percent);
    }
    let channel = vm.enable(&builder);
    vm.machine.advance(SECOND);
    journal.take();
    (vm, id, journal, channel)
}

fn levels(journal: &Journal) -> Vec<Level> {
    journal
        .take()
        .into_iter()
        .filter_map(|seen| match seen {
            Seen::Packet(_, level) => Some(level),
            _ => None,
        })
        .collect()
}

#[test]
fn processing_yields_to_passive_when_its_share_of_the_time_is_spent() {
    let (vm, id, journal, channel) = slow(Some(50));
    vm.send_all(id, 0..30);
    // The clock is read every eight packets: 8 ms of a window of 10 ms are more than its half.
    assert_eq!(levels(&journal), [Level::Dispatch; 8]);
    vm.machine.settle();
    assert_eq!(levels(&journal), [Level::Passive; 22]);
    assert_eq!(channel.channel().counters().cpu_budget_stops, 1);
    assert_eq!(channel.channel().counters().budget_stops, 0);

    vm.machine.advance(SECOND);
    vm.send_all(id, [30]);
    assert_eq!(levels(&journal), [Level::Dispatch], "another window");
}

#[test]
fn an_interrupt_in_a_window_that_is_spent_is_served_at_passive() {
    let (vm, id, journal, channel) = slow(Some(10));
    vm.send_all(id, [1]);
    assert_eq!(levels(&journal), [Level::Dispatch]);
    vm.send_all(id, [2]);
    assert_eq!(levels(&journal), []);
    vm.machine.settle();
    assert_eq!(levels(&journal), [Level::Passive]);
    assert_eq!(channel.channel().counters().cpu_budget_stops, 1);
}

#[test]
fn without_a_share_processing_goes_on_at_dispatch() {
    let (vm, id, journal, channel) = slow(None);
    vm.send_all(id, 0..30);
    assert_eq!(levels(&journal), [Level::Dispatch; 30]);
    channel.channel().set_allowable_dpc_cpu_usage(50);
    vm.send_all(id, 0..30);
    assert_eq!(
        levels(&journal),
        [Level::Dispatch; 8],
        "from the next batch on"
    );
}

#[test]
fn a_share_of_more_than_everything_or_of_nothing_is_refused() {
    let (vm, _) = Vm::with_device();
    let builder = Journal::default().builder(|_, packet| packet.complete(&[]));
    for percent in [0, 101] {
        assert_eq!(
            builder
                .clone()
                .allowable_dpc_cpu_usage(percent)
                .enable(vm.vmbus.client())
                .err(),
            Some(vmbus::kmcl::ConfigError::CpuUsage(percent))
        );
    }
}

mod a_hostile_host {
    use super::*;

    /// Plays `attack` on an open channel and returns how it ended.
    fn ended_by(attack: impl FnOnce(&Vm, vmbus::ids::ChannelId)) -> (Vec<Seen>, Vm) {
        open!(vm, id, journal, channel);
        attack(&vm, id);
        vm.machine.interrupt(id);
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Disabled);
        assert!(!vm.machine.is_open(id));
        assert_eq!(vm.machine.shared_runs(), 0, "the ring memory is free");
        vm.assert_well_behaved();
        (journal.take(), vm)
    }

    fn reason(seen: &[Seen]) -> ChannelError {
        match seen {
            [Seen::Suspend, Seen::Closed, Seen::Failure(error)] => *error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn garbage_in_the_ring_fails_the_channel_with_a_reason() {
        let (seen, _) = ended_by(|vm, id| {
            vm.host(id, |host| {
                let memory = host.memory();
                memory.write(6 * 4096, &[0xFF; 64]).unwrap();
                // The producer offset of the host-to-guest ring.
                memory.write(5 * 4096, &64u32.to_le_bytes()).unwrap();
            });
        });
        assert!(matches!(
            reason(&seen),
            ChannelError::Ring(RingError::Length { .. })
        ));
    }

    #[test]
    fn an_offset_outside_the_ring_fails_the_channel() {
        let (seen, _) = ended_by(|vm, id| {
            vm.host(id, |host| {
                host.memory()
                    .write(5 * 4096, &0x8000_0000u32.to_le_bytes())
                    .unwrap();
            });
        });
        assert_eq!(
            reason(&seen),
            ChannelError::Ring(RingError::ProducerOffset(0x8000_0000))
        );
    }

    #[test]
    fn packets_before_the_broken_one_are_delivered() {
        let (seen, _) = ended_by(|vm, id| {
            vm.host(id, |host| {
                host.push(&Outgoing::in_band([b"12345678", &[]])).unwrap();
                host.publish().unwrap();
                host.take_interrupt();
                let memory = host.memory();
                memory.write(6 * 4096 + 32, &[0xFF; 64]).unwrap();
                memory.write(5 * 4096, &96u32.to_le_bytes()).unwrap();
            });
        });
        assert_eq!(
            seen[..2],
            [
                Seen::Packet(b"12345678".to_vec(), Level::Dispatch),
                Seen::Complete(1)
            ]
        );
        reason(&seen[2..]);
    }

    #[test]
    fn a_packet_that_the_driver_fails_closes_the_channel() {
        let (vm, id) = Vm::with_device();
        let journal = Journal::default();
        let channel = vm.enable(&journal.builder(|_, packet| packet.fail("a nonsense request")));
        journal.take();
        vm.send_all(id, 0..3);
        vm.machine.settle();
        let seen = journal.take();
        assert!(matches!(seen[..2], [Seen::Packet(..), Seen::Complete(1)]));
        assert_eq!(
            reason(&seen[2..]),
            ChannelError::Packet("a nonsense request")
        );
        assert_eq!(channel.channel().state(), State::Disabled);
    }

    #[test]
    fn answers_to_nothing_are_dropped_and_counted() {
        open!(vm, id, journal, channel);
        vm.host(id, |host| {
            for transaction in [0, 1, u64::MAX, 1 << 32, 1 << 32 | 1] {
                host.push(&Outgoing::completion(transaction, &[])).unwrap();
            }
            host.publish().unwrap();
        });
        assert_eq!(channel.channel().counters().unknown_completions, 5);
        assert_eq!(journal.take(), []);
        assert!(is_active(&channel));
    }

    #[test]
    fn broken_pipe_headers_fail_the_channel() {
        for (header, kind, length) in [
            ([9, 0, 0, 0, 8, 0, 0, 0], 9, 8),
            ([1, 0, 0, 0, 9, 0, 0, 0], 1, 9),
            ([1, 0, 0, 0, 255, 255, 255, 255], 1, u32::MAX),
        ] {
            open!(vm, id, journal, channel, |builder| builder.pipe());
            vm.host(id, |host| {
                host.send(&Outgoing::in_band([&header, b"12345678"]))
                    .unwrap();
            });
            vm.machine.settle();
            assert_eq!(reason(&journal.take()), ChannelError::Pipe { kind, length });
            assert_eq!(channel.channel().state(), State::Disabled);
        }
    }
}

#[test]
fn pipe_messages_lose_their_header_and_padding() {
    open!(vm, id, journal, channel, |builder| builder.pipe());
    vm.host(id, |host| {
        let header = [1, 0, 0, 0, 5, 0, 0, 0];
        host.send(&Outgoing::in_band([&header, b"hello"])).unwrap();
    });
    assert_eq!(
        journal.take(),
        [
            Seen::Packet(b"hello".to_vec(), Level::Dispatch),
            Seen::Complete(1)
        ]
    );
    channel.channel().send_message(b"you too").unwrap();
    assert_eq!(
        vm.host(id, received),
        [(None, b"\x01\0\0\0\x07\0\0\0you too\0".to_vec())]
    );
}
