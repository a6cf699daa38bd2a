//! The guest's side of the dynamic memory protocol, without input or output: it eats messages and
//! times, and makes messages and requests to memory (spec balloon.md, 5 to 8).

use alloc::collections::VecDeque;
use core::fmt;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::message::{
    self, ACCEPTED, BalloonRequest, BalloonResponse, CAPABILITIES, Capabilities, HotAddResponse,
    HotRemoveResponse, Kind, MAX_MESSAGE, MAX_RANGE_PAGES, MAX_RANGES, Response, SUPPRESS_REPORTS,
    StatusReport, UnballoonRequest, VersionRequest,
};
use super::ranges::RangeSet;
use super::{Figures, GuestMemory, PageRange};

/// One second in units of 100 ns.
const SECOND: u64 = 10_000_000;

/// How long the host may take to answer the version and capability messages.
const RESPONSE_TIMEOUT: u64 = 5 * SECOND;

/// Time between status reports.
const REPORT_INTERVAL: u64 = SECOND;

/// Pages of the blocks that are taken first: 2 MiB.
const BLOCK: u64 = 512;

/// Requests of the host that may wait for their answer; more than a host has under way at one time.
const MAX_REQUESTS: usize = 16;

/// A version of the protocol: major in the upper half, minor in the lower.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u32);

impl Version {
    /// 2.0, Windows 10.
    pub const V2_0: Self = Self(0x0002_0000);
    /// 1.0, Windows 8.
    pub const V1_0: Self = Self(0x0001_0000);
    /// 0.3, Windows 7.
    pub const V0_3: Self = Self(3);
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xFFFF)
    }
}

/// The versions that are asked for, in this order.
const VERSIONS: [Version; 3] = [Version::V2_0, Version::V1_0, Version::V0_3];

/// How far the protocol has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The channel is not open.
    Closed,
    /// Asking for a version.
    Negotiating,
    /// Serving the host.
    Ready,
    /// The host does not want to, and why.
    Refused(&'static str),
}

/// How the driver stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status {
    /// How far the protocol has come.
    pub phase: Phase,
    /// The version in use.
    pub version: Option<Version>,
    /// Whether the host wants status reports.
    pub reports: bool,
    /// Status reports sent.
    pub reports_sent: u64,
    /// Pages that the host has now.
    pub ballooned_pages: u64,
    /// Balloon requests that were not fulfilled in whole.
    pub partial_requests: u64,
    /// Requests, and ranges in requests, that were refused or ignored: hot add, pages that the host never got, broken messages.
    pub refusals: u64,
    /// The most memory that the host may ever give, in pages, if it said so.
    pub maximum_pages: Option<u64>,
}

/// The protocol.
#[derive(Debug)]
pub struct Protocol {
    phase: Phase,
    version: Option<Version>,
    attempt: usize,
    /// The transaction id of the request that the host has to answer.
    awaited: Option<u32>,
    next_transaction: u32,
    /// What is to be sent, in order.
    output: VecDeque<Output>,
    /// When the host is too late, or the next report is due.
    deadline: Option<u64>,
    held: RangeSet,
    status: Status,
}

/// A message to be made.
#[derive(Clone, Copy, Debug)]
enum Output {
    Version(Version),
    Capabilities,
    Report,
    /// Pages for the host: as many messages as it takes.
    Balloon {
        transaction_id: u32,
        wanted: u64,
        left: u64,
    },
    UnballoonDone {
        transaction_id: u32,
    },
    HotAddRefused {
        transaction_id: u32,
    },
    HotRemoveRefused {
        transaction_id: u32,
    },
}

impl Default for Protocol {
    fn default() -> Self {
        Self::new()
    }
}

