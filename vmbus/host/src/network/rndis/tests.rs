//! RNDIS messages: what is read is what was meant, and what lies is refused.

use alloc::vec;
use alloc::vec::Vec;

use proptest::prelude::*;

use super::*;

fn packet(frame: &[u8], info: &[u8]) -> Vec<u8> {
    let fields = [
        36 + info.len() as u32,
        frame.len() as u32,
        0,
        0,
        0,
        36,
        info.len() as u32,
        0,
        0,
    ];
    let mut data = info.to_vec();
    data.extend_from_slice(frame);
    message(kind::PACKET, &fields, &data)
}

fn element(kind: u32, value: u32) -> Vec<u8> {
    [16, kind, 12, value]
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect()
}

fn only(bytes: &[u8]) -> Result<Message<'_>, Malformed> {
    let mut messages = Messages::new(bytes);
    let first = messages.next().unwrap();
    assert!(messages.next().is_none());
    first
}

#[test]
fn per_packet_information_becomes_tasks() {
    let info = [
        element(0, 0x0001_0005),
        element(0x8000_0001, 7),
        element(6, 0x0123),
        element(2, 1 << 30 | 1460),
    ]
    .concat();
    let bytes = packet(b"frame", &info);
    let Ok(Message::Packet(packet)) = only(&bytes) else {
        panic!("no packet");
    };
    assert_eq!(packet.frame, b"frame");
    assert!(
        packet
            .tasks
            .checksum
            .is_some_and(|checksum| checksum.tcp() && !checksum.udp())
    );
    assert_eq!(packet.tasks.vlan.map(VlanTag::tci), Some(3 << 13 | 0x12));
    assert_eq!(packet.tasks.large_send.map(LargeSend::segment), Some(1460));
}

#[test]
fn a_batch_is_several_messages_each_padded() {
    let mut batch = Vec::new();
    for frame in [&b"one"[..], b"second", b"3"] {
        let mut bytes = packet(frame, &[]);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let length = bytes.len() as u32;
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        batch.extend_from_slice(&bytes);
    }
    let frames: Vec<_> = Messages::new(&batch)
        .map(|message| match message {
            Ok(Message::Packet(packet)) => packet.frame.to_vec(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(frames, [&b"one"[..], b"second", b"3"]);
}

#[test]
fn offsets_and_lengths_that_lead_out_are_refused() {
    let good = packet(b"frame", &element(0, 4));
    assert!(only(&good).is_ok());
    for (field, value) in [
        (4, 0u32),
        (4, 7),
        (4, good.len() as u32 + 1),
        (4, u32::MAX),
        (8, u32::MAX),
        (12, u32::MAX),
        (12, 22),
        (28, u32::MAX),
        (32, u32::MAX),
        (32, 11),
        (44, 0),
        (44, u32::MAX),
        (44, 17),
        (52, 14),
        (52, u32::MAX),
    ] {
        let mut bytes = good.clone();
        bytes[field..field + 4].copy_from_slice(&value.to_le_bytes());
        assert_eq!(only(&bytes), Err(Malformed), "{value:#x} at {field}");
    }
}

#[test]
fn the_data_of_an_object_is_found_by_its_offset() {
    let bytes = message(kind::SET, &[9, 0x0001_010E, 4, 20, 0], &[0xB, 0, 0, 0]);
    let set = Message::Set {
        id: 9,
        oid: 0x0001_010E,
        input: &[0xB, 0, 0, 0],
    };
    assert_eq!(only(&bytes), Ok(set));
    let empty = message(kind::QUERY, &[9, 1, 0, u32::MAX, 0], &[]);
    assert!(only(&empty).is_ok(), "nothing lies nowhere");
    let lies = message(kind::QUERY, &[9, 1, 4, 17, 0], &[]);
    assert_eq!(only(&lies), Err(Malformed));
}

#[test]
fn what_is_delivered_can_be_read() {
    let facts = Facts {
        checksum: Some(ReceiveChecksum::TCP_GOOD.and(ReceiveChecksum::IP_GOOD)),
        vlan: Some(VlanTag::from_tci(0xB123)),
        hash: Some(0x1234_5678),
    };
    let mut bytes = vec![1; 3];
    write_packet(&mut bytes, b"frame", &facts);
    assert_eq!(bytes.len(), PACKET_HEADER + 3 * INFO + 5);
    let Ok(Message::Packet(packet)) = only(&bytes) else {
        panic!("no packet");
    };
    assert_eq!(packet.frame, b"frame");
    assert_eq!(packet.tasks.vlan.map(VlanTag::tci), Some(0xB123));
    assert_eq!(packet.tasks.checksum, Some(TransmitChecksum(0x28)));
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused_and_reading_ends(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let count = Messages::new(&bytes).count();
        prop_assert!(count <= bytes.len() / 8);
    }

    #[test]
    fn messages_with_plausible_numbers_never_lead_out(
        words in proptest::collection::vec(prop_oneof![0u32..80, any::<u32>()], 2..40),
    ) {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes[0..4].copy_from_slice(&(words[0] % 9).to_le_bytes());
        for message in Messages::new(&bytes).flatten() {
            if let Message::Packet(packet) = message {
                prop_assert!(packet.frame.len() <= bytes.len());
            }
        }
    }
}
