//! Answers: what the guest is told of a command that has ended, also one that ended on another thread.

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
    pub(super) answers: Mutex<Vec<Answer>>,
    pub(super) link: Link,
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
    pub(super) results: Option<Arc<Results>>,
    pub(super) transaction: u64,
    pub(super) srb: Srb,
    pub(super) version: ProtocolVersion,
    pub(super) unit: Option<Arc<LogicalUnit>>,
    pub(super) running: Option<Running>,
}

impl Ticket {
    pub(super) fn finish(mut self, outcome: &Outcome) {
        let reply = ended(self.version, &self.srb, self.unit.as_deref(), outcome);
        self.send(reply);
    }

    fn send(&mut self, reply: Reply) {
        // Whoever has the answer sees the command no longer among those under way.
        drop(self.running.take());
        if let Some(results) = self.results.take() {
            let answer = Answer {
                transaction: self.transaction,
                reply,
            };
            results.answers.lock().push(answer);
            results.link.wake();
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
        let reply = Reply::srb(self.version, Some(&self.srb), &end);
        self.send(reply);
    }
}
