//! Packets to the host: order, completion, and what happens to them when the channel ends.

use std::sync::{Arc, Mutex};

use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    AllocateError, Channel, ChannelError, EnabledChannel, ExternalData, MessageError, PacketError,
    RequestError, SendFailure, SendFlags, State, Timeout,
};
use vmbus::ring::{Outgoing, PacketBuffer};

use crate::support::{Journal, Vm, is_active, number, received};

type Ends = Arc<Mutex<Vec<(u64, Result<Vec<u8>, PacketError>)>>>;

struct Open {
    vm: Vm,
    id: ChannelId,
    channel: EnabledChannel,
    ends: Ends,
}

/// A guest with an open channel of few and large packets.
fn open() -> Open {
    open_answering(&[])
}

/// The same, with this answer to every packet of the host.
fn open_answering(answer: &'static [u8]) -> Open {
    let (vm, id) = Vm::with_device();
    let builder = Journal::default()
        .builder(move |_, packet| packet.complete(answer))
        .ring_pages(1, 1)
        .maximum_packet_size(2000)
        .maximum_packet_count(16);
    let channel = vm.enable(&builder);
    assert!(is_active(&channel));
    Open {
        vm,
        id,
        channel,
        ends: Ends::default(),
    }
}

impl Open {
    fn channel(&self) -> &Channel {
        self.channel.channel()
    }

    /// Sends a packet of `length` bytes that begins with `n`, and notes its end.
    fn send(&self, n: u64, length: usize, transaction: bool) {
        let mut packet = self.channel().allocate_packet().unwrap();
        let ends = self.ends.clone();
        packet.set_completion_routine(Arc::new(move |_packet, result| {
            let result = result.map(<[u8]>::to_vec);
            ends.lock().unwrap().push((n, result));
        }));
        let mut data = vec![0; length];
        data[..8].copy_from_slice(&n.to_le_bytes());
        if transaction {
            packet.send_transaction(&data).unwrap();
        } else {
            packet.send(&data).unwrap();
        }
    }

    fn take_ends(&self) -> Vec<(u64, Result<Vec<u8>, PacketError>)> {
        std::mem::take(&mut *self.ends.lock().unwrap())
    }

    fn ended(&self) -> Vec<u64> {
        self.take_ends().into_iter().map(|(n, _)| n).collect()
    }

    /// What the host receives now: numbers and transaction ids.
    fn receive(&self) -> Vec<(u64, Option<u64>)> {
        let packets = self.vm.host(self.id, received);
        packets
            .into_iter()
            .map(|(id, payload)| (number(&payload), id))
            .collect()
    }

    fn numbers(&self) -> Vec<u64> {
        self.receive().into_iter().map(|(n, _)| n).collect()
    }
}

#[test]
fn a_message_ends_when_it_has_entered_the_ring() {
    let open = open();
    open.send(1, 8, false);
    assert_eq!(open.take_ends(), [(1, Ok(vec![]))], "before send returned");
    assert_eq!(open.numbers(), [1]);
}

#[test]
fn a_transaction_ends_with_the_answer_of_the_host() {
    let open = open();
    open.send(1, 8, true);
    open.send(2, 8, true);
    assert_eq!(open.take_ends(), []);
    let sent = open.receive();
    open.vm.host(open.id, |host| {
        for (n, id) in sent.iter().rev() {
            let answer = (n * 10).to_le_bytes();
            host.push(&Outgoing::completion(id.unwrap(), &answer))
                .unwrap();
            // A host that answers twice finds nobody.
            host.push(&Outgoing::completion(id.unwrap(), &answer))
                .unwrap();
        }
        host.publish().unwrap();
    });
    let answer = |n: u64| Ok(n.to_le_bytes().to_vec());
    assert_eq!(open.take_ends(), [(2, answer(20)), (1, answer(10))]);
    assert_eq!(open.channel().counters().unknown_completions, 2);
}