impl Protocol {
    /// A protocol whose channel is not open.
    pub fn new() -> Self {
        Self {
            phase: Phase::Closed,
            version: None,
            attempt: 0,
            awaited: None,
            next_transaction: 1,
            output: VecDeque::with_capacity(MAX_REQUESTS + 2),
            deadline: None,
            held: RangeSet::new(),
            status: Status {
                phase: Phase::Closed,
                version: None,
                reports: false,
                reports_sent: 0,
                ballooned_pages: 0,
                partial_requests: 0,
                refusals: 0,
                maximum_pages: None,
            },
        }
    }

    /// The channel is open: begins. Pages that the host has from before stay with it.
    pub fn start(&mut self, now: u64) {
        self.stop();
        self.attempt = 0;
        self.ask_for_version(now);
    }

    /// The channel is closed.
    pub fn stop(&mut self) {
        self.phase = Phase::Closed;
        self.version = None;
        self.awaited = None;
        self.deadline = None;
        self.output.clear();
        self.status.reports = false;
    }

    /// How it stands.
    pub fn status(&self) -> Status {
        Status {
            phase: self.phase,
            version: self.version,
            ballooned_pages: self.held.pages(),
            ..self.status
        }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn deadline(&self) -> Option<u64> {
        self.deadline
    }

    /// Does what is due.
    pub fn tick(&mut self, now: u64) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        match self.phase {
            Phase::Negotiating if self.version.is_none() => {
                self.refuse("the host did not answer the version request");
            }
            Phase::Negotiating => self.refuse("the host did not answer the capabilities report"),
            Phase::Ready => {
                // One report at a time: a slow host gets the newest figures, not a heap of old ones.
                if !self
                    .output
                    .iter()
                    .any(|output| matches!(output, Output::Report))
                {
                    self.output.push_back(Output::Report);
                }
                self.deadline = Some(now.saturating_add(REPORT_INTERVAL));
            }
            Phase::Closed | Phase::Refused(_) => self.deadline = None,
        }
    }

    /// Handles a message from the host. Memory that the host gives back goes to `memory` at once.
    pub fn receive(&mut self, now: u64, bytes: &[u8], memory: &dyn GuestMemory) {
        let Some((header, body)) = message::parse(bytes) else {
            return self.ignore("a message with an impossible length");
        };
        let transaction_id = header.transaction_id.get();
        match (Kind(header.kind.get()), self.phase) {
            (Kind::VERSION_RESPONSE, Phase::Negotiating) => {
                self.version_response(now, transaction_id, body);
            }
            (Kind::CAPABILITIES_RESPONSE, Phase::Negotiating) => {
                self.capabilities_response(now, transaction_id, body);
            }
            (Kind::BALLOON_REQUEST, Phase::Ready) => match BalloonRequest::read_from_prefix(body) {
                Ok((request, _)) => {
                    let wanted = u64::from(request.pages.get());
                    self.answer(Output::Balloon {
                        transaction_id,
                        wanted,
                        left: wanted,
                    });
                }
                Err(_) => self.ignore("a short balloon request"),
            },
            (Kind::UNBALLOON_REQUEST, Phase::Ready) => {
                self.unballoon(transaction_id, body, memory);
            }
            (Kind::HOT_ADD_REQUEST, Phase::Ready) => {
                self.ignore("a hot-add request: memory cannot be added to this guest");
                self.answer(Output::HotAddRefused { transaction_id });
            }
            (Kind::HOT_REMOVE_REQUEST, Phase::Ready) => {
                self.ignore("a hot-remove request: no memory was hot-added");
                self.answer(Output::HotRemoveRefused { transaction_id });
            }
            (Kind::INFO, _) => self.info(body),
            (kind, _) => {
                self.status.refusals += 1;
                log::warn!("balloon: message type {} has no place now", kind.0);
            }
        }
    }

    /// Whether [`poll_message`](Self::poll_message) has something.
    pub fn has_message(&self) -> bool {
        !self.output.is_empty()
    }

