//! Offloads against known frames, against etherparse's own sums, and against a model that puts segments together again.

use alloc::vec;
use alloc::vec::Vec;

use etherparse::PacketBuilder;
use proptest::prelude::*;

use super::checksum::fill_all;
use super::*;
use crate::network::rndis::{ReceiveChecksum, TransmitChecksum, VlanTag};

const TCP: TransmitChecksum = TransmitChecksum(1 << 2);
const UDP: TransmitChecksum = TransmitChecksum(1 << 3);
const IP_AND_TCP: TransmitChecksum = TransmitChecksum(1 | 1 << 2 | 1 << 4);

/// A TCP frame with right checksums, as etherparse makes it.
fn tcp(ip: Ip, data: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ports = (4000, 80);
    let mut frame = Vec::new();
    let built = match ip {
        Ip::V4 => ethernet
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .tcp(ports.0, ports.1, 0xFFFF_FF00, 1000)
            .psh()
            .fin()
            .cwr()
            .ack(7)
            .write(&mut frame, data),
        Ip::V6 => ethernet
            .ipv6([0xFD; 16], [0xFE; 16], 64)
            .tcp(ports.0, ports.1, 0xFFFF_FF00, 1000)
            .psh()
            .fin()
            .cwr()
            .ack(7)
            .write(&mut frame, data),
    };
    built.unwrap();
    frame
}

fn udp(data: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .udp(4000, 53)
        .write(&mut frame, data)
        .unwrap();
    frame
}

/// The sum as RFC 1071 says it: words, one after the other.
fn naive_sum(bytes: &[u8]) -> u16 {
    let mut total = 0u32;
    for pair in bytes.chunks(2) {
        total += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        total = (total >> 16) + (total & 0xFFFF);
    }
    total as u16
}

fn verified(frame: &[u8]) -> Option<ReceiveChecksum> {
    verify_checksums(frame, &Headers::find(frame).unwrap())
}

#[test]
fn the_sum_of_rfc_1071s_example_is_the_one_that_it_gives() {
    let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
    assert_eq!(sum(0, &bytes), 0xddf2);
}

#[test]
fn checksums_that_the_guest_left_out_are_computed() {
    for (ip, clear) in [(Ip::V4, vec![24, 25, 50, 51]), (Ip::V6, vec![70, 71])] {
        let right = tcp(ip, b"data of odd length");
        let mut frame = right.clone();
        for at in clear {
            frame[at] = 0x5A;
        }
        assert_ne!(frame, right);
        let wanted = if ip == Ip::V4 { IP_AND_TCP } else { TCP };
        assert_eq!(fill_checksums(&mut frame, wanted), Ok(()));
        assert_eq!(frame, right);
    }
    let right = udp(b"question");
    let mut frame = right.clone();
    frame[40..42].copy_from_slice(&[1, 2]);
    assert_eq!(fill_checksums(&mut frame, UDP), Ok(()));
    assert_eq!(frame, right);
}

#[test]
fn only_the_checksums_that_are_asked_for_are_touched() {
    let right = tcp(Ip::V4, b"x");
    let mut frame = right.clone();
    frame[24] ^= 1;
    frame[50] ^= 1;
    let broken_ip = frame[24];
    assert_eq!(fill_checksums(&mut frame, TCP), Ok(()));
    assert_eq!((frame[24], frame[50]), (broken_ip, right[50]));
    assert_eq!(fill_checksums(&mut frame, UDP), Err(NotApplicable));
    assert_eq!(fill_checksums(&mut [0; 60], TCP), Err(NotApplicable));
}

#[test]
fn a_udp_checksum_of_zero_is_sent_as_all_ones() {
    // The data is chosen such that the sum is all ones.
    let mut frame = udp(&[0, 0]);
    frame[40..42].copy_from_slice(&[0, 0]);
    let headers = Headers::find(&frame).unwrap();
    let part = &frame[34..];
    let pseudo = naive_sum(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 17, 0, 10]);
    let rest = !(sum(u32::from(pseudo), part) as u16);
    frame[42..44].copy_from_slice(&rest.to_be_bytes());
    assert_eq!(fill_checksums(&mut frame, UDP), Ok(()));
    assert_eq!(frame[40..42], [0xFF, 0xFF]);
    assert_eq!(
        verify_checksums(&frame, &headers),
        Some(ReceiveChecksum::IP_GOOD.and(ReceiveChecksum::UDP_GOOD))
    );
}

