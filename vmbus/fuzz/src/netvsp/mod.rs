//! The host's network card, over what a guest and a network send: every packet is answered, pieces that the guest has stay as
//! they are, and the network gets frames that fit.

mod net;
mod wire;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmbus::ids::{GpadlHandle, PAGE_SIZE, PageNumber};
use vmbus::protocol::Guid;
use vmbus::ring::{Kind, Outgoing, PacketBuffer, ScatterList};
use vmbus_host::network::backend::LargeSends;
use vmbus_host::network::{Config, MAX_FRAME, Netvsp, Nic, nvsp, oid};

use self::net::Net;
use self::wire::{ALL_RINGS, CHANNELS, Wire, bytes};
use crate::frames::frame;
use crate::steps;

/// Something that happens between a guest, its card and the network.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// The guest sends these bytes as an NVSP message, on which channel, and whether it wants an answer.
    Message(u8, bool, &'a [u8]),
    /// The guest sets up everything, with the version of this number, frames so long and so many pages for receiving.
    SetUp(u8, u16, u8),
    /// The guest sends an NVSP message of this type with these fields.
    Say(u8, [u32; 2]),
    /// The guest lends the receive buffer, of so many pages.
    LendReceive(u8),
    /// The guest lends the send buffer, of so many pages.
    LendSend(u8),
    /// The guest revokes the receive buffer, or the send buffer.
    Revoke(bool),
    /// The guest takes the memory of one of them back, revoked or not.
    TakeBack(bool),
    /// The guest sends these bytes as RNDIS messages of this traffic.
    Rndis(u8, How, u8, &'a [u8]),
    /// The guest sends a control message of this type: with an object by number, and a value.
    Control(u8, u8, &'a [u8]),
    /// The guest sends frames.
    Frame(u8, How, Frame),
    /// The network has frames for the guest: sort, bytes of data, spice, to whom, how many.
    Inbound(u8, u16, u8, u8, u8),
    /// The cable is in, or out.
    Link(bool),
    /// The MTU is another.
    Mtu(u16),
    /// The network: bit 0 full, 1 down, 2 takes large frames, 3 cuts them.
    Network(u8),
    /// The guest keeps what it receives from now on, or answers at once.
    Hold(bool),
    /// The guest does not look into a ring from now on, or does.
    Stall(u8, bool),
    /// The guest answers one of the packets that it has kept.
    Complete(u8),
    /// The guest answers a packet that may not exist, on which channel.
    CompleteFalsely(u8, u64),
    /// The guest opens a channel.
    Open(u8),
    /// The guest closes a channel.
    Close(u8),
    /// Time goes by, in units of 100 ns.
    Advance(u32),
}

/// How RNDIS messages travel.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) enum How {
    /// In a section of the send buffer.
    Section(u8),
    /// In pages, from this byte on.
    Pages(u16),
    /// So many bytes in a section, the rest in pages.
    Mixed(u8, u8),
    /// In pages that are not the guest's, from this number on.
    Foreign(u64),
    /// In a section whose number and size are these, whatever lies there.
    Lie(u32, u32),
}

/// Frames that a guest sends.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) sort: u8,
    /// Bytes of its data.
    pub(crate) data: u16,
    pub(crate) spice: u8,
    /// How many there are in one packet.
    pub(crate) count: u8,
    /// Per-packet information: checksum, large send, VLAN.
    pub(crate) tasks: [Option<u32>; 3],
}

/// Versions as [`Step::SetUp`] counts them.
const VERSIONS: [nvsp::Version; 6] = nvsp::Version::ALL;

/// The card's address, and that of somebody else.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Where the buffers and what packets lend lie in the guest's memory, in pages.
const RECEIVE: Range<usize> = ALL_RINGS..ALL_RINGS + 24;
const SEND: Range<usize> = RECEIVE.end..RECEIVE.end + 3;
const DATA: Range<usize> = SEND.end..SEND.end + 17;

/// The transfer page set, and the id of the send buffer.
const SET: u16 = 0xCAFE;

/// Bytes of a section of the send buffer.
const SECTION: usize = 6144;

/// Sections of the send buffer.
const SECTIONS: u32 = (bytes(SEND.end - SEND.start) / SECTION) as u32;

/// The most steps of one input.
const STEPS: usize = 64;

