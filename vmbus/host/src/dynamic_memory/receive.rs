//! What the guest says: versions, capabilities, reports, and answers to requests (spec balloon.md 3 to 7).

use super::{DynamicMemory, MemoryEvent, POST_INIT_WAIT, Report, Run, State};

impl DynamicMemory {
    /// Handles a message of the guest.
    pub fn receive(&mut self, now: u64, message: &[u8]) {
        let (Some(kind), Some(size), Some(id)) =
            (u16_at(message, 0), u16_at(message, 2), u32_at(message, 4))
        else {
            return self.complain("a message without a header");
        };
        let Some(message) = message.get(..usize::from(size)) else {
            return self.complain("a message shorter than it says");
        };
        match (kind, self.state) {
            (1, State::Version) => self.version_request(id, message),
            (3, State::Capabilities) => self.capabilities_report(now, id, message),
            (5, State::Closed | State::Version | State::Capabilities) => {
                self.complain("a status report before the capabilities");
            }
            (5, _) => self.status_report(message),
            (7, State::Balloon) => self.balloon_response(id, message),
            (9, State::Unballoon) => {
                if id != self.transaction {
                    self.complain("an unballoon response with another id");
                }
                self.returning = None;
                self.done();
            }
            (11, State::HotAdd) => self.hot_add_response(id, message),
            _ => self.complain("a message that has no place now"),
        }
    }

    fn version_request(&mut self, id: u32, message: &[u8]) {
        let (Some(version), Some(last)) = (u32_at(message, 8), u32_at(message, 12)) else {
            return self.complain("a short version request");
        };
        if (version == 3) != (last & 1 == 1) {
            self.complain("the last attempt is not marked");
        }
        let accepted = (3..=self.newest_version).contains(&version);
        self.send(2, id, &u64::from(accepted).to_le_bytes());
        if accepted {
            self.version = Some(version);
            self.state = State::Capabilities;
        }
    }

    fn capabilities_report(&mut self, now: u64, id: u32, message: &[u8]) {
        if message.len() != 32 {
            return self.complain("a capabilities report of the wrong size");
        }
        self.capabilities = u64_at(message, 8);
        let flags =
            u64::from(self.accepts_capabilities) | 1 << 1 | u64::from(!self.status_reports) << 2;
        self.send(4, id, &flags.to_le_bytes());
        self.state = State::PostInit(now.saturating_add(POST_INIT_WAIT));
    }

    fn status_report(&mut self, message: &[u8]) {
        let report = u64_at(message, 8).zip(u64_at(message, 16));
        let (Some((available, committed)), 48) = (report, message.len()) else {
            return self.complain("a status report of the wrong size");
        };
        if !self.status_reports {
            self.complain("a status report that was not wanted");
        }
        self.reports += 1;
        self.last_report = Some(Report {
            available,
            committed,
        });
    }

    fn balloon_response(&mut self, id: u32, message: &[u8]) {
        let Some(word) = u32_at(message, 12) else {
            return self.complain("a short balloon response");
        };
        if id != self.transaction {
            self.complain("a balloon response with another id");
        }
        self.responses += 1;
        let (more, count) = (word & 1 == 1, (word >> 1) as usize);
        if message.len() != 16 + 8 * count {
            return self.complain("a balloon response whose length does not fit its ranges");
        }
        for at in 0..count {
            let word = u64_at(message, 16 + 8 * at).unwrap_or(0);
            self.take_out((word & ((1 << 40) - 1), word >> 40));
        }
        if count == 0 {
            self.wanted = 0;
        } else if more {
            return;
        }
        if self.wanted > 0 {
            self.transaction = self.transaction.wrapping_add(1);
            self.ask();
        } else {
            self.done();
        }
    }

    fn take_out(&mut self, run: Run) {
        let (_, count) = run;
        if count == 0 || !self.known.contain(run) {
            return self.complain("pages that the guest does not have");
        }
        if !self.removed.insert(run) {
            return self.complain("pages that the host has already");
        }
        match self.wanted.checked_sub(count) {
            Some(rest) => self.wanted = rest,
            None => {
                self.wanted = 0;
                self.complain("more pages than were asked for");
            }
        }
        self.tell(MemoryEvent::Taken(run));
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
