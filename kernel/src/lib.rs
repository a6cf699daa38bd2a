//! The Enlit unikernel: everything under an appliance, as a library.
//!
//! An appliance is a `no_std`, `no_main` binary that names an async function with [`main!`] and
//! is given the [`Machine`]. Everything before that happens here: entry, memory, traps, the
//! Hyper-V partition, VMBus and its drivers.

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

#[cfg(target_os = "none")]
mod acpi_tables;
#[cfg(target_os = "none")]
pub mod arch;
pub mod boot;
pub mod command_line;
#[cfg(target_os = "none")]
pub mod console;
#[cfg(target_os = "none")]
mod drivers;
pub mod hyperv;
#[cfg(target_os = "none")]
pub mod interrupt;
#[cfg(target_os = "none")]
mod machine;
pub mod memory;
#[cfg(target_os = "none")]
pub mod milestone;
#[cfg(target_os = "none")]
mod panic;
#[cfg(target_os = "none")]
mod partition;
#[cfg(target_os = "none")]
pub mod power;
#[cfg(target_os = "none")]
#[doc(hidden)]
pub mod selftest;
pub mod sleep_states;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
mod sync;
#[cfg(target_os = "none")]
pub mod task;
#[cfg(target_os = "none")]
pub mod work;

#[cfg(target_os = "none")]
pub use drivers::Device;
#[cfg(target_os = "none")]
pub use machine::Machine;
#[doc(hidden)]
#[cfg(target_os = "none")]
pub use start::run;
pub use vmbus;
