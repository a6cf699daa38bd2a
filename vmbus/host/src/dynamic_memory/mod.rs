//! A provider of dynamic memory that behaves as QEMU's hv-balloon does (spec balloon.md, 9).
//!
//! It does no I/O: it eats the guest's messages and makes the host's. Whoever owns the guest's memory learns by
//! [`MemoryEvent`]s which pages are whose, and brings memory to add.

mod runs;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

pub use runs::Run;

use runs::Runs;

use vmbus::ring::{Outgoing, PacketBuffer, PushError};

use crate::channel::HostChannel;
use crate::complaints::Complaints;
use crate::integration::Reply;
use crate::integration::reply::{Outcomes, Promise, promise};
use crate::message_faults::{Layout, MessageFault, MessageFaults};
use crate::provider::Link;

/// One second in units of 100 ns.
const SECOND: u64 = 10_000_000;

/// How long the host leaves the guest alone after the capabilities.
pub const POST_INIT_WAIT: u64 = 50 * SECOND;

/// The most pages in one balloon request.
const MAX_REQUEST: u64 = 585_728;

/// The most pages in one range that the host gives back: 2 GiB.
const MAX_RETURN: u64 = 1 << 19;

/// The most pages in one hot-add request: 2 GiB.
const MAX_ADD: u64 = 1 << 19;

/// Requests for memory to be added that may wait.
const MAX_WAITING: usize = 16;

/// How long the host waits for the answer to a message that had a fault.
const SHORT: u64 = 5 * SECOND;

/// Capability: hot add (spec balloon.md 4).
const HOT_ADD: u64 = 1 << 1;

/// Where faults find the fields of a message.
const LAYOUT: Layout = Layout {
    id: 4..8,
    kind: 0..2,
    length: 2..4,
    envelope: None,
};

/// Packets that are taken before others have their turn.
const BUDGET: usize = 64;

/// What becomes of pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryEvent {
    /// The guest has given these pages: they can be discarded.
    Taken(Run),
    /// The guest is about to get these pages back.
    GivenBack(Run),
    /// The guest uses these pages of the memory that was offered to it.
    Added(Run),
    /// The channel is closed: pages that the guest had given are its own again.
    Forgotten,
}

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
struct Adding {
    /// What is still to be offered.
    rest: Run,
    /// What has been offered last.
    offered: u64,
    /// Pages that the guest has taken.
    added: u64,
    promise: Promise<Result<u64, HotAddError>>,
}

/// Who wants to know what becomes of pages.
type Observer = Box<dyn FnMut(MemoryEvent) + Send>;

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
pub struct DynamicMemory {
    /// Whether it wants status reports.
    pub status_reports: bool,
    /// The newest version that it accepts.
    pub newest_version: u32,
    /// Whether it accepts the guest's capabilities.
    pub accepts_capabilities: bool,
    state: State,
    /// The pages that the guest started with.
    initial: Vec<Run>,
    /// The pages that it knows of: those, and what was added.
    known: Runs,
    target: u64,
    target_changed: bool,
    transaction: u32,
    /// Pages still to be asked for.
    wanted: u64,
    removed: Runs,
    /// The run handed back in the unballoon request under way.
    returning: Option<Run>,
    /// Memory to add; the first is under way in [`State::HotAdd`].
    adding: VecDeque<Adding>,
    /// When the host gives up a request that had a fault.
    patience: Option<u64>,
    /// The request under way had a fault.
    spoilt: bool,
    version: Option<u32>,
    capabilities: Option<u64>,
    reports: u64,
    last_report: Option<Report>,
    hot_add_answer: Option<(u32, u32)>,
    responses: u64,
    output: VecDeque<Vec<u8>>,
    faults: MessageFaults,
    complaints: Complaints,
    outcomes: Outcomes,
    observer: Option<Observer>,
    link: Option<Link>,
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
    /// A host whose guest has `ram` pages, from page 0 on.
    pub fn new(ram: u64) -> Self {
        Self::with_memory(&[(0, ram)])
    }

