//! Faults on request, for every provider: what a channel loses, delays and spoils between a provider and its guest.
//!
//! A [`ChannelFaults`] belongs to a device and covers its sub-channels, too. The provider does not know of it: its
//! [`HostChannel`](crate::channel::HostChannel) asks for every packet. Which packets are hit is a matter of counting, so that a run can be repeated.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use vmbus::ring::OwnedPacket;

use crate::provider::Link;
use crate::sync::Mutex;

/// Which way packets go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// What the guest sends; a packet that is lost never gets its completion.
    FromGuest,
    /// What the provider sends.
    ToGuest,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChannelFault {
    /// The packet is lost.
    Drop,
    /// The packet comes later by this time, in units of 100 ns, and others overtake it.
    Delay(u64),
    /// The packet has at most this many bytes of data. To the guest only.
    Truncate(usize),
    /// The packet has this many bytes more, all ones. To the guest only.
    Extend(usize),
    /// The transaction id is another: these bits are flipped. To the guest only.
    TransactionId(u64),
    /// Bits of the data's byte `at` are flipped: ids, lengths and offsets of the device's own protocol. To the guest only.
    Spoil {
        /// Which byte.
        at: usize,
        /// Which bits of it.
        bits: u8,
    },
    /// The provider's offset in the ring's control page says nonsense from the packet on, until the channel is opened again. From the guest, that is how far the
    /// host has read; to the guest, how far it has written.
    CorruptRing,
    /// The ring stands still until the faults are cleared: nothing is read, or nobody is signalled.
    Stall,
    /// The channel is taken away before the packet.
    Rescind,
}

impl ChannelFault {
    /// Whether the fault makes sense in this direction.
    pub const fn fits(self, direction: Direction) -> bool {
        match self {
            Self::Drop | Self::Delay(_) | Self::CorruptRing | Self::Stall | Self::Rescind => true,
            Self::Truncate(_) | Self::Extend(_) | Self::TransactionId(_) | Self::Spoil { .. } => {
                matches!(direction, Direction::ToGuest)
            }
        }
    }
}

/// Which packets meet a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChannelRule {
    /// Those that go this way.
    pub direction: Direction,
    /// So many pass unharmed first.
    pub skip: u64,
    /// So many meet it then; every one when `None`.
    pub count: Option<u64>,
    /// What happens to them.
    pub fault: ChannelFault,
}

impl ChannelRule {
    /// Every packet that goes this way, until cleared.
    pub const fn always(direction: Direction, fault: ChannelFault) -> Self {
        Self {
            direction,
            skip: 0,
            count: None,
            fault,
        }
    }

    /// The next packet that goes this way.
    pub const fn once(direction: Direction, fault: ChannelFault) -> Self {
        Self {
            direction,
            skip: 0,
            count: Some(1),
            fault,
        }
    }
}

/// A fault that makes no sense for packets in this direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WrongDirection(pub ChannelFault);

impl fmt::Display for WrongDirection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} can only happen to what the host sends to the guest",
            self.0
        )
    }
}

impl core::error::Error for WrongDirection {}

/// The faults of a device. Clones are the same.
#[derive(Clone, Default)]
pub struct ChannelFaults(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Whether there are any rules: what a channel without faults looks at.
    any: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rules: Vec<ChannelRule>,
    hits: u64,
    /// The device's channels, primary first.
    links: Vec<Link>,
}

impl ChannelFaults {
    /// Adds a rule. Of several that fit a packet the first one is used.
    ///
    /// # Errors
    /// [`WrongDirection`] when the fault cannot happen that way.
    pub fn inject(&self, rule: ChannelRule) -> Result<(), WrongDirection> {
        if !rule.fault.fits(rule.direction) {
            return Err(WrongDirection(rule.fault));
        }
        self.0.state.lock().rules.push(rule);
        self.0.any.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Nothing goes wrong from now on, and what stood still goes on. Returns how many packets were hit so far.
    pub fn clear(&self) -> u64 {
        let mut state = self.0.state.lock();
        state.rules.clear();
        self.0.any.store(false, Ordering::SeqCst);
        let (hits, links) = (state.hits, state.links.clone());
        drop(state);
        links.iter().for_each(Link::wake);
        hits
    }

    /// How many packets were hit.
    pub fn hits(&self) -> u64 {
        self.0.state.lock().hits
    }

    pub(crate) fn attach(&self, link: Link) {
        self.0.state.lock().links.push(link);
    }

    pub(crate) fn detach(&self, gone: &Link) {
        let links = &mut self.0.state.lock().links;
        links.retain(|link| link.channel() != gone.channel());
    }

    /// Takes the device away.
    pub(crate) fn rescind(&self) {
        let primary = self.0.state.lock().links.first().cloned();
        if let Some(primary) = primary {
            primary.rescind();
        }
    }

    /// Whether the ring stands still.
    pub(crate) fn stalls(&self, direction: Direction) -> bool {
        self.0.any.load(Ordering::SeqCst)
            && self.0.state.lock().rules.iter().any(|rule| {
                rule.direction == direction
                    && rule.fault == ChannelFault::Stall
                    && rule.skip == 0
                    && rule.count != Some(0)
            })
    }

    /// What happens to the next packet.
    pub(crate) fn next(&self, direction: Direction) -> Option<ChannelFault> {
        if !self.0.any.load(Ordering::SeqCst) {
            return None;
        }
        let mut state = self.0.state.lock();
        let mut hit = None;
        for rule in &mut state.rules {
            if rule.direction != direction || rule.count == Some(0) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if hit.is_none() && rule.fault != ChannelFault::Stall {
                rule.count = rule.count.map(|count| count - 1);
                hit = Some(rule.fault);
            }
        }
        state.rules.retain(|rule| rule.count != Some(0));
        state.hits += u64::from(hit.is_some());
        hit
    }
}

impl fmt::Debug for ChannelFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.0.state.lock().rules).finish()
    }
}

/// Changes a packet for the guest as the fault says; `false` when the fault is not of that kind.
pub(crate) fn alter(packet: &mut OwnedPacket, fault: ChannelFault) -> bool {
    match fault {
        ChannelFault::Truncate(length) => packet.payload.truncate(length),
        ChannelFault::Extend(more) => {
            let length = packet.payload.len().saturating_add(more);
            packet.payload.resize(length, 0xFF);
        }
        ChannelFault::TransactionId(bits) => packet.transaction_id ^= bits,
        ChannelFault::Spoil { at, bits } => {
            if let Some(byte) = packet.payload.get_mut(at) {
                *byte ^= bits;
            }
        }
        _ => return false,
    }
    true
}
