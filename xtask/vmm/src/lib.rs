//! The test machine: a small VMM on KVM whose VMs look like Generation 2 VMs of Hyper-V.

#![deny(unsafe_code)]

pub mod config;
pub mod control;
#[cfg(target_os = "linux")]
pub mod devices;
#[cfg(target_os = "linux")]
pub mod runner;
