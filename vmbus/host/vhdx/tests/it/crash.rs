//! A power failure at any moment leaves a valid disk with everything that was durable.
//!
//! A session is recorded as the writes that reach the storage. Then it is played back up to each of them, in order, and in any
//! order: of the writes since the last sync any may be missing, and any may be torn between sectors of 512 bytes.

use std::io;
use std::sync::{Arc, Mutex};

use vhdx::{Finding, MemoryStorage, Settings, Storage, Vhdx, check};

use crate::support::{Random, made, open, read, small};

#[derive(Clone, Debug)]
enum Operation {
    Write(u64, Vec<u8>),
    Length(u64),
    Zero(u64, u64),
    Sync,
}

/// Memory that writes down what is done to it.
struct Recorder {
    storage: MemoryStorage,
    operations: Mutex<Vec<Operation>>,
}

impl Recorder {
    fn new(start: &MemoryStorage) -> Arc<Self> {
        Arc::new(Self {
            storage: start.copy(),
            operations: Mutex::new(Vec::new()),
        })
    }

    fn note(&self, operation: Operation) {
        self.operations.lock().unwrap().push(operation);
    }

    /// How many operations there have been.
    fn now(&self) -> usize {
        self.operations.lock().unwrap().len()
    }
}

impl Storage for Recorder {
    fn length(&self) -> io::Result<u64> {
        self.storage.length()
    }
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.storage.read_at(offset, data)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note(Operation::Write(offset, data.to_vec()));
        self.storage.write_at(offset, data)
    }
    fn set_length(&self, length: u64) -> io::Result<()> {
        self.note(Operation::Length(length));
        self.storage.set_length(length)
    }
    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.note(Operation::Zero(offset, length));
        self.storage.zero(offset, length)
    }
    fn sync(&self) -> io::Result<()> {
        self.note(Operation::Sync);
        self.storage.sync()
    }
}

fn apply(storage: &MemoryStorage, operation: &Operation) {
    match operation {
        Operation::Write(offset, data) => storage.write_at(*offset, data).unwrap(),
        Operation::Length(length) => storage.set_length(*length).unwrap(),
        Operation::Zero(offset, length) => storage.zero(*offset, *length).unwrap(),
        Operation::Sync => {}
    }
}

/// A part of the operation, or nothing, or all of it.
fn tear(storage: &MemoryStorage, operation: &Operation, random: &mut Random) {
    if random.below(2) == 0 {
        return;
    }
    match operation {
        Operation::Write(offset, data) if random.below(2) == 0 => {
            for (at, sector) in (*offset..).step_by(512).zip(data.chunks(512)) {
                if random.below(2) == 0 {
                    storage.write_at(at, sector).unwrap();
                }
            }
        }
        // A file only grows here; what has been written behind its end stays.
        Operation::Length(length) if storage.length().unwrap() >= *length => {}
        operation => apply(storage, operation),
    }
}

/// What a sector of the disk may hold: one number stands for its content.
#[derive(Clone, Default)]
struct Sector {
    /// What it held at the last flush, and all that was written since.
    may: Vec<u64>,
}

/// A sector's content from its number; 0 is zeros.
fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(64)
}

const SECTORS: u64 = 5 * 2048 + 40;

/// A recorded session and what the disk may hold after each operation.
struct Session {
    start: MemoryStorage,
    operations: Vec<Operation>,
    /// From which operation on what may be where.
    history: Vec<(usize, Vec<Sector>)>,
}

impl Session {
    /// Random requests, from a seed.
    fn record(seed: u64, requests: u32) -> Self {
        let mut random = Random(seed);
        let start = made(&small(SECTORS * 512));
        // Something to lose.
        let before = open(&start);
        let mut sectors = vec![Sector { may: vec![0] }; SECTORS as usize];
        for sector in [0, 2047, 2048, SECTORS - 1] {
            before.write(sector * 512, &content(1000 + sector)).unwrap();
            sectors[sector as usize].may = vec![1000 + sector];
        }
        before.close().unwrap();
        let start = start.copy();
        let recorder = Recorder::new(&start);
        let disk = Vhdx::open(recorder.clone(), false).unwrap();
        let mut history = vec![(0, sectors.clone())];
        for number in 1..=u64::from(requests) {
            let from = random.below(SECTORS);
            let flush = match random.below(8) {
                0..4 => {
                    let count = (1 + random.below(20)).min(SECTORS - from);
                    for sector in &mut sectors[from as usize..(from + count) as usize] {
                        sector.may.push(number);
                    }
                    // It may be on the disk from its first operation on.
                    history.push((recorder.now(), sectors.clone()));
                    let data = content(number).repeat(count as usize);
                    disk.write(from * 512, &data).unwrap();
                    false
                }
                4..6 => {
                    let count = (1 + random.below(3 * 2048)).min(SECTORS - from);
                    for sector in &mut sectors[from as usize..(from + count) as usize] {
                        sector.may.push(0);
                    }
                    history.push((recorder.now(), sectors.clone()));
                    disk.unmap(from * 512, count * 512).unwrap();
                    false
                }
                _ => true,
            };
            if flush || number == u64::from(requests) {
                disk.flush().unwrap();
                // What it holds now is durable: nothing else any more.
                for (at, sector) in (0..).step_by(512).zip(&mut sectors) {
                    let data = read(&disk, at, 512);
                    let now = u64::from_le_bytes(data[..8].try_into().unwrap());
                    assert!(sector.may.contains(&now));
                    sector.may = vec![now];
                }
                history.push((recorder.now(), sectors.clone()));
            }
        }
        disk.close().unwrap();
        let operations = recorder.operations.lock().unwrap().clone();
        Self {
            start,
            operations,
            history,
        }
    }

