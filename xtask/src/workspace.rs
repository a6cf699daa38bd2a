//! Where things are: the work tree, cargo's target directory and our own
//! corner of it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cargo_metadata::MetadataCommand;

/// Directories of this work tree.
#[derive(Debug, Clone)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub fn find() -> Result<Self> {
        let metadata = MetadataCommand::new()
            .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .no_deps()
            .exec()
            .context("cargo cannot describe the work tree")?;
        Ok(Self {
            root: metadata.workspace_root.into_std_path_buf(),
            target: metadata.target_directory.into_std_path_buf(),
        })
    }

    /// Top level of the work tree.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// cargo's target directory.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// What xtask makes and keeps: packages, the test machine, images.
    pub fn store(&self) -> PathBuf {
        self.target.join("enlit")
    }
}
