//! Channels by the table: made and ended, enabled and disabled, paused, and what they tell.

use std::ptr;

use vmbus::bus::Config;
use vmbus::kmcl::abi::*;
use vmbus::protocol::Status;
use vmbus::protocol::monitor::MonitorId;
use vmbus_host::bus::{Device as Offer, Profile};
use vmbus_host::provider::Manual;

use crate::caller::{Call, Caller, Then};
use crate::support::{INSTANCE, INTERFACE, Vm};

#[test]
fn allocate_says_which_argument_is_wrong() {
    let caller = Caller::alone();
    let mut channel = VMBCHANNEL::NULL;
    let device = caller.device.handle();
    let allocate = |device, server, channel| unsafe {
        (caller.table.VmbChannelAllocate)(device, server, channel)
    };
    assert_eq!(
        allocate(PDEVICE_OBJECT::NULL, 0, &mut channel),
        STATUS_INVALID_PARAMETER_1
    );
    assert_eq!(allocate(device, 1, &mut channel), STATUS_NOT_SUPPORTED);
    assert_eq!(
        allocate(device, 0, ptr::null_mut()),
        STATUS_INVALID_PARAMETER_3
    );
    assert_eq!(channel, VMBCHANNEL::NULL);
    assert_eq!(allocate(device, 0, &mut channel), STATUS_SUCCESS);
    assert_ne!(channel, caller.channel);
}

#[test]
fn a_channel_in_the_drivers_own_memory_is_known_by_its_address_until_cleanup() {
    let caller = Caller::alone();
    let (table, device) = (&caller.table, caller.device.handle());
    let need = unsafe { (table.VmbSizeofChannel)() };
    let mut memory = vec![0u64; need.div_ceil(8) as usize];
    let place = VMBCHANNEL(memory.as_mut_ptr().addr());
    let initialize = |device, server, place, bytes| unsafe {
        (table.VmbChannelInitialize)(device, server, place, bytes)
    };
    let null = PDEVICE_OBJECT::NULL;
    assert_eq!(initialize(null, 0, place, need), STATUS_INVALID_PARAMETER_1);
    assert_eq!(initialize(device, 1, place, need), STATUS_NOT_SUPPORTED);
    assert_eq!(
        initialize(device, 0, VMBCHANNEL::NULL, need),
        STATUS_INVALID_PARAMETER_3
    );
    assert_eq!(
        initialize(device, 0, place, need - 1),
        STATUS_INVALID_PARAMETER_4
    );
    let pointer = |channel| unsafe { (table.VmbChannelGetPointer)(channel) };
    assert!(pointer(place).is_null());
    assert_eq!(initialize(device, 0, place, need), STATUS_SUCCESS);
    assert_eq!(
        initialize(device, 0, place, need),
        STATUS_INVALID_PARAMETER_3,
        "it is a channel already"
    );
    let mark: PVOID = (&raw mut memory).cast();
    unsafe { (table.VmbChannelSetPointer)(place, mark) };
    assert_eq!(pointer(place), mark);
    unsafe { (table.VmbChannelCleanup)(place) };
    assert!(pointer(place).is_null());
    assert_eq!(initialize(device, 0, place, need), STATUS_SUCCESS);
    unsafe { (table.VmbChannelCleanup)(place) };
}

#[test]
fn cleanup_needs_a_disabled_channel() {
    let (caller, _) = Caller::active();
    unsafe { (caller.table.VmbChannelCleanup)(caller.channel) };
    assert_eq!(caller.try_enable(), STATUS_INVALID_PARAMETER_1);
    caller.disable();
    assert_eq!(caller.book.take(), [Call::Suspend, Call::Closed]);
    // It was not ended by the first call, and is by the second.
    unsafe { (caller.table.VmbChannelCleanup)(caller.channel) };
    assert!(unsafe { (caller.table.VmbChannelGetPointer)(caller.channel) }.is_null());
    unsafe { (caller.table.VmbChannelCleanup)(caller.channel) };
}

