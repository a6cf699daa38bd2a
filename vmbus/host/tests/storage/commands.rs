//! What a disk answers to each command, to good input and to bad.

use std::sync::Arc;

use vmbus_host::disk::{Disk, DiskError, Geometry};
use vmbus_host::storage::{Limits, Lun};
use vmbus_host::work::Inline;

use crate::disk::TestDisk;
use crate::guest::*;
use crate::unmap::{unmap, unmap_list};

pub fn guest() -> (Guest, Arc<TestDisk>) {
    let disk = TestDisk::small();
    (Guest::with_disk(disk.clone()), disk)
}

/// INQUIRY for a page of vital product data.
pub fn vital(guest: &Guest, page: u8) -> End {
    guest.command(&[0x12, 1, page, 0, 252, 0], Data::In(252))
}

pub fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(*bytes.first_chunk().unwrap())
}

#[test]
fn test_unit_ready_is_good_when_nothing_has_happened() {
    let (guest, _) = guest();
    guest.command(&[0; 6], Data::None).good();
}

#[test]
fn inquiry_tells_what_hyper_v_tells_and_as_much_as_is_asked_for() {
    let (guest, _) = guest();
    let inquiry =
        |allocation: u8, room| guest.command(&[0x12, 0, 0, 0, allocation, 0], Data::In(room));
    let data = inquiry(96, 96).good();
    assert_eq!(data.len(), 36);
    assert_eq!(data[..5], [0, 0, 5, 2, 31]);
    assert_eq!(&data[8..32], b"Msft    Virtual Disk    ");
    assert_eq!(inquiry(5, 5).good(), data[..5]);
    assert_eq!(inquiry(0, 0).good(), []);
    assert_eq!(inquiry(36, 96).good(), data);
    // The buffer is shorter than what the CDB asks for.
    let end = inquiry(36, 10);
    assert_eq!((end.srb_status, end.scsi_status), (0x12, 0));
    assert_eq!((end.transferred, &*end.data), (10, &data[..10]));
    let page = guest.command(&[0x12, 0, 0x80, 0, 36, 0], Data::In(36));
    assert_eq!(page.check(), INVALID_FIELD);
    assert_eq!(page.sense[15..18], [0xC0, 0, 2], "the field");
}

#[test]
fn vital_product_data_has_every_page_that_it_lists() {
    let (guest, _) = guest();
    let pages = vital(&guest, 0).good();
    assert_eq!(pages, [0, 0, 0, 6, 0, 0x80, 0x83, 0xB0, 0xB1, 0xB2]);
    for page in &pages[4..] {
        let data = vital(&guest, *page).good();
        assert_eq!((data[0], data[1]), (0, *page));
        let length = u16::from_be_bytes([data[2], data[3]]);
        assert_eq!(usize::from(length) + 4, data.len());
    }
    for page in [0x81, 0x84, 0xC0, 0xFF] {
        assert_eq!(vital(&guest, page).check(), INVALID_FIELD);
    }
}

#[test]
fn serial_number_and_designators_name_the_disk() {
    let (guest, _) = guest();
    let identity = b"the test's disk!";
    let serial = vital(&guest, 0x80).good();
    let digits: String = identity.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(serial[4..], *digits.as_bytes());
    let data = vital(&guest, 0x83).good();
    // A binary NAA name of the unit, registered to Microsoft.
    assert_eq!(data[4..8], [1, 3, 0, 16]);
    assert_eq!(data[8..11], [0x60, 0x02, 0x24]);
    assert_eq!(data[11] >> 4, 8);
    // The maker's own name.
    assert_eq!(data[24..28], [1, 1, 0, 24]);
    assert_eq!(&data[28..36], b"Msft    ");
    assert_eq!(data[36..], *identity);
}

