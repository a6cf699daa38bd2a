//! The SCSI target: what a unit answers to a command (SPC-3, SBC-3, MMC-5).
//!
//! [`decode`] makes a [`Command`] of a CDB. [`LogicalUnit::start`] answers it at once, or makes [`Work`] of it that
//! any thread may do.

mod cdb;
mod disc;
mod execute;
mod inquiry;
mod mode;
mod sense;
mod transfer;
mod unit;
mod work;

pub use cdb::{Blocks, Command, Form, ModeSense, Refusal, decode};
pub use inquiry::{Kind, MAX_UNMAP_DESCRIPTORS, report, standard};
pub use sense::{Additional, Field, LENGTH as SENSE_LENGTH, Sense, SenseKey};
pub use transfer::{Outcome, Stop, Transfer};
pub use unit::{Attention, LogicalUnit, Medium, Step};
pub use work::{Pieces, Work};
