//! Files that are not as they have to be: each is refused in a sentence that says where, and none does harm.

use std::sync::Arc;

use proptest::prelude::*;
use vhdx::{MIB, MemoryStorage, Settings, Storage, Vhdx, check};

use crate::support::{BAT, bytes, made, open, read, refusal, small};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;

/// Changes a structure and makes its checksum right again.
fn change(storage: &MemoryStorage, at: u64, length: usize, change: impl FnOnce(&mut [u8])) {
    let mut structure = bytes(storage, at, length);
    change(&mut structure);
    structure[4..8].fill(0);
    let sum = crc32c::crc32c(&structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
    storage.write_at(at, &structure).unwrap();
}

fn headers(storage: &MemoryStorage, mut edit: impl FnMut(&mut [u8])) {
    for at in HEADERS {
        change(storage, at, 4096, &mut edit);
    }
}

fn regions(storage: &MemoryStorage, mut edit: impl FnMut(&mut [u8])) {
    for at in REGION_TABLES {
        change(storage, at, 64 << 10, &mut edit);
    }
}

fn disk() -> Arc<MemoryStorage> {
    let storage = made(&small(8 * MIB));
    let disk = open(&storage);
    disk.write(0, &[1; 2048]).unwrap();
    disk.write(5 * MIB, &[2; 2048]).unwrap();
    disk.close().unwrap();
    storage
}

/// What a file with this change is refused for.
fn refused(edit: impl FnOnce(&MemoryStorage)) -> String {
    let storage = disk();
    edit(&storage);
    let before = storage.copy();
    let why = refusal(&storage);
    let writing = Vhdx::open(storage.clone(), false).map(drop);
    assert_eq!(writing.unwrap_err().to_string(), why);
    let length = storage.length().unwrap();
    assert_eq!(length, before.length().unwrap());
    let same = |offset: u64| {
        let length = (length - offset).min(MIB) as usize;
        bytes(&*storage, offset, length) == bytes(&before, offset, length)
    };
    assert!(
        (0..length).step_by(1 << 20).all(same),
        "what is refused is unchanged"
    );
    let file: Arc<dyn Storage> = storage;
    assert_eq!(check(&file).unwrap_err().to_string(), why);
    why
}

#[test]
fn no_vhdx() {
    let why = "is no VHDX file";
    assert_eq!(refused(|file| file.set_length(0).unwrap()), why);
    assert_eq!(refused(|file| file.set_length(7).unwrap()), why);
    assert_eq!(refused(|file| file.write_at(0, b"vhdxfilf").unwrap()), why);
}

#[test]
fn headers_must_be_valid_and_known() {
    let neither = refused(|file| {
        HEADERS
            .iter()
            .for_each(|at| file.write_at(at + 8, &[1]).unwrap());
    });
    assert_eq!(
        neither,
        "is damaged in its headers: neither of the two is valid"
    );
    let cut = refused(|file| file.set_length(64 << 10).unwrap());
    assert_eq!(cut, neither);
    let same = refused(|file| {
        headers(file, |header| header[8] = 9);
        change(file, HEADERS[1], 4096, |header| header[20] ^= 1);
    });
    assert!(
        same.contains("the two differ and have the same number"),
        "{same}"
    );
    let version = refused(|file| headers(file, |header| header[66] = 2));
    assert_eq!(version, "is of version 2, which is not known");
    let log_version = refused(|file| {
        headers(file, |header| {
            header[48] = 1;
            header[64] = 3;
        });
    });
    assert_eq!(log_version, "is of version 3, which is not known");
    let place = refused(|file| headers(file, |header| header[72] = 1));
    assert!(place.contains("not a multiple of 1 MiB"), "{place}");
    let long = refused(|file| headers(file, |header| header[71] = 0x10));
    assert_eq!(long, "is not supported: its log of 257 MiB is too long");
    // Found only when somebody flushes, it would be too late.
    let none = refused(|file| headers(file, |header| header[70] = 0));
    assert_eq!(none, "is damaged in its headers: they name no log");
    let beyond = refused(|file| headers(file, |header| header[76] = 1));
    assert_eq!(
        beyond,
        "is damaged in its headers: the log lies beyond the end of the file"
    );
}

#[test]
fn one_good_header_and_one_good_region_table_are_enough() {
    for at in HEADERS {
        let storage = disk();
        storage.write_at(at + 100, &[1]).unwrap();
        let disk = open(&storage);
        assert_eq!(read(&disk, 0, 2048), [1; 2048]);
        disk.write(0, &[3; 2048]).unwrap();
        disk.close().unwrap();
        assert_eq!(read(&open(&storage), 0, 2048), [3; 2048]);
    }
    for at in REGION_TABLES {
        let storage = disk();
        storage.write_at(at + 100, &[1]).unwrap();
        assert_eq!(read(&open(&storage), 0, 2048), [1; 2048]);
        let file: Arc<dyn Storage> = storage;
        let said = check(&file).unwrap().findings[0].to_string();
        assert_eq!(said, "one of the two region tables is damaged");
    }
}

#[test]
fn region_tables_must_name_what_is_needed_and_nothing_unknown() {
    let says = |edit: fn(&mut [u8])| refused(|file| regions(file, edit));
    let neither = refused(|file| {
        REGION_TABLES
            .iter()
            .for_each(|at| file.write_at(at + 9, &[1]).unwrap());
    });
    assert_eq!(
        neither,
        "is damaged in its region tables: neither of the two is valid"
    );
    let many = says(|table| table[9] = 0x10);
    assert!(many.contains("4098 entries are too many"), "{many}");
    let unknown = says(|table| table[16] ^= 1);
    assert!(unknown.starts_with("has a required region"), "{unknown}");
    let none = says(|table| table[8] = 1);
    assert!(none.contains("no metadata region is named"), "{none}");
    let optional = says(|table| {
        table[16] ^= 1;
        table[16 + 28] = 0;
    });
    assert!(
        optional.contains("no block allocation table is named"),
        "{optional}"
    );
    let twice = says(|table| table.copy_within(16..32, 48));
    assert!(twice.contains("is there twice"), "{twice}");
    let overlap = says(|table| table.copy_within(32..40, 64));
    assert!(overlap.contains("overlap"), "{overlap}");
    let beyond = says(|table| table[16 + 20] = 0xFF);
    assert!(beyond.contains("beyond the end of the file"), "{beyond}");
    let odd = says(|table| table[16 + 16] = 1);
    assert!(odd.contains("not in whole MiB"), "{odd}");
}

#[test]
fn metadata_must_be_complete_and_known() {
    // The table's entries begin at 32, the items at 64 KiB: flags, size, identity, logical and physical sector.
    const ITEMS: u64 = METADATA + (64 << 10);
    let says = |at: u64, bytes: &'static [u8]| refused(|file| file.write_at(at, bytes).unwrap());
    let entry = |number: u64| METADATA + 32 + 32 * number;
    for (at, bytes, part) in [
        (METADATA, &b"x"[..], "the table has no signature"),
        (METADATA + 11, &[0xFF], "items are too many"),
        (METADATA + 10, &[4], "the physical sector size is missing"),
        (entry(1) + 24, &[0], "the disk's size is missing"),
        (entry(2) + 24, &[7], "the disk's identity is missing"),
        (entry(1) + 20, &[9], "has a wrong length"),
        (entry(1) + 18, &[0xFF], "lies outside the region"),
        (entry(4) + 16, &[24], "items overlap"),
        (ITEMS, &[1], "a block size of"),
        (ITEMS + 8, &[1], "a disk size of"),
        (ITEMS + 15, &[1], "a disk size of"),
        (ITEMS + 33, &[1], "logical sectors of 256 bytes"),
        (ITEMS + 37, &[1], "physical sectors of 256 bytes"),
    ] {
        let why = if part.contains("size is missing") && at == entry(1) + 24 {
            // Not required any more, and unknown: as if it were not there.
            refused(|file| {
                file.write_at(entry(1), &[0xAA]).unwrap();
                file.write_at(entry(1) + 24, &[0]).unwrap();
            })
        } else {
            says(at, bytes)
        };
        assert!(why.starts_with("is damaged in its metadata: "), "{why}");
        assert!(why.contains(part), "{why}");
    }
    let unknown = says(entry(1), &[0xAA]);
    assert!(
        unknown.starts_with("has a required metadata item"),
        "{unknown}"
    );
    let twice = refused(|file| {
        let first = bytes(file, entry(0), 16);
        file.write_at(entry(1), &first).unwrap();
    });
    assert!(twice.contains("is there twice"), "{twice}");
    let child = says(ITEMS + 4, &[2]);
    assert!(child.starts_with("is a differencing disk"), "{child}");
}

#[test]
fn every_entry_of_the_bat_must_be_possible() {
    let says = |entry: u64| refused(|file| file.write_at(BAT + 16, &entry.to_le_bytes()).unwrap());
    let part = "is damaged in its block allocation table: block 2 ";
    assert_eq!(
        says(7),
        format!("{part}is partly in a parent, and the disk has none")
    );
    for reserved in [4, 5] {
        assert_eq!(
            says(reserved),
            format!("{part}has a state that is reserved")
        );
    }
    for beyond in [(1 << 30) | 6, !7 | 6] {
        assert_eq!(
            says(beyond),
            format!("{part}lies beyond the end of the file")
        );
    }
    // The headers, the log, the metadata, the BAT.
    for place in 0..4 {
        let why = says((place << 20) | 6);
        assert_eq!(why, format!("{part}lies where something else is"));
    }
    let crossed = refused(|file| {
        let other = bytes(file, BAT, 8);
        file.write_at(BAT + 16, &other).unwrap();
    });
    assert_eq!(crossed, format!("{part}lies where something else is"));
    let small = refused(|file| {
        let size = 200_000 * MIB;
        file.write_at(METADATA + (64 << 10) + 8, &size.to_le_bytes())
            .unwrap();
    });
    assert!(small.contains("its region has no room for"), "{small}");
}

/// A file whose log is in use, with one entry.
fn logged() -> Arc<MemoryStorage> {
    let storage = made(&small(8 * MIB));
    let disk = open(&storage);
    disk.write(0, &[1; 2048]).unwrap();
    disk.flush().unwrap();
    let storage = Arc::new(storage.copy());
    drop(disk);
    storage
}

#[test]
fn a_log_in_use_must_be_whole() {
    let says = |edit: &dyn Fn(&MemoryStorage)| {
        let storage = logged();
        edit(&storage);
        refusal(&storage)
    };
    let entry = |edit: fn(&mut [u8])| says(&|file: &MemoryStorage| change(file, LOG, 8192, edit));
    let part = "is damaged in its log: ";
    let torn = says(&|file| file.write_at(LOG + 5000, &[7]).unwrap());
    assert_eq!(
        torn,
        format!("{part}it is in use and no sequence of entries is whole")
    );
    // Descriptor of the header's number, data sector's numbers and signature, length, tail, count.
    for edit in [
        (|entry| entry[64 + 24] = 9) as fn(&mut [u8]),
        |entry| entry[4096 + 4] = 9,
        |entry| entry[8191] = 9,
        |entry| entry[4096] = b'x',
        |entry| entry[64] = b'x',
        |entry| entry[64 + 16] = 1,
        |entry| entry[9] = 0x10,
        |entry| entry[8] = 1,
        |entry| entry[13] = 0x10,
        |entry| entry[24] = 2,
        |entry| entry[27] = 0xFF,
        |entry| entry[16..24].fill(0),
    ] {
        assert_eq!(entry(edit), torn);
    }
    let headers_changed = entry(|entry| entry[64 + 18] = 1);
    assert!(
        headers_changed.contains("what a log cannot change"),
        "{headers_changed}"
    );
    let beyond = entry(|entry| entry[64 + 23] = 1);
    assert!(beyond.contains("what a log cannot change"), "{beyond}");
    let shorter = entry(|entry| entry[48 + 4] = 1);
    assert!(shorter.contains("shorter than it was"), "{shorter}");
    let longer = entry(|entry| entry[56 + 6] = 1);
    assert!(
        longer.contains("the file would become too long"),
        "{longer}"
    );
    let nothing = logged();
    nothing.zero(LOG, MIB).unwrap();
    let disk = open(&nothing);
    assert_eq!(
        read(&disk, 0, 2048),
        [1; 2048],
        "a log without an entry has nothing to replay"
    );
    let outside = says(&|file| headers(file, |header| header[75] = 0x10));
    assert!(outside.contains("not within the file"), "{outside}");
}

#[test]
fn the_newest_whole_sequence_of_the_log_counts() {
    // Enough entries to go round the end of the log.
    let storage = made(&small(512 * MIB));
    let disk = open(&storage);
    for round in 0..300u64 {
        let data = [round as u8 | 1; 512];
        disk.write(round * MIB, &data).unwrap();
        disk.flush().unwrap();
        let crashed = Arc::new(storage.copy());
        crashed.zero(BAT, 4096).unwrap();
        let replayed = open(&crashed);
        assert_eq!(
            replayed.present_blocks(),
            round + 1,
            "all that the newest entry says"
        );
        assert_eq!(read(&replayed, round * MIB, 512), data);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_change_gives_a_disk_or_a_sentence(
        changes in prop::collection::vec((0..5usize, 0..70_000u64, any::<[u8; 4]>()), 1..4),
        log: bool,
        sealed: bool,
    ) {
        let storage = if log { logged() } else { disk() };
        for (part, at, value) in changes {
            let (start, length) = [
                (HEADERS[0], 4096),
                (REGION_TABLES[0], 64 << 10),
                (LOG, 8192),
                (METADATA, 70_000),
                (BAT, 128),
            ][part];
            let at = at % (length - 4);
            if sealed && part < 3 {
                change(&storage, start, length as usize, |structure| {
                    structure[at as usize..][..4].copy_from_slice(&value);
                });
            } else {
                storage.write_at(start + at, &value).unwrap();
            }
        }
        for read_only in [true, false] {
            if let Ok(disk) = Vhdx::open(storage.clone(), read_only) {
                let size = disk.parameters().size;
                let sector = u64::from(disk.parameters().logical_sector);
                let mut data = vec![0; 4096];
                for at in [0, size / 2 / sector * sector, size.saturating_sub(4096)] {
                    let _ = disk.read(at, &mut data);
                    let _ = disk.write(at, &data);
                }
                let _ = disk.unmap(0, size);
                let _ = disk.flush();
            }
        }
    }

    #[test]
    fn any_bytes_give_a_sentence(mut bytes in prop::collection::vec(any::<u8>(), 0..2000), signed: bool) {
        if signed && bytes.len() > 8 {
            bytes[..8].copy_from_slice(b"vhdxfile");
        }
        let storage = Arc::new(MemoryStorage::with_content(&bytes));
        refusal(&storage);
    }
}

#[test]
fn settings_do_not_matter_for_a_sound_file() {
    let file: Arc<dyn Storage> = made(&Settings::new(8 << 30));
    let report = check(&file).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!(
        (report.present_blocks, report.parameters.size),
        (0, 8 << 30)
    );
}
