//! The way of frames from the guest: every method, every offload, and a network that does not keep up.

use etherparse::PacketBuilder;
use vmbus::hypervisor::Hypervisor;
use vmbus::kmcl::ExternalData;
use vmbus_host::network::backend::{Backend, LargeSends, SendError, Waker};
use vmbus_host::network::offload::{Headers, Ip, Segmentation, sum, verify_checksums};
use vmbus_host::network::rndis::ReceiveChecksum;
use vmbus_host::network::{Capture, Direction};

use crate::guest::{Guest, How, MAC, PEER, SECTION, frame_to, rndis_packet, word, words};
use crate::support::SECOND;

/// A TCP frame with right checksums.
pub fn tcp(data: &[u8], v6: bool) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(MAC, PEER);
    let mut frame = Vec::new();
    if v6 {
        let ip = ethernet.ipv6([0xFD; 16], [0xFE; 16], 64);
        ip.tcp(4000, 80, 9, 1000).psh().write(&mut frame, data)
    } else {
        let ip = ethernet.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
        ip.tcp(4000, 80, 9, 1000).psh().write(&mut frame, data)
    }
    .unwrap();
    frame
}

#[test]
fn every_method_brings_the_frame_to_the_network() {
    let (guest, peer) = Guest::ready();
    for length in [60, 61, 63, 64, 100, 1000, 1513, 1514] {
        for how in [How::Section(0), How::Section(4), How::Pages, How::Mixed(2)] {
            let data: Vec<u8> = (14..length).map(|byte| byte as u8).collect();
            let frame = frame_to(PEER, MAC, &data);
            assert_eq!(guest.send(how, &frame, &[]), Some(1), "{how:?}");
            assert_eq!(peer.receive(), Some(frame), "{how:?}");
        }
    }
    guest.assert_fine();
}

#[test]
fn a_batch_is_sent_in_order() {
    let (guest, peer) = Guest::ready();
    let frames: Vec<_> = (0..8u8)
        .map(|number| frame_to(PEER, MAC, &vec![number; 50 + 31 * usize::from(number)]))
        .collect();
    let batch: Vec<u8> = frames
        .iter()
        .flat_map(|frame| rndis_packet(frame, &[]))
        .collect();
    assert_eq!(guest.deliver(How::Section(3), 0, &batch, 0), Some(1));
    assert_eq!(
        std::iter::from_fn(|| peer.receive()).collect::<Vec<_>>(),
        frames
    );
    // The last one's frame lies in pages.
    let head = batch.len() - rndis_packet(&frames[7], &[]).len() + 44;
    assert_eq!(guest.deliver(How::Mixed(1), 0, &batch, head), Some(1));
    assert_eq!(
        std::iter::from_fn(|| peer.receive()).collect::<Vec<_>>(),
        frames
    );
    guest.assert_fine();
}

#[test]
fn a_tag_from_the_side_goes_into_the_frame() {
    let (guest, peer) = Guest::ready();
    let frame = frame_to(PEER, MAC, &[7; 1500]);
    assert_eq!(frame.len(), 1514);
    // Priority 5, VLAN 100.
    assert_eq!(
        guest.send(How::Pages, &frame, &[(6, 5 | 100 << 4)]),
        Some(1)
    );
    let sent = peer.receive().unwrap();
    assert_eq!(sent.len(), 1518);
    assert_eq!(sent[12..18], [0x81, 0x00, 0xA0, 100, 0x88, 0xB5]);
    assert_eq!((&sent[..12], &sent[16..]), (&frame[..12], &frame[12..]));
    guest.assert_fine();
}

