//! Negotiation: each version on its own, walking down, and what has no place where it comes.

use vmbus::kmcl::ExternalData;
use vmbus_host::network::backend::Backend;
use vmbus_host::network::nvsp::Version;

use crate::guest::{FILTER, Guest, How, MAC, PEER, frame_to, rndis_control, word, words};

#[test]
fn frames_go_both_ways_at_each_version() {
    for version in Version::ALL {
        let (mut guest, peer) = Guest::new(|_| {});
        guest.set_up(version);
        for round in 0..3 {
            let ping = frame_to(PEER, MAC, &[round; 100]);
            assert_eq!(guest.send(How::Section(1), &ping, &[]), Some(1));
            assert_eq!(peer.receive().as_ref(), Some(&ping));
            let pong = frame_to(MAC, PEER, &[round; 200]);
            peer.send(&pong).unwrap();
            let frames = guest.frames();
            assert_eq!(frames.len(), 1);
            assert_eq!((&frames[0].frame, &frames[0].info[..]), (&pong, &[][..]));
        }
        let counters = guest.nic.counters();
        assert_eq!((counters.sent_frames, counters.received_frames), (3, 3));
        guest.assert_fine();
    }
}

#[test]
fn a_guest_walks_down_until_the_host_knows_the_version() {
    let (guest, _peer) = Guest::new(|config| config.newest_version = Version::V4);
    for unknown in [0x7_0000, 0x6_0002, 0x4_0001, 0, u32::MAX] {
        assert_eq!(guest.init(Version(unknown)), 0);
    }
    let refused: Vec<_> = Version::ALL
        .into_iter()
        .take_while(|version| guest.init(*version) != 1)
        .collect();
    assert_eq!(refused, [Version::V6_1, Version::V6, Version::V5]);
    guest.assert_fine();
}

#[test]
fn a_range_of_versions_is_none() {
    let (guest, _peer) = Guest::new(|_| {});
    let answer = guest.ask(&words(&[1, Version::V1.0, Version::V6_1.0]));
    assert_eq!(word(&answer, 12), 0);
}

#[test]
fn the_frame_size_decides_how_the_receive_buffer_is_divided() {
    for (frame, piece) in [
        (1514, 1806),
        (9014, 9306),
        (9216, 9508),
        // Nonsense is taken for the usual size.
        (9217, 1806),
        (1513, 1806),
        (0, 1806),
        (u32::MAX, 1806),
    ] {
        let (mut guest, _peer) = Guest::new(|_| {});
        guest.set_up_with(Version::V5, frame, 256);
        assert_eq!(guest.piece, piece, "{frame}");
    }
}

#[test]
fn a_receive_buffer_that_is_too_small_or_not_there_is_refused() {
    let (mut guest, _peer) = Guest::new(|_| {});
    guest.init(Version::V6_1);
    guest.tell(&words(&[125, 1514, 0, 0x8, 0]));
    assert_eq!(word(&guest.lend_receive(8), 4), 2);
    let answer = guest.ask(&words(&[101, 0x7777, 0xCAFE]));
    assert_eq!((word(&answer, 0), word(&answer, 4)), (102, 2));
    let answer = guest.ask(&words(&[104, 0x7777, 0]));
    assert_eq!((word(&answer, 0), word(&answer, 4)), (105, 2));
    assert_eq!(word(&guest.lend_send(1), 4), 2, "no whole section");
    // One that is large enough is taken after that.
    assert_eq!(word(&guest.lend_receive(64), 4), 1);
    assert_eq!(guest.nic.failure(), None);
}

#[test]
fn messages_that_have_no_answer_are_completed_if_the_guest_wants_it() {
    let (guest, _peer) = Guest::new(|_| {});
    guest.init(Version::V6_1);
    assert_eq!(guest.ask(&words(&[125, 1514, 0, 0x8, 0])), []);
    assert_eq!(guest.ask(&words(&[100, 6, 0x1E])), []);
    assert_eq!(guest.ask(&words(&[129, 0])), [], "data path");
}

