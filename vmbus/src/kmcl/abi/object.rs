//! The object behind a `VMBCHANNEL`: a configuration, and the channel of the Rust API that is made of it.

use alloc::string::String;
use alloc::sync::Arc;
use core::ffi::c_void;
use core::fmt;
use core::num::NonZeroU16;
use core::pin::pin;
use core::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU32, AtomicUsize, Ordering,
};
use core::task::{Context, Poll, Waker};

use spin::{Mutex, MutexGuard};

use super::callbacks::PFN_VMB_CHANNEL_PNP_FAILURE;
use super::events::{Process, StateChange};
use super::gpadl::Lent;
use super::handles::{BUSY, Handle, Kind, Placed, Published, Slots};
use super::types::{PDEVICE_OBJECT, VMBCHANNEL};
use super::{events, incoming, outgoing};
use crate::kmcl::{
    Channel, ChannelBuilder, Client, ConfigError, DisabledChannel, EnableError, EnabledChannel,
    Guid, Level, MAX_PACKETS, State, VpIndex,
};

/// The slot has a channel object.
const LIVE: u8 = 2;

/// The most channel objects at one time.
const LIMIT: u32 = 1 << 14;

static CHANNELS: Slots<ChannelSlot> = Slots::new();

/// Objects in memory of drivers.
pub(super) static PLACED: Placed = Placed::new();

/// A channel's place, with those of its packets.
pub(super) struct ChannelSlot {
    object: Published<Arc<ChannelObject>>,
    pub(super) packets: Slots<outgoing::Place>,
    pub(super) received: Slots<incoming::Place>,
}

impl Default for ChannelSlot {
    fn default() -> Self {
        Self {
            object: Published::default(),
            packets: Slots::new(),
            received: Slots::new(),
        }
    }
}

/// The place of a channel by its number.
pub(super) fn channel_slot(owner: u32) -> Option<&'static ChannelSlot> {
    CHANNELS.get(owner).map(|slot| &slot.value)
}

impl ChannelSlot {
    /// The object that is here.
    pub(super) fn object(&self) -> Option<Arc<ChannelObject>> {
        self.object.get()
    }

    /// Its handle.
    pub(super) fn handle(&self) -> Option<VMBCHANNEL> {
        Some(self.object()?.handle)
    }
}

/// A channel object.
pub(super) struct ChannelObject {
    /// What callbacks are handed: the handle, or the address of the driver's memory.
    pub(super) handle: VMBCHANNEL,
    /// The number of its place, and its generation there.
    pub(super) owner: u32,
    generation: u32,
    pub(super) place: &'static ChannelSlot,
    pub(super) client: Client,
    pub(super) parent: PDEVICE_OBJECT,
    pub(super) pointer: AtomicPtr<c_void>,
    /// Settings that can be changed in any state and at any level.
    pub(super) quota: AtomicU32,
    pub(super) passive: AtomicBool,
    pub(super) cpu_usage: AtomicU8,
    /// Bytes of context of a packet to send, as the channel was made with it.
    pub(super) inline_context: AtomicUsize,
    /// What the opened callback returned when it refused.
    pub(super) refusal: AtomicI32,
    /// The channel of the Rust API, once it was needed.
    pub(super) channel: Published<Channel>,
    /// PASSIVE only, and never held while a driver's code runs.
    stage: Mutex<Stage>,
    /// GPADLs by handle. PASSIVE only.
    pub(super) lent: Mutex<Lent>,
}

/// Configuration, and how far the channel is made of it.
pub(super) struct Stage {
    pub(super) config: Config,
    /// Whether the configuration is another than that of the channel.
    changed: bool,
    made: Made,
}

enum Made {
    Nothing,
    Disabled(DisabledChannel),
    Enabled(Arc<EnabledChannel>),
}

/// What the Init functions set.
#[derive(Clone, Default)]
pub(super) struct Config {
    pub(super) interface: Option<Guid>,
    pub(super) instance: Option<Guid>,
    pub(super) pnp_failure: PFN_VMB_CHANNEL_PNP_FAILURE,
    pub(super) name: Option<String>,
    pub(super) packet_size: Option<usize>,
    pub(super) packet_count: Option<usize>,
    pub(super) external: Option<(usize, usize)>,
    pub(super) client_context: usize,
    pub(super) inline_context: usize,
    pub(super) pipe: bool,
    pub(super) start_paused: bool,
    pub(super) ring_pages: Option<(usize, usize)>,
    pub(super) vp: Option<VpIndex>,
    pub(super) primary: Option<(VMBCHANNEL, NonZeroU16)>,
    pub(super) process: Process,
    pub(super) state_change: StateChange,
}

/// Where a channel object's memory is.
pub(super) enum Memory {
    /// The library's.
    Own,
    /// The driver's, at this address.
    At(usize),
}