#[test]
fn a_late_answer_does_not_end_the_next_use_of_the_packet() {
    let open = open();
    open.send(1, 8, true);
    let first = open.receive()[0].1.unwrap();
    open.vm.host(open.id, |host| {
        host.send(&Outgoing::completion(first, &[])).unwrap();
    });
    assert_eq!(open.ended(), [1]);
    open.send(2, 8, true);
    open.vm.host(open.id, |host| {
        host.send(&Outgoing::completion(first, &[])).unwrap();
    });
    assert_eq!(open.ended(), [] as [u64; 0]);
}

#[test]
fn a_full_ring_keeps_the_order() {
    let open = open();
    // Two large ones fit; the third waits, and the small ones behind it do not overtake it.
    for n in 0..3 {
        open.send(n, 1900, false);
    }
    for n in 3..8 {
        open.send(n, 8, false);
    }
    assert_eq!(open.ended(), [0, 1], "what waits has not ended");
    open.vm.machine.settle();
    assert_eq!(open.numbers(), [0, 1]);
    assert_eq!(
        open.ended(),
        (2..8).collect::<Vec<_>>(),
        "the host told of the room that the guest waits for"
    );
    assert_eq!(open.numbers(), (2..8).collect::<Vec<_>>());
    assert_eq!(open.channel().counters().ring_full_waits, 1);
    open.vm.assert_well_behaved();
}

#[test]
fn the_wish_for_room_is_renewed_after_a_partial_drain() {
    let open = open();
    for n in 0..7 {
        open.send(n, 1900, false);
    }
    open.vm.machine.settle();
    let mut seen = Vec::new();
    for _ in 0..7 {
        // One packet at a time: each must lead to the next signal.
        open.vm.host(open.id, |host| {
            let mut packet = PacketBuffer::default();
            if host.receive(&mut packet).unwrap() {
                seen.push(number(packet.payload()));
            }
            host.release().unwrap();
        });
    }
    assert_eq!(seen, (0..7).collect::<Vec<_>>());
    assert_eq!(open.ended(), (0..7).collect::<Vec<_>>());
}

#[test]
fn a_host_that_does_not_signal_room_is_polled() {
    let open = open();
    // Clears the feature bit in the host's outgoing ring.
    open.vm.host(open.id, |host| {
        host.memory().write(2 * 4096 + 64, &[0; 4]).unwrap();
    });
    for n in 0..4 {
        open.send(n, 1900, false);
    }
    open.vm.machine.settle();
    assert!(open.vm.vmbus.deadline().is_some());
    open.vm.host(open.id, |host| {
        received(host);
        host.take_interrupt();
    });
    assert_eq!(open.ended(), [0, 1]);
    open.vm.machine.advance(100_000);
    assert_eq!(open.ended(), [2, 3]);
    assert_eq!(open.vm.vmbus.deadline(), None, "and then no more");
}

#[test]
fn only_the_first_packet_in_an_empty_ring_is_signalled() {
    let open = open();
    let signals = open.vm.machine.signals();
    for n in 0..5 {
        open.send(n, 8, false);
    }
    assert_eq!(open.vm.machine.signals(), signals + 1);
    assert_eq!(open.channel().counters().signals_suppressed, 4);
}

#[test]
fn packets_are_limited_and_come_back() {
    let open = open();
    let packets: Vec<_> = (0..16)
        .map(|_| open.channel().allocate_packet().unwrap())
        .collect();
    assert_eq!(
        open.channel().allocate_packet().unwrap_err(),
        AllocateError::TooMany { maximum: 16 }
    );
    drop(packets);
    open.channel().allocate_packet().unwrap();
}

#[test]
fn a_refused_send_gives_the_packet_back_and_does_not_end_it() {
    let open = open();
    let ends = open.ends.clone();
    let mut packet = open.channel().allocate_packet().unwrap();
    packet.set_completion_routine(Arc::new(move |_, _| {
        ends.lock().unwrap().push((0, Ok(vec![])));
    }));
    let error = packet.send(&[0; 2001]).unwrap_err();
    assert_eq!(
        error.reason,
        SendFailure::TooLong {
            length: 2001,
            maximum: 2000
        }
    );
    let error = error
        .packet
        .send_with_external_data(b"no data", ExternalData::new(), SendFlags::default())
        .unwrap_err();
    assert_eq!(error.reason, SendFailure::NoExternalData);
    assert_eq!(open.ended(), [] as [u64; 0]);
    error.packet.send(b"12345678").unwrap();
    assert_eq!(open.ended(), [0]);
}

