//! The guest's memory as the host reaches it: by page number, and nowhere but where the guest has shared it.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus::ring::PacketBuffer;
use vmbus::shared::{SharedPages, WeakPages};

use crate::bus::{Access, Mapped, Range};
use crate::sync::{Mutex, RwLock};

/// All pages that the guest has shared. Clones are the same.
#[derive(Clone, Default)]
pub struct GuestMemory(Arc<Mutex<Runs>>);

/// Makes one run of pages that lie apart, by mapping them once more.
pub trait Mapper: Send + Sync {
    /// The pages in this order. `None` when one of them is not the guest's, or there is no room.
    fn map(&self, pages: &[PageNumber]) -> Option<SharedPages>;
}

#[derive(Default)]
struct Runs {
    /// Runs of pages by their first.
    runs: BTreeMap<PageNumber, Run>,
    /// How many runs lead to the next look for those that were given back.
    limit: usize,
    mapper: Option<Arc<dyn Mapper>>,
}

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
    /// The guest has got the memory back, or its channel is gone.
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

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestMemory({} runs)", self.shared_runs())
    }
}

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

    /// These pages as one run: a part of a run if they follow each other, else as the
    /// [`Mapper`] puts them together. `None` when one is not shared or nobody can.
    pub fn view(&self, pages: &[PageNumber]) -> Option<SharedPages> {
        let (run, index) = self.find(*pages.first()?)?;
        let mut follow = pages.windows(2).map(|pair| match pair {
            [one, next] => one.0.checked_add(1) == Some(next.0),
            _ => false,
        });
        if follow.all(|follows| follows) {
            let whole = index == 0 && run.page_count() == pages.len();
            return if whole {
                Some(run)
            } else {
                run.slice(index, pages.len())
            };
        }
        let mapper = self.0.lock().mapper.clone();
        mapper?.map(pages)
    }

    /// Who makes one run of scattered pages from now on.
    pub fn set_mapper(&self, mapper: Arc<dyn Mapper>) {
        self.0.lock().mapper = Some(mapper);
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
            lease: Lease::default(),
        }
    }
}

/// How long the guest lends memory: until its channel is closed or taken away. Clones are the same.
#[derive(Clone, Default, Debug)]
pub struct Lease(Arc<RwLock<Ended>>);

/// Whether the time is over.
type Ended = bool;

impl Lease {
    /// The time is over. Returns once nobody copies any more.
    pub fn end(&self) {
        *self.0.write() = true;
    }

    fn during<R>(&self, copy: impl FnOnce() -> Result<R, AccessError>) -> Result<R, AccessError> {
        let ended = self.0.read();
        if *ended {
            Err(AccessError::Revoked)
        } else {
            copy()
        }
    }
}

/// Ranges of guest memory, one behind the other.
#[derive(Clone, Debug)]
pub struct GuestBuffer {
    memory: GuestMemory,
    ranges: Vec<Range>,
    lease: Lease,
}

impl GuestBuffer {
    /// The same memory, for as long as this lease runs.
    #[must_use]
    pub fn leased(self, lease: &Lease) -> Self {
        Self {
            lease: lease.clone(),
            ..self
        }
    }

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
        self.lease.during(|| {
            self.for_each_piece(offset, length, |done, pages, at, count| {
                let piece = bytes.get_mut(done..done + count);
                let piece = piece.ok_or(AccessError::OutOfBounds)?;
                pages.read(at, piece).map_err(|_| AccessError::OutOfBounds)
            })
        })
    }

    /// Copies bytes in, at `offset`. On an error some may have been copied.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), AccessError> {
        self.lease.during(|| {
            self.for_each_piece(offset, bytes.len(), |done, pages, at, count| {
                let piece = bytes.get(done..done + count);
                let piece = piece.ok_or(AccessError::OutOfBounds)?;
                pages.write(at, piece).map_err(|_| AccessError::OutOfBounds)
            })
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
    fn a_view_is_the_run_a_part_of_it_or_what_the_mapper_makes() {
        struct Apart(SharedPages);
        impl Mapper for Apart {
            fn map(&self, pages: &[PageNumber]) -> Option<SharedPages> {
                (pages == [PageNumber(12), PageNumber(10)]).then(|| self.0.clone())
            }
        }
        let memory = GuestMemory::default();
        let run = shared(&memory, 10, 3);
        let view = |pages: &[u64]| {
            let pages: Vec<_> = pages.iter().map(|page| PageNumber(*page)).collect();
            memory.view(&pages)
        };
        assert!(!view(&[10, 11, 12]).unwrap().is_slice());
        let part = view(&[11, 12]).unwrap();
        assert_eq!((part.first_page(), part.page_count()), (PageNumber(11), 2));
        assert!(part.is_slice());
        assert!(view(&[]).is_none());
        assert!(view(&[12, 13]).is_none());
        assert!(view(&[12, 10]).is_none(), "nobody can map it");
        memory.set_mapper(Arc::new(Apart(run)));
        assert!(view(&[12, 10]).is_some());
        assert!(view(&[10, 12]).is_none());
    }

    #[test]
    fn nothing_is_copied_after_the_end_of_the_lease() {
        let memory = GuestMemory::default();
        let _pages = shared(&memory, 10, 1);
        let lease = Lease::default();
        let buffer = memory.buffer(alloc::vec![range(0, 8, &[10])]);
        let buffer = buffer.leased(&lease);
        let copy = buffer.clone();
        assert_eq!(copy.write(0, b"before"), Ok(()));
        lease.end();
        assert_eq!(copy.write(0, b"after"), Err(AccessError::Revoked));
        assert_eq!(buffer.to_vec(), Err(AccessError::Revoked));
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
