//! One channel's traffic: completions and transfer pages on their way to the guest, and what waits for room.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use vmbus::ring::{Outgoing, PacketBuffer, TransferPageList, TransferPageRange};

use super::control::Session;
use super::receive::{Pieces, ReceiveBuffer, Use};
use super::{Fault, PATIENCE, Shared, room};
use crate::channel::HostChannel;
use crate::network::nic::Nic;
use crate::network::nvsp::{self, Status, Traffic};
use crate::network::rndis;

/// Bytes of frames that wait for the network; beyond them the guest's packets stay in the ring.
const OUTBOX: usize = 1 << 20;

/// Bytes of frames that wait for the network in any case: one packet may make many frames of one, and those beyond this are
/// lost.
const OUTBOX_LIMIT: usize = 2 * OUTBOX;

/// Packets of the guest whose answers wait; beyond them likewise.
const ANSWERS: usize = 1024;

/// Control messages that wait for the guest. One that asks for more and takes none of them is served no longer.
const MESSAGES: usize = 128;

/// Frames in one transfer-page packet.
const RANGES: usize = 32;

/// How often to look for room in the ring of a guest that does not signal it, in units of 100 ns.
const POLL: u64 = 100_000;

/// The first transaction id of transfer-page packets.
const FIRST_TRANSACTION: u64 = 1;

/// Something that leaves the provider, in this order.
#[derive(Debug)]
pub(super) enum Out {
    /// A frame for the network.
    Frame(Vec<u8>),
    /// The completion of an RNDIS packet.
    Done(u64, Status),
    /// The answer to another packet.
    Answer(u64, Vec<u8>),
}

/// A transfer-page packet that has its pieces and waits for room in the ring.
#[derive(Debug)]
struct Ready {
    traffic: Traffic,
    list: TransferPageList,
    pieces: Pieces,
    frames: u64,
    bytes: u64,
}

/// The traffic of one channel.
#[derive(Debug)]
pub(super) struct Path {
    /// The channel's index: 0 is the primary one.
    pub(super) index: u16,
    /// Answers that wait for nothing but room in the ring.
    pub(super) answers: VecDeque<Out>,
    /// Frames that wait for the network, and behind them the answers to the packets that they were in.
    pub(super) outbox: VecDeque<Out>,
    pub(super) outbox_bytes: usize,
    /// Since when the network has had no room.
    pub(super) blocked_since: Option<u64>,
    /// Control messages for the guest.
    messages: VecDeque<Vec<u8>>,
    /// NVSP messages that nobody has asked for.
    told: VecDeque<Vec<u8>>,
    ready: Option<Ready>,
    /// Pieces of the receive buffer that the guest has, by transaction id.
    outstanding: BTreeMap<u64, Pieces>,
    next_transaction: u64,
    /// To build messages in.
    pub(super) scratch: Scratch,
}

/// Memory that is used over and over.
#[derive(Default, Debug)]
pub(super) struct Scratch {
    pub(super) gathered: Vec<u8>,
    pub(super) frame: Vec<u8>,
    pub(super) segment: Vec<u8>,
    message: Vec<u8>,
}

impl Path {
    pub(super) fn new(index: u16) -> Self {
        Self {
            index,
            answers: VecDeque::new(),
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            blocked_since: None,
            messages: VecDeque::new(),
            told: VecDeque::new(),
            ready: None,
            outstanding: BTreeMap::new(),
            next_transaction: FIRST_TRANSACTION,
            scratch: Scratch::default(),
        }
    }

    /// Whether there is room for what comes of another packet of the guest.
    pub(super) fn has_room(&self) -> bool {
        self.outbox_bytes < OUTBOX && self.outbox.len() + self.answers.len() < ANSWERS
    }

    /// Has a frame wait for room in the network. Returns whether there is room for it here.
    pub(super) fn keep(&mut self, frame: &[u8]) -> bool {
        let bytes = self.outbox_bytes.saturating_add(frame.len());
        let fits = bytes <= OUTBOX_LIMIT;
        if fits {
            self.outbox_bytes = bytes;
            self.outbox.push_back(Out::Frame(frame.to_vec()));
        }
        fits
    }

    /// Whether nothing is under way, in either direction.
    pub(super) fn is_idle(&self) -> bool {
        self.answers.is_empty()
            && self.outbox.is_empty()
            && self.messages.is_empty()
            && self.told.is_empty()
            && self.ready.is_none()
            && self.outstanding.is_empty()
    }

    /// Whether the guest is behind with its control messages.
    pub(super) fn is_behind(&self) -> bool {
        self.messages.len() >= MESSAGES / 2
    }

