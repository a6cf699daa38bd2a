//! Objects, indications and RNDIS's other control messages.

use vmbus_host::network::nvsp::Version;
use vmbus_host::network::{Config, ConfigError, Nic, backend::Nowhere};

use crate::guest::{Guest, How, MAC, PEER, frame_to, rndis_control, word, words};
use crate::receiving::OFFLOADS;
use vmbus_host::network::backend::Backend;

const NOT_SUPPORTED: u32 = 0xC000_00BB;
const INVALID_DATA: u32 = 0xC001_0015;
const INVALID_LENGTH: u32 = 0xC001_0014;

#[test]
fn every_object_that_is_listed_can_be_queried_or_set() {
    let (mut guest, _peer) = Guest::ready();
    let list = guest.query(0x0001_0101, &[]).unwrap();
    let list: Vec<_> = list.chunks(4).map(|oid| word(oid, 0)).collect();
    // What Linux and Windows ask for (spec netvsc.md 7.4).
    for oid in [
        0x0101_0101,
        0x0101_0102,
        0x0001_0106,
        0x0001_010E,
        0x0001_0114,
        0x0001_0107,
        0x0001_0207,
        0xFC01_020B,
        0xFC01_020D,
        0xFC01_020C,
        0x0101_010A,
        0x0001_0203,
        0x0001_0204,
        0x0001_021B,
        0x0001_0101,
        0x0002_0216,
    ] {
        assert!(list.contains(&oid), "{oid:#x}");
    }
    for oid in list {
        if guest.query(oid, &[]).is_err() {
            // For setting only: it is known, so it says what is wrong with nothing.
            assert_ne!(guest.set(oid, &[]), NOT_SUPPORTED, "{oid:#x}");
        }
    }
    for unknown in [0, 0x0001_0202, 0x0D01_0101, u32::MAX] {
        assert_eq!(guest.query(unknown, &[]), Err(NOT_SUPPORTED));
        assert_eq!(guest.set(unknown, &[0; 4]), NOT_SUPPORTED);
    }
    assert_eq!(guest.set(0x0101_0101, &MAC), NOT_SUPPORTED, "permanent");
    guest.assert_fine();
}

#[test]
fn objects_have_the_values_of_the_card() {
    let (mut guest, _peer) = Guest::ready_with(|config| config.speed = 25_000_000_000);
    assert_eq!(guest.query(0x0101_0101, &[]).unwrap(), MAC);
    assert_eq!(guest.query(0x0101_0102, &[]).unwrap(), MAC);
    assert_eq!(guest.query_u32(0x0001_0106), 1500);
    assert_eq!(guest.query_u32(0x0001_0111), 1514);
    assert_eq!(guest.query_u32(0x0001_0114), 0);
    assert_eq!(guest.query_u32(0x0001_0107), 250_000_000);
    assert_eq!(guest.query_u32(0x0001_010E), 0x0B);
    let link = guest.query(0x0001_0207, &[]).unwrap();
    assert_eq!((link.len(), link[0], word(&link, 4)), (40, 0x80, 1));
    assert_eq!(link[16..24], 25_000_000_000u64.to_le_bytes());
    let name = guest.query(0x0002_0216, &[]).unwrap();
    assert_eq!(name[..10], [b'n', 0, b'e', 0, b't', 0, b'0', 0, 0, 0]);
    guest.assert_fine();
}

