//! Answers on their way to the control thread, from whichever thread has them.

use std::io;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use vmbus_host::sync::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::control::Failure;

/// Which command an answer is to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Ticket(pub(super) u64);

/// The queue of answers. Clones are the same.
#[derive(Clone)]
pub(super) struct Answers(Arc<Shared>);

struct Shared {
    queue: Mutex<Vec<(Ticket, Result<Value, Failure>)>>,
    told: EventFd,
}

impl Answers {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            queue: Mutex::default(),
            told: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// Takes what has been answered.
    pub(super) fn take(&self) -> Vec<(Ticket, Result<Value, Failure>)> {
        let _ = self.0.told.read();
        std::mem::take(&mut *self.0.queue.lock())
    }

    /// How the command of this ticket is answered.
    pub(super) fn answer(&self, ticket: Ticket) -> Answer {
        let answers = self.clone();
        Answer::new(move |result| {
            answers.0.queue.lock().push((ticket, result));
            answers.wake();
        })
    }

    /// Has the thread look.
    pub(super) fn wake(&self) {
        // One that is full wakes already.
        let _ = self.0.told.write(1);
    }

    pub(super) fn descriptor(&self) -> &EventFd {
        &self.0.told
    }
}

impl std::fmt::Debug for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} answers", self.0.queue.lock().len())
    }
}

/// How a command is answered: once, by any thread.
pub struct Answer(Box<dyn FnOnce(Result<Value, Failure>) + Send>);

impl Answer {
    /// `tell` is called with the answer. It must not block.
    pub fn new(tell: impl FnOnce(Result<Value, Failure>) + Send + 'static) -> Self {
        Self(Box::new(tell))
    }

    /// The command is done and returns this.
    pub fn give(self, result: Result<impl Serialize, Failure>) {
        let value = result.and_then(|value| serde_json::to_value(value).map_err(Failure::generic));
        (self.0)(value);
    }

    /// The command is done, and there is nothing more to say.
    pub fn done(self, result: Result<(), Failure>) {
        (self.0)(result.map(|()| json!({})));
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Answer")
    }
}
