//! Resets: what is under way ends first, and the unit tells of it.

use std::sync::Arc;

use vmbus_host::storage::{Limits, Lun};

use crate::disk::{Held, TestDisk};
use crate::guest::*;

/// A guest with two disks whose work the test does.
fn held() -> (Guest, Held) {
    let held = Held::default();
    let guest = Guest::silent(Limits::default(), Arc::new(held.clone()));
    for lun in [0, 1] {
        let disk = Lun::Disk(TestDisk::small());
        guest.controller.add_lun(lun, disk).unwrap();
    }
    (guest.ready(0x0602), held)
}

fn reset(operation: u32, lun: u8) -> Vec<u8> {
    packet(64, operation, &[0, 0, 0, 0, 0, 0, 0, lun])
}

const WRITE: [u8; 10] = [0x2A, 0, 0, 0, 0, 0, 0, 0, 8, 0];

#[test]
fn a_reset_of_an_idle_unit_is_told_with_its_next_command() {
    let (guest, _) = held();
    assert_eq!(guest.say(&reset(RESET_LUN, 1)).0, SUCCESS);
    assert_eq!(guest.on_lun(1, &[0; 6], Data::None).check(), POWER_ON);
    guest.on_lun(1, &[0; 6], Data::None).good();
    guest.on_lun(0, &[0; 6], Data::None).good();
    for operation in [5, RESET_BUS] {
        assert_eq!(guest.say(&reset(operation, 0)).0, SUCCESS);
        // These are answered all the same.
        guest
            .on_lun(0, &[0x12, 0, 0, 0, 36, 0], Data::In(36))
            .good();
        let mut luns = [0; 12];
        (luns[0], luns[9]) = (0xA0, 64);
        guest.on_lun(0, &luns, Data::In(64)).good();
        for lun in [0, 1] {
            assert_eq!(guest.on_lun(lun, &[0; 6], Data::None).check(), POWER_ON);
        }
    }
    assert_eq!(guest.say(&reset(RESET_LUN, 9)).0, SUCCESS, "nobody there");
    assert_eq!(guest.controller.counts().packets.resets, 4);
}

#[test]
fn a_reset_is_answered_when_all_that_was_under_way_has_been() {
    let (guest, held) = held();
    let data = pattern(4096, 1);
    let mut writes: Vec<_> = (0..3)
        .map(|_| guest.start(0, 0, &WRITE, Data::Out(&data)))
        .collect();
    let mut other = guest.start(0, 1, &WRITE, Data::Out(&data));
    guest.vm.machine.settle();
    assert_eq!(held.len(), 4);
    let mut reset = guest.begin(0, &reset(RESET_LUN, 0));
    for which in (0..3).rev() {
        assert!(guest.poll(&mut reset).is_none(), "{which} is under way");
        held.run_one(which);
        let end = guest.poll(&mut writes[which]).unwrap();
        // Bus reset, with sense data: aborted command.
        assert_eq!((end.srb_status, end.scsi_status), (0x8E, 2));
        assert_eq!(end.sense_code(), (0xB, 0, 0));
        assert_eq!(end.transferred, 0);
    }
    assert_eq!(guest.poll(&mut reset).unwrap().status, SUCCESS);
    assert!(guest.poll(&mut other).is_none());
    held.run_all();
    guest.poll(&mut other).unwrap().good();
    let units = guest.controller.counts().units;
    assert_eq!((units[0].1.stopped, units[1].1.stopped), (3, 0));
    assert_eq!(units[0].1.written_bytes, 0);
}

#[test]
fn a_reset_of_the_bus_waits_for_every_channel() {
    let held = Held::default();
    let limits = Limits {
        sub_channels: 1,
        ..Limits::default()
    };
    let guest = Guest::silent(limits, Arc::new(held.clone()));
    let disk = Lun::Disk(TestDisk::small());
    guest.controller.add_lun(0, disk).unwrap();
    let mut guest = guest.ready(0x0602);
    guest.add_sub_channels(1);
    let mut write = guest.start(1, 0, &WRITE, Data::Out(&pattern(4096, 1)));
    guest.vm.machine.settle();
    let mut reset = guest.begin(0, &reset(RESET_BUS, 0));
    assert!(guest.poll(&mut reset).is_none());
    held.run_all();
    assert_eq!(guest.poll(&mut write).unwrap().srb_status, 0x8E);
    assert_eq!(guest.poll(&mut reset).unwrap().status, SUCCESS);
}

#[test]
fn two_resets_at_once_are_both_answered() {
    let (guest, held) = held();
    let mut write = guest.start(0, 0, &WRITE, Data::Out(&pattern(4096, 1)));
    guest.vm.machine.settle();
    let mut first = guest.begin(0, &reset(RESET_BUS, 0));
    let mut second = guest.begin(0, &reset(RESET_LUN, 0));
    // Nothing began between the two.
    assert_eq!(guest.poll(&mut second).unwrap().status, SUCCESS);
    assert!(guest.poll(&mut first).is_none());
    held.run_all();
    assert_eq!(guest.poll(&mut write).unwrap().srb_status, 0x8E);
    assert_eq!(guest.poll(&mut first).unwrap().status, SUCCESS);
}

#[test]
fn work_that_nobody_does_is_answered_as_a_failure_of_the_host() {
    let (guest, held) = held();
    let mut write = guest.start(0, 0, &WRITE, Data::Out(&pattern(4096, 1)));
    guest.vm.machine.settle();
    held.drop_one();
    let end = guest.poll(&mut write).unwrap();
    assert_eq!((end.srb_status, end.scsi_status), (0x30, 2));
    assert_eq!(guest.controller.counts().in_flight, 0);
}
