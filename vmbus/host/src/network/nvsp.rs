//! NVSP messages byte for byte: what a guest's network client and the host's switch say about versions, buffers, sub-channels
//! and single RNDIS messages (spec netvsc.md 2 and 3).

use alloc::vec::Vec;
use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A protocol version as it stands on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

impl Version {
    /// The base protocol.
    pub const V1: Self = Self(0x0_0002);
    /// Adds the NDIS configuration: MTU and VLAN.
    pub const V2: Self = Self(0x3_0002);
    /// Adds virtual functions; NDIS 6.1 offloads.
    pub const V4: Self = Self(0x4_0000);
    /// Adds sub-channels and the send indirection table; NDIS 6.30.
    pub const V5: Self = Self(0x5_0000);
    /// Adds PacketDirect, which nobody uses.
    pub const V6: Self = Self(0x6_0000);
    /// Adds segments coalesced by the host; messages of 40 bytes.
    pub const V6_1: Self = Self(0x6_0001);

    /// All versions, newest first: the order in which guests try them.
    pub const ALL: [Self; 6] = [Self::V6_1, Self::V6, Self::V5, Self::V4, Self::V2, Self::V1];

    /// Whether this is one of the versions that exist.
    pub fn is_known(self) -> bool {
        Self::ALL.contains(&self)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::V1 => f.write_str("1"),
            Self::V2 => f.write_str("2"),
            Self::V4 => f.write_str("4"),
            Self::V5 => f.write_str("5"),
            Self::V6 => f.write_str("6"),
            Self::V6_1 => f.write_str("6.1"),
            Self(other) => write!(f, "{other:#x}"),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The result that an answer carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(pub u32);

impl Status {
    /// What OpenVMM answers to a version that it does not know.
    pub const NONE: Self = Self(0);
    /// Done.
    pub const SUCCESS: Self = Self(1);
    /// Not done.
    pub const FAILURE: Self = Self(2);
    /// The RNDIS message in the packet makes no sense.
    pub const INVALID_RNDIS_PACKET: Self = Self(5);
}

/// Message types.
pub mod kind {
    /// Offers a version.
    pub const INIT: u32 = 1;
    /// Answers [`INIT`].
    pub const INIT_COMPLETE: u32 = 2;
    /// The guest's NDIS version.
    pub const SEND_NDIS_VERSION: u32 = 100;
    /// Lends the receive buffer.
    pub const SEND_RECEIVE_BUFFER: u32 = 101;
    /// How the host divides it.
    pub const SEND_RECEIVE_BUFFER_COMPLETE: u32 = 102;
    /// Wants the receive buffer back.
    pub const REVOKE_RECEIVE_BUFFER: u32 = 103;
    /// Lends the send buffer.
    pub const SEND_SEND_BUFFER: u32 = 104;
    /// The size of its sections.
    pub const SEND_SEND_BUFFER_COMPLETE: u32 = 105;
    /// Wants the send buffer back.
    pub const REVOKE_SEND_BUFFER: u32 = 106;
    /// Carries RNDIS messages.
    pub const SEND_RNDIS_PACKET: u32 = 107;
    /// Answers [`SEND_RNDIS_PACKET`].
    pub const SEND_RNDIS_PACKET_COMPLETE: u32 = 108;
    /// MTU and capabilities.
    pub const SEND_NDIS_CONFIG: u32 = 125;
    /// Moves the traffic to or from a virtual function.
    pub const SWITCH_DATA_PATH: u32 = 129;
    /// Asks for sub-channels, and the answer.
    pub const SUB_CHANNEL: u32 = 133;
    /// Which channel the guest should send on, by hash.
    pub const SEND_INDIRECTION_TABLE: u32 = 134;
}

/// What an RNDIS packet carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Traffic(pub u32);

impl Traffic {
    /// Frames.
    pub const DATA: Self = Self(0);
    /// Everything else.
    pub const CONTROL: Self = Self(1);
}

/// "No section": the data is in the packet's pages.
pub const NO_SECTION: u32 = u32::MAX;

/// Capability bit of the NDIS configuration: the guest takes VLAN tags out of band.
pub const CAPABILITY_8021Q: u64 = 1 << 3;

/// INIT, behind the type.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Init {
    min: U32,
    max: U32,
}

/// SEND_NDIS_CONFIG, behind the type.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct NdisConfig {
    frame: U32,
    _reserved: U32,
    capabilities: U64,
}

