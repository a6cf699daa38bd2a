//! Controllers that are taken away in good order while their guest uses them.

use std::sync::Arc;

use vmbus_host::disk::Disk;
use vmbus_host::storage::{Limits, Lun};
use vmbus_host::work::Inline;

use crate::disk::{Held, TestDisk};
use crate::guest::*;

/// A second in units of 100 ns.
const SECOND: u64 = 10_000_000;

const TEST_UNIT_READY: [u8; 6] = [0; 6];

const REPORT_LUNS: [u8; 12] = [0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0];

/// SRB_STATUS_INVALID_LUN, by which guests learn that a unit has gone.
const GONE: u8 = 0x20;

fn take_away(guest: &Guest) {
    assert!(guest.vm.machine.host(|host| host.take_away(guest.id)));
    guest.vm.machine.settle();
}

fn pass(guest: &Guest, time: u64) {
    guest.vm.machine.advance(time);
    guest.vm.machine.settle();
}

fn is_offered(guest: &Guest) -> bool {
    guest
        .vm
        .machine
        .server(|server| server.is_offered(guest.id))
}

#[test]
fn commands_under_way_end_before_their_controller_goes() {
    let held = Held::default();
    let disk = TestDisk::small();
    let mut guest = Guest::silent(
        Limits {
            sub_channels: 1,
            ..Limits::default()
        },
        Arc::new(held.clone()),
    )
    .ready(0x0602);
    guest.add_sub_channels(1);
    let controller = &guest.controller;
    controller.add_lun(0, Lun::Disk(disk.clone())).unwrap();
    guest.notices();
    guest.command(&TEST_UNIT_READY, Data::None).check();
    let data = pattern(4096, 1);
    let mut pending: Vec<_> = (0..4)
        .map(|index| guest.start(index % 2, 0, &ten(0x2A, 0, 8), Data::Out(&data)))
        .collect();
    guest.vm.machine.settle();
    take_away(&guest);
    // Nobody has worked on them.
    for pending in &mut pending {
        let end = guest.poll(pending).unwrap();
        assert_eq!((end.srb_status, end.scsi_status), (GONE, 2));
    }
    assert_eq!(guest.notices().len(), 1, "ENUMERATE_BUS");
    assert!(is_offered(&guest), "the guest has yet to let go");
    guest.command(&REPORT_LUNS, Data::In(16)).good();
    // Those who work on them now find that it is too late.
    held.run_all();
    guest.vm.machine.settle();
    let mut content = vec![0; 4096];
    disk.read(0, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 0));
    pass(&guest, 3 * SECOND);
    assert!(!is_offered(&guest));
    guest.vm.assert_well_behaved();
}

#[test]
fn a_guest_is_given_time_to_look_for_units_and_to_flush_the_caches_it_knows() {
    let guest = Guest::with_disk(TestDisk::small());
    for lun in [1, 2] {
        let disk = Lun::Disk(TestDisk::small());
        guest.controller.add_lun(lun, disk).unwrap();
    }
    // Of 0 and 1 it learns that they have a cache; it has that of 1 turned off.
    for lun in [0, 1] {
        let unit_attention = guest.on_lun(lun, &TEST_UNIT_READY, Data::None);
        drop(unit_attention);
        let sense = guest.on_lun(lun, &[0x1A, 8, 8, 0, 24, 0], Data::In(24));
        assert_eq!(sense.good()[6], 4, "WCE");
    }
    let mut off = [0; 24];
    off[4..6].copy_from_slice(&[8, 18]);
    guest
        .on_lun(1, &[0x15, 0x10, 0, 0, 24, 0], Data::Out(&off))
        .good();
    take_away(&guest);
    pass(&guest, 9 * SECOND);
    assert!(is_offered(&guest), "it has not looked yet");
    guest.command(&REPORT_LUNS, Data::In(16)).good();
    pass(&guest, 9 * SECOND);
    assert!(is_offered(&guest), "it has not flushed yet");
    let flush = guest.command(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], Data::None);
    assert_eq!((flush.srb_status, flush.scsi_status), (GONE, 2));
    pass(&guest, SECOND);
    assert!(is_offered(&guest), "there may come more");
    pass(&guest, 2 * SECOND);
    assert!(!is_offered(&guest));
    guest.vm.assert_well_behaved();
}

#[test]
fn a_guest_that_lets_go_of_nothing_and_is_silent_does_not_keep_a_controller() {
    let guest = Guest::with_disk(TestDisk::small());
    take_away(&guest);
    pass(&guest, 9 * SECOND);
    assert!(is_offered(&guest));
    pass(&guest, 2 * SECOND);
    assert!(!is_offered(&guest));
}

#[test]
fn a_guest_finds_no_units_while_it_lets_go() {
    let guest = Guest::with_disk(TestDisk::small());
    take_away(&guest);
    let end = guest.command(&TEST_UNIT_READY, Data::None);
    assert_eq!((end.srb_status, end.scsi_status), (GONE, 2));
    let report = guest.command(&REPORT_LUNS, Data::In(16)).good();
    assert_eq!(report[..4], [0; 4], "REPORT LUNS has none");
}

#[test]
fn a_guest_that_never_lets_go_does_not_keep_a_controller() {
    let guest = Guest::with_disk(TestDisk::small());
    take_away(&guest);
    for second in 0..30 {
        assert!(is_offered(&guest), "after {second} seconds");
        guest.command(&TEST_UNIT_READY, Data::None);
        pass(&guest, SECOND);
    }
    pass(&guest, SECOND);
    assert!(!is_offered(&guest));
    guest.vm.assert_well_behaved();
}

#[test]
fn a_controller_that_nobody_uses_goes_at_once() {
    let guest = Guest::silent(Limits::default(), Arc::new(Inline));
    take_away(&guest);
    assert!(!is_offered(&guest));
}
