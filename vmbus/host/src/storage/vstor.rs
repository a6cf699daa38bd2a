//! VSTOR packets: what a guest's storage driver and its host say to each other (spec storvsc.md 2).
//!
//! [`parse`] reads any bytes; what has no meaning stays a [`Request::Other`] or becomes a [`Malformed`]. Packets for the
//! guest are made by [`Reply`] and [`notice`].

use core::fmt;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

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

/// SRB flag: no sense data in the answer.
const DISABLE_AUTOSENSE: u32 = 0x20;

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

/// Flag of the properties: sub-channels can be had.
const MULTI_CHANNEL: u32 = 1;

/// Which unit a command is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address {
    /// The path, or bus.
    pub path: u8,
    /// The target on it.
    pub target: u8,
    /// The logical unit of that.
    pub lun: u8,
}

/// A SCSI command as the guest sent it.
#[derive(Clone, Copy, Debug)]
pub struct Srb {
    /// For which unit.
    pub address: Address,
    /// Where the data goes.
    pub direction: Direction,
    /// Bytes of data that the guest has or has room for.
    pub transfer_length: u32,
    /// Bytes of sense data that the guest has room for.
    pub sense_room: u8,
    cdb: [u8; MAX_CDB],
    cdb_length: u8,
}

impl Srb {
    /// The CDB.
    pub fn cdb(&self) -> &[u8] {
        self.cdb
            .get(..usize::from(self.cdb_length))
            .unwrap_or_default()
    }
}

/// What a guest asks for.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// The first packet.
    BeginInitialization,
    /// From now on there are commands.
    EndInitialization,
    /// Proposes a version.
    QueryProtocolVersion(ProtocolVersion),
    /// Asks what the controller can do.
    QueryProperties,
    /// Asks for so many sub-channels.
    CreateSubChannels(u16),
    /// A command.
    ExecuteSrb(Srb),
    /// Gives up what this unit is doing.
    ResetLun(Address),
    /// Gives up what every unit is doing.
    ResetBus,
    /// Something that no guest has to ask of a SCSI controller.
    Other(Operation),
}

/// What is wrong with a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Malformed {
    /// Fewer bytes than its operation needs.
    Short {
        /// Bytes that came.
        length: usize,
        /// Bytes that are needed.
        needed: usize,
    },
    /// An SRB says of itself that it has so many bytes.
    SrbLength(u16),
    /// A CDB of so many bytes.
    CdbLength(u8),
    /// A direction that is none.
    Direction(u8),
}

impl Malformed {
    /// How a command that is wrong in this way is answered.
    pub const fn srb_status(self) -> SrbStatus {
        match self {
            Self::Short { .. } | Self::SrbLength(_) => SrbStatus::BAD_SRB_LENGTH,
            Self::CdbLength(_) | Self::Direction(_) => SrbStatus::INVALID_REQUEST,
        }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short { length, needed } => {
                write!(f, "a packet of {length} bytes where {needed} are needed")
            }
            Self::SrbLength(length) => write!(f, "an SRB of {length} bytes"),
            Self::CdbLength(length) => write!(f, "a CDB of {length} bytes"),
            Self::Direction(direction) => write!(f, "data direction {direction}"),
        }
    }
}

impl core::error::Error for Malformed {}

