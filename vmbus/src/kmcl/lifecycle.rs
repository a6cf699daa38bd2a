//! Opening, pausing and closing a channel: what it asks of the bus, step by step, all at PASSIVE.
//!
//! Open: ring GPADL, OPEN_CHANNEL, opened and started callbacks, delivery on, post-started. Pause: delivery off,
//! suspend, wait for the driver's packets. Close: the same, then CLOSE_CHANNEL, closed callback, GPADL
//! teardown; when the host has let go, waiting packets fail and the memory is free (spec kmcl.md 1.13,
//! chapters 2 and 3, and 6.1, 16 and 17).
//!
//! What happens is only noted down; [`Channel::step`] alone decides and acts. A callback that waits is itself a place
//! from which the bus is served, so steps may meet: the inner one leaves the channel to the outer one.

use alloc::boxed::Box;
use core::sync::atomic::Ordering;

use spin::Mutex;

use super::channel::{Channel, State};
use super::dispatcher::Delivery;
use super::error::ChannelError;
use super::sender::Gate;
use crate::bus::{Bus, GpaRange, GpadlError, Offer, OpenError, OpenParameters};
use crate::hypervisor::Level;
use crate::ids::{ChannelId, ConnectionId, GpadlHandle};
use crate::protocol::Guid;
use crate::ring::{Reader, Ring, Writer};
use crate::shared::SharedPages;

/// How far a channel has come.
#[derive(Default)]
pub(super) struct Lifecycle {
    phase: Phase,
    /// A step runs.
    stepping: bool,
    bound: Option<Bound>,
    memory: Option<SharedPages>,
    gpadl: Option<GpadlHandle>,
    news: News,
    /// The opened callback ran and agreed, so a closed callback is due.
    announced: bool,
    /// The connection that the offer came with is no more. The next one may use the same numbers.
    orphaned: bool,
    reason: Option<ChannelError>,
}

/// The offer that a channel is bound to.
#[derive(Clone, Copy)]
struct Bound {
    channel: ChannelId,
    instance: Guid,
    connection: ConnectionId,
    mmio_megabytes: u16,
}

/// What the bus has reported and no step has looked at.
#[derive(Default)]
struct News {
    created: Option<Result<(), GpadlError>>,
    opened: Option<Result<(), OpenError>>,
    torn_down: bool,
    /// The connection is no more, and whether the host confirmed it.
    disconnected: Option<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    /// Disabled.
    #[default]
    Ended,
    /// No offer yet.
    Waiting,
    /// The host is being told of the ring memory.
    Sharing,
    /// The host is opening the channel.
    Opening,
    /// Open; the opened callback runs.
    Greeting,
    /// Open, and packets flow.
    Running,
    /// Delivery is off; the driver completes what it holds. Then the channel is paused.
    Pausing,
    /// Open, and the driver wants nothing to flow.
    Paused,
    /// Delivery is off; the driver completes what it holds. Then the channel is closed.
    Draining,
    /// The host lets go of the memory.
    TearingDown,
    /// The host lets go of everything.
    Unloading,
}

impl Lifecycle {
    pub(super) fn instance(&self) -> Option<Guid> {
        self.bound.map(|bound| bound.instance)
    }

    /// The offer's channel number, while the host takes GPADLs for it from a driver.
    pub(super) fn open_channel(&self) -> Option<ChannelId> {
        let open = matches!(
            self.phase,
            Phase::Greeting | Phase::Running | Phase::Pausing | Phase::Paused | Phase::Draining
        );
        self.connected().filter(|_| open)
    }

    /// The offer's channel number, while the host knows it by that.
    fn connected(&self) -> Option<ChannelId> {
        self.bound
            .filter(|_| !self.orphaned)
            .map(|bound| bound.channel)
    }

    /// The device and the MiB of address space that its offer asks for, from the opened callback until all is over.
    pub(super) fn mmio(&self) -> Option<(Guid, u16)> {
        let closing = self.announced && self.phase == Phase::TearingDown;
        self.bound
            .filter(|_| closing || self.open_channel().is_some())
            .map(|bound| (bound.instance, bound.mmio_megabytes))
    }
}

