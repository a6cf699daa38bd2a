//! Units that come and go while the guest uses the controller.

use std::sync::Arc;

use vmbus_host::storage::{Limits, Lun, LunError, MAX_LUN};
use vmbus_host::work::Inline;

use crate::disk::{Held, TestDisk};
use crate::guest::*;

fn disk() -> Lun {
    Lun::Disk(TestDisk::small())
}

fn enumerate(version: u16) -> Vec<u8> {
    let mut packet = packet(packet_size(version), 11, &[]);
    packet[4] = 0;
    packet
}

fn empty(version: u16) -> Guest {
    Guest::silent(Limits::default(), Arc::new(Inline)).ready(version)
}

const TEST_UNIT_READY: [u8; 6] = [0; 6];

#[test]
fn a_new_unit_is_announced_and_tells_that_it_is_new() {
    for version in VERSIONS {
        let guest = empty(version);
        guest.controller.add_lun(0, disk()).unwrap();
        let told: &[_] = if version >= 0x0402 {
            &[enumerate(version)]
        } else {
            &[]
        };
        assert_eq!(guest.notices(), told);
        assert_eq!(
            guest.command(&TEST_UNIT_READY, Data::None).check(),
            POWER_ON
        );
        guest.command(&TEST_UNIT_READY, Data::None).good();
        assert_eq!(guest.controller.counts().packets.notices, told.len() as u64);
    }
}

#[test]
fn a_guest_that_cannot_be_told_learns_it_from_every_unit() {
    let guest = Guest::silent(Limits::default(), Arc::new(Inline));
    guest.controller.add_lun(0, disk()).unwrap();
    let guest = guest.ready(0x0200);
    guest.command(&TEST_UNIT_READY, Data::None).good();
    guest.controller.add_lun(5, disk()).unwrap();
    guest.vm.machine.settle();
    let end = guest.command(&TEST_UNIT_READY, Data::None);
    assert_eq!(end.check(), (6, 0x3F, 0x0E));
    guest.command(&TEST_UNIT_READY, Data::None).good();
}

#[test]
fn a_guest_that_has_read_the_list_of_units_is_not_told_that_there_is_another() {
    let guest = Guest::silent(Limits::default(), Arc::new(Inline));
    for lun in 0..3 {
        guest.controller.add_lun(lun, disk()).unwrap();
    }
    let guest = guest.ready(0x0200);
    guest.controller.remove_lun(2).unwrap();
    let luns = [0xA0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    let end = guest.on_lun(1, &TEST_UNIT_READY, Data::None);
    assert_eq!(end.check(), (6, 0x3F, 0x0E));
    guest.command(&luns, Data::In(64)).good();
    guest.command(&TEST_UNIT_READY, Data::None).good();
    // Whatever else there is to tell is told.
    guest.controller.remove_lun(1).unwrap();
    let reset = packet(48, RESET_LUN, &[]);
    assert_eq!(guest.say(&reset).0, SUCCESS);
    guest.command(&luns, Data::In(64)).good();
    let end = guest.command(&TEST_UNIT_READY, Data::None);
    assert_eq!(end.check(), POWER_ON);
}

#[test]
fn units_that_were_there_before_the_guest_are_no_news() {
    let guest = Guest::silent(Limits::default(), Arc::new(Inline));
    guest.controller.add_lun(0, disk()).unwrap();
    guest.controller.add_lun(1, disk()).unwrap();
    guest.controller.remove_lun(1).unwrap();
    let guest = guest.ready(0x0602);
    assert!(guest.notices().is_empty());
    guest.command(&TEST_UNIT_READY, Data::None).good();
}

#[test]
fn many_changes_that_nobody_has_heard_of_are_one_notice() {
    let guest = empty(0x0602);
    for lun in 0..=MAX_LUN {
        guest.controller.add_lun(lun, disk()).unwrap();
    }
    for lun in 1..=MAX_LUN {
        guest.controller.remove_lun(lun).unwrap();
    }
    assert_eq!(guest.notices(), [enumerate(0x0602)]);
    assert_eq!(guest.controller.luns().len(), 1);
}

#[test]
fn a_unit_that_went_is_gone_for_every_command_and_is_announced() {
    let guest = empty(0x0602);
    guest.controller.add_lun(0, disk()).unwrap();
    assert_eq!(guest.notices(), [enumerate(0x0602)]);
    assert!(guest.controller.remove_lun(0).unwrap().is_over(None));
    assert_eq!(guest.notices(), [enumerate(0x0602)]);
    let end = guest.command(&ten(0x28, 0, 1), Data::In(512));
    assert_eq!((end.srb_status, end.scsi_status), (0x20, 2));
    let inquiry = guest.command(&[0x12, 0, 0, 0, 36, 0], Data::In(36));
    assert_eq!(inquiry.good()[0], 0x7F);
}

#[test]
fn commands_under_way_end_with_their_unit() {
    let held = Held::default();
    let guest = Guest::silent(Limits::default(), Arc::new(held.clone())).ready(0x0602);
    let old = TestDisk::small();
    guest.controller.add_lun(0, Lun::Disk(old.clone())).unwrap();
    guest.command(&TEST_UNIT_READY, Data::None).check();
    let data = pattern(4096, 1);
    let write = ten(0x2A, 0, 8);
    let mut pending: Vec<_> = (0..4)
        .map(|_| guest.start(0, 0, &write, Data::Out(&data)))
        .collect();
    guest.vm.machine.settle();
    held.run_one(0);
    let going = guest.controller.remove_lun(0).unwrap();
    assert!(!going.is_over(None));
    // Another unit takes the number at once.
    let new = TestDisk::small();
    guest.controller.add_lun(0, Lun::Disk(new.clone())).unwrap();
    held.run_all();
    assert!(going.is_over(None));
    let ends: Vec<_> = pending
        .iter_mut()
        .map(|pending| guest.poll(pending).unwrap())
        .collect();
    assert_eq!(ends[0].srb_status, 1, "done before");
    for end in &ends[1..] {
        assert_eq!((end.srb_status, end.scsi_status), (0x20, 2));
    }
    assert_eq!(
        guest.command(&TEST_UNIT_READY, Data::None).check(),
        POWER_ON
    );
    let mut read = guest.start(0, 0, &ten(0x28, 0, 8), Data::In(4096));
    guest.vm.machine.settle();
    held.run_all();
    let content = guest.poll(&mut read).unwrap().good();
    assert!(content.iter().all(|byte| *byte == 0), "the new disk");
    drop((old, new));
}

#[test]
fn the_file_of_a_unit_that_went_is_free_once_its_commands_have_ended() {
    use vmbus_host::disk::{Options, open};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, [0; 1 << 16]).unwrap();
    let again = || open(&path, Options::default());
    let held = Held::default();
    let guest = Guest::silent(Limits::default(), Arc::new(held.clone())).ready(0x0602);
    let disk = again().unwrap();
    guest.controller.add_lun(0, Lun::Disk(disk)).unwrap();
    guest.command(&TEST_UNIT_READY, Data::None).check();
    let data = pattern(4096, 1);
    let mut write = guest.start(0, 0, &ten(0x2A, 0, 8), Data::Out(&data));
    guest.vm.machine.settle();
    let going = guest.controller.remove_lun(0).unwrap();
    assert!(again().is_err(), "a command still has it");
    held.run_all();
    assert!(going.is_over(None));
    guest.vm.machine.settle();
    assert_eq!(guest.poll(&mut write).unwrap().srb_status, 0x20);
    again().unwrap();
}

