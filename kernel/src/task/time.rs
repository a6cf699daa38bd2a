//! Time for tasks and for work: embassy-time on the reference clock and synthetic timer 0.

use core::task::Waker;

use embassy_time_driver::Driver;
use embassy_time_queue_utils::Queue;

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

/// Wakes and queues what is due, and sets the timer for what comes next.
pub(crate) fn reschedule() {
    let mut wakers = TIME.wakers.lock();
    let Some(partition) = per_cpu::current().partition.get() else {
        return;
    };
    let now = clock::now();
    let next = wakers.next_expiration(now).min(work::queue_due(now));
    // Each write to the timer is a VM exit, and deadlines are mostly taken back before they pass. So one that lies
    // ahead stays armed when it is no longer wanted or a later one is: when it expires, this
    // runs again. One that has passed is not trusted to be still on its way.
    let armed = partition.timer.deadline().filter(|&armed| armed > now);
    if next != u64::MAX && armed.is_none_or(|armed| next < armed) {
        partition.timer.arm(next);
    }
}

/// The timer's interrupt.
pub(crate) fn on_interrupt() {
    let Some(partition) = per_cpu::current().partition.get() else {
        return;
    };
    if partition.take_expiry() {
        reschedule();
    }
    if partition.timer_needs_eoi() {
        apic::end_of_interrupt();
    }
}
