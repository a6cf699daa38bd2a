//! Received packets as C has them: handles that are good until the packet is completed (spec kmcl.md 1.8).

use core::cell::UnsafeCell;
use core::hint;
use core::mem::ManuallyDrop;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use super::arguments::{Memory, Out};
use super::handles::{BUSY, Handle, Kind, Slot};
use super::object::{ChannelSlot, channel_slot};
use super::types::{
    NTSTATUS, PMDL, PVOID, STATUS_BUFFER_OVERFLOW, STATUS_INVALID_PARAMETER_1,
    STATUS_INVALID_PARAMETER_2, STATUS_INVALID_PARAMETER_3, STATUS_NOT_SUPPORTED, STATUS_SUCCESS,
    VMB_TRANSFER_PAGE_RANGE, VMBPACKETCOMPLETION, VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAGS,
    VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA,
};
use crate::kmcl::{IncomingPacket, ReceivedPacket, TransferPages};

/// The packet is in process-packet, on the stack of the dispatcher.
const INLINE: u8 = 2;
/// The driver keeps the packet.
const KEPT: u8 = 3;

/// Where a received packet is. Whoever has brought the slot to [`BUSY`] owns what is in it.
#[derive(Default)]
pub(super) struct Place {
    packet: UnsafeCell<Content>,
    context: AtomicPtr<core::ffi::c_void>,
}

#[derive(Default)]
enum Content {
    #[default]
    None,
    /// On the stack of [`deliver`], which does not return while the slot is in use.
    Inline(*mut Option<ReceivedPacket<'static>>),
    Kept(IncomingPacket),
}

// SAFETY: the cell is touched only by the one that brought the slot to `BUSY`; packets may be sent between threads.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    fn put(&self, content: Content) {
        // SAFETY: the caller has the slot in `BUSY`.
        unsafe { *self.packet.get() = content };
    }

    fn take(&self) -> Taken {
        // SAFETY: the caller has the slot in `BUSY`.
        let content = core::mem::take(unsafe { &mut *self.packet.get() });
        match content {
            Content::None => Taken::Nothing,
            Content::Kept(packet) => Taken::Kept(packet),
            // SAFETY: `deliver` waits until the slot is no longer busy before its packet goes.
            Content::Inline(packet) => match unsafe { &mut *packet }.take() {
                Some(packet) => Taken::Inline(packet),
                None => Taken::Nothing,
            },
        }
    }
}

