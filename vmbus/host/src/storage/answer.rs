//! Answers: what the guest is told of a command that has ended, also one that ended on another thread.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::activity::Running;
use super::scsi::{self, LogicalUnit, Outcome, Sense, Stop, Transfer};
use super::vstor::{
    Malformed, NtStatus, Operation, ProtocolVersion, Reply, Srb, SrbEnd, SrbStatus,
};
use crate::provider::Link;
use crate::sync::Mutex;

/// The SCSI status of a command that was refused or failed (SAM-3 5.3).
const CHECK_CONDITION: u8 = 2;

/// Where answers come from other threads.
pub(super) struct Results {
    answers: Mutex<Answers>,
    pub(super) link: Link,
}

#[derive(Default)]
struct Answers {
    /// Commands that others work on, by the numbers of their tickets.
    waiting: BTreeMap<u64, Waiting>,
    /// What has not been taken yet.
    done: Vec<Answer>,
    /// The number of the next ticket.
    next: u64,
}

/// A command that waits for its answer.
struct Waiting {
    transaction: u64,
    srb: Srb,
    version: ProtocolVersion,
}

impl Results {
    pub(super) fn new(link: Link) -> Self {
        let answers = Mutex::default();
        Self { answers, link }
    }

    /// Takes what is done.
    pub(super) fn take(&self) -> Vec<Answer> {
        core::mem::take(&mut self.answers.lock().done)
    }

    /// Waits for no command any more: the guest is told that their units are gone. Their data are out of reach by now.
    pub(super) fn give_up(&self) {
        let mut answers = self.answers.lock();
        let outcome = Outcome::Stopped(Stop::Removed);
        for waiting in core::mem::take(&mut answers.waiting).into_values() {
            answers.done.push(Answer {
                transaction: waiting.transaction,
                reply: ended(waiting.version, &waiting.srb, None, &outcome),
            });
        }
    }
}

/// An answer and the packet that it is for.
pub(super) struct Answer {
    pub(super) transaction: u64,
    pub(super) reply: Reply,
}

/// The answer to a packet that is wrong in itself.
pub(super) fn malformed(
    ready: Option<ProtocolVersion>,
    size: usize,
    operation: Option<Operation>,
    error: Malformed,
) -> Reply {
    match ready.filter(|_| operation == Some(Operation::EXECUTE_SRB)) {
        Some(version) => {
            let end = refused(error.srb_status());
            Reply::srb(version, None, &end)
        }
        None => Reply::status(size, NtStatus::INVALID_PARAMETER),
    }
}

/// REPORT LUNS (SPC-3 6.21).
pub(super) fn report(luns: &[u8], select: u8, allocation: u32, transfer: &Transfer) -> Outcome {
    if allocation < 16 {
        return Sense::invalid_cdb(6).into();
    }
    let luns = match select {
        0 | 2 => luns,
        // Well-known units, of which there are none.
        1 => &[],
        _ => return Sense::invalid_cdb(2).into(),
    };
    transfer.deliver(&scsi::report(luns.iter().copied()), allocation)
}

/// The end of a command that nothing came of, with sense data for guests that look at nothing else.
fn refused(srb_status: SrbStatus) -> SrbEnd {
    let sense = Sense::illegal(scsi::Additional::INVALID_FIELD_IN_CDB);
    SrbEnd {
        srb_status: srb_status.with_sense(),
        scsi_status: CHECK_CONDITION,
        transferred: 0,
        sense: Some((sense.to_bytes(), scsi::SENSE_LENGTH as u8)),
    }
}

/// The answer to a command that has ended.
pub(super) fn ended(
    version: ProtocolVersion,
    srb: &Srb,
    unit: Option<&LogicalUnit>,
    outcome: &Outcome,
) -> Reply {
    let done = |srb_status, transferred| SrbEnd {
        srb_status,
        scsi_status: 0,
        transferred,
        sense: None,
    };
    let failed = |srb_status| SrbEnd {
        scsi_status: CHECK_CONDITION,
        ..done(srb_status, 0)
    };
    let (mut end, sense) = match outcome {
        Outcome::Good(transferred) => (done(SrbStatus::SUCCESS, *transferred), None),
        Outcome::Overrun(transferred) => (done(SrbStatus::DATA_OVERRUN, *transferred), None),
        Outcome::Check(sense) => (failed(SrbStatus::ERROR), Some(*sense)),
        Outcome::Invalid => {
            let sense = Sense::illegal(scsi::Additional::INVALID_FIELD_IN_CDB);
            (failed(SrbStatus::INVALID_REQUEST), Some(sense))
        }
        Outcome::Stopped(Stop::Reset) => {
            let sense = Sense::new(scsi::SenseKey::ABORTED_COMMAND, scsi::Additional::NONE);
            (failed(SrbStatus::BUS_RESET), Some(sense))
        }
        // Guests look at the status alone: no sense data.
        Outcome::Stopped(Stop::Removed) => (failed(SrbStatus::INVALID_LUN), None),
    };
    match (sense, unit) {
        (Some(sense), Some(unit)) if srb.sense_room == 0 => unit.keep_sense(sense),
        (Some(sense), _) if srb.sense_room != 0 => {
            end.srb_status = end.srb_status.with_sense();
            let length = srb.sense_room.min(scsi::SENSE_LENGTH as u8);
            end.sense = Some((sense.to_bytes(), length));
        }
        _ => {}
    }
    Reply::srb(version, Some(srb), &end)
}

/// A command that is being worked on. Whatever becomes of it, the guest gets an answer.
pub(super) struct Ticket {
    results: Arc<Results>,
    number: u64,
    unit: Option<Arc<LogicalUnit>>,
    running: Option<Running>,
}

impl Ticket {
    /// For the command of this packet.
    pub(super) fn new(
        results: &Arc<Results>,
        transaction: u64,
        (srb, version): (Srb, ProtocolVersion),
        unit: Option<Arc<LogicalUnit>>,
        running: Running,
    ) -> Self {
        let mut answers = results.answers.lock();
        let number = answers.next;
        answers.next = number.wrapping_add(1);
        let waiting = Waiting {
            transaction,
            srb,
            version,
        };
        answers.waiting.insert(number, waiting);
        drop(answers);
        Self {
            results: Arc::clone(results),
            number,
            unit,
            running: Some(running),
        }
    }

    pub(super) fn finish(mut self, outcome: &Outcome) {
        let unit = self.unit.take();
        self.leave(|waiting| ended(waiting.version, &waiting.srb, unit.as_deref(), outcome));
    }

    /// Leaves the answer, unless there is one.
    fn leave(&mut self, reply: impl FnOnce(&Waiting) -> Reply) {
        // Whoever has the answer sees the command no longer among those under way.
        drop(self.running.take());
        let mut answers = self.results.answers.lock();
        if let Some(waiting) = answers.waiting.remove(&self.number) {
            let reply = reply(&waiting);
            let transaction = waiting.transaction;
            answers.done.push(Answer { transaction, reply });
            drop(answers);
            self.results.link.wake();
        }
    }
}

impl Drop for Ticket {
    /// The work was given up without an end.
    fn drop(&mut self) {
        let end = SrbEnd {
            srb_status: SrbStatus::INTERNAL_ERROR,
            scsi_status: CHECK_CONDITION,
            transferred: 0,
            sense: None,
        };
        self.leave(|waiting| Reply::srb(waiting.version, Some(&waiting.srb), &end));
    }
}
