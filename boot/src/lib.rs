//! The parts of the EFI loader that only compute: what the kernel file asks for, what the memory
//! map says, which address goes where, and the page tables. None of it touches the machine, so
//! all of it is tested on the host. The EFI application itself is `main.rs`, which is the place to
//! read the order of events.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod command_line;
pub mod framebuffer;
pub mod image;
pub mod layout;
pub mod memory_map;
pub mod paging;
pub mod ranges;
