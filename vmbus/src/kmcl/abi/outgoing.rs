//! Packets to send as C has them: objects with handles, which hold packets of the Rust API while they are the driver's
//! (spec kmcl.md 1.9 and 3).

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::arguments::{In, Memory, Out};
use super::callbacks::{PFN_VMB_PACKET_COMPLETION_ROUTINE, PFN_VMB_PACKET_COMPLETION_ROUTINE_EX};
use super::events::{Context, NOTHING};
use super::handles::{BUSY, Handle, Kind, Slot};
use super::memory::{self, Piece};
use super::object::{ChannelObject, ChannelSlot, PLACED, channel_slot};
use super::types::{
    LARGE_INTEGER, MDL, NTSTATUS, PFN_NUMBER, PVOID, STATUS_BUFFER_OVERFLOW, STATUS_CANCELLED,
    STATUS_DEVICE_REMOVED, STATUS_INSUFFICIENT_RESOURCES, STATUS_INVALID_DEVICE_STATE,
    STATUS_INVALID_PARAMETER, STATUS_INVALID_PARAMETER_1, STATUS_INVALID_PARAMETER_2,
    STATUS_INVALID_PARAMETER_3, STATUS_SUCCESS, STATUS_UNSUCCESSFUL, VMBCHANNEL, VMBPACKET,
    VMBUS_CHANNEL_FORMAT_FLAG_DATA_IN_ONLY, VMBUS_CHANNEL_FORMAT_FLAG_DATA_OUT_ONLY,
    VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH, VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION,
    VMBUS_CHANNEL_FORMAT_FLAGS,
};
use crate::kmcl::{
    AllocateError, Channel, CompletionRoutine, ExternalData, OutgoingPacket, PacketError,
    RequestError, SendFailure, SendFlags, Timeout,
};

/// The packet is the driver's.
const IDLE: u8 = 2;
/// The packet is the library's.
const FLIGHT: u8 = 3;

/// A packet object. Whoever has brought the slot to [`BUSY`] owns the content.
#[derive(Default)]
pub(super) struct Place {
    content: UnsafeCell<Content>,
    pointer: AtomicPtr<c_void>,
    /// Where the inline context is.
    context: AtomicPtr<c_void>,
    /// What the driver knows the packet by: the handle, or the address of its memory.
    name: AtomicUsize,
}

#[derive(Default)]
struct Content {
    /// The packet of the Rust API, while it is not in flight.
    packet: Option<OutgoingPacket>,
    routine: Routine,
    /// What the Rust API calls: made once for each slot.
    callback: Option<Arc<CompletionRoutine>>,
    /// The inline context, aligned for anything.
    context: Vec<u128>,
    /// Whether the driver gave the memory.
    placed: bool,
}

#[derive(Clone, Copy, Default)]
enum Routine {
    /// The packet is freed.
    #[default]
    Free,
    Plain(PFN_VMB_PACKET_COMPLETION_ROUTINE),
    Ex(Context, PFN_VMB_PACKET_COMPLETION_ROUTINE_EX),
}

// SAFETY: the cell is touched only by the one that brought the slot to `BUSY`; what is in it may be sent.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    /// The content, for the one that has the slot in `BUSY`, with nothing of the driver's called meanwhile.
    fn with<R>(&self, work: impl FnOnce(&mut Content) -> R) -> R {
        // SAFETY: the caller has the slot in `BUSY`, and `work` does not come here again.
        work(unsafe { &mut *self.content.get() })
    }
}

/// A packet object in its slot.
#[derive(Clone, Copy)]
struct Packet {
    handle: Handle,
    channel: &'static ChannelSlot,
    slot: &'static Slot<Place>,
}

impl Packet {
    fn find(packet: VMBPACKET) -> Option<Self> {
        let decode = |word| Handle::decode(word, Kind::Packet);
        let handle = decode(packet.0).or_else(|| decode(PLACED.get(packet.0)?))?;
        let channel = channel_slot(handle.owner)?;
        let slot = channel.packets.get(handle.index)?;
        slot.state(handle.generation)?;
        // A packet in the driver's memory is known by its address only.
        (slot.value.name.load(Ordering::Relaxed) == packet.0).then_some(Self {
            handle,
            channel,
            slot,
        })
    }

