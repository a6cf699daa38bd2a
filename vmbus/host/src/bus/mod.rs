//! The bus server: takes the guest's messages, keeps offers, GPADLs and open channels, and makes the replies.
//!
//! It does no I/O. Whoever owns a [`Server`] gives it what the guest posts ([`post`](Server::post)), lets it
//! [`run`](Server::run), delivers what [`poll_message`](Server::poll_message) returns and handles what
//! [`poll_event`](Server::poll_event) returns. Times are in units of 100 ns. How it behaves where hosts differ is a
//! matter of its [`Profile`]; what goes wrong can be chosen with [`inject`](Server::inject) and [`Refusals`].
//!
//! What a host would drop without a word is told to the owner as [`Event::Dropped`]: a
//! guest in good order never causes one.

mod gpadl;
mod line;
mod profile;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;
use core::num::NonZeroU16;

use vmbus::ids::{ChannelId, ConnectionId, GpadlHandle, PAGE_SIZE, PageNumber, VpIndex};
use vmbus::protocol::message::{
    AllOffersDelivered, CloseChannel, GpadlBody, GpadlCreated, GpadlHeader, GpadlTeardown,
    GpadlTorndown, InitiateContact, ModifyChannel, ModifyChannelResponse, OfferChannel,
    OpenChannel, OpenChannelResult, RelidReleased, RescindChannelOffer, ResponseFeatures,
    TlConnectRequest, TlConnectResult, UnloadComplete, VersionResponse,
};
use vmbus::protocol::monitor::{MonitorId, MonitorPages};
use vmbus::protocol::sizes::{Direction, MessageInfo};
use vmbus::protocol::{
    Body, ConnectionState, FeatureFlags, Guid, Header, LEGACY_CONNECTION, MULTICLIENT_CONNECTION,
    MessageType, OfferFlags, Payload, SINT, Status, Version,
};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

pub use gpadl::{Access, Gpadls, Lent, MapError, Mapped, Range};
pub use line::{Fault, Rule};
pub use profile::{GpadlRule, OfferOrder, Profile, RescindOrder, Versions};

use gpadl::{Gpadl, Progress};
use line::Line;

/// The most GPADLs that a guest has at one time: two for each channel number that there is.
const MAX_GPADLS: usize = 1 << 12;

/// The most bytes that describe them: as many as 4 GiB of pages take. A guest can lend a page any number of times, so its own
/// memory is no limit.
const MAX_DESCRIBED: usize = 8 << 20;

/// The status of a hypercall (spec tlfs.md 3.3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HvStatus(pub u16);

impl HvStatus {
    /// Done.
    pub const SUCCESS: Self = Self(0x00);
    /// The input makes no sense.
    pub const INVALID_HYPERCALL_INPUT: Self = Self(0x03);
    /// There is no such connection.
    pub const INVALID_CONNECTION_ID: Self = Self(0x12);
    /// The host is busy: try again.
    pub const INSUFFICIENT_BUFFERS: Self = Self(0x13);
}

/// A device's channel, as the server offers it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// What kind of device it is.
    pub interface: Guid,
    /// Which device it is.
    pub instance: Guid,
    /// 0 for a primary channel, 1.. for sub-channels.
    pub sub_channel_index: u16,
    /// What else the offer says.
    pub flags: OfferFlags,
    /// MMIO space that the device needs, in MiB.
    pub mmio_megabytes: u16,
    /// MMIO space that the device could use, in MiB.
    pub optional_mmio_megabytes: u16,
    /// Defined by the device.
    pub user_data: [u8; 120],
    /// Its bit in the monitor page, if it wants one and the host and the guest have such pages.
    pub monitor_id: Option<MonitorId>,
    /// Offered only when all others have been, as Hyper-V may do with integration components.
    pub late: bool,
}

impl Device {
    /// A device with one channel and nothing special.
    pub const fn new(interface: Guid, instance: Guid) -> Self {
        Self {
            interface,
            instance,
            sub_channel_index: 0,
            flags: OfferFlags::ENUMERATE_DEVICE_INTERFACE,
            mmio_megabytes: 0,
            optional_mmio_megabytes: 0,
            user_data: [0; 120],
            monitor_id: None,
            late: false,
        }
    }

    /// A further channel of this device. MMIO space and monitor bit stay with the primary channel.
    pub const fn sub_channel(&self, index: NonZeroU16) -> Self {
        Self {
            sub_channel_index: index.get(),
            flags: self.flags,
            user_data: self.user_data,
            ..Self::new(self.interface, self.instance)
        }
    }

    /// The same channel of the same device.
    fn is_same(&self, other: &Self) -> bool {
        let key = |device: &Self| (device.interface, device.instance, device.sub_channel_index);
        key(self) == key(other)
    }
}

/// A message to deliver to the guest, with type 1.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// To which VP.
    pub vp: VpIndex,
    /// On which synthetic interrupt source.
    pub sint: u8,
    /// What.
    pub payload: Vec<u8>,
}