    /// A host whose guest has these pages.
    pub fn with_memory(runs: &[Run]) -> Self {
        let known = known(runs);
        let ram = known.pages();
        Self {
            status_reports: true,
            newest_version: 0x2_0000,
            accepts_capabilities: true,
            state: State::Closed,
            initial: runs.into(),
            known,
            target: ram,
            target_changed: false,
            transaction: 0,
            wanted: 0,
            removed: Runs::new(),
            returning: None,
            adding: VecDeque::new(),
            patience: None,
            spoilt: false,
            version: None,
            capabilities: None,
            reports: 0,
            last_report: None,
            hot_add_answer: None,
            responses: 0,
            output: VecDeque::new(),
            faults: MessageFaults::new(),
            complaints: Complaints::new(),
            outcomes: Outcomes::default(),
            observer: None,
            link: None,
        }
    }

    /// The guest has opened the channel.
    pub fn opened(&mut self) {
        self.state = State::Version;
        self.version = None;
        self.capabilities = None;
        self.output.clear();
    }

    /// The guest has closed the channel: the host forgets everything but the memory that it added.
    pub fn closed(&mut self) {
        self.state = State::Closed;
        self.removed.clear();
        self.returning = None;
        self.output.clear();
        self.transaction = 0;
        self.wanted = 0;
        self.patience = None;
        self.spoilt = false;
        self.last_report = None;
        self.capabilities = None;
        for adding in core::mem::take(&mut self.adding) {
            self.outcomes.add(adding.promise, Err(HotAddError::Closed));
        }
        self.tell(MemoryEvent::Forgotten);
    }

    /// The guest starts anew with the memory that it had at first.
    pub fn restart(&mut self) {
        self.closed();
        self.known = known(&self.initial);
        self.target = self.known.pages();
        self.target_changed = false;
    }

    /// Has `observer` told, at once and under the lock that this is behind, what becomes of pages.
    pub fn observe(&mut self, observer: impl FnMut(MemoryEvent) + Send + 'static) {
        self.observer = Some(Box::new(observer));
    }

    /// Whom to wake when there is something to send.
    pub fn set_link(&mut self, link: Link) {
        self.link = Some(link);
    }

    fn tell(&mut self, event: MemoryEvent) {
        if let Some(observer) = &mut self.observer {
            observer(event);
        }
    }

    fn wake(&self) {
        if let Some(link) = &self.link {
            link.wake();
        }
    }

    /// The user wants the guest to have so many pages, now or as soon as the guest can be asked.
    pub fn set_target(&mut self, pages: u64) {
        self.target = pages;
        self.target_changed = true;
        self.step();
        self.wake();
    }

    /// The pages that the guest should have.
    pub fn target(&self) -> u64 {
        self.target
    }

    /// The pages that the guest has now.
    pub fn actual(&self) -> u64 {
        self.known.pages().saturating_sub(self.removed.pages())
    }

    /// The pages that the guest has given away, by their number.
    pub fn removed(&self) -> Vec<Run> {
        self.removed.to_vec()
    }

    /// How many pages the guest has given away.
    pub fn removed_pages(&self) -> u64 {
        self.removed.pages()
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
        self.complaints.first()
    }

    /// How often the guest did what no guest may do.
    pub fn complaint_count(&self) -> u64 {
        self.complaints.total()
    }

    /// The next `count` messages to the guest have this fault, behind those asked for before.
    pub fn inject(&mut self, fault: MessageFault, count: u32) {
        self.faults.inject(fault, count);
    }

    /// Nothing goes wrong with messages any more.
    pub fn heal(&mut self) {
        self.faults.clear();
    }

