//! What can be made to go wrong.

use serde::{Deserialize, Serialize};

use crate::config::Kind;

/// A fault, and where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FaultOn {
    /// The device.
    pub device: String,
    /// What goes wrong.
    #[serde(flatten)]
    pub fault: Fault,
}

/// What goes wrong. Rates are in thousandths; what is drawn is drawn from the device's own seed, the same in each run.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(
    tag = "kind",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Fault {
    /// Packets come late.
    Delay {
        /// Which way.
        #[serde(default)]
        direction: Direction,
        /// By how much.
        milliseconds: u64,
        /// How many packets; without it all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        packets: Option<u32>,
    },
    /// Packets do not come at all.
    Drop {
        /// Which way.
        #[serde(default)]
        direction: Direction,
        /// How many packets; without it all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        packets: Option<u32>,
    },
    /// Packets are too short.
    Truncate {
        /// Which way.
        #[serde(default)]
        direction: Direction,
        /// How long they are at most, in bytes.
        bytes: u32,
        /// How many packets; without it all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        packets: Option<u32>,
    },
    /// Packets are too long.
    Extend {
        /// Which way.
        #[serde(default)]
        direction: Direction,
        /// By how many bytes.
        bytes: u32,
        /// How many packets; without it all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        packets: Option<u32>,
    },
    /// Packets have another transaction id than they should.
    WrongTransaction {
        /// Which way.
        #[serde(default)]
        direction: Direction,
        /// How many packets; without it all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        packets: Option<u32>,
    },
    /// Bytes of the payload are changed.
    Corrupt {
        /// Which way.
        #[serde(default)]
        direction: Direction,
        /// Where in the payload.
        offset: u32,
        /// How many packets; without it all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        packets: Option<u32>,
    },
    /// The indices of a ring are no indices.
    CorruptRing {
        /// Which ring.
        #[serde(default)]
        direction: Direction,
    },
    /// The host neither reads the ring nor signals.
    Stall {},
    /// The device is taken away after so many packets, in the middle of whatever goes on.
    RescindAfter {
        /// How many packets of the guest's.
        packets: u32,
    },
    /// A disk is slow.
    SlowDisk {
        /// The disk of the controller.
        lun: u8,
        /// How long each transfer takes, at least.
        milliseconds: u64,
    },
    /// Parts of a disk cannot be read or written.
    FailingDisk {
        /// The disk of the controller.
        lun: u8,
        /// What fails.
        #[serde(default)]
        operation: DiskOperation,
        /// Where the part begins, in bytes.
        #[serde(default)]
        offset: u64,
        /// How long it is, in bytes; without it to the end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        length: Option<u64>,
    },
    /// Writes of a disk are cut off in the middle.
    TornWrites {
        /// The disk of the controller.
        lun: u8,
        /// How many bytes of a write still get there.
        bytes: u64,
    },
    /// A network loses frames, doubles them, changes their order and makes them late.
    LossyNetwork {
        /// Lost frames of a thousand.
        #[serde(default)]
        loss: u16,
        /// Doubled frames of a thousand.
        #[serde(default)]
        duplication: u16,
        /// Frames of a thousand that come after the next one.
        #[serde(default)]
        reordering: u16,
        /// How late all are, in milliseconds.
        #[serde(default)]
        milliseconds: u64,
    },
}

/// A direction on VMBus.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From host to guest.
    #[default]
    ToGuest,
    /// From guest to host.
    ToHost,
}

/// What a disk does.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskOperation {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It makes writes durable.
    Flush,
    /// Anything.
    #[default]
    Any,
}

/// A fault that a device of this kind cannot have.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{device}` is a {} device: it cannot have the fault `{fault}`", kind.name())]
pub struct Misfit {
    /// The device.
    pub device: String,
    /// What sort it is.
    pub kind: Kind,
    /// The fault.
    pub fault: &'static str,
}

impl Fault {
    /// Its name on the stream.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Delay { .. } => "delay",
            Self::Drop { .. } => "drop",
            Self::Truncate { .. } => "truncate",
            Self::Extend { .. } => "extend",
            Self::WrongTransaction { .. } => "wrong-transaction",
            Self::Corrupt { .. } => "corrupt",
            Self::CorruptRing { .. } => "corrupt-ring",
            Self::Stall {} => "stall",
            Self::RescindAfter { .. } => "rescind-after",
            Self::SlowDisk { .. } => "slow-disk",
            Self::FailingDisk { .. } => "failing-disk",
            Self::TornWrites { .. } => "torn-writes",
            Self::LossyNetwork { .. } => "lossy-network",
        }
    }
}
