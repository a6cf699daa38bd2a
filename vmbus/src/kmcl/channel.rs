//! An enabled channel: what driver, interrupt handler and work queue share of it.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use spin::Mutex;

use super::builder::ChannelBuilder;
use super::client::{Client, Inner};
use super::counters::{Counters, Live};
use super::dispatcher::{AtomicDelivery, Delivery, ReceiveSide};
use super::error::ChannelError;
use super::incoming::Pool;
use super::lifecycle::Lifecycle;
use super::quota::Quota;
use super::request::Runner;
use super::sender::SendSide;
use crate::ids::{ChannelId, ConnectionId};
use crate::protocol::Guid;
use crate::ring::Signal;
use crate::sync::DispatchLock;
use crate::turn::Turn;

/// A handle to an enabled channel, as callbacks get it. Clones name the same channel.
///
/// Everything here may be called at DISPATCH and at PASSIVE unless it says otherwise.
#[derive(Clone)]
pub struct Channel(Arc<Shared>);

/// The owner of an enabled channel. Dropping it disables the channel in the background.
#[must_use = "dropping it disables the channel"]
pub struct EnabledChannel {
    channel: Channel,
}

/// Where a channel stands (spec kmcl.md, chapter 2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Ended, or never begun.
    Disabled,
    /// Waits for an offer, or for the host to open it.
    Enabled,
    /// The opened and started callbacks run.
    Opening,
    /// Packets flow.
    Active,
    /// The suspend callback runs, or the driver has yet to complete packets.
    Suspending,
    /// The closed callback runs, or the host has yet to let go of the rings.
    Closing,
}

impl State {
    const ALL: [Self; 6] = [
        Self::Disabled,
        Self::Enabled,
        Self::Opening,
        Self::Active,
        Self::Suspending,
        Self::Closing,
    ];
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disabled => "disabled",
            Self::Enabled => "enabled",
            Self::Opening => "opening",
            Self::Active => "active",
            Self::Suspending => "suspending",
            Self::Closing => "closing",
        })
    }
}

/// All of a channel.
pub(crate) struct Shared {
    pub(super) client: Arc<Inner>,
    pub(super) config: ChannelBuilder,
    pub(super) counters: Live,

    /// The receiving half. Taken while a batch runs, callbacks included.
    pub(super) receive: Turn<ReceiveSide>,
    /// The turn to run the driver's callback for signals, in raw mode.
    pub(super) signals: Turn<()>,
    /// What a batch may take from the ring.
    pub(super) delivery: AtomicDelivery,
    pub(super) passive: AtomicBool,
    /// Percent of the time that batches at DISPATCH may take; 0 without a limit.
    dpc_cpu_usage: AtomicU8,
    /// Packets that the driver holds, and whether delivery waits for one of them or for a place.
    pub(super) quota: Quota,
    pub(super) pool: DispatchLock<Pool>,

    pub(super) send: DispatchLock<SendSide>,
    /// When to look for room in a ring whose consumer does not signal it; reference time.
    pub(super) poll_at: AtomicU64,
    /// When the time of a request is over, the earliest first; reference time. May name one that has ended.
    pub(super) request_at: AtomicU64,
    /// Who runs the opened and started callbacks, while the state is Opening.
    pub(super) opener: Runner,
    /// Who runs a batch at PASSIVE.
    pub(super) batch_runner: Runner,

    /// The channel's number while it is bound to an offer, else 0.
    id: AtomicU32,
    connection: AtomicU32,

    state: AtomicU8,
    pub(super) disable_requested: AtomicBool,
    pub(super) failed: DispatchLock<Option<ChannelError>>,
    /// Opening and closing: PASSIVE only.
    pub(super) lifecycle: Mutex<Lifecycle>,
}

impl Shared {
    pub(super) fn new(client: Arc<Inner>, config: ChannelBuilder) -> Self {
        let (packets, quota) = (config.maximum_packet_count, config.transaction_quota);
        // Besides the packets that the driver holds: completions that wait for room, one packet being
        // delivered, and one deferred.
        let buffers = quota as usize + packets + 2;
        Self {
            counters: Live::default(),
            receive: Turn::new(ReceiveSide::default()),
            signals: Turn::new(()),
            delivery: AtomicDelivery::new(),
            passive: AtomicBool::new(config.passive),
            dpc_cpu_usage: AtomicU8::new(config.dpc_cpu_usage.unwrap_or(0)),
            quota: Quota::new(quota),
            pool: DispatchLock::new(Pool::new(
                buffers,
                config.maximum_packet_size,
                config.client_context_size,
            )),
            send: DispatchLock::new(SendSide::new(packets, buffers)),
            poll_at: AtomicU64::new(u64::MAX),
            request_at: AtomicU64::new(u64::MAX),
            opener: Runner::default(),
            batch_runner: Runner::default(),
            id: AtomicU32::new(0),
            connection: AtomicU32::new(0),
            state: AtomicU8::new(State::Enabled as u8),
            disable_requested: AtomicBool::new(false),
            failed: DispatchLock::new(None),
            lifecycle: Mutex::new(Lifecycle::default()),
            client,
            config,
        }
    }

