//! Packets by the table: received ones with their completions, and those to send.

use std::ptr;

use vmbus::kmcl::abi::*;
use vmbus::ring::{Outgoing, PacketBuffer, TransferPageList, TransferPageRange};

use crate::caller::{Call, Caller, Then, sent};
use crate::support::received;

const WAIT: u32 = VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION;

fn packet(number: u64) -> Call {
    Call::Packet(number.to_le_bytes().to_vec(), 0)
}

#[test]
fn a_completion_goes_to_a_host_that_asked_for_it_and_to_no_other() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Answer(42);
    caller.vm.host(id, |host| {
        let data = 1u64.to_le_bytes();
        host.send(&Outgoing::in_band([&data, &[]]).with_completion(77))
            .unwrap();
    });
    caller.vm.host(id, |host| {
        let mut packet = PacketBuffer::default();
        assert!(host.receive(&mut packet).unwrap());
        assert_eq!(packet.transaction_id(), 77);
        assert_eq!(packet.payload(), 42u64.to_le_bytes());
        host.release().unwrap();
    });
    caller.vm.send_all(id, [2]);
    caller.vm.host(id, |host| {
        assert!(!host.receive(&mut PacketBuffer::default()).unwrap());
    });
}

#[test]
fn a_kept_packet_is_completed_once_and_its_handle_is_good_until_then() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Keep;
    caller.vm.send_all(id, [1, 2]);
    let kept = std::mem::take(&mut *caller.book.kept());
    let mut mdl: PMDL = ptr::null_mut();
    let external = |packet, flags, mdl| unsafe {
        (caller.table.VmbChannelPacketGetExternalData)(packet, flags, mdl)
    };
    assert_eq!(external(kept[0], 0, &mut mdl), STATUS_NOT_SUPPORTED);
    // Out of order, and one of them twice: the second time is a bug that is reported and does nothing.
    caller.complete(kept[1], &[]);
    caller.complete(kept[1], &[]);
    caller.complete(kept[0], &[]);
    assert_eq!(external(kept[0], 0, &mut mdl), STATUS_INVALID_PARAMETER_1);
    caller.complete(VMBPACKETCOMPLETION::NULL, &[]);
    caller.vm.send_all(id, [3]);
    assert_eq!(
        caller.book.take_packets(),
        [
            packet(1),
            packet(2),
            Call::Complete(2),
            packet(3),
            Call::Complete(1)
        ]
    );
    caller.complete(kept[0], &[]);
    let last = caller.book.kept().remove(0);
    caller.complete(last, &[]);
    caller.disable();
}

#[test]
fn external_data_says_which_argument_is_wrong() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Keep;
    caller.vm.send_all(id, [1]);
    let kept = caller.book.kept().remove(0);
    let mut mdl: PMDL = ptr::null_mut();
    let get = |packet, flags, mdl| unsafe {
        (caller.table.VmbChannelPacketGetExternalData)(packet, flags, mdl)
    };
    assert_eq!(
        get(VMBPACKETCOMPLETION::NULL, 0, &mut mdl),
        STATUS_INVALID_PARAMETER_1
    );
    assert_eq!(get(kept, 2, &mut mdl), STATUS_INVALID_PARAMETER_2);
    assert_eq!(get(kept, 1, ptr::null_mut()), STATUS_INVALID_PARAMETER_3);
    assert_eq!(get(kept, 1, &mut mdl), STATUS_NOT_SUPPORTED);
    caller.complete(kept, &[]);
}

#[test]
fn a_deferred_packet_comes_again_at_passive_and_is_counted_once() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Defer;
    caller.vm.send_all(id, [1, 2]);
    caller.vm.machine.settle();
    let calls = caller.book.take();
    let delivered: Vec<&Call> = calls
        .iter()
        .filter(|call| matches!(call, Call::Packet(..)))
        .collect();
    assert_eq!(delivered, [&packet(1), &packet(1), &packet(2)]);
    let counted: u32 = calls
        .iter()
        .filter_map(|call| match call {
            Call::Complete(count) => Some(*count),
            _ => None,
        })
        .sum();
    assert_eq!(counted, 2);
}