/// Something that the server's owner should know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The guest has connected, with this version.
    Connected(Version),
    /// The guest has unloaded or made contact anew: every channel is closed and every GPADL gone.
    Disconnected,
    /// The guest wants to open a channel: answer with [`Server::finish_open`].
    Opening(Opening),
    /// The guest has closed a channel, or the connection ended.
    Closed(ChannelId),
    /// The guest wants a channel's interrupts on this VP.
    TargetVp {
        /// The channel.
        channel: ChannelId,
        /// The VP.
        target_vp: VpIndex,
    },
    /// The guest wants to connect to a service of the host: offer a channel, or [`Server::refuse`].
    Connect(ConnectRequest),
    /// A GPADL exists.
    GpadlCreated(GpadlHandle),
    /// A GPADL is gone.
    GpadlTornDown(GpadlHandle),
    /// A channel has been taken away.
    Rescinded(ChannelId),
    /// The guest gave a rescinded channel's number back.
    Released(ChannelId),
    /// The guest sent something that hosts drop or refuse.
    Dropped {
        /// The message.
        message: MessageType,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// A guest's wish to connect to a service of the host (spec hvsock.md 2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ConnectRequest {
    /// The guest's end, picked by the guest.
    pub endpoint: Guid,
    /// The service.
    pub service: Guid,
}

/// The status of a connection that nobody accepts (spec hvsock.md 2).
const CONNECTION_REFUSED: Status = Status(0xC000_0236);

/// The target VP of a channel whose interrupts the guest does not want (spec vmbus.md 3.2).
pub const NO_INTERRUPTS: VpIndex = VpIndex(u32::MAX);

/// How the guest wants to open a channel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opening {
    /// The channel.
    pub channel: ChannelId,
    /// The GPADL of both rings.
    pub ring: GpadlHandle,
    /// The pages of both rings; guest-to-host first.
    pub pages: Vec<PageNumber>,
    /// Where the host-to-guest ring begins, in pages.
    pub downstream_page: u32,
    /// The VP to interrupt.
    pub target_vp: VpIndex,
    /// The event flag to set on that VP.
    pub event_flag: u16,
    /// The event connection that the guest signals.
    pub connection: ConnectionId,
    /// Defined by the device.
    pub user_data: [u8; 120],
}

/// What the server refuses, though it could do it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Refusals {
    /// Connections fail with this state.
    pub contact: Option<ConnectionState>,
    /// GPADLs fail with this status.
    pub gpadls: Option<Status>,
    /// MODIFY_CHANNEL fails with this status.
    pub modify: Option<Status>,
}

/// The host's end of the bus.
#[derive(Debug)]
pub struct Server {
    profile: Profile,
    /// What is refused from now on. Opening is refused with [`Server::finish_open`].
    pub refusals: Refusals,
    connection: Option<Connection>,
    channels: BTreeMap<ChannelId, Channel>,
    gpadls: BTreeMap<GpadlHandle, Gpadl>,
    /// Those that are whole.
    lent: Gpadls,
    inbox: Line<Incoming>,
    outbox: Line<Message>,
    events: VecDeque<Event>,
    now: u64,
}

