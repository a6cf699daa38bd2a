//! A channel: what driver, interrupt handler and work queue share of it, and who owns it.

use alloc::sync::Arc;
use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use core::task::{Context, Poll};

use spin::Mutex;

use super::builder::{ChannelBuilder, ConfigError};
use super::client::{Client, Inner};
use super::counters::{Counters, Live};
use super::dispatcher::{AtomicDelivery, Delivery, ReceiveSide};
use super::error::ChannelError;
use super::gpadl::Gpadls;
use super::incoming::Pool;
use super::lifecycle::Lifecycle;
use super::monitor::Monitor;
use super::quota::Quota;
use super::request::Runner;
use super::sender::{Gate, SendSide};
use crate::hypervisor::Level;
use crate::ids::{ChannelId, ConnectionId, VpIndex};
use crate::protocol::Guid;
use crate::ring::Signal;
use crate::sync::DispatchLock;
use crate::turn::Turn;

/// A handle to a channel, as callbacks get it. Clones name the same channel.
///
/// Everything here may be called at DISPATCH and at PASSIVE unless it says otherwise.
#[derive(Clone)]
pub struct Channel(Arc<Shared>);

/// The owner of a channel that is Disabled: made and not enabled, or ended. Nothing of it is known to the host.
pub struct DisabledChannel {
    channel: Channel,
}

/// The owner of an enabled channel. Dropping it disables the channel in the background.
///
/// What KMCL allows for Disabled channels only cannot be written for this one; it has to end first:
///
/// ```
/// use vmbus::kmcl::{DisabledChannel, EnabledChannel, StateError};
/// async fn again(enabled: EnabledChannel) -> Result<(), StateError> {
///     let disabled: DisabledChannel = enabled.into_disabled().await?;
///     let builder = disabled.into_builder().maximum_packet_size(512);
///     # drop(builder);
///     Ok(())
/// }
/// ```
///
/// Setting it up:
///
/// ```compile_fail,E0599
/// use vmbus::kmcl::EnabledChannel;
/// fn configure(enabled: EnabledChannel) {
///     enabled.into_builder();
/// }
/// ```
///
/// Enabling it once more:
///
/// ```compile_fail,E0599
/// use vmbus::kmcl::EnabledChannel;
/// fn enable(enabled: EnabledChannel) {
///     enabled.enable();
/// }
/// ```
#[must_use = "dropping it disables the channel"]
pub struct EnabledChannel {
    channel: Channel,
}

/// A channel that could not be enabled, and why.
#[derive(Debug)]
pub struct EnableError {
    /// The channel, as it was before the call.
    pub channel: DisabledChannel,
    /// What is in the way.
    pub reason: ConfigError,
}

impl fmt::Display for EnableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)
    }
}

impl core::error::Error for EnableError {}

/// Why a call was refused that moves a channel from state to state, or needs one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StateError {
    /// A callback of this very channel called: it would wait for itself (spec kmcl.md 6.1, 18).
    InCallback,
    /// The channel is not in a state in which this can be done.
    NotNow(State),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InCallback => f.write_str("a callback of the channel itself cannot do this"),
            Self::NotNow(state) => write!(f, "the channel is {state}"),
        }
    }
}

impl core::error::Error for StateError {}

/// Address space for the registers of a device, in guest physical memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MmioSpace {
    /// Where it begins.
    pub address: u64,
    /// Its length in bytes.
    pub length: u64,
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
    /// Open, and nothing flows until the driver starts it.
    Paused,
    /// The suspend callback runs, or the driver has yet to complete packets.
    Suspending,
    /// The closed callback runs, or the host has yet to let go of the rings.
    Closing,
}

impl State {
    const ALL: [Self; 7] = [
        Self::Disabled,
        Self::Enabled,
        Self::Opening,
        Self::Active,
        Self::Paused,
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
            Self::Paused => "paused",
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
    /// Counts how often the channel has been closed: what a driver still holds from before is answered no more.
    pub(super) opening: AtomicU32,
    pub(super) monitor: Monitor,
    /// When the time of a request is over, the earliest first; reference time. May name one that has ended.
    pub(super) request_at: AtomicU64,
    /// Who runs a state-change callback.
    pub(super) caller: Runner,
    /// Who runs a batch at PASSIVE.
    pub(super) batch_runner: Runner,
    /// Who has the rings at PASSIVE, in raw mode.
    pub(super) rings_runner: Runner,

    /// The channel's number while it is bound to an offer, else 0.
    id: AtomicU32,
    connection: AtomicU32,

    state: AtomicU8,
    pub(super) disable_requested: AtomicBool,
    pub(super) pause_requested: AtomicBool,
    /// The host has taken the offer back.
    pub(super) rescinded: AtomicBool,
    /// A step was to be made while a callback ran.
    pub(super) skipped: AtomicBool,
    /// The channel is on its way to Disabled, and its sub-channels with it.
    pub(super) closing: AtomicBool,
    pub(super) failed: DispatchLock<Option<ChannelError>>,
    /// Opening and closing: PASSIVE only.
    pub(super) lifecycle: Mutex<Lifecycle>,
    /// The GPADLs of the driver.
    pub(super) gpadls: Gpadls,
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
            opening: AtomicU32::new(0),
            monitor: Monitor::default(),
            request_at: AtomicU64::new(u64::MAX),
            caller: Runner::default(),
            batch_runner: Runner::default(),
            rings_runner: Runner::default(),
            id: AtomicU32::new(0),
            connection: AtomicU32::new(0),
            state: AtomicU8::new(State::Disabled as u8),
            disable_requested: AtomicBool::new(false),
            pause_requested: AtomicBool::new(config.start_paused),
            rescinded: AtomicBool::new(false),
            skipped: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            failed: DispatchLock::new(None),
            lifecycle: Mutex::new(Lifecycle::default()),
            gpadls: Gpadls::default(),
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
        self.state.store(state as u8, Ordering::Release);
        self.client.notify();
        // A sub-channel follows its primary channel, and the other way round.
        self.client.request_attention();
    }

