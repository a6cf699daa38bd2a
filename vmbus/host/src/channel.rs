//! The host's end of an open channel: both rings, and when the guest must be interrupted.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use vmbus::ids::{GpadlHandle, PAGE_SIZE, VpIndex};
use vmbus::ring::{
    Kind, Outgoing, OwnedPacket, PacketBuffer, PushError, Reader, Ring, RingError, Signal, Writer,
};
use vmbus::shared::SharedPages;

use crate::bus::{Access, Gpadls, MapError, Opening};
use crate::faults::{self, ChannelFault, ChannelFaults, Direction};
use crate::memory::{AccessError, GuestBuffer, GuestMemory, Lease, MappedGpadl};

/// Where the producer's offset stands in a ring's control page (spec vmbus.md 6.1).
const PRODUCER: usize = 0;

/// Where the consumer's offset stands.
const CONSUMER: usize = 4;

/// An open channel as the host sees it.
#[derive(Debug)]
pub struct HostChannel {
    /// How the guest opened it.
    pub opening: Opening,
    memory: SharedPages,
    /// Handles to the memory that this end has.
    own_handles: usize,
    reader: Reader,
    writer: Writer,
    interrupt: bool,
    guest: GuestMemory,
    gpadls: Gpadls,
    lease: Lease,
    last_transaction: u64,
    faults: ChannelFaults,
    /// Reference time when the channel was served last.
    now: u64,
    /// Packets of the guest that come later, and when.
    late: VecDeque<(u64, PacketBuffer)>,
    /// Packets for the guest that go later, and when.
    held: VecDeque<(u64, OwnedPacket)>,
    /// There may be packets that nobody will signal.
    unseen: bool,
    /// Offsets that say nonsense from now on: the control page, and where in it.
    corrupt: Vec<(u32, usize)>,
}

/// A packet of the guest, taken from the ring.
#[derive(Clone, Debug)]
pub struct Received {
    /// What sort of packet it is.
    pub kind: Kind,
    /// The guest's transaction id, if it asks for a completion; in a completion that of the request.
    pub transaction: Option<u64>,
    /// The data, padded to a multiple of 8 bytes.
    pub payload: Vec<u8>,
    /// The memory that it lends. The host's until it completes the packet.
    pub external: Option<GuestBuffer>,
}

impl HostChannel {
    /// The host's end of the rings in `memory`, which are the pages of `opening`.
    pub fn new(opening: Opening, memory: SharedPages) -> Result<Self, RingError> {
        let before = memory.handle_count() - 1;
        let (upstream, downstream) = Ring::split(&memory, opening.downstream_page as usize)?;
        let (reader, writer) = (Reader::new(upstream), Writer::new(downstream)?);
        Ok(Self {
            own_handles: memory.handle_count() - before,
            opening,
            memory,
            reader,
            writer,
            interrupt: false,
            guest: GuestMemory::default(),
            gpadls: Gpadls::default(),
            lease: Lease::default(),
            last_transaction: 0,
            faults: ChannelFaults::default(),
            now: 0,
            late: VecDeque::new(),
            held: VecDeque::new(),
            unseen: false,
            corrupt: Vec::new(),
        })
    }

    /// The same channel, able to reach the memory that the guest lends.
    pub fn reaching(self, guest: &GuestMemory, gpadls: &Gpadls) -> Self {
        Self {
            guest: guest.clone(),
            gpadls: gpadls.clone(),
            ..self
        }
    }

    /// Maps a GPADL of this channel (`VmbChannelMapGpadl`). Dropping the mapping unmaps it; until then the guest does
    /// not get the memory back, unless the channel is rescinded or the connection ends.
    pub fn map_gpadl(&self, handle: GpadlHandle, access: Access) -> Result<MappedGpadl, MapError> {
        let mapped = self.gpadls.map(self.opening.channel, handle, access)?;
        Ok(self.guest.gpadl(mapped))
    }

    /// Handles of this channel's GPADLs besides that of the rings.
    pub fn gpadls(&self) -> Vec<GpadlHandle> {
        let mut handles = self.gpadls.of_channel(self.opening.channel);
        handles.retain(|handle| *handle != self.opening.ring);
        handles
    }

