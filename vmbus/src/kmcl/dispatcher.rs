//! The dispatcher: takes packets from the ring to the driver.
//!
//! There is one. It runs at DISPATCH from the channel's interrupt and at PASSIVE from the work queue; the level
//! is an argument. A batch ends when the ring is empty, the quota reached, the budget spent, or the driver
//! wants PASSIVE; whatever the end, processing-complete runs if there were packets, and then the
//! read position is published (design.md, A packet's way).

use core::sync::atomic::{Ordering, fence};

use super::ChannelError;
use super::channel::Channel;
use super::incoming::{Content, Fate, ReceivedPacket};
use super::pipe;
use crate::hypervisor::Level;
use crate::ring::{Kind, PacketBuffer, Reader};

/// The receiving half of a channel.
#[derive(Default)]
pub(super) struct ReceiveSide {
    reader: Option<Reader>,
    /// A buffer for the next packet, while the driver holds no other.
    spare: Option<PacketBuffer>,
    /// Where completions are read to.
    completion: PacketBuffer,
    /// A packet that is to be delivered again, before all others.
    deferred: Option<Content>,
}

/// Why a batch ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    Empty,
    /// The driver holds too many packets; the completion of one goes on.
    Starved,
    Budget,
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
        let mut budget = shared.config.batch_budget;
        shared.again.store(true, Ordering::SeqCst);
        loop {
            // Between "again" and the lock, here and after the lock: of two that meet, one sees the other.
            fence(Ordering::SeqCst);
            let Some(mut side) = shared.receive.try_lock() else {
                return;
            };
            shared.again.store(false, Ordering::SeqCst);
            let outcome = match side.run(self, level, &mut budget) {
                Ok(outcome) => outcome,
                Err(error) => {
                    shared.fail(error);
                    Outcome::Done
                }
            };
            drop(side);
            if outcome == Outcome::Later {
                shared.defer();
                return;
            }
            fence(Ordering::SeqCst);
            if !shared.again.load(Ordering::SeqCst) {
                return;
            }
        }
    }
}

impl ReceiveSide {
    pub(super) fn attach(&mut self, reader: Reader) {
        self.reader = Some(reader);
    }