#[test]
fn enable_returns_at_once_and_only_on_a_disabled_channel() {
    let (caller, id) = Caller::with_device();
    assert_eq!(
        unsafe { (caller.table.VmbChannelEnable)(VMBCHANNEL::NULL) },
        STATUS_INVALID_PARAMETER_1
    );
    assert_eq!(caller.try_enable(), STATUS_SUCCESS);
    assert!(!caller.vm.machine.is_open(id));
    assert_eq!(caller.try_enable(), STATUS_INVALID_PARAMETER_1);
    caller.vm.machine.settle();
    assert!(caller.vm.machine.is_open(id));
    assert_eq!(caller.try_enable(), STATUS_INVALID_PARAMETER_1);
}

#[test]
fn disable_returns_when_all_is_over_and_the_channel_can_be_enabled_again() {
    let (caller, id) = Caller::active();
    for _ in 0..3 {
        caller.disable();
        assert!(!caller.vm.machine.is_open(id));
        assert_eq!(caller.book.take(), [Call::Suspend, Call::Closed]);
        caller.disable();
        assert_eq!(caller.book.take(), []);
        caller.enable();
        assert_eq!(
            caller.book.take(),
            [Call::Opened, Call::Started, Call::PostStarted]
        );
    }
    caller.vm.assert_well_behaved();
}

#[test]
fn disable_of_a_channel_that_waits_for_its_device_ends_the_wait_without_a_callback() {
    let caller = Caller::alone();
    caller.target(INTERFACE);
    caller.register();
    assert_eq!(caller.try_enable(), STATUS_SUCCESS);
    caller.disable();
    assert_eq!(caller.book.take(), []);
    assert_eq!(caller.try_enable(), STATUS_SUCCESS);
}

#[test]
fn pause_suspends_and_start_resumes() {
    let (caller, id) = Caller::active();
    let pause = || unsafe { (caller.table.VmbChannelPause)(caller.channel) };
    let start = || unsafe { (caller.table.VmbChannelStart)(caller.channel) };
    pause();
    assert_eq!(caller.book.take(), [Call::Suspend]);
    caller.vm.send_all(id, [1]);
    caller.vm.machine.settle();
    assert_eq!(caller.book.take(), []);
    start();
    caller.vm.machine.settle();
    let calls = caller.book.take();
    assert_eq!(calls[0], Call::Started);
    assert!(calls.contains(&Call::Packet(1u64.to_le_bytes().to_vec(), 0)));
    assert!(calls.contains(&Call::PostStarted));
}

#[test]
fn pause_of_a_disabled_channel_has_it_start_paused_once() {
    let (caller, _) = Caller::with_device();
    unsafe { (caller.table.VmbChannelPause)(caller.channel) };
    caller.enable();
    assert_eq!(caller.book.take(), [Call::Opened]);
    unsafe { (caller.table.VmbChannelStart)(caller.channel) };
    caller.vm.machine.settle();
    assert_eq!(caller.book.take(), [Call::Started, Call::PostStarted]);
    caller.disable();
    caller.book.take();
    caller.enable();
    assert_eq!(
        caller.book.take(),
        [Call::Opened, Call::Started, Call::PostStarted]
    );
}

#[test]
fn an_opened_callback_that_fails_closes_the_channel_and_its_status_reaches_pnp_failure() {
    let (caller, id) = Caller::with_device();
    *caller.book.opened.lock().unwrap() = STATUS_INSUFFICIENT_RESOURCES;
    caller.enable();
    assert_eq!(
        caller.book.take(),
        [
            Call::Opened,
            Call::PnpFailure(STATUS_INSUFFICIENT_RESOURCES)
        ]
    );
    assert!(!caller.vm.machine.is_open(id));
    *caller.book.opened.lock().unwrap() = STATUS_SUCCESS;
    caller.enable();
    assert!(caller.vm.machine.is_open(id));
}

#[test]
fn pending_from_an_opened_callback_is_a_success() {
    let (caller, id) = Caller::with_device();
    *caller.book.opened.lock().unwrap() = STATUS_PENDING;
    caller.enable();
    assert!(caller.vm.machine.is_open(id));
}

#[test]
fn a_host_that_does_not_open_the_channel_is_told_to_pnp_failure() {
    let (caller, _) = Caller::with_device();
    caller.vm.machine.set_open_status(Status(0xC000_009A));
    caller.enable();
    assert_eq!(
        caller.book.take(),
        [Call::PnpFailure(STATUS_INSUFFICIENT_RESOURCES)]
    );
}

