//! Monitor pages: the memory through which a signal goes without a hypercall (spec vmbus.md 5.3).

use core::fmt;
use core::mem::offset_of;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::{PAGE_SIZE, PageNumber};

/// Both pages, as INITIATE_CONTACT names them: there are two or none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MonitorPages {
    /// The one that the host writes.
    pub parent_to_child: PageNumber,
    /// The one that the guest writes.
    pub child_to_parent: PageNumber,
}

/// Groups of bits in a page.
pub const GROUPS: usize = 4;

/// Bits in a group.
pub const GROUP_BITS: usize = 32;

/// One group of bits.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct TriggerGroup {
    /// The bits that are signalled.
    pub pending: U32,
    /// The receiver's own.
    pub armed: U32,
}

const _: () = assert!(size_of::<TriggerGroup>() == 8);

/// What a bit stands for.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Parameter {
    /// The event connection that a hypercall would name.
    pub connection: U32,
    /// The flag that a hypercall would name.
    pub flag: U16,
    /// Zero.
    pub reserved: U16,
}

const _: () = assert!(size_of::<Parameter>() == 8);

/// A whole monitor page.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct MonitorPage {
    /// Bits 3:0 tell which groups the receiver looks at.
    pub trigger_state: U32,
    /// Zero.
    pub reserved_state: U32,
    /// The bits themselves.
    pub groups: [TriggerGroup; GROUPS],
    /// Not used.
    pub reserved_groups: [u8; 24],
    /// When the receiver looks at a bit next; its own.
    pub next_check: [[U32; GROUP_BITS]; GROUPS],
    /// How long a bit may wait to be seen, in units of 100 ns.
    pub latency: [[U16; GROUP_BITS]; GROUPS],
    /// Not used.
    pub reserved_latency: [u8; 256],
    /// What each bit stands for.
    pub parameter: [[Parameter; GROUP_BITS]; GROUPS],
    /// Not used.
    pub reserved_parameter: [u8; 1984],
}

const _: () = {
    assert!(size_of::<MonitorPage>() == PAGE_SIZE);
    assert!(offset_of!(MonitorPage, groups) == 0x008);
    assert!(offset_of!(MonitorPage, next_check) == 0x040);
    assert!(offset_of!(MonitorPage, latency) == 0x240);
    assert!(offset_of!(MonitorPage, parameter) == 0x440);
    assert!(offset_of!(MonitorPage, reserved_parameter) == 0x840);
};

/// A bit of a monitor page: less than 128.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MonitorId(u8);

impl MonitorId {
    /// The number of bits in a page.
    pub const COUNT: usize = GROUPS * GROUP_BITS;

    /// The bit with this number, if there is one.
    pub const fn new(number: u8) -> Option<Self> {
        if (number as usize) < Self::COUNT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Its group.
    pub const fn group(self) -> usize {
        self.0 as usize / GROUP_BITS
    }

    /// Its place in the group's word.
    pub const fn mask(self) -> u32 {
        1 << (self.0 as usize % GROUP_BITS)
    }

    /// The bit of `trigger_state` that tells whether the receiver looks at it.
    pub const fn enable_mask(self) -> u32 {
        1 << self.group()
    }

    /// Where the 32-bit word of trigger state stands in the page, in bytes.
    pub const TRIGGER_STATE: usize = offset_of!(MonitorPage, trigger_state);

    /// Where the 32-bit word of its group's pending bits stands in the page, in bytes.
    pub const fn pending_offset(self) -> usize {
        offset_of!(MonitorPage, groups) + self.group() * size_of::<TriggerGroup>()
    }

    /// Where its 16-bit latency stands in the page, in bytes.
    pub const fn latency_offset(self) -> usize {
        offset_of!(MonitorPage, latency) + self.0 as usize * size_of::<U16>()
    }

    /// Where its [`Parameter`] stands in the page, in bytes.
    pub const fn parameter_offset(self) -> usize {
        offset_of!(MonitorPage, parameter) + self.0 as usize * size_of::<Parameter>()
    }
}

impl fmt::Display for MonitorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_lie_where_the_page_has_them() {
        assert_eq!(MonitorId::new(128), None);
        assert_eq!(MonitorId::new(255), None);
        let last = MonitorId::new(127).unwrap();
        assert_eq!(
            (last.group(), last.mask(), last.enable_mask()),
            (3, 1 << 31, 8)
        );
        assert_eq!(last.pending_offset(), 0x020);
        assert_eq!(last.latency_offset(), 0x33E);
        assert_eq!(last.parameter_offset(), 0x838);
        let first = MonitorId::new(0).unwrap();
        assert_eq!(
            (first.group(), first.mask(), first.enable_mask()),
            (0, 1, 1)
        );
        assert_eq!(
            [
                first.pending_offset(),
                first.latency_offset(),
                first.parameter_offset()
            ],
            [0x008, 0x240, 0x440]
        );
        let of_group = MonitorId::new(32).unwrap();
        assert_eq!((of_group.group(), of_group.mask()), (1, 1));
    }
}
