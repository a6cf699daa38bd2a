//! A guest on a machine, and a driver that writes down what happens to it.

use std::sync::{Arc, Mutex};

use vmbus::bus::Config;
use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    Channel, ChannelBuilder, ChannelError, EnabledChannel, IncomingPacket, Level, ReceivedPacket,
    State,
};
use vmbus::protocol::Guid;
use vmbus::ring::Outgoing;
use vmbus::{ConnectionState, Vmbus};
use vmbus_host::bus::{Device, Profile};
use vmbus_host::channel::HostChannel;
use vmbus_host::machine::Machine;
use vmbus_host::provider::Manual;

pub const INTERFACE: Guid = Guid::literal("11111111-2222-3333-4444-555555555555");
pub const INSTANCE: Guid = Guid::literal("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee");

/// One second in units of 100 ns.
pub const SECOND: u64 = 10_000_000;

pub struct Vm {
    pub machine: Arc<Machine>,
    pub vmbus: Arc<Vmbus>,
}

impl Vm {
    /// A guest that is not connected yet.
    pub fn new(profile: Profile) -> Self {
        Self::with_config(profile, Config::default())
    }

    /// The same, with settings of the stack.
    pub fn with_config(profile: Profile, config: Config) -> Self {
        let machine = Machine::new(profile);
        let vmbus = Vmbus::new(machine.clone(), config);
        machine.attach(vmbus.clone());
        Self { machine, vmbus }
    }

    /// A connected guest with one device of [`INTERFACE`], which the test serves by hand.
    pub fn with_device() -> (Self, ChannelId) {
        let vm = Self::new(Profile::openvmm());
        let id = vm
            .machine
            .add(Device::new(INTERFACE, INSTANCE), Manual)
            .unwrap();
        vm.connect();
        (vm, id)
    }

    pub fn connect(&self) {
        self.vmbus.connect();
        self.machine.settle();
        let connection = self.vmbus.connection();
        assert!(
            matches!(
                connection,
                ConnectionState::Connected {
                    all_offers_delivered: true,
                    ..
                }
            ),
            "{connection}"
        );
    }

    /// Enables the channel and lets it open.
    pub fn enable(&self, builder: &ChannelBuilder) -> EnabledChannel {
        let channel = builder.enable(self.vmbus.client()).unwrap();
        self.machine.settle();
        channel
    }

    pub fn host<R>(&self, id: ChannelId, with: impl FnOnce(&mut HostChannel) -> R) -> R {
        self.machine.channel(id, with).expect("the channel is open")
    }

    /// The host sends one message and interrupts if it must.
    pub fn send(&self, id: ChannelId, payload: &[u8]) {
        self.host(id, |host| {
            host.send(&Outgoing::in_band([payload, &[]])).unwrap();
        });
    }

    /// The host sends messages that become visible together.
    pub fn send_all(&self, id: ChannelId, payloads: impl IntoIterator<Item = u64>) {
        self.host(id, |host| {
            for payload in payloads {
                host.push(&Outgoing::in_band([&payload.to_le_bytes(), &[]]))
                    .unwrap();
            }
            host.publish().unwrap();
        });
    }

    /// No guest may make a host complain.
    pub fn assert_well_behaved(&self) {
        assert_eq!(self.machine.complaints(), [] as [&str; 0]);
    }
}

/// What a driver sees.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Seen {
    Opened,
    Started,
    PostStarted,
    Packet(Vec<u8>, Level),
    Complete(u32),
    Suspend,
    Closed,
    Failure(ChannelError),
}

/// A journal that callbacks write to.
#[derive(Clone, Default)]
pub struct Journal(Arc<Mutex<Vec<Seen>>>);

impl Journal {
    pub fn note(&self, seen: Seen) {
        self.0.lock().unwrap().push(seen);
    }

    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// The payloads of the packets seen so far, as numbers, and forgets everything.
    pub fn take_numbers(&self) -> Vec<u64> {
        self.take()
            .into_iter()
            .filter_map(|seen| match seen {
                Seen::Packet(bytes, _) => Some(number(&bytes)),
                _ => None,
            })
            .collect()
    }

    /// How often processing-complete was called, with which counts; forgets everything.
    pub fn take_completes(&self) -> Vec<u32> {
        self.take()
            .into_iter()
            .filter_map(|seen| match seen {
                Seen::Complete(count) => Some(count),
                _ => None,
            })
            .collect()
    }

    pub fn packet(&self, packet: &ReceivedPacket<'_>) {
        self.note(Seen::Packet(packet.payload().to_vec(), packet.level()));
    }

    /// A builder whose callbacks write here, and whose packets meet `process`.
    pub fn builder(
        &self,
        process: impl Fn(&Channel, ReceivedPacket<'_>) + Send + Sync + 'static,
    ) -> ChannelBuilder {
        let [
            packets,
            completes,
            opened,
            started,
            post,
            suspend,
            closed,
            failure,
        ] = std::array::from_fn(|_| self.clone());
        ChannelBuilder::new(INTERFACE)
            .friendly_name("test")
            .process_packet_callbacks(
                move |channel, packet| {
                    packets.packet(&packet);
                    process(channel, packet);
                },
                move |_, count| completes.note(Seen::Complete(count)),
            )
            .opened(move |_| {
                opened.note(Seen::Opened);
                Ok(())
            })
            .started(move |_| started.note(Seen::Started))
            .post_started(move |_| post.note(Seen::PostStarted))
            .suspend(move |_| suspend.note(Seen::Suspend))
            .closed(move |_| closed.note(Seen::Closed))
            .failure(move |_, error| failure.note(Seen::Failure(error)))
    }
}

/// A shelf for packets that a driver holds.
pub type Shelf = Arc<Mutex<Vec<IncomingPacket>>>;

pub fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().unwrap())
}

/// Everything that has come from the guest: transaction id if an answer is wanted, and payload.
pub fn received(host: &mut HostChannel) -> Vec<(Option<u64>, Vec<u8>)> {
    let mut packet = vmbus::ring::PacketBuffer::default();
    let mut all = Vec::new();
    while host.receive(&mut packet).unwrap() {
        let id = packet
            .completion_requested()
            .then_some(packet.transaction_id());
        all.push((id, packet.payload().to_vec()));
    }
    host.release().unwrap();
    all
}

pub fn is_active(channel: &EnabledChannel) -> bool {
    channel.channel().state() == State::Active
}