    /// Makes the next message in `buffer`, of at least [`MAX_MESSAGE`] bytes. A balloon response takes its pages from `memory` now.
    pub fn poll_message<'a>(
        &mut self,
        now: u64,
        memory: &dyn GuestMemory,
        buffer: &'a mut [u8; MAX_MESSAGE],
    ) -> Option<&'a [u8]> {
        let output = self.output.pop_front()?;
        match output {
            Output::Version(version) => {
                let last = VERSIONS.last() == Some(&version);
                let body = VersionRequest {
                    version: U32::new(version.0),
                    last_attempt: U32::new(u32::from(last)),
                };
                let id = self.ask(now);
                message::write(buffer, Kind::VERSION_REQUEST, id, body.as_bytes(), &[])
            }
            Output::Capabilities => {
                let body = Capabilities {
                    capabilities: U64::new(CAPABILITIES),
                    minimum_pages: U64::ZERO,
                    maximum_page: U64::new(u64::MAX),
                };
                let id = self.ask(now);
                message::write(buffer, Kind::CAPABILITIES_REPORT, id, body.as_bytes(), &[])
            }
            Output::Report => {
                let figures = memory.figures();
                let committed = figures
                    .committed
                    .saturating_add(self.held.pages())
                    .saturating_add(floor(figures.total));
                let body = StatusReport {
                    available: U64::new(figures.free),
                    committed: U64::new(committed),
                    ..StatusReport::default()
                };
                self.status.reports_sent += 1;
                let id = self.transaction();
                message::write(buffer, Kind::STATUS_REPORT, id, body.as_bytes(), &[])
            }
            Output::Balloon {
                transaction_id,
                wanted,
                left,
            } => self.balloon(transaction_id, wanted, left, memory, buffer),
            Output::UnballoonDone { transaction_id } => {
                message::write(buffer, Kind::UNBALLOON_RESPONSE, transaction_id, &[], &[])
            }
            Output::HotAddRefused { transaction_id } => {
                let body = HotAddResponse {
                    pages: U32::ZERO,
                    // For good: a host that is told to try later would go on trying.
                    result: U32::new(1),
                };
                let kind = Kind::HOT_ADD_RESPONSE;
                message::write(buffer, kind, transaction_id, body.as_bytes(), &[])
            }
            Output::HotRemoveRefused { transaction_id } => {
                let body = HotRemoveResponse::default();
                let kind = Kind::HOT_REMOVE_RESPONSE;
                message::write(buffer, kind, transaction_id, body.as_bytes(), &[])
            }
        }
    }

    /// A message could not be sent: pages in it have not reached the host, and go back.
    pub fn not_sent(&mut self, bytes: &[u8], memory: &dyn GuestMemory) {
        let Some((header, body)) = message::parse(bytes) else {
            return;
        };
        if Kind(header.kind.get()) != Kind::BALLOON_RESPONSE {
            return;
        }
        if let Ok((_, words)) = BalloonResponse::read_from_prefix(body) {
            for word in words.as_chunks::<8>().0 {
                self.take_back(message::decode_range(u64::from_le_bytes(*word)), memory);
            }
        }
    }

    fn transaction(&mut self) -> u32 {
        let id = self.next_transaction;
        self.next_transaction = id.wrapping_add(1);
        id
    }

    /// A transaction id for a message that the host has to answer in time.
    fn ask(&mut self, now: u64) -> u32 {
        let id = self.transaction();
        self.awaited = Some(id);
        self.deadline = Some(now.saturating_add(RESPONSE_TIMEOUT));
        id
    }

    /// Whether this is the answer that is waited for. Hosts repeat the id of the question.
    fn is_awaited(&mut self, transaction_id: u32) -> bool {
        let awaited = self.awaited == Some(transaction_id);
        if awaited {
            self.awaited = None;
        }
        awaited
    }

    fn ask_for_version(&mut self, now: u64) {
        match VERSIONS.get(self.attempt) {
            Some(&version) => {
                self.phase = Phase::Negotiating;
                self.deadline = Some(now.saturating_add(RESPONSE_TIMEOUT));
                self.output.push_back(Output::Version(version));
            }
            None => self.refuse("the host has none of the versions 2.0, 1.0 and 0.3"),
        }
    }

    fn version_response(&mut self, now: u64, transaction_id: u32, body: &[u8]) {
        let Ok((response, _)) = Response::read_from_prefix(body) else {
            return self.ignore("a short version response");
        };
        if self.version.is_some() || !self.is_awaited(transaction_id) {
            return self.ignore("a version response that nobody waits for");
        }
        if response.flags.get() & ACCEPTED == 0 {
            self.attempt += 1;
            return self.ask_for_version(now);
        }
        self.version = VERSIONS.get(self.attempt).copied();
        self.deadline = Some(now.saturating_add(RESPONSE_TIMEOUT));
        self.output.push_back(Output::Capabilities);
    }

    fn capabilities_response(&mut self, now: u64, transaction_id: u32, body: &[u8]) {
        let Ok((response, _)) = Response::read_from_prefix(body) else {
            return self.ignore("a short capabilities response");
        };
        if self.version.is_none() || !self.is_awaited(transaction_id) {
            return self.ignore("a capabilities response that nobody waits for");
        }
        let flags = response.flags.get();
        if flags & ACCEPTED == 0 {
            return self.refuse("the host does not accept the capabilities");
        }
        self.phase = Phase::Ready;
        // The bit means that from 2.0 on only.
        let suppressed = flags & SUPPRESS_REPORTS != 0 && self.version == Some(Version::V2_0);
        self.status.reports = !suppressed;
        // Hosts take reports as soon as they have answered, so the first goes out now.
        self.deadline = (!suppressed).then_some(now);
        self.tick(now);
    }

    fn refuse(&mut self, reason: &'static str) {
        log::warn!("balloon: {reason}");
        self.phase = Phase::Refused(reason);
        self.deadline = None;
        self.awaited = None;
        self.output.clear();
    }

    fn ignore(&mut self, what: &str) {
        self.status.refusals += 1;
        log::warn!("balloon: refused {what}");
    }

    /// Lines up an answer, unless the host asks for too much at one time.
    fn answer(&mut self, output: Output) {
        if self.output.len() < MAX_REQUESTS {
            self.output.push_back(output);
        } else {
            self.ignore("a request while many others wait");
        }
    }

    /// Fills one balloon response.
    fn balloon<'a>(
        &mut self,
        transaction_id: u32,
        wanted: u64,
        mut left: u64,
        memory: &dyn GuestMemory,
        buffer: &'a mut [u8; MAX_MESSAGE],
    ) -> Option<&'a [u8]> {
        let mut words = [U64::ZERO; MAX_RANGES];
        let mut count = 0;
        let mut exhausted = false;
        while left > 0 && count < MAX_RANGES {
            let Some(range) = self.take(left, memory) else {
                exhausted = true;
                break;
            };
            left -= range.count;
            // Blocks that follow each other go as one range.
            let last = count.checked_sub(1).and_then(|last| words.get_mut(last));
            match last {
                Some(word) if follows(word.get(), range) => {
                    let mut joined = message::decode_range(word.get());
                    joined.count += range.count;
                    *word = U64::new(message::encode_range(joined));
                }
                _ => {
                    if let Some(word) = words.get_mut(count) {
                        *word = U64::new(message::encode_range(range));
                        count += 1;
                    }
                }
            }
        }
        let more = left > 0 && !exhausted;
        if more {
            self.output.push_front(Output::Balloon {
                transaction_id,
                wanted,
                left,
            });
        } else if left > 0 {
            self.status.partial_requests += 1;
            log::warn!(
                "balloon: the host asked for {wanted} pages and gets {}: the guest needs the rest to live",
                wanted - left
            );
        }
        let body = BalloonResponse {
            reserved: U32::ZERO,
            // At most 510 ranges.
            ranges: U32::new((count as u32) << 1 | u32::from(more)),
        };
        let ranges = words.get(..count)?;
        let kind = Kind::BALLOON_RESPONSE;
        message::write(buffer, kind, transaction_id, body.as_bytes(), ranges)
    }

    /// Takes up to `left` pages in one piece: 2 MiB blocks as long as there are any, then single pages.
    fn take(&mut self, left: u64, memory: &dyn GuestMemory) -> Option<PageRange> {
        let allowed = spare(&memory.figures());
        let wanted = left.min(allowed).min(MAX_RANGE_PAGES);
        if wanted == 0 {
            return None;
        }
        let range = Some(wanted)
            .filter(|&wanted| wanted >= BLOCK)
            .and_then(|wanted| memory.take(wanted - wanted % BLOCK, BLOCK))
            .or_else(|| memory.take(wanted, 1))?;
        debug_assert!(range.count > 0 && range.count <= wanted);
        if let Err(error) = self.held.insert(range) {
            log::warn!("balloon: cannot give {range}: {error}");
            memory.give_back(range);
            return None;
        }
        Some(range)
    }

    fn unballoon(&mut self, transaction_id: u32, body: &[u8], memory: &dyn GuestMemory) {
        let Ok((request, words)) = UnballoonRequest::read_from_prefix(body) else {
            return self.ignore("a short unballoon request");
        };
        let words = words.as_chunks::<8>().0;
        let Some(words) = words.get(..request.ranges.get() as usize) else {
            return self.ignore("an unballoon request with more ranges than it holds");
        };
        for word in words {
            self.take_back(message::decode_range(u64::from_le_bytes(*word)), memory);
        }
        if request.more.get() & 1 == 0 {
            self.answer(Output::UnballoonDone { transaction_id });
        }
    }

    fn take_back(&mut self, range: PageRange, memory: &dyn GuestMemory) {
        match self.held.remove(range) {
            Ok(()) => memory.give_back(range),
            Err(error) => {
                self.status.refusals += 1;
                log::warn!("balloon: the host returns {range}: {error}");
            }
        }
    }

    fn info(&mut self, body: &[u8]) {
        /// Information of type 0: the most pages that the guest may ever have.
        const MAXIMUM_PAGES: u32 = 0;

        let words = body.as_chunks::<4>().0;
        let word = |at: usize| words.get(at).map(|bytes| u32::from_le_bytes(*bytes));
        // Reserved, size, then type, size and data of the information itself.
        if let (Some(MAXIMUM_PAGES), Some(8..), Some(low), Some(high)) =
            (word(2), word(3), word(4), word(5))
        {
            self.status.maximum_pages = Some(u64::from(high) << 32 | u64::from(low));
        }
    }
}

