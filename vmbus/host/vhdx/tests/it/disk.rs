//! What a disk holds, how it grows, and what its headers say of it.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhdx::{Error, Finding, MIB, MemoryStorage, Settings, Storage, Uuid, Vhdx, check, create};

use crate::support::{BAT, bytes, made, open, read, small};

#[test]
fn every_block_size_and_sector_holds_what_is_written() {
    for block in 0..=8 {
        for (logical, physical) in [(512, 512), (512, 4096), (4096, 4096)] {
            for fixed in [false, true] {
                let block_size = 1 << (20 + block);
                let settings = Settings {
                    size: 3 * u64::from(block_size) + 5 * 4096,
                    fixed,
                    block_size,
                    logical_sector: logical,
                    physical_sector: physical,
                    identity: Uuid::from_u128(7),
                };
                let storage = made(&settings);
                let disk = open(&storage);
                let got = disk.parameters();
                assert_eq!(
                    (
                        got.size,
                        got.block_size,
                        got.logical_sector,
                        got.physical_sector
                    ),
                    (settings.size, block_size, logical, physical)
                );
                assert_eq!((got.fixed, got.identity), (fixed, settings.identity));
                let across = 2 * u64::from(block_size) - 4096;
                disk.write(across, &[5; 8192]).unwrap();
                disk.write(settings.size - 4096, &[6; 4096]).unwrap();
                disk.close().unwrap();
                let disk = Vhdx::open(storage, true).unwrap();
                assert_eq!(read(&disk, across - 4096, 4096), [0; 4096]);
                assert_eq!(read(&disk, across, 8192), [5; 8192]);
                assert_eq!(read(&disk, across + 8192, 4096), [0; 4096]);
                assert_eq!(read(&disk, settings.size - 4096, 4096), [6; 4096]);
                assert_eq!(disk.present_blocks(), if fixed { 4 } else { 3 });
            }
        }
    }
}

#[test]
fn a_bitmap_entry_follows_the_blocks_of_each_chunk() {
    // 512 << 23 bytes are a chunk: with blocks of 256 MiB a ratio of 16.
    let settings = Settings {
        block_size: 256 << 20,
        ..Settings::new(40 << 30)
    };
    let storage = made(&settings);
    let disk = open(&storage);
    for block in [15, 16, 33] {
        disk.write(block << 28, &[block as u8; 512]).unwrap();
    }
    disk.close().unwrap();
    let entry = |index: u64| {
        let raw = bytes(&*storage, BAT + index * 8, 8);
        u64::from_le_bytes(raw.try_into().unwrap()) & 7
    };
    let present: Vec<_> = (0..170).filter(|index| entry(*index) == 6).collect();
    assert_eq!(
        present,
        [15, 17, 35],
        "one behind each 16 blocks is the bitmap's"
    );
    let disk = open(&storage);
    assert_eq!(read(&disk, 33 << 28, 512), [33; 512]);
}

#[test]
fn requests_must_be_whole_sectors_of_the_disk() {
    let settings = Settings {
        logical_sector: 4096,
        ..small(2 * MIB)
    };
    let disk = open(&made(&settings));
    let mut data = [0; 8192];
    for (offset, length) in [
        (512, 4096),
        (0, 512),
        (2 * MIB, 4096),
        (2 * MIB - 4096, 8192),
    ] {
        let data = &mut data[..length];
        assert!(matches!(disk.read(offset, data), Err(Error::OutOfRange)));
        assert!(matches!(disk.write(offset, data), Err(Error::OutOfRange)));
        let unmapped = disk.unmap(offset, length as u64);
        assert!(matches!(unmapped, Err(Error::OutOfRange)));
    }
    assert!(matches!(
        disk.read(u64::MAX - 4095, &mut data[..4096]),
        Err(Error::OutOfRange)
    ));
}

