//! A VMBus guest stack without an operating system.
//!
//! `no_std` with `alloc`, no architecture, no MSR: all that it needs of the machine is one
//! trait, [`hypervisor::Hypervisor`], so the whole stack runs and is tested on any computer.

#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod atomics;
pub mod bus;
pub mod drivers;
pub mod hypervisor;
pub mod ids;
pub mod kmcl;
pub mod protocol;
pub mod ring;
mod runtime;
pub mod shared;
pub mod sync;
mod turn;

pub use runtime::{ChannelInfo, ConnectionState, OfferInfo, Snapshot, Vmbus};
