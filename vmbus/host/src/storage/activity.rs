//! Commands that are under way: counted, told to stop, and waited for.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use super::scsi::Stop;
use crate::provider::Link;
use crate::sync::Mutex;

/// Commands that began in one span of time: of a unit, from one reset to the next; of a controller, from one guest to
/// the next.
#[derive(Debug, Default)]
pub struct Activity {
    running: AtomicUsize,
    /// Why it is to stop, if it is.
    stop: AtomicU8,
    /// Who wants to know when nothing is under way.
    waiting: Mutex<Vec<Link>>,
}

const GOES_ON: u8 = 0;
const RESET: u8 = 1;
const REMOVED: u8 = 2;

impl Activity {
    /// A command has begun; it ends when what this returns is dropped.
    pub fn begin(self: &Arc<Self>) -> Running {
        self.running.fetch_add(1, Ordering::SeqCst);
        Running(Arc::clone(self))
    }

    /// Asks what is under way to stop where it can.
    pub fn stop(&self, why: Stop) {
        let why = match why {
            Stop::Reset => RESET,
            Stop::Removed => REMOVED,
        };
        self.stop.store(why, Ordering::SeqCst);
    }

    /// Whether and why it is to stop.
    pub fn stopped(&self) -> Option<Stop> {
        match self.stop.load(Ordering::SeqCst) {
            GOES_ON => None,
            RESET => Some(Stop::Reset),
            _ => Some(Stop::Removed),
        }
    }

    /// Whether nothing is under way. If something is, `link` is woken when it has ended.
    pub fn is_over(&self, link: Option<&Link>) -> bool {
        if self.running.load(Ordering::SeqCst) == 0 {
            return true;
        }
        if let Some(link) = link {
            let mut waiting = self.waiting.lock();
            if !waiting
                .iter()
                .any(|known| known.channel() == link.channel())
            {
                waiting.push(link.clone());
            }
        }
        // What ended before the link was there woke nobody.
        self.running.load(Ordering::SeqCst) == 0
    }

    /// How many commands are under way.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }
}

/// A command that is under way.
#[derive(Debug)]
pub struct Running(Arc<Activity>);

impl Running {
    /// Whether and why the command is to stop.
    pub fn stopped(&self) -> Option<Stop> {
        self.0.stopped()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::SeqCst) == 1 {
            let waiting = core::mem::take(&mut *self.0.waiting.lock());
            waiting.iter().for_each(Link::wake);
        }
    }
}
