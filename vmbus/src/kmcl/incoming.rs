//! Received packets: values that are completed exactly once.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{Deref, DerefMut, Range};

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::channel::{Channel, Shared};
use super::dispatcher::Delivery;
use crate::hypervisor::Level;
use crate::ring::{PacketBuffer, TransferPages};

/// A packet in the process-packet callback.
///
/// Complete it, hold it for later, defer it, or fail the channel: each takes the value.
/// Dropping it instead is a bug of the driver; that is logged, and the packet completes without data.
pub struct ReceivedPacket<'a> {
    channel: &'a Channel,
    /// There until the packet has met its fate.
    content: Option<Box<Content>>,
    fate: &'a mut Fate,
    level: Level,
}

/// A packet that the driver keeps beyond the callback, to be completed from anywhere, in any order.
///
/// Dropping it without completing it is a bug of the driver; that is logged, and the packet completes without data.
pub struct IncomingPacket {
    channel: Channel,
    content: Option<Box<Content>>,
}

/// The private copy of a packet, where the driver's data lies in it, and what the driver writes down about it.
pub(super) struct Content {
    buffer: PacketBuffer,
    pub(super) data: Range<usize>,
    context: Box<[ContextUnit]>,
    context_size: usize,
    /// The opening of the channel in which it came: its answer belongs into no other.
    pub(super) opening: u32,
}

/// A piece of a client context. The alignment suits whatever a driver puts there.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(16))]
struct ContextUnit([u8; 16]);

/// What became of a packet in the process-packet callback.
pub(super) enum Fate {
    /// The callback has not returned.
    Undecided,
    /// Completed; here is the buffer, unless the completion waits in it.
    Completed(Option<Box<Content>>),
    /// The driver keeps it.
    Held,
    /// To be delivered again at PASSIVE.
    Deferred(Box<Content>),
    /// The channel is to be failed.
    Failed(Box<Content>, &'static str),
}

impl Content {
    /// A place for packets of `bytes` bytes and as much context as the driver wants, if the heap has room.
    fn new(bytes: usize, context_size: usize) -> Option<Box<Self>> {
        let mut context = Vec::new();
        let units = context_size.div_ceil(size_of::<ContextUnit>());
        context.try_reserve_exact(units).ok()?;
        context.resize(units, ContextUnit([0; 16]));
        Some(Box::new(Self {
            buffer: PacketBuffer::with_capacity(bytes).ok()?,
            data: 0..0,
            context: context.into_boxed_slice(),
            context_size,
            opening: 0,
        }))
    }

    /// The driver's data.
    fn data(&self) -> &[u8] {
        self.buffer
            .payload()
            .get(self.data.clone())
            .unwrap_or_default()
    }

    fn data_mut(&mut self) -> &mut [u8] {
        let data = self.data.clone();
        self.buffer.payload_mut().get_mut(data).unwrap_or_default()
    }

    fn context(&mut self) -> &mut [u8] {
        let bytes = self.context.as_mut_bytes();
        bytes.get_mut(..self.context_size).unwrap_or_default()
    }

    /// Makes the context what a driver finds with a new packet.
    #[inline]
    pub(super) fn clear_context(&mut self) {
        if !self.context.is_empty() {
            self.context.as_mut_bytes().zero();
        }
    }
}

impl Deref for Content {
    type Target = PacketBuffer;

    fn deref(&self) -> &PacketBuffer {
        &self.buffer
    }
}

impl DerefMut for Content {
    fn deref_mut(&mut self) -> &mut PacketBuffer {
        &mut self.buffer
    }
}

impl<'a> ReceivedPacket<'a> {
    pub(super) fn new(
        channel: &'a Channel,
        content: Box<Content>,
        fate: &'a mut Fate,
        level: Level,
    ) -> Self {
        Self {
            channel,
            content: Some(content),
            fate,
            level,
        }
    }

    /// The data, in private memory. Outside pipe mode it is padded to a multiple of 8 bytes.
    pub fn payload(&self) -> &[u8] {
        payload(&self.content)
    }

    /// The same, to be worked on in place.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.content
            .as_deref_mut()
            .map(Content::data_mut)
            .unwrap_or_default()
    }

    /// Whether the host asked for a completion. The packet must be completed in any case.
    pub fn completion_requested(&self) -> bool {
        completion_requested(&self.content)
    }

    /// The pieces of a buffer known to both ends that the packet names, if any. They are the host's word:
    /// check them against the buffer.
    pub fn transfer_pages(&self) -> Option<TransferPages<'_>> {
        self.content.as_ref()?.transfer_pages()
    }

    /// Memory of the driver's own that goes with the packet until it completes, as long as
    /// [`client_context_size`](super::ChannelBuilder::client_context_size) says and aligned to 16 bytes. All zeros when the
    /// packet is delivered; a deferred packet keeps it (`VmbChannelPacketGetClientContext`, spec kmcl.md 1.8).
    pub fn client_context(&mut self) -> &mut [u8] {
        client_context(&mut self.content)
    }

    /// The level at which the callback runs.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Ends the use of the packet; `data` goes to the host if it asked for a completion.
    pub fn complete(mut self, data: &[u8]) {
        self.finish(data);
    }

    /// Keeps the packet beyond the callback.
    pub fn hold(mut self) -> IncomingPacket {
        let content = self.content.take();
        *self.fate = Fate::Held;
        self.channel.shared().quota.hold();
        IncomingPacket {
            channel: self.channel.clone(),
            content,
        }
    }

    /// Has the packet delivered again, at PASSIVE, before any later one, with its client context as it is now.
    pub fn defer_to_passive(mut self) {
        if let Some(content) = self.content.take() {
            *self.fate = Fate::Deferred(content);
        }
    }

    /// Gives up on the channel: this packet is consumed without a completion, no further one is delivered, and
    /// the channel closes with this reason. Enabling it again starts afresh (spec kmcl.md 6.1, 26).
    pub fn fail(mut self, reason: &'static str) {
        if let Some(content) = self.content.take() {
            *self.fate = Fate::Failed(content, reason);
        }
    }

    fn finish(&mut self, data: &[u8]) {
        if let Some(content) = self.content.take() {
            let rest = self.channel.shared().send_answer(content, data);
            *self.fate = Fate::Completed(rest);
        }
    }
}