/// What the bus tells a channel.
impl Channel {
    /// Whether the channel would take this offer.
    pub(crate) fn wants(&self, offer: &Offer) -> bool {
        let config = &self.shared().config;
        let (instance, index) = match &config.primary {
            Some((primary, index)) => match primary.interface_instance() {
                Some(instance) => (Some(instance), index.get()),
                None => return false,
            },
            None => (config.instance, 0),
        };
        self.phase() == Phase::Waiting
            && self.shared().reason_to_end().is_none()
            && offer.sub_channel_index == index
            && offer.interface == config.interface
            && instance.is_none_or(|instance| instance == offer.instance)
    }

    /// The number of the offer that the channel is bound to.
    pub(crate) fn bound_to(&self) -> Option<ChannelId> {
        self.shared().lifecycle.lock().connected()
    }

    /// Binds to an offer and begins to open it.
    pub(crate) fn bind(&self, bus: &Mutex<Bus>, offer: &Offer) {
        let shared = self.shared();
        let config = &shared.config;
        {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.bound = Some(Bound {
                channel: offer.channel,
                instance: offer.instance,
                connection: offer.connection,
                mmio_megabytes: offer.mmio_megabytes,
            });
        }
        shared.monitor.bind(&shared.client, offer.monitor_id);
        let pages = config.outgoing_pages() + config.incoming_pages() + 2;
        let memory = match shared.client.hypervisor.share_pages(pages) {
            Ok(memory) => memory,
            Err(error) => return self.end(bus, ChannelError::NoMemory(error)),
        };
        let now = shared.client.hypervisor.reference_time();
        let created = GpaRange::whole_pages(memory.pages())
            .and_then(|range| bus.lock().create_gpadl(now, offer.channel, &[range]));
        match created {
            Ok(handle) => {
                let mut lifecycle = shared.lifecycle.lock();
                lifecycle.memory = Some(memory);
                lifecycle.gpadl = Some(handle);
                lifecycle.phase = Phase::Sharing;
            }
            Err(error) => self.end(bus, ChannelError::Bus(error)),
        }
    }

    /// The host has taken memory of the channel, or not. Returns whether it is the channel's.
    pub(crate) fn on_gpadl_created(
        &self,
        handle: GpadlHandle,
        result: Result<(), GpadlError>,
    ) -> bool {
        let mut lifecycle = self.shared().lifecycle.lock();
        if lifecycle.gpadl == Some(handle) {
            lifecycle.news.created = Some(result);
            drop(lifecycle);
            self.shared().client.request_attention();
            return true;
        }
        drop(lifecycle);
        self.shared().gpadls.on_created(self, handle, result)
    }

    /// The host has let go of memory of the channel. Returns whether it is the channel's.
    pub(crate) fn on_gpadl_torn_down(&self, handle: GpadlHandle) -> bool {
        let mut lifecycle = self.shared().lifecycle.lock();
        let ring = lifecycle.gpadl == Some(handle);
        if ring {
            lifecycle.news.torn_down = true;
        }
        drop(lifecycle);
        let known = ring || self.shared().gpadls.on_torn_down(self, handle);
        if known {
            self.shared().client.request_attention();
        }
        known
    }

    /// The host has opened the channel, or not.
    pub(crate) fn on_opened(&self, result: Result<(), OpenError>) {
        self.shared().lifecycle.lock().news.opened = Some(result);
        self.shared().client.request_attention();
    }

    /// The host took the device away.
    pub(crate) fn on_rescinded(&self) {
        self.shared().rescinded.store(true, Ordering::SeqCst);
        self.shared().client.request_attention();
    }

    /// The connection is no more. If `acknowledged`, the host touches nothing any more.
    pub(crate) fn on_disconnected(&self, acknowledged: bool) {
        let mut lifecycle = self.shared().lifecycle.lock();
        lifecycle.news.disconnected = Some(acknowledged);
        lifecycle.orphaned = true;
        drop(lifecycle);
        // A callback may wait for one of these.
        self.shared().gpadls.disconnected(self, acknowledged);
        self.shared().client.request_attention();
    }
}

/// What is to be done next.
impl Channel {
    /// Looks what the host, the driver or the dispatcher wants of the channel, and does it, as far as it can be done now.
    pub(crate) fn step(&self, bus: &Mutex<Bus>) {
        self.step_gpadls(bus);
        if self.begin_step(false) {
            while self.advance(bus) {}
            self.end_step();
        }
    }

