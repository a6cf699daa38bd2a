//! Opening and closing a channel: what it asks of the bus, step by step, all at PASSIVE.
//!
//! Open: ring GPADL, OPEN_CHANNEL, opened and started callbacks, delivery on, post-started. Close: delivery
//! off, suspend, wait for the driver's packets, CLOSE_CHANNEL, closed callback, GPADL teardown; when the host has
//! let go, waiting packets fail and the memory is free (spec kmcl.md 1.13, 3 and 6.1, 16 and 17).

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
    bound: Option<Bound>,
    memory: Option<SharedPages>,
    gpadl: Option<GpadlHandle>,
    /// The host has taken the offer back.
    rescinded: bool,
    /// The opened callback ran and agreed, so a closed callback is due.
    announced: bool,
    reason: Option<ChannelError>,
}

/// The offer that a channel is bound to.
#[derive(Clone, Copy)]
struct Bound {
    channel: ChannelId,
    instance: Guid,
    connection: ConnectionId,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Phase {
    /// No offer yet.
    #[default]
    Waiting,
    /// The host is being told of the ring memory.
    Sharing,
    /// The host is opening the channel.
    Opening,
    /// Open.
    Running,
    /// Delivery is off; the driver completes what it holds.
    Draining,
    /// The host lets go of the ring memory.
    TearingDown,
    /// The host lets go of everything.
    Unloading,
    /// Over.
    Ended,
}

impl Lifecycle {
    pub(super) fn instance(&self) -> Option<Guid> {
        self.bound.map(|bound| bound.instance)
    }
}

impl Channel {
    fn phase(&self) -> Phase {
        self.shared().lifecycle.lock().phase
    }

    fn set_phase(&self, phase: Phase) {
        self.shared().lifecycle.lock().phase = phase;
    }

    /// Whether the channel would take this offer.
    pub(crate) fn wants(&self, offer: &Offer) -> bool {
        let config = &self.shared().config;
        self.phase() == Phase::Waiting
            && !self.shared().disable_requested.load(Ordering::SeqCst)
            && offer.sub_channel_index == 0
            && offer.interface == config.interface
            && config
                .instance
                .is_none_or(|instance| instance == offer.instance)
    }

    /// The number of the offer that the channel is bound to.
    pub(crate) fn bound_to(&self) -> Option<ChannelId> {
        let lifecycle = self.shared().lifecycle.lock();
        lifecycle.bound.map(|bound| bound.channel)
    }

    /// Whether the ring memory is lent under this handle.
    pub(crate) fn has_gpadl(&self, handle: GpadlHandle) -> bool {
        self.shared().lifecycle.lock().gpadl == Some(handle)
    }

