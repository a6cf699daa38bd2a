//! A guest's storage driver on the host's SCSI controller, in one process.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod channels;
mod commands;
mod disk;
mod dvd;
mod guest;
mod hostile;
mod hot_plug;
mod leaving;
mod mode;
mod model;
mod protocol;
mod resets;
#[path = "../machine/support.rs"]
#[allow(dead_code)]
mod support;
mod unmap;
