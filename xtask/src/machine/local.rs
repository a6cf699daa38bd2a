//! VMs on this computer: the agent as a thread, and what /dev/kvm can do.

use std::{fs, os::unix::net::UnixStream, path::Path, thread, time::Duration};

use agent::server;
use anyhow::{Context, Result};
use kvm_ioctls::Kvm;

use super::{link::Link, process};

/// `KVM_CAP_HYPERV_SYNIC2` of the kernel's KVM interface: the synthetic
/// interrupt controller in the form that QEMU uses.
const HYPERV_SYNIC2: u64 = 148;

/// The agent's thread and its directory. Dropping it waits for both to go.
pub struct Agent {
    stream: UnixStream,
    thread: Option<thread::JoinHandle<()>>,
    directory: tempfile::TempDir,
}

impl Agent {
    /// Starts the thread and connects to it.
    pub fn start() -> Result<(Self, Link)> {
        let directory = tempfile::tempdir().context("cannot make a scratch directory")?;
        let (near, far) = UnixStream::pair()?;
        let input = far.try_clone()?;
        let place = directory.path().to_owned();
        let thread = thread::spawn(move || {
            // The client sees a broken stream and says so.
            drop(server::serve(input, far, &place));
        });
        process::close_on_interrupt(near.try_clone()?);
        let agent = Self {
            stream: near.try_clone()?,
            thread: Some(thread),
            directory,
        };
        let link = Link::new(near.try_clone()?, near, Duration::from_secs(10))?;
        Ok((agent, link))
    }
}

impl Agent {
    /// Where files are put.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Already closed is as good.
        drop(self.stream.shutdown(std::net::Shutdown::Both));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Whether KVM here can be a Hyper-V; if not, why, in words.
pub fn hyperv_capability() -> Result<(), String> {
    if fs::metadata("/dev/kvm").is_err() {
        return Err("there is no /dev/kvm".into());
    }
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm cannot be opened: {error}"))?;
    if kvm.check_extension_raw(HYPERV_SYNIC2) > 0 {
        Ok(())
    } else {
        Err("/dev/kvm offers no Hyper-V".into())
    }
}
