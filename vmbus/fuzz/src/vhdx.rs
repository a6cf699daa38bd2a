//! VHDX files: any bytes in any of their parts, and any sequence of requests to a sound one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock};

use serde::{Deserialize, Serialize};
use vhdx::{MIB, MemoryStorage, Settings, Storage, Vhdx, check, create};

use crate::steps;

/// Something that happens to a file or to the disk in it.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// Bytes of the file become others: in the part of this number, from there on.
    Bytes(u8, u32, &'a [u8]),
    /// The structure at the start of a part gets its checksum.
    Seal(u8),
    /// The file gets another length.
    Length(u64),
    /// The disk is closed and opened again; for reading only, or not.
    Open(bool),
    /// What was written becomes durable, and the power fails; the disk is opened again.
    Crash,
    /// Sectors are written, with this value: the first one, and how many.
    Write(u32, u8, u8),
    /// Sectors are read.
    Read(u32, u8),
    /// Sectors are given back.
    Unmap(u32, u16),
    /// What was written becomes durable.
    Flush,
}

/// The parts of a file as `create` lays it out: both headers, both region tables, log, metadata, its items, BAT.
const PARTS: [(u64, usize); 9] = [
    (0, 0),
    (64 << 10, 4096),
    (128 << 10, 4096),
    (192 << 10, 64 << 10),
    (256 << 10, 64 << 10),
    (MIB, 8192),
    (2 * MIB, 0),
    (2 * MIB + (64 << 10), 0),
    (3 * MIB, 0),
];

/// How often a file that was changed by hand is opened: it may say that it has a table of half a GiB.
const OPENINGS: u32 = 16;

/// Sectors of the disks.
const SECTORS: u64 = 5 * 2048 + 3;

/// Sectors that are read together in the end.
const TOGETHER: u64 = 16;

/// What a file may take of memory, beyond what it began with: a few blocks, and a few bytes for each step.
const MAX_GROWTH: u64 = 64 * MIB;

/// Disks to begin with: dynamic, dynamic with its log in use, fixed.
static FILES: LazyLock<[MemoryStorage; 3]> = LazyLock::new(|| {
    let made = |fixed, write: bool| {
        let storage = Arc::new(MemoryStorage::new());
        let settings = Settings {
            fixed,
            block_size: 1 << 20,
            ..Settings::new(SECTORS * 512)
        };
        create(&(storage.clone() as Arc<dyn Storage>), &settings).expect("sound settings");
        if write {
            let disk = Vhdx::open(storage.clone(), false).expect("a sound disk");
            disk.write(0, &[1; 512]).expect("memory does not fail");
            disk.flush().expect("memory does not fail");
            // Before it is closed.
            return storage.copy();
        }
        storage.copy()
    };
    [made(false, false), made(false, true), made(true, false)]
});

/// A disk that is open, and what it holds as long as nobody changed its file by hand.
struct Open {
    storage: Arc<MemoryStorage>,
    disk: Option<Vhdx>,
    /// Sectors that are not zeros; `None` when anything may be in them.
    model: Option<BTreeMap<u64, u8>>,
    fixed: bool,
}

impl Open {
    fn reopen(&mut self, read_only: bool) {
        let sound = self.model.is_some();
        if let Some(disk) = self.disk.take() {
            let closed = disk.close();
            assert!(!sound || closed.is_ok(), "{closed:?}");
        }
        let opened = Vhdx::open(self.storage.clone(), read_only);
        if sound {
            let file: Arc<dyn Storage> = self.storage.clone();
            check(&file).expect("a disk that was only used is sound");
            assert!(opened.is_ok(), "a disk that was only used opens");
        }
        self.disk = opened.ok();
    }

    /// The file is changed by hand: nothing is open, and nothing known of the content any more.
    fn changed(&mut self) {
        self.disk = None;
        self.model = None;
    }

    fn flush(&self) {
        if let Some(disk) = &self.disk {
            let result = disk.flush();
            assert!(self.model.is_none() || result.is_ok(), "{result:?}");
        }
    }

    fn write(&mut self, first: u64, count: u64, value: u8) {
        let Some(disk) = &self.disk else { return };
        let length = usize::try_from(count * 512).unwrap_or(0);
        let result = disk.write(first * 512, &vec![value; length]);
        if let Some(model) = &mut self.model
            && !disk.is_read_only()
        {
            result.expect("memory does not fail");
            model.extend((first..first + count).map(|sector| (sector, value)));
        }
    }

