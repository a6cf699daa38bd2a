//! What a network card reads and writes: RNDIS and NVSP messages, the objects that a guest sets, and what is done with frames.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmbus_host::network::backend::Nowhere;
use vmbus_host::network::offload::{
    Headers, MIN_SEGMENT, Transport, fill_checksums, insert_tag, resize_large, segment, strip_tag,
    verify_checksums,
};
use vmbus_host::network::rndis::{
    Facts, INFO, Message, Messages, PACKET_HEADER, ReceiveChecksum, TransmitChecksum, VlanTag,
    write_packet,
};
use vmbus_host::network::{Adapter, Config, Negotiated, Nic, nvsp, oid};

use crate::frames::frame;
use crate::steps;

/// Something that is read, written, set or done.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// Bytes that a guest sends as RNDIS messages.
    Messages(&'a [u8]),
    /// Bytes that a guest sends as an NVSP message.
    Nvsp(&'a [u8]),
    /// A frame that the host delivers, with checksums, tag and hash.
    Deliver([Option<u32>; 3], &'a [u8]),
    /// The guest asks for an object.
    Query(u8, &'a [u8]),
    /// The guest sets an object.
    Set(u8, &'a [u8]),
    /// The guest has been granted channels.
    Channels(u8),
    /// The network brings a frame: sort, bytes of data, spice.
    Arrive(u8, u16, u8),
    /// A frame whose checksums are left to the host.
    Checksums(Made<'a>, u32),
    /// A frame that is cut into such with so many bytes of data.
    Segment(Made<'a>, u32),
    /// A frame that the network takes uncut.
    Whole(Made<'a>),
    /// A frame that gets a tag.
    Tag(Made<'a>, u32),
}

/// A frame of a sort, with bytes of data, spice, and then bytes of another frame from this place on.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) struct Made<'a>(
    pub(crate) u8,
    pub(crate) u16,
    pub(crate) u8,
    pub(crate) u8,
    pub(crate) &'a [u8],
);

/// The card's address, and that of somebody else.
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Bytes of data in all frames of an input: more make it slow, not deep.
const DATA: usize = 4 << 20;

/// Bytes that an answer may have at most, to fit a piece of the least receive buffer.
const ANSWER: usize = 1514 + 256;

impl Step<'_> {
    /// Bytes of data in the frame that it makes.
    fn data(&self) -> usize {
        match self {
            Self::Checksums(made, _)
            | Self::Segment(made, _)
            | Self::Whole(made)
            | Self::Tag(made, _) => made.1.into(),
            Self::Arrive(_, data, _) => (*data).into(),
            _ => 0,
        }
    }
}

impl Made<'_> {
    fn frame(self) -> Vec<u8> {
        let Self(sort, data, spice, at, bytes) = self;
        let mut frame = frame(sort, [PEER, MAC], usize::from(data), spice);
        let places = frame.iter_mut().skip(usize::from(at));
        places.zip(bytes).for_each(|(place, byte)| *place = *byte);
        frame
    }
}

/// What a guest's messages say lies inside them.
fn messages(bytes: &[u8]) {
    let all = bytes.as_ptr_range();
    let inside = |part: &[u8]| {
        let part_of = part.as_ptr_range();
        assert!(part.is_empty() || all.start <= part_of.start && part_of.end <= all.end);
    };
    let mut count = 0;
    for message in Messages::new(bytes) {
        count += 1;
        match message {
            Ok(Message::Packet(packet)) => inside(packet.frame),
            Ok(Message::Query { input, .. } | Message::Set { input, .. }) => inside(input),
            _ => {}
        }
    }
    assert!(count <= bytes.len() / 8, "each has a header");
}

/// A delivered frame is read back as it was.
fn deliver([checksum, vlan, hash]: [Option<u32>; 3], frame: &[u8]) {
    let facts = Facts {
        checksum: checksum.map(ReceiveChecksum),
        vlan: vlan.map(VlanTag),
        hash,
    };
    // What it held before is gone.
    let mut message = vec![1; 7];
    write_packet(&mut message, frame, &facts);
    let elements = [checksum, vlan, hash].iter().flatten().count();
    assert_eq!(message.len(), PACKET_HEADER + elements * INFO + frame.len());
    let mut read = Messages::new(&message);
    let Some(Ok(Message::Packet(packet))) = read.next() else {
        panic!("it is a packet");
    };
    assert_eq!(packet.frame, frame);
    assert_eq!(packet.tasks.vlan, facts.vlan);
    assert_eq!(packet.tasks.checksum.map(|sum| sum.0), checksum);
    assert_eq!(packet.tasks.large_send, None);
    assert!(read.next().is_none());
    if let Some(tag) = facts.vlan {
        assert_eq!(VlanTag::from_tci(tag.tci()).0, tag.0 & 0xFFFF);
    }
}

/// The sum of RFC 1071, word by word.
fn sum(parts: &[&[u8]]) -> u16 {
    let bytes: Vec<u8> = parts.concat();
    let words = bytes.chunks(2).map(|word| {
        let low = word.get(1).copied().unwrap_or(0);
        u64::from(u16::from_be_bytes([word[0], low]))
    });
    let mut sum: u64 = words.sum();
    while sum > 0xFFFF {
        sum = (sum >> 16) + (sum & 0xFFFF);
    }
    sum as u16
}

/// Checks length and checksums of a TCP frame, counted in another way than the host does.
fn check_tcp(frame: &[u8], headers: &Headers) {
    let (transport, at) = headers.transport.expect("somebody looked");
    assert_eq!(transport, Transport::Tcp);
    let network = &frame[headers.network..];
    let (addresses, length, extra) = if network[0] >> 4 == 4 {
        let header = usize::from(network[0] & 0xF) * 4;
        assert_eq!(sum(&[&network[..header]]), 0xFFFF, "the IP header's");
        (&network[12..20], &network[2..4], 0)
    } else {
        (&network[8..40], &network[4..6], 40)
    };
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    assert_eq!(headers.network + extra + length, frame.len());
    let tcp = &frame[at..];
    let pseudo = (tcp.len() as u32 + 6).to_be_bytes();
    assert_eq!(sum(&[addresses, &pseudo, tcp]), 0xFFFF, "TCP's");
}

fn checksums(mut bytes: Vec<u8>, wanted: u32) {
    let before = bytes.clone();
    let done = fill_checksums(&mut bytes, TransmitChecksum(wanted));
    assert_eq!(bytes.len(), before.len());
    let all = 0b11100;
    if done.is_ok()
        && wanted & all == all
        && let Some(headers) = Headers::find(&bytes)
    {
        let found = verify_checksums(&bytes, &headers);
        let wrong = ReceiveChecksum::TCP_FAILED
            .and(ReceiveChecksum::UDP_FAILED)
            .and(ReceiveChecksum::IP_FAILED);
        assert!(
            found.is_none_or(|found| found.0 & wrong.0 == 0),
            "{found:?}"
        );
    }
}

/// Together the segments are the frame, and each is sound.
fn cut(bytes: &[u8], size: usize) {
    let mut buffer = Vec::new();
    let mut data = Vec::new();
    let mut count = 0;
    let headers = Headers::find(bytes);
    let done = segment(bytes, size, &mut buffer, |piece| {
        let headers = headers.expect("it has headers");
        let (_, at) = headers.transport.expect("it is TCP");
        let part = &piece[headers.payload..];
        assert!(part.len() <= size);
        let sequence = |frame: &[u8]| {
            frame[at + 4..]
                .first_chunk()
                .copied()
                .map(u32::from_be_bytes)
        };
        let place = sequence(bytes).map(|first| first.wrapping_add(data.len() as u32));
        assert_eq!(sequence(piece), place, "the place of its data");
        let is_last = data.len() + part.len() == bytes.len() - headers.payload;
        let kept = if is_last { 0x09 } else { 0 } | if count == 0 { 0x80 } else { 0 } | 0x76;
        assert_eq!(piece[at + 13], bytes[at + 13] & kept, "its flags");
        check_tcp(piece, &headers);
        data.extend_from_slice(part);
        count += 1;
    });
    match done {
        Ok(()) => {
            let headers = headers.expect("it has headers");
            assert!(size >= MIN_SEGMENT);
            assert_eq!(data, &bytes[headers.payload..], "nothing is lost");
        }
        Err(_) => assert_eq!(count, 0, "nothing was handed out"),
    }
}

/// The objects of a card, and what frames they let in.
struct Objects {
    adapter: Adapter,
    channels: u16,
}

impl Objects {
    fn new(version: u8) -> Self {
        let nic: Arc<Nic> =
            Nic::new(Config::new("net0", MAC), Nowhere).expect("there can be such a card");
        let version = nvsp::Version::ALL[usize::from(version) % nvsp::Version::ALL.len()];
        let negotiated = Negotiated {
            version,
            frame: 1514,
            channels: 1,
        };
        Self {
            adapter: Adapter::new(nic, negotiated),
            channels: 1,
        }
    }

    fn query(&self, object: u8, input: &[u8]) {
        let object = oid::ALL[usize::from(object) % oid::ALL.len()];
        if let Ok(value) = self.adapter.query(object, input) {
            assert!(value.len() <= ANSWER, "{object:#x} fits");
        }
    }

    fn set(&mut self, object: u8, input: &[u8]) {
        let object = oid::ALL[usize::from(object) % oid::ALL.len()];
        let before = self.adapter.query(object, &[]);
        let done = self.adapter.set(object, input);
        let after = self.adapter.query(object, &[]);
        assert!(done.is_ok() || before == after, "refused, and set");
        if let Some(rss) = self.adapter.rss() {
            for hash in [0, 1, 127, 128, u32::MAX] {
                assert!(rss.queue(hash) < self.channels, "there is such a queue");
            }
        }
    }

    fn arrive(&self, sort: u8, data: u16, spice: u8) {
        let to = [MAC, PEER, [0xFF; 6], [1, 0, 0x5E, 0, 0, 1]][usize::from(spice % 4)];
        let frame = frame(sort, [to, PEER], usize::from(data), spice);
        let wanted = self.adapter.wants(&frame);
        assert!(!wanted || self.adapter.filter().0 != 0);
        let (Some(headers), Some(rss)) = (Headers::find(&frame), self.adapter.rss()) else {
            return;
        };
        let hash = rss.hash(&frame, &headers);
        assert!(hash.is_none_or(|hash| rss.queue(hash) < self.channels));
    }
}

/// A network card's messages, objects and frames. The first byte chooses the version.
pub fn rndis(data: &[u8]) {
    let Some((version, data)) = data.split_first() else {
        return;
    };
    messages(data);
    let mut objects = Objects::new(*version);
    let mut left = DATA;
    for step in steps::<Step<'_>>(data) {
        let Some(rest) = left.checked_sub(step.data()) else {
            break;
        };
        left = rest;
        match step {
            Step::Messages(bytes) => messages(bytes),
            Step::Nvsp(bytes) => drop(nvsp::Request::parse(bytes)),
            Step::Deliver(facts, frame) => deliver(facts, frame),
            Step::Query(object, input) => objects.query(object, input),
            Step::Set(object, input) => objects.set(object, input),
            Step::Channels(channels) => {
                // As a session does: once, and more of them.
                objects.channels = objects.channels.max(u16::from(channels % 64) + 1);
                objects.adapter.set_channels(objects.channels);
            }
            Step::Arrive(sort, data, spice) => objects.arrive(sort, data, spice),
            Step::Checksums(made, wanted) => checksums(made.frame(), wanted),
            Step::Segment(made, size) => cut(&made.frame(), size as usize),
            Step::Whole(made) => {
                let mut bytes = made.frame();
                if resize_large(&mut bytes).is_ok() {
                    let headers = Headers::find(&bytes).expect("it has headers");
                    check_tcp(&bytes, &headers);
                }
            }
            Step::Tag(made, tag) => {
                let before = made.frame();
                let mut bytes = before.clone();
                insert_tag(&mut bytes, VlanTag(tag));
                if before.len() >= 12 {
                    let tag = VlanTag(tag & 0xFFFF);
                    assert_eq!(strip_tag(&mut bytes), Some(tag));
                }
                assert_eq!(bytes, before);
            }
        }
    }
}