impl ChannelObject {
    /// A new object, and its handle; `None` when there are too many.
    pub(super) fn create(
        client: Client,
        parent: PDEVICE_OBJECT,
        memory: Memory,
    ) -> Option<VMBCHANNEL> {
        let (owner, generation, slot) = CHANNELS.claim(LIMIT)?;
        let word = Handle {
            kind: Kind::Channel,
            owner,
            index: 0,
            generation,
        }
        .encode();
        let handle = match memory {
            Memory::Own => word,
            Memory::At(address) => {
                if !PLACED.set(address, word) {
                    CHANNELS.release(owner, slot, generation);
                    return None;
                }
                address
            }
        };
        let object = Arc::new(Self {
            handle: VMBCHANNEL(handle),
            owner,
            generation,
            place: &slot.value,
            client,
            parent,
            pointer: AtomicPtr::default(),
            quota: AtomicU32::new(0),
            passive: AtomicBool::new(false),
            cpu_usage: AtomicU8::new(0),
            inline_context: AtomicUsize::new(0),
            refusal: AtomicI32::new(0),
            channel: Published::default(),
            stage: Mutex::new(Stage {
                config: Config::default(),
                changed: true,
                made: Made::Nothing,
            }),
            lent: Mutex::new(Lent::default()),
        });
        slot.value.object.replace(Some(object));
        slot.advance(generation, BUSY, LIVE);
        Some(VMBCHANNEL(handle))
    }

    /// The object with this handle, if there is one.
    pub(super) fn find(handle: VMBCHANNEL) -> Option<Arc<Self>> {
        let decode = |word| Handle::decode(word, Kind::Channel);
        let parts = decode(handle.0).or_else(|| decode(PLACED.get(handle.0)?))?;
        let slot = CHANNELS.get(parts.owner)?;
        slot.state(parts.generation)?;
        let object = slot.value.object.get()?;
        // An object in the driver's memory is known by its address only.
        (object.generation == parts.generation && object.handle == handle).then_some(object)
    }

    /// Ends the object, which is Disabled. `false`: it is not, or somebody else ends it.
    pub(super) fn end(&self) -> bool {
        let Some(mut stage) = self.stage().filter(|stage| stage.is_disabled()) else {
            return false;
        };
        let Some(slot) = CHANNELS.get(self.owner) else {
            return false;
        };
        if !slot.advance(self.generation, LIVE, BUSY) {
            return false;
        }
        let made = core::mem::replace(&mut stage.made, Made::Nothing);
        drop(stage);
        outgoing::end_all(self);
        let left = self.lent.lock().clear();
        drop(left);
        let channel = self.channel.replace(None);
        let object = slot.value.object.replace(None);
        PLACED.remove(self.handle.0);
        CHANNELS.release(self.owner, slot, self.generation);
        drop((made, channel, object));
        true
    }

    /// Configuration and state, as they are now. `None` at DISPATCH, where nobody may wait for them.
    pub(super) fn stage(&self) -> Option<MutexGuard<'_, Stage>> {
        self.is_passive().then(|| {
            let mut stage = self.stage.lock();
            stage.settle();
            stage
        })
    }

    /// Whether the caller is at PASSIVE.
    pub(super) fn is_passive(&self) -> bool {
        self.client.current_level() == Level::Passive
    }

    /// The channel of the Rust API. One that is Disabled is made of the configuration as it is now; at DISPATCH there is only
    /// what was made before.
    pub(super) fn channel(self: &Arc<Self>) -> Option<Channel> {
        if let Some(channel) = self.open_channel() {
            return Some(channel);
        }
        match self.stage() {
            Some(mut stage) => stage.make(self).ok(),
            None => self.channel.get(),
        }
    }

    /// The channel of the Rust API, unless it is Disabled.
    pub(super) fn open_channel(&self) -> Option<Channel> {
        self.channel
            .get()
            .filter(|channel| channel.state() != State::Disabled)
    }
}

impl Stage {
    /// Follows a channel that has ended by itself.
    fn settle(&mut self) {
        let Made::Enabled(enabled) = &self.made else {
            return;
        };
        if enabled.channel().state() != State::Disabled {
            return;
        }
        if let Made::Enabled(enabled) = core::mem::replace(&mut self.made, Made::Nothing) {
            self.made = match Arc::try_unwrap(enabled) {
                // It has ended, so this is ready at once; if not, the channel is made anew.
                Ok(enabled) => match now(enabled.into_disabled()) {
                    Some(Ok(disabled)) => Made::Disabled(disabled),
                    _ => Made::Nothing,
                },
                // Somebody still waits for the end, and comes here after that.
                Err(enabled) => Made::Enabled(enabled),
            };
        }
    }

    /// Whether the channel can be configured.
    pub(super) fn is_disabled(&self) -> bool {
        !matches!(self.made, Made::Enabled(_))
    }