    fn read(&self, first: u64, count: u64) {
        let Some(disk) = &self.disk else { return };
        let mut data = vec![0xEE; usize::try_from(count * 512).unwrap_or(0)];
        let result = disk.read(first * 512, &mut data);
        if let Some(model) = &self.model {
            result.expect("memory does not fail");
            for (sector, bytes) in (first..).zip(data.chunks(512)) {
                let value = model.get(&sector).copied().unwrap_or(0);
                assert_eq!(bytes, [value; 512], "sector {sector}");
            }
        }
    }

    /// Reads what was written and what lies beside it, and where blocks meet: all of the disk takes too long.
    fn read_back(&self) {
        let written = self.model.iter().flatten().map(|(sector, _)| *sector);
        let blocks = (0..SECTORS).step_by(2048);
        let places: BTreeSet<_> = written
            .chain(blocks)
            .flat_map(|sector| [sector.saturating_sub(1), sector, sector + 1])
            .map(|sector| sector.min(SECTORS - 1) / TOGETHER * TOGETHER)
            .collect();
        for first in places {
            self.read(first, TOGETHER.min(SECTORS - first));
        }
    }

    fn unmap(&mut self, first: u64, count: u64) {
        let Some(disk) = &self.disk else { return };
        let result = disk.unmap(first * 512, count * 512);
        if let Some(model) = &mut self.model
            && !disk.is_read_only()
        {
            result.expect("memory does not fail");
            // Whole blocks of 2048 sectors; the last one ends with the disk.
            let end = first + count;
            let last = if end == SECTORS {
                end
            } else {
                end / 2048 * 2048
            };
            let blocks = first.next_multiple_of(2048)..last;
            if !self.fixed {
                model.retain(|sector, _| !blocks.contains(sector));
            }
        }
    }
}

/// A file of any bytes, or a disk that is used and changed by hand: nothing panics, nothing takes memory without bound, and as
/// long as it is only used, the disk holds what was written. The first byte chooses the file.
pub fn vhdx(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else {
        return;
    };
    let Some(file) = FILES.get(usize::from(*choice)) else {
        let storage = Arc::new(MemoryStorage::with_content(data));
        assert!(
            Vhdx::open(storage, choice & 1 != 0).is_err(),
            "too short for a disk"
        );
        return;
    };
    let fixed = *choice == 2;
    let model = match choice {
        1 => BTreeMap::from([(0, 1)]),
        _ => BTreeMap::new(),
    };
    let mut open = Open {
        storage: Arc::new(file.copy()),
        disk: None,
        model: Some(model),
        fixed,
    };
    open.reopen(false);
    let mut openings = OPENINGS;
    for step in steps(data) {
        if open.model.is_none() && matches!(step, Step::Open(_) | Step::Crash) {
            let Some(left) = openings.checked_sub(1) else {
                break;
            };
            openings = left;
        }
        match step {
            Step::Bytes(part, at, bytes) => {
                open.changed();
                let (start, _) = PARTS[usize::from(part) % PARTS.len()];
                let at = start + u64::from(at) % MIB;
                open.storage
                    .write_at(at, bytes)
                    .expect("memory does not fail");
            }
            Step::Seal(part) => {
                open.changed();
                let (start, length) = PARTS[usize::from(part) % PARTS.len()];
                seal(&open.storage, start, length);
            }
            Step::Length(length) => {
                open.changed();
                let set = open.storage.set_length(length);
                set.expect("memory does not fail");
            }
            Step::Open(read_only) => open.reopen(read_only),
            Step::Crash => {
                open.flush();
                open.storage = Arc::new(open.storage.copy());
                open.disk = None;
                open.reopen(false);
            }
            Step::Write(first, count, value) => {
                let first = u64::from(first) % SECTORS;
                open.write(first, u64::from(count).min(SECTORS - first), value);
            }
            Step::Read(first, count) => {
                let first = u64::from(first) % SECTORS;
                open.read(first, u64::from(count).min(SECTORS - first));
            }
            Step::Unmap(first, count) => {
                let first = u64::from(first) % SECTORS;
                open.unmap(first, u64::from(count).min(SECTORS - first));
            }
            Step::Flush => open.flush(),
        }
    }
    open.reopen(true);
    open.read_back();
    let growth = open.storage.allocated().saturating_sub(file.allocated());
    assert!(growth <= MAX_GROWTH, "the file takes {growth} bytes more");
}

/// Puts the checksum into bytes 4 to 8 of a structure, if it has one.
fn seal(storage: &MemoryStorage, at: u64, length: usize) {
    let mut structure = vec![0; length];
    if length == 0 || storage.read_at(at, &mut structure).is_err() {
        return;
    }
    structure[4..8].fill(0);
    let sum = crc32c::crc32c(&structure);
    let written = storage.write_at(at + 4, &sum.to_le_bytes());
    written.expect("memory does not fail");
}
