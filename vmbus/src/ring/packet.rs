//! Packets: the descriptor, what may stand between it and the data, and the private copy of one
//! that was read (spec vmbus.md 6.2).

use alloc::vec::Vec;
use core::fmt;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FOOTER, RingError};
use crate::ids::{PAGE_SIZE, PageNumber};

/// Bytes of a packet descriptor.
pub(super) const DESCRIPTOR: u32 = 16;

/// The longest packet without footer: the length field counts 8-byte units in 16 bits.
pub(super) const MAX_LENGTH: u32 = 0xFFFF * 8;

/// Flag bit 0: the sender wants a completion packet with the same transaction id.
const COMPLETION_REQUESTED: u16 = 1;

/// A packet descriptor on the wire.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
pub(super) struct Descriptor {
    kind: U16,
    /// Where the data begins, in 8-byte units from the start of the packet.
    data_offset: U16,
    /// Length without footer, in 8-byte units.
    length: U16,
    flags: U16,
    transaction_id: U64,
}

const _: () = assert!(size_of::<Descriptor>() == DESCRIPTOR as usize);

/// The header of a packet with transfer pages, or with GPA-direct ranges, behind the descriptor.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct RangeHeader {
    /// The transfer page set; reserved with GPA-direct.
    set: U16,
    /// Whether the sender owns the set, and a byte of garbage.
    _reserved: U16,
    count: U32,
}

const _: () = assert!(size_of::<RangeHeader>() == 8);

/// A packet type (spec vmbus.md 6.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kind(pub u16);

impl Kind {
    /// Data in the ring itself.
    pub const IN_BAND: Self = Self(0x6);
    /// Data in a buffer that both ends know; host to guest only.
    pub const TRANSFER_PAGES: Self = Self(0x7);
    /// Data in guest pages that the packet lists; guest to host only.
    pub const GPA_DIRECT: Self = Self(0x9);
    /// The answer to a packet that asked for one.
    pub const COMPLETION: Self = Self(0xB);
}

impl Descriptor {
    /// Checks the descriptor against the `available` bytes of the ring.
    #[inline]
    pub(super) fn check(&self, available: u32) -> Result<super::Head, RingError> {
        let length = u32::from(self.length.get()) * 8;
        let offset = u32::from(self.data_offset.get()) * 8;
        if length + FOOTER > available {
            return Err(RingError::Length {
                length: length + FOOTER,
                available,
            });
        }
        if offset < DESCRIPTOR || offset > length {
            return Err(RingError::DataOffset { offset, length });
        }
        let kind = Kind(self.kind.get());
        match kind {
            Kind::IN_BAND | Kind::COMPLETION | Kind::TRANSFER_PAGES | Kind::GPA_DIRECT => {}
            Kind(other) => return Err(RingError::Kind(other)),
        }
        Ok(super::Head {
            kind,
            // Flag bits without a meaning are left alone.
            completion_requested: self.flags.get() & COMPLETION_REQUESTED != 0,
            transaction_id: self.transaction_id.get(),
            extra: offset - DESCRIPTOR,
            rest: length - DESCRIPTOR,
        })
    }
}