/// The longest frame in bytes that the network takes whole, where it does.
const WHOLE: usize = 0xFFFF;

/// The answer to a received packet.
const DONE: [u8; 8] = [108, 0, 0, 0, 1, 0, 0, 0];

/// Bytes of a VLAN tag.
const TAG: usize = 4;

/// Frames in the card that wait for the guest, at most: in a queue for each channel, in the ring's next packets, and one.
const WAITING: u64 = CHANNELS as u64 * (512 + 32) + 1;

/// Frames of the network in one input, at most.
const FRAMES: u64 = 2500;

/// A packet of the host that the guest has not answered.
struct Held {
    channel: u16,
    id: u64,
    /// What lies where.
    parts: Vec<(usize, Vec<u8>)>,
}

/// The receive buffer as the host has divided it.
#[derive(Clone, Copy)]
struct Divided {
    id: u16,
    /// Where it begins, in bytes.
    at: usize,
    piece: usize,
    count: usize,
}

struct Guest {
    wire: Wire,
    nic: Arc<Nic>,
    net: Net,
    /// What wants an answer, by channel and transaction id.
    wanted: BTreeMap<(u16, u64), Vec<u8>>,
    next: u64,
    held: Vec<Held>,
    hold: bool,
    stalled: [bool; CHANNELS as usize],
    /// What the guest has lent: the receive and the send buffer.
    lent: [Option<GpadlHandle>; 2],
    divided: Option<Divided>,
    /// The guest does not know what became of the receive buffer: it wanted no answer, has lent other memory for it, or has
    /// changed something while it did not read what the host had sent.
    is_blind: bool,
    /// What the guest has written where the host may only read.
    written: Vec<u8>,
    /// The receive buffer as it was when the host gave it back.
    received: Option<Vec<u8>>,
    /// Faults before the primary channel was opened.
    faults: u64,
    /// Frames in the card that may have been forgotten with a channel or a buffer.
    forgotten: u64,
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_le_bytes(*field))
}

impl Guest {
    fn new() -> Self {
        let net = Net::default();
        let config = Config {
            queues: CHANNELS,
            ..Config::new("net0", MAC)
        };
        let nic = Nic::new(config, net.clone()).expect("there can be such a card");
        let device = Netvsp::device(Guid([1; 16]));
        let wire = Wire::new(DATA.end, device, Netvsp::new(nic.clone()));
        let mut guest = Self {
            wire,
            nic,
            net,
            wanted: BTreeMap::new(),
            next: 1 << 32,
            held: Vec::new(),
            hold: false,
            stalled: [false; CHANNELS as usize],
            lent: [None; 2],
            divided: None,
            is_blind: false,
            written: vec![0; bytes(DATA.end - SEND.start)],
            received: None,
            faults: 0,
            forgotten: 0,
        };
        guest.open(0);
        guest
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        self.wire.memory.write(at, data).expect("in bounds");
        let from = at - bytes(SEND.start);
        self.written[from..from + data.len()].copy_from_slice(data);
    }

    fn open(&mut self, index: u16) {
        if self.wire.is_open(index) || !self.wire.open(index) {
            return;
        }
        if index == 0 {
            self.faults = self.nic.counters().protocol_errors;
            self.net.lock().longest = 1514 + TAG;
        }
        self.forget();
    }

    fn close(&mut self, index: u16) {
        self.wire.close(index);
        self.wire.settle();
        let wire = &self.wire;
        self.wanted.retain(|(channel, _), _| wire.is_open(*channel));
        self.held.retain(|held| wire.is_open(held.channel));
        if index == 0 {
            assert!(!self.wire.keeps_demanded(), "it is closed");
            self.given_back();
        }
        self.forget();
    }

    /// Whether there may be packets that the guest has not read.
    fn is_behind(&self) -> bool {
        self.stalled.contains(&true)
    }

    /// The host is done with the receive buffer.
    fn given_back(&mut self) {
        self.divided = None;
        self.held.clear();
        let mut wanted = self.wanted.values();
        if wanted.any(|request| word(request, 0) == Some(101)) {
            // It has been lent again.
            return;
        }
        let (at, length) = (bytes(RECEIVE.start), bytes(RECEIVE.len()));
        self.received = Some(self.wire.get(at, length));
    }

