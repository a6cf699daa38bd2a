//! The Enlit unikernel: everything under an appliance, as a library.
//!
//! An appliance is a `no_std`, `no_main` binary that names an async function with [`main!`] and
//! is given the [`Machine`]. Everything before that happens here: entry, memory, traps, the
//! Hyper-V partition, VMBus and its drivers.

#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]
// Other targets build the parts that know no machine, for their tests.
#![cfg_attr(not(target_os = "none"), allow(dead_code, unused_imports))]

extern crate alloc;

mod acpi_check;
#[cfg(target_os = "none")]
mod acpi_tables;
#[cfg(target_os = "none")]
mod arch;
mod boot;
mod command_line;
#[cfg(target_os = "none")]
#[doc(hidden)]
pub mod console;
#[cfg(target_os = "none")]
mod drivers;
#[allow(
    dead_code,
    reason = "the interface is there whole; not all of it is in use"
)]
mod hyperv;
pub mod hypervisor;
#[cfg(target_os = "none")]
pub mod interrupt;
#[cfg(target_os = "none")]
mod machine;
mod memory;
#[cfg(target_os = "none")]
mod milestone;
#[cfg(target_os = "none")]
mod panic;
#[cfg(target_os = "none")]
mod partition;
#[cfg(target_os = "none")]
pub mod power;
#[cfg(target_os = "none")]
#[doc(hidden)]
pub mod selftest;
pub mod services;
mod sleep_states;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
mod sync;
#[cfg(target_os = "none")]
pub mod task;
#[cfg(target_os = "none")]
pub mod work;

#[cfg(target_os = "none")]
pub use arch::apic::Access as ApicAccess;
pub use command_line::{BadValue, CommandLine};
#[cfg(target_os = "none")]
pub use drivers::Device;
#[cfg(target_os = "none")]
pub use machine::{Interrupts, Machine, Memory};
#[cfg(target_os = "none")]
pub use milestone::Milestone;
#[doc(hidden)]
#[cfg(target_os = "none")]
pub use start::run;
pub use vmbus;
