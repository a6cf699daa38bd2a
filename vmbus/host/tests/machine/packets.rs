//! What a packet to send carries, and what it may be: contexts, completion routines, lent memory, sizes.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    ChannelBuilder, ConfigError, EnabledChannel, ExternalData, ExternalDataError, OutgoingPacket,
    PacketError, PageNumber, SendFailure, SendFlags, SharedPages,
};
use vmbus::ring::{Outgoing, PacketBuffer, ScatterList};

use crate::support::{Journal, Vm, is_active, received};

const PAGE: usize = 4096;

fn builder() -> ChannelBuilder {
    Journal::default().builder(|_, packet| packet.complete(&[]))
}

struct Open {
    vm: Vm,
    id: ChannelId,
    channel: EnabledChannel,
}

fn open(builder: &ChannelBuilder) -> Open {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(builder);
    assert!(is_active(&channel));
    Open { vm, id, channel }
}

impl Open {
    fn packet(&self) -> OutgoingPacket {
        self.channel.channel().allocate_packet().unwrap()
    }

    /// The next packet that the host receives: its transaction id, and offset, length and pages of each range.
    fn lent(&self) -> (u64, Vec<(u32, u32, Vec<u64>)>) {
        self.vm.host(self.id, |host| {
            let mut packet = PacketBuffer::default();
            assert!(host.receive(&mut packet).unwrap());
            host.release().unwrap();
            let ranges = packet.gpa_ranges().unwrap();
            let ranges = ranges
                .map(|range| {
                    let pages = range.pages().map(|page| page.0).collect();
                    (range.offset, range.length, pages)
                })
                .collect();
            (packet.transaction_id(), ranges)
        })
    }

    fn answer(&self, id: u64) {
        self.vm.host(self.id, |host| {
            host.send(&Outgoing::completion(id, &[])).unwrap();
        });
    }
}

/// Room for so many bytes in so many ranges.
fn lending(bytes: usize, ranges: usize) -> Open {
    open(&builder().maximum_external_data(bytes, ranges))
}

// What travels with a packet.

#[test]
fn the_inline_context_stays_with_a_packet_until_it_is_put_aside() {
    let open = open(&builder().inline_packet_context_size(20));
    let back = Arc::new(Mutex::new(None));
    let keep = back.clone();
    let mut packet = open.packet();
    assert_eq!(packet.context(), [0; 20]);
    assert!(packet.context().as_ptr().addr().is_multiple_of(16));
    packet.context().fill(7);
    packet.set_completion_routine(Arc::new(move |packet, _| {
        *keep.lock().unwrap() = Some(packet);
    }));
    packet.send(b"message!").unwrap();
    let mut packet = back.lock().unwrap().take().unwrap();
    assert_eq!(packet.context(), [7; 20]);
    drop(packet);
    assert_eq!(open.packet().context(), [0; 20]);
}

#[test]
fn without_a_size_there_is_no_inline_context() {
    assert!(open(&builder()).packet().context().is_empty());
}

#[test]
fn user_data_stays_with_a_packet_until_it_is_put_aside() {
    let open = open(&builder());
    let data = Arc::new(AtomicU64::new(5));
    let mut packet = open.packet();
    assert!(packet.user_data().is_none());
    packet.set_user_data(Some(data.clone()));
    packet.set_completion_function(|packet, _| {
        let data = packet.user_data().unwrap();
        let number = data.downcast_ref::<AtomicU64>().unwrap();
        number.fetch_add(1, Ordering::SeqCst);
    });
    packet.send(b"message!").unwrap();
    assert_eq!(data.load(Ordering::SeqCst), 6);
    assert_eq!(Arc::strong_count(&data), 1, "the packet was put aside");
    assert!(open.packet().user_data().is_none());
}

#[test]
fn a_completion_function_gets_the_packet_and_the_answer() {
    static ENDS: AtomicU32 = AtomicU32::new(0);
    let open = open(&builder());
    let mut packet = open.packet();
    packet.set_completion_function(|packet, result| {
        assert_eq!(result, Ok(&b"answer!!"[..]));
        drop(packet);
        ENDS.fetch_add(1, Ordering::SeqCst);
    });
    packet.send_transaction(b"question").unwrap();
    let id = open.vm.host(open.id, received)[0].0.unwrap();
    open.vm.host(open.id, |host| {
        host.send(&Outgoing::completion(id, b"answer!!")).unwrap();
    });
    assert_eq!(ENDS.load(Ordering::SeqCst), 1);
}

#[test]
fn the_default_routine_puts_the_packet_aside() {
    let open = open(&builder().maximum_packet_count(1));
    for _ in 0..3 {
        open.packet().send(b"message!").unwrap();
    }
    let mut packet = open.packet();
    packet.set_completion_function(|_, _| unreachable!("the packet was put aside before"));
    drop(packet);
    open.packet().send(b"message!").unwrap();
}

// Lent memory.

