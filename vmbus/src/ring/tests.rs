//! The ring against a model, against every clause of the signalling rules, and against garbage.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use std::vec;

use proptest::prelude::*;

use super::*;
use crate::ids::PageNumber;

const DATA_PAGES: usize = 1;
const SIZE: u32 = 4096;

fn memory() -> SharedPages {
    SharedPages::from_heap(PageNumber(0x100), 1 + DATA_PAGES).unwrap()
}

fn pair() -> (SharedPages, Writer, Reader) {
    let pages = memory();
    let ring = Ring::new(&pages, 0, 1 + DATA_PAGES).unwrap();
    (
        pages.clone(),
        Writer::new(ring.clone()).unwrap(),
        Reader::new(ring),
    )
}

fn field(pages: &SharedPages, offset: usize) -> u32 {
    pages.atomic_u32(offset).unwrap().load(Ordering::SeqCst)
}

fn set_field(pages: &SharedPages, offset: usize, value: u32) {
    pages
        .atomic_u32(offset)
        .unwrap()
        .store(value, Ordering::SeqCst);
}

fn push(writer: &mut Writer, payload: &[u8]) -> Result<(), PushError> {
    writer.push(&Outgoing::in_band([payload, &[]]))
}

fn read(reader: &mut Reader) -> Option<Vec<u8>> {
    let mut packet = PacketBuffer::default();
    reader
        .read(&mut packet)
        .unwrap()
        .then(|| packet.payload().to_vec())
}

/// The free bytes that a packet with `payload` bytes of data needs.
fn need(payload: usize) -> u32 {
    (16 + payload.next_multiple_of(8) + 8) as u32
}

#[test]
fn wire_layout_of_an_in_band_packet() {
    let (pages, mut writer, _) = pair();
    push(&mut writer, b"first").unwrap();
    writer
        .push(&Outgoing::in_band([b"se", b"cond"]).with_completion(0x1122_3344_5566_7788))
        .unwrap();
    assert_eq!(field(&pages, 0), 0, "nothing is visible before publish");
    let _ = writer.publish().unwrap();
    assert_eq!(field(&pages, 0), 64);
    let mut bytes = [0; 64];
    pages.read(4096, &mut bytes).unwrap();
    #[rustfmt::skip]
    assert_eq!(bytes, [
        6, 0, 2, 0, 3, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        b'f', b'i', b'r', b's', b't', 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        6, 0, 2, 0, 3, 0, 1, 0,  0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,
        b's', b'e', b'c', b'o', b'n', b'd', 0, 0,  0, 0, 0, 0, 32, 0, 0, 0,
    ]);
}

#[test]
fn wire_layout_of_a_gpa_direct_packet() {
    let (pages, mut writer, mut reader) = pair();
    let mut list = ScatterList::default();
    list.push(0x80, 4096, [PageNumber(0x55), PageNumber(0x99)].into_iter())
        .unwrap();
    list.push(0, 1, [PageNumber(0x7)].into_iter()).unwrap();
    writer
        .push(&Outgoing::gpa_direct(&list, [b"command!", &[]]).with_completion(9))
        .unwrap();
    let _ = writer.publish().unwrap();
    let mut bytes = [0; 72];
    pages.read(4096, &mut bytes).unwrap();
    #[rustfmt::skip]
    assert_eq!(bytes, [
        9, 0, 8, 0, 9, 0, 1, 0,  9, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 2, 0, 0, 0,
        0, 16, 0, 0, 0x80, 0, 0, 0,  0x55, 0, 0, 0, 0, 0, 0, 0,  0x99, 0, 0, 0, 0, 0, 0, 0,
        1, 0, 0, 0, 0, 0, 0, 0,  7, 0, 0, 0, 0, 0, 0, 0,
        b'c', b'o', b'm', b'm', b'a', b'n', b'd', b'!',
    ]);
    let mut packet = PacketBuffer::default();
    assert!(reader.read(&mut packet).unwrap());
    assert_eq!(packet.payload(), b"command!");
    let ranges: Vec<_> = packet
        .gpa_ranges()
        .unwrap()
        .map(|range| {
            (
                range.offset,
                range.length,
                range.pages().collect::<Vec<_>>(),
            )
        })
        .collect();
    assert_eq!(
        ranges,
        [
            (0x80, 4096, vec![PageNumber(0x55), PageNumber(0x99)]),
            (0, 1, vec![PageNumber(7)])
        ]
    );
    assert!(packet.transfer_pages().is_none());
}