    pub(super) fn set_gate(&self, gate: Gate) {
        self.send.lock(&*self.client.hypervisor).gate = gate;
    }

    /// Lets no packet be sent any more, for this reason.
    pub(super) fn stop_sending(&self, gate: Gate, reason: ChannelError) {
        self.send.lock(&*self.client.hypervisor).close(gate, reason);
    }

    /// Forgets what was wanted of the channel when it was last enabled.
    pub(super) fn forget_wishes(&self) {
        self.disable_requested.store(false, Ordering::SeqCst);
        self.rescinded.store(false, Ordering::SeqCst);
        self.closing.store(false, Ordering::SeqCst);
        *self.failed.lock(&*self.client.hypervisor) = None;
    }

    /// Why the channel has to end, if it has to.
    pub(super) fn reason_to_end(&self) -> Option<ChannelError> {
        if self.rescinded.load(Ordering::SeqCst) {
            Some(ChannelError::Rescinded)
        } else if self.disable_requested.load(Ordering::SeqCst) {
            Some(ChannelError::Disabled)
        } else if self.primary().is_some_and(Self::is_ending) {
            Some(ChannelError::PrimaryClosed)
        } else {
            *self.failed.lock(&*self.client.hypervisor)
        }
    }

    /// Whether the channel has ended or is about to: nothing that waits for the host will be answered.
    pub(super) fn is_ending(&self) -> bool {
        self.closing.load(Ordering::SeqCst) || self.state() == State::Disabled
    }

    /// Whether the driver wants nothing to flow: of this channel or of its primary one.
    pub(super) fn pause_wanted(&self) -> bool {
        let primary = |primary: &Self| {
            matches!(primary.state(), State::Suspending | State::Paused) || primary.pause_wanted()
        };
        self.pause_requested.load(Ordering::SeqCst) || self.primary().is_some_and(primary)
    }

    /// Asks for the step that could not be made while a callback ran.
    pub(super) fn catch_up(&self) {
        if self.skipped.swap(false, Ordering::SeqCst) {
            self.client.request_attention();
        }
    }

    fn primary(&self) -> Option<&Self> {
        let (primary, _) = self.config.primary.as_ref()?;
        Some(primary.shared())
    }

