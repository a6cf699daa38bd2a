//! The Linux guest that judges our host: Debian's kernel with its Hyper-V drivers, Debian's
//! tools, and a shell on the serial port that a test drives.

mod guest;
mod image;
pub mod shell;

pub use self::{
    guest::{Done, Guest, Status},
    image::{CMDLINE, Contents, Image},
};
