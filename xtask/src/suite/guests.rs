//! The guests that the tests boot, built once for a test run.

use anyhow::Result;

use crate::{
    guest::{self, Guest, Profile},
    image::Image,
    workspace::Workspace,
};

/// Guests in all the forms that tests need.
pub struct Guests {
    /// The appliance that shows the machine.
    pub hello: Guest,
    /// The appliance whose behaviour is chosen on its command line.
    pub selftest: Guest,
    /// `hello` as an EFI application.
    pub hello_efi: Vec<u8>,
    /// `hello` on a disk.
    pub hello_disk: Vec<u8>,
}

/// What stands on the disk's command line: a test sees it arrive.
pub const DISK_CMDLINE: &str = "log=loud debug-exit=0xf4";

impl Guests {
    /// Builds them.
    pub fn build(workspace: &Workspace) -> Result<Self> {
        let Image { guest, efi, disk } =
            Image::build(workspace, "hello", Profile::Release, Some(DISK_CMDLINE))?;
        Ok(Self {
            hello: guest,
            selftest: guest::build(workspace, "selftest", Profile::Release)?,
            hello_efi: efi,
            hello_disk: disk,
        })
    }
}
