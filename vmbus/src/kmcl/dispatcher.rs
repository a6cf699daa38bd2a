//! The dispatcher: takes packets from the ring to the driver.
//!
//! There is one. It runs at DISPATCH from the channel's interrupt and at PASSIVE from the work queue; the level
//! is an argument. A batch ends when the ring is empty, the quota reached, the budget or the time at DISPATCH spent, or
//! the driver wants PASSIVE; whatever the end, processing-complete runs if there were packets, and then the
//! read position is published (design.md, A packet's way).

use alloc::boxed::Box;
use core::ops::ControlFlow;

use super::ChannelError;
use super::channel::{Channel, Shared};
use super::cpu_usage::{CpuUsage, PACKETS_PER_LOOK};
use super::incoming::{Content, Fate, ReceivedPacket};
use super::pipe;
use super::trace;
use crate::atomics::{AtomicU8, Ordering};
use crate::hypervisor::Level;
use crate::ring::{Kind, PacketBuffer, Reader, Writer};
use crate::turn::Taken;

/// What may be taken from the ring.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Delivery {
    /// Nothing: the channel is not open yet, or its ring is broken.
    Off,
    /// Completions, as long as no data packet stands before them: the channel is paused or stops, and what the
    /// driver has sent still ends (spec kmcl.md 6.1, 5).
    CompletionsOnly,
    /// Everything.
    All,
}

/// The [`Delivery`] of a channel, seen by every VP.
pub(super) struct AtomicDelivery(AtomicU8);

impl AtomicDelivery {
    pub(super) fn new() -> Self {
        Self(AtomicU8::new(Delivery::Off as u8))
    }

    pub(super) fn get(&self) -> Delivery {
        match self.0.load(Ordering::Acquire) {
            0 => Delivery::Off,
            1 => Delivery::CompletionsOnly,
            _ => Delivery::All,
        }
    }

    /// Has everything taken from now on. The dispatcher must be run after this.
    pub(super) fn set_all(&self) {
        self.0.store(Delivery::All as u8, Ordering::Release);
    }

    /// Has no more than `most` taken from now on. A batch that runs notices at its next packet; once the receiving half
    /// has been [free](Shared::alone), it has.
    pub(super) fn restrict(&self, most: Delivery) {
        self.0.fetch_min(most as u8, Ordering::AcqRel);
    }
}

/// The receiving half of a channel.
#[derive(Default)]
pub(super) struct ReceiveSide {
    reader: Option<Reader>,
    /// The other direction, in raw mode; else the sending half has it.
    writer: Option<Writer>,
    /// A place for the next packet, while the driver holds no other.
    spare: Option<Box<Content>>,
    /// Where completions are read to.
    completion: PacketBuffer,
    /// A packet that is to be delivered again, before all others.
    deferred: Option<Box<Content>>,
    cpu: CpuUsage,
}

/// Why a batch ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    Empty,
    /// The driver holds too many packets; the completion of one goes on.
    Starved,
    Budget,
    CpuUsage,
    NeedsPassive,
    Closed,
}

/// Whether the work queue has to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Done,
    Later,
}

impl Channel {
    /// Runs batches for this channel at `level` until nothing is left to do there.
    ///
    /// If a batch runs already, on another VP or below this interrupt, that one goes on instead: an
    /// interrupt during a batch is neither lost nor waited for.
    pub(super) fn dispatch(&self, level: Level) {
        let shared = self.shared();
        match &shared.config.callbacks.on_signal {
            Some(on_signal) => self.run_on_signal(&**on_signal, level),
            None => self.run_batches(level),
        }
        if shared.delivery.get() != Delivery::All {
            // Somebody may wait for the end of this batch.
            shared.client.request_attention();
        }
    }

    fn run_batches(&self, level: Level) {
        let shared = self.shared();
        let mut budget = shared.config.batch_budget;
        shared.receive.run(|side| {
            match shared.in_batch(level, || side.run(self, level, &mut budget)) {
                Ok(Outcome::Done) => ControlFlow::Continue(()),
                Ok(Outcome::Later) => {
                    shared.defer();
                    ControlFlow::Break(())
                }
                Err(error) => {
                    shared.delivery.restrict(Delivery::Off);
                    shared.fail(error);
                    ControlFlow::Continue(())
                }
            }
        });
    }
}

impl Shared {
    /// Has no data packet delivered any more. `false` while one is: then attention is requested when its batch has
    /// ended, and this is to be called again.
    pub(super) fn stop_delivery(&self) -> bool {
        self.delivery.restrict(Delivery::CompletionsOnly);
        let free = |taken: Option<Taken<()>>| {
            taken.is_some_and(|taken| {
                if taken.asked {
                    self.defer();
                }
                true
            })
        };
        free(self.signals.enter(|()| ())) && free(self.receive.enter(|_| ()))
    }

