//! What can be wrong with a ring.

use core::fmt;

use crate::shared::OutOfBounds;

/// A ring that cannot be used any more, and why: the other end broke the rules, or memory is missing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RingError {
    /// The producer offset in the control page lies outside the ring or is no multiple of 8.
    ProducerOffset(u32),
    /// The consumer offset in the control page lies outside the ring or is no multiple of 8.
    ConsumerOffset(u32),
    /// Fewer bytes are there than the smallest packet has.
    Truncated {
        /// Bytes between the offsets.
        available: u32,
    },
    /// A packet is longer than what the producer has written.
    Length {
        /// The length that the descriptor tells, footer included, in bytes.
        length: u32,
        /// Bytes between the offsets.
        available: u32,
    },
    /// A packet's data begins inside its descriptor or behind its end.
    DataOffset {
        /// Where the data begins, in bytes from the packet's start.
        offset: u32,
        /// The packet's length in bytes, without footer.
        length: u32,
    },
    /// A packet type that no end of a channel may send.
    Kind(u16),
    /// A list of ranges that does not fit its packet or its pages.
    Ranges,
    /// The memory is too short for a ring, or too long.
    Memory,
    /// No memory for the private copy of a packet.
    OutOfMemory {
        /// Bytes that were needed.
        bytes: usize,
    },
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ProducerOffset(at) => write!(f, "producer offset {at:#x} is not in the ring"),
            Self::ConsumerOffset(at) => write!(f, "consumer offset {at:#x} is not in the ring"),
            Self::Truncated { available } => {
                write!(f, "{available} bytes are too few for a packet")
            }
            Self::Length { length, available } => {
                write!(
                    f,
                    "a packet of {length} bytes where {available} were written"
                )
            }
            Self::DataOffset { offset, length } => {
                write!(f, "packet data at {offset} in a packet of {length} bytes")
            }
            Self::Kind(kind) => write!(f, "packet type {kind:#x} is not one of a channel"),
            Self::Ranges => f.write_str("a range list does not fit its packet"),
            Self::Memory => f.write_str("the ring memory has an impossible size"),
            Self::OutOfMemory { bytes } => write!(f, "no memory for a packet of {bytes} bytes"),
        }
    }
}

impl core::error::Error for RingError {}

impl From<OutOfBounds> for RingError {
    fn from(_: OutOfBounds) -> Self {
        Self::Memory
    }
}
