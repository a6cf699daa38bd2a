//! Channels as C has them: made and ended, enabled and disabled, and what can be asked of them (spec kmcl.md 1.7 and 2).

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use super::arguments::{Memory, Out};
use super::device;
use super::events::NOTHING;
use super::handles::{Handle, Kind};
use super::object::{self, ChannelObject, EnableFailure, PLACED};
use super::types::{
    BOOLEAN, GUID, NTSTATUS, PDEVICE_OBJECT, PVOID, STATUS_INSUFFICIENT_RESOURCES,
    STATUS_INVALID_DEVICE_STATE, STATUS_INVALID_PARAMETER, STATUS_INVALID_PARAMETER_1,
    STATUS_INVALID_PARAMETER_3, STATUS_INVALID_PARAMETER_4, STATUS_NOT_SUPPORTED, STATUS_SUCCESS,
    ULONG, VMBCHANNEL,
};
use crate::kmcl::{Channel, ConfigError, Guid, LatencyError};

/// Bytes that a driver has to give for a channel of its own. The library only uses the address.
const CHANNEL_MEMORY: ULONG = 64;

/// Reports a call on something that is no channel, for functions that have no result.
fn no_channel(what: &str, channel: VMBCHANNEL) {
    log::error!("driver bug: {what} of {channel:?}, which is no channel that can be");
}

/// The object, for functions without a result that are for PASSIVE; else reports the bug.
fn passive(what: &str, channel: VMBCHANNEL) -> Option<Arc<ChannelObject>> {
    let object = ChannelObject::find(channel);
    match &object {
        None => no_channel(what, channel),
        Some(object) if !object.is_passive() => {
            log::error!("driver bug: {what} of {channel:?} at DISPATCH");
            return None;
        }
        Some(_) => {}
    }
    object
}

pub(super) fn allocate(
    parent: PDEVICE_OBJECT,
    is_server: BOOLEAN,
    channel: Out<VMBCHANNEL>,
) -> NTSTATUS {
    let Some(client) = device::find(parent) else {
        return STATUS_INVALID_PARAMETER_1;
    };
    if is_server != 0 {
        return STATUS_NOT_SUPPORTED;
    }
    if channel.is_null() {
        return STATUS_INVALID_PARAMETER_3;
    }
    match ChannelObject::create(client, parent, object::Memory::Own) {
        Some(handle) => {
            channel.write(handle);
            STATUS_SUCCESS
        }
        None => STATUS_INSUFFICIENT_RESOURCES,
    }
}

pub(super) fn size_of_channel() -> ULONG {
    CHANNEL_MEMORY
}

pub(super) fn initialize(
    parent: PDEVICE_OBJECT,
    is_server: BOOLEAN,
    channel: VMBCHANNEL,
    bytes: ULONG,
) -> NTSTATUS {
    let Some(client) = device::find(parent) else {
        return STATUS_INVALID_PARAMETER_1;
    };
    if is_server != 0 {
        return STATUS_NOT_SUPPORTED;
    }
    if channel.is_null()
        || Handle::decode(channel.0, Kind::Channel).is_some()
        || PLACED.get(channel.0).is_some()
    {
        return STATUS_INVALID_PARAMETER_3;
    }
    if bytes < CHANNEL_MEMORY {
        return STATUS_INVALID_PARAMETER_4;
    }
    match ChannelObject::create(client, parent, object::Memory::At(channel.0)) {
        Some(_) => STATUS_SUCCESS,
        None => STATUS_INSUFFICIENT_RESOURCES,
    }
}

pub(super) fn cleanup(channel: VMBCHANNEL) {
    let ended = ChannelObject::find(channel).is_some_and(|object| object.end());
    if !ended {
        no_channel("cleanup", channel);
    }
}

pub(super) fn get_pointer(channel: VMBCHANNEL) -> PVOID {
    ChannelObject::find(channel).map_or(NOTHING, |object| object.pointer.load(Ordering::Acquire))
}

pub(super) fn set_pointer(channel: VMBCHANNEL, pointer: Memory) {
    match ChannelObject::find(channel) {
        Some(object) => object.pointer.store(pointer.into_c(), Ordering::Release),
        None => no_channel("a pointer", channel),
    }
}

pub(super) fn get_target_device_object(_: VMBCHANNEL, device: Out<PDEVICE_OBJECT>) {
    device.write(PDEVICE_OBJECT::NULL);
}

pub(super) fn get_parent_device_object(channel: VMBCHANNEL, device: Out<PDEVICE_OBJECT>) {
    let parent = ChannelObject::find(channel).map(|object| object.parent);
    device.write(parent.unwrap_or(PDEVICE_OBJECT::NULL));
}

pub(super) fn enable(channel: VMBCHANNEL) -> NTSTATUS {
    let Some(object) = ChannelObject::find(channel) else {
        return STATUS_INVALID_PARAMETER_1;
    };
    let Some(mut stage) = object.stage() else {
        return STATUS_INVALID_DEVICE_STATE;
    };
    let enabled = stage.enable(&object);
    drop(stage);
    match enabled {
        None => STATUS_INVALID_PARAMETER_1,
        Some(Ok(())) => STATUS_SUCCESS,
        Some(Err(failure)) => {
            log::error!("channel in C: {failure}");
            match failure {
                EnableFailure::Config(ConfigError::PrimaryNotOpen) => STATUS_INVALID_DEVICE_STATE,
                EnableFailure::NoTarget | EnableFailure::Config(_) => STATUS_INVALID_PARAMETER,
            }
        }
    }
}