#[test]
fn lent_memory_reaches_the_host_and_comes_back_with_the_answer() {
    let (vm, id) = Vm::with_device();
    let builder = Journal::default()
        .builder(|_, packet| packet.complete(&[]))
        .maximum_external_data(8200, 1);
    let channel = vm.enable(&builder);
    let pages = vmbus::kmcl::SharedPages::from_heap(vmbus::kmcl::PageNumber(0x77), 3).unwrap();
    let mut external = ExternalData::new();
    external.push(pages.clone(), 100..8300).unwrap();
    let back = Arc::new(Mutex::new(None));
    let keep = back.clone();
    let mut packet = channel.channel().allocate_packet().unwrap();
    packet.set_completion_routine(Arc::new(move |mut packet, _| {
        *keep.lock().unwrap() = Some(packet.take_external_data());
    }));
    packet
        .send_with_external_data(b"command!", external, SendFlags::default())
        .unwrap();
    let transaction = vm.host(id, |host| {
        let mut packet = PacketBuffer::default();
        assert!(host.receive(&mut packet).unwrap());
        let ranges: Vec<_> = packet
            .gpa_ranges()
            .unwrap()
            .map(|range| {
                let pages: Vec<_> = range.pages().map(|page| page.0).collect();
                (range.offset, range.length, pages)
            })
            .collect();
        assert_eq!(ranges, [(100, 8200, vec![0x77, 0x78, 0x79])]);
        assert_eq!(packet.payload(), b"command!");
        packet.transaction_id()
    });
    assert_eq!(pages.handle_count(), 2, "the library holds it");
    vm.host(id, |host| {
        host.send(&Outgoing::completion(transaction, &[])).unwrap();
    });
    assert!(back.lock().unwrap().is_some());
}

/// Every packet ends exactly once, with a reason, and only after the host has let go.
fn all_fail(open: &Open, reason: ChannelError) {
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Disabled);
    let mut ends = open.take_ends();
    ends.sort_by_key(|(n, _)| *n);
    let failed: Vec<_> = (0..8)
        .map(|n| (n, Err(PacketError::Removed(reason))))
        .collect();
    assert_eq!(ends, failed);
    let error = open.channel().allocate_packet().unwrap().send(b"late");
    assert_eq!(error.unwrap_err().reason, SendFailure::NotOpen);
    assert_eq!(open.vm.machine.shared_runs(), 0);
    open.vm.assert_well_behaved();
}

/// A channel with transactions in the ring, read by the host, and waiting for room.
fn busy() -> Open {
    let open = open();
    open.send(0, 8, true);
    assert_eq!(open.numbers(), [0]);
    for n in 1..8 {
        open.send(n, 1900, true);
    }
    assert_eq!(open.ended(), [] as [u64; 0]);
    open
}

#[test]
fn disabling_ends_every_packet_once() {
    let open = busy();
    open.channel.disable();
    all_fail(&open, ChannelError::Disabled);
}

#[test]
fn a_rescind_ends_every_packet_once() {
    let open = busy();
    assert!(open.vm.machine.rescind(open.id));
    all_fail(&open, ChannelError::Rescinded);
}

#[test]
fn unloading_ends_every_packet_once() {
    let open = busy();
    open.vm.vmbus.begin_unload();
    all_fail(&open, ChannelError::Unloaded);
}

