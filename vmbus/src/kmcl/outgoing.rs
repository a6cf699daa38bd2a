//! Packets to send: owned objects that come back with their completion.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::fmt;
use core::mem;

use zerocopy::IntoBytes;

use super::builder::ChannelBuilder;
use super::channel::{Channel, Shared};
use super::error::{AllocateError, PacketError, SendError, SendFailure};
use super::external::{self, ExternalData};
use super::pipe;
use super::sender::{Order, Refusal, Sent};
use crate::ids::PAGE_SIZE;
use crate::ring::{PacketBuffer, ScatterList};

/// What runs when a packet has ended, at DISPATCH or PASSIVE: with the packet, which it owns from then on, and
/// with the host's answer, or nothing when none was asked for and the packet has entered the ring.
pub type CompletionRoutine = dyn Fn(OutgoingPacket, Result<&[u8], PacketError>) + Send + Sync;

/// The same as a plain function, which needs no memory of its own: what it has to know is in the packet, as
/// [`context`](OutgoingPacket::context) or [`user_data`](OutgoingPacket::user_data).
pub type CompletionFunction = fn(OutgoingPacket, Result<&[u8], PacketError>);

/// Something of the driver's that travels with a packet.
pub type UserData = Arc<dyn Any + Send + Sync>;

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
    pub(super) data: Vec<u8>,
    pub(super) external: ExternalData,
    pub(super) list: ScatterList,
    /// The id, while the host is to answer.
    pub(super) transaction: Option<u64>,
    pub(super) ending: Ending,
    /// What the host answered to a request; made when the packet is first used for one.
    pub(super) answer: Option<PacketBuffer>,
    /// The inline packet context, aligned for anything.
    context: Box<[u128]>,
    user_data: Option<UserData>,
    /// The slot that is reserved for the packet.
    pub(super) slot: usize,
}

/// What happens when the packet ends.
pub(super) enum Ending {
    /// It is put aside.
    Aside,
    Call(Arc<CompletionRoutine>),
    Run(CompletionFunction),
    /// A request that waits for it gets it.
    Request,
}

/// What a driver can tell about memory that it lends, for hosts that copy it: the hints `VMBUS_CHANNEL_FORMAT_FLAG_DATA_IN_ONLY`
/// and `..._DATA_OUT_ONLY` (spec kmcl.md 1.3). They only matter where lent memory goes through bounce buffers, in isolated VMs;
/// here the host gets the pages themselves, and the hints change nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SendFlags {
    /// The host only writes: what the memory held before need not reach it.
    pub data_in_only: bool,
    /// The host only reads.
    pub data_out_only: bool,
}

impl Body {
    fn new(config: &ChannelBuilder) -> Result<Self, AllocateError> {
        let mut data = Vec::new();
        data.try_reserve_exact(config.maximum_packet_size)
            .map_err(|_| AllocateError::NoMemory)?;
        let words = config
            .inline_packet_context_size
            .div_ceil(size_of::<u128>());
        let mut context = Vec::new();
        context
            .try_reserve_exact(words)
            .map_err(|_| AllocateError::NoMemory)?;
        context.resize(words, 0);
        let (bytes, ranges) = config.maximum_external.unwrap_or_default();
        let pages = external::most_pages(bytes, ranges);
        Ok(Self {
            data,
            external: ExternalData::new(),
            list: ScatterList::with_capacity(ranges, pages),
            transaction: None,
            ending: Ending::Aside,
            answer: None,
            context: context.into_boxed_slice(),
            user_data: None,
            slot: usize::MAX,
        })
    }

    /// Makes room for the answer to a request, which is none yet.
    pub(super) fn reserve_answer(&mut self, bytes: usize) -> Result<(), AllocateError> {
        let answer = match &mut self.answer {
            Some(answer) => answer,
            none => {
                let buffer =
                    PacketBuffer::with_capacity(bytes).map_err(|_| AllocateError::NoMemory)?;
                none.insert(buffer)
            }
        };
        answer
            .become_completion(&[])
            .map_err(|_| AllocateError::NoMemory)
    }

    /// Forgets everything that a driver put in.
    pub(super) fn forget(&mut self) {
        self.ending = Ending::Aside;
        self.external = ExternalData::new();
        self.user_data = None;
        self.context.fill(0);
    }
}

impl OutgoingPacket {
    pub(super) fn new(channel: Channel, body: Box<Body>) -> Self {
        Self {
            channel,
            body: Some(body),
        }
    }

    fn body(&mut self) -> Option<&mut Body> {
        self.body.as_deref_mut()
    }

    /// What the host answered, if the packet was that of a request.
    pub(super) fn answer(&self) -> &[u8] {
        self.body
            .as_deref()
            .and_then(|body| body.answer.as_ref())
            .map(PacketBuffer::payload)
            .unwrap_or_default()
    }

