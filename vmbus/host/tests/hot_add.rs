//! Hot add and the owner's view of pages (spec balloon.md 6 to 8): the provider against messages of a guest that takes memory.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmbus_host::dynamic_memory::{
    DynamicMemory, HotAddError, MemoryEvent, POST_INIT_WAIT, Run, State,
};
use vmbus_host::message_faults::MessageFault;

/// Pages in a MiB.
const MIB: u64 = 256;

/// What a guest takes as a unit: 128 MiB, as Linux does.
const UNIT: u64 = 128 * MIB;

const RAM: u64 = 512 * MIB;

/// Capabilities: balloon, hot add, units of 2^7 MiB.
const LINUX: u64 = 1 | 1 << 1 | 7 << 2;

/// Where memory is added: from 4 GiB on.
const FIRST: u64 = 1 << 20;

struct Setup {
    memory: DynamicMemory,
    events: Arc<Mutex<Vec<MemoryEvent>>>,
    now: u64,
}

fn message(kind: u16, id: u32, body: &[u8]) -> Vec<u8> {
    let mut message = kind.to_le_bytes().to_vec();
    message.extend((8 + body.len() as u16).to_le_bytes());
    message.extend(id.to_le_bytes());
    message.extend(body);
    message
}

impl Setup {
    fn new(capabilities: u64) -> Self {
        let mut memory = DynamicMemory::new(RAM);
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = events.clone();
        memory.observe(move |event| seen.lock().unwrap().push(event));
        memory.opened();
        let mut setup = Self {
            memory,
            events,
            now: 1,
        };
        setup.guest(1, 1, &[0, 0, 2, 0, 0, 0, 0, 0]);
        let mut body = capabilities.to_le_bytes().to_vec();
        body.extend([0; 16]);
        setup.guest(3, 2, &body);
        while setup.memory.poll_message().is_some() {}
        setup.pass(POST_INIT_WAIT);
        assert_eq!(setup.memory.state(), State::Idle);
        setup
    }

    fn pass(&mut self, time: u64) {
        self.now += time;
        self.memory.tick(self.now);
    }

    /// The guest says something.
    fn guest(&mut self, kind: u16, id: u32, body: &[u8]) {
        self.memory.receive(self.now, &message(kind, id, body));
    }

    /// The next message of the host: type, id, body.
    fn host(&mut self) -> Option<(u16, u32, Vec<u8>)> {
        let message = self.memory.poll_message()?;
        let word = |at: usize| u32::from_le_bytes(*message[at..].first_chunk().unwrap());
        Some((word(0) as u16, word(4), message[8..].to_vec()))
    }

    /// The host offers memory: the id, and range and region.
    fn offered(&mut self) -> (u32, Run, Run) {
        let (kind, id, body) = self.host().expect("a hot-add request");
        assert_eq!((kind, body.len()), (10, 16));
        let run = |at: usize| {
            let word = u64::from_le_bytes(*body[at..].first_chunk().unwrap());
            (word & ((1 << 40) - 1), word >> 40)
        };
        (id, run(0), run(8))
    }

    /// The guest answers a hot-add request.
    fn added(&mut self, id: u32, pages: u64, result: u32) {
        let mut body = (pages as u32).to_le_bytes().to_vec();
        body.extend(result.to_le_bytes());
        self.guest(11, id, &body);
    }

    fn take_events(&self) -> Vec<MemoryEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// The guest gives pages that were asked for.
    fn give(&mut self, runs: &[Run]) {
        let (kind, id, _) = self.host().expect("a balloon request");
        assert_eq!(kind, 6);
        let mut body = vec![0; 4];
        body.extend((runs.len() as u32 * 2).to_le_bytes());
        for (first, count) in runs {
            body.extend((first | (count << 40)).to_le_bytes());
        }
        self.guest(7, id, &body);
    }

    /// Gives the answers that were made to who waits for them.
    fn outcomes(&mut self) {
        self.memory.outcomes().deliver();
    }
}