#[test]
fn packets_end_only_when_the_host_has_let_go() {
    let open = busy();
    use vmbus::protocol::MessageType;
    use vmbus_host::bus::{Fault, Rule};
    open.vm.machine.server(|server| {
        server.inject(Rule::once(
            MessageType::GPADL_TORNDOWN,
            Fault::Delay(10_000_000),
        ));
    });
    open.channel.disable();
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Closing);
    assert_eq!(open.ended(), [] as [u64; 0]);
    assert_eq!(open.vm.machine.shared_runs(), 1);
    open.vm.machine.advance(20_000_000);
    all_fail(&open, ChannelError::Disabled);
}

#[test]
fn packets_sent_before_the_channel_is_open_wait_for_it() {
    let vm = Vm::new(vmbus_host::bus::Profile::qemu());
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    for n in 0..3u64 {
        channel.channel().send_message(&n.to_le_bytes()).unwrap();
    }
    let device = vmbus_host::bus::Device::new(crate::support::INTERFACE, crate::support::INSTANCE);
    let id = vm
        .machine
        .add(device, vmbus_host::provider::Manual)
        .unwrap();
    vm.connect();
    assert!(is_active(&channel));
    let payloads: Vec<_> = vm
        .host(id, received)
        .into_iter()
        .map(|(_, p)| number(&p))
        .collect();
    assert_eq!(payloads, [0, 1, 2]);
}

#[test]
fn answers_wait_in_order_when_the_ring_is_full() {
    let open = open_answering(&[7; 500]);
    // Fills the outgoing ring.
    open.send(0, 1900, false);
    open.send(1, 1900, false);
    open.vm.host(open.id, |host| {
        for id in 10..14 {
            let question = Outgoing::in_band([&[0; 200], &[]]);
            host.push(&question.with_completion(id)).unwrap();
        }
        host.publish().unwrap();
    });
    open.send(2, 100, false);
    open.vm.machine.settle();
    assert_eq!(
        open.channel().outstanding_packets(),
        0,
        "the quota is not touched"
    );
    let mut seen = Vec::new();
    let mut packet = PacketBuffer::default();
    open.vm.host(open.id, |host| {
        while host.receive(&mut packet).unwrap() {
            seen.push((packet.kind(), packet.transaction_id()));
        }
        host.release().unwrap();
    });
    open.vm.host(open.id, |host| {
        while host.receive(&mut packet).unwrap() {
            seen.push((packet.kind(), packet.transaction_id()));
        }
        host.release().unwrap();
    });
    use vmbus::ring::Kind;
    assert_eq!(
        seen,
        [
            (Kind::IN_BAND, 0),
            (Kind::IN_BAND, 0),
            (Kind::COMPLETION, 10),
            (Kind::COMPLETION, 11),
            (Kind::COMPLETION, 12),
            (Kind::COMPLETION, 13),
            (Kind::IN_BAND, 0),
        ]
    );
}

// What the open-source client of the same bus gets wrong (spec kmcl.md 4.3): each defect and what happens here.

/// Where a control page tells how much room the producer waits for (spec vmbus.md 6.1).
const PENDING_SEND_SIZE: usize = 12;

/// The consumer's offset in the guest's outgoing ring becomes nonsense.
fn break_outgoing_ring(open: &Open) {
    open.vm.host(open.id, |host| {
        host.memory().write(4, &[0xFF; 4]).unwrap();
    });
}

#[test]
fn emcl_1_a_write_that_fails_ends_its_packet_exactly_once() {
    let open = open();
    open.send(0, 8, true);
    open.send(1, 1900, false);
    open.send(2, 1900, false);
    assert_eq!(open.ended(), [1, 2]);
    break_outgoing_ring(&open);
    let ends = open.ends.clone();
    let mut packet = open.channel().allocate_packet().unwrap();
    packet.set_completion_routine(Arc::new(move |_, _| {
        ends.lock().unwrap().push((3, Ok(vec![])));
    }));
    let error = packet.send(&[0; 1900]).unwrap_err();
    assert!(matches!(error.reason, SendFailure::Ring(_)), "{error}");
    drop(error);
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Disabled);
    assert_eq!(open.ended(), [0], "the one that was lost, once");
}

