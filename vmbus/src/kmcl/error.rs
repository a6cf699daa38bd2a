//! Why a channel ended, a packet failed, or a call was refused.

use core::fmt;

use super::OutgoingPacket;
use crate::bus;
use crate::hypervisor::OutOfMemory;
use crate::ring::RingError;

/// Why a channel is not, or no longer, open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChannelError {
    /// The driver disabled it.
    Disabled,
    /// The host took the device away.
    Rescinded,
    /// The channel is being paused: what is sent until it is has no place.
    Pausing,
    /// The primary channel of this sub-channel ends.
    PrimaryClosed,
    /// The guest is leaving VMBus.
    Unloaded,
    /// The host broke the rules of the ring.
    Ring(RingError),
    /// The host sent a pipe message with an impossible header.
    Pipe {
        /// The message type.
        kind: u32,
        /// The length that the header tells, in bytes.
        length: u32,
    },
    /// The driver failed the channel because of a packet.
    Packet(&'static str),
    /// The opened callback refused the channel.
    Refused(Refused),
    /// There is no memory for the rings.
    NoMemory(OutOfMemory),
    /// The bus refused a step of opening it.
    Bus(bus::Error),
    /// The host did not take the ring memory.
    Gpadl(bus::GpadlError),
    /// The host did not open the channel.
    Open(bus::OpenError),
}

impl ChannelError {
    /// Whether nobody did anything wrong: the driver, the host or the guest ended the channel on purpose.
    pub fn is_orderly(self) -> bool {
        matches!(
            self,
            Self::Disabled | Self::Rescinded | Self::PrimaryClosed | Self::Unloaded
        )
    }
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disabled => f.write_str("the driver disabled the channel"),
            Self::Rescinded => f.write_str("the host removed the device"),
            Self::Pausing => f.write_str("the channel is being paused"),
            Self::PrimaryClosed => f.write_str("the primary channel ends"),
            Self::Unloaded => f.write_str("the guest left VMBus"),
            Self::Ring(error) => write!(f, "the host broke the ring: {error}"),
            Self::Pipe { kind, length } => {
                write!(
                    f,
                    "the host sent a pipe message of type {kind} and length {length}"
                )
            }
            Self::Packet(reason) => write!(f, "a packet was refused: {reason}"),
            Self::Refused(Refused(reason)) => write!(f, "the driver refused the channel: {reason}"),
            Self::NoMemory(error) => write!(f, "no memory for the rings: {error}"),
            Self::Bus(error) => error.fmt(f),
            Self::Gpadl(error) => error.fmt(f),
            Self::Open(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for ChannelError {}

impl From<RingError> for ChannelError {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

/// A driver's "no" from its opened callback, with the reason.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused(pub &'static str);

/// How a packet failed that had been accepted for sending.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PacketError {
    /// The channel ended before the packet was sent, or answered (STATUS_DEVICE_REMOVED).
    Removed(ChannelError),
}

impl fmt::Display for PacketError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Removed(reason) => reason.fmt(f),
        }
    }
}

impl core::error::Error for PacketError {}

/// Why a send was refused. The packet is the caller's again, its completion routine does not run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SendFailure {
    /// The channel is suspended or closed.
    NotOpen,
    /// The data is longer than the maximum packet size of the channel.
    TooLong {
        /// Bytes of data.
        length: usize,
        /// The most that the channel was configured for.
        maximum: usize,
    },
    /// The packet with its list of pages does not fit the ring.
    TooLarge {
        /// Bytes that the packet would take.
        need: u64,
        /// The most that a packet may take in this ring.
        limit: u32,
    },
    /// A pipe channel has no transactions and no external data.
    Pipe,
    /// The external data is empty.
    NoExternalData,
    /// More external data than the channel was configured for.
    TooMuchExternalData {
        /// Bytes that were to be lent.
        bytes: usize,
        /// Ranges that they lie in.
        ranges: usize,
        /// The most bytes.
        maximum_bytes: usize,
        /// The most ranges.
        maximum_ranges: usize,
    },
    /// The host broke the ring.
    Ring(RingError),
}

impl fmt::Display for SendFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOpen => f.write_str("the channel is not open"),
            Self::TooLong { length, maximum } => {
                write!(
                    f,
                    "{length} bytes of data, where the channel takes {maximum}"
                )
            }
            Self::TooLarge { need, limit } => {
                write!(f, "a packet of {need} bytes, where the ring takes {limit}")
            }
            Self::Pipe => f.write_str("a pipe has no transactions and no external data"),
            Self::NoExternalData => f.write_str("the external data is empty"),
            Self::TooMuchExternalData {
                bytes,
                ranges,
                maximum_bytes,
                maximum_ranges,
            } => write!(
                f,
                "{bytes} bytes of external data in {ranges} ranges, where the channel takes {maximum_bytes} in {maximum_ranges}"
            ),
            Self::Ring(error) => error.fmt(f),
        }
    }
}

/// A refused send, with the packet.
#[derive(Debug)]
pub struct SendError {
    /// The packet, as it was before the call.
    pub packet: OutgoingPacket,
    /// Why it was not taken.
    pub reason: SendFailure,
}

impl fmt::Display for SendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl core::error::Error for SendError {}

/// Why there is no packet to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocateError {
    /// As many packets exist as the channel was configured for.
    TooMany {
        /// The maximum packet count.
        maximum: usize,
    },
    /// The heap has no room.
    NoMemory,
    /// The channel is in raw mode: the library queues nothing, and the driver writes the ring itself.
    Raw,
}

impl fmt::Display for AllocateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooMany { maximum } => write!(f, "all {maximum} packets are in use"),
            Self::NoMemory => f.write_str("no memory for a packet"),
            Self::Raw => f.write_str("a channel in raw mode has no packets"),
        }
    }
}

impl core::error::Error for AllocateError {}

/// Why a request has no answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestError {
    /// With a time-out of zero: there was no room for it at once. It was not sent (STATUS_BUFFER_OVERFLOW).
    NotQueued,
    /// Its time was over before the host answered (STATUS_CANCELLED).
    Cancelled,
    /// The channel ended before it was sent, or answered (STATUS_DEVICE_REMOVED).
    Removed(ChannelError),
    /// The answer is longer than the place for it (STATUS_BUFFER_OVERFLOW).
    AnswerTooLong {
        /// Bytes of the answer.
        length: usize,
    },
    /// The caller is in a callback that has to return before the answer can come.
    WouldDeadlock,
    /// The caller is at DISPATCH, where nobody may wait.
    WouldBlock,
    /// There is no packet to send it in.
    Allocate(AllocateError),
    /// It can never be sent.
    Send(SendFailure),
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotQueued => f.write_str("there is no room for the packet now"),
            Self::Cancelled => f.write_str("the host did not answer in time"),
            Self::Removed(reason) => reason.fmt(f),
            Self::AnswerTooLong { length } => {
                write!(
                    f,
                    "an answer of {length} bytes, more than there is room for"
                )
            }
            Self::WouldDeadlock => {
                f.write_str("the answer cannot come before this callback has returned")
            }
            Self::WouldBlock => f.write_str("waiting is for PASSIVE, and this is DISPATCH"),
            Self::Allocate(error) => error.fmt(f),
            Self::Send(reason) => reason.fmt(f),
        }
    }
}

impl core::error::Error for RequestError {}
