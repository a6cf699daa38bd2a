//! Restart of the partition by MSR (spec tlfs.md 2).

#![forbid(unsafe_code)]

use core::fmt;

use super::features::{Features, Privileges};
use super::msr;

/// Restarts the partition. Returns only if that did not work, with the reason.
pub fn reset(features: &Features) -> StillRunning {
    if !features.privileges.contains(Privileges::RESET) {
        return StillRunning::NotOffered;
    }
    msr::RESET.write(1);
    StillRunning::Ignored
}

/// Why the partition was not restarted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StillRunning {
    /// The hypervisor does not offer it: use ACPI.
    NotOffered,
    /// The hypervisor took the request and did nothing.
    Ignored,
}

impl fmt::Display for StillRunning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotOffered => "the hypervisor offers no reset",
            Self::Ignored => "the hypervisor took the reset request and did nothing",
        })
    }
}
