//! A DVD drive: what Linux's driver asks of it, its tray, and media that come and go.

use std::sync::Arc;

use vmbus_host::disk::{Disk, Geometry, MemoryDisk};
use vmbus_host::storage::scsi::Medium;
use vmbus_host::storage::{Limits, Lun, LunError};
use vmbus_host::work::Inline;

use crate::disk::TestDisk;
use crate::guest::*;

const SECTORS: u64 = 400_000;

fn disc(seed: u32) -> Arc<dyn Disk> {
    let disc = MemoryDisk::new(Geometry {
        sectors: SECTORS,
        logical: 2048,
        physical: 2048,
    });
    disc.write(0, &pattern(4 * 2048, seed)).unwrap();
    Arc::new(disc.into_read_only())
}

fn drive(medium: Option<Arc<dyn Disk>>) -> Guest {
    Guest::with_lun(Lun::Dvd {
        identity: [5; 16],
        medium,
    })
}

const TEST_UNIT_READY: [u8; 6] = [0; 6];
const EJECT: [u8; 6] = [0x1B, 0, 0, 0, 2, 0];
const LOAD: [u8; 6] = [0x1B, 0, 0, 0, 3, 0];
const CHANGED: (u8, u8, u8) = (6, 0x28, 0);
const OPEN: (u8, u8, u8) = (2, 0x3A, 2);

/// Code and status of the media event.
fn event(guest: &Guest) -> (u8, u8) {
    let cdb = [0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];
    let data = guest.command(&cdb, Data::In(8)).good();
    assert_eq!(data[..4], [0, 6, 4, 0x10]);
    (data[4], data[5])
}

#[test]
fn a_drive_is_a_removable_dvd_rom() {
    let guest = drive(Some(disc(1)));
    let data = guest.command(&[0x12, 0, 0, 0, 36, 0], Data::In(36)).good();
    assert_eq!(data[..2], [5, 0x80]);
    assert_eq!(&data[8..32], b"Msft    Virtual DVD-ROM ");
    let pages = guest.command(&[0x12, 1, 0, 0, 36, 0], Data::In(36)).good();
    assert_eq!(pages, [5, 0, 0, 3, 0, 0x80, 0x83]);
    let page = guest.command(&[0x12, 1, 0xB0, 0, 36, 0], Data::In(36));
    assert_eq!(page.check(), INVALID_FIELD);
}

#[test]
fn a_disc_is_read_in_its_sectors() {
    let guest = drive(Some(disc(1)));
    let capacity = guest.command(&ten(0x25, 0, 0), Data::In(8)).good();
    assert_eq!(capacity[..4], (SECTORS as u32 - 1).to_be_bytes());
    assert_eq!(capacity[4..], 2048u32.to_be_bytes());
    let expected = pattern(4 * 2048, 1);
    let read = guest.command(&ten(0x28, 1, 2), Data::In(4096)).good();
    assert_eq!(read, expected[2048..3 * 2048]);
    let twelve = [0xA8, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0];
    let read = guest.command(&twelve, Data::In(2048)).good();
    assert_eq!(read, expected[3 * 2048..]);
    let end = guest.command(&ten(0x28, SECTORS as u32, 1), Data::In(2048));
    assert_eq!(end.check(), OUT_OF_RANGE);
}

#[test]
fn what_writes_is_no_command_of_a_drive() {
    let guest = drive(Some(disc(1)));
    let data = [0; 2048];
    for code in [0x2A, 0x0A, 0xAA, 0x8A, 0x42] {
        let mut cdb = [0; 16];
        (cdb[0], cdb[8]) = (code, 24);
        let end = guest.command(&cdb, Data::Out(&data));
        assert_eq!(end.check(), ILLEGAL_OPCODE, "{code:#x}");
    }
    guest.command(&ten(0x35, 0, 0), Data::None).good();
}