pub(super) fn disable(channel: VMBCHANNEL) {
    let Some(object) = passive("disabling", channel) else {
        return;
    };
    // A Disabled channel is what was wanted.
    let Some(enabled) = object.stage().and_then(|stage| stage.enabled()) else {
        return;
    };
    enabled.disable();
    match object.client.block_on(enabled.disabled()) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::error!("driver bug: disabling {channel:?}: {error}"),
        Err(error) => log::error!("driver bug: disabling {channel:?}: {error}"),
    }
    drop(enabled);
    // Now that nobody waits any more, it becomes Disabled for good.
    drop(object.stage());
}

/// Has a Disabled channel begin paused, or not, when it is enabled. `false`: it is not Disabled.
fn latch(object: &ChannelObject, paused: bool) -> bool {
    let latched = object.stage().and_then(|mut stage| {
        stage.configure::<()>(|config| {
            config.start_paused = paused;
            Ok(())
        })
    });
    latched.is_some()
}

pub(super) fn pause(channel: VMBCHANNEL) {
    let Some(object) = passive("pausing", channel) else {
        return;
    };
    if latch(&object, true) {
        return;
    }
    let Some(open) = object.channel.get() else {
        return;
    };
    match open.pause() {
        Ok(paused) => {
            if let Err(error) = object.client.block_on(paused) {
                log::error!("driver bug: pausing {channel:?}: {error}");
            }
        }
        Err(error) => log::error!("driver bug: pausing {channel:?}: {error}"),
    }
}

pub(super) fn start(channel: VMBCHANNEL) {
    let Some(object) = passive("starting", channel) else {
        return;
    };
    if latch(&object, false) {
        return;
    }
    if let Some(open) = object.channel.get()
        && let Err(error) = open.start()
    {
        log::error!("driver bug: starting {channel:?}: {error}");
    }
}

/// Has the setting hold for the channel as it is, and for what will be made of the configuration.
fn apply(what: &str, channel: VMBCHANNEL, setting: impl FnOnce(&ChannelObject, Option<Channel>)) {
    match ChannelObject::find(channel) {
        Some(object) => setting(&object, object.channel.get()),
        None => no_channel(what, channel),
    }
}

pub(super) fn set_incoming_processing_at_passive(channel: VMBCHANNEL, passive: BOOLEAN) {
    apply("processing at PASSIVE", channel, |object, channel| {
        object.passive.store(passive != 0, Ordering::Relaxed);
        if let Some(channel) = channel {
            channel.set_incoming_processing_at_passive(passive != 0);
        }
    });
}

pub(super) fn set_transaction_quota(channel: VMBCHANNEL, quota: u32) {
    if quota == 0 {
        log::error!("driver bug: a quota of no packets for {channel:?}");
        return;
    }
    apply("the quota", channel, |object, channel| {
        object.quota.store(quota, Ordering::Relaxed);
        if let Some(channel) = channel {
            channel.set_transaction_quota(quota);
        }
    });
}

pub(super) fn set_allowable_dpc_cpu_usage(channel: VMBCHANNEL, percent: u8) {
    if !(1..=100).contains(&percent) {
        log::error!("driver bug: a share of {percent} percent for {channel:?}");
        return;
    }
    apply("the share of time", channel, |object, channel| {
        object.cpu_usage.store(percent, Ordering::Relaxed);
        if let Some(channel) = channel {
            channel.set_allowable_dpc_cpu_usage(percent);
        }
    });
}

pub(super) fn set_interrupt_latency(
    channel: VMBCHANNEL,
    latency: u16,
    original: Out<u16>,
) -> NTSTATUS {
    let Some(channel) = ChannelObject::find(channel).and_then(|object| object.open_channel())
    else {
        return STATUS_INVALID_PARAMETER_1;
    };
    if original.is_null() {
        return STATUS_INVALID_PARAMETER_3;
    }
    match channel.set_interrupt_latency(latency) {
        Ok(before) => {
            original.write(before);
            STATUS_SUCCESS
        }
        Err(LatencyError::NotMonitored) => STATUS_NOT_SUPPORTED,
        Err(LatencyError::NotOpen(_)) => STATUS_INVALID_PARAMETER_1,
    }
}

pub(super) fn get_interface_instance(channel: VMBCHANNEL, instance: Out<GUID>) {
    let found = passive("asking for the instance", channel)
        .and_then(|object| object.channel.get())
        .and_then(|channel| channel.interface_instance());
    instance.write(GUID::new(found.unwrap_or(Guid::ZERO)));
}

pub(super) fn get_mmio_space(channel: VMBCHANNEL, address: Out<u64>, size: Out<u64>) {
    let (start, bytes) = passive("asking for the registers", channel)
        .and_then(|object| object.channel.get())
        .and_then(|channel| channel.mmio_space())
        .map_or((0, 0), |space| (space.address, space.length));
    address.write(start);
    size.write(bytes);
}