#[test]
fn a_chain_becomes_one_range_for_each_element() {
    let open = lending(3 * PAGE, 2);
    let mut external = ExternalData::new();
    for first in [0x10, 0x20] {
        let pages = SharedPages::from_heap(PageNumber(first), 2).unwrap();
        external.push(pages, 10..5000).unwrap();
    }
    let packet = open.packet();
    packet
        .send_with_external_data(b"command!", external, SendFlags::default())
        .unwrap();
    let (_, ranges) = open.lent();
    assert_eq!(
        ranges,
        [(10, 4990, vec![0x10, 0x11]), (10, 4990, vec![0x20, 0x21])]
    );
}

#[test]
fn a_sub_range_of_lent_memory_is_told_as_such() {
    let open = lending(4 * PAGE, 1);
    let pages = SharedPages::from_heap(PageNumber(0x10), 4).unwrap();
    let mut external = ExternalData::new();
    external.push(pages, 100..4 * PAGE).unwrap();
    external.narrow(PAGE..PAGE + 5000).unwrap();
    let packet = open.packet();
    packet
        .send_with_external_data(b"command!", external, SendFlags::default())
        .unwrap();
    assert_eq!(open.lent().1, [(100, 5000, vec![0x11, 0x12])]);
}

#[test]
fn pages_by_number_are_lent_whole_and_their_owner_is_kept_until_the_answer() {
    let open = lending(3 * PAGE, 1);
    let owner = Arc::new(());
    let numbers = [PageNumber(9), PageNumber(2), PageNumber(5)];
    let external = ExternalData::whole_pages(numbers, owner.clone()).unwrap();
    assert_eq!(external.len(), 3 * PAGE);
    let flags = SendFlags {
        data_in_only: true,
        ..SendFlags::default()
    };
    let packet = open.packet();
    packet
        .send_with_external_data(b"command!", external, flags)
        .unwrap();
    let (id, ranges) = open.lent();
    assert_eq!(ranges, [(0, 3 * PAGE as u32, vec![9, 2, 5])]);
    assert_eq!(Arc::strong_count(&owner), 2);
    open.answer(id);
    assert_eq!(Arc::strong_count(&owner), 1);
}

#[test]
fn the_direction_hints_change_nothing_that_the_host_sees() {
    let open = lending(PAGE, 1);
    let mut seen = Vec::new();
    for (data_in_only, data_out_only) in [(false, false), (true, false), (false, true)] {
        let external = ExternalData::whole_pages([PageNumber(3)], Arc::new(())).unwrap();
        let flags = SendFlags {
            data_in_only,
            data_out_only,
        };
        let packet = open.packet();
        packet
            .send_with_external_data(b"command!", external, flags)
            .unwrap();
        seen.push(open.lent().1);
    }
    assert_eq!(
        seen,
        [const { [(0, 4096)] }; 3].map(|ranges| {
            ranges
                .map(|(offset, length)| (offset, length, vec![3]))
                .to_vec()
        })
    );
}

#[test]
fn no_pages_are_no_memory_to_lend() {
    let error = ExternalData::whole_pages([], Arc::new(())).unwrap_err();
    assert_eq!(error, ExternalDataError::Empty);
}

#[test]
fn external_data_beyond_the_maxima_is_refused() {
    let open = lending(PAGE, 1);
    let page = |first| SharedPages::from_heap(PageNumber(first), 2).unwrap();
    let mut long = ExternalData::new();
    long.push(page(1), 0..PAGE + 1).unwrap();
    let mut chain = ExternalData::new();
    chain.push(page(1), 0..1).unwrap();
    chain.push(page(2), 0..1).unwrap();
    let mut packet = open.packet();
    for (external, bytes, ranges) in [(long, PAGE + 1, 1), (chain, 2, 2)] {
        let error = packet
            .send_with_external_data(b"command!", external, SendFlags::default())
            .unwrap_err();
        assert_eq!(
            error.reason,
            SendFailure::TooMuchExternalData {
                bytes,
                ranges,
                maximum_bytes: PAGE,
                maximum_ranges: 1
            }
        );
        packet = error.packet;
        assert!(!packet.take_external_data().is_empty(), "given back");
    }
    assert_eq!(open.vm.host(open.id, received), []);
}

#[test]
fn maxima_of_nothing_are_refused() {
    let (vm, _) = Vm::with_device();
    for (bytes, ranges, what) in [
        (0, 1, "maximum external data size"),
        (1, 0, "maximum external data range count"),
    ] {
        let error = builder()
            .maximum_external_data(bytes, ranges)
            .enable(vm.vmbus.client())
            .unwrap_err();
        assert_eq!(error, ConfigError::Zero(what));
    }
}

// Sizes.

