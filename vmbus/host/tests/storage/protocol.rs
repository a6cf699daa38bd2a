//! The order of the protocol, its versions and sizes, and packets that are wrong in themselves.

use std::sync::Arc;

use vmbus::kmcl::Timeout;
use vmbus_host::storage::{Limits, Lun};
use vmbus_host::work::Inline;

use crate::disk::TestDisk;
use crate::guest::*;

fn silent() -> Guest {
    let limits = Limits {
        sub_channels: 3,
        max_transfer: 1 << 20,
        depth: 16,
    };
    let guest = Guest::silent(limits, Arc::new(Inline));
    let disk = Lun::Disk(TestDisk::small());
    guest.controller.add_lun(0, disk).unwrap();
    guest
}

/// Every packet of the guest, of this size.
fn every_packet(size: usize) -> Vec<Vec<u8>> {
    let mut packets: Vec<_> = [BEGIN, END, QUERY_PROPERTIES, RESET_LUN, 5, RESET_BUS]
        .map(|operation| packet(size, operation, &[]))
        .into();
    packets.push(packet(size, QUERY_VERSION, &0x0600u16.to_le_bytes()));
    packets.push(packet(size, CREATE_SUB_CHANNELS, &1u16.to_le_bytes()));
    let version = if size == 64 { 0x0600 } else { 0x0402 };
    packets.push(srb(version, 0, &[0; 6], Data::None));
    packets
}

fn operation(packet: &[u8]) -> u32 {
    u32::from_le_bytes(*packet.first_chunk().unwrap())
}

#[test]
fn every_version_is_spoken_and_has_its_properties_and_sizes() {
    for version in VERSIONS {
        let guest = silent();
        let size = packet_size(version);
        let say = |operation, body: &[u8]| {
            let (status, answer) = guest.say(&packet(size, operation, body));
            assert_eq!((status, answer.len()), (SUCCESS, size), "{operation}");
            answer
        };
        say(BEGIN, &[]);
        let answer = say(QUERY_VERSION, &version.to_le_bytes());
        assert_eq!(answer[12..14], version.to_le_bytes());
        let answer = say(QUERY_PROPERTIES, &[]);
        let sub_channels = if version >= 0x0501 { 3 } else { 0 };
        assert_eq!(answer[16..18], u16::to_le_bytes(sub_channels));
        assert_eq!(answer[20], u8::from(sub_channels != 0), "multi-channel");
        assert_eq!(answer[24..28], (1u32 << 20).to_le_bytes());
        say(END, &[]);
        let guest = guest.of_version(version);
        guest.command(&[0; 6], Data::None).good();
        guest.vm.assert_well_behaved();
    }
}

#[test]
fn an_unknown_version_is_refused_and_another_may_be_asked_for() {
    let guest = silent();
    assert_eq!(guest.say(&packet(64, BEGIN, &[])).0, SUCCESS);
    for version in [0x0000u16, 0x0100, 0x0201, 0x0603, 0x0700, 0xFFFF] {
        let (status, answer) = guest.say(&packet(64, QUERY_VERSION, &version.to_le_bytes()));
        assert_eq!(status, REVISION_MISMATCH);
        assert_eq!(answer[12..14], version.to_le_bytes());
    }
    let (status, _) = guest.say(&packet(64, QUERY_VERSION, &0x0602u16.to_le_bytes()));
    assert_eq!(status, SUCCESS);
}

#[test]
fn before_there_is_a_version_answers_have_the_size_of_the_request() {
    for (sent, came) in [(12, 48), (16, 48), (48, 48), (56, 48), (64, 64), (120, 64)] {
        let guest = silent();
        let (status, answer) = guest.say(&packet(sent, BEGIN, &[]));
        assert_eq!((status, answer.len()), (SUCCESS, came), "{sent}");
        let version = packet(sent, QUERY_VERSION, &0x0501u16.to_le_bytes());
        assert_eq!(guest.say(&version).1.len(), came);
        let (status, answer) = guest.say(&packet(sent, QUERY_PROPERTIES, &[]));
        assert_eq!((status, answer.len()), (SUCCESS, 64), "the version's");
    }
}

#[test]
fn a_packet_at_the_wrong_time_is_refused_and_changes_nothing() {
    let steps = [BEGIN, QUERY_VERSION, QUERY_PROPERTIES, END];
    for done in 0..=steps.len() {
        let guest = silent();
        let next = |step: &u32| {
            let body = 0x0600u16.to_le_bytes();
            assert_eq!(guest.say(&packet(64, *step, &body)).0, SUCCESS, "{step}");
        };
        steps[..done].iter().for_each(next);
        for packet in every_packet(64) {
            let operation = operation(&packet);
            let ready = done == steps.len();
            let fits = steps.get(done) == Some(&operation)
                || (operation == CREATE_SUB_CHANNELS && done >= 3)
                || (ready && (EXECUTE..=RESET_BUS).contains(&operation));
            if !fits {
                let (status, answer) = guest.say(&packet);
                assert_eq!(status, INVALID_DEVICE_STATE, "{operation} after {done}");
                assert!(answer[12..].iter().all(|byte| *byte == 0));
            }
        }
        steps[done..].iter().for_each(next);
        assert_eq!(
            guest.controller.counts().packets.malformed,
            0,
            "nothing is wrong with the packets themselves"
        );
    }
}