#[test]
fn what_cannot_be_a_disk_is_not_created() {
    let wrong = |settings: Settings, part: &str| {
        let file: Arc<dyn Storage> = Arc::new(MemoryStorage::new());
        let error = create(&file, &settings).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
        assert_eq!(file.length().unwrap(), 0, "nothing is written");
    };
    let settings = Settings::new(8 << 20);
    wrong(
        Settings {
            size: 0,
            ..settings
        },
        "a disk size of 0",
    );
    wrong(
        Settings {
            size: 513,
            ..settings
        },
        "a disk size of 513",
    );
    wrong(
        Settings {
            size: (64 << 40) + 512,
            ..settings
        },
        "a disk size of",
    );
    wrong(
        Settings {
            block_size: 512 << 10,
            ..settings
        },
        "a block size of",
    );
    wrong(
        Settings {
            block_size: 3 << 20,
            ..settings
        },
        "a block size of",
    );
    wrong(
        Settings {
            block_size: 512 << 20,
            ..settings
        },
        "a block size of",
    );
    wrong(
        Settings {
            logical_sector: 1024,
            ..settings
        },
        "logical sectors of 1024",
    );
    wrong(
        Settings {
            physical_sector: 8192,
            ..settings
        },
        "physical sectors of 8192",
    );
    wrong(
        Settings {
            logical_sector: 4096,
            physical_sector: 512,
            ..settings
        },
        "shorter",
    );
    let file: Arc<dyn Storage> = Arc::new(MemoryStorage::with_content(b"precious"));
    let error = create(&file, &settings).unwrap_err().to_string();
    assert!(error.contains("not empty"), "{error}");
}

#[test]
fn the_largest_disk_takes_no_more_memory_than_it_holds() {
    let storage = made(&small(64 << 40));
    let disk = open(&storage);
    disk.write((64 << 40) - 512, &[1; 512]).unwrap();
    disk.unmap(0, 64 << 40).unwrap();
    disk.write((64 << 40) - 512, &[2; 512]).unwrap();
    disk.close().unwrap();
    assert_eq!(read(&open(&storage), (64 << 40) - 512, 512), [2; 512]);
    assert!(storage.allocated() < 4 * MIB, "{}", storage.allocated());
}

#[test]
fn what_is_given_back_reads_as_zeros_and_its_place_is_used_again() {
    let storage = made(&small(16 * MIB));
    let disk = open(&storage);
    disk.write(0, &vec![1; 4 << 20]).unwrap();
    disk.flush().unwrap();
    let grown = storage.length().unwrap();
    // The blocks 1 and 2 wholly, of 0 and 3 only parts.
    disk.unmap(512, 4 * MIB - 1024).unwrap();
    assert_eq!(disk.present_blocks(), 2);
    assert_eq!(read(&disk, MIB - 512, 1024), [[1; 512], [0; 512]].concat());
    assert_eq!(
        read(&disk, 3 * MIB - 512, 1024),
        [[0; 512], [1; 512]].concat()
    );
    // Until the BAT is durable the places are still the old blocks'.
    disk.write(8 * MIB, &[2; 512]).unwrap();
    assert_eq!(storage.length().unwrap(), grown + MIB);
    disk.flush().unwrap();
    disk.write(9 * MIB + 512, &[3; 512]).unwrap();
    disk.write(10 * MIB, &[4; 512]).unwrap();
    assert_eq!(storage.length().unwrap(), grown + MIB);
    let around = read(&disk, 9 * MIB, 1536);
    assert_eq!(
        around,
        [[0; 512], [3; 512], [0; 512]].concat(),
        "no old content"
    );
    assert_eq!(read(&disk, 10 * MIB + 512, 1 << 19), vec![0; 1 << 19]);
    disk.close().unwrap();
    let disk = open(&storage);
    assert_eq!(read(&disk, 9 * MIB, 1536), around);
    assert_eq!(read(&disk, MIB, 2 << 20), vec![0; 2 << 20]);
}

#[test]
fn a_fixed_disk_keeps_its_blocks() {
    let settings = Settings {
        fixed: true,
        ..small(4 * MIB)
    };
    let storage = made(&settings);
    let length = storage.length().unwrap();
    let disk = open(&storage);
    disk.write(0, &[1; 512]).unwrap();
    disk.unmap(0, 4 * MIB).unwrap();
    assert_eq!(read(&disk, 0, 512), [1; 512]);
    assert_eq!(disk.present_blocks(), 4);
    disk.close().unwrap();
    assert_eq!(storage.length().unwrap(), length);
}

