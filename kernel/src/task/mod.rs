//! Tasks: async code at PASSIVE, and the loop that runs it, the work queue and nothing else.

use core::future::Future;

use crate::arch::{cpu, executor};
use crate::work;

pub(crate) mod time;

/// Starts a task beside `main`. Its memory is kept for good, so this is for the few that run as
/// long as the machine; a task that comes and goes belongs into `#[embassy_executor::task]` pools.
///
/// Only tasks may call it, not interrupt handlers.
pub fn spawn<F: Future<Output = ()> + 'static>(future: F) {
    executor::spawn(future);
}

/// Runs work and tasks; sleeps when there are none, with interrupts on and nothing polled.
pub(crate) fn run() -> ! {
    cpu::enable_interrupts();
    loop {
        let busy = step();
        time::update();
        if busy {
            continue;
        }
        cpu::disable_interrupts();
        if work::is_pending() || executor::is_ready() || time::is_stale() {
            cpu::enable_interrupts();
        } else {
            cpu::enable_interrupts_and_halt();
        }
    }
}

/// Runs what is queued and ready. Answers whether there was anything.
fn step() -> bool {
    // Both, always: neither may keep the other waiting.
    work::run_pending() | executor::poll()
}
