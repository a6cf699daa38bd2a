//! A million steps, of seeds that are always the same. `cargo xtask sim` takes a fresh one.

use vmbus_sim::run;

const STEPS: u64 = 200_000;

/// Runs a seed; what it prints is how to run it again.
fn play(seed: u64) {
    let outcome = run(seed, STEPS, false);
    println!("{outcome}");
    assert!(outcome.steps >= STEPS);
}

#[test]
fn seed_1_ends_every_packet_exactly_once() {
    play(1);
}

#[test]
fn seed_2_ends_every_packet_exactly_once() {
    play(2);
}

#[test]
fn seed_3_ends_every_packet_exactly_once() {
    play(3);
}

#[test]
fn seed_4_ends_every_packet_exactly_once() {
    play(4);
}

#[test]
fn seed_5_ends_every_packet_exactly_once() {
    play(5);
}

#[test]
fn a_seed_gives_the_same_run_again() {
    assert_eq!(run(6, 20_000, false), run(6, 20_000, false));
}

#[test]
fn seeds_differ() {
    assert_ne!(run(7, 5_000, false).trace, run(8, 5_000, false).trace);
}