    /// Binds to an offer and begins to open it.
    pub(crate) fn bind(&self, bus: &Mutex<Bus>, offer: &Offer) {
        let shared = self.shared();
        let config = &shared.config;
        {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.rescinded = false;
            lifecycle.bound = Some(Bound {
                channel: offer.channel,
                instance: offer.instance,
                connection: offer.connection,
            });
        }
        let pages = config.outgoing_pages + config.incoming_pages + 2;
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

    /// The host has taken the ring memory, or not.
    pub(crate) fn on_gpadl_created(&self, bus: &Mutex<Bus>, result: Result<(), GpadlError>) {
        if self.phase() != Phase::Sharing {
            return;
        }
        let result = match result {
            Ok(()) => self.open(bus),
            Err(error) => {
                self.forget_gpadl(error.frees_memory());
                self.note_rescind(error == GpadlError::Rescinded);
                Err(ChannelError::Gpadl(error))
            }
        };
        if let Err(error) = result {
            self.abandon(bus, error);
        }
    }

    /// Sets up the rings and asks the host to open the channel.
    fn open(&self, bus: &Mutex<Bus>) -> Result<(), ChannelError> {
        let shared = self.shared();
        let config = &shared.config;
        let (bound, memory, gpadl) = {
            let lifecycle = shared.lifecycle.lock();
            match (lifecycle.bound, lifecycle.memory.clone(), lifecycle.gpadl) {
                (Some(bound), Some(memory), Some(gpadl)) => (bound, memory, gpadl),
                _ => return Err(ChannelError::Disabled),
            }
        };
        let downstream_page = config.outgoing_pages + 1;
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
    pub(crate) fn on_opened(&self, bus: &Mutex<Bus>, result: Result<(), OpenError>) {
        if self.phase() != Phase::Opening {
            return;
        }
        if let Err(error) = result {
            self.note_rescind(error == OpenError::Rescinded);
            return self.abandon(bus, ChannelError::Open(error));
        }
        let shared = self.shared();
        let callbacks = &shared.config.callbacks;
        self.set_phase(Phase::Running);
        shared.set_state(State::Opening);
        if let Some(opened) = &callbacks.opened
            && let Err(refused) = opened(self)
        {
            return self.stop(bus, ChannelError::Refused(refused));
        }
        shared.lifecycle.lock().announced = true;
        if let Some(started) = &callbacks.started {
            started(self);
        }
        shared.delivery.set_all();
        shared.send.lock(&*shared.client.hypervisor).gate = Gate::Open;
        shared.set_state(State::Active);
        // Whatever came or was lined up before: interrupts until now found delivery off.
        self.dispatch(Level::Passive);
        if let Some(post_started) = &callbacks.post_started {
            post_started(self);
        }
        // Whoever wanted it closed while it was being opened has not been heard yet.
        shared.client.request_attention();
    }

    /// The host took the device away.
    pub(crate) fn on_rescinded(&self) {
        self.note_rescind(true);
        self.shared().client.request_attention();
    }

    fn note_rescind(&self, rescinded: bool) {
        self.shared().lifecycle.lock().rescinded |= rescinded;
    }

    /// The host has let go of the ring memory.
    pub(crate) fn on_gpadl_torn_down(&self, bus: &Mutex<Bus>) {
        self.forget_gpadl(true);
        let reason = self.shared().lifecycle.lock().reason;
        match reason {
            Some(reason) if self.phase() == Phase::TearingDown => self.end(bus, reason),
            _ => {}
        }
    }

    /// The connection is no more. If `acknowledged`, the host touches nothing any more.
    pub(crate) fn on_disconnected(&self, bus: &Mutex<Bus>, acknowledged: bool) {
        self.prepare_unload(bus);
        self.detach();
        self.forget_gpadl(acknowledged);
        self.end(bus, ChannelError::Unloaded);
    }

    /// Stops using the connection, which is about to be ended.
    pub(crate) fn prepare_unload(&self, bus: &Mutex<Bus>) {
        if self.phase() == Phase::Running {
            self.suspend(ChannelError::Unloaded);
        }
        if self.phase() == Phase::Draining {
            // Whatever the driver holds, the host will not wait for it.
            self.close(bus);
        }
        let mut lifecycle = self.shared().lifecycle.lock();
        if lifecycle.phase != Phase::Ended {
            lifecycle.phase = Phase::Unloading;
        }
    }

    /// Looks whether driver, host or dispatcher wants the channel to end, and goes on with ending it.
    pub(crate) fn step(&self, bus: &Mutex<Bus>) {
        let shared = self.shared();
        match self.phase() {
            Phase::Waiting if shared.disable_requested.load(Ordering::SeqCst) => {
                self.end(bus, ChannelError::Disabled);
            }
            Phase::Running => {
                if let Some(reason) = self.reason_to_stop()
                    && shared.stop_delivery()
                {
                    self.stop(bus, reason);
                }
            }
            Phase::Draining => self.drain(bus),
            // The bus will say how it ended; then there is a decision to make.
            _ => {}
        }
    }

    fn reason_to_stop(&self) -> Option<ChannelError> {
        let shared = self.shared();
        if shared.lifecycle.lock().rescinded {
            Some(ChannelError::Rescinded)
        } else if shared.disable_requested.load(Ordering::SeqCst) {
            Some(ChannelError::Disabled)
        } else {
            *shared.failed.lock(&*shared.client.hypervisor)
        }
    }

    /// Turns delivery off and waits for the driver.
    fn stop(&self, bus: &Mutex<Bus>, reason: ChannelError) {
        self.suspend(reason);
        self.drain(bus);
    }

    fn suspend(&self, reason: ChannelError) {
        let shared = self.shared();
        shared.delivery.restrict(Delivery::CompletionsOnly);
        let mut sending = shared.send.lock(&*shared.client.hypervisor);
        sending.close(Gate::CompletionsOnly, reason);
        drop(sending);
        shared.give_up_requests();
        // A batch that runs now sees that; once the receiving half was free no packet is being delivered or will be.
        shared.signals.wait(|()| ());
        shared.alone(|_| ());
        let announced = {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.reason = Some(reason);
            lifecycle.phase = Phase::Draining;
            lifecycle.announced
        };
        shared.set_state(State::Suspending);
        if !reason.is_orderly() {
            log::error!("{}: {reason}", shared.config.friendly_name);
        }
        if let Some(suspend) = &shared.config.callbacks.suspend
            && announced
        {
            suspend(self);
        }
    }

    fn drain(&self, bus: &Mutex<Bus>) {
        if self.shared().quota.held() == 0 {
            self.close(bus);
        }
    }

    /// Closes the channel and asks the host to let go of the rings.
    fn close(&self, bus: &Mutex<Bus>) {
        let shared = self.shared();
        self.detach();
        let (bound, gpadl, announced) = {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.phase = Phase::TearingDown;
            (lifecycle.bound, lifecycle.gpadl, lifecycle.announced)
        };
        shared.set_state(State::Closing);
        if let Some(bound) = bound
            && let Err(error) = bus.lock().close(bound.channel)
        {
            log::warn!("{}: closing: {error}", shared.config.friendly_name);
        }
        if let Some(closed) = &shared.config.callbacks.closed
            && announced
        {
            closed(self);
        }
        self.tear_down(bus, gpadl);
    }

    /// Takes the rings from everybody who could use them.
    fn detach(&self) {
        let shared = self.shared();
        if let Some(id) = shared.id() {
            shared.client.uninstall(id);
        }
        shared.set_id(None);
        shared.delivery.restrict(Delivery::Off);
        let left = shared.alone(|side| side.detach());
        if let Some(buffer) = left {
            shared.recycle(buffer);
        }
        shared.send.lock(&*shared.client.hypervisor).detach();
        shared.poll_at.store(u64::MAX, Ordering::Relaxed);
    }

    /// Asks the host to let go of the rings, if it has them.
    fn tear_down(&self, bus: &Mutex<Bus>, gpadl: Option<GpadlHandle>) {
        let shared = self.shared();
        let reason = shared.lifecycle.lock().reason;
        let now = shared.client.hypervisor.reference_time();
        let asked = match gpadl {
            Some(handle) => bus.lock().teardown_gpadl(now, handle),
            None => return self.end(bus, reason.unwrap_or(ChannelError::Disabled)),
        };
        if let Err(error) = asked {
            log::warn!("{}: closing: {error}", shared.config.friendly_name);
            // Then it is not known when the host lets go: keep the memory from everybody.
            self.forget_gpadl(false);
            self.end(bus, reason.unwrap_or(ChannelError::Bus(error)));
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

    /// Lets go of the ring memory: gives it back, or keeps it aside for as long as the host may touch it.
    fn forget_gpadl(&self, free: bool) {
        let shared = self.shared();
        let memory = {
            let mut lifecycle = shared.lifecycle.lock();
            lifecycle.gpadl = None;
            lifecycle.memory.take()
        };
        if !free {
            if let Some(memory) = memory {
                shared.client.kept.lock().push(memory);
            }
            shared.keep_lent_memory();
        }
    }

    /// The last step: nothing of the channel is left at the host.
    fn end(&self, bus: &Mutex<Bus>, reason: ChannelError) {
        let shared = self.shared();
        if self.phase() == Phase::Ended {
            return;
        }
        let (bound, rescinded, announced) = {
            let mut lifecycle = shared.lifecycle.lock();
            (
                lifecycle.bound.take(),
                lifecycle.rescinded,
                lifecycle.announced,
            )
        };
        if rescinded && let Some(bound) = bound {
            // Refused when the connection is gone, and then nobody waits for it.
            let _ = bus.lock().release(bound.channel);
        }
        let disable = shared.disable_requested.load(Ordering::SeqCst);
        if rescinded && !announced && !disable && reason != ChannelError::Unloaded {
            // The offer went away before it was open: wait for another one.
            let mut lifecycle = shared.lifecycle.lock();
            *lifecycle = Lifecycle::default();
            drop(lifecycle);
            shared.send.lock(&*shared.client.hypervisor).gate = Gate::Queue;
            shared.client.request_attention();
            return;
        }
        self.set_phase(Phase::Ended);
        let mut sending = shared.send.lock(&*shared.client.hypervisor);
        sending.close(Gate::Shut, reason);
        drop(sending);
        self.fail_outgoing(reason);
        let mut channels = shared.client.channels.lock();
        channels.retain(|other| !alloc::sync::Arc::ptr_eq(other.shared(), shared));
        drop(channels);
        shared.set_state(State::Disabled);
        if !reason.is_orderly() {
            if !announced {
                log::error!("{}: {reason}", shared.config.friendly_name);
            }
            if let Some(failure) = &shared.config.callbacks.failure {
                failure(self, reason);
            }
        }
    }
}