/// Reads a packet of the guest. `version` is what was agreed upon; before that a packet may have any version's length.
/// What follows the packet is ignored: rings pad.
///
/// # Errors
///
/// [`Malformed`], with the operation if there is one.
pub fn parse(
    payload: &[u8],
    version: Option<ProtocolVersion>,
) -> Result<Request, (Option<Operation>, Malformed)> {
    let short = |needed| Malformed::Short {
        length: payload.len(),
        needed,
    };
    let (header, body) = WireHeader::ref_from_prefix(payload).map_err(|_| (None, short(HEADER)))?;
    let operation = header.operation;
    let word = |at: usize| match body.get(at..).and_then(|rest| rest.first_chunk::<2>()) {
        Some(bytes) => Ok(u16::from_le_bytes(*bytes)),
        None => Err((Some(operation), short(HEADER + at + 2))),
    };
    Ok(match operation {
        Operation::BEGIN_INITIALIZATION => Request::BeginInitialization,
        Operation::END_INITIALIZATION => Request::EndInitialization,
        Operation::QUERY_PROTOCOL_VERSION => {
            Request::QueryProtocolVersion(ProtocolVersion(word(0)?))
        }
        Operation::QUERY_PROPERTIES => Request::QueryProperties,
        Operation::CREATE_SUB_CHANNELS => Request::CreateSubChannels(word(0)?),
        Operation::EXECUTE_SRB => {
            let version = version.unwrap_or(ProtocolVersion::V2_0);
            let srb = parse_srb(body, version).map_err(|error| match error {
                None => (Some(operation), short(version.packet_size())),
                Some(error) => (Some(operation), error),
            })?;
            Request::ExecuteSrb(srb)
        }
        Operation::RESET_LUN => {
            let [path, target] = word(5)?.to_le_bytes();
            let [_, lun] = word(6)?.to_le_bytes();
            Request::ResetLun(Address { path, target, lun })
        }
        Operation::RESET_ADAPTER | Operation::RESET_BUS => Request::ResetBus,
        other => Request::Other(other),
    })
}

/// Reads the SRB. The error is `None` when there are too few bytes.
fn parse_srb(body: &[u8], version: ProtocolVersion) -> Result<Srb, Option<Malformed>> {
    let (wire, rest) = WireSrb::ref_from_prefix(body).map_err(|_| None)?;
    let mut flags = 0;
    if version.srb_size() > SRB {
        let (extension, _) = WireSrbExtension::ref_from_prefix(rest).map_err(|_| None)?;
        flags = extension.flags.get();
    }
    let length = wire.length.get();
    if usize::from(length) < SRB || usize::from(length) > body.len() {
        return Err(Some(Malformed::SrbLength(length)));
    }
    if !(1..=MAX_CDB).contains(&usize::from(wire.cdb_length)) {
        return Err(Some(Malformed::CdbLength(wire.cdb_length)));
    }
    let direction = Direction(wire.direction);
    if direction.0 > Direction::NONE.0 {
        return Err(Some(Malformed::Direction(wire.direction)));
    }
    let mut cdb = [0; MAX_CDB];
    let bytes = wire.payload.iter().take(usize::from(wire.cdb_length));
    cdb.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    let no_sense = flags & DISABLE_AUTOSENSE != 0;
    Ok(Srb {
        address: Address {
            path: wire.path,
            target: wire.target,
            lun: wire.lun,
        },
        direction,
        transfer_length: wire.transfer_length.get(),
        sense_room: if no_sense { 0 } else { wire.sense_length }.min(version.sense_room()),
        cdb,
        cdb_length: wire.cdb_length,
    })
}

/// What the controller can do (spec storvsc.md 2.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Properties {
    /// How many sub-channels it can have at most.
    pub sub_channels: u16,
    /// The most bytes of one command's data.
    pub max_transfer: u32,
}

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SrbEnd {
    /// The adapter's word on it; with [`SrbStatus::with_sense`] when there is sense data.
    pub srb_status: SrbStatus,
    /// The unit's word on it (SAM): 0 good, 2 check condition.
    pub scsi_status: u8,
    /// Bytes that were transferred.
    pub transferred: u32,
    /// Sense data, and how much of it counts.
    pub sense: Option<([u8; 18], u8)>,
}

/// A packet for the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reply {
    bytes: [u8; MAX_PACKET],
    length: usize,
}

impl Reply {
    /// An answer of `size` bytes (at most [`MAX_PACKET`]) that says only this.
    pub fn status(size: usize, status: NtStatus) -> Self {
        Self::packet(size, Operation::COMPLETE_IO, 0, status)
    }

    /// The answer to QUERY_PROTOCOL_VERSION.
    pub fn version(size: usize, status: NtStatus, version: ProtocolVersion) -> Self {
        let mut reply = Self::status(size, status);
        reply.put(&U16::new(version.0));
        reply
    }

