//! The Init functions: success, and each documented failure, by the pointers in the table.

use std::ptr;

use vmbus::kmcl::abi::*;

use crate::caller::{Call, Caller, process_packet_ex, state_change_v1, state_change_v5};
use crate::support::{INTERFACE, Vm};

/// Calls every Init function with arguments that are right, on this channel.
fn call_all(caller: &Caller, channel: VMBCHANNEL) -> Vec<(&'static str, NTSTATUS)> {
    let table = &caller.table;
    let primary = {
        let mut primary = VMBCHANNEL::NULL;
        let status = unsafe { (table.VmbChannelAllocate)(caller.device.handle(), 0, &mut primary) };
        assert_eq!(status, STATUS_SUCCESS);
        primary
    };
    let interface = GUID::new(INTERFACE);
    let mut text: Vec<u16> = "name".encode_utf16().collect();
    let name = UNICODE_STRING {
        Length: 8,
        MaximumLength: 8,
        Buffer: text.as_mut_ptr(),
    };
    let callbacks = state_change_v1();
    unsafe {
        vec![
            (
                "VmbChannelInitSetClientContextSize",
                (table.VmbChannelInitSetClientContextSize)(channel, 32),
            ),
            (
                "VmbChannelInitSetFlags",
                (table.VmbChannelInitSetFlags)(channel, 0),
            ),
            (
                "VmbChannelInitSetFriendlyName",
                (table.VmbChannelInitSetFriendlyName)(channel, &name),
            ),
            (
                "VmbChannelInitSetMaximumExternalData",
                (table.VmbChannelInitSetMaximumExternalData)(channel, 65536, 4),
            ),
            (
                "VmbChannelInitSetMaximumPacketSize",
                (table.VmbChannelInitSetMaximumPacketSize)(channel, 256),
            ),
            (
                "VmbChannelInitSetProcessPacketCallbacks",
                (table.VmbChannelInitSetProcessPacketCallbacks)(
                    channel,
                    Some(crate::caller::process_packet),
                    None,
                ),
            ),
            (
                "VmbChannelInitSetStateChangeCallbacks",
                (table.VmbChannelInitSetStateChangeCallbacks)(channel, &callbacks),
            ),
            (
                "VmbClientChannelInitSetRingBufferPageCount",
                (table.VmbClientChannelInitSetRingBufferPageCount)(channel, 8, 8),
            ),
            (
                "VmbClientChannelInitSetTargetPnp",
                (table.VmbClientChannelInitSetTargetPnp)(channel, &interface, ptr::null(), None),
            ),
            (
                "VmbChannelInitSetBounceBufferSizes",
                (table.VmbChannelInitSetBounceBufferSizes)(channel, 4096, 0, 8192),
            ),
            (
                "VmbChannelInitSetMaximumPacketCount",
                (table.VmbChannelInitSetMaximumPacketCount)(channel, 16),
            ),
            (
                "VmbChannelInitSetPrimaryChannel",
                (table.VmbChannelInitSetPrimaryChannel)(channel, primary, 1),
            ),
            (
                "VmbClientChannelInitSetTargetProcessorIndex",
                (table.VmbClientChannelInitSetTargetProcessorIndex)(channel, 0),
            ),
            (
                "VmbChannelInitSetInlinePacketContextSize",
                (table.VmbChannelInitSetInlinePacketContextSize)(channel, 24),
            ),
            (
                "VmbChannelInitSetProcessPacketCallbacksEx",
                (table.VmbChannelInitSetProcessPacketCallbacksEx)(
                    channel,
                    caller.book.context(),
                    Some(process_packet_ex),
                    None,
                ),
            ),
        ]
    }
}

#[test]
fn every_init_function_succeeds_on_a_disabled_channel() {
    let caller = Caller::alone();
    for (name, status) in call_all(&caller, caller.channel) {
        assert_eq!(status, STATUS_SUCCESS, "{name}");
    }
}

#[test]
fn the_list_here_has_every_init_function_of_the_client_table() {
    let caller = Caller::alone();
    let mut here: Vec<&str> = call_all(&caller, caller.channel)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let mut all: Vec<&str> = FUNCTIONS
        .iter()
        .filter(|function| matches!(function.interface, Interface::Client { .. }))
        .map(|function| function.name)
        .filter(|name| name.contains("InitSet"))
        .collect();
    here.sort_unstable();
    all.sort_unstable();
    assert_eq!(here, all);
}