/// The newest header of a file: its number, and its GUIDs for file, data and log.
fn header(storage: &MemoryStorage) -> (u64, [u8; 16], [u8; 16], [u8; 16]) {
    let one = |offset| {
        let header = bytes(storage, offset, 64);
        let guid = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).unwrap();
        let number = u64::from_le_bytes(header[8..16].try_into().unwrap());
        (number, guid(16), guid(32), guid(48))
    };
    one(64 << 10).max(one(128 << 10))
}

#[test]
fn the_headers_say_when_file_and_data_changed_and_when_the_log_is_in_use() {
    let storage = made(&small(4 * MIB));
    let created = header(&storage);
    assert_eq!(created.3, [0; 16], "no log in use");
    let disk = open(&storage);
    read(&disk, 0, 512);
    disk.flush().unwrap();
    assert_eq!(header(&storage), created, "reading changes nothing");
    disk.write(0, &[1; 512]).unwrap();
    let written = header(&storage);
    assert!(written.0 > created.0);
    assert_ne!((written.1, written.2), (created.1, created.2));
    assert_ne!(written.1, created.1);
    assert_eq!(written.3, [0; 16], "nothing is in the log yet");
    disk.flush().unwrap();
    let flushed = header(&storage);
    assert_eq!(
        (flushed.1, flushed.2),
        (written.1, written.2),
        "once in a session"
    );
    assert_ne!(flushed.3, [0; 16], "the log is in use");
    disk.write(0, &[2; 512]).unwrap();
    disk.flush().unwrap();
    assert_eq!(
        header(&storage),
        flushed,
        "a block that is there needs no log"
    );
    disk.close().unwrap();
    let closed = header(&storage);
    assert_eq!(
        (closed.1, closed.2, closed.3),
        (flushed.1, flushed.2, [0; 16])
    );
    drop(Vhdx::open(storage.clone(), true).unwrap());
    assert_eq!(header(&storage), closed);
}

#[test]
fn a_disk_that_was_not_closed_is_read_through_its_log() {
    let storage = made(&small(4 * MIB));
    let disk = open(&storage);
    disk.write(MIB, &[3; 512]).unwrap();
    disk.flush().unwrap();
    let crashed = Arc::new(storage.copy());
    // The BAT in its place as it was before: only the log knows.
    crashed.zero(BAT, 4096).unwrap();
    let before = header(&crashed);
    let file: Arc<dyn Storage> = crashed.clone();
    assert!(check(&file).unwrap().findings.contains(&Finding::LogInUse));
    let reading = Vhdx::open(crashed.clone(), true).unwrap();
    assert_eq!(read(&reading, MIB, 512), [3; 512]);
    assert!(matches!(reading.write(0, &[0; 512]), Err(Error::ReadOnly)));
    drop(reading);
    assert_eq!(header(&crashed), before, "reading replays nothing for good");
    let writing = open(&crashed);
    assert_eq!(read(&writing, MIB, 512), [3; 512]);
    let replayed = header(&crashed);
    assert_ne!(replayed.1, before.1, "a replay changes the file");
    assert_eq!(replayed.2, before.2, "and not the disk");
    assert_eq!(replayed.3, [0; 16]);
    drop(writing);
    assert_eq!(check(&file).unwrap().findings, []);
}