/// A packet to write.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    kind: Kind,
    transaction_id: u64,
    completion_requested: bool,
    /// The range header and the ranges, as they stand in the packet.
    ranges: Option<(u16, u32, &'a [u8])>,
    payload: [&'a [u8]; 2],
}

impl<'a> Outgoing<'a> {
    /// A packet whose data is `payload`: two parts that follow each other without a gap.
    pub fn in_band(payload: [&'a [u8]; 2]) -> Self {
        Self {
            kind: Kind::IN_BAND,
            transaction_id: 0,
            completion_requested: false,
            ranges: None,
            payload,
        }
    }

    /// The completion of a received packet.
    pub fn completion(transaction_id: u64, payload: &'a [u8]) -> Self {
        Self {
            kind: Kind::COMPLETION,
            transaction_id,
            ..Self::in_band([payload, &[]])
        }
    }

    /// A packet that also lends the guest pages of `list` to the other end. The list must not be empty.
    pub fn gpa_direct(list: &'a ScatterList, payload: [&'a [u8]; 2]) -> Self {
        Self {
            kind: Kind::GPA_DIRECT,
            ranges: Some((0, list.count, &list.bytes)),
            ..Self::in_band(payload)
        }
    }

    /// A packet that points into a buffer known to both ends.
    pub fn transfer_pages(list: &'a TransferPageList, payload: [&'a [u8]; 2]) -> Self {
        Self {
            kind: Kind::TRANSFER_PAGES,
            ranges: Some((list.set, list.count, &list.bytes)),
            ..Self::in_band(payload)
        }
    }

    /// Asks the other end for a completion with this transaction id.
    pub fn with_completion(self, transaction_id: u64) -> Self {
        Self {
            transaction_id,
            completion_requested: true,
            ..self
        }
    }

    /// The same packet with memory of its own.
    pub fn owned(&self) -> OwnedPacket {
        OwnedPacket {
            kind: self.kind,
            transaction_id: self.transaction_id,
            completion_requested: self.completion_requested,
            ranges: self
                .ranges
                .map(|(set, count, bytes)| (set, count, bytes.to_vec())),
            payload: self.payload.concat(),
        }
    }

    /// Bytes that the packet takes in a ring, footer included.
    pub fn footprint(&self) -> u64 {
        self.length() + u64::from(FOOTER)
    }

    /// Bytes of the range header and its ranges.
    fn extra(&self) -> u64 {
        self.ranges
            .map_or(0, |(.., bytes)| 8 + (bytes.len() as u64))
    }

    /// The packet's length in bytes, without footer.
    pub(super) fn length(&self) -> u64 {
        let payload = self.payload[0].len() as u64 + self.payload[1].len() as u64;
        u64::from(DESCRIPTOR) + self.extra() + payload.next_multiple_of(8)
    }

    /// The descriptor. The length has been checked against [`MAX_LENGTH`] before.
    pub(super) fn head(&self) -> [[u8; 8]; 2] {
        let units = |bytes: u64| U16::new(u16::try_from(bytes / 8).unwrap_or(u16::MAX));
        zerocopy::transmute!(Descriptor {
            kind: U16::new(self.kind.0),
            data_offset: units(u64::from(DESCRIPTOR) + self.extra()),
            length: units(self.length()),
            flags: U16::new(if self.completion_requested {
                COMPLETION_REQUESTED
            } else {
                0
            }),
            transaction_id: U64::new(self.transaction_id),
        })
    }

    /// The range header, and the ranges behind it.
    pub(super) fn ranges(&self) -> Option<([u8; 8], &'a [u8])> {
        let (set, count, bytes) = self.ranges?;
        let header = RangeHeader {
            set: U16::new(set),
            _reserved: U16::ZERO,
            count: U32::new(count),
        };
        Some((zerocopy::transmute!(header), bytes))
    }

    /// The data: two parts that follow each other without a gap.
    pub(super) fn payload(&self) -> [&'a [u8]; 2] {
        self.payload
    }
}

/// A packet that waits to be written.
#[derive(Clone, Debug)]
pub struct OwnedPacket {
    kind: Kind,
    /// Repeated by the completion, or that of the packet that this one completes.
    pub transaction_id: u64,
    completion_requested: bool,
    ranges: Option<(u16, u32, Vec<u8>)>,
    /// The data.
    pub payload: Vec<u8>,
}

impl OwnedPacket {
    /// The packet as it is written.
    pub fn as_outgoing(&self) -> Outgoing<'_> {
        let ranges = self.ranges.as_ref();
        Outgoing {
            kind: self.kind,
            transaction_id: self.transaction_id,
            completion_requested: self.completion_requested,
            ranges: ranges.map(|(set, count, bytes)| (*set, *count, &bytes[..])),
            payload: [&self.payload, &[]],
        }
    }
}

/// Guest pages that a packet lends to the other end: one or more ranges, each a run of bytes over any pages.
#[derive(Clone, Default, Debug)]
pub struct ScatterList {
    /// The ranges as they stand in the packet.
    bytes: Vec<u8>,
    count: u32,
}

impl ScatterList {
    /// An empty list with room for `ranges` ranges over `pages` pages in all, so that filling it
    /// allocates nothing.
    pub fn with_capacity(ranges: usize, pages: usize) -> Self {
        Self {
            bytes: Vec::with_capacity((ranges + pages) * 8),
            count: 0,
        }
    }

