//! The sending half of a channel: the queue in front of the ring, and the packets that the host has yet to answer.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::mem;
use core::sync::atomic::Ordering;
use core::task::Waker;

use super::builder::ChannelBuilder;
use super::channel::{Channel, Shared};
use super::error::{AllocateError, ChannelError, PacketError, SendFailure};
use super::incoming::Content;
use super::outgoing::{Body, Ending, OutgoingPacket};
use super::slots::{Answered, Slots, Waiter};
use super::{pipe, trace};
use crate::ids::PAGE_SIZE;
use crate::ring::{
    Outgoing, PacketBuffer, PushError, Ring, RingError, Room, ScatterList, Signal, Writer,
    largest_packet,
};

/// How many packets one round of draining the queue moves under one hold of the lock.
const ROUND: usize = 8;

/// How often a full ring is looked at whose consumer does not signal room, in units of 100 ns.
pub(super) const POLL_INTERVAL: u64 = 10_000;

/// The most bytes that a packet takes in a ring of any size: KMCL keeps it, footer included, below what the length
/// field could say (spec kmcl.md 1.9).
const LARGEST_PACKET: u32 = 0xFFFF * 8 - 8;

/// Whether packets may be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Gate {
    /// Not yet open: they wait.
    Queue,
    /// They go to the ring.
    Open,
    /// Stopping: no packet is taken any more. Those that wait, and completions of received packets, are still written.
    CompletionsOnly,
    /// Closed: packets are lined up again, though for nothing, because they fail when all is over. Nobody may wait for one.
    Closed,
    /// Nothing is written any more.
    Shut,
}

/// The sending half of a channel, under one lock.
pub(super) struct SendSide {
    pub(super) gate: Gate,
    /// Why nothing is sent, while nothing is.
    reason: ChannelError,
    writer: Option<Writer>,
    /// The ring of the other direction: tells whether the host signals room.
    incoming: Option<Ring>,
    /// Packets that wait for room, in order. Has room for all that can exist.
    queue: VecDeque<Queued>,
    pub(super) slots: Slots,
    /// Packets that nobody uses.
    #[expect(
        clippy::vec_box,
        reason = "packets move in and out without being copied"
    )]
    aside: Vec<Box<Body>>,
}

/// A packet that waits for room in the ring.
enum Queued {
    Packet(Box<Body>),
    Completion(Box<Content>),
}

/// What is to be sent.
pub(super) struct Order<'a> {
    pub(super) data: &'a [u8],
    /// Whether the host is to answer.
    pub(super) transaction: bool,
    /// Until when a request waits for the end of the packet.
    pub(super) request: Option<u64>,
    /// Whether it may wait for room.
    pub(super) may_wait: bool,
}

/// Why a packet was not taken.
pub(super) enum Refusal {
    /// It would have to wait for room, or for the channel to open.
    Full,
    /// The channel ends, or has ended.
    Ended(ChannelError),
    Failure(SendFailure),
}

/// What became of a packet that was taken.
pub(super) enum Sent {
    /// The library has it, for a request under this id.
    Accepted { id: u64 },
    /// It is in the ring, and nothing more is to come.
    Done { id: u64, body: Box<Body> },
}

/// What is left of a request that stops waiting.
#[derive(Default)]
pub(super) struct Abandoned {
    pub(super) waker: Option<Waker>,
    pub(super) body: Option<Box<Body>>,
    /// Whether others waited behind it for room.
    pub(super) front: bool,
    /// Whether it had an answer to wait for.
    pub(super) waited: bool,
}

/// What one round of draining the queue did.
struct Round {
    /// Packets moved to the ring.
    count: u64,
    signal: Signal,
    /// Whether there may be more to move at once.
    more: bool,
    error: Option<RingError>,
}

impl SendSide {
    pub(super) fn new(packets: usize, completions: usize) -> Self {
        Self {
            // Until the channel is enabled.
            gate: Gate::Shut,
            reason: ChannelError::Disabled,
            writer: None,
            incoming: None,
            queue: VecDeque::with_capacity(packets + completions),
            slots: Slots::with_capacity(packets),
            aside: Vec::with_capacity(packets),
        }
    }

    pub(super) fn attach(&mut self, writer: Writer, incoming: Ring) {
        self.writer = Some(writer);
        self.incoming = Some(incoming);
    }

