//! One message slot of a SIM page, and how to empty it (TLFS, Inter-Partition Communication; spec
//! tlfs.md 5.1 and 5.2).
//!
//! The slot holds one message; while it is full the hypervisor queues the next ones and sets a
//! flag in the slot. The order of the steps in `take` is what keeps the queue moving.

#![forbid(unsafe_code)]

use core::fmt;
use core::mem::offset_of;
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Most bytes that a message carries.
pub const MAX_PAYLOAD: usize = 240;

/// What a message is about. The host posts types with bit 31 clear, the hypervisor itself sends
/// the others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MessageType(pub u32);

impl MessageType {
    /// No message.
    pub const NONE: Self = Self(0);
    /// A message of VMBus channel management.
    pub const CHANNEL: Self = Self(1);
    /// A synthetic timer has expired.
    pub const TIMER_EXPIRED: Self = Self(0x8000_0010);
}

impl fmt::Debug for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => f.write_str("none"),
            Self::CHANNEL => f.write_str("channel"),
            Self::TIMER_EXPIRED => f.write_str("timer expired"),
            Self(other) => write!(f, "{other:#010x}"),
        }
    }
}

/// A message, copied out of its slot.
#[derive(Clone, Debug)]
pub struct Message {
    /// What it is about.
    pub kind: MessageType,
    /// Where it comes from: a port id for a posted message, 0 for a timer.
    pub origin: u64,
    length: u8,
    payload: Payload,
}

/// Aligned, so that the structures in it can be viewed in place.
#[derive(Clone, Debug)]
#[repr(align(8))]
struct Payload([u8; MAX_PAYLOAD]);

impl Message {
    /// The bytes that it carries, at most 240.
    pub fn payload(&self) -> &[u8] {
        self.payload
            .0
            .get(..usize::from(self.length))
            .unwrap_or(&self.payload.0)
    }
}

/// A message slot as the hypervisor fills it.
#[repr(C)]
pub(super) struct MessageSlot {
    kind: AtomicU32,
    payload_size: AtomicU8,
    flags: AtomicU8,
    reserved: AtomicU16,
    origin: AtomicU64,
    payload: [AtomicU64; MAX_PAYLOAD / 8],
}

/// The SIM page: one slot for each SINT.
#[repr(C)]
pub(super) struct MessagePage {
    pub(super) slots: [MessageSlot; 16],
}

const _: () = {
    assert!(size_of::<MessageSlot>() == 256);
    assert!(offset_of!(MessageSlot, flags) == 5);
    assert!(offset_of!(MessageSlot, origin) == 8);
    assert!(offset_of!(MessageSlot, payload) == 16);
    assert!(size_of::<MessagePage>() == 4096);
};

/// Slot flags bit 0: the hypervisor has more messages for this slot.
const MESSAGE_PENDING: u8 = 1 << 0;

/// The accesses to a slot that the receive protocol is made of.
pub(super) trait Slot {
    /// The type of the message in the slot. What is read after it is that message or a later one.
    fn kind(&self) -> MessageType;
    /// The rest of the message: origin, and as much payload as the slot says there is.
    fn copy(&self, kind: MessageType) -> Message;
    /// Empties the slot if it still holds a message of type `kind`.
    fn release(&self, kind: MessageType) -> bool;
    /// Whether the hypervisor waits for an end of message.
    fn pending(&self) -> bool;
}

impl Slot for MessageSlot {
    fn kind(&self) -> MessageType {
        MessageType(self.kind.load(Ordering::Acquire))
    }

    fn copy(&self, kind: MessageType) -> Message {
        // Read once; a size that cannot be is cut to what a slot can hold.
        let length = self
            .payload_size
            .load(Ordering::Relaxed)
            .min(MAX_PAYLOAD as u8);
        let mut payload = Payload([0; MAX_PAYLOAD]);
        let words = usize::from(length).div_ceil(8);
        for (bytes, word) in payload.0.chunks_exact_mut(8).zip(&self.payload).take(words) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        Message {
            kind,
            origin: self.origin.load(Ordering::Relaxed),
            length,
            payload,
        }
    }

