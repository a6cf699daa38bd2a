//! Requests that are answered later: who asked polls, waits, or is called.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use crate::sync::Mutex;

/// The answer to a request, once it is there. The host's thread makes it; any thread may hold this.
pub struct Reply<T>(Arc<Mutex<State<T>>>);

/// The end that gives the answer.
pub(crate) struct Promise<T>(Arc<Mutex<State<T>>>);

enum State<T> {
    Open,
    Then(Box<dyn FnOnce(T) + Send>),
    Done(T),
    Taken,
}

/// A promise, and the reply that it fulfils.
pub(crate) fn promise<T>() -> (Promise<T>, Reply<T>) {
    let state = Arc::new(Mutex::new(State::Open));
    (Promise(state.clone()), Reply(state))
}

impl<T> Reply<T> {
    /// An answer that is there at once.
    pub(crate) fn ready(value: T) -> Self {
        Self(Arc::new(Mutex::new(State::Done(value))))
    }

    /// The answer, once, when it is there.
    pub fn take(&self) -> Option<T> {
        let mut state = self.0.lock();
        match core::mem::replace(&mut *state, State::Taken) {
            State::Done(value) => Some(value),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Whether the answer is there.
    pub fn is_done(&self) -> bool {
        matches!(*self.0.lock(), State::Done(_))
    }

    /// Has `act` called with the answer: now if it is there, else by the thread that runs the host. It must not block.
    pub fn then(self, act: impl FnOnce(T) + Send + 'static) {
        let mut state = self.0.lock();
        match core::mem::replace(&mut *state, State::Taken) {
            State::Open => *state = State::Then(Box::new(act)),
            State::Done(value) => {
                drop(state);
                act(value);
            }
            // Nobody else has it: `then` takes it away.
            State::Then(_) | State::Taken => {}
        }
    }
}

#[cfg(feature = "std")]
impl<T: Send + 'static> Reply<T> {
    /// Waits for the answer. `None` when it has not come in time; the request goes on. Not for the thread that runs
    /// the host, which would wait for itself.
    pub fn wait(self, limit: std::time::Duration) -> Option<T> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.then(move |value| {
            // Whoever waited may have gone.
            let _ = sender.try_send(value);
        });
        receiver.recv_timeout(limit).ok()
    }
}

impl<T> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("done", &self.is_done())
            .finish()
    }
}

impl<T> Promise<T> {
    fn keep(self, value: T) {
        let mut state = self.0.lock();
        if let State::Then(act) = core::mem::replace(&mut *state, State::Taken) {
            drop(state);
            act(value);
        } else {
            *state = State::Done(value);
        }
    }
}

impl<T> fmt::Debug for Promise<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Promise")
    }
}

/// Answers that have been made and are given when no lock is held: who is called may ask again at once.
#[derive(Default)]
pub struct Outcomes(Vec<Box<dyn FnOnce() + Send>>);

impl Outcomes {
    /// Adds one.
    pub(crate) fn add<T: Send + 'static>(&mut self, promise: Promise<T>, value: T) {
        self.0.push(Box::new(move || promise.keep(value)));
    }

    /// Gives all of them.
    pub fn deliver(self) {
        self.0.into_iter().for_each(|give| give());
    }
}

impl fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} outcomes", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_once() {
        let (promise, reply) = promise();
        assert_eq!(reply.take(), None);
        let mut outcomes = Outcomes::default();
        outcomes.add(promise, 7);
        assert!(!reply.is_done(), "not before it is delivered");
        outcomes.deliver();
        assert!(reply.is_done());
        assert_eq!(reply.take(), Some(7));
        assert_eq!(reply.take(), None);
    }

    #[test]
    fn who_wants_to_be_called_is_called_whenever_the_answer_comes() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (late, reply) = promise();
        let note = seen.clone();
        reply.then(move |value| note.lock().push(value));
        let mut outcomes = Outcomes::default();
        outcomes.add(late, 1);
        outcomes.deliver();
        let note = seen.clone();
        Reply::ready(2).then(move |value| note.lock().push(value));
        assert_eq!(*seen.lock(), [1, 2]);
    }

    #[cfg(feature = "std")]
    #[test]
    fn who_waits_is_woken_by_another_thread() {
        let (promise, reply) = promise();
        let host = std::thread::spawn(move || {
            let mut outcomes = Outcomes::default();
            outcomes.add(promise, 5);
            outcomes.deliver();
        });
        assert_eq!(reply.wait(std::time::Duration::from_secs(60)), Some(5));
        host.join().unwrap();
        let (_kept, never) = super::promise::<u32>();
        assert_eq!(never.wait(std::time::Duration::from_millis(1)), None);
    }
}