#[derive(Clone, Debug)]
struct Incoming {
    connection: ConnectionId,
    payload: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
struct Connection {
    version: Version,
    features: FeatureFlags,
    /// Where the guest's messages come from now.
    messages: ConnectionId,
    /// Where the host's messages go.
    vp: VpIndex,
    monitor_pages: Option<MonitorPages>,
    offers_requested: bool,
}

#[derive(Debug)]
struct Channel {
    device: Device,
    state: ChannelState,
    rescinded: bool,
    /// Not offered yet: the guest has still to give back the number that this device had before it was taken away. Until
    /// then Linux would take the offer for one that it knows.
    held: bool,
}

impl Channel {
    /// The guest knows of it and may use it.
    const fn is_current(&self) -> bool {
        !self.rescinded && !self.held
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ChannelState {
    Closed,
    Opening { open_id: u32, ring: GpadlHandle },
    Open { ring: GpadlHandle },
}

impl ChannelState {
    fn ring(self) -> Option<GpadlHandle> {
        match self {
            Self::Closed => None,
            Self::Opening { ring, .. } | Self::Open { ring } => Some(ring),
        }
    }
}

impl Server {
    /// A server without devices and without a guest.
    pub fn new(profile: Profile) -> Self {
        Self {
            profile,
            refusals: Refusals {
                contact: None,
                gpadls: None,
                modify: None,
            },
            connection: None,
            channels: BTreeMap::new(),
            gpadls: BTreeMap::new(),
            lent: Gpadls::default(),
            inbox: Line::new(),
            outbox: Line::new(),
            events: VecDeque::new(),
            now: 0,
        }
    }

    /// How the server behaves.
    pub const fn profile(&self) -> &Profile {
        &self.profile
    }

    /// Makes something go wrong with messages from now on.
    pub fn inject(&mut self, rule: Rule) {
        let direction = rule
            .kind
            .and_then(MessageInfo::of)
            .map(|info| info.direction);
        if direction != Some(Direction::ToGuest) {
            self.inbox.inject(rule);
        }
        if direction != Some(Direction::ToHost) {
            self.outbox.inject(rule);
        }
    }

    /// Nothing goes wrong with messages any more, and nothing is refused.
    pub fn heal(&mut self) {
        self.inbox.heal();
        self.outbox.heal();
        self.refusals = Refusals::default();
    }

    /// Adds a message to those for the guest, whatever it says: for tests that play a broken host.
    pub fn forge(&mut self, payload: &[u8]) {
        let kind = Header::type_of(payload).unwrap_or(MessageType(0));
        self.send_bytes(kind, payload);
    }

    /// Adds a device's channel and offers it to a guest that has asked for offers. `None` when no
    /// channel number is free.
    ///
    /// A device that was taken away and comes back is offered once the guest has given its old number back, on hosts that
    /// heed that message (spec vmbus.md section 7).
    pub fn add(&mut self, device: Device) -> Option<ChannelId> {
        let mut ids = (1..=ChannelId::MAX).map(ChannelId);
        let id = ids.find(|id| !self.channels.contains_key(id))?;
        let held = self.profile.relid_released && self.is_unreleased(&device);
        let channel = Channel {
            device,
            state: ChannelState::Closed,
            rescinded: false,
            held,
        };
        self.channels.insert(id, channel);
        if self
            .connection
            .is_some_and(|connection| connection.offers_requested)
        {
            self.offer(id);
        }
        Some(id)
    }

    /// Whether the guest has still to give back the number of such a channel that was taken away.
    fn is_unreleased(&self, device: &Device) -> bool {
        let mut channels = self.channels.values();
        channels.any(|channel| channel.rescinded && channel.device.is_same(device))
    }

    /// Adds a channel to the device that `primary` belongs to, and offers it. `None` when there is no such primary
    /// channel, the device has a channel with this index, or no channel number is free.
    ///
    /// Hosts do this when the device's own protocol asks for it. The channel goes with its primary channel.
    pub fn add_sub_channel(&mut self, primary: ChannelId, index: NonZeroU16) -> Option<ChannelId> {
        let channel = self.channels.get(&primary)?;
        let device = &channel.device;
        if !channel.is_current() || device.sub_channel_index != 0 {
            return None;
        }
        let device = device.sub_channel(index);
        let taken = self.sub_channels(primary).any(|id| {
            let other = self.channels.get(&id);
            other.is_some_and(|other| other.device.sub_channel_index == index.get())
        });
        if taken { None } else { self.add(device) }
    }

    /// The sub-channels of the device that `primary` belongs to, in the order of their numbers. Rescinded ones are not.
    pub fn sub_channels(&self, primary: ChannelId) -> impl Iterator<Item = ChannelId> + use<'_> {
        let device = self.channels.get(&primary).map(|channel| &channel.device);
        let device = device.filter(|device| device.sub_channel_index == 0);
        let of_device = move |channel: &Channel| {
            !channel.rescinded
                && channel.device.sub_channel_index != 0
                && device.is_some_and(|device| {
                    device.interface == channel.device.interface
                        && device.instance == channel.device.instance
                })
        };
        let channels = self.channels.iter();
        channels
            .filter(move |(_, channel)| of_device(channel))
            .map(|(id, _)| *id)
    }

    /// Takes a channel back; with a primary channel its sub-channels go too, one message for each, in the order of the
    /// [`Profile`]. Returns whether there is such a channel.
    pub fn rescind(&mut self, id: ChannelId) -> bool {
        let subs: Vec<_> = self.sub_channels(id).collect();
        if self.profile.rescind_order == RescindOrder::SubChannelsFirst {
            subs.iter().for_each(|sub| self.rescind_one(*sub));
        }
        let there = self.channels.get(&id);
        let there = there.is_some_and(|channel| !channel.rescinded);
        self.rescind_one(id);
        if self.profile.rescind_order == RescindOrder::PrimaryFirst {
            subs.iter().for_each(|sub| self.rescind_one(*sub));
        }
        there
    }

    fn rescind_one(&mut self, id: ChannelId) {
        let channel = self.channels.get_mut(&id);
        let Some(channel) = channel.filter(|channel| !channel.rescinded) else {
            return;
        };
        let requested = |connection: Connection| connection.offers_requested;
        if channel.held || !self.connection.is_some_and(requested) {
            self.channels.remove(&id);
            return;
        }
        channel.rescinded = true;
        if let ChannelState::Opening { .. } = channel.state {
            channel.state = ChannelState::Closed;
            self.events.push_back(Event::Closed(id));
        }
        let incomplete = |gpadl: &Gpadl| gpadl.channel == id && gpadl.ranges().is_none();
        self.gpadls.retain(|_, gpadl| !incomplete(gpadl));
        self.lent.revoke(id);
        self.events.push_back(Event::Rescinded(id));
        self.send(&RescindChannelOffer {
            channel: U32::new(id.0),
        });
    }

    /// Answers [`Event::Opening`]. Does nothing when the guest no longer waits for it.
    pub fn finish_open(&mut self, id: ChannelId, status: Status) {
        let Some(channel) = self
            .channels
            .get_mut(&id)
            .filter(|channel| !channel.rescinded)
        else {
            return;
        };
        let ChannelState::Opening { open_id, ring } = channel.state else {
            return;
        };
        channel.state = if status.is_success() {
            ChannelState::Open { ring }
        } else {
            ChannelState::Closed
        };
        self.send(&OpenChannelResult {
            channel: U32::new(id.0),
            open_id: U32::new(open_id),
            status: U32::new(status.0),
        });
        self.finish_teardowns();
    }

    /// Answers [`Event::Connect`]: nobody listens. Guests before version 4.1 are not told and have to wait in vain.
    pub fn refuse(&mut self, request: ConnectRequest) {
        if self.version() >= Some(Version::V4_1) {
            self.send(&TlConnectResult {
                endpoint: request.endpoint,
                service: request.service,
                status: U32::new(CONNECTION_REFUSED.0),
            });
        }
    }

    /// The ranges of a GPADL that exists.
    pub fn gpadl(&self, handle: GpadlHandle) -> Option<&[Range]> {
        self.gpadls.get(&handle)?.ranges()
    }

    /// The GPADLs that are whole, for whoever maps them. Clones are the same.
    pub const fn gpadls(&self) -> &Gpadls {
        &self.lent
    }

    /// How many GPADLs exist, incomplete ones included.
    pub fn gpadl_count(&self) -> usize {
        self.gpadls.len()
    }

    /// The version that the guest is connected with.
    pub fn version(&self) -> Option<Version> {
        Some(self.connection?.version)
    }

    /// The monitor pages of the guest, if it has such pages and the host uses them.
    pub fn monitor_pages(&self) -> Option<MonitorPages> {
        self.connection?
            .monitor_pages
            .filter(|_| self.profile.monitors)
    }

    /// The bit of a channel in the monitor pages, if both ends have such pages.
    pub fn monitor_bit(&self, id: ChannelId) -> Option<MonitorId> {
        self.monitor_pages()?;
        self.channels.get(&id)?.device.monitor_id
    }

    /// The open channel that has this bit in the monitor pages.
    pub fn monitored_channel(&self, monitor_id: MonitorId) -> Option<ChannelId> {
        let mut channels = self.channels.iter();
        let of = |channel: &Channel| {
            channel.device.monitor_id == Some(monitor_id)
                && matches!(channel.state, ChannelState::Open { .. })
        };
        channels.find(|(_, channel)| of(channel)).map(|(id, _)| *id)
    }

    /// Whether there is such a channel, and it has not been taken away.
    pub fn is_offered(&self, id: ChannelId) -> bool {
        let channel = self.channels.get(&id);
        channel.is_some_and(|channel| !channel.rescinded)
    }

    /// Interface and instance of the device that a channel belongs to.
    pub fn device(&self, id: ChannelId) -> Option<(Guid, Guid)> {
        let device = &self.channels.get(&id)?.device;
        Some((device.interface, device.instance))
    }

    /// The sub-channel index of a channel: 0 for the primary one of its device.
    pub fn sub_channel_index(&self, id: ChannelId) -> Option<u16> {
        Some(self.channels.get(&id)?.device.sub_channel_index)
    }

    /// Whether a channel is open.
    pub fn is_open(&self, id: ChannelId) -> bool {
        let channel = self.channels.get(&id);
        channel.is_some_and(|channel| matches!(channel.state, ChannelState::Open { .. }))
    }

    /// The event connection on which the guest signals a channel.
    pub const fn event_connection(&self, id: ChannelId) -> ConnectionId {
        ConnectionId(self.profile.event_connections.wrapping_add(id.0))
    }

    /// Takes a message that the guest posts; the status is that of the hypercall.
    pub fn post(&mut self, now: u64, connection: ConnectionId, payload: &[u8]) -> HvStatus {
        let known = connection == LEGACY_CONNECTION
            || self.profile.multiclient && connection == MULTICLIENT_CONNECTION
            || self
                .connection
                .is_some_and(|live| live.messages == connection);
        if !known {
            return HvStatus::INVALID_CONNECTION_ID;
        }
        if self.inbox.len() >= self.profile.inbox {
            return HvStatus::INSUFFICIENT_BUFFERS;
        }
        let kind = Header::type_of(payload).unwrap_or(MessageType(0));
        if self.profile.refuses_new_messages && kind >= MessageType::OPEN_RESERVED_CHANNEL {
            self.drop(kind, "the host does not know this type");
            return HvStatus::INVALID_HYPERCALL_INPUT;
        }
        let message = Incoming {
            connection,
            payload: payload.into(),
        };
        self.inbox.push(now, kind, message);
        HvStatus::SUCCESS
    }

    /// Handles the messages that have arrived by now.
    pub fn run(&mut self, now: u64) {
        self.now = now;
        while let Some(message) = self.inbox.pop(now) {
            if let Err((kind, reason)) = self.handle(&message) {
                self.drop(kind, reason);
            }
        }
        // Somebody may have unmapped one.
        self.finish_teardowns();
    }

    /// The next message to deliver to the guest.
    pub fn poll_message(&mut self, now: u64) -> Option<Message> {
        self.outbox.pop(now)
    }

    /// When [`run`](Self::run) or [`poll_message`](Self::poll_message) has something to do.
    pub fn deadline(&self) -> Option<u64> {
        let (inbox, outbox) = (self.inbox.deadline(), self.outbox.deadline());
        inbox.into_iter().chain(outbox).min()
    }

    /// The next event to handle.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    fn drop(&mut self, message: MessageType, reason: &'static str) {
        self.events.push_back(Event::Dropped { message, reason });
    }