    /// Changes the configuration, if the channel is Disabled; `None` if it is not.
    pub(super) fn configure<E>(
        &mut self,
        change: impl FnOnce(&mut Config) -> Result<(), E>,
    ) -> Option<Result<(), E>> {
        self.is_disabled().then(|| {
            change(&mut self.config)?;
            self.changed = true;
            Ok(())
        })
    }

    /// The channel that is made of the configuration.
    fn make(&mut self, object: &Arc<ChannelObject>) -> Result<Channel, ConfigError> {
        let channel = match &self.made {
            Made::Enabled(enabled) => return Ok(enabled.channel().clone()),
            Made::Disabled(disabled) if !self.changed => return Ok(disabled.channel().clone()),
            _ => {
                let disabled = self.builder(object)?.build(&object.client)?;
                let channel = disabled.channel().clone();
                self.made = Made::Disabled(disabled);
                self.changed = false;
                channel
            }
        };
        object
            .inline_context
            .store(self.config.inline_context, Ordering::Relaxed);
        object.channel.replace(Some(channel.clone()));
        Ok(channel)
    }

    /// Enables the channel. `None`: it is not Disabled.
    pub(super) fn enable(
        &mut self,
        object: &Arc<ChannelObject>,
    ) -> Option<Result<(), EnableFailure>> {
        if !self.is_disabled() {
            return None;
        }
        if self.config.interface.is_none() {
            return Some(Err(EnableFailure::NoTarget));
        }
        // The primary may have been made anew meanwhile.
        self.changed |= self.config.primary.is_some();
        if let Err(error) = self.make(object) {
            return Some(Err(EnableFailure::Config(error)));
        }
        let Made::Disabled(disabled) = core::mem::replace(&mut self.made, Made::Nothing) else {
            return None;
        };
        Some(match disabled.enable() {
            Ok(enabled) => {
                self.made = Made::Enabled(Arc::new(enabled));
                // The latch holds for one time.
                if self.config.start_paused {
                    self.config.start_paused = false;
                    self.changed = true;
                }
                Ok(())
            }
            Err(EnableError { channel, reason }) => {
                self.made = Made::Disabled(channel);
                Err(EnableFailure::Config(reason))
            }
        })
    }

    /// The enabled channel, to be disabled or waited for.
    pub(super) fn enabled(&self) -> Option<Arc<EnabledChannel>> {
        match &self.made {
            Made::Enabled(enabled) => Some(enabled.clone()),
            _ => None,
        }
    }

    fn builder(&self, object: &Arc<ChannelObject>) -> Result<ChannelBuilder, ConfigError> {
        let config = &self.config;
        let mut builder = ChannelBuilder::new(config.interface.unwrap_or(Guid::ZERO))
            .client_context_size(config.client_context)
            .monitored_notification();
        if let Some(instance) = config.instance {
            builder = builder.instance(instance);
        }
        if let Some(name) = &config.name {
            builder = builder.friendly_name(name.clone());
        }
        if let Some(bytes) = config.packet_size {
            builder = builder.maximum_packet_size(bytes);
        }
        if let Some(packets) = config.packet_count {
            builder = builder.maximum_packet_count(packets);
        }
        if let Some((bytes, chain)) = config.external {
            builder = builder.maximum_external_data(bytes, chain);
        }
        if let Some((incoming, outgoing)) = config.ring_pages {
            builder = builder.ring_pages(incoming, outgoing);
        }
        if let Some(vp) = config.vp {
            builder = builder.target_vp(vp);
        }
        if config.pipe {
            builder = builder.pipe();
        }
        if config.start_paused {
            builder = builder.start_paused();
        }
        if let Some((primary, index)) = config.primary {
            let primary = ChannelObject::find(primary).and_then(|primary| primary.channel());
            let primary = primary.ok_or(ConfigError::PrimaryNotOpen)?;
            builder = builder.sub_channel_of(&primary, index);
        }
        match object.quota.load(Ordering::Relaxed) {
            0 => {}
            // "No limit" is what a driver means by more than there can be.
            quota => builder = builder.transaction_quota(quota.min(MAX_PACKETS as u32)),
        }
        match object.cpu_usage.load(Ordering::Relaxed) {
            0 => {}
            percent => builder = builder.allowable_dpc_cpu_usage(percent),
        }
        if object.passive.load(Ordering::Relaxed) {
            builder = builder.incoming_processing_at_passive();
        }
        Ok(events::register(builder, object, config))
    }
}

/// Why a Disabled channel was not enabled.
pub(super) enum EnableFailure {
    /// Nobody said which device.
    NoTarget,
    Config(ConfigError),
}

impl fmt::Display for EnableFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoTarget => f.write_str("no device was named for it"),
            Self::Config(error) => error.fmt(f),
        }
    }
}

/// The result of a future that is ready.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = Context::from_waker(Waker::noop());
    match pin!(future).poll(&mut context) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}
