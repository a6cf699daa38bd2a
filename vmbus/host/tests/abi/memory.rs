//! Memory that is lent by the table: pages, MDLs, page numbers, GPADLs.

use std::ptr;

use vmbus::kmcl::abi::*;
use vmbus::ring::PacketBuffer;

use crate::caller::Caller;

const WAIT: u32 = VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION;

/// An MDL with room for page numbers.
#[repr(C)]
struct Described {
    mdl: MDL,
    pages: [PFN_NUMBER; 8],
}

impl Described {
    fn new(buffer: PVOID, length: u32) -> (Box<Self>, NTSTATUS) {
        let mut this: Box<Self> = unsafe { Box::new(std::mem::zeroed()) };
        let size = size_of::<Self>() as u32;
        let status = unsafe { VmbInitializeMdl(this.mdl(), size, buffer, length) };
        (this, status)
    }

    fn mdl(&mut self) -> *mut MDL {
        ptr::from_mut(self).cast()
    }
}

fn pages(caller: &Caller, count: u32) -> PVOID {
    let pages = unsafe { VmbAllocateSharedPages(caller.device.handle(), count) };
    assert!(!pages.is_null());
    pages
}

/// What the host sees of the ranges of the guest's next packet: bytes, offset, page numbers.
fn ranges(caller: &Caller, id: vmbus::ids::ChannelId) -> Vec<(u32, u32, Vec<u64>)> {
    caller.vm.host(id, |host| {
        let mut packet = PacketBuffer::default();
        assert!(host.receive(&mut packet).unwrap());
        host.release().unwrap();
        let ranges = packet.gpa_ranges().unwrap();
        ranges
            .map(|range| {
                let pages = range.pages().map(|page| page.0).collect();
                (range.length, range.offset, pages)
            })
            .collect()
    })
}

/// An open channel that may lend memory.
fn lender() -> (Caller, vmbus::ids::ChannelId) {
    let (caller, id) = Caller::with_device();
    let set =
        unsafe { (caller.table.VmbChannelInitSetMaximumExternalData)(caller.channel, 65536, 8) };
    assert_eq!(set, STATUS_SUCCESS);
    caller.enable();
    caller.book.take();
    (caller, id)
}

#[test]
fn shared_pages_are_zero_and_the_drivers_until_it_gives_them_back() {
    let caller = Caller::alone();
    let before = caller.vm.machine.shared_runs();
    let memory = pages(&caller, 2);
    assert!(memory.addr().is_multiple_of(4096));
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), 8192) };
    assert!(bytes.iter().all(|&byte| byte == 0));
    bytes.fill(7);
    assert_eq!(caller.vm.machine.shared_runs(), before + 1);
    unsafe { VmbFreeSharedPages(memory) };
    assert_eq!(caller.vm.machine.shared_runs(), before);
    // Not twice, and not what never was one.
    unsafe { VmbFreeSharedPages(memory) };
    unsafe { VmbFreeSharedPages(ptr::null_mut()) };
    let none = unsafe { VmbAllocateSharedPages(PDEVICE_OBJECT::NULL, 1) };
    assert!(none.is_null());
    assert!(unsafe { VmbAllocateSharedPages(caller.device.handle(), 0) }.is_null());
}

#[test]
fn an_mdl_describes_a_buffer_in_shared_pages_and_nothing_else() {
    let caller = Caller::alone();
    let memory = pages(&caller, 3);
    let buffer = memory.wrapping_byte_add(4000);
    let (mut described, status) = Described::new(buffer, 200);
    assert_eq!(status, STATUS_SUCCESS);
    let mdl = described.mdl;
    assert!(mdl.Next.is_null());
    assert_eq!(
        (mdl.ByteCount, mdl.ByteOffset, mdl.PageCount),
        (200, 4000, 2)
    );
    assert_eq!(mdl.StartVa, memory);
    assert_eq!(described.pages[1], described.pages[0] + 1);
    let size = size_of::<MDL>() as u32;
    let init = |mdl, size, buffer, length| unsafe { VmbInitializeMdl(mdl, size, buffer, length) };
    let place = described.mdl();
    let whole = size + 2 * 8;
    for (status, wanted) in [
        (
            init(ptr::null_mut(), whole, buffer, 200),
            STATUS_INVALID_PARAMETER_1,
        ),
        (
            init(place, whole - 1, buffer, 200),
            STATUS_INVALID_PARAMETER_2,
        ),
        (
            init(place, whole, (&raw const mdl).cast_mut().cast(), 200),
            STATUS_INVALID_PARAMETER_3,
        ),
        (init(place, whole, buffer, 0), STATUS_INVALID_PARAMETER_4),
        (init(place, whole, buffer, 9000), STATUS_INVALID_PARAMETER_4),
        (init(place, whole, buffer, 200), STATUS_SUCCESS),
    ] {
        assert_eq!(status, wanted);
    }
}

