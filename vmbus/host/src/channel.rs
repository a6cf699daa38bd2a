//! The host's end of an open channel: both rings, and when the guest must be interrupted.

use vmbus::ids::VpIndex;
use vmbus::ring::{Outgoing, PacketBuffer, PushError, Reader, Ring, RingError, Signal, Writer};
use vmbus::shared::SharedPages;

use crate::bus::Opening;

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
        })
    }

    /// The ring memory: for tests that play a broken host.
    pub fn memory(&self) -> &SharedPages {
        &self.memory
    }

    /// Whether anybody besides this end still holds the ring memory. While the channel or its GPADL exists, the
    /// guest must.
    pub fn guest_holds_memory(&self) -> bool {
        self.memory.handle_count() > self.own_handles
    }

    /// Sends one packet.
    pub fn send(&mut self, packet: &Outgoing<'_>) -> Result<(), PushError> {
        self.push(packet)?;
        Ok(self.publish()?)
    }

    /// Writes one packet that the guest sees after [`publish`](Self::publish).
    pub fn push(&mut self, packet: &Outgoing<'_>) -> Result<(), PushError> {
        self.writer.push(packet)
    }

    /// Makes the written packets visible.
    pub fn publish(&mut self) -> Result<(), RingError> {
        let signal = self.writer.publish()?;
        self.interrupt |= signal == Signal::Needed;
        Ok(())
    }

    /// Asks the guest to interrupt when `bytes` are free in its incoming ring.
    pub fn wait_for_room(&mut self, bytes: u32) -> Result<bool, RingError> {
        Ok(self.writer.wait_for(bytes)? == vmbus::ring::Room::Available)
    }

    /// Takes the guest's next packet. Its room is the guest's again after [`release`](Self::release).
    pub fn receive(&mut self, packet: &mut PacketBuffer) -> Result<bool, RingError> {
        self.reader.read(packet)
    }

    /// Gives the room of the received packets back to the guest.
    pub fn release(&mut self) -> Result<(), RingError> {
        let signal = self.reader.publish()?;
        self.interrupt |= signal == Signal::Needed;
        Ok(())
    }

    /// Tells the guest not to signal new packets.
    pub fn mask(&mut self) -> Result<(), RingError> {
        self.reader.mask()
    }

    /// Asks the guest to signal new packets again; `true` when there are some already.
    pub fn unmask(&mut self) -> Result<bool, RingError> {
        self.reader.unmask()
    }

    /// The VP to interrupt, if the guest must be, once.
    pub fn take_interrupt(&mut self) -> Option<VpIndex> {
        core::mem::take(&mut self.interrupt).then_some(self.opening.target_vp)
    }
}
