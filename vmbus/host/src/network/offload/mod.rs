//! What network cards do with frames, in software: checksums, segmentation, VLAN tags.

mod checksum;
mod headers;
mod segment;
mod vlan;

#[cfg(test)]
mod tests;

pub use checksum::{NotApplicable, fill_checksums, sum, verify_checksums};
pub use headers::{Headers, Ip, Transport};
pub use segment::{MIN_SEGMENT, Segmentation, leave_uncut, resize_large, segment};
pub use vlan::{insert_tag, strip_tag};

/// Bytes of an Ethernet header without tags.
pub const ETHERNET: usize = 14;

/// Bytes of a VLAN tag.
pub const VLAN: usize = 4;
