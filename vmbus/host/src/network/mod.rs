//! Network cards: the provider that a guest's netvsc talks to, and the networks behind it (spec netvsc.md).
//!
//! A [`Nic`] is the card as its owner sees it; [`Netvsp`] serves its channels; a [`Backend`](backend::Backend) is the network.

mod adapter;
pub mod backend;
mod counters;
mod netvsp;
mod nic;
pub mod nvsp;
pub mod offload;
pub mod oid;
#[cfg(feature = "std")]
mod pcap;
pub mod rndis;
pub mod rss;

pub use adapter::{Adapter, Filter, Negotiated, Offloads, SetResult, Ways};
pub use counters::Counters;
pub use netvsp::{MAX_FRAME, Netvsp};
pub use nic::{Capture, Config, ConfigError, Direction, MAX_MTU, MAX_QUEUES, MIN_MTU, Mac, Nic};
#[cfg(feature = "std")]
pub use pcap::Pcap;
