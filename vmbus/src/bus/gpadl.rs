//! GPADLs: ranges of guest memory described to the host, cut into messages.

use alloc::vec::Vec;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::event::Error;
use crate::ids::{ChannelId, GpadlHandle, PAGE_SIZE, PageNumber};
use crate::protocol::Payload;
use crate::protocol::message::{GpadlBody, GpadlHeader, RangeHeader};

/// How many 8-byte words (range headers and page numbers) a GPADL can have: its length in bytes is a 16-bit
/// field (spec vmbus.md 3.3).
pub const MAX_WORDS: usize = u16::MAX as usize / 8;

/// How many pages a GPADL of one range can have.
pub const MAX_PAGES: usize = MAX_WORDS - 1;

/// A run of guest memory, contiguous for the host though its pages need not be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GpaRange {
    /// Where the range begins in its first page, in bytes.
    pub byte_offset: u32,
    /// Its length in bytes.
    pub byte_count: u32,
    /// The pages it lies in, in order.
    pub pages: Vec<PageNumber>,
}

impl GpaRange {
    /// A range of whole pages: what rings are made of, and all that QEMU accepts.
    ///
    /// # Errors
    ///
    /// [`Error::BadRange`] when there is no page, [`Error::GpadlTooLong`] when there are more than [`MAX_PAGES`].
    pub fn whole_pages(pages: impl IntoIterator<Item = PageNumber>) -> Result<Self, Error> {
        // One page more than fits tells that there are too many, however many there are.
        let pages: Vec<PageNumber> = pages.into_iter().take(MAX_PAGES + 1).collect();
        if pages.len() > MAX_PAGES {
            return Err(Error::GpadlTooLong {
                words: pages.len() + 1,
            });
        }
        let byte_count = u32::try_from(pages.len() * PAGE_SIZE).map_err(|_| Error::BadRange)?;
        if byte_count == 0 {
            return Err(Error::BadRange);
        }
        Ok(Self {
            byte_offset: 0,
            byte_count,
            pages,
        })
    }

    /// Whether the pages are exactly those that offset and length need.
    fn is_sound(&self) -> bool {
        let end = u64::from(self.byte_offset) + u64::from(self.byte_count);
        self.byte_count > 0
            && (self.byte_offset as usize) < PAGE_SIZE
            && end.div_ceil(PAGE_SIZE as u64) == self.pages.len() as u64
    }
}

/// A GPADL on its way to the host: makes one message after another.
#[derive(Clone, Debug)]
pub(super) struct Transfer {
    handle: GpadlHandle,
    channel: ChannelId,
    range_count: u16,
    words: Vec<U64>,
    /// Words that are in messages already.
    sent: usize,
    /// Messages made so far.
    messages: u32,
}

impl Transfer {
    /// Checks the ranges and lays them out.
    pub(super) fn new(
        handle: GpadlHandle,
        channel: ChannelId,
        ranges: &[GpaRange],
    ) -> Result<Self, Error> {
        if ranges.is_empty() || !ranges.iter().all(GpaRange::is_sound) {
            return Err(Error::BadRange);
        }
        let count: usize = ranges.iter().map(|range| range.pages.len() + 1).sum();
        if count > MAX_WORDS {
            return Err(Error::GpadlTooLong { words: count });
        }
        let mut words = Vec::with_capacity(count);
        for range in ranges {
            let header = RangeHeader {
                byte_count: U32::new(range.byte_count),
                byte_offset: U32::new(range.byte_offset),
            };
            words.push(zerocopy::transmute!(header));
            words.extend(range.pages.iter().map(|page| U64::new(page.0)));
        }
        Ok(Self {
            handle,
            channel,
            // At most MAX_WORDS.
            range_count: ranges.len() as u16,
            words,
            sent: 0,
            messages: 0,
        })
    }

    pub(super) fn handle(&self) -> GpadlHandle {
        self.handle
    }

    /// The next message; `None` when the whole GPADL has been sent.
    pub(super) fn next_message(&mut self) -> Option<Payload> {
        let rest = self
            .words
            .get(self.sent..)
            .filter(|rest| !rest.is_empty())?;
        let gpadl = U32::new(self.handle.0);
        let mut payload = match self.messages.checked_sub(1) {
            None => Payload::new(&GpadlHeader {
                channel: U32::new(self.channel.0),
                gpadl,
                // At most MAX_WORDS words.
                range_bytes: U16::new((self.words.len() * 8) as u16),
                range_count: U16::new(self.range_count),
            }),
            Some(number) => Payload::new(&GpadlBody {
                number: U32::new(number),
                gpadl,
            }),
        };
        let count = rest.len().min(payload.room() / 8);
        payload.append(rest.get(..count)?.as_bytes());
        self.sent += count;
        self.messages += 1;
        Some(payload)
    }

    /// Whether every message has been made.
    pub(super) fn is_done(&self) -> bool {
        self.sent == self.words.len()
    }
}

