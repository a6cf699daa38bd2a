//! Time for tasks and for work: embassy-time on the reference clock and synthetic timer 0.

use core::sync::atomic::{AtomicBool, Ordering};
use core::task::Waker;

use embassy_time_driver::Driver;
use embassy_time_queue_utils::Queue;

use crate::arch::cpu::InterruptsOff;
use crate::arch::{apic, per_cpu};
use crate::hyperv::clock;
use crate::sync::Lock;
use crate::work;

/// A tick of embassy-time is a unit of reference time.
const _: () = assert!(embassy_time_driver::TICK_HZ == clock::PER_SECOND);

struct ReferenceTime {
    wakers: Lock<Queue>,
}

embassy_time_driver::time_driver_impl!(static TIME: ReferenceTime = ReferenceTime { wakers: Lock::new(Queue::new()) });

impl Driver for ReferenceTime {
    fn now(&self) -> u64 {
        clock::now()
    }

    fn schedule_wake(&self, at: u64, waker: &Waker) {
        let earlier = self.wakers.lock().schedule_wake(at, waker);
        if earlier {
            reschedule();
        }
    }
}

/// The timer may have to be set anew.
static STALE: AtomicBool = AtomicBool::new(false);

/// Has the timer set anew before this VP sleeps. Callable at any level.
pub(crate) fn reschedule() {
    STALE.store(true, Ordering::Release);
}

/// Wakes and queues what is due, and sets the timer for what comes next, if that may have changed.
/// The loop in [`super::run`] calls it after each round of work: deadlines that come and go within
/// one cost nothing.
pub(crate) fn update() {
    if !STALE.swap(false, Ordering::Acquire) {
        return;
    }
    let interrupts = InterruptsOff::enter();
    let now = clock::now();
    let next = expire(now);
    if let Some(partition) = per_cpu::current().partition.get() {
        // Each write to the timer is a VM exit, and deadlines are mostly taken back before they pass. So one
        // that lies ahead stays armed when it is no longer wanted or a later one is: when it
        // expires, this runs again. One that has passed is not trusted to be still on its way.
        let armed = partition.timer.deadline().filter(|&armed| armed > now);
        if next != u64::MAX && armed.is_none_or(|armed| next < armed) {
            partition.timer.arm(next);
        }
    }
    drop(interrupts);
}

/// Whether [`update`] has something to do.
pub(crate) fn is_stale() -> bool {
    STALE.load(Ordering::Acquire)
}

/// Wakes and queues what is due. The answer is when the next is, `u64::MAX` for never.
fn expire(now: u64) -> u64 {
    TIME.wakers
        .lock()
        .next_expiration(now)
        .min(work::queue_due(now))
}

/// The timer's interrupt.
pub(crate) fn on_interrupt() {
    let Some(partition) = per_cpu::current().partition.get() else {
        return;
    };
    if partition.take_expiry() {
        expire(clock::now());
        reschedule();
    }
    if partition.timer_needs_eoi() {
        apic::end_of_interrupt();
    }
}