#[test]
fn the_offload_object_has_the_revision_that_version_and_guest_know() {
    for (version, asked, revision, size) in [
        (Version::V6_1, None, 3, 156),
        (Version::V6_1, Some(1), 1, 112),
        (Version::V5, Some(9), 3, 156),
        (Version::V4, Some(3), 2, 144),
        (Version::V2, None, 1, 112),
    ] {
        let (mut guest, _peer) = Guest::new(|_| {});
        guest.set_up(version);
        let input = asked.map(|revision| [0xA7, revision, 156, 0]);
        let input = input.as_ref().map_or(&[][..], |input| input);
        let object = guest.query(0xFC01_020D, input).unwrap();
        assert_eq!(object.len(), size);
        assert_eq!(object[..4], [0xA7, revision, size as u8, 0]);
        let checksums = [2, 0x155, 2, 0x155, 2, 0x55, 2, 0x55];
        assert_eq!(object[4..36], words(&checksums));
        assert_eq!(object[36..80], [0; 44], "no older large send, no IPsec");
        let large = [2, 0xF53C, 2, 2, 0xF53C, 2, 5];
        assert_eq!(object[80..108], words(&large));
        assert!(object[108..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn offloads_are_what_was_set_last() {
    let (mut guest, _peer) = Guest::ready();
    let current = |guest: &mut Guest| guest.query(0xFC01_020B, &[]).unwrap();
    assert!(current(&mut guest)[4..].iter().all(|byte| *byte == 0));
    assert_eq!(guest.set(0xFC01_020C, &OFFLOADS), 0);
    let all = guest.query(0xFC01_020D, &[]).unwrap();
    assert_eq!(current(&mut guest), all);
    // Only large send of IPv4 changes; the rest stays.
    let mut some = [0; 20];
    some[..4].copy_from_slice(&[0x80, 1, 20, 0]);
    some[11] = 1;
    assert_eq!(guest.set(0xFC01_020C, &some), 0);
    let after = current(&mut guest);
    assert_eq!((&after[4..36], word(&after, 84)), (&all[4..36], 0));
    for (at, value) in [
        (0, 0xA7),
        (4, 5),
        (8, 9),
        (9, 2),
        (10, 2),
        (11, 3),
        (12, 255),
    ] {
        let mut wrong = OFFLOADS;
        wrong[at] = value;
        assert_eq!(guest.set(0xFC01_020C, &wrong), INVALID_DATA, "{at}");
    }
    assert_eq!(guest.set(0xFC01_020C, &OFFLOADS[..15]), INVALID_LENGTH);
    assert_eq!(current(&mut guest), after, "unchanged");
}

#[test]
fn the_guest_changes_its_address_by_name() {
    let (mut guest, peer) = Guest::ready();
    let utf16 = |text: &str| {
        text.encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect::<Vec<u8>>()
    };
    let parameter = |name: &str, kind: u32, value: &str| {
        let (name, value) = (utf16(name), utf16(value));
        let fields = [20, name.len(), kind as usize, 20 + name.len(), value.len()];
        let fields = fields.map(|field| field as u32);
        [words(&fields), name, value].concat()
    };
    let new = [0x02, 0, 0, 0xAB, 0xCD, 0xEF];
    let set = parameter("NetworkAddress", 2, "020000abCDef");
    assert_eq!(guest.set(0x0001_021B, &set), 0);
    assert_eq!(guest.query(0x0101_0102, &[]).unwrap(), new);
    assert_eq!(guest.query(0x0101_0101, &[]).unwrap(), MAC);
    peer.send(&frame_to(MAC, PEER, b"old")).unwrap();
    peer.send(&frame_to(new, PEER, b"new")).unwrap();
    assert_eq!(guest.frames().len(), 1);
    for (name, kind, value, status) in [
        ("NetworkAddress", 2, "020000abcde", INVALID_DATA),
        ("NetworkAddress", 2, "0200000abcdef", INVALID_DATA),
        ("NetworkAddress", 2, "02000000000g", INVALID_DATA),
        ("NetworkAddress", 2, "010000000001", INVALID_DATA),
        ("NetworkAddress", 2, "000000000000", INVALID_DATA),
        ("NetworkAddress", 0, "020000abcdef", NOT_SUPPORTED),
        ("Something", 2, "020000abcdef", NOT_SUPPORTED),
    ] {
        let set = parameter(name, kind, value);
        assert_eq!(guest.set(0x0001_021B, &set), status, "{name} {value}");
    }
    let mut lies = parameter("NetworkAddress", 2, "020000abcdef");
    lies[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(guest.set(0x0001_021B, &lies), INVALID_LENGTH);
    assert_eq!(guest.query(0x0101_0102, &[]).unwrap(), new);
}

#[test]
fn the_guest_is_told_when_the_cable_goes_out_and_in() {
    let (mut guest, peer) = Guest::ready();
    assert_eq!(guest.message(), None, "nothing has happened");
    guest.nic.set_link(false);
    let down = words(&[7, 20, 0x4001_000C, 0, 0]);
    assert_eq!(guest.message(), Some(down.clone()));
    assert_eq!(guest.message(), None, "once");
    assert_eq!(guest.query_u32(0x0001_0114), 1);
    let link = guest.query(0x0001_0207, &[]).unwrap();
    assert_eq!(word(&link, 4), 2);
    peer.send(&frame_to(MAC, PEER, b"lost")).unwrap();
    guest.nic.set_link(true);
    assert_eq!(guest.message(), Some(words(&[7, 20, 0x4001_000B, 0, 0])));
    assert_eq!(guest.query_u32(0x0001_0114), 0);
    // The other end of the cable goes.
    drop(peer);
    assert_eq!(guest.message(), Some(down));
    guest.assert_fine();
}

#[test]
fn a_card_without_a_network_says_so_from_the_beginning() {
    let mut guest = Guest::with(Nowhere, |_| {});
    guest.set_up(Version::V6_1);
    assert_eq!(guest.query_u32(0x0001_0114), 1);
    assert_eq!(guest.message(), None);
}

#[test]
fn a_new_mtu_is_announced_and_counts_for_the_next_negotiation() {
    let (mut guest, _peer) = Guest::ready_with(|config| config.mtu = 9000);
    assert_eq!(guest.query_u32(0x0001_0106), 1500, "as negotiated");
    guest.nic.set_mtu(1400).unwrap();
    assert_eq!(guest.message(), Some(words(&[7, 20, 0x4001_0018, 0, 0])));
    assert_eq!(guest.query_u32(0x0001_0106), 1400);
    guest.nic.set_mtu(9000).unwrap();
    assert!(guest.message().is_some());
    assert_eq!(guest.query_u32(0x0001_0106), 1500);
    let error = guest.nic.set_mtu(9203).unwrap_err();
    assert_eq!(
        error.to_string(),
        "network net0: the MTU must be from 576 to 9202 bytes, not 9203"
    );
    assert_eq!(guest.message(), None);
}

#[test]
fn a_guest_that_listens_late_hears_of_the_last_change_of_the_link() {
    let (guest, _peer) = Guest::ready();
    guest.keep_control(true);
    // More changes than there are pieces and places.
    for number in 1..=601 {
        guest.nic.set_link(number % 2 == 0);
        guest.vm.machine.settle();
    }
    assert_eq!(guest.nic.failure(), None);
    guest.keep_control(false);
    guest.complete_kept(usize::MAX);
    let told: Vec<_> = std::iter::from_fn(|| guest.message())
        .map(|message| word(&message, 8))
        .collect();
    assert!(told.len() < 400, "not every one");
    assert_eq!(told.last(), Some(&0x4001_000C), "disconnected");
    guest.nic.set_link(true);
    let message = guest.message().map(|message| word(&message, 8));
    assert_eq!(message, Some(0x4001_000B), "connected");
    guest.assert_fine();
}

#[test]
fn keepalive_and_reset_are_answered_and_nonsense_is_not() {
    let (mut guest, _peer) = Guest::ready();
    let answer = guest.control(rndis_control(8, &[77], &[])).unwrap();
    assert_eq!(answer, words(&[0x8000_0008, 16, 77, 0]));
    guest.set(0xFC01_020C, &OFFLOADS);
    let answer = guest.control(rndis_control(6, &[0], &[])).unwrap();
    assert_eq!(answer, words(&[0x8000_0006, 16, 0, 1]));
    assert_eq!(guest.query_u32(0x0001_010E), 0, "the filter, too");
    for kind in [7, 9, 10, 0x8000_0008, u32::MAX] {
        assert_eq!(guest.control(rndis_control(kind, &[1, 2, 3], &[])), None);
    }
    guest.assert_fine();
}

#[test]
fn a_guest_that_asks_and_never_listens_is_served_no_longer() {
    let (guest, _peer) = Guest::ready();
    guest.keep_control(true);
    let keepalive = rndis_control(8, &[1], &[]);
    let answered = (0..2000)
        .take_while(|_| guest.deliver(How::Section(0), 1, &keepalive, 0) == Some(1))
        .count();
    // As many answers as there are pieces, and as many as the host keeps.
    let pieces = 64 * 4096 / guest.piece as usize;
    assert_eq!(answered, pieces + 128);
    assert!(guest.nic.failure().is_some());
}

#[test]
fn cards_that_cannot_be_are_refused_in_one_sentence() {
    let refuse = |change: &dyn Fn(&mut Config)| {
        let mut config = Config::new("net7", MAC);
        change(&mut config);
        Nic::new(config, Nowhere).map(drop).unwrap_err()
    };
    for (error, sentence) in [
        (
            refuse(&|config| config.queues = 0),
            "network net7: there can be 1 to 64 queues, not 0",
        ),
        (
            refuse(&|config| config.mtu = 500),
            "network net7: the MTU must be from 576 to 9202 bytes, not 500",
        ),
        (
            refuse(&|config| config.mac = [1, 2, 3, 4, 5, 6]),
            "network net7: 01:02:03:04:05:06 is not the address of one card",
        ),
    ] {
        assert_eq!(error.to_string(), sentence);
    }
    assert!(matches!(
        refuse(&|config| config.queues = 65),
        ConfigError::Queues { queues: 65, .. }
    ));
}
