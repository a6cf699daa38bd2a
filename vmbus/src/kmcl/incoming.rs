//! Received packets: values that are completed exactly once.

use alloc::vec::Vec;
use core::fmt;
use core::mem;
use core::ops::Range;
use core::sync::atomic::Ordering;

use super::channel::{Channel, Shared};
use crate::hypervisor::Level;
use crate::ring::{PacketBuffer, TransferPages};

/// A packet in the process-packet callback.
///
/// Complete it, hold it for later, defer it, or fail the channel: each takes the value.
/// Dropping it instead is a bug of the driver; that is logged, and the packet completes without data.
pub struct ReceivedPacket<'a> {
    channel: &'a Channel,
    content: Content,
    fate: &'a mut Fate,
    level: Level,
}

/// A packet that the driver keeps beyond the callback, to be completed from anywhere, in any order.
///
/// Dropping it without completing it is a bug of the driver; that is logged, and the packet completes without data.
pub struct IncomingPacket {
    channel: Channel,
    content: Option<Content>,
}

/// The private copy of a packet, and where the driver's data lies in it.
pub(super) struct Content {
    pub(super) buffer: PacketBuffer,
    pub(super) data: Range<usize>,
}

/// What became of a packet in the process-packet callback.
pub(super) enum Fate {
    /// The callback has not returned.
    Undecided,
    /// Completed; here is the buffer, unless the completion waits in it.
    Completed(Option<PacketBuffer>),
    /// The driver keeps it.
    Held,
    /// To be delivered again at PASSIVE.
    Deferred(Content),
    /// The channel is to be failed.
    Failed(PacketBuffer, &'static str),
}

impl Content {
    fn payload(&self) -> &[u8] {
        self.buffer
            .payload()
            .get(self.data.clone())
            .unwrap_or_default()
    }
}

impl<'a> ReceivedPacket<'a> {
    pub(super) fn new(
        channel: &'a Channel,
        content: Content,
        fate: &'a mut Fate,
        level: Level,
    ) -> Self {
        Self {
            channel,
            content,
            fate,
            level,
        }
    }

    /// The data, in private memory. Outside pipe mode it is padded to a multiple of 8 bytes.
    pub fn payload(&self) -> &[u8] {
        self.content.payload()
    }

    /// Whether the host asked for a completion. The packet must be completed in any case.
    pub fn completion_requested(&self) -> bool {
        self.content.buffer.completion_requested()
    }

    /// The pieces of a buffer known to both ends that the packet names, if any. They are the host's word:
    /// check them against the buffer.
    pub fn transfer_pages(&self) -> Option<TransferPages<'_>> {
        self.content.buffer.transfer_pages()
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
        *self.fate = Fate::Held;
        IncomingPacket {
            channel: self.channel.clone(),
            content: Some(self.take()),
        }
    }

    /// Has the packet delivered again, at PASSIVE, before any later one.
    pub fn defer_to_passive(mut self) {
        let content = self.take();
        *self.fate = Fate::Deferred(content);
    }

    /// Gives up on the channel: it is closed with this reason, and the packet is not completed.
    pub fn fail(mut self, reason: &'static str) {
        let content = self.take();
        *self.fate = Fate::Failed(content.buffer, reason);
    }

    fn take(&mut self) -> Content {
        Content {
            buffer: mem::take(&mut self.content.buffer),
            data: self.content.data.clone(),
        }
    }

    fn finish(&mut self, data: &[u8]) {
        let buffer = self.take().buffer;
        *self.fate = Fate::Completed(self.channel.shared().complete_incoming(buffer, data));
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
        self.content
            .as_ref()
            .map(Content::payload)
            .unwrap_or_default()
    }

    /// Whether the host asked for a completion. The packet must be completed in any case.
    pub fn completion_requested(&self) -> bool {
        self.content
            .as_ref()
            .is_some_and(|content| content.buffer.completion_requested())
    }

    /// The pieces of a buffer known to both ends that the packet names, if any. They are the host's word:
    /// check them against the buffer.
    pub fn transfer_pages(&self) -> Option<TransferPages<'_>> {
        self.content.as_ref()?.buffer.transfer_pages()
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
            if let Some(buffer) = shared.complete_incoming(content.buffer, data) {
                shared.recycle(buffer);
            }
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

/// Buffers for received packets. Grows to what is in use at one time, never beyond its limit,
/// and then allocates no more.
pub(super) struct Pool {
    free: Vec<PacketBuffer>,
    /// Buffers that exist, free or not.
    count: usize,
    limit: usize,
    /// Bytes that a new buffer has room for.
    size: usize,
}

impl Pool {
    pub(super) fn new(limit: usize, size: usize) -> Self {
        Self {
            free: Vec::with_capacity(limit),
            count: 0,
            limit,
            size,
        }
    }

    /// A buffer; `None` when the limit is reached or the heap is full.
    pub(super) fn take(&mut self) -> Option<PacketBuffer> {
        if let Some(buffer) = self.free.pop() {
            return Some(buffer);
        }
        if self.count == self.limit {
            return None;
        }
        let buffer = PacketBuffer::with_capacity(self.size).ok()?;
        self.count += 1;
        Some(buffer)
    }

    pub(super) fn put(&mut self, buffer: PacketBuffer) {
        self.free.push(buffer);
    }
}

impl Shared {
    /// Ends one delivered packet. Gives the buffer back unless the completion waits in it.
    pub(super) fn complete_incoming(
        &self,
        buffer: PacketBuffer,
        data: &[u8],
    ) -> Option<PacketBuffer> {
        let rest = if buffer.completion_requested() {
            self.send_completion(buffer, data)
        } else {
            Some(buffer)
        };
        self.outstanding.fetch_sub(1, Ordering::SeqCst);
        // Pairs with the dispatcher, which sets the flag first and looks at the count after.
        if self.starved.swap(false, Ordering::SeqCst) {
            self.defer();
        }
        if !self.receiving.load(Ordering::SeqCst) {
            // Closing waits for the last completion.
            self.client.request_attention();
        }
        rest
    }

    /// Takes a buffer back that no packet needs any more.
    pub(super) fn recycle(&self, buffer: PacketBuffer) {
        self.pool.lock(&*self.client.hypervisor).put(buffer);
        if self.starved.swap(false, Ordering::SeqCst) {
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