#[test]
fn memory_is_offered_with_range_and_region_alike_and_counts_when_the_guest_has_taken_it() {
    let mut setup = Setup::new(LINUX);
    let reply = setup.memory.hot_add((FIRST, 2 * UNIT));
    let (id, range, region) = setup.offered();
    assert_eq!((range, region), ((FIRST, 2 * UNIT), (FIRST, 2 * UNIT)));
    assert_eq!(setup.memory.state(), State::HotAdd);
    assert!(!reply.is_done());
    assert_eq!(setup.memory.actual(), RAM);
    setup.added(id, 2 * UNIT, 1);
    setup.outcomes();
    assert_eq!(reply.take(), Some(Ok(2 * UNIT)));
    assert_eq!(setup.memory.actual(), RAM + 2 * UNIT);
    assert_eq!(setup.memory.target(), RAM + 2 * UNIT);
    assert_eq!(setup.take_events(), [MemoryEvent::Added((FIRST, 2 * UNIT))]);
    assert_eq!(setup.memory.complaints(), [] as [&str; 0]);
}

#[test]
fn much_memory_is_offered_in_pieces_of_2_gib() {
    let mut setup = Setup::new(LINUX);
    let piece = 2048 * MIB;
    let reply = setup.memory.hot_add((FIRST, 2 * piece + UNIT));
    let mut first = FIRST;
    for count in [piece, piece, UNIT] {
        let (id, range, _) = setup.offered();
        assert_eq!(range, (first, count));
        setup.added(id, count, 1);
        first += count;
    }
    setup.outcomes();
    assert_eq!(reply.take(), Some(Ok(2 * piece + UNIT)));
    assert_eq!(setup.memory.actual(), RAM + 2 * piece + UNIT);
    assert!(setup.host().is_none());
}

#[test]
fn a_guest_that_takes_less_has_reached_its_limit() {
    let mut setup = Setup::new(LINUX);
    let reply = setup.memory.hot_add((FIRST, 3 * UNIT));
    let (id, ..) = setup.offered();
    setup.added(id, UNIT, 1);
    setup.outcomes();
    assert_eq!(reply.take(), Some(Ok(UNIT)));
    assert_eq!(setup.memory.actual(), RAM + UNIT);
    assert!(setup.host().is_none());
}

#[test]
fn a_guest_that_takes_nothing_refuses() {
    for (pages, result) in [(0, 0), (0, 1), (UNIT, 0)] {
        let mut setup = Setup::new(LINUX);
        let reply = setup.memory.hot_add((FIRST, UNIT));
        let (id, ..) = setup.offered();
        setup.added(id, pages, result);
        setup.outcomes();
        assert_eq!(reply.take(), Some(Err(HotAddError::Refused)));
        assert_eq!(setup.memory.actual(), RAM);
        // What was refused can be offered again.
        let _reply = setup.memory.hot_add((FIRST, UNIT));
        assert_eq!(setup.offered().1, (FIRST, UNIT));
    }
}

#[test]
fn a_guest_that_takes_more_than_was_offered_is_complained_about() {
    let mut setup = Setup::new(LINUX);
    let _reply = setup.memory.hot_add((FIRST, UNIT));
    let (id, ..) = setup.offered();
    setup.added(id, 2 * UNIT, 1);
    assert_eq!(setup.memory.actual(), RAM);
    assert_eq!(
        setup.memory.complaints(),
        ["more pages added than were offered"]
    );
}