#[test]
fn transfer_page_ranges_are_read() {
    let (_, mut writer, mut reader) = pair();
    let ranges = [
        TransferPageRange {
            length: 60,
            offset: 0x3000,
        },
        TransferPageRange {
            length: 1514,
            offset: 0,
        },
    ];
    let list = TransferPageList::new(0xCAFE, &ranges);
    writer
        .push(&Outgoing::transfer_pages(&list, [b"rndis", &[]]).with_completion(3))
        .unwrap();
    let _ = writer.publish().unwrap();
    let mut packet = PacketBuffer::default();
    assert!(reader.read(&mut packet).unwrap());
    let seen = packet.transfer_pages().unwrap();
    assert_eq!(seen.set, 0xCAFE);
    assert_eq!(seen.ranges().collect::<Vec<_>>(), ranges);
    assert!(packet.completion_requested());
    assert_eq!(packet.payload(), b"rndis\0\0\0");
}

#[test]
fn scatter_lists_refuse_what_does_not_fit() {
    let mut list = ScatterList::default();
    assert!(list.push(0, 0, [].into_iter()).is_err());
    assert!(list.push(4096, 1, [PageNumber(1)].into_iter()).is_err());
    assert!(list.push(4095, 2, [PageNumber(1)].into_iter()).is_err());
    assert!(list.push(0, 4096, [PageNumber(1); 2].into_iter()).is_err());
    assert!(list.is_empty());
}

#[test]
fn rings_of_impossible_size_are_refused() {
    let pages = memory();
    assert!(Ring::new(&pages, 0, 1).is_err());
    assert!(Ring::new(&pages, 1, 2).is_err());
    assert!(Ring::new(&pages, usize::MAX, 2).is_err());
    assert!(Ring::split(&pages, 3).is_err());
    assert!(Ring::split(&pages, 1).is_err());
}

#[test]
fn a_packet_that_can_never_fit_is_told_apart_from_a_full_ring() {
    let (_, mut writer, _) = pair();
    let limit = SIZE - 16;
    let fits = vec![0; (limit - 24) as usize];
    let too_large = vec![0; (limit - 24 + 1) as usize];
    assert!(matches!(
        push(&mut writer, &too_large),
        Err(PushError::TooLarge { .. })
    ));
    push(&mut writer, &fits).unwrap();
    assert_eq!(push(&mut writer, b""), Err(PushError::Full { need: 24 }));
}

#[test]
fn the_length_field_limits_packets_in_big_rings() {
    let pages = SharedPages::from_heap(PageNumber(0), 200).unwrap();
    let mut writer = Writer::new(Ring::new(&pages, 0, 200).unwrap()).unwrap();
    let most = 0xFFFF * 8 - 16;
    assert!(matches!(
        push(&mut writer, &vec![0; most + 1]),
        Err(PushError::TooLarge { .. })
    ));
    push(&mut writer, &vec![0; most]).unwrap();
}

mod signals_to_the_consumer {
    use super::*;

    #[test]
    fn needed_when_the_ring_was_empty() {
        let (_, mut writer, mut reader) = pair();
        push(&mut writer, b"1").unwrap();
        assert_eq!(writer.publish(), Ok(Signal::Needed));
        read(&mut reader).unwrap();
        let _ = reader.publish().unwrap();
        push(&mut writer, b"2").unwrap();
        assert_eq!(writer.publish(), Ok(Signal::Needed));
    }

    #[test]
    fn not_needed_when_the_ring_was_not_empty() {
        let (_, mut writer, _) = pair();
        push(&mut writer, b"1").unwrap();
        assert_eq!(writer.publish(), Ok(Signal::Needed));
        push(&mut writer, b"2").unwrap();
        assert_eq!(writer.publish(), Ok(Signal::NotNeeded));
    }

    #[test]
    fn not_needed_when_masked() {
        let (_, mut writer, mut reader) = pair();
        reader.mask().unwrap();
        push(&mut writer, b"1").unwrap();
        assert_eq!(writer.publish(), Ok(Signal::NotNeeded));
        assert_eq!(
            reader.unmask(),
            Ok(true),
            "the look after unmasking finds it"
        );
    }

