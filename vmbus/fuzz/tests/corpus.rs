//! Every input of the corpus is played, on any toolchain: what a fuzzer found once stays found.

use std::fs;
use std::path::PathBuf;

use vmbus_fuzz::TARGETS;
use vmbus_fuzz::seeds::seeds;

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target)
}

fn replay(target: &str) {
    let (_, play) = TARGETS.iter().find(|(name, _)| *name == target).unwrap();
    let mut count = 0;
    for file in fs::read_dir(corpus(target)).unwrap() {
        let file = file.unwrap().path();
        // Shown when the test fails: the input that it failed on is the last one.
        println!("{}", file.display());
        play(&fs::read(&file).unwrap());
        count += 1;
    }
    assert_ne!(count, 0, "{target} has a corpus");
}

macro_rules! replayed {
    ($($target:ident)+) => {
        $(#[test] fn $target() { replay(stringify!($target)); })+

        #[test]
        fn every_target_is_replayed() {
            let names: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, [$(stringify!($target)),+]);
        }
    };
}

replayed! {
    balloon bus_messages host_hvsocket host_ic host_kvp host_providers host_ring host_server ic kmcl_channel netvsp protocol ring_reader ring_writer rndis storvsp vhdx
}

#[test]
fn the_seeds_are_those_that_the_code_makes() {
    for seed in seeds() {
        let file = corpus(seed.target).join(format!("{}.seed", seed.name));
        let bytes = fs::read(&file).unwrap_or_default();
        assert!(
            bytes == seed.bytes,
            "{} is stale: cargo run --no-default-features --example seeds",
            file.display()
        );
    }
}

#[test]
fn every_target_takes_nothing_and_noise() {
    let noise: Vec<u8> = (0..2000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    for (_, play) in TARGETS {
        for length in [0, 1, 2, 7, 100, noise.len()] {
            play(&noise[..length]);
        }
    }
}
