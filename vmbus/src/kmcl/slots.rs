//! The places of the packets to send: what a transaction id leads to, and who waits for it.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::mem;
use core::task::Waker;

use super::error::{AllocateError, ChannelError};
use super::outgoing::Body;
use crate::ring::PacketBuffer;

/// One place for each packet that exists.
pub(super) struct Slots(Vec<Slot>);

/// The place of one packet: what its transaction id leads to.
#[derive(Default)]
pub(super) struct Slot {
    /// Grows with each use, so that a late or repeated answer finds nothing.
    generation: u32,
    /// The packet, from its entering the ring until the host has answered.
    pub(super) in_flight: Option<Box<Body>>,
    pub(super) waiter: Waiter,
}

/// Which request waits for the packet of a slot.
#[derive(Default)]
pub(super) enum Waiter {
    /// None: the packet ends by its routine.
    #[default]
    Nobody,
    /// This one, until this reference time.
    Waiting { waker: Option<Waker>, until: u64 },
    /// The packet has ended, and the request has not looked yet.
    Ended(Ended),
    /// It waits no more, but the host may still answer, and touch what was lent to it.
    GaveUp,
}

/// A packet that has ended, and how.
pub(super) type Ended = (Box<Body>, Result<(), ChannelError>);

/// What an answer of the host belongs to.
pub(super) enum Answered {
    Packet(Box<Body>),
    Request(Option<Waker>),
    /// A request that has given up.
    Late(Box<Body>),
    Unknown,
}

impl Slots {
    /// Room for the slots of so many packets.
    pub(super) fn with_capacity(packets: usize) -> Self {
        Self(Vec::with_capacity(packets))
    }

    /// Whether so many packets exist already.
    pub(super) fn is_full(&self, maximum: usize) -> bool {
        self.0.len() >= maximum
    }

    /// The slot of a packet that has been made.
    pub(super) fn add(&mut self, maximum: usize) -> Result<usize, AllocateError> {
        if self.is_full(maximum) {
            return Err(AllocateError::TooMany { maximum });
        }
        self.0.push(Slot::default());
        Ok(self.0.len() - 1)
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut Slot> {
        self.0.get_mut(index)
    }

    /// Books a packet that is in the ring: into its slot if an answer is to come, else back to the caller.
    pub(super) fn book(&mut self, body: Box<Body>) -> Option<Box<Body>> {
        if body.transaction.is_none() {
            return Some(body);
        }
        if let Some(slot) = self.0.get_mut(body.slot) {
            slot.in_flight = Some(body);
        }
        None
    }

    /// A new id for the packet in a slot.
    pub(super) fn id_of(&mut self, slot: usize) -> u64 {
        let generation = self.0.get_mut(slot).map_or(0, |slot| {
            slot.generation = slot.generation.wrapping_add(1);
            slot.generation
        });
        u64::from(generation) << 32 | (slot as u64 + 1)
    }

    /// The slot of the packet that has this id now.
    pub(super) fn find(&mut self, id: u64) -> Option<(usize, &mut Slot)> {
        let index = usize::try_from((id & 0xFFFF_FFFF).checked_sub(1)?).ok()?;
        let slot = self.0.get_mut(index)?;
        (u64::from(slot.generation) == id >> 32).then_some((index, slot))
    }

    /// The packet with this transaction id, once. A request gets the answer itself, in exchange for its own buffer.
    pub(super) fn retire(&mut self, id: u64, answer: &mut PacketBuffer) -> Answered {
        let Some((_, slot)) = self.find(id) else {
            return Answered::Unknown;
        };
        let Some(mut body) = slot.in_flight.take() else {
            return Answered::Unknown;
        };
        match mem::take(&mut slot.waiter) {
            Waiter::Waiting { waker, .. } => {
                mem::swap(body.answer.get_or_insert_default(), answer);
                slot.waiter = Waiter::Ended((body, Ok(())));
                Answered::Request(waker)
            }
            Waiter::GaveUp => Answered::Late(body),
            Waiter::Nobody | Waiter::Ended(..) => Answered::Packet(body),
        }
    }

    /// Ends the packet of a request. Gives it back when the request has given up.
    pub(super) fn end_request(
        &mut self,
        body: Box<Body>,
        result: Result<(), ChannelError>,
    ) -> (Option<Waker>, Option<Box<Body>>) {
        let Some(slot) = self.0.get_mut(body.slot) else {
            return (None, Some(body));
        };
        match mem::take(&mut slot.waiter) {
            Waiter::Waiting { waker, .. } => {
                slot.waiter = Waiter::Ended((body, result));
                (waker, None)
            }
            Waiter::Nobody | Waiter::GaveUp | Waiter::Ended(..) => (None, Some(body)),
        }
    }
}
