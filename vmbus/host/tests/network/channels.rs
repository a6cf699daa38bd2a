//! Sub-channels, receive side scaling over them, and the end of channels and buffers.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use etherparse::PacketBuilder;
use vmbus::kmcl::State;
use vmbus_host::network::backend::Backend;
use vmbus_host::network::nvsp::Version;
use vmbus_host::network::rss::{KEY, Toeplitz};

use crate::guest::{Guest, How, MAC, PEER, frame_to, rndis_packet, word, words};

/// The key of Microsoft's verification suite.
const MICROSOFT: [u8; KEY] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Hash function Toeplitz over IPv4, TCP over IPv4, IPv6, TCP over IPv6.
const HASHES: u32 = 0x1701;

/// The parameters as Linux sends them: revision 2, the table behind them, then the key.
fn parameters(flags: u16, hashes: u32, table: &[u32], key: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x89, 2, 44, 0];
    bytes.extend(flags.to_le_bytes());
    bytes.extend([0, 0]);
    bytes.extend(words(&[hashes, 4 * table.len() as u32, 44]));
    bytes.extend(words(&[
        key.len() as u32,
        44 + 4 * table.len() as u32,
        0,
        0,
        0,
        0,
    ]));
    assert_eq!(bytes.len(), 44);
    bytes.extend(words(table));
    bytes.extend_from_slice(key);
    bytes
}

fn table(queues: u32) -> Vec<u32> {
    (0..128).map(|entry| entry % queues).collect()
}

fn flow(source: [u8; 4], from: u16, destination: [u8; 4], to: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(PEER, MAC)
        .ipv4(source, destination, 64)
        .tcp(from, to, 1, 1000)
        .write(&mut frame, b"data")
        .unwrap();
    frame
}

/// A guest with four channels, receiving on all.
fn spread() -> (Guest, vmbus_host::network::backend::Pair) {
    let (mut guest, peer) = Guest::ready();
    let capabilities = guest.query(0x0001_0203, &[0x88, 2, 18, 0]).unwrap();
    assert_eq!(capabilities.len(), 18);
    assert_eq!(capabilities[..4], [0x88, 2, 18, 0]);
    assert_eq!((word(&capabilities, 12), capabilities[16]), (4, 128));
    assert_eq!(guest.add_channels(7), 3, "as many as the card has");
    let off = parameters(0x10, 0, &[], &[]);
    assert_eq!(guest.set(0x0001_0204, &off), 0);
    let on = parameters(0, HASHES, &table(4), &MICROSOFT);
    assert_eq!(guest.set(0x0001_0204, &on), 0);
    (guest, peer)
}

#[test]
fn flows_go_to_the_queues_that_microsofts_hashes_say() {
    let (guest, peer) = spread();
    for (source, from, destination, to, hash) in [
        (
            [66, 9, 149, 187],
            2794,
            [161, 142, 100, 80],
            1766,
            0x51cc_c178_u32,
        ),
        (
            [199, 92, 111, 2],
            14230,
            [65, 69, 140, 83],
            4739,
            0xc626_b0ea,
        ),
        (
            [24, 19, 198, 95],
            12898,
            [12, 22, 207, 184],
            38024,
            0x5c2b_394a,
        ),
        (
            [38, 27, 205, 30],
            48228,
            [209, 142, 163, 6],
            2217,
            0xafc7_327f,
        ),
        (
            [153, 39, 163, 191],
            44251,
            [202, 188, 127, 2],
            1303,
            0x10e8_28a2,
        ),
    ] {
        let frame = flow(source, from, destination, to);
        peer.send(&frame).unwrap();
        let frames = guest.frames();
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].channel, (hash as usize & 127) % 4);
        assert_eq!(frames[0].info(8), Some(hash));
        assert_eq!(frames[0].frame, frame);
    }
    peer.send(&frame_to(MAC, PEER, b"no flow")).unwrap();
    assert_eq!(guest.frames()[0].channel, 0);
    guest.assert_fine();
}

#[test]
fn each_flow_stays_in_order_on_one_channel_and_all_channels_have_some() {
    let (guest, peer) = spread();
    for round in 0..4 {
        for port in 0..64 {
            let mut frame = flow([10, 0, 0, 1], 1000 + port, [10, 0, 0, 2], 80);
            *frame.last_mut().unwrap() = round;
            peer.send(&frame).unwrap();
        }
    }
    let mut flows: BTreeMap<Vec<u8>, Vec<(usize, u8)>> = BTreeMap::new();
    for got in guest.frames() {
        let last = *got.frame.last().unwrap();
        flows
            .entry(got.frame[34..36].to_vec())
            .or_default()
            .push((got.channel, last));
    }
    assert_eq!(flows.len(), 64);
    let hash = Toeplitz::new(MICROSOFT);
    let mut used = [0; 4];
    for (port, seen) in &flows {
        let source = Ipv4Addr::new(10, 0, 0, 1).octets();
        let input = [&source[..], &[10, 0, 0, 2], port, &[0, 80]];
        let queue = (hash.hash(input) as usize & 127) % 4;
        let expected: Vec<_> = (0..4).map(|round| (queue, round)).collect();
        assert_eq!(*seen, expected);
        used[queue] += 1;
    }
    assert!(used.iter().all(|count| *count > 0), "{used:?}");
    guest.assert_fine();
}

