//! GPADLs as the host puts them together.

use alloc::vec::Vec;

use vmbus::ids::{ChannelId, PAGE_SIZE, PageNumber};
use vmbus::protocol::message::{GpadlHeader, RangeHeader};
use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::profile::GpadlRule;

/// One range of a GPADL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Range {
    /// Where it begins in its first page, in bytes.
    pub byte_offset: u32,
    /// Its length in bytes.
    pub byte_count: u32,
    /// Its pages, in order.
    pub pages: Vec<PageNumber>,
}

#[derive(Debug)]
pub(super) struct Gpadl {
    pub(super) channel: ChannelId,
    range_bytes: usize,
    range_count: u16,
    /// What has come so far.
    data: Vec<u8>,
    /// Set once everything has come.
    ranges: Option<Vec<Range>>,
    /// The guest wants it back, but a channel still uses it.
    pub(super) leaving: bool,
}

/// Where a GPADL stands after a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// More is to come.
    Incomplete,
    /// It is whole.
    Whole,
    /// It makes no sense, or is not of the kind that the host takes.
    Bad,
}

impl Gpadl {
    pub(super) fn new(header: &GpadlHeader) -> Self {
        Self {
            channel: ChannelId(header.channel.get()),
            range_bytes: usize::from(header.range_bytes.get()),
            range_count: header.range_count.get(),
            data: Vec::new(),
            ranges: None,
            leaving: false,
        }
    }

    /// The ranges, once it is whole.
    pub(super) fn ranges(&self) -> Option<&[Range]> {
        self.ranges.as_deref()
    }

    /// How many pages it has, once it is whole.
    pub(super) fn page_count(&self) -> Option<usize> {
        Some(self.ranges()?.iter().map(|range| range.pages.len()).sum())
    }

    /// Adds the data of a header or body.
    pub(super) fn append(&mut self, data: &[u8], rule: GpadlRule) -> Progress {
        let missing = self.range_bytes - self.data.len();
        let data = data.get(..missing).unwrap_or(data);
        if data.len() % 8 != 0 {
            return Progress::Bad;
        }
        self.data.extend_from_slice(data);
        if self.data.len() < self.range_bytes {
            // Every message but the last is full.
            return if data.is_empty() {
                Progress::Bad
            } else {
                Progress::Incomplete
            };
        }
        match parse(&self.data, self.range_count) {
            Some(ranges) if rule.takes(&ranges) => {
                self.ranges = Some(ranges);
                Progress::Whole
            }
            _ => Progress::Bad,
        }
    }
}

impl GpadlRule {
    fn takes(self, ranges: &[Range]) -> bool {
        let aligned = |range: &Range| {
            range.byte_offset == 0 && (range.byte_count as usize).is_multiple_of(PAGE_SIZE)
        };
        match self {
            Self::OneAlignedRange => ranges.len() == 1 && ranges.iter().all(aligned),
            Self::AnyRanges(_) => !ranges.is_empty(),
        }
    }
}

/// Takes the ranges apart; `None` when they are not exactly the data.
fn parse(mut data: &[u8], count: u16) -> Option<Vec<Range>> {
    let mut ranges = Vec::new();
    for _ in 0..count {
        let (header, rest) = RangeHeader::read_from_prefix(data).ok()?;
        let (byte_offset, byte_count) = (header.byte_offset.get(), header.byte_count.get());
        let bytes = (byte_offset as usize).checked_add(byte_count as usize)?;
        if byte_count == 0 || byte_offset as usize >= PAGE_SIZE {
            return None;
        }
        let (pages, rest) =
            <[U64]>::ref_from_prefix_with_elems(rest, bytes.div_ceil(PAGE_SIZE)).ok()?;
        ranges.push(Range {
            byte_offset,
            byte_count,
            pages: pages.iter().map(|page| PageNumber(page.get())).collect(),
        });
        data = rest;
    }
    data.is_empty().then_some(ranges)
}
