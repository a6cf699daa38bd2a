//! What a guest without manners can make the host keep: a bounded amount, however long it goes on.

use vmbus::ids::{ChannelId, PAGE_SIZE, PageNumber};
use vmbus::protocol::message::{
    CloseChannel, ContactTarget, GpadlBody, GpadlHeader, GpadlTeardown, InitiateContact,
    OpenChannel, RangeHeader, RequestOffers,
};
use vmbus::protocol::{Body, LEGACY_CONNECTION, MessageType, Payload, Version};
use vmbus::shared::SharedPages;
use vmbus_host::bus::{Device, HvStatus, Profile};
use vmbus_host::host::Host;
use vmbus_host::memory::GuestMemory;
use vmbus_host::provider::Manual;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use crate::support::{INSTANCE, INTERFACE};

/// The first of the guest's pages.
const FIRST: u64 = 0x100;

/// Pages of both rings.
const RINGS: usize = 4;

/// A guest that writes its messages by hand.
struct Guest {
    host: Host,
    id: ChannelId,
    memory: SharedPages,
}

impl Guest {
    /// One that is connected, and has been offered a device.
    fn new() -> Self {
        let memory = SharedPages::from_heap(PageNumber(FIRST), RINGS).unwrap();
        let pages = GuestMemory::default();
        pages.add(&memory);
        let mut host = Host::new(Profile::hyper_v(), pages);
        let id = host.add(Device::new(INTERFACE, INSTANCE), Manual).unwrap();
        let mut guest = Self { host, id, memory };
        guest.say(&InitiateContact {
            version: U32::new(Version::V4_0.0),
            target_vp: U32::ZERO,
            target: ContactTarget::new_zeroed(),
            parent_to_child_monitor: U64::ZERO,
            child_to_parent_monitor: U64::ZERO,
        });
        guest.say(&RequestOffers {});
        guest
    }

    /// Posts a message; gives the types of the answers, and the last word of each.
    fn post(&mut self, message: &[u8]) -> Vec<(MessageType, u32)> {
        let status = self.host.post(1, LEGACY_CONNECTION, message);
        assert_eq!(status, HvStatus::SUCCESS);
        while self.host.run(1).busy {}
        std::iter::from_fn(|| self.host.poll_message(1))
            .map(|message| {
                let kind = MessageType(u32::from_le_bytes(*message.payload.first_chunk().unwrap()));
                let status = message.payload.get(16..20).unwrap_or(&[0; 4]);
                (kind, u32::from_le_bytes(*status.first_chunk().unwrap()))
            })
            .collect()
    }

    fn say<B: Body>(&mut self, body: &B) -> Vec<(MessageType, u32)> {
        self.post(&Payload::new(body))
    }

    /// Lends pages, as many as one message has room for and are said to be there in all.
    fn lend(&mut self, handle: u32, pages: u16, said: u16) -> Vec<(MessageType, u32)> {
        let mut message = Payload::new(&GpadlHeader {
            channel: U32::new(self.id.0),
            gpadl: U32::new(handle),
            range_bytes: U16::new(8 + 8 * said),
            range_count: U16::new(1),
        });
        let range = RangeHeader {
            byte_count: U32::new(u32::from(said) * PAGE_SIZE as u32),
            byte_offset: U32::ZERO,
        };
        assert!(message.append(range.as_bytes()));
        for page in 0..u64::from(pages) {
            assert!(message.append(&(FIRST + page).to_le_bytes()));
        }
        self.post(&message)
    }
}

#[test]
fn a_channel_that_is_opened_and_closed_with_the_same_rings_leaves_nothing_behind() {
    let mut guest = Guest::new();
    let pages = RINGS as u16;
    let created = guest.lend(1, pages, pages);
    assert_eq!(created, [(MessageType::GPADL_CREATED, 0)]);
    let mut handles = Vec::new();
    for open_id in 0..20 {
        let opened = guest.say(&OpenChannel {
            channel: U32::new(guest.id.0),
            open_id: U32::new(open_id),
            ring: U32::new(1),
            target_vp: U32::ZERO,
            downstream_page: U32::new(2),
            user_data: [0; 120],
        });
        assert_eq!(opened, [(MessageType::OPEN_CHANNEL_RESULT, 0)]);
        guest.say(&CloseChannel {
            channel: U32::new(guest.id.0),
        });
        handles.push(guest.memory.handle_count());
    }
    assert!(
        handles.iter().all(|count| *count == handles[0]),
        "{handles:?}"
    );
    guest.say(&GpadlTeardown {
        channel: U32::new(guest.id.0),
        gpadl: U32::new(1),
    });
    assert_eq!(guest.memory.handle_count(), 1, "the guest's own");
}

#[test]
fn a_guest_that_lends_the_same_pages_for_ever_is_refused_in_the_end() {
    // Whole ones, and those of which the rest never comes.
    for (pages, said) in [(1, 1), (20, 8000)] {
        let mut guest = Guest::new();
        let mut handle = 0;
        let refused = loop {
            handle += 1;
            assert!(handle < 1 << 14, "the host takes them all");
            let answers = guest.lend(handle, pages, said);
            let refused =
                |(kind, status): &(_, u32)| *kind == MessageType::GPADL_CREATED && *status != 0;
            if answers.iter().any(refused) {
                break handle;
            }
        };
        let kept = guest.host.server().gpadl_count();
        // Room for every ring and buffer of a guest in good order: for all channels, or for 4 GiB.
        let pages_kept = kept * usize::from(said);
        assert!(kept >= 2048 || pages_kept >= 1 << 19, "{kept}");
        // One that was given up has no rest.
        let body = GpadlBody {
            number: U32::ZERO,
            gpadl: U32::new(refused),
        };
        assert_eq!(guest.say(&body), []);
        assert_eq!(guest.host.server().gpadl_count(), kept);
        if said == pages {
            guest.say(&GpadlTeardown {
                channel: U32::new(guest.id.0),
                gpadl: U32::new(1),
            });
            let again = guest.lend(1, pages, said);
            assert_eq!(
                again,
                [(MessageType::GPADL_CREATED, 0)],
                "there is room again"
            );
        }
    }
}