#[test]
fn emcl_1_a_write_from_the_queue_that_fails_ends_its_packets_exactly_once() {
    let open = open();
    open.send(0, 1900, false);
    open.send(1, 1900, false);
    let large = [0; 1900];
    let request = open
        .channel()
        .request(&large, ExternalData::new(), Timeout::Never);
    // Fits the room that was free when it was last looked for; the one behind it does not.
    open.send(3, 100, false);
    open.send(4, 1900, true);
    open.vm.machine.settle();
    assert_eq!(open.ended(), [0, 1]);
    break_outgoing_ring(&open);
    drop(request);
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Disabled);
    let mut ends = open.take_ends();
    ends.sort_by_key(|(n, _)| *n);
    assert!(
        matches!(
            ends[..],
            [
                (3, Err(PacketError::Removed(ChannelError::Ring(_)))),
                (4, Err(PacketError::Removed(ChannelError::Ring(_))))
            ]
        ),
        "{ends:?}"
    );
}

#[test]
fn emcl_2_a_small_packet_does_not_overtake_queued_large_ones() {
    let open = open();
    for n in 0..4 {
        open.send(n, 1900, false);
    }
    for n in 4..6 {
        open.send(n, 8, n % 2 == 0);
    }
    assert!(open.channel().try_send(&6u64.to_le_bytes()).is_err());
    let mut seen = Vec::new();
    while seen.len() < 6 {
        open.vm.machine.settle();
        let numbers = open.numbers();
        assert!(!numbers.is_empty(), "after {seen:?}");
        seen.extend(numbers);
    }
    assert_eq!(seen, (0..6).collect::<Vec<_>>());
}

#[test]
fn emcl_3_a_later_send_does_not_wipe_the_wish_for_room() {
    let open = open();
    for n in 0..3 {
        open.send(n, 1900, false);
    }
    open.vm.machine.settle();
    let wish = || {
        open.vm.host(open.id, |host| {
            let field = host.memory().atomic_u32(PENDING_SEND_SIZE).unwrap();
            field.load(std::sync::atomic::Ordering::SeqCst)
        })
    };
    assert_eq!(wish(), 1904 + 24);
    open.send(3, 8, false);
    assert!(open.channel().try_send(&4u64.to_le_bytes()).is_err());
    assert_eq!(wish(), 1904 + 24);
    assert_eq!(open.numbers(), [0, 1]);
    assert_eq!(
        open.ended(),
        [0, 1, 2, 3],
        "the host has signalled, and nobody else"
    );
    assert_eq!(wish(), 0);
}