    /// The channel of the packet.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Sets what runs when the packet has ended. Without it the packet is put aside then.
    pub fn set_completion_routine(&mut self, routine: Arc<CompletionRoutine>) {
        if let Some(body) = self.body() {
            body.ending = Ending::Call(routine);
        }
    }

    /// The same with a plain function: nothing has to be allocated for it.
    pub fn set_completion_function(&mut self, routine: CompletionFunction) {
        if let Some(body) = self.body() {
            body.ending = Ending::Run(routine);
        }
    }

    /// The inline context of the packet: as many bytes as
    /// [`inline_packet_context_size`](ChannelBuilder::inline_packet_context_size) says, aligned to 16, zero in a new packet, and
    /// left alone by the library until the packet is put aside.
    pub fn context(&mut self) -> &mut [u8] {
        let bytes = self.channel.shared().config.inline_packet_context_size;
        self.body
            .as_deref_mut()
            .and_then(|body| body.context.as_mut_bytes().get_mut(..bytes))
            .unwrap_or_default()
    }

    /// Puts something of the driver's into the packet: what `VmbPacketSetPointer` is for. It stays until it is replaced or
    /// the packet is put aside.
    pub fn set_user_data(&mut self, data: Option<UserData>) {
        if let Some(body) = self.body() {
            body.user_data = data;
        }
    }

    /// What [`set_user_data`](Self::set_user_data) put in.
    pub fn user_data(&self) -> Option<&UserData> {
        self.body.as_deref()?.user_data.as_ref()
    }

    /// Takes back the memory that was lent with the last send. Empty after a send without, and when the
    /// guest has left a host that did not say whether it is done with it: then the library keeps it.
    pub fn take_external_data(&mut self) -> ExternalData {
        self.body()
            .map(|body| mem::take(&mut body.external))
            .unwrap_or_default()
    }

    /// Sends `data` as a message. The completion routine runs when it has entered the ring: perhaps
    /// before this returns, so hold no lock that it takes. At DISPATCH or PASSIVE.
    pub fn send(self, data: &[u8]) -> Result<(), SendError> {
        self.submit(data, ExternalData::new(), false)
    }

    /// Sends `data` as a request. The completion routine runs when the host has answered.
    pub fn send_transaction(self, data: &[u8]) -> Result<(), SendError> {
        self.submit(data, ExternalData::new(), true)
    }

    /// Sends `data` as a request that lends memory to the host. It is always a request: without an answer nobody would know when
    /// the host is done with the memory (spec kmcl.md 6.1, 23).
    ///
    /// # Errors
    ///
    /// The packet comes back with the memory: [`take_external_data`](Self::take_external_data).
    pub fn send_with_external_data(
        self,
        data: &[u8],
        external: ExternalData,
        _flags: SendFlags,
    ) -> Result<(), SendError> {
        if external.is_empty() {
            return Err(SendError {
                packet: self,
                reason: SendFailure::NoExternalData,
            });
        }
        self.submit(data, external, true)
    }

    fn submit(
        mut self,
        data: &[u8],
        external: ExternalData,
        transaction: bool,
    ) -> Result<(), SendError> {
        // A packet without a body is never handed out.
        let Some(mut body) = self.body.take() else {
            return Ok(());
        };
        body.external = external;
        let channel = self.channel.clone();
        let order = Order {
            data,
            transaction,
            request: None,
            may_wait: true,
        };
        let sent = match channel.shared().prepare(&mut body, &order) {
            Ok(()) => channel.shared().send(body, &order),
            Err(reason) => Err((body, Refusal::Failure(reason))),
        };
        match sent {
            Ok(Sent::Accepted { .. }) => Ok(()),
            Ok(Sent::Done { body, .. }) => {
                channel.finish_packet(body, Ok(&[]));
                Ok(())
            }
            Err((body, refusal)) => {
                self.body = Some(body);
                Err(SendError {
                    packet: self,
                    reason: match refusal {
                        Refusal::Failure(reason) => reason,
                        Refusal::Ended(_) | Refusal::Full => SendFailure::NotOpen,
                    },
                })
            }
        }
    }
}

impl Drop for OutgoingPacket {
    fn drop(&mut self) {
        if let Some(body) = self.body.take() {
            self.channel.shared().put_aside(body);
        }
    }
}

impl fmt::Debug for OutgoingPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OutgoingPacket")
    }
}

impl Channel {
    /// A packet to send, with everything that the send will need. At DISPATCH or PASSIVE.
    pub fn allocate_packet(&self) -> Result<OutgoingPacket, AllocateError> {
        let body = self.shared().take_packet()?;
        Ok(OutgoingPacket::new(self.clone(), body))
    }

    /// Sends `data` as a message in a packet that nobody needs to see again.
    pub fn send_message(&self, data: &[u8]) -> Result<(), MessageError> {
        let packet = self.allocate_packet().map_err(MessageError::Allocate)?;
        packet
            .send(data)
            .map_err(|error| MessageError::Send(error.reason))
    }

