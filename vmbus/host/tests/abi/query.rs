//! How the table is obtained: by GUID, size and version.

use std::mem::MaybeUninit;
use std::ptr;

use vmbus::kmcl::abi::*;

use crate::caller::Caller;

/// The sizes of the versions.
fn sizes() -> [u16; 5] {
    [
        size_of::<KMCL_CLIENT_INTERFACE_V1>(),
        size_of::<KMCL_CLIENT_INTERFACE_V2>(),
        size_of::<KMCL_CLIENT_INTERFACE_V3>(),
        size_of::<KMCL_CLIENT_INTERFACE_V4>(),
        size_of::<KMCL_CLIENT_INTERFACE_V5>(),
    ]
    .map(|size| size as u16)
}

#[test]
fn each_version_is_given_for_its_own_size_and_no_other() {
    let caller = Caller::alone();
    let client = &KMCL_CLIENT_INTERFACE_TYPE;
    for (version, right) in (1..).zip(sizes()) {
        let table = query_interface(&caller.device, client, right, version).unwrap();
        let header = match table {
            Table::V1(table) => table.Interface,
            Table::V2(table) => table.Interface,
            Table::V3(table) => table.Interface,
            Table::V4(table) => table.Interface,
            Table::V5(table) => table.Interface,
        };
        assert_eq!((header.Size, header.Version), (right, version));
        for wrong in [0, right - 8, right + 8, u16::MAX] {
            let refused = query_interface(&caller.device, client, wrong, version);
            assert_eq!(refused.err(), Some(STATUS_INVALID_PARAMETER_4));
        }
    }
}

#[test]
fn unknown_versions_and_interfaces_are_not_supported() {
    let caller = Caller::alone();
    let [_, _, _, _, newest] = sizes();
    for version in [0, 6, u16::MAX] {
        let refused = query_interface(&caller.device, &KMCL_CLIENT_INTERFACE_TYPE, newest, version);
        assert_eq!(refused.err(), Some(STATUS_NOT_SUPPORTED));
    }
    let mut other = KMCL_CLIENT_INTERFACE_TYPE;
    other.Data4[7] ^= 1;
    for (interface, size) in [
        (other, newest),
        (
            KMCL_SERVER_INTERFACE_TYPE,
            size_of::<KMCL_SERVER_INTERFACE_V1>() as u16,
        ),
        (
            KMCL_SERVER_INTERFACE_TYPE,
            size_of::<KMCL_SERVER_INTERFACE_V5>() as u16,
        ),
    ] {
        for version in [1, 5] {
            let refused = query_interface(&caller.device, &interface, size, version);
            assert_eq!(refused.err(), Some(STATUS_NOT_SUPPORTED));
        }
    }
}

#[test]
fn c_has_its_own_structure_filled_and_nothing_behind_it() {
    let caller = Caller::alone();
    let size = size_of::<KMCL_CLIENT_INTERFACE_V1>();
    let mut place: MaybeUninit<[KMCL_CLIENT_INTERFACE_V1; 2]> = MaybeUninit::uninit();
    unsafe { ptr::write_bytes(place.as_mut_ptr(), 0xA5, 1) };
    let status = unsafe {
        VmbQueryInterface(
            caller.device.handle(),
            &KMCL_CLIENT_INTERFACE_TYPE,
            place.as_mut_ptr().cast(),
            size as u16,
            1,
        )
    };
    assert_eq!(status, STATUS_SUCCESS);
    let bytes: &[u8] =
        unsafe { std::slice::from_raw_parts(place.as_ptr().cast::<u8>().add(size), size) };
    assert!(bytes.iter().all(|&byte| byte == 0xA5));
    let table: KMCL_CLIENT_INTERFACE_V1 = unsafe { ptr::read(place.as_ptr().cast()) };
    let mut channel = VMBCHANNEL::NULL;
    let status = unsafe { (table.VmbChannelAllocate)(caller.device.handle(), 0, &mut channel) };
    assert_eq!(status, STATUS_SUCCESS);
    unsafe { (table.VmbChannelCleanup)(channel) };
    unsafe { table.Interface.InterfaceReference.unwrap()(table.Interface.Context) };
    unsafe { table.Interface.InterfaceDereference.unwrap()(table.Interface.Context) };
}