    #[test]
    fn one_for_a_whole_batch() {
        let (pages, mut writer, _) = pair();
        for _ in 0..5 {
            push(&mut writer, b"12345678").unwrap();
        }
        assert_eq!(field(&pages, 0), 0);
        assert_eq!(writer.publish(), Ok(Signal::Needed));
        assert_eq!(field(&pages, 0), 5 * 32);
        assert_eq!(writer.publish(), Ok(Signal::NotNeeded), "nothing new");
    }

    #[test]
    fn unmasking_an_empty_ring_leaves_nothing_to_do() {
        let (pages, _, mut reader) = pair();
        reader.mask().unwrap();
        assert_eq!(field(&pages, 8), 1);
        assert_eq!(reader.unmask(), Ok(false));
        assert_eq!(field(&pages, 8), 0);
    }
}

mod signals_to_the_producer {
    use super::*;

    /// A ring filled with packets of 1000 bytes of data, whose writer waits for `free` bytes.
    fn full(wait: u32) -> (SharedPages, Writer, Reader) {
        let (pages, mut writer, reader) = pair();
        while push(&mut writer, &[7; 1000]).is_ok() {}
        let _ = writer.publish().unwrap();
        assert_eq!(writer.wait_for(wait), Ok(Room::Awaited));
        assert_eq!(field(&pages, 12), wait);
        (pages, writer, reader)
    }

    #[test]
    fn never_without_a_pending_size() {
        let (_, mut writer, mut reader) = pair();
        while push(&mut writer, &[7; 1000]).is_ok() {}
        let _ = writer.publish().unwrap();
        while read(&mut reader).is_some() {
            assert_eq!(reader.publish(), Ok(Signal::NotNeeded));
        }
    }

    #[test]
    fn once_when_the_room_appears() {
        // Three packets of 1024 fit, with 4096 - 8 - 3 * 1024 = 1016 bytes to spare.
        let (_, _, mut reader) = full(need(1000));
        read(&mut reader).unwrap();
        assert_eq!(reader.publish(), Ok(Signal::Needed));
        read(&mut reader).unwrap();
        assert_eq!(
            reader.publish(),
            Ok(Signal::NotNeeded),
            "there already was room"
        );
    }

    #[test]
    fn not_before_there_is_enough() {
        let (_, _, mut reader) = full(2048);
        read(&mut reader).unwrap();
        assert_eq!(reader.publish(), Ok(Signal::NotNeeded));
        read(&mut reader).unwrap();
        assert_eq!(reader.publish(), Ok(Signal::Needed));
    }

    #[test]
    fn once_when_one_publish_covers_several_packets() {
        let (_, _, mut reader) = full(2048);
        while read(&mut reader).is_some() {}
        assert_eq!(reader.publish(), Ok(Signal::Needed));
        assert_eq!(reader.publish(), Ok(Signal::NotNeeded));
    }

    #[test]
    fn a_pending_size_that_is_no_multiple_of_8_is_rounded_down() {
        let (pages, _, mut reader) = full(need(1000));
        // The room that the first packet leaves: 1016 + 1024 bytes.
        set_field(&pages, 12, 2040 + 7);
        read(&mut reader).unwrap();
        assert_eq!(reader.publish(), Ok(Signal::Needed));
    }

    #[test]
    fn room_that_came_in_between_needs_no_signal() {
        let (pages, mut writer, mut reader) = pair();
        while push(&mut writer, &[7; 1000]).is_ok() {}
        let _ = writer.publish().unwrap();
        read(&mut reader).unwrap();
        let _ = reader.publish().unwrap();
        assert_eq!(writer.wait_for(need(1000)), Ok(Room::Available));
        assert_eq!(field(&pages, 12), 0, "and the wish is withdrawn");
        push(&mut writer, &[7; 1000]).unwrap();
    }

    #[test]
    fn pushing_a_small_packet_does_not_withdraw_the_wish() {
        let (pages, mut writer, _) = full(need(1000));
        push(&mut writer, b"small").unwrap();
        let _ = writer.publish().unwrap();
        assert_eq!(field(&pages, 12), need(1000));
        writer.stop_waiting().unwrap();
        assert_eq!(field(&pages, 12), 0);
    }

    #[test]
    fn the_feature_bit_says_who_signals_room() {
        let pages = memory();
        let ring = Ring::new(&pages, 0, 2).unwrap();
        assert_eq!(ring.producer_signals_room(), Ok(false));
        let _writer = Writer::new(ring.clone()).unwrap();
        assert_eq!(ring.producer_signals_room(), Ok(true));
    }
}

mod a_broken_peer {
    use super::*;

