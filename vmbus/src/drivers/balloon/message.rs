//! Messages of the dynamic memory protocol, byte for byte (spec balloon.md, 1 to 3).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::PageRange;

/// The longest message: one page.
pub const MAX_MESSAGE: usize = 4096;

/// A message type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Kind(pub u16);

impl Kind {
    /// Guest: may we speak this version?
    pub const VERSION_REQUEST: Self = Self(1);
    /// Host: yes or no.
    pub const VERSION_RESPONSE: Self = Self(2);
    /// Guest: this is what I can do.
    pub const CAPABILITIES_REPORT: Self = Self(3);
    /// Host: agreed or not.
    pub const CAPABILITIES_RESPONSE: Self = Self(4);
    /// Guest: how memory stands.
    pub const STATUS_REPORT: Self = Self(5);
    /// Host: give me pages.
    pub const BALLOON_REQUEST: Self = Self(6);
    /// Guest: here they are.
    pub const BALLOON_RESPONSE: Self = Self(7);
    /// Host: take these pages back.
    pub const UNBALLOON_REQUEST: Self = Self(8);
    /// Guest: done.
    pub const UNBALLOON_RESPONSE: Self = Self(9);
    /// Host: here is more memory.
    pub const HOT_ADD_REQUEST: Self = Self(10);
    /// Guest: so much of it is in use now.
    pub const HOT_ADD_RESPONSE: Self = Self(11);
    /// Host: for your information.
    pub const INFO: Self = Self(12);
    /// Host: give back hot-added memory.
    pub const HOT_REMOVE_REQUEST: Self = Self(13);
    /// Guest: done or not.
    pub const HOT_REMOVE_RESPONSE: Self = Self(14);
}

/// Declares wire structs whose size is asserted.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident, $size:literal { $($(#[$field_doc:meta])* $field:ident: $type:ty,)+ })+) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
            pub struct $name {
                $($(#[$field_doc])* pub $field: $type,)+
            }

            const _: () = assert!(size_of::<$name>() == $size);
        )+
    };
}

wire! {
    /// The start of every message.
    Header, 8 {
        /// A [`Kind`].
        kind: U16,
        /// Bytes of the whole message.
        size: U16,
        /// Chosen by the one who asks, repeated by the one who answers.
        transaction_id: U32,
    }

    /// Behind the header of [`Kind::VERSION_REQUEST`].
    VersionRequest, 8 {
        /// Major version in the upper half, minor in the lower.
        version: U32,
        /// Bit 0: the guest will ask for no other.
        last_attempt: U32,
    }

    /// Behind the header of a response with flags: version and capabilities.
    Response, 8 {
        /// Bit 0 accepted. In a capabilities response: bit 1 hot remove, bit 2 no status reports, please.
        flags: U64,
    }

    /// Behind the header of [`Kind::CAPABILITIES_REPORT`].
    Capabilities, 24 {
        /// What the guest can do.
        capabilities: U64,
        /// Pages that the guest needs at least; 0.
        minimum_pages: U64,
        /// The last page number that the guest can use; all ones.
        maximum_page: U64,
    }

    /// Behind the header of [`Kind::STATUS_REPORT`]. Counts pages.
    StatusReport, 40 {
        /// Pages that the guest could use at once.
        available: U64,
        /// Pages that the guest needs or has promised: what hosts look at.
        committed: U64,
        /// Pages of swap; 0.
        page_file: U64,
        /// Zeroed and free pages; 0.
        zero_and_free: U64,
        /// Writes to swap; 0.
        page_file_writes: U32,
        /// I/O since the last report; 0.
        io_difference: U32,
    }

    /// Behind the header of [`Kind::BALLOON_REQUEST`].
    BalloonRequest, 8 {
        /// How many pages the host wants.
        pages: U32,
        /// 0.
        reserved: U32,
    }

    /// Behind the header of [`Kind::BALLOON_RESPONSE`]; ranges follow.
    BalloonResponse, 8 {
        /// 0.
        reserved: U32,
        /// Bit 0: more messages follow. The other bits: how many ranges follow here.
        ranges: U32,
    }

    /// Behind the header of [`Kind::UNBALLOON_REQUEST`]; ranges follow.
    UnballoonRequest, 8 {
        /// Bit 0: more messages follow.
        more: U32,
        /// How many ranges follow here.
        ranges: U32,
    }

    /// Behind the header of [`Kind::HOT_ADD_RESPONSE`].
    HotAddResponse, 8 {
        /// Pages that are in use now.
        pages: U32,
        /// 1: done, or never to be tried again. 0: try later.
        result: U32,
    }

    /// Behind the header of [`Kind::HOT_REMOVE_RESPONSE`] without ranges.
    HotRemoveResponse, 16 {
        /// 0 when nothing was removed.
        result: U32,
        /// How many ranges follow.
        ranges: U32,
        /// Bit 0: more messages follow.
        more: U64,
    }
}

/// Bit 0 of the flags of a response: accepted.
pub const ACCEPTED: u64 = 1;

/// Bit 2 of the flags of a capabilities response: the host wants no status reports.
pub const SUPPRESS_REPORTS: u64 = 1 << 2;

/// The guest's capabilities: balloon, hot add, aligned to 2^7 MiB. Hosts insist on the hot-add bit, also from a guest that
/// refuses every hot-add request (spec balloon.md, 4).
pub const CAPABILITIES: u64 = 1 | 1 << 1 | 7 << 2;

/// The most ranges in one message.
pub const MAX_RANGES: usize =
    (MAX_MESSAGE - size_of::<Header>() - size_of::<BalloonResponse>()) / 8;

/// The most pages in one range: its count has 24 bits.
pub const MAX_RANGE_PAGES: u64 = (1 << 24) - 1;

/// First page number in the lower 40 bits, page count in the upper 24.
pub fn encode_range(range: PageRange) -> u64 {
    range.first & ((1 << 40) - 1) | (range.count & MAX_RANGE_PAGES) << 40
}

/// The opposite of [`encode_range`].
pub fn decode_range(word: u64) -> PageRange {
    PageRange {
        first: word & ((1 << 40) - 1),
        count: word >> 40,
    }
}

/// Writes a message into `buffer`; `None` if it does not fit.
pub fn write<'a>(
    buffer: &'a mut [u8],
    kind: Kind,
    transaction_id: u32,
    body: &[u8],
    ranges: &[U64],
) -> Option<&'a [u8]> {
    let ranges = ranges.as_bytes();
    let size = size_of::<Header>() + body.len() + ranges.len();
    let header = Header {
        kind: U16::new(kind.0),
        size: U16::new(u16::try_from(size).ok()?),
        transaction_id: U32::new(transaction_id),
    };
    let message = buffer.get_mut(..size)?;
    let (head, rest) = message.split_at_mut_checked(size_of::<Header>())?;
    head.copy_from_slice(header.as_bytes());
    let (start, end) = rest.split_at_mut_checked(body.len())?;
    start.copy_from_slice(body);
    end.copy_from_slice(ranges);
    Some(message)
}

/// Splits a received message into its header and what follows, as far as the header says, which is at most what came.
pub fn parse(message: &[u8]) -> Option<(Header, &[u8])> {
    let (header, rest) = Header::read_from_prefix(message).ok()?;
    let length = usize::from(header.size.get()).checked_sub(size_of::<Header>())?;
    Some((header, rest.get(..length)?))
}