#[test]
fn checksums_are_computed_and_tags_do_not_disturb_them() {
    let (guest, peer) = Guest::ready();
    for (v6, kind, at) in [(false, 0x15, 50), (true, 0x06, 70)] {
        let right = tcp(b"some data", v6);
        let mut frame = right.clone();
        frame[at] ^= 0xFF;
        if !v6 {
            frame[24] ^= 0xFF;
        }
        let offset = if v6 { 54 } else { 34 };
        let checksum = (0, kind | offset << 16);
        assert_eq!(guest.send(How::Section(0), &frame, &[checksum]), Some(1));
        assert_eq!(peer.receive(), Some(right.clone()));
        assert_eq!(
            guest.send(How::Pages, &frame, &[checksum, (6, 9 << 4)]),
            Some(1)
        );
        let tagged = peer.receive().unwrap();
        assert_eq!([&tagged[..12], &tagged[16..]].concat(), right);
    }
    assert_eq!(guest.nic.counters().sent_not_applicable, 0);
    // A frame that is none of that goes as it is.
    let other = frame_to(PEER, MAC, b"no datagram");
    assert_eq!(guest.send(How::Pages, &other, &[(0, 0x05)]), Some(1));
    assert_eq!(peer.receive(), Some(other));
    assert_eq!(guest.nic.counters().sent_not_applicable, 1);
}

#[test]
fn sixty_kibibytes_are_cut_at_the_mtu() {
    let (guest, peer) = Guest::ready();
    let data: Vec<u8> = (0..60 << 10).map(|byte: u32| (byte / 3) as u8).collect();
    for v6 in [false, true] {
        let mut frame = tcp(&data[..61_000], v6);
        let (header, mss) = if v6 { (74, 1440) } else { (54, 1460) };
        // As Linux does: lengths and checksums are the host's matter.
        frame[16..18].copy_from_slice(if v6 { &[0x3B, 0xBE] } else { &[0, 0] });
        let info = [
            (2, mss | 34 << 20 | 1 << 30 | u32::from(v6) << 31),
            (6, 77 << 4),
        ];
        assert_eq!(guest.send(How::Pages, &frame, &info), Some(1));
        let mut got = Vec::new();
        while let Some(sent) = peer.receive() {
            assert!(sent.len() <= 1518, "{}", sent.len());
            assert_eq!(sent[12..16], [0x81, 0, 0, 77]);
            let headers = Headers::find(&sent).unwrap();
            assert_eq!(headers.end, sent.len());
            let found = verify_checksums(&sent, &headers).unwrap();
            assert_eq!(
                found.0 & ReceiveChecksum::TCP_GOOD.0,
                ReceiveChecksum::TCP_GOOD.0
            );
            assert_eq!(found.0 & 7, 0, "nothing failed");
            got.extend_from_slice(&sent[header + 4..]);
        }
        assert!(got == data[..61_000]);
    }
    assert_eq!(guest.nic.counters().large_sends, 2);
    guest.assert_fine();
}

#[test]
fn segments_longer_than_the_mtu_are_not_sent() {
    let (guest, peer) = Guest::ready();
    let frame = tcp(&[1; 20_000], false);
    assert_eq!(
        guest.send(How::Pages, &frame, &[(2, 4000 | 1 << 30)]),
        Some(1)
    );
    assert_eq!(guest.send(How::Pages, &frame, &[(2, 1 << 30)]), Some(1));
    assert_eq!(peer.receive().map(|last| last.len() <= 1518), None);
    assert_eq!(guest.nic.counters().sent_not_applicable, 2);
}

/// A network that takes large frames, and keeps them.
#[derive(Clone, Default)]
struct Wide(std::sync::Arc<std::sync::Mutex<Vec<Vec<u8>>>>);

impl Backend for Wide {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        self.0.lock().unwrap().push(frame.to_vec());
        Ok(())
    }
    fn receive(&self) -> Option<Vec<u8>> {
        None
    }
    fn set_waker(&self, _waker: Option<Waker>) {}
    fn large_sends(&self) -> LargeSends {
        LargeSends::Whole(65534)
    }
}

/// A network that cuts large frames, while it has room for them.
#[derive(Clone, Default)]
struct Cutter(std::sync::Arc<std::sync::Mutex<Cut>>);

#[derive(Default)]
struct Cut {
    large: Vec<(Vec<u8>, Segmentation)>,
    plain: Vec<Vec<u8>>,
    is_full: bool,
}

