//! Handles: numbers that name objects of the library, checked before anything is done with them.
//!
//! Objects live in slots that never move and are never given back, so looking at one that has ended is harmless: its
//! generation is another. Handles are no addresses, except where the driver gives the memory; those addresses are
//! looked up and not followed. No lock is taken to look one up.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

/// What a handle names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Kind {
    Channel = 0xC1,
    Packet = 0xC2,
    Completion = 0xC3,
    Device = 0xC4,
}

/// A handle in its parts. As a number it is no canonical address, so it cannot be the address of anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Handle {
    pub(super) kind: Kind,
    /// Of the channel's slot, or the device's.
    pub(super) owner: u32,
    /// Of the packet's slot among the channel's; else 0.
    pub(super) index: u32,
    pub(super) generation: u32,
}

const OWNER_BITS: u32 = 14;
const INDEX_BITS: u32 = 20;
const GENERATION_BITS: u32 = 22;

impl Handle {
    pub(super) fn encode(self) -> usize {
        let mut word = self.kind as u64;
        word = word << OWNER_BITS | u64::from(self.owner);
        word = word << INDEX_BITS | u64::from(self.index);
        (word << GENERATION_BITS | u64::from(self.generation)) as usize
    }

    /// The handle in this number, if it can be one of that kind.
    pub(super) fn decode(word: usize, kind: Kind) -> Option<Self> {
        let part = |shift: u32, bits: u32| (word as u64 >> shift) as u32 & ((1 << bits) - 1);
        (part(OWNER_BITS + INDEX_BITS + GENERATION_BITS, 8) == kind as u32).then(|| Self {
            kind,
            owner: part(INDEX_BITS + GENERATION_BITS, OWNER_BITS),
            index: part(GENERATION_BITS, INDEX_BITS),
            generation: part(0, GENERATION_BITS),
        })
    }
}

/// Nobody uses the slot.
pub(super) const FREE: u8 = 0;
/// Somebody works on the slot; nobody else touches it.
pub(super) const BUSY: u8 = 1;

/// A place for an object. What the states above [`BUSY`] mean, and who may touch what in which, is the object's matter.
pub(super) struct Slot<T> {
    /// Generation and state.
    word: AtomicU32,
    pub(super) value: T,
}

impl<T> Slot<T> {
    /// Goes from one state to another, if the object is still that one and in that state.
    pub(super) fn advance(&self, generation: u32, from: u8, to: u8) -> bool {
        self.word
            .compare_exchange(
                generation << 8 | u32::from(from),
                generation << 8 | u32::from(to),
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    /// The object's state, if it is still that one.
    pub(super) fn state(&self, generation: u32) -> Option<u8> {
        let word = self.word.load(Ordering::Acquire);
        let state = (word & 0xFF) as u8;
        (word >> 8 == generation && state != FREE).then_some(state)
    }

    /// Generation and state of whatever is there.
    pub(super) fn current(&self) -> (u32, u8) {
        let word = self.word.load(Ordering::Acquire);
        (word >> 8, (word & 0xFF) as u8)
    }

    /// Takes the slot if nobody uses it, and says which generation its object is.
    fn claim(&self) -> Option<u32> {
        let word = self.word.load(Ordering::Relaxed);
        if word & 0xFF != u32::from(FREE) {
            return None;
        }
        let generation = ((word >> 8) + 1) & ((1 << GENERATION_BITS) - 1);
        self.word
            .compare_exchange(
                word,
                generation << 8 | u32::from(BUSY),
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .ok()
            .map(|_| generation)
    }
}

/// Slots that grow in number and are never given back.
pub(super) struct Slots<T: 'static> {
    /// Piece `k` holds `FIRST << k` slots.
    pieces: [AtomicPtr<Slot<T>>; PIECES],
    /// Where a free one is likely.
    hint: AtomicU32,
}

/// Slots of the first piece.
const FIRST: u32 = 8;
/// Together about a million, which an index has room for.
const PIECES: usize = 17;

impl<T: Default + 'static> Slots<T> {
    pub(super) const fn new() -> Self {
        Self {
            pieces: [const { AtomicPtr::new(ptr::null_mut()) }; PIECES],
            hint: AtomicU32::new(0),
        }
    }

    /// Piece of an index, and place in it.
    fn place(index: u32) -> (usize, usize) {
        let piece = (index / FIRST + 1).ilog2();
        let start = FIRST * ((1 << piece) - 1);
        (piece as usize, (index - start) as usize)
    }

    /// The slot with this index, if there is one by now.
    pub(super) fn get(&self, index: u32) -> Option<&'static Slot<T>> {
        let (piece, at) = Self::place(index);
        let start = self.pieces.get(piece)?.load(Ordering::Acquire);
        if start.is_null() {
            return None;
        }
        // SAFETY: the piece has `FIRST << piece` slots, and `place` gives one of them.
        let slot = unsafe { start.add(at) };
        // SAFETY: pieces are initialised before they are published, and never freed.
        Some(unsafe { &*slot })
    }