#[test]
fn a_guest_without_a_send_buffer_sends_by_pages_alone() {
    let (mut guest, peer) = Guest::new(|_| {});
    guest.init(Version::V5);
    guest.tell(&words(&[125, 1514, 0, 0x8, 0]));
    guest.tell(&words(&[100, 6, 0x1E]));
    guest.lend_receive(64);
    guest.initialize();
    assert_eq!(guest.set(0x0001_010E, &FILTER.to_le_bytes()), 0);
    let frame = frame_to(PEER, MAC, b"pages");
    assert_eq!(guest.send(How::Pages, &frame, &[]), Some(1));
    assert_eq!(peer.receive(), Some(frame));
    guest.assert_fine();
}

#[test]
fn what_has_no_place_ends_the_channel() {
    let init = words(&[1, Version::V6_1.0, Version::V6_1.0]);
    let old = words(&[1, Version::V1.0, Version::V1.0]);
    let config = words(&[125, 1514, 0, 8, 0]);
    let ndis = words(&[100, 6, 0x1E]);
    let packet = words(&[107, 1, u32::MAX, 0]);
    for messages in [
        vec![&config],
        vec![&ndis],
        vec![&packet],
        vec![&init, &init],
        vec![&init, &config, &config],
        vec![&init, &ndis, &ndis],
        vec![&old, &config],
        vec![&init, &words(&[101, 1, 0xCAFE])],
        vec![&init, &packet],
        vec![&init, &words(&[109, 0])],
        vec![&init, &words(&[0, 0])],
        vec![&init, &words(&[u32::MAX])],
        vec![&init, &words(&[108, 1])],
    ] {
        let (guest, _peer) = Guest::new(|_| {});
        let (last, before) = messages.split_last().unwrap();
        for message in before {
            assert!(guest.try_ask(message).is_some());
            assert_eq!(guest.nic.failure(), None);
        }
        assert_eq!(guest.try_ask(last), None, "{messages:?}");
        assert!(guest.nic.failure().is_some(), "{messages:?}");
        assert_eq!(guest.nic.counters().protocol_errors, 1);
        // Nothing is served any more, until the channel is opened again.
        assert_eq!(guest.try_ask(&init), None);
    }
}

#[test]
fn rndis_begins_with_initialize() {
    let (mut guest, peer) = Guest::new(|_| {});
    guest.init(Version::V5);
    guest.tell(&words(&[125, 1514, 0, 0x8, 0]));
    guest.tell(&words(&[100, 6, 0x1E]));
    guest.lend_receive(64);
    guest.lend_send(8);
    let frame = frame_to(PEER, MAC, b"early");
    assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(2));
    assert_eq!(guest.query(0x0101_0101, &[]), Err(0xC000_0001));
    assert_eq!(guest.set(0x0001_010E, &[1, 0, 0, 0]), 0xC000_0001);
    let answer = guest.control(rndis_control(2, &[7, 2, 0, 0x4000], &[]));
    assert_eq!(word(&answer.unwrap(), 12), 0xC001_0004, "bad version");
    let answer = guest.initialize();
    let fields: Vec<_> = (8..52).step_by(4).map(|at| word(&answer, at)).collect();
    let limits = [0, 1, 0, 1, 0, 8, 256 << 10, 3, 0, 0];
    assert_eq!(fields[1..], limits);
    assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(1));
    assert_eq!(peer.receive(), Some(frame));
    guest.assert_fine();
}

#[test]
fn a_message_without_a_wish_for_an_answer_gets_none() {
    let (guest, _peer) = Guest::new(|_| {});
    guest.tell(&words(&[1, Version::V5.0, Version::V5.0]));
    // It counts all the same.
    let again = words(&[1, Version::V5.0, Version::V5.0]);
    let external = ExternalData::new();
    assert_eq!(guest.try_ask_on(guest.channel(), &again, external), None);
    assert!(guest.nic.failure().is_some());
}