#[test]
fn linux_finds_the_capabilities_where_it_looks() {
    let guest = drive(Some(disc(1)));
    // As sr does it: page 2Ah, the block descriptor's length from the header.
    for cdb in [
        &[0x1A, 0, 0x2A, 0, 128, 0][..],
        &[0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 128, 0],
    ] {
        let data = guest.command(cdb, Data::In(128)).good();
        let at = if cdb[0] == 0x1A {
            4 + usize::from(data[3])
        } else {
            8 + usize::from(data[7])
        };
        assert_eq!(data[at], 0x2A);
        assert_eq!(data[at + 2] & 0x08, 8, "reads DVD-ROM");
        assert_eq!(data[at + 3], 0, "writes nothing");
        assert_eq!(data[at + 6] & 0x08, 8, "ejects");
        assert_eq!(data[at + 6] >> 5, 1, "a tray");
        assert_ne!(data[at + 8..at + 10], [0, 0], "has a speed");
    }
    let all = guest.command(&[0x1A, 0, 0x3F, 0, 128, 0], Data::In(128));
    assert_eq!(all.good().len(), 4 + 12 + 20);
}

#[test]
fn configuration_profile_toc_disc_and_track_information_describe_a_dvd() {
    let guest = drive(Some(disc(1)));
    let cdb = [0x46, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    let header = guest.command(&cdb, Data::In(8)).good();
    assert_eq!(header[6..], [0, 0x10], "DVD-ROM");
    let cdb = [0x46, 2, 0, 3, 0, 0, 0, 0, 64, 0];
    let removable = guest.command(&cdb, Data::In(64)).good();
    assert_eq!((removable.len(), removable[9]), (16, 3));
    let cdb = [0x46, 3, 0, 0, 0, 0, 0, 0, 8, 0];
    assert_eq!(guest.command(&cdb, Data::In(8)).check(), INVALID_FIELD);
    let toc = |flags, format, track, control| {
        let cdb = [0x43, flags, format, 0, 0, 0, track, 0, 64, control];
        guest.command(&cdb, Data::In(64))
    };
    let tracks = toc(0, 0, 0, 0).good();
    assert_eq!(tracks[..4], [0, 18, 1, 1]);
    assert_eq!(tracks[14], 0xAA);
    assert_eq!(tracks[16..], (SECTORS as u32).to_be_bytes());
    assert_eq!(toc(0, 1, 0, 0).good()[..4], [0, 10, 1, 1], "sessions");
    assert_eq!(toc(0, 0, 0, 0x40).good()[..4], [0, 10, 1, 1], "old form");
    assert_eq!(toc(0, 2, 0, 0).check(), INVALID_FIELD);
    assert_eq!(toc(0, 0, 9, 0).check(), INVALID_FIELD);
    let cdb = [0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0];
    let information = guest.command(&cdb, Data::In(34)).good();
    assert_eq!((information.len(), information[2]), (34, 0x0E));
    // As Linux asks: the track's length first, then all of it.
    for allocation in [8, 36] {
        let cdb = [0x52, 1, 0, 0, 0, 1, 0, 0, allocation, 0];
        let track = guest.command(&cdb, Data::In(allocation.into())).good();
        assert_eq!(track.len(), allocation.into());
        assert_eq!(track[..8], [0, 34, 1, 1, 0, 4, 1, 0]);
    }
    let cdb = [0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0];
    assert_eq!(guest.command(&cdb, Data::In(8)).good(), [0; 8]);
}

#[test]
fn without_a_disc_the_drive_is_not_ready() {
    let guest = drive(None);
    for cdb in [
        &TEST_UNIT_READY[..],
        &ten(0x28, 0, 1),
        &ten(0x25, 0, 0),
        &ten(0x35, 0, 0),
        &[0x43, 0, 0, 0, 0, 0, 0, 0, 64, 0],
        &[0x51, 0, 0, 0, 0, 0, 0, 0, 34, 0],
        &[0x52, 1, 0, 0, 0, 1, 0, 0, 36, 0],
    ] {
        let end = guest.command(cdb, Data::In(2048));
        assert_eq!(end.check(), NO_MEDIUM, "{cdb:x?}");
    }
    guest.command(&[0x12, 0, 0, 0, 36, 0], Data::In(36)).good();
    guest
        .command(&[0x1A, 0, 0x2A, 0, 64, 0], Data::In(64))
        .good();
    let cdb = [0x46, 0, 0, 0, 0, 0, 0, 0, 8, 0];
    assert_eq!(guest.command(&cdb, Data::In(8)).good()[6..], [0, 0]);
    assert_eq!(event(&guest), (0, 0));
    assert_eq!(guest.controller.counts().units[0].1.not_ready, 7);
}

#[test]
fn events_are_only_told_to_those_who_ask_for_them_one_by_one() {
    let guest = drive(Some(disc(1)));
    let cdb = [0x4A, 0, 0, 0, 0x10, 0, 0, 0, 8, 0];
    assert_eq!(guest.command(&cdb, Data::In(8)).check(), INVALID_FIELD);
    let cdb = [0x4A, 1, 0, 0, 0x02, 0, 0, 0, 8, 0];
    let none = guest.command(&cdb, Data::In(8)).good();
    assert_eq!(none, [0, 2, 0x80, 0x10], "no such class");
}

#[test]
fn the_guest_ejects_and_loads_unless_it_has_locked_the_tray() {
    let guest = drive(Some(disc(1)));
    guest.command(&[0x1E, 0, 0, 0, 1, 0], Data::None).good();
    assert_eq!(guest.command(&EJECT, Data::None).check(), (5, 0x53, 2));
    guest.command(&TEST_UNIT_READY, Data::None).good();
    let change = guest.controller.change_medium(0, None, false);
    assert_eq!(change.err(), Some(LunError::Locked(0)));
    guest.command(&[0x1E, 0, 0, 0, 0, 0], Data::None).good();
    guest.command(&EJECT, Data::None).good();
    assert_eq!(guest.controller.luns()[0].2, Medium::Open);
    assert_eq!(event(&guest), (3, 1));
    assert_eq!(event(&guest), (0, 1), "once");
    assert_eq!(guest.command(&TEST_UNIT_READY, Data::None).check(), OPEN);
    guest.command(&EJECT, Data::None).good();
    guest.command(&LOAD, Data::None).good();
    assert_eq!(event(&guest), (2, 2));
    assert_eq!(guest.command(&TEST_UNIT_READY, Data::None).check(), CHANGED);
    guest.command(&TEST_UNIT_READY, Data::None).good();
    assert_eq!(guest.controller.luns()[0].2, Medium::Present);
}

/// The event notification of unit 0.
fn notification(version: u16) -> Vec<u8> {
    let mut packet = packet(packet_size(version), 14, &[0, 0, 0, 1]);
    packet[4] = 0;
    packet
}

#[test]
fn another_disc_is_announced_in_the_versions_that_can_and_told_by_the_drive() {
    for version in VERSIONS {
        let guest = Guest::silent(Limits::default(), Arc::new(Inline));
        let identity = [5; 16];
        let medium = Some(disc(1));
        let dvd = Lun::Dvd { identity, medium };
        guest.controller.add_lun(0, dvd).unwrap();
        let guest = guest.ready(version);
        let told = || match version {
            0x0600.. => vec![notification(version)],
            _ => Vec::new(),
        };
        let change = |medium| guest.controller.change_medium(0, medium, false).unwrap();
        assert!(change(None).is_some());
        assert_eq!(guest.notices(), told());
        assert_eq!(event(&guest), (3, 0));
        assert_eq!(
            guest.command(&TEST_UNIT_READY, Data::None).check(),
            NO_MEDIUM
        );
        assert!(change(Some(disc(2))).is_none());
        assert_eq!(guest.notices(), told());
        assert_eq!(guest.command(&TEST_UNIT_READY, Data::None).check(), CHANGED);
        let read = guest.command(&ten(0x28, 0, 1), Data::In(2048)).good();
        assert_eq!(read, pattern(2048, 2));
    }
}

#[test]
fn a_locked_disc_goes_when_the_host_insists() {
    let guest = drive(Some(disc(1)));
    guest.command(&[0x1E, 0, 0, 0, 1, 0], Data::None).good();
    let before = guest.controller.change_medium(0, None, true).unwrap();
    assert!(before.is_some());
    assert_eq!(
        guest.command(&TEST_UNIT_READY, Data::None).check(),
        NO_MEDIUM
    );
}

#[test]
fn only_a_drive_has_media() {
    let guest = Guest::with_disk(TestDisk::small());
    let change = |lun| guest.controller.change_medium(lun, None, true).err();
    assert_eq!(change(0), Some(LunError::NoDrive(0)));
    assert_eq!(change(1), Some(LunError::None(1)));
}
