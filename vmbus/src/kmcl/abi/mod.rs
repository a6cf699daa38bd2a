//! The library as drivers in C see it: KMCL's function tables, with Microsoft's x64 calling convention.
//!
//! A thin layer: a `VMBCHANNEL` is a configuration and the [`Channel`](super::Channel) that is made of it, a `VMBPACKET` holds an
//! [`OutgoingPacket`](super::OutgoingPacket), and each function does what the method of the same purpose does. What this layer
//! adds is what C cannot have otherwise: handles that are checked, statuses instead of errors, and callbacks by address.
//!
//! A driver is given a [`Device`] and asks for its table, [`query_interface`] or `VmbQueryInterface`. The header is
//! `vmbus/include/vmbkmcl.h`, made by [`header`] of the same declarations as the tables.

#![allow(
    unsafe_code,
    reason = "C hands over addresses; this is the place where they are believed"
)]
#![allow(
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    clippy::upper_case_acronyms,
    reason = "the names are the interface's"
)]

mod arguments;
mod callbacks;
mod channel;
mod configure;
mod declare;
mod device;
mod events;
mod gpadl;
mod handles;
mod header;
mod incoming;
mod memory;
mod object;
mod outgoing;
mod server;
mod table;
mod types;

pub use callbacks::*;
pub use declare::{Callback, Constant, Field, Function, Interface, Prototype, Structure};
pub use device::{Device, Driver, RunningDriver, Table, query_interface, server_table};
pub use header::{TABLES, TableLayout, header, layout_assertions};
pub use table::*;
pub use types::*;
