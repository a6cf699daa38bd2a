//! One ring whose other end keeps to no rule.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus::ring::{
    Kind, Outgoing, PacketBuffer, PushError, Reader, Ring, Room, ScatterList, TransferPageList,
    TransferPageRange, Writer,
};
use vmbus::shared::SharedPages;

use crate::steps;

/// Pages of the memory: a guard, the control page, two data pages, a guard.
const PAGES: usize = 5;
/// What the guards are filled with.
const GUARD: u8 = 0xA5;

/// The words of a control page that the other end may write.
const FIELDS: [usize; 5] = [0, 4, 8, 12, 64];

/// Something that happens to a ring.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// An honest packet.
    Packet(Packet<'a>),
    /// Packets pushed become visible.
    Publish,
    /// Takes a packet out.
    Read,
    /// Looks at the next packet.
    Peek,
    /// The consumer gives back what it has read.
    Release,
    /// The consumer's mask.
    Mask(bool),
    /// The producer waits for room.
    WaitFor(u32),
    /// It waits no more.
    StopWaiting,
    /// Any bytes anywhere in the ring, its control page included.
    Bytes(u16, &'a [u8]),
    /// A number in a field of the control page.
    Control(u8, u32),
}

/// A packet that keeps to the rules.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Packet<'a> {
    pub(crate) payload: &'a [u8],
    /// Zeros behind the payload, to fill the ring fast.
    pub(crate) more: u16,
    pub(crate) transaction: Option<u64>,
    pub(crate) ranges: Ranges,
}

/// What stands in front of a packet's data.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Ranges {
    None,
    Completion,
    /// The pieces of transfer page set 7: length and offset.
    TransferPages(Vec<(u32, u32)>),
    /// Guest pages: offset, length.
    GpaDirect(Vec<(u16, u16)>),
}

