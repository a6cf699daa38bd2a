//! The devices of a machine: built from the configuration, found by name, offered and taken away.
//!
//! A device kind is one file here: what it makes of its configuration, the provider that serves it, and what
//! the control stream can ask of it. Devices outlive the VM: a guest that starts anew finds them as they are.

mod ask;
mod balloon;
mod faults;
mod heartbeat;
mod instance;
mod integration;
mod kvp;
mod net;
mod observed;
mod scsi;
mod shutdown;
mod time_sync;
mod vsock;

use std::collections::BTreeMap;
use std::sync::Arc;

use vmbus::ids::ChannelId;
use vmbus::protocol::Guid;
use vmbus_host::bus;
use vmbus_host::faults::ChannelFaults;
use vmbus_host::host::Host;
use vmbus_host::integration::{Heartbeat, Kvp, Shutdown, TimeSync};
use vmbus_host::provider::Provider;
use vmbus_host::work::Threads;

pub use balloon::Balloon;
pub use scsi::OpenDisk;

use self::integration::Integration;
use self::net::{Adapter, Wires};
use self::scsi::Scsi;
use self::vsock::Vsock;
use crate::config::{self, Config, Kind};
use crate::control::{Class, Event, Failure, Fault};
use crate::runner::{Events, Vm};
use observed::Observed;

/// Numbers by their names.
type Counters = BTreeMap<String, u64>;

/// What all device kinds have in common.
trait Part {
    /// The offer, and what serves its primary channel: the same state each time. None of what offers channels when
    /// somebody wants to connect.
    fn offer(&self) -> Option<(bus::Device, Box<dyn Provider>)> {
        None
    }

    /// What it has counted.
    fn counters(&self) -> Counters;

    /// There is a new host, with a VM below.
    fn begin(&mut self, _host: &mut Host, _vm: &Arc<dyn Vm>) -> Result<(), Failure> {
        Ok(())
    }

    /// The VM is gone.
    fn finish(&mut self) {}

    /// Makes something go wrong that is this device's own. `false` when it has no such fault.
    fn inject(&self, _fault: &Fault) -> Result<bool, Failure> {
        Ok(false)
    }

    /// Nothing of that kind goes wrong any more.
    fn clear_faults(&self) {}
}

/// Declares the kinds of devices.
macro_rules! bodies {
    ($($kind:ident($part:ty)),+ $(,)?) => {
        /// A device by its kind.
        enum Body {
            $($kind($part)),+
        }

        impl Body {
            fn part(&self) -> &dyn Part {
                match self {
                    $(Self::$kind(part) => part),+
                }
            }

            fn part_mut(&mut self) -> &mut dyn Part {
                match self {
                    $(Self::$kind(part) => part),+
                }
            }
        }
    };
}

bodies! {
    Scsi(Scsi),
    Net(Adapter),
    Heartbeat(Integration<Heartbeat>),
    Shutdown(Integration<Shutdown>),
    TimeSync(Integration<TimeSync>),
    Kvp(Integration<Kvp>),
    Balloon(Balloon),
    Vsock(Vsock),
}

/// What devices share while they are built, and after.
#[derive(Default)]
struct Workshop {
    disks: Option<Arc<Threads>>,
    wires: Wires,
}

/// Threads that read and write disks.
const DISK_THREADS: usize = 4;

impl Workshop {
    /// Who reads and writes disks.
    fn disks(&mut self) -> Result<Arc<Threads>, Failure> {
        if let Some(disks) = &self.disks {
            return Ok(Arc::clone(disks));
        }
        let threads = Threads::new("disk", DISK_THREADS).map_err(|error| {
            let desc = format!("there is no room for the threads of the disks: {error}");
            Failure::generic(desc)
        })?;
        Ok(Arc::clone(self.disks.insert(Arc::new(threads))))
    }
}

/// A device.
pub struct Device {
    name: String,
    kind: Kind,
    body: Body,
    /// Its primary channel, while it is offered.
    channel: Option<ChannelId>,
    /// Its last one, until [`Devices::gone`] hears that the guest has let go of it.
    leaving: Option<ChannelId>,
    /// Whether a guest that starts anew is offered it.
    wanted: bool,
}

/// The devices of a machine, in the order of the configuration.
#[derive(Default)]
pub struct Devices {
    all: Vec<Device>,
}

impl Devices {
    /// Builds what the configuration names; nothing is offered yet.
    ///
    /// # Errors
    /// One sentence for the first device that cannot be built.
    pub fn new(config: &Config, events: &Events) -> Result<Self, Failure> {
        let mut workshop = Workshop::default();
        let build = |device: &config::Device| {
            let body = match device {
                config::Device::Scsi(scsi) => Body::Scsi(Scsi::new(scsi, &mut workshop)?),
                config::Device::Net(net) => Body::Net(Adapter::new(net, &mut workshop)?),
                config::Device::Heartbeat(_) => Body::Heartbeat(heartbeat::build()),
                config::Device::Shutdown(_) => Body::Shutdown(shutdown::build()),
                config::Device::TimeSync(_) => Body::TimeSync(time_sync::build()),
                config::Device::Kvp(_) => Body::Kvp(kvp::build()),
                config::Device::Balloon(balloon) => {
                    Body::Balloon(Balloon::new(balloon, config.memory_mib, events.clone()))
                }
                config::Device::Vsock(vsock) => Body::Vsock(Vsock::new(vsock)?),
            };
            Ok(Device {
                name: device.name().to_owned(),
                kind: device.kind(),
                body,
                channel: None,
                leaving: None,
                wanted: true,
            })
        };
        let all = config.devices.iter().map(build).collect::<Result<_, _>>()?;
        Ok(Self { all })
    }

