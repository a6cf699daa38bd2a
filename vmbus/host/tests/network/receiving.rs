//! The way of frames to the guest: filter, offloads, and the pieces of the receive buffer.

use std::collections::BTreeSet;

use vmbus_host::network::backend::Backend;
use vmbus_host::network::nvsp::Version;
use vmbus_host::network::offload::insert_tag;
use vmbus_host::network::rndis::VlanTag;

use crate::guest::{Guest, How, MAC, PEER, frame_to, word, words};
use crate::sending::tcp;

/// Offload parameters: both ways of every checksum, large send on.
pub const OFFLOADS: [u8; 28] = [
    0x80, 3, 28, 0, 4, 4, 4, 4, 4, 1, 1, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// The same frame, the other way.
pub fn turned(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..12].rotate_left(6);
    frame
}

#[test]
fn frames_that_come_together_go_in_one_packet() {
    let (guest, peer) = Guest::ready();
    for number in 0..40u8 {
        peer.send(&frame_to(MAC, PEER, &[number; 100])).unwrap();
    }
    let frames = guest.frames();
    assert_eq!(frames.len(), 40);
    assert!(
        (0..)
            .zip(&frames)
            .all(|(number, got)| got.frame[14] == number)
    );
    assert_eq!((frames[0].together, frames[39].together), (32, 8));
    let places: BTreeSet<_> = frames.iter().map(|got| got.offset).collect();
    assert_eq!(places.len(), 40, "each has its own piece");
    assert!(places.iter().all(|offset| offset % guest.piece == 0));
    guest.assert_fine();
}

#[test]
fn the_filter_decides_what_comes() {
    let (mut guest, peer) = Guest::ready();
    let group = [0x01, 0x00, 0x5E, 0, 0, 1];
    let listed = [0x33, 0x33, 0, 0, 0, 9];
    let to = [MAC, PEER, [0xFF; 6], group, listed];
    assert_eq!(guest.set(0x0101_0103, &listed), 0);
    for (filter, wanted) in [
        (0x00, vec![]),
        (0x01, vec![MAC]),
        (0x02, vec![listed]),
        (0x04, vec![group, listed]),
        (0x08, vec![[0xFF; 6]]),
        (0x0B, vec![MAC, [0xFF; 6], listed]),
        (0x0D, vec![MAC, [0xFF; 6], group, listed]),
        (0x20, to.to_vec()),
    ] {
        assert_eq!(guest.set(0x0001_010E, &u32::to_le_bytes(filter)), 0);
        for to in to {
            peer.send(&frame_to(to, PEER, b"")).unwrap();
        }
        let came: Vec<_> = guest
            .frames()
            .iter()
            .map(|got| got.frame[..6].to_vec())
            .collect();
        assert_eq!(came, wanted, "{filter:#x}");
    }
    assert!(guest.nic.counters().received_filtered > 0);
    guest.assert_fine();
}

#[test]
fn checksums_are_told_about_when_the_guest_wants_it_and_true() {
    let (mut guest, peer) = Guest::ready();
    let good = turned(tcp(b"data", false));
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    let six = turned(tcp(b"data", true));
    let info = |guest: &Guest| {
        for frame in [&good, &bad, &six, &frame_to(MAC, PEER, b"other")] {
            peer.send(frame).unwrap();
        }
        let frames = guest.frames();
        frames.iter().map(|got| got.info(0)).collect::<Vec<_>>()
    };
    assert_eq!(info(&guest), [None; 4], "off");
    assert_eq!(guest.set(0xFC01_020C, &OFFLOADS), 0);
    assert_eq!(info(&guest), [Some(0x28), Some(0x21), Some(0x08), None]);
    // TCP over IPv4 for sending only, nothing of IPv6.
    let mut some = OFFLOADS;
    some[5] = 2;
    some[7] = 1;
    assert_eq!(guest.set(0xFC01_020C, &some), 0);
    assert_eq!(info(&guest), [Some(0x20), Some(0x20), None, None]);
    guest.assert_fine();
}

