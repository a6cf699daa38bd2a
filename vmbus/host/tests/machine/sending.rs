//! Packets to the host: order, completion, and what happens to them when the channel ends.

use std::sync::{Arc, Mutex};

use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    AllocateError, Channel, ChannelError, EnabledChannel, ExternalData, PacketError, SendFailure,
    SendFlags, State,
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
    let id = vm.machine.add(device, vmbus_host::machine::Manual).unwrap();
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