    /// Every slot that exists.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &'static Slot<T>)> {
        (0..).map_while(|index| Some((index, self.get(index)?)))
    }

    /// A slot that nobody uses, with its index and new generation, in state [`BUSY`]; below `limit`.
    pub(super) fn claim(&self, limit: u32) -> Option<(u32, u32, &'static Slot<T>)> {
        let hint = self.hint.load(Ordering::Relaxed);
        let try_one = |index: u32| {
            let slot = self.get(index)?;
            Some((index, slot.claim()?, slot))
        };
        if hint < limit
            && let Some(found) = try_one(hint)
        {
            return Some(found);
        }
        let mut index = 0;
        while index < limit {
            if self.get(index).is_none() && !self.grow(index) {
                return None;
            }
            if let Some(found) = try_one(index) {
                self.hint.store(index + 1, Ordering::Relaxed);
                return Some(found);
            }
            index += 1;
        }
        None
    }

    /// Frees a slot whose object has ended. The caller has it in state [`BUSY`] and has emptied it.
    pub(super) fn release(&self, index: u32, slot: &Slot<T>, generation: u32) {
        slot.word
            .store(generation << 8 | u32::from(FREE), Ordering::Release);
        self.hint.store(index, Ordering::Relaxed);
    }

    /// Makes the piece in which this index lies.
    fn grow(&self, index: u32) -> bool {
        let (piece, _) = Self::place(index);
        let Some(place) = self.pieces.get(piece) else {
            return false;
        };
        let count = (FIRST as usize) << piece;
        let mut slots = Vec::new();
        if slots.try_reserve_exact(count).is_err() {
            return false;
        }
        slots.extend((0..count).map(|_| Slot {
            word: AtomicU32::new(u32::from(FREE)),
            value: T::default(),
        }));
        let start = Box::into_raw(slots.into_boxed_slice());
        let null = ptr::null_mut();
        let published =
            place.compare_exchange(null, start.cast(), Ordering::AcqRel, Ordering::Acquire);
        if published.is_err() {
            // Another was faster, perhaps in an interrupt in the middle of this.
            // SAFETY: made above, and nobody has seen it.
            drop(unsafe { Box::from_raw(start) });
        }
        true
    }
}

/// A value that DISPATCH code takes copies of while PASSIVE code replaces it, without a lock.
pub(super) struct Published<T> {
    value: UnsafeCell<Option<T>>,
    readers: AtomicU32,
    replacing: AtomicBool,
}

// SAFETY: the value is cloned only while `readers` counts the reader and nobody replaces it, and replaced only
// while there is no reader and nobody else replaces it.
unsafe impl<T: Send + Sync> Sync for Published<T> {}

impl<T> Default for Published<T> {
    fn default() -> Self {
        Self {
            value: UnsafeCell::new(None),
            readers: AtomicU32::new(0),
            replacing: AtomicBool::new(false),
        }
    }
}

impl<T: Clone> Published<T> {
    /// A copy of the value; none when there is none, or when it is just being replaced.
    pub(super) fn get(&self) -> Option<T> {
        self.readers.fetch_add(1, Ordering::SeqCst);
        let value = if self.replacing.load(Ordering::SeqCst) {
            None
        } else {
            // SAFETY: this reader is counted, so whoever wants to replace the value waits.
            unsafe { &*self.value.get() }.clone()
        };
        self.readers.fetch_sub(1, Ordering::SeqCst);
        value
    }

    /// Replaces the value, and gives the old one. At PASSIVE. Readers are there for a few steps only, so they are waited for.
    pub(super) fn replace(&self, value: Option<T>) -> Option<T> {
        while self.replacing.swap(true, Ordering::SeqCst) {
            core::hint::spin_loop();
        }
        while self.readers.load(Ordering::SeqCst) != 0 {
            core::hint::spin_loop();
        }
        // SAFETY: `replacing` is this caller's, and there is no reader.
        let old = core::mem::replace(unsafe { &mut *self.value.get() }, value);
        self.replacing.store(false, Ordering::SeqCst);
        old
    }
}