/// SEND_RECEIVE_BUFFER and SEND_SEND_BUFFER, behind the type.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Buffer {
    gpadl: U32,
    id: U16,
    _reserved: U16,
}

/// SEND_RNDIS_PACKET, behind the type.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct RndisPacket {
    traffic: U32,
    section: U32,
    section_size: U32,
}

/// Two numbers, which is what most messages are.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Pair {
    first: U32,
    second: U32,
}

const _: () = assert!(size_of::<Init>() == 8);
const _: () = assert!(size_of::<NdisConfig>() == 16);
const _: () = assert!(size_of::<Buffer>() == 8);
const _: () = assert!(size_of::<RndisPacket>() == 12);
const _: () = assert!(size_of::<Pair>() == 8);

/// A part of the send buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Section {
    /// Which one.
    pub index: u32,
    /// Bytes used in it.
    pub bytes: u32,
}

/// What a guest says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// Offers the versions from `min` to `max`, which are the same.
    Init {
        /// The oldest version.
        min: Version,
        /// The newest version.
        max: Version,
    },
    /// The guest's NDIS version.
    NdisVersion {
        /// 6.
        major: u32,
        /// 1 or 0x1E.
        minor: u32,
    },
    /// The longest frame in bytes, Ethernet header included, and capability bits.
    NdisConfig {
        /// Bytes.
        frame: u32,
        /// Bits.
        capabilities: u64,
    },
    /// Lends the receive buffer.
    SendReceiveBuffer {
        /// The GPADL that describes it.
        gpadl: u32,
        /// The transfer page set id.
        id: u16,
    },
    /// Wants it back.
    RevokeReceiveBuffer {
        /// The transfer page set id.
        id: u16,
    },
    /// Lends the send buffer.
    SendSendBuffer {
        /// The GPADL that describes it.
        gpadl: u32,
        /// The buffer's id.
        id: u16,
    },
    /// Wants it back.
    RevokeSendBuffer {
        /// The buffer's id.
        id: u16,
    },
    /// RNDIS messages, in a section, in the packet's pages, or both.
    RndisPacket {
        /// What they carry.
        traffic: Traffic,
        /// Where they begin.
        section: Option<Section>,
    },
    /// Which data path the guest wants: 0 this one, 1 that of a virtual function.
    SwitchDataPath(u32),
    /// Asks for `count` sub-channels, if `operation` is 1.
    SubChannels {
        /// 1.
        operation: u32,
        /// How many.
        count: u32,
    },
    /// A message without a meaning here.
    Unknown(u32),
}

/// A message that is shorter than its type asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooShort;

