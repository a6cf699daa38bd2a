//! What serves a device's channels at the host, and how it asks for things.

use alloc::boxed::Box;
use alloc::collections::BTreeSet;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroU16;

use vmbus::ids::ChannelId;
use vmbus::protocol::{Status, Version};

use crate::bus::{ConnectRequest, Device};
use crate::channel::HostChannel;
use crate::sync::Mutex;

/// What serves a channel at the host. Each sub-channel has a provider of its own; those of one device share what they
/// have in common.
///
/// A provider never waits: slow work goes to an [`Executor`](crate::work::Executor), and [`Link::wake`] brings it back here.
pub trait Provider: Send {
    /// The channel is on a host that will offer it. `link` asks for things later.
    fn attached(&mut self, _link: Link) {}

    /// The guest opens the channel; a failure is its answer.
    fn opened(&mut self, _channel: &mut HostChannel) -> Status {
        Status::SUCCESS
    }

    /// Something may be in the ring, or has been asked for with [`Link::wake`], or the [`deadline`](Self::deadline) has
    /// come. `now` is reference time in units of 100 ns.
    fn serve(&mut self, now: u64, channel: &mut HostChannel);

    /// The device is about to be taken away: what is under way is ended, and its guest told, while it still looks at the
    /// channel. Called instead of [`serve`](Self::serve) being waited for, until it says `true` on every channel of the
    /// device, or the host's patience ends.
    fn leave(&mut self, _now: u64, _channel: &mut HostChannel) -> bool {
        true
    }

    /// The channel is closed, taken away, or its connection has ended. The guest's memory is out of reach by now.
    fn closed(&mut self) {}

    /// When [`serve`](Self::serve) wants to be called without anything in the ring, in reference time.
    fn deadline(&self) -> Option<u64> {
        None
    }
}

/// What answers a guest that wants to connect to services of the host, and connects to the guest's: sockets over
/// VMBus, each a channel of its own.
pub trait Connector: Send {
    /// It is on a host. `link` offers channels.
    fn attached(&mut self, _link: HostLink) {}

    /// The guest has connected to the bus, with this version.
    fn connected(&mut self, _version: Version) {}

    /// The guest asks for a connection: to be offered or refused by the link, now or later.
    fn requested(&mut self, request: ConnectRequest);

    /// It was woken, or its [`deadline`](Self::deadline) has come. `now` is reference time in units of 100 ns.
    fn serve(&mut self, now: u64);

    /// The guest has left the bus: what it asked for is void.
    fn disconnected(&mut self) {}

    /// When [`serve`](Self::serve) wants to be called.
    fn deadline(&self) -> Option<u64> {
        None
    }
}

/// A provider that leaves its channel to the test.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manual;

impl Provider for Manual {
    fn serve(&mut self, _now: u64, _channel: &mut HostChannel) {}
}

/// How a provider asks its host for something, from any thread. Clones are the same; what is asked for a channel
/// that is gone does nothing.
#[derive(Clone)]
pub struct Link {
    channel: ChannelId,
    wishes: Wishes,
}

impl Link {
    pub(crate) const fn new(channel: ChannelId, wishes: Wishes) -> Self {
        Self { channel, wishes }
    }

    /// The channel that this link is of.
    pub const fn channel(&self) -> ChannelId {
        self.channel
    }

    /// Has the provider served soon.
    pub fn wake(&self) {
        let first = self.wishes.0.lists.lock().woken.insert(self.channel);
        if first {
            self.wishes.notify();
        }
    }

    /// Offers a further channel of this device, as a device does whose protocol was asked for it. One whose index
    /// is taken is not offered.
    pub fn add_sub_channel(&self, index: NonZeroU16, provider: Box<dyn Provider>) {
        let primary = self.channel;
        self.wishes.wish(Wish::SubChannel(primary, index, provider));
    }

    /// Takes the channel away; with a primary channel its sub-channels.
    pub fn rescind(&self) {
        self.wishes.wish(Wish::Rescind(self.channel));
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({:?})", self.channel)
    }
}

/// How a [`Connector`] asks its host for something, from any thread. Clones are the same.
#[derive(Clone)]
pub struct HostLink {
    wishes: Wishes,
}

impl HostLink {
    pub(crate) const fn new(wishes: Wishes) -> Self {
        Self { wishes }
    }

    /// Has the connector served soon.
    pub fn wake(&self) {
        self.wishes.0.lists.lock().connector = true;
        self.wishes.notify();
    }

    /// Offers a channel. When no channel number is free, the provider is dropped without having been attached.
    pub fn offer(&self, device: Device, provider: Box<dyn Provider>) {
        self.wishes.wish(Wish::Offer(Box::new(device), provider));
    }

    /// Tells the guest that nobody accepts its connection.
    pub fn refuse(&self, request: ConnectRequest) {
        self.wishes.wish(Wish::Refuse(request));
    }
}

impl fmt::Debug for HostLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HostLink")
    }
}

/// What providers have asked for, and whom to tell.
#[derive(Clone, Default)]
pub(crate) struct Wishes(Arc<Shared>);

#[derive(Default)]
struct Shared {
    lists: Mutex<Lists>,
    told: Mutex<Option<Notify>>,
}

/// Called, on any thread, when a provider has asked for something.
pub type Notify = Arc<dyn Fn() + Send + Sync>;

#[derive(Default)]
pub(crate) struct Lists {
    /// Channels to serve.
    pub(crate) woken: BTreeSet<ChannelId>,
    /// The connector is to be served.
    pub(crate) connector: bool,
    pub(crate) others: Vec<Wish>,
}

/// What is asked for besides being served.
pub(crate) enum Wish {
    SubChannel(ChannelId, NonZeroU16, Box<dyn Provider>),
    Rescind(ChannelId),
    Offer(Box<Device>, Box<dyn Provider>),
    Refuse(ConnectRequest),
}

impl Wishes {
    pub(crate) fn on_wish(&self, notify: Notify) {
        *self.0.told.lock() = Some(notify);
    }

    /// Takes what has been asked for so far.
    pub(crate) fn take(&self) -> Lists {
        core::mem::take(&mut *self.0.lists.lock())
    }

    fn wish(&self, wish: Wish) {
        self.0.lists.lock().others.push(wish);
        self.notify();
    }

    fn notify(&self) {
        let notify = self.0.told.lock().clone();
        if let Some(notify) = notify {
            notify();
        }
    }
}
