//! `Vmbus`: the whole stack put together, as a kernel uses it.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use core::task::Waker;

use spin::Mutex;

use crate::bus::{Bus, Config, ConnectError, Event, Offer};
use crate::hypervisor::Hypervisor;
use crate::ids::ChannelId;
use crate::kmcl::{Channel, Client, Counters, Inner, MonitorMemory, Serve, State};
use crate::protocol::monitor::MonitorPages;
use crate::protocol::{FeatureFlags, MAX_PAYLOAD, Version};
use crate::sync::DispatchLock;

/// Messages that may wait for [`Vmbus::run_work`].
const INBOX: usize = 16;

/// The VMBus of this partition.
///
/// The kernel hands every interrupt on to [`on_message`](Self::on_message) and [`on_event`](Self::on_event), and calls
/// [`run_work`](Self::run_work) when asked to and at the [`deadline`](Self::deadline). Drivers are
/// given the [`client`](Self::client).
pub struct Vmbus {
    client: Client,
    /// PASSIVE only, and never held while a driver's code runs.
    bus: Mutex<Bus>,
    inbox: DispatchLock<Inbox>,
    /// The VP that works, plus one; 0 when none does. PASSIVE code of one VP never interrupts itself, so
    /// whoever finds its own VP here was called by the one that works.
    worker: AtomicU32,
    /// The change that async code has been woken for.
    woken: AtomicU64,
    /// Set by whoever found it held.
    again: AtomicBool,
    connection: Mutex<ConnectionState>,
    unload_requested: AtomicBool,
    unclaimed_events: AtomicU64,
}

/// How the connection stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum ConnectionState {
    /// Not tried yet.
    #[default]
    Disconnected,
    /// Waiting for the host.
    Connecting,
    /// Connected.
    Connected {
        /// The version in use.
        version: Version,
        /// The features in use.
        features: FeatureFlags,
        /// Whether the host has told all that it had to offer at the start.
        all_offers_delivered: bool,
    },
    /// There is no connection, and why.
    Failed(ConnectError),
    /// The guest has left.
    Unloaded {
        /// Whether the host confirmed it.
        acknowledged: bool,
    },
}

/// What there is to see of a VMBus at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The connection.
    pub connection: ConnectionState,
    /// What the host offers, by channel number.
    pub offers: Vec<OfferInfo>,
    /// Every enabled channel, bound to an offer or not.
    pub channels: Vec<ChannelInfo>,
    /// Interrupts for channels that nobody has open.
    pub unclaimed_events: u64,
    /// Messages for which there was no room at first.
    pub inbox_full: u64,
    /// How often the host has violated the bus protocol.
    pub violations: u64,
}

/// One offer.
#[derive(Clone, Debug)]
pub struct OfferInfo {
    /// What the host said.
    pub offer: Offer,
    /// The friendly name of the channel that is bound to it.
    pub driver: Option<String>,
}

/// One enabled channel.
#[derive(Clone, Debug)]
pub struct ChannelInfo {
    /// The friendly name.
    pub name: String,
    /// The offer it is bound to.
    pub channel: Option<ChannelId>,
    /// Where it stands.
    pub state: State,
    /// Its counters.
    pub counters: Counters,
}

/// Messages between the interrupt and the work queue: a ring of fixed size.
struct Inbox {
    slots: Box<[Message]>,
    first: usize,
    count: usize,
    /// Messages that were turned away.
    full: u64,
}

#[derive(Clone, Copy)]
struct Message {
    bytes: [u8; MAX_PAYLOAD],
    length: usize,
}

impl Inbox {
    fn new() -> Self {
        let empty = Message {
            bytes: [0; MAX_PAYLOAD],
            length: 0,
        };
        Self {
            slots: alloc::vec![empty; INBOX].into_boxed_slice(),
            first: 0,
            count: 0,
            full: 0,
        }
    }

    fn push(&mut self, payload: &[u8]) -> bool {
        if self.count == self.slots.len() {
            self.full += 1;
            return false;
        }
        let at = (self.first + self.count) % self.slots.len();
        if let Some(slot) = self.slots.get_mut(at) {
            // A SynIC message has no more than that.
            let length = payload.len().min(MAX_PAYLOAD);
            slot.bytes[..length].copy_from_slice(&payload[..length]);
            slot.length = length;
            self.count += 1;
        }
        true
    }