impl Request {
    /// Reads a guest's message. Bytes behind it are ignored: guests of newer versions send longer ones.
    ///
    /// # Errors
    ///
    /// [`TooShort`], where the message ends before its last field.
    pub fn parse(message: &[u8]) -> Result<Self, TooShort> {
        let (kind, body) = take::<U32>(message)?;
        Ok(match kind.get() {
            kind::INIT => {
                let (init, _) = take::<Init>(body)?;
                Self::Init {
                    min: Version(init.min.get()),
                    max: Version(init.max.get()),
                }
            }
            kind::SEND_NDIS_VERSION => {
                let (version, _) = take::<Pair>(body)?;
                Self::NdisVersion {
                    major: version.first.get(),
                    minor: version.second.get(),
                }
            }
            kind::SEND_NDIS_CONFIG => {
                let (config, _) = take::<NdisConfig>(body)?;
                Self::NdisConfig {
                    frame: config.frame.get(),
                    capabilities: config.capabilities.get(),
                }
            }
            kind::SEND_RECEIVE_BUFFER => {
                let (buffer, _) = take::<Buffer>(body)?;
                Self::SendReceiveBuffer {
                    gpadl: buffer.gpadl.get(),
                    id: buffer.id.get(),
                }
            }
            kind::SEND_SEND_BUFFER => {
                let (buffer, _) = take::<Buffer>(body)?;
                Self::SendSendBuffer {
                    gpadl: buffer.gpadl.get(),
                    id: buffer.id.get(),
                }
            }
            kind::REVOKE_RECEIVE_BUFFER => Self::RevokeReceiveBuffer {
                id: take::<U16>(body)?.0.get(),
            },
            kind::REVOKE_SEND_BUFFER => Self::RevokeSendBuffer {
                id: take::<U16>(body)?.0.get(),
            },
            kind::SEND_RNDIS_PACKET => {
                let (packet, _) = take::<RndisPacket>(body)?;
                let index = packet.section.get();
                Self::RndisPacket {
                    traffic: Traffic(packet.traffic.get()),
                    section: (index != NO_SECTION).then_some(Section {
                        index,
                        bytes: packet.section_size.get(),
                    }),
                }
            }
            kind::SWITCH_DATA_PATH => Self::SwitchDataPath(take::<U32>(body)?.0.get()),
            kind::SUB_CHANNEL => {
                let (request, _) = take::<Pair>(body)?;
                Self::SubChannels {
                    operation: request.first.get(),
                    count: request.second.get(),
                }
            }
            other => Self::Unknown(other),
        })
    }
}

fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(
    bytes: &[u8],
) -> Result<(&T, &[u8]), TooShort> {
    T::ref_from_prefix(bytes).map_err(|_| TooShort)
}

/// How the host divides the receive buffer: one section of equal pieces from its beginning (spec netvsc.md 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Bytes of a piece.
    pub piece: u32,
    /// How many there are.
    pub count: u32,
}

/// Bytes that every message of the host has at least. Those of version 6.1 have 40.
pub fn wire_size(version: Version) -> usize {
    if version >= Version::V6_1 { 40 } else { 28 }
}