#[test]
fn read_capacity_tells_the_last_block_in_both_forms() {
    let sizes = [(8192, 512, 512), (8192, 512, 4096), (1 << 33, 4096, 4096)];
    for (sectors, logical, physical) in sizes {
        let geometry = Geometry {
            sectors,
            logical,
            physical,
        };
        let guest = Guest::with_disk(TestDisk::new(geometry));
        let short = guest.command(&ten(0x25, 0, 0), Data::In(8)).good();
        let last = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
        assert_eq!((be32(&short), be32(&short[4..])), (last, logical));
        let long = guest
            .command(&sixteen(0x9E, 0x10, 0, 32), Data::In(32))
            .good();
        assert_eq!(long[..8], (sectors - 1).to_be_bytes());
        assert_eq!(be32(&long[8..]), logical);
        assert_eq!(1 << long[13], physical / logical);
        assert_eq!(long[14], 0x80, "thin");
        let part = guest.command(&sixteen(0x9E, 0x10, 0, 12), Data::In(12));
        assert_eq!(part.good(), long[..12]);
    }
}

#[test]
fn read_capacity_of_a_part_asks_for_pmi_and_other_actions_are_none() {
    let (guest, _) = guest();
    let end = guest.command(&ten(0x25, 1, 0), Data::In(8));
    assert_eq!(end.check(), INVALID_FIELD);
    guest.command(&ten(0x25, 1, 0x100), Data::In(8)).check();
    guest.command(&ten(0x25, 1, 0x001), Data::In(8)).good();
    let end = guest.command(&sixteen(0x9E, 0x10, 1, 32), Data::In(32));
    assert_eq!(end.check(), INVALID_FIELD);
    let end = guest.command(&sixteen(0x9E, 0x12, 0, 32), Data::In(32));
    assert_eq!(end.check(), INVALID_FIELD);
}

#[test]
fn every_form_of_write_and_read_reaches_the_same_blocks() {
    let (guest, disk) = guest();
    let six = |code| [code, 0, 0, 7, 2, 0];
    let twelve = |code| [code, 0, 0, 0, 0, 7, 0, 0, 0, 2, 0, 0];
    let writes: [&[u8]; 4] = [
        &six(0x0A),
        &ten(0x2A, 7, 2),
        &twelve(0xAA),
        &sixteen(0x8A, 0, 7, 2),
    ];
    let reads: [&[u8]; 4] = [
        &six(0x08),
        &ten(0x28, 7, 2),
        &twelve(0xA8),
        &sixteen(0x88, 0, 7, 2),
    ];
    for (seed, write) in (1..).zip(writes) {
        let data = pattern(1024, seed);
        assert_eq!(guest.command(write, Data::Out(&data)).good(), data);
        for read in reads {
            assert_eq!(guest.command(read, Data::In(1024)).good(), data);
        }
    }
    let mut around = [1; 2048];
    disk.inner.read(6 * 512, &mut around).unwrap();
    assert!(
        around[..512]
            .iter()
            .chain(&around[1536..])
            .all(|byte| *byte == 0)
    );
    let units = guest.controller.counts().units;
    let counts = units[0].1;
    assert_eq!((counts.writes, counts.written_bytes), (4, 4096));
    assert_eq!((counts.reads, counts.read_bytes), (16, 16384));
}

#[test]
fn a_count_of_zero_is_256_blocks_in_the_short_form_and_none_in_others() {
    let (guest, _) = guest();
    let data = pattern(256 * 512, 9);
    let write = guest.command(&[0x0A, 0, 0, 0, 0, 0], Data::Out(&data));
    assert_eq!(write.transferred, 256 * 512);
    write.good();
    let read = guest.command(&[0x08, 0, 0, 0, 0, 0], Data::In(256 * 512));
    assert_eq!(read.good(), data);
    for cdb in [ten(0x28, 8192, 0), ten(0x2A, 0, 0)] {
        assert_eq!(guest.command(&cdb, Data::None).good(), []);
    }
    let end = guest.command(&ten(0x28, 8193, 0), Data::None);
    assert_eq!(end.check(), OUT_OF_RANGE);
}

#[test]
fn data_may_lie_anywhere_in_the_guests_pages() {
    let (guest, _) = guest();
    for (count, offset) in [(1, 0), (1, 3584), (8, 512), (9, 4094), (512, 2)] {
        let data = pattern(count * 512, offset as u32);
        let write = ten(0x2A, 3, count as u16);
        let pending = guest.start_at(0, 0, &write, Data::Out(&data), offset);
        assert_eq!(guest.finish(pending).good(), data);
        let read = ten(0x28, 3, count as u16);
        let pending = guest.start_at(0, 0, &read, Data::In(data.len()), 4094 - offset);
        assert_eq!(guest.finish(pending).good(), data);
    }
}