    /// Adds `length` bytes that begin `offset` bytes into the first of `pages`.
    ///
    /// # Errors
    ///
    /// [`RingError::Ranges`] when `length` is zero, `offset` lies beyond the first page, or `pages` has not
    /// exactly the pages that those bytes touch.
    pub fn push(
        &mut self,
        offset: u32,
        length: u32,
        pages: impl ExactSizeIterator<Item = PageNumber>,
    ) -> Result<(), RingError> {
        if length == 0 || offset as usize >= PAGE_SIZE || page_span(offset, length) != pages.len() {
            return Err(RingError::Ranges);
        }
        self.bytes.extend_from_slice(&length.to_le_bytes());
        self.bytes.extend_from_slice(&offset.to_le_bytes());
        for page in pages {
            self.bytes.extend_from_slice(&page.0.to_le_bytes());
        }
        self.count += 1;
        Ok(())
    }

    /// Forgets all ranges and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.count = 0;
    }

    /// Whether there are no ranges.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// Pages that `length` bytes touch, from `offset` of the first.
fn page_span(offset: u32, length: u32) -> usize {
    ((u64::from(offset) + u64::from(length)).div_ceil(PAGE_SIZE as u64)) as usize
}

/// Pieces of a buffer known to both ends.
#[derive(Clone, Debug)]
pub struct TransferPageList {
    set: u16,
    bytes: Vec<u8>,
    count: u32,
}

impl TransferPageList {
    /// Pieces of buffer `set`.
    pub fn new(set: u16, ranges: &[TransferPageRange]) -> Self {
        let mut bytes = Vec::with_capacity(ranges.len() * 8);
        for range in ranges {
            bytes.extend_from_slice(&range.length.to_le_bytes());
            bytes.extend_from_slice(&range.offset.to_le_bytes());
        }
        Self {
            set,
            count: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
            bytes,
        }
    }
}

/// One piece of a transfer page set. The host says where it lies; check it against the
/// buffer before use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TransferPageRange {
    /// Bytes.
    pub length: u32,
    /// Bytes from the start of the set's buffer.
    pub offset: u32,
}

/// The pieces of a transfer page set that a received packet names.
#[derive(Clone, Copy, Debug)]
pub struct TransferPages<'a> {
    /// The id of the set.
    pub set: u16,
    ranges: &'a [u8],
}

impl<'a> TransferPages<'a> {
    /// The pieces, in order.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = TransferPageRange> + use<'a> {
        self.ranges.as_chunks::<8>().0.iter().map(|bytes| {
            let word = u64::from_le_bytes(*bytes);
            TransferPageRange {
                length: (word & 0xFFFF_FFFF) as u32,
                offset: (word >> 32) as u32,
            }
        })
    }
}

/// Guest pages that a received packet lends: what a host sees of a [`ScatterList`].
#[derive(Clone, Copy, Debug)]
pub struct GpaRanges<'a> {
    words: &'a [u8],
}

/// One run of bytes over guest pages.
#[derive(Clone, Copy, Debug)]
pub struct GpaRange<'a> {
    /// Bytes.
    pub length: u32,
    /// Where they begin in the first page.
    pub offset: u32,
    pages: &'a [u8],
}

impl<'a> GpaRange<'a> {
    /// The pages, in order.
    pub fn pages(&self) -> impl ExactSizeIterator<Item = PageNumber> + use<'a> {
        self.pages
            .as_chunks::<8>()
            .0
            .iter()
            .map(|bytes| PageNumber(u64::from_le_bytes(*bytes)))
    }
}

impl<'a> Iterator for GpaRanges<'a> {
    type Item = GpaRange<'a>;

    fn next(&mut self) -> Option<GpaRange<'a>> {
        let (head, rest) = self.words.split_first_chunk::<8>()?;
        let word = u64::from_le_bytes(*head);
        let (length, offset) = ((word & 0xFFFF_FFFF) as u32, (word >> 32) as u32);
        let (pages, rest) = rest.split_at_checked(page_span(offset, length).checked_mul(8)?)?;
        self.words = rest;
        Some(GpaRange {
            length,
            offset,
            pages,
        })
    }
}

/// A packet that was copied out of a ring: checked, private, and reusable, so that reading allocates only when a packet
/// is longer than all before it.
#[derive(Debug, Default)]
pub struct PacketBuffer {
    /// What stands behind the descriptor; longer than the packet when an earlier one was longer.
    bytes: Vec<u8>,
    /// Bytes of the packet behind the descriptor.
    length: usize,
    /// Where the data begins in `bytes`.
    data: usize,
    kind: u16,
    completion_requested: bool,
    transaction_id: u64,
}

impl PacketBuffer {
    /// A buffer that takes packets of up to `bytes` bytes of headers and data without allocating. Fails
    /// when the heap has no room.
    pub fn with_capacity(bytes: usize) -> Result<Self, RingError> {
        let mut buffer = Self::default();
        buffer.grow(bytes.next_multiple_of(8))?;
        Ok(buffer)
    }

