//! The guest's memory as the host reaches it: by page number, and nowhere but where the guest has shared it.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use spin::Mutex;
use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus::ring::PacketBuffer;
use vmbus::shared::{SharedPages, WeakPages};

use crate::bus::{Access, Mapped, Range};

/// All pages that the guest has shared. Clones are the same.
#[derive(Clone, Default, Debug)]
pub struct GuestMemory(Arc<Mutex<Runs>>);

#[derive(Default, Debug)]
struct Runs {
    /// Runs of pages by their first.
    runs: BTreeMap<PageNumber, Run>,
    /// How many runs lead to the next look for those that were given back.
    limit: usize,
}

#[derive(Debug)]
struct Run {
    pages: WeakPages,
    count: usize,
}

/// Runs that are kept without looking whether they were given back.
const MIN_LIMIT: usize = 4096;

/// Why the host cannot touch memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessError {
    /// Beyond the end of the buffer.
    OutOfBounds,
    /// The page was never shared, or has been given back.
    NotShared(PageNumber),
    /// The buffer is only to be read.
    ReadOnly,
    /// The guest has got the memory back.
    Revoked,
    /// The packet lends no memory.
    NoExternalData,
}

impl fmt::Display for AccessError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfBounds => f.write_str("beyond the end of the buffer"),
            Self::NotShared(page) => write!(f, "the guest does not share page {page}"),
            Self::ReadOnly => f.write_str("the buffer is only to be read"),
            Self::Revoked => f.write_str("the guest has got the memory back"),
            Self::NoExternalData => f.write_str("the packet lends no memory"),
        }
    }
}

impl core::error::Error for AccessError {}

impl GuestMemory {
    /// Adds pages that the guest shares from now until their last handle goes.
    pub fn add(&self, pages: &SharedPages) {
        let mut all = self.0.lock();
        if all.runs.len() >= all.limit.max(MIN_LIMIT) {
            all.runs.retain(|_, run| run.pages.upgrade().is_some());
            all.limit = 2 * all.runs.len();
        }
        let run = Run {
            pages: pages.downgrade(),
            count: pages.page_count(),
        };
        all.runs.insert(pages.first_page(), run);
    }

    /// The run of shared pages in which `page` lies, and where in it, in pages.
    pub fn find(&self, page: PageNumber) -> Option<(SharedPages, usize)> {
        let all = self.0.lock();
        let (first, run) = all.runs.range(..=page).next_back()?;
        let index = usize::try_from(page.0 - first.0).ok()?;
        let pages = run.pages.upgrade().filter(|_| index < run.count)?;
        Some((pages, index))
    }

    /// How many runs the guest has not given back.
    pub fn shared_runs(&self) -> usize {
        let all = self.0.lock();
        let live = |run: &&Run| run.pages.upgrade().is_some();
        all.runs.values().filter(live).count()
    }

    /// Whether `page` was shared and has been given back, as far as this is remembered.
    pub fn was_given_back(&self, page: PageNumber) -> bool {
        let all = self.0.lock();
        let run = all.runs.range(..=page).next_back();
        run.is_some_and(|(first, run)| {
            page.0 - first.0 < run.count as u64 && run.pages.upgrade().is_none()
        })
    }

    /// The memory of a mapped GPADL.
    pub fn gpadl(&self, mapped: Mapped) -> MappedGpadl {
        let buffer = self.buffer(mapped.ranges().to_vec());
        MappedGpadl { mapped, buffer }
    }

    /// The memory that a received packet lends (`VmbChannelPacketGetExternalData`, spec kmcl.md 1.8). It is the host's
    /// until the host completes the packet.
    pub fn external_data(&self, packet: &PacketBuffer) -> Result<GuestBuffer, AccessError> {
        let ranges = packet.gpa_ranges().ok_or(AccessError::NoExternalData)?;
        let ranges = ranges.map(|range| Range {
            byte_offset: range.offset,
            byte_count: range.length,
            pages: range.pages().collect(),
        });
        Ok(self.buffer(ranges.collect()))
    }

    /// Ranges of guest memory, one behind the other.
    pub fn buffer(&self, ranges: Vec<Range>) -> GuestBuffer {
        GuestBuffer {
            memory: self.clone(),
            ranges,
        }
    }
}

/// Ranges of guest memory, one behind the other.
#[derive(Clone, Debug)]
pub struct GuestBuffer {
    memory: GuestMemory,
    ranges: Vec<Range>,
}