fn message(version: Version, kind: u32, fields: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    bytes.extend_from_slice(&kind.to_le_bytes());
    for field in fields {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes.resize(bytes.len().max(wire_size(version)), 0);
    bytes
}

/// The most MDLs that a packet may have, as OpenVMM says it.
const MAX_MDL_CHAIN: u32 = 34;

/// Answers INIT with this version.
pub fn init_complete(version: Version, status: Status) -> Vec<u8> {
    let deprecated = if version == Version::V1 {
        version.0
    } else {
        u32::MAX
    };
    // The guest may speak any version yet, and takes what is not longer than the oldest messages.
    message(
        Version::V1,
        kind::INIT_COMPLETE,
        &[deprecated, MAX_MDL_CHAIN, status.0],
    )
}

/// Answers SEND_RECEIVE_BUFFER. Without a layout the buffer was refused.
pub fn receive_buffer_complete(version: Version, layout: Option<Layout>) -> Vec<u8> {
    let Some(Layout { piece, count }) = layout else {
        let refused = [Status::FAILURE.0, 0];
        return message(version, kind::SEND_RECEIVE_BUFFER_COMPLETE, &refused);
    };
    let end = piece.saturating_mul(count);
    let fields = [Status::SUCCESS.0, 1, 0, piece, count, end];
    message(version, kind::SEND_RECEIVE_BUFFER_COMPLETE, &fields)
}

/// Answers SEND_SEND_BUFFER: the size of a section in bytes, or that the buffer was refused.
pub fn send_buffer_complete(version: Version, section: Option<u32>) -> Vec<u8> {
    let status = section.map_or(Status::FAILURE, |_| Status::SUCCESS);
    let fields = [status.0, section.unwrap_or(0)];
    message(version, kind::SEND_SEND_BUFFER_COMPLETE, &fields)
}

/// Tells the guest that an RNDIS message lies in a piece of its receive buffer. The bytes of one version fit all.
pub fn rndis_packet(traffic: Traffic) -> [u8; 40] {
    let mut bytes = [0; 40];
    let words = [kind::SEND_RNDIS_PACKET, traffic.0, NO_SECTION, 0];
    for (field, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *field = word.to_le_bytes();
    }
    bytes
}

/// Answers SEND_RNDIS_PACKET.
pub fn rndis_packet_complete(status: Status) -> [u8; 28] {
    let mut bytes = [0; 28];
    let words = [kind::SEND_RNDIS_PACKET_COMPLETE, status.0];
    for (field, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *field = word.to_le_bytes();
    }
    bytes
}

/// Answers a request for sub-channels.
pub fn sub_channels_complete(version: Version, status: Status, granted: u32) -> Vec<u8> {
    message(version, kind::SUB_CHANNEL, &[status.0, granted])
}

/// Entries of the table in [`send_indirection_table`]; guests refuse any other number.
pub const SEND_TABLE_ENTRIES: u32 = 16;

/// Where the table lies. Old versions of the protocol have hosts that give a wrong offset, so guests look here when the
/// message is long enough, whatever it says (spec netvsc.md 3). It is right either way.
const SEND_TABLE_OFFSET: u32 = 40;

/// Spreads what the guest sends over these channels, by their indices; over the primary one if there are none.
pub fn send_indirection_table(channels: &[u32]) -> Vec<u8> {
    let head = [SEND_TABLE_ENTRIES, SEND_TABLE_OFFSET];
    let mut bytes = message(Version::V6_1, kind::SEND_INDIRECTION_TABLE, &head);
    let entries = channels
        .iter()
        .cycle()
        .chain(&[0; SEND_TABLE_ENTRIES as usize]);
    for channel in entries.take(SEND_TABLE_ENTRIES as usize) {
        bytes.extend_from_slice(&channel.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_says() {
        let bytes = receive_buffer_complete(
            Version::V5,
            Some(Layout {
                piece: 1806,
                count: 10,
            }),
        );
        let words: Vec<u32> = bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|word| u32::from_le_bytes(*word))
            .collect();
        assert_eq!(words, [102, 1, 1, 0, 1806, 10, 18060]);
        let init = init_complete(Version::V1, Status::SUCCESS);
        assert_eq!(
            init.get(..16),
            Some(&[2, 0, 0, 0, 2, 0, 0, 0, 34, 0, 0, 0, 1, 0, 0, 0][..])
        );
        assert_eq!(init.len(), 28);
        assert_eq!(send_buffer_complete(Version::V6_1, None).len(), 40);
    }

    #[test]
    fn the_send_table_lies_behind_the_longest_message() {
        let bytes = send_indirection_table(&[0, 1, 3]);
        assert_eq!(bytes.len(), 40 + 16 * 4);
        let entry = |index: usize| bytes.get(40 + 4 * index).copied();
        assert_eq!(
            (entry(0), entry(2), entry(3), entry(15)),
            (Some(0), Some(3), Some(0), Some(0))
        );
    }

    #[test]
    fn messages_that_end_too_early_are_refused() {
        let mut config = [0; 20];
        config[0] = 125;
        assert!(Request::parse(&config).is_ok());
        assert_eq!(Request::parse(&config[..19]), Err(TooShort));
        assert_eq!(Request::parse(&[1, 0]), Err(TooShort));
        assert_eq!(Request::parse(&[0xFF; 4]), Ok(Request::Unknown(u32::MAX)));
    }
}