    /// A new object for a packet of the Rust API.
    fn create(
        object: &ChannelObject,
        packet: OutgoingPacket,
        address: Option<usize>,
        context: Vec<u128>,
    ) -> Option<VMBPACKET> {
        let (index, generation, slot) = object.place.packets.claim(u32::MAX)?;
        let it = Self {
            handle: Handle {
                kind: Kind::Packet,
                owner: object.owner,
                index,
                generation,
            },
            channel: object.place,
            slot,
        };
        let word = it.handle.encode();
        if let Some(address) = address
            && !PLACED.set(address, word)
        {
            object.place.packets.release(index, slot, generation);
            return None;
        }
        let name = address.unwrap_or(word);
        let place = &slot.value;
        place.with(|content| {
            content.packet = Some(packet);
            content.routine = Routine::Free;
            content.context = context;
            content.placed = address.is_some();
            let pointer = content.context.as_mut_ptr();
            let pointer = if content.context.is_empty() {
                ptr::null_mut()
            } else {
                pointer.cast()
            };
            place.context.store(pointer, Ordering::Relaxed);
            content
                .callback
                .get_or_insert_with(|| Arc::new(move |packet, result| it.complete(packet, result)));
        });
        place.pointer.store(ptr::null_mut(), Ordering::Relaxed);
        place.name.store(name, Ordering::Relaxed);
        slot.advance(generation, BUSY, IDLE);
        Some(VMBPACKET(name))
    }

    /// Takes the packet for a moment, if it is the driver's.
    fn borrow<R>(&self, work: impl FnOnce(&mut Content) -> R) -> Option<R> {
        let generation = self.handle.generation;
        if !self.slot.advance(generation, IDLE, BUSY) {
            return None;
        }
        let result = self.slot.value.with(work);
        self.slot.advance(generation, BUSY, IDLE);
        Some(result)
    }

    /// Frees the object. The caller has the slot in `BUSY`.
    fn end(&self) {
        let packet = self.slot.value.with(|content| {
            content.context = Vec::new();
            content.packet.take()
        });
        let name = self.slot.value.name.swap(0, Ordering::Relaxed);
        PLACED.remove(name);
        let generation = self.handle.generation;
        self.channel
            .packets
            .release(self.handle.index, self.slot, generation);
        drop(packet);
    }

    /// The packet has ended: hands it to the driver's routine, or frees it. Called for whatever generation is there: one
    /// slot has one packet in flight.
    fn complete(&self, packet: OutgoingPacket, result: Result<&[u8], PacketError>) {
        let (generation, _) = self.slot.current();
        if !self.slot.advance(generation, FLIGHT, BUSY) {
            return;
        }
        let it = Self {
            handle: Handle {
                generation,
                ..self.handle
            },
            ..*self
        };
        let place = &self.slot.value;
        let routine = place.with(|content| {
            content.packet = Some(packet);
            content.routine
        });
        if let Routine::Free = routine {
            return it.end();
        }
        let name = VMBPACKET(place.name.load(Ordering::Relaxed));
        self.slot.advance(generation, BUSY, IDLE);
        let (status, data) = match result {
            Ok(data) => (STATUS_SUCCESS, data),
            Err(error) => (status_of_end(error), &[][..]),
        };
        let buffer = if data.is_empty() {
            NOTHING
        } else {
            data.as_ptr().cast_mut().cast()
        };
        // A packet is far shorter than 4 GiB.
        let length = data.len() as u32;
        match routine {
            Routine::Plain(Some(routine)) => {
                // SAFETY: the driver set a function of this type; it only reads the buffer, during the call.
                unsafe { routine(name, status, buffer, length) };
            }
            Routine::Ex(context, Some(routine)) => {
                // SAFETY: as above.
                unsafe { routine(name, context.0, status, buffer, length) };
            }
            _ => {}
        }
    }
}

/// Ends every packet of a channel that ends.
pub(super) fn end_all(object: &ChannelObject) {
    for (index, slot) in object.place.packets.all() {
        let (generation, _) = slot.current();
        if slot.advance(generation, IDLE, BUSY) {
            Packet {
                handle: Handle {
                    kind: Kind::Packet,
                    owner: object.owner,
                    index,
                    generation,
                },
                channel: object.place,
                slot,
            }
            .end();
        }
    }
}

fn status_of_end(error: PacketError) -> NTSTATUS {
    match error {
        PacketError::Removed(_) => STATUS_DEVICE_REMOVED,
    }
}

fn status_of_refusal(reason: SendFailure) -> NTSTATUS {
    match reason {
        SendFailure::NotOpen => STATUS_DEVICE_REMOVED,
        SendFailure::TooLong { .. } => STATUS_INVALID_PARAMETER_3,
        SendFailure::TooLarge { .. }
        | SendFailure::Pipe
        | SendFailure::NoExternalData
        | SendFailure::TooMuchExternalData { .. } => STATUS_INVALID_PARAMETER,
        SendFailure::Ring(_) => STATUS_UNSUCCESSFUL,
    }
}