    /// Frames in the card may be forgotten now.
    fn forget(&mut self) {
        self.forgotten = self.inside();
    }

    /// Frames that the card has taken from the network, and not accounted for.
    fn inside(&self) -> u64 {
        let counters = self.nic.counters();
        let accounted = counters.received_frames
            + counters.received_dropped
            + counters.received_filtered
            + counters.received_oversized;
        self.net.lock().taken.saturating_sub(accounted)
    }

    fn write(&mut self, channel: u16, packet: Outgoing<'_>, payload: &[u8], wants: bool) {
        let id = self.next;
        let packet = if wants {
            packet.with_completion(id)
        } else {
            packet
        };
        if self.wire.write(channel, &packet) && wants {
            self.next += 1;
            self.wanted.insert((channel, id), payload.to_vec());
        }
    }

    /// Sends an NVSP message.
    fn say(&mut self, channel: u16, message: &[u8], wants: bool) {
        let message = &message[..message.len().min(256)];
        self.foresee(message, wants);
        let packet = Outgoing::in_band([message, &[]]);
        self.write(channel, packet, message, wants);
        self.wire.settle();
    }

    /// What the guest must know of a message before the host has it.
    fn foresee(&mut self, message: &[u8], wants: bool) {
        match word(message, 0) {
            // NDIS configuration.
            Some(125) => {
                let frame = word(message, 4).unwrap_or(0);
                if (1514..=MAX_FRAME).contains(&frame) {
                    let mut net = self.net.lock();
                    net.longest = net.longest.max(frame as usize + TAG);
                }
            }
            // The receive buffer: from now on the host may write to it.
            Some(101) => {
                let handle = self.lent[0].map(|handle| handle.0);
                self.is_blind |= !wants || word(message, 4) != handle || self.is_behind();
                self.received = None;
            }
            Some(103) => {
                self.is_blind |= !wants || self.is_behind();
                self.forgotten += 32;
            }
            _ => {}
        }
    }

    fn words(&mut self, message: &[u32]) {
        let mut message = words(message);
        message.resize(40, 0);
        self.say(0, &message, true);
    }

    fn lend(&mut self, which: usize, pages: usize) {
        let range = [RECEIVE, SEND][which].clone();
        let range = range.start..range.start + pages.clamp(1, range.len());
        if self.lent[which].is_none() {
            self.lent[which] = self.wire.lend(range);
        }
        if let Some(handle) = self.lent[which] {
            let kind = [101, 104][which];
            self.words(&[kind, handle.0, u32::from(SET)]);
        }
    }

    fn set_up(&mut self, version: u8, frame: u16, pages: u8) {
        let version = VERSIONS[usize::from(version) % VERSIONS.len()];
        self.words(&[1, version.0, version.0]);
        if version >= nvsp::Version::V2 {
            self.words(&[125, u32::from(frame), 0, 8, 0]);
        }
        self.words(&[100, 6, 30]);
        self.lend(0, usize::from(pages));
        self.lend(1, SEND.len());
        self.control(2, 0, &[]);
        // All frames.
        self.control(5, 13, &[0x2F, 0, 0, 0]);
        self.look();
    }

    fn control(&mut self, kind: u8, object: u8, value: &[u8]) {
        let object = oid::ALL[usize::from(object) % oid::ALL.len()];
        let value = &value[..value.len().min(512)];
        let fields = match kind {
            2 => vec![7, 1, 0, 0x4000],
            4 | 5 => vec![7, object, value.len() as u32, 20, 0],
            _ => vec![7],
        };
        let length = 8 + 4 * fields.len() + value.len();
        let head = words(&[u32::from(kind), length as u32]);
        let message = [&head, &words(&fields), value].concat();
        self.rndis(0, How::Pages(100), 1, &message);
    }

