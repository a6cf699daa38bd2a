//! UNMAP, and what the disk says of it beforehand.

use vmbus_host::disk::Disk;

use crate::commands::{be32, guest, vital};
use crate::disk::TestDisk;
use crate::guest::*;

/// UNMAP with these blocks.
pub fn unmap_list(blocks: &[(u64, u32)]) -> Vec<u8> {
    let mut list = Vec::new();
    list.extend_from_slice(&(blocks.len() as u16 * 16 + 6).to_be_bytes());
    list.extend_from_slice(&(blocks.len() as u16 * 16).to_be_bytes());
    list.extend_from_slice(&[0; 4]);
    for (first, count) in blocks {
        list.extend_from_slice(&first.to_be_bytes());
        list.extend_from_slice(&count.to_be_bytes());
        list.extend_from_slice(&[0; 4]);
    }
    list
}

pub fn unmap(guest: &Guest, list: &[u8]) -> End {
    guest.command(&ten(0x42, 0, list.len() as u16), Data::Out(list))
}

#[test]
fn unmap_gives_back_the_blocks_that_it_lists_and_no_others() {
    let (guest, disk) = guest();
    disk.inner.write(0, &[7; 64 * 512]).unwrap();
    unmap(&guest, &unmap_list(&[(8, 8), (0, 0), (32, 16)])).good();
    let mut content = vec![0; 64 * 512];
    disk.inner.read(0, &mut content).unwrap();
    for (block, sector) in content.chunks(512).enumerate() {
        let gone = (8..16).contains(&block) || (32..48).contains(&block);
        let expected = if gone { 0 } else { 7 };
        assert!(sector.iter().all(|byte| *byte == expected), "{block}");
    }
    let counts = guest.controller.counts().units[0].1;
    assert_eq!((counts.unmaps, counts.unmapped_bytes), (1, 24 * 512));
    guest.command(&ten(0x42, 0, 0), Data::None).good();
    unmap(&guest, &unmap_list(&[])).good();
}

#[test]
fn a_broken_unmap_list_changes_nothing() {
    let (guest, disk) = guest();
    disk.inner.write(0, &[7; 64 * 512]).unwrap();
    let good = unmap_list(&[(8, 8)]);
    const LENGTH: (u8, u8, u8) = (5, 0x1A, 0);
    assert_eq!(unmap(&guest, &good[..7]).check(), LENGTH);
    assert_eq!(unmap(&guest, &good[..23]).check(), LENGTH);
    let out = unmap_list(&[(8, 8), (8191, 2)]);
    assert_eq!(unmap(&guest, &out).check(), OUT_OF_RANGE);
    let out = unmap_list(&[(8, 8), (u64::MAX, u32::MAX)]);
    assert_eq!(unmap(&guest, &out).check(), OUT_OF_RANGE);
    let many = unmap_list(&vec![(8, 8); 257]);
    assert_eq!(unmap(&guest, &many).check(), (5, 0x26, 0));
    let mut anchor = ten(0x42, 0, 24);
    anchor[1] = 1;
    let end = guest.command(&anchor, Data::Out(&good));
    assert_eq!(end.check(), INVALID_FIELD);
    // The list is longer than the buffer.
    let end = guest.command(&ten(0x42, 0, 24), Data::Out(&good[..8]));
    assert_eq!(end.srb_status, 0x86);
    let mut content = vec![0; 64 * 512];
    disk.inner.read(0, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 7));
    // A descriptor that is cut off is ignored.
    let mut cut = good.clone();
    cut[3] = 15;
    unmap(&guest, &cut).good();
    disk.inner.read(0, &mut content).unwrap();
    assert!(content.iter().all(|byte| *byte == 7));
    unmap(&guest, &unmap_list(&[(8, 8); 256])).good();
}

#[test]
fn a_disk_that_cannot_unmap_knows_no_such_command() {
    let disk = TestDisk::small().with(|state| state.can_not_unmap = true);
    let guest = Guest::with_disk(disk);
    let end = unmap(&guest, &unmap_list(&[(8, 8)]));
    assert_eq!(end.check(), ILLEGAL_OPCODE);
    let long = guest.command(&sixteen(0x9E, 0x10, 0, 32), Data::In(32));
    assert_eq!(long.good()[14], 0);
}

#[test]
fn block_limits_and_provisioning_say_what_unmap_can_do() {
    let (guest, _) = guest();
    let limits = vital(&guest, 0xB0).good();
    assert_eq!(limits.len(), 0x40);
    assert_eq!(be32(&limits[8..]), (256 << 10) / 512, "maximum transfer");
    assert_eq!(be32(&limits[20..]), u32::MAX, "blocks");
    assert_eq!(be32(&limits[24..]), 256, "descriptors");
    assert_eq!(be32(&limits[28..]), 8, "granularity");
    assert_eq!(be32(&limits[32..]), 0x8000_0000, "aligned to 0");
    assert_eq!(vital(&guest, 0xB1).good()[4..6], [0, 1], "nothing rotates");
    assert_eq!(vital(&guest, 0xB2).good()[4..], [0, 0x80, 2, 0], "thin");
    let disk = TestDisk::small().with(|state| state.can_not_unmap = true);
    let guest = Guest::with_disk(disk);
    let limits = vital(&guest, 0xB0).good();
    assert!(limits[20..36].iter().all(|byte| *byte == 0));
    assert_eq!(vital(&guest, 0xB2).good()[4..], [0; 4]);
}
