//! Everything that parses what the other end of VMBus wrote, as functions over any bytes.
//!
//! Each function plays an input and panics when something is not as it must be. libFuzzer calls them
//! (`cargo fuzz run TARGET`), and a plain test replays the corpus.
//!
//! Most inputs are a sequence of steps in postcard's encoding, so that an input can be made from a real exchange:
//! see [`seeds`]. What cannot be decoded is skipped byte by byte.

#![forbid(unsafe_code)]

mod balloon;
mod bus;
mod frames;
mod guest;
mod host;
mod hvsocket;
mod ic;
mod kmcl;
mod kvp;
mod netvsp;
mod protocol;
mod ring;
mod rndis;
pub mod seeds;
mod storvsp;
mod vhdx;

pub use balloon::balloon;
pub use bus::bus_messages;
pub use host::{host_providers, host_ring, host_server};
pub use hvsocket::host_hvsocket;
pub use ic::{host_ic, ic};
pub use kmcl::kmcl_channel;
pub use kvp::host_kvp;
pub use netvsp::netvsp;
pub use protocol::protocol;
pub use ring::{ring_reader, ring_writer};
pub use rndis::rndis;
pub use storvsp::storvsp;
pub use vhdx::vhdx;

use serde::{Deserialize, Serialize};

/// A fuzz target: its name and what plays an input.
pub type Target = (&'static str, fn(&[u8]));

/// Every target, by name.
pub const TARGETS: [Target; 17] = [
    ("balloon", balloon),
    ("bus_messages", bus_messages),
    ("host_hvsocket", host_hvsocket),
    ("host_ic", host_ic),
    ("host_kvp", host_kvp),
    ("host_providers", host_providers),
    ("host_ring", host_ring),
    ("host_server", host_server),
    ("ic", ic),
    ("kmcl_channel", kmcl_channel),
    ("netvsp", netvsp),
    ("protocol", protocol),
    ("ring_reader", ring_reader),
    ("ring_writer", ring_writer),
    ("rndis", rndis),
    ("storvsp", storvsp),
    ("vhdx", vhdx),
];

/// The most steps of one input: more make it slow, not deep.
const MAX_STEPS: usize = 512;

/// The steps that an input holds.
fn steps<'a, S: Deserialize<'a>>(mut data: &'a [u8]) -> impl Iterator<Item = S> {
    std::iter::from_fn(move || {
        loop {
            match postcard::take_from_bytes(data) {
                Ok((step, rest)) if rest.len() < data.len() => {
                    data = rest;
                    return Some(step);
                }
                _ => data = data.get(1..)?,
            }
        }
    })
    .take(MAX_STEPS)
}

/// The input that holds these steps.
fn input<S: Serialize>(steps: &[S]) -> Vec<u8> {
    steps
        .iter()
        .flat_map(|step| postcard::to_allocvec(step).expect("steps can be encoded"))
        .collect()
}
