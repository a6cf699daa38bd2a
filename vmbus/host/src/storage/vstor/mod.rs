//! VSTOR packets: what a guest's storage driver and its host say to each other (spec storvsc.md 2).
//!
//! [`parse`] reads any bytes; what has no meaning stays a [`Request::Other`] or becomes a [`Malformed`]. Packets for the
//! guest are made by [`Reply`] and [`notice`].

mod reply;
mod request;

use core::fmt;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use reply::{Notice, Properties, Reply, SrbEnd, notice};
pub use request::{Address, Malformed, Request, Srb, parse};

/// Bytes in front of what depends on the operation.
pub const HEADER: usize = 12;

/// The longest packet of any version in bytes.
pub const MAX_PACKET: usize = 64;

/// Bytes of a CDB at most.
pub const MAX_CDB: usize = 16;

/// What a packet is about (spec storvsc.md 2).
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Debug,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(transparent)]
pub struct Operation(U32);

/// Declares the operations.
macro_rules! operations {
    ($($constant:ident = $value:literal, $meaning:literal;)+) => {
        $(#[doc = $meaning] pub const $constant: Self = Self::new($value);)+
    };
}

impl Operation {
    /// The operation with this number.
    pub const fn new(number: u32) -> Self {
        Self(U32::new(number))
    }

    /// Its number.
    pub const fn number(self) -> u32 {
        self.0.get()
    }

    operations! {
        COMPLETE_IO = 1, "The host's answer to any packet.";
        REMOVE_DEVICE = 2, "Host: a unit has gone.";
        EXECUTE_SRB = 3, "Guest: a SCSI command.";
        RESET_LUN = 4, "Guest: gives up what a unit is doing.";
        RESET_ADAPTER = 5, "Guest: gives up what every unit is doing.";
        RESET_BUS = 6, "Guest: gives up what every unit of a path is doing.";
        BEGIN_INITIALIZATION = 7, "Guest: the first packet.";
        END_INITIALIZATION = 8, "Guest: from now on there are commands.";
        QUERY_PROTOCOL_VERSION = 9, "Guest: proposes a version.";
        QUERY_PROPERTIES = 10, "Guest: asks what the controller can do.";
        ENUMERATE_BUS = 11, "Host: units have come or gone.";
        FCHBA_DATA = 12, "Guest: asks for the names of a Fibre Channel adapter.";
        CREATE_SUB_CHANNELS = 13, "Guest: asks for more channels.";
        EVENT_NOTIFICATION = 14, "Host: something has happened to a unit.";
    }
}

/// A version of the protocol: the major number in the upper byte (spec storvsc.md 2.2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProtocolVersion(pub u16);

impl ProtocolVersion {
    /// Windows Server 2008.
    pub const V2_0: Self = Self(0x0200);
    /// Windows Server 2008 R2.
    pub const V4_2: Self = Self(0x0402);
    /// Windows Server 2012.
    pub const V5_1: Self = Self(0x0501);
    /// Windows Server 2012 R2.
    pub const V6_0: Self = Self(0x0600);
    /// Windows Server 2016.
    pub const V6_2: Self = Self(0x0602);

    /// Every version that there is, oldest first.
    pub const ALL: [Self; 5] = [Self::V2_0, Self::V4_2, Self::V5_1, Self::V6_0, Self::V6_2];

    /// Bytes of every packet.
    pub const fn packet_size(self) -> usize {
        if self.0 >= Self::V5_1.0 { 64 } else { 48 }
    }

    /// Bytes of an SRB.
    const fn srb_size(self) -> usize {
        self.packet_size() - HEADER
    }

    /// The most bytes of sense data in an answer.
    pub const fn sense_room(self) -> u8 {
        if self.0 >= Self::V5_1.0 { 0x14 } else { 0x12 }
    }

    /// Whether there can be sub-channels.
    pub fn has_sub_channels(self) -> bool {
        self >= Self::V5_1
    }

    /// Whether the guest understands [`Operation::ENUMERATE_BUS`].
    pub fn has_enumerate_bus(self) -> bool {
        self >= Self::V4_2
    }

    /// Whether the guest understands [`Operation::EVENT_NOTIFICATION`].
    pub fn has_events(self) -> bool {
        self >= Self::V6_0
    }
}

impl fmt::Debug for ProtocolVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 8, self.0 & 0xFF)
    }
}