    fn release(&self, kind: MessageType) -> bool {
        // Only if it is still the same: a panicking VP that empties the slots of others must not
        // wipe out a message that nobody has copied.
        self.kind
            .compare_exchange(kind.0, 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    fn pending(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & MESSAGE_PENDING != 0
    }
}

/// Takes the message out of a slot, if there is one. Calls `end_of_message` when the hypervisor
/// waits for room.
///
/// The flag is read after the slot is empty, with a full fence between: the hypervisor sets the
/// flag, then looks at the slot again. In this order at least one side sees the other.
pub(super) fn take<S: Slot>(slot: &S, end_of_message: impl FnOnce()) -> Option<Message> {
    let kind = slot.kind();
    if kind == MessageType::NONE {
        return None;
    }
    let message = slot.copy(kind);
    if !slot.release(kind) {
        return None;
    }
    fence(Ordering::SeqCst);
    if slot.pending() {
        end_of_message();
    }
    Some(message)
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::VecDeque;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    fn empty_slot() -> MessageSlot {
        MessageSlot {
            kind: AtomicU32::new(0),
            payload_size: AtomicU8::new(0),
            flags: AtomicU8::new(0),
            reserved: AtomicU16::new(0),
            origin: AtomicU64::new(0),
            payload: [const { AtomicU64::new(0) }; MAX_PAYLOAD / 8],
        }
    }

    /// Where the host is on its way through the delivery rule (spec tlfs.md 5.3).
    #[derive(Clone, Copy, PartialEq)]
    enum Delivery {
        Idle,
        /// Has been asked to deliver.
        Look,
        /// Has found the slot full.
        Flag,
        /// Has set the flag and looks once more.
        LookAgain,
    }

    /// A hypervisor that delivers its queue through the slot, one access at a time.
    struct Host {
        queue: VecDeque<u32>,
        delivery: Delivery,
        interrupts: u32,
    }

    impl Host {
        fn post(&mut self, number: u32) {
            self.queue.push_back(number);
            self.wake();
        }

        fn wake(&mut self) {
            if self.delivery == Delivery::Idle {
                self.delivery = Delivery::Look;
            }
        }

        fn step(&mut self, slot: &MessageSlot) {
            let full = slot.kind.load(Ordering::SeqCst) != 0;
            self.delivery = match self.delivery {
                Delivery::Idle => Delivery::Idle,
                Delivery::Look | Delivery::LookAgain if self.queue.is_empty() => Delivery::Idle,
                Delivery::Look if full => Delivery::Flag,
                Delivery::LookAgain if full => Delivery::Idle,
                Delivery::Flag => {
                    slot.flags.fetch_or(MESSAGE_PENDING, Ordering::SeqCst);
                    Delivery::LookAgain
                }
                Delivery::Look | Delivery::LookAgain => {
                    let number = self.queue.pop_front().unwrap();
                    slot.payload[0].store(u64::from(number), Ordering::Relaxed);
                    slot.payload_size.store(8, Ordering::Relaxed);
                    slot.flags.store(0, Ordering::Relaxed);
                    slot.kind.store(1, Ordering::Release);
                    self.interrupts += 1;
                    if self.queue.is_empty() {
                        Delivery::Idle
                    } else {
                        Delivery::Look
                    }
                }
            };
        }
    }

    /// A slot whose host acts between any two accesses of the guest, as `schedule` says.
    struct Shared<'a> {
        slot: MessageSlot,
        host: RefCell<Host>,
        schedule: RefCell<&'a [u8]>,
        next: Cell<u32>,
        total: u32,
    }

    impl<'a> Shared<'a> {
        fn new(total: u32, schedule: &'a [u8]) -> Self {
            let host = Host {
                queue: VecDeque::new(),
                delivery: Delivery::Idle,
                interrupts: 0,
            };
            Self {
                slot: empty_slot(),
                host: host.into(),
                schedule: schedule.into(),
                next: 0.into(),
                total,
            }
        }

        fn post(&self) {
            if self.next.get() < self.total {
                self.host.borrow_mut().post(self.next.get());
                self.next.set(self.next.get() + 1);
            }
        }

        /// Lets the host do 0 to 4 things.
        fn interleave(&self) {
            let schedule = *self.schedule.borrow();
            let Some((&byte, rest)) = schedule.split_first() else {
                return;
            };
            *self.schedule.borrow_mut() = rest;
            for bits in [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6 & 3] {
                match bits {
                    0 | 1 => {}
                    2 => self.host.borrow_mut().step(&self.slot),
                    _ => self.post(),
                }
            }
        }

        /// The guest's interrupt handler runs as often as the host raises it; between that the
        /// host runs until it has nothing to do.
        fn run(&self, mut handle: impl FnMut(&Self)) {
            loop {
                self.interleave();
                let idle = {
                    let mut host = self.host.borrow_mut();
                    host.step(&self.slot);
                    host.delivery == Delivery::Idle
                };
                if std::mem::take(&mut self.host.borrow_mut().interrupts) > 0 {
                    handle(self);
                } else if idle {
                    if self.next.get() == self.total {
                        return;
                    }
                    self.post();
                }
            }
        }

        fn end_of_message(&self) {
            self.host.borrow_mut().wake();
        }
    }

    impl Slot for Shared<'_> {
        fn kind(&self) -> MessageType {
            self.interleave();
            self.slot.kind()
        }

        fn copy(&self, kind: MessageType) -> Message {
            self.interleave();
            self.slot.copy(kind)
        }

        fn release(&self, kind: MessageType) -> bool {
            self.interleave();
            self.slot.release(kind)
        }

        fn pending(&self) -> bool {
            self.interleave();
            self.slot.pending()
        }
    }

