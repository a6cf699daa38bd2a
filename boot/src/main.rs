//! The EFI application: carries the kernel, loads it, and hands the machine over.
//!
//! What it owes the kernel is written in the `handover` crate. Everything that can fail happens
//! while the firmware is still there to print a line and to take an error status; after
//! `ExitBootServices` there are only steps that cannot fail.

#![cfg_attr(target_os = "uefi", no_main, no_std)]
#![deny(unsafe_code)]

#[cfg(target_os = "uefi")]
mod application;
#[cfg(target_os = "uefi")]
mod machine;

#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("This is an EFI application: build it for the target x86_64-unknown-uefi.");
    std::process::exit(1);
}