#[test]
fn operations_of_no_scsi_guest_are_refused_at_any_time() {
    let guest = silent();
    for operation in [0, 1, 2, 11, 12, 14, 15, 0xFFFF_FFFF] {
        let (status, _) = guest.say(&packet(64, operation, &[]));
        assert_eq!(status, INVALID_DEVICE_REQUEST, "{operation}");
    }
    let guest = guest.ready(0x0600);
    for operation in [0, 1, 2, 11, 12, 14, 15, 0xFFFF_FFFF] {
        let (status, _) = guest.say(&packet(64, operation, &[]));
        assert_eq!(status, INVALID_DEVICE_REQUEST, "{operation}");
    }
    assert_eq!(guest.controller.counts().packets.refused, 16);
    guest.command(&[0; 6], Data::None).good();
}

#[test]
fn a_short_packet_is_answered_as_wrong() {
    let guest = silent();
    for length in [0, 8] {
        let (status, _) = guest.say(&packet(64, BEGIN, &[])[..length]);
        assert_eq!(status, INVALID_PARAMETER, "{length} bytes");
    }
    let guest = guest.ready(0x0600);
    let whole = srb(0x0600, 0, &[0; 6], Data::None);
    for length in [16, 24, 40, 48, 56] {
        let end = End::read(&guest.wait(guest.begin(0, &whole[..length])), Vec::new());
        assert_eq!((end.status, end.srb_status), (INVALID_PARAMETER, 0x95));
        assert_eq!(end.scsi_status, 2);
    }
    let (status, _) = guest.say(&packet(64, RESET_LUN, &[])[..16]);
    assert_eq!(status, INVALID_PARAMETER);
    assert_eq!(guest.controller.counts().packets.malformed, 8);
    guest.command(&[0; 6], Data::None).good();
}

#[test]
fn a_longer_packet_is_read_as_far_as_it_counts() {
    for version in VERSIONS {
        let guest = silent().ready(version);
        let mut packet = srb(version, 0, &[0; 6], Data::None);
        packet.resize(120, 0xEE);
        let end = End::read(&guest.wait(guest.begin(0, &packet)), Vec::new());
        end.good();
    }
}

#[test]
fn an_srb_that_lies_about_its_length_is_refused() {
    for version in VERSIONS {
        let guest = silent().ready(version);
        let good = packet_size(version) - 12;
        for length in [0, 1, 0x23, good as u16 + 1, 0x100, 0xFFFF] {
            let mut packet = srb(version, 0, &[0; 6], Data::None);
            packet[12..14].copy_from_slice(&length.to_le_bytes());
            let end = End::read(&guest.wait(guest.begin(0, &packet)), Vec::new());
            assert_eq!((end.srb_status, end.scsi_status), (0x95, 2), "{length:#x}");
        }
        // The shorter SRB of old versions is there in every version.
        let mut packet = srb(version, 0, &[0; 6], Data::None);
        packet[12..14].copy_from_slice(&[0x24, 0]);
        End::read(&guest.wait(guest.begin(0, &packet)), Vec::new()).good();
    }
}

#[test]
fn a_cdb_length_or_direction_that_is_none_is_refused() {
    let guest = silent().ready(0x0602);
    for (at, value) in [(20, 0), (20, 17), (20, 255), (22, 3), (22, 255)] {
        let mut packet = srb(0x0602, 0, &[0; 6], Data::None);
        packet[at] = value;
        let end = End::read(&guest.wait(guest.begin(0, &packet)), Vec::new());
        assert_eq!((end.srb_status, end.scsi_status), (0x86, 2));
    }
    let short = srb(0x0602, 0, &[0; 5], Data::None);
    let end = End::read(&guest.wait(guest.begin(0, &short)), Vec::new());
    assert_eq!(end.srb_status, 0x86, "a CDB shorter than its code");
}

#[test]
fn a_packet_that_asks_for_no_answer_is_dropped_and_counted() {
    let guest = silent().ready(0x0602);
    let deliver = |packet: &[u8]| {
        let sent = guest.primary().deliver(packet, Timeout::Never);
        guest.vm.vmbus.client().block_on(sent).unwrap().unwrap();
    };
    every_packet(64).iter().for_each(|packet| deliver(packet));
    guest.vm.machine.settle();
    let counts = guest.controller.counts();
    assert_eq!(counts.packets.unanswerable, 9);
    assert_eq!((counts.packets.resets, counts.packets.commands), (0, 0));
    guest.command(&[0; 6], Data::None).good();
}

#[test]
fn sense_data_comes_as_long_as_there_is_room_and_else_by_request_sense() {
    for version in VERSIONS {
        let guest = silent().ready(version);
        let fail = |room: u8, flags: u8| {
            let mut packet = srb(version, 0, &ten(0x28, u32::MAX, 1), Data::In(512));
            packet[21] = room;
            if version >= 0x0501 {
                packet[52] = flags;
            }
            guest.finish(guest.lend(0, &packet, 0, 512, &[]))
        };
        assert_eq!(fail(0xFF, 0).check(), OUT_OF_RANGE);
        let end = fail(4, 0);
        assert_eq!((end.srb_status, &*end.sense), (0x84, &[0x70, 0, 5, 0][..]));
        let request_sense = || {
            let sense = guest.command(&[3, 0, 0, 0, 18, 0], Data::In(18)).good();
            (sense[2], sense[12], sense[13])
        };
        assert_eq!(request_sense(), (0, 0, 0), "it has been told");
        let end = fail(0, 0);
        assert_eq!((end.srb_status, end.scsi_status), (4, 2));
        assert!(end.sense.is_empty());
        assert_eq!(request_sense(), OUT_OF_RANGE);
        assert_eq!(request_sense(), (0, 0, 0));
        if version >= 0x0501 {
            assert_eq!(fail(0x14, 0x20).srb_status, 4, "autosense is disabled");
            guest.command(&[0; 6], Data::None).good();
            assert_eq!(request_sense(), (0, 0, 0), "forgotten");
        }
    }
}
