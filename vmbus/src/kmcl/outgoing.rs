//! Packets to send: owned objects that come back with their completion.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem;
use core::ops::Range;
use core::sync::atomic::Ordering;

use super::channel::{Channel, Shared};
use super::error::{AllocateError, ChannelError, PacketError, SendError, SendFailure};
use super::incoming::Content;
use super::{pipe, trace};
use crate::ids::PAGE_SIZE;
use crate::ring::{
    Outgoing, PushError, Ring, RingError, Room, ScatterList, Signal, Writer, largest_packet,
};
use crate::shared::SharedPages;

/// What runs when a packet has ended, at DISPATCH or PASSIVE: with the packet, which it owns from then on, and
/// with the host's answer, or nothing when none was asked for and the packet has entered the ring.
pub type CompletionRoutine = dyn Fn(OutgoingPacket, Result<&[u8], PacketError>) + Send + Sync;

/// How many packets one round of draining the queue moves under one hold of the lock.
const ROUND: usize = 8;

/// How often a full ring is looked at whose consumer does not signal room, in units of 100 ns.
const POLL_INTERVAL: u64 = 10_000;

/// A packet that is not in flight. Sending hands it over; its completion gives it back.
///
/// It has all that a send needs: sending never fails for want of memory, and in steady
/// state nothing is allocated. Dropping it puts it aside for the next
/// [`allocate_packet`](Channel::allocate_packet).
pub struct OutgoingPacket {
    channel: Channel,
    body: Option<Box<Body>>,
}

/// The packet itself.
pub(super) struct Body {
    /// The data while the packet waits for room.
    data: Vec<u8>,
    external: ExternalData,
    list: ScatterList,
    transaction: Option<u64>,
    routine: Option<Arc<CompletionRoutine>>,
    /// The slot that is reserved for the packet.
    slot: usize,
}

/// Guest memory that a packet lends to the host. The library keeps it until the host can no longer touch it,
/// and the completed packet gives it back.
#[derive(Clone, Default, Debug)]
pub struct ExternalData {
    parts: Vec<(SharedPages, Range<usize>)>,
}

impl ExternalData {
    /// No memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes `range` of `pages`, as a range of its own. Returns whether they lie in the pages and are
    /// neither none nor too many for a range.
    pub fn push(&mut self, pages: SharedPages, range: Range<usize>) -> bool {
        let sound = range.start < range.end
            && range.end <= pages.len()
            && u32::try_from(range.len()).is_ok();
        if sound {
            self.parts.push((pages, range));
        }
        sound
    }

    /// Writes the ranges into `list`.
    fn describe(&self, list: &mut ScatterList) -> Result<(), RingError> {
        list.clear();
        for (pages, range) in &self.parts {
            let (first, end) = (range.start / PAGE_SIZE, range.end.div_ceil(PAGE_SIZE));
            let start = pages.first_page().0;
            // Both fit: `push` has seen to it.
            let offset = (range.start % PAGE_SIZE) as u32;
            let length = range.len() as u32;
            let numbers = (first..end).map(|page| crate::ids::PageNumber(start + page as u64));
            list.push(offset, length, numbers)?;
        }
        Ok(())
    }
}

impl OutgoingPacket {
    fn body(&mut self) -> Option<&mut Body> {
        self.body.as_deref_mut()
    }

    /// The channel of the packet.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Sets what runs when the packet has ended. Without it the packet is put aside then.
    pub fn set_completion_routine(&mut self, routine: Arc<CompletionRoutine>) {
        if let Some(body) = self.body() {
            body.routine = Some(routine);
        }
    }

    /// Takes back the memory that was lent with the last send.
    pub fn take_external_data(&mut self) -> ExternalData {
        self.body()
            .map(|body| mem::take(&mut body.external))
            .unwrap_or_default()
    }

    /// Sends `data` as a message. The completion routine runs when it has entered the ring: perhaps
    /// before this returns, so hold no lock that it takes. At DISPATCH or PASSIVE.
    pub fn send(self, data: &[u8]) -> Result<(), SendError> {
        self.submit(data, None, false)
    }

    /// Sends `data` as a request. The completion routine runs when the host has answered.
    pub fn send_transaction(self, data: &[u8]) -> Result<(), SendError> {
        self.submit(data, None, true)
    }

    /// Sends `data` as a request that lends memory to the host.
    pub fn send_with_external_data(
        self,
        data: &[u8],
        external: ExternalData,
    ) -> Result<(), SendError> {
        self.submit(data, Some(external), true)
    }

