//! The host's end of VMBus.
//!
//! It shares wire types, rings and shared memory with the guest's stack and nothing else:
//! a fault in the guest's state machines cannot hide behind the same fault here. It does no
//! I/O: tests run it in their own process, a test machine behind a real hypercall.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

pub mod bus;
pub mod channel;
mod complaints;
pub mod disk;
pub mod dynamic_memory;
pub mod faults;
pub mod host;
pub mod hvsocket;
pub mod integration;
pub mod machine;
pub mod memory;
pub mod message_faults;
pub mod monitor;
pub mod network;
pub mod provider;
pub mod storage;
pub mod sync;
pub mod work;
