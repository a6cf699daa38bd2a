//! Every command of the control stream.

use serde_json::{Map, Value};

use super::arguments::{
    BalloonTarget, DeviceName, DiskAdd, DiskEject, HotAdd, IpSettings, KvpKey, KvpPool, KvpSet,
    Link, Mtu, Nic, NoArguments, Shutdown, SomeDevice, TimeStep,
};
use super::fault::FaultOn;
use super::line::{Class, Failure};

/// Declares the commands: what each is called and what it is given.
macro_rules! commands {
    ($($(#[$doc:meta])* $variant:ident($arguments:ty) = $name:literal),+ $(,)?) => {
        /// A command.
        #[derive(Clone, PartialEq, Debug)]
        pub enum Command {
            $($(#[$doc])* $variant($arguments)),+
        }

        impl Command {
            /// The names of all commands.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            /// Its name on the stream.
            pub const fn name(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $name),+
                }
            }

            /// Its arguments as they go over the stream.
            ///
            /// # Errors
            /// When a path in it is no text.
            pub fn arguments(&self) -> serde_json::Result<Value> {
                match self {
                    $(Self::$variant(arguments) => serde_json::to_value(arguments)),+
                }
            }

            /// The command of this name with these arguments.
            ///
            /// # Errors
            /// When there is no such command, or it does not take these arguments.
            pub fn parse(name: &str, arguments: Map<String, Value>) -> Result<Self, Failure> {
                let arguments = Value::Object(arguments);
                let parsed = match name {
                    $($name => serde_json::from_value(arguments).map(Self::$variant),)+
                    _ => {
                        let desc = format!("there is no command `{name}`");
                        return Err(Failure::new(Class::CommandNotFound, desc));
                    }
                };
                parsed.map_err(|error| Failure::generic(format!("`{name}`: {error}")))
            }
        }
    };
}

commands! {
    /// Does nothing: QEMU's clients begin with it.
    Capabilities(NoArguments) = "qmp_capabilities",
    /// Lets the virtual processors run.
    Continue(NoArguments) = "cont",
    /// Halts the virtual processors.
    Stop(NoArguments) = "stop",
    /// Ends the VM at once.
    Quit(NoArguments) = "quit",
    /// Whether the VM runs, and how far VMBus is: [`Status`](super::Status).
    QueryStatus(NoArguments) = "query-status",
    /// All devices: a list of [`DeviceState`](super::DeviceState).
    QueryDevices(NoArguments) = "query-devices",
    /// What the devices and their channels have counted: a list of [`Counters`](super::Counters).
    QueryCounters(SomeDevice) = "query-counters",
    /// How often the virtual processors have left the guest, by reason: [`Exits`](super::Exits).
    QueryExits(NoArguments) = "query-exits",
    /// Asks the guest to power off, to restart or to hibernate. Its answer comes as
    /// [`Event::ShutdownAnswered`](super::Event::ShutdownAnswered).
    Shutdown(Shutdown) = "shutdown",
    /// Whether the guest answers heartbeats: [`HeartbeatState`](super::HeartbeatState).
    Heartbeat(NoArguments) = "heartbeat",
    /// Has the guest set its clock by the host's now.
    TimeSync(NoArguments) = "time-sync",
    /// Moves the host's clock as the guest sees it, and has the guest set its own.
    TimeStep(TimeStep) = "time-step",
    /// Gives the guest a value. Answered when the guest has it.
    KvpSet(KvpSet) = "kvp-set",
    /// A value of the guest's: [`KvpItem`](super::KvpItem).
    KvpGet(KvpKey) = "kvp-get",
    /// All values of a pool: [`KvpItems`](super::KvpItems).
    KvpList(KvpPool) = "kvp-list",
    /// Takes a value from the guest.
    KvpDelete(KvpKey) = "kvp-delete",
    /// The IP addresses of a network adapter, as the guest says: [`IpInformation`](super::IpInformation).
    KvpIpGet(Nic) = "kvp-ip-get",
    /// Gives a network adapter IP addresses.
    KvpIpSet(IpSettings) = "kvp-ip-set",
    /// Adds a disk.
    DiskAdd(DiskAdd) = "disk-add",
    /// Takes a disk out.
    DiskEject(DiskEject) = "disk-eject",
    /// Plugs a network adapter's cable in or out.
    Link(Link) = "link",
    /// Sets the largest packet of a network adapter. The guest sees it when it binds the adapter anew.
    Mtu(Mtu) = "mtu",
    /// Sets how much memory the guest should have. Events tell how it goes: [`Event::Balloon`](super::Event::Balloon).
    Balloon(BalloonTarget) = "balloon",
    /// How dynamic memory stands: [`BalloonState`](super::BalloonState).
    QueryBalloon(NoArguments) = "query-balloon",
    /// Gives the guest more memory than it started with.
    HotAdd(HotAdd) = "hot-add",
    /// Takes a device away.
    Rescind(DeviceName) = "rescind",
    /// Offers a device again that was taken away: at once, or when the guest has let go of it.
    Offer(DeviceName) = "offer",
    /// Makes something go wrong.
    Fault(FaultOn) = "fault",
    /// Nothing goes wrong any more.
    FaultsClear(SomeDevice) = "faults-clear",
}
