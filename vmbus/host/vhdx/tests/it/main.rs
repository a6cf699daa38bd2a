//! VHDX disks from outside: what they hold, what a crash leaves of them, what damage does to them.

#![allow(clippy::unwrap_used)]

mod crash;
mod damage;
mod disk;
mod model;
mod support;