#[test]
fn blocks_that_are_not_present_read_as_zeros_and_keep_the_place_they_hold() {
    let storage = made(&small(8 * MIB));
    let end = storage.length().unwrap();
    storage.set_length(end + 3 * MIB).unwrap();
    storage.write_at(end, &vec![9; 3 << 20]).unwrap();
    // Undefined, zero and unmapped, each with a place; not present with a number that means nothing; unmapped with the place of another.
    let entries = [
        end | 1,
        (end + MIB) | 2,
        (end + 2 * MIB) | 3,
        5 * MIB,
        end | 3,
    ];
    for (index, entry) in (0..).zip(entries) {
        storage
            .write_at(BAT + index * 8, &entry.to_le_bytes())
            .unwrap();
    }
    let disk = open(&storage);
    assert_eq!(disk.present_blocks(), 0);
    assert_eq!(read(&disk, 0, 8 << 20), vec![0; 8 << 20]);
    for block in [0, 2, 4] {
        disk.write(block * MIB + 512, &[block as u8; 512]).unwrap();
        let start = read(&disk, block * MIB, 1536);
        assert_eq!(start, [[0; 512], [block as u8; 512], [0; 512]].concat());
    }
    disk.close().unwrap();
    let entry = |index: u64| {
        let raw = bytes(&*storage, BAT + index * 8, 8);
        u64::from_le_bytes(raw.try_into().unwrap())
    };
    let kept = [end | 6, (end + MIB) | 2, (end + 2 * MIB) | 6];
    assert_eq!([entry(0), entry(1), entry(2)], kept);
    assert_eq!(
        entry(4),
        (end + 3 * MIB) | 6,
        "what another holds is not taken"
    );
    let disk = open(&storage);
    assert_eq!(read(&disk, 4 * MIB + 512, 512), [4; 512]);
}

/// Memory that fails from a given operation on.
struct Failing {
    storage: Arc<MemoryStorage>,
    left: AtomicU64,
    syncs_only: bool,
}

impl Failing {
    fn pass(&self, is_sync: bool) -> io::Result<()> {
        if self.syncs_only && !is_sync {
            return Ok(());
        }
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.left.store(left - 1, Ordering::Relaxed);
        Ok(())
    }
}

impl Storage for Failing {
    fn length(&self) -> io::Result<u64> {
        self.storage.length()
    }
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.storage.read_at(offset, data)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pass(false)?;
        self.storage.write_at(offset, data)
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        self.pass(false)?;
        self.storage.set_length(length)
    }
    fn sync(&self) -> io::Result<()> {
        self.pass(true)
    }
}

#[test]
fn a_full_storage_fails_the_write_and_keeps_the_disk() {
    // The log, the headers (each written and synced), the page of the BAT, the growth and the write of the block.
    for left in 5..8 {
        let storage = made(&small(4 * MIB));
        let failing = Arc::new(Failing {
            storage: storage.clone(),
            left: AtomicU64::new(left),
            syncs_only: false,
        });
        let disk = Vhdx::open(failing.clone(), false).unwrap();
        let error = disk.write(0, &[1; 512]).unwrap_err();
        assert!(error.is_no_space(), "{error}");
        assert_eq!(read(&disk, 0, 512), [0; 512]);
        failing.left.store(100, Ordering::Relaxed);
        disk.write(512, &[2; 512]).unwrap();
        disk.close().unwrap();
        let disk = open(&storage);
        assert_eq!(read(&disk, 0, 1024), [[0; 512], [2; 512]].concat());
    }
}

#[test]
fn after_a_failed_sync_nothing_is_promised_any_more() {
    let storage = made(&small(4 * MIB));
    let failing = Arc::new(Failing {
        storage: storage.clone(),
        left: AtomicU64::new(2),
        syncs_only: true,
    });
    let disk = Vhdx::open(failing.clone(), false).unwrap();
    disk.write(0, &[1; 512]).unwrap();
    assert!(disk.flush().unwrap_err().is_no_space());
    failing.left.store(100, Ordering::Relaxed);
    assert!(matches!(disk.flush(), Err(Error::Stopped)));
    assert!(matches!(disk.write(0, &[1; 512]), Err(Error::Stopped)));
    assert!(matches!(disk.unmap(0, MIB), Err(Error::Stopped)));
    assert_eq!(read(&disk, 0, 512), [1; 512]);
    assert!(matches!(disk.close(), Err(Error::Stopped)));
    open(&storage).write(0, &[2; 512]).unwrap();
}