    /// Answers for those who wait, to be given when no lock is held.
    pub fn outcomes(&mut self) -> Outcomes {
        core::mem::take(&mut self.outcomes)
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn deadline(&self) -> Option<u64> {
        let spoilt = self.spoilt.then_some(0);
        let init = match self.state {
            State::PostInit(until) => Some(until),
            _ => None,
        };
        init.into_iter().chain(self.patience).chain(spoilt).min()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: u64) {
        if let State::PostInit(until) = self.state
            && until <= now
        {
            self.state = State::Idle;
            self.step();
        }
        if core::mem::take(&mut self.spoilt) {
            self.patience = Some(now.saturating_add(SHORT));
        }
        if self.patience.is_some_and(|until| until <= now) {
            self.give_up();
        }
    }

    /// No answer will come to a request that had a fault: the host begins anew.
    fn give_up(&mut self) {
        self.patience = None;
        match self.state {
            State::Balloon => self.wanted = 0,
            State::Unballoon => {
                if let Some(run) = self.returning.take() {
                    self.removed.insert(run);
                    self.tell(MemoryEvent::Taken(run));
                }
            }
            State::HotAdd => {
                if let Some(adding) = self.adding.pop_front() {
                    self.outcomes.add(adding.promise, Err(HotAddError::Closed));
                }
            }
            _ => return,
        }
        self.target_changed = true;
        self.done();
    }

    /// A transaction has ended.
    fn done(&mut self) {
        self.transaction = self.transaction.wrapping_add(1);
        self.patience = None;
        self.spoilt = false;
        self.state = State::Idle;
        self.step();
    }

    /// Handles what has come on the channel and what is due, and sends what there is to send.
    pub fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        self.tick(now);
        let mut packet = PacketBuffer::default();
        for turn in 0.. {
            if turn == BUDGET {
                self.wake();
                break;
            }
            match channel.receive(&mut packet) {
                Ok(true) => self.receive(now, packet.payload()),
                _ => break,
            }
            if channel.release().is_err() {
                break;
            }
        }
        while let Some(message) = self.output.pop_front() {
            match channel.send(&Outgoing::in_band([&message, &[]])) {
                Ok(()) => {}
                Err(PushError::Full { need }) => {
                    self.output.push_front(message);
                    // A broken ring shows at the next access.
                    if !channel.wait_for_room(need).unwrap_or(false) {
                        break;
                    }
                }
                // It will never go.
                Err(PushError::TooLarge { .. } | PushError::Ring(_)) => {}
            }
        }
    }

    /// The next message for the guest.
    pub fn poll_message(&mut self) -> Option<Vec<u8>> {
        self.output.pop_front()
    }

    /// Sends anything at all: for tests that play an odd host.
    pub fn send_raw(&mut self, message: Vec<u8>) {
        self.output.push_back(message);
        self.wake();
    }

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
    fn offer_memory(&mut self) {
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

    fn hot_add_response(&mut self, id: u32, message: &[u8]) {
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

    fn step(&mut self) {
        if self.state != State::Idle {
            return;
        }
        let actual = self.actual();
        if self.target_changed && self.target < actual {
            self.target_changed = false;
            self.wanted = actual - self.target;
            self.ask();
        } else if self.target_changed && self.target > actual && self.removed.pages() > 0 {
            self.give_back(self.target - actual);
        } else {
            // First what the guest has given, then what it never had (spec balloon.md 9).
            self.target_changed = false;
            self.offer_memory();
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
        let Some(run) = self.removed.take_last(pages.min(MAX_RETURN)) else {
            return;
        };
        let (first, count) = run;
        let mut body = Vec::from([0, 0, 0, 0, 1, 0, 0, 0]);
        body.extend_from_slice(&(first | count << 40).to_le_bytes());
        self.returning = Some(run);
        self.tell(MemoryEvent::GivenBack(run));
        self.state = State::Unballoon;
        self.send(8, self.transaction, &body);
    }

    fn send(&mut self, kind: u16, id: u32, body: &[u8]) {
        let size = (8 + body.len()) as u16;
        let mut message = Vec::from(kind.to_le_bytes());
        message.extend_from_slice(&size.to_le_bytes());
        message.extend_from_slice(&id.to_le_bytes());
        message.extend_from_slice(body);
        let waits = matches!(
            self.state,
            State::Balloon | State::Unballoon | State::HotAdd
        );
        self.spoilt |= waits && !self.faults.is_empty();
        let output = &mut self.output;
        self.faults
            .apply(&LAYOUT, message, |message| output.push_back(message));
    }

    fn complain(&mut self, what: &'static str) {
        self.complaints.add(what);
    }
}

impl fmt::Debug for DynamicMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DynamicMemory")
            .field("state", &self.state)
            .field("target", &self.target)
            .field("actual", &self.actual())
            .finish_non_exhaustive()
    }
}

/// The guest's pages at the start. Runs that overlap count once.
fn known(runs: &[Run]) -> Runs {
    let mut known = Runs::new();
    for run in runs {
        known.join(*run);
    }
    known
}

/// Pages that hot add takes as a unit: 2^n MiB (spec balloon.md 4).
fn unit(capabilities: u64) -> u64 {
    let exponent = capabilities >> 2 & 0xF;
    256 << exponent
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