#[test]
fn frames_are_sent_by_any_channel() {
    let (guest, peer) = spread();
    for (index, sub) in guest.subs.iter().enumerate() {
        let frame = frame_to(PEER, MAC, &[index as u8; 99]);
        let message = rndis_packet(&frame, &[]);
        for how in [How::Section(index as u32), How::Pages] {
            assert_eq!(
                guest.deliver_on(sub.channel(), how, 0, &message, 0),
                Some(1)
            );
            assert_eq!(peer.receive().as_ref(), Some(&frame));
        }
    }
    guest.assert_fine();
    // Control messages have no place there, and one broken channel is not all of them.
    let sub = guest.subs[0].channel();
    assert_eq!(
        guest.deliver_on(sub, How::Pages, 1, &words(&[8, 12, 1]), 0),
        None
    );
    assert!(guest.nic.failure().is_some());
    let frame = frame_to(PEER, MAC, b"still");
    assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(1));
}

#[test]
fn the_guest_is_told_how_to_spread_what_it_sends() {
    for version in [Version::V5, Version::V6_1] {
        let (mut guest, _peer) = Guest::new(|_| {});
        guest.set_up(version);
        guest.add_channels(3);
        let told = guest.told();
        assert_eq!(told.len(), 1, "once, when all are open");
        let table = &told[0];
        assert_eq!((word(table, 0), word(table, 4)), (134, 16));
        let at = word(table, 8) as usize;
        let entries: Vec<_> = (0..16).map(|entry| word(table, at + 4 * entry)).collect();
        assert_eq!(entries, (0..16).map(|entry| entry % 4).collect::<Vec<_>>());
        // One is closed: the others take over.
        guest.subs[1].disable();
        let told = guest.told();
        let entries: Vec<_> = (0..16)
            .map(|entry| word(&told[0], at + 4 * entry))
            .collect();
        assert_eq!(entries[..4], [0, 1, 3, 0]);
        guest.assert_fine();
    }
}

#[test]
fn frames_for_a_channel_that_is_closed_come_by_the_primary() {
    let (guest, peer) = spread();
    guest.keep(true);
    // Hash 0xafc7327f: queue 3; 0x10e828a2: queue 2.
    let third = flow([38, 27, 205, 30], 48228, [209, 142, 163, 6], 2217);
    peer.send(&third).unwrap();
    assert_eq!(guest.frames()[0].channel, 3);
    guest.keep(false);
    guest.subs[2].disable();
    guest.vm.machine.settle();
    peer.send(&third).unwrap();
    assert_eq!(guest.frames()[0].channel, 0);
    guest.assert_fine();
}

#[test]
fn sub_channels_are_refused_to_old_versions_and_a_second_time() {
    let (mut guest, _peer) = Guest::new(|_| {});
    guest.set_up(Version::V4);
    let refused = words(&[133, 2, 0]);
    assert_eq!(guest.ask(&words(&[133, 1, 2]))[..12], refused);
    let (mut guest, _peer) = Guest::ready();
    for (operation, count) in [(0, 2), (2, 2), (1, 0)] {
        assert_eq!(guest.ask(&words(&[133, operation, count]))[..12], refused);
    }
    assert_eq!(guest.add_channels(2), 2);
    assert_eq!(guest.ask(&words(&[133, 1, 1]))[..12], refused);
    let (mut single, _peer) = Guest::ready_with(|config| config.queues = 1);
    assert_eq!(single.ask(&words(&[133, 1, 1]))[..12], refused);
    let capabilities = single.query(0x0001_0203, &[]).unwrap();
    assert_eq!(word(&capabilities, 12), 1);
}

