//! What can be made to go wrong.

use serde::{Deserialize, Serialize};

use crate::config::Kind;

/// A fault, and where.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FaultOn {
    /// The device.
    pub device: String,
    /// Of a fault of packets: which way they go. To the guest, if it says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    /// Of a fault of packets: so many pass unharmed first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skip: Option<u64>,
    /// Of a fault of packets: how many meet it; without it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<u64>,
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
    /// Packets do not come.
    Drop {},
    /// Packets come late, and others overtake them.
    Delay {
        /// By how much.
        milliseconds: u64,
    },
    /// Packets are too short. To the guest only.
    Truncate {
        /// Bytes of data that they have at most.
        bytes: u32,
    },
    /// Packets are too long. To the guest only.
    Extend {
        /// By how many bytes.
        bytes: u32,
    },
    /// Packets have another transaction id than they should. To the guest only.
    TransactionId {
        /// The bits of it that are flipped.
        #[serde(default = "all")]
        bits: u64,
    },
    /// Bits of a byte of the data are flipped. To the guest only.
    Spoil {
        /// Which byte.
        at: u32,
        /// Which bits.
        #[serde(default = "all_of_a_byte")]
        bits: u8,
    },
    /// The host's offset in the ring says nonsense, until the channel is opened again.
    CorruptRing {},
    /// The ring stands still until the faults are cleared.
    Stall {},
    /// The device is taken away before the packet.
    Rescind {},
    /// The next messages that the device makes are what a broken host would send instead.
    Message {
        /// What is wrong with them.
        what: MessageFault,
        /// How many of them.
        #[serde(default = "one")]
        messages: u32,
    },
    /// A disk is slow.
    SlowDisk {
        /// The disk of the controller.
        lun: u8,
        /// What is slow.
        #[serde(default)]
        operation: DiskOperation,
        /// How much longer it takes.
        milliseconds: u64,
        /// How often; without it always.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        requests: Option<u64>,
    },
    /// A disk, or a part of it, cannot be read or written.
    FailingDisk {
        /// The disk of the controller.
        lun: u8,
        /// What fails.
        #[serde(default)]
        operation: DiskOperation,
        /// How it fails.
        #[serde(default)]
        error: DiskFailure,
        /// Where the part begins, in bytes; without it all of the disk fails.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// How long the part is, in bytes; without it to the end.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        length: Option<u64>,
        /// How often; without it always.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        requests: Option<u64>,
    },
    /// Writes of a disk are cut off in the middle, and fail.
    TornWrites {
        /// The disk of the controller.
        lun: u8,
        /// How often; without it always.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        requests: Option<u64>,
    },
    /// A network loses frames, doubles them, changes their order and their bits, and makes them late.
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
        /// Frames of a thousand of which one bit is another.
        #[serde(default)]
        corruption: u16,
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

/// What is wrong with a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MessageFault {
    /// It has another transaction id, or belongs to another connection.
    WrongId,
    /// It has a type that nobody knows.
    WrongType,
    /// It has fewer bytes than it says.
    Short,
    /// It has more bytes than any message of its kind.
    Oversized,
    /// It says that it is longer than it is.
    Overstated,
    /// It is never sent.
    Lost,
    /// It comes twice.
    Twice,
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

/// How a disk fails.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFailure {
    /// Its surface is broken there.
    #[default]
    Medium,
    /// It does not react.
    NotReady,
    /// There is no room for what is written.
    NoSpace,
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
            Self::Drop {} => "drop",
            Self::Delay { .. } => "delay",
            Self::Truncate { .. } => "truncate",
            Self::Extend { .. } => "extend",
            Self::TransactionId { .. } => "transaction-id",
            Self::Spoil { .. } => "spoil",
            Self::CorruptRing {} => "corrupt-ring",
            Self::Stall {} => "stall",
            Self::Rescind {} => "rescind",
            Self::Message { .. } => "message",
            Self::SlowDisk { .. } => "slow-disk",
            Self::FailingDisk { .. } => "failing-disk",
            Self::TornWrites { .. } => "torn-writes",
            Self::LossyNetwork { .. } => "lossy-network",
        }
    }
}

fn one() -> u32 {
    1
}

fn all() -> u64 {
    u64::MAX
}

fn all_of_a_byte() -> u8 {
    u8::MAX
}