    /// Stops using the connection, which is about to be ended. `false` when a callback stands in the way.
    pub(crate) fn prepare_unload(&self, bus: &Mutex<Bus>) -> bool {
        let begun = self.begin_step(true);
        if begun {
            self.leave_connection(Some(bus));
            self.end_step();
        }
        begun
    }

    /// Whether a step can be made: not below a step, and not below a batch at PASSIVE, because delivery cannot be
    /// turned off from within. Then it is made when that one ends.
    fn begin_step(&self, unloading: bool) -> bool {
        let shared = self.shared();
        let mut lifecycle = shared.lifecycle.lock();
        let free = !lifecycle.stepping && !self.is_processing_below();
        lifecycle.stepping |= free;
        let leaving = unloading || lifecycle.orphaned;
        drop(lifecycle);
        if !free {
            shared.skipped.store(true, Ordering::SeqCst);
            let left = leaving.then_some(ChannelError::Unloaded);
            if let Some(reason) = shared.reason_to_end().or(left) {
                // The callback in the way may wait for an answer that will not come.
                shared.stop_sending(Gate::CompletionsOnly, reason);
                shared.give_up_requests();
            }
        }
        free
    }

    fn end_step(&self) {
        self.shared().lifecycle.lock().stepping = false;
        self.shared().catch_up();
    }

    fn phase(&self) -> Phase {
        self.shared().lifecycle.lock().phase
    }

    fn set_phase(&self, phase: Phase) {
        self.shared().lifecycle.lock().phase = phase;
    }

    /// One transition. Answers whether there may be another.
    fn advance(&self, bus: &Mutex<Bus>) -> bool {
        let shared = self.shared();
        let gone = shared.lifecycle.lock().news.disconnected.take();
        if let Some(acknowledged) = gone {
            self.disconnect(bus, acknowledged);
            return false;
        }
        match self.phase() {
            Phase::Waiting => match shared.reason_to_end() {
                Some(ChannelError::Rescinded) | None => false,
                Some(reason) => {
                    self.end(bus, reason);
                    false
                }
            },
            Phase::Sharing => {
                let news = shared.lifecycle.lock().news.created.take();
                news.is_some_and(|result| self.shared_rings(bus, result))
            }
            Phase::Opening => {
                let news = shared.lifecycle.lock().news.opened.take();
                news.is_some_and(|result| self.opened(bus, result))
            }
            Phase::Running => {
                let reason = shared.reason_to_end();
                if (reason.is_none() && !shared.pause_wanted()) || !shared.stop_delivery() {
                    return false;
                }
                match reason {
                    Some(reason) => self.suspend(reason),
                    None => self.turn_delivery_off(Phase::Pausing, ChannelError::Pausing),
                }
                true
            }
            Phase::Pausing => {
                if let Some(reason) = shared.reason_to_end() {
                    self.begin_draining(reason);
                    return true;
                }
                if !self.has_given_back_all() || !self.sub_channels().all(|sub| sub.is_at_rest()) {
                    return false;
                }
                self.set_phase(Phase::Paused);
                shared.set_gate(Gate::Queue);
                shared.set_state(State::Paused);
                true
            }
            Phase::Paused => {
                if let Some(reason) = shared.reason_to_end() {
                    self.begin_draining(reason);
                } else if !shared.pause_wanted() {
                    self.start_delivery();
                } else {
                    return false;
                }
                true
            }
            Phase::Draining => {
                let over = |sub: Channel| sub.state() == State::Disabled;
                if !self.has_given_back_all() || !self.sub_channels().all(over) {
                    return false;
                }
                self.close(Some(bus));
                true
            }
            Phase::TearingDown => {
                let torn_down = core::mem::take(&mut shared.lifecycle.lock().news.torn_down);
                if torn_down {
                    self.forget_ring(true);
                }
                let (ring, reason) = {
                    let lifecycle = shared.lifecycle.lock();
                    (lifecycle.gpadl.is_some(), lifecycle.reason)
                };
                if !ring && shared.gpadls.is_empty() {
                    self.end(bus, reason.unwrap_or(ChannelError::Disabled));
                }
                false
            }
            Phase::Greeting | Phase::Unloading | Phase::Ended => false,
        }
    }

    /// Whether the driver holds no packet any more.
    fn has_given_back_all(&self) -> bool {
        self.shared().quota.held() == 0
    }

    /// Whether nothing flows on the channel.
    fn is_at_rest(&self) -> bool {
        matches!(
            self.state(),
            State::Disabled | State::Enabled | State::Paused
        )
    }