#[test]
fn parameters_that_make_no_sense_are_refused_and_the_old_ones_stay() {
    let (mut guest, peer) = spread();
    let good = || parameters(0, HASHES, &table(4), &MICROSOFT);
    let spoil = |at: usize, value: u8| {
        let mut bytes = good();
        bytes[at] = value;
        bytes
    };
    for bytes in [
        spoil(0, 0x80),
        spoil(8, 2),
        spoil(13, 0xFF),
        spoil(12, 2),
        spoil(16, 0xFF),
        spoil(19, 0xFF),
        spoil(20, 39),
        spoil(27, 0xFF),
        parameters(0, HASHES, &table(5), &MICROSOFT),
        parameters(0, HASHES, &[], &MICROSOFT),
        parameters(0, HASHES, &[0; 129], &MICROSOFT),
        good()[..43].to_vec(),
        vec![0x89, 2],
        vec![],
    ] {
        assert_ne!(
            guest.set(0x0001_0204, &bytes),
            0,
            "{:?}",
            &bytes[..bytes.len().min(44)]
        );
    }
    let frame = flow([66, 9, 149, 187], 2794, [161, 142, 100, 80], 1766);
    peer.send(&frame).unwrap();
    assert_eq!(guest.frames()[0].info(8), Some(0x51cc_c178));
    // All to the last queue; hash and key stay what they are.
    let only = parameters(2 | 8, 0, &[3], &[]);
    assert_eq!(guest.set(0x0001_0204, &only), 0);
    peer.send(&frame).unwrap();
    let frames = guest.frames();
    assert_eq!(
        (frames[0].channel, frames[0].info(8)),
        (3, Some(0x51cc_c178))
    );
    assert_eq!(
        guest.set(0x0001_0204, &parameters(0, 0, &[], &[])),
        0,
        "off"
    );
    peer.send(&frame).unwrap();
    let frames = guest.frames();
    assert_eq!((frames[0].channel, frames[0].info(8)), (0, None));
    guest.assert_fine();
}

#[test]
fn a_revoked_buffer_is_not_touched_and_its_memory_comes_back() {
    let (mut guest, peer) = Guest::ready();
    guest.keep(true);
    peer.send(&frame_to(MAC, PEER, b"before")).unwrap();
    assert_eq!(guest.frames().len(), 1);
    assert_eq!(guest.set(0x0001_010E, &[0; 4]), 0);
    let id = guest.next_id();
    guest.deliver(How::Pages, 1, &words(&[3, 12, id]), 0);
    guest.tell(&words(&[103, 0xBEEF]));
    guest.tell(&words(&[103, 0xCAFE]));
    guest.tell(&words(&[106, 0]));
    // The host has let go, though a packet is outstanding.
    for gpadl in [guest.receive.take(), guest.send.take()] {
        let deleting = gpadl.unwrap().delete();
        guest.vm.vmbus.client().block_on(deleting).unwrap();
    }
    guest.keep(false);
    assert_eq!(guest.nic.failure(), None);
    // New ones are taken, and what is completed of the old one does not count for them.
    assert_eq!(word(&guest.lend_receive(64), 4), 1);
    assert_eq!(word(&guest.lend_send(8), 4), 1);
    guest.initialize();
    assert_eq!(guest.set(0x0001_010E, &[0x0B, 0, 0, 0]), 0);
    peer.send(&frame_to(MAC, PEER, b"after")).unwrap();
    assert_eq!(guest.frames().len(), 1);
    assert_eq!(guest.nic.failure(), None);
    guest.vm.assert_well_behaved();
}

#[test]
fn a_channel_that_is_closed_with_frames_outstanding_opens_again() {
    let (guest, peer) = spread();
    guest.keep(true);
    for port in 0..64 {
        peer.send(&flow([10, 0, 0, 1], 1000 + port, [10, 0, 0, 2], 80))
            .unwrap();
    }
    assert_eq!(guest.frames().len(), 64);
    guest.keep(false);
    guest.primary.disable();
    guest.vm.machine.settle();
    assert_eq!(guest.channel().state(), State::Disabled);
    peer.send(&frame_to(MAC, PEER, b"while closed")).unwrap();
    guest.vm.machine.settle();
    let mut guest = guest.again();
    guest.set_up(Version::V5);
    let frame = frame_to(MAC, PEER, b"again");
    peer.send(&frame).unwrap();
    let frames = guest.frames();
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0].frame, frame);
    assert_eq!(guest.add_channels(3), 3);
    assert_eq!(guest.nic.failure(), None);
    guest.vm.assert_well_behaved();
}

#[test]
fn a_card_that_is_taken_away_takes_its_channels_along() {
    let (guest, peer) = spread();
    guest.keep(true);
    for port in 0..64 {
        peer.send(&flow([10, 0, 0, 1], 1000 + port, [10, 0, 0, 2], 80))
            .unwrap();
    }
    assert_eq!(guest.frames().len(), 64);
    assert!(guest.vm.machine.rescind(guest.id));
    guest.vm.machine.settle();
    guest.keep(false);
    assert_eq!(guest.channel().state(), State::Disabled);
    assert!(
        guest
            .subs
            .iter()
            .all(|sub| sub.channel().state() == State::Disabled)
    );
    // Nobody is there to take it, and nothing happens.
    peer.send(&frame_to(MAC, PEER, b"nobody")).unwrap();
    guest.vm.machine.settle();
    guest.vm.assert_well_behaved();
}