    fn pop(&mut self) -> Option<Message> {
        self.count = self.count.checked_sub(1)?;
        let message = self.slots.get(self.first).copied();
        self.first = (self.first + 1) % self.slots.len();
        message
    }
}

impl Vmbus {
    /// A VMBus that is not connected. Channels are served by the VP of `config` unless they say otherwise.
    pub fn new(hypervisor: Arc<dyn Hypervisor>, config: Config) -> Arc<Self> {
        let vmbus = Arc::new(Self {
            client: Client::new(hypervisor, config.target_vp),
            bus: Mutex::new(Bus::new(config)),
            inbox: DispatchLock::new(Inbox::new()),
            worker: AtomicU32::new(0),
            woken: AtomicU64::new(0),
            again: AtomicBool::new(false),
            connection: Mutex::new(ConnectionState::default()),
            unload_requested: AtomicBool::new(false),
            unclaimed_events: AtomicU64::new(0),
        });
        let stack: Weak<Self> = Arc::downgrade(&vmbus);
        vmbus.client.set_stack(stack);
        vmbus
    }

    /// What drivers enable their channels on.
    pub fn client(&self) -> &Client {
        &self.client
    }

    fn inner(&self) -> &Inner {
        self.client.inner()
    }

    fn hypervisor(&self) -> &dyn Hypervisor {
        &*self.inner().hypervisor
    }

    /// Makes contact with the host. At PASSIVE; the outcome comes with [`run_work`](Self::run_work).
    pub fn connect(&self) {
        *self.connection.lock() = ConnectionState::Connecting;
        let monitor = self.monitor_pages();
        let now = self.hypervisor().reference_time();
        let mut bus = self.bus.lock();
        bus.set_monitor_pages(monitor);
        bus.connect(now);
        drop(bus);
        self.hypervisor().request_work();
    }

    /// The pages for signals without hypercalls, empty. None when they are not wanted, or there is no memory for them:
    /// then each signal is a hypercall.
    fn monitor_pages(&self) -> Option<MonitorPages> {
        if !self.bus.lock().config().monitor_pages {
            return None;
        }
        let mut memory = self.inner().monitor.lock();
        if memory.is_none() {
            match MonitorMemory::share(self.hypervisor()) {
                Ok(shared) => *memory = Some(shared),
                Err(error) => log::warn!("VMBus goes without monitor pages: {error}"),
            }
        }
        let memory = memory.as_ref()?;
        memory.clear();
        Some(memory.pages())
    }

    /// Takes one channel message: the payload of a SynIC message of type 1. Called at DISPATCH.
    ///
    /// `false` means that there is no room: leave the message in its slot and offer it again after the next
    /// [`run_work`](Self::run_work), which has been asked for.
    pub fn on_message(&self, payload: &[u8]) -> bool {
        let taken = self.inbox.lock(self.hypervisor()).push(payload);
        self.hypervisor().request_work();
        taken
    }