    fn submit(
        mut self,
        data: &[u8],
        external: Option<ExternalData>,
        transaction: bool,
    ) -> Result<(), SendError> {
        let channel = self.channel.clone();
        let result = match self.body.take() {
            Some(mut body) => {
                let lends = external.is_some();
                body.external = external.unwrap_or_default();
                match prepare(channel.shared(), &mut body, data, lends, transaction) {
                    Ok(()) => channel.shared().send(body, data, transaction),
                    Err(reason) => Err((body, reason)),
                }
            }
            // A packet without a body is never handed out.
            None => return Ok(()),
        };
        match result {
            Ok(None) => Ok(()),
            Ok(Some(body)) => {
                channel.finish_packet(body, Ok(&[]));
                Ok(())
            }
            Err((body, reason)) => {
                self.body = Some(body);
                Err(SendError {
                    packet: self,
                    reason,
                })
            }
        }
    }
}

/// Checks a send before the lock is taken.
fn prepare(
    shared: &Shared,
    body: &mut Body,
    data: &[u8],
    lends: bool,
    transaction: bool,
) -> Result<(), SendFailure> {
    let maximum = shared.config.maximum_packet_size;
    if data.len() > maximum {
        return Err(SendFailure::TooLong {
            length: data.len(),
            maximum,
        });
    }
    if shared.config.pipe && (lends || transaction) {
        return Err(SendFailure::Pipe);
    }
    body.list.clear();
    if lends && body.external.parts.is_empty() {
        return Err(SendFailure::NoExternalData);
    }
    if lends {
        body.external
            .describe(&mut body.list)
            .map_err(SendFailure::Ring)?;
    }
    let header = pipe::header(data.len());
    let need = frame(shared.config.pipe, &header, data, &body.list, None).footprint();
    let limit = shared.largest_packet();
    if need > u64::from(limit) {
        return Err(SendFailure::TooLarge { need, limit });
    }
    Ok(())
}

impl Drop for OutgoingPacket {
    fn drop(&mut self) {
        if let Some(mut body) = self.body.take() {
            body.routine = None;
            body.external = ExternalData::default();
            self.channel.shared().put_aside(body);
        }
    }
}

impl fmt::Debug for OutgoingPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutgoingPacket")
    }
}

/// Whether packets may be sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Gate {
    /// Not yet open: they wait.
    Queue,
    /// They go to the ring.
    Open,
    /// Ending: only completions of received packets are still written.
    CompletionsOnly,
    /// Nothing is written any more.
    Shut,
}

