//! The provider of a network card: a guest's netvsc is at the other end of its channels (spec netvsc.md).
//!
//! A [`Netvsp`] serves one channel. The primary one carries all control traffic and decides which channel a received frame
//! goes to; sub-channels carry frames only. What they have in common is behind one lock: all of them run on their host's thread.

mod control;
mod path;
mod receive;
mod send;

use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroU16;

use vmbus::protocol::{Guid, Status, interface};
use vmbus::ring::{Kind, PacketBuffer, PushError, RingError};

use self::control::Session;
use self::path::Path;
use self::receive::Queue;
use super::nic::Nic;
use super::nvsp::{self, Request, Traffic};
use super::rndis::Limits;
use crate::bus::Device;
use crate::channel::HostChannel;
use crate::provider::{Link, Provider};
use crate::sync::Mutex;

/// The shortest longest frame that a guest can negotiate, in bytes; also what it gets when it asks for nonsense.
pub(super) const MIN_FRAME: u32 = 1514;

/// The longest frame that a guest can negotiate, in bytes (spec netvsc.md 5).
pub const MAX_FRAME: u32 = 9216;

/// What the host says in answer to RNDIS INITIALIZE: OpenVMM's numbers, except that of bytes, which is true here.
pub(super) const LIMITS: Limits = Limits {
    max_packets: 8,
    max_transfer: send::MAX_MESSAGES as u32,
    alignment: 3,
};

/// How long a frame waits for room, at either end, in units of 100 ns. Then it is lost, as on any network, so that what does
/// not move holds up nothing else.
const PATIENCE: u64 = 1_000_000;

/// How long nothing must have happened for a guest to have let go of a card that is about to be taken away, in units of 100 ns:
/// longer than the 2 s for which Linux may put off a change of the link.
const QUIET: u64 = 25_000_000;

/// What the guest has done such that its channel is served no longer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    /// The ring is broken.
    Ring(RingError),
    /// The ring is too small for a packet that it has to take.
    RingTooSmall,
    /// What it sent is not what anybody sends here.
    Protocol(&'static str),
}

impl From<RingError> for Fault {
    fn from(error: RingError) -> Self {
        Self::Ring(error)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ring(error) => error.fmt(f),
            Self::RingTooSmall => f.write_str("a ring that is too small for the host's packets"),
            Self::Protocol(what) => f.write_str(what),
        }
    }
}

/// The room in the ring that a packet waits for, or `None` when it was written.
fn room(pushed: Result<(), PushError>) -> Result<Option<u32>, Fault> {
    match pushed {
        Ok(()) => Ok(None),
        Err(PushError::Full { need }) => Ok(Some(need)),
        Err(PushError::TooLarge { .. }) => Err(Fault::RingTooSmall),
        Err(PushError::Ring(error)) => Err(Fault::Ring(error)),
    }
}

/// What the channels of one card share.
struct Shared {
    nic: Arc<Nic>,
    /// How often the primary channel was opened.
    generation: u64,
    /// From the opening of the primary channel to its end.
    session: Option<Session>,
    /// One for each channel that the guest may have, by index.
    queues: Vec<Queue>,
}

impl Shared {
    fn wake(&self, index: usize) {
        let queue = self.queues.get(index);
        if let Some(link) = queue.and_then(|queue| queue.link.as_ref()) {
            link.wake();
        }
    }

    /// The indices of the open channels.
    fn open(&self) -> Vec<u32> {
        let all = (0..).zip(&self.queues);
        all.filter(|(_, queue)| queue.open)
            .map(|(index, _)| index)
            .collect()
    }
}

/// Serves a channel of a network card.
pub struct Netvsp {
    shared: Arc<Mutex<Shared>>,
    /// During which opening of the primary channel this one was offered, if it is a sub-channel.
    generation: Option<u64>,
    path: Path,
    deadline: Option<u64>,
    /// When something was under way last, once the card is about to be taken away.
    busy_at: Option<u64>,
    failed: bool,
}

