//! The stack's lock-free code under every interleaving and memory order that the language allows.
//!
//! These are not models of the code but the code: ring, turn, quota and the set of deferred channels are compiled here a second
//! time, from the same files, with loom's atomics in place of the processor's ([`atomics`]), with ring memory that tells a
//! data race ([`shared`]), and with small pages ([`ids`]), so that a ring is full after three packets. Each function below is one
//! question, asked by `tests/memory_ordering.rs`.
//!
//! Loom, and not shuttle: what can go wrong here is a fence or an ordering that is missing, and shuttle knows sequential
//! consistency only. Loom explores exhaustively, up to a number of preemptions per run.

#![forbid(unsafe_code)]
#![allow(
    dead_code,
    missing_docs,
    unused_imports,
    clippy::semicolon_if_nothing_returned,
    reason = "much of what is compiled here is used elsewhere, and documented there"
)]
#![allow(
    clippy::unwrap_used,
    reason = "a model that panics has found something"
)]

extern crate alloc;

mod atomics;
mod ids;
mod shared;

#[path = "../../src/kmcl/deferred.rs"]
mod deferred;
#[path = "../../src/kmcl/quota.rs"]
mod quota;
#[path = "../../src/ring/mod.rs"]
mod ring;
#[path = "../../src/turn.rs"]
mod turn;

use std::ops::ControlFlow;

use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;

use deferred::Deferred;
use ids::ChannelId;
use quota::Quota;
use ring::{Outgoing, PacketBuffer, Reader, Ring, Room, Signal, Writer};
use shared::SharedPages;
use turn::Turn;

/// Runs a model under all interleavings with up to `preemptions` preemptions.
pub fn check(preemptions: usize, model: fn()) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Both ends of an empty ring.
fn ring() -> (Writer, Reader) {
    let ring = Ring::new(&SharedPages::new(2), 0, 2).unwrap();
    (Writer::new(ring.clone()).unwrap(), Reader::new(ring))
}

fn push(writer: &mut Writer, number: u64) {
    let payload = number.to_le_bytes();
    writer.push(&Outgoing::in_band([&payload, &[]])).unwrap();
}

fn pop(reader: &mut Reader) -> Option<u64> {
    let mut packet = PacketBuffer::default();
    let found = reader.read(&mut packet).unwrap();
    found.then(|| u64::from_le_bytes(*packet.payload().first_chunk().unwrap()))
}

/// A packet that is published while the consumer goes to sleep is either found by the last look, or signalled.
pub fn a_packet_is_found_or_signalled() {
    let (mut writer, mut reader) = ring();
    let producer = thread::spawn(move || {
        push(&mut writer, 7);
        writer.publish().unwrap() == Signal::Needed
    });
    reader.mask().unwrap();
    let mut found = pop(&mut reader);
    let _ = reader.publish().unwrap();
    if reader.unmask().unwrap() && found.is_none() {
        found = pop(&mut reader);
        assert!(found.is_some(), "the look has seen it");
    }
    let signalled = producer.join().unwrap();
    assert!(found.is_none_or(|number| number == 7), "whole");
    assert!(found.is_some() || signalled, "nobody tells the consumer");
}

/// Two packets, published one after the other while the consumer empties the ring: it never sleeps on one.
pub fn the_last_packet_is_found_or_signalled() {
    let (mut writer, mut reader) = ring();
    let producer = thread::spawn(move || {
        let mut last = Signal::NotNeeded;
        for number in [1, 2] {
            push(&mut writer, number);
            last = writer.publish().unwrap();
        }
        last == Signal::Needed
    });
    reader.mask().unwrap();
    let mut count = 0;
    while pop(&mut reader).is_some() {
        count += 1;
    }
    let _ = reader.publish().unwrap();
    let more = reader.unmask().unwrap();
    let asleep_on_nothing = count == 0;
    let signalled = producer.join().unwrap();
    // If the first was signalled, the consumer comes for both.
    assert!(
        count == 2 || more || signalled || asleep_on_nothing,
        "the consumer sleeps and a packet is there"
    );
}

/// Room that is given back while the producer begins to wait is either found by its look, or signalled.
pub fn room_is_found_or_signalled() {
    let (mut writer, mut reader) = ring();
    for number in 0..3 {
        push(&mut writer, number);
    }
    let _ = writer.publish().unwrap();
    let consumer = thread::spawn(move || {
        assert_eq!(pop(&mut reader), Some(0));
        reader.publish().unwrap() == Signal::Needed
    });
    let room = writer.wait_for(32).unwrap();
    let signalled = consumer.join().unwrap();
    assert!(
        room == Room::Available || signalled,
        "nobody tells the producer"
    );
}

/// A place in the ring is written again only when what was there has been read.
pub fn a_packet_is_read_before_it_is_overwritten() {
    let (mut writer, mut reader) = ring();
    for number in 0..3 {
        push(&mut writer, number);
    }
    let _ = writer.publish().unwrap();
    let producer = thread::spawn(move || {
        // The fourth goes behind the others, the fifth to where the first one was.
        for number in [3u64, 4] {
            let payload = number.to_le_bytes();
            if writer.push(&Outgoing::in_band([&payload, &[]])).is_err() {
                break;
            }
        }
        let _ = writer.publish().unwrap();
    });
    assert_eq!(pop(&mut reader), Some(0));
    assert_eq!(pop(&mut reader), Some(1));
    let _ = reader.publish().unwrap();
    assert_eq!(pop(&mut reader), Some(2));
    producer.join().unwrap();
}