#[test]
fn a_failed_packet_ends_the_channel_without_a_completion() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Fail;
    caller.vm.send_all(id, [1, 2]);
    caller.vm.machine.settle();
    let calls = caller.book.take();
    assert!(calls.contains(&packet(1)) && !calls.contains(&packet(2)));
    assert!(calls.ends_with(&[Call::Suspend, Call::Closed]));
    assert!(!caller.vm.machine.is_open(id));
    *caller.book.then.lock().unwrap() = Then::Complete;
    caller.enable();
    assert!(caller.vm.machine.is_open(id));
}

#[test]
fn deferring_or_failing_outside_of_process_packet_is_refused() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Keep;
    caller.vm.send_all(id, [1]);
    let kept = caller.book.kept().remove(0);
    unsafe { (caller.table.VmbChannelPacketDeferToPassive)(kept) };
    unsafe { (caller.table.VmbChannelPacketFail)(kept) };
    caller.vm.machine.settle();
    assert!(caller.vm.machine.is_open(id));
    assert_eq!(caller.book.take(), [packet(1), Call::Complete(1)]);
    caller.complete(kept, &[]);
    caller.disable();
}

#[test]
fn each_received_packet_has_its_own_client_context() {
    let (caller, id) = Caller::with_device();
    let set = unsafe { (caller.table.VmbChannelInitSetClientContextSize)(caller.channel, 40) };
    assert_eq!(set, STATUS_SUCCESS);
    caller.enable();
    *caller.book.then.lock().unwrap() = Then::Keep;
    caller.vm.send_all(id, [1, 2]);
    let context = |packet| unsafe { (caller.table.VmbChannelPacketGetClientContext)(packet) };
    let kept = std::mem::take(&mut *caller.book.kept());
    let contexts = [context(kept[0]).cast::<u8>(), context(kept[1]).cast::<u8>()];
    assert!(contexts.iter().all(|context| !context.is_null()));
    assert!(contexts[0].addr().abs_diff(contexts[1].addr()) >= 40);
    for (fill, context) in (1..).zip(contexts) {
        unsafe { context.write_bytes(fill, 40) };
    }
    assert_eq!(unsafe { *contexts[0].add(39) }, 1);
    for packet in kept {
        caller.complete(packet, &[]);
        assert!(context(packet).is_null());
    }
    assert!(context(VMBPACKETCOMPLETION::NULL).is_null());
}

#[test]
fn transfer_pages_are_flagged_as_external_data_and_told() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Keep;
    let ranges = [
        TransferPageRange {
            length: 100,
            offset: 0,
        },
        TransferPageRange {
            length: 200,
            offset: 4096,
        },
    ];
    caller.vm.host(id, |host| {
        let list = TransferPageList::new(9, &ranges);
        let data = 5u64.to_le_bytes();
        host.send(&Outgoing::transfer_pages(&list, [&data, &[]]))
            .unwrap();
    });
    caller.vm.send_all(id, [6]);
    let calls = caller.book.take_packets();
    assert_eq!(
        calls[0],
        Call::Packet(
            5u64.to_le_bytes().to_vec(),
            VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA
        )
    );
    let kept = std::mem::take(&mut *caller.book.kept());
    let empty = VMB_TRANSFER_PAGE_RANGE {
        ByteCount: 0,
        ByteOffset: 0,
    };
    let mut told = [empty; 2];
    let (mut set, mut count) = (0, 1);
    let get = |packet, set: *mut u16, count: *mut u32, told: &mut [VMB_TRANSFER_PAGE_RANGE; 2]| unsafe {
        VmbChannelPacketGetTransferPages(packet, set, count, told.as_mut_ptr())
    };
    assert_eq!(
        get(kept[0], &mut set, &mut count, &mut told),
        STATUS_BUFFER_OVERFLOW
    );
    assert_eq!((set, count, told[0].ByteCount), (9, 2, 0));
    assert_eq!(
        get(kept[0], &mut set, &mut count, &mut told),
        STATUS_SUCCESS
    );
    for (told, sent) in told.iter().zip(ranges) {
        assert_eq!(
            (told.ByteCount, told.ByteOffset),
            (sent.length, sent.offset)
        );
    }
    for (status, wanted) in [
        (
            get(kept[1], &mut set, &mut count, &mut told),
            STATUS_INVALID_PARAMETER_1,
        ),
        (
            get(kept[0], ptr::null_mut(), &mut count, &mut told),
            STATUS_INVALID_PARAMETER_2,
        ),
        (
            get(kept[0], &mut set, ptr::null_mut(), &mut told),
            STATUS_INVALID_PARAMETER_3,
        ),
    ] {
        assert_eq!(status, wanted);
    }
    for packet in kept {
        caller.complete(packet, &[]);
    }
}