#[test]
fn the_footprint_of_a_packet_is_what_it_takes_in_the_ring() {
    for pipe in [false, true] {
        let builder = builder().maximum_external_data(16 * PAGE, 4);
        let open = open(&if pipe { builder.pipe() } else { builder });
        let channel = open.channel.channel();
        let header = if pipe { 8 } else { 0 };
        for length in [0, 1, 8, 100] {
            let data = vec![0; header + length];
            assert_eq!(
                channel.packet_footprint(length, &ExternalData::new()) as u64,
                Outgoing::in_band([&data, &[]]).footprint()
            );
        }
    }
    let open = lending(16 * PAGE, 4);
    let pages = SharedPages::from_heap(PageNumber(1), 4).unwrap();
    let mut external = ExternalData::new();
    let mut list = ScatterList::default();
    for range in [0..PAGE, 5000..9000, 4095..4097] {
        let (first, end) = (range.start / PAGE, range.end.div_ceil(PAGE));
        let numbers = (first..end).map(|page| PageNumber(1 + page as u64));
        let (offset, length) = (range.start % PAGE, range.len());
        list.push(offset as u32, length as u32, numbers).unwrap();
        external.push(pages.clone(), range).unwrap();
        assert_eq!(
            open.channel.channel().packet_footprint(30, &external) as u64,
            Outgoing::gpa_direct(&list, [&[0; 30], &[]]).footprint()
        );
    }
}

#[test]
fn a_packet_that_fills_the_ring_goes_and_one_unit_more_is_refused() {
    let open = open(&builder().ring_pages(1, 1).maximum_packet_size(4048));
    let limit = open.channel.channel().largest_packet();
    assert_eq!(limit, PAGE - 16);
    open.packet().send(&[1; 4048]).unwrap();
    assert_eq!(open.vm.host(open.id, received).len(), 1);
    // The configuration promises that whatever keeps to the maxima fits.
    let need = open
        .channel
        .channel()
        .packet_footprint(4048, &ExternalData::new());
    assert!(need <= limit);
}

#[test]
fn a_packet_is_shorter_than_its_length_field_could_say() {
    // 524,280 bytes is 65,535 times 8; the packet has to stay below that, whatever the ring.
    let largest = 524_280 - 8 - 32;
    let (vm, _) = Vm::with_device();
    let sized = |bytes| builder().ring_pages(4, 200).maximum_packet_size(bytes);
    let error = sized(largest + 1).enable(vm.vmbus.client()).unwrap_err();
    assert_eq!(
        error,
        ConfigError::RingTooSmall {
            need: 524_280,
            limit: 524_272
        }
    );
    let open = open(&sized(largest));
    open.packet().send(&vec![3; largest]).unwrap();
    assert_eq!(open.vm.host(open.id, received)[0].1, vec![3; largest]);
}

#[test]
fn rings_that_nobody_sized_have_room_for_several_of_the_largest_packets() {
    for (size, external) in [(100, 0), (16_000, 0), (500, 4 << 20)] {
        let mut builder = builder().maximum_packet_size(size);
        if external > 0 {
            builder = builder.maximum_external_data(external, 4);
        }
        let open = open(&builder);
        let memory = open.vm.host(open.id, |host| host.memory().page_count());
        let each = memory / 2 - 1;
        assert!(each >= 4, "{each}");
        let owner = Arc::new(());
        let ends = Arc::new(AtomicU32::new(0));
        for _ in 0..3 {
            let mut packet = open.packet();
            let count = ends.clone();
            packet.set_completion_routine(Arc::new(move |_, result| {
                assert!(matches!(result, Err(PacketError::Removed(_)) | Ok(_)));
                count.fetch_add(1, Ordering::SeqCst);
            }));
            if external > 0 {
                let numbers: Vec<_> = (0..external as u64 / 4096).map(PageNumber).collect();
                let lent = ExternalData::whole_pages(numbers, owner.clone()).unwrap();
                packet
                    .send_with_external_data(&vec![0; size], lent, SendFlags::default())
                    .unwrap();
            } else {
                packet.send(&vec![0; size]).unwrap();
            }
        }
        assert_eq!(
            open.channel.channel().counters().packets_sent,
            3,
            "none of them has to wait"
        );
        assert_eq!(open.vm.host(open.id, received).len(), 3);
    }
}

#[test]
fn a_size_that_the_driver_chose_is_kept() {
    let builder = builder().ring_pages(2, 3).maximum_packet_size(8000);
    let open = open(&builder.maximum_external_data(4096, 1));
    assert_eq!(
        open.vm.host(open.id, |host| host.memory().page_count()),
        2 + 3 + 2
    );
}

#[test]
fn the_memory_of_a_packet_grows_with_the_maxima() {
    let memory = |builder: &ChannelBuilder| open(builder).channel.channel().packet_memory();
    let small = memory(&builder().maximum_packet_size(8));
    assert_eq!(memory(&builder().maximum_packet_size(1000)), small + 992);
    let small = memory(&builder());
    assert_eq!(
        memory(&builder().inline_packet_context_size(20)),
        small + 32
    );
    assert!(memory(&builder().maximum_external_data(1 << 20, 2)) >= small + 8 * 256);
}