/// Whoever comes for a turn, what it has done before is seen by work that runs after, whoever does the work.
pub fn a_turn_that_was_asked_for_is_taken() {
    let world = Arc::new((Turn::new([false; 2]), [flag(), flag()]));
    let ask = |mine: usize| {
        let world = world.clone();
        move || {
            world.1[mine].store(true, Ordering::Relaxed);
            world.0.run(|seen| {
                for (seen, flag) in seen.iter_mut().zip(&world.1) {
                    *seen |= flag.load(Ordering::Relaxed);
                }
                ControlFlow::Continue(())
            });
        }
    };
    let other = thread::spawn(ask(1));
    ask(0)();
    other.join().unwrap();
    world.0.run(|seen| {
        assert_eq!(*seen, [true; 2], "work was left");
        ControlFlow::Continue(())
    });
}

/// The same when one of them takes the turn for one thing only, and hands on that it was asked.
pub fn a_mark_left_with_a_single_turn_is_handed_on() {
    let world = Arc::new((Turn::new(false), flag(), flag()));
    let asker = {
        let world = world.clone();
        thread::spawn(move || {
            world.1.store(true, Ordering::Relaxed);
            world.0.run(|seen| {
                *seen |= world.1.load(Ordering::Relaxed);
                ControlFlow::Continue(())
            });
        })
    };
    let asked = world.0.enter(|_| ()).is_some_and(|taken| taken.asked);
    asker.join().unwrap();
    world.0.run(|seen| {
        assert!(*seen || asked, "nobody runs the work");
        ControlFlow::Continue(())
    });
}

/// Delivery that the quota stops is started again by the completion that makes room, or has seen it.
pub fn a_completion_restarts_a_starved_delivery() {
    let quota = Arc::new(Quota::new(1));
    quota.hold();
    let completer = {
        let quota = quota.clone();
        thread::spawn(move || quota.complete())
    };
    let admitted = quota.admit(|| Some(())).is_some();
    let restarted = completer.join().unwrap();
    assert!(admitted || restarted, "delivery sleeps below its quota");
}

/// The same with two packets held and two completions at once.
pub fn one_of_two_completions_restarts_a_starved_delivery() {
    let quota = Arc::new(Quota::new(2));
    quota.hold();
    quota.hold();
    let completers = [(); 2].map(|()| {
        let quota = quota.clone();
        thread::spawn(move || quota.complete())
    });
    let admitted = quota.admit(|| Some(())).is_some();
    let restarted = completers.map(|completer| completer.join().unwrap());
    assert!(admitted || restarted.contains(&true));
    assert_eq!(quota.held(), 0);
}

/// Delivery that found no place for a packet is started again by whoever puts one back, or has seen it.
pub fn a_returned_place_restarts_a_starved_delivery() {
    let world = Arc::new((Quota::new(1), Mutex::new(0)));
    let giver = {
        let world = world.clone();
        thread::spawn(move || {
            *world.1.lock().unwrap() += 1;
            world.0.take_starved()
        })
    };
    let place = || {
        let mut places = world.1.lock().unwrap();
        (*places > 0).then(|| *places -= 1)
    };
    let admitted = world.0.admit(place).is_some();
    let restarted = giver.join().unwrap();
    assert!(admitted || restarted, "delivery sleeps beside a free place");
}

/// A channel that is deferred is served after that, and what led to it is seen.
pub fn a_deferred_channel_is_served() {
    struct World {
        deferred: Deferred,
        /// What `Hypervisor::request_work` sets, as it must: so that whoever takes it sees all that was done before any of the
        /// requests that it answers.
        work: AtomicBool,
        done: [AtomicU32; 2],
    }
    let world = Arc::new(World {
        deferred: Deferred::new(),
        work: AtomicBool::new(false),
        done: [AtomicU32::new(0), AtomicU32::new(0)],
    });
    let serve = |world: &World, seen: &mut [u32; 2]| {
        if world.work.swap(false, Ordering::AcqRel) {
            world.deferred.serve_each(|id| {
                let index = id.0 as usize - 1;
                seen[index] = world.done[index].load(Ordering::Relaxed);
            });
        }
    };
    let deferrers = [1, 2].map(|number| {
        let world = world.clone();
        thread::spawn(move || {
            world.done[number - 1].store(7, Ordering::Relaxed);
            world.deferred.add(ChannelId(number as u32));
            world.work.swap(true, Ordering::AcqRel);
        })
    });
    let mut seen = [0; 2];
    serve(&world, &mut seen);
    for deferrer in deferrers {
        deferrer.join().unwrap();
    }
    serve(&world, &mut seen);
    assert_eq!(seen, [7; 2]);
}

fn flag() -> AtomicBool {
    AtomicBool::new(false)
}
