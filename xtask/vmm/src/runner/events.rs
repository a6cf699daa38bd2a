//! Events on their way to the control stream: never in the way of those who make them.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vmbus_host::sync::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::control::{Event, TimedEvent, Timestamp};

/// Events that may wait. Later ones are lost, but for milestones.
const WAITING: usize = 1024;

/// A queue of events. Clones are the same.
#[derive(Clone)]
pub struct Events(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    /// Written to when an event comes.
    told: EventFd,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<TimedEvent>,
    lost: u64,
}

impl Events {
    /// An empty queue.
    ///
    /// # Errors
    /// When the system has no file descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            queue: Mutex::new(Queue::default()),
            told: EventFd::new(EFD_NONBLOCK)?,
        })))
    }

    /// Adds an event that happens now.
    pub fn push(&self, event: Event) {
        let mut queue = self.0.queue.lock();
        if queue.events.len() >= WAITING && !event.is_milestone() {
            queue.lost += 1;
        } else {
            queue.events.push_back(TimedEvent {
                event,
                timestamp: Timestamp::now(),
            });
        }
        drop(queue);
        // An event that is full is one that says so already.
        let _ = self.0.told.write(1);
    }

    /// Takes what has happened, in order.
    pub fn take(&self) -> Vec<TimedEvent> {
        let _ = self.0.told.read();
        let mut queue = self.0.queue.lock();
        let lost = std::mem::take(&mut queue.lost);
        let mut events: Vec<_> = queue.events.drain(..).collect();
        if lost > 0 {
            events.push(TimedEvent {
                event: Event::EventsLost { count: lost },
                timestamp: Timestamp::now(),
            });
        }
        events
    }

    /// Readable while there are events.
    pub fn descriptor(&self) -> &EventFd {
        &self.0.told
    }
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} events", self.0.queue.lock().events.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Reason;

    #[test]
    fn what_nobody_reads_is_counted_and_milestones_are_kept() {
        let events = Events::new().unwrap();
        for _ in 0..WAITING + 7 {
            events.push(Event::VmbusDisconnected {});
        }
        let end = Event::Shutdown {
            guest: true,
            reason: Reason::GuestReset,
        };
        events.push(end.clone());
        let all: Vec<_> = events.take().into_iter().map(|timed| timed.event).collect();
        assert_eq!(all.len(), WAITING + 2);
        assert_eq!(all[WAITING..], [end, Event::EventsLost { count: 7 }]);
        assert_eq!(events.take(), []);
    }
}
