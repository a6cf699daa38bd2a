//! The whole guest stack on a whole host, in one process.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod balloon;
mod blocking;
mod bounds;
mod dispatcher;
mod documentation;
mod faults;
mod gpadls;
mod hostile;
mod hosts;
mod hvsocket;
mod integration;
mod kvp;
mod lifecycle;
mod memory;
mod monitor;
mod packets;
mod pausing;
mod process_packet_callbacks;
mod raw;
mod reoffers;
mod requests;
mod sending;
mod state_table;
mod subchannels;
mod support;
mod traps;
#[cfg(unix)]
mod unix_sockets;
