//! A guest with one network card: what a netvsc driver says, byte by byte, over the KMCL library.

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmbus::hypervisor::Hypervisor;
use vmbus::ids::{ChannelId, PAGE_SIZE};
use vmbus::kmcl::{
    Channel, ChannelBuilder, EnabledChannel, ExternalData, Gpadl, GpadlAccess, GpadlSource,
    IncomingPacket, ReceivedPacket, Request, SharedPages, State, Timeout,
};
use vmbus::protocol::{Guid, interface};
use vmbus_host::bus::Profile;
use vmbus_host::network::backend::{Backend, Pair};
use vmbus_host::network::nvsp::Version;
use vmbus_host::network::{Config, Netvsp, Nic};

use crate::support::{SECOND, Vm};

pub const INSTANCE: Guid = Guid::literal("8d2f5a11-0000-4000-8000-000000000001");

/// The card's address.
pub const MAC: [u8; 6] = [0x02, 0x15, 0x5D, 1, 2, 3];

/// Who is at the other end of the cable.
pub const PEER: [u8; 6] = [0x02, 0x15, 0x5D, 9, 9, 9];

/// Bytes of a section of the send buffer.
pub const SECTION: usize = 6144;

/// Packet filter: directed, multicast, broadcast.
pub const FILTER: u32 = 0x0B;

/// The answer to a received packet.
const DONE: [u8; 8] = [108, 0, 0, 0, 1, 0, 0, 0];

/// How RNDIS messages travel to the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    /// In a section of the send buffer.
    Section(u32),
    /// In pages of the packet.
    Pages,
    /// The RNDIS header in a section, the frame in pages.
    Mixed(u32),
}

/// What the guest was sent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Got {
    /// By which channel.
    pub channel: usize,
    /// Bytes of the frame.
    pub frame: Vec<u8>,
    /// Type and value of its per-packet information.
    pub info: Vec<(u32, u32)>,
    /// How many frames were in the same packet.
    pub together: usize,
    /// Where in the receive buffer it lay.
    pub offset: u32,
}

impl Got {
    pub fn info(&self, kind: u32) -> Option<u32> {
        let found = self.info.iter().find(|(other, _)| *other == kind);
        found.map(|(_, value)| *value)
    }
}

/// What callbacks and tests share.
#[derive(Default)]
pub struct Inbox {
    pages: Mutex<Option<SharedPages>>,
    frames: Mutex<Vec<Got>>,
    /// RNDIS messages that are no frames.
    messages: Mutex<VecDeque<Vec<u8>>>,
    /// NVSP messages that nobody asked for.
    told: Mutex<Vec<Vec<u8>>>,
    /// Packets stay here uncompleted.
    keep: AtomicBool,
    /// So do those with control messages.
    keep_control: AtomicBool,
    kept: Mutex<Vec<IncomingPacket>>,
}

pub struct Guest {
    pub vm: Vm,
    pub nic: Arc<Nic>,
    pub id: ChannelId,
    pub primary: EnabledChannel,
    pub subs: Vec<EnabledChannel>,
    pub inbox: Arc<Inbox>,
    pub receive: Option<Gpadl>,
    pub send: Option<Gpadl>,
    pub piece: u32,
    next_id: u32,
}

fn builder(inbox: &Arc<Inbox>, index: usize) -> ChannelBuilder {
    let inbox = inbox.clone();
    ChannelBuilder::new(interface::NETWORK)
        .ring_pages(8, 8)
        .maximum_packet_size(256)
        .maximum_packet_count(256)
        .transaction_quota(1024)
        .maximum_external_data(300 << 10, 40)
        .process_packet(move |_, packet| inbox.take(index, packet))
}

impl Inbox {
    fn take(&self, channel: usize, packet: ReceivedPacket<'_>) {
        let Some(pages) = packet.transfer_pages() else {
            self.told.lock().unwrap().push(packet.payload().to_vec());
            packet.complete(&[]);
            return;
        };
        assert_eq!(pages.set, 0xCAFE);
        assert_eq!(word(packet.payload(), 0), 107);
        assert_eq!(word(packet.payload(), 8), u32::MAX, "no section");
        let is_control = word(packet.payload(), 4) == 1;
        let ranges: Vec<_> = pages.ranges().collect();
        let memory = self.pages.lock().unwrap().clone().unwrap();
        for range in &ranges {
            let mut message = vec![0; range.length as usize];
            memory.read(range.offset as usize, &mut message).unwrap();
            assert_eq!(word(&message, 4), range.length, "one message in a range");
            if is_control {
                self.messages.lock().unwrap().push_back(message);
            } else {
                let (frame, info) = read_packet(&message);
                self.frames.lock().unwrap().push(Got {
                    channel,
                    frame,
                    info,
                    together: ranges.len(),
                    offset: range.offset,
                });
            }
        }
        let keep = if is_control {
            &self.keep_control
        } else {
            &self.keep
        };
        if keep.load(Ordering::SeqCst) {
            self.kept.lock().unwrap().push(packet.hold());
        } else {
            packet.complete(&DONE);
        }
    }
}

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes[at..].first_chunk().unwrap())
}

