//! Waiting at PASSIVE: the blocking form of everything that takes time.

use alloc::sync::Arc;
use alloc::task::Wake;
use core::fmt;
use core::future::Future;
use core::pin::pin;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};

use super::client::{Client, Inner};
use crate::hypervisor::Level;

/// Code at DISPATCH may not wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WouldBlock;

impl fmt::Display for WouldBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("waiting is for PASSIVE, and this is DISPATCH")
    }
}

impl core::error::Error for WouldBlock {}

impl Client {
    /// The level at which the caller runs.
    pub fn current_level(&self) -> Level {
        self.inner().hypervisor.current_level()
    }

    /// Runs `future` to its end. Meanwhile the stack is served, so that what the future waits for can happen, and the VP
    /// sleeps when there is nothing to do; other tasks do not run.
    ///
    /// May be called in a state-change callback, and in process-packet at PASSIVE. There it must not wait for that
    /// callback's own channel to go on: KMCL's rules say what may be waited for where, and futures
    /// of this library refuse what could never end.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`] at DISPATCH; the future has not been polled then.
    pub fn block_on<F: Future>(&self, future: F) -> Result<F::Output, WouldBlock> {
        if self.current_level() == Level::Dispatch {
            return Err(WouldBlock);
        }
        let inner = self.inner();
        let mut future = pin!(future);
        let alarm = Arc::new(Alarm {
            inner: inner.clone(),
            rung: AtomicBool::new(true),
        });
        let waker = Waker::from(alarm.clone());
        let mut context = Context::from_waker(&waker);
        loop {
            if alarm.rung.swap(false, Ordering::SeqCst)
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                // A request for work that ended the last sleep has not been served yet.
                inner.request_work();
                return Ok(output);
            }
            let stack = inner.stack();
            if let Some(stack) = &stack {
                stack.serve();
            }
            if !alarm.rung.load(Ordering::SeqCst) {
                let deadline = stack.and_then(|stack| stack.deadline());
                inner.hypervisor.wait_for_interrupt(deadline);
            }
        }
    }
}

/// What wakes a waiting caller.
struct Alarm {
    inner: Arc<Inner>,
    rung: AtomicBool,
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::SeqCst);
        self.inner.request_work();
    }
}
