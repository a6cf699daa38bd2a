//! `cargo xtask header`: the C header of the VMBus library, made of its declarations in Rust.

use std::process::ExitCode;

use anyhow::Result;

/// Where the header is kept.
const HEADER: &str = "vmbus/include/vmbkmcl.h";

/// Writes the header.
#[cfg(target_arch = "x86_64")]
pub fn run() -> Result<ExitCode> {
    use crate::{packages::Problem, workspace::Workspace};

    let path = Workspace::find()?.root().join(HEADER);
    let text = vmbus::kmcl::abi::header();
    std::fs::write(&path, &text).map_err(Problem::file(&path))?;
    println!("{:>9} bytes  {}", text.len(), path.display());
    Ok(ExitCode::SUCCESS)
}

/// The table is for x86-64, and so is its declaration.
#[cfg(not(target_arch = "x86_64"))]
pub fn run() -> Result<ExitCode> {
    anyhow::bail!("{HEADER} can be written on x86-64 only, where its calling convention is")
}
