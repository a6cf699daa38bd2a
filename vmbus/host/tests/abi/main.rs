//! The function table, called by pointer as a driver in C calls it, on a whole guest stack and host in one process.

#![allow(clippy::unwrap_used, unreachable_pub)]
#![allow(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "the tests call as C does, with the arguments that each function's promise asks for"
)]
#![cfg(target_arch = "x86_64")]

#[path = "../machine/support.rs"]
#[allow(dead_code, reason = "these tests need less of it")]
mod support;

mod caller;
mod channels;
mod configure;
mod header;
mod memory;
mod packets;
mod query;
mod requests;
mod seed;