fn status_of_request(error: RequestError) -> NTSTATUS {
    match error {
        RequestError::NotQueued | RequestError::AnswerTooLong { .. } => STATUS_BUFFER_OVERFLOW,
        RequestError::Cancelled => STATUS_CANCELLED,
        RequestError::Removed(_) => STATUS_DEVICE_REMOVED,
        RequestError::WouldDeadlock | RequestError::WouldBlock => STATUS_INVALID_DEVICE_STATE,
        RequestError::Allocate(AllocateError::Raw) => STATUS_INVALID_PARAMETER_1,
        RequestError::Allocate(_) => STATUS_INSUFFICIENT_RESOURCES,
        RequestError::Send(reason) => status_of_refusal(reason),
    }
}

pub(super) fn allocate(channel: VMBCHANNEL) -> VMBPACKET {
    let packet = || {
        let object = ChannelObject::find(channel)?;
        let packet = object.channel()?.allocate_packet().ok()?;
        let bytes = object.inline_context.load(Ordering::Relaxed);
        let words = bytes.div_ceil(size_of::<u128>());
        let mut context = Vec::new();
        context.try_reserve_exact(words).ok()?;
        context.resize(words, 0);
        Packet::create(&object, packet, None, context)
    };
    packet().unwrap_or(VMBPACKET::NULL)
}

pub(super) fn initialize(channel: VMBCHANNEL, packet: VMBPACKET, bytes: u32) -> NTSTATUS {
    let Some((object, channel)) =
        ChannelObject::find(channel).and_then(|object| Some((object.clone(), object.channel()?)))
    else {
        return STATUS_INVALID_PARAMETER_1;
    };
    if packet.is_null() || Handle::decode(packet.0, Kind::Packet).is_some() {
        return STATUS_INVALID_PARAMETER_2;
    }
    if (bytes as usize) < channel.packet_memory() {
        return STATUS_INVALID_PARAMETER_3;
    }
    // Memory that was a packet before is a new one from now on.
    match PLACED.get(packet.0).map(|_| Packet::find(packet)) {
        None => {}
        Some(Some(old)) if old.slot.advance(old.handle.generation, IDLE, BUSY) => old.end(),
        Some(_) => return STATUS_INVALID_PARAMETER_2,
    }
    let created = channel
        .allocate_packet()
        .ok()
        .and_then(|new| Packet::create(&object, new, Some(packet.0), Vec::new()));
    match created {
        Some(_) => STATUS_SUCCESS,
        None => STATUS_INSUFFICIENT_RESOURCES,
    }
}

pub(super) fn size_of_packet(channel: VMBCHANNEL) -> u32 {
    ChannelObject::find(channel)
        .and_then(|object| object.channel())
        .map_or(0, |channel| {
            u32::try_from(channel.packet_memory()).unwrap_or(u32::MAX)
        })
}

pub(super) fn free(packet: VMBPACKET) {
    let freed = Packet::find(packet).is_some_and(|it| {
        let generation = it.handle.generation;
        if !it.slot.advance(generation, IDLE, BUSY) {
            return false;
        }
        let placed = it.slot.value.with(|content| content.placed);
        if placed {
            it.slot.advance(generation, BUSY, IDLE);
        } else {
            it.end();
        }
        !placed
    });
    if !freed {
        log::error!("driver bug: {packet:?} is freed, which is no packet that can be");
    }
}

pub(super) fn get_channel(packet: VMBPACKET) -> VMBCHANNEL {
    Packet::find(packet)
        .and_then(|it| it.channel.handle())
        .unwrap_or(VMBCHANNEL::NULL)
}

pub(super) fn get_pointer(packet: VMBPACKET) -> PVOID {
    Packet::find(packet).map_or(NOTHING, |it| it.slot.value.pointer.load(Ordering::Acquire))
}

pub(super) fn set_pointer(packet: VMBPACKET, pointer: Memory) {
    match Packet::find(packet) {
        Some(it) => it
            .slot
            .value
            .pointer
            .store(pointer.into_c(), Ordering::Release),
        None => log::error!("driver bug: a pointer for {packet:?}, which is no packet"),
    }
}