    fn descriptor(kind: u16, offset: u16, length: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..2].copy_from_slice(&kind.to_le_bytes());
        bytes[2..4].copy_from_slice(&offset.to_le_bytes());
        bytes[4..6].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    fn error_for(bytes: &[u8], producer: u32) -> RingError {
        let (pages, _, mut reader) = pair();
        pages.write(4096, bytes).unwrap();
        set_field(&pages, 0, producer);
        reader.read(&mut PacketBuffer::default()).unwrap_err()
    }

    #[test]
    fn offsets_outside_the_ring_are_refused() {
        for bad in [SIZE, SIZE + 8, u32::MAX, 4, 9] {
            assert_eq!(error_for(&[], bad), RingError::ProducerOffset(bad));
            let (pages, mut writer, _) = pair();
            set_field(&pages, 4, bad);
            push(&mut writer, b"x").unwrap();
            assert_eq!(writer.publish(), Err(RingError::ConsumerOffset(bad)));
        }
    }

    #[test]
    fn lengths_are_checked_against_what_was_written() {
        assert_eq!(
            error_for(&descriptor(6, 2, 2), 16),
            RingError::Truncated { available: 16 }
        );
        assert_eq!(
            error_for(&descriptor(6, 2, 3), 24),
            RingError::Length {
                length: 32,
                available: 24
            }
        );
        assert_eq!(
            error_for(&descriptor(6, 2, 0xFFFF), 4000),
            RingError::Length {
                length: 0xFFFF * 8 + 8,
                available: 4000
            }
        );
    }

    #[test]
    fn the_data_lies_behind_the_descriptor_and_inside_the_packet() {
        for offset in [0, 1, 4, 0xFFFF] {
            assert_eq!(
                error_for(&descriptor(6, offset, 3), 32),
                RingError::DataOffset {
                    offset: u32::from(offset) * 8,
                    length: 24
                }
            );
        }
        assert_eq!(
            error_for(&descriptor(6, 2, 0), 32),
            RingError::DataOffset {
                offset: 16,
                length: 0
            }
        );
    }

    #[test]
    fn types_that_no_channel_carries_are_refused() {
        for kind in [0, 1, 5, 8, 0xA, 0xC, 0xD, 0xE, 0xFFFF] {
            assert_eq!(
                error_for(&descriptor(kind, 2, 2), 24),
                RingError::Kind(kind)
            );
        }
    }

    #[test]
    fn range_lists_are_checked() {
        // Transfer pages and GPA-direct without room for the range header.
        assert_eq!(error_for(&descriptor(7, 2, 4), 40), RingError::Ranges);
        assert_eq!(error_for(&descriptor(9, 2, 4), 40), RingError::Ranges);
        // More transfer page ranges than the header has room for.
        let mut bytes = [0; 40];
        bytes[..16].copy_from_slice(&descriptor(7, 4, 4));
        bytes[20] = 2;
        assert_eq!(error_for(&bytes, 40), RingError::Ranges);
        // A GPA range of no bytes, and one whose pages are missing.
        bytes[..16].copy_from_slice(&descriptor(9, 4, 4));
        bytes[20] = 1;
        assert_eq!(error_for(&bytes, 40), RingError::Ranges);
        bytes[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(error_for(&bytes, 40), RingError::Ranges);
    }

    #[test]
    fn the_descriptor_is_read_once() {
        let (pages, mut writer, mut reader) = pair();
        push(&mut writer, b"12345678").unwrap();
        let _ = writer.publish().unwrap();
        assert_eq!(reader.peek().unwrap().unwrap().kind(), Kind::IN_BAND);
        // A second look would find a packet much too long.
        pages.write(4096, &descriptor(6, 2, 0xFFFF)).unwrap();
        assert_eq!(read(&mut reader).unwrap(), b"12345678");
    }
}

#[derive(Clone, Debug)]
enum Step {
    Push(usize),
    Publish,
    Read,
    Give,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0usize..1500).prop_map(Step::Push),
        2 => (0usize..16).prop_map(Step::Push),
        3 => Just(Step::Publish),
        5 => Just(Step::Read),
        3 => Just(Step::Give),
    ];
    proptest::collection::vec(step, 0..400)
}