    /// The memory that a received packet lends (`VmbChannelPacketGetExternalData`).
    pub fn external_data(&self, packet: &PacketBuffer) -> Result<GuestBuffer, AccessError> {
        let data = self.guest.external_data(packet)?;
        Ok(data.leased(&self.lease))
    }

    /// The memory that packets lend is out of reach from now on, also for other threads.
    pub fn end_lease(&self) {
        self.lease.end();
    }

    /// The memory that packets have lent so far is out of reach from now on, also for other threads. That of the packets to
    /// come is not.
    pub fn renew_lease(&mut self) {
        self.lease.end();
        self.lease = Lease::default();
    }

    /// The ring memory: for tests that play a broken host.
    pub fn memory(&self) -> &SharedPages {
        &self.memory
    }

    /// Whether anybody besides this end still holds the ring memory. While the channel or its GPADL exists, the
    /// guest must. Of a part of the guest's memory nobody can tell.
    pub fn guest_holds_memory(&self) -> bool {
        self.memory.is_slice() || self.memory.handle_count() > self.own_handles
    }

    /// Sends one packet.
    pub fn send(&mut self, packet: &Outgoing<'_>) -> Result<(), PushError> {
        self.push(packet)?;
        Ok(self.publish()?)
    }

    /// Writes one packet that the guest sees after [`publish`](Self::publish).
    pub fn push(&mut self, packet: &Outgoing<'_>) -> Result<(), PushError> {
        let Some(fault) = self.faults.next(Direction::ToGuest) else {
            return self.writer.push(packet);
        };
        match fault {
            ChannelFault::Drop => Ok(()),
            ChannelFault::Rescind => {
                self.faults.rescind();
                Ok(())
            }
            ChannelFault::Delay(time) => {
                let at = self.now.saturating_add(time);
                self.held.push_back((at, packet.owned()));
                Ok(())
            }
            ChannelFault::CorruptRing => {
                self.corrupt.push((self.opening.downstream_page, PRODUCER));
                self.interrupt = true;
                self.writer.push(packet)
            }
            altered => {
                let mut packet = packet.owned();
                faults::alter(&mut packet, altered);
                self.writer.push(&packet.as_outgoing())
            }
        }
    }

    /// Makes the written packets visible.
    pub fn publish(&mut self) -> Result<(), RingError> {
        let signal = self.writer.publish()?;
        self.interrupt |= signal == Signal::Needed;
        self.corrupt();
        Ok(())
    }

    /// Writes the nonsense that a fault asked for.
    fn corrupt(&self) {
        for (page, field) in &self.corrupt {
            let at = *page as usize * PAGE_SIZE + field;
            if let Ok(offset) = self.memory.atomic_u32(at) {
                offset.store(u32::MAX - 7, Ordering::SeqCst);
            }
        }
    }

    /// When packets that a fault delays have to move on.
    pub fn deadline(&self) -> Option<u64> {
        let held = self.held.iter().map(|(at, _)| *at);
        let late = self.late.iter().map(|(at, _)| *at);
        held.chain(late).min()
    }

    /// Tells the time, and sends what was delayed until now.
    pub(crate) fn set_time(&mut self, now: u64) {
        self.now = now;
        let held = core::mem::take(&mut self.held);
        for (at, packet) in held {
            let due = at <= now;
            if !due || self.writer.push(&packet.as_outgoing()).is_err() {
                // One for which there is no room is tried again a millisecond later.
                let at = if due { now.saturating_add(10_000) } else { at };
                self.held.push_back((at, packet));
            }
        }
        // A broken ring shows at the provider's next access.
        let _ = self.publish();
    }

    /// Whether there may be packets that nobody will signal, once.
    pub(crate) fn take_unseen(&mut self) -> bool {
        core::mem::take(&mut self.unseen)
    }

    /// The faults that the packets meet.
    pub(crate) fn set_faults(&mut self, faults: ChannelFaults) {
        self.faults = faults;
    }

    /// Asks the guest to interrupt when `bytes` are free in its incoming ring.
    pub fn wait_for_room(&mut self, bytes: u32) -> Result<bool, RingError> {
        Ok(self.writer.wait_for(bytes)? == vmbus::ring::Room::Available)
    }