    /// The answer to QUERY_PROPERTIES.
    pub fn properties(size: usize, properties: &Properties) -> Self {
        let mut reply = Self::status(size, NtStatus::SUCCESS);
        let multi = properties.sub_channels != 0;
        reply.put(&WireProperties {
            reserved: U32::ZERO,
            sub_channels: U16::new(properties.sub_channels),
            reserved_too: U16::ZERO,
            flags: U32::new(if multi { MULTI_CHANNEL } else { 0 }),
            max_transfer: U32::new(properties.max_transfer),
            reserved_again: [U32::ZERO; 2],
        });
        reply
    }

    /// The answer to a command. `srb` is what was asked, as far as it could be read.
    pub fn srb(version: ProtocolVersion, srb: Option<&Srb>, end: &SrbEnd) -> Self {
        let mut reply = Self::status(version.packet_size(), nt_status(end.srb_status));
        let address = srb.map_or([0; 3], |srb| {
            [srb.address.path, srb.address.target, srb.address.lun]
        });
        let mut payload = [0; 20];
        let mut sense_length = 0;
        if let Some((sense, length)) = end.sense {
            sense_length = length;
            let valid = sense.iter().take(usize::from(length));
            payload
                .iter_mut()
                .zip(valid)
                .for_each(|(to, from)| *to = *from);
        }
        reply.put(&WireSrb {
            length: U16::new(version.srb_size() as u16),
            srb_status: end.srb_status.0,
            scsi_status: end.scsi_status,
            port: 0,
            path: address[0],
            target: address[1],
            lun: address[2],
            cdb_length: srb.map_or(0, |srb| srb.cdb_length),
            sense_length,
            direction: srb.map_or(Direction::NONE.0, |srb| srb.direction.0),
            properties: 0,
            transfer_length: U32::new(end.transferred),
            payload,
        });
        reply
    }

    /// The packet.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    fn packet(size: usize, operation: Operation, flags: u32, status: NtStatus) -> Self {
        let mut packet = Self {
            bytes: [0; MAX_PACKET],
            length: size.min(MAX_PACKET),
        };
        let header = WireHeader {
            operation,
            flags: U32::new(flags),
            status: U32::new(status.0),
        };
        // The header is shorter than the longest packet.
        let _ = header.write_to_prefix(&mut packet.bytes);
        packet
    }

    /// Writes what follows the header.
    fn put(&mut self, body: &(impl IntoBytes + Immutable)) {
        if let Some(place) = self.bytes.get_mut(HEADER..) {
            let _ = body.write_to_prefix(place);
        }
    }
}

/// The NTSTATUS that goes with an SRB status: for the guest's log.
fn nt_status(status: SrbStatus) -> NtStatus {
    match SrbStatus(status.0 & 0x3F) {
        SrbStatus::SUCCESS => NtStatus::SUCCESS,
        SrbStatus::DATA_OVERRUN => NtStatus::BUFFER_OVERFLOW,
        SrbStatus::INVALID_LUN => NtStatus::DEVICE_DOES_NOT_EXIST,
        SrbStatus::INVALID_REQUEST => NtStatus::INVALID_DEVICE_REQUEST,
        SrbStatus::BAD_SRB_LENGTH => NtStatus::INVALID_PARAMETER,
        SrbStatus::BUS_RESET => NtStatus::CANCELLED,
        _ => NtStatus::IO_DEVICE_ERROR,
    }
}

/// Something that the host tells unasked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// Units have come or gone.
    EnumerateBus,
    /// The medium of this unit has changed.
    MediaChanged(Address),
}

/// The packet that tells it.
pub fn notice(version: ProtocolVersion, notice: Notice) -> Reply {
    let size = version.packet_size();
    match notice {
        Notice::EnumerateBus => Reply::packet(size, Operation::ENUMERATE_BUS, 0, NtStatus::SUCCESS),
        Notice::MediaChanged(address) => {
            let event = Operation::EVENT_NOTIFICATION;
            let mut packet = Reply::packet(size, event, 0, NtStatus::SUCCESS);
            packet.put(&[address.lun, address.target, address.path, MEDIA_CHANGED]);
            packet
        }
    }
}

/// Flag of an event notification: the medium has changed.
const MEDIA_CHANGED: u8 = 1;
