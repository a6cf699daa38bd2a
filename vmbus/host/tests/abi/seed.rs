//! `VmbChannelInitSetProcessPacketCallbacks`, clause by clause, by its slot in the table (issue 3, the seed).

use std::ptr;
use std::sync::atomic::Ordering;

use vmbus::kmcl::abi::*;

use crate::caller::{
    Call, Caller, Then, process_packet, process_packet_ex, processing_complete,
    processing_complete_ex, stray_packet,
};
use crate::support::{INTERFACE, Vm};

/// Calls it by the pointer in the table.
fn set(caller: &Caller, channel: VMBCHANNEL) -> NTSTATUS {
    unsafe {
        (caller.table.VmbChannelInitSetProcessPacketCallbacks)(
            channel,
            Some(process_packet),
            Some(processing_complete),
        )
    }
}

/// A driver that has set nothing but its target.
fn bare() -> (Caller, vmbus::ids::ChannelId) {
    let (vm, id) = Vm::with_device();
    let caller = Caller::on(vm);
    caller.target(INTERFACE);
    (caller, id)
}

/// The same, open with these callbacks only.
fn open() -> (Caller, vmbus::ids::ChannelId) {
    let (caller, id) = bare();
    assert_eq!(set(&caller, caller.channel), STATUS_SUCCESS);
    caller.enable();
    (caller, id)
}

fn packet(number: u64) -> Call {
    Call::Packet(number.to_le_bytes().to_vec(), 0)
}

#[test]
fn it_is_a_member_of_the_client_interface_v1() {
    let caller = Caller::alone();
    let size = size_of::<KMCL_CLIENT_INTERFACE_V1>() as u16;
    let table = query_interface(&caller.device, &KMCL_CLIENT_INTERFACE_TYPE, size, 1).unwrap();
    let Table::V1(table) = table else {
        panic!("{table:?}");
    };
    // The header of 32 bytes, then the sixteenth function.
    assert_eq!(
        std::mem::offset_of!(
            KMCL_CLIENT_INTERFACE_V1,
            VmbChannelInitSetProcessPacketCallbacks
        ),
        32 + 15 * 8
    );
    let status = unsafe {
        (table.VmbChannelInitSetProcessPacketCallbacks)(
            caller.channel,
            Some(process_packet),
            Some(processing_complete),
        )
    };
    assert_eq!(status, STATUS_SUCCESS);
}

#[test]
fn it_sets_both_callbacks_and_returns_success_on_a_disabled_channel() {
    let (caller, id) = open();
    caller.vm.send_all(id, [1]);
    assert_eq!(caller.book.take(), [packet(1), Call::Complete(1)]);
}

#[test]
fn the_processing_complete_callback_is_optional() {
    let (caller, id) = bare();
    let status = unsafe {
        (caller.table.VmbChannelInitSetProcessPacketCallbacks)(
            caller.channel,
            Some(process_packet),
            None,
        )
    };
    assert_eq!(status, STATUS_SUCCESS);
    caller.enable();
    caller.vm.send_all(id, [1, 2]);
    assert_eq!(caller.book.take(), [packet(1), packet(2)]);
}

#[test]
fn an_invalid_channel_handle_is_invalid_parameter_1() {
    let (caller, _) = bare();
    let packet = caller.allocate_packet();
    assert!(!packet.is_null());
    for (what, handle) in [
        ("null", VMBCHANNEL::NULL),
        ("a small number", VMBCHANNEL(0x1000)),
        ("all ones", VMBCHANNEL(usize::MAX)),
        ("a bit changed", VMBCHANNEL(caller.channel.0 ^ 1)),
        ("a packet", VMBCHANNEL(packet.0)),
        ("the device", VMBCHANNEL(caller.device.handle().0)),
        (
            "an address of something else",
            VMBCHANNEL(ptr::from_ref(&caller).addr()),
        ),
    ] {
        assert_eq!(set(&caller, handle), STATUS_INVALID_PARAMETER_1, "{what}");
    }
}

#[test]
fn a_handle_of_a_channel_that_was_cleaned_up_is_invalid_parameter_1() {
    let caller = Caller::alone();
    let old = caller.channel;
    unsafe { (caller.table.VmbChannelCleanup)(old) };
    assert_eq!(set(&caller, old), STATUS_INVALID_PARAMETER_1);
    // Another channel, perhaps in the same place, does not bring it back.
    let mut new = VMBCHANNEL::NULL;
    let status = unsafe { (caller.table.VmbChannelAllocate)(caller.device.handle(), 0, &mut new) };
    assert_eq!(status, STATUS_SUCCESS);
    assert_eq!(set(&caller, old), STATUS_INVALID_PARAMETER_1);
    assert_eq!(set(&caller, new), STATUS_SUCCESS);
}

#[test]
fn in_a_state_in_which_it_cannot_be_configured_it_is_invalid_parameter_1() {
    // Enabled, and no device has come.
    let waiting = Caller::alone();
    waiting.target(INTERFACE);
    assert_eq!(waiting.try_enable(), STATUS_SUCCESS);
    assert_eq!(set(&waiting, waiting.channel), STATUS_INVALID_PARAMETER_1);
    waiting.disable();
    assert_eq!(set(&waiting, waiting.channel), STATUS_SUCCESS);

    // Active, paused, and Disabled again.
    let (caller, _) = open();
    assert_eq!(set(&caller, caller.channel), STATUS_INVALID_PARAMETER_1);
    unsafe { (caller.table.VmbChannelPause)(caller.channel) };
    assert_eq!(set(&caller, caller.channel), STATUS_INVALID_PARAMETER_1);
    caller.disable();
    assert_eq!(set(&caller, caller.channel), STATUS_SUCCESS);
}

