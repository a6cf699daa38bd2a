//! RNDIS messages as netvsc uses them: control requests with their answers, frames with per-packet information, and status
//! indications (spec netvsc.md 7).

use alloc::vec::Vec;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Message types.
pub mod kind {
    /// A frame.
    pub const PACKET: u32 = 1;
    /// Begins everything.
    pub const INITIALIZE: u32 = 2;
    /// Ends everything.
    pub const HALT: u32 = 3;
    /// Asks for the value of an object.
    pub const QUERY: u32 = 4;
    /// Sets the value of an object.
    pub const SET: u32 = 5;
    /// Sets everything back.
    pub const RESET: u32 = 6;
    /// Something has happened.
    pub const INDICATE_STATUS: u32 = 7;
    /// Are you there?
    pub const KEEPALIVE: u32 = 8;
    /// With this bit a message is the answer to the one without it.
    pub const COMPLETE: u32 = 1 << 31;
}

/// A status code of NDIS.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(pub u32);

impl Status {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// Not done.
    pub const FAILURE: Self = Self(0xC000_0001);
    /// Not to be had here.
    pub const NOT_SUPPORTED: Self = Self(0xC000_00BB);
    /// The data makes no sense.
    pub const INVALID_DATA: Self = Self(0xC001_0015);
    /// The data is too short.
    pub const INVALID_LENGTH: Self = Self(0xC001_0014);
    /// The protocol's version is another.
    pub const BAD_VERSION: Self = Self(0xC001_0004);
}

/// Something that the host tells unasked (spec netvsc.md 7.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Indication(pub u32);

impl Indication {
    /// The link is up.
    pub const MEDIA_CONNECT: Self = Self(0x4001_000B);
    /// The link is down.
    pub const MEDIA_DISCONNECT: Self = Self(0x4001_000C);
    /// What the network can do has changed: as if the link went down and up.
    pub const NETWORK_CHANGE: Self = Self(0x4001_0018);
    /// The offloads that are on have changed.
    pub const OFFLOAD_CONFIG: Self = Self(0x4002_0006);
}

/// In front of every message.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Header {
    kind: U32,
    length: U32,
}

/// Bytes of the header.
const HEADER: usize = 8;

/// What follows the header of a PACKET. Offsets count from its beginning.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct PacketBody {
    data_offset: U32,
    data_length: U32,
    oob_offset: U32,
    oob_length: U32,
    oob_count: U32,
    info_offset: U32,
    info_length: U32,
    _vc_handle: U32,
    _reserved: U32,
}

/// Bytes of a PACKET in front of its per-packet information.
pub const PACKET_HEADER: usize = HEADER + size_of::<PacketBody>();

/// What follows the header of a QUERY or a SET. The offset counts from its beginning.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct ObjectBody {
    id: U32,
    oid: U32,
    length: U32,
    offset: U32,
    _vc_handle: U32,
}

/// What follows the header of an INITIALIZE.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct InitializeBody {
    id: U32,
    major: U32,
    minor: U32,
    max_transfer: U32,
}

/// In front of each element of per-packet information.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct InfoHeader {
    size: U32,
    kind: U32,
    offset: U32,
}

/// Bytes of an element of per-packet information with one number in it.
pub const INFO: usize = size_of::<InfoHeader>() + 4;

const _: () = assert!(size_of::<Header>() == HEADER);
const _: () = assert!(size_of::<PacketBody>() == 36);
const _: () = assert!(size_of::<ObjectBody>() == 20);
const _: () = assert!(size_of::<InitializeBody>() == 16);
const _: () = assert!(INFO == 16);

/// Types of per-packet information.
mod info {
    pub const CHECKSUM: u32 = 0;
    pub const LARGE_SEND: u32 = 2;
    pub const VLAN: u32 = 6;
    pub const HASH: u32 = 8;
}

/// A message that contradicts itself: lengths or offsets that lead out of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed;