/// Objects in the driver's own memory: their handles by their addresses.
pub(super) struct Placed {
    buckets: [Slots<Place>; 32],
}

/// One of them.
#[derive(Default)]
struct Place {
    address: AtomicUsize,
    handle: AtomicUsize,
}

/// The place holds an address.
const HELD: u8 = 2;

impl Placed {
    pub(super) const fn new() -> Self {
        Self {
            buckets: [const { Slots::new() }; 32],
        }
    }

    fn bucket(&self, address: usize) -> &Slots<Place> {
        &self.buckets[(address >> 5 ^ address >> 12) % 32]
    }

    fn find(&self, address: usize) -> Option<(u32, u32, &'static Slot<Place>)> {
        self.bucket(address).all().find_map(|(index, slot)| {
            let (generation, state) = slot.current();
            (state == HELD && slot.value.address.load(Ordering::Relaxed) == address)
                .then_some((index, generation, slot))
        })
    }

    /// The handle of the object at this address.
    pub(super) fn get(&self, address: usize) -> Option<usize> {
        let (_, _, slot) = self.find(address)?;
        Some(slot.value.handle.load(Ordering::Relaxed))
    }

    /// Says which object is at an address from now on. `false` when there is no memory to note it.
    pub(super) fn set(&self, address: usize, handle: usize) -> bool {
        if let Some((_, _, slot)) = self.find(address) {
            slot.value.handle.store(handle, Ordering::Relaxed);
            return true;
        }
        let Some((_, generation, slot)) = self.bucket(address).claim(u32::MAX) else {
            return false;
        };
        slot.value.address.store(address, Ordering::Relaxed);
        slot.value.handle.store(handle, Ordering::Relaxed);
        slot.advance(generation, BUSY, HELD)
    }

    /// Forgets the object at an address.
    pub(super) fn remove(&self, address: usize) {
        if let Some((index, generation, slot)) = self.find(address)
            && slot.advance(generation, HELD, BUSY)
        {
            self.bucket(address).release(index, slot, generation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_decoded_as_it_was_encoded_and_only_as_its_kind() {
        let handle = Handle {
            kind: Kind::Packet,
            owner: 1234,
            index: 56789,
            generation: (1 << GENERATION_BITS) - 1,
        };
        let word = handle.encode();
        assert_eq!(Handle::decode(word, Kind::Packet), Some(handle));
        assert_eq!(Handle::decode(word, Kind::Channel), None);
        assert_eq!(Handle::decode(0, Kind::Channel), None);
        assert_eq!(Handle::decode(usize::MAX, Kind::Channel), None);
    }

    #[test]
    fn a_slot_that_is_used_again_is_another_object() {
        static SLOTS: Slots<u8> = Slots::new();
        let (index, first, slot) = SLOTS.claim(100).unwrap();
        assert_eq!(slot.state(first), Some(BUSY));
        SLOTS.release(index, slot, first);
        assert_eq!(slot.state(first), None);
        let (again, second, slot) = SLOTS.claim(100).unwrap();
        assert_eq!(index, again);
        assert_ne!(first, second);
        assert_eq!(slot.state(first), None);
        assert_eq!(slot.state(second), Some(BUSY));
    }

    #[test]
    fn slots_grow_up_to_their_limit_and_all_differ() {
        static SLOTS: Slots<u8> = Slots::new();
        let mut taken: Vec<u32> = (0..100).map(|_| SLOTS.claim(100).unwrap().0).collect();
        assert!(SLOTS.claim(100).is_none());
        taken.sort_unstable();
        taken.dedup();
        assert_eq!(taken.len(), 100);
    }

    #[test]
    fn a_place_is_known_until_it_is_forgotten() {
        static PLACED: Placed = Placed::new();
        for address in (0x1000..0x9000).step_by(64) {
            assert!(PLACED.set(address, address + 1));
        }
        assert_eq!(PLACED.get(0x1040), Some(0x1041));
        assert_eq!(PLACED.get(0x1041), None);
        PLACED.remove(0x1040);
        assert_eq!(PLACED.get(0x1040), None);
        assert!(PLACED.set(0x1080, 7));
        assert_eq!(PLACED.get(0x1080), Some(7));
    }
}
