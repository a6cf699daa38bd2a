//! The guests that the tests boot, built once for a test run.

use anyhow::Result;

use crate::{
    guest::{self, Guest, Profile},
    image::Image,
    machine::debug_exit_word,
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

/// What stands on the disk's command line: the guest complains about it, so a
/// test sees it arrive.
pub const DISK_WORD: &str = "log=loud";

impl Guests {
    /// Builds them.
    pub fn build(workspace: &Workspace) -> Result<Self> {
        let words = format!("{DISK_WORD} {}", debug_exit_word());
        let Image { guest, efi, disk } =
            Image::build(workspace, "hello", Profile::Release, Some(&words))?;
        Ok(Self {
            hello: guest,
            selftest: guest::build(workspace, "selftest", Profile::Release)?,
            hello_efi: efi,
            hello_disk: disk,
        })
    }
}