    /// Lets go of the ring, and gives back what would have been delivered again.
    pub(super) fn detach(&mut self) -> Option<PacketBuffer> {
        self.reader = None;
        self.deferred.take().map(|content| content.buffer)
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
            if !shared.receiving.load(Ordering::SeqCst) {
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
            let stop = stop?;
            let Some(reader) = self.reader.as_mut() else {
                return Ok(Outcome::Done);
            };
            shared.signal_after_receive(reader.publish()?);

            if *budget != left {
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
                    return Ok(Outcome::Done);
                }
                Stop::Budget => {
                    shared.counters.budget_stops.add(1);
                    return Ok(Outcome::Later);
                }
                Stop::NeedsPassive => return Ok(Outcome::Later),
                Stop::Closed => return Ok(Outcome::Done),
            }
        }
    }

    /// Takes packets until there is a reason to stop.
    fn batch(
        &mut self,
        channel: &Channel,
        level: Level,
        budget: &mut u32,
        delivered: &mut u32,
    ) -> Result<Stop, ChannelError> {
        let shared = channel.shared();
        loop {
            if !shared.receiving.load(Ordering::SeqCst) {
                return Ok(Stop::Closed);
            }
            let passive = level == Level::Passive;
            let content = if let Some(content) = self.deferred.take_if(|_| passive) {
                content
            } else if self.deferred.is_some() {
                return Ok(Stop::NeedsPassive);
            } else {
                let Some(reader) = self.reader.as_mut() else {
                    return Ok(Stop::Closed);
                };
                let Some(head) = reader.peek()? else {
                    return Ok(Stop::Empty);
                };
                if *budget == 0 {
                    return Ok(Stop::Budget);
                }
                if head.kind() == Kind::COMPLETION {
                    // No quota stands in the way of completions: the packets of the driver may wait for them.
                    reader.read(&mut self.completion)?;
                    *budget -= 1;
                    let completion = &self.completion;
                    channel.complete_transaction(completion.transaction_id(), completion.payload());
                    continue;
                }
                if !passive && shared.passive.load(Ordering::SeqCst) {
                    return Ok(Stop::NeedsPassive);
                }
                let Some(mut buffer) = self.admit(channel) else {
                    return Ok(Stop::Starved);
                };
                let read = reader_of(&mut self.reader)?.read(&mut buffer);
                let data = match read {
                    Ok(_) if shared.config.pipe => pipe::parse(buffer.payload()),
                    Ok(_) => Ok(0..buffer.payload().len()),
                    Err(error) => Err(error.into()),
                };
                match data {
                    Ok(data) => Content { buffer, data },
                    Err(error) => {
                        self.spare = Some(buffer);
                        return Err(error);
                    }
                }
            };
            *budget = budget.saturating_sub(1);
            if let Some(stop) = self.deliver(channel, content, level, delivered) {
                return Ok(stop);
            }
        }
    }

    /// A buffer for one more packet, if quota and memory allow one.
    fn admit(&mut self, channel: &Channel) -> Option<PacketBuffer> {
        let shared = channel.shared();
        loop {
            let quota = shared.quota.load(Ordering::SeqCst);
            if shared.outstanding.load(Ordering::SeqCst) < quota {
                let pooled = || shared.pool.lock(&*shared.client.hypervisor).take();
                if let Some(buffer) = self.spare.take().or_else(pooled) {
                    return Some(buffer);
                }
            }
            // A completion lowers the count first and looks at the flag after; so the other way here.
            if shared.starved.swap(true, Ordering::SeqCst) {
                return None;
            }
        }
    }

    /// Hands one packet to the driver.
    fn deliver(
        &mut self,
        channel: &Channel,
        content: Content,
        level: Level,
        delivered: &mut u32,
    ) -> Option<Stop> {
        let shared = channel.shared();
        shared.outstanding.fetch_add(1, Ordering::SeqCst);
        let mut fate = Fate::Undecided;
        let packet = ReceivedPacket::new(channel, content, &mut fate, level);
        match &shared.config.callbacks.process_packet {
            Some(process) => process(channel, packet),
            None => packet.complete(&[]),
        }
        match fate {
            Fate::Completed(buffer) => {
                self.keep(channel, buffer);
                *delivered += 1;
                None
            }
            Fate::Held => {
                *delivered += 1;
                None
            }
            Fate::Deferred(content) => {
                shared.outstanding.fetch_sub(1, Ordering::SeqCst);
                shared.counters.deferrals.add(1);
                self.deferred = Some(content);
                Some(Stop::NeedsPassive)
            }
            Fate::Failed(buffer, reason) => {
                shared.outstanding.fetch_sub(1, Ordering::SeqCst);
                self.keep(channel, Some(buffer));
                *delivered += 1;
                shared.fail(ChannelError::Packet(reason));
                Some(Stop::Closed)
            }
            // Only a driver that forgets the value comes here; nobody else can complete it.
            Fate::Undecided => {
                shared.outstanding.fetch_sub(1, Ordering::SeqCst);
                shared.fail(ChannelError::Packet("the driver forgot a packet"));
                Some(Stop::Closed)
            }
        }
    }

    /// Puts a buffer where the next packet finds it.
    fn keep(&mut self, channel: &Channel, buffer: Option<PacketBuffer>) {
        if let Some(buffer) = buffer
            && let Some(other) = self.spare.replace(buffer)
        {
            channel.shared().recycle(other);
        }
    }
}

fn reader_of(reader: &mut Option<Reader>) -> Result<&mut Reader, ChannelError> {
    reader.as_mut().ok_or(ChannelError::Disabled)
}