#[test]
fn what_cannot_be_added_is_refused_before_it_is_offered() {
    let mut setup = Setup::new(LINUX);
    for (run, error) in [
        ((FIRST, UNIT / 2), HotAddError::Unaligned(UNIT)),
        ((FIRST + 1, UNIT), HotAddError::Unaligned(UNIT)),
        ((FIRST, 0), HotAddError::Unaligned(UNIT)),
        ((0, UNIT), HotAddError::Overlap),
        ((u64::MAX / UNIT * UNIT, UNIT), HotAddError::Overlap),
    ] {
        assert_eq!(
            setup.memory.hot_add(run).take(),
            Some(Err(error)),
            "{run:?}"
        );
    }
    let _first = setup.memory.hot_add((FIRST, UNIT));
    let again = setup.memory.hot_add((FIRST, UNIT));
    assert_eq!(again.take(), Some(Err(HotAddError::Overlap)));
    assert_eq!(
        HotAddError::Unaligned(UNIT).to_string(),
        "the guest adds memory in multiples of 128 MiB only"
    );
    let mut old = Setup::new(1);
    assert_eq!(
        old.memory.hot_add((FIRST, UNIT)).take(),
        Some(Err(HotAddError::NotSupported))
    );
    let mut closed = DynamicMemory::new(RAM);
    assert_eq!(
        closed.hot_add((FIRST, UNIT)).take(),
        Some(Err(HotAddError::NotReady))
    );
}

#[test]
fn memory_is_added_after_what_the_guest_has_given_is_back() {
    let mut setup = Setup::new(LINUX);
    setup.memory.set_target(RAM - 512);
    setup.give(&[(1024, 512)]);
    setup.memory.set_target(RAM);
    let (kind, id, _) = setup.host().unwrap();
    assert_eq!(kind, 8);
    let _reply = setup.memory.hot_add((FIRST, UNIT));
    assert!(setup.host().is_none(), "one transaction at a time");
    setup.guest(9, id, &[]);
    assert_eq!(setup.offered().1, (FIRST, UNIT));
}

#[test]
fn added_memory_can_be_ballooned() {
    let mut setup = Setup::new(LINUX);
    let _reply = setup.memory.hot_add((FIRST, UNIT));
    let (id, ..) = setup.offered();
    setup.added(id, UNIT, 1);
    setup.memory.set_target(RAM);
    setup.give(&[(FIRST, UNIT)]);
    assert_eq!(setup.memory.actual(), RAM);
    assert_eq!(setup.memory.removed(), [(FIRST, UNIT)]);
    assert_eq!(setup.memory.complaints(), [] as [&str; 0]);
}

#[test]
fn the_owner_learns_whose_pages_are_whose() {
    let mut setup = Setup::new(LINUX);
    setup.memory.set_target(RAM - 1024);
    setup.give(&[(5000, 512), (9000, 512)]);
    assert_eq!(
        setup.take_events(),
        [
            MemoryEvent::Taken((5000, 512)),
            MemoryEvent::Taken((9000, 512))
        ]
    );
    setup.memory.set_target(RAM - 600);
    assert_eq!(
        setup.take_events(),
        [MemoryEvent::GivenBack((9000, 424))],
        "before the guest is told"
    );
    setup.memory.closed();
    assert_eq!(setup.take_events(), [MemoryEvent::Forgotten]);
    assert_eq!(setup.memory.actual(), RAM);
}

#[test]
fn memory_with_a_hole_in_it_is_known_by_its_runs() {
    let mut memory = DynamicMemory::with_memory(&[(0, RAM), (FIRST, UNIT)]);
    assert_eq!(memory.actual(), RAM + UNIT);
    assert_eq!(
        memory.hot_add((FIRST, UNIT)).take(),
        Some(Err(HotAddError::NotReady))
    );
}

#[test]
fn added_memory_stays_when_the_channel_closes_and_goes_when_the_guest_starts_anew() {
    let mut setup = Setup::new(LINUX);
    let _reply = setup.memory.hot_add((FIRST, UNIT));
    let (id, ..) = setup.offered();
    setup.added(id, UNIT, 1);
    let waiting = setup.memory.hot_add((FIRST + UNIT, UNIT));
    setup.memory.closed();
    setup.outcomes();
    assert_eq!(waiting.take(), Some(Err(HotAddError::Closed)));
    assert_eq!(setup.memory.actual(), RAM + UNIT);
    setup.memory.restart();
    assert_eq!((setup.memory.actual(), setup.memory.target()), (RAM, RAM));
}

