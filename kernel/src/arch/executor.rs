//! The executor that runs all tasks: embassy's raw one, woken by a flag that the idle loop reads.

use core::future::Future;
use core::sync::atomic::{AtomicBool, Ordering};

use alloc::boxed::Box;
use embassy_executor::raw::{Executor, TaskStorage};
use spin::Once;

/// Some task is ready to run.
static READY: AtomicBool = AtomicBool::new(false);

/// The executor is not `Sync`: only the boot VP polls it and spawns on it, never in an interrupt.
struct BootVpOnly(Executor);

// SAFETY: see the type's description; wakers, which may be called anywhere, do not go through here.
unsafe impl Sync for BootVpOnly {}
// SAFETY: as above.
unsafe impl Send for BootVpOnly {}

static EXECUTOR: Once<BootVpOnly> = Once::new();

fn executor() -> &'static Executor {
    &EXECUTOR
        .call_once(|| BootVpOnly(Executor::new(core::ptr::null_mut())))
        .0
}

/// Embassy calls this when a task becomes ready; from any context.
#[unsafe(export_name = "__pender")]
fn pender(_context: *mut ()) {
    READY.store(true, Ordering::Release);
}

/// Whether a task is ready.
pub fn is_ready() -> bool {
    READY.load(Ordering::Acquire)
}

/// Runs all tasks that are ready. Answers whether there were any.
///
/// To be called from the idle loop only: never from a task.
pub fn poll() -> bool {
    let ready = READY.swap(false, Ordering::Acquire);
    if ready {
        // SAFETY: the idle loop is the only caller and does not nest.
        unsafe { executor().poll() };
    }
    ready
}

/// Starts a task. Its memory is kept for good, also when it has ended: meant for the few tasks that a machine begins with.
pub fn spawn<F: Future<Output = ()> + 'static>(future: F) {
    let storage: &'static TaskStorage<F> = Box::leak(Box::new(TaskStorage::new()));
    match storage.spawn(|| future) {
        Ok(token) => executor().spawner().spawn(token),
        Err(error) => unreachable!("fresh task storage is free: {error}"),
    }
}