#[test]
fn a_message_that_has_entered_the_ring_completes_its_packet() {
    let (caller, id) = Caller::active();
    let packet = caller.packet();
    assert_eq!(caller.send(packet, b"message!", 0), STATUS_SUCCESS);
    assert_eq!(
        caller.book.take(),
        [Call::Sent(packet, STATUS_SUCCESS, Vec::new())]
    );
    let messages = caller.vm.host(id, received);
    assert_eq!(messages, [(None, b"message!".to_vec())]);
    // It is the driver's again: it can be sent again, or freed.
    assert_eq!(caller.send(packet, b"again...", 0), STATUS_SUCCESS);
    caller.book.take();
    unsafe { (caller.table.VmbPacketFree)(packet) };
    assert_eq!(
        caller.send(packet, b"too late", 0),
        STATUS_INVALID_PARAMETER_1
    );
}

#[test]
fn a_transaction_completes_with_the_hosts_answer() {
    let (caller, id) = Caller::active();
    let packet = caller.packet();
    assert_eq!(caller.send(packet, b"request!", WAIT), STATUS_SUCCESS);
    assert_eq!(caller.book.take(), []);
    // In flight, it is the library's.
    assert_eq!(
        caller.send(packet, b"request!", WAIT),
        STATUS_INVALID_PARAMETER_1
    );
    unsafe { (caller.table.VmbPacketFree)(packet) };
    let requests = caller.vm.host(id, received);
    let (Some(transaction), _) = requests[0] else {
        panic!("{requests:?}");
    };
    caller.vm.host(id, |host| {
        host.send(&Outgoing::completion(transaction, b"answered"))
            .unwrap();
    });
    assert_eq!(
        caller.book.take(),
        [Call::Sent(packet, STATUS_SUCCESS, b"answered".to_vec())]
    );
}

#[test]
fn an_unanswered_transaction_fails_with_device_removed_when_the_channel_closes() {
    let (caller, _) = Caller::active();
    let packet = caller.packet();
    assert_eq!(caller.send(packet, b"request!", WAIT), STATUS_SUCCESS);
    caller.disable();
    let calls = caller.book.take();
    let failed = Call::Sent(packet, STATUS_DEVICE_REMOVED, Vec::new());
    assert_eq!(calls.iter().filter(|call| **call == failed).count(), 1);
    assert_eq!(
        caller.send(packet, b"request!", WAIT),
        STATUS_DEVICE_REMOVED
    );
    // The packet outlives the channel's rest.
    caller.enable();
    assert_eq!(caller.send(packet, b"message!", 0), STATUS_SUCCESS);
}

#[test]
fn without_a_routine_a_packet_frees_itself_when_it_has_ended() {
    let (caller, _) = Caller::active();
    let packet = caller.allocate_packet();
    assert_eq!(caller.send(packet, b"message!", 0), STATUS_SUCCESS);
    assert_eq!(
        caller.send(packet, b"message!", 0),
        STATUS_INVALID_PARAMETER_1
    );
}

#[test]
fn no_more_packets_are_allocated_than_configured() {
    let (caller, _) = Caller::with_device();
    let set = unsafe { (caller.table.VmbChannelInitSetMaximumPacketCount)(caller.channel, 3) };
    assert_eq!(set, STATUS_SUCCESS);
    let packets: Vec<VMBPACKET> = (0..3).map(|_| caller.allocate_packet()).collect();
    assert!(packets.iter().all(|packet| !packet.is_null()));
    assert!(caller.allocate_packet().is_null());
    unsafe { (caller.table.VmbPacketFree)(packets[1]) };
    assert!(!caller.allocate_packet().is_null());
    assert!(unsafe { (caller.table.VmbPacketAllocate)(VMBCHANNEL::NULL) }.is_null());
}