#[test]
fn what_is_announced_as_good_has_been_verified() {
    let good = ReceiveChecksum::IP_GOOD.and(ReceiveChecksum::TCP_GOOD);
    assert_eq!(verified(&tcp(Ip::V4, b"data")), Some(good));
    assert_eq!(
        verified(&tcp(Ip::V6, b"data")),
        Some(ReceiveChecksum::TCP_GOOD)
    );
    let mut frame = tcp(Ip::V4, b"data");
    *frame.last_mut().unwrap() ^= 1;
    let bad = ReceiveChecksum::IP_GOOD.and(ReceiveChecksum::TCP_FAILED);
    assert_eq!(verified(&frame), Some(bad));
    let mut frame = tcp(Ip::V4, b"data");
    frame[22] = 63;
    let bad = ReceiveChecksum::IP_FAILED.and(ReceiveChecksum::TCP_GOOD);
    assert_eq!(verified(&frame), Some(bad));
    let mut frame = udp(b"no checksum");
    frame[40..42].copy_from_slice(&[0, 0]);
    assert_eq!(verified(&frame), Some(ReceiveChecksum::IP_GOOD));
}

#[test]
fn padding_behind_a_datagram_does_not_count() {
    let mut frame = tcp(Ip::V4, b"");
    frame.resize(60, 0xEE);
    let good = ReceiveChecksum::IP_GOOD.and(ReceiveChecksum::TCP_GOOD);
    assert_eq!(verified(&frame), Some(good));
}

#[test]
fn of_a_fragment_only_the_ip_header_is_verified() {
    let mut frame = tcp(Ip::V4, b"data");
    frame[20] = 0x20;
    let headers = Headers::find(&frame).unwrap();
    assert!(headers.fragment && headers.transport.is_none());
    assert_eq!(verified(&frame), Some(ReceiveChecksum::IP_FAILED));
}

#[test]
fn headers_behind_tags_and_extensions_are_found() {
    let mut frame = tcp(Ip::V4, b"data");
    insert_tag(&mut frame, VlanTag::from_tci(7));
    insert_tag(&mut frame, VlanTag::from_tci(8));
    let headers = Headers::find(&frame).unwrap();
    assert_eq!(headers.network, 22);
    assert_eq!(headers.transport, Some((Transport::Tcp, 42)));
    assert_eq!(headers.payload, 62);
    assert_eq!(fill_checksums(&mut frame, IP_AND_TCP), Ok(()));
    // Eight bytes of destination options between IPv6 and TCP.
    let mut frame = tcp(Ip::V6, b"data");
    frame.splice(54..54, [6, 0, 1, 4, 0, 0, 0, 0]);
    frame[20] = 60;
    frame[19] += 8;
    let headers = Headers::find(&frame).unwrap();
    assert_eq!(headers.transport, Some((Transport::Tcp, 62)));
    assert_eq!(verified(&frame), Some(ReceiveChecksum::TCP_GOOD));
}

#[test]
fn tags_go_into_frames_and_out_again() {
    let plain = tcp(Ip::V4, b"data");
    let mut frame = plain.clone();
    let tag = VlanTag::from_tci(0xB00F);
    insert_tag(&mut frame, tag);
    assert_eq!(frame[12..16], [0x81, 0, 0xB0, 0x0F]);
    assert_eq!(strip_tag(&mut frame), Some(tag));
    assert_eq!(frame, plain);
    assert_eq!(strip_tag(&mut frame), None);
    let mut short = vec![1, 2, 3];
    insert_tag(&mut short, tag);
    assert_eq!(short, [1, 2, 3]);
}

fn segments(frame: &[u8], size: usize) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    segment(frame, size, &mut Vec::new(), |piece| {
        all.push(piece.to_vec());
    })
    .unwrap();
    all
}

/// Puts segments together again, checking each as a receiver would.
fn reassemble(frames: &[Vec<u8>], ip: Ip) -> Vec<u8> {
    let mut data = Vec::new();
    let mut expected = 0xFFFF_FF00u32;
    for (index, frame) in frames.iter().enumerate() {
        let headers = Headers::find(frame).unwrap();
        assert_eq!(headers.end, frame.len(), "the length in the header");
        let good = match ip {
            Ip::V4 => ReceiveChecksum::IP_GOOD.and(ReceiveChecksum::TCP_GOOD),
            Ip::V6 => ReceiveChecksum::TCP_GOOD,
        };
        assert_eq!(verify_checksums(frame, &headers), Some(good));
        let (_, at) = headers.transport.unwrap();
        let sequence = u32::from_be_bytes(*frame[at + 4..].first_chunk().unwrap());
        assert_eq!(sequence, expected);
        let flags = frame[at + 13];
        let last = index + 1 == frames.len();
        assert_eq!(flags & 0x09, if last { 0x09 } else { 0 }, "PSH and FIN");
        assert_eq!(flags & 0x80, if index == 0 { 0x80 } else { 0 }, "CWR");
        assert_eq!(flags & 0x10, 0x10, "ACK");
        if ip == Ip::V4 {
            let id = u16::from_be_bytes(*frame[18..].first_chunk().unwrap());
            assert_eq!(id, index as u16);
        }
        let piece = &frame[headers.payload..];
        expected = expected.wrapping_add(piece.len() as u32);
        data.extend_from_slice(piece);
    }
    data
}