    fn rndis(&mut self, channel: u16, how: How, traffic: u32, message: &[u8]) {
        let most = bytes(DATA.len()) - PAGE_SIZE;
        let message = &message[..message.len().min(most)];
        let none = nvsp::NO_SECTION;
        let (section, size, in_section, in_pages, offset) = match how {
            How::Section(section) => {
                let part = &message[..message.len().min(SECTION)];
                (u32::from(section), part.len(), part, &[][..], 0)
            }
            How::Mixed(section, size) => {
                let (head, rest) = message.split_at(usize::from(size).min(message.len()));
                (u32::from(section), head.len(), head, rest, 500)
            }
            How::Lie(section, size) => (section, size as usize, &[][..], message, 0),
            How::Pages(offset) => (none, 0, &[][..], message, usize::from(offset) % PAGE_SIZE),
            How::Foreign(_) => (none, 0, &[][..], message, 0),
        };
        let at = (section % SECTIONS) as usize * SECTION;
        if !in_section.is_empty() {
            self.put(bytes(SEND.start) + at, in_section);
        }
        let nvsp = words(&[107, traffic, section, size as u32]);
        let mut list = ScatterList::default();
        if !in_pages.is_empty() {
            self.put(bytes(DATA.start) + offset, in_pages);
            let count = (offset + in_pages.len()).div_ceil(PAGE_SIZE);
            let first = match how {
                How::Foreign(first) if first >> 32 != 0 => first,
                _ => Wire::number(DATA.start).0,
            };
            let pages: Vec<_> = (0..count as u64)
                .map(|page| PageNumber(first.wrapping_add(page)))
                .collect();
            let length = in_pages.len() as u32;
            list.push(offset as u32, length, pages.into_iter())
                .expect("there is something");
        }
        let packet = if list.is_empty() {
            Outgoing::in_band([&nvsp, &[]])
        } else {
            Outgoing::gpa_direct(&list, [&nvsp, &[]])
        };
        self.write(channel, packet, &nvsp, true);
        self.wire.settle();
    }

    fn frames(&mut self, channel: u16, how: How, frames: Frame) {
        let Frame {
            sort,
            data,
            spice,
            count,
            tasks,
        } = frames;
        let frame = frame(sort, [PEER, MAC], usize::from(data), spice);
        let info: Vec<u8> = [0, 2, 6]
            .iter()
            .zip(tasks)
            .filter_map(|(kind, task)| Some(words(&[16, *kind, 12, task?])))
            .flatten()
            .collect();
        let at = 36 + info.len();
        let length = (8 + at + frame.len()).next_multiple_of(8);
        let behind = if info.is_empty() { 0 } else { 36 };
        let mut message = words(&[1, length as u32, at as u32, frame.len() as u32, 0, 0, 0]);
        message.extend(words(&[behind, info.len() as u32, 0, 0]));
        message.extend([&info[..], &frame].concat());
        message.resize(length, 0);
        let batch = message.repeat(usize::from(count % 8) + 1);
        self.rndis(channel, how, 0, &batch);
    }

    /// Takes what the host has sent.
    fn look(&mut self) {
        let mut packet = PacketBuffer::default();
        loop {
            self.wire.settle();
            let mut found = false;
            for channel in 0..CHANNELS {
                if !self.stalled[usize::from(channel)] && self.wire.read(channel, &mut packet) {
                    found = true;
                    self.take(channel, &packet);
                }
            }
            if !found {
                return;
            }
        }
    }

    fn take(&mut self, channel: u16, packet: &PacketBuffer) {
        let id = packet.transaction_id();
        if packet.kind() == Kind::COMPLETION {
            let request = self.wanted.remove(&(channel, id));
            let request = request.expect("an answer is to a question");
            return self.answered(&request, packet.payload());
        }
        if packet.transfer_pages().is_some() {
            return self.transferred(channel, packet);
        }
        // The table of what channels to send on.
        let payload = packet.payload();
        assert_eq!(word(payload, 0), Some(134));
        let table = payload.get(40..40 + 64).expect("16 entries");
        let (entries, _) = table.as_chunks::<4>();
        let inside = |entry: &[u8; 4]| u32::from_le_bytes(*entry) < u32::from(CHANNELS);
        assert!(entries.iter().all(inside), "there is such a channel");
    }

    fn answered(&mut self, request: &[u8], answer: &[u8]) {
        match (word(request, 0), word(answer, 0), word(answer, 4)) {
            (Some(101), Some(102), Some(1)) => {
                let field = |at| word(answer, at).expect("the answer is whole") as usize;
                let (piece, count) = (field(16), field(20));
                assert!(piece > 0 && piece * count == field(24), "equal pieces");
                self.divided = Some(Divided {
                    id: word(request, 8).map_or(0, |id| id as u16),
                    at: bytes(RECEIVE.start),
                    piece,
                    count,
                });
                assert!(piece * count <= bytes(RECEIVE.len()), "they are lent");
            }
            (Some(103), _, _) => {
                let id = word(request, 4).map(|id| id as u16);
                if self.divided.is_some_and(|divided| Some(divided.id) == id) {
                    self.given_back();
                    self.forget();
                }
            }
            (Some(107), kind, _) => assert_eq!(kind, Some(108)),
            _ => {}
        }
    }