#[test]
fn tags_come_from_the_side_if_the_guest_takes_them_so() {
    let plain = turned(tcp(&[5; 1460], false));
    assert_eq!(plain.len(), 1514);
    let mut tagged = plain.clone();
    insert_tag(&mut tagged, VlanTag::from_tci(0x6123));
    let (mut guest, peer) = Guest::ready();
    guest.set(0xFC01_020C, &OFFLOADS);
    peer.send(&tagged).unwrap();
    let frames = guest.frames();
    assert_eq!(frames[0].frame, plain);
    assert_eq!(frames[0].info(6), Some(3 | 0x123 << 4));
    assert_eq!(frames[0].info(0), Some(0x28), "verified behind the tag");
    // Version 1 has no means to say that it does.
    let (mut old, peer) = Guest::new(|_| {});
    old.set_up(Version::V1);
    peer.send(&tagged).unwrap();
    let frames = old.frames();
    assert_eq!((&frames[0].frame, frames[0].info.len()), (&tagged, 0));
}

#[test]
fn frames_longer_than_the_mtu_do_not_come() {
    let (guest, peer) = Guest::ready();
    peer.send(&frame_to(MAC, PEER, &[0; 1501])).unwrap();
    peer.send(&frame_to(MAC, PEER, &[0; 1500])).unwrap();
    let frames = guest.frames();
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0].frame.len(), 1514);
    assert_eq!(guest.nic.counters().received_oversized, 1);
    let (mut jumbo, peer) = Guest::new(|_| {});
    jumbo.set_up_with(Version::V5, 9014, 128);
    peer.send(&frame_to(MAC, PEER, &[4; 9000])).unwrap();
    assert_eq!(jumbo.frames()[0].frame.len(), 9014);
    let long = frame_to(PEER, MAC, &[4; 9000]);
    assert_eq!(jumbo.send(How::Pages, &long, &[]), Some(1));
    assert_eq!(peer.receive(), Some(long));
    jumbo.assert_fine();
}

#[test]
fn a_piece_is_used_again_only_after_its_completion() {
    let (mut guest, peer) = Guest::ready();
    let count = 64 * 4096 / guest.piece as usize;
    guest.keep(true);
    for number in 0..400u32 {
        peer.send(&frame_to(MAC, PEER, &number.to_le_bytes()))
            .unwrap();
    }
    let mut frames = guest.frames();
    assert_eq!(frames.len(), count - 16, "some are for control messages");
    let places = |frames: &[crate::guest::Got]| -> BTreeSet<u32> {
        frames.iter().map(|got| got.offset).collect()
    };
    assert_eq!(places(&frames).len(), frames.len());
    // Control messages still come.
    assert_eq!(guest.query_u32(0x0001_010E), 0x0B);
    assert_eq!(guest.frames(), []);
    let first = places(&frames[..32]);
    guest.complete_kept(1);
    let more = guest.frames();
    assert_eq!(places(&more), first);
    frames.extend(more);
    guest.keep(false);
    frames.extend(guest.frames());
    let numbers: Vec<_> = frames.iter().map(|got| word(&got.frame, 14)).collect();
    assert_eq!(numbers, (0..400).collect::<Vec<_>>(), "in order, none lost");
    guest.assert_fine();
}

#[test]
fn frames_that_the_guest_has_no_room_for_wait_and_then_are_lost() {
    let (guest, peer) = Guest::ready();
    guest.keep(true);
    let send = |count: u32| {
        for _ in 0..count {
            peer.send(&frame_to(MAC, PEER, b"")).unwrap();
        }
        guest.vm.machine.settle();
    };
    send(600);
    send(600);
    assert_eq!(guest.nic.counters().received_dropped, 0, "they wait");
    guest.vm.machine.advance(2_000_000);
    let dropped = guest.nic.counters().received_dropped;
    assert!(dropped > 0, "a network does not wait for ever");
    // What is in the card's own queue comes yet.
    guest.keep(false);
    guest.vm.machine.settle();
    assert_eq!(guest.frames().len() as u64 + dropped, 1200);
    send(3);
    assert_eq!(guest.frames().len(), 3);
    guest.assert_fine();
}

#[test]
fn what_came_before_the_guest_is_not_for_it() {
    let (mut guest, peer) = Guest::new(|_| {});
    peer.send(&frame_to(MAC, PEER, b"stale")).unwrap();
    guest.set_up(Version::V5);
    assert_eq!(guest.frames(), []);
    assert_eq!(guest.nic.counters().received_filtered, 1);
    // RNDIS HALT ends it again.
    let id = guest.next_id();
    let halt = words(&[3, 12, id]);
    assert_eq!(guest.deliver(How::Pages, 1, &halt, 0), Some(1));
    peer.send(&frame_to(MAC, PEER, b"late")).unwrap();
    assert_eq!(guest.frames(), []);
}