#[test]
fn c_is_told_which_argument_is_wrong() {
    let caller = Caller::alone();
    let mut table: MaybeUninit<KMCL_CLIENT_INTERFACE_V1> = MaybeUninit::uninit();
    let into: *mut INTERFACE = table.as_mut_ptr().cast();
    let client: *const GUID = &KMCL_CLIENT_INTERFACE_TYPE;
    let size = size_of::<KMCL_CLIENT_INTERFACE_V1>() as u16;
    let device = caller.device.handle();
    let query = |device, guid, into, size, version| unsafe {
        VmbQueryInterface(device, guid, into, size, version)
    };
    for (status, wanted) in [
        (
            query(PDEVICE_OBJECT::NULL, client, into, size, 1),
            STATUS_INVALID_PARAMETER_1,
        ),
        (
            query(PDEVICE_OBJECT(device.0 ^ 1), client, into, size, 1),
            STATUS_INVALID_PARAMETER_1,
        ),
        (
            query(device, ptr::null(), into, size, 1),
            STATUS_INVALID_PARAMETER_2,
        ),
        (
            query(device, client, ptr::null_mut(), size, 1),
            STATUS_INVALID_PARAMETER_3,
        ),
        (
            query(device, client, into, size - 1, 1),
            STATUS_INVALID_PARAMETER_4,
        ),
        (query(device, client, into, size, 9), STATUS_NOT_SUPPORTED),
        (
            query(device, &KMCL_SERVER_INTERFACE_TYPE, into, size, 1),
            STATUS_NOT_SUPPORTED,
        ),
    ] {
        assert_eq!(status, wanted);
    }
}

#[test]
fn a_device_that_has_ended_is_no_device() {
    let caller = Caller::alone();
    let device = Device::new(caller.vm.vmbus.client()).unwrap();
    let handle = device.handle();
    drop(device);
    let mut channel = VMBCHANNEL::NULL;
    let status = unsafe { (caller.table.VmbChannelAllocate)(handle, 0, &mut channel) };
    assert_eq!(status, STATUS_INVALID_PARAMETER_1);
    assert_eq!(channel, VMBCHANNEL::NULL);
}

/// Calls every function of servers, by its slot.
#[test]
fn functions_of_servers_refuse() {
    let caller = Caller::alone();
    let table = server_table(&caller.device);
    let (channel, null) = (caller.channel, ptr::null_mut());
    let guid = KMCL_SERVER_INTERFACE_TYPE;
    let mut mdl: PMDL = ptr::null_mut();
    let (mut filled, mut required) = (1, 1);
    let mut handle: HANDLE = ptr::null_mut();
    let statuses = unsafe {
        [
            (table.VmbChannelMapGpadl)(channel, 0, 1, &mut mdl),
            (table.VmbChannelRestoreFromBuffer)(channel, null, 0),
            (table.VmbChannelSaveBegin)(channel),
            (table.VmbChannelSaveContinue)(channel, null, 0, &mut filled, &mut required),
            (table.VmbConvertVmbusHandleToKernelHandle)(null, &mut handle),
            (table.VmbPacketRestore)(VMBPACKET::NULL, null, 0),
            (table.VmbServerChannelInitSetFlags)(channel, 0),
            (table.VmbServerChannelInitSetMmioMegabytes)(channel, 1, 1),
            (table.VmbServerChannelInitSetSaveRestorePacketCallbacks)(channel, None, None),
            (table.VmbServerChannelInitSetTargetInterfaceId)(channel, guid, guid),
            (table.VmbServerChannelInitSetTargetVtl)(channel, 0),
            (table.VmbServerChannelInitSetVmbusHandle)(channel, null),
            (table.VmbServerChannelInitSetSaveRestorePacketCallbacksEx)(channel, null, None, None),
        ]
    };
    assert!(
        statuses
            .iter()
            .all(|&status| status == STATUS_NOT_SUPPORTED)
    );
    unsafe { (table.VmbChannelSaveEnd)(channel) };
    unsafe { (table.VmbChannelUnmapGpadl)(channel, 1) };
    assert_eq!((filled, required), (1, 1));
    // And the channel is what it was.
    caller.target(crate::support::INTERFACE);
    let named = abi_functions_of_servers();
    assert_eq!(named.len(), statuses.len() + 2);
}

fn abi_functions_of_servers() -> Vec<&'static str> {
    let refusing = FUNCTIONS
        .iter()
        .filter(|function| matches!(function.interface, Interface::Server { .. }));
    assert!(refusing.clone().all(|function| !function.applies_to_guest));
    refusing.map(|function| function.name).collect()
}

/// Section 6.3 of the sheet: what NT_SUCCESS makes of two statuses.
#[test]
fn pending_is_a_success_and_more_processing_required_is_none() {
    assert!(STATUS_SUCCESS.is_success());
    assert!(STATUS_PENDING.is_success());
    assert!(!STATUS_MORE_PROCESSING_REQUIRED.is_success());
    assert!(!STATUS_BUFFER_OVERFLOW.is_success());
    assert!(!STATUS_INVALID_PARAMETER_1.is_success());
}
