//! Raw mode, "queue management suppressed": the driver reads and writes the rings itself (spec kmcl.md 6.1, 1).
//!
//! No dispatcher, no packets of the library, no quota: an interrupt only runs the driver's
//! [`on_signal`](super::ChannelBuilder::queue_management_suppressed), and [`Channel::raw`] gives access to both rings.
//! Opening, closing and the state changes are as for any channel.

use core::fmt;
use core::ops::ControlFlow;
use core::sync::atomic::Ordering;

use super::ChannelError;
use super::channel::{Channel, Shared};
use super::dispatcher::Delivery;
use super::sender::POLL_INTERVAL;
use super::trace;
use crate::hypervisor::Level;
use crate::ring::{
    Head, Kind, Outgoing, PacketBuffer, PushError, Reader, RingError, Room, Signal, Writer,
};

/// What runs at every signal of the host.
pub(super) type OnSignal = dyn Fn(&Channel) + Send + Sync;

/// Both rings of a channel in raw mode, for the time of one [`Channel::raw`].
pub struct RawRings<'a> {
    shared: &'a Shared,
    reader: &'a mut Reader,
    writer: &'a mut Writer,
}

/// A packet to write in raw mode. It holds all its data: memory is lent to the host only by packets whose end the library sees.
#[derive(Clone, Copy, Debug)]
pub struct RawPacket<'a>(Outgoing<'a>);

/// Why the rings could not be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RawError {
    /// The channel was not built for raw mode.
    NotRaw,
    /// The channel is not open: there are no rings between the closed callback and the next started callback.
    NotOpen,
    /// Somebody else has the rings, on another VP or below this interrupt. When that one is done,
    /// `on_signal` runs once more, at PASSIVE.
    Busy,
    /// The outgoing ring has no room now for the packet.
    Full {
        /// The free bytes that it needs.
        need: u32,
    },
    /// The packet does not fit the outgoing ring even when that is empty.
    TooLarge {
        /// The free bytes that it would need.
        need: u64,
        /// The most that any packet may need.
        limit: u32,
    },
    /// A ring is broken. The channel is being closed for that reason.
    Ring(RingError),
}