    /// The packet type.
    #[inline]
    pub fn kind(&self) -> Kind {
        Kind(self.kind)
    }

    /// Whether the sender asked for a completion.
    #[inline]
    pub fn completion_requested(&self) -> bool {
        self.completion_requested
    }

    /// The sender's transaction id, which the completion repeats.
    pub fn transaction_id(&self) -> u64 {
        self.transaction_id
    }

    /// The data, padded by the sender to a multiple of 8 bytes.
    #[inline]
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(self.data..self.length).unwrap_or_default()
    }

    /// The same, to be worked on in place.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        self.bytes
            .get_mut(self.data..self.length)
            .unwrap_or_default()
    }

    /// The pieces of a transfer page set that the packet names, if it is of that kind.
    pub fn transfer_pages(&self) -> Option<TransferPages<'_>> {
        let (header, rest) = self.range_header(Kind::TRANSFER_PAGES)?;
        let length = (header.count.get() as usize).checked_mul(8)?;
        Some(TransferPages {
            set: header.set.get(),
            ranges: rest.get(..length)?,
        })
    }

    /// The guest pages that the packet lends, if it is of that kind.
    pub fn gpa_ranges(&self) -> Option<GpaRanges<'_>> {
        let (_, words) = self.range_header(Kind::GPA_DIRECT)?;
        Some(GpaRanges { words })
    }

    fn range_header(&self, kind: Kind) -> Option<(&RangeHeader, &[u8])> {
        if self.kind() != kind {
            return None;
        }
        RangeHeader::ref_from_prefix(self.bytes.get(..self.data)?).ok()
    }

    /// Makes room for `bytes` bytes.
    #[inline]
    fn grow(&mut self, bytes: usize) -> Result<(), RingError> {
        if bytes <= self.bytes.len() {
            return Ok(());
        }
        self.allocate(bytes)
    }

    #[cold]
    fn allocate(&mut self, bytes: usize) -> Result<(), RingError> {
        let more = bytes.saturating_sub(self.bytes.len());
        self.bytes
            .try_reserve_exact(more)
            .map_err(|_| RingError::OutOfMemory { bytes })?;
        self.bytes.resize(bytes, 0);
        Ok(())
    }

    /// Takes over a descriptor, and gives the place for the bytes behind it.
    #[inline]
    pub(super) fn prepare(&mut self, head: &super::Head) -> Result<&mut [u8], RingError> {
        let length = head.rest as usize;
        self.grow(length)?;
        self.length = length;
        self.data = head.extra as usize;
        self.kind = head.kind.0;
        self.completion_requested = head.completion_requested;
        self.transaction_id = head.transaction_id;
        Ok(&mut self.bytes[..length])
    }

    /// Checks the copied range lists.
    #[inline]
    pub(super) fn check(&self) -> Result<(), RingError> {
        match self.kind() {
            Kind::TRANSFER_PAGES => match self.transfer_pages() {
                Some(_) => Ok(()),
                None => Err(RingError::Ranges),
            },
            Kind::GPA_DIRECT => self.check_gpa_ranges(),
            _ => Ok(()),
        }
    }

    fn check_gpa_ranges(&self) -> Result<(), RingError> {
        let (header, words) = self
            .range_header(Kind::GPA_DIRECT)
            .ok_or(RingError::Ranges)?;
        let sound = |range: &GpaRange<'_>| range.length > 0 && (range.offset as usize) < PAGE_SIZE;
        let count = GpaRanges { words }.take_while(sound).count();
        if count == 0 || count != header.count.get() as usize {
            return Err(RingError::Ranges);
        }
        Ok(())
    }

    /// Replaces the packet by the completion that is to be sent for it.
    pub fn become_completion(&mut self, payload: &[u8]) -> Result<(), RingError> {
        self.grow(payload.len())?;
        self.bytes[..payload.len()].copy_from_slice(payload);
        self.length = payload.len();
        self.data = 0;
        self.kind = Kind::COMPLETION.0;
        self.completion_requested = false;
        Ok(())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::IN_BAND => f.write_str("in-band data"),
            Self::TRANSFER_PAGES => f.write_str("transfer pages"),
            Self::GPA_DIRECT => f.write_str("GPA-direct data"),
            Self::COMPLETION => f.write_str("completion"),
            Self(other) => write!(f, "type {other:#x}"),
        }
    }
}
