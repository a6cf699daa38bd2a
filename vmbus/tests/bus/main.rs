//! The guest's bus against the bus server of `vmbus-host`, in one process and in simulated time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod channels;
mod connection;
mod gpadls;
mod hostile;
mod subchannels;
mod world;