    fn this_vp(&self) -> VpIndex {
        self.client.hypervisor.current_vp()
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
        if self.signal_monitored() {
            return;
        }
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

    /// Whether both are the same channel.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Runs a state-change callback.
    pub(super) fn call<R>(&self, callback: impl FnOnce(&Self) -> R) -> R {
        self.0.caller.during(self.0.this_vp(), || callback(self))
    }

    /// Whether a state-change callback of the channel called this code, or its process-packet callback at PASSIVE. An
    /// interrupt in the middle of one did not come from it.
    pub(super) fn is_in_callback(&self) -> bool {
        (self.0.caller.is(self.0.this_vp()) || self.is_processing_below())
            && self.0.client.hypervisor.current_level() == Level::Passive
    }

    /// Whether this code was called, at PASSIVE, by a batch of the channel or by somebody who has its rings.
    pub(super) fn is_processing_below(&self) -> bool {
        let me = self.0.this_vp();
        self.0.batch_runner.is(me) || self.0.rings_runner.is(me)
    }

    /// Where the channel stands.
    pub fn state(&self) -> State {
        self.0.state()
    }

    /// The name for logs and counters.
    pub fn friendly_name(&self) -> &str {
        &self.0.config.friendly_name
    }

    /// The counters.
    pub fn counters(&self) -> Counters {
        self.0.counters.read()
    }

    /// The instance GUID of the device, while the channel is bound to one. At PASSIVE.
    pub fn interface_instance(&self) -> Option<Guid> {
        self.0.lifecycle.lock().instance()
    }

    /// Address space for the registers of the device, if its offer asks for some and the machine has it. From the
    /// opened callback until the channel is Disabled. At PASSIVE.
    pub fn mmio_space(&self) -> Option<MmioSpace> {
        let (instance, megabytes) = self.0.lifecycle.lock().mmio()?;
        if megabytes == 0 {
            return None;
        }
        let length = u64::from(megabytes) << 20;
        let address = self.0.client.hypervisor.mmio_space(instance, length)?;
        Some(MmioSpace { address, length })
    }

    /// Lets nothing flow any more: the suspend callback runs, and when the driver has completed every packet that it
    /// holds, the channel is Paused and the result is ready. Sub-channels pause with their primary
    /// channel. Packets that the host has yet to answer are still answered.
    ///
    /// A channel that is not open yet will be Paused when it is; so will one that is Disabled, when it
    /// is enabled.
    ///
    /// # Errors
    ///
    /// [`StateError::InCallback`].
    pub fn pause(&self) -> Result<Paused, StateError> {
        if self.is_in_callback() {
            return Err(StateError::InCallback);
        }
        self.0.pause_requested.store(true, Ordering::SeqCst);
        self.0.client.request_attention();
        Ok(Paused {
            channel: self.clone(),
        })
    }

    /// Takes [`pause`](Self::pause) back: the started callback runs, packets flow, and post-started runs.
    /// Does nothing for a channel that is not paused. Returns at once.
    ///
    /// # Errors
    ///
    /// [`StateError::InCallback`].
    pub fn start(&self) -> Result<(), StateError> {
        if self.is_in_callback() {
            return Err(StateError::InCallback);
        }
        self.0.pause_requested.store(false, Ordering::SeqCst);
        // Who waits for the pause waits for nothing now.
        self.0.client.notify();
        self.0.client.request_attention();
        Ok(())
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

/// Waits until a channel is paused; see [`Channel::pause`]. Ready as well when it never will be: because it ended, was
/// started again, or is not open yet.
#[derive(Debug)]
#[must_use = "the channel pauses in the background"]
pub struct Paused {
    channel: Channel,
}

impl Future for Paused {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let channel = &self.channel;
        let shared = channel.shared();
        shared.client.poll_change(context, || {
            let over = matches!(
                channel.state(),
                State::Disabled | State::Enabled | State::Paused
            );
            over || !shared.pause_wanted()
        })
    }
}

impl DisabledChannel {
    pub(super) fn new(shared: Shared) -> Self {
        Self {
            channel: Channel(Arc::new(shared)),
        }
    }

    /// The handle.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Enables the channel: opens a matching offer, now or when it comes. Returns at once; called at PASSIVE.
    ///
    /// # Errors
    ///
    /// [`ConfigError::PrimaryNotOpen`] for a sub-channel whose primary channel is not open.
    pub fn enable(self) -> Result<EnabledChannel, EnableError> {
        let primary = self.channel.shared().primary();
        let open = |primary: &Shared| {
            let state = primary.state();
            !matches!(state, State::Disabled | State::Enabled) && !primary.is_ending()
        };
        if primary.is_some_and(|primary| !open(primary)) {
            return Err(EnableError {
                channel: self,
                reason: ConfigError::PrimaryNotOpen,
            });
        }
        self.channel.begin_waiting();
        Ok(EnabledChannel {
            channel: self.channel,
        })
    }

    /// Gives the configuration back, for a channel that is to differ from this one.
    pub fn into_builder(self) -> ChannelBuilder {
        self.channel.shared().config.clone()
    }
}

impl EnabledChannel {
    /// The handle.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Begins to close the channel; [`disabled`](Self::disabled) waits for the end.
    pub fn disable(&self) {
        let shared = self.channel.shared();
        shared.disable_requested.store(true, Ordering::SeqCst);
        shared.client.notify();
        shared.client.request_attention();
    }

    /// Waits until the channel has ended, whoever ended it: no callback runs any more, and
    /// every packet has completed.
    ///
    /// # Errors
    ///
    /// [`StateError::InCallback`] when a callback of the channel itself would wait.
    pub async fn disabled(&self) -> Result<(), StateError> {
        if self.channel.is_in_callback() {
            return Err(StateError::InCallback);
        }
        let client = &self.channel.shared().client;
        // The failure callback comes last of all.
        let over =
            || self.channel.state() == State::Disabled && self.channel.shared().caller.is_idle();
        core::future::poll_fn(|context| client.poll_change(context, over)).await;
        Ok(())
    }

    /// Disables the channel and waits for the end. It can be enabled again then.
    ///
    /// # Errors
    ///
    /// As [`disabled`](Self::disabled); the channel is disabled all the same.
    pub async fn into_disabled(self) -> Result<DisabledChannel, StateError> {
        self.disable();
        self.disabled().await?;
        Ok(DisabledChannel {
            channel: self.channel.clone(),
        })
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

impl fmt::Debug for DisabledChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.channel.fmt(f)
    }
}

impl fmt::Debug for EnabledChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.channel.fmt(f)
    }
}