#[test]
fn emcl_4_what_waits_is_bounded_by_the_packet_count() {
    let open = open();
    let mut accepted = 0;
    let refused = loop {
        match open.channel().send_message(&[0; 1900]) {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(
        refused,
        MessageError::Allocate(AllocateError::TooMany { maximum: 16 })
    );
    assert_eq!(accepted, 16 + 2, "two have entered the ring");
}

#[test]
fn emcl_5_closing_ends_what_waits_and_wakes_who_waits() {
    let open = busy();
    let asking = open.channel().clone();
    assert!(open.vm.machine.rescind(open.id));
    let answer =
        asking.send_synchronous_request(&[0; 8], ExternalData::new(), Timeout::Never, &mut []);
    assert_eq!(answer, Err(RequestError::Removed(ChannelError::Rescinded)));
    all_fail(&open, ChannelError::Rescinded);
}

// Traps (spec kmcl.md 6.3).

#[test]
fn a_full_quota_with_both_rings_full_is_no_deadlock() {
    let (vm, id) = Vm::with_device();
    let shelf = crate::support::Shelf::default();
    let holder = shelf.clone();
    let builder = Journal::default()
        .builder(move |_, packet| holder.lock().unwrap().push(packet.hold()))
        .ring_pages(1, 1)
        .maximum_packet_size(2000)
        .transaction_quota(2);
    let channel = vm.enable(&builder);
    // The guest's ring is full, and the host reads nothing before it has written all that it has to say.
    for n in 0..3u64 {
        let mut data = [0; 1900];
        data[..8].copy_from_slice(&n.to_le_bytes());
        channel.channel().send_message(&data).unwrap();
    }
    let mut written = 0u64;
    let mut rounds = 0;
    while written < 40 {
        vm.host(id, |host| {
            loop {
                let question = Outgoing::in_band([&[0; 400], &[]]).with_completion(100 + written);
                match host.push(&question) {
                    Ok(()) => written += 1,
                    Err(vmbus::ring::PushError::Full { need }) => {
                        host.publish().unwrap();
                        host.wait_for_room(need).unwrap();
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
                if written == 40 {
                    host.publish().unwrap();
                    break;
                }
            }
        });
        vm.machine.settle();
        assert!(channel.channel().outstanding_packets() <= 2);
        for packet in std::mem::take(&mut *shelf.lock().unwrap()) {
            packet.complete(b"answer!!");
        }
        vm.machine.settle();
        rounds += 1;
        assert!(rounds < 100, "stuck after {written} packets");
    }
    while channel.channel().outstanding_packets() > 0 {
        for packet in std::mem::take(&mut *shelf.lock().unwrap()) {
            packet.complete(b"answer!!");
        }
        vm.machine.settle();
    }
    let mut seen = Vec::new();
    let mut packet = PacketBuffer::default();
    while seen.len() < 43 {
        let before = seen.len();
        vm.host(id, |host| {
            while host.receive(&mut packet).unwrap() {
                seen.push(packet.transaction_id());
            }
            host.release().unwrap();
        });
        vm.machine.settle();
        assert!(seen.len() > before, "{seen:?}");
    }
    let mut expected = vec![0; 3];
    expected.extend(100..140);
    assert_eq!(seen, expected);
    vm.assert_well_behaved();
}

#[test]
fn a_completion_is_owed_even_when_none_was_requested() {
    let (vm, id) = Vm::with_device();
    let shelf = crate::support::Shelf::default();
    let holder = shelf.clone();
    let builder = Journal::default()
        .builder(move |_, packet| holder.lock().unwrap().push(packet.hold()))
        .transaction_quota(1);
    let channel = vm.enable(&builder);
    vm.send_all(id, 0..2);
    assert_eq!(channel.channel().outstanding_packets(), 1);
    let first = shelf.lock().unwrap().pop().unwrap();
    assert!(!first.completion_requested());
    channel.disable();
    vm.machine.settle();
    assert_eq!(
        channel.channel().state(),
        State::Suspending,
        "closing waits for it"
    );
    first.complete(b"ignored!");
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
}

// The end of the channel (spec kmcl.md 3, 16 to 18, and 6.1, 17).

#[test]
fn lent_memory_comes_back_only_when_the_host_has_let_go() {
    for reason in [
        ChannelError::Disabled,
        ChannelError::Rescinded,
        ChannelError::Unloaded,
    ] {
        let (vm, id) = Vm::with_device();
        let journal = Journal::default();
        let builder = journal
            .builder(|_, packet| packet.complete(&[]))
            .maximum_external_data(4096, 1);
        let channel = vm.enable(&builder);
        let page = vmbus::kmcl::SharedPages::from_heap(vmbus::kmcl::PageNumber(0x77), 1).unwrap();
        let mut external = ExternalData::new();
        external.push(page.clone(), 0..4096).unwrap();
        let ends = Arc::new(Mutex::new(Vec::new()));
        let notes = ends.clone();
        let mut packet = channel.channel().allocate_packet().unwrap();
        packet.set_completion_routine(Arc::new(move |mut packet, result| {
            let back = packet.take_external_data().len();
            let state = packet.channel().state();
            notes.lock().unwrap().push((result.map(drop), back, state));
        }));
        packet
            .send_with_external_data(b"command!", external, SendFlags::default())
            .unwrap();
        vm.host(id, received);
        use vmbus::protocol::MessageType;
        use vmbus_host::bus::{Fault, Rule};
        for message in [MessageType::GPADL_TORNDOWN, MessageType::UNLOAD_COMPLETE] {
            vm.machine
                .server(|server| server.inject(Rule::once(message, Fault::Delay(10_000_000))));
        }
        match reason {
            ChannelError::Disabled => channel.disable(),
            ChannelError::Rescinded => assert!(vm.machine.rescind(id)),
            _ => vm.vmbus.begin_unload(),
        }
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Closing, "{reason}");
        assert!(journal.take().contains(&crate::support::Seen::Closed));
        assert_eq!(*ends.lock().unwrap(), [], "{reason}");
        assert_eq!(page.handle_count(), 2, "{reason}");
        vm.machine.advance(20_000_000);
        let failed = Err(PacketError::Removed(reason));
        assert_eq!(*ends.lock().unwrap(), [(failed, 4096, State::Closing)]);
        assert_eq!(channel.channel().state(), State::Disabled, "{reason}");
        assert_eq!(page.handle_count(), 1, "{reason}");
        vm.assert_well_behaved();
    }
}

#[test]
fn lent_memory_does_not_come_back_from_a_host_that_never_lets_go() {
    let (vm, id) = Vm::with_device();
    let builder = Journal::default()
        .builder(|_, packet| packet.complete(&[]))
        .maximum_external_data(4096, 1);
    let channel = vm.enable(&builder);
    let page = vmbus::kmcl::SharedPages::from_heap(vmbus::kmcl::PageNumber(0x77), 1).unwrap();
    let mut external = ExternalData::new();
    external.push(page.clone(), 0..4096).unwrap();
    let back = Arc::new(Mutex::new(None));
    let note = back.clone();
    let mut packet = channel.channel().allocate_packet().unwrap();
    packet.set_completion_routine(Arc::new(move |mut packet, result| {
        let external = packet.take_external_data();
        *note.lock().unwrap() = Some((result.map(drop), external.len()));
    }));
    packet
        .send_with_external_data(b"command!", external, SendFlags::default())
        .unwrap();
    vm.host(id, received);
    use vmbus::protocol::MessageType;
    use vmbus_host::bus::{Fault, Rule};
    vm.machine
        .server(|server| server.inject(Rule::always(MessageType::UNLOAD_COMPLETE, Fault::Drop)));
    vm.vmbus.begin_unload();
    vm.machine.advance(600_000_000);
    assert_eq!(channel.channel().state(), State::Disabled);
    let failed = Err(PacketError::Removed(ChannelError::Unloaded));
    assert_eq!(*back.lock().unwrap(), Some((failed, 0)), "it has ended");
    assert_eq!(page.handle_count(), 2, "and the library keeps the memory");
}

#[test]
fn outgoing_transactions_survive_a_pause() {
    let open = open();
    open.send(0, 8, true);
    let request = open
        .channel()
        .request(&[1; 8], ExternalData::new(), Timeout::Never);
    let ids = open.receive();
    let _paused = open.channel().pause().unwrap();
    open.vm.machine.settle();
    assert_eq!(open.channel().state(), State::Paused);
    assert_eq!(open.ended(), [] as [u64; 0]);
    open.send(2, 8, false);
    assert_eq!(open.numbers(), [] as [u64; 0], "it waits for the resume");
    open.vm.host(open.id, |host| {
        for (_, id) in &ids {
            host.push(&Outgoing::completion(id.unwrap(), &[])).unwrap();
        }
        host.publish().unwrap();
    });
    open.channel().start().unwrap();
    open.vm.machine.settle();
    assert_eq!(open.ended(), [0, 2]);
    let answer = open.channel().client().block_on(request).unwrap();
    assert!(answer.is_ok());
    assert_eq!(open.numbers(), [2]);
}

#[test]
fn a_channel_is_drained_when_the_host_has_read_all() {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
    let channel = channel.channel();
    assert!(channel.is_drained());
    channel.send_message(&[1; 8]).unwrap();
    channel.send_message(&[2; 8]).unwrap();
    assert!(!channel.is_drained());
    assert_eq!(vm.host(id, received).len(), 2);
    assert!(channel.is_drained());
}