impl Packet<'_> {
    /// An in-band packet without a wish.
    pub(crate) const fn data(payload: &[u8]) -> Packet<'_> {
        Packet {
            payload,
            more: 0,
            transaction: None,
            ranges: Ranges::None,
        }
    }

    /// Has the packet pushed; `None` when it is none that an honest end can make.
    pub(crate) fn push<R>(&self, push: impl FnOnce(&Outgoing<'_>) -> R) -> Option<R> {
        let zeros = [0; 4096];
        let parts = [self.payload, &zeros[..usize::from(self.more).min(4096)]];
        let mut list = ScatterList::default();
        let pieces;
        let packet = match &self.ranges {
            Ranges::None => Outgoing::in_band(parts),
            Ranges::Completion => {
                return Some(push(&Outgoing::completion(
                    self.transaction.unwrap_or(0),
                    self.payload,
                )));
            }
            Ranges::TransferPages(ranges) => {
                let ranges: Vec<_> = ranges
                    .iter()
                    .map(|&(length, offset)| TransferPageRange { length, offset })
                    .collect();
                pieces = TransferPageList::new(7, &ranges);
                Outgoing::transfer_pages(&pieces, parts)
            }
            Ranges::GpaDirect(ranges) => {
                for &(offset, length) in ranges {
                    let pages = (usize::from(offset) + usize::from(length)).div_ceil(PAGE_SIZE);
                    let pages: Vec<_> = (0..pages as u64).map(PageNumber).collect();
                    list.push(u32::from(offset), u32::from(length), pages.into_iter())
                        .ok()?;
                }
                if list.is_empty() {
                    return None;
                }
                Outgoing::gpa_direct(&list, parts)
            }
        };
        Some(push(&match self.transaction {
            Some(id) => packet.with_completion(id),
            None => packet,
        }))
    }

    /// The data as the other end gets it.
    fn padded(&self) -> Vec<u8> {
        let mut bytes = self.payload.to_vec();
        if !matches!(self.ranges, Ranges::Completion) {
            bytes.resize(bytes.len() + usize::from(self.more).min(4096), 0);
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn kind(&self) -> Kind {
        match self.ranges {
            Ranges::None => Kind::IN_BAND,
            Ranges::Completion => Kind::COMPLETION,
            Ranges::TransferPages(_) => Kind::TRANSFER_PAGES,
            Ranges::GpaDirect(_) => Kind::GPA_DIRECT,
        }
    }
}

/// Both ends of a ring between two guards.
struct Stand {
    memory: SharedPages,
    reader: Reader,
    writer: Writer,
    /// What an honest ring has still to give.
    expected: VecDeque<(Kind, Vec<u8>)>,
    /// Pushed and not yet published.
    pushed: VecDeque<(Kind, Vec<u8>)>,
    /// Whether nobody has touched the ring behind the ends' backs.
    honest: bool,
    buffer: PacketBuffer,
}

impl Stand {
    fn new() -> Self {
        let memory = SharedPages::from_heap(PageNumber(0x100), PAGES).expect("the heap has room");
        for guard in [0, PAGES - 1] {
            memory
                .write(guard * PAGE_SIZE, &[GUARD; PAGE_SIZE])
                .expect("in bounds");
        }
        let ring = Ring::new(&memory, 1, PAGES - 2).expect("a ring fits between the guards");
        Self {
            reader: Reader::new(ring.clone()),
            writer: Writer::new(ring).expect("the control page is there"),
            memory,
            expected: VecDeque::new(),
            pushed: VecDeque::new(),
            honest: true,
            buffer: PacketBuffer::default(),
        }
    }

    fn play(&mut self, step: &Step<'_>) {
        match step {
            Step::Packet(packet) => {
                let limit = u64::from(self.writer.largest_packet());
                let result = packet.push(|packet| (packet.footprint(), self.writer.push(packet)));
                match result {
                    Some((need, Ok(()))) => {
                        assert!(need <= limit);
                        self.pushed.push_back((packet.kind(), packet.padded()));
                    }
                    Some((need, Err(PushError::Full { need: said }))) => {
                        assert_eq!(need, u64::from(said));
                    }
                    Some((need, Err(PushError::TooLarge { .. }))) => assert!(need > limit),
                    Some((_, Err(PushError::Ring(error)))) => {
                        assert!(!self.honest, "an honest ring is broken: {error}");
                    }
                    None => {}
                }
            }
            Step::Publish => self.publish(),
            Step::Read => self.read(),
            Step::Peek => {
                let head = self.reader.peek();
                assert!(!self.honest || head.is_ok(), "{head:?}");
            }
            Step::Release => {
                let result = self.reader.publish();
                assert!(!self.honest || result.is_ok(), "{result:?}");
            }
            Step::Mask(true) => assert_eq!(self.reader.mask(), Ok(())),
            Step::Mask(false) => {
                let more = self.reader.unmask();
                if self.honest {
                    assert_eq!(more, Ok(!self.expected.is_empty()));
                }
            }
            Step::WaitFor(need) => {
                // What was pushed must be visible first, by contract.
                self.publish();
                let room = self.writer.wait_for(*need);
                assert!(!self.honest || room.is_ok(), "{room:?}");
                if *need == 0 && self.honest {
                    assert_eq!(room, Ok(Room::Available));
                }
            }
            Step::StopWaiting => assert_eq!(self.writer.stop_waiting(), Ok(())),
            Step::Bytes(offset, bytes) => {
                self.honest &= bytes.is_empty();
                let offset = usize::from(*offset) % ((PAGES - 2) * PAGE_SIZE);
                let room = (PAGES - 2) * PAGE_SIZE - offset;
                self.memory
                    .write(PAGE_SIZE + offset, &bytes[..bytes.len().min(room)])
                    .expect("in bounds");
            }
            Step::Control(field, value) => {
                self.honest = false;
                let field = FIELDS[usize::from(*field) % FIELDS.len()];
                self.memory
                    .write(PAGE_SIZE + field, &value.to_le_bytes())
                    .expect("in bounds");
            }
        }
    }

    fn publish(&mut self) {
        match self.writer.publish() {
            Ok(_) => self.expected.append(&mut self.pushed),
            Err(error) => assert!(!self.honest, "an honest ring is broken: {error}"),
        }
    }

    fn read(&mut self) {
        let result = self.reader.read(&mut self.buffer);
        if let Ok(true) = result {
            check_packet(&self.buffer, self.reader.ring_size());
        }
        if self.honest {
            let expected = self.expected.pop_front();
            assert_eq!(result, Ok(expected.is_some()));
            if let Some((kind, payload)) = expected {
                assert_eq!(self.buffer.kind(), kind);
                assert_eq!(self.buffer.payload(), payload);
            }
        }
    }

    fn finish(&self) {
        for guard in [0, PAGES - 1] {
            let mut page = [0; PAGE_SIZE];
            self.memory
                .read(guard * PAGE_SIZE, &mut page)
                .expect("in bounds");
            assert_eq!(page, [GUARD; PAGE_SIZE], "written outside of the ring");
        }
    }
}

/// A packet that was taken for good is good.
pub(crate) fn check_packet(packet: &PacketBuffer, ring_size: u32) {
    let size = ring_size as usize;
    assert!(packet.payload().len() < size);
    match packet.kind() {
        Kind::TRANSFER_PAGES => {
            let pages = packet.transfer_pages().expect("checked when it was read");
            assert!(pages.ranges().len() * 8 < size);
            assert_eq!(pages.ranges().count(), pages.ranges().len());
        }
        Kind::GPA_DIRECT => {
            let ranges = packet.gpa_ranges().expect("checked when it was read");
            assert!(ranges.count() * 16 < size);
            for range in ranges {
                let end = u64::from(range.offset) + u64::from(range.length);
                assert_eq!(
                    range.pages().len() as u64,
                    end.div_ceil(PAGE_SIZE as u64),
                    "a range has the pages that it touches"
                );
            }
        }
        kind => assert!(
            [Kind::IN_BAND, Kind::COMPLETION].contains(&kind),
            "{kind} is no type that passes"
        ),
    }
}

/// A reader whose producer writes anything anywhere between two reads. While nobody scribbles, what is read is
/// what was sent.
pub fn ring_reader(data: &[u8]) {
    let mut stand = Stand::new();
    steps(data).for_each(|step| stand.play(&step));
    stand.publish();
    // However broken, a ring comes to an end: each packet is longer than nothing.
    for _ in 0..2 * PAGES * PAGE_SIZE / 24 {
        if !matches!(stand.reader.read(&mut stand.buffer), Ok(true)) {
            break;
        }
        check_packet(&stand.buffer, stand.reader.ring_size());
    }
    stand.finish();
}

/// A writer whose consumer writes anything anywhere between two packets: never does it write outside of the ring, nor
/// does it ever take more than the ring can hold.
pub fn ring_writer(data: &[u8]) {
    let mut stand = Stand::new();
    steps(data).for_each(|step| stand.play(&step));
    // A consumer that stands still gives no room, but for what its last step away gave.
    let packet = Packet::data(&[0xEE; 24]);
    let most = 2 * (PAGES - 3) * PAGE_SIZE / 48;
    let pushed = (0..2 * most)
        .take_while(|_| packet.push(|packet| stand.writer.push(packet)) == Some(Ok(())))
        .count();
    assert!(pushed <= most, "{pushed} packets in a ring for {most}");
    stand.finish();
}
