//! External data: guest memory that a packet lends to the host.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::fmt;
use core::ops::Range;

use crate::ids::{PAGE_SIZE, PageNumber};
use crate::ring::{RingError, ScatterList};
use crate::shared::SharedPages;

/// Guest memory that a packet lends to the host: a scatter list of ranges, each a run of bytes over pages. It is what
/// a chain of MDLs is for KMCL; each element becomes one GPA range of the packet (spec kmcl.md 1.9).
///
/// The library keeps the memory until the host can no longer touch it: until the host has answered, or has let
/// go of the closed channel. The completed packet gives it back.
#[derive(Clone, Default)]
pub struct ExternalData {
    parts: Vec<Part>,
}

/// One range.
#[derive(Clone)]
struct Part {
    memory: Memory,
    /// Bytes from the start of the memory. Neither empty nor longer than 32 bits can say.
    range: Range<usize>,
}

#[derive(Clone)]
enum Memory {
    /// Pages that follow each other.
    Pages(SharedPages),
    /// Any pages, and who keeps them in place.
    List {
        pages: Arc<[PageNumber]>,
        _owner: Arc<dyn Any + Send + Sync>,
    },
}

/// Why memory cannot be lent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExternalDataError {
    /// The range has no bytes.
    Empty,
    /// The range goes beyond the memory.
    OutOfRange {
        /// Where it ends, in bytes.
        end: usize,
        /// Bytes that there are.
        length: usize,
    },
    /// A range counts its bytes in 32 bits.
    TooLong {
        /// Bytes of the range.
        length: usize,
    },
}

impl fmt::Display for ExternalDataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("a range of no bytes"),
            Self::OutOfRange { end, length } => {
                write!(f, "a range up to byte {end} of {length} bytes of memory")
            }
            Self::TooLong { length } => write!(f, "a range of {length} bytes"),
        }
    }
}

impl core::error::Error for ExternalDataError {}

impl ExternalData {
    /// No memory yet.
    pub const fn new() -> Self {
        Self { parts: Vec::new() }
    }

    /// Adds bytes `range` of `pages`, as a range of its own.
    pub fn push(
        &mut self,
        pages: SharedPages,
        range: Range<usize>,
    ) -> Result<(), ExternalDataError> {
        let length = pages.len();
        self.add(Memory::Pages(pages), length, range)
    }

    /// Adds bytes `range` of pages that are given by their numbers, as a range of its own. `owner` is kept as long as
    /// the host may touch them: it has to keep them where they are, and used for nothing else. It may be dropped at DISPATCH.
    pub fn push_page_list(
        &mut self,
        pages: impl Into<Arc<[PageNumber]>>,
        range: Range<usize>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<(), ExternalDataError> {
        let pages = pages.into();
        let length = pages.len().saturating_mul(PAGE_SIZE);
        let memory = Memory::List {
            pages,
            _owner: owner,
        };
        self.add(memory, length, range)
    }

    /// Whole pages by their numbers, as one range: what `VmbPacketSendWithExternalPfns` sends (spec kmcl.md 6.1, 24).
    pub fn whole_pages(
        pages: impl Into<Arc<[PageNumber]>>,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, ExternalDataError> {
        let pages = pages.into();
        let length = pages.len().saturating_mul(PAGE_SIZE);
        let mut external = Self::new();
        external.push_page_list(pages, 0..length, owner)?;
        Ok(external)
    }

    fn add(
        &mut self,
        memory: Memory,
        length: usize,
        range: Range<usize>,
    ) -> Result<(), ExternalDataError> {
        check(&range, length)?;
        if u32::try_from(range.len()).is_err() {
            return Err(ExternalDataError::TooLong {
                length: range.len(),
            });
        }
        self.parts.push(Part { memory, range });
        Ok(())
    }

    /// Narrows this to its bytes `range`, counted from the first byte of the first range: the MdlOffset and MdlLength of
    /// `VmbPacketSendWithExternalMdl`. Ranges of which nothing is left are dropped. Allocates nothing.
    pub fn narrow(&mut self, range: Range<usize>) -> Result<(), ExternalDataError> {
        check(&range, self.len())?;
        let mut before = 0;
        self.parts.retain_mut(|part| {
            let length = part.range.len();
            let start = range.start.saturating_sub(before).min(length);
            let end = range.end.saturating_sub(before).min(length);
            before += length;
            let base = part.range.start;
            part.range = base + start..base + end;
            start < end
        });
        Ok(())
    }

    /// Forgets all ranges, and keeps the memory of the list itself.
    pub fn clear(&mut self) {
        self.parts.clear();
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.range.len()).sum()
    }

    /// Whether there is no memory.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The number of ranges.
    pub fn range_count(&self) -> usize {
        self.parts.len()
    }

    /// The number of page numbers that a packet needs to tell of this memory.
    pub fn page_count(&self) -> usize {
        self.parts.iter().map(|part| part.pages().len()).sum()
    }

    /// Bytes that this adds to a packet: the header, 8 bytes per range, and 8 per page (spec kmcl.md 1.9).
    pub(super) fn footprint(&self) -> usize {
        match self.range_count() {
            0 => 0,
            ranges => footprint(ranges, self.page_count()),
        }
    }

    /// Writes the ranges into `list`.
    pub(super) fn describe(&self, list: &mut ScatterList) -> Result<(), RingError> {
        list.clear();
        for Part { memory, range } in &self.parts {
            let pages = page_range(range);
            let offset = u32::try_from(range.start % PAGE_SIZE).map_err(|_| RingError::Ranges)?;
            let length = u32::try_from(range.len()).map_err(|_| RingError::Ranges)?;
            match memory {
                Memory::Pages(run) => {
                    let first = run.first_page().0;
                    let numbers = pages.map(|page| PageNumber(first + page as u64));
                    list.push(offset, length, numbers)?;
                }
                Memory::List { pages: all, .. } => {
                    let numbers = all.get(pages).unwrap_or_default();
                    list.push(offset, length, numbers.iter().copied())?;
                }
            }
        }
        Ok(())
    }
}

impl Part {
    fn pages(&self) -> Range<usize> {
        page_range(&self.range)
    }
}

/// Bytes that `ranges` ranges over `pages` pages add to a packet.
pub(super) fn footprint(ranges: usize, pages: usize) -> usize {
    let words = ranges.saturating_add(pages).saturating_add(1);
    words.saturating_mul(8)
}

/// The most pages that `bytes` bytes in `ranges` ranges can touch.
pub(super) fn most_pages(bytes: usize, ranges: usize) -> usize {
    // A range that does not begin with a page touches one more at its end.
    (bytes / PAGE_SIZE).saturating_add(ranges.saturating_mul(2))
}

/// The pages that a range of bytes touches.
fn page_range(range: &Range<usize>) -> Range<usize> {
    range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE)
}