impl Backend for Cutter {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        let mut cut = self.0.lock().unwrap();
        if cut.is_full {
            return Err(SendError::Full);
        }
        cut.plain.push(frame.to_vec());
        Ok(())
    }
    fn receive(&self) -> Option<Vec<u8>> {
        None
    }
    fn set_waker(&self, _waker: Option<Waker>) {}
    fn large_sends(&self) -> LargeSends {
        LargeSends::Cut
    }
    fn send_large(&self, frame: &[u8], how: &Segmentation) -> Result<(), SendError> {
        let mut cut = self.0.lock().unwrap();
        if cut.is_full {
            return Err(SendError::Full);
        }
        cut.large.push((frame.to_vec(), *how));
        Ok(())
    }
}

#[test]
fn a_network_that_takes_large_frames_gets_them_whole() {
    let wide = Wide::default();
    let mut guest = Guest::with(wide.clone(), |_| {});
    guest.set_up(vmbus_host::network::nvsp::Version::V6_1);
    let right = tcp(&[9; 50_000], false);
    let mut frame = right.clone();
    frame[16..18].copy_from_slice(&[0, 0]);
    frame[50..52].copy_from_slice(&[1, 2]);
    assert_eq!(
        guest.send(How::Pages, &frame, &[(2, 1460 | 1 << 30)]),
        Some(1)
    );
    assert!(*wide.0.lock().unwrap() == [right]);
}

#[test]
fn a_network_that_cuts_large_frames_gets_them_begun() {
    for v6 in [false, true] {
        let cutter = Cutter::default();
        let mut guest = Guest::with(cutter.clone(), |_| {});
        guest.set_up(vmbus_host::network::nvsp::Version::V6_1);
        let right = tcp(&[9; 50_000], v6);
        let (length, header, mss) = if v6 { (18, 74, 1440) } else { (16, 54, 1460) };
        let mut frame = right.clone();
        frame[length..length + 2].copy_from_slice(&[0, 0]);
        let info = (2, mss | 1 << 30 | u32::from(v6) << 31);
        assert_eq!(guest.send(How::Pages, &frame, &[info]), Some(1));
        // One whose segments are longer than frames of the network may be.
        assert_eq!(guest.send(How::Pages, &frame, &[(2, info.1 + 5)]), Some(1));
        assert_eq!(guest.nic.counters().sent_not_applicable, 1);
        let cut = cutter.0.lock().unwrap();
        assert_eq!((cut.large.len(), cut.plain.len()), (1, 0));
        let (got, how) = &cut.large[0];
        assert_eq!(how.tcp, header - 20);
        assert_eq!((how.headers, how.size), (header, mss as u16));
        assert_eq!(how.ip, if v6 { Ip::V6 } else { Ip::V4 });
        assert!(!how.congestion);
        // Whoever adds the sum from the TCP header on, with what lies in the checksum's place, has the checksum.
        let mut finished = got.clone();
        let whole = !(sum(0, &got[how.tcp..]) as u16);
        finished[how.tcp + 16..how.tcp + 18].copy_from_slice(&whole.to_be_bytes());
        assert!(finished == right, "lengths, IP checksum, TCP checksum");
    }
}

#[test]
fn a_network_that_cuts_and_has_no_room_gets_segments_later() {
    let cutter = Cutter::default();
    let mut guest = Guest::with(cutter.clone(), |_| {});
    guest.set_up(vmbus_host::network::nvsp::Version::V6_1);
    cutter.0.lock().unwrap().is_full = true;
    let frame = tcp(&[9; 5000], false);
    let info = [(2, 1460 | 1 << 30)];
    let waits = guest.begin(&rndis_packet(&frame, &info));
    guest.vm.machine.settle();
    assert_eq!(guest.nic.counters().sent_frames, 0);
    cutter.0.lock().unwrap().is_full = false;
    // What comes now stays behind it, and is not handed out whole.
    let behind = guest.begin(&rndis_packet(&frame, &info));
    guest.vm.machine.settle();
    for asked in [waits, behind] {
        guest.vm.vmbus.client().block_on(asked).unwrap().unwrap();
    }
    let cut = cutter.0.lock().unwrap();
    assert_eq!((cut.large.len(), cut.plain.len()), (0, 8));
    for frame in &cut.plain {
        let headers = Headers::find(frame).unwrap();
        let found = verify_checksums(frame, &headers).unwrap();
        assert_eq!(found.0 & 7, 0, "nothing failed");
    }
}

