//! Messages of the integration components as they are on the wire (spec ic.md 2 to 4).

use alloc::vec::Vec;
use core::fmt;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::message_faults::Layout;

/// A version: of the framework, or of a component's messages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u16, pub u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a guest says about a request: an HRESULT (spec ic.md 3).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct GuestStatus(pub u32);

impl GuestStatus {
    /// Done, or will be.
    pub const OK: Self = Self(0);
    /// Will not be done.
    pub const FAILURE: Self = Self(0x8000_4005);
    /// The guest cannot do that.
    pub const NOT_SUPPORTED: Self = Self(0x8007_0032);
    /// The list ends before this item.
    pub const NO_MORE_ITEMS: Self = Self(0x8007_0103);
    /// There is no such thing.
    pub const NOT_FOUND: Self = Self(0x8004_1002);
    /// The request makes no sense.
    pub const INVALID_ARGUMENT: Self = Self(0x8007_0057);
    /// It is there already.
    pub const ALREADY_EXISTS: Self = Self(0x8007_0050);
    /// The guest's disk is full.
    pub const DISK_FULL: Self = Self(0x8007_0070);
    /// The guest's service is not connected.
    pub const NOT_CONNECTED: Self = Self(0x8007_048F);
    /// The guest is locked by its user.
    pub const MACHINE_LOCKED: Self = Self(0x8007_04F7);

    /// Whether the guest has done, or will do, what was asked.
    pub const fn is_ok(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for GuestStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::OK => "done",
            Self::FAILURE => "failure",
            Self::NOT_SUPPORTED => "not supported",
            Self::NO_MORE_ITEMS => "no more items",
            Self::NOT_FOUND => "not found",
            Self::INVALID_ARGUMENT => "invalid argument",
            Self::ALREADY_EXISTS => "already exists",
            Self::DISK_FULL => "disk full",
            Self::NOT_CONNECTED => "not connected",
            Self::MACHINE_LOCKED => "machine locked",
            _ => "unknown error",
        };
        write!(f, "{name} ({:#010x})", self.0)
    }
}

impl fmt::Debug for GuestStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Message type of the negotiation.
pub(super) const NEGOTIATE: u16 = 0;

/// Flags of a request: transaction, request.
pub const REQUEST_FLAGS: u8 = 3;

/// Flags of an answer: transaction, response.
pub const ANSWER_FLAGS: u8 = 5;

/// In front of every message: the pipe's header and the component's (spec ic.md 3).
#[repr(C)]
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
pub(super) struct Header {
    pub(super) pipe_kind: U32,
    pub(super) pipe_length: U32,
    pub(super) framework: [U16; 2],
    pub(super) kind: U16,
    pub(super) message: [U16; 2],
    pub(super) body_size: U16,
    pub(super) status: U32,
    pub(super) transaction: u8,
    pub(super) flags: u8,
    pub(super) reserved: U16,
}

/// Bytes of the headers in front of a body.
pub const HEADER: usize = size_of::<Header>();

const _: () = assert!(HEADER == 28);

/// Bytes of the pipe's own header.
pub(super) const PIPE_HEADER: usize = 8;

/// Where faults find the fields of [`Header`].
pub(super) const LAYOUT: Layout = Layout {
    id: 24..25,
    kind: 12..14,
    length: 18..20,
    envelope: Some(4..8),
};

/// A packet as the host sends it: pipe header, component header, body.
pub fn message(
    kind: u16,
    framework: Version,
    version: Version,
    transaction: u8,
    flags: u8,
    body: &[u8],
) -> Vec<u8> {
    let header = Header {
        pipe_kind: U32::new(1),
        pipe_length: U32::new((HEADER - PIPE_HEADER + body.len()) as u32),
        framework: [U16::new(framework.0), U16::new(framework.1)],
        kind: U16::new(kind),
        message: [U16::new(version.0), U16::new(version.1)],
        body_size: U16::new(body.len() as u16),
        status: U32::ZERO,
        transaction,
        flags,
        reserved: U16::ZERO,
    };
    let mut bytes = Vec::from(header.as_bytes());
    bytes.extend_from_slice(body);
    bytes
}
