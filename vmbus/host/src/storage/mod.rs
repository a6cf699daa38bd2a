//! Storage: a SCSI controller with disks and DVD drives, for a guest's storage driver (spec storvsc.md).
//!
//! A [`Controller`] has the units; they come and go while a guest uses them. [`Storvsp`] is what serves its channels: it
//! speaks VSTOR ([`vstor`]), keeps to the protocol's order ([`Session`]) and has commands done by the [`scsi`]
//! target, those that touch a disk on an [`Executor`](crate::work::Executor).

mod activity;
mod answer;
mod controller;
mod counters;
mod provider;
pub mod scsi;
mod session;
pub mod vstor;

pub use activity::{Activity, Running};
pub use controller::{Controller, Limits, Lun, LunError, MAX_LUN};
pub use counters::{Counts, PacketCounts, UnitCounts};
pub use provider::Storvsp;
pub use session::{Session, Verdict};
