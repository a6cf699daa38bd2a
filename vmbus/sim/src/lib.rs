//! A deterministic simulation of VMBus: guest and host in one process, and a seed that decides every step.
//!
//! At each step the scheduler picks one thing: something that a driver does, something that the host does, a
//! delivery (an interrupt, a message, the work queue), a move of the clock, or a fault. It is asked again
//! wherever the guest's code calls the machine below it, so that interrupts and the host's acts fall into the middle of
//! whatever the guest does, and in every callback. An oracle watches both ends: order, exactly one
//! end for each packet, callbacks in their order, memory that stays until the host has let go, and that nothing is left
//! behind once the faults stop.
//!
//! A run is cut into rounds, each with a machine of its own and its own kind of host and faults. One
//! decision that leads to something is one step; what happens while a round comes to rest is not counted.

#![forbid(unsafe_code)]

mod decisions;
mod driver;
mod host;
mod report;
mod world;

pub use report::{Outcome, fresh_seed, run};
