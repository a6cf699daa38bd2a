//! Sockets between host and guest, as Unix sockets of this system.

use std::path::PathBuf;
use std::sync::Arc;

use vmbus_host::host::Host;
use vmbus_host::hvsocket::unix::bind;
use vmbus_host::hvsocket::{Limits, Sockets, SocketsHandle};

use super::integration::of_messages;
use super::{Counters, Part, counted};
use crate::config;
use crate::control::{Failure, Fault};
use crate::runner::Vm;

/// The sockets of a VM.
pub(super) struct Vsock {
    path: PathBuf,
    /// Bound before the VM starts, so that a mistake is told in time; a host has them then.
    bound: Option<Sockets>,
    handle: SocketsHandle,
}

impl Vsock {
    /// Listens.
    ///
    /// # Errors
    /// When somebody else does.
    pub(super) fn new(config: &config::Vsock) -> Result<Self, Failure> {
        let sockets = bind(&config.path, Limits::default()).map_err(Failure::generic)?;
        Ok(Self {
            path: config.path.clone(),
            handle: sockets.handle(),
            bound: Some(sockets),
        })
    }
}

impl Part for Vsock {
    fn counters(&self) -> Counters {
        let counts = self.handle.counts();
        counted([
            ("connections", counts.connections),
            ("from-guest", counts.from_guest),
            ("from-host", counts.from_host),
            ("refused", counts.refused),
            ("expired", counts.expired),
            ("dropped", counts.dropped),
            ("bytes-from-guest", counts.bytes_from_guest),
            ("bytes-to-guest", counts.bytes_to_guest),
            ("complaints", counts.complaints),
        ])
    }

    fn begin(&mut self, host: &mut Host, _vm: &Arc<dyn Vm>) -> Result<(), Failure> {
        let sockets = match self.bound.take() {
            Some(sockets) => sockets,
            // Those of the VM before ended with its host.
            None => bind(&self.path, Limits::default()).map_err(Failure::generic)?,
        };
        self.handle = sockets.handle();
        host.set_connector(sockets);
        Ok(())
    }

    fn inject(&self, fault: &Fault) -> Result<bool, Failure> {
        let Fault::Message { what, messages } = *fault else {
            return Ok(false);
        };
        self.handle.inject(of_messages(what), messages);
        Ok(true)
    }

    fn clear_faults(&self) {
        self.handle.heal();
    }
}