#[test]
fn every_init_function_is_invalid_parameter_1_for_no_channel_and_for_one_that_is_not_disabled() {
    let caller = Caller::alone();
    let freed = caller.channel;
    unsafe { (caller.table.VmbChannelCleanup)(freed) };
    let (active, _) = Caller::active();
    for (what, caller, channel) in [
        ("null", &caller, VMBCHANNEL::NULL),
        ("an address", &caller, VMBCHANNEL(0xFFFF_8000_0000_0000)),
        ("a freed one", &caller, freed),
        ("a device", &caller, VMBCHANNEL(caller.device.handle().0)),
        ("an active one", &active, active.channel),
    ] {
        for (name, status) in call_all(caller, channel) {
            assert_eq!(status, STATUS_INVALID_PARAMETER_1, "{name}: {what}");
        }
    }
}

#[test]
fn sizes_and_counts_of_zero_are_refused_by_their_place() {
    let caller = Caller::alone();
    let (table, channel) = (&caller.table, caller.channel);
    let statuses = unsafe {
        [
            (
                (table.VmbChannelInitSetMaximumPacketSize)(channel, 0),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbChannelInitSetMaximumPacketCount)(channel, 0),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbChannelInitSetMaximumExternalData)(channel, 0, 1),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbChannelInitSetMaximumExternalData)(channel, 1, 0),
                STATUS_INVALID_PARAMETER_3,
            ),
            (
                (table.VmbClientChannelInitSetRingBufferPageCount)(channel, 0, 4),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbClientChannelInitSetRingBufferPageCount)(channel, 4, 0),
                STATUS_INVALID_PARAMETER_3,
            ),
            (
                (table.VmbChannelInitSetFlags)(channel, 2),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbChannelInitSetFlags)(channel, 3),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbChannelInitSetBounceBufferSizes)(channel, 1, 0, 0),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbChannelInitSetBounceBufferSizes)(channel, 0, 4095, 0),
                STATUS_INVALID_PARAMETER_3,
            ),
            (
                (table.VmbChannelInitSetBounceBufferSizes)(channel, 0, 0, 4097),
                STATUS_INVALID_PARAMETER_4,
            ),
            (
                (table.VmbClientChannelInitSetTargetPnp)(channel, ptr::null(), ptr::null(), None),
                STATUS_INVALID_PARAMETER_2,
            ),
        ]
    };
    for (index, (status, wanted)) in statuses.into_iter().enumerate() {
        assert_eq!(status, wanted, "call {index}");
    }
    // Contexts may be of no bytes.
    let none = unsafe {
        [
            (table.VmbChannelInitSetClientContextSize)(channel, 0),
            (table.VmbChannelInitSetInlinePacketContextSize)(channel, 0),
        ]
    };
    assert_eq!(none, [STATUS_SUCCESS; 2]);
}

#[test]
fn a_bounce_buffer_is_not_supported_after_its_arguments_are_checked() {
    let caller = Caller::alone();
    let allocate =
        |channel, bytes| unsafe { (caller.table.VmbChannelAllocateBounceBuffer)(channel, bytes) };
    assert_eq!(allocate(VMBCHANNEL::NULL, 4096), STATUS_INVALID_PARAMETER_1);
    assert_eq!(allocate(caller.channel, 0), STATUS_INVALID_PARAMETER);
    assert_eq!(allocate(caller.channel, 100), STATUS_INVALID_PARAMETER);
    assert_eq!(allocate(caller.channel, 4096), STATUS_NOT_SUPPORTED);
}

#[test]
fn a_friendly_name_is_set_once_copied_and_seen() {
    let (caller, _) = Caller::with_device();
    let set = |units: &mut Vec<u16>, length: u16| {
        let name = UNICODE_STRING {
            Length: length,
            MaximumLength: (units.len() * 2) as u16,
            Buffer: if units.is_empty() {
                ptr::null_mut()
            } else {
                units.as_mut_ptr()
            },
        };
        unsafe { (caller.table.VmbChannelInitSetFriendlyName)(caller.channel, &name) }
    };
    let null = unsafe { (caller.table.VmbChannelInitSetFriendlyName)(caller.channel, ptr::null()) };
    assert_eq!(null, STATUS_INVALID_PARAMETER_2);
    assert_eq!(set(&mut Vec::new(), 0), STATUS_INVALID_PARAMETER_2);
    assert_eq!(set(&mut vec![65; 2], 100), STATUS_INVALID_PARAMETER_2);
    let mut text: Vec<u16> = "Netzwérk".encode_utf16().collect();
    assert_eq!(set(&mut text, 16), STATUS_SUCCESS);
    text.fill(0);
    assert_eq!(set(&mut vec![65; 2], 4), STATUS_INVALID_PARAMETER_2);
    caller.enable();
    let channels = caller.vm.vmbus.snapshot().channels;
    assert!(channels.iter().any(|info| info.name == "Netzwérk"));
    caller.disable();
    assert_eq!(set(&mut vec![65; 2], 4), STATUS_INVALID_PARAMETER_2);
}

