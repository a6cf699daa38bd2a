//! A device that was taken away and comes back: offered once the guest has given its old channel number back.

use vmbus::ids::ChannelId;
use vmbus::protocol::message::{
    Body, GpadlHeader, InitiateContact, OfferChannel, RelidReleased, RequestOffers,
};
use vmbus::protocol::{LEGACY_CONNECTION, Payload, Version};
use vmbus_host::bus::{Device, Event, HvStatus, Profile, Server};
use zerocopy::{FromZeros, IntoBytes};

use crate::support::{INSTANCE, INTERFACE};

/// A guest's end by hand.
struct Guest {
    server: Server,
}

impl Guest {
    /// Has asked for the offers of a host with one device.
    fn new(profile: Profile) -> (Self, ChannelId) {
        let mut guest = Self {
            server: Server::new(profile),
        };
        let id = guest.add();
        let mut contact = InitiateContact::new_zeroed();
        contact.version.set(Version::V4_0.0);
        guest.post(&contact);
        guest.post(&RequestOffers {});
        assert_eq!(guest.offers(), [id]);
        (guest, id)
    }

    fn add(&mut self) -> ChannelId {
        let device = Device::new(INTERFACE, INSTANCE);
        self.server.add(device).expect("a number is free")
    }

    fn post<B: Body>(&mut self, body: &B) {
        self.post_bytes(&Payload::new(body));
    }

    fn post_bytes(&mut self, payload: &[u8]) {
        let status = self.server.post(0, LEGACY_CONNECTION, payload);
        assert_eq!(status, HvStatus::SUCCESS);
        self.server.run(0);
    }

    fn release(&mut self, id: ChannelId) {
        self.post(&RelidReleased {
            channel: id.0.into(),
        });
    }

    /// The channels that have been offered.
    fn offers(&mut self) -> Vec<ChannelId> {
        self.server.run(0);
        let messages = std::iter::from_fn(|| self.server.poll_message(0));
        let offers = messages.filter_map(|message| {
            let (offer, _) = OfferChannel::parse(&message.payload)?;
            Some(ChannelId(offer.channel.get()))
        });
        offers.collect()
    }

    fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.server.poll_event()).collect()
    }
}

#[test]
fn a_device_that_comes_back_waits_for_its_old_number() {
    let (mut guest, old) = Guest::new(Profile::hyper_v());
    assert!(guest.server.rescind(old));
    let new = guest.add();
    assert_ne!(new, old, "the old number is the guest's");
    assert!(guest.server.is_offered(new));
    assert_eq!(guest.offers(), []);
    guest.release(old);
    assert_eq!(guest.offers(), [new]);
}

#[test]
fn a_host_that_does_not_heed_the_message_does_not_wait_for_it() {
    let (mut guest, old) = Guest::new(Profile::qemu());
    guest.server.rescind(old);
    let new = guest.add();
    assert_eq!(guest.offers(), [new]);
}

#[test]
fn a_number_that_the_guest_does_not_know_yet_is_no_channel_for_it() {
    let (mut guest, old) = Guest::new(Profile::hyper_v());
    guest.server.rescind(old);
    let new = guest.add();
    guest.events();
    guest.release(new);
    let refused = guest.events();
    assert!(
        matches!(refused[..], [Event::Dropped { reason, .. }] if reason == "no such channel"),
        "{refused:?}"
    );
}

#[test]
fn a_device_that_goes_while_it_waits_is_not_mentioned() {
    let (mut guest, old) = Guest::new(Profile::hyper_v());
    guest.server.rescind(old);
    let second = guest.add();
    assert!(guest.server.rescind(second));
    assert!(!guest.server.is_offered(second));
    let third = guest.add();
    guest.release(old);
    assert_eq!(guest.offers(), [third]);
    let mut rescinds = std::iter::from_fn(|| guest.server.poll_message(0));
    assert!(rescinds.next().is_none());
}

#[test]
fn a_guest_that_starts_anew_waits_for_nothing() {
    let (mut guest, old) = Guest::new(Profile::hyper_v());
    guest.server.rescind(old);
    let new = guest.add();
    guest.server.reset();
    let mut contact = InitiateContact::new_zeroed();
    contact.version.set(Version::V4_0.0);
    guest.post(&contact);
    guest.post(&RequestOffers {});
    assert_eq!(guest.offers(), [new]);
}

/// As Linux does: it sends no GPADL_TEARDOWN for a channel that was taken away.
#[test]
fn a_number_that_is_given_back_takes_its_gpadls_along() {
    let (mut guest, id) = Guest::new(Profile::hyper_v());
    let mut header = GpadlHeader::new_zeroed();
    header.channel.set(id.0);
    header.gpadl.set(7);
    // One range of one page: its length, its offset, its page.
    header.range_bytes.set(16);
    header.range_count.set(1);
    let mut message = Payload::new(&header).to_vec();
    message.extend_from_slice([4096_u32, 0].as_bytes());
    message.extend_from_slice(3_u64.as_bytes());
    guest.post_bytes(&message);
    assert_eq!(guest.server.gpadl_count(), 1);
    guest.server.rescind(id);
    guest.events();
    guest.release(id);
    assert_eq!(guest.server.gpadl_count(), 0);
    let events = guest.events();
    assert!(
        matches!(events[..], [Event::GpadlTornDown(handle), Event::Released(released)] if handle.0 == 7 && released == id),
        "{events:?}"
    );
}
