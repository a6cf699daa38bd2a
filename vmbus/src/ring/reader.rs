//! The consuming end of a ring.

use super::packet::{DESCRIPTOR, Descriptor, Kind, PacketBuffer};
use super::{FOOTER, Ring, RingError, Signal};
use crate::atomics::{Ordering, fence};

/// The consuming end: copies packets out, and says when the producer must be signalled.
///
/// After an error the position in the ring means nothing any more; close the channel.
#[derive(Debug)]
pub struct Reader {
    ring: Ring,
    /// Where the next packet begins. Kept here, not read back from shared memory.
    consumer: u32,
    /// The consumer offset that the producer can see.
    published: u32,
    /// The producer offset up to which packets are known to be there.
    producer: u32,
    /// The descriptor at `consumer`, once it has been read and checked.
    head: Option<Head>,
}

/// The checked descriptor of the packet that is next in the ring.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    pub(super) kind: Kind,
    pub(super) completion_requested: bool,
    pub(super) transaction_id: u64,
    /// Bytes from the descriptor's end to the data.
    pub(super) extra: u32,
    /// Bytes from the descriptor's end to the packet's end, without footer.
    pub(super) rest: u32,
}

impl Head {
    /// What sort of packet is next.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether the sender asked for a completion.
    pub fn completion_requested(&self) -> bool {
        self.completion_requested
    }

    /// The sender's transaction id.
    pub fn transaction_id(&self) -> u64 {
        self.transaction_id
    }

    /// Bytes of data, with the padding to a multiple of 8.
    pub fn payload_length(&self) -> usize {
        // The descriptor has been checked: the data begins in the packet.
        self.rest.saturating_sub(self.extra) as usize
    }
}

impl Reader {
    /// The consuming end of an empty, zeroed ring.
    pub fn new(ring: Ring) -> Self {
        Self {
            ring,
            consumer: 0,
            published: 0,
            producer: 0,
            head: None,
        }
    }

    /// Bytes of the ring's data area: no packet is longer.
    pub fn ring_size(&self) -> u32 {
        self.ring.size()
    }

    /// Whether this ring's producer signals room in the other ring: [`Ring::producer_signals_room`].
    pub fn producer_signals_room(&self) -> Result<bool, RingError> {
        self.ring.producer_signals_room()
    }

    /// The next packet's descriptor, read once and checked; `None` when the ring is empty.
    pub fn peek(&mut self) -> Result<Option<Head>, RingError> {
        self.look()?;
        Ok(self.head)
    }

    /// What sort of packet is next: a cheaper [`peek`](Self::peek).
    #[inline]
    pub(crate) fn next_kind(&mut self) -> Result<Option<Kind>, RingError> {
        self.look()?;
        Ok(self.head.as_ref().map(Head::kind))
    }

    /// Reads the next packet's descriptor, if there is one and it has not been read.
    #[inline]
    fn look(&mut self) -> Result<(), RingError> {
        if self.head.is_some() {
            return Ok(());
        }
        if self.consumer == self.producer {
            self.producer = self.ring.control().producer()?;
            if self.consumer == self.producer {
                return Ok(());
            }
        }
        let available = self.ring.used(self.producer, self.consumer);
        if available < DESCRIPTOR + FOOTER {
            return Err(RingError::Truncated { available });
        }
        let words = [
            self.ring.read_word(self.consumer)?,
            self.ring.read_word(self.ring.advance(self.consumer, 8))?,
        ];
        let descriptor: Descriptor = zerocopy::transmute!(words);
        self.head = Some(descriptor.check(available)?);
        Ok(())
    }

    /// Copies the next packet into `packet` and moves behind it; `false` when the ring is empty.
    ///
    /// The producer learns of the room at [`publish`](Self::publish).
    #[inline]
    pub fn read(&mut self, packet: &mut PacketBuffer) -> Result<bool, RingError> {
        self.look()?;
        let Some(head) = &self.head else {
            return Ok(false);
        };
        let length = head.rest;
        let body = packet.prepare(head)?;
        self.ring
            .read(self.ring.advance(self.consumer, DESCRIPTOR), body)?;
        packet.check()?;
        // `check` saw that the whole packet and its footer lie before the producer's offset.
        self.consumer = self
            .ring
            .advance(self.consumer, DESCRIPTOR + length + FOOTER);
        self.head = None;
        Ok(true)
    }

    /// Whether the producer knows of the room of all packets read so far.
    pub fn is_published(&self) -> bool {
        self.consumer == self.published
    }

    /// Gives the room of all packets read so far back to the producer, and decides whether it
    /// waits for exactly that (spec vmbus.md 6.4, step 3).
    pub fn publish(&mut self) -> Result<Signal, RingError> {
        let before = self.published;
        if self.consumer == before {
            return Ok(Signal::NotNeeded);
        }
        let control = self.ring.control();
        control.set_consumer(self.consumer)?;
        self.published = self.consumer;
        // A producer that waits writes the pending size first and looks at the consumer's offset
        // after; so the other way here.
        fence(Ordering::SeqCst);
        // Some producers write one less than a multiple of 8.
        let pending = control.pending_send_size()? & !7;
        if pending == 0 {
            return Ok(Signal::NotNeeded);
        }
        let producer = control.producer()?;
        let had = self.ring.free(producer, before);
        let has = self.ring.free(producer, self.consumer);
        Ok(if had < pending && has >= pending {
            Signal::Needed
        } else {
            Signal::NotNeeded
        })
    }

    /// Tells the producer to send no "not empty" signals until [`unmask`](Self::unmask).
    pub fn mask(&self) -> Result<(), RingError> {
        self.ring.control().set_interrupt_mask(true)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Asks for signals again and looks once more: `true` means that packets have come in the meantime
    /// for which no signal may follow, so go on reading.
    pub fn unmask(&mut self) -> Result<bool, RingError> {
        self.ring.control().set_interrupt_mask(false)?;
        // Without this fence the look below could come first, and a packet written in between
        // would neither be seen nor signalled.
        fence(Ordering::SeqCst);
        Ok(self.head.is_some() || self.ring.control().producer()? != self.consumer)
    }
}