pub fn words(fields: &[u32]) -> Vec<u8> {
    fields.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn read_packet(message: &[u8]) -> (Vec<u8>, Vec<(u32, u32)>) {
    assert_eq!(word(message, 0), 1);
    let body = &message[8..];
    let (at, length) = (word(body, 0) as usize, word(body, 4) as usize);
    let (info, info_length) = (word(body, 20) as usize, word(body, 24) as usize);
    let mut elements = &body[info..info + info_length];
    let mut all = Vec::new();
    while !elements.is_empty() {
        let (size, place) = (word(elements, 0) as usize, word(elements, 8) as usize);
        all.push((word(elements, 4), word(elements, place)));
        elements = &elements[size..];
    }
    (body[at..at + length].to_vec(), all)
}

/// An RNDIS PACKET with per-packet information, padded to 8 bytes.
pub fn rndis_packet(frame: &[u8], info: &[(u32, u32)]) -> Vec<u8> {
    let info: Vec<u8> = info
        .iter()
        .flat_map(|(kind, value)| words(&[16, *kind, 12, *value]))
        .collect();
    let at = 36 + info.len();
    let length = (8 + at + frame.len()).next_multiple_of(8);
    let mut message = words(&[
        1,
        length as u32,
        at as u32,
        frame.len() as u32,
        0,
        0,
        0,
        36,
        info.len() as u32,
        0,
        0,
    ]);
    message.extend_from_slice(&info);
    message.extend_from_slice(frame);
    message.resize(length, 0);
    message
}

/// An RNDIS control message of this type with these fields behind its header.
pub fn rndis_control(kind: u32, fields: &[u32], data: &[u8]) -> Vec<u8> {
    let length = 8 + 4 * fields.len() + data.len();
    let mut message = words(&[kind, length as u32]);
    message.extend(words(fields));
    message.extend_from_slice(data);
    message
}

/// A plain frame for the other end.
pub fn frame_to(to: [u8; 6], from: [u8; 6], data: &[u8]) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xB5], data].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

impl Guest {
    /// A guest whose channel is open, with a cable to the test.
    pub fn new(change: impl FnOnce(&mut Config)) -> (Self, Pair) {
        let (mine, peer) = Pair::new();
        (Self::with(mine, change), peer)
    }

    pub fn with(backend: impl Backend + 'static, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new("net0", MAC);
        change(&mut config);
        let nic = Nic::new(config, backend).unwrap();
        let vm = Vm::new(Profile::openvmm());
        let device = Netvsp::device(INSTANCE);
        let id = vm.machine.add(device, Netvsp::new(nic.clone())).unwrap();
        vm.connect();
        let inbox = Arc::new(Inbox::default());
        let primary = vm.enable(&builder(&inbox, 0));
        assert_eq!(primary.channel().state(), State::Active);
        Self {
            vm,
            nic,
            id,
            primary,
            subs: Vec::new(),
            inbox,
            receive: None,
            send: None,
            piece: 0,
            next_id: 100,
        }
    }

    /// The same guest and card, with the channel opened anew.
    pub fn again(self) -> Self {
        let inbox = Arc::new(Inbox::default());
        let primary = self.vm.enable(&builder(&inbox, 0));
        assert_eq!(primary.channel().state(), State::Active);
        Self {
            primary,
            inbox,
            subs: Vec::new(),
            receive: None,
            send: None,
            ..self
        }
    }

    /// A guest that has set up everything, and receives.
    pub fn ready() -> (Self, Pair) {
        Self::ready_with(|_| {})
    }

    pub fn ready_with(change: impl FnOnce(&mut Config)) -> (Self, Pair) {
        let (mut guest, peer) = Self::new(change);
        guest.set_up(Version::V6_1);
        (guest, peer)
    }

    /// All of spec netvsc.md 4, with this version.
    pub fn set_up(&mut self, version: Version) {
        self.set_up_with(version, 1514, 64);
    }

    pub fn set_up_with(&mut self, version: Version, frame: u32, receive_pages: usize) {
        assert_eq!(self.init(version), 1);
        if version >= Version::V2 {
            self.tell(&words(&[125, frame, 0, 0xAC, 0]));
        }
        self.tell(&words(&[100, 6, 0x1E]));
        let answer = self.lend_receive(receive_pages);
        assert_eq!((word(&answer, 0), word(&answer, 4)), (102, 1));
        assert_eq!(word(&answer, 8), 1, "one section");
        assert_eq!(word(&answer, 12), 0, "from the beginning");
        self.piece = word(&answer, 16);
        let count = word(&answer, 20);
        assert_eq!(word(&answer, 24), self.piece * count);
        assert!((self.piece * count) as usize <= receive_pages * PAGE_SIZE);
        let answer = self.lend_send(8);
        assert_eq!(answer[..12], words(&[105, 1, SECTION as u32]));
        let answer = self.initialize();
        assert_eq!(word(&answer, 12), 0, "initialized");
        assert_eq!(self.set(0x0001_010E, &FILTER.to_le_bytes()), 0);
    }