#[test]
fn each_element_of_a_chain_is_one_range_of_the_packet() {
    let (caller, id) = lender();
    let memory = pages(&caller, 3);
    let (mut second, _) = Described::new(memory.wrapping_byte_add(8192 + 16), 48);
    let (mut first, _) = Described::new(memory.wrapping_byte_add(4000), 200);
    first.mdl.Next = second.mdl();
    let page = first.pages[0];
    let data = *b"request!";
    let buffer: PVOID = data.as_ptr().cast_mut().cast();
    let all = [(200, 4000, vec![page, page + 1]), (48, 16, vec![page + 2])];
    let packet = caller.packet();
    let send = |mdl, offset, length, flags| unsafe {
        (caller.table.VmbPacketSendWithExternalMdl)(packet, buffer, 8, mdl, offset, length, flags)
    };
    // Without the WAIT flag nobody would know when the host is done with the memory.
    let plain = |mdl, flags| unsafe { (caller.table.VmbPacketSend)(packet, buffer, 8, mdl, flags) };
    assert_eq!(plain(first.mdl(), 0), STATUS_INVALID_PARAMETER);
    assert_eq!(plain(first.mdl(), WAIT), STATUS_SUCCESS);
    assert_eq!(ranges(&caller, id), all);

    // A piece across the two, the rest of it, and too much.
    let next = || caller.packet();
    let piece = |offset, length, flags, mdl| unsafe {
        (caller.table.VmbPacketSendWithExternalMdl)(
            next(),
            buffer,
            8,
            mdl,
            offset,
            length,
            WAIT | flags,
        )
    };
    assert_eq!(send(first.mdl(), 0, 0, WAIT), STATUS_INVALID_PARAMETER_1);
    assert_eq!(piece(100, 120, 0, first.mdl()), STATUS_SUCCESS);
    assert_eq!(
        ranges(&caller, id),
        [(100, 4, vec![page + 1]), (20, 16, vec![page + 2])]
    );
    assert_eq!(piece(240, 0, 0, first.mdl()), STATUS_SUCCESS);
    assert_eq!(ranges(&caller, id), [(8, 56, vec![page + 2])]);
    assert_eq!(piece(0, 249, 0, first.mdl()), STATUS_INVALID_PARAMETER);
    // Forced: past the end of the first element, as far as its last page goes; no other is used.
    let force = VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH;
    assert_eq!(piece(0, 300, force, first.mdl()), STATUS_SUCCESS);
    assert_eq!(ranges(&caller, id), [(300, 4000, vec![page, page + 1])]);
    assert_eq!(piece(0, 4193, force, first.mdl()), STATUS_INVALID_PARAMETER);
    // An MDL that says more than it has pages for.
    first.mdl.ByteCount = 100_000;
    assert_eq!(piece(0, 0, 0, first.mdl()), STATUS_INVALID_PARAMETER);
    caller.disable();
}

