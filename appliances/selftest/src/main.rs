//! A guest whose behaviour tests choose on its command line: `selftest=NAME`.
//!
//! Each either prints `selftest: NAME passed` and powers off, or ends the machine in the way that it is about.

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

extern crate alloc;

mod loopback;

use core::future::{Future, poll_fn};
use core::hint::black_box;
use core::pin::pin;
use core::sync::atomic::{AtomicBool, Ordering};

use alloc::vec::Vec;
use embassy_time::{Duration, Instant, Timer};
use enlit::{Machine, interrupt, println, work};

enlit::main!(main);

async fn main(machine: Machine) {
    let name = machine.command_line().get("selftest").unwrap_or_default();
    println!("selftest: {name}");
    match name {
        "panic-main" => panic!("asked to, in main"),
        "panic-interrupt" => in_interrupt(|| panic!("asked to, in an interrupt")).await,
        "panic-work" => in_work(|| panic!("asked to, in a work item")).await,
        "null" => enlit::selftest::read_null(),
        "write-code" => enlit::selftest::write_code(),
        "run-data" => enlit::selftest::run_data(),
        "overflow" => {
            overflow(0);
        }
        "invalid-opcode" => enlit::selftest::invalid_opcode(),
        "out-of-memory" => exhaust(),
        "rights" => enlit::selftest::check_rights(),
        "work" => {
            in_interrupt(|| {}).await;
            in_work(|| {}).await;
        }
        "timer" => timer().await,
        "c-driver" => loopback::heartbeat().await,
        "block-on" => block_on(&machine).await,
        "poweroff" => {}
        "reboot" => machine.reboot().await,
        other => panic!("there is no selftest={other}"),
    }
    println!("selftest: {name} passed");
    machine.power_off().await;
}

/// Waits in the middle of a task and of a work item, while the VMBus stack is served and the VP sleeps.
async fn block_on(machine: &Machine) {
    let client = machine.vmbus().client().clone();
    let wait = move || {
        let start = Instant::now();
        let mut polls = 0;
        let mut timer = pin!(Timer::after(Duration::from_millis(300)));
        let counted = poll_fn(|context| {
            polls += 1;
            timer.as_mut().poll(context)
        });
        client.block_on(counted).expect("tasks and work may wait");
        assert!(start.elapsed() >= Duration::from_millis(300));
        assert!(polls <= 3, "polled {polls} times: it did not sleep");
        assert!(interrupt::is_enabled());
    };
    let before = machine.interrupts();
    wait();
    let ticks = machine.interrupts().handled - before.handled;
    assert!(ticks >= 1, "no interrupt ended the sleep");
    let client = machine.vmbus().client().clone();
    in_interrupt(move || {
        let refused = client.block_on(core::future::ready(()));
        assert!(refused.is_err(), "code at DISPATCH may not wait");
    })
    .await;
    in_work(wait).await;
    // The stack is as alive as before: a task is still woken by its changes.
    let seen = machine.vmbus().changes();
    machine.vmbus().client().notify();
    machine.vmbus().changed(seen).await;
}

/// Runs `action` in an interrupt handler and waits until it has run.
async fn in_interrupt(action: impl Fn() + Send + Sync + 'static) {
    static ACTION: AtomicBool = AtomicBool::new(false);
    static DONE: AtomicBool = AtomicBool::new(false);
    enlit::selftest::on_interrupt(move || {
        action();
        DONE.store(true, Ordering::Release);
    });
    ACTION.store(true, Ordering::Release);
    enlit::selftest::raise_interrupt();
    while !DONE.load(Ordering::Acquire) {
        Timer::after(Duration::from_millis(1)).await;
    }
    assert!(interrupt::is_enabled());
}

/// Runs `action` in a work item and waits until it has run.
async fn in_work(action: impl Fn() + Send + Sync + 'static) {
    static DONE: AtomicBool = AtomicBool::new(false);
    let item = work::register("selftest", move || {
        assert!(
            interrupt::is_enabled(),
            "work runs at PASSIVE, with interrupts on"
        );
        action();
        DONE.store(true, Ordering::Release);
    });
    item.queue();
    while !DONE.load(Ordering::Acquire) {
        Timer::after(Duration::from_millis(1)).await;
    }
}

/// Timers never fire early and keep their order.
async fn timer() {
    for milliseconds in [0, 1, 5, 20, 50] {
        let wanted = Duration::from_millis(milliseconds);
        let start = Instant::now();
        Timer::after(wanted).await;
        assert!(
            start.elapsed() >= wanted,
            "{milliseconds} ms timer fired early"
        );
    }
    let before = Instant::now();
    let mut last = before;
    for _ in 0..10_000 {
        let now = Instant::now();
        assert!(now >= last, "the clock went back");
        last = now;
    }
}

/// Runs off the end of the stack, into its guard page.
#[inline(never)]
#[allow(unconditional_recursion, reason = "that is the point")]
fn overflow(depth: u64) -> u64 {
    let page = black_box([depth; 512]);
    overflow(depth + 1) + page[black_box(7)]
}

/// Takes all memory that there is.
fn exhaust() {
    let mut all: Vec<Vec<u8>> = Vec::new();
    loop {
        all.push(alloc::vec![0xA5; 256 * 1024]);
    }
}