/// The sending half of a channel, under one lock.
pub(super) struct SendSide {
    pub(super) gate: Gate,
    writer: Option<Writer>,
    /// The ring of the other direction: tells whether the host signals room.
    incoming: Option<Ring>,
    /// Packets that wait for room, in order. Has room for all that can exist.
    queue: VecDeque<Queued>,
    slots: Vec<Slot>,
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

/// A place for a packet that the host has yet to answer.
#[derive(Default)]
struct Slot {
    /// Grows with each transaction, so that a late or repeated answer finds nothing.
    generation: u32,
    in_flight: Option<Box<Body>>,
}

/// What a write to the ring led to.
enum Written {
    Yes(Signal),
    /// The ring is full.
    No,
}

impl SendSide {
    pub(super) fn new(packets: usize, completions: usize) -> Self {
        Self {
            gate: Gate::Queue,
            writer: None,
            incoming: None,
            queue: VecDeque::with_capacity(packets + completions),
            slots: Vec::with_capacity(packets),
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

    fn id_of(&mut self, slot: usize) -> u64 {
        let generation = self.slots.get_mut(slot).map_or(0, |slot| {
            slot.generation = slot.generation.wrapping_add(1);
            slot.generation
        });
        u64::from(generation) << 32 | (slot as u64 + 1)
    }

    /// The packet with this transaction id, once.
    fn retire(&mut self, id: u64) -> Option<Box<Body>> {
        let slot = usize::try_from((id & 0xFFFF_FFFF).checked_sub(1)?).ok()?;
        let slot = self.slots.get_mut(slot)?;
        if u64::from(slot.generation) != id >> 32 {
            return None;
        }
        slot.in_flight.take()
    }

    /// Writes one packet if there is room.
    fn push(&mut self, packet: &Outgoing<'_>) -> Result<Written, PushError> {
        let Some(writer) = self.writer.as_mut() else {
            return Ok(Written::No);
        };
        match writer.push(packet) {
            Ok(()) => Ok(Written::Yes(writer.publish()?)),
            Err(PushError::Full { .. }) => Ok(Written::No),
            Err(error) => Err(error),
        }
    }

    /// Whether a packet may go straight to the ring without overtaking another.
    fn is_clear(&self) -> bool {
        self.queue.is_empty() && self.writer.is_some()
    }
}

/// The packet as the ring takes it.
fn frame<'a>(
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
    /// A packet to send, with everything that the send will need. At DISPATCH or PASSIVE.
    pub fn allocate_packet(&self) -> Result<OutgoingPacket, AllocateError> {
        let shared = self.shared();
        let mut side = shared.send.lock(&*shared.client.hypervisor);
        let body = match side.aside.pop() {
            Some(body) => body,
            None => {
                let maximum = shared.config.maximum_packet_count;
                if side.slots.len() == maximum {
                    return Err(AllocateError::TooMany { maximum });
                }
                let mut data = Vec::new();
                data.try_reserve_exact(shared.config.maximum_packet_size)
                    .map_err(|_| AllocateError::NoMemory)?;
                let (pages, ranges) = shared.config.maximum_external;
                let slot = side.slots.len();
                side.slots.push(Slot::default());
                Box::new(Body {
                    data,
                    external: ExternalData::default(),
                    list: ScatterList::with_capacity(ranges, pages),
                    transaction: None,
                    routine: None,
                    slot,
                })
            }
        };
        drop(side);
        Ok(OutgoingPacket {
            channel: self.clone(),
            body: Some(body),
        })
    }

    /// Sends `data` as a message in a packet that nobody needs to see again.
    pub fn send_message(&self, data: &[u8]) -> Result<(), MessageError> {
        let packet = self.allocate_packet().map_err(MessageError::Allocate)?;
        packet
            .send(data)
            .map_err(|error| MessageError::Send(error.reason))
    }

    /// Ends a packet: its routine gets it, or it is put aside.
    pub(super) fn finish_packet(&self, mut body: Box<Body>, result: Result<&[u8], PacketError>) {
        body.transaction = None;
        let routine = body.routine.clone();
        let packet = OutgoingPacket {
            channel: self.clone(),
            body: Some(body),
        };
        match routine {
            Some(routine) => routine(packet, result),
            None => drop(packet),
        }
    }

    /// Moves waiting packets to the ring, in order, as far as there is room, and asks the host for
    /// a signal when more has to wait. Returns whether any was moved.
    pub(super) fn flush(&self) -> Result<bool, RingError> {
        let shared = self.shared();
        let mut moved = false;
        loop {
            let mut entered: [Option<Queued>; ROUND] = Default::default();
            let round = shared.drain_round(&mut entered)?;
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
            if !round.more {
                return Ok(moved);
            }
        }
    }

    /// Retires the packet that a completion answers, and runs its routine.
    pub(super) fn complete_transaction(&self, id: u64, payload: &[u8]) {
        let shared = self.shared();
        shared.counters.completions_received.add(1);
        let body = shared.send.lock(&*shared.client.hypervisor).retire(id);
        match body {
            Some(body) => self.finish_packet(body, Ok(payload)),
            None => shared.counters.unknown_completions.add(1),
        }
    }

    /// Fails every packet that waits, in order, and every one that the host has not answered. The host must not be able to
    /// touch lent memory any more.
    pub(super) fn fail_outgoing(&self, reason: ChannelError) {
        let shared = self.shared();
        let error = PacketError::Removed(reason);
        loop {
            let next = shared
                .send
                .lock(&*shared.client.hypervisor)
                .queue
                .pop_front();
            match next {
                Some(Queued::Packet(body)) => self.finish_packet(body, Err(error)),
                Some(Queued::Completion(buffer)) => shared.recycle(buffer),
                None => break,
            }
        }
        let mut index = 0;
        loop {
            let mut side = shared.send.lock(&*shared.client.hypervisor);
            let Some(slot) = side.slots.get_mut(index) else {
                break;
            };
            let body = slot.in_flight.take();
            drop(side);
            if let Some(body) = body {
                self.finish_packet(body, Err(error));
            }
            index += 1;
        }
    }
}

/// Why [`Channel::send_message`] failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MessageError {
    /// There is no packet to send it in.
    Allocate(AllocateError),
    /// It was not taken.
    Send(SendFailure),
}

impl fmt::Display for MessageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allocate(error) => error.fmt(f),
            Self::Send(reason) => reason.fmt(f),
        }
    }
}

impl core::error::Error for MessageError {}