#[test]
fn numbers_are_checked() {
    let guest = empty(0x0602);
    let controller = &guest.controller;
    let high = MAX_LUN + 1;
    assert_eq!(
        controller.add_lun(high, disk()),
        Err(LunError::TooHigh(high))
    );
    controller.add_lun(2, disk()).unwrap();
    assert_eq!(controller.add_lun(2, disk()), Err(LunError::InUse(2)));
    let gone = controller.remove_lun(3).err().unwrap();
    assert_eq!(gone.to_string(), "there is no LUN 3");
}

#[test]
fn disks_come_and_go_from_other_threads_while_there_is_io() {
    use vmbus_host::work::Threads;
    let threads = Threads::new("disk", 4).unwrap();
    let guest = Guest::silent(Limits::default(), Arc::new(threads)).ready(0x0602);
    let controller = guest.controller.clone();
    let changes = std::thread::spawn(move || {
        for round in 0..200u32 {
            let lun = (round % 3) as u8;
            controller.add_lun(lun, disk()).unwrap();
            let activity = controller.remove_lun(lun).unwrap();
            drop(activity);
        }
        controller.add_lun(0, disk()).unwrap();
    });
    let data = pattern(8192, 1);
    let mut seen = [0u32; 256];
    while !changes.is_finished() {
        let pending: Vec<_> = (0..12)
            .map(|index| guest.start(0, index % 3, &ten(0x2A, 0, 16), Data::Out(&data)))
            .collect();
        for pending in pending {
            let end = guest.finish(pending);
            seen[usize::from(end.srb_status)] += 1;
        }
    }
    changes.join().unwrap();
    let expected = [0x01, 0x20, 0x84];
    for (status, count) in seen.iter().enumerate() {
        assert!(*count == 0 || expected.contains(&status), "{status:#x}");
    }
    guest.vm.machine.settle();
    while guest.command(&TEST_UNIT_READY, Data::None).srb_status != 1 {}
    guest.command(&ten(0x2A, 0, 16), Data::Out(&data)).good();
    assert_eq!(guest.controller.counts().in_flight, 0);
    guest.vm.assert_well_behaved();
}