    fn number(message: &Message) -> u32 {
        assert_eq!(message.kind, MessageType::CHANNEL);
        u32::from_le_bytes(message.payload()[..4].try_into().unwrap())
    }

    /// The receive protocol with the one mistake that it warns of: the flag is read before the
    /// slot is empty.
    fn take_in_wrong_order<S: Slot>(slot: &S, end_of_message: impl FnOnce()) -> Option<Message> {
        let kind = slot.kind();
        if kind == MessageType::NONE {
            return None;
        }
        let message = slot.copy(kind);
        let pending = slot.pending();
        slot.release(kind);
        if pending {
            end_of_message();
        }
        Some(message)
    }

    proptest! {
        #[test]
        fn every_message_arrives_once_and_in_order(
            total in 0_u32..12,
            schedule in proptest::collection::vec(any::<u8>(), 0..200),
            drain in any::<bool>(),
        ) {
            let shared = Shared::new(total, &schedule);
            let mut received = Vec::new();
            shared.run(|shared| {
                while let Some(message) = take(shared, || shared.end_of_message()) {
                    received.push(number(&message));
                    if !drain {
                        break;
                    }
                }
            });
            prop_assert_eq!(received, (0..total).collect::<Vec<_>>());
        }
    }

    /// Receives two messages, the second of which the host tries to deliver, and gives up on, just
    /// before the guest's access number `at`.
    fn receive_with_burst(at: usize, take: impl Fn(&Shared<'_>) -> Option<Message>) -> Vec<u32> {
        // Post, look, set the flag, look again.
        const BURST: u8 = 0b10_10_10_11;
        let mut schedule = [0; 16];
        schedule[at] = BURST;
        let shared = Shared::new(2, &schedule);
        let mut received = Vec::new();
        shared.run(|shared| received.extend(take(shared).as_ref().map(number)));
        received
    }

    #[test]
    fn the_fake_host_catches_the_wrong_order() {
        let right = |shared: &Shared<'_>| take(shared, || shared.end_of_message());
        let wrong = |shared: &Shared<'_>| take_in_wrong_order(shared, || shared.end_of_message());
        assert!((0..16).all(|at| receive_with_burst(at, right) == [0, 1]));
        let stuck = (0..16)
            .filter(|&at| receive_with_burst(at, wrong) == [0])
            .count();
        assert_eq!(
            stuck, 1,
            "between the look at the flag and the release of the slot"
        );
    }

    #[test]
    fn impossible_size_is_cut() {
        let slot = empty_slot();
        slot.payload_size.store(255, Ordering::Relaxed);
        slot.payload[29].store(u64::MAX, Ordering::Relaxed);
        slot.kind.store(1, Ordering::Relaxed);
        let message = take(&slot, || panic!("nothing is pending")).unwrap();
        assert_eq!(message.payload().len(), MAX_PAYLOAD);
        assert_eq!(message.payload()[239], 0xFF);
    }

    #[test]
    fn only_the_payload_is_copied() {
        let slot = empty_slot();
        slot.payload[0].store(0x0807_0605_0403_0201, Ordering::Relaxed);
        slot.payload[1].store(u64::MAX, Ordering::Relaxed);
        slot.payload_size.store(5, Ordering::Relaxed);
        slot.origin.store(7, Ordering::Relaxed);
        slot.kind.store(0x8000_0010, Ordering::Relaxed);
        let message = take(&slot, || panic!("nothing is pending")).unwrap();
        assert_eq!(message.kind, MessageType::TIMER_EXPIRED);
        assert_eq!(message.origin, 7);
        assert_eq!(message.payload(), [1, 2, 3, 4, 5]);
        assert!(take(&slot, || panic!("the slot is empty")).is_none());
    }

    #[test]
    fn a_message_that_another_vp_took_is_not_taken_again() {
        struct Raced(MessageSlot);
        impl Slot for Raced {
            fn kind(&self) -> MessageType {
                self.0.kind()
            }
            fn copy(&self, kind: MessageType) -> Message {
                let message = self.0.copy(kind);
                // Meanwhile a panicking VP empties the slot and the host puts a timer message into
                // it.
                self.0
                    .kind
                    .store(MessageType::TIMER_EXPIRED.0, Ordering::Relaxed);
                message
            }
            fn release(&self, kind: MessageType) -> bool {
                self.0.release(kind)
            }
            fn pending(&self) -> bool {
                panic!("the slot was not emptied")
            }
        }
        let raced = Raced(empty_slot());
        raced.0.kind.store(1, Ordering::Relaxed);
        assert!(take(&raced, || panic!("the slot was not emptied")).is_none());
        assert_eq!(raced.0.kind(), MessageType::TIMER_EXPIRED);
    }
}
