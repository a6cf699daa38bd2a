//! Requests to a guest that answers one at a time: a bounded queue with time limits.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// Requests that wait, and the one that the guest has.
#[derive(Debug)]
pub(super) struct Requests<J> {
    waiting: VecDeque<Timed<J>>,
    asked: Option<Timed<J>>,
    /// How long a request may take, its wait included; units of 100 ns.
    pub(super) time_limit: u64,
    capacity: usize,
}

#[derive(Debug)]
struct Timed<J> {
    job: J,
    /// Set when the host first sees the request: who asks does not know the guest's clock.
    until: Option<u64>,
}

impl<J> Requests<J> {
    pub(super) fn new(capacity: usize, time_limit: u64) -> Self {
        Self {
            waiting: VecDeque::new(),
            asked: None,
            time_limit,
            capacity,
        }
    }

    /// Adds a request; gives it back when too many wait.
    pub(super) fn push(&mut self, job: J) -> Result<(), J> {
        if self.waiting.len() >= self.capacity {
            return Err(job);
        }
        self.waiting.push_back(Timed { job, until: None });
        Ok(())
    }

    /// The request that is to be sent now.
    pub(super) fn next(&mut self) -> Option<&J> {
        self.asked = Some(self.waiting.pop_front()?);
        self.asked.as_ref().map(|timed| &timed.job)
    }

    /// Whether a request waits to be sent.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The request that the guest has answered. `None` when its time was over before.
    pub(super) fn answered(&mut self) -> Option<J> {
        self.asked.take().map(|timed| timed.job)
    }

    /// A request that needs one more answer goes before all others.
    pub(super) fn again(&mut self, job: J) {
        self.waiting.push_front(Timed { job, until: None });
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(super) fn expiry(&self) -> Option<u64> {
        let all = self.waiting.iter().chain(&self.asked);
        all.map(|timed| timed.until.unwrap_or(0)).min()
    }

    /// The requests whose time is over. The time of those that are new begins.
    pub(super) fn expire(&mut self, now: u64) -> Vec<J> {
        let limit = now.saturating_add(self.time_limit);
        let mut over = Vec::new();
        let mut check = |mut timed: Timed<J>| {
            if *timed.until.get_or_insert(limit) <= now {
                over.push(timed.job);
                None
            } else {
                Some(timed)
            }
        };
        self.asked = self.asked.take().and_then(&mut check);
        self.waiting = core::mem::take(&mut self.waiting)
            .into_iter()
            .filter_map(check)
            .collect();
        over
    }

    /// All requests: none of them will be answered.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = J> + use<J> {
        let asked = self.asked.take().into_iter();
        let waiting = core::mem::take(&mut self.waiting);
        asked.chain(waiting).map(|timed| timed.job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_wait_than_there_is_room_for() {
        let mut requests = Requests::new(2, 10);
        assert_eq!(requests.push(1), Ok(()));
        assert_eq!(requests.push(2), Ok(()));
        assert_eq!(requests.push(3), Err(3));
        assert_eq!(requests.next(), Some(&1));
        assert_eq!(requests.push(3), Ok(()));
        assert_eq!(requests.drain().collect::<Vec<_>>(), [1, 2, 3]);
    }

    #[test]
    fn time_begins_when_the_host_first_looks_and_ends_waiting_and_asked_ones() {
        let mut requests = Requests::new(2, 10);
        assert_eq!(requests.expiry(), None);
        requests.push(1).unwrap();
        assert_eq!(requests.expiry(), Some(0));
        assert_eq!(requests.expire(100), []);
        assert_eq!(requests.expiry(), Some(110));
        requests.next();
        requests.push(2).unwrap();
        assert_eq!(requests.expire(105), []);
        assert_eq!(requests.expire(110), [1]);
        assert_eq!(requests.answered(), None, "too late");
        assert_eq!(requests.expire(115), [2]);
    }

    #[test]
    fn a_request_that_goes_on_is_the_next_one() {
        let mut requests = Requests::new(1, 10);
        requests.push(1).unwrap();
        requests.next();
        requests.push(2).unwrap();
        let first = requests.answered().unwrap();
        requests.again(first);
        assert_eq!(requests.next(), Some(&1));
    }
}