#[test]
fn what_is_written_down_is_what_goes() {
    let cutter = Cutter::default();
    let mut guest = Guest::with(cutter.clone(), |_| {});
    guest.set_up(vmbus_host::network::nvsp::Version::V6_1);
    let send = || {
        let frame = tcp(&[9; 5000], false);
        assert_eq!(
            guest.send(How::Pages, &frame, &[(2, 1460 | 1 << 30)]),
            Some(1)
        );
        let cut = cutter.0.lock().unwrap();
        (cut.large.len(), cut.plain.len())
    };
    assert_eq!(send(), (1, 0));
    guest.nic.set_capture(Some(Box::new(Nothing)));
    assert_eq!(send(), (1, 4));
    guest.nic.set_capture(None);
    assert_eq!(send(), (2, 4));
}

/// Writes nothing down.
struct Nothing;

impl Capture for Nothing {
    fn frame(&mut self, _direction: Direction, _frame: &[u8]) {}
}

#[test]
fn what_is_no_frame_is_answered_so_and_the_channel_goes_on() {
    let (guest, peer) = Guest::ready();
    let good = rndis_packet(&frame_to(PEER, MAC, b"good"), &[]);
    let spoil = |at: usize, value: u32| {
        let mut bytes = good.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let long = rndis_packet(&frame_to(PEER, MAC, &[0; 1505]), &[]);
    for (bytes, status) in [
        (spoil(0, 4), 5),
        (spoil(0, 99), 5),
        (spoil(4, 7), 5),
        (spoil(4, good.len() as u32 + 8), 5),
        (spoil(8, 1 << 31), 5),
        (spoil(12, 13), 5),
        (spoil(12, u32::MAX), 5),
        (spoil(32, 8), 5),
        (long, 5),
        // Too short to say anything at all.
        (vec![1, 0, 0, 0], 1),
    ] {
        assert_eq!(guest.deliver(How::Section(0), 0, &bytes, 0), Some(status));
    }
    // Nothing in it, no such section, more than a section holds, and no section and no pages.
    let nowhere = [
        (5, 100),
        (u32::MAX - 1, 100),
        (0, SECTION as u32 + 1),
        (0, u32::MAX),
        (u32::MAX, 100),
    ];
    for (section, size) in nowhere {
        let answer = guest.ask(&words(&[107, 0, section, size]));
        assert_eq!(word(&answer, 4), 2, "{section:#x} {size:#x}");
    }
    // More pages than any packet needs.
    let pages = guest.pages(70);
    let mut external = ExternalData::new();
    external.push(pages.clone(), 0..70 * 4096).unwrap();
    let message = words(&[107, 0, u32::MAX, 0]);
    let answer = guest
        .try_ask_on(guest.channel(), &message, external)
        .unwrap();
    assert_eq!(word(&answer, 4), 2);
    // Traffic of no kind.
    assert_eq!(guest.deliver(How::Section(0), 7, &good, 0), Some(5));
    assert_eq!(peer.receive(), None);
    assert_eq!(guest.deliver(How::Section(0), 0, &good, 0), Some(1));
    assert!(peer.receive().is_some());
    guest.assert_fine();
}

#[test]
fn a_network_without_room_holds_the_guest_back_and_loses_what_waits_too_long() {
    let (mut guest, peer) = Guest::ready();
    let frame = frame_to(PEER, MAC, &[3; 1400]);
    let message = rndis_packet(&frame, &[]);
    let memory = guest.send.as_ref().unwrap().memory().unwrap().clone();
    memory.write(0, &message).unwrap();
    let send = words(&[107, 0, 0, message.len() as u32]);
    let before = guest.channel().counters().completions_received;
    // More than the cable holds.
    let mut sent = 0;
    for _ in 0..1100 {
        if guest
            .channel()
            .allocate_packet()
            .unwrap()
            .send_transaction(&send)
            .is_ok()
        {
            sent += 1;
        }
        guest.vm.machine.settle();
        let answered = guest.channel().counters().completions_received - before;
        if sent - answered > 30 {
            break;
        }
    }
    let answered = |guest: &Guest| guest.channel().counters().completions_received - before;
    assert_eq!(sent - answered(&guest), 31, "these wait");
    assert_eq!(guest.nic.counters().sent_dropped, 0);
    // Control messages do not wait.
    assert_eq!(guest.query_u32(0x0001_010E), 0x0B);
    // There is room again.
    let mut count = 0;
    while peer.receive().is_some() {
        count += 1;
        guest.vm.machine.settle();
    }
    assert_eq!(count, sent);
    assert_eq!(answered(&guest), sent + 1, "and the control message");
    // Nobody makes room: what has waited for a tenth of a second is lost.
    let mut lost = 0;
    while guest.nic.counters().sent_dropped == 0 {
        assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(1));
        lost += 1;
        assert!(lost < 2000);
    }
    assert!(guest.vm.machine.reference_time() < 10 * SECOND);
    assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(1), "at once");
    assert_eq!(
        std::iter::from_fn(|| peer.receive()).count() as u64,
        lost - 1
    );
    guest.assert_fine();
}