#[test]
fn a_request_that_is_lost_is_given_up_after_a_while_and_made_again() {
    let mut setup = Setup::new(LINUX);
    setup.memory.inject(MessageFault::Lost, 1);
    setup.memory.set_target(RAM - 512);
    assert!(setup.host().is_none());
    setup.pass(0);
    assert_eq!(setup.memory.deadline(), Some(setup.now + 50_000_000));
    setup.pass(50_000_000);
    setup.give(&[(1024, 512)]);
    assert_eq!(setup.memory.actual(), RAM - 512);
    // What was about to be given back is not lost with the message.
    setup.memory.inject(MessageFault::WrongType, 1);
    setup.memory.set_target(RAM);
    assert_eq!(setup.host().unwrap().0, !8);
    assert_eq!(setup.memory.removed_pages(), 0);
    setup.pass(0);
    setup.pass(50_000_000);
    let (kind, id, _) = setup.host().unwrap();
    assert_eq!(kind, 8);
    setup.guest(9, id, &[]);
    assert_eq!(setup.memory.actual(), RAM);
    assert_eq!(setup.memory.complaints(), [] as [&str; 0]);
}

#[test]
fn a_million_runs_of_one_page_are_taken_without_a_search() {
    let mut memory = Setup::new(LINUX);
    memory.memory.set_target(0);
    let runs: Vec<Run> = (0..RAM).step_by(2).map(|page| (page, 1)).collect();
    for (at, piece) in runs.chunks(400).enumerate() {
        let last = (at + 1) * 400 >= runs.len();
        let mut body = vec![0; 4];
        body.extend(((piece.len() as u32 * 2) | u32::from(!last)).to_le_bytes());
        for (first, count) in piece {
            body.extend((first | count << 40).to_le_bytes());
        }
        memory.guest(7, 0, &body);
    }
    assert_eq!(memory.memory.removed_pages(), RAM / 2);
    assert_eq!(memory.memory.complaints(), [] as [&str; 0]);
}

#[derive(Clone, Debug)]
enum Step {
    Guest(u16, u32, Vec<u8>),
    Garbage(Vec<u8>),
    Target(u64),
    Add(u64),
    Pass(u64),
    Open(bool),
}

proptest! {
    #[test]
    fn whatever_a_guest_says_the_figures_stay_sane(
        capabilities: u64,
        steps in proptest::collection::vec(
            prop_oneof![
                6 => (0u16..15, 0u32..6, proptest::collection::vec(any::<u8>(), 0..64))
                    .prop_map(|(kind, id, body)| Step::Guest(kind, id, body)),
                1 => any::<Vec<u8>>().prop_map(Step::Garbage),
                3 => (0..2 * RAM).prop_map(Step::Target),
                2 => (0u64..8).prop_map(Step::Add),
                3 => (0..2 * POST_INIT_WAIT).prop_map(Step::Pass),
                1 => any::<bool>().prop_map(Step::Open),
            ],
            0..60,
        ),
    ) {
        let mut setup = Setup::new(capabilities);
        for step in steps {
            match step {
                Step::Guest(kind, id, body) => setup.guest(kind, id, &body),
                Step::Garbage(bytes) => setup.memory.receive(setup.now, &bytes),
                Step::Target(pages) => setup.memory.set_target(pages),
                Step::Add(at) => drop(setup.memory.hot_add((FIRST + at * UNIT, UNIT))),
                Step::Pass(time) => setup.pass(time),
                Step::Open(true) => setup.memory.opened(),
                Step::Open(false) => setup.memory.closed(),
            }
            while setup.memory.poll_message().is_some() {}
            let whole = setup.memory.actual() + setup.memory.removed_pages();
            prop_assert!((RAM..=RAM + 8 * UNIT).contains(&whole));
        }
    }
}
