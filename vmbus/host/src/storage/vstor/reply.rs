//! What a host sends: answers, and notices that nobody has asked for.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::{
    Address, Direction, HEADER, MAX_PACKET, NtStatus, Operation, ProtocolVersion, Srb, SrbStatus,
    WireHeader, WireProperties, WireSrb,
};

/// Flag of the properties: sub-channels can be had.
const MULTI_CHANNEL: u32 = 1;

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