    pub(crate) fn id(&self) -> Option<ChannelId> {
        match self.id.load(Ordering::Acquire) {
            0 => None,
            id => Some(ChannelId(id)),
        }
    }

    /// Binds the channel to an offer, or to none.
    pub(super) fn set_id(&self, offer: Option<(ChannelId, ConnectionId)>) {
        if let Some((_, connection)) = offer {
            self.connection.store(connection.0, Ordering::Relaxed);
        }
        self.id
            .store(offer.map_or(0, |(id, _)| id.0), Ordering::Release);
    }

    pub(crate) fn state(&self) -> State {
        let state = usize::from(self.state.load(Ordering::Acquire));
        State::ALL.get(state).copied().unwrap_or(State::Disabled)
    }

    pub(super) fn set_state(&self, state: State) {
        if state == State::Opening {
            self.opener.set(Some(self.client.hypervisor.current_vp()));
        }
        self.state.store(state as u8, Ordering::Release);
        self.client.notify();
    }

    /// Has the dispatcher run for this channel at PASSIVE.
    pub(super) fn defer(&self) {
        if let Some(id) = self.id() {
            self.client.defer(id);
        }
    }

    /// Ends the channel because something is wrong; the first reason counts.
    pub(super) fn fail(&self, reason: ChannelError) {
        self.delivery.restrict(Delivery::CompletionsOnly);
        self.failed
            .lock(&*self.client.hypervisor)
            .get_or_insert(reason);
        self.client.request_attention();
    }

    /// Percent of the time that batches at DISPATCH may take, if there is a limit.
    pub(super) fn cpu_limit(&self) -> Option<u8> {
        match self.dpc_cpu_usage.load(Ordering::Relaxed) {
            0 => None,
            percent => Some(percent),
        }
    }

    pub(super) fn signal_host(&self) {
        self.counters.signals_sent.add(1);
        let connection = ConnectionId(self.connection.load(Ordering::Relaxed));
        self.client.hypervisor.signal_event(connection, 0);
    }

    /// Tells the host about room if it waits for that.
    pub(super) fn signal_after_receive(&self, signal: Signal) {
        if signal == Signal::Needed {
            self.signal_host();
        }
    }
}

impl Channel {
    pub(super) fn from_shared(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }

    /// Where the channel stands.
    pub fn state(&self) -> State {
        self.0.state()
    }

    /// The name for logs and counters.
    pub fn friendly_name(&self) -> &'static str {
        self.0.config.friendly_name
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.0.counters.read()
    }

    /// The instance GUID of the device, while the channel is bound to one. At PASSIVE.
    pub fn interface_instance(&self) -> Option<Guid> {
        self.0.lifecycle.lock().instance()
    }

    /// The library that the channel belongs to.
    pub fn client(&self) -> Client {
        Client::from_inner(self.0.client.clone())
    }

    /// Whether packets are to be delivered at PASSIVE only; from the next batch on.
    pub fn set_incoming_processing_at_passive(&self, passive: bool) {
        self.0.passive.store(passive, Ordering::SeqCst);
    }

    /// The most packets that may be delivered and not yet completed; at least 1 and at most what the
    /// channel was built with. A higher quota does not restart a delivery that waits: the next completion does.
    pub fn set_transaction_quota(&self, packets: u32) {
        let most = self.0.config.transaction_quota;
        self.0.quota.set_limit(packets.clamp(1, most));
    }

    /// The share of the time, in percent from 1 to 100, that packets may be processed at DISPATCH, from the next batch on.
    /// A tracked window is 10 ms of reference time; when its share is used up, processing goes on at PASSIVE
    /// (`VmbChannelSetAllowableDpcCpuUsage`, spec kmcl.md 1.7).
    pub fn set_allowable_dpc_cpu_usage(&self, percent: u8) {
        let percent = percent.clamp(1, 100);
        self.0.dpc_cpu_usage.store(percent, Ordering::Relaxed);
    }

    /// Packets that the driver holds: delivered, kept beyond the callback, and not yet completed.
    pub fn outstanding_packets(&self) -> u32 {
        self.0.quota.held()
    }
}

impl EnabledChannel {
    pub(super) fn new(channel: Channel) -> Self {
        Self { channel }
    }

    /// The handle.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Begins to close the channel; [`disabled`](Self::disabled) waits for the end.
    pub fn disable(&self) {
        let shared = self.channel.shared();
        shared.disable_requested.store(true, Ordering::SeqCst);
        shared.client.request_attention();
    }

    /// Waits until the channel has ended, whoever ended it: no callback runs any more, and
    /// every packet has completed.
    pub async fn disabled(&self) {
        let client = self.channel.client();
        loop {
            let seen = client.changes();
            if self.channel.state() == State::Disabled {
                return;
            }
            client.changed(seen).await;
        }
    }
}

impl Drop for EnabledChannel {
    fn drop(&mut self) {
        self.disable();
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel")
            .field("friendly_name", &self.friendly_name())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for EnabledChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.channel.fmt(f)
    }
}
