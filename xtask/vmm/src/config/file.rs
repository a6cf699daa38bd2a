//! Reading the configuration.

use std::path::{Path, PathBuf};
use std::{fs, io};

use super::{Config, Mistake};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file cannot be read.
    #[error("the configuration {} cannot be read: {cause}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It is no JSON, or holds something that a configuration does not have.
    #[error("the configuration {} is wrong: {cause}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// What, and where.
        cause: serde_json::Error,
    },
    /// It asks for something that no VM can have.
    #[error(transparent)]
    Mistake(#[from] Mistake),
}

impl Config {
    /// Reads a configuration and checks it. What it names is sought in the current directory.
    pub fn read(file: &Path) -> Result<Self, ReadError> {
        let text = fs::read(file).map_err(|cause| ReadError::Unreadable {
            file: file.into(),
            cause,
        })?;
        let config: Self = serde_json::from_slice(&text).map_err(|cause| ReadError::Syntax {
            file: file.into(),
            cause,
        })?;
        config.check()?;
        Ok(config)
    }
}