#[test]
fn sends_say_which_argument_is_wrong() {
    let (caller, _) = Caller::active();
    let table = &caller.table;
    let packet = caller.packet();
    let mut page: PFN_NUMBER = 5;
    let mut data = [0u8; 8];
    let buffer: PVOID = data.as_mut_ptr().cast();
    let null = ptr::null_mut();
    let no_mdl: *mut MDL = ptr::null_mut();
    let statuses = unsafe {
        [
            (
                (table.VmbPacketSend)(VMBPACKET::NULL, buffer, 8, no_mdl, 0),
                STATUS_INVALID_PARAMETER_1,
            ),
            (
                (table.VmbPacketSend)(VMBPACKET(caller.channel.0), buffer, 8, no_mdl, 0),
                STATUS_INVALID_PARAMETER_1,
            ),
            (
                (table.VmbPacketSend)(packet, null, 8, no_mdl, 0),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                (table.VmbPacketSend)(packet, vec![0u8; 2000].as_mut_ptr().cast(), 2000, no_mdl, 0),
                STATUS_INVALID_PARAMETER_3,
            ),
            (
                (table.VmbPacketSend)(packet, buffer, 8, no_mdl, 0x20),
                STATUS_INVALID_PARAMETER,
            ),
            // External data only with the WAIT flag, and only if there is some.
            (
                (table.VmbPacketSendWithExternalPfns)(packet, buffer, 8, &mut page, 1, 0),
                STATUS_INVALID_PARAMETER,
            ),
            (
                (table.VmbPacketSendWithExternalPfns)(packet, buffer, 8, ptr::null_mut(), 1, WAIT),
                STATUS_INVALID_PARAMETER,
            ),
            (
                (table.VmbPacketSendWithExternalPfns)(packet, buffer, 8, &mut page, 0, WAIT),
                STATUS_INVALID_PARAMETER,
            ),
            (
                (table.VmbPacketSendWithExternalMdl)(packet, buffer, 8, no_mdl, 0, 0, WAIT),
                STATUS_INVALID_PARAMETER,
            ),
        ]
    };
    for (index, (status, wanted)) in statuses.into_iter().enumerate() {
        assert_eq!(status, wanted, "call {index}");
    }
    // None of them has sent it, or called its routine.
    assert_eq!(caller.book.take(), []);
    assert_eq!(caller.send(packet, &data, 0), STATUS_SUCCESS);
}

#[test]
fn a_packet_in_the_drivers_own_memory_needs_a_routine_and_is_never_freed() {
    let (caller, _) = Caller::active();
    let table = &caller.table;
    let need = unsafe { (table.VmbChannelSizeofPacket)(caller.channel) };
    assert!(need > 1024 + 8, "more than the largest data and a pointer");
    assert_eq!(
        unsafe { (table.VmbChannelSizeofPacket)(VMBCHANNEL::NULL) },
        0
    );
    let mut memory = vec![0u64; need.div_ceil(8) as usize];
    let place = VMBPACKET(memory.as_mut_ptr().addr());
    let initialize =
        |channel, place, bytes| unsafe { (table.VmbPacketInitialize)(channel, place, bytes) };
    assert_eq!(
        initialize(VMBCHANNEL::NULL, place, need),
        STATUS_INVALID_PARAMETER_1
    );
    assert_eq!(
        initialize(caller.channel, VMBPACKET::NULL, need),
        STATUS_INVALID_PARAMETER_2
    );
    assert_eq!(
        initialize(caller.channel, place, need - 1),
        STATUS_INVALID_PARAMETER_3
    );
    assert_eq!(
        caller.send(place, b"message!", 0),
        STATUS_INVALID_PARAMETER_1
    );
    assert_eq!(initialize(caller.channel, place, need), STATUS_SUCCESS);
    assert_eq!(
        unsafe { (table.VmbPacketGetChannel)(place) },
        caller.channel
    );
    assert_eq!(
        caller.send(place, b"message!", 0),
        STATUS_INVALID_PARAMETER_1,
        "there is no routine"
    );
    unsafe { (table.VmbPacketSetCompletionRoutine)(place, Some(sent)) };
    unsafe { (table.VmbPacketFree)(place) };
    assert_eq!(caller.send(place, b"message!", WAIT), STATUS_SUCCESS);
    assert_eq!(
        initialize(caller.channel, place, need),
        STATUS_INVALID_PARAMETER_2,
        "it is in flight"
    );
    caller.disable();
    let failed = Call::Sent(place, STATUS_DEVICE_REMOVED, Vec::new());
    assert!(caller.book.take().contains(&failed));
    assert_eq!(initialize(caller.channel, place, need), STATUS_SUCCESS);
}

