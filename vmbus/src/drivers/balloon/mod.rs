//! Dynamic memory: gives memory to the host when asked, and takes it back (spec balloon.md).
//!
//! [`Balloon`] is the driver: it moves bytes between a channel and [`protocol`], which has all the
//! logic and does no input or output.

pub mod message;
pub mod protocol;
pub mod ranges;

use alloc::boxed::Box;
use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use spin::Mutex;

pub use protocol::{Phase, Status, Version};
pub use ranges::PageRange;

use super::standing::Standing;
use crate::kmcl::{
    Channel, ChannelBuilder, Client, CompletionRoutine, ConfigError, OutgoingPacket,
    ReceivedPacket, interface,
};
use message::MAX_MESSAGE;
use protocol::Protocol;

/// Messages that may be on their way to the host.
const PACKETS: usize = 4;

/// Data pages per ring: room for a message of one page and a few small ones.
const RING_PAGES: usize = 4;

/// The memory of the guest, as the balloon needs it. Called at PASSIVE.
pub trait GuestMemory: Send + Sync {
    /// How much there is, and how much of it is in use.
    fn figures(&self) -> Figures;

    /// Takes free, contiguous pages: at most `wanted`, in a block of `block` pages aligned to its size (1 or 512)
    /// or more of them. `None` when there is no such block. The guest does not touch them again until they are given back.
    fn take(&self, wanted: u64, block: u64) -> Option<PageRange>;

    /// Gives back pages that were taken; their contents are undefined. Ranges may be split and merged.
    fn give_back(&self, range: PageRange);
}

/// How much memory the guest has, in pages of 4096 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Figures {
    /// All memory that the guest was given, ballooned pages included.
    pub total: u64,
    /// Free pages, ballooned ones not included.
    pub free: u64,
    /// Pages that are in use or promised, ballooned ones not included.
    pub committed: u64,
    /// Free pages that must stay free for the guest to live.
    pub reserve: u64,
}

/// The dynamic memory driver.
///
/// Give it its time: call [`service`](Self::service) at the [`deadline`](Self::deadline), and look at the deadline again
/// after each change of the [`Client`].
#[derive(Debug)]
pub struct Balloon {
    state: Arc<State>,
    channel: Standing,
}

/// What the callbacks share with the driver.
struct State {
    work: Mutex<Work>,
    memory: Arc<dyn GuestMemory>,
    packets: Arc<Packets>,
    /// When to look again, for those who must not take the lock; `u64::MAX` for never.
    deadline: AtomicU64,
}

/// What is used at PASSIVE only.
struct Work {
    protocol: Protocol,
    buffer: Box<[u8; MAX_MESSAGE]>,
    routine: Arc<CompletionRoutine>,
}

/// Whether there is a packet for the next message.
#[derive(Default)]
struct Packets {
    /// A message waits for a packet.
    wanted: AtomicBool,
    /// One has come back since.
    back: AtomicBool,
}

impl Balloon {
    /// Enables the driver: it serves the host's dynamic memory device, now or when it is offered.
    /// Called at PASSIVE.
    pub fn new(client: &Client, memory: Arc<dyn GuestMemory>) -> Result<Self, ConfigError> {
        let packets = Arc::new(Packets::default());
        let (returned, waiter) = (packets.clone(), client.clone());
        let routine: Arc<CompletionRoutine> = Arc::new(move |packet, _| {
            drop(packet);
            if returned.wanted.swap(false, Ordering::SeqCst) {
                returned.back.store(true, Ordering::SeqCst);
                waiter.notify();
            }
        });
        let state = Arc::new(State {
            work: Mutex::new(Work {
                protocol: Protocol::new(),
                buffer: Box::new([0; MAX_MESSAGE]),
                routine,
            }),
            memory,
            packets,
            deadline: AtomicU64::new(u64::MAX),
        });
        let [for_packets, for_start, for_close] = [state.clone(), state.clone(), state.clone()];
        let builder = ChannelBuilder::new(interface::DYNAMIC_MEMORY)
            .friendly_name("balloon")
            .ring_pages(RING_PAGES, RING_PAGES)
            .maximum_packet_size(MAX_MESSAGE)
            .maximum_packet_count(PACKETS)
            .transaction_quota(1)
            // Taking memory is nothing for an interrupt handler.
            .incoming_processing_at_passive()
            .process_packet_callbacks(
                move |channel, packet| for_packets.receive(channel, packet),
                |_, _| {},
            )
            .post_started(move |channel| {
                let now = channel.client().now();
                for_start.work.lock().protocol.start(now);
                for_start.pump(channel, now);
            })
            .closed(move |channel| {
                for_close.work.lock().protocol.stop();
                for_close.publish_deadline(channel);
            });
        let channel = Standing::new(client, interface::DYNAMIC_MEMORY, builder)?;
        Ok(Self { state, channel })
    }

    /// When to call [`service`](Self::service) next, in reference time; `None` when there is nothing to wait for.
    pub fn deadline(&self) -> Option<u64> {
        if self.state.packets.back.load(Ordering::SeqCst) {
            return Some(0);
        }
        Some(self.state.deadline.load(Ordering::SeqCst)).filter(|&at| at != u64::MAX)
    }

    /// Does what is due: status reports, time-outs, messages that waited for room. At PASSIVE.
    pub fn service(&self, now: u64) {
        self.state.packets.back.store(false, Ordering::SeqCst);
        self.state.work.lock().protocol.tick(now);
        self.state.pump(&self.channel.channel(), now);
    }

    /// How the protocol stands, and what the host has got. At PASSIVE.
    pub fn status(&self) -> Status {
        self.state.work.lock().protocol.status()
    }

    /// The channel.
    pub fn channel(&self) -> &Standing {
        &self.channel
    }
}

impl State {
    fn receive(&self, channel: &Channel, packet: ReceivedPacket<'_>) {
        let now = channel.client().now();
        self.work
            .lock()
            .protocol
            .receive(now, packet.payload(), &*self.memory);
        packet.complete(&[]);
        self.pump(channel, now);
    }

    /// Sends what the protocol has to say, as far as there are packets.
    fn pump(&self, channel: &Channel, now: u64) {
        let mut work = self.work.lock();
        let Work {
            protocol,
            buffer,
            routine,
        } = &mut *work;
        while protocol.has_message() {
            let Some(mut packet) = self.packet(channel) else {
                break;
            };
            packet.set_completion_routine(routine.clone());
            let Some(message) = protocol.poll_message(now, &*self.memory, buffer) else {
                break;
            };
            if let Err(error) = packet.send(message) {
                log::warn!("balloon: {error}");
                protocol.not_sent(message, &*self.memory);
                break;
            }
        }
        drop(work);
        self.publish_deadline(channel);
    }

    /// A packet; without one, the next that comes back has [`Balloon::service`] called.
    fn packet(&self, channel: &Channel) -> Option<OutgoingPacket> {
        if let Ok(packet) = channel.allocate_packet() {
            return Some(packet);
        }
        self.packets.wanted.store(true, Ordering::SeqCst);
        // One that came back in between woke nobody.
        let packet = channel.allocate_packet().ok()?;
        self.packets.wanted.store(false, Ordering::SeqCst);
        Some(packet)
    }

    fn publish_deadline(&self, channel: &Channel) {
        let deadline = self.work.lock().protocol.deadline().unwrap_or(u64::MAX);
        if self.deadline.swap(deadline, Ordering::SeqCst) != deadline {
            channel.client().notify();
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("balloon::State")
    }
}
