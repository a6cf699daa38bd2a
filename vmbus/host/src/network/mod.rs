//! Network cards: the provider that a guest's netvsc talks to, and the networks behind it (spec netvsc.md).

pub mod nvsp;
pub mod offload;
pub mod rndis;
pub mod rss;
