//! The way of frames to the guest: which of them it gets, by which channel, and the pieces of the receive buffer that they lie in.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use super::control::Session;
use super::{PATIENCE, Shared};
use crate::bus::Access;
use crate::channel::HostChannel;
use crate::memory::{AccessError, MappedGpadl};
use crate::network::nic::Nic;
use crate::network::nvsp::{CAPABILITY_8021Q, Layout};
use crate::network::offload::{Headers, VLAN, strip_tag, verify_checksums};
use crate::network::rndis::{Facts, ReceiveChecksum};
use crate::provider::Link;
use vmbus::ids::GpadlHandle;

/// Frames that are taken from the network before the guest's packets have their turn again.
const BURST: usize = 256;

/// Frames that wait for one channel at most.
const WAITING: usize = 512;

/// Pieces of the receive buffer that are for control messages alone.
const CONTROL_PIECES: usize = 16;

/// Bytes of a piece besides the frame: as in OpenVMM, more than RNDIS needs.
const PIECE_OVERHEAD: u32 = 256 + 36;

/// The largest receive buffer in bytes (spec netvsc.md 5).
const MAX_BUFFER: usize = 31 << 20;

/// A frame on its way to the guest.
#[derive(Debug)]
pub(super) struct Inbound {
    pub(super) frame: Vec<u8>,
    pub(super) facts: Facts,
}

/// What the host knows of one of the card's channels.
#[derive(Default)]
pub(super) struct Queue {
    pub(super) link: Option<Link>,
    pub(super) open: bool,
    /// Frames that wait for the channel.
    pub(super) frames: VecDeque<Inbound>,
    /// Frames have waited for too long: more of them are lost at once, until it moves again.
    stuck: bool,
    /// It waits for room in the network.
    pub(super) send_blocked: bool,
}

impl Queue {
    /// The channel is opened or closed.
    pub(super) fn reset(&mut self, open: bool) {
        *self = Self {
            link: self.link.take(),
            open,
            ..Self::default()
        };
    }

    /// Takes the next frame.
    pub(super) fn pop(&mut self) -> Option<Inbound> {
        self.stuck = false;
        self.frames.pop_front()
    }
}

/// A frame for a channel whose queue is full.
#[derive(Debug)]
pub(super) struct Held {
    queue: usize,
    inbound: Inbound,
    since: u64,
}

impl Held {
    /// The channel that it waits for.
    pub(super) fn queue(&self) -> usize {
        self.queue
    }
}

/// The guest's receive buffer.
#[derive(Debug)]
pub(super) struct ReceiveBuffer {
    memory: MappedGpadl,
    /// The transfer page set.
    pub(super) id: u16,
    pub(super) layout: Layout,
    /// Which buffer of the session it is.
    epoch: u64,
    /// Pieces that the host may write to.
    free: Vec<u32>,
    /// Channels that wait for a piece.
    waiting: Vec<u16>,
}

/// Pieces of a receive buffer that the guest has, or is about to get.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub(super) struct Pieces {
    /// Which buffer of the session they are of.
    pub(super) epoch: u64,
    pub(super) list: Vec<u32>,
}

/// What a piece is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Use {
    /// A frame.
    Frame,
    /// A control message, which the guest may wait for.
    Control,
}

impl ReceiveBuffer {
    /// Divides the buffer that the guest lends, for frames of at most `frame` bytes. `None` when it is not lent, or of no use.
    pub(super) fn new(
        channel: &HostChannel,
        gpadl: u32,
        id: u16,
        frame: u32,
        epoch: u64,
    ) -> Option<Self> {
        let memory = channel.map_gpadl(GpadlHandle(gpadl), Access::ReadWrite);
        let memory = memory.ok().filter(|memory| memory.len() <= MAX_BUFFER)?;
        let piece = PIECE_OVERHEAD.checked_add(frame)?;
        let count = memory.len().checked_div(piece as usize)?;
        if count < 2 * CONTROL_PIECES {
            return None;
        }
        let count = u32::try_from(count).ok()?;
        Some(Self {
            memory,
            id,
            layout: Layout { piece, count },
            epoch,
            // The lowest first, which keeps the pages in use few.
            free: (0..count).rev().collect(),
            waiting: Vec::new(),
        })
    }

