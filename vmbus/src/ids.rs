//! Identifiers that must not be mistaken for one another.

use core::fmt;

/// Declares a newtype over an integer that prints as it does.
macro_rules! id {
    ($(#[$doc:meta])* $name:ident($int:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

id!(
    /// A channel's number on the bus ("child relid"), 1 to 2047; also its event flag in the
    /// SIEF page (spec vmbus.md 3.1, 5.2).
    ChannelId(u32), "{}"
);
id!(
    /// A guest-chosen handle of a GPADL, never zero (spec vmbus.md 3.3).
    GpadlHandle(u32), "{:#x}"
);
id!(
    /// A hypervisor connection id, the target of a posted message or a signalled event
    /// (TLFS, Inter-Partition Communication).
    ConnectionId(u32), "{:#x}"
);
id!(
    /// A virtual processor's index within the partition; not its APIC id (TLFS, Virtual Processors).
    VpIndex(u32), "{}"
);
id!(
    /// The number of a 4096-byte page of guest physical address space.
    PageNumber(u64), "{:#x}"
);

impl ChannelId {
    /// The largest number an event flag page has room for.
    pub const MAX: u32 = 2047;

    /// The number as an index, if it is one that a channel can have.
    pub const fn index(self) -> Option<usize> {
        if self.0 >= 1 && self.0 <= Self::MAX {
            Some(self.0 as usize)
        } else {
            None
        }
    }
}

/// Bytes in a page of guest physical address space, whatever the host's page size.
pub const PAGE_SIZE: usize = 4096;