/// A guest's message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Message<'a> {
    /// A frame to send.
    Packet(Packet<'a>),
    /// Begins everything.
    Initialize {
        /// Repeated by the answer.
        id: u32,
        /// The guest's version: 1.
        major: u32,
        /// 0.
        minor: u32,
    },
    /// Ends everything.
    Halt,
    /// Asks for the value of an object.
    Query {
        /// Repeated by the answer.
        id: u32,
        /// Which object.
        oid: u32,
        /// What the object wants to know first; mostly nothing.
        input: &'a [u8],
    },
    /// Sets the value of an object.
    Set {
        /// Repeated by the answer.
        id: u32,
        /// Which object.
        oid: u32,
        /// The value.
        input: &'a [u8],
    },
    /// Sets everything back.
    Reset,
    /// Are you there?
    Keepalive {
        /// Repeated by the answer.
        id: u32,
    },
    /// A message that the host answers to no one, such as the answer to a question that it never asked.
    Other(u32),
}

/// A frame to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet<'a> {
    /// Ethernet header and what follows it.
    pub frame: &'a [u8],
    /// What is left to do with it.
    pub tasks: Tasks,
}

/// What a guest leaves to the host, from a frame's per-packet information (spec netvsc.md 7.3).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Tasks {
    /// Which checksums to compute.
    pub checksum: Option<TransmitChecksum>,
    /// How to cut the frame.
    pub large_send: Option<LargeSend>,
    /// The tag to put into it.
    pub vlan: Option<VlanTag>,
}

/// Which checksums the host computes: bit 0 IPv4, 1 IPv6, 2 TCP, 3 UDP, 4 IP header, 25:16 offset of the TCP or UDP header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TransmitChecksum(pub u32);

impl TransmitChecksum {
    /// The TCP checksum.
    pub fn tcp(self) -> bool {
        self.0 & 1 << 2 != 0
    }

    /// The UDP checksum.
    pub fn udp(self) -> bool {
        self.0 & 1 << 3 != 0
    }

    /// The checksum of the IPv4 header.
    pub fn ip(self) -> bool {
        self.0 & 1 << 4 != 0
    }
}

/// How a TCP frame is cut: bits 19:0 the bytes of data in each, 29:20 offset of the TCP header, 30 version 2, 31 IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LargeSend(pub u32);

impl LargeSend {
    /// Bytes of TCP data in each frame. With version 1 this is the same place.
    pub fn segment(self) -> usize {
        (self.0 & 0xF_FFFF) as usize
    }
}

/// The tag of a VLAN in NDIS's order: bits 2:0 priority, 3 drop eligible, 15:4 VLAN id.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VlanTag(pub u32);

impl VlanTag {
    /// The tag whose control information in a frame is `tci`.
    pub fn from_tci(tci: u16) -> Self {
        let tci = u32::from(tci);
        Self((tci & 0xFFF) << 4 | (tci >> 12 & 1) << 3 | tci >> 13)
    }

    /// Control information as it stands in a frame: bits 15:13 priority, 12 drop eligible, 11:0 VLAN id.
    pub fn tci(self) -> u16 {
        let tci = (self.0 & 7) << 13 | (self.0 >> 3 & 1) << 12 | (self.0 >> 4 & 0xFFF);
        // 16 bits by construction.
        tci as u16
    }
}

/// What the host found out about a frame's checksums.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ReceiveChecksum(pub u32);

impl ReceiveChecksum {
    /// The TCP checksum is wrong.
    pub const TCP_FAILED: Self = Self(1);
    /// The UDP checksum is wrong.
    pub const UDP_FAILED: Self = Self(1 << 1);
    /// The IP header's checksum is wrong.
    pub const IP_FAILED: Self = Self(1 << 2);
    /// The TCP checksum is right.
    pub const TCP_GOOD: Self = Self(1 << 3);
    /// The UDP checksum is right.
    pub const UDP_GOOD: Self = Self(1 << 4);
    /// The IP header's checksum is right.
    pub const IP_GOOD: Self = Self(1 << 5);

    /// Both statements.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What the host tells about a frame that it delivers.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Facts {
    /// Its checksums.
    pub checksum: Option<ReceiveChecksum>,
    /// The tag that it had.
    pub vlan: Option<VlanTag>,
    /// Its RSS hash.
    pub hash: Option<u32>,
}