    pub(super) fn detach(&mut self) {
        self.gate = Gate::Shut;
        self.writer = None;
        self.incoming = None;
    }

    /// Stops sending, for this reason.
    pub(super) fn close(&mut self, gate: Gate, reason: ChannelError) {
        self.gate = gate;
        self.reason = reason;
    }

    /// Why nothing is sent, while nothing is.
    pub(super) fn reason(&self) -> ChannelError {
        self.reason
    }

    /// A packet that nobody uses; `None` when one more can be made.
    pub(super) fn reuse(&mut self, maximum: usize) -> Result<Option<Box<Body>>, AllocateError> {
        match self.aside.pop() {
            None if self.slots.is_full(maximum) => Err(AllocateError::TooMany { maximum }),
            body => Ok(body),
        }
    }

    /// Makes a request stop waiting. What waits for room is not sent; what the host has stays with
    /// the library, slot and all, until the host answers or has let go of the channel.
    pub(super) fn abandon(&mut self, index: usize) -> Abandoned {
        let Some(slot) = self.slots.get_mut(index) else {
            return Abandoned::default();
        };
        match mem::take(&mut slot.waiter) {
            Waiter::Waiting { waker, .. } if slot.in_flight.is_some() => {
                slot.waiter = Waiter::GaveUp;
                Abandoned {
                    waker,
                    waited: true,
                    ..Abandoned::default()
                }
            }
            Waiter::Waiting { waker, .. } => {
                let of_slot =
                    |queued: &Queued| matches!(queued, Queued::Packet(body) if body.slot == index);
                let at = self.queue.iter().position(of_slot);
                let body = match at.and_then(|at| self.queue.remove(at)) {
                    Some(Queued::Packet(body)) => Some(body),
                    _ => None,
                };
                Abandoned {
                    waker,
                    body,
                    front: at == Some(0),
                    waited: true,
                }
            }
            Waiter::Ended((body, _)) => Abandoned {
                body: Some(body),
                ..Abandoned::default()
            },
            other => {
                slot.waiter = other;
                Abandoned::default()
            }
        }
    }