    /// Whether frames wait for room in the network.
    pub(super) fn is_blocked(&self) -> bool {
        self.outbox_bytes > 0
    }

    /// Answers a packet that asked for it, with `payload`.
    pub(super) fn answer(&mut self, packet: &PacketBuffer, payload: Vec<u8>) {
        if packet.completion_requested() {
            self.answers
                .push_back(Out::Answer(packet.transaction_id(), payload));
        }
    }

    /// Sends the guest an RNDIS message.
    pub(super) fn message(&mut self, message: Vec<u8>) -> Result<(), Fault> {
        if self.messages.len() >= MESSAGES {
            return Err(Fault::Protocol(
                "more control messages than it takes the answers of",
            ));
        }
        self.messages.push_back(message);
        Ok(())
    }

    /// Sends the guest an NVSP message. A newer one replaces those that it has not got yet.
    pub(super) fn tell(&mut self, message: Vec<u8>) {
        self.told.clear();
        self.told.push_back(message);
    }

    /// The guest has completed a transfer-page packet. Returns the channels that wait for its pieces.
    pub(super) fn completed(
        &mut self,
        nic: &Nic,
        session: &mut Session,
        packet: &PacketBuffer,
    ) -> Vec<u16> {
        let Some(pieces) = self.outstanding.remove(&packet.transaction_id()) else {
            nic.counters.stray_completions.one();
            return Vec::new();
        };
        nic.counters.transfers_completed.one();
        session.take_back(&pieces)
    }

    /// The receive buffer is no longer: nothing in it counts.
    pub(super) fn forget_pieces(&mut self) {
        self.outstanding.clear();
        self.ready = None;
    }

    /// Takes over all pieces of the receive buffer that this channel has.
    pub(super) fn outstanding(&mut self) -> Vec<Pieces> {
        let pieces = core::mem::take(&mut self.outstanding);
        let ready = self.ready.take().map(|ready| ready.pieces);
        pieces.into_values().chain(ready).collect()
    }

    /// Moves everything that can be. Returns when to try again, if nobody tells.
    pub(super) fn flush(
        &mut self,
        shared: &mut Shared,
        now: u64,
        channel: &mut HostChannel,
    ) -> Result<Option<u64>, Fault> {
        loop {
            let need = self.push_all(shared, now, channel)?;
            channel.publish()?;
            // Once that time is over frames are lost at once, and there is nothing to wait for.
            let blocked = self.blocked_since.filter(|_| self.is_blocked());
            let blocked = blocked.map(|since| since.saturating_add(PATIENCE));
            let Some(need) = need else {
                return Ok(blocked);
            };
            if !channel.wait_for_room(need)? {
                return Ok(Some(blocked.unwrap_or(u64::MAX).min(now + POLL)));
            }
        }
    }

    /// Writes all packets that there is room for. Returns the room that the next one needs, if there is not enough.
    fn push_all(
        &mut self,
        shared: &mut Shared,
        now: u64,
        channel: &mut HostChannel,
    ) -> Result<Option<u32>, Fault> {
        let nic = shared.nic.clone();
        if let Some(need) = self.push_outbox(&nic, now, channel)? {
            return Ok(Some(need));
        }
        while let Some(message) = self.told.front() {
            if let Some(need) = room(channel.push(&Outgoing::in_band([message, &[]])))? {
                return Ok(Some(need));
            }
            self.told.pop_front();
        }
        while self.prepare(shared)? {
            if let Some(need) = self.push_ready(&nic, shared, channel)? {
                return Ok(Some(need));
            }
        }
        Ok(None)
    }

    fn push_outbox(
        &mut self,
        nic: &Nic,
        now: u64,
        channel: &mut HostChannel,
    ) -> Result<Option<u32>, Fault> {
        loop {
            let is_answer = !self.answers.is_empty();
            let queue = if is_answer {
                &self.answers
            } else {
                &self.outbox
            };
            let Some(out) = queue.front() else {
                return Ok(None);
            };
            let pushed = match out {
                Out::Frame(frame) => {
                    let length = frame.len();
                    if nic.send(frame).is_ok() {
                        self.blocked_since = None;
                    } else {
                        let since = *self.blocked_since.get_or_insert(now);
                        if now.saturating_sub(since) < PATIENCE {
                            return Ok(None);
                        }
                        nic.counters.sent_dropped.one();
                    }
                    self.outbox_bytes = self.outbox_bytes.saturating_sub(length);
                    Ok(())
                }
                Out::Done(transaction, status) => {
                    let payload = nvsp::rndis_packet_complete(*status);
                    channel.push(&Outgoing::completion(*transaction, &payload))
                }
                Out::Answer(transaction, payload) => {
                    channel.push(&Outgoing::completion(*transaction, payload))
                }
            };
            if let Some(need) = room(pushed)? {
                return Ok(Some(need));
            }
            if is_answer {
                self.answers.pop_front();
            } else {
                self.outbox.pop_front();
            }
        }
    }