    /// Serves the interrupt of one channel: event flag `channel` of SINT 2 was set. Called at DISPATCH on the channel's VP;
    /// runs the driver's callbacks.
    pub fn on_event(&self, channel: ChannelId) {
        if !self.inner().on_event(channel) {
            self.unclaimed_events.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Does all that is to be done at PASSIVE: messages, time-outs, opening and closing, deferred channels. Drivers'
    /// callbacks run in it. May be called at any time and from any VP; one works, the others return at once.
    pub fn run_work(&self) {
        self.again.store(true, Ordering::SeqCst);
        loop {
            fence(Ordering::SeqCst);
            let me = self.hypervisor().current_vp().0.wrapping_add(1);
            let free = self
                .worker
                .compare_exchange(0, me, Ordering::SeqCst, Ordering::SeqCst);
            if free.is_err() {
                return;
            }
            self.again.store(false, Ordering::SeqCst);
            self.work();
            self.worker.store(0, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if !self.again.load(Ordering::SeqCst) {
                return;
            }
        }
    }

    /// When [`run_work`](Self::run_work) has to be called next if nothing asks for it before; reference time.
    pub fn deadline(&self) -> Option<u64> {
        let bus = self.bus.lock().deadline();
        bus.into_iter().chain(self.inner().poll_deadline()).min()
    }

    /// Leaves VMBus: channels are suspended and closed, then the host is told to drop everything.
    /// [`ConnectionState::Unloaded`] tells that it is done. At PASSIVE.
    pub fn begin_unload(&self) {
        self.unload_requested.store(true, Ordering::SeqCst);
        self.hypervisor().request_work();
    }

    /// How the connection stands. At PASSIVE.
    pub fn connection(&self) -> ConnectionState {
        self.connection.lock().clone()
    }

    /// What there is to see now. At PASSIVE.
    pub fn snapshot(&self) -> Snapshot {
        let channels: Vec<Channel> = self.inner().channels.lock().clone();
        let channels: Vec<ChannelInfo> = channels
            .iter()
            .map(|channel| ChannelInfo {
                name: channel.friendly_name().into(),
                channel: channel.bound_to(),
                state: channel.state(),
                counters: channel.counters(),
            })
            .collect();
        let bus = self.bus.lock();
        let offers = bus
            .offers()
            .map(|offer| OfferInfo {
                offer: offer.clone(),
                driver: channels
                    .iter()
                    .find(|info| info.channel == Some(offer.channel))
                    .map(|info| info.name.clone()),
            })
            .collect();
        let violations = bus.violations();
        drop(bus);
        Snapshot {
            connection: self.connection(),
            offers,
            channels,
            unclaimed_events: self.unclaimed_events.load(Ordering::Relaxed),
            inbox_full: self.inbox.lock(self.hypervisor()).full,
            violations,
        }
    }

    /// Has `waker` woken at the next change; see [`Client::changes`].
    pub fn register(&self, waker: &Waker) {
        self.inner().register(waker);
    }

    /// A number that grows with every change: of the connection, an offer, or a channel's state.
    pub fn changes(&self) -> u64 {
        self.client.changes()
    }

    /// Waits until [`changes`](Self::changes) is no longer `seen`, and returns it.
    pub async fn changed(&self, seen: u64) -> u64 {
        self.client.changed(seen).await
    }

    fn work(&self) {
        let now = self.hypervisor().reference_time();
        self.inner().poll_rings(now);
        // Each round may give the next one something to do; channels that defer themselves anew wait for the
        // next call, so that nobody is starved.
        self.inner().run_deferred();
        loop {
            let mut busy = self.receive_messages();
            busy |= self.handle_events();
            busy |= self.step_channels();
            busy |= self.post_messages();
            if !busy {
                break;
            }
        }
        let changes = self.client.changes();
        if self.woken.swap(changes, Ordering::SeqCst) != changes {
            self.inner().wake();
        }
    }

    fn receive_messages(&self) -> bool {
        let now = self.hypervisor().reference_time();
        let mut busy = false;
        loop {
            let message = self.inbox.lock(self.hypervisor()).pop();
            let Some(message) = message else {
                break;
            };
            let payload = message.bytes.get(..message.length).unwrap_or_default();
            self.bus.lock().receive(now, payload);
            busy = true;
        }
        self.bus.lock().tick(now);
        busy
    }

    fn handle_events(&self) -> bool {
        let mut busy = false;
        loop {
            let event = self.bus.lock().poll_event();
            let Some(event) = event else {
                return busy;
            };
            busy = true;
            self.handle(event);
        }
    }

    fn channels(&self) -> Vec<Channel> {
        self.inner().channels.lock().clone()
    }

    fn find(&self, wanted: impl Fn(&Channel) -> bool) -> Option<Channel> {
        self.inner()
            .channels
            .lock()
            .iter()
            .find(|channel| wanted(channel))
            .cloned()
    }

    fn handle(&self, event: Event) {
        let bus = &self.bus;
        match event {
            Event::Connected { version, features } => {
                // The host has dropped what it knew of an earlier connection.
                self.disconnected(true, |channel| channel.bound_to().is_some());
                *self.connection.lock() = ConnectionState::Connected {
                    version,
                    features,
                    all_offers_delivered: false,
                };
                self.client.notify();
            }
            Event::ConnectFailed(error) => {
                self.disconnected(false, |channel| channel.bound_to().is_some());
                *self.connection.lock() = ConnectionState::Failed(error);
                self.client.notify();
            }
            Event::Offered(offer) => {
                self.client.notify();
                // One that has been taken back meanwhile, in a message that came with it, is not worth a try.
                let stands = |known: &Offer| known.channel == offer.channel;
                let stands = bus.lock().offers().any(stands);
                if stands && let Some(channel) = self.find(|channel| channel.wants(&offer)) {
                    channel.bind(bus, &offer);
                }
            }
            Event::AllOffersDelivered => {
                if let ConnectionState::Connected {
                    all_offers_delivered,
                    ..
                } = &mut *self.connection.lock()
                {
                    *all_offers_delivered = true;
                }
                self.client.notify();
            }
            Event::Rescinded(id) => {
                self.client.notify();
                match self.find(|channel| channel.bound_to() == Some(id)) {
                    Some(channel) => channel.on_rescinded(),
                    None => {
                        if let Err(error) = bus.lock().release(id) {
                            log::warn!("releasing channel {id}: {error}");
                        }
                    }
                }
            }
            Event::GpadlCreated { handle, result } => {
                self.find(|channel| channel.on_gpadl_created(handle, result));
            }
            Event::GpadlTornDown(handle) => {
                self.find(|channel| channel.on_gpadl_torn_down(handle));
            }
            Event::Opened { channel, result } => {
                if let Some(bound) = self.find(|bound| bound.bound_to() == Some(channel)) {
                    bound.on_opened(result);
                }
            }
            // Nobody moves channels to other VPs yet.
            Event::TargetVpModified { .. } => {}
            Event::Unloaded { acknowledged } => {
                self.disconnected(acknowledged, |_| true);
                if acknowledged {
                    drop(self.inner().monitor.lock().take());
                }
                *self.connection.lock() = ConnectionState::Unloaded { acknowledged };
                self.client.notify();
            }
            Event::Violation(violation) => log::warn!("VMBus: {violation}"),
        }
    }

    /// Ends channels after the connection has gone.
    fn disconnected(&self, acknowledged: bool, ends: impl Fn(&Channel) -> bool) {
        for channel in self.channels().iter().filter(|channel| ends(channel)) {
            channel.on_disconnected(acknowledged);
        }
        if acknowledged {
            self.inner().release_kept();
        }
    }

    fn step_channels(&self) -> bool {
        let unload = self.unload_requested.load(Ordering::SeqCst);
        // All, also when one is not ready: the others need not wait for it. Sub-channels, which were enabled after their
        // primary channel, come before it.
        let leave = |ready: bool, channel: &Channel| channel.prepare_unload(&self.bus) && ready;
        if unload && self.channels().iter().rev().fold(true, leave) {
            self.unload_requested.store(false, Ordering::SeqCst);
            let now = self.hypervisor().reference_time();
            self.bus.lock().unload(now);
            return true;
        }
        if !self.inner().take_attention() {
            return false;
        }
        for channel in self.channels().iter().rev() {
            channel.step(&self.bus);
        }
        self.bind_waiting();
        true
    }

    /// Binds channels that were enabled after their offer came.
    fn bind_waiting(&self) {
        let offers: Vec<Offer> = self.bus.lock().offers().cloned().collect();
        for offer in offers {
            let taken = self.find(|channel| channel.bound_to() == Some(offer.channel));
            if taken.is_none()
                && let Some(channel) = self.find(|channel| channel.wants(&offer))
            {
                channel.bind(&self.bus, &offer);
            }
        }
    }

    fn post_messages(&self) -> bool {
        let mut busy = false;
        loop {
            let message = self.bus.lock().poll_message();
            let Some(message) = message else {
                return busy;
            };
            busy = true;
            let posted = self
                .hypervisor()
                .post_message(message.connection, &message.payload);
            if let Err(error) = posted {
                let now = self.hypervisor().reference_time();
                self.bus.lock().message_refused(now, error);
            }
        }
    }
}

impl Serve for Vmbus {
    fn serve(&self) {
        let me = self.hypervisor().current_vp().0.wrapping_add(1);
        if self.worker.load(Ordering::SeqCst) == me {
            // A callback of the one that works waits here. What that one had in hand when it called stays with it;
            // everything else is done now, whether or not somebody asked.
            self.inner().set_attention();
            self.work();
        } else {
            self.run_work();
        }
    }

    fn deadline(&self) -> Option<u64> {
        Vmbus::deadline(self)
    }
}

impl fmt::Debug for Vmbus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmbus")
            .field("connection", &*self.connection.lock())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected => f.write_str("not connected"),
            Self::Connecting => f.write_str("connecting"),
            Self::Connected { version, .. } => write!(f, "connected, version {version}"),
            Self::Failed(error) => error.fmt(f),
            Self::Unloaded { acknowledged: true } => f.write_str("unloaded"),
            Self::Unloaded {
                acknowledged: false,
            } => f.write_str("unloaded without the host's answer"),
        }
    }
}