    /// Runs `work` on the receiving half while no batch runs. At PASSIVE, and not from this channel's packet callbacks.
    pub(super) fn alone<R>(&self, work: impl FnOnce(&mut ReceiveSide) -> R) -> R {
        let taken = self.receive.wait(work);
        if taken.asked {
            self.defer();
        }
        taken.result
    }
}

impl ReceiveSide {
    pub(super) fn attach(&mut self, reader: Reader) {
        self.reader = Some(reader);
    }

    /// Takes both rings, for a driver that uses them itself.
    pub(super) fn attach_raw(&mut self, reader: Reader, writer: Writer) {
        self.reader = Some(reader);
        self.writer = Some(writer);
    }

    pub(super) fn raw(&mut self) -> Option<(&mut Reader, &mut Writer)> {
        self.reader.as_mut().zip(self.writer.as_mut())
    }

    /// Lets go of the rings, and gives back what would have been delivered again.
    pub(super) fn detach(&mut self) -> Option<Box<Content>> {
        self.reader = None;
        self.writer = None;
        self.deferred.take()
    }

    fn run(
        &mut self,
        channel: &Channel,
        level: Level,
        budget: &mut u32,
    ) -> Result<Outcome, ChannelError> {
        let shared = channel.shared();
        let mut first = true;
        loop {
            let Some(reader) = self.reader.as_ref() else {
                return Ok(Outcome::Done);
            };
            if shared.delivery.get() == Delivery::Off {
                return Ok(Outcome::Done);
            }
            reader.mask()?;
            // An interrupt also means that there may be room for what waits to be sent.
            let sent = channel.flush()?;

            let left = *budget;
            let mut delivered = 0;
            let stop = self.batch(channel, level, budget, &mut delivered);
            if delivered > 0 {
                shared.counters.packets_received.add(u64::from(delivered));
                if let Some(complete) = &shared.config.callbacks.processing_complete {
                    complete(channel, delivered);
                }
            }
            let taken = left - *budget;
            trace::fetch_ended(shared, taken, shared.config.batch_budget);
            if level == Level::Dispatch && shared.cpu_limit().is_some() {
                self.cpu.stop(shared.client.hypervisor.reference_time());
            }
            let stop = stop?;
            let Some(reader) = self.reader.as_mut() else {
                return Ok(Outcome::Done);
            };
            shared.signal_after_receive(reader.publish()?);

            if taken > 0 {
                shared.counters.batches.add(1);
            } else if first && !sent && stop == Stop::Empty && level == Level::Dispatch {
                shared.counters.spurious_events.add(1);
            }
            first = false;
            match stop {
                Stop::Empty => {
                    if !reader.unmask()? {
                        return Ok(Outcome::Done);
                    }
                }
                // The ring stays masked: nothing that the host could tell would change anything.
                Stop::Starved => {
                    shared.counters.quota_stops.add(1);
                    trace::quota_hit(shared);
                    return Ok(Outcome::Done);
                }
                Stop::Budget => {
                    shared.counters.budget_stops.add(1);
                    trace::budget_hit(shared);
                    return Ok(Outcome::Later);
                }
                Stop::CpuUsage => {
                    shared.counters.cpu_budget_stops.add(1);
                    trace::budget_hit(shared);
                    return Ok(Outcome::Later);
                }
                Stop::NeedsPassive => return Ok(Outcome::Later),
                Stop::Closed => return Ok(Outcome::Done),
            }
        }
    }

    /// Takes packets until there is a reason to stop.
    ///
    /// With a limit on the time at DISPATCH the clock is read before the batch and every [`PACKETS_PER_LOOK`] packets;
    /// without one nothing is looked at, per packet or otherwise.
    fn batch(
        &mut self,
        channel: &Channel,
        level: Level,
        budget: &mut u32,
        delivered: &mut u32,
    ) -> Result<Stop, ChannelError> {
        let shared = channel.shared();
        let limit = match level {
            Level::Dispatch => shared.cpu_limit(),
            Level::Passive => None,
        };
        let Some(percent) = limit else {
            return self.slice(channel, level, budget, 0, delivered);
        };
        loop {
            let now = shared.client.hypervisor.reference_time();
            if self.cpu.is_spent(now, percent) {
                return Ok(Stop::CpuUsage);
            }
            let end = budget.saturating_sub(PACKETS_PER_LOOK);
            let stop = self.slice(channel, level, budget, end, delivered)?;
            if stop != Stop::Budget || *budget == 0 {
                return Ok(stop);
            }
        }
    }

