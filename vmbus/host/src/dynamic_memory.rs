//! A provider of dynamic memory that behaves as QEMU's hv-balloon does (spec balloon.md, 9).
//!
//! It does no I/O: it eats the guest's messages and makes the host's.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// One second in units of 100 ns.
const SECOND: u64 = 10_000_000;

/// How long the host leaves the guest alone after the capabilities.
pub const POST_INIT_WAIT: u64 = 50 * SECOND;

/// The most pages in one balloon request.
const MAX_REQUEST: u64 = 585_728;

/// The most pages in one range that the host gives back: 2 GiB.
const MAX_RETURN: u64 = 1 << 19;

/// A run of pages: first, count.
pub type Run = (u64, u64);

/// Where the host stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// The channel is closed.
    Closed,
    /// Waits for a version request.
    Version,
    /// Waits for the guest's capabilities.
    Capabilities,
    /// Leaves the guest alone until this time.
    PostInit(u64),
    /// Nothing to do.
    Idle,
    /// Waits for a balloon response.
    Balloon,
    /// Waits for an unballoon response.
    Unballoon,
    /// Waits for a hot-add response.
    HotAdd,
}

/// The provider.
#[derive(Debug)]
pub struct DynamicMemory {
    /// Whether it wants status reports.
    pub status_reports: bool,
    /// The newest version that it accepts.
    pub newest_version: u32,
    /// Whether it accepts the guest's capabilities.
    pub accepts_capabilities: bool,
    state: State,
    ram: u64,
    target: u64,
    target_changed: bool,
    transaction: u32,
    /// Pages still to be asked for.
    wanted: u64,
    removed: Vec<Run>,
    /// Ranges handed back in the unballoon request under way.
    returning: Vec<Run>,
    version: Option<u32>,
    capabilities: Option<u64>,
    reports: u64,
    last_report: Option<Report>,
    hot_add_answer: Option<(u32, u32)>,
    responses: u64,
    output: VecDeque<Vec<u8>>,
    complaints: Vec<&'static str>,
}

/// What a status report says, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// Pages that the guest has free.
    pub available: u64,
    /// Pages that the guest needs.
    pub committed: u64,
}

impl DynamicMemory {
    /// A host whose guest has `ram` pages.
    pub fn new(ram: u64) -> Self {
        Self {
            status_reports: true,
            newest_version: 0x2_0000,
            accepts_capabilities: true,
            state: State::Closed,
            ram,
            target: ram,
            target_changed: false,
            transaction: 0,
            wanted: 0,
            removed: Vec::new(),
            returning: Vec::new(),
            version: None,
            capabilities: None,
            reports: 0,
            last_report: None,
            hot_add_answer: None,
            responses: 0,
            output: VecDeque::new(),
            complaints: Vec::new(),
        }
    }

    /// The guest has opened the channel.
    pub fn opened(&mut self) {
        self.state = State::Version;
        self.version = None;
        self.capabilities = None;
        self.output.clear();
    }

    /// The guest has closed the channel: the host forgets everything.
    pub fn closed(&mut self) {
        self.state = State::Closed;
        self.removed.clear();
        self.returning.clear();
        self.output.clear();
        self.transaction = 0;
        self.wanted = 0;
        self.last_report = None;
    }

    /// The user wants the guest to have so many pages.
    pub fn set_target(&mut self, pages: u64) {
        self.target = pages;
        self.target_changed = true;
        self.step();
    }

    /// The pages that the guest has now.
    pub fn actual(&self) -> u64 {
        self.ram - self.removed_pages()
    }

    /// The pages that the guest has given away, in the order of their coming.
    pub fn removed(&self) -> &[Run] {
        &self.removed
    }

    /// Where the host stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// The version that was accepted.
    pub fn version(&self) -> Option<u32> {
        self.version
    }

    /// What the guest says it can do.
    pub fn capabilities(&self) -> Option<u64> {
        self.capabilities
    }

    /// How many status reports came, and the last one.
    pub fn reports(&self) -> (u64, Option<Report>) {
        (self.reports, self.last_report)
    }

    /// How many balloon responses came.
    pub fn balloon_responses(&self) -> u64 {
        self.responses
    }

