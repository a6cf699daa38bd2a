//! A provider of dynamic memory that behaves as QEMU's hv-balloon does (spec balloon.md, 9).
//!
//! It does no I/O: it eats the guest's messages and makes the host's. Whoever owns the guest's memory learns by
//! [`MemoryEvent`]s which pages are whose, and brings memory to add.

mod hot_add;
mod receive;
mod runs;

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

pub use hot_add::HotAddError;
pub use runs::Run;

use hot_add::Adding;
use runs::Runs;

use vmbus::ring::{Outgoing, PacketBuffer, PushError};

use crate::channel::HostChannel;
use crate::complaints::Complaints;
use crate::integration::reply::Outcomes;
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

/// How long the host waits for the answer to a message that had a fault.
const SHORT: u64 = 5 * SECOND;

/// Where faults find the fields of a message.
const LAYOUT: Layout = Layout {
    id: 4..8,
    kind: 0..2,
    length: 2..4,
    envelope: None,
};

/// Packets that are taken before others have their turn.
const BUDGET: usize = 64;

/// Messages that wait for room in the ring; beyond them the guest's stay in theirs.
const OUTPUT: usize = 16;

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
        let mut is_behind = false;
        for turn in 0.. {
            is_behind = self.output.len() >= OUTPUT;
            if is_behind {
                break;
            }
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
        if is_behind && self.output.len() < OUTPUT {
            self.wake();
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

#[cfg(test)]
mod tests;
