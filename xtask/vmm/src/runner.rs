//! The host's side of a VM: one thread that serves VMBus, and what the virtual processors tell it.
//!
//! A [`Runner`] lives as long as the machine. Each time the guest starts anew it gets a new VM below it and a new
//! [`Host`]; the devices stay. [`Runner::serve`] is the thread: it sleeps until the guest signals a channel, a
//! provider or a virtual processor wakes it, or a deadline comes, and then lets the host run and delivers what comes of it.
//! It knows the VM by the trait [`Vm`], so that tests run it without one.

mod events;
mod input;
mod life;
mod partition;
mod poll;
#[cfg(test)]
mod tests;
mod vm;

use std::io;
use std::sync::Arc;

use vmbus::ids::{ConnectionId, VpIndex};
use vmbus_host::bus::{HvStatus, Profile};
use vmbus_host::host::Host;
use vmbus_host::sync::{Mutex, MutexGuard};

pub use events::Events;
pub use life::{Channel, Counts};
pub use poll::Sleep;
pub use vm::{Crash, End, Exits, Vm};

use crate::control::{BusState, Event, Failure, Reason, RunState, Status};
use crate::devices::Devices;
use input::Input;
use life::Life;
use poll::Poll;

/// How often the host may run before the lock is given up for those who wait: a guest that never rests must not keep them out.
const ROUNDS: usize = 64;

/// Messages that may wait for the guest to read them. While more do, the guest's own are refused as busy.
const WAITING_MESSAGES: usize = 256;

/// The host's side of a VM.
pub struct Runner {
    profile: Profile,
    devices: Mutex<Devices>,
    /// The VM of now. Not held while the VM is asked to do something that takes time.
    life: Mutex<Option<Life>>,
    poll: Poll,
    events: Events,
    input: Input,
    state: Mutex<State>,
}

/// How the machine stands.
struct State {
    run: RunState,
    /// How the VM of now has ended.
    end: Option<End>,
}

