//! A ring's control page: two offsets and the words by which the ends spare each other signals
//! (spec vmbus.md 6.1).

use super::{Ring, RingError};
use crate::atomics::{AtomicU32, Ordering};

/// Offset of the producer's position, written by the producer.
const PRODUCER: usize = 0;
/// Offset of the consumer's position, written by the consumer.
const CONSUMER: usize = 4;
/// Offset of the consumer's interrupt mask.
const INTERRUPT_MASK: usize = 8;
/// Offset of the number of free bytes that the producer waits for.
const PENDING_SEND_SIZE: usize = 12;
/// Offset of the producer's feature bits.
const FEATURES: usize = 64;

/// Feature bit 0: this end signals when the room that the other waits for is there.
const FEATURE_PENDING_SEND_SIZE: u32 = 1;

/// The control page of one ring. Each getter reads shared memory once.
pub(super) struct Control<'a> {
    ring: &'a Ring,
}

impl<'a> Control<'a> {
    #[inline]
    pub(super) fn new(ring: &'a Ring) -> Self {
        Self { ring }
    }

    #[inline]
    fn field(&self, offset: usize) -> Result<&'a AtomicU32, RingError> {
        Ok(self.ring.pages.atomic_u32(self.ring.control + offset)?)
    }

    #[inline]
    fn valid(&self, offset: u32) -> Option<u32> {
        (offset < self.ring.size && offset.is_multiple_of(8)).then_some(offset)
    }

    /// The producer's position; acquires what it wrote before.
    #[inline]
    pub(super) fn producer(&self) -> Result<u32, RingError> {
        let raw = self.field(PRODUCER)?.load(Ordering::Acquire);
        self.valid(raw).ok_or(RingError::ProducerOffset(raw))
    }

    /// The consumer's position; what it had read before may be overwritten.
    #[inline]
    pub(super) fn consumer(&self) -> Result<u32, RingError> {
        let raw = self.field(CONSUMER)?.load(Ordering::Acquire);
        self.valid(raw).ok_or(RingError::ConsumerOffset(raw))
    }

    #[inline]
    pub(super) fn set_producer(&self, offset: u32) -> Result<(), RingError> {
        self.field(PRODUCER)?.store(offset, Ordering::Release);
        Ok(())
    }

    #[inline]
    pub(super) fn set_consumer(&self, offset: u32) -> Result<(), RingError> {
        self.field(CONSUMER)?.store(offset, Ordering::Release);
        Ok(())
    }

    #[inline]
    pub(super) fn interrupt_mask(&self) -> Result<bool, RingError> {
        Ok(self.field(INTERRUPT_MASK)?.load(Ordering::Relaxed) != 0)
    }

    #[inline]
    pub(super) fn set_interrupt_mask(&self, masked: bool) -> Result<(), RingError> {
        self.field(INTERRUPT_MASK)?
            .store(u32::from(masked), Ordering::Relaxed);
        Ok(())
    }

    #[inline]
    pub(super) fn pending_send_size(&self) -> Result<u32, RingError> {
        Ok(self.field(PENDING_SEND_SIZE)?.load(Ordering::Relaxed))
    }

    #[inline]
    pub(super) fn set_pending_send_size(&self, bytes: u32) -> Result<(), RingError> {
        self.field(PENDING_SEND_SIZE)?
            .store(bytes, Ordering::Relaxed);
        Ok(())
    }

    #[inline]
    pub(super) fn supports_pending_send_size(&self) -> Result<bool, RingError> {
        Ok(self.field(FEATURES)?.load(Ordering::Relaxed) & FEATURE_PENDING_SEND_SIZE != 0)
    }

    #[inline]
    pub(super) fn announce_pending_send_size(&self) -> Result<(), RingError> {
        self.field(FEATURES)?
            .store(FEATURE_PENDING_SEND_SIZE, Ordering::Relaxed);
        Ok(())
    }
}
