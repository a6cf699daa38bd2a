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

/// SRB_STATUS_INVALID_LUN, by which guests learn that a unit has gone.
const GONE: u8 = 0x20;

fn take_away(guest: &Guest) {
    assert!(guest.vm.machine.host(|host| host.take_away(guest.id)));
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
    // Those who work on them now find that it is too late.
    held.run_all();
    guest.vm.machine.settle();
    let mut content = vec![0; 4096];
    disk.read(0, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 0));
    guest.vm.machine.advance(2 * SECOND);
    guest.vm.machine.settle();
    assert!(!is_offered(&guest));
    guest.vm.assert_well_behaved();
}

#[test]
fn a_guest_finds_no_units_while_it_lets_go() {
    let guest = Guest::with_disk(TestDisk::small());
    take_away(&guest);
    let end = guest.command(&TEST_UNIT_READY, Data::None);
    assert_eq!((end.srb_status, end.scsi_status), (GONE, 2));
    let luns = [0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0];
    let report = guest.command(&luns, Data::In(16)).good();
    assert_eq!(report[..4], [0; 4], "REPORT LUNS has none");
}

#[test]
fn a_guest_that_never_lets_go_does_not_keep_a_controller() {
    let guest = Guest::with_disk(TestDisk::small());
    take_away(&guest);
    for half in 0..19 {
        assert!(is_offered(&guest), "after {half} half seconds");
        guest.command(&TEST_UNIT_READY, Data::None);
        guest.vm.machine.advance(SECOND / 2);
        guest.vm.machine.settle();
    }
    guest.vm.machine.advance(SECOND);
    guest.vm.machine.settle();
    assert!(!is_offered(&guest));
    guest.vm.assert_well_behaved();
}

#[test]
fn a_controller_that_nobody_uses_goes_at_once() {
    let guest = Guest::silent(Limits::default(), Arc::new(Inline));
    take_away(&guest);
    assert!(!is_offered(&guest));
}