pub(super) fn get_inline_context(packet: VMBPACKET) -> PVOID {
    Packet::find(packet).map_or(NOTHING, |it| it.slot.value.context.load(Ordering::Relaxed))
}

fn set_routine(packet: VMBPACKET, routine: Routine) {
    let set = Packet::find(packet).and_then(|it| it.borrow(|content| content.routine = routine));
    if set.is_none() {
        log::error!(
            "driver bug: a completion routine for {packet:?}, which is no packet that can be"
        );
    }
}

pub(super) fn set_completion_routine(
    packet: VMBPACKET,
    routine: PFN_VMB_PACKET_COMPLETION_ROUTINE,
) {
    set_routine(
        packet,
        match routine {
            Some(_) => Routine::Plain(routine),
            None => Routine::Free,
        },
    );
}

pub(super) fn set_completion_routine_ex(
    packet: VMBPACKET,
    context: Memory,
    routine: PFN_VMB_PACKET_COMPLETION_ROUTINE_EX,
) {
    set_routine(
        packet,
        match routine {
            Some(_) => Routine::Ex(Context(context.into_c()), routine),
            None => Routine::Free,
        },
    );
}

/// What a packet lends.
enum External {
    Nothing,
    Mdl(Out<MDL>, Piece),
    Pages(Out<PFN_NUMBER>, u32),
}

impl External {
    /// Describes it in `into`, which keeps its memory from send to send.
    fn describe(&self, into: &mut ExternalData) -> Result<(), NTSTATUS> {
        into.clear();
        match self {
            Self::Nothing => Ok(()),
            Self::Mdl(mdl, piece) => memory::describe_mdl(mdl, piece, into),
            Self::Pages(pages, count) => {
                *into = memory::describe_pages(pages, *count)?;
                Ok(())
            }
        }
    }

    fn is_some(&self) -> bool {
        !matches!(self, Self::Nothing)
    }
}

/// Checks the flags of a send.
fn check_flags(flags: u32, external: &External) -> Result<(), NTSTATUS> {
    let waits = flags & VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION != 0;
    if flags & !VMBUS_CHANNEL_FORMAT_FLAGS != 0 || external.is_some() && !waits {
        return Err(STATUS_INVALID_PARAMETER);
    }
    Ok(())
}

fn submit(
    packet: VMBPACKET,
    buffer: &Memory,
    length: u32,
    external: &External,
    flags: u32,
) -> Result<(), NTSTATUS> {
    let it = Packet::find(packet).ok_or(STATUS_INVALID_PARAMETER_1)?;
    let data = buffer.bytes(length).ok_or(STATUS_INVALID_PARAMETER_2)?;
    check_flags(flags, external)?;
    let object = it.channel.object().ok_or(STATUS_INVALID_PARAMETER_1)?;
    let channel = object.open_channel().ok_or(STATUS_DEVICE_REMOVED)?;
    let generation = it.handle.generation;
    if !it.slot.advance(generation, IDLE, BUSY) {
        return Err(STATUS_INVALID_PARAMETER_1);
    }
    let ready = it
        .slot
        .value
        .with(|content| prepare(content, &channel, external));
    let (sending, lent) = match ready {
        Ok(ready) => ready,
        Err(status) => {
            it.slot.advance(generation, BUSY, IDLE);
            return Err(status);
        }
    };
    // It may complete before the call returns.
    it.slot.advance(generation, BUSY, FLIGHT);
    let sent = if external.is_some() {
        let hints = SendFlags {
            data_in_only: flags & VMBUS_CHANNEL_FORMAT_FLAG_DATA_IN_ONLY != 0,
            data_out_only: flags & VMBUS_CHANNEL_FORMAT_FLAG_DATA_OUT_ONLY != 0,
        };
        sending.send_with_external_data(data, lent, hints)
    } else if flags & VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION != 0 {
        sending.send_transaction(data)
    } else {
        sending.send(data)
    };
    sent.map_err(|error| {
        if it.slot.advance(generation, FLIGHT, BUSY) {
            it.slot
                .value
                .with(|content| content.packet = Some(error.packet));
            it.slot.advance(generation, BUSY, IDLE);
        }
        status_of_refusal(error.reason)
    })
}