impl Drop for ReceivedPacket<'_> {
    fn drop(&mut self) {
        if matches!(self.fate, Fate::Undecided) {
            self.channel.shared().report_uncompleted();
            self.finish(&[]);
        }
    }
}

impl IncomingPacket {
    /// The data, in private memory. Outside pipe mode it is padded to a multiple of 8 bytes.
    pub fn payload(&self) -> &[u8] {
        payload(&self.content)
    }

    /// Whether the host asked for a completion. The packet must be completed in any case.
    pub fn completion_requested(&self) -> bool {
        completion_requested(&self.content)
    }

    /// The pieces of a buffer known to both ends that the packet names, if any. They are the host's word:
    /// check them against the buffer.
    pub fn transfer_pages(&self) -> Option<TransferPages<'_>> {
        self.content.as_ref()?.transfer_pages()
    }

    /// Memory of the driver's own that goes with the packet: the same as in the callback
    /// ([`ReceivedPacket::client_context`]), with what was written there.
    pub fn client_context(&mut self) -> &mut [u8] {
        client_context(&mut self.content)
    }

    /// The channel that the packet came on.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Ends the use of the packet; `data` goes to the host if it asked for a completion. At DISPATCH or PASSIVE.
    pub fn complete(mut self, data: &[u8]) {
        self.finish(data);
    }

    fn finish(&mut self, data: &[u8]) {
        if let Some(content) = self.content.take() {
            let shared = self.channel.shared();
            if let Some(content) = shared.send_answer(content, data) {
                shared.recycle(content);
            }
            shared.released();
        }
    }
}

impl Drop for IncomingPacket {
    fn drop(&mut self) {
        if self.content.is_some() {
            self.channel.shared().report_uncompleted();
            self.finish(&[]);
        }
    }
}

fn payload(content: &Option<Box<Content>>) -> &[u8] {
    content.as_deref().map(Content::data).unwrap_or_default()
}

fn completion_requested(content: &Option<Box<Content>>) -> bool {
    content
        .as_ref()
        .is_some_and(|content| content.completion_requested())
}

fn client_context(content: &mut Option<Box<Content>>) -> &mut [u8] {
    content
        .as_deref_mut()
        .map(Content::context)
        .unwrap_or_default()
}

impl fmt::Debug for ReceivedPacket<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ReceivedPacket")
            .field(&self.payload().len())
            .finish()
    }
}

impl fmt::Debug for IncomingPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IncomingPacket")
            .field(&self.payload().len())
            .finish()
    }
}

/// Places for received packets. Grows to what is in use at one time, never beyond its limit,
/// and then allocates no more.
pub(super) struct Pool {
    #[expect(
        clippy::vec_box,
        reason = "packets move in and out without being copied"
    )]
    free: Vec<Box<Content>>,
    /// Places that exist, free or not.
    count: usize,
    limit: usize,
    /// Bytes that a new place has room for.
    size: usize,
    context_size: usize,
}

impl Pool {
    pub(super) fn new(limit: usize, size: usize, context_size: usize) -> Self {
        Self {
            free: Vec::with_capacity(limit),
            count: 0,
            limit,
            size,
            context_size,
        }
    }

    /// A place; `None` when the limit is reached or the heap is full.
    pub(super) fn take(&mut self) -> Option<Box<Content>> {
        if let Some(content) = self.free.pop() {
            return Some(content);
        }
        if self.count == self.limit {
            return None;
        }
        let content = Content::new(self.size, self.context_size)?;
        self.count += 1;
        Some(content)
    }

    pub(super) fn put(&mut self, content: Box<Content>) {
        self.free.push(content);
    }
}

impl Shared {
    /// Answers a delivered packet if the host asked for that. Gives the packet back unless the answer waits in it.
    fn send_answer(&self, content: Box<Content>, data: &[u8]) -> Option<Box<Content>> {
        if content.completion_requested() {
            self.send_completion(content, data)
        } else {
            Some(content)
        }
    }

    /// Counts a packet that the driver held as completed, and tells whoever waits for that.
    fn released(&self) {
        if self.quota.complete() {
            self.defer();
        }
        if self.delivery.get() != Delivery::All {
            // Closing waits for the last completion.
            self.client.request_attention();
        }
    }

    /// Takes a place back that no packet needs any more.
    pub(super) fn recycle(&self, content: Box<Content>) {
        self.pool.lock(&*self.client.hypervisor).put(content);
        // The dispatcher sets the mark before it looks into the pool for the last time.
        if self.quota.take_starved() {
            self.defer();
        }
    }

    fn report_uncompleted(&self) {
        self.counters.uncompleted_drops.add(1);
        log::error!(
            "{}: driver bug: a received packet was dropped without being completed",
            self.config.friendly_name
        );
    }
}