#[test]
fn pages_that_lie_apart_are_used_in_their_order() {
    use vmbus::hypervisor::Hypervisor;
    let (guest, disk) = guest();
    let data = pattern(4 * 4096, 5);
    disk.inner.write(0, &data).unwrap();
    let memory = guest.vm.machine.share_pages(8).unwrap();
    let order = [6, 0, 3, 2];
    let pages = order.map(|page| memory.pages().nth(page).unwrap());
    let packet = srb(0x0602, 0, &ten(0x28, 0, 32), Data::In(4 * 4096));
    let pending = guest.lend_pages(&packet, pages.to_vec(), 4 * 4096);
    guest.finish(pending).good();
    for (index, page) in order.into_iter().enumerate() {
        let mut content = vec![0; 4096];
        memory.read(page * 4096, &mut content).unwrap();
        assert_eq!(content, data[index * 4096..][..4096]);
    }
    for untouched in [1, 4, 5, 7] {
        let mut content = vec![1; 4096];
        memory.read(untouched * 4096, &mut content).unwrap();
        assert!(content.iter().all(|byte| *byte == 0));
    }
}

#[test]
fn blocks_beyond_the_end_are_out_of_range_in_every_command() {
    let (guest, disk) = guest();
    let data = pattern(1024, 1);
    for first in [8191, 8192, u64::from(u32::MAX)] {
        let short = u32::try_from(first).unwrap();
        for (cdb, data) in [
            (ten(0x28, short, 2), Data::In(1024)),
            (ten(0x2A, short, 2), Data::Out(&data)),
            (ten(0x2F, short, 2), Data::None),
            (ten(0x35, short, 2), Data::None),
        ] {
            assert_eq!(guest.command(&cdb, data).check(), OUT_OF_RANGE);
        }
    }
    for first in [8191, u64::MAX - 1, u64::MAX] {
        let read = guest.command(&sixteen(0x88, 0, first, 2), Data::In(1024));
        assert_eq!(read.check(), OUT_OF_RANGE);
        let write = guest.command(&sixteen(0x8A, 0, first, 2), Data::Out(&data));
        assert_eq!(write.check(), OUT_OF_RANGE);
    }
    let mut last = [1; 512];
    disk.inner.read(8191 * 512, &mut last).unwrap();
    assert_eq!(last, [0; 512], "nothing was written");
    assert_eq!(guest.controller.counts().units[0].1.illegal_requests, 18);
}

#[test]
fn a_command_that_moves_more_than_its_buffer_has_is_refused_whole() {
    let (guest, disk) = guest();
    let data = pattern(512, 1);
    let write = guest.command(&ten(0x2A, 0, 2), Data::Out(&data));
    assert_eq!(write.check(), INVALID_FIELD);
    let read = guest.command(&ten(0x28, 0, 2), Data::In(1023));
    assert_eq!(read.check(), INVALID_FIELD);
    // The other direction, and none.
    let write = guest.command(&ten(0x2A, 0, 1), Data::In(512));
    assert_eq!(write.check(), INVALID_FIELD);
    let read = guest.command(&ten(0x28, 0, 1), Data::Out(&data));
    assert_eq!(read.check(), INVALID_FIELD);
    let read = guest.command(&ten(0x28, 0, 1), Data::None);
    assert_eq!(read.check(), INVALID_FIELD);
    let mut first = [1; 512];
    disk.inner.read(0, &mut first).unwrap();
    assert_eq!(first, [0; 512], "nothing was written");
    // More room than data is no fault.
    let read = guest.command(&ten(0x28, 0, 1), Data::In(4096));
    assert_eq!(read.good().len(), 512);
    let inquiry = guest.command(&[0x12, 0, 0, 0, 36, 0], Data::Out(&data));
    assert_eq!((inquiry.srb_status, inquiry.scsi_status), (0x86, 2));
}