    /// Offers a version; the status of the answer.
    pub fn init(&self, version: Version) -> u32 {
        let answer = self.ask(&words(&[1, version.0, version.0]));
        assert_eq!(word(&answer, 0), 2);
        word(&answer, 12)
    }

    pub fn channel(&self) -> &Channel {
        self.primary.channel()
    }

    /// A request and its answer. Guests send 40 bytes.
    pub fn ask(&self, message: &[u8]) -> Vec<u8> {
        self.try_ask(message).expect("an answer")
    }

    pub fn try_ask(&self, message: &[u8]) -> Option<Vec<u8>> {
        self.try_ask_on(self.channel(), message, ExternalData::new())
    }

    pub fn try_ask_on(
        &self,
        channel: &Channel,
        message: &[u8],
        external: ExternalData,
    ) -> Option<Vec<u8>> {
        let mut message = message.to_vec();
        message.resize(message.len().max(40), 0);
        let request = channel.request(&message, external, Timeout::After(SECOND));
        let answer = self.vm.vmbus.client().block_on(request).unwrap();
        answer.ok().map(|answer| answer.to_vec())
    }

    /// A message without an answer.
    pub fn tell(&self, message: &[u8]) {
        let mut message = message.to_vec();
        message.resize(message.len().max(40), 0);
        self.channel().send_message(&message).unwrap();
        self.vm.machine.settle();
    }

    pub fn pages(&self, count: usize) -> SharedPages {
        self.vm.machine.share_pages(count).unwrap()
    }

    pub fn lend(&self, pages: &SharedPages) -> Gpadl {
        let source = GpadlSource::Pages(pages.clone());
        let creating = self
            .channel()
            .create_gpadl(source, GpadlAccess::ReadWrite)
            .unwrap();
        self.vm.vmbus.client().block_on(creating).unwrap().unwrap()
    }

    pub fn lend_receive(&mut self, count: usize) -> Vec<u8> {
        let pages = self.pages(count);
        let gpadl = self.lend(&pages);
        *self.inbox.pages.lock().unwrap() = Some(pages);
        let answer = self.ask(&words(&[101, gpadl.handle().0, 0xCAFE]));
        self.receive = Some(gpadl);
        answer
    }

    pub fn lend_send(&mut self, count: usize) -> Vec<u8> {
        let gpadl = self.lend(&self.pages(count));
        let answer = self.ask(&words(&[104, gpadl.handle().0, 0]));
        self.send = Some(gpadl);
        answer
    }

    pub fn initialize(&mut self) -> Vec<u8> {
        let id = self.next_id();
        self.control(rndis_control(2, &[id, 1, 0, 0x4000], &[]))
            .expect("an answer to INITIALIZE")
    }