#[test]
fn a_rescind_disables_and_the_channel_stays_so_until_it_is_enabled_again() {
    let (caller, id) = Caller::active();
    assert!(caller.vm.machine.rescind(id));
    caller.vm.machine.settle();
    caller.vm.machine.advance(15 * crate::support::SECOND);
    assert_eq!(caller.book.take(), [Call::Suspend, Call::Closed]);
    caller.register();
    assert_eq!(caller.try_enable(), STATUS_SUCCESS);
}

#[test]
fn the_interface_instance_is_that_of_the_bound_device() {
    let (caller, _) = Caller::with_device();
    let mut guid = KMCL_CLIENT_INTERFACE_TYPE;
    let mut get =
        |channel| unsafe { (caller.table.VmbChannelGetInterfaceInstance)(channel, &mut guid) };
    get(caller.channel);
    get(VMBCHANNEL::NULL);
    assert_eq!(guid, GUID::new(vmbus::protocol::Guid::ZERO));
    caller.enable();
    unsafe { (caller.table.VmbChannelGetInterfaceInstance)(caller.channel, &mut guid) };
    assert_eq!(guid, GUID::new(INSTANCE));
}

#[test]
fn a_device_without_registers_has_no_mmio_space() {
    let (caller, _) = Caller::active();
    let (mut address, mut size) = (1, 1);
    unsafe { (caller.table.VmbChannelGetMmioSpace)(caller.channel, &mut address, &mut size) };
    assert_eq!((address, size), (0, 0));
}

#[test]
fn device_objects_are_the_parent_and_none() {
    let caller = Caller::alone();
    let mut device = PDEVICE_OBJECT(1);
    unsafe { (caller.table.VmbChannelGetTargetDeviceObject)(caller.channel, &mut device) };
    assert_eq!(device, PDEVICE_OBJECT::NULL);
    unsafe { (caller.table.VmbChannelGetParentDeviceObject)(caller.channel, &mut device) };
    assert_eq!(device, caller.device.handle());
    unsafe { (caller.table.VmbChannelGetParentDeviceObject)(VMBCHANNEL::NULL, &mut device) };
    assert_eq!(device, PDEVICE_OBJECT::NULL);
}

#[test]
fn interrupt_latency_is_for_open_channels_with_monitored_notification() {
    let (caller, _) = Caller::with_device();
    let mut old = 7;
    let set = |channel, old: *mut u16| unsafe {
        (caller.table.VmbChannelSetInterruptLatency)(channel, 1000, old)
    };
    assert_eq!(set(VMBCHANNEL::NULL, &mut old), STATUS_INVALID_PARAMETER_1);
    assert_eq!(set(caller.channel, &mut old), STATUS_INVALID_PARAMETER_1);
    caller.enable();
    assert_eq!(
        set(caller.channel, ptr::null_mut()),
        STATUS_INVALID_PARAMETER_3
    );
    // The test's device has none.
    assert_eq!(set(caller.channel, &mut old), STATUS_NOT_SUPPORTED);
    assert_eq!(old, 7);
}

#[test]
fn with_monitored_notification_the_latency_of_before_is_told() {
    let profile = Profile::hyper_v();
    let before = profile.monitor_latency;
    let config = Config {
        monitor_pages: true,
        ..Config::default()
    };
    let vm = Vm::with_config(profile, config);
    let offer = Offer {
        monitor_id: MonitorId::new(5),
        ..Offer::new(INTERFACE, INSTANCE)
    };
    vm.machine.add(offer, Manual).unwrap();
    vm.connect();
    let caller = Caller::on(vm);
    caller.target(INTERFACE);
    caller.enable();
    let mut old = 0;
    let mut set = |latency| unsafe {
        let status =
            (caller.table.VmbChannelSetInterruptLatency)(caller.channel, latency, &mut old);
        (status, old)
    };
    assert_eq!(set(1234), (STATUS_SUCCESS, before));
    assert_eq!(set(1), (STATUS_SUCCESS, 1234));
}

