//! What a guest sends: any bytes become a [`Request`], or are [`Malformed`].

use core::fmt;

use zerocopy::FromBytes;

use super::{
    Direction, HEADER, MAX_CDB, Operation, ProtocolVersion, SRB, SrbStatus, WireHeader, WireSrb,
    WireSrbExtension,
};

/// SRB flag: no sense data in the answer.
const DISABLE_AUTOSENSE: u32 = 0x20;

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
    pub(super) cdb_length: u8,
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