#[test]
fn packets_have_a_pointer_a_channel_and_an_inline_context() {
    let (caller, _) = Caller::with_device();
    let table = &caller.table;
    let set = unsafe { (table.VmbChannelInitSetInlinePacketContextSize)(caller.channel, 24) };
    assert_eq!(set, STATUS_SUCCESS);
    let (first, second) = (caller.allocate_packet(), caller.allocate_packet());
    let mut mark = 7u32;
    let mark: PVOID = (&raw mut mark).cast();
    unsafe { (table.VmbPacketSetPointer)(first, mark) };
    assert_eq!(unsafe { (table.VmbPacketGetPointer)(first) }, mark);
    assert!(unsafe { (table.VmbPacketGetPointer)(second) }.is_null());
    assert!(unsafe { (table.VmbPacketGetPointer)(VMBPACKET::NULL) }.is_null());
    unsafe { (table.VmbPacketSetPointer)(VMBPACKET::NULL, mark) };
    assert_eq!(
        unsafe { (table.VmbPacketGetChannel)(first) },
        caller.channel
    );
    assert!(unsafe { (table.VmbPacketGetChannel)(VMBPACKET::NULL) }.is_null());
    let context = |packet| unsafe { (table.VmbPacketGetInlinePacketContextPointer)(packet) };
    assert!(context(VMBPACKET::NULL).is_null());
    let bytes = context(first).cast::<[u8; 24]>();
    assert_eq!(unsafe { *bytes }, [0; 24]);
    unsafe { *bytes = [9; 24] };
    assert_ne!(context(first), context(second));
    // Both stay what they are while the packet is sent and comes back.
    unsafe {
        (table.VmbPacketSetCompletionRoutineEx)(
            first,
            caller.book.context(),
            Some(crate::caller::sent_ex),
        );
    }
    caller.enable();
    assert_eq!(caller.send(first, b"message!", 0), STATUS_SUCCESS);
    assert_eq!(context(first).cast(), bytes);
    assert_eq!(unsafe { *bytes }, [9; 24]);
    assert_eq!(unsafe { (table.VmbPacketGetPointer)(first) }, mark);
}

fn request(
    caller: &Caller,
    flags: u32,
    answer: &mut [u8],
    timeout: Option<i64>,
) -> (NTSTATUS, u32) {
    let data = *b"request!";
    let mut size = answer.len() as u32;
    let timeout = timeout.map(|time| LARGE_INTEGER { QuadPart: time });
    let status = unsafe {
        (caller.table.VmbChannelSendSynchronousRequest)(
            caller.channel,
            data.as_ptr().cast_mut().cast(),
            8,
            ptr::null_mut(),
            flags,
            answer.as_mut_ptr().cast(),
            &mut size,
            timeout.as_ref().map_or(ptr::null(), ptr::from_ref),
        )
    };
    (status, size)
}

#[test]
fn a_synchronous_request_whose_time_is_up_is_cancelled() {
    let (caller, _) = Caller::active();
    let mut answer = [0; 16];
    // Relative, and absolute in reference time.
    assert_eq!(
        request(&caller, WAIT, &mut answer, Some(-50_000)).0,
        STATUS_CANCELLED
    );
    let now = vmbus::hypervisor::Hypervisor::reference_time(&*caller.vm.machine);
    let at = i64::try_from(now + 50_000).unwrap();
    assert_eq!(
        request(&caller, WAIT, &mut answer, Some(at)).0,
        STATUS_CANCELLED
    );
    let now = vmbus::hypervisor::Hypervisor::reference_time(&*caller.vm.machine);
    assert!(now >= at as u64);
}

