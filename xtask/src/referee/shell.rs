//! A shell on the nested machine itself, beside the VMs: the host's side of what a guest is judged by.

use std::{fs, time::Duration};

use anyhow::{Context, Result};

use crate::{machine::Machine, packages::Tree};

/// Longest wait for the shell to be there.
const SOON: Duration = Duration::from_secs(30);

/// Puts busybox there, with all its commands.
pub fn install(machine: &Machine, tools: &Tree) -> Result<()> {
    let busybox = tools
        .program("busybox")
        .context("the packages are without busybox")?;
    machine.put_program("busybox", &fs::read(busybox)?)?;
    machine
        .command(&["./busybox", "--install", "-s", "/bin"], SOON)
        .map(drop)
}

/// Runs a command of the shell; gives what it printed.
pub fn run(machine: &Machine, command: &str, limit: Duration) -> Result<String> {
    machine.command(&["./busybox", "sh", "-c", command], limit)
}
