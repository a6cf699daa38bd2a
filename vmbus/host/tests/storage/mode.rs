//! Mode pages of a disk: what it tells, and what can be changed.

use crate::commands::guest;
use crate::guest::*;
use crate::unmap::{unmap, unmap_list};

#[test]
fn mode_sense_has_the_cache_and_control_pages_in_both_forms() {
    let (guest, _) = guest();
    let short = |page, allocation: u8| {
        guest.command(
            &[0x1A, 0, page, 0, allocation, 0],
            Data::In(allocation.into()),
        )
    };
    let all = short(0x3F, 255).good();
    assert_eq!(all.len(), 4 + 8 + 20 + 12);
    assert_eq!(all[..4], [43, 0, 0x10, 8]);
    assert_eq!(all[12..15], [8, 18, 4], "write cache enabled");
    assert_eq!(all[32..34], [0x0A, 10]);
    assert_eq!(short(0x3F, 4).good(), all[..4]);
    let long = guest.command(&[0x5A, 8, 8, 0, 0, 0, 0, 0, 255, 0], Data::In(255));
    let long = long.good();
    assert_eq!(long[..8], [0, 26, 0, 0x10, 0, 0, 0, 0]);
    assert_eq!(long[8..], all[12..32]);
    assert_eq!(short(0x1C, 255).check(), INVALID_FIELD);
    let saved = guest.command(&[0x1A, 0, 0xC8, 0, 255, 0], Data::In(255));
    assert_eq!(saved.check(), (5, 0x39, 0));
}

#[test]
fn mode_select_turns_the_write_cache_off_and_every_write_is_durable_then() {
    let (guest, disk) = guest();
    let mut list = vec![0; 4 + 20];
    list[4..6].copy_from_slice(&[8, 18]);
    let select = |list: &[u8], flags| {
        let cdb = [0x15, flags, 0, 0, list.len() as u8, 0];
        guest.command(&cdb, Data::Out(list))
    };
    select(&list, 0x10).good();
    assert_eq!(disk.flushes(), 1, "what waited in the cache");
    let cache = || {
        let cdb = [0x1A, 8, 8, 0, 24, 0];
        guest.command(&cdb, Data::In(24)).good()[6]
    };
    assert_eq!(cache(), 0);
    let data = pattern(512, 1);
    guest.command(&ten(0x2A, 0, 1), Data::Out(&data)).good();
    unmap(&guest, &unmap_list(&[(8, 8)])).good();
    assert_eq!(disk.flushes(), 3);
    list[6] = 4;
    select(&list, 0x10).good();
    assert_eq!(cache(), 4);
    guest.command(&ten(0x2A, 0, 1), Data::Out(&data)).good();
    assert_eq!(disk.flushes(), 3);
    // The long form.
    let mut long = vec![0; 8 + 20];
    long[8..10].copy_from_slice(&[8, 18]);
    let cdb = [0x55, 0x10, 0, 0, 0, 0, 0, 0, 28, 0];
    guest.command(&cdb, Data::Out(&long)).good();
    assert_eq!(cache(), 0);
    // Saving, the vendor's own format, and what cannot be changed.
    assert_eq!(select(&list, 0x11).check(), INVALID_FIELD);
    assert_eq!(select(&list, 0x00).check(), INVALID_FIELD);
    list[7] = 1;
    let end = select(&list, 0x10);
    assert_eq!(end.check(), (5, 0x26, 0));
    assert_eq!(end.sense[15..18], [0x80, 0, 7], "the field");
    assert_eq!(select(&list[..23], 0x10).check(), (5, 0x1A, 0));
    guest.command(&[0x15, 0x10, 0, 0, 0, 0], Data::None).good();
}
