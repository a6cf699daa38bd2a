//! The bus's way in and out: messages to post, in order, and events to report, in order.

use alloc::boxed::Box;
use alloc::collections::VecDeque;

use super::event::{Event, Violation};
use super::gpadl::Transfer;
use crate::hypervisor::PostError;
use crate::ids::{ChannelId, GpadlHandle};
use crate::protocol::{Body, MessageType, Payload};

/// How many violations may wait to be reported. A host that makes more is only counted.
const MAX_VIOLATIONS: usize = 32;

/// How often a message is posted again to a connection that the hypervisor does not know, though contact
/// was made: for a short while after contact that can happen (spec tlfs.md 4).
const MAX_RETRIES: u8 = 20;

/// The time between two such attempts: 10 ms, in units of 100 ns.
const RETRY_DELAY: u64 = 100_000;

/// Whom it concerns when a message cannot be posted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Subject {
    Contact,
    RequestOffers,
    Gpadl(GpadlHandle),
    Teardown(GpadlHandle),
    Open(ChannelId),
    Modify(ChannelId),
    Unload,
    /// Nobody waits for an answer.
    Notice(MessageType),
}

/// One or more messages that wait to be posted.
#[derive(Debug)]
enum Queued {
    Message(Box<Posted>),
    Transfer(Transfer),
}

/// A message that the caller was given to post.
#[derive(Clone, Copy, Debug)]
struct Posted {
    subject: Subject,
    payload: Payload,
}

/// What becomes of a message that could not be posted.
pub(super) enum Refused {
    /// Nothing was waiting to be posted, or it is posted again later.
    Handled,
    /// It failed for good.
    Failed(Subject),
}

/// Messages and events that wait to be fetched.
#[derive(Default, Debug)]
pub(super) struct Io {
    outbox: VecDeque<Queued>,
    /// The message fetched last.
    posted: Option<Posted>,
    /// Posting goes on at this time.
    held_until: Option<u64>,
    retries: u8,
    events: VecDeque<Event>,
    waiting_violations: usize,
    violations: u64,
}

impl Io {
    pub(super) fn send<B: Body>(&mut self, subject: Subject, body: &B) {
        self.send_payload(subject, Payload::new(body));
    }

    pub(super) fn send_payload(&mut self, subject: Subject, payload: Payload) {
        self.outbox
            .push_back(Queued::Message(Box::new(Posted { subject, payload })));
    }

    /// Sends a message that nobody waits for an answer to.
    pub(super) fn notify<B: Body>(&mut self, body: &B) {
        self.send(Subject::Notice(B::TYPE), body);
    }

    pub(super) fn send_gpadl(&mut self, transfer: Transfer) {
        self.outbox.push_back(Queued::Transfer(transfer));
    }

    /// Whether some of this GPADL's messages have not been fetched yet.
    pub(super) fn is_sending(&self, handle: GpadlHandle) -> bool {
        self.outbox.iter().any(|queued| match queued {
            Queued::Transfer(transfer) => transfer.handle() == handle,
            Queued::Message(posted) => posted.subject == Subject::Gpadl(handle),
        })
    }

    /// Drops this GPADL's messages that have not been posted yet.
    pub(super) fn stop_sending(&mut self, handle: GpadlHandle) {
        self.posted = self
            .posted
            .filter(|posted| posted.subject != Subject::Gpadl(handle));
        self.outbox.retain(|queued| match queued {
            Queued::Transfer(transfer) => transfer.handle() != handle,
            Queued::Message(posted) => posted.subject != Subject::Gpadl(handle),
        });
    }

    /// Whether all messages have been fetched.
    pub(super) fn all_sent(&self) -> bool {
        self.outbox.is_empty()
    }

    /// Drops all messages that have not been fetched yet.
    pub(super) fn drop_messages(&mut self) {
        self.outbox.clear();
        self.posted = None;
        self.held_until = None;
        self.retries = 0;
    }

    /// The next message to post.
    pub(super) fn poll_message(&mut self) -> Option<Payload> {
        if self.held_until.is_some() {
            return None;
        }
        let posted = loop {
            match self.outbox.front_mut()? {
                Queued::Message(posted) => {
                    let posted = **posted;
                    self.outbox.pop_front();
                    break posted;
                }
                Queued::Transfer(transfer) => {
                    let subject = Subject::Gpadl(transfer.handle());
                    let payload = transfer.next_message();
                    if transfer.is_done() {
                        self.outbox.pop_front();
                    }
                    if let Some(payload) = payload {
                        break Posted { subject, payload };
                    }
                }
            }
        };
        // The message before it was not refused.
        if self.posted.replace(posted).is_some() {
            self.retries = 0;
        }
        Some(posted.payload)
    }

    /// Takes back the message fetched last, which could not be posted. A message of a live connection that
    /// the hypervisor does not know (yet) is kept for another attempt.
    pub(super) fn message_refused(&mut self, now: u64, error: PostError) -> Refused {
        let Some(posted) = self.posted.take() else {
            return Refused::Handled;
        };
        let again = error == PostError::InvalidConnection
            && posted.subject != Subject::Contact
            && self.retries < MAX_RETRIES;
        if !again {
            self.retries = 0;
            return Refused::Failed(posted.subject);
        }
        self.retries += 1;
        self.held_until = Some(now.saturating_add(RETRY_DELAY));
        self.outbox.push_front(Queued::Message(Box::new(posted)));
        Refused::Handled
    }

    /// Lets held messages go when their time has come.
    pub(super) fn tick(&mut self, now: u64) {
        if self.held_until.is_some_and(|until| until <= now) {
            self.held_until = None;
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.held_until
    }

    pub(super) fn report(&mut self, event: Event) {
        self.events.push_back(event);
    }

    pub(super) fn violation(&mut self, violation: Violation) {
        self.violations = self.violations.saturating_add(1);
        if self.waiting_violations < MAX_VIOLATIONS {
            self.waiting_violations += 1;
            self.events.push_back(Event::Violation(violation));
        }
    }

    pub(super) fn violations(&self) -> u64 {
        self.violations
    }

    pub(super) fn poll_event(&mut self) -> Option<Event> {
        let event = self.events.pop_front()?;
        if let Event::Violation(_) = event {
            self.waiting_violations -= 1;
        }
        Some(event)
    }
}
