//! GPADLs as the host puts them together.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use vmbus::ids::{ChannelId, GpadlHandle, PAGE_SIZE, PageNumber};
use vmbus::protocol::message::{GpadlHeader, RangeHeader};
use zerocopy::FromBytes;
use zerocopy::little_endian::U64;

use super::profile::GpadlRule;
use crate::sync::Mutex;

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

/// The GPADLs that are whole: who maps one finds it here. Clones are the same.
#[derive(Clone, Default, Debug)]
pub struct Gpadls(Arc<Mutex<BTreeMap<GpadlHandle, Arc<Lent>>>>);

/// A GPADL that is whole.
#[derive(Debug)]
pub struct Lent {
    channel: ChannelId,
    ranges: Vec<Range>,
    mapped: AtomicBool,
    /// The host may not touch it any more.
    revoked: AtomicBool,
}

/// A GPADL that the host uses. The guest gets its memory back only after this has been dropped
/// (spec kmcl.md 1.10, `VmbChannelMapGpadl` and `VmbChannelUnmapGpadl`).
#[derive(Debug)]
pub struct Mapped {
    lent: Arc<Lent>,
    access: Access,
}

/// What a mapping is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// The host only reads.
    Read,
    /// The host reads and writes.
    ReadWrite,
}

/// Why a GPADL cannot be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapError {
    /// The channel has no such GPADL.
    Unknown(GpadlHandle),
    /// It is mapped already: one mapping at a time.
    Mapped(GpadlHandle),
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(handle) => write!(f, "the channel has no GPADL {handle}"),
            Self::Mapped(handle) => write!(f, "GPADL {handle} is mapped already"),
        }
    }
}

impl core::error::Error for MapError {}

impl Gpadls {
    /// The GPADL with this handle.
    pub fn get(&self, handle: GpadlHandle) -> Option<Arc<Lent>> {
        self.0.lock().get(&handle).cloned()
    }

    /// Handles of the GPADLs of a channel, its rings included.
    pub fn of_channel(&self, channel: ChannelId) -> Vec<GpadlHandle> {
        let all = self.0.lock();
        let of = all.iter().filter(|(_, lent)| lent.channel == channel);
        of.map(|(handle, _)| *handle).collect()
    }

    /// Maps a GPADL of `channel`.
    pub fn map(
        &self,
        channel: ChannelId,
        handle: GpadlHandle,
        access: Access,
    ) -> Result<Mapped, MapError> {
        let lent = self.get(handle).filter(|lent| lent.channel == channel);
        let lent = lent.ok_or(MapError::Unknown(handle))?;
        if lent.revoked.load(Ordering::SeqCst) {
            return Err(MapError::Unknown(handle));
        }
        if lent.mapped.swap(true, Ordering::SeqCst) {
            return Err(MapError::Mapped(handle));
        }
        Ok(Mapped { lent, access })
    }

    pub(super) fn insert(&self, handle: GpadlHandle, channel: ChannelId, ranges: &[Range]) {
        let lent = Lent {
            channel,
            ranges: ranges.into(),
            mapped: AtomicBool::new(false),
            revoked: AtomicBool::new(false),
        };
        self.0.lock().insert(handle, Arc::new(lent));
    }

    pub(super) fn is_mapped(&self, handle: GpadlHandle) -> bool {
        self.get(handle)
            .is_some_and(|lent| lent.mapped.load(Ordering::SeqCst))
    }

    /// Takes the GPADLs of a channel from whoever has them mapped.
    pub(super) fn revoke(&self, channel: ChannelId) {
        for lent in self.0.lock().values() {
            if lent.channel == channel {
                lent.revoked.store(true, Ordering::SeqCst);
            }
        }
    }

    pub(super) fn remove(&self, handle: GpadlHandle) {
        if let Some(lent) = self.0.lock().remove(&handle) {
            lent.revoked.store(true, Ordering::SeqCst);
        }
    }

    pub(super) fn clear(&self) {
        let gone = core::mem::take(&mut *self.0.lock());
        for lent in gone.values() {
            lent.revoked.store(true, Ordering::SeqCst);
        }
    }
}

impl Lent {
    /// What it describes.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// Whether the guest may take the memory back: by a rescind or the end of the connection.
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::SeqCst)
    }
}

impl Mapped {
    /// What it describes.
    pub fn ranges(&self) -> &[Range] {
        self.lent.ranges()
    }

    /// What it was mapped for.
    pub const fn access(&self) -> Access {
        self.access
    }

    /// Whether the guest has got the memory back by a rescind or the end of the connection.
    pub fn is_revoked(&self) -> bool {
        self.lent.revoked.load(Ordering::SeqCst)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.lent.mapped.store(false, Ordering::SeqCst);
    }
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

    /// Bytes that describe it, once it is whole.
    pub(super) fn described(&self) -> usize {
        self.range_bytes
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