#[test]
fn what_one_packet_becomes_is_bounded() {
    let (guest, peer) = Guest::ready();
    let small = frame_to(PEER, MAC, &[0; 50]);
    while guest.nic.counters().sent_frames < 1024 {
        assert_eq!(guest.send(How::Section(0), &small, &[]), Some(1));
    }
    // Headers of IPv6 before the TCP header that are as long as a frame can be, and as little data in each as there can be.
    let plain = tcp(&[7; 56 << 10], true);
    let (ethernet, tcp) = (&plain[..54], &plain[54..]);
    let mut frame = ethernet.to_vec();
    frame[20] = 0;
    frame.extend([6, 160]);
    frame.extend([0; 8 * 161 - 2]);
    frame.extend(tcp);
    let message = rndis_packet(&frame, &[(2, 1 << 30 | 28)]);
    // The answer waits behind the frames.
    let asked = guest.begin(&message);
    guest.vm.machine.settle();
    let dropped = guest.nic.counters().sent_dropped;
    assert!(dropped > 0, "there is no room for all");
    let mut frames = 0;
    let mut kept = 0;
    while let Some(frame) = peer.receive() {
        frames += 1;
        kept += frame.len();
        guest.vm.machine.settle();
    }
    assert_eq!(guest.nic.counters().sent_dropped, dropped);
    assert!(
        frames > 1024 && kept <= (2 << 20) + 1024 * 64,
        "{kept} bytes"
    );
    guest.vm.vmbus.client().block_on(asked).unwrap().unwrap();
    guest.assert_fine();
}

#[test]
fn frames_of_a_card_without_a_cable_are_lost_and_counted() {
    let (guest, peer) = Guest::ready();
    guest.nic.set_link(false);
    let frame = frame_to(PEER, MAC, b"lost");
    assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(1));
    assert_eq!(peer.receive(), None);
    guest.nic.set_link(true);
    assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(1));
    assert_eq!(peer.receive(), Some(frame.clone()));
    drop(peer);
    assert_eq!(guest.send(How::Section(0), &frame, &[]), Some(1));
    let counters = guest.nic.counters();
    assert_eq!((counters.sent_frames, counters.sent_link_down), (1, 2));
}

#[test]
fn a_capture_has_the_frames_as_the_network_sees_them() {
    type Written = std::sync::Arc<std::sync::Mutex<Vec<(Direction, Vec<u8>)>>>;
    struct Notes(Written);
    impl Capture for Notes {
        fn frame(&mut self, direction: Direction, frame: &[u8]) {
            self.0.lock().unwrap().push((direction, frame.to_vec()));
        }
    }
    let (guest, peer) = Guest::ready();
    let written = Written::default();
    guest
        .nic
        .set_capture(Some(Box::new(Notes(written.clone()))));
    let out = frame_to(PEER, MAC, b"out");
    guest.send(How::Section(0), &out, &[(6, 5 << 4)]);
    let back = frame_to(MAC, PEER, b"back");
    peer.send(&back).unwrap();
    assert_eq!(guest.frames().len(), 1);
    let tagged = peer.receive().unwrap();
    assert_eq!(
        *written.lock().unwrap(),
        [(Direction::Sent, tagged), (Direction::Received, back)]
    );
}