    /// Pages and result of the last hot-add response.
    pub fn hot_add_answer(&self) -> Option<(u32, u32)> {
        self.hot_add_answer
    }

    /// What the guest did wrong.
    pub fn complaints(&self) -> &[&'static str] {
        &self.complaints
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn deadline(&self) -> Option<u64> {
        match self.state {
            State::PostInit(until) => Some(until),
            _ => None,
        }
    }

    /// Does what is due.
    pub fn tick(&mut self, now: u64) {
        if let State::PostInit(until) = self.state
            && until <= now
        {
            self.state = State::Idle;
            self.step();
        }
    }

    /// The next message for the guest.
    pub fn poll_message(&mut self) -> Option<Vec<u8>> {
        self.output.pop_front()
    }

    /// Sends anything at all: for tests that play an odd host.
    pub fn send_raw(&mut self, message: Vec<u8>) {
        self.output.push_back(message);
    }

    /// Offers memory to add.
    pub fn hot_add(&mut self, (first, count): Run) {
        let range = first | count << 40;
        let mut body = Vec::from(range.to_le_bytes());
        body.extend_from_slice(&range.to_le_bytes());
        self.state = State::HotAdd;
        self.send(10, self.transaction, &body);
    }

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
                self.transaction += 1;
                self.state = State::Idle;
                self.step();
            }
            (11, State::HotAdd) => {
                self.hot_add_answer = u32_at(message, 8).zip(u32_at(message, 12));
                self.transaction += 1;
                self.state = State::Idle;
                self.step();
            }
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
        self.state = State::PostInit(now + POST_INIT_WAIT);
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
        self.transaction += 1;
        self.state = State::Idle;
        if self.wanted > 0 {
            self.ask();
        } else {
            self.step();
        }
    }

    fn take_out(&mut self, run: Run) {
        let (first, count) = run;
        let overlaps = |&(start, length): &Run| first < start + length && start < first + count;
        if count == 0 || first + count > self.ram {
            return self.complain("pages that the guest does not have");
        }
        if self.removed.iter().any(overlaps) {
            return self.complain("pages that the host has already");
        }
        match self.wanted.checked_sub(count) {
            Some(rest) => self.wanted = rest,
            None => {
                self.wanted = 0;
                self.complain("more pages than were asked for");
            }
        }
        self.removed.push(run);
    }

    fn removed_pages(&self) -> u64 {
        self.removed.iter().map(|&(_, count)| count).sum()
    }

    fn step(&mut self) {
        if self.state != State::Idle || !self.target_changed {
            return;
        }
        let actual = self.actual();
        if self.target < actual {
            self.target_changed = false;
            self.wanted = actual - self.target;
            self.ask();
        } else if self.target > actual && !self.removed.is_empty() {
            self.give_back(self.target - actual);
        } else {
            self.target_changed = false;
        }
    }

    fn ask(&mut self) {
        // At most MAX_REQUEST.
        let pages = self.wanted.min(MAX_REQUEST) as u32;
        let mut body = Vec::from(pages.to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        self.state = State::Balloon;
        self.send(6, self.transaction, &body);
    }

    /// One range, as QEMU does; the answer leads to the next.
    fn give_back(&mut self, pages: u64) {
        let Some((first, count)) = self.removed.pop() else {
            return;
        };
        let give = count.min(pages).min(MAX_RETURN);
        if count > give {
            self.removed.push((first + give, count - give));
        }
        let mut body = Vec::from([0, 0, 0, 0, 1, 0, 0, 0]);
        body.extend_from_slice(&(first | give << 40).to_le_bytes());
        self.state = State::Unballoon;
        self.send(8, self.transaction, &body);
    }

    fn send(&mut self, kind: u16, id: u32, body: &[u8]) {
        let size = (8 + body.len()) as u16;
        let mut message = Vec::from(kind.to_le_bytes());
        message.extend_from_slice(&size.to_le_bytes());
        message.extend_from_slice(&id.to_le_bytes());
        message.extend_from_slice(body);
        self.output.push_back(message);
    }

    fn complain(&mut self, what: &'static str) {
        self.complaints.push(what);
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