fn check(range: &Range<usize>, length: usize) -> Result<(), ExternalDataError> {
    if range.start >= range.end {
        Err(ExternalDataError::Empty)
    } else if range.end > length {
        Err(ExternalDataError::OutOfRange {
            end: range.end,
            length,
        })
    } else {
        Ok(())
    }
}

impl fmt::Debug for ExternalData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExternalData")
            .field("length", &self.len())
            .field("ranges", &self.range_count())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(first: u64, count: usize) -> SharedPages {
        SharedPages::from_heap(PageNumber(first), count).unwrap()
    }

    /// Offset, length and pages of every range.
    fn ranges(external: &ExternalData) -> Vec<(usize, usize, Vec<u64>)> {
        let describe = |part: &Part| {
            let numbers: Vec<u64> = match &part.memory {
                Memory::Pages(run) => part
                    .pages()
                    .map(|page| run.first_page().0 + page as u64)
                    .collect(),
                Memory::List { pages, .. } => {
                    pages[part.pages()].iter().map(|page| page.0).collect()
                }
            };
            (part.range.start % PAGE_SIZE, part.range.len(), numbers)
        };
        external.parts.iter().map(describe).collect()
    }

    #[test]
    fn only_memory_that_is_there_can_be_lent() {
        let mut external = ExternalData::new();
        let run = pages(8, 2);
        assert_eq!(
            external.push(run.clone(), 5..5),
            Err(ExternalDataError::Empty)
        );
        assert_eq!(
            external.push(run.clone(), 0..8193),
            Err(ExternalDataError::OutOfRange {
                end: 8193,
                length: 8192
            })
        );
        assert!(external.is_empty());
        external.push(run, 4095..4097).unwrap();
        assert_eq!((external.range_count(), external.page_count()), (1, 2));
    }

    #[test]
    fn a_sub_range_of_a_chain_drops_what_lies_outside_of_it() {
        let mut external = ExternalData::new();
        external.push(pages(0x10, 1), 0..4096).unwrap();
        let list = [PageNumber(7), PageNumber(3), PageNumber(9)];
        external
            .push_page_list(list, 100..3 * 4096, Arc::new(()))
            .unwrap();
        external.push(pages(0x20, 1), 0..10).unwrap();
        let length = external.len();
        external.narrow(4096 + 4000..length - 10).unwrap();
        assert_eq!(ranges(&external), [(4, 8188, std::vec![3, 9])]);
        assert_eq!(external.narrow(0..8189).unwrap_err(), {
            ExternalDataError::OutOfRange {
                end: 8189,
                length: 8188,
            }
        });
        external.narrow(8187..8188).unwrap();
        assert_eq!(ranges(&external), [(4095, 1, std::vec![9])]);
    }

    #[test]
    fn no_range_touches_more_pages_than_are_reserved_for_it() {
        for (start, length) in [(0, 4096), (1, 4096), (4095, 2), (4095, 4098), (5, 1)] {
            let mut external = ExternalData::new();
            external.push(pages(1, 3), start..start + length).unwrap();
            assert!(external.page_count() <= most_pages(length, 1));
        }
    }
}
