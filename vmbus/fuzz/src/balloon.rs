//! The guest's dynamic memory protocol, its host sending anything.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};
use vmbus::drivers::balloon::message::{self, MAX_MESSAGE};
use vmbus::drivers::balloon::protocol::Protocol;
use vmbus::drivers::balloon::{Figures, GuestMemory, PageRange};

use crate::steps;

/// Something that the host, the channel or the clock does.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// The channel opens or closes.
    Open(bool),
    /// A message from the host.
    Receive(&'a [u8]),
    /// The host asks for so many pages.
    Balloon(u32),
    /// The host gives back whole the range of its last message with this number.
    Unballoon(u8),
    /// The guest's next message goes out, or cannot.
    Send(bool),
    /// The host agrees to what the guest asked last.
    Agree,
    /// Time goes by, in units of 100 ns.
    Tick(u32),
}

/// Pages of the guest.
const PAGES: u64 = 2048;
/// The first of them.
const FIRST: u64 = 0x1_0000;

/// Memory that knows which pages are away.
struct Memory(Mutex<Vec<bool>>);

impl Memory {
    fn new() -> Self {
        Self(Mutex::new(vec![false; PAGES as usize]))
    }

    fn away(&self) -> u64 {
        let pages = self.0.lock().expect("nobody panics under the lock");
        pages.iter().filter(|&&away| away).count() as u64
    }
}

impl GuestMemory for Memory {
    fn figures(&self) -> Figures {
        let away = self.away();
        Figures {
            total: PAGES,
            free: PAGES - away,
            committed: PAGES / 8,
            reserve: PAGES / 8,
        }
    }

    fn take(&self, wanted: u64, block: u64) -> Option<PageRange> {
        let mut pages = self.0.lock().expect("nobody panics under the lock");
        let block = usize::try_from(block).expect("1 or 512");
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        let first = (0..pages.len())
            .step_by(block)
            .find(|&at| pages[at..at + block].iter().all(|away| !away))
            .filter(|_| wanted >= block)?;
        pages[first..first + block].fill(true);
        Some(PageRange {
            first: FIRST + first as u64,
            count: block as u64,
        })
    }

    fn give_back(&self, range: PageRange) {
        let mut pages = self.0.lock().expect("nobody panics under the lock");
        for page in range.first..range.first + range.count {
            let away = page
                .checked_sub(FIRST)
                .and_then(|at| pages.get_mut(usize::try_from(at).ok()?))
                .expect("the page is the guest's");
            assert!(*away, "page {page:#x} comes back twice");
            *away = false;
        }
    }
}

/// Dynamic memory with a host that sends anything: the guest gives away and takes back only what it may, page by page.
pub fn balloon(data: &[u8]) {
    let memory = Memory::new();
    let mut protocol = Protocol::new();
    let mut buffer = Box::new([0; MAX_MESSAGE]);
    let mut now = 1;
    // What the guest asked last, and the ranges that the host got, as they stood in the messages.
    let (mut asked, mut given) = (0, Vec::new());
    for step in steps(data) {
        match step {
            Step::Open(true) => protocol.start(now),
            Step::Open(false) => protocol.stop(),
            Step::Receive(message) => protocol.receive(now, message, &memory),
            Step::Balloon(pages) => {
                let body = u64::from(pages).to_le_bytes();
                protocol.receive(now, &message(6, 77, &body), &memory);
            }
            Step::Unballoon(which) => {
                if !given.is_empty() {
                    let range: [u8; 8] = given.swap_remove(usize::from(which) % given.len());
                    let body = [[0, 0, 0, 0, 1, 0, 0, 0], range].concat();
                    protocol.receive(now, &message(8, 78, &body), &memory);
                }
            }
            Step::Agree => {
                for kind in [2, 4] {
                    protocol.receive(now, &message(kind, asked, &1u64.to_le_bytes()), &memory);
                }
            }
            Step::Send(goes_out) => {
                if let Some(sent) = protocol.poll_message(now, &memory, &mut buffer) {
                    let (header, body) = message::parse(sent).expect("a message is whole");
                    assert_eq!(usize::from(header.size.get()), sent.len());
                    if !goes_out {
                        protocol.not_sent(sent, &memory);
                    } else if header.kind.get() == 7 {
                        let ranges = body.get(8..).expect("a response has a count");
                        given.extend_from_slice(ranges.as_chunks().0);
                    } else if [1, 3].contains(&header.kind.get()) {
                        asked = header.transaction_id.get();
                    }
                }
            }
            Step::Tick(by) => {
                now += u64::from(by);
                protocol.tick(now);
                assert!(protocol.deadline().is_none_or(|at| at > now));
            }
        }
        assert_eq!(
            protocol.status().ballooned_pages,
            memory.away(),
            "the host has what is away"
        );
    }
}

/// A message of the host.
pub(crate) fn message(kind: u16, transaction_id: u32, body: &[u8]) -> Vec<u8> {
    let size = 8 + body.len() as u16;
    let mut message = kind.to_le_bytes().to_vec();
    message.extend_from_slice(&size.to_le_bytes());
    message.extend_from_slice(&transaction_id.to_le_bytes());
    message.extend_from_slice(body);
    message
}
