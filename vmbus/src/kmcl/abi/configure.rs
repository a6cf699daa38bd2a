//! The Init functions: what can be set on a Disabled channel (spec kmcl.md 1.7).

use alloc::string::String;
use alloc::vec::Vec;
use core::num::NonZeroU16;

use super::arguments::{In, Memory};
use super::callbacks::{
    PFN_VMB_CHANNEL_PNP_FAILURE, PFN_VMB_CHANNEL_PROCESS_PACKET, PFN_VMB_CHANNEL_PROCESS_PACKET_EX,
    PFN_VMB_CHANNEL_PROCESSING_COMPLETE, PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX,
};
use super::events::{Context, Process, StateChange};
use super::object::{ChannelObject, Config};
use super::types::{
    GUID, NTSTATUS, STATUS_INVALID_DEVICE_STATE, STATUS_INVALID_PARAMETER,
    STATUS_INVALID_PARAMETER_1, STATUS_INVALID_PARAMETER_2, STATUS_INVALID_PARAMETER_3,
    STATUS_INVALID_PARAMETER_4, STATUS_NOT_SUPPORTED, STATUS_SUCCESS, ULONG, UNICODE_STRING,
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS, VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5,
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION, VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION_V5,
    VMBCHANNEL, VMBUS_CHANNEL_INIT_FLAG_IS_PIPE, VMBUS_CHANNEL_INIT_FLAGS, WCHAR,
};
use crate::kmcl::{PAGE_SIZE, VpIndex};

/// Changes the configuration of a Disabled channel.
fn set(channel: VMBCHANNEL, change: impl FnOnce(&mut Config) -> Result<(), NTSTATUS>) -> NTSTATUS {
    let Some(object) = ChannelObject::find(channel) else {
        return STATUS_INVALID_PARAMETER_1;
    };
    let Some(mut stage) = object.stage() else {
        return STATUS_INVALID_DEVICE_STATE;
    };
    match stage.configure(change) {
        None => STATUS_INVALID_PARAMETER_1,
        Some(Err(status)) => status,
        Some(Ok(())) => STATUS_SUCCESS,
    }
}

/// `Ok` if the condition holds.
fn check(condition: bool, otherwise: NTSTATUS) -> Result<(), NTSTATUS> {
    if condition { Ok(()) } else { Err(otherwise) }
}

pub(super) fn client_context_size(channel: VMBCHANNEL, bytes: u32) -> NTSTATUS {
    set(channel, |config| {
        config.client_context = bytes as usize;
        Ok(())
    })
}

pub(super) fn inline_packet_context_size(channel: VMBCHANNEL, bytes: u32) -> NTSTATUS {
    set(channel, |config| {
        config.inline_context = bytes as usize;
        Ok(())
    })
}

pub(super) fn flags(channel: VMBCHANNEL, flags: u32) -> NTSTATUS {
    set(channel, |config| {
        check(
            flags & !VMBUS_CHANNEL_INIT_FLAGS == 0,
            STATUS_INVALID_PARAMETER_2,
        )?;
        config.pipe = flags & VMBUS_CHANNEL_INIT_FLAG_IS_PIPE != 0;
        Ok(())
    })
}

pub(super) fn friendly_name(channel: VMBCHANNEL, name: In<UNICODE_STRING>) -> NTSTATUS {
    set(channel, |config| {
        check(config.name.is_none(), STATUS_INVALID_PARAMETER_2)?;
        let name = name.read().ok_or(STATUS_INVALID_PARAMETER_2)?;
        let units = usize::from(name.Length) / size_of::<WCHAR>();
        check(
            units > 0 && !name.Buffer.is_null() && name.Length <= name.MaximumLength,
            STATUS_INVALID_PARAMETER_2,
        )?;
        let text: In<WCHAR> = text_of(name);
        let units: Vec<WCHAR> = (0..units)
            .filter_map(|index| text.offset(index).read())
            .collect();
        config.name = Some(String::from_utf16_lossy(&units));
        Ok(())
    })
}

/// The text of a counted string.
fn text_of(name: UNICODE_STRING) -> In<WCHAR> {
    use super::arguments::Argument;
    // SAFETY: the caller promised a text of this length.
    unsafe { name.Buffer.cast_const().into_safe() }
}

pub(super) fn maximum_external_data(channel: VMBCHANNEL, bytes: u32, chain: u32) -> NTSTATUS {
    set(channel, |config| {
        check(bytes > 0, STATUS_INVALID_PARAMETER_2)?;
        check(chain > 0, STATUS_INVALID_PARAMETER_3)?;
        config.external = Some((bytes as usize, chain as usize));
        Ok(())
    })
}

pub(super) fn maximum_packet_size(channel: VMBCHANNEL, bytes: u32) -> NTSTATUS {
    set(channel, |config| {
        check(bytes > 0, STATUS_INVALID_PARAMETER_2)?;
        config.packet_size = Some(bytes as usize);
        Ok(())
    })
}

