//! The producing end of a ring.

use core::fmt;

use super::packet::Outgoing;
use super::{Ring, RingError, Signal};
use crate::atomics::{Ordering, fence};
use crate::shared::OutOfBounds;

/// The producing end: writes packets, and says when the consumer must be signalled.
///
/// Packets pushed one after the other become visible together at [`publish`](Self::publish): one
/// update of the producer offset and at most one signal (spec vmbus.md 6.3).
#[derive(Debug)]
pub struct Writer {
    ring: Ring,
    /// Where the next packet goes. Kept here: what the shared page says of it does not matter.
    producer: u32,
    /// The producer offset that the consumer can see.
    published: u32,
    /// The last consumer offset that was read; the true one can only be further on.
    consumer: u32,
    /// Whether the pending send size is set.
    waiting: bool,
}

/// Why a packet was not pushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PushError {
    /// There is no room now.
    Full {
        /// The free bytes that the packet needs.
        need: u32,
    },
    /// The packet does not fit the ring, or the length field of a packet, even when the ring is empty.
    TooLarge {
        /// The free bytes that the packet would need.
        need: u64,
        /// The most that any packet may need in this ring.
        limit: u32,
    },
    /// The ring is broken.
    Ring(RingError),
}

impl fmt::Display for PushError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { need } => write!(f, "the ring has no {need} bytes free"),
            Self::TooLarge { need, limit } => {
                write!(
                    f,
                    "a packet that needs {need} bytes, where at most {limit} fit"
                )
            }
            Self::Ring(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for PushError {}

impl From<RingError> for PushError {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

/// What [`Writer::wait_for`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Room {
    /// There is room by now; nobody will signal.
    Available,
    /// The consumer will signal when there is room.
    Awaited,
}

impl Writer {
    /// The producing end of an empty, zeroed ring.
    ///
    /// Announces that this side, as a consumer, signals a producer that waits for room.
    pub fn new(ring: Ring) -> Result<Self, RingError> {
        ring.control().announce_pending_send_size()?;
        Ok(Self {
            ring,
            producer: 0,
            published: 0,
            consumer: 0,
            waiting: false,
        })
    }

    /// The largest packet that fits at all, footer included.
    pub fn largest_packet(&self) -> u32 {
        self.ring.largest_packet()
    }

    /// Writes one packet behind those pushed before. The consumer sees it after
    /// [`publish`](Self::publish). On an error the ring is as before.
    pub fn push(&mut self, packet: &Outgoing<'_>) -> Result<(), PushError> {
        let limit = self.ring.largest_packet();
        let need = packet.footprint();
        let length = match u32::try_from(need) {
            Ok(short) if short <= limit => short,
            _ => return Err(PushError::TooLarge { need, limit }),
        };
        if !self.has_room(length)? {
            return Err(PushError::Full { need: length });
        }

        let start = self.producer;
        self.producer = self.write(packet, start).map_err(RingError::from)?;
        debug_assert_eq!(self.producer, self.ring.advance(start, length));
        Ok(())
    }

    /// Writes the packet and its footer at `start`; gives the offset behind.
    fn write(&self, packet: &Outgoing<'_>, start: u32) -> Result<u32, OutOfBounds> {
        let mut at = start;
        for word in packet.head() {
            at = self.ring.write_word(at, word)?;
        }
        if let Some((header, ranges)) = packet.ranges() {
            at = self.ring.write_word(at, header)?;
            at = self.ring.write_padded(at, ranges)?;
        }
        let [first, second] = packet.payload();
        at = if second.is_empty() {
            self.ring.write_padded(at, first)?
        } else if first.len().is_multiple_of(8) {
            at = self.ring.write(at, first)?;
            self.ring.write_padded(at, second)?
        } else {
            at = self.ring.write(at, first)?;
            at = self.ring.write(at, second)?;
            let length = first.len() + second.len();
            self.ring
                .write(at, &[0; 8][..length.next_multiple_of(8) - length])?
        };
        let footer = u64::from(start) << 32;
        self.ring.write_word(at, footer.to_le_bytes())
    }

    /// Makes the pushed packets visible, and decides about the signal.
    pub fn publish(&mut self) -> Result<Signal, RingError> {
        let before = self.published;
        if self.producer == before {
            return Ok(Signal::NotNeeded);
        }
        let control = self.ring.control();
        control.set_producer(self.producer)?;
        self.published = self.producer;
        // The offset must be visible before the mask and the consumer's offset are read: a
        // consumer that goes to sleep writes them first and looks at the producer's offset after.
        fence(Ordering::SeqCst);
        if control.interrupt_mask()? {
            return Ok(Signal::NotNeeded);
        }
        self.consumer = control.consumer()?;
        Ok(if self.consumer == before {
            Signal::Needed
        } else {
            Signal::NotNeeded
        })
    }

    /// Asks the consumer for a signal once `need` bytes are free, unless they are free already.
    ///
    /// Packets pushed before must have been published, or the consumer could never make room.
    /// Only for a consumer that [supports it](Ring::producer_signals_room).
    pub fn wait_for(&mut self, need: u32) -> Result<Room, RingError> {
        debug_assert_eq!(self.producer, self.published);
        self.ring.control().set_pending_send_size(need)?;
        self.waiting = true;
        // The consumer frees room first and looks at the pending size after; so the other way here.
        fence(Ordering::SeqCst);
        self.consumer = self.ring.control().consumer()?;
        if self.ring.free(self.producer, self.consumer) >= need {
            self.stop_waiting()?;
            return Ok(Room::Available);
        }
        Ok(Room::Awaited)
    }

    /// Withdraws what [`wait_for`](Self::wait_for) asked. Costs nothing when nothing was asked.
    pub fn stop_waiting(&mut self) -> Result<(), RingError> {
        if self.waiting {
            self.ring.control().set_pending_send_size(0)?;
            self.waiting = false;
        }
        Ok(())
    }

    /// Whether the consumer has read everything that it can see.
    pub fn is_drained(&self) -> Result<bool, RingError> {
        Ok(self.ring.control().consumer()? == self.published)
    }

    /// Whether `need` bytes are free; reads the consumer's offset only when the last one that was
    /// read does not suffice.
    fn has_room(&mut self, need: u32) -> Result<bool, RingError> {
        if self.ring.free(self.producer, self.consumer) >= need {
            return Ok(true);
        }
        self.consumer = self.ring.control().consumer()?;
        Ok(self.ring.free(self.producer, self.consumer) >= need)
    }
}
