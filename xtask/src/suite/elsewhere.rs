//! Systems other than Linux run no VMs, so nobody judges our host there.

/// No tests.
pub mod referee {
    use anyhow::{Result, bail};

    use crate::{cli::Wish, packages::Packages, suite::Count, workspace::Workspace};

    /// There are none.
    pub fn names() -> impl Iterator<Item = &'static str> {
        std::iter::empty()
    }

    /// Fails.
    pub fn run(
        _wanted: &str,
        _machine: Wish,
        _workspace: &Workspace,
        _packages: &mut Packages,
        _count: &mut Count,
    ) -> Result<()> {
        bail!("VMs are run on Linux only")
    }
}
