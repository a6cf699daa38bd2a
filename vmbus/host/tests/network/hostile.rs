//! Guests that send anything at all: nothing that they do ends the host, and the next guest finds it well.

use proptest::prelude::*;
use vmbus_host::network::backend::Backend;
use vmbus_host::network::nvsp::Version;

use crate::guest::{Guest, How, MAC, PEER, SECTION, frame_to, rndis_packet, words};

/// A number that a parser may stumble over.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        0u32..80,
        Just(u32::MAX),
        Just(1 << 31),
        1500u32..7000,
        any::<u32>()
    ]
}

/// Numbers, as bytes.
fn fields(most: usize) -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(number(), 1..most).prop_map(|fields| words(&fields))
}

/// The next guest gets everything.
fn assert_alive(guest: Guest, peer: &impl Backend) {
    guest.primary.disable();
    guest.vm.machine.settle();
    while peer.receive().is_some() {}
    let mut guest = guest.again();
    guest.set_up(Version::V6_1);
    let ping = frame_to(PEER, MAC, b"ping");
    assert_eq!(guest.send(How::Section(0), &ping, &[]), Some(1));
    assert_eq!(peer.receive(), Some(ping));
    let pong = frame_to(MAC, PEER, b"pong");
    peer.send(&pong).unwrap();
    assert_eq!(guest.frames().len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nvsp_messages_of_any_sort(
        set_up: bool,
        messages in proptest::collection::vec((prop_oneof![1u32..3, 100u32..136], fields(8)), 1..8),
    ) {
        let (mut guest, peer) = Guest::new(|_| {});
        if set_up {
            guest.set_up(Version::V6_1);
        }
        for (kind, fields) in messages {
            let message = [words(&[kind]), fields].concat();
            guest.try_ask(&message);
        }
        assert_alive(guest, &peer);
    }

    #[test]
    fn rndis_messages_of_any_sort(
        traffic in 0u32..2,
        messages in proptest::collection::vec((1u32..10, fields(20)), 1..8),
    ) {
        let (guest, peer) = Guest::ready();
        for (kind, fields) in messages {
            let length = fields.len() as u32 + 8;
            let message = [words(&[kind, length]), fields].concat();
            guest.deliver(How::Pages, traffic, &message, 0);
        }
        assert_alive(guest, &peer);
    }

    #[test]
    fn frames_with_any_tasks(
        frame in proptest::collection::vec(any::<u8>(), 0..200),
        like in 0..3u8,
        tasks in proptest::collection::vec((prop_oneof![Just(0u32), Just(2), Just(6), any::<u32>()], number()), 0..4),
    ) {
        let (guest, peer) = Guest::ready();
        let mut frame = frame;
        let head: &[u8] = match like {
            0 => &[0x08, 0x00, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6],
            1 => &[0x86, 0xDD, 0x60, 0, 0, 0, 0, 0, 6, 64],
            _ => &[],
        };
        for (to, from) in frame.iter_mut().skip(12).zip(head) {
            *to = *from;
        }
        guest.send(How::Pages, &frame, &tasks);
        prop_assert_eq!(guest.nic.failure(), None);
        assert_alive(guest, &peer);
    }

    #[test]
    fn a_batch_with_a_lie_in_it(at in 0usize..200, lie in number()) {
        let (guest, peer) = Guest::ready();
        let mut batch: Vec<u8> = (0..3u8)
            .flat_map(|number| rndis_packet(&frame_to(PEER, MAC, &[number]), &[(6, 16)]))
            .collect();
        let at = at.min(batch.len() - 4);
        batch[at..at + 4].copy_from_slice(&lie.to_le_bytes());
        prop_assert!(batch.len() <= SECTION);
        guest.deliver(How::Section(0), 0, &batch, 0);
        prop_assert_eq!(guest.nic.failure(), None);
        assert_alive(guest, &peer);
    }

    #[test]
    fn objects_set_to_anything(
        sets in proptest::collection::vec((proptest::sample::select(vmbus_host::network::oid::ALL), fields(50)), 1..5),
    ) {
        let (mut guest, peer) = Guest::ready();
        for (oid, mut value) in sets {
            // Objects with a header get further.
            if let Some(kind) = [(0x0001_0204, 0x89), (0xFC01_020C, 0x80)].iter().find(|(object, _)| *object == oid) {
                value[..4].copy_from_slice(&[kind.1, 2, 44, 0]);
            }
            guest.set(oid, &value);
            let _ = guest.query(oid, &value);
        }
        prop_assert_eq!(guest.nic.failure(), None);
        assert_alive(guest, &peer);
    }
}