#[test]
fn a_zero_timeout_without_wait_sends_now_or_not_at_all_at_any_level() {
    let (caller, id) = Caller::active();
    let send = || request(&caller, 0, &mut [], Some(0)).0;
    assert_eq!(send(), STATUS_SUCCESS);
    assert_eq!(caller.vm.machine.at_dispatch(send), STATUS_SUCCESS);
    assert_eq!(caller.vm.host(id, received).len(), 2);
    let accepted = (0..100_000)
        .take_while(|_| send() == STATUS_SUCCESS)
        .count();
    assert!(accepted > 100);
    assert_eq!(send(), STATUS_BUFFER_OVERFLOW);
    assert_eq!(caller.vm.host(id, received).len(), accepted);
    assert_eq!(send(), STATUS_SUCCESS);
    caller.disable();
    assert_eq!(send(), STATUS_DEVICE_REMOVED);
}

#[test]
fn a_synchronous_request_says_what_is_wrong() {
    let (caller, _) = Caller::active();
    let table = &caller.table;
    let data = *b"request!";
    let buffer: PVOID = data.as_ptr().cast_mut().cast();
    let mut answer = [0u8; 16];
    let place: PVOID = answer.as_mut_ptr().cast();
    let mut size = 16;
    let mut odd = 12;
    let (no_mdl, no_time) = (ptr::null_mut(), ptr::null());
    let send = table.VmbChannelSendSynchronousRequest;
    let channel = caller.channel;
    let statuses = unsafe {
        [
            (
                send(
                    VMBCHANNEL::NULL,
                    buffer,
                    8,
                    no_mdl,
                    WAIT,
                    place,
                    &mut size,
                    no_time,
                ),
                STATUS_INVALID_PARAMETER_1,
            ),
            (
                send(
                    channel,
                    ptr::null_mut(),
                    8,
                    no_mdl,
                    WAIT,
                    place,
                    &mut size,
                    no_time,
                ),
                STATUS_INVALID_PARAMETER_2,
            ),
            (
                send(channel, buffer, 8, no_mdl, 0x100, place, &mut size, no_time),
                STATUS_INVALID_PARAMETER,
            ),
            (
                send(channel, buffer, 8, no_mdl, WAIT, place, &mut odd, no_time),
                STATUS_INVALID_PARAMETER,
            ),
            (
                send(
                    channel,
                    buffer,
                    8,
                    no_mdl,
                    WAIT,
                    place,
                    ptr::null_mut(),
                    no_time,
                ),
                STATUS_INVALID_PARAMETER,
            ),
        ]
    };
    for (index, (status, wanted)) in statuses.into_iter().enumerate() {
        assert_eq!(status, wanted, "call {index}");
    }
    // At DISPATCH nobody may wait.
    let waits = || request(&caller, WAIT, &mut [0; 16], None).0;
    assert_eq!(
        caller.vm.machine.at_dispatch(waits),
        STATUS_INVALID_DEVICE_STATE
    );
}

/// Several threads complete the same packets; each packet goes to one of them.
#[test]
fn a_packet_that_several_complete_is_completed_once() {
    let (caller, id) = Caller::active();
    *caller.book.then.lock().unwrap() = Then::Keep;
    let mut answers = 0;
    for round in 0..200u64 {
        caller.vm.host(id, |host| {
            let data = round.to_le_bytes();
            host.send(&Outgoing::in_band([&data, &[]]).with_completion(round + 1))
                .unwrap();
        });
        let kept = caller.book.kept().remove(0);
        let complete = caller.table.VmbChannelPacketComplete;
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| unsafe { complete(kept, ptr::null_mut(), 0) });
            }
        });
        caller.vm.machine.settle();
        let completions = caller.vm.host(id, received);
        assert_eq!(completions.len(), 1, "round {round}");
        answers += completions.len();
    }
    assert_eq!(answers, 200);
    caller.disable();
    caller.vm.assert_well_behaved();
}

#[test]
fn the_paged_buffer_flag_is_taken_and_changes_nothing() {
    let (caller, id) = Caller::active();
    let flag = VMBUS_CHANNEL_FORMAT_FLAG_PAGED_BUFFER;
    assert_eq!(
        caller.send(caller.packet(), b"message!", flag),
        STATUS_SUCCESS
    );
    let messages = caller.vm.host(id, received);
    assert_eq!(messages, [(None, b"message!".to_vec())]);
}