    /// Offers all devices on a new host.
    ///
    /// # Errors
    /// When what a device had before is not to be had again.
    pub(crate) fn begin(&mut self, host: &mut Host, vm: &Arc<dyn Vm>) -> Result<(), Failure> {
        for device in &mut self.all {
            device.body.part_mut().begin(host, vm)?;
            device.channel = None;
            device.leaving = None;
            if device.wanted && device.instance().is_some() {
                device.offer(host)?;
            }
        }
        Ok(())
    }

    /// The host is gone.
    pub(crate) fn finish(&mut self) {
        for device in &mut self.all {
            device.channel = None;
            device.leaving = None;
            device.body.part_mut().finish();
        }
    }

    /// A device has gone, the one that had this channel: it is offered again if that was asked for meanwhile.
    pub(crate) fn gone(&mut self, host: &mut Host, channel: ChannelId, events: &Events) {
        let mut devices = self.all.iter_mut();
        let Some(device) = devices.find(|device| device.leaving == Some(channel)) else {
            return;
        };
        device.leaving = None;
        let name = device.name.clone();
        events.push(Event::DeviceGone { device: name });
        if device.wanted && device.offer(host).is_err() {
            // The bus is full; the device counts as not offered.
            device.wanted = false;
        }
    }

    /// The names of the devices by their instances.
    pub fn names(&self) -> BTreeMap<Guid, String> {
        let pairs = self.all.iter();
        pairs
            .filter_map(|device| Some((device.instance()?, device.name.clone())))
            .collect()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.all.iter()
    }

    /// The device of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn find(&mut self, name: &str) -> Result<&mut Device, Failure> {
        let found = self.all.iter_mut().find(|device| device.name == name);
        found.ok_or_else(|| {
            let desc = format!("there is no device `{name}`");
            Failure::new(Class::DeviceNotFound, desc)
        })
    }

    /// The one device for which `pick` finds something.
    fn one<'a, T>(
        &'a self,
        kind: Kind,
        pick: impl FnMut(&'a Device) -> Option<T>,
    ) -> Result<T, Failure> {
        self.all.iter().find_map(pick).ok_or_else(|| {
            let desc = format!("this machine has no {} device", kind.name());
            Failure::new(Class::DeviceNotFound, desc)
        })
    }

    /// Has the provider of the one device of this kind look.
    fn wake(&self, host: &mut Host, kind: Kind) {
        let devices = self.all.iter().filter(|device| device.kind == kind);
        devices
            .filter_map(|device| device.channel)
            .for_each(|channel| host.wake(channel));
    }

    /// Dynamic memory.
    ///
    /// # Errors
    /// When the machine has none.
    pub fn balloon(&self) -> Result<&Balloon, Failure> {
        self.one(Kind::Balloon, |device| match &device.body {
            Body::Balloon(balloon) => Some(balloon),
            _ => None,
        })
    }
}

impl Device {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What sort it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its instance GUID, if it is offered as a whole.
    pub fn instance(&self) -> Option<Guid> {
        let (device, _) = self.body.part().offer()?;
        Some(device.instance)
    }

    /// Whether the guest is offered it.
    pub fn is_offered(&self, host: &mut Host) -> bool {
        self.channel
            .is_some_and(|channel| host.server().is_offered(channel))
    }

    /// What it has counted.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        self.body.part().counters()
    }

    /// Offers it: at once, or when the guest has let go of what it had before.
    ///
    /// # Errors
    /// When it is offered already, or the bus is full.
    pub fn offer(&mut self, host: &mut Host) -> Result<(), Failure> {
        let name = &self.name;
        let is_leaving = self.leaving.is_some();
        if self.is_offered(host) || is_leaving && self.wanted {
            return Err(Failure::generic(format!("`{name}` is offered already")));
        }
        if is_leaving {
            self.wanted = true;
            return Ok(());
        }
        let Some((device, provider)) = self.body.part().offer() else {
            return Err(self.not_offered());
        };
        let channel = host.add(device, Observed::new(provider));
        let full = || Failure::generic(format!("there is no channel left for `{name}`"));
        self.channel = Some(channel.ok_or_else(full)?);
        self.wanted = true;
        Ok(())
    }

    /// Takes it away, in good order: what is under way ends first.
    ///
    /// # Errors
    /// When it is not offered.
    pub fn rescind(&mut self, host: &mut Host) -> Result<(), Failure> {
        let offered = self.is_offered(host);
        if !offered && self.wanted && self.leaving.is_some() {
            // It was to come back.
            self.wanted = false;
            return Ok(());
        }
        self.wanted &= !offered;
        match self.channel.take().filter(|_| offered) {
            Some(channel) if host.take_away(channel) => {
                self.leaving = Some(channel);
                Ok(())
            }
            _ => Err(self.not_offered()),
        }
    }

    /// What goes wrong on its channels.
    fn channel_faults(&self, host: &Host) -> Result<ChannelFaults, Failure> {
        let faults = self.channel.and_then(|channel| host.faults(channel));
        faults.ok_or_else(|| self.not_offered())
    }

    fn not_offered(&self) -> Failure {
        let name = &self.name;
        let desc = match self.instance() {
            Some(_) => format!("`{name}` is not offered"),
            None => format!("`{name}` is no device that is offered: its connections are"),
        };
        Failure::new(Class::DeviceNotActive, desc)
    }
}

/// Counters by fixed names.
fn counted<const N: usize>(counters: [(&str, u64); N]) -> Counters {
    counters
        .map(|(name, count)| (name.to_owned(), count))
        .into()
}

fn device_is_no(name: &str, what: &str) -> Failure {
    Failure::new(Class::DeviceNotFound, format!("`{name}` is no {what}"))
}