    /// Bytes of memory that one packet to send takes, with room for the largest data and external data that the channel is
    /// configured for: what `VmbChannelSizeofPacket` tells.
    pub fn packet_memory(&self) -> usize {
        let config = &self.shared().config;
        let (bytes, ranges) = config.maximum_external.unwrap_or_default();
        let words = ranges.saturating_add(external::most_pages(bytes, ranges));
        size_of::<Body>()
            .saturating_add(config.maximum_packet_size)
            .saturating_add(words.saturating_mul(8))
            .saturating_add(config.inline_packet_context_size.next_multiple_of(16))
    }

    /// Bytes that a packet with so many bytes of data, and this memory, takes in the outgoing ring.
    pub fn packet_footprint(&self, data: usize, external: &ExternalData) -> usize {
        let header = if self.shared().config.pipe {
            pipe::HEADER
        } else {
            0
        };
        FRAME
            .saturating_add(external.footprint())
            .saturating_add(data.saturating_add(header).saturating_add(7) & !7)
    }

    /// The most bytes that a packet may take in the outgoing ring.
    pub fn largest_packet(&self) -> usize {
        self.shared().largest_packet() as usize
    }
}

/// Bytes of a packet in the ring besides data and lent memory: descriptor and footer.
const FRAME: usize = 16 + 8;

impl ChannelBuilder {
    /// Bytes in the ring of the largest packet that this configuration allows.
    pub(super) fn largest_packet(&self) -> usize {
        let header = if self.pipe { pipe::HEADER } else { 0 };
        let (bytes, ranges) = self.maximum_external.unwrap_or_default();
        let pages = external::most_pages(bytes, ranges);
        let data = self.maximum_packet_size.saturating_add(header);
        FRAME
            .saturating_add(external::footprint(ranges, pages))
            .saturating_add(data.saturating_add(7) & !7)
    }

    /// Data pages of a ring that nobody asked to have a certain size: room for several of the largest packets.
    pub(super) fn default_ring_pages(&self) -> usize {
        const PACKETS: usize = 4;
        const AT_LEAST: usize = 4;
        self.largest_packet()
            .saturating_mul(PACKETS)
            .div_ceil(PAGE_SIZE)
            .max(AT_LEAST)
    }
}

impl Shared {
    /// A packet, new or used before.
    pub(super) fn take_packet(&self) -> Result<Box<Body>, AllocateError> {
        self.check_mode()?;
        let hypervisor = &*self.client.hypervisor;
        let maximum = self.config.maximum_packet_count;
        if let Some(body) = self.send.lock(hypervisor).reuse(maximum)? {
            return Ok(body);
        }
        let mut body = Box::new(Body::new(&self.config)?);
        body.slot = self.send.lock(hypervisor).slots.add(maximum)?;
        Ok(body)
    }

    /// Refuses a channel in raw mode.
    pub(super) fn check_mode(&self) -> Result<(), AllocateError> {
        match self.config.callbacks.on_signal {
            Some(_) => Err(AllocateError::Raw),
            None => Ok(()),
        }
    }

    /// Checks a send before the lock is taken, and writes the list of lent pages.
    pub(super) fn prepare(&self, body: &mut Body, order: &Order<'_>) -> Result<(), SendFailure> {
        self.check_data(order.data)?;
        let lent = &body.external;
        if self.config.pipe && (order.transaction || !lent.is_empty()) {
            return Err(SendFailure::Pipe);
        }
        body.list.clear();
        let mut need = FRAME.saturating_add(lent.footprint());
        if !lent.is_empty() {
            let (maximum_bytes, maximum_ranges) = self.config.maximum_external.unwrap_or_default();
            let (bytes, ranges) = (lent.len(), lent.range_count());
            if bytes > maximum_bytes || ranges > maximum_ranges {
                return Err(SendFailure::TooMuchExternalData {
                    bytes,
                    ranges,
                    maximum_bytes,
                    maximum_ranges,
                });
            }
            lent.describe(&mut body.list).map_err(SendFailure::Ring)?;
        }
        let header = if self.config.pipe { pipe::HEADER } else { 0 };
        need = need.saturating_add((order.data.len() + header).next_multiple_of(8));
        let limit = self.largest_packet();
        if need > limit as usize {
            return Err(SendFailure::TooLarge {
                need: need as u64,
                limit,
            });
        }
        Ok(())
    }

    /// Checks the length of the data alone.
    pub(super) fn check_data(&self, data: &[u8]) -> Result<(), SendFailure> {
        let (length, maximum) = (data.len(), self.config.maximum_packet_size);
        if length > maximum {
            return Err(SendFailure::TooLong { length, maximum });
        }
        Ok(())
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