    fn send<B: Body>(&mut self, body: &B) {
        self.send_bytes(B::TYPE, &Payload::new(body));
    }

    fn send_bytes(&mut self, kind: MessageType, bytes: &[u8]) {
        let mut payload = Vec::from(bytes);
        // What a host does not clear is whatever was there before.
        payload.resize(bytes.len().next_multiple_of(self.profile.padding), 0xA5);
        let vp = self
            .connection
            .map_or(VpIndex(0), |connection| connection.vp);
        let message = Message {
            vp,
            sint: SINT,
            payload,
        };
        self.outbox.push(self.now, kind, message);
    }

    fn handle(&mut self, message: &Incoming) -> Result<(), (MessageType, &'static str)> {
        let Incoming {
            connection: from,
            payload,
        } = message;
        let kind = Header::type_of(payload).ok_or((MessageType(0), "no header"))?;
        let with = |reason| (kind, reason);
        if let MessageType::INITIATE_CONTACT = kind {
            return self.contact(*from, payload).map_err(with);
        }
        let Some(connection) = self.connection else {
            return Err(with("not connected"));
        };
        if self.profile.only_named_connection && *from != connection.messages {
            return Err(with("on the wrong connection"));
        }
        let info = MessageInfo::of(kind).filter(|info| info.direction == Direction::ToHost);
        let info = info.ok_or(with("not for a host"))?;
        match info.size(connection.version, connection.features) {
            None => return Err(with("not of this version")),
            // A guest may leave the silo out (spec hvsock.md 2).
            Some(_) if kind == MessageType::TL_CONNECT_REQUEST => {}
            Some(size) if payload.len() < size => return Err(with("too short")),
            Some(_) => {}
        }
        match kind {
            MessageType::REQUEST_OFFERS => self.request_offers(),
            MessageType::GPADL_HEADER => self.gpadl_header(body(payload)?),
            MessageType::GPADL_BODY => self.gpadl_body(body(payload)?),
            MessageType::GPADL_TEARDOWN => self.gpadl_teardown(body(payload)?.0),
            MessageType::OPEN_CHANNEL => self.open(body(payload)?.0),
            MessageType::CLOSE_CHANNEL => self.close(body(payload)?.0),
            MessageType::RELID_RELEASED => self.released(body(payload)?.0),
            MessageType::MODIFY_CHANNEL => self.modify(body(payload)?.0),
            MessageType::TL_CONNECT_REQUEST => {
                let (request, _) = body::<TlConnectRequest>(payload)?;
                self.events.push_back(Event::Connect(ConnectRequest {
                    endpoint: request.endpoint,
                    service: request.service,
                }));
                Ok(())
            }
            MessageType::UNLOAD => {
                self.disconnect();
                self.send(&UnloadComplete {});
                self.connection = None;
                Ok(())
            }
            _ => Err("not handled"),
        }
        .map_err(with)
    }