/// The messages that lie one behind the other in the data of one NVSP packet.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    /// The messages in `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn cut(&mut self) -> Result<Message<'a>, Malformed> {
        let (header, _) = Header::ref_from_prefix(self.rest).map_err(|_| Malformed)?;
        let length = header.length.get() as usize;
        // A message holds its header at least, else this would not end.
        let (message, rest) = self
            .rest
            .split_at_checked(length.max(HEADER))
            .ok_or(Malformed)?;
        let body = message.get(HEADER..length).ok_or(Malformed)?;
        let message = Message::parse(header.kind.get(), body)?;
        self.rest = rest;
        Ok(message)
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        // What is shorter than a header is padding: packets are padded to 8 bytes.
        if self.rest.len() < HEADER {
            return None;
        }
        let message = self.cut();
        if message.is_err() {
            self.rest = &[];
        }
        Some(message)
    }
}

impl<'a> Message<'a> {
    fn parse(kind: u32, body: &'a [u8]) -> Result<Self, Malformed> {
        Ok(match kind {
            kind::PACKET => Self::Packet(Packet::parse(body)?),
            kind::INITIALIZE => {
                let (request, _) = InitializeBody::ref_from_prefix(body).map_err(|_| Malformed)?;
                Self::Initialize {
                    id: request.id.get(),
                    major: request.major.get(),
                    minor: request.minor.get(),
                }
            }
            kind::HALT => Self::Halt,
            kind::QUERY => {
                let (id, oid, input) = object(body)?;
                Self::Query { id, oid, input }
            }
            kind::SET => {
                let (id, oid, input) = object(body)?;
                Self::Set { id, oid, input }
            }
            kind::RESET => Self::Reset,
            kind::KEEPALIVE => {
                let (id, _) = U32::ref_from_prefix(body).map_err(|_| Malformed)?;
                Self::Keepalive { id: id.get() }
            }
            other => Self::Other(other),
        })
    }
}

/// Request id, OID and data of a QUERY or SET.
fn object(body: &[u8]) -> Result<(u32, u32, &[u8]), Malformed> {
    let (request, _) = ObjectBody::ref_from_prefix(body).map_err(|_| Malformed)?;
    // No data lies nowhere, whatever the offset says.
    let input = match request.length.get() {
        0 => &[],
        length => slice(body, request.offset.get(), length)?,
    };
    Ok((request.id.get(), request.oid.get(), input))
}

/// `length` bytes from `offset` of `bytes`.
fn slice(bytes: &[u8], offset: u32, length: u32) -> Result<&[u8], Malformed> {
    let (offset, length) = (offset as usize, length as usize);
    let end = offset.checked_add(length).ok_or(Malformed)?;
    bytes.get(offset..end).ok_or(Malformed)
}

impl<'a> Packet<'a> {
    fn parse(body: &'a [u8]) -> Result<Self, Malformed> {
        let (packet, _) = PacketBody::ref_from_prefix(body).map_err(|_| Malformed)?;
        let frame = slice(body, packet.data_offset.get(), packet.data_length.get())?;
        let tasks = match packet.info_length.get() {
            0 => Tasks::default(),
            length => Tasks::parse(slice(body, packet.info_offset.get(), length)?)?,
        };
        Ok(Self { frame, tasks })
    }
}

impl Tasks {
    fn parse(mut elements: &[u8]) -> Result<Self, Malformed> {
        let mut tasks = Self::default();
        while !elements.is_empty() {
            let (header, _) = InfoHeader::ref_from_prefix(elements).map_err(|_| Malformed)?;
            let size = (header.size.get() as usize).max(size_of::<InfoHeader>());
            let (element, rest) = elements.split_at_checked(size).ok_or(Malformed)?;
            elements = rest;
            let payload = element
                .get(header.offset.get() as usize..)
                .ok_or(Malformed)?;
            let value = || match U32::ref_from_prefix(payload) {
                Ok((value, _)) => Ok(value.get()),
                Err(_) => Err(Malformed),
            };
            match header.kind.get() {
                info::CHECKSUM => tasks.checksum = Some(TransmitChecksum(value()?)),
                info::LARGE_SEND => tasks.large_send = Some(LargeSend(value()?)),
                info::VLAN => tasks.vlan = Some(VlanTag(value()?)),
                // Guests say more than anybody wants to know.
                _ => {}
            }
        }
        Ok(tasks)
    }
}

