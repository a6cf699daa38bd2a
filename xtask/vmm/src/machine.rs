//! A machine from its configuration to its end: the guest's lives, one after the other.

use std::io;
use std::sync::Arc;

use vmbus_host::bus;

use crate::config::{Config, OnReboot, Profile};
use crate::control::server::{Ends, ListenError, Server};
use crate::control::{Event, Failure};
use crate::devices::Devices;
use crate::runner::{End, Events, Runner, Vm};

/// Why a machine does not start, or cannot go on. Each is one sentence for the user.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A device cannot be built.
    #[error("{0}")]
    Device(#[from] Failure),
    /// Nobody can control it.
    #[error(transparent)]
    Control(#[from] ListenError),
    /// There is no VM.
    #[error(transparent)]
    Vm(#[from] crate::Error),
    /// The system fails the host's thread.
    #[error("the host's thread cannot go on: {0}")]
    System(#[from] io::Error),
}

/// A machine that is ready to start.
#[derive(Debug)]
pub struct Machine {
    runner: Arc<Runner>,
    on_reboot: OnReboot,
}

impl Machine {
    /// Builds the devices. Nothing runs yet.
    ///
    /// # Errors
    /// When a device cannot be built.
    pub fn new(config: &Config) -> Result<Self, MachineError> {
        let events = Events::new()?;
        let devices = Devices::new(config, &events)?;
        Ok(Self {
            runner: Runner::new(profile(config), devices, events)?,
            on_reboot: config.on_reboot,
        })
    }

    /// What serves its VMBus, and owns its partition.
    pub fn runner(&self) -> &Arc<Runner> {
        &self.runner
    }

    /// Runs it to its end, on this thread: from `cont`, or at once if nobody can control it. `make` makes the VM,
    /// stopped, with everything in its memory; it is called again each time that the guest starts anew. Returns
    /// the exit status of the program.
    ///
    /// # Errors
    /// When there is no VM, or nobody can control it.
    pub fn run(
        &self,
        control: Ends,
        make: impl FnMut() -> Result<Arc<dyn Vm>, crate::Error>,
    ) -> Result<u8, MachineError> {
        let mut make = make;
        self.runner.begin(make()?)?;
        if control.stream.is_none() && control.path.is_none() {
            self.runner.resume();
        }
        // The greeting says that the VM is there.
        let server = Server::start(control, Arc::clone(&self.runner))?;
        let end = self.live(&mut make);
        // What happened is told before the program ends.
        drop(server);
        self.runner.finish();
        let end = end?;
        if let End::Failed(why) = &end {
            eprintln!("enlit-vmm: {why}");
        }
        Ok(exit_status(&end))
    }

    /// Runs the guest, and again when it is reset.
    fn live(
        &self,
        make: &mut impl FnMut() -> Result<Arc<dyn Vm>, crate::Error>,
    ) -> Result<End, MachineError> {
        let events = self.runner.events();
        loop {
            let end = self.runner.serve()?;
            let (guest, reason) = (end.is_by_guest(), end.reason());
            let again =
                matches!(end, End::Reset | End::TripleFault) && self.on_reboot == OnReboot::Reset;
            if !again {
                events.push(Event::Shutdown { guest, reason });
                return Ok(end);
            }
            events.push(Event::Reset { guest, reason });
            // Its threads end, and its memory is given back before there is more.
            drop(self.runner.finish());
            self.runner.begin(make()?)?;
            self.runner.resume();
        }
    }
}

/// The host's habits.
pub(crate) fn profile(config: &Config) -> bus::Profile {
    let profile = match config.vmbus.profile {
        Profile::TestMachine => bus::Profile::test_machine(),
        Profile::HyperV => bus::Profile::hyper_v(),
        Profile::Openvmm => bus::Profile::openvmm(),
        Profile::Qemu => bus::Profile::qemu(),
    };
    match config.vmbus.newest() {
        Some(newest) => profile.up_to(newest),
        None => profile,
    }
}

/// 0 when the guest or the user ended it; what the guest wrote to the debug-exit port as QEMU has it.
fn exit_status(end: &End) -> u8 {
    match end {
        End::PowerOff | End::Hibernated | End::Reset | End::TripleFault | End::Quit => 0,
        End::Crashed | End::Failed(_) => 1,
        // A process has no more bits.
        End::DebugExit(value) => (*value as u8) << 1 | 1,
    }
}