    /// The guest is gone, and said nothing: its connection ends, and so do the messages that are under way.
    pub fn reset(&mut self) {
        self.inbox.clear();
        self.outbox.clear();
        if self.connection.take().is_some() {
            self.disconnect();
        }
    }

    /// Closes every channel and forgets every GPADL and every rescinded channel.
    fn disconnect(&mut self) {
        for (id, channel) in &mut self.channels {
            if channel.state != ChannelState::Closed {
                channel.state = ChannelState::Closed;
                self.events.push_back(Event::Closed(*id));
            }
        }
        // Sub-channels exist because the guest asked the device for them.
        let stays = |channel: &Channel| !channel.rescinded && channel.device.sub_channel_index == 0;
        self.channels.retain(|_, channel| stays(channel));
        for channel in self.channels.values_mut() {
            channel.held = false;
        }
        self.gpadls.clear();
        self.lent.clear();
        self.events.push_back(Event::Disconnected);
    }

    fn contact(&mut self, from: ConnectionId, payload: &[u8]) -> Result<(), &'static str> {
        let (contact, rest) = InitiateContact::parse(payload).ok_or("too short")?;
        let version = Version(contact.version.get());
        if self.profile.checks_target && from == MULTICLIENT_CONNECTION {
            if version >= Version::V5_0 && contact.target.sint != SINT {
                return Err("SINT 2 is not the target");
            }
            if version >= Version::V5_1 && contact.target.vtl != 0 {
                return Err("VTL 0 is not the target");
            }
        }
        let asked = if version >= Version::V6_0 {
            FeatureFlags(contact.target.features.get())
        } else {
            FeatureFlags::NONE
        };
        if asked.contains(FeatureFlags::CLIENT_ID) && Guid::read_from_prefix(rest).is_err() {
            return Err("the client id is missing");
        }
        if self.connection.is_some() {
            self.disconnect();
        }
        self.connection = None;
        let monitors = (
            contact.parent_to_child_monitor.get() != 0,
            contact.child_to_parent_monitor.get() != 0,
        );
        let supported = self.profile.versions.contain(version);
        let state = match self.refusals.contact {
            Some(state) => state,
            None if monitors.0 != monitors.1 => ConnectionState::UNKNOWN_FAILURE,
            None => ConnectionState::SUCCESS,
        };
        let named = version >= Version::V5_0;
        let connection = Connection {
            version,
            features: asked.intersection(self.profile.features),
            messages: if named {
                self.profile.named_connection
            } else {
                from
            },
            vp: VpIndex(if version >= Version::V3_0 {
                contact.target_vp.get()
            } else {
                0
            }),
            monitor_pages: (monitors.0 && monitors.1).then(|| MonitorPages {
                parent_to_child: page_of(contact.parent_to_child_monitor.get()),
                child_to_parent: page_of(contact.child_to_parent_monitor.get()),
            }),
            offers_requested: false,
        };
        let mut response = Payload::new(&VersionResponse {
            supported: u8::from(supported),
            state: if supported { state.0 } else { 0 },
            padding: U16::ZERO,
            selected: U32::new(match (supported, named) {
                (false, _) => 0,
                (true, false) => version.0,
                (true, true) => connection.messages.0,
            }),
        });
        if supported && version >= Version::V6_0 {
            let features = U32::new(connection.features.0);
            response.append(ResponseFeatures { features }.as_bytes());
        }
        if supported && state == ConnectionState::SUCCESS {
            self.connection = Some(connection);
            self.events.push_back(Event::Connected(version));
        }
        let short = response.get(..self.profile.version_response);
        let bytes = short
            .filter(|_| version < Version::V6_0)
            .unwrap_or(&response);
        self.send_bytes(MessageType::VERSION_RESPONSE, bytes);
        Ok(())
    }