#[test]
fn state_change_callbacks_are_told_apart_by_version_and_size() {
    let (caller, _) = Caller::with_device();
    let set = |callbacks: *const VMB_CHANNEL_STATE_CHANGE_CALLBACKS| unsafe {
        (caller.table.VmbChannelInitSetStateChangeCallbacks)(caller.channel, callbacks)
    };
    assert_eq!(set(ptr::null()), STATUS_INVALID_PARAMETER_2);
    let v1 = size_of::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS>() as u32;
    let v5 = size_of::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5>() as u32;
    for (version, size) in [
        (1, v5),
        (5, v1),
        (1, 0),
        (0, v1),
        (2, v1),
        (6, v5),
        (1, v1 + 1),
    ] {
        let mut callbacks = state_change_v5(&caller.book);
        (callbacks.Version, callbacks.Size) = (version, size);
        assert_eq!(
            set(ptr::from_ref(&callbacks).cast()),
            STATUS_INVALID_PARAMETER_2,
            "version {version}, size {size}"
        );
    }
    // What was refused has changed nothing; then each form works, copied.
    let expected = [Call::Opened, Call::Started, Call::PostStarted];
    caller.enable();
    assert_eq!(caller.book.take(), expected);
    caller.disable();
    assert_eq!(caller.book.take(), [Call::Suspend, Call::Closed]);
    {
        let callbacks = state_change_v1();
        assert_eq!(set(&callbacks), STATUS_SUCCESS);
    }
    caller.enable();
    assert_eq!(caller.book.take(), expected);
    caller.disable();
    assert_eq!(caller.book.take(), [Call::Suspend, Call::Closed]);
}

#[test]
fn all_state_change_callbacks_are_optional() {
    let (caller, id) = Caller::with_device();
    let none = VMB_CHANNEL_STATE_CHANGE_CALLBACKS {
        Version: 1,
        Size: size_of::<VMB_CHANNEL_STATE_CHANGE_CALLBACKS>() as u32,
        EvtChannelOpened: None,
        EvtChannelClosed: None,
        EvtChannelSuspend: None,
        EvtChannelStarted: None,
        EvtChannelPostStarted: None,
    };
    let status =
        unsafe { (caller.table.VmbChannelInitSetStateChangeCallbacks)(caller.channel, &none) };
    assert_eq!(status, STATUS_SUCCESS);
    caller.enable();
    assert!(caller.vm.machine.is_open(id));
    caller.disable();
    assert_eq!(caller.book.take(), []);
}

#[test]
fn a_primary_channel_is_another_channel_set_once_with_an_index() {
    let caller = Caller::alone();
    let mut other = VMBCHANNEL::NULL;
    let status =
        unsafe { (caller.table.VmbChannelAllocate)(caller.device.handle(), 0, &mut other) };
    assert_eq!(status, STATUS_SUCCESS);
    let set = |primary, index| unsafe {
        (caller.table.VmbChannelInitSetPrimaryChannel)(caller.channel, primary, index)
    };
    assert_eq!(set(VMBCHANNEL::NULL, 1), STATUS_INVALID_PARAMETER_2);
    assert_eq!(set(caller.channel, 1), STATUS_INVALID_PARAMETER_2);
    assert_eq!(set(other, 0), STATUS_INVALID_PARAMETER_3);
    assert_eq!(set(other, 1), STATUS_SUCCESS);
    assert_eq!(set(other, 1), STATUS_INVALID_PARAMETER_2);
    // Its primary is not open, so it cannot be enabled, and stays as it is.
    caller.target(INTERFACE);
    assert_eq!(caller.try_enable(), STATUS_INVALID_DEVICE_STATE);
    caller.register();
}

#[test]
fn a_configuration_that_cannot_work_is_told_by_enable() {
    let (vm, _) = Vm::with_device();
    let caller = Caller::on(vm);
    // No target.
    assert_eq!(caller.try_enable(), STATUS_INVALID_PARAMETER);
    caller.target(INTERFACE);
    let (table, channel) = (&caller.table, caller.channel);
    // A packet that the ring cannot hold.
    let set = |bytes| unsafe { (table.VmbChannelInitSetMaximumPacketSize)(channel, bytes) };
    assert_eq!(set(64 * 1024), STATUS_SUCCESS);
    let rings = unsafe { (table.VmbClientChannelInitSetRingBufferPageCount)(channel, 4, 4) };
    assert_eq!(rings, STATUS_SUCCESS);
    assert_eq!(caller.try_enable(), STATUS_INVALID_PARAMETER);
    assert_eq!(set(1024), STATUS_SUCCESS);
    caller.enable();
}
