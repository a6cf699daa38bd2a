//! One ring buffer over shared pages: the way that packets take between guest and host.
//!
//! A ring is a control page and one or more data pages. It has one [`Writer`] and one [`Reader`],
//! at opposite ends; a channel has two rings, one each way (spec vmbus.md, chapter 6).
//! Neither end trusts the other: control fields are read once and checked, a packet is copied into private
//! memory before anybody looks at it, and nothing that the other end writes can lead an
//! access outside the ring.

mod control;
mod error;
mod packet;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

pub use error::RingError;
pub use packet::{
    GpaRange, GpaRanges, Kind, Outgoing, OwnedPacket, PacketBuffer, ScatterList, TransferPageList,
    TransferPageRange, TransferPages,
};
pub use reader::{Head, Reader};
pub use writer::{PushError, Room, Writer};

use crate::atomics::Ordering;
use crate::ids::PAGE_SIZE;
use crate::shared::{OutOfBounds, SharedPages};
use control::Control;

/// Bytes that are never filled, so that a full ring and an empty one look different.
const GAP: u32 = 8;

/// Bytes after each packet that repeat where it began.
const FOOTER: u32 = 8;

/// The largest data area: offsets and their sums stay far from the limits of 32 bits.
const MAX_DATA: usize = 1 << 30;

/// The largest packet, its footer included, that fits a ring with `size` bytes of data at all. Hosts
/// refuse one that fills the ring to the last usable byte.
pub const fn largest_packet(size: usize) -> u32 {
    let usable = size.saturating_sub(GAP as usize + 8);
    let most = packet::MAX_LENGTH + FOOTER;
    if usable < most as usize {
        usable as u32
    } else {
        most
    }
}

/// Whether the other end must be signalled now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "a signal that is not sent leaves the other end asleep"]
pub enum Signal {
    /// The other end waits for this: signal it.
    Needed,
    /// The other end is awake or does not want to know.
    NotNeeded,
}

/// The memory of one ring: a control page followed by data pages.
#[derive(Clone, Debug)]
pub struct Ring {
    pages: SharedPages,
    /// Where the control page begins in `pages`.
    control: usize,
    /// Where the data begins in `pages`.
    data: usize,
    /// Bytes of data; a multiple of the page size.
    size: u32,
}

impl Ring {
    /// The ring in pages `first .. first + count` of `pages`, its control page included.
    pub fn new(pages: &SharedPages, first: usize, count: usize) -> Result<Self, RingError> {
        let end = first.checked_add(count).ok_or(RingError::Memory)?;
        if count < 2 || end > pages.page_count() || (count - 1) * PAGE_SIZE > MAX_DATA {
            return Err(RingError::Memory);
        }
        Ok(Self {
            pages: pages.clone(),
            control: first * PAGE_SIZE,
            data: (first + 1) * PAGE_SIZE,
            size: u32::try_from((count - 1) * PAGE_SIZE).map_err(|_| RingError::Memory)?,
        })
    }

    /// Splits a channel's ring memory: the guest-to-host ring takes the first
    /// `downstream_page` pages, the host-to-guest ring the rest (OPEN_CHANNEL, spec vmbus.md 3.2).
    pub fn split(pages: &SharedPages, downstream_page: usize) -> Result<(Self, Self), RingError> {
        let rest = pages
            .page_count()
            .checked_sub(downstream_page)
            .ok_or(RingError::Memory)?;
        Ok((
            Self::new(pages, 0, downstream_page)?,
            Self::new(pages, downstream_page, rest)?,
        ))
    }

    /// Bytes of the data area.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// The largest packet, its footer included, that fits the ring at all.
    pub fn largest_packet(&self) -> u32 {
        largest_packet(self.size as usize)
    }

    /// Whether the producer of this ring signals, as the consumer of the other one, when the
    /// room that is waited for is there. If not, whoever waits must poll (spec vmbus.md 6.3, step 2).
    pub fn producer_signals_room(&self) -> Result<bool, RingError> {
        self.control().supports_pending_send_size()
    }

    #[inline]
    fn control(&self) -> Control<'_> {
        Control::new(self)
    }

    /// `offset` moved on by `bytes`, which is at most the ring's size.
    #[inline]
    fn advance(&self, offset: u32, bytes: u32) -> u32 {
        let sum = offset + bytes;
        if sum >= self.size {
            sum - self.size
        } else {
            sum
        }
    }

    /// Bytes between `consumer` and `producer`, both valid offsets.
    #[inline]
    fn used(&self, producer: u32, consumer: u32) -> u32 {
        if producer >= consumer {
            producer - consumer
        } else {
            producer + self.size - consumer
        }
    }

    /// Bytes that can be written with these offsets.
    #[inline]
    fn free(&self, producer: u32, consumer: u32) -> u32 {
        (self.size - self.used(producer, consumer)).saturating_sub(GAP)
    }

    /// Copies into the data area at `offset`, around its end if need be; gives the offset behind.
    #[inline]
    fn write(&self, offset: u32, bytes: &[u8]) -> Result<u32, OutOfBounds> {
        // A slice longer than the ring is refused.
        let length = u32::try_from(bytes.len()).map_err(|_| OutOfBounds)?;
        let straight = self.size - offset;
        if length <= straight {
            self.pages.write(self.data + offset as usize, bytes)?;
        } else {
            let (head, tail) = bytes.split_at(straight as usize);
            self.pages.write(self.data + offset as usize, head)?;
            self.pages.write(self.data, tail)?;
        }
        Ok(self.advance(offset, length))
    }

    /// Copies into the data area at `offset`, a multiple of 8, and fills with zeros up to the next multiple of 8; gives the
    /// offset behind.
    fn write_padded(&self, offset: u32, bytes: &[u8]) -> Result<u32, OutOfBounds> {
        let (words, tail) = bytes.as_chunks::<8>();
        let mut at = offset;
        if !words.is_empty() {
            at = self.write(at, words.as_flattened())?;
        }
        if !tail.is_empty() {
            let mut word = [0; 8];
            word[..tail.len()].copy_from_slice(tail);
            at = self.write_word(at, word)?;
        }
        Ok(at)
    }

    /// Writes 8 bytes at `offset`, a multiple of 8; gives the offset behind. No such word goes around the end.
    #[inline]
    fn write_word(&self, offset: u32, word: [u8; 8]) -> Result<u32, OutOfBounds> {
        self.pages
            .atomic_u64(self.data + offset as usize)?
            .store(u64::from_ne_bytes(word), Ordering::Relaxed);
        Ok(self.advance(offset, 8))
    }

    /// Reads 8 bytes at `offset`, a multiple of 8.
    #[inline]
    fn read_word(&self, offset: u32) -> Result<[u8; 8], OutOfBounds> {
        let word = self.pages.atomic_u64(self.data + offset as usize)?;
        Ok(word.load(Ordering::Relaxed).to_ne_bytes())
    }

    /// Copies out of the data area at `offset`, around its end if need be.
    #[inline]
    fn read(&self, offset: u32, bytes: &mut [u8]) -> Result<(), OutOfBounds> {
        let straight = (self.size - offset) as usize;
        if bytes.len() <= straight {
            return self.pages.read(self.data + offset as usize, bytes);
        }
        let (head, tail) = bytes.split_at_mut(straight);
        self.pages.read(self.data + offset as usize, head)?;
        self.pages.read(self.data, tail)
    }
}