#[test]
fn many_threads_share_a_disk() {
    let storage = made(&small(64 * MIB));
    let disk = open(&storage);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                for round in 0..16 {
                    let offset = (round * 4 + thread) * MIB;
                    let data = vec![(offset / MIB) as u8 + 1; 8192];
                    disk.write(offset + 4096, &data).unwrap();
                    disk.flush().unwrap();
                    assert_eq!(read(disk, offset + 4096, 8192), data);
                    if round % 4 == 3 {
                        disk.unmap(offset - 4 * MIB, MIB).unwrap();
                    }
                }
            });
        }
    });
    disk.close().unwrap();
    let disk = open(&storage);
    for block in 0..64 {
        let unmapped = (block / 4) % 4 == 2;
        let value = if unmapped { 0 } else { block as u8 + 1 };
        assert_eq!(read(&disk, block * MIB + 4096, 8192), vec![value; 8192]);
    }
}

#[test]
fn a_block_that_is_written_and_given_back_again_and_again_does_not_grow_the_file() {
    for block_size in [1 << 20, 32 << 20] {
        let storage = made(&Settings {
            block_size,
            ..Settings::new(64 * MIB)
        });
        let empty = storage.length().unwrap();
        let disk = open(&storage);
        let data = [7; 4096];
        for _ in 0..1000 {
            disk.write(0, &data).unwrap();
            disk.unmap(0, block_size.into()).unwrap();
        }
        // The disk's own size, and what may wait for the next flush.
        let most = empty + 64 * MIB + 128 * MIB;
        let length = storage.length().unwrap();
        assert!(length <= most, "blocks of {block_size}: {length} bytes");
        disk.write(0, &data).unwrap();
        disk.close().unwrap();
        assert_eq!(read(&open(&storage), 0, 4096), data);
    }
}

/// A file system with so much room: what is a hole takes none.
struct FileSystem {
    storage: MemoryStorage,
    room: AtomicU64,
    /// Pages that have their room.
    pages: Mutex<BTreeSet<u64>>,
}

impl FileSystem {
    const PAGE: u64 = 4096;

    /// Gives these bytes room, where they have none.
    fn take(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut pages = self.pages.lock().unwrap();
        let range = offset / Self::PAGE..(offset + length).div_ceil(Self::PAGE);
        let new: Vec<_> = range.filter(|page| !pages.contains(page)).collect();
        let room = self.room.load(Ordering::Relaxed);
        let rest = room.checked_sub(new.len() as u64 * Self::PAGE);
        let rest = rest.ok_or(io::ErrorKind::StorageFull)?;
        self.room.store(rest, Ordering::Relaxed);
        pages.extend(new);
        Ok(())
    }
}

impl Storage for FileSystem {
    fn length(&self) -> io::Result<u64> {
        self.storage.length()
    }
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.storage.read_at(offset, data)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.take(offset, data.len() as u64)?;
        self.storage.write_at(offset, data)
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        self.storage.set_length(length)
    }
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_file_system_fails_writes_and_no_flush_and_takes_writes_when_there_is_room_again() {
    let made = made(&small(1024 * MIB));
    for room in 0..512 {
        let storage = Arc::new(FileSystem {
            storage: made.copy(),
            room: AtomicU64::new(room * FileSystem::PAGE),
            // What another program has made may have holes behind its headers.
            pages: Mutex::new((0..MIB / FileSystem::PAGE).collect()),
        });
        let disk = Vhdx::open(storage.clone(), false).unwrap();
        let mut written = Vec::new();
        // In three pages of the BAT.
        for offset in [0, 600 * MIB, MIB, 1023 * MIB].into_iter().cycle() {
            let offset = offset + 4096 * written.len() as u64;
            if written.len() == 8 {
                break;
            }
            match disk.write(offset, &[7; 4096]) {
                Ok(()) => written.push(offset),
                Err(error) if error.is_no_space() => break,
                Err(error) => panic!("{error}"),
            }
        }
        disk.flush().unwrap();
        storage.room.store(64 * MIB, Ordering::Relaxed);
        disk.write(512 * MIB, &[8; 4096]).unwrap();
        disk.close().unwrap();
        let disk = Vhdx::open(storage, true).unwrap();
        for offset in written.iter().copied() {
            assert_eq!(read(&disk, offset, 4096), [7; 4096], "{room}");
        }
        assert_eq!(read(&disk, 512 * MIB, 4096), [8; 4096]);
        if written.len() == 8 {
            return;
        }
    }
    panic!("the room never suffices");
}