    pub fn next_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }

    /// Sends a control message, and returns what comes back.
    pub fn control(&mut self, message: Vec<u8>) -> Option<Vec<u8>> {
        assert_eq!(self.deliver(How::Pages, 1, &message, 0), Some(1));
        self.message()
    }

    /// The next RNDIS message of the host that is no frame.
    pub fn message(&self) -> Option<Vec<u8>> {
        self.vm.machine.settle();
        self.inbox.messages.lock().unwrap().pop_front()
    }

    /// The messages of the host that nobody asked for.
    pub fn told(&self) -> Vec<Vec<u8>> {
        self.vm.machine.settle();
        std::mem::take(&mut self.inbox.told.lock().unwrap())
    }

    pub fn query(&mut self, oid: u32, input: &[u8]) -> Result<Vec<u8>, u32> {
        let id = self.next_id();
        let fields = [id, oid, input.len() as u32, 20, 0];
        let answer = self.control(rndis_control(4, &fields, input)).unwrap();
        assert_eq!((word(&answer, 0), word(&answer, 8)), (0x8000_0004, id));
        let (length, at) = (word(&answer, 16) as usize, word(&answer, 20) as usize);
        match word(&answer, 12) {
            0 => Ok(answer[8 + at..8 + at + length].to_vec()),
            status => Err(status),
        }
    }

    pub fn query_u32(&mut self, oid: u32) -> u32 {
        let value = self.query(oid, &[]).unwrap();
        assert_eq!(value.len(), 4);
        word(&value, 0)
    }

    /// The status of setting an object.
    pub fn set(&mut self, oid: u32, value: &[u8]) -> u32 {
        let id = self.next_id();
        let fields = [id, oid, value.len() as u32, 20, 0];
        let answer = self.control(rndis_control(5, &fields, value)).unwrap();
        assert_eq!((word(&answer, 0), word(&answer, 8)), (0x8000_0005, id));
        word(&answer, 12)
    }

    /// Sends RNDIS messages of this traffic by the primary channel; the status of the completion. With [`How::Mixed`] the first
    /// `head` bytes are in the section.
    pub fn deliver(&self, how: How, traffic: u32, bytes: &[u8], head: usize) -> Option<u32> {
        self.deliver_on(self.channel(), how, traffic, bytes, head)
    }

    pub fn deliver_on(
        &self,
        channel: &Channel,
        how: How,
        traffic: u32,
        bytes: &[u8],
        head: usize,
    ) -> Option<u32> {
        let (section, in_section) = match how {
            How::Section(section) => (section, bytes),
            How::Pages => (u32::MAX, &[][..]),
            How::Mixed(section) => (section, &bytes[..head]),
        };
        if !in_section.is_empty() {
            let memory = self.send.as_ref().unwrap().memory().unwrap();
            memory
                .write(section as usize * SECTION, in_section)
                .unwrap();
        }
        let mut external = ExternalData::new();
        let in_pages = &bytes[in_section.len()..];
        if !in_pages.is_empty() {
            // Two ranges, neither at the beginning of a page.
            let cut = in_pages.len().min(44);
            for part in [&in_pages[..cut], &in_pages[cut..]] {
                if !part.is_empty() {
                    let pages = self.pages((100 + part.len()).div_ceil(PAGE_SIZE));
                    pages.write(100, part).unwrap();
                    external.push(pages, 100..100 + part.len()).unwrap();
                }
            }
        }
        let message = words(&[107, traffic, section, in_section.len() as u32]);
        let answer = self.try_ask_on(channel, &message, external)?;
        assert_eq!(word(&answer, 0), 108);
        Some(word(&answer, 4))
    }

    /// Sends a frame; the status of the completion.
    pub fn send(&self, how: How, frame: &[u8], info: &[(u32, u32)]) -> Option<u32> {
        let message = rndis_packet(frame, info);
        let head = 44 + 16 * info.len();
        self.deliver(how, 0, &message, head)
    }

    /// Sends a message in pages, and does not wait for the answer.
    pub fn begin(&self, message: &[u8]) -> Request {
        let pages = self.pages(message.len().div_ceil(4096));
        pages.write(0, message).unwrap();
        let mut external = ExternalData::new();
        external.push(pages, 0..message.len()).unwrap();
        let mut said = words(&[107, 0, u32::MAX, 0]);
        said.resize(40, 0);
        self.channel().request(&said, external, Timeout::Never)
    }

    /// The frames that came.
    pub fn frames(&self) -> Vec<Got> {
        self.vm.machine.settle();
        std::mem::take(&mut self.inbox.frames.lock().unwrap())
    }

    /// Keeps received frames uncompleted from now on, or completes those that are kept, and all others at once.
    pub fn keep(&self, keep: bool) {
        self.inbox.keep.store(keep, Ordering::SeqCst);
        if !keep {
            self.complete_kept(usize::MAX);
        }
    }

    /// Keeps control messages uncompleted from now on.
    pub fn keep_control(&self, keep: bool) {
        self.inbox.keep_control.store(keep, Ordering::SeqCst);
    }

    /// Completes the oldest packets that are kept.
    pub fn complete_kept(&self, count: usize) {
        let kept: Vec<_> = {
            let mut kept = self.inbox.kept.lock().unwrap();
            let count = count.min(kept.len());
            kept.drain(..count).collect()
        };
        kept.into_iter().for_each(|packet| packet.complete(&DONE));
        self.vm.machine.settle();
    }

    /// Asks for sub-channels and opens those that are granted.
    pub fn add_channels(&mut self, count: u32) -> u32 {
        let answer = self.ask(&words(&[133, 1, count]));
        assert_eq!((word(&answer, 0), word(&answer, 4)), (133, 1));
        let granted = word(&answer, 8);
        for index in 1..=granted {
            let number = NonZeroU16::new(index as u16).unwrap();
            let builder = builder(&self.inbox, index as usize);
            let builder = builder.sub_channel_of(self.channel(), number);
            let sub = self.vm.enable(&builder);
            assert_eq!(sub.channel().state(), State::Active);
            self.subs.push(sub);
        }
        granted
    }

    /// Nothing was wrong, on either side.
    pub fn assert_fine(&self) {
        assert_eq!(self.nic.failure(), None);
        assert_eq!(self.nic.counters().stray_completions, 0);
        self.vm.assert_well_behaved();
    }
}