/// Whether `range` can be added to the range in `word`.
fn follows(word: u64, range: PageRange) -> bool {
    let before = message::decode_range(word);
    before.end() == Some(range.first) && before.count + range.count <= MAX_RANGE_PAGES
}

/// Pages that may still be given: all free ones but those that the guest needs to live.
///
/// Linux keeps the [`floor`] too, because it cannot know what a general-purpose system needs
/// next. A guest that is one program knows what it uses.
fn spare(figures: &Figures) -> u64 {
    figures.free.saturating_sub(figures.reserve)
}

/// The pages that a status report adds to the committed ones, so that the host's own choice leaves a guest of
/// `total` pages some room (spec balloon.md, 5). A host that asks for more all the same gets more.
pub fn floor(total: u64) -> u64 {
    const MIB: u64 = 256;
    let mib = total / MIB;
    let kept = match mib {
        0..128 => 8 + mib / 2,
        128..512 => 40 + mib / 4,
        512..2048 => 104 + mib / 8,
        2048..8192 => 232 + mib / 16,
        _ => 488 + mib / 32,
    };
    // A guest smaller than the smallest floor keeps all it has.
    (kept * MIB).min(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;
    use proptest::prelude::*;
    use spin::Mutex;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    /// Pages `0..TOTAL`, all free at first.
    struct Ram(Mutex<RefCell<BTreeSet<u64>>>);

    const TOTAL: u64 = 8192;

    impl GuestMemory for Ram {
        fn figures(&self) -> Figures {
            Figures {
                total: TOTAL,
                free: self.0.lock().borrow().len() as u64,
                committed: 0,
                reserve: 16,
            }
        }

        fn take(&self, wanted: u64, block: u64) -> Option<PageRange> {
            let ram = self.0.lock();
            let mut free = ram.borrow_mut();
            let whole = |page: &u64| {
                page.is_multiple_of(block)
                    && free.range(*page..page + block).count() as u64 == block
            };
            let first = free.iter().copied().find(whole)?;
            let count = block.min(wanted);
            for page in first..first + count {
                free.remove(&page);
            }
            Some(PageRange { first, count })
        }

        fn give_back(&self, range: PageRange) {
            let ram = self.0.lock();
            for page in range.first..range.first + range.count {
                assert!(ram.borrow_mut().insert(page), "page {page} was not taken");
            }
        }
    }

    fn message() -> impl Strategy<Value = Vec<u8>> {
        let range = (0..TOTAL, 0u64..600).prop_map(|(first, count)| first | count << 40);
        let word = prop_oneof![any::<u64>(), 0u64..9000, range];
        let honest = (1u16..15, 0u32..6, proptest::collection::vec(word, 0..8)).prop_map(
            |(kind, id, words)| {
                let mut bytes = kind.to_le_bytes().to_vec();
                bytes.extend_from_slice(&(8 + 8 * words.len() as u16).to_le_bytes());
                bytes.extend_from_slice(&id.to_le_bytes());
                words
                    .iter()
                    .for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
                bytes
            },
        );
        prop_oneof![
            8 => honest,
            1 => proptest::collection::vec(any::<u8>(), 0..64),
        ]
    }

    proptest! {
        /// Whatever the host says: no page is lost or given twice, the reserve holds, and every message is
        /// well-formed.
        #[test]
        fn any_messages_at_all(
            ready in any::<bool>(),
            messages in proptest::collection::vec((message(), 0usize..3), 0..60),
        ) {
            let memory = Ram(Mutex::new(RefCell::new((0..TOTAL).collect())));
            let mut protocol = Protocol::new();
            let mut buffer = [0; MAX_MESSAGE];
            let mut now = 0;
            protocol.start(now);
            if ready {
                protocol.phase = Phase::Ready;
                protocol.output.clear();
            }
            for (bytes, polls) in messages {
                protocol.receive(now, &bytes, &memory);
                for _ in 0..polls {
                    if let Some(message) = protocol.poll_message(now, &memory, &mut buffer) {
                        let (header, _) = message::parse(message).unwrap();
                        prop_assert_eq!(usize::from(header.size.get()), message.len());
                    }
                }
                now += SECOND / 4;
                protocol.tick(now);
                let held = protocol.status().ballooned_pages;
                prop_assert_eq!(held + memory.figures().free, TOTAL);
                prop_assert!(memory.figures().free >= memory.figures().reserve);
                prop_assert!(protocol.output.len() <= MAX_REQUESTS + 2);
            }
        }
    }

    #[test]
    fn pages_in_a_message_that_was_not_sent_go_back() {
        let memory = Ram(Mutex::new(RefCell::new((0..TOTAL).collect())));
        let mut protocol = Protocol::new();
        protocol.phase = Phase::Ready;
        let mut buffer = [0; MAX_MESSAGE];
        protocol.answer(Output::Balloon {
            transaction_id: 1,
            wanted: 700,
            left: 700,
        });
        let message = protocol.poll_message(0, &memory, &mut buffer).unwrap();
        assert_eq!(memory.figures().free, TOTAL - 700);
        protocol.not_sent(message, &memory);
        assert_eq!(memory.figures().free, TOTAL);
        assert_eq!(protocol.status().ballooned_pages, 0);
    }
}
