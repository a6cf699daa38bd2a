//! The pages of a VP's SynIC: event flags and message slots (spec tlfs.md 5).
//!
//! KVM keeps the registers and raises the interrupts; what is in the pages is written here.

use std::sync::atomic::{Ordering, fence};

use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus::shared::SharedPages;
use vmbus_host::memory::GuestMemory;

const ENABLED: u64 = 1;
/// Bytes of a message slot, and of the event flags of one SINT.
const SLOT: usize = 256;
/// Synthetic interrupt sources.
pub const SINTS: u8 = 16;
/// Bytes of a message's header.
const HEADER: usize = 16;
/// The most that a message carries.
const MAX_PAYLOAD: usize = 240;
/// The type of the messages of a VMBus.
const CHANNEL_MESSAGE: u32 = 1;
/// In a slot's flags: there are more messages.
const PENDING: u32 = 1 << 8;

/// A page that the guest has named, and where in its run it is.
#[derive(Debug)]
struct Page {
    run: SharedPages,
    offset: usize,
}

/// What became of a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Delivery {
    /// It is in its slot: interrupt the VP.
    Done,
    /// The slot is taken. The guest will write EOM when it has emptied it.
    SlotTaken,
    /// The guest takes no messages, or there is no such slot: the message is lost.
    Lost,
}

/// The state of one VP's SynIC, as far as it is needed here.
#[derive(Debug, Default)]
pub struct Synic {
    enabled: bool,
    events: Option<Page>,
    messages: Option<Page>,
}

impl Synic {
    /// The guest has written a register.
    pub fn update(
        &mut self,
        control: u64,
        event_page: u64,
        message_page: u64,
        memory: &GuestMemory,
    ) {
        let page = |register: u64| {
            let number = PageNumber(register / PAGE_SIZE as u64);
            let (run, index) = memory.find(number).filter(|_| register & ENABLED != 0)?;
            let offset = index * PAGE_SIZE;
            Some(Page { run, offset })
        };
        self.enabled = control & ENABLED != 0;
        self.events = page(event_page);
        self.messages = page(message_page);
    }

    /// Sets an event flag. `Some(true)`: it was clear, interrupt the VP. `None`: the guest takes no events, or there is no
    /// such flag.
    pub fn set_event_flag(&self, sint: u8, flag: u16) -> Option<bool> {
        let page = self.events.as_ref().filter(|_| self.enabled)?;
        if sint >= SINTS || usize::from(flag) >= SLOT * 8 {
            return None;
        }
        let word = usize::from(flag) / 64 * 8;
        let at = page.offset + usize::from(sint) * SLOT + word;
        let bit = 1 << (flag % 64);
        let word = page.run.atomic_u64(at).ok()?;
        Some(word.fetch_or(bit, Ordering::SeqCst) & bit == 0)
    }

    /// Puts a message into its slot. To be called on the VP's own thread while it does not run: KVM writes to the
    /// slots there, too.
    pub fn deliver(&self, sint: u8, payload: &[u8]) -> Delivery {
        self.try_deliver(sint, payload).unwrap_or(Delivery::Lost)
    }

    fn try_deliver(&self, sint: u8, payload: &[u8]) -> Option<Delivery> {
        let page = self.messages.as_ref().filter(|_| self.enabled)?;
        if sint >= SINTS || payload.len() > MAX_PAYLOAD {
            return None;
        }
        let slot = page.offset + usize::from(sint) * SLOT;
        let kind = page.run.atomic_u32(slot).ok()?;
        // Payload size, flags and two reserved bytes.
        let size = page.run.atomic_u32(slot + 4).ok()?;
        if kind.load(Ordering::SeqCst) != 0 {
            size.fetch_or(PENDING, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            // Emptied between the two looks, the guest may not have seen the flag and writes no EOM.
            if kind.load(Ordering::SeqCst) != 0 {
                return Some(Delivery::SlotTaken);
            }
        }
        page.run.write(slot + HEADER, payload).ok()?;
        // The origin: a port of ours, which has no number.
        page.run
            .atomic_u64(slot + 8)
            .ok()?
            .store(0, Ordering::SeqCst);
        size.store(payload.len() as u32, Ordering::SeqCst);
        kind.store(CHANNEL_MESSAGE, Ordering::Release);
        Some(Delivery::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A SynIC with its event page at page 0x11 and its message page at page 0x12.
    fn synic() -> (SharedPages, GuestMemory, Synic) {
        let memory = GuestMemory::default();
        let pages = SharedPages::from_heap(PageNumber(0x10), 3).unwrap();
        memory.add(&pages);
        let mut synic = Synic::default();
        synic.update(1, 0x1_1001, 0x1_2001, &memory);
        (pages, memory, synic)
    }

    fn bytes<const N: usize>(pages: &SharedPages, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        pages.read(at, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_flag_is_set_where_the_specification_has_it_and_interrupts_once() {
        let (pages, _memory, synic) = synic();
        assert_eq!(synic.set_event_flag(2, 77), Some(true));
        assert_eq!(synic.set_event_flag(2, 77), Some(false));
        assert_eq!(bytes(&pages, 0x1000 + 2 * 256 + 77 / 8), [1 << (77 % 8)]);
        assert_eq!(synic.set_event_flag(2, 2047), Some(true));
        assert_eq!(bytes(&pages, 0x1000 + 2 * 256 + 255), [0x80]);
    }

    #[test]
    fn flags_that_do_not_exist_are_refused() {
        let (_pages, _memory, synic) = synic();
        assert_eq!(synic.set_event_flag(2, 2048), None);
        assert_eq!(synic.set_event_flag(16, 0), None);
    }

    #[test]
    fn a_message_waits_until_its_slot_is_empty() {
        let (pages, _memory, synic) = synic();
        let slot = 0x2000 + 2 * 256;
        assert_eq!(synic.deliver(2, b"first"), Delivery::Done);
        assert_eq!(bytes(&pages, slot), [1, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(&bytes::<5>(&pages, slot + 16), b"first");
        assert_eq!(synic.deliver(2, b"second"), Delivery::SlotTaken);
        assert_eq!(
            bytes(&pages, slot + 5),
            [1],
            "the guest is told that there is more"
        );
        assert_eq!(&bytes::<6>(&pages, slot + 16), b"first\0");
        pages.write(slot, &[0; 4]).unwrap();
        assert_eq!(synic.deliver(2, b"second"), Delivery::Done);
        assert_eq!(bytes(&pages, slot), [1, 0, 0, 0, 6, 0, 0, 0]);
        assert_eq!(&bytes::<6>(&pages, slot + 16), b"second");
        assert_eq!(synic.deliver(3, b"elsewhere"), Delivery::Done);
    }

    #[test]
    fn nothing_is_written_where_the_guest_has_no_page() {
        let (pages, memory, mut synic) = synic();
        for (control, events, messages) in [
            (0, 0x1_1001, 0x1_2001),
            (1, 0x1_1000, 0x1_2000),
            (1, 0x9_9001, u64::MAX),
        ] {
            synic.update(control, events, messages, &memory);
            assert_eq!(synic.set_event_flag(2, 1), None);
            assert_eq!(synic.deliver(2, b"lost"), Delivery::Lost);
        }
        assert_eq!(bytes(&pages, 0), [0; 0x3000]);
    }

    #[test]
    fn messages_that_no_slot_holds_are_lost() {
        let (_pages, _memory, synic) = synic();
        assert_eq!(synic.deliver(2, &[0; 241]), Delivery::Lost);
        assert_eq!(synic.deliver(16, &[0; 1]), Delivery::Lost);
    }
}