    /// Writes one packet if there is room.
    fn push(&mut self, packet: &Outgoing<'_>) -> Result<Option<Signal>, PushError> {
        let Some(writer) = self.writer.as_mut() else {
            return Ok(None);
        };
        match writer.push(packet) {
            Ok(()) => Ok(Some(writer.publish()?)),
            Err(PushError::Full { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether a packet may go straight to the ring without overtaking another.
    fn is_clear(&self) -> bool {
        self.queue.is_empty() && self.writer.is_some()
    }

    /// Moves packets from the queue to the ring, unpublished, as far as there are places. `Some` is the room
    /// that the next one needs. After an error nothing has moved.
    fn fill(
        &mut self,
        pipe: bool,
        entered: &mut [Option<Queued>; ROUND],
        count: &mut u64,
    ) -> Result<Option<u32>, RingError> {
        let Some(writer) = self.writer.as_mut() else {
            return Ok(None);
        };
        for place in entered.iter_mut() {
            let Some(front) = self.queue.front() else {
                break;
            };
            let header;
            let packet = match front {
                Queued::Packet(body) => {
                    header = pipe::header(body.data.len());
                    body.frame(pipe, &header)
                }
                Queued::Completion(buffer) => {
                    Outgoing::completion(buffer.transaction_id(), buffer.payload())
                }
            };
            match writer.push(&packet) {
                Ok(()) => *count += 1,
                Err(PushError::Full { need }) => return Ok(Some(need)),
                Err(PushError::Ring(error)) => return Err(error),
                // Sizes are checked before anything is lined up.
                Err(PushError::TooLarge { .. }) => return Err(RingError::Memory),
            }
            *place = match self.queue.pop_front() {
                Some(Queued::Packet(body)) => self.slots.book(body).map(Queued::Packet),
                completion => completion,
            };
        }
        Ok(None)
    }
}

/// The packet as the ring takes it.
pub(super) fn frame<'a>(
    pipe: bool,
    header: &'a [u8; pipe::HEADER],
    data: &'a [u8],
    list: &'a ScatterList,
    transaction: Option<u64>,
) -> Outgoing<'a> {
    let parts: [&[u8]; 2] = if pipe { [header, data] } else { [data, &[]] };
    let packet = if list.is_empty() {
        Outgoing::in_band(parts)
    } else {
        Outgoing::gpa_direct(list, parts)
    };
    match transaction {
        Some(id) => packet.with_completion(id),
        None => packet,
    }
}

impl Body {
    /// The packet from the copy of its data.
    fn frame<'a>(&'a self, pipe: bool, header: &'a [u8; pipe::HEADER]) -> Outgoing<'a> {
        frame(pipe, header, &self.data, &self.list, self.transaction)
    }
}

impl Channel {
    /// Ends a packet: a request learns of it, or its routine gets it, or it is put aside.
    pub(super) fn finish_packet(&self, mut body: Box<Body>, result: Result<&[u8], PacketError>) {
        body.transaction = None;
        let packet = |body| OutgoingPacket::new(self.clone(), body);
        match &body.ending {
            Ending::Aside => self.shared().put_aside(body),
            Ending::Call(routine) => {
                let routine = routine.clone();
                routine(packet(body), result);
            }
            Ending::Run(routine) => routine(packet(body), result),
            Ending::Request => {
                let result = result.map(drop).map_err(|PacketError::Removed(why)| why);
                self.shared().end_request(body, result);
            }
        }
    }

    /// Moves waiting packets to the ring, in order, as far as there is room, and asks the host for
    /// a signal when more has to wait. Returns whether any was moved.
    pub(super) fn flush(&self) -> Result<bool, RingError> {
        let shared = self.shared();
        let mut moved = false;
        loop {
            let mut entered: [Option<Queued>; ROUND] = Default::default();
            let round = shared.drain_round(&mut entered);
            if round.count > 0 {
                moved = true;
                shared.written(round.count, round.signal);
            }
            for queued in entered.into_iter().flatten() {
                match queued {
                    Queued::Packet(body) => self.finish_packet(body, Ok(&[])),
                    Queued::Completion(buffer) => shared.recycle(buffer),
                }
            }
            if let Some(error) = round.error {
                return Err(error);
            }
            if !round.more {
                return Ok(moved);
            }
        }
    }

    /// Retires the packet that a completion answers, and ends it. A request takes the completion itself, and
    /// leaves a buffer of its own.
    pub(super) fn complete_transaction(&self, completion: &mut PacketBuffer) {
        let shared = self.shared();
        shared.counters.completions_received.add(1);
        let id = completion.transaction_id();
        let mut side = shared.send.lock(&*shared.client.hypervisor);
        let answered = side.slots.retire(id, completion);
        drop(side);
        match answered {
            Answered::Packet(body) => self.finish_packet(body, Ok(completion.payload())),
            Answered::Request(Some(waker)) => waker.wake(),
            Answered::Request(None) => {}
            Answered::Late(body) => {
                shared.counters.late_completions.add(1);
                shared.put_aside(body);
            }
            Answered::Unknown => shared.counters.unknown_completions.add(1),
        }
    }

    /// Fails every packet that waits, in order, and every one that the host has not answered. The host must not be able to
    /// touch lent memory any more.
    pub(super) fn fail_outgoing(&self, reason: ChannelError) {
        let shared = self.shared();
        let hypervisor = &*shared.client.hypervisor;
        let error = PacketError::Removed(reason);
        loop {
            let queued = shared.send.lock(hypervisor).queue.pop_front();
            match queued {
                Some(Queued::Packet(body)) => self.finish_packet(body, Err(error)),
                Some(Queued::Completion(buffer)) => shared.recycle(buffer),
                None => break,
            }
        }
        for index in 0.. {
            let mut side = shared.send.lock(hypervisor);
            let Some(slot) = side.slots.get_mut(index) else {
                break;
            };
            let body = slot.in_flight.take();
            drop(side);
            if let Some(body) = body {
                self.finish_packet(body, Err(error));
            }
        }
    }
}

impl Channel {
    /// Whether the host has read all that has been sent: nothing waits for room, and the outgoing ring is empty. True
    /// of a channel that is not open. A channel that closes takes unread packets with it; no event tells
    /// when they have been read.
    pub fn is_drained(&self) -> bool {
        let shared = self.shared();
        let side = shared.send.lock(&*shared.client.hypervisor);
        match &side.writer {
            Some(writer) => side.queue.is_empty() && writer.is_drained().unwrap_or(true),
            None => true,
        }
    }
}

impl Shared {
    /// Writes a packet to the ring or lines it up.
    pub(super) fn send(
        &self,
        mut body: Box<Body>,
        order: &Order<'_>,
    ) -> Result<Sent, (Box<Body>, Refusal)> {
        let mut side = self.send.lock(&*self.client.hypervisor);
        let open = match side.gate {
            Gate::Open => true,
            Gate::Queue => false,
            Gate::Closed if order.request.is_none() => false,
            Gate::Closed | Gate::CompletionsOnly | Gate::Shut => {
                return Err((body, Refusal::Ended(side.reason)));
            }
        };
        let index = body.slot;
        let id = side.slots.id_of(index);
        body.transaction = order.transaction.then_some(id);
        let header = pipe::header(order.data.len());
        if open && side.is_clear() {
            let transaction = body.transaction;
            let packet = frame(
                self.config.pipe,
                &header,
                order.data,
                &body.list,
                transaction,
            );
            // The slot must be taken before the host can answer, so the lock is held across the write.
            match side.push(&packet) {
                Ok(Some(signal)) => {
                    let back = side.slots.book(body);
                    self.note_request(&mut side, index, order);
                    drop(side);
                    self.written(1, signal);
                    return Ok(match back {
                        Some(body) => Sent::Done { id, body },
                        None => Sent::Accepted { id },
                    });
                }
                Ok(None) => {}
                Err(error) => {
                    drop(side);
                    return Err((body, Refusal::Failure(self.push_failed(error))));
                }
            }
        }
        if !order.may_wait {
            return Err((body, Refusal::Full));
        }
        body.data.clear();
        body.data.extend_from_slice(order.data);
        let first = side.queue.is_empty();
        side.queue.push_back(Queued::Packet(body));
        self.note_request(&mut side, index, order);
        drop(side);
        if first && open {
            self.counters.ring_full_waits.add(1);
            // The dispatcher asks the host for a signal, or finds that there is room by now.
            self.defer();
        }
        Ok(Sent::Accepted { id })
    }

    /// Writes a message to the ring if it has room now and nothing waits for it.
    pub(super) fn send_now(&self, data: &[u8]) -> Result<(), Refusal> {
        let mut side = self.send.lock(&*self.client.hypervisor);
        match side.gate {
            Gate::Open if side.is_clear() => {}
            Gate::Open | Gate::Queue => return Err(Refusal::Full),
            Gate::CompletionsOnly | Gate::Closed | Gate::Shut => {
                return Err(Refusal::Ended(side.reason));
            }
        }
        let header = pipe::header(data.len());
        let none = ScatterList::default();
        match side.push(&frame(self.config.pipe, &header, data, &none, None)) {
            Ok(Some(signal)) => {
                drop(side);
                self.written(1, signal);
                Ok(())
            }
            Ok(None) => Err(Refusal::Full),
            Err(error) => {
                drop(side);
                Err(Refusal::Failure(self.push_failed(error)))
            }
        }
    }

    /// Writes the completion of a received packet, or lines it up. Gives the buffer back when it is free.
    pub(super) fn send_completion(
        &self,
        mut buffer: Box<Content>,
        data: &[u8],
    ) -> Option<Box<Content>> {
        let mut side = self.send.lock(&*self.client.hypervisor);
        let stale = buffer.opening != self.opening.load(Ordering::SeqCst);
        if stale || matches!(side.gate, Gate::Closed | Gate::Shut) {
            return Some(buffer);
        }
        if side.is_clear() {
            let packet = Outgoing::completion(buffer.transaction_id(), data);
            match side.push(&packet) {
                Ok(Some(signal)) => {
                    drop(side);
                    self.written(1, signal);
                    return Some(buffer);
                }
                Ok(None) => {}
                Err(error) => {
                    drop(side);
                    self.push_failed(error);
                    return Some(buffer);
                }
            }
        }
        let need = Outgoing::completion(0, data).footprint();
        if need > u64::from(self.largest_packet()) {
            drop(side);
            self.fail(ChannelError::Packet("a completion is longer than the ring"));
            return Some(buffer);
        }
        if let Err(error) = buffer.become_completion(data) {
            drop(side);
            self.fail(ChannelError::Ring(error));
            return Some(buffer);
        }
        let first = side.queue.is_empty();
        side.queue.push_back(Queued::Completion(buffer));
        drop(side);
        if first {
            self.counters.ring_full_waits.add(1);
            self.defer();
        }
        None
    }

    /// Moves up to [`ROUND`] packets from the queue to the ring with one update of the producer offset.
    fn drain_round(&self, entered: &mut [Option<Queued>; ROUND]) -> Round {
        let mut guard = self.send.lock(&*self.client.hypervisor);
        let side = &mut *guard;
        let mut round = Round {
            count: 0,
            signal: Signal::NotNeeded,
            more: false,
            error: None,
        };
        if !matches!(side.gate, Gate::Open | Gate::CompletionsOnly) {
            return round;
        }
        let filled = side.fill(self.config.pipe, entered, &mut round.count);
        let Some(writer) = side.writer.as_mut() else {
            return round;
        };
        let published = filled.and_then(|wanted| Ok((wanted, writer.publish()?)));
        let wanted = match published {
            Ok((wanted, signal)) => {
                round.signal = signal;
                wanted
            }
            Err(error) => {
                // The host may not have seen them; they end with the channel.
                for queued in entered.iter_mut().rev().filter_map(Option::take) {
                    side.queue.push_front(queued);
                }
                round.count = 0;
                round.error = Some(error);
                return round;
            }
        };
        match self.after_round(side, wanted) {
            Ok(more) => round.more = more,
            Err(error) => round.error = Some(error),
        }
        round
    }

    /// Asks the host for a signal if something waits for room. Returns whether there is something to move at once.
    fn after_round(&self, side: &mut SendSide, wanted: Option<u32>) -> Result<bool, RingError> {
        let Some(writer) = side.writer.as_mut() else {
            return Ok(false);
        };
        let Some(need) = wanted else {
            if side.queue.is_empty() {
                writer.stop_waiting()?;
                self.poll_at.store(u64::MAX, Ordering::Relaxed);
            }
            return Ok(!side.queue.is_empty());
        };
        if writer.wait_for(need)? == Room::Available {
            return Ok(true);
        }
        if let Some(incoming) = &side.incoming
            && !incoming.producer_signals_room()?
        {
            let now = self.client.hypervisor.reference_time();
            let at = now.saturating_add(POLL_INTERVAL);
            self.poll_at.store(at, Ordering::Relaxed);
            // The one who sleeps until the deadline has to learn of it.
            self.client.notify();
        }
        Ok(false)
    }

    /// Counts packets written to the ring, and tells the host about them if it waits for them.
    fn written(&self, packets: u64, signal: Signal) {
        self.counters.packets_sent.add(packets);
        trace::sent(self, packets);
        match signal {
            Signal::Needed => self.signal_host(),
            Signal::NotNeeded => self.counters.signals_suppressed.add(1),
        }
    }

    /// The most bytes that a packet may take in the outgoing ring.
    pub(super) fn largest_packet(&self) -> u32 {
        self.config.packet_limit()
    }

    fn push_failed(&self, error: PushError) -> SendFailure {
        match error {
            PushError::TooLarge { need, limit } => SendFailure::TooLarge { need, limit },
            PushError::Ring(error) => {
                self.fail(ChannelError::Ring(error));
                SendFailure::Ring(error)
            }
            PushError::Full { .. } => SendFailure::NotOpen,
        }
    }

    /// Takes a packet back that nobody uses any more.
    pub(super) fn put_aside(&self, mut body: Box<Body>) {
        // What the driver left in it is dropped while no lock is held.
        body.forget();
        self.send.lock(&*self.client.hypervisor).aside.push(body);
    }
}

impl ChannelBuilder {
    /// The most bytes that a packet may take in the outgoing ring (spec kmcl.md 1.9).
    pub(super) fn packet_limit(&self) -> u32 {
        let data = self.outgoing_pages().saturating_mul(PAGE_SIZE);
        largest_packet(data).min(LARGEST_PACKET)
    }
}

impl Shared {
    /// Keeps what was lent with packets that the host has not answered, although the packets are about to end: it is not
    /// known when the host lets go of it.
    pub(super) fn keep_lent_memory(&self) {
        for index in 0.. {
            let mut side = self.send.lock(&*self.client.hypervisor);
            let Some(slot) = side.slots.get_mut(index) else {
                return;
            };
            let external = slot
                .in_flight
                .as_mut()
                .map(|body| mem::take(&mut body.external));
            drop(side);
            if let Some(external) = external
                && !external.is_empty()
            {
                self.client.keep(Box::new(external));
            }
        }
    }
}