#[test]
fn a_refused_registration_changes_nothing() {
    let (caller, id) = open();
    let status = unsafe {
        (caller.table.VmbChannelInitSetProcessPacketCallbacks)(
            caller.channel,
            Some(stray_packet),
            None,
        )
    };
    assert_eq!(status, STATUS_INVALID_PARAMETER_1);
    caller.vm.send_all(id, [3]);
    assert_eq!(caller.book.take(), [packet(3), Call::Complete(1)]);
    assert_eq!(caller.book.strays.load(Ordering::SeqCst), 0);
}

/// Public KMCL has no way to suppress queue management, and neither has the table: what is registered through it is always
/// meaningful, and no flag turns it off.
#[test]
fn it_is_meaningful_while_queue_management_is_not_suppressed_and_the_table_cannot_suppress_it() {
    let (caller, id) = bare();
    for flag in (0..32).map(|bit| 1u32 << bit) {
        let status = unsafe { (caller.table.VmbChannelInitSetFlags)(caller.channel, flag) };
        let wanted = if flag == VMBUS_CHANNEL_INIT_FLAG_IS_PIPE {
            STATUS_SUCCESS
        } else {
            STATUS_INVALID_PARAMETER_2
        };
        assert_eq!(status, wanted, "flag {flag:#x}");
    }
    let none = unsafe { (caller.table.VmbChannelInitSetFlags)(caller.channel, 0) };
    assert_eq!(none, STATUS_SUCCESS);
    assert_eq!(set(&caller, caller.channel), STATUS_SUCCESS);
    caller.enable();
    caller.vm.send_all(id, [9]);
    assert_eq!(caller.book.take(), [packet(9), Call::Complete(1)]);
}

#[test]
fn process_packet_runs_for_every_packet_received_in_order() {
    let (caller, id) = open();
    for burst in 0..20u64 {
        caller.vm.send_all(id, burst * 50..(burst + 1) * 50);
    }
    caller.vm.machine.settle();
    let seen: Vec<Call> = caller
        .book
        .take()
        .into_iter()
        .filter(|call| matches!(call, Call::Packet(..)))
        .collect();
    assert_eq!(seen, (0..1000).map(packet).collect::<Vec<_>>());
}

#[test]
fn processing_complete_runs_every_time_the_ring_goes_from_non_empty_to_empty() {
    let (caller, id) = open();
    for round in 0..3 {
        caller.vm.send_all(id, [round, round + 10]);
        assert_eq!(
            caller.book.take(),
            [packet(round), packet(round + 10), Call::Complete(2)]
        );
    }
    // An interrupt that finds nothing is no such time.
    caller.vm.machine.interrupt(id);
    caller.vm.machine.settle();
    assert_eq!(caller.book.take(), []);
}

#[test]
fn processing_complete_runs_after_the_last_process_packet_call_of_its_batch() {
    let (caller, id) = open();
    caller.vm.send_all(id, 0..200);
    caller.vm.machine.settle();
    let calls = caller.book.take();
    let mut since = 0;
    let mut seen = 0;
    for call in &calls {
        match call {
            Call::Packet(..) => since += 1,
            Call::Complete(count) => {
                assert_eq!(*count, since, "it counts the packets since the last time");
                assert!(since > 0, "never for an empty batch");
                seen += since;
                since = 0;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((seen, since), (200, 0));
    assert!(matches!(calls.last(), Some(Call::Complete(_))));
}

#[test]
fn of_the_plain_and_the_ex_form_the_last_valid_registration_wins() {
    let ex = |caller: &Caller| unsafe {
        (caller.table.VmbChannelInitSetProcessPacketCallbacksEx)(
            caller.channel,
            caller.book.context(),
            Some(process_packet_ex),
            Some(processing_complete_ex),
        )
    };
    let stray = |caller: &Caller| unsafe {
        (caller.table.VmbChannelInitSetProcessPacketCallbacks)(
            caller.channel,
            Some(stray_packet),
            None,
        )
    };
    let (caller, id) = bare();
    assert_eq!(stray(&caller), STATUS_SUCCESS);
    assert_eq!(ex(&caller), STATUS_SUCCESS);
    caller.enable();
    caller.vm.send_all(id, [1]);
    assert_eq!(caller.book.take(), [packet(1), Call::Complete(1)]);
    assert_eq!(caller.book.strays.load(Ordering::SeqCst), 0);

    // Between Disable and Enable it can be set anew.
    caller.disable();
    assert_eq!(stray(&caller), STATUS_SUCCESS);
    caller.enable();
    caller.vm.send_all(id, [2, 3]);
    assert_eq!(caller.book.take(), []);
    assert_eq!(caller.book.strays.load(Ordering::SeqCst), 2);
}

#[test]
fn packets_that_a_driver_keeps_are_counted_in_their_batch() {
    let (caller, id) = open();
    *caller.book.then.lock().unwrap() = Then::Keep;
    caller.vm.send_all(id, [1, 2, 3]);
    assert_eq!(
        caller.book.take(),
        [packet(1), packet(2), packet(3), Call::Complete(3)]
    );
    for kept in caller.book.kept().drain(..) {
        caller.complete(kept, &[]);
    }
}