proptest! {
    /// The ring is a queue: what was published comes out whole and in order, whatever the sizes,
    /// wraps and fillings, and a push is refused exactly when the bytes do not fit.
    #[test]
    fn behaves_like_a_queue(steps in steps()) {
        let (_, mut writer, mut reader) = pair();
        let mut invisible: VecDeque<Vec<u8>> = VecDeque::new();
        let mut visible: VecDeque<Vec<u8>> = VecDeque::new();
        // Bytes that the writer may not yet overwrite.
        let mut occupied = 0;
        let mut read_since_publish = 0;
        let mut next = 0u8;
        for step in steps {
            match step {
                Step::Push(length) => {
                    next = next.wrapping_add(1);
                    let payload = vec![next; length];
                    let fits = occupied + need(length) <= SIZE - 8;
                    let pushed = push(&mut writer, &payload);
                    if fits {
                        prop_assert_eq!(pushed, Ok(()));
                        occupied += need(length);
                        invisible.push_back(payload);
                    } else {
                        prop_assert_eq!(pushed, Err(PushError::Full { need: need(length) }));
                    }
                }
                Step::Publish => {
                    let was_empty = visible.is_empty() && read_since_publish == 0;
                    let signal = writer.publish().unwrap();
                    let expected = was_empty && !invisible.is_empty();
                    prop_assert_eq!(signal == Signal::Needed, expected);
                    visible.append(&mut invisible);
                }
                Step::Read => {
                    let mut packet = PacketBuffer::default();
                    let found = reader.read(&mut packet).unwrap();
                    prop_assert_eq!(found, !visible.is_empty());
                    if let Some(expected) = visible.pop_front() {
                        let payload = packet.payload();
                        prop_assert_eq!(&payload[..expected.len()], &expected[..]);
                        prop_assert_eq!(payload.len(), expected.len().next_multiple_of(8));
                        prop_assert!(payload[expected.len()..].iter().all(|&byte| byte == 0));
                        read_since_publish += need(expected.len());
                    }
                }
                Step::Give => {
                    prop_assert_eq!(reader.publish(), Ok(Signal::NotNeeded));
                    occupied -= read_since_publish;
                    read_since_publish = 0;
                }
            }
        }
    }

    /// Whatever the other end writes, and whenever, reading ends: with packets, or with an error.
    #[test]
    fn survives_garbage(
        producer in any::<u32>(),
        aligned in any::<bool>(),
        data in proptest::collection::vec(any::<u8>(), 0..4096),
        small in any::<bool>(),
        pending in any::<u32>(),
    ) {
        let (pages, _, mut reader) = pair();
        let mut data = data;
        if small {
            // Plausible descriptors, so that the deeper checks are reached too.
            for descriptor in data.chunks_exact_mut(16) {
                descriptor[0] = [6, 7, 9, 0xB][usize::from(descriptor[0] % 4)];
                descriptor[1] = 0;
                descriptor[2] %= 12;
                descriptor[3] = 0;
                descriptor[4] %= 16;
                descriptor[5] = 0;
            }
        }
        pages.write(4096, &data).unwrap();
        let producer = if aligned { (producer % SIZE) & !7 } else { producer };
        set_field(&pages, 0, producer);
        set_field(&pages, 12, pending);
        let mut packet = PacketBuffer::default();
        let mut reads = 0;
        while let Ok(true) = reader.read(&mut packet) {
            let _ = packet.payload().len();
            if let Some(transfer) = packet.transfer_pages() {
                let _ = transfer.ranges().count();
            }
            if let Some(ranges) = packet.gpa_ranges() {
                for range in ranges {
                    let _ = range.pages().count();
                }
            }
            reads += 1;
            prop_assert!(reads <= SIZE / 24, "the ring cannot hold more packets");
        }
        let _ = reader.publish();
        let _ = reader.unmask();
    }

    /// A writer whose consumer lies about its position never writes outside the ring.
    #[test]
    fn a_lying_consumer_harms_only_itself(
        offsets in proptest::collection::vec((any::<u32>(), 0usize..3000), 0..100),
    ) {
        let pages = SharedPages::from_heap(PageNumber(0), 3).unwrap();
        let mut writer = Writer::new(Ring::new(&pages, 0, 2).unwrap()).unwrap();
        for (consumer, length) in offsets {
            set_field(&pages, 4, (consumer % SIZE) & !7);
            let _ = push(&mut writer, &vec![0xAA; length]);
            let _ = writer.publish().unwrap();
            let _ = writer.wait_for(need(length)).unwrap();
        }
        let mut behind = vec![0; 4096];
        pages.read(8192, &mut behind).unwrap();
        prop_assert!(behind.iter().all(|&byte| byte == 0));
    }
}