impl Runner {
    /// A machine without a VM.
    ///
    /// # Errors
    /// When the system has no file descriptors left.
    pub fn new(profile: Profile, devices: Devices, events: Events) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            profile,
            devices: Mutex::new(devices),
            life: Mutex::new(None),
            poll: Poll::new()?,
            events,
            input: Input::default(),
            state: Mutex::new(State {
                run: RunState::Prelaunch,
                end: None,
            }),
        }))
    }

    /// Puts a VM below the host and offers it the devices. It is not started.
    ///
    /// # Errors
    /// When what a device had before is not to be had again.
    pub fn begin(&self, vm: Arc<dyn Vm>) -> Result<(), Failure> {
        let mut devices = self.devices.lock();
        let mut host = Host::new(self.profile.clone(), vm.memory());
        host.on_wish(self.poll.waker());
        devices.begin(&mut host, &vm)?;
        *self.life.lock() = Some(Life::new(vm, host, devices.names()));
        self.state.lock().end = None;
        self.input.drained();
        self.wake();
        Ok(())
    }

    /// Takes the VM away from the host, whose providers are done with its memory when this returns.
    pub fn finish(&self) -> Option<Arc<dyn Vm>> {
        let mut devices = self.devices.lock();
        let life = self.life.lock().take();
        let vm = life.map(|life| life.end(&self.poll, &self.events));
        devices.finish();
        vm
    }

    /// Lets the virtual processors run.
    pub fn resume(&self) {
        if let Some(vm) = self.vm() {
            vm.resume();
            self.state.lock().run = RunState::Running;
            self.events.push(Event::Resume {});
        }
    }

    /// Halts the virtual processors. Not on one of their threads.
    pub fn pause(&self) {
        if let Some(vm) = self.vm() {
            vm.pause();
            self.state.lock().run = RunState::Paused;
            self.events.push(Event::Stop {});
        }
    }

    /// Ends the machine.
    pub fn quit(&self) {
        self.ended(End::Quit);
    }

    /// The VM has ended like this. The first end counts.
    pub fn ended(&self, end: End) {
        let mut state = self.state.lock();
        if state.end.is_none() {
            state.run = match end {
                End::Crashed => RunState::GuestPanicked,
                _ => RunState::Shutdown,
            };
            state.end = Some(end);
        }
        drop(state);
        self.wake();
    }

    /// The guest has reported a crash.
    pub fn crashed(&self, crash: Crash) {
        self.events.push(Event::GuestPanicked {
            parameters: crash.parameters,
            message: crash.message,
        });
        self.ended(End::Crashed);
    }

    /// The guest posts a message; the status is that of the hypercall. On any thread.
    pub fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> HvStatus {
        let mut life = self.life.lock();
        let Some(life) = life.as_mut() else {
            return HvStatus::INVALID_CONNECTION_ID;
        };
        if life.waiting_messages() >= WAITING_MESSAGES {
            return HvStatus::INSUFFICIENT_BUFFERS;
        }
        let status = life.post(connection, payload);
        self.wake();
        status
    }

    /// The guest signals an event that is not routed to the host's thread; the status is that of the hypercall. On
    /// any thread.
    pub fn signal_event(&self, connection: ConnectionId, flag: u16) -> HvStatus {
        let mut life = self.life.lock();
        let found = life
            .as_mut()
            .is_some_and(|life| life.signal(connection, flag));
        self.wake();
        if found {
            HvStatus::SUCCESS
        } else {
            HvStatus::INVALID_CONNECTION_ID
        }
    }

    /// The VP has room for the next message. On any thread.
    pub fn message_delivered(&self, _vp: VpIndex) {
        self.wake();
    }

    /// The guest has read all input of its serial port. On any thread.
    pub fn console_drained(&self) {
        self.input.drained();
    }

    /// Gives input to the guest's serial port, and waits until it has taken all.
    pub fn feed_console(&self, bytes: &[u8]) {
        self.input.feed(bytes, |bytes| {
            let vm = self.vm();
            vm.map_or(0, |vm| vm.console_input(bytes))
        });
    }

    /// Has the host's thread look.
    pub fn wake(&self) {
        self.poll.wake();
    }

    /// Serves VMBus until the VM has ended; says how. Only one thread does this.
    ///
    /// # Errors
    /// When the system's clocks or descriptors fail.
    pub fn serve(&self) -> io::Result<End> {
        loop {
            let sleep = self.turn();
            if let Some(end) = self.state.lock().end.clone() {
                return Ok(end);
            }
            self.attend(sleep)?;
        }
    }

    /// Sleeps, and notes who has signalled.
    fn attend(&self, sleep: Sleep) -> io::Result<()> {
        for channel in self.poll.wait(sleep)? {
            if let Some(life) = self.life.lock().as_mut() {
                life.signalled(channel);
            }
        }
        Ok(())
    }

    /// Lets the host run until it has nothing to do.
    pub fn turn(&self) -> Sleep {
        let (sleep, gone) = {
            let mut life = self.life.lock();
            let Some(life) = life.as_mut() else {
                return Sleep::Unlimited;
            };
            let mut rounds = 0..ROUNDS;
            let rests = rounds.any(|_| !life.step(&self.poll, &self.events));
            let sleep = if rests { life.sleep() } else { Sleep::Not };
            (sleep, life.take_gone())
        };
        if gone.is_empty() {
            return sleep;
        }
        let mut devices = self.devices();
        for channel in gone {
            self.with_host(|host| devices.gone(host, channel, &self.events));
        }
        Sleep::Not
    }

    /// The devices. Before [`with_host`](Self::with_host), never in it.
    pub fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock()
    }

    /// Does something with the host; what comes of it goes to the guest soon. `None` when there is no VM.
    pub fn with_host<R>(&self, act: impl FnOnce(&mut Host) -> R) -> Option<R> {
        let result = self.life.lock().as_mut().map(|life| act(life.host()));
        self.wake();
        result
    }

    /// The VM of now.
    pub fn vm(&self) -> Option<Arc<dyn Vm>> {
        self.life.lock().as_ref().map(Life::vm)
    }

    /// Where events go.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// How the machine stands.
    pub fn status(&self) -> Status {
        let run = self.state.lock().run;
        let mut life = self.life.lock();
        let version = life
            .as_mut()
            .and_then(|life| life.host().server().version());
        let complaints = life.as_mut().map(|life| life.host().complaints());
        Status {
            running: run == RunState::Running,
            status: run,
            vmbus: version.map(|version| BusState {
                version: version.to_string(),
            }),
            complaints: complaints
                .unwrap_or_default()
                .into_iter()
                .map(str::to_owned)
                .collect(),
        }
    }

    /// The channels that are open now, with what they have counted.
    pub fn channels(&self) -> Vec<(Channel, Counts)> {
        let life = self.life.lock();
        life.as_ref().map(Life::channels).unwrap_or_default()
    }

    /// What was counted since the VM began, of the bus itself.
    pub fn bus_counts(&self) -> std::collections::BTreeMap<String, u64> {
        let life = self.life.lock();
        life.as_ref().map(Life::bus_counts).unwrap_or_default()
    }
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner")
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

impl End {
    /// Whether the guest has brought it about.
    pub fn is_by_guest(&self) -> bool {
        !matches!(self, Self::Quit | Self::Failed(_))
    }

    /// Why, as an event says it.
    pub fn reason(&self) -> Reason {
        match self {
            Self::PowerOff | Self::Hibernated | Self::DebugExit(_) => Reason::GuestShutdown,
            Self::Reset | Self::TripleFault => Reason::GuestReset,
            Self::Crashed => Reason::GuestPanic,
            Self::Quit => Reason::HostQmpQuit,
            Self::Failed(_) => Reason::HostError,
        }
    }
}
