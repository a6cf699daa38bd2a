//! Channels with the programming model of the Kernel Mode Client Library.
//!
//! A driver describes a channel with a [`ChannelBuilder`] (KMCL's Disabled state), enables it, and from then on its
//! callbacks run: state changes at PASSIVE, packets at DISPATCH, in the very interrupt handler, or
//! at PASSIVE when it asks for that (spec kmcl.md). This is all that a driver sees of VMBus.

#[cfg(target_arch = "x86_64")]
pub mod abi;
mod blocking;
mod builder;
mod channel;
mod client;
mod counters;
mod cpu_usage;
mod deferred;
mod dispatcher;
mod error;
mod external;
mod gpadl;
mod incoming;
mod lifecycle;
mod monitor;
mod outgoing;
mod pipe;
mod quota;
mod raw;
mod request;
mod sender;
mod slots;
mod trace;

pub use blocking::WouldBlock;
pub use builder::{ChannelBuilder, ChannelDriver, ConfigError, MAX_PACKETS};
pub use channel::{
    Channel, DisabledChannel, EnableError, EnabledChannel, MmioSpace, Paused, State, StateError,
};
pub use client::Client;
pub use counters::Counters;
pub use error::{
    AllocateError, ChannelError, PacketError, Refused, RequestError, SendError, SendFailure,
};
pub use external::{ExternalData, ExternalDataError};
pub use gpadl::{CreateGpadl, DeleteGpadl, Gpadl, GpadlAccess, GpadlError, GpadlSource};
pub use incoming::{IncomingPacket, ReceivedPacket};
pub use monitor::LatencyError;
pub use outgoing::{
    CompletionFunction, CompletionRoutine, MessageError, OutgoingPacket, SendFlags, UserData,
};
pub use raw::{RawError, RawPacket, RawRings};
pub use request::{Answer, Request, Timeout};

pub use crate::hypervisor::Level;
pub use crate::ids::{GpadlHandle, PAGE_SIZE, PageNumber, VpIndex};
pub use crate::protocol::{Guid, interface};
pub use crate::ring::{
    Head as PacketHead, Kind as PacketKind, PacketBuffer, RingError, TransferPageRange,
    TransferPages,
};
pub use crate::shared::SharedPages;

pub(crate) use client::{Inner, Serve};
pub(crate) use monitor::MonitorMemory;