impl GuestBuffer {
    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.ranges
            .iter()
            .map(|range| range.byte_count as usize)
            .sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Copies bytes out, from `offset`. On an error some may have been copied.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), AccessError> {
        let length = bytes.len();
        self.for_each_piece(offset, length, |done, pages, at, count| {
            let piece = bytes.get_mut(done..done + count);
            let piece = piece.ok_or(AccessError::OutOfBounds)?;
            pages.read(at, piece).map_err(|_| AccessError::OutOfBounds)
        })
    }

    /// Copies bytes in, at `offset`. On an error some may have been copied.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), AccessError> {
        self.for_each_piece(offset, bytes.len(), |done, pages, at, count| {
            let piece = bytes.get(done..done + count);
            let piece = piece.ok_or(AccessError::OutOfBounds)?;
            pages.write(at, piece).map_err(|_| AccessError::OutOfBounds)
        })
    }

    /// All of it.
    pub fn to_vec(&self) -> Result<Vec<u8>, AccessError> {
        let mut bytes = alloc::vec![0; self.len()];
        self.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Cuts bytes `offset .. offset + length` at the limits of pages.
    fn for_each_piece(
        &self,
        offset: usize,
        length: usize,
        mut take: impl FnMut(usize, &SharedPages, usize, usize) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let end = offset.checked_add(length).ok_or(AccessError::OutOfBounds)?;
        if end > self.len() {
            return Err(AccessError::OutOfBounds);
        }
        let (mut skip, mut done) = (offset, 0);
        for range in &self.ranges {
            let size = range.byte_count as usize;
            let mut at = skip;
            skip = skip.saturating_sub(size);
            while at < size && done < length {
                let place = range.byte_offset as usize + at;
                let page = range.pages.get(place / PAGE_SIZE);
                let page = *page.ok_or(AccessError::OutOfBounds)?;
                let (pages, index) = self.memory.find(page).ok_or(AccessError::NotShared(page))?;
                let in_page = place % PAGE_SIZE;
                let count = (PAGE_SIZE - in_page).min(size - at).min(length - done);
                take(done, &pages, index * PAGE_SIZE + in_page, count)?;
                done += count;
                at += count;
            }
        }
        Ok(())
    }
}

/// The memory of a GPADL while the host has it mapped. Dropping it unmaps.
#[derive(Debug)]
pub struct MappedGpadl {
    mapped: Mapped,
    buffer: GuestBuffer,
}

impl MappedGpadl {
    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range] {
        self.buffer.ranges()
    }

    /// Copies bytes out, from `offset`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), AccessError> {
        self.check()?;
        self.buffer.read(offset, bytes)
    }

    /// Copies bytes in, at `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), AccessError> {
        self.check()?;
        if self.mapped.access() == Access::Read {
            return Err(AccessError::ReadOnly);
        }
        self.buffer.write(offset, bytes)
    }

    fn check(&self) -> Result<(), AccessError> {
        if self.mapped.is_revoked() {
            return Err(AccessError::Revoked);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(memory: &GuestMemory, first: u64, count: usize) -> SharedPages {
        let pages = SharedPages::from_heap(PageNumber(first), count).unwrap();
        memory.add(&pages);
        pages
    }

    fn range(byte_offset: u32, byte_count: u32, pages: &[u64]) -> Range {
        Range {
            byte_offset,
            byte_count,
            pages: pages.iter().map(|page| PageNumber(*page)).collect(),
        }
    }

    #[test]
    fn pieces_of_any_pages_are_one_buffer() {
        let memory = GuestMemory::default();
        let low = shared(&memory, 10, 3);
        let high = shared(&memory, 20, 1);
        let buffer = memory.buffer(alloc::vec![range(4090, 10, &[12, 20]), range(0, 4, &[10]),]);
        assert_eq!(buffer.len(), 14);
        buffer.write(0, b"abcdefghijABCD").unwrap();
        let mut part = [0; 6];
        low.read(2 * PAGE_SIZE + 4090, &mut part).unwrap();
        assert_eq!(&part, b"abcdef");
        high.read(0, &mut part[..4]).unwrap();
        assert_eq!(&part[..4], b"ghij");
        low.read(0, &mut part[..4]).unwrap();
        assert_eq!(&part[..4], b"ABCD");
        buffer.read(8, &mut part).unwrap();
        assert_eq!(&part, b"ijABCD");
        assert_eq!(buffer.write(9, &part), Err(AccessError::OutOfBounds));
        assert_eq!(
            buffer.read(usize::MAX, &mut part),
            Err(AccessError::OutOfBounds)
        );
    }

    #[test]
    fn memory_that_was_given_back_is_out_of_reach() {
        let memory = GuestMemory::default();
        let pages = shared(&memory, 10, 1);
        let buffer = memory.buffer(alloc::vec![range(0, 8, &[10])]);
        assert_eq!(buffer.to_vec(), Ok(alloc::vec![0; 8]));
        assert!(!memory.was_given_back(PageNumber(10)));
        drop(pages);
        let gone = AccessError::NotShared(PageNumber(10));
        assert_eq!(buffer.write(0, &[1]), Err(gone));
        assert!(memory.was_given_back(PageNumber(10)));
        assert!(!memory.was_given_back(PageNumber(11)), "never shared");
        assert!(memory.find(PageNumber(9)).is_none());
    }
}