#[test]
fn lent_pages_stay_with_the_library_until_the_host_has_let_go() {
    let (caller, id) = lender();
    let before = caller.vm.machine.shared_runs();
    let memory = pages(&caller, 1);
    let (mut described, _) = Described::new(memory, 4096);
    let packet = caller.packet();
    let status =
        unsafe { (caller.table.VmbPacketSend)(packet, ptr::null_mut(), 0, described.mdl(), WAIT) };
    assert_eq!(status, STATUS_SUCCESS);
    unsafe { VmbFreeSharedPages(memory) };
    assert_eq!(ranges(&caller, id).len(), 1);
    assert_eq!(caller.vm.machine.shared_runs(), before + 1);
    caller.disable();
    unsafe { (caller.table.VmbPacketFree)(packet) };
    unsafe { (caller.table.VmbChannelCleanup)(caller.channel) };
    assert_eq!(caller.vm.machine.shared_runs(), 0);
}

#[test]
fn pages_by_number_are_one_range_of_whole_pages() {
    let (caller, id) = lender();
    let mut numbers: [PFN_NUMBER; 3] = [0x55, 0x77, 0x11];
    let packet = caller.packet();
    let status = unsafe {
        (caller.table.VmbPacketSendWithExternalPfns)(
            packet,
            ptr::null_mut(),
            0,
            numbers.as_mut_ptr(),
            3,
            WAIT,
        )
    };
    assert_eq!(status, STATUS_SUCCESS);
    assert_eq!(ranges(&caller, id), [(3 * 4096, 0, vec![0x55, 0x77, 0x11])]);
}

#[test]
fn gpadls_are_made_from_the_opened_callback_on_and_deleted() {
    let (caller, _) = Caller::with_device();
    let (table, channel) = (&caller.table, caller.channel);
    let memory = pages(&caller, 4);
    let mut handle = 0;
    let from_buffer = |flags, buffer, bytes, handle| unsafe {
        (table.VmbChannelCreateGpadlFromBuffer)(channel, flags, buffer, bytes, handle)
    };
    assert_eq!(
        from_buffer(0, memory, 4096, &mut handle),
        STATUS_INVALID_PARAMETER_1,
        "the channel is not open"
    );
    caller.enable();
    for (status, wanted) in [
        (
            from_buffer(2, memory, 4096, &mut handle),
            STATUS_INVALID_PARAMETER_2,
        ),
        (
            from_buffer(0, ptr::null_mut(), 4096, &mut handle),
            STATUS_INVALID_PARAMETER_3,
        ),
        (
            from_buffer(0, memory, 0, &mut handle),
            STATUS_INVALID_PARAMETER_4,
        ),
        (
            from_buffer(0, memory, 5 * 4096, &mut handle),
            STATUS_INVALID_PARAMETER_4,
        ),
        (
            from_buffer(0, memory, 4096, ptr::null_mut()),
            STATUS_INVALID_PARAMETER_5,
        ),
    ] {
        assert_eq!(status, wanted);
    }
    assert_eq!(handle, 0);
    let read_only = VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY;
    assert_eq!(
        from_buffer(read_only, memory, 4 * 4096, &mut handle),
        STATUS_SUCCESS
    );
    assert_ne!(handle, 0);

    // From a chain whose inner edges are those of pages.
    let (mut rest, _) = Described::new(memory.wrapping_byte_add(8192), 8192);
    let (mut first, _) = Described::new(memory.wrapping_byte_add(100), 8092);
    first.mdl.Next = rest.mdl();
    let mut second = 0;
    let from_mdl = |mdl, offset, length, handle| unsafe {
        (table.VmbChannelCreateGpadlFromMdl)(channel, 0, mdl, offset, length, handle)
    };
    for (status, wanted) in [
        (
            from_mdl(ptr::null_mut(), 0, 0, &mut second),
            STATUS_INVALID_PARAMETER_3,
        ),
        (
            from_mdl(first.mdl(), 20_000, 0, &mut second),
            STATUS_INVALID_PARAMETER_4,
        ),
        (
            from_mdl(first.mdl(), 0, 20_000, &mut second),
            STATUS_INVALID_PARAMETER_5,
        ),
        (
            from_mdl(first.mdl(), 0, 0, ptr::null_mut()),
            STATUS_INVALID_PARAMETER_6,
        ),
        (from_mdl(first.mdl(), 0, 0, &mut second), STATUS_SUCCESS),
    ] {
        assert_eq!(status, wanted);
    }
    let (mut odd, _) = Described::new(memory, 100);
    odd.mdl.Next = rest.mdl();
    assert_eq!(
        from_mdl(odd.mdl(), 0, 0, &mut second),
        STATUS_INVALID_PARAMETER_3,
        "an inner edge that is none of a page's"
    );

    // From page numbers.
    let mut numbers: [PFN_NUMBER; 2] = [0x500, 0x300];
    let mut third = 0;
    let from_list = |list, count, handle| unsafe {
        (table.VmbChannelCreateGpadlFromPfnList)(channel, 0, list, count, handle)
    };
    for (status, wanted) in [
        (
            from_list(ptr::null_mut(), 2, &mut third),
            STATUS_INVALID_PARAMETER_3,
        ),
        (
            from_list(numbers.as_mut_ptr(), 0, &mut third),
            STATUS_INVALID_PARAMETER_4,
        ),
        (
            from_list(numbers.as_mut_ptr(), 2, ptr::null_mut()),
            STATUS_INVALID_PARAMETER_5,
        ),
        (
            from_list(numbers.as_mut_ptr(), 2, &mut third),
            STATUS_SUCCESS,
        ),
    ] {
        assert_eq!(status, wanted);
    }

    // Deleted, the memory is the driver's again; twice is a bug that is reported.
    for handle in [handle, second, third, third, 0] {
        unsafe { (table.VmbChannelDeleteGpadl)(channel, handle) };
    }
    let rings = caller.vm.machine.shared_runs();
    unsafe { VmbFreeSharedPages(memory) };
    assert_eq!(caller.vm.machine.shared_runs(), rings - 1);
    caller.vm.assert_well_behaved();
}