/// An NTSTATUS (spec storvsc.md 5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NtStatus(pub u32);

impl NtStatus {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// More data than room.
    pub const BUFFER_OVERFLOW: Self = Self(0x8000_0005);
    /// A packet that is wrong in itself.
    pub const INVALID_PARAMETER: Self = Self(0xC000_000D);
    /// An operation that is none of this device.
    pub const INVALID_DEVICE_REQUEST: Self = Self(0xC000_0010);
    /// A version that the host does not speak.
    pub const REVISION_MISMATCH: Self = Self(0xC000_0059);
    /// There is no such unit.
    pub const DEVICE_DOES_NOT_EXIST: Self = Self(0xC000_00C0);
    /// Given up on request.
    pub const CANCELLED: Self = Self(0xC000_0120);
    /// An operation at the wrong time.
    pub const INVALID_DEVICE_STATE: Self = Self(0xC000_0184);
    /// Something else went wrong with a command: see the SRB.
    pub const IO_DEVICE_ERROR: Self = Self(0xC000_0185);
}

/// How the adapter ended a command (spec storvsc.md 5); bit 7 says that there is sense data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SrbStatus(pub u8);

impl SrbStatus {
    /// Done.
    pub const SUCCESS: Self = Self(0x01);
    /// The command failed: see the SCSI status.
    pub const ERROR: Self = Self(0x04);
    /// The request contradicts itself.
    pub const INVALID_REQUEST: Self = Self(0x06);
    /// Given up because of a reset.
    pub const BUS_RESET: Self = Self(0x0E);
    /// More data than room.
    pub const DATA_OVERRUN: Self = Self(0x12);
    /// The SRB's own length is wrong.
    pub const BAD_SRB_LENGTH: Self = Self(0x15);
    /// There is no such unit.
    pub const INVALID_LUN: Self = Self(0x20);
    /// The host failed.
    pub const INTERNAL_ERROR: Self = Self(0x30);
    /// Set besides: the answer has sense data.
    const AUTOSENSE_VALID: u8 = 0x80;

    /// The same, with sense data in the answer.
    #[must_use]
    pub const fn with_sense(self) -> Self {
        Self(self.0 | Self::AUTOSENSE_VALID)
    }

    /// Whether there is sense data in the answer.
    pub const fn has_sense(self) -> bool {
        self.0 & Self::AUTOSENSE_VALID != 0
    }
}

/// Where the data of a command goes (spec storvsc.md 2.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Direction(pub u8);

impl Direction {
    /// To the device: a write.
    pub const OUT: Self = Self(0);
    /// From the device: a read.
    pub const IN: Self = Self(1);
    /// There is none.
    pub const NONE: Self = Self(2);
}

/// The SCSI command in a packet, as every version has it (spec storvsc.md 2.1).
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct WireSrb {
    length: U16,
    srb_status: u8,
    scsi_status: u8,
    port: u8,
    path: u8,
    target: u8,
    lun: u8,
    cdb_length: u8,
    sense_length: u8,
    direction: u8,
    properties: u8,
    transfer_length: U32,
    /// The CDB in a request, sense data in an answer.
    payload: [u8; 20],
}

/// What versions from 5.1 on have behind it.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct WireSrbExtension {
    reserved: U16,
    queue_tag: u8,
    queue_action: u8,
    flags: U32,
    timeout: U32,
    sort_key: U32,
}

/// What every packet begins with.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct WireHeader {
    operation: Operation,
    flags: U32,
    status: U32,
}

/// The answer to QUERY_PROPERTIES (spec storvsc.md 2.3).
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct WireProperties {
    reserved: U32,
    sub_channels: U16,
    reserved_too: U16,
    flags: U32,
    max_transfer: U32,
    reserved_again: [U32; 2],
}

const SRB: usize = size_of::<WireSrb>();
const _: () = assert!(SRB == 0x24);
const _: () = assert!(SRB + size_of::<WireSrbExtension>() == 0x34);
const _: () = assert!(size_of::<WireHeader>() == HEADER);
const _: () = assert!(size_of::<WireProperties>() == 24);
const _: () = assert!(HEADER + 0x34 == MAX_PACKET);