impl Shared {
    /// Writes a packet to the ring or lines it up. Gives it back when it has entered the ring
    /// and no answer is to come.
    fn send(
        &self,
        mut body: Box<Body>,
        data: &[u8],
        transaction: bool,
    ) -> Result<Option<Box<Body>>, (Box<Body>, SendFailure)> {
        let hypervisor = &*self.client.hypervisor;
        let mut side = self.send.lock(hypervisor);
        if !matches!(side.gate, Gate::Queue | Gate::Open) {
            return Err((body, SendFailure::NotOpen));
        }
        body.transaction = transaction.then(|| side.id_of(body.slot));
        let header = pipe::header(data.len());
        if side.gate == Gate::Open && side.is_clear() {
            let packet = frame(
                self.config.pipe,
                &header,
                data,
                &body.list,
                body.transaction,
            );
            // The slot must be taken before the host can answer, so the lock is held across the write.
            match side.push(&packet) {
                Ok(Written::Yes(signal)) => {
                    let back = book(&mut side.slots, body);
                    drop(side);
                    self.written(1, signal);
                    return Ok(back);
                }
                Ok(Written::No) => {}
                Err(error) => {
                    drop(side);
                    return Err((body, self.push_failed(error)));
                }
            }
        }
        body.data.clear();
        body.data.extend_from_slice(data);
        let first = side.queue.is_empty();
        side.queue.push_back(Queued::Packet(body));
        let open = side.gate == Gate::Open;
        drop(side);
        if first && open {
            self.counters.ring_full_waits.add(1);
            // The dispatcher asks the host for a signal, or finds that there is room by now.
            self.defer();
        }
        Ok(None)
    }

    /// Writes the completion of a received packet, or lines it up. Gives the buffer back when it is free.
    pub(super) fn send_completion(
        &self,
        mut buffer: Box<Content>,
        data: &[u8],
    ) -> Option<Box<Content>> {
        let mut side = self.send.lock(&*self.client.hypervisor);
        if side.gate == Gate::Shut {
            return Some(buffer);
        }
        if side.is_clear() {
            let packet = Outgoing::completion(buffer.transaction_id(), data);
            match side.push(&packet) {
                Ok(Written::Yes(signal)) => {
                    drop(side);
                    self.written(1, signal);
                    return Some(buffer);
                }
                Ok(Written::No) => {}
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
    fn drain_round(&self, entered: &mut [Option<Queued>; ROUND]) -> Result<Round, RingError> {
        let hypervisor = &*self.client.hypervisor;
        let mut guard = self.send.lock(hypervisor);
        let side = &mut *guard;
        let mut round = Round {
            count: 0,
            signal: Signal::NotNeeded,
            more: false,
        };
        let Some(writer) = side.writer.as_mut() else {
            return Ok(round);
        };
        if !matches!(side.gate, Gate::Open | Gate::CompletionsOnly) {
            return Ok(round);
        }
        let mut wanted = None;
        for place in entered.iter_mut() {
            let Some(front) = side.queue.front() else {
                break;
            };
            let header;
            let packet = match front {
                Queued::Packet(body) => {
                    header = pipe::header(body.data.len());
                    body.frame(self.config.pipe, &header)
                }
                Queued::Completion(buffer) => {
                    Outgoing::completion(buffer.transaction_id(), buffer.payload())
                }
            };
            match writer.push(&packet) {
                Ok(()) => round.count += 1,
                Err(PushError::Full { need }) => {
                    wanted = Some(need);
                    break;
                }
                Err(PushError::Ring(error)) => return Err(error),
                // Sizes are checked before anything is lined up.
                Err(PushError::TooLarge { .. }) => return Err(RingError::Memory),
            }
            *place = match side.queue.pop_front() {
                Some(Queued::Packet(body)) => book(&mut side.slots, body).map(Queued::Packet),
                completion => completion,
            };
        }
        round.signal = writer.publish()?;
        let Some(need) = wanted else {
            if side.queue.is_empty() {
                writer.stop_waiting()?;
                self.poll_at.store(u64::MAX, Ordering::Relaxed);
            }
            round.more = !side.queue.is_empty();
            return Ok(round);
        };
        let room = writer.wait_for(need)?;
        round.more = room == Room::Available;
        if room == Room::Awaited
            && let Some(incoming) = &side.incoming
            && !incoming.producer_signals_room()?
        {
            let at = hypervisor.reference_time().saturating_add(POLL_INTERVAL);
            self.poll_at.store(at, Ordering::Relaxed);
            // The one who sleeps until the deadline has to learn of it.
            self.client.notify();
        }
        Ok(round)
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
    fn largest_packet(&self) -> u32 {
        largest_packet(self.config.outgoing_pages * PAGE_SIZE)
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

    fn put_aside(&self, body: Box<Body>) {
        self.send.lock(&*self.client.hypervisor).aside.push(body);
    }
}

/// What one round of draining the queue did.
struct Round {
    /// Packets moved to the ring.
    count: u64,
    signal: Signal,
    /// Whether there may be more to move at once.
    more: bool,
}

/// Books a packet that is in the ring: into its slot if an answer is to come, else back to the caller.
fn book(slots: &mut [Slot], body: Box<Body>) -> Option<Box<Body>> {
    if body.transaction.is_none() {
        return Some(body);
    }
    if let Some(slot) = slots.get_mut(body.slot) {
        slot.in_flight = Some(body);
    }
    None
}