#[test]
fn a_gpadl_can_be_allocated_and_its_memory_found() {
    let (caller, _) = Caller::active();
    let channel = caller.channel;
    let (mut handle, mut other) = (0, 0);
    let create =
        |flags, pages, handle| unsafe { VmbChannelCreateGpadl(channel, flags, pages, handle) };
    for (status, wanted) in [
        (
            unsafe { VmbChannelCreateGpadl(VMBCHANNEL::NULL, 0, 1, &mut handle) },
            STATUS_INVALID_PARAMETER_1,
        ),
        (create(2, 1, &mut handle), STATUS_INVALID_PARAMETER_2),
        (create(0, 0, &mut handle), STATUS_INVALID_PARAMETER_3),
        (create(0, 1, ptr::null_mut()), STATUS_INVALID_PARAMETER_4),
        (
            create(0, 1_000_000, &mut handle),
            STATUS_INSUFFICIENT_RESOURCES,
        ),
        (create(0, 3, &mut handle), STATUS_SUCCESS),
    ] {
        assert_eq!(status, wanted);
    }
    let memory = pages(&caller, 1);
    let lent = unsafe {
        (caller.table.VmbChannelCreateGpadlFromBuffer)(channel, 0, memory, 4096, &mut other)
    };
    assert_eq!(lent, STATUS_SUCCESS);
    let mut address: PVOID = ptr::null_mut();
    let find = |channel, handle, address| unsafe {
        VmbChannelGetSystemAddressForGpadl(channel, 0, handle, address)
    };
    for (status, wanted) in [
        (
            find(VMBCHANNEL::NULL, handle, &mut address),
            STATUS_INVALID_PARAMETER_1,
        ),
        (
            find(channel, other, &mut address),
            STATUS_INVALID_PARAMETER_3,
        ),
        (
            find(channel, handle, ptr::null_mut()),
            STATUS_INVALID_PARAMETER_4,
        ),
        (find(channel, handle, &mut address), STATUS_SUCCESS),
    ] {
        assert_eq!(status, wanted);
    }
    unsafe { address.cast::<u8>().write_bytes(1, 3 * 4096) };
    for handle in [handle, other] {
        unsafe { (caller.table.VmbChannelDeleteGpadl)(channel, handle) };
    }
    assert_eq!(
        find(channel, handle, &mut address),
        STATUS_INVALID_PARAMETER_3
    );
}