    /// Frames, or a control message.
    fn transferred(&mut self, channel: u16, packet: &PacketBuffer) {
        let pages = packet.transfer_pages().expect("somebody looked");
        assert!(packet.completion_requested());
        assert_eq!(word(packet.payload(), 0), Some(107));
        let is_control = word(packet.payload(), 4) == Some(1);
        let mut parts = Vec::new();
        if let Some(divided) = self.divided.filter(|_| !self.is_blind) {
            assert_eq!(pages.set, divided.id);
            for range in pages.ranges() {
                let (offset, length) = (range.offset as usize, range.length as usize);
                assert!(offset.is_multiple_of(divided.piece) && length <= divided.piece);
                assert!(offset / divided.piece < divided.count);
                let at = divided.at + offset;
                let mut given = self.held.iter().flat_map(|held| &held.parts);
                assert!(!given.any(|(other, _)| *other == at), "the guest has it");
                let message = self.wire.get(at, length);
                assert_eq!(word(&message, 4), Some(range.length), "one message");
                if is_control {
                    assert_ne!(word(&message, 0), Some(1));
                } else {
                    self.delivered(&message);
                }
                parts.push((at, message));
            }
        } else {
            assert!(self.is_blind, "there is a receive buffer");
        }
        self.held.push(Held {
            channel,
            id: packet.transaction_id(),
            parts,
        });
        if !self.hold {
            self.complete(self.held.len() - 1);
        }
    }

    /// A frame is one that came, and as it came.
    fn delivered(&self, message: &[u8]) {
        let field = |at| word(message, at).expect("a whole header") as usize;
        assert_eq!(field(0), 1);
        let (at, length) = (8 + field(8), field(12));
        let mut frame = message[at..at + length].to_vec();
        let info = 8 + field(28);
        for element in message[info..info + field(32)].chunks(16) {
            if let (Some(6), Some(tag)) = (word(element, 4), word(element, 12)) {
                let tci = tag as u16 >> 4 | (tag as u16 & 8) << 9 | (tag as u16 & 7) << 13;
                let tag = [[0x81, 0], tci.to_be_bytes()].concat();
                frame.splice(12..12, tag);
            }
        }
        let mut net = self.net.lock();
        assert!(frame.len() <= net.longest, "it fits");
        let place = net.under_way.iter().position(|other| *other == frame);
        let place = place.expect("the network has sent it");
        net.under_way.swap_remove(place);
    }

    fn complete(&mut self, which: usize) {
        let Some(held) = self.held.get(which) else {
            return;
        };
        for (at, content) in &held.parts {
            let now = self.wire.get(*at, content.len());
            assert!(
                self.is_blind || now == *content,
                "the piece at {at} is the guest's"
            );
        }
        let done = Outgoing::completion(held.id, &DONE);
        if self.wire.write(held.channel, &done) {
            self.held.remove(which);
        }
    }