    /// Withdraws what [`wait_for_room`](Self::wait_for_room) asked.
    pub fn stop_waiting(&mut self) -> Result<(), RingError> {
        self.writer.stop_waiting()
    }

    /// Whether the guest has read everything that was sent.
    pub fn is_drained(&self) -> Result<bool, RingError> {
        self.writer.is_drained()
    }

    /// Takes the guest's next packet. Its room is the guest's again after [`release`](Self::release).
    pub fn receive(&mut self, packet: &mut PacketBuffer) -> Result<bool, RingError> {
        if self.faults.stalls(Direction::FromGuest) {
            return Ok(false);
        }
        let due = self.late.iter().position(|(at, _)| *at <= self.now);
        if let Some((_, late)) = due.and_then(|index| self.late.remove(index)) {
            *packet = late;
            return Ok(true);
        }
        while self.reader.read(packet)? {
            match self.faults.next(Direction::FromGuest) {
                None => return Ok(true),
                Some(ChannelFault::Delay(time)) => {
                    let at = self.now.saturating_add(time);
                    self.late.push_back((at, core::mem::take(packet)));
                }
                Some(ChannelFault::Rescind) => self.faults.rescind(),
                Some(ChannelFault::CorruptRing) => {
                    self.corrupt.push((0, CONSUMER));
                    self.interrupt = true;
                    return Ok(true);
                }
                // The others cannot be injected this way.
                Some(_) => {}
            }
            self.release()?;
        }
        Ok(false)
    }

    /// Takes all that the guest has sent, in order, and gives their room back. No quota holds any of it back: whoever
    /// wants back-pressure takes one [`receive`](Self::receive) at a time.
    pub fn receive_all(&mut self) -> Result<Vec<Received>, RingError> {
        let mut packet = PacketBuffer::default();
        let mut all = Vec::new();
        while self.receive(&mut packet)? {
            let is_answer = packet.kind() == Kind::COMPLETION;
            all.push(Received {
                kind: packet.kind(),
                transaction: (is_answer || packet.completion_requested())
                    .then_some(packet.transaction_id()),
                payload: packet.payload().to_vec(),
                external: self.external_data(&packet).ok(),
            });
        }
        self.release()?;
        Ok(all)
    }

    /// Answers a packet of the guest's that asked for it.
    pub fn complete(&mut self, transaction: u64, payload: &[u8]) -> Result<(), PushError> {
        self.send(&Outgoing::completion(transaction, payload))
    }

    /// Sends a packet and asks for its completion; returns the transaction id that the completion will repeat.
    pub fn request(&mut self, payload: &[u8]) -> Result<u64, PushError> {
        let id = self.last_transaction.wrapping_add(1);
        self.send(&Outgoing::in_band([payload, &[]]).with_completion(id))?;
        self.last_transaction = id;
        Ok(id)
    }

    /// Gives the room of the received packets back to the guest.
    pub fn release(&mut self) -> Result<(), RingError> {
        if self.reader.is_published() {
            return Ok(());
        }
        let signal = self.reader.publish()?;
        self.interrupt |= signal == Signal::Needed;
        self.corrupt();
        // What came between the last look and now was not signalled: the guest saw a ring that was not empty.
        fence(Ordering::SeqCst);
        self.unseen |= self.reader.peek()?.is_some();
        Ok(())
    }

    /// Tells the guest not to signal new packets.
    pub fn mask(&mut self) -> Result<(), RingError> {
        self.reader.mask()
    }

    /// Asks the guest to signal new packets again; `true` when there are some already.
    pub fn unmask(&mut self) -> Result<bool, RingError> {
        let more = self.reader.unmask()?;
        // What stands still cannot be taken. Whoever ends that wakes the provider.
        Ok(more && !self.faults.stalls(Direction::FromGuest))
    }

    /// The VP to interrupt, if the guest must be, once.
    pub fn take_interrupt(&mut self) -> Option<VpIndex> {
        if self.interrupt && self.faults.stalls(Direction::ToGuest) {
            return None;
        }
        core::mem::take(&mut self.interrupt).then_some(self.opening.target_vp)
    }
}
