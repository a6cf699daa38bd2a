//! The control stream: JSON lines in the shape of QEMU's monitor protocol (QMP), so that one client drives both.
//!
//! The machine greets with `{"QMP": …}`. Each [`Request`] line is a [`Command`] by name, with arguments and an id; each
//! gets one [`Response`] line with the same id, in whatever order the guest lets them be answered. [`Event`] lines come unasked, to every client.

mod arguments;
mod command;
mod event;
mod fault;
mod line;
#[cfg(target_os = "linux")]
pub mod server;
mod value;

pub use arguments::{
    BalloonTarget, DeviceName, DiskAdd, DiskEject, HotAdd, IpSettings, KvpKey, KvpPool, KvpSet,
    KvpValue, Link, Mtu, Nic, NoArguments, Pool, Shutdown, ShutdownKind, SomeDevice, TimeStep,
};
pub use command::Command;
pub use event::{Event, Reason, TimedEvent, Timestamp};
pub use fault::{Direction, DiskFailure, DiskOperation, Fault, FaultOn, MessageFault, Misfit};
pub use line::{Class, Failure, Greeting, LONGEST_LINE, Request, Response};
pub use value::{
    BalloonState, BusState, ChannelState, Contact, Counters, DeviceState, Exits, FaultsCleared,
    HeartbeatState, IpInformation, KvpItem, KvpItems, RunState, Status,
};

#[cfg(test)]
mod tests;
