//! The x86_64 machine: entry, descriptor tables, traps, paging, APIC, per-CPU data.
//!
//! Here, in `hyperv` and in `vmbus`' shared memory lives all `unsafe` code of the project. What this module exports is
//! safe to call unless it says so.

#![allow(unsafe_code)]

pub mod acpi;
pub mod apic;
pub mod backtrace;
pub mod cpu;
pub mod descriptors;
pub mod entry;
pub mod executor;
pub(crate) mod faults;
pub mod heap;
pub mod image;
pub mod paging;
pub mod per_cpu;
pub mod physical;
pub mod port;
pub mod traps;
