//! The agent: runs virtual machines for `cargo xtask`, either on this computer
//! or inside the test machine.
//!
//! `xtask` speaks to an agent through one byte stream ([`protocol`]). When the
//! computer can run a guest by itself, the agent is a thread of `xtask` and the
//! stream a socket pair ([`server::serve`]). When it cannot, the agent is the
//! first process of a small Linux VM and the stream is a virtio port. So what
//! is written against the protocol runs in both places unchanged.

#![deny(unsafe_code)]

#[cfg(target_os = "linux")]
mod files;
pub mod flow;
pub mod messages;
#[cfg(target_os = "linux")]
mod priority;
pub mod protocol;
#[cfg(target_os = "linux")]
pub mod server;
pub mod streams;
#[cfg(target_os = "linux")]
mod vm;