    fn play(&mut self, step: Step<'_>) {
        let index = |channel: u8| u16::from(channel) % CHANNELS;
        match step {
            Step::Message(channel, wants, message) => self.say(index(channel), message, wants),
            Step::SetUp(version, frame, pages) => self.set_up(version, frame, pages),
            Step::Say(kind, [first, second]) => self.words(&[u32::from(kind), first, second]),
            Step::LendReceive(pages) => self.lend(0, usize::from(pages)),
            Step::LendSend(pages) => self.lend(1, usize::from(pages)),
            Step::Revoke(false) => self.words(&[103, u32::from(SET)]),
            Step::Revoke(true) => self.words(&[106, u32::from(SET)]),
            Step::TakeBack(which) => {
                if let Some(handle) = self.lent[usize::from(which)] {
                    self.is_blind |= self.is_behind();
                    self.wire.demand(handle);
                }
            }
            Step::Rndis(channel, how, traffic, message) => {
                self.rndis(index(channel), how, u32::from(traffic), message);
            }
            Step::Control(kind, object, value) => self.control(kind, object, value),
            Step::Frame(channel, how, frames) => self.frames(index(channel), how, frames),
            Step::Inbound(sort, data, spice, to, count) => {
                let to = [MAC, PEER, [0xFF; 6], [1, 0, 0x5E, 0, 0, 1]][usize::from(to % 4)];
                let mut net = self.net.lock();
                if net.taken + (net.inbound.len() as u64) < FRAMES {
                    let data = usize::from(data) % 2500;
                    let frame = frame(sort, [to, PEER], data, spice);
                    let frames = std::iter::repeat_n(frame, usize::from(count % 64) + 1);
                    net.inbound.extend(frames);
                }
                drop(net);
                self.net.wake();
            }
            Step::Link(connected) => self.nic.set_link(connected),
            // One that there cannot be is refused.
            Step::Mtu(mtu) => drop(self.nic.set_mtu(u32::from(mtu))),
            Step::Network(state) => {
                let mut net = self.net.lock();
                net.full = state & 1 != 0;
                net.down = state & 2 != 0;
                net.large = match state & 12 {
                    0 => None,
                    4 => Some(LargeSends::Whole(WHOLE)),
                    _ => Some(LargeSends::Cut),
                };
                if state & 12 == 4 {
                    net.whole = WHOLE;
                }
                drop(net);
                self.net.wake();
            }
            Step::Hold(hold) => self.hold = hold,
            Step::Stall(channel, stalled) => self.stalled[usize::from(index(channel))] = stalled,
            Step::Complete(which) => {
                self.complete(usize::from(which) % self.held.len().max(1));
            }
            Step::CompleteFalsely(channel, id) => {
                // One that it really has is answered by the other step.
                if !self.held.iter().any(|held| held.id == id) {
                    // It may be that of a packet that the guest has not read.
                    self.is_blind |= self.is_behind();
                    self.wire
                        .write(index(channel), &Outgoing::completion(id, &DONE));
                }
            }
            Step::Open(channel) => self.open(index(channel)),
            Step::Close(channel) => self.close(index(channel)),
            Step::Advance(by) => self.wire.advance(u64::from(by)),
        }
        self.look();
        for which in 0..2 {
            if self.lent[which].is_some_and(|handle| !self.wire.is_lent(handle)) {
                self.lent[which] = None;
                if which == 0 {
                    self.given_back();
                }
            }
        }
    }

    /// The host touches nothing that is not its.
    fn check_memory(&self) {
        if self.is_blind {
            return;
        }
        let readable = bytes(DATA.end - SEND.start);
        let written = self.wire.get(bytes(SEND.start), readable);
        assert!(written == self.written, "what is only lent to be read");
        if let Some(received) = &self.received {
            let now = self.wire.get(bytes(RECEIVE.start), bytes(RECEIVE.len()));
            assert!(now == *received, "the receive buffer was given back");
        }
    }

    /// Nothing holds anything up: all comes to its end.
    fn finish(&mut self) {
        self.hold = false;
        self.stalled = Default::default();
        self.play(Step::Link(true));
        self.play(Step::Network(0));
        for _ in 0..100 {
            let mut left = usize::MAX;
            // Until there is no more, or no room.
            while (1..left).contains(&self.held.len()) {
                left = self.held.len();
                self.complete(0);
                self.look();
            }
            self.look();
            if self.wanted.is_empty() {
                break;
            }
            let next = self.wire.deadline().unwrap_or(0).max(self.wire.now + 1);
            self.wire.advance(next - self.wire.now);
        }
        let sound = self.nic.counters().protocol_errors == self.faults;
        assert!(!sound || self.wanted.is_empty(), "every packet is answered");
    }
}

/// The network card over what a guest and a network send.
pub fn netvsp(data: &[u8]) {
    let mut guest = Guest::new();
    for step in steps(data).take(STEPS) {
        let brings_frames = matches!(step, Step::Inbound(..) | Step::Advance(_));
        guest.play(step);
        if !brings_frames {
            guest.forget();
        }
        let inside = guest.inside().saturating_sub(guest.forgotten);
        assert!(inside <= WAITING, "{inside} frames wait");
    }
    guest.check_memory();
    guest.finish();
    guest.close(0);
    guest.check_memory();
    guest.wire.unload();
}
