//! Any sequence of requests, over any number of sessions, gives what a run of bytes gives.

use proptest::prelude::*;
use vhdx::{MIB, Settings, Storage, Vhdx, check};

use crate::support::{made, open, read, small};

const SECTORS: u64 = (6 * MIB + 512 * 300) / 512;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Read(u64, u64),
    Unmap(u64, u64),
    Flush,
    /// Close and open again.
    Close,
    /// Read everything in a session of reading.
    ReadOnly,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS, prop_oneof![1..16u64, 1..5000u64]);
    let range = move || range().prop_map(|(from, count)| (from, count.min(SECTORS - from)));
    prop_oneof![
        5 => (range(), any::<u8>()).prop_map(|((from, count), value)| Step::Write(from, count, value)),
        2 => range().prop_map(|(from, count)| Step::Read(from, count)),
        3 => range().prop_map(|(from, count)| Step::Unmap(from, count)),
        2 => Just(Step::Flush),
        1 => Just(Step::Close),
        1 => Just(Step::ReadOnly),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_disk_is_a_run_of_bytes(steps in prop::collection::vec(step(), 1..30), fixed: bool) {
        let settings = Settings { fixed, ..small(SECTORS * 512) };
        let storage = made(&settings);
        let mut disk = open(&storage);
        let mut model = vec![0; (SECTORS * 512) as usize];
        for step in steps {
            match step {
                Step::Write(from, count, value) => {
                    let data: Vec<_> = (0..count * 512).map(|at| value.wrapping_add((at / 512) as u8)).collect();
                    disk.write(from * 512, &data).unwrap();
                    model[(from * 512) as usize..][..data.len()].copy_from_slice(&data);
                }
                Step::Read(from, count) => {
                    let length = (count * 512) as usize;
                    let data = read(&disk, from * 512, length);
                    prop_assert!(data == model[(from * 512) as usize..][..length]);
                }
                Step::Unmap(from, count) => {
                    disk.unmap(from * 512, count * 512).unwrap();
                    if !fixed {
                        // Whole blocks go; the last one ends with the disk.
                        let first = (from * 512).div_ceil(MIB) * MIB;
                        let end = (from + count) * 512;
                        let last = if end == SECTORS * 512 { end } else { end / MIB * MIB };
                        if first < last {
                            model[first as usize..last as usize].fill(0);
                        }
                    }
                }
                Step::Flush => disk.flush().unwrap(),
                Step::Close => {
                    disk.close().unwrap();
                    let file: std::sync::Arc<dyn Storage> = storage.clone();
                    check(&file).unwrap();
                    disk = open(&storage);
                }
                Step::ReadOnly => {
                    drop(disk);
                    let reading = Vhdx::open(storage.clone(), true).unwrap();
                    prop_assert!(read(&reading, 0, model.len()) == model);
                    disk = open(&storage);
                }
            }
        }
        prop_assert!(read(&disk, 0, model.len()) == model);
    }
}
