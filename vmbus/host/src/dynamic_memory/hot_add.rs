//! Hot add: memory that the guest gets while it runs (spec balloon.md 8).

use alloc::vec::Vec;
use core::fmt;

use super::receive::u32_at;
use super::{DynamicMemory, MemoryEvent, Run, State};
use crate::integration::Reply;
use crate::integration::reply::{Promise, promise};

/// The most pages in one hot-add request: 2 GiB.
const MAX_ADD: u64 = 1 << 19;

/// Requests for memory to be added that may wait.
const MAX_WAITING: usize = 16;

/// Capability: hot add (spec balloon.md 4).
const HOT_ADD: u64 = 1 << 1;

/// Why memory was not added.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum HotAddError {
    /// The channel is not open, or the guest has not said what it can do.
    NotReady,
    /// The guest cannot do that.
    NotSupported,
    /// First page and count are no multiples of so many pages, as the guest wants it.
    Unaligned(u64),
    /// The guest has some of these pages already.
    Overlap,
    /// Too many requests wait.
    Busy,
    /// The guest did not take any of it.
    Refused,
    /// The guest has closed the channel before it answered, or its answer was lost.
    Closed,
}

impl fmt::Display for HotAddError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotReady => f.write_str("the guest has not started dynamic memory"),
            Self::NotSupported => f.write_str("the guest cannot add memory while it runs"),
            Self::Unaligned(pages) => {
                let mib = pages / 256;
                write!(f, "the guest adds memory in multiples of {mib} MiB only")
            }
            Self::Overlap => f.write_str("the guest has some of this memory already"),
            Self::Busy => f.write_str("too many requests for memory wait"),
            Self::Refused => f.write_str("the guest has not taken the memory"),
            Self::Closed => f.write_str("the guest closed the channel before it answered"),
        }
    }
}

impl core::error::Error for HotAddError {}

/// Memory that is to be added, and how far that has come.
#[derive(Debug)]
pub(super) struct Adding {
    /// What is still to be offered.
    rest: Run,
    /// What has been offered last.
    offered: u64,
    /// Pages that the guest has taken.
    added: u64,
    pub(super) promise: Promise<Result<u64, HotAddError>>,
}

impl DynamicMemory {
    /// Adds memory: these pages are there, and the guest is to use them. The reply comes when it has answered, and says how many
    /// pages it took.
    pub fn hot_add(&mut self, run: Run) -> Reply<Result<u64, HotAddError>> {
        if let Err(error) = self.check_hot_add(run) {
            return Reply::ready(Err(error));
        }
        let (promise, reply) = promise();
        self.adding.push_back(Adding {
            rest: run,
            offered: 0,
            added: 0,
            promise,
        });
        self.step();
        self.wake();
        reply
    }

    /// Whether this memory can be added now, as far as the host can tell.
    pub fn check_hot_add(&self, (first, count): Run) -> Result<(), HotAddError> {
        let capabilities = self.capabilities.ok_or(HotAddError::NotReady)?;
        if capabilities & HOT_ADD == 0 {
            return Err(HotAddError::NotSupported);
        }
        let unit = unit(capabilities);
        if count == 0 || !first.is_multiple_of(unit) || !count.is_multiple_of(unit) {
            return Err(HotAddError::Unaligned(unit));
        }
        let end = first.checked_add(count).filter(|end| *end < 1 << 40);
        let end = end.ok_or(HotAddError::Overlap)?;
        let waiting = self.adding.iter().map(|adding| adding.rest);
        let mut taken = self.known.to_vec().into_iter().chain(waiting);
        if taken.any(|(other, length)| first < other + length && other < end) {
            return Err(HotAddError::Overlap);
        }
        if self.adding.len() >= MAX_WAITING {
            return Err(HotAddError::Busy);
        }
        Ok(())
    }

    /// Offers the next piece of the memory that is to be added first.
    pub(super) fn offer_memory(&mut self) {
        let Some(adding) = self.adding.front_mut() else {
            return;
        };
        let (first, count) = adding.rest;
        let unit = self.capabilities.map_or(1, unit);
        // No less than the guest's own unit, however large that is.
        let piece = count.min((MAX_ADD / unit * unit).max(unit));
        adding.offered = piece;
        // Range and region are the same (spec balloon.md 8).
        let range = first | piece << 40;
        let mut body = Vec::from(range.to_le_bytes());
        body.extend_from_slice(&range.to_le_bytes());
        self.state = State::HotAdd;
        self.send(10, self.transaction, &body);
    }

    pub(super) fn hot_add_response(&mut self, id: u32, message: &[u8]) {
        if id != self.transaction {
            self.complain("a hot-add response with another id");
        }
        self.hot_add_answer = u32_at(message, 8).zip(u32_at(message, 12));
        let Some((pages, result)) = self.hot_add_answer else {
            return self.complain("a short hot-add response");
        };
        let Some(mut adding) = self.adding.pop_front() else {
            return self.done();
        };
        let (first, count) = adding.rest;
        let mut pages = u64::from(pages);
        if pages > adding.offered {
            self.complain("more pages added than were offered");
            pages = 0;
        }
        if result & 1 == 0 {
            pages = 0;
        }
        if pages > 0 && self.known.join((first, pages)) {
            adding.added += pages;
            // Who adds memory wants the guest to have it.
            self.target = self.target.saturating_add(pages);
            self.tell(MemoryEvent::Added((first, pages)));
        }
        let all = pages == adding.offered;
        adding.rest = (first + pages, count - pages);
        if all && count > pages {
            self.adding.push_front(adding);
        } else {
            let outcome = match adding.added {
                0 => Err(HotAddError::Refused),
                added => Ok(added),
            };
            self.outcomes.add(adding.promise, outcome);
        }
        self.done();
    }
}

/// Pages that hot add takes as a unit: 2^n MiB (spec balloon.md 4).
fn unit(capabilities: u64) -> u64 {
    let exponent = capabilities >> 2 & 0xF;
    256 << exponent
}
