//! `cargo xtask image`: the files that a VM boots an appliance from.

mod disk;
mod fat;

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::{
    cli::What,
    guest::{self, Guest, Profile},
    packages::Problem,
    workspace::Workspace,
};

/// Options of `image`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    what: What,
    /// Command line of the guest, stored on the disk image: words `key=value`
    #[arg(long, value_name = "WORDS", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Directory for the files [default: images in target/enlit]
    #[arg(short, long, value_name = "DIRECTORY")]
    output: Option<PathBuf>,
}

/// An appliance in its bootable forms.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel.
    pub guest: Guest,
    /// The EFI application that carries the kernel.
    pub efi: Vec<u8>,
    /// The raw disk that carries the EFI application.
    pub disk: Vec<u8>,
}

impl Image {
    /// Builds all forms.
    pub fn build(
        workspace: &Workspace,
        package: &str,
        profile: Profile,
        cmdline: Option<&str>,
    ) -> Result<Self> {
        let guest = guest::build(workspace, package, profile)?;
        let path = guest::build_efi(workspace, package, &guest, profile)?;
        let efi = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let disk = disk::build(&efi, cmdline).context("cannot make the disk image")?;
        Ok(Self { guest, efi, disk })
    }
}

/// Writes the image files and names them with their sizes.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let package = &options.what.package;
    let image = Image::build(
        &workspace,
        package,
        options.what.profile(),
        options.cmdline.as_deref(),
    )?;
    let directory = match &options.output {
        Some(directory) => directory.clone(),
        None => workspace.store().join("images"),
    };
    fs::create_dir_all(&directory).map_err(Problem::file(&directory))?;
    for (kind, bytes) in [("efi", &image.efi), ("img", &image.disk)] {
        let path = directory.join(format!("{package}.{kind}"));
        fs::write(&path, bytes).map_err(Problem::file(&path))?;
        println!("{:>9} bytes  {}", bytes.len(), path.display());
    }
    Ok(ExitCode::SUCCESS)
}