    /// The channels that are subordinate to this one.
    fn sub_channels(&self) -> impl Iterator<Item = Channel> {
        let all = self.shared().client.channels.lock().clone();
        let primary = self.clone();
        all.into_iter().filter(move |channel| {
            let config = &channel.shared().config;
            config
                .primary
                .as_ref()
                .is_some_and(|(other, _)| other.is(&primary))
        })
    }
}

/// Opening.
impl Channel {
    fn shared_rings(&self, bus: &Mutex<Bus>, result: Result<(), GpadlError>) -> bool {
        let result = match result {
            Ok(()) => self.open(bus),
            Err(error) => {
                self.forget_ring(error.frees_memory());
                self.note_rescind(error == GpadlError::Rescinded);
                Err(ChannelError::Gpadl(error))
            }
        };
        if let Err(error) = result {
            self.abandon(bus, error);
        }
        true
    }

    /// Sets up the rings and asks the host to open the channel.
    fn open(&self, bus: &Mutex<Bus>) -> Result<(), ChannelError> {
        let shared = self.shared();
        let config = &shared.config;
        if let Some(reason) = shared.reason_to_end() {
            return Err(reason);
        }
        let (bound, memory, gpadl) = {
            let lifecycle = shared.lifecycle.lock();
            match (lifecycle.bound, lifecycle.memory.clone(), lifecycle.gpadl) {
                (Some(bound), Some(memory), Some(gpadl)) => (bound, memory, gpadl),
                _ => return Err(ChannelError::Disabled),
            }
        };
        let downstream_page = config.outgoing_pages() + 1;
        let (outgoing, incoming) = Ring::split(&memory, downstream_page)?;
        let reader = Reader::new(incoming.clone());
        let writer = Writer::new(outgoing)?;
        if config.callbacks.on_signal.is_some() {
            shared.alone(|side| side.attach_raw(reader, writer));
        } else {
            shared.alone(|side| side.attach(reader));
            shared
                .send
                .lock(&*shared.client.hypervisor)
                .attach(writer, incoming);
        }
        // Before the host may interrupt, which can be before it answers.
        shared.set_id(Some((bound.channel, bound.connection)));
        shared.client.install(bound.channel, self);
        self.set_phase(Phase::Opening);
        let parameters = OpenParameters {
            ring: gpadl,
            // At most 8190.
            downstream_page: downstream_page as u32,
            target_vp: config.target_vp.unwrap_or(shared.client.default_vp),
            user_data: config.user_data,
        };
        let now = shared.client.hypervisor.reference_time();
        let opened = bus.lock().open(now, bound.channel, &parameters);
        opened.map_err(ChannelError::Bus)
    }

    /// The host has opened the channel, or not.
    fn opened(&self, bus: &Mutex<Bus>, result: Result<(), OpenError>) -> bool {
        let shared = self.shared();
        if let Err(error) = result {
            self.note_rescind(error == OpenError::Rescinded);
            self.abandon(bus, ChannelError::Open(error));
            return true;
        }
        if let Some(reason) = shared.reason_to_end() {
            // Nobody has been told that it is open, and nobody will be.
            self.begin_draining(reason);
            return true;
        }
        let callbacks = &shared.config.callbacks;
        self.set_phase(Phase::Greeting);
        shared.set_state(State::Opening);
        if let Some(opened) = &callbacks.opened
            && let Err(refused) = self.call(|channel| opened(channel))
        {
            self.begin_draining(ChannelError::Refused(refused));
            return true;
        }
        shared.lifecycle.lock().announced = true;
        if shared.pause_wanted() {
            self.set_phase(Phase::Paused);
            shared.set_state(State::Paused);
        } else {
            self.start_delivery();
        }
        true
    }

    /// Lets packets flow: started, delivery on, post-started.
    fn start_delivery(&self) {
        let shared = self.shared();
        let callbacks = &shared.config.callbacks;
        shared.set_state(State::Opening);
        if let Some(started) = &callbacks.started {
            self.call(|channel| started(channel));
        }
        self.set_phase(Phase::Running);
        shared.delivery.set_all();
        shared.set_gate(Gate::Open);
        shared.set_state(State::Active);
        // Whatever came or was lined up before: interrupts until now found delivery off.
        self.dispatch(Level::Passive);
        if let Some(post_started) = &callbacks.post_started {
            self.call(|channel| post_started(channel));
        }
    }
}

