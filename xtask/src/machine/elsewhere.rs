//! Systems other than Linux run no VMs: guests are built there, not started.
//! [`Packages::new`](crate::packages::Packages::new) says so before anything
//! here is reached.

/// No agent can be started.
pub mod local {
    use std::convert::Infallible;

    use anyhow::{Result, bail};

    use crate::machine::link::Link;

    /// There is none.
    pub struct Agent(Infallible);

    impl Agent {
        /// Fails.
        pub fn start() -> Result<(Self, Link)> {
            bail!("VMs are run on Linux only")
        }
    }

    /// There is no KVM.
    pub fn hyperv_capability() -> Result<(), String> {
        Err("there is no KVM on this system".into())
    }
}

/// There is nothing to share files with.
pub mod files {
    /// What a VM may do with a file.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Access {
        /// Read it, with others.
        Read,
        /// Read and change it, alone.
        Write,
        /// Write it anew, from nothing.
        Create,
    }
}

/// There is nothing to reach.
pub mod reach {
    use std::{convert::Infallible, path::Path};

    use anyhow::Result;

    use crate::machine::{files::Access, link::Link};

    /// There is none.
    #[derive(Clone)]
    pub struct Reach(Option<Infallible>);

    impl Reach {
        /// Nothing.
        pub fn here() -> Self {
            Self(None)
        }

        /// Nothing.
        pub fn nested(_: Link) -> Self {
            Self(None)
        }

        /// Fails.
        pub fn file(&self, _: &Path, _: Access) -> Result<String> {
            self.nothing()
        }

        /// Fails.
        pub fn socket(&self, _: &Path) -> Result<String> {
            self.nothing()
        }

        /// Fails.
        pub fn guest_sockets(&self, _: &Path) -> Result<String> {
            self.nothing()
        }

        /// Nothing.
        pub fn forget_file(&self, _: &str) {}

        fn nothing(&self) -> Result<String> {
            match self.0 {
                Some(never) => match never {},
                None => anyhow::bail!("VMs are run on Linux only"),
            }
        }
    }
}

/// No nested machine can be started.
pub mod nested {
    use std::{convert::Infallible, path::Path};

    use anyhow::{Result, bail};

    use crate::{
        machine::{Clock, link::Link},
        packages::Qemu,
    };

    /// There is none.
    pub struct Outer(Infallible);

    /// There is none.
    pub struct Image(Infallible);

    impl Image {
        /// Fails.
        pub fn prepare(_: &Path, _: Option<&Qemu>, _: &Path, _: &Path) -> Result<Self> {
            bail!("VMs are run on Linux only")
        }

        /// Cannot be called: there is no image.
        pub fn boot(&self, _: &Qemu, _: Clock) -> Result<(Outer, Link)> {
            match self.0 {}
        }

        /// Nothing to start.
        pub fn inner_qemu() -> Vec<String> {
            Vec::new()
        }
    }
}

/// There are no processes to end.
pub mod process {
    use std::convert::Infallible;

    /// The command as it is.
    pub fn tied_to_us(command: Vec<String>) -> Vec<String> {
        command
    }

    /// Ctrl-C ends the program at once, so nobody learns of it.
    pub fn was_interrupted() -> bool {
        false
    }

    /// Ctrl-C does what it always does.
    pub fn handle_interrupts() -> Result<(), Infallible> {
        Ok(())
    }
}
