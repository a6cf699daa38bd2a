//! The deferred work queue: what an interrupt hands on to PASSIVE.
//!
//! Work is registered once and queued as often as needed. Queueing sets a bit of the VP's
//! own: it allocates nothing, takes no lock, and does nothing when the work is queued already.
//! The idle loop runs queued work with interrupts on.

use core::sync::atomic::{AtomicU64, Ordering};

use alloc::boxed::Box;
use spin::Once;

use crate::arch::per_cpu;
use crate::task::time;

/// The most kinds of work there can be.
const MAX: usize = 64;

/// No time to queue an item at. Zero, so that the items take no room in the image's file.
const NEVER: u64 = 0;

static ITEMS: [Item; MAX] = [const {
    Item {
        run: Once::new(),
        due: AtomicU64::new(NEVER),
    }
}; MAX];

struct Item {
    run: Once<Registered>,
    /// Reference time at which to queue it; [`NEVER`] for not at all.
    due: AtomicU64,
}

struct Registered {
    name: &'static str,
    run: Box<dyn Fn() + Send + Sync>,
}

/// A kind of work that can be queued.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WorkItem {
    index: usize,
}

/// Registers work. It will run at PASSIVE, once for any number of times that it was queued
/// before it began.
///
/// # Panics
///
/// When there are 64 kinds of work already: registering is for the machine's beginning.
pub fn register(name: &'static str, run: impl Fn() + Send + Sync + 'static) -> WorkItem {
    let mut work = Some(Registered {
        name,
        run: Box::new(run),
    });
    for (index, item) in ITEMS.iter().enumerate() {
        item.run
            .call_once(|| work.take().expect("taken once, at the first free place"));
        if work.is_none() {
            return WorkItem { index };
        }
    }
    panic!("no room to register work item {name}");
}

impl WorkItem {
    /// Queues it on this VP. Callable at any level.
    pub fn queue(self) {
        per_cpu::current()
            .work
            .fetch_or(1 << self.index, Ordering::Release);
    }

    /// Queues it at `when`, in reference time, instead of at any other time asked for before;
    /// `None` takes that back.
    pub fn queue_at(self, when: Option<u64>) {
        let when = when.map_or(NEVER, |when| when.max(1));
        if ITEMS[self.index].due.swap(when, Ordering::Relaxed) != when {
            time::reschedule();
        }
    }

    /// Takes it out of this VP's queue. Answers whether it was there.
    pub(crate) fn take(self) -> bool {
        let bit = 1 << self.index;
        per_cpu::current().work.fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        ITEMS[self.index].run.get().map_or("", |work| work.name)
    }
}

/// Whether work is queued on this VP.
pub(crate) fn is_pending() -> bool {
    per_cpu::current().work.load(Ordering::Acquire) != 0
}

/// Runs what is queued on this VP. Answers whether there was anything.
pub(crate) fn run_pending() -> bool {
    let mut pending = per_cpu::current().work.swap(0, Ordering::Acquire);
    let any = pending != 0;
    while pending != 0 {
        let index = pending.trailing_zeros() as usize;
        pending &= pending - 1;
        if let Some(work) = ITEMS.get(index).and_then(|item| item.run.get()) {
            (work.run)();
        }
    }
    any
}

/// Queues what is due at `now`. The answer is when the next is, `u64::MAX` for never.
pub(crate) fn queue_due(now: u64) -> u64 {
    let mut next = u64::MAX;
    for (index, item) in ITEMS
        .iter()
        .enumerate()
        .take_while(|(_, item)| item.run.is_completed())
    {
        let due = item.due.load(Ordering::Relaxed);
        if due == NEVER {
            continue;
        }
        if due <= now {
            item.due.store(NEVER, Ordering::Relaxed);
            WorkItem { index }.queue();
        } else {
            next = next.min(due);
        }
    }
    next
}