    /// A free piece. Without one the channel will be woken when there is.
    pub(super) fn take(&mut self, channel: u16, what: Use) -> Option<u32> {
        let kept = match what {
            Use::Frame => CONTROL_PIECES,
            Use::Control => 0,
        };
        if self.free.len() <= kept {
            if !self.waiting.contains(&channel) {
                self.waiting.push(channel);
            }
            return None;
        }
        self.free.pop()
    }

    /// The guest is done with these pieces. Returns the channels that waited for them.
    pub(super) fn put_back(&mut self, pieces: &Pieces) -> Vec<u16> {
        if !self.has(pieces) {
            return Vec::new();
        }
        self.free.extend_from_slice(&pieces.list);
        core::mem::take(&mut self.waiting)
    }

    /// Whether these are pieces of this buffer, not of one before it.
    pub(super) fn has(&self, pieces: &Pieces) -> bool {
        self.epoch == pieces.epoch
    }

    /// Pieces of this buffer.
    pub(super) fn pieces(&self, list: Vec<u32>) -> Pieces {
        let epoch = self.epoch;
        Pieces { epoch, list }
    }

    /// Where a piece begins, in bytes.
    pub(super) fn offset(&self, piece: u32) -> u32 {
        piece.saturating_mul(self.layout.piece)
    }

    /// Writes an RNDIS message to a piece.
    pub(super) fn write(&self, piece: u32, message: &[u8]) -> Result<(), AccessError> {
        if message.len() > self.layout.piece as usize {
            return Err(AccessError::OutOfBounds);
        }
        self.memory.write(self.offset(piece) as usize, message)
    }
}

/// Brings frames of the network to the channels that they are for. Returns when it wants to do so again.
pub(super) fn distribute(shared: &mut Shared, now: u64) -> Option<u64> {
    let nic = shared.nic.clone();
    let next = nic.backend().pass(now);
    for _ in 0..BURST {
        let session = shared.session.as_mut()?;
        let (queue, inbound, since) = match session.held.take() {
            Some(held) => (held.queue, held.inbound, held.since),
            None => {
                let Some(frame) = nic.receive() else {
                    return nic.backend().pass(now).or(next);
                };
                let Some((queue, inbound)) = classify(&nic, session, frame) else {
                    continue;
                };
                (queue, inbound, now)
            }
        };
        let is_open = shared.queues.get(queue).is_some_and(|queue| queue.open);
        let index = if is_open { queue } else { 0 };
        let queue = shared.queues.get_mut(index)?;
        if queue.frames.len() < WAITING {
            queue.frames.push_back(inbound);
            if queue.frames.len() == 1 && index != 0 {
                shared.wake(index);
            }
        } else if queue.stuck || now.saturating_sub(since) >= PATIENCE {
            queue.stuck = true;
            nic.counters.received_dropped.one();
        } else {
            session.held = Some(Held {
                queue: index,
                inbound,
                since,
            });
            return Some(since + PATIENCE);
        }
    }
    Some(now + 1)
}

/// What the guest gets of a frame, and by which channel. `None` when it does not get it.
fn classify(nic: &Nic, session: &Session, mut frame: Vec<u8>) -> Option<(usize, Inbound)> {
    let counters = &nic.counters;
    let adapter = session.adapter.as_ref();
    let wanted = adapter.filter(|adapter| nic.link_up() && adapter.wants(&frame));
    let Some(adapter) = wanted else {
        counters.received_filtered.one();
        return None;
    };
    let out_of_band = session.has_capability(CAPABILITY_8021Q);
    let vlan = out_of_band.then(|| strip_tag(&mut frame)).flatten();
    let tag = if out_of_band { 0 } else { VLAN };
    if frame.len() > session.frame() as usize + tag {
        counters.received_oversized.one();
        return None;
    }
    let headers = Headers::find(&frame);
    let mut facts = Facts {
        vlan,
        ..Facts::default()
    };
    let mut queue = 0;
    if let Some(headers) = &headers {
        if adapter.offloads().receives_checksums() {
            facts.checksum = verify_checksums(&frame, headers)
                .map(|found| ReceiveChecksum(found.0 & adapter.offloads().receive_mask(headers.ip)))
                .filter(|found| found.0 != 0);
        }
        if let Some(rss) = adapter.rss() {
            facts.hash = rss.hash(&frame, headers);
            queue = facts.hash.map_or(0, |hash| rss.queue(hash));
        }
    }
    Some((usize::from(queue), Inbound { frame, facts }))
}
