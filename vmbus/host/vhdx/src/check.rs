//! Says what is wrong with a file, and changes nothing.

use std::sync::Arc;

use crate::error::Result;
use crate::metadata::Parameters;
use crate::opening;
use crate::region;
use crate::storage::Storage;

/// Something about a file that is not as it could be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Finding {
    /// One of the two copies of the region table is damaged; the other one serves.
    RegionTable,
    /// The log is in use: the file was not closed. Opening the disk for writing replays it.
    LogInUse,
    /// This many bytes of the file belong to nothing. They are used for new blocks.
    Unused(u64),
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::RegionTable => f.write_str("one of the two region tables is damaged"),
            Self::LogInUse => f.write_str("the log is in use: the disk was not closed"),
            Self::Unused(bytes) => write!(f, "{bytes} bytes of the file belong to nothing"),
        }
    }
}

/// What a file that holds a sound disk is like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Report {
    /// The disk.
    pub parameters: Parameters,
    /// Length of the file in bytes.
    pub file_length: u64,
    /// Number of blocks whose content is in the file.
    pub present_blocks: u64,
    /// What is not as it could be.
    pub findings: Vec<Finding>,
}

/// Looks at everything that has to hold: headers, log, region tables, metadata, and every entry of the BAT.
///
/// # Errors
/// What is wrong first, when the disk cannot be used.
pub fn check(storage: &Arc<dyn Storage>) -> Result<Report> {
    let content = opening::read(storage)?;
    let mut findings = Vec::new();
    let view = opening::view(storage, content.replay.as_ref());
    if region::valid(&view)? != [true; 2] {
        findings.push(Finding::RegionTable);
    }
    if content.replay.is_some() {
        findings.push(Finding::LogInUse);
    }
    let unused = content.space.unused();
    if unused > 0 {
        findings.push(Finding::Unused(unused));
    }
    Ok(Report {
        parameters: content.parameters,
        file_length: storage.length()?,
        present_blocks: content.bat.present(),
        findings,
    })
}