#[test]
fn the_quota_stops_delivery_and_a_completion_restarts_it() {
    let (caller, id) = Caller::active();
    unsafe { (caller.table.VmbChannelSetTransactionQuota)(caller.channel, 2) };
    *caller.book.then.lock().unwrap() = Then::Keep;
    caller.vm.send_all(id, 0..5);
    caller.vm.machine.settle();
    assert_eq!(caller.book.kept().len(), 2);
    // Raising it restarts nothing.
    unsafe { (caller.table.VmbChannelSetTransactionQuota)(caller.channel, 4) };
    caller.vm.machine.settle();
    assert_eq!(caller.book.kept().len(), 2);
    let first = caller.book.kept().remove(0);
    caller.complete(first, &[]);
    caller.vm.machine.settle();
    assert_eq!(caller.book.kept().len(), 4);
    let kept = std::mem::take(&mut *caller.book.kept());
    *caller.book.then.lock().unwrap() = Then::Complete;
    for packet in kept {
        caller.complete(packet, &[]);
    }
    caller.disable();
}

#[test]
fn settings_of_any_state_are_taken_in_any_state_and_nonsense_changes_nothing() {
    let (caller, id) = Caller::with_device();
    let table = &caller.table;
    let set = |channel| unsafe {
        (table.VmbChannelSetIncomingProcessingAtPassive)(channel, 1);
        (table.VmbChannelSetTransactionQuota)(channel, 0);
        (table.VmbChannelSetTransactionQuota)(channel, 8);
        (table.VmbChannelSetAllowableDpcCpuUsage)(channel, 0);
        (table.VmbChannelSetAllowableDpcCpuUsage)(channel, 101);
        (table.VmbChannelSetAllowableDpcCpuUsage)(channel, 50);
    };
    set(VMBCHANNEL::NULL);
    set(caller.channel);
    caller.enable();
    set(caller.channel);
    caller.book.take();
    caller.vm.send_all(id, [1]);
    assert_eq!(caller.book.take(), [], "the interrupt delivers nothing");
    caller.vm.machine.settle();
    assert_eq!(caller.book.take_packets().len(), 2);
    caller.disable();
    set(caller.channel);
}

#[test]
fn what_is_for_passive_is_refused_at_dispatch_and_never_waits() {
    let (caller, id) = Caller::active();
    let (table, channel) = (&caller.table, caller.channel);
    let mut latency = 0;
    caller.vm.machine.at_dispatch(|| unsafe {
        assert_eq!(
            (table.VmbChannelEnable)(channel),
            STATUS_INVALID_DEVICE_STATE
        );
        assert_eq!(
            (table.VmbChannelInitSetFlags)(channel, 0),
            STATUS_INVALID_DEVICE_STATE
        );
        let mut handle = 0;
        assert_eq!(
            VmbChannelCreateGpadl(channel, 0, 1, &mut handle),
            STATUS_INVALID_DEVICE_STATE
        );
        let mut address = ptr::null_mut();
        assert_eq!(
            VmbChannelGetSystemAddressForGpadl(channel, 0, 1, &mut address),
            STATUS_INVALID_DEVICE_STATE
        );
        assert!(VmbAllocateSharedPages(caller.device.handle(), 1).is_null());
        (table.VmbChannelDisable)(channel);
        (table.VmbChannelPause)(channel);
        (table.VmbChannelStart)(channel);
        (table.VmbChannelCleanup)(channel);
        (table.VmbChannelDeleteGpadl)(channel, 1);
        let mut guid = GUID::new(INSTANCE);
        (table.VmbChannelGetInterfaceInstance)(channel, &mut guid);
        assert_eq!(guid, GUID::new(vmbus::protocol::Guid::ZERO));
        // And what is not: a driver's interrupt needs packets.
        let packet = (table.VmbPacketAllocate)(channel);
        assert!(!packet.is_null());
        (table.VmbPacketFree)(packet);
        (table.VmbChannelSetInterruptLatency)(channel, 1, &mut latency);
    });
    caller.vm.machine.settle();
    assert!(caller.vm.machine.is_open(id));
    assert_eq!(caller.book.take(), []);
}

/// What was logged, by every test of this program.
static LINES: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());

struct Lines;

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LINES.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[test]
fn a_line_of_the_driver_reaches_the_log() {
    log::set_logger(&Lines).unwrap();
    log::set_max_level(log::LevelFilter::Info);
    let caller = Caller::alone();
    let text = c"a line of the test of the log";
    unsafe { VmbLog(caller.device.handle(), text.as_ptr().cast()) };
    log::set_max_level(log::LevelFilter::Off);
    let line = text.to_str().unwrap();
    assert!(LINES.lock().unwrap().iter().any(|seen| seen == line));
}