/// Writes the message that delivers `frame` into `message`, in place of what it held.
pub fn write_packet(message: &mut Vec<u8>, frame: &[u8], facts: &Facts) {
    let elements = [
        (info::CHECKSUM, facts.checksum.map(|checksum| checksum.0)),
        (info::VLAN, facts.vlan.map(|tag| tag.0)),
        (info::HASH, facts.hash),
    ];
    let present = elements.iter().filter(|(_, value)| value.is_some());
    let info_length = present.count() * INFO;
    let body = size_of::<PacketBody>();
    let length = HEADER + body + info_length + frame.len();
    let header = Header {
        kind: U32::new(kind::PACKET),
        length: number(length),
    };
    let packet = PacketBody {
        data_offset: number(body + info_length),
        data_length: number(frame.len()),
        oob_offset: U32::ZERO,
        oob_length: U32::ZERO,
        oob_count: U32::ZERO,
        info_offset: number(if info_length == 0 { 0 } else { body }),
        info_length: number(info_length),
        _vc_handle: U32::ZERO,
        _reserved: U32::ZERO,
    };
    message.clear();
    message.reserve(length);
    message.extend_from_slice(header.as_bytes());
    message.extend_from_slice(packet.as_bytes());
    for (kind, value) in elements {
        let Some(value) = value else { continue };
        let element = InfoHeader {
            size: number(INFO),
            kind: U32::new(kind),
            offset: number(size_of::<InfoHeader>()),
        };
        message.extend_from_slice(element.as_bytes());
        message.extend_from_slice(&value.to_le_bytes());
    }
    message.extend_from_slice(frame);
}

/// A length of a message of ours, which is far below 4 GiB.
fn number(length: usize) -> U32 {
    U32::new(u32::try_from(length).unwrap_or(u32::MAX))
}

fn message(kind: u32, fields: &[u32], data: &[u8]) -> Vec<u8> {
    let length = HEADER + 4 * fields.len() + data.len();
    let mut bytes = Vec::with_capacity(length);
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(number(length).as_bytes());
    for field in fields {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}

/// What the host tells about itself in answer to INITIALIZE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Frames that may lie in one NVSP packet.
    pub max_packets: u32,
    /// Bytes of all of them.
    pub max_transfer: u32,
    /// Each begins at a multiple of two to this power.
    pub alignment: u32,
}

/// Answers INITIALIZE.
pub fn initialize_complete(id: u32, status: Status, limits: Limits) -> Vec<u8> {
    const CONNECTIONLESS: u32 = 1;
    const MEDIUM_802_3: u32 = 0;
    let fields = [
        id,
        status.0,
        1,
        0,
        CONNECTIONLESS,
        MEDIUM_802_3,
        limits.max_packets,
        limits.max_transfer,
        limits.alignment,
        0,
        0,
    ];
    message(kind::INITIALIZE | kind::COMPLETE, &fields, &[])
}

/// Answers QUERY.
pub fn query_complete(id: u32, answer: Result<&[u8], Status>) -> Vec<u8> {
    /// From the request id to behind the fields.
    const OFFSET: u32 = 16;
    let (status, data) = match answer {
        Ok(data) => (Status::SUCCESS, data),
        Err(status) => (status, &[][..]),
    };
    let offset = if data.is_empty() { 0 } else { OFFSET };
    let fields = [id, status.0, number(data.len()).get(), offset];
    message(kind::QUERY | kind::COMPLETE, &fields, data)
}

/// Answers SET.
pub fn set_complete(id: u32, status: Status) -> Vec<u8> {
    message(kind::SET | kind::COMPLETE, &[id, status.0], &[])
}

/// Answers RESET; the guest has to set its addresses and filter again.
pub fn reset_complete(status: Status) -> Vec<u8> {
    message(kind::RESET | kind::COMPLETE, &[status.0, 1], &[])
}

/// Answers KEEPALIVE.
pub fn keepalive_complete(id: u32) -> Vec<u8> {
    message(
        kind::KEEPALIVE | kind::COMPLETE,
        &[id, Status::SUCCESS.0],
        &[],
    )
}

/// Tells that something has happened.
pub fn indicate_status(indication: Indication, data: &[u8]) -> Vec<u8> {
    /// From the status field to behind the fields.
    const OFFSET: u32 = 12;
    let offset = if data.is_empty() { 0 } else { OFFSET };
    let fields = [indication.0, number(data.len()).get(), offset];
    message(kind::INDICATE_STATUS, &fields, data)
}

#[cfg(test)]
mod tests;