    /// What may be where when this many operations have been done.
    fn allowed(&self, operations: usize) -> &[Sector] {
        let known = self.history.iter().rfind(|(from, _)| *from <= operations);
        &known.unwrap().1
    }

    fn verify(&self, storage: MemoryStorage, operations: usize, what: &str) {
        let storage = Arc::new(storage);
        let file: Arc<dyn Storage> = storage.clone();
        let report = check(&file).unwrap_or_else(|error| panic!("{what}: the file {error}"));
        assert!(!report.findings.contains(&Finding::RegionTable), "{what}");
        let mut after = Vec::new();
        for read_only in [true, false] {
            let disk = Vhdx::open(storage.clone(), read_only).unwrap();
            let data = read(&disk, 0, (SECTORS * 512) as usize);
            let allowed = self.allowed(operations);
            for (number, (sector, allowed)) in data.chunks(512).zip(allowed).enumerate() {
                // A torn write may leave a part of a sector's neighbours, never of a sector.
                let holds = u64::from_le_bytes(sector[..8].try_into().unwrap());
                assert!(
                    allowed.may.contains(&holds) && sector == content(holds),
                    "{what}: sector {number} holds {holds}, not one of {:?}",
                    allowed.may
                );
            }
            if !read_only {
                assert!(after == data, "{what}: reading and writing see the same");
                // It takes writes, and is sound after them.
                disk.write(0, &content(7)).unwrap();
                disk.write((SECTORS - 1) * 512, &content(8)).unwrap();
                disk.close().unwrap();
            }
            after = data;
        }
        check(&file).unwrap_or_else(|error| panic!("{what}, then written to: the file {error}"));
        let disk = open(&storage);
        assert_eq!(read(&disk, 0, 512), content(7));
        assert_eq!(read(&disk, (SECTORS - 1) * 512, 512), content(8));
    }
}

#[test]
fn a_session_cut_at_any_operation_leaves_what_was_durable() {
    for seed in 0..3 {
        let session = Session::record(seed, 40);
        let storage = session.start.copy();
        for (done, operation) in session.operations.iter().enumerate() {
            apply(&storage, operation);
            let what = format!("seed {seed}, after operation {done}");
            session.verify(storage.copy(), done + 1, &what);
        }
    }
}

#[test]
fn writes_lost_reordered_and_torn_between_syncs_leave_what_was_durable() {
    for seed in 10..14 {
        let session = Session::record(seed, 40);
        let mut random = Random(seed);
        let durable = session.start.copy();
        let mut pending: Vec<&Operation> = Vec::new();
        for (done, operation) in session.operations.iter().enumerate() {
            pending.push(operation);
            for _ in 0..2 {
                let storage = durable.copy();
                let mut order = pending.clone();
                for last in (1..order.len()).rev() {
                    // Writes to the same place keep their order in any cache; others do not.
                    let other = random.below(last as u64 + 1) as usize;
                    if !order[other..=last]
                        .iter()
                        .any(|one| overlap(one, order[last]) || overlap(one, order[other]))
                    {
                        order.swap(other, last);
                    }
                }
                for operation in order {
                    tear(&storage, operation, &mut random);
                }
                let what = format!("seed {seed}, torn in operation {done}");
                // A sync that is torn has not returned.
                let returned = !matches!(operation, Operation::Sync);
                session.verify(storage, done + usize::from(returned), &what);
            }
            if matches!(operation, Operation::Sync) {
                for operation in pending.drain(..) {
                    apply(&durable, operation);
                }
            }
        }
    }
}

/// Whether two operations that are not the same touch the same bytes.
fn overlap(one: &Operation, other: &Operation) -> bool {
    let range = |operation: &Operation| match operation {
        Operation::Write(offset, data) => *offset..*offset + data.len() as u64,
        Operation::Zero(offset, length) => *offset..*offset + length,
        Operation::Length(_) | Operation::Sync => 0..0,
    };
    let (a, b) = (range(one), range(other));
    !std::ptr::eq(one, other) && a.start < b.end && b.start < a.end
}

#[test]
fn more_pages_than_an_entry_holds_go_through_the_log_in_order() {
    // Blocks of 1 MiB: a page of the BAT stands for about half a GiB.
    let start = made(&Settings { ..small(200 << 29) });
    let disk = open(&start);
    for page in 0..150u64 {
        disk.write(page << 29, &content(page + 1)).unwrap();
    }
    disk.close().unwrap();
    let recorder = Recorder::new(&start.copy());
    let disk = Vhdx::open(recorder.clone(), false).unwrap();
    disk.unmap(0, 200 << 29).unwrap();
    disk.write(0, &content(9)).unwrap();
    let flushing = recorder.now();
    disk.flush().unwrap();
    let flushed = recorder.now();
    disk.close().unwrap();
    let operations = recorder.operations.lock().unwrap().clone();
    let storage = start.copy();
    for (done, operation) in operations.iter().enumerate() {
        apply(&storage, operation);
        let storage = Arc::new(storage.copy());
        let disk = open(&storage);
        for page in 0..150 {
            let data = read(&disk, page << 29, 512);
            let holds = u64::from_le_bytes(data[..8].try_into().unwrap());
            let (old, new) = (page + 1, if page == 0 { 9 } else { 0 });
            assert!(
                [old, new, 0].contains(&holds),
                "operation {done}, page {page}: {holds}"
            );
            if done + 1 >= flushed {
                assert_eq!(holds, new, "operation {done} is after the flush");
            }
        }
        if done < flushing.min(3) {
            assert_eq!(disk.present_blocks(), 150);
        }
    }
}