    /// Makes the next transfer-page packet ready. Returns whether there is one.
    fn prepare(&mut self, shared: &mut Shared) -> Result<bool, Fault> {
        if self.ready.is_some() {
            return Ok(true);
        }
        let Some(session) = &mut shared.session else {
            return Ok(false);
        };
        let Some(buffer) = &mut session.receive else {
            return Ok(false);
        };
        let gone = |_| Fault::Protocol("a receive buffer that is not there");
        if let Some(message) = self.messages.front() {
            let Some(piece) = buffer.take(self.index, Use::Control) else {
                return Ok(false);
            };
            buffer.write(piece, message).map_err(gone)?;
            let lengths = [message.len()];
            self.ready = Some(Ready::new(
                buffer,
                Traffic::CONTROL,
                [piece].into(),
                &lengths,
            ));
            self.messages.pop_front();
            return Ok(true);
        }
        let Some(queue) = shared.queues.get_mut(usize::from(self.index)) else {
            return Ok(false);
        };
        let (mut pieces, mut lengths, mut bytes) = (Vec::new(), Vec::new(), 0);
        while pieces.len() < RANGES && !queue.frames.is_empty() {
            let Some(piece) = buffer.take(self.index, Use::Frame) else {
                break;
            };
            pieces.push(piece);
            let Some(inbound) = queue.pop() else { break };
            let message = &mut self.scratch.message;
            rndis::write_packet(message, &inbound.frame, &inbound.facts);
            buffer.write(piece, message).map_err(gone)?;
            lengths.push(message.len());
            bytes += inbound.frame.len() as u64;
        }
        if pieces.is_empty() {
            return Ok(false);
        }
        let held = session.held.as_ref().map(super::receive::Held::queue);
        let ready = Ready::new(buffer, Traffic::DATA, pieces, &lengths);
        self.ready = Some(Ready { bytes, ..ready });
        if held == Some(usize::from(self.index)) {
            // There is room for it now.
            shared.wake(0);
        }
        Ok(true)
    }

    fn push_ready(
        &mut self,
        nic: &Nic,
        shared: &Shared,
        channel: &mut HostChannel,
    ) -> Result<Option<u32>, Fault> {
        let session = shared.session.as_ref();
        let buffer = session.and_then(|session| session.receive.as_ref());
        let is_there = |ready: &Ready| buffer.is_some_and(|buffer| buffer.has(&ready.pieces));
        let Some(ready) = self.ready.take().filter(is_there) else {
            return Ok(None);
        };
        let payload = nvsp::rndis_packet(ready.traffic);
        let version = shared.session.as_ref().and_then(|session| session.version);
        let length = nvsp::wire_size(version.unwrap_or(nvsp::Version::V1));
        let payload = payload.get(..length).unwrap_or(&payload);
        let id = self.next_transaction;
        let packet = Outgoing::transfer_pages(&ready.list, [payload, &[]]).with_completion(id);
        if let Some(need) = room(channel.push(&packet))? {
            self.ready = Some(ready);
            return Ok(Some(need));
        }
        self.next_transaction = id.wrapping_add(1);
        nic.counters.transfers_sent.one();
        nic.counters.received_frames.add(ready.frames);
        nic.counters.received_bytes.add(ready.bytes);
        self.outstanding.insert(id, ready.pieces);
        Ok(None)
    }
}

impl Ready {
    fn new(buffer: &ReceiveBuffer, traffic: Traffic, pieces: Vec<u32>, lengths: &[usize]) -> Self {
        let ranges: Vec<_> = pieces
            .iter()
            .zip(lengths)
            .map(|(piece, length)| TransferPageRange {
                // No message is longer than a piece.
                length: u32::try_from(*length).unwrap_or(u32::MAX),
                offset: buffer.offset(*piece),
            })
            .collect();
        Self {
            traffic,
            list: TransferPageList::new(buffer.id, &ranges),
            frames: match traffic {
                Traffic::DATA => ranges.len() as u64,
                _ => 0,
            },
            bytes: 0,
            pieces: buffer.pieces(pieces),
        }
    }
}
