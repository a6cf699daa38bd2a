//! Random reads, writes, unmaps and flushes against a disk that is a vector of bytes.

use std::sync::Arc;

use proptest::prelude::*;
use vmbus_host::disk::Geometry;
use vmbus_host::storage::{Limits, Lun};
use vmbus_host::work::{Inline, Threads};

use crate::disk::TestDisk;
use crate::guest::*;

/// Sectors of the disk.
const SECTORS: u64 = 600;

#[derive(Clone, Debug)]
enum Step {
    Read {
        form: u8,
        first: u64,
        count: u32,
    },
    Write {
        form: u8,
        first: u64,
        count: u32,
        seed: u32,
        fua: bool,
    },
    Unmap {
        first: u64,
        count: u32,
    },
    Flush,
    Verify {
        first: u64,
        count: u32,
        wrong: bool,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let blocks = || (0..SECTORS + 20, 0u32..80);
    let step = prop_oneof![
        3 => (0u8..4, blocks()).prop_map(|(form, (first, count))| Step::Read { form, first, count }),
        4 => (0u8..4, blocks(), any::<u32>(), any::<bool>()).prop_map(
            |(form, (first, count), seed, fua)| Step::Write { form, first, count, seed, fua }
        ),
        1 => blocks().prop_map(|(first, count)| Step::Unmap { first, count }),
        1 => Just(Step::Flush),
        1 => (blocks(), any::<bool>())
            .prop_map(|((first, count), wrong)| Step::Verify { first, count, wrong }),
    ];
    proptest::collection::vec((step, 0usize..4096, 0usize..3), 1..40)
        .prop_map(|steps| steps.into_iter().map(|(step, ..)| step).collect())
}

/// READ or WRITE in one of its forms; one that cannot say the count takes the longest.
fn transfer(form: u8, write: bool, first: u64, count: u32, fua: bool) -> Vec<u8> {
    let bit = u8::from(write) * 2;
    let flags = u8::from(fua) << 3;
    match form {
        // The short form has no FUA, and 0 means 256.
        0 if !fua && count != 0 => {
            let [_, _, high, low] = (first as u32).to_be_bytes();
            vec![0x08 | bit, 0, high, low, count as u8, 0]
        }
        1 => {
            let mut cdb = ten(0x28 | bit, first as u32, count as u16);
            cdb[1] = flags;
            cdb.into()
        }
        2 => {
            let mut cdb = vec![0xA8 | bit, flags];
            cdb.extend_from_slice(&(first as u32).to_be_bytes());
            cdb.extend_from_slice(&count.to_be_bytes());
            cdb.extend_from_slice(&[0, 0]);
            cdb
        }
        _ => sixteen(0x88 | bit, flags, first, count).into(),
    }
}

/// What a disk of the spec would do.
struct Model {
    content: Vec<u8>,
    sector: usize,
}

impl Model {
    fn range(&self, first: u64, count: u32) -> Option<std::ops::Range<usize>> {
        let end = first.checked_add(count.into())?;
        let there = end <= SECTORS;
        there.then(|| first as usize * self.sector..end as usize * self.sector)
    }
}

fn play(guest: &Guest, model: &mut Model, step: &Step) {
    match *step {
        Step::Read { form, first, count } => {
            let length = count as usize * model.sector;
            let cdb = transfer(form, false, first, count, false);
            let end = guest.command(&cdb, Data::In(length));
            match model.range(first, count) {
                Some(range) => assert_eq!(end.good(), model.content[range]),
                None => assert_eq!(end.check(), OUT_OF_RANGE),
            }
        }
        Step::Write {
            form,
            first,
            count,
            seed,
            fua,
        } => {
            let data = pattern(count as usize * model.sector, seed);
            let cdb = transfer(form, true, first, count, fua);
            let end = guest.command(&cdb, Data::Out(&data));
            match model.range(first, count) {
                Some(range) => {
                    end.good();
                    model.content[range].copy_from_slice(&data);
                }
                None => assert_eq!(end.check(), OUT_OF_RANGE),
            }
        }
        Step::Unmap { first, count } => {
            let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
            list.extend_from_slice(&first.to_be_bytes());
            list.extend_from_slice(&count.to_be_bytes());
            list.extend_from_slice(&[0; 4]);
            let end = guest.command(&ten(0x42, 0, 24), Data::Out(&list));
            let Some(range) = model.range(first, count) else {
                assert_eq!(end.check(), OUT_OF_RANGE);
                return;
            };
            end.good();
            // Each sector reads as before or as zeros from now on.
            let length = range.len();
            if length == 0 {
                return;
            }
            let cdb = transfer(3, false, first, count, false);
            let now = guest.command(&cdb, Data::In(length)).good();
            let before = model.content[range.clone()].chunks(model.sector);
            for (now, before) in now.chunks(model.sector).zip(before) {
                assert!(now == before || now.iter().all(|byte| *byte == 0));
            }
            model.content[range].copy_from_slice(&now);
        }
        Step::Flush => {
            guest.command(&ten(0x35, 0, 0), Data::None).good();
        }
        Step::Verify {
            first,
            count,
            wrong,
        } => {
            let range = model.range(first, count);
            let length = count as usize * model.sector;
            let mut data = range.map_or(vec![0; length], |range| model.content[range].to_vec());
            if wrong && let Some(last) = data.last_mut() {
                *last ^= 1;
            }
            let mut cdb = sixteen(0x8F, 2, first, count);
            cdb[1] = 2;
            let end = guest.command(&cdb, Data::Out(&data));
            match (model.range(first, count), wrong && length != 0) {
                (None, _) => assert_eq!(end.check(), OUT_OF_RANGE),
                (_, true) => assert_eq!(end.check(), (0xE, 0x1D, 0)),
                (_, false) => drop(end.good()),
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_disk_holds_what_was_written(steps in steps(), large in any::<bool>()) {
        let logical = if large { 4096 } else { 512 };
        let geometry = Geometry { sectors: SECTORS, logical, physical: 4096 };
        let disk = Lun::Disk(TestDisk::new(geometry));
        let limits = Limits { max_transfer: 80 * 4096, ..Limits::default() };
        let guest = Guest::silent(limits, Arc::new(Inline));
        guest.controller.add_lun(0, disk).unwrap();
        let guest = guest.ready(0x0602);
        let sector = logical as usize;
        let mut model = Model { content: vec![0; SECTORS as usize * sector], sector };
        for step in &steps {
            play(&guest, &mut model, step);
        }
        let mut after = Vec::new();
        for first in (0..SECTORS).step_by(50) {
            let cdb = transfer(1, false, first, 50, false);
            after.extend(guest.command(&cdb, Data::In(50 * sector)).good());
        }
        prop_assert!(after == model.content);
        guest.vm.assert_well_behaved();
    }
}

#[test]
fn many_writes_at_once_on_threads_leave_the_last_content_of_each_place() {
    let executor = Arc::new(Threads::new("disk", 4).unwrap());
    let guest = Guest::silent(Limits::default(), executor);
    let disk = Lun::Disk(TestDisk::small());
    guest.controller.add_lun(0, disk).unwrap();
    let guest = guest.ready(0x0602);
    // Each round writes every place once, in any order, and waits.
    let mut content = Vec::new();
    for round in 0..8 {
        content = pattern(128 * 4096, round);
        let places = content.chunks(4096).enumerate();
        let pending: Vec<_> = places
            .map(|(place, data)| {
                guest.start(0, 0, &ten(0x2A, place as u32 * 8, 8), Data::Out(data))
            })
            .collect();
        for pending in pending {
            guest.finish(pending).good();
        }
    }
    for (place, expected) in content.chunks(65536).enumerate() {
        let read = ten(0x28, place as u32 * 128, 128);
        assert_eq!(guest.command(&read, Data::In(65536)).good(), expected);
    }
}
