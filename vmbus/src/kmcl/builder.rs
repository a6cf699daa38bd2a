//! A channel in the Disabled state: everything that can be configured.

use alloc::borrow::Cow;
use alloc::sync::Arc;
use core::fmt;
use core::num::NonZeroU16;

use super::channel::{Channel, DisabledChannel, EnabledChannel, Shared};
use super::raw::OnSignal;
use super::{ChannelError, Client, ReceivedPacket, Refused, pipe};
use crate::ids::VpIndex;
use crate::protocol::Guid;

pub(super) type ProcessPacket = dyn Fn(&Channel, ReceivedPacket<'_>) + Send + Sync;
pub(super) type ProcessingComplete = dyn Fn(&Channel, u32) + Send + Sync;
pub(super) type Opened = dyn Fn(&Channel) -> Result<(), Refused> + Send + Sync;
pub(super) type StateChange = dyn Fn(&Channel) + Send + Sync;
pub(super) type Failure = dyn Fn(&Channel, ChannelError) + Send + Sync;

/// A disabled channel: set it up, then [`enable`](Self::enable) it.
///
/// The setters are KMCL's `VmbChannelInit...` and `VmbClientChannelInit...` functions. That they work on a Disabled
/// channel only holds by type: an enabled one is an [`EnabledChannel`]. A builder can be enabled
/// again after its channel has ended; cloning it is cheap.
#[derive(Clone)]
pub struct ChannelBuilder {
    pub(super) interface: Guid,
    pub(super) instance: Option<Guid>,
    pub(super) primary: Option<(Channel, NonZeroU16)>,
    pub(super) friendly_name: Cow<'static, str>,
    ring_pages: Option<(usize, usize)>,
    pub(super) maximum_packet_size: usize,
    pub(super) maximum_packet_count: usize,
    /// Bytes and ranges.
    pub(super) maximum_external: Option<(usize, usize)>,
    pub(super) inline_packet_context_size: usize,
    pub(super) transaction_quota: u32,
    pub(super) client_context_size: usize,
    pub(super) dpc_cpu_usage: Option<u8>,
    pub(super) batch_budget: u32,
    pub(super) target_vp: Option<VpIndex>,
    pub(super) user_data: [u8; 120],
    pub(super) pipe: bool,
    pub(super) monitored: bool,
    pub(super) passive: bool,
    pub(super) start_paused: bool,
    pub(super) callbacks: Callbacks,
}

/// A driver as the context of its callbacks: the form of KMCL's `Ex` callbacks.
///
/// Every method has the meaning of the builder's setter of that name; see there for levels and order. The driver is
/// kept for as long as the channel, so one that keeps the channel in turn lives as long as the machine.
pub trait ChannelDriver: Send + Sync + 'static {
    /// See [`ChannelBuilder::opened`].
    ///
    /// # Errors
    ///
    /// The driver's reason not to use the channel.
    fn opened(&self, channel: &Channel) -> Result<(), Refused> {
        let _ = channel;
        Ok(())
    }
    /// See [`ChannelBuilder::started`].
    fn started(&self, channel: &Channel) {
        let _ = channel;
    }
    /// See [`ChannelBuilder::post_started`].
    fn post_started(&self, channel: &Channel) {
        let _ = channel;
    }
    /// See [`ChannelBuilder::suspend`].
    fn suspend(&self, channel: &Channel) {
        let _ = channel;
    }
    /// See [`ChannelBuilder::closed`].
    fn closed(&self, channel: &Channel) {
        let _ = channel;
    }
    /// See [`ChannelBuilder::failure`].
    fn failure(&self, channel: &Channel, error: ChannelError) {
        let _ = (channel, error);
    }
    /// See [`ChannelBuilder::process_packet_callbacks`].
    fn process_packet(&self, channel: &Channel, packet: ReceivedPacket<'_>);
    /// See [`ChannelBuilder::process_packet_callbacks`].
    fn processing_complete(&self, channel: &Channel, packets: u32) {
        let _ = (channel, packets);
    }
}

/// What the driver wants to be told.
#[derive(Clone, Default)]
pub(super) struct Callbacks {
    pub(super) process_packet: Option<Arc<ProcessPacket>>,
    pub(super) processing_complete: Option<Arc<ProcessingComplete>>,
    pub(super) opened: Option<Arc<Opened>>,
    pub(super) started: Option<Arc<StateChange>>,
    pub(super) post_started: Option<Arc<StateChange>>,
    pub(super) suspend: Option<Arc<StateChange>>,
    pub(super) closed: Option<Arc<StateChange>>,
    pub(super) failure: Option<Arc<Failure>>,
    /// Runs at every signal, in place of all that the library does; raw mode.
    pub(super) on_signal: Option<Arc<OnSignal>>,
}

/// The most packets of each direction that a channel can have at one time: there is a place for each from the beginning.
pub const MAX_PACKETS: usize = 1 << 16;

/// A setting that cannot work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConfigError {
    /// A size or count that must not be zero is zero.
    Zero(&'static str),
    /// More packets at one time than a channel can have: [`MAX_PACKETS`].
    TooManyPackets {
        /// What asks for them.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// In raw mode the library processes no packets, so there are no callbacks for them, and no pipe headers.
    Raw,
    /// A share of processor time that is not from 1 to 100 percent.
    CpuUsage(u8),
    /// A pipe message holds at most 16384 bytes.
    PipePacketSize(usize),
    /// The outgoing ring cannot hold one packet of the maximum size.
    RingTooSmall {
        /// Bytes that the largest packet takes.
        need: usize,
        /// The most that a packet may take in the ring.
        limit: usize,
    },
    /// The primary channel of this sub-channel is not open.
    PrimaryNotOpen,
    /// A ring of more pages than one GPADL can describe.
    RingTooLarge {
        /// Pages of both rings.
        pages: usize,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero(what) => write!(f, "the {what} must not be zero"),
            Self::TooManyPackets { what, count } => {
                write!(
                    f,
                    "a {what} of {count}, where channels have {MAX_PACKETS} at most"
                )
            }
            Self::Raw => {
                f.write_str("a channel in raw mode has no packet callbacks and no pipe mode")
            }
            Self::CpuUsage(percent) => {
                write!(f, "a share of the time is 1 to 100 percent, not {percent}")
            }
            Self::PipePacketSize(size) => {
                write!(f, "pipe messages hold 16384 bytes, not {size}")
            }
            Self::RingTooSmall { need, limit } => {
                write!(
                    f,
                    "a packet may take {need} bytes, and the ring takes {limit}"
                )
            }
            Self::PrimaryNotOpen => f.write_str("the primary channel is not open"),
            Self::RingTooLarge { pages } => {
                write!(f, "one GPADL cannot describe rings of {pages} pages")
            }
        }
    }
}

impl core::error::Error for ConfigError {}

impl ChannelBuilder {
    /// A channel for devices of this interface type, with 4 data pages per ring, packets of up to 1024 bytes, 64 of them
    /// at a time, and 64 received ones that may wait for their completion.
    pub fn new(interface: Guid) -> Self {
        Self {
            interface,
            instance: None,
            friendly_name: crate::protocol::interface::name(&interface)
                .unwrap_or("channel")
                .into(),
            primary: None,
            start_paused: false,
            ring_pages: None,
            maximum_packet_size: 1024,
            maximum_packet_count: 64,
            maximum_external: None,
            inline_packet_context_size: 0,
            transaction_quota: 64,
            client_context_size: 0,
            dpc_cpu_usage: None,
            batch_budget: 64,
            target_vp: None,
            user_data: [0; 120],
            pipe: false,
            monitored: false,
            passive: false,
            callbacks: Callbacks::default(),
        }
    }

    /// Takes only the device with this instance GUID. Without it: the first that no other channel has.
    pub fn instance(mut self, instance: Guid) -> Self {
        self.instance = Some(instance);
        self
    }

    /// Makes this the sub-channel `index` of an open channel: its offer has the same interface and instance. It can be
    /// enabled while that channel is open, is disabled when that one closes, and pauses and resumes with it.
    pub fn sub_channel_of(mut self, primary: &Channel, index: NonZeroU16) -> Self {
        self.primary = Some((primary.clone(), index));
        self
    }

    /// Has the channel Paused when it opens: nothing flows before [`Channel::start`].
    pub fn start_paused(mut self) -> Self {
        self.start_paused = true;
        self
    }

    /// The name for logs and counters. Short ones are best: "network", "SCSI".
    pub fn friendly_name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.friendly_name = name.into();
        self
    }

    /// Data pages of the rings, without their control pages. Without this call they have room for several of the largest
    /// packets that the maxima allow, and at least 4 pages.
    pub fn ring_pages(mut self, incoming: usize, outgoing: usize) -> Self {
        self.ring_pages = Some((incoming, outgoing));
        self
    }

    /// The most bytes of data in one sent packet.
    pub fn maximum_packet_size(mut self, bytes: usize) -> Self {
        self.maximum_packet_size = bytes;
        self
    }

    /// The most packets to send that exist at one time.
    pub fn maximum_packet_count(mut self, packets: usize) -> Self {
        self.maximum_packet_count = packets;
        self
    }

    /// The most external data of one packet: bytes in all, and ranges. Without this call there is none.
    pub fn maximum_external_data(mut self, bytes: usize, ranges: usize) -> Self {
        self.maximum_external = Some((bytes, ranges));
        self
    }

    /// Bytes of context that the driver has in each packet to send.
    pub fn inline_packet_context_size(mut self, bytes: usize) -> Self {
        self.inline_packet_context_size = bytes;
        self
    }

    /// The most received packets that may be delivered and not yet completed. Can be changed later.
    pub fn transaction_quota(mut self, packets: u32) -> Self {
        self.transaction_quota = packets;
        self
    }

    /// Bytes of the driver's own that go with each received packet ([`ReceivedPacket::client_context`]); none without this
    /// (`VmbChannelInitSetClientContextSize`, spec kmcl.md 1.7).
    pub fn client_context_size(mut self, bytes: usize) -> Self {
        self.client_context_size = bytes;
        self
    }

    /// The share of the time, in percent from 1 to 100, that packets may be processed at DISPATCH; past it, processing
    /// goes on at PASSIVE. Can be [changed](Channel::set_allowable_dpc_cpu_usage) later. Without it there is no limit.
    pub fn allowable_dpc_cpu_usage(mut self, percent: u8) -> Self {
        self.dpc_cpu_usage = Some(percent);
        self
    }

    /// The most packets that one batch takes from the ring before others have their turn.
    pub fn batch_budget(mut self, packets: u32) -> Self {
        self.batch_budget = packets;
        self
    }

    /// The VP that takes the channel's interrupts. Without it: the one that connected.
    pub fn target_vp(mut self, vp: VpIndex) -> Self {
        self.target_vp = Some(vp);
        self
    }

    /// What the device wants to be told when the channel is opened; zeros without it.
    pub fn user_data(mut self, data: [u8; 120]) -> Self {
        self.user_data = data;
        self
    }

    /// Messages have a pipe header; no transactions, no external data.
    pub fn pipe(mut self) -> Self {
        self.pipe = true;
        self
    }

    /// Signals go through the monitor page where the host gave the channel a bit in it: cheaper for this end, and
    /// seen later by the other (see [`Channel::set_interrupt_latency`]). Without this, and for channels
    /// without a bit, each signal is a hypercall, which every host accepts at once.
    pub fn monitored_notification(mut self) -> Self {
        self.monitored = true;
        self
    }

    /// Packets are delivered at PASSIVE only. Can be changed later.
    pub fn incoming_processing_at_passive(mut self) -> Self {
        self.passive = true;
        self
    }

    /// Sets what runs for every received packet, and what runs every time the incoming ring has gone
    /// from non-empty to empty, or delivery pauses for another reason, with the number of packets delivered
    /// since the last time; never with none (spec kmcl.md 6.1, 2 and 3).
    ///
    /// Both run at DISPATCH or at PASSIVE, one after the other, never two at once. The first packets may come before
    /// [`post_started`](Self::post_started). Without this call packets are completed unseen.
    pub fn process_packet_callbacks(
        mut self,
        process_packet: impl Fn(&Channel, ReceivedPacket<'_>) + Send + Sync + 'static,
        processing_complete: impl Fn(&Channel, u32) + Send + Sync + 'static,
    ) -> Self {
        self.callbacks.process_packet = Some(Arc::new(process_packet));
        self.callbacks.processing_complete = Some(Arc::new(processing_complete));
        self
    }

    /// Suppresses the library's queue management: the driver reads and writes the rings itself, with [`Channel::raw`]
    /// (spec kmcl.md 6.1, 1). `on_signal` runs when the host signals, for new packets or for room, and once after the
    /// started callback: at DISPATCH, or at PASSIVE with
    /// [`incoming_processing_at_passive`](Self::incoming_processing_at_passive); never two at once. A signal while it
    /// runs has it run again.
    ///
    /// Not together with [`process_packet_callbacks`](Self::process_packet_callbacks), and no packets can be allocated.
    pub fn queue_management_suppressed(
        mut self,
        on_signal: impl Fn(&Channel) + Send + Sync + 'static,
    ) -> Self {
        self.callbacks.on_signal = Some(Arc::new(on_signal));
        self
    }

    /// [`process_packet_callbacks`](Self::process_packet_callbacks) without the second one.
    pub fn process_packet(
        mut self,
        process_packet: impl Fn(&Channel, ReceivedPacket<'_>) + Send + Sync + 'static,
    ) -> Self {
        self.callbacks.process_packet = Some(Arc::new(process_packet));
        self.callbacks.processing_complete = None;
        self
    }

    /// Runs at PASSIVE when the host has opened the channel, before anything flows. Packets sent here wait.
    /// After an error the channel is closed again.
    pub fn opened(
        mut self,
        callback: impl Fn(&Channel) -> Result<(), Refused> + Send + Sync + 'static,
    ) -> Self {
        self.callbacks.opened = Some(Arc::new(callback));
        self
    }

    /// Runs at PASSIVE before delivery begins.
    pub fn started(mut self, callback: impl Fn(&Channel) + Send + Sync + 'static) -> Self {
        self.callbacks.started = Some(Arc::new(callback));
        self
    }

    /// Runs at PASSIVE when packets flow: the place to begin a device's protocol.
    pub fn post_started(mut self, callback: impl Fn(&Channel) + Send + Sync + 'static) -> Self {
        self.callbacks.post_started = Some(Arc::new(callback));
        self
    }

    /// Runs at PASSIVE when the channel stops: no packet is being delivered or will be. The driver
    /// now completes what it holds; the channel closes when it has.
    pub fn suspend(mut self, callback: impl Fn(&Channel) + Send + Sync + 'static) -> Self {
        self.callbacks.suspend = Some(Arc::new(callback));
        self
    }

    /// Runs at PASSIVE when the channel has been closed.
    pub fn closed(mut self, callback: impl Fn(&Channel) + Send + Sync + 'static) -> Self {
        self.callbacks.closed = Some(Arc::new(callback));
        self
    }

    /// Runs at PASSIVE, last of all, when the channel has ended or never opened because something was wrong.
    pub fn failure(
        mut self,
        callback: impl Fn(&Channel, ChannelError) + Send + Sync + 'static,
    ) -> Self {
        self.callbacks.failure = Some(Arc::new(callback));
        self
    }

    /// Sets all callbacks at once, with the driver as their context.
    pub fn driver(mut self, driver: Arc<impl ChannelDriver>) -> Self {
        macro_rules! callback {
            ($name:ident($($argument:ident),*)) => {{
                let driver = driver.clone();
                Some(Arc::new(move |channel: &Channel $(, $argument)*| {
                    driver.$name(channel $(, $argument)*)
                }))
            }};
        }
        self.callbacks = Callbacks {
            on_signal: None,
            opened: callback!(opened()),
            started: callback!(started()),
            post_started: callback!(post_started()),
            suspend: callback!(suspend()),
            closed: callback!(closed()),
            failure: callback!(failure(error)),
            processing_complete: callback!(processing_complete(packets)),
            process_packet: {
                let driver = driver.clone();
                Some(Arc::new(
                    move |channel: &Channel, packet: ReceivedPacket<'_>| {
                        driver.process_packet(channel, packet);
                    },
                ))
            },
        };
        self
    }

    /// Makes the channel, in the Disabled state. At PASSIVE.
    ///
    /// # Errors
    ///
    /// Whatever of the configuration cannot work.
    pub fn build(&self, client: &Client) -> Result<DisabledChannel, ConfigError> {
        self.check()?;
        Ok(DisabledChannel::new(Shared::new(
            client.inner().clone(),
            self.clone(),
        )))
    }

    /// Makes the channel and enables it: opens a matching offer, now or when it comes. Returns at once; called at PASSIVE.
    ///
    /// # Errors
    ///
    /// As [`build`](Self::build), and [`ConfigError::PrimaryNotOpen`].
    pub fn enable(&self, client: &Client) -> Result<EnabledChannel, ConfigError> {
        self.build(client)?.enable().map_err(|error| error.reason)
    }

    /// Data pages of the incoming ring.
    pub(super) fn incoming_pages(&self) -> usize {
        self.ring_pages
            .map_or_else(|| self.default_ring_pages(), |(incoming, _)| incoming)
    }

    /// Data pages of the outgoing ring.
    pub(super) fn outgoing_pages(&self) -> usize {
        self.ring_pages
            .map_or_else(|| self.default_ring_pages(), |(_, outgoing)| outgoing)
    }

    fn check(&self) -> Result<(), ConfigError> {
        for (value, what) in [
            (self.incoming_pages(), "incoming ring page count"),
            (self.outgoing_pages(), "outgoing ring page count"),
            (self.maximum_packet_size, "maximum packet size"),
            (self.maximum_packet_count, "maximum packet count"),
            (self.transaction_quota as usize, "transaction quota"),
            (self.batch_budget as usize, "batch budget"),
            (
                self.maximum_external.map_or(1, |(bytes, _)| bytes),
                "maximum external data size",
            ),
            (
                self.maximum_external.map_or(1, |(_, ranges)| ranges),
                "maximum external data range count",
            ),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero(what));
            }
        }
        for (count, what) in [
            (self.maximum_packet_count, "maximum packet count"),
            (self.transaction_quota as usize, "transaction quota"),
        ] {
            if count > MAX_PACKETS {
                return Err(ConfigError::TooManyPackets { what, count });
            }
        }
        let callbacks = &self.callbacks;
        let processes =
            callbacks.process_packet.is_some() || callbacks.processing_complete.is_some();
        if callbacks.on_signal.is_some() && (processes || self.pipe) {
            return Err(ConfigError::Raw);
        }
        if let Some(percent) = self.dpc_cpu_usage
            && !(1..=100).contains(&percent)
        {
            return Err(ConfigError::CpuUsage(percent));
        }
        if self.pipe && self.maximum_packet_size > pipe::MAX_DATA {
            return Err(ConfigError::PipePacketSize(self.maximum_packet_size));
        }
        // One GPADL of one range describes both rings.
        let pages = self
            .incoming_pages()
            .saturating_add(self.outgoing_pages())
            .saturating_add(2);
        if pages > crate::bus::MAX_PAGES {
            return Err(ConfigError::RingTooLarge { pages });
        }
        let limit = self.packet_limit() as usize;
        let need = self.largest_packet();
        if need > limit {
            return Err(ConfigError::RingTooSmall { need, limit });
        }
        Ok(())
    }
}

impl fmt::Debug for ChannelBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelBuilder")
            .field("friendly_name", &self.friendly_name)
            .field("interface", &self.interface)
            .field("instance", &self.instance)
            .finish_non_exhaustive()
    }
}
