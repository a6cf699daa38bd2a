//! Cards that are taken away in good order while their guest uses them.

use vmbus_host::network::Netvsp;
use vmbus_host::network::backend::Backend;
use vmbus_host::network::nvsp::Version;

use crate::guest::{Guest, How, MAC, PEER, frame_to, word};
use crate::support::INSTANCE;

/// A second in units of 100 ns.
const SECOND: u64 = 10_000_000;

/// RNDIS_STATUS_MEDIA_DISCONNECT.
const DISCONNECTED: u32 = 0x4001_000C;

fn take_away(guest: &Guest) {
    assert!(guest.vm.machine.host(|host| host.take_away(guest.id)));
    guest.vm.machine.settle();
}

fn is_offered(guest: &Guest) -> bool {
    let server = |id| guest.vm.machine.server(|server| server.is_offered(id));
    server(guest.id)
}

fn pass(guest: &Guest, time: u64) {
    guest.vm.machine.advance(time);
    guest.vm.machine.settle();
}

#[test]
fn a_guest_gives_back_and_gets_back_everything_before_its_card_goes() {
    let (mut guest, peer) = Guest::ready();
    guest.add_channels(1);
    guest.keep(true);
    peer.send(&frame_to(MAC, PEER, b"before")).unwrap();
    assert_eq!(guest.frames().len(), 1);
    take_away(&guest);
    let told = guest.message().map(|message| word(&message, 8));
    assert_eq!(told, Some(DISCONNECTED));
    // Nothing comes or goes any more, and what is sent is answered all the same.
    peer.send(&frame_to(MAC, PEER, b"after")).unwrap();
    assert_eq!(guest.frames(), []);
    let frame = frame_to(PEER, MAC, b"late");
    assert_eq!(guest.send(How::Pages, &frame, &[]), Some(1));
    assert_eq!(peer.receive(), None);
    pass(&guest, 5 * SECOND);
    assert!(is_offered(&guest), "the guest still has a frame");
    guest.complete_kept(usize::MAX);
    pass(&guest, 2 * SECOND);
    assert!(is_offered(&guest), "it may not have heard of the link yet");
    pass(&guest, SECOND);
    assert!(!is_offered(&guest));
    guest.assert_fine();
}

#[test]
fn a_guest_that_gives_nothing_back_does_not_keep_a_card() {
    let (guest, peer) = Guest::ready();
    guest.keep(true);
    peer.send(&frame_to(MAC, PEER, b"kept")).unwrap();
    assert_eq!(guest.frames().len(), 1);
    take_away(&guest);
    pass(&guest, 29 * SECOND);
    assert!(is_offered(&guest));
    pass(&guest, 2 * SECOND);
    assert!(!is_offered(&guest));
}

#[test]
fn a_card_that_comes_back_has_its_link() {
    let (guest, peer) = Guest::ready();
    take_away(&guest);
    assert!(!guest.nic.link_up());
    pass(&guest, 3 * SECOND);
    assert!(!is_offered(&guest));
    let provider = Netvsp::new(guest.nic.clone());
    let device = Netvsp::device(INSTANCE);
    guest.vm.machine.add(device, provider).unwrap();
    let mut guest = guest.again();
    guest.set_up(Version::V6_1);
    assert!(guest.nic.link_up());
    peer.send(&frame_to(MAC, PEER, b"again")).unwrap();
    guest.query_u32(0x0001_010E);
    assert_eq!(guest.message(), None);
}