/// A packet whose fate is being decided.
enum Taken {
    Nothing,
    Inline(ReceivedPacket<'static>),
    Kept(IncomingPacket),
}

/// What a driver's callback is told of a packet.
pub(super) struct Delivery {
    pub(super) handle: VMBPACKETCOMPLETION,
    pub(super) buffer: PVOID,
    pub(super) length: u32,
    pub(super) flags: u32,
}

/// Has `callback` see the packet, and keeps it for the driver if that has not decided on it yet.
pub(super) fn deliver(
    (owner, channel): (u32, &'static ChannelSlot),
    mut packet: ReceivedPacket<'_>,
    callback: impl FnOnce(Delivery),
) {
    let Some((index, generation, slot)) = channel.received.claim(u32::MAX) else {
        packet.fail("no memory to hand the packet to a driver in C");
        return;
    };
    let context = packet.client_context();
    let context = if context.is_empty() {
        ptr::null_mut()
    } else {
        context.as_mut_ptr().cast()
    };
    slot.value.context.store(context, Ordering::Relaxed);
    let flags = if packet.transfer_pages().is_some() {
        VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA
    } else {
        0
    };
    let data = packet.payload_mut();
    let delivery = Delivery {
        handle: VMBPACKETCOMPLETION(
            Handle {
                kind: Kind::Completion,
                owner,
                index,
                generation,
            }
            .encode(),
        ),
        // Packets are far shorter than 4 GiB.
        length: data.len() as u32,
        buffer: data.as_mut_ptr().cast(),
        flags,
    };
    // From here on only the slot's rules say who touches it, so nothing may drop it behind their back.
    let mut inline = ManuallyDrop::new(Some(packet));
    slot.value.put(Content::Inline(
        (&raw mut inline).cast::<Option<ReceivedPacket<'static>>>(),
    ));
    slot.advance(generation, BUSY, INLINE);
    callback(delivery);
    // Another VP may be in the middle of completing it; it is done within a few steps.
    while !slot.advance(generation, INLINE, BUSY) {
        match slot.state(generation) {
            Some(_) => hint::spin_loop(),
            None => return,
        }
    }
    slot.value.put(Content::None);
    match ManuallyDrop::into_inner(inline) {
        Some(packet) => {
            slot.value.put(Content::Kept(packet.hold()));
            slot.advance(generation, BUSY, KEPT);
        }
        None => channel.received.release(index, slot, generation),
    }
}

/// A handle's slot, if its packet has not met its fate.
fn find(
    handle: VMBPACKETCOMPLETION,
) -> Option<(Handle, &'static ChannelSlot, &'static Slot<Place>)> {
    let handle = Handle::decode(handle.0, Kind::Completion)?;
    let channel = channel_slot(handle.owner)?;
    let slot = channel.received.get(handle.index)?;
    slot.state(handle.generation)?;
    Some((handle, channel, slot))
}

/// Decides on a packet: once, whoever is first.
fn decide(handle: VMBPACKETCOMPLETION, what: &str, states: &[u8], decision: impl FnOnce(Taken)) {
    let found = find(handle).filter(|(handle, _, slot)| {
        states
            .iter()
            .any(|&state| slot.advance(handle.generation, state, BUSY))
    });
    match found {
        Some((handle, channel, slot)) => {
            decision(slot.value.take());
            channel
                .received
                .release(handle.index, slot, handle.generation);
        }
        None => log::error!("driver bug: {what} of {handle:?}, which is no packet that can be"),
    }
}

pub(super) fn complete(handle: VMBPACKETCOMPLETION, buffer: Memory, length: u32) {
    let Some(data) = buffer.bytes(length) else {
        log::error!("driver bug: completion of {handle:?} with {length} bytes of nothing");
        return complete(handle, buffer, 0);
    };
    decide(
        handle,
        "completion",
        &[INLINE, KEPT],
        |packet| match packet {
            Taken::Inline(packet) => packet.complete(data),
            Taken::Kept(packet) => packet.complete(data),
            Taken::Nothing => {}
        },
    );
}

pub(super) fn defer_to_passive(handle: VMBPACKETCOMPLETION) {
    decide(handle, "deferral", &[INLINE], |packet| {
        if let Taken::Inline(packet) = packet {
            packet.defer_to_passive();
        }
    });
}

pub(super) fn fail(handle: VMBPACKETCOMPLETION) {
    decide(handle, "failing", &[INLINE], |packet| {
        if let Taken::Inline(packet) = packet {
            packet.fail("the driver failed the packet");
        }
    });
}

pub(super) fn get_external_data(
    handle: VMBPACKETCOMPLETION,
    flags: u32,
    mdl: Out<PMDL>,
) -> NTSTATUS {
    if find(handle).is_none() {
        STATUS_INVALID_PARAMETER_1
    } else if flags & !VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAGS != 0 {
        STATUS_INVALID_PARAMETER_2
    } else if mdl.is_null() {
        STATUS_INVALID_PARAMETER_3
    } else {
        mdl.write(ptr::null_mut());
        STATUS_NOT_SUPPORTED
    }
}

pub(super) fn get_client_context(handle: VMBPACKETCOMPLETION) -> PVOID {
    find(handle).map_or(ptr::null_mut(), |(_, _, slot)| {
        slot.value.context.load(Ordering::Relaxed)
    })
}

pub(super) fn get_transfer_pages(
    handle: VMBPACKETCOMPLETION,
    set: Out<u16>,
    count: Out<u32>,
    ranges: Out<VMB_TRANSFER_PAGE_RANGE>,
) -> NTSTATUS {
    let Some((handle, _, slot)) = find(handle) else {
        return STATUS_INVALID_PARAMETER_1;
    };
    if set.is_null() {
        return STATUS_INVALID_PARAMETER_2;
    }
    let Some(room) = count.read() else {
        return STATUS_INVALID_PARAMETER_3;
    };
    let Some(state) = [INLINE, KEPT]
        .into_iter()
        .find(|&state| slot.advance(handle.generation, state, BUSY))
    else {
        return STATUS_INVALID_PARAMETER_1;
    };
    let write = |pages: Option<TransferPages<'_>>| {
        let Some(pages) = pages else {
            return STATUS_INVALID_PARAMETER_1;
        };
        set.write(pages.set);
        let all = pages.ranges().count();
        // A packet holds no more than 65535 bytes of ranges.
        count.write(all as u32);
        if all > room as usize || ranges.is_null() {
            return STATUS_BUFFER_OVERFLOW;
        }
        ranges.write_all(pages.ranges().map(|range| VMB_TRANSFER_PAGE_RANGE {
            ByteCount: range.length,
            ByteOffset: range.offset,
        }));
        STATUS_SUCCESS
    };
    // SAFETY: the slot is in `BUSY`, so nobody else touches the cell.
    let status = match unsafe { &*slot.value.packet.get() } {
        Content::None => STATUS_INVALID_PARAMETER_1,
        Content::Kept(packet) => write(packet.transfer_pages()),
        // SAFETY: `deliver` waits until the slot is no longer busy before its packet goes.
        Content::Inline(packet) => match unsafe { &**packet } {
            Some(packet) => write(packet.transfer_pages()),
            None => STATUS_INVALID_PARAMETER_1,
        },
    };
    slot.advance(handle.generation, BUSY, state);
    status
}