#[test]
fn sixty_kibibytes_are_cut_at_the_segment_size() {
    let data: Vec<u8> = (0..60 * 1024u32).map(|byte| byte as u8).collect();
    for (ip, size) in [(Ip::V4, 1460), (Ip::V6, 1440)] {
        let mut frame = tcp(ip, &data);
        // As Linux does before it hands such a frame over.
        if ip == Ip::V4 {
            frame[16..18].copy_from_slice(&[0, 0]);
        }
        let pieces = segments(&frame, size);
        assert_eq!(pieces.len(), data.len().div_ceil(size));
        assert!(pieces.iter().all(|piece| piece.len() <= 1514));
        assert_eq!(reassemble(&pieces, ip), data);
    }
}

#[test]
fn a_network_that_takes_large_frames_gets_one_with_right_lengths() {
    for ip in [Ip::V4, Ip::V6] {
        let right = tcp(ip, &[7; 50_000]);
        let mut frame = right.clone();
        let length = if ip == Ip::V4 { 16 } else { 18 };
        frame[length..length + 2].copy_from_slice(&[0, 0]);
        assert_eq!(resize_large(&mut frame), Ok(()));
        assert_eq!(frame, right);
    }
    let mut too_long = tcp(Ip::V4, &[7; 60_000]);
    too_long.resize(70_000, 0);
    assert_eq!(resize_large(&mut too_long), Err(NotApplicable));
}

#[test]
fn what_cannot_be_cut_is_refused() {
    let mut buffer = Vec::new();
    let mut refuse = |frame: &[u8], size| {
        let result = segment(frame, size, &mut buffer, |_| panic!("a segment"));
        assert_eq!(result, Err(NotApplicable));
    };
    refuse(&udp(&[0; 3000]), 1000);
    refuse(&tcp(Ip::V4, &[0; 3000]), 0);
    refuse(&tcp(Ip::V4, &[0; 3000]), MIN_SEGMENT - 1);
    refuse(&tcp(Ip::V4, &[0; 3000]), 0xF_FFFF);
    refuse(&tcp(Ip::V4, b"")[..50], 1000);
    refuse(&[], 1000);
}

proptest! {
    #[test]
    fn the_fast_sum_is_the_naive_one(bytes in proptest::collection::vec(any::<u8>(), 0..200), start in 0u32..0x10000) {
        let mut naive = u32::from(naive_sum(&bytes)) + start;
        naive = (naive >> 16) + (naive & 0xFFFF);
        let fast = sum(start, &bytes);
        // Both zeros of ones' complement are the same.
        prop_assert_eq!(fast % 0xFFFF, naive % 0xFFFF);
        prop_assert!(fast <= 0xFFFF);
    }

    #[test]
    fn segments_are_the_data_again(length in 0usize..5000, size in MIN_SEGMENT..3000, v6: bool) {
        let ip = if v6 { Ip::V6 } else { Ip::V4 };
        let data: Vec<u8> = (0..length).map(|byte| (byte * 7) as u8).collect();
        let pieces = segments(&tcp(ip, &data), size);
        prop_assert_eq!(reassemble(&pieces, ip), data);
    }

    #[test]
    fn any_frame_is_worked_on_or_refused(
        mut frame in proptest::collection::vec(any::<u8>(), 0..120),
        kind in 0..5u8,
        wanted: u32,
        size in 0usize..200,
    ) {
        // Frames that look like something get further.
        let head: &[u8] = match kind {
            0 => &[0x08, 0x00, 0x45],
            1 => &[0x86, 0xDD, 0x60],
            2 => &[0x81, 0x00, 0x00, 0x01, 0x08, 0x00, 0x46],
            3 => &[0x08, 0x00, 0x4F],
            _ => &[],
        };
        for (to, from) in frame.iter_mut().skip(12).zip(head) {
            *to = *from;
        }
        if frame.len() > 23 && kind == 0 {
            frame[23] = 6;
        }
        let _ = fill_checksums(&mut frame, TransmitChecksum(wanted));
        let mut count = 0;
        let _ = segment(&frame, size, &mut Vec::new(), |_| count += 1);
        prop_assert!(count <= 1 + frame.len() / MIN_SEGMENT);
        let _ = resize_large(&mut frame);
        if let Ok(cut) = leave_uncut(&mut frame, size) {
            prop_assert!(cut.tcp + 20 <= cut.headers && cut.headers <= frame.len());
            prop_assert!(usize::from(cut.size) == size && size >= MIN_SEGMENT);
        }
        if let Some(headers) = Headers::find(&frame) {
            prop_assert!(headers.payload <= headers.end && headers.end <= frame.len());
            let _ = verify_checksums(&frame, &headers);
            let _ = fill_all(&mut frame, &headers);
        }
        strip_tag(&mut frame);
    }
}