impl Netvsp {
    /// The provider of this card's primary channel. It offers sub-channels when the guest asks for them.
    pub fn new(nic: Arc<Nic>) -> Self {
        let shared = Shared {
            nic,
            generation: 0,
            session: None,
            queues: alloc::vec![Queue::default()],
        };
        Self {
            shared: Arc::new(Mutex::new(shared)),
            generation: None,
            path: Path::new(0),
            deadline: None,
            busy_at: None,
            failed: false,
        }
    }

    /// The device to offer for a card.
    pub const fn device(instance: Guid) -> Device {
        Device::new(interface::NETWORK, instance)
    }

    fn is_primary(&self) -> bool {
        self.generation.is_none()
    }

    fn try_serve(&mut self, now: u64, channel: &mut HostChannel) -> Result<(), Fault> {
        let shared = self.shared.clone();
        let mut shared = shared.lock();
        if self.generation.is_some_and(|own| own != shared.generation) {
            return Ok(());
        }
        let nic = shared.nic.clone();
        self.take_packets(&mut shared, channel)?;
        let left_some = !self.path.has_room();
        let mut deadline = None;
        if self.is_primary() {
            self.keep_house(&mut shared)?;
            deadline = receive::distribute(&mut shared, now);
        }
        let flushed = self.path.flush(&mut shared, now, channel)?;
        if self.is_primary() {
            // The network may have room again.
            for index in 1..shared.queues.len() {
                let queue = shared.queues.get_mut(index);
                if queue.is_some_and(|queue| core::mem::take(&mut queue.send_blocked)) {
                    shared.wake(index);
                }
            }
        } else if let Some(queue) = shared.queues.get_mut(usize::from(self.path.index)) {
            queue.send_blocked = self.path.is_blocked();
        }
        // What is left in the ring has nobody who signals it. While there is no room, the network or the ring will tell.
        let rest = (left_some && self.path.has_room()).then_some(now + 1);
        self.deadline = [deadline, flushed, rest].into_iter().flatten().min();
        nic.rest();
        Ok(())
    }

    /// Takes the guest's packets, as long as what comes of them has room.
    fn take_packets(
        &mut self,
        shared: &mut Shared,
        channel: &mut HostChannel,
    ) -> Result<(), Fault> {
        let nic = shared.nic.clone();
        let mut packet = PacketBuffer::default();
        while self.path.has_room() && channel.receive(&mut packet)? {
            let Some(session) = &mut shared.session else {
                return Ok(());
            };
            if packet.kind() == Kind::COMPLETION {
                for index in self.path.completed(&nic, session, &packet) {
                    shared.wake(usize::from(index));
                }
                continue;
            }
            let request = Request::parse(packet.payload());
            let request =
                request.map_err(|_| Fault::Protocol("an NVSP message that is too short"))?;
            match request {
                Request::RndisPacket { traffic, section }
                    if self.is_primary() || traffic == Traffic::DATA =>
                {
                    let taken = send::Taken {
                        packet: &packet,
                        traffic,
                        section,
                    };
                    self.path.take(&nic, session, channel, &taken)?;
                }
                request if self.is_primary() => {
                    session.handle(&mut self.path, channel, &packet, request)?;
                }
                _ => {
                    return Err(Fault::Protocol(
                        "something else than frames on a sub-channel",
                    ));
                }
            }
        }
        Ok(channel.release()?)
    }

    /// What the primary channel does besides packets.
    fn keep_house(&mut self, shared: &mut Shared) -> Result<(), Fault> {
        let open = shared.open();
        let nic = shared.nic.clone();
        let Some(session) = &mut shared.session else {
            return Ok(());
        };
        session.announce(&nic, &mut self.path)?;
        if session.wants_send_table(open.len()) {
            self.path.tell(nvsp::send_indirection_table(&open));
        }
        if let Some(count) = session.take_granted() {
            self.offer_sub_channels(shared, count);
        }
        Ok(())
    }