pub(super) fn maximum_packet_count(channel: VMBCHANNEL, packets: u32) -> NTSTATUS {
    set(channel, |config| {
        check(packets > 0, STATUS_INVALID_PARAMETER_2)?;
        config.packet_count = Some(packets as usize);
        Ok(())
    })
}

pub(super) fn process_packet_callbacks(
    channel: VMBCHANNEL,
    process_packet: PFN_VMB_CHANNEL_PROCESS_PACKET,
    processing_complete: PFN_VMB_CHANNEL_PROCESSING_COMPLETE,
) -> NTSTATUS {
    set(channel, |config| {
        config.process = Process::Plain(process_packet, processing_complete);
        Ok(())
    })
}

pub(super) fn process_packet_callbacks_ex(
    channel: VMBCHANNEL,
    context: Memory,
    process_packet: PFN_VMB_CHANNEL_PROCESS_PACKET_EX,
    processing_complete: PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX,
) -> NTSTATUS {
    set(channel, |config| {
        config.process = Process::Ex(
            Context(context.into_c()),
            process_packet,
            processing_complete,
        );
        Ok(())
    })
}

pub(super) fn state_change_callbacks(
    channel: VMBCHANNEL,
    callbacks: In<VMB_CHANNEL_STATE_CHANGE_CALLBACKS>,
) -> NTSTATUS {
    /// The size that a structure says of itself.
    const fn size<T>() -> ULONG {
        // A few pointers.
        size_of::<T>() as ULONG
    }
    set(channel, |config| {
        // Version and size come first in both layouts; the rest is read when it is known how much there is.
        let [version, bytes] = callbacks
            .cast::<[ULONG; 2]>()
            .read()
            .ok_or(STATUS_INVALID_PARAMETER_2)?;
        let read = match (version, bytes) {
            (VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION, bytes)
                if bytes == size::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS>() =>
            {
                callbacks.read().map(StateChange::Plain)
            }
            (VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION_V5, bytes)
                if bytes == size::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5>() =>
            {
                callbacks
                    .cast::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5>()
                    .read()
                    .map(|callbacks| StateChange::Ex(Context(callbacks.CallbackContext), callbacks))
            }
            _ => None,
        };
        config.state_change = read.ok_or(STATUS_INVALID_PARAMETER_2)?;
        Ok(())
    })
}

pub(super) fn ring_buffer_page_count(
    channel: VMBCHANNEL,
    incoming: u32,
    outgoing: u32,
) -> NTSTATUS {
    set(channel, |config| {
        check(incoming > 0, STATUS_INVALID_PARAMETER_2)?;
        check(outgoing > 0, STATUS_INVALID_PARAMETER_3)?;
        config.ring_pages = Some((incoming as usize, outgoing as usize));
        Ok(())
    })
}

pub(super) fn target_pnp(
    channel: VMBCHANNEL,
    interface: In<GUID>,
    instance: In<GUID>,
    failure: PFN_VMB_CHANNEL_PNP_FAILURE,
) -> NTSTATUS {
    set(channel, |config| {
        let interface = interface.read().ok_or(STATUS_INVALID_PARAMETER_2)?;
        config.interface = Some(interface.to_guid());
        config.instance = instance.read().map(GUID::to_guid);
        config.pnp_failure = failure;
        Ok(())
    })
}

pub(super) fn target_processor_index(channel: VMBCHANNEL, index: ULONG) -> NTSTATUS {
    set(channel, |config| {
        config.vp = Some(VpIndex(index));
        Ok(())
    })
}

pub(super) fn primary_channel(channel: VMBCHANNEL, primary: VMBCHANNEL, index: u16) -> NTSTATUS {
    let is_other = primary != channel && ChannelObject::find(primary).is_some();
    set(channel, |config| {
        check(
            is_other && config.primary.is_none(),
            STATUS_INVALID_PARAMETER_2,
        )?;
        let index = NonZeroU16::new(index).ok_or(STATUS_INVALID_PARAMETER_3)?;
        config.primary = Some((primary, index));
        Ok(())
    })
}

/// Whether this is a whole number of pages; none is one.
fn is_paged(bytes: u32) -> bool {
    (bytes as usize).is_multiple_of(PAGE_SIZE)
}

pub(super) fn bounce_buffer_sizes(
    channel: VMBCHANNEL,
    initial: u32,
    increment: u32,
    maximum: u32,
) -> NTSTATUS {
    set(channel, |_| {
        check(is_paged(initial), STATUS_INVALID_PARAMETER_2)?;
        check(is_paged(increment), STATUS_INVALID_PARAMETER_3)?;
        check(is_paged(maximum), STATUS_INVALID_PARAMETER_4)
    })
}

pub(super) fn allocate_bounce_buffer(channel: VMBCHANNEL, bytes: u32) -> NTSTATUS {
    if ChannelObject::find(channel).is_none() {
        STATUS_INVALID_PARAMETER_1
    } else if bytes == 0 || !is_paged(bytes) {
        STATUS_INVALID_PARAMETER
    } else {
        STATUS_NOT_SUPPORTED
    }
}