impl fmt::Display for RawError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRaw => f.write_str("the channel is not in raw mode"),
            Self::NotOpen => f.write_str("the channel is not open"),
            Self::Busy => f.write_str("somebody else has the rings"),
            Self::Full { need } => PushError::Full { need: *need }.fmt(f),
            Self::TooLarge { need, limit } => PushError::TooLarge {
                need: *need,
                limit: *limit,
            }
            .fmt(f),
            Self::Ring(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for RawError {}

impl<'a> RawPacket<'a> {
    /// A message, or an event of a protocol of the driver's own.
    pub fn in_band(payload: &'a [u8]) -> Self {
        Self(Outgoing::in_band([payload, &[]]))
    }

    /// The completion of a packet that was read, with that packet's transaction id.
    pub fn completion(transaction_id: u64, payload: &'a [u8]) -> Self {
        Self(Outgoing::completion(transaction_id, payload))
    }

    /// Asks the host for a completion with this transaction id. The id comes back as the host's word.
    pub fn with_completion(self, transaction_id: u64) -> Self {
        Self(self.0.with_completion(transaction_id))
    }
}

impl Channel {
    /// Gives the rings of a channel in raw mode to `work`, and [publishes](RawRings::publish) afterwards what it has done. At
    /// DISPATCH or PASSIVE, after the first started callback until the closed callback.
    ///
    /// Nobody waits: one at a time has the rings. Keep the work short, and do not call this inside it.
    ///
    /// # Errors
    ///
    /// Those of `work`, and [`RawError::NotRaw`], [`RawError::NotOpen`], [`RawError::Busy`]. A ring error fails the channel.
    pub fn raw<R>(
        &self,
        work: impl FnOnce(&mut RawRings<'_>) -> Result<R, RawError>,
    ) -> Result<R, RawError> {
        let shared = self.shared();
        if shared.config.callbacks.on_signal.is_none() {
            return Err(RawError::NotRaw);
        }
        let level = shared.client.hypervisor.current_level();
        let taken = shared.receive.enter(|side| {
            if shared.delivery.get() == Delivery::Off {
                return Err(RawError::NotOpen);
            }
            let (reader, writer) = side.raw().ok_or(RawError::NotOpen)?;
            let mut rings = RawRings {
                shared,
                reader,
                writer,
            };
            let result = shared.as_runner(&shared.rings_runner, level, || work(&mut rings));
            rings.publish()?;
            result
        });
        let taken = taken.ok_or(RawError::Busy)?;
        if taken.asked {
            shared.defer();
        }
        taken.result
    }

    /// Runs the driver's callback for a signal.
    pub(super) fn run_on_signal(&self, on_signal: &OnSignal, level: Level) {
        let shared = self.shared();
        if level == Level::Dispatch && shared.passive.load(Ordering::Relaxed) {
            return shared.defer();
        }
        shared.signals.run(|()| {
            if shared.delivery.get() == Delivery::All {
                shared.counters.batches.add(1);
                shared.in_batch(level, || on_signal(self));
            }
            ControlFlow::Continue(())
        });
    }
}

impl RawRings<'_> {
    /// What is next in the incoming ring: read once, checked, and left there. `None` when the ring is empty.
    pub fn peek(&mut self) -> Result<Option<Head>, RawError> {
        self.reader.peek().map_err(|error| fail(self.shared, error))
    }

    /// Copies the next packet into private memory and moves behind it. `false` when the ring is empty.
    pub fn read(&mut self, packet: &mut PacketBuffer) -> Result<bool, RawError> {
        let found = self
            .reader
            .read(packet)
            .map_err(|error| fail(self.shared, error))?;
        if found {
            let is_completion = packet.kind() == Kind::COMPLETION;
            trace::fetched(self.shared, is_completion, packet.transaction_id());
            let counters = &self.shared.counters;
            if is_completion {
                counters.completions_received.add(1);
            } else {
                counters.packets_received.add(1);
            }
        }
        Ok(found)
    }

    /// Writes one packet behind those written before. The host sees it after [`publish`](Self::publish).
    pub fn write(&mut self, packet: &RawPacket<'_>) -> Result<(), RawError> {
        self.writer.push(&packet.0).map_err(|error| match error {
            PushError::Full { need } => RawError::Full { need },
            PushError::TooLarge { need, limit } => RawError::TooLarge { need, limit },
            PushError::Ring(error) => fail(self.shared, error),
        })?;
        self.shared.counters.packets_sent.add(1);
        trace::sent(self.shared, 1);
        Ok(())
    }

    /// Shows the host what has been written, gives it the room of what has been read, and signals it
    /// if it waits for either.
    pub fn publish(&mut self) -> Result<(), RawError> {
        let ends = self
            .writer
            .publish()
            .and_then(|written| Ok((written, self.reader.publish()?)));
        let (written, read) = ends.map_err(|error| fail(self.shared, error))?;
        // One signal says both.
        if written == Signal::Needed || read == Signal::Needed {
            self.shared.signal_host();
        }
        Ok(())
    }

    /// Asks the host for no signals about new packets until [`unmask`](Self::unmask).
    pub fn mask(&mut self) -> Result<(), RawError> {
        self.reader.mask().map_err(|error| fail(self.shared, error))
    }

    /// Asks for signals again, and looks once more: `true` means that packets have come meanwhile for which no signal
    /// may follow, so go on reading.
    pub fn unmask(&mut self) -> Result<bool, RawError> {
        self.reader
            .unmask()
            .map_err(|error| fail(self.shared, error))
    }

    /// Publishes, and has `on_signal` run once `need` bytes are free in the outgoing ring. `true` means that they are free by now, and
    /// nothing will follow.
    pub fn wait_for_room(&mut self, need: u32) -> Result<bool, RawError> {
        self.publish()?;
        let found = self.writer.wait_for(need).and_then(|room| {
            let polled = room == Room::Awaited && !self.reader.producer_signals_room()?;
            Ok((room, polled))
        });
        let (room, polled) = found.map_err(|error| fail(self.shared, error))?;
        if room == Room::Awaited {
            self.shared.counters.ring_full_waits.add(1);
        }
        if polled {
            let client = &self.shared.client;
            let at = client
                .hypervisor
                .reference_time()
                .saturating_add(POLL_INTERVAL);
            self.shared.poll_at.store(at, Ordering::Relaxed);
            client.notify();
        }
        Ok(room == Room::Available)
    }

    /// Withdraws what [`wait_for_room`](Self::wait_for_room) asked.
    pub fn stop_waiting(&mut self) -> Result<(), RawError> {
        self.shared.poll_at.store(u64::MAX, Ordering::Relaxed);
        self.writer
            .stop_waiting()
            .map_err(|error| fail(self.shared, error))
    }
}

/// Fails the channel for a broken ring.
fn fail(shared: &Shared, error: RingError) -> RawError {
    shared.delivery.restrict(Delivery::Off);
    shared.fail(ChannelError::Ring(error));
    RawError::Ring(error)
}

impl fmt::Debug for RawRings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RawRings")
            .field("reader", &self.reader)
            .field("writer", &self.writer)
            .finish_non_exhaustive()
    }
}
