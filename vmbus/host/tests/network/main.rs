//! A network card of the host, and a small guest that knows netvsc's messages by heart.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod channels;
mod control;
mod guest;
mod hostile;
mod leaving;
mod receiving;
mod sending;
#[path = "../machine/support.rs"]
#[allow(dead_code)]
mod support;
mod versions;