/// Words after the header and after a body's own fields (spec vmbus.md 3.3): 26 page numbers behind the
/// range header, then 28 in each body.
const _: () = {
    use crate::protocol::MAX_PAYLOAD;
    use crate::protocol::message::Header;
    assert!((MAX_PAYLOAD - size_of::<Header>() - size_of::<GpadlHeader>()) / 8 == 27);
    assert!((MAX_PAYLOAD - size_of::<Header>() - size_of::<GpadlBody>()) / 8 == 28);
    assert!(MAX_PAGES == 8190);
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Body, Header, MessageType};
    use proptest::prelude::*;

    fn pages(count: usize) -> Vec<PageNumber> {
        (0..count as u64)
            .map(|i| PageNumber(0x1_0000_0000 + i * 7))
            .collect()
    }

    fn messages(ranges: &[GpaRange]) -> Vec<Payload> {
        let mut transfer = Transfer::new(GpadlHandle(9), ChannelId(3), ranges).unwrap();
        let messages: Vec<_> = core::iter::from_fn(|| transfer.next_message()).collect();
        assert!(transfer.is_done());
        messages
    }

    /// All that follows the messages' own fields, in one piece.
    fn stream(messages: &[Payload]) -> Vec<u8> {
        let mut data = Vec::new();
        for (i, message) in messages.iter().enumerate() {
            let rest = if i == 0 {
                let (header, rest) = GpadlHeader::parse(message).unwrap();
                assert_eq!((header.channel.get(), header.gpadl.get()), (3, 9));
                rest
            } else {
                let (body, rest) = GpadlBody::parse(message).unwrap();
                assert_eq!((body.number.get() as usize, body.gpadl.get()), (i - 1, 9));
                rest
            };
            assert!(message.len() <= 240);
            data.extend_from_slice(rest);
        }
        data
    }

    #[test]
    fn chunks_are_26_pages_and_then_28() {
        for (count, expected) in [
            (1, 1),
            (26, 1),
            (27, 2),
            (54, 2),
            (55, 3),
            (82, 3),
            (8190, 293),
        ] {
            let range = GpaRange::whole_pages(pages(count)).unwrap();
            let messages = messages(&[range]);
            assert_eq!(messages.len(), expected, "{count} pages");
            assert_eq!(
                Header::type_of(&messages[0]),
                Some(MessageType::GPADL_HEADER)
            );
            let (header, _) = GpadlHeader::parse(&messages[0]).unwrap();
            assert_eq!(usize::from(header.range_bytes.get()), (count + 1) * 8);
            assert_eq!(header.range_count.get(), 1);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert_eq!(
            GpaRange::whole_pages(pages(8191)),
            Err(Error::GpadlTooLong { words: 8192 })
        );
        assert_eq!(GpaRange::whole_pages([]), Err(Error::BadRange));
        let half = GpaRange::whole_pages(pages(4095)).unwrap();
        let new = |ranges: &[GpaRange]| Transfer::new(GpadlHandle(1), ChannelId(1), ranges);
        assert_eq!(
            new(&[half.clone(), half]).unwrap_err(),
            Error::GpadlTooLong { words: 8192 }
        );
        assert_eq!(new(&[]).unwrap_err(), Error::BadRange);
        for (byte_offset, byte_count, count) in [
            (0, 4097, 1),
            (0, 4096, 2),
            (1, 4096, 1),
            (4096, 1, 2),
            (0, 0, 0),
            (u32::MAX, u32::MAX, 1),
        ] {
            let range = GpaRange {
                byte_offset,
                byte_count,
                pages: pages(count),
            };
            assert_eq!(new(&[range]).unwrap_err(), Error::BadRange);
        }
    }

    proptest! {
        /// Header and bodies, put together, are exactly the ranges.
        #[test]
        fn nothing_is_lost_or_added(
            ranges in proptest::collection::vec(
                (0u32..4096, proptest::collection::vec(any::<u64>(), 1..200), 0u32..4096),
                1..6,
            )
        ) {
            let ranges: Vec<GpaRange> = ranges
                .into_iter()
                .map(|(byte_offset, pages, tail)| {
                    // Ends somewhere in the last page.
                    let least = ((pages.len() as u32 - 1) * 4096).max(byte_offset);
                    let end = (least + 1 + tail).min(pages.len() as u32 * 4096);
                    GpaRange {
                        byte_offset,
                        byte_count: end - byte_offset,
                        pages: pages.into_iter().map(PageNumber).collect(),
                    }
                })
                .collect();
            let mut expected = Vec::new();
            for range in &ranges {
                expected.extend(range.byte_count.to_le_bytes());
                expected.extend(range.byte_offset.to_le_bytes());
                range.pages.iter().for_each(|page| expected.extend(page.0.to_le_bytes()));
            }
            let messages = messages(&ranges);
            prop_assert_eq!(stream(&messages), expected);
        }
    }
}
