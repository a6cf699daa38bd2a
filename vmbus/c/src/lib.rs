//! VMBus drivers written in C against the function table of KMCL, as Rust starts them.
//!
//! They are compiled with the computer's C compiler and know nothing but `vmbus/include/vmbkmcl.h`.

#![no_std]
#![cfg(target_arch = "x86_64")]
#![deny(unsafe_code)]

use vmbus::kmcl::Client;
use vmbus::kmcl::abi::{NTSTATUS, RunningDriver};

/// The drivers' descriptions, in their object files.
#[allow(unsafe_code, reason = "only C can export them")]
mod linked {
    use vmbus::kmcl::abi::Driver;

    // SAFETY: heartbeat.c defines it as a constant of the header's VMB_DRIVER.
    unsafe extern "C" {
        pub(crate) safe static HeartbeatDriver: Driver;
    }
}

/// The heartbeat driver, `heartbeat.c`: answers the host's question whether the guest is alive, for as long as this exists, on
/// every heartbeat device that comes one after the other.
#[derive(Debug)]
pub struct Heartbeat {
    running: RunningDriver,
}

impl Heartbeat {
    /// Starts the driver. At PASSIVE.
    ///
    /// # Errors
    ///
    /// The status of the step that failed.
    pub fn start(client: &Client) -> Result<Self, NTSTATUS> {
        let running = RunningDriver::start(client, &linked::HeartbeatDriver)?;
        Ok(Self { running })
    }

    /// Enables the channel again when its device has gone. At PASSIVE, after each piece of the bus's work.
    pub fn attend(&self) {
        self.running.attend();
    }
}