/// Pausing and closing.
impl Channel {
    fn suspend(&self, reason: ChannelError) {
        let shared = self.shared();
        shared.closing.store(true, Ordering::SeqCst);
        shared.lifecycle.lock().reason = Some(reason);
        if !reason.is_orderly() {
            log::error!("{}: {reason}", shared.config.friendly_name);
        }
        self.turn_delivery_off(Phase::Draining, reason);
    }

    /// Has the driver complete what it holds. No packet is being delivered.
    fn turn_delivery_off(&self, phase: Phase, reason: ChannelError) {
        let shared = self.shared();
        shared.stop_sending(Gate::CompletionsOnly, reason);
        if phase == Phase::Draining {
            shared.give_up_requests();
        }
        self.set_phase(phase);
        shared.set_state(State::Suspending);
        if let Some(suspend) = &shared.config.callbacks.suspend {
            self.call(|channel| suspend(channel));
        }
    }

    /// Begins to close a channel on which nothing flows.
    fn begin_draining(&self, reason: ChannelError) {
        let shared = self.shared();
        shared.closing.store(true, Ordering::SeqCst);
        shared.stop_sending(Gate::CompletionsOnly, reason);
        shared.give_up_requests();
        let mut lifecycle = shared.lifecycle.lock();
        lifecycle.reason = Some(reason);
        lifecycle.phase = Phase::Draining;
        drop(lifecycle);
        if !reason.is_orderly() {
            log::error!("{}: {reason}", shared.config.friendly_name);
        }
        // Sub-channels look at this.
        shared.client.request_attention();
    }

    /// Closes the channel and asks the host to let go of its memory, if there is still a connection.
    fn close(&self, bus: Option<&Mutex<Bus>>) {
        let shared = self.shared();
        self.detach();
        let (bound, gpadl, announced) = {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.phase = Phase::TearingDown;
            (lifecycle.bound, lifecycle.gpadl, lifecycle.announced)
        };
        shared.set_state(State::Closing);
        if let (Some(bound), Some(bus)) = (bound, bus)
            && let Err(error) = bus.lock().close(bound.channel)
        {
            log::warn!("{}: closing: {error}", shared.config.friendly_name);
        }
        shared.set_gate(Gate::Closed);
        if let Some(closed) = &shared.config.callbacks.closed
            && announced
        {
            self.call(|channel| closed(channel));
        }
        shared.gpadls.force_deletion(self);
        if let Some(bus) = bus {
            self.step_gpadls(bus);
            self.tear_down(bus, gpadl);
        }
    }

    /// Takes the rings from everybody who could use them.
    fn detach(&self) {
        let shared = self.shared();
        shared.delivery.restrict(Delivery::Off);
        if let Some(id) = shared.id() {
            shared.client.uninstall(id, self);
        }
        shared.set_id(None);
        let left = shared.alone(|side| side.detach());
        if let Some(buffer) = left {
            shared.recycle(buffer);
        }
        // Nothing that came through these rings is answered through the next ones.
        shared.opening.fetch_add(1, Ordering::SeqCst);
        shared.send.lock(&*shared.client.hypervisor).detach();
        shared.poll_at.store(u64::MAX, Ordering::Relaxed);
    }

    /// Asks the host to let go of the rings, if it has them.
    fn tear_down(&self, bus: &Mutex<Bus>, gpadl: Option<GpadlHandle>) {
        let Some(handle) = gpadl else {
            return;
        };
        let shared = self.shared();
        let now = shared.client.hypervisor.reference_time();
        let asked = bus.lock().teardown_gpadl(now, handle);
        if let Err(error) = asked {
            log::warn!("{}: closing: {error}", shared.config.friendly_name);
            // Then it is not known when the host lets go: keep the memory from everybody.
            self.forget_ring(false);
        }
    }

    /// Gives up opening; the channel is not open at the host.
    fn abandon(&self, bus: &Mutex<Bus>, reason: ChannelError) {
        let shared = self.shared();
        self.detach();
        let gpadl = {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.reason = Some(reason);
            lifecycle.phase = Phase::TearingDown;
            lifecycle.gpadl
        };
        self.tear_down(bus, gpadl);
    }