#[test]
fn a_transfer_longer_than_the_packet_lends_or_the_controller_allows_is_invalid() {
    let (guest, _) = guest();
    let mut packet = srb(0x0602, 0, &ten(0x28, 0, 2), Data::In(1024));
    let end = guest.finish(guest.lend(0, &packet, 100, 1023, &[]));
    assert_eq!((end.srb_status, end.scsi_status), (0x86, 2));
    let end = guest.finish(guest.begin(0, &packet));
    assert_eq!(end.srb_status, 0x86, "the packet lends nothing");
    let length = (256 << 10) + 512;
    packet[24..28].copy_from_slice(&(length as u32).to_le_bytes());
    let end = guest.finish(guest.lend(0, &packet, 0, length, &[]));
    assert_eq!(end.srb_status, 0x86, "above the maximum");
    packet[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
    let end = guest.finish(guest.lend(0, &packet, 0, 1024, &[]));
    assert_eq!(end.srb_status, 0x86);
    assert_eq!(guest.controller.counts().units[0].1.invalid, 4);
    let longest = ten(0x28, 0, 512);
    guest.command(&longest, Data::In(256 << 10)).good();
}

#[test]
fn fua_makes_a_write_durable_and_a_plain_write_may_wait() {
    let (guest, disk) = guest();
    let data = pattern(512, 1);
    guest.command(&ten(0x2A, 0, 1), Data::Out(&data)).good();
    assert_eq!(disk.flushes(), 0);
    for (count, cdb) in (1..).zip([
        &[0x2A, 8, 0, 0, 0, 0, 0, 0, 1, 0][..],
        &[0xAA, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        &sixteen(0x8A, 8, 0, 1),
    ]) {
        guest.command(cdb, Data::Out(&data)).good();
        assert_eq!(disk.flushes(), count);
    }
    guest.command(&sixteen(0x88, 8, 0, 1), Data::In(512)).good();
    assert_eq!(disk.flushes(), 4, "a read past the cache");
}

#[test]
fn synchronize_cache_flushes_in_both_forms() {
    let (guest, disk) = guest();
    guest.command(&ten(0x35, 0, 0), Data::None).good();
    guest
        .command(&[0x35, 2, 0, 0, 0, 0, 0, 0, 8, 0], Data::None)
        .good();
    guest.command(&sixteen(0x91, 0, 8191, 1), Data::None).good();
    assert_eq!(disk.flushes(), 3);
    assert_eq!(guest.controller.counts().units[0].1.flushes, 3);
    let end = guest.command(&sixteen(0x91, 0, 8192, 1), Data::None);
    assert_eq!(end.check(), OUT_OF_RANGE);
}

#[test]
fn a_read_only_disk_says_so_and_refuses_every_change() {
    let disk = TestDisk::small().with(|state| state.read_only = true);
    let guest = Guest::with_disk(disk.clone());
    const PROTECTED: (u8, u8, u8) = (7, 0x27, 0);
    let sense = guest.command(&[0x1A, 8, 0x3F, 0, 192, 0], Data::In(192));
    assert_eq!(sense.good()[2], 0x90, "WP, and DPOFUA");
    let data = pattern(512, 1);
    let write = guest.command(&ten(0x2A, 0, 1), Data::Out(&data));
    assert_eq!(write.check(), PROTECTED);
    assert_eq!(unmap(&guest, &unmap_list(&[(8, 8)])).check(), PROTECTED);
    guest.command(&ten(0x28, 0, 1), Data::In(512)).good();
    guest.command(&ten(0x35, 0, 0), Data::None).good();
    assert_eq!(disk.flushes(), 0);
    assert_eq!(guest.controller.counts().units[0].1.data_protect, 2);
}

#[test]
fn verify_reads_and_compares() {
    let (guest, disk) = guest();
    let data = pattern(1024, 3);
    disk.inner.write(4 * 512, &data).unwrap();
    let verify = |flags: u8, data: Data<'_>| {
        let mut cdb = ten(0x2F, 4, 2);
        cdb[1] = flags;
        guest.command(&cdb, data)
    };
    verify(0, Data::None).good();
    verify(2, Data::Out(&data)).good();
    let mut other = data.clone();
    other[1000] ^= 1;
    const MISCOMPARE: (u8, u8, u8) = (0xE, 0x1D, 0);
    assert_eq!(verify(2, Data::Out(&other)).check(), MISCOMPARE);
    assert_eq!(verify(6, Data::Out(&data[..512])).check(), MISCOMPARE);
    disk.inner.write(5 * 512, &data[..512]).unwrap();
    let end = verify(6, Data::Out(&data[..512]));
    assert_eq!((end.transferred, end.scsi_status), (512, 0));
    assert_eq!(verify(4, Data::None).check(), INVALID_FIELD);
    assert_eq!(verify(2, Data::Out(&data[..512])).check(), INVALID_FIELD);
    guest.command(&sixteen(0x8F, 0, 4, 2), Data::None).good();
    let twelve = [0xAF, 0, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0];
    guest.command(&twelve, Data::None).good();
    // No more than one command may move.
    let end = guest.command(&sixteen(0x8F, 0, 0, 513), Data::None);
    assert_eq!(end.check(), INVALID_FIELD);
}

#[test]
fn report_luns_lists_what_is_there_also_without_lun_0() {
    let guest = Guest::silent(Limits::default(), Arc::new(Inline));
    for lun in [3, 1, 63] {
        let disk = Lun::Disk(TestDisk::small());
        guest.controller.add_lun(lun, disk).unwrap();
    }
    let guest = guest.ready(0x0602);
    let report = |select, allocation: u32, room| {
        let mut cdb = [0; 12];
        (cdb[0], cdb[2]) = (0xA0, select);
        cdb[6..10].copy_from_slice(&allocation.to_be_bytes());
        guest.command(&cdb, Data::In(room))
    };
    let data = report(0, 4096, 4096).good();
    assert_eq!(be32(&data), 24);
    let entries: Vec<_> = data[8..].chunks(8).map(|entry| entry[1]).collect();
    assert_eq!(entries, [1, 3, 63]);
    assert_eq!(report(2, 4096, 4096).good(), data);
    assert_eq!(report(0, 16, 16).good(), data[..16]);
    assert_eq!(report(1, 4096, 4096).good(), [0; 8], "well-known units");
    assert_eq!(report(3, 4096, 4096).check(), INVALID_FIELD);
    assert_eq!(report(0, 15, 15).check(), INVALID_FIELD);
    // There is nothing behind other paths and targets.
    for at in [17, 18] {
        let mut cdb = [0; 12];
        (cdb[0], cdb[8]) = (0xA0, 1);
        let mut packet = srb(0x0602, 0, &cdb, Data::In(256));
        packet[at] = 1;
        let end = guest.finish(guest.lend(0, &packet, 0, 256, &[]));
        assert_eq!(end.good(), [0; 8]);
    }
}

#[test]
fn a_unit_that_is_not_there_says_so_to_inquiry_and_knows_no_other_command() {
    let (guest, _) = guest();
    let data = guest
        .on_lun(1, &[0x12, 0, 0, 0, 36, 0], Data::In(36))
        .good();
    assert_eq!((data[0], data.len()), (0x7F, 36));
    let end = guest.on_lun(1, &[0x12, 1, 0x83, 0, 36, 0], Data::In(36));
    assert_eq!(end.check(), INVALID_FIELD);
    for (cdb, data) in [
        (&[0; 6][..], Data::None),
        (&ten(0x28, 0, 1), Data::In(512)),
        (&[3, 0, 0, 0, 18, 0], Data::In(18)),
        (&[0xFF; 6], Data::None),
    ] {
        let end = guest.on_lun(1, cdb, data);
        assert_eq!(end.status, 0xC000_00C0);
        assert_eq!((end.srb_status, end.scsi_status), (0x20, 2));
        assert!(end.sense.is_empty());
    }
    assert_eq!(guest.controller.counts().packets.no_unit, 4);
}

#[test]
fn start_stop_of_a_disk_makes_it_safe_and_cannot_eject_it() {
    let (guest, disk) = guest();
    guest.command(&[0x1B, 0, 0, 0, 0, 0], Data::None).good();
    assert_eq!(disk.flushes(), 1);
    guest.command(&[0x1B, 0, 0, 0, 1, 0], Data::None).good();
    guest.command(&[0; 6], Data::None).good();
    let eject = guest.command(&[0x1B, 0, 0, 0, 2, 0], Data::None);
    assert_eq!(eject.check(), INVALID_FIELD);
    guest.command(&[0x1E, 0, 0, 0, 1, 0], Data::None).good();
    guest.command(&[0x1E, 0, 0, 0, 0, 0], Data::None).good();
}

#[test]
fn commands_that_are_not_there_are_illegal() {
    let (guest, _) = guest();
    let codes = [
        0x01, 0x04, 0x16, 0x17, 0x41, 0x43, 0x46, 0x4A, 0x51, 0x5E, 0x5F, 0x7F, 0x83, 0x85, 0x93,
        0xA1, 0xA3, 0xBD, 0xC0, 0xFF,
    ];
    for code in codes {
        let mut cdb = [0; 16];
        cdb[0] = code;
        let end = guest.command(&cdb, Data::None);
        assert_eq!(end.check(), ILLEGAL_OPCODE, "{code:#x}");
    }
}

#[test]
fn request_sense_has_nothing_to_tell_and_only_the_fixed_format() {
    let (guest, _) = guest();
    let sense = guest.command(&[3, 0, 0, 0, 252, 0], Data::In(252)).good();
    assert_eq!((sense.len(), sense[0], sense[2]), (18, 0x70, 0));
    let end = guest.command(&[3, 1, 0, 0, 252, 0], Data::In(252));
    assert_eq!(end.check(), INVALID_FIELD);
}

#[test]
fn what_goes_wrong_with_the_disk_has_its_sense_data() {
    let (guest, disk) = guest();
    let data = pattern(1024, 1);
    let read = || guest.command(&ten(0x28, 4, 2), Data::In(1024));
    let write = || guest.command(&ten(0x2A, 4, 2), Data::Out(&data));
    let fail = |error| disk.state.lock().unwrap().error = Some(error);
    fail(DiskError::Medium(5 * 512));
    let end = read();
    assert_eq!(end.check(), (3, 0x11, 0));
    assert_eq!(end.sense[0], 0xF0, "the block is told");
    assert_eq!(be32(&end.sense[3..]), 5);
    assert_eq!(write().check(), (3, 0x0C, 0));
    let verify = guest.command(&ten(0x2F, 4, 2), Data::None);
    assert_eq!(verify.check(), (3, 0x11, 0));
    fail(DiskError::NotReady);
    assert_eq!(read().check(), (2, 0x04, 1));
    fail(DiskError::NoSpace);
    assert_eq!(write().check(), (7, 0x27, 7));
    fail(DiskError::Failed("the file is gone".into()));
    assert_eq!(read().check(), (4, 0x44, 0));
    let flush = guest.command(&ten(0x35, 0, 0), Data::None);
    assert_eq!(flush.check(), (4, 0x44, 0));
    disk.state.lock().unwrap().error = None;
    write().good();
    assert_eq!(read().good(), data);
    let counts = guest.controller.counts().units[0].1;
    assert_eq!((counts.medium_errors, counts.hardware_errors), (3, 2));
    assert_eq!((counts.not_ready, counts.data_protect), (1, 1));
}

#[test]
fn a_disk_of_another_size_is_told_once_and_then_has_it() {
    let (guest, disk) = guest();
    disk.state.lock().unwrap().sectors = Some(16384);
    let read = ten(0x28, 0, 1);
    guest.command(&[0x12, 0, 0, 0, 36, 0], Data::In(36)).good();
    let end = guest.command(&read, Data::In(512));
    assert_eq!(end.check(), (6, 0x2A, 9));
    guest.command(&read, Data::In(512)).good();
    let capacity = guest.command(&ten(0x25, 0, 0), Data::In(8)).good();
    assert_eq!(be32(&capacity), 16383);
    disk.state.lock().unwrap().sectors = Some(100);
    let sense = guest.command(&[3, 0, 0, 0, 18, 0], Data::In(18)).good();
    assert_eq!((sense[2], sense[12], sense[13]), (6, 0x2A, 9));
    let end = guest.command(&ten(0x28, 100, 1), Data::In(512));
    assert_eq!(end.check(), OUT_OF_RANGE);
}
