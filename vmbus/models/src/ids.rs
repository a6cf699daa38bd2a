//! The identifiers that the compiled sources name, in small.

/// Bytes of a page: a control page, and room for three packets.
pub(crate) const PAGE_SIZE: usize = 128;

/// A page's number; pages have none here.
#[derive(Clone, Copy, Debug)]
pub struct PageNumber(pub u64);

/// A channel's number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChannelId(pub u32);

impl ChannelId {
    /// As many as fit one word of the set of deferred channels.
    pub const MAX: u32 = 63;

    pub const fn index(self) -> Option<usize> {
        if self.0 >= 1 && self.0 <= Self::MAX {
            Some(self.0 as usize)
        } else {
            None
        }
    }
}