    fn note_rescind(&self, rescinded: bool) {
        self.shared()
            .rescinded
            .fetch_or(rescinded, Ordering::SeqCst);
    }

    /// Lets go of the ring memory: gives it back, or keeps it aside for as long as the host may touch it.
    fn forget_ring(&self, free: bool) {
        let shared = self.shared();
        let memory = {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.gpadl = None;
            lifecycle.memory.take()
        };
        if !free {
            if let Some(memory) = memory {
                shared.client.keep(Box::new(memory));
            }
            shared.keep_lent_memory();
        }
    }

    /// Stops using the connection: whatever the driver holds, the host will not wait for it.
    fn leave_connection(&self, bus: Option<&Mutex<Bus>>) {
        if self.phase() == Phase::Running {
            let shared = self.shared();
            shared.delivery.restrict(Delivery::CompletionsOnly);
            shared.signals.wait(|()| ());
            shared.alone(|_| ());
            self.suspend(ChannelError::Unloaded);
        }
        if matches!(self.phase(), Phase::Pausing | Phase::Paused) {
            self.begin_draining(ChannelError::Unloaded);
        }
        if self.phase() == Phase::Draining {
            self.close(bus);
        }
        let mut lifecycle = self.shared().lifecycle.lock();
        if lifecycle.phase != Phase::Ended {
            lifecycle.phase = Phase::Unloading;
        }
    }

    fn disconnect(&self, bus: &Mutex<Bus>, acknowledged: bool) {
        self.leave_connection(None);
        self.detach();
        self.forget_ring(acknowledged);
        self.end(bus, ChannelError::Unloaded);
    }

    /// The last step: nothing of the channel is left at the host.
    fn end(&self, bus: &Mutex<Bus>, reason: ChannelError) {
        let shared = self.shared();
        if self.phase() == Phase::Ended {
            return;
        }
        let (channel, announced) = {
            let mut lifecycle = shared.lifecycle.lock();
            let channel = lifecycle.connected();
            lifecycle.bound = None;
            (channel, lifecycle.announced)
        };
        let rescinded = shared.rescinded.swap(false, Ordering::SeqCst);
        shared.monitor.bind(&shared.client, None);
        if rescinded && let Some(channel) = channel {
            // Refused when the connection is gone, and then nobody waits for it.
            let _ = bus.lock().release(channel);
        }
        let disable = shared.disable_requested.load(Ordering::SeqCst);
        let final_word = matches!(reason, ChannelError::Unloaded | ChannelError::Refused(_));
        if rescinded && !announced && !disable && !final_word {
            // The offer went away before it was open: wait for another one.
            let mut lifecycle = shared.lifecycle.lock();
            *lifecycle = Lifecycle {
                phase: Phase::Waiting,
                stepping: lifecycle.stepping,
                ..Lifecycle::default()
            };
            drop(lifecycle);
            shared.closing.store(false, Ordering::SeqCst);
            shared.set_gate(Gate::Queue);
            shared.set_state(State::Enabled);
            return;
        }
        self.set_phase(Phase::Ended);
        shared.stop_sending(Gate::Shut, reason);
        self.call(|channel| channel.fail_outgoing(reason));
        let mut channels = shared.client.channels.lock();
        channels.retain(|other| !other.is(self));
        drop(channels);
        let paused = shared.config.start_paused;
        shared.pause_requested.store(paused, Ordering::SeqCst);
        // Who waits for the end waits for the failure callback too.
        self.call(|channel| {
            shared.set_state(State::Disabled);
            if reason.is_orderly() {
                return;
            }
            if !announced {
                log::error!("{}: {reason}", shared.config.friendly_name);
            }
            if let Some(failure) = &shared.config.callbacks.failure {
                failure(channel, reason);
            }
        });
        shared.client.notify();
    }

    /// Makes a channel that has ended, or never begun, wait for an offer.
    pub(super) fn begin_waiting(&self) {
        let shared = self.shared();
        let mut lifecycle = shared.lifecycle.lock();
        *lifecycle = Lifecycle {
            phase: Phase::Waiting,
            // A failure callback may be what enables it again.
            stepping: lifecycle.stepping,
            ..Lifecycle::default()
        };
        drop(lifecycle);
        shared.forget_wishes();
        shared.set_gate(Gate::Queue);
        shared.client.channels.lock().push(self.clone());
        shared.set_state(State::Enabled);
    }
}