    fn offer_sub_channels(&self, shared: &mut Shared, count: u16) {
        let link = shared.queues.first().and_then(|queue| queue.link.clone());
        let Some(link) = link else { return };
        for index in (1..=count).filter_map(NonZeroU16::new) {
            shared.queues.push(Queue::default());
            let provider = Self {
                shared: self.shared.clone(),
                generation: Some(shared.generation),
                path: Path::new(index.get()),
                deadline: None,
                busy_at: None,
                failed: false,
            };
            link.add_sub_channel(index, Box::new(provider));
        }
    }

    /// Forgets everything of the guest that had the channel before.
    fn start_over(&mut self) {
        self.path = Path::new(self.path.index);
        self.deadline = None;
        self.busy_at = None;
        self.failed = false;
    }
}

impl Provider for Netvsp {
    fn attached(&mut self, link: Link) {
        let mut shared = self.shared.lock();
        if self.is_primary() {
            shared.nic.attach(link.clone());
        } else if self.generation != Some(shared.generation) {
            return;
        }
        if let Some(queue) = shared.queues.get_mut(usize::from(self.path.index)) {
            queue.link = Some(link);
        }
    }

    fn opened(&mut self, _channel: &mut HostChannel) -> Status {
        self.start_over();
        let mut shared = self.shared.lock();
        if self.is_primary() {
            shared.generation += 1;
            shared.queues.truncate(1);
            shared.session = Some(Session::new(shared.nic.clone()));
        } else if self.generation != Some(shared.generation) {
            return Status::UNSUCCESSFUL;
        }
        if let Some(queue) = shared.queues.get_mut(usize::from(self.path.index)) {
            queue.reset(true);
        }
        if !self.is_primary() {
            shared.wake(0);
        }
        Status::SUCCESS
    }

    fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        if self.failed {
            return;
        }
        if let Err(fault) = self.try_serve(now, channel) {
            self.shared.lock().nic.fail(fault.to_string());
            self.failed = true;
            self.deadline = None;
        }
    }

    /// The link goes down, upon which a guest sends no more. What it has sent is answered, and it gives back what it has got:
    /// Linux waits for the one and the other for ever once the card is away.
    fn leave(&mut self, now: u64, channel: &mut HostChannel) -> bool {
        self.shared.lock().nic.leave();
        self.serve(now, channel);
        if self.failed {
            return true;
        }
        let idle = self.path.is_idle() && channel.is_drained().unwrap_or(true);
        if self.busy_at.is_none() || !idle {
            self.busy_at = Some(now);
        }
        let busy_at = self.busy_at.unwrap_or(now);
        now.saturating_sub(busy_at) >= QUIET
    }

    fn closed(&mut self) {
        let lent = self.path.outstanding();
        self.start_over();
        let mut shared = self.shared.lock();
        if self.is_primary() {
            shared.session = None;
            // Hosts whose sub-channels end with the primary one have done this already.
            for link in shared
                .queues
                .iter()
                .skip(1)
                .filter_map(|queue| queue.link.as_ref())
            {
                link.rescind();
            }
            shared.queues.truncate(1);
            if let Some(queue) = shared.queues.first_mut() {
                queue.reset(false);
            }
        } else if self.generation == Some(shared.generation) {
            // The guest is done with what came by this channel, since it has closed it.
            if let Some(session) = &mut shared.session {
                for pieces in lent {
                    session.take_back(&pieces);
                }
            }
            if let Some(queue) = shared.queues.get_mut(usize::from(self.path.index)) {
                queue.reset(false);
            }
            shared.wake(0);
        }
    }

    fn deadline(&self) -> Option<u64> {
        self.deadline
    }
}

impl fmt::Debug for Netvsp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Netvsp(channel {})", self.path.index)
    }
}