    /// Takes packets until the budget is down to `end`, or there is another reason to stop.
    fn slice(
        &mut self,
        channel: &Channel,
        level: Level,
        budget: &mut u32,
        end: u32,
        delivered: &mut u32,
    ) -> Result<Stop, ChannelError> {
        let shared = channel.shared();
        let passive = level == Level::Passive;
        loop {
            let delivery = shared.delivery.get();
            if delivery == Delivery::Off {
                return Ok(Stop::Closed);
            }
            if self.deferred.is_some() && delivery == Delivery::All {
                if !passive {
                    return Ok(Stop::NeedsPassive);
                }
                if let Some(content) = self.deferred.take() {
                    *budget = budget.saturating_sub(1);
                    if let Some(stop) = self.deliver(channel, content, level, delivered) {
                        return Ok(stop);
                    }
                    continue;
                }
            }
            let Some(reader) = &mut self.reader else {
                return Ok(Stop::Closed);
            };
            let Some(kind) = reader.next_kind()? else {
                return Ok(Stop::Empty);
            };
            if *budget <= end {
                return Ok(Stop::Budget);
            }
            if kind == Kind::COMPLETION {
                // No quota stands in the way of completions: the packets of the driver may wait for them.
                reader.read(&mut self.completion)?;
                *budget -= 1;
                trace::fetched(shared, true, self.completion.transaction_id());
                channel.complete_transaction(&mut self.completion);
                continue;
            }
            if delivery == Delivery::CompletionsOnly {
                return Ok(Stop::Closed);
            }
            if !passive && shared.passive.load(Ordering::Relaxed) {
                return Ok(Stop::NeedsPassive);
            }
            let content = match &mut self.spare {
                Some(_) if shared.quota.admits() => self.spare.take(),
                _ => self.admit(shared),
            };
            let Some(mut content) = content else {
                return Ok(Stop::Starved);
            };
            if let Err(error) = self.read(shared, &mut content) {
                self.spare = Some(content);
                return Err(error);
            }
            *budget -= 1;
            if let Some(stop) = self.deliver(channel, content, level, delivered) {
                return Ok(stop);
            }
        }
    }

    /// Copies the next packet out of the ring.
    #[inline]
    fn read(&mut self, shared: &Shared, content: &mut Content) -> Result<(), ChannelError> {
        let reader = self.reader.as_mut().ok_or(ChannelError::Disabled)?;
        reader.read(content)?;
        trace::fetched(shared, false, content.transaction_id());
        content.data = if shared.config.pipe {
            pipe::parse(content.payload())?
        } else {
            0..content.payload().len()
        };
        content.clear_context();
        content.opening = shared.opening.load(Ordering::Relaxed);
        Ok(())
    }

    /// A place for one more packet, if quota and memory allow one.
    #[cold]
    fn admit(&mut self, shared: &Shared) -> Option<Box<Content>> {
        shared.quota.admit(|| {
            let pooled = || shared.pool.lock(&*shared.client.hypervisor).take();
            self.spare.take().or_else(pooled)
        })
    }

    /// Hands one packet to the driver.
    #[inline]
    fn deliver(
        &mut self,
        channel: &Channel,
        content: Box<Content>,
        level: Level,
        delivered: &mut u32,
    ) -> Option<Stop> {
        let shared = channel.shared();
        let mut fate = Fate::Undecided;
        let packet = ReceivedPacket::new(channel, content, &mut fate, level);
        match &shared.config.callbacks.process_packet {
            Some(process) => process(channel, packet),
            None => packet.complete(&[]),
        }
        match fate {
            Fate::Completed(Some(content)) if self.spare.is_none() => {
                self.spare = Some(content);
                *delivered += 1;
                None
            }
            Fate::Completed(content) => {
                self.keep(shared, content);
                *delivered += 1;
                None
            }
            Fate::Held => {
                *delivered += 1;
                None
            }
            Fate::Deferred(content) => {
                shared.counters.deferrals.add(1);
                self.deferred = Some(content);
                Some(Stop::NeedsPassive)
            }
            Fate::Failed(content, reason) => {
                self.keep(shared, Some(content));
                *delivered += 1;
                shared.fail(ChannelError::Packet(reason));
                Some(Stop::Closed)
            }
            // Only a driver that forgets the value comes here; nobody else can complete it.
            Fate::Undecided => {
                shared.fail(ChannelError::Packet("the driver forgot a packet"));
                Some(Stop::Closed)
            }
        }
    }

    /// Puts a place where the next packet finds it.
    fn keep(&mut self, shared: &Shared, content: Option<Box<Content>>) {
        if let Some(content) = content
            && let Some(other) = self.spare.replace(content)
        {
            shared.recycle(other);
        }
    }
}
