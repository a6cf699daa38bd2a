//! VMBus and the drivers that the kernel brings: connected, bound and watched.

use crate::machine::Machine;

/// A device that an appliance can insist on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// Dynamic memory.
    Balloon,
}

pub(crate) async fn start(_requires: &'static [Device]) -> Result<Machine, &'static str> {
    Ok(Machine { _private: () })
}