/// Makes a packet ready to be sent on the channel as it is now.
fn prepare(
    content: &mut Content,
    channel: &Channel,
    external: &External,
) -> Result<(OutgoingPacket, ExternalData), NTSTATUS> {
    if content.placed && matches!(content.routine, Routine::Free) {
        return Err(STATUS_INVALID_PARAMETER_1);
    }
    // A channel that was configured anew has other packets.
    let known = content
        .packet
        .take_if(|packet| Arc::ptr_eq(packet.channel().shared(), channel.shared()));
    let mut packet = match known {
        Some(packet) => packet,
        None => {
            content.packet = None;
            channel
                .allocate_packet()
                .map_err(|_| STATUS_INSUFFICIENT_RESOURCES)?
        }
    };
    let mut lent = packet.take_external_data();
    if let Err(status) = external.describe(&mut lent) {
        content.packet = Some(packet);
        return Err(status);
    }
    if let Some(callback) = &content.callback {
        packet.set_completion_routine(callback.clone());
    }
    Ok((packet, lent))
}

fn status(result: Result<(), NTSTATUS>) -> NTSTATUS {
    result.err().unwrap_or(STATUS_SUCCESS)
}

pub(super) fn send(
    packet: VMBPACKET,
    buffer: Memory,
    length: u32,
    mdl: Out<MDL>,
    flags: u32,
) -> NTSTATUS {
    let external = if mdl.is_null() {
        External::Nothing
    } else {
        External::Mdl(mdl, Piece::ALL)
    };
    status(submit(packet, &buffer, length, &external, flags))
}

pub(super) fn send_with_external_mdl(
    packet: VMBPACKET,
    buffer: Memory,
    length: u32,
    mdl: Out<MDL>,
    mdl_offset: u32,
    mdl_length: u32,
    flags: u32,
) -> NTSTATUS {
    let piece = Piece {
        offset: mdl_offset,
        length: mdl_length,
        forced: flags & VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH != 0,
    };
    let external = External::Mdl(mdl, piece);
    status(submit(packet, &buffer, length, &external, flags))
}

pub(super) fn send_with_external_pfns(
    packet: VMBPACKET,
    buffer: Memory,
    length: u32,
    pages: Out<PFN_NUMBER>,
    count: u32,
    flags: u32,
) -> NTSTATUS {
    let external = External::Pages(pages, count);
    status(submit(packet, &buffer, length, &external, flags))
}

#[allow(clippy::too_many_arguments, reason = "the function has so many")]
pub(super) fn send_synchronous_request(
    channel: VMBCHANNEL,
    buffer: Memory,
    length: u32,
    mdl: Out<MDL>,
    flags: u32,
    mut answer: Memory,
    answer_size: Out<u32>,
    timeout: In<LARGE_INTEGER>,
) -> NTSTATUS {
    let external = if mdl.is_null() {
        External::Nothing
    } else {
        External::Mdl(mdl, Piece::ALL)
    };
    let mut request = || -> Result<(), NTSTATUS> {
        let object = ChannelObject::find(channel).ok_or(STATUS_INVALID_PARAMETER_1)?;
        let data = buffer.bytes(length).ok_or(STATUS_INVALID_PARAMETER_2)?;
        check_flags(flags, &external)?;
        let room = answer_size.read().unwrap_or(0);
        let wanted = !answer.is_null();
        if wanted && answer_size.is_null() || !room.is_multiple_of(8) {
            return Err(STATUS_INVALID_PARAMETER);
        }
        let timeout = match timeout.read().map(|time| time.QuadPart) {
            None => Timeout::Never,
            // What is not positive is relative.
            Some(time @ ..=0) => Timeout::After(time.unsigned_abs()),
            Some(time) => Timeout::At(time.unsigned_abs()),
        };
        let channel = object.open_channel().ok_or(STATUS_DEVICE_REMOVED)?;
        if flags & VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION == 0 {
            if timeout == Timeout::After(0) {
                channel.try_send(data).map_err(status_of_request)?;
            } else {
                channel
                    .client()
                    .block_on(channel.deliver(data, timeout))
                    .map_err(|_| STATUS_INVALID_DEVICE_STATE)?
                    .map_err(status_of_request)?;
            }
            answer_size.write(0);
            return Ok(());
        }
        let mut lent = ExternalData::new();
        external.describe(&mut lent)?;
        let place = match wanted {
            true => answer.bytes_mut(room).unwrap_or_default(),
            false => &mut [],
        };
        match channel.send_synchronous_request(data, lent, timeout, place) {
            Ok(bytes) => {
                // At most as many as there is room for.
                answer_size.write(bytes as u32);
                Ok(())
            }
            // Who gives no room wants to know only that it was answered.
            Err(RequestError::AnswerTooLong { .. }) if !wanted => Ok(()),
            Err(error) => Err(status_of_request(error)),
        }
    };
    status(request())
}