    fn request_offers(&mut self) -> Result<(), &'static str> {
        let connection = self.connection.as_mut().ok_or("not connected")?;
        let again = core::mem::replace(&mut connection.offers_requested, true);
        if again && !self.profile.repeats_offers {
            return Err("offers have been requested before");
        }
        let channels = self.channels.iter();
        let mut ids: Vec<_> = channels
            .filter(|(_, channel)| !channel.rescinded)
            .map(|(id, channel)| (*id, channel.device.interface, channel.device.instance))
            .collect();
        match self.profile.offer_order {
            OfferOrder::Added => {}
            OfferOrder::Sorted => {
                ids.sort_by_key(|&(_, interface, instance)| (interface, instance));
            }
            OfferOrder::Reversed => ids.reverse(),
        }
        let is_late = |id: &ChannelId| {
            self.channels
                .get(id)
                .is_some_and(|channel| channel.device.late)
        };
        let (late, first): (Vec<_>, Vec<_>) = ids
            .into_iter()
            .map(|(id, ..)| id)
            .partition(|id| is_late(id));
        for id in first {
            self.offer(id);
        }
        self.send(&AllOffersDelivered {});
        for id in late {
            self.offer(id);
        }
        if again {
            Err("offers have been requested before")
        } else {
            Ok(())
        }
    }

    fn offer(&mut self, id: ChannelId) {
        let channel = self.channels.get(&id);
        let Some(channel) = channel.filter(|channel| channel.is_current()) else {
            return;
        };
        let device = &channel.device;
        let monitor_id = self.monitor_bit(id);
        let offer = OfferChannel {
            interface: device.interface,
            instance: device.instance,
            reserved: [0; 16],
            flags: U16::new(device.flags.0),
            mmio_megabytes: U16::new(device.mmio_megabytes),
            user_data: device.user_data,
            sub_channel_index: U16::new(device.sub_channel_index),
            optional_mmio_megabytes: U16::new(device.optional_mmio_megabytes),
            channel: U32::new(id.0),
            monitor_id: monitor_id.map_or(0xFF, MonitorId::number),
            monitor_allocated: u8::from(monitor_id.is_some()),
            dedicated_interrupt: U16::new(1),
            connection: U32::new(self.event_connection(id).0),
        };
        self.send(&offer);
    }

    /// The channel that a message names.
    fn channel(&mut self, id: U32) -> Result<(ChannelId, &mut Channel), &'static str> {
        let id = ChannelId(id.get());
        let requested = self
            .connection
            .is_some_and(|connection| connection.offers_requested);
        let channel = self.channels.get_mut(&id);
        channel
            .filter(|channel| requested && !channel.held)
            .map(|channel| (id, channel))
            .ok_or("no such channel")
    }

    fn gpadl_header(&mut self, (header, data): (&GpadlHeader, &[u8])) -> Result<(), &'static str> {
        let handle = GpadlHandle(header.gpadl.get());
        let (_, channel) = self.channel(header.channel)?;
        if channel.rescinded {
            return Err("GPADL for a rescinded channel");
        }
        if handle.0 == 0 || self.gpadls.contains_key(&handle) {
            return Err("GPADL handle is zero or in use");
        }
        let described: usize = self.gpadls.values().map(Gpadl::described).sum();
        let gpadl = Gpadl::new(header);
        if self.gpadls.len() >= MAX_GPADLS || described + gpadl.described() > MAX_DESCRIBED {
            self.send(&GpadlCreated {
                channel: header.channel,
                gpadl: header.gpadl,
                status: U32::new(Status::UNSUCCESSFUL.0),
            });
            return Err("more GPADLs than the host keeps");
        }
        self.gpadls.insert(handle, gpadl);
        self.gpadl_data(handle, data)
    }

    fn gpadl_body(&mut self, (body, data): (&GpadlBody, &[u8])) -> Result<(), &'static str> {
        let handle = GpadlHandle(body.gpadl.get());
        match self.gpadls.get(&handle) {
            Some(gpadl) if gpadl.ranges().is_none() => self.gpadl_data(handle, data),
            _ => Err("no such GPADL is incomplete"),
        }
    }

    fn gpadl_data(&mut self, handle: GpadlHandle, data: &[u8]) -> Result<(), &'static str> {
        let rule = self.profile.gpadls;
        let gpadl = self.gpadls.get_mut(&handle).ok_or("no such GPADL")?;
        let channel = U32::new(gpadl.channel.0);
        let status = match (gpadl.append(data, rule), self.refusals.gpadls, rule) {
            (Progress::Incomplete, ..) => return Ok(()),
            (Progress::Whole, None, _) => Status::SUCCESS,
            (Progress::Whole, Some(status), _) => status,
            (Progress::Bad, _, GpadlRule::AnyRanges(status)) => status,
            (Progress::Bad, _, GpadlRule::OneAlignedRange) => {
                self.gpadls.remove(&handle);
                return Err("not one range of whole pages");
            }
        };
        if status.is_success() {
            if let Some(gpadl) = self.gpadls.get(&handle) {
                let ranges = gpadl.ranges().unwrap_or_default();
                self.lent.insert(handle, gpadl.channel, ranges);
            }
            self.events.push_back(Event::GpadlCreated(handle));
        } else {
            self.gpadls.remove(&handle);
        }
        self.send(&GpadlCreated {
            channel,
            gpadl: U32::new(handle.0),
            status: U32::new(status.0),
        });
        Ok(())
    }

    fn gpadl_teardown(&mut self, teardown: &GpadlTeardown) -> Result<(), &'static str> {
        let handle = GpadlHandle(teardown.gpadl.get());
        let (id, channel) = self.channel(teardown.channel)?;
        let rescinded = channel.rescinded;
        let gpadl = self.gpadls.get_mut(&handle);
        let gpadl = gpadl.filter(|gpadl| gpadl.channel == id && gpadl.ranges().is_some());
        match gpadl {
            Some(gpadl) => gpadl.leaving = true,
            // The host forgets incomplete ones of a rescinded channel.
            None if rescinded => {}
            None => return Err("no such GPADL"),
        }
        if rescinded {
            self.gpadls.remove(&handle);
            self.lent.remove(handle);
            if self.profile.torn_down_after_rescind {
                self.torn_down(handle);
            } else {
                self.events.push_back(Event::GpadlTornDown(handle));
            }
        } else {
            self.finish_teardowns();
        }
        Ok(())
    }

    /// Lets go of the GPADLs that the guest wants back, that no channel uses any more and that nobody has mapped.
    fn finish_teardowns(&mut self) {
        let rings: Vec<_> = self
            .channels
            .values()
            .filter_map(|channel| channel.state.ring())
            .collect();
        let leaving = self.gpadls.iter().filter(|(_, gpadl)| gpadl.leaving);
        let free: Vec<_> = leaving
            .map(|(handle, _)| *handle)
            .filter(|handle| !rings.contains(handle) && !self.lent.is_mapped(*handle))
            .collect();
        for handle in free {
            self.gpadls.remove(&handle);
            self.lent.remove(handle);
            self.torn_down(handle);
        }
    }

    fn torn_down(&mut self, handle: GpadlHandle) {
        self.events.push_back(Event::GpadlTornDown(handle));
        self.send(&GpadlTorndown {
            gpadl: U32::new(handle.0),
        });
    }

    fn open(&mut self, open: &OpenChannel) -> Result<(), &'static str> {
        let ring = GpadlHandle(open.ring.get());
        let (id, channel) = self.channel(open.channel)?;
        if channel.rescinded {
            return Err("OPEN for a rescinded channel");
        }
        if channel.state != ChannelState::Closed {
            return Err("the channel is not closed");
        }
        let gpadl = self
            .gpadls
            .get(&ring)
            .filter(|gpadl| gpadl.channel == id && !gpadl.leaving);
        let pages = gpadl
            .and_then(Gpadl::page_count)
            .ok_or("no such ring GPADL")?;
        if open.downstream_page.get() as usize >= pages {
            return Err("the downstream ring is outside of the GPADL");
        }
        let ranges = self.gpadl(ring).unwrap_or(&[]).iter();
        let opening = Opening {
            channel: id,
            ring,
            pages: ranges
                .flat_map(|range| range.pages.iter().copied())
                .collect(),
            downstream_page: open.downstream_page.get(),
            target_vp: VpIndex(open.target_vp.get()),
            event_flag: id.0 as u16,
            connection: self.event_connection(id),
            user_data: open.user_data,
        };
        let (_, channel) = self.channel(open.channel)?;
        channel.state = ChannelState::Opening {
            open_id: open.open_id.get(),
            ring,
        };
        self.events.push_back(Event::Opening(opening));
        Ok(())
    }

    fn close(&mut self, close: &CloseChannel) -> Result<(), &'static str> {
        let (id, channel) = self.channel(close.channel)?;
        if !matches!(channel.state, ChannelState::Open { .. }) {
            return Err("the channel is not open");
        }
        channel.state = ChannelState::Closed;
        self.events.push_back(Event::Closed(id));
        if self.profile.sub_channels_end_with_primary {
            let subs: Vec<_> = self.sub_channels(id).collect();
            subs.into_iter().for_each(|sub| self.rescind_one(sub));
        }
        self.finish_teardowns();
        Ok(())
    }

    fn released(&mut self, released: &RelidReleased) -> Result<(), &'static str> {
        if !self.profile.relid_released {
            return Ok(());
        }
        let (id, channel) = self.channel(released.channel)?;
        if channel.state != ChannelState::Closed {
            return Err("the channel is not closed");
        }
        if !channel.rescinded {
            return Err("the channel has not been rescinded");
        }
        // Linux sends no GPADL_TEARDOWN for a channel that was taken away; this is how it takes its memory back.
        let gpadls = self.gpadls.iter();
        let left = gpadls.filter(|(_, gpadl)| gpadl.channel == id);
        let left: Vec<_> = left.map(|(handle, _)| *handle).collect();
        for handle in left {
            self.gpadls.remove(&handle);
            self.lent.remove(handle);
            self.events.push_back(Event::GpadlTornDown(handle));
        }
        let released = self.channels.remove(&id);
        self.events.push_back(Event::Released(id));
        if let Some(Channel { device, .. }) = released
            && !self.is_unreleased(&device)
        {
            self.offer_held(&device);
        }
        Ok(())
    }

    /// Offers the device that waited for its old number to be given back.
    fn offer_held(&mut self, device: &Device) {
        let mut channels = self.channels.iter_mut();
        let waits = |channel: &Channel| channel.held && channel.device.is_same(device);
        if let Some((id, channel)) = channels.find(|(_, channel)| waits(channel)) {
            let id = *id;
            channel.held = false;
            self.offer(id);
        }
    }

    fn modify(&mut self, modify: &ModifyChannel) -> Result<(), &'static str> {
        let answers = self.version() >= Some(Version::V5_3);
        let status = self.refusals.modify.unwrap_or(Status::SUCCESS);
        let (id, channel) = self.channel(modify.channel)?;
        if !matches!(channel.state, ChannelState::Open { .. }) {
            return Err("the channel is not open");
        }
        if VpIndex(modify.target_vp.get()) == NO_INTERRUPTS {
            return Err("the target VP is none");
        }
        if status.is_success() {
            self.events.push_back(Event::TargetVp {
                channel: id,
                target_vp: VpIndex(modify.target_vp.get()),
            });
        }
        if answers {
            self.send(&ModifyChannelResponse {
                channel: modify.channel,
                status: U32::new(status.0),
            });
        }
        Ok(())
    }
}

/// The body of a message and what follows it.
fn body<B: Body>(payload: &[u8]) -> Result<(&B, &[u8]), (MessageType, &'static str)> {
    B::parse(payload).ok_or((B::TYPE, "too short"))
}

/// The page of a guest physical address.
const fn page_of(address: u64) -> PageNumber {
    PageNumber(address / PAGE_SIZE as u64)
}
