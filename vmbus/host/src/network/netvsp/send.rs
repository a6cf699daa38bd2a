//! The way of frames from the guest: gathered from sections and pages, finished as the guest asks, and handed to the network.

use alloc::vec::Vec;

use vmbus::ids::GpadlHandle;
use vmbus::ring::{Kind, PacketBuffer};

use super::Fault;
use super::control::Session;
use super::path::{Out, Path, Scratch};
use crate::bus::Access;
use crate::channel::HostChannel;
use crate::memory::MappedGpadl;
use crate::network::backend::LargeSends;
use crate::network::nic::Nic;
use crate::network::nvsp::{Section, Status, Traffic};
use crate::network::offload::{
    ETHERNET, NotApplicable, VLAN, fill_checksums, insert_tag, leave_uncut, resize_large, segment,
};
use crate::network::rndis::{Message, Messages, Packet};

/// Bytes of all RNDIS messages in one NVSP packet: a batch of large sends has room.
pub(super) const MAX_MESSAGES: usize = 256 << 10;

/// Bytes of a section of the send buffer (spec netvsc.md 5).
pub(super) const SECTION: u32 = 6144;

/// The largest send buffer in bytes (spec netvsc.md 5).
const MAX_BUFFER: usize = 15 << 20;

/// The guest's send buffer.
#[derive(Debug)]
pub(super) struct SendBuffer {
    memory: MappedGpadl,
    pub(super) id: u16,
}

impl SendBuffer {
    /// The buffer that the guest lends. `None` when it is not lent, or of no use.
    pub(super) fn new(channel: &HostChannel, gpadl: u32, id: u16) -> Option<Self> {
        let memory = channel.map_gpadl(GpadlHandle(gpadl), Access::Read).ok()?;
        let length = memory.len();
        (SECTION as usize..=MAX_BUFFER)
            .contains(&length)
            .then_some(Self { memory, id })
    }

    /// Copies what is in a section to the end of `bytes`. `None` when there is no such section.
    fn read(&self, section: Section, bytes: &mut Vec<u8>) -> Option<()> {
        let count = self.memory.len() / SECTION as usize;
        let (index, length) = (section.index as usize, section.bytes as usize);
        if index >= count || section.bytes > SECTION {
            return None;
        }
        let from = bytes.len();
        bytes.resize(from + length, 0);
        let place = bytes.get_mut(from..)?;
        self.memory.read(index * SECTION as usize, place).ok()
    }
}

/// A packet of the guest with RNDIS messages.
pub(super) struct Taken<'a> {
    pub(super) packet: &'a PacketBuffer,
    pub(super) traffic: Traffic,
    pub(super) section: Option<Section>,
}

impl Path {
    /// Takes the RNDIS messages of a packet. What is wrong with them is the guest's answer, not the end of the channel.
    pub(super) fn take(
        &mut self,
        nic: &Nic,
        session: &mut Session,
        channel: &HostChannel,
        taken: &Taken<'_>,
    ) -> Result<(), Fault> {
        session.expect_rndis()?;
        let mut scratch = core::mem::take(&mut self.scratch);
        let gathered = gather(session, channel, taken, &mut scratch.gathered);
        let bytes = core::mem::take(&mut scratch.gathered);
        let status = match gathered {
            None => Ok(Status::FAILURE),
            Some(()) => self.take_messages(nic, session, taken.traffic, &bytes, &mut scratch),
        };
        scratch.gathered = bytes;
        self.scratch = scratch;
        let status = status?;
        if status != Status::SUCCESS {
            nic.counters.sent_invalid.one();
        }
        if taken.packet.completion_requested() {
            let transaction = taken.packet.transaction_id();
            // Frames of this packet may wait; those before it are no concern of a control message.
            let waits = self.is_blocked() && taken.traffic == Traffic::DATA;
            let queue = if waits {
                &mut self.outbox
            } else {
                &mut self.answers
            };
            queue.push_back(Out::Done(transaction, status));
        }
        Ok(())
    }

    fn take_messages(
        &mut self,
        nic: &Nic,
        session: &mut Session,
        traffic: Traffic,
        bytes: &[u8],
        scratch: &mut Scratch,
    ) -> Result<Status, Fault> {
        for message in Messages::new(bytes) {
            let Ok(message) = message else {
                return Ok(Status::INVALID_RNDIS_PACKET);
            };
            match (traffic, message) {
                (Traffic::DATA, Message::Packet(packet)) => {
                    if session.adapter.is_none() {
                        return Ok(Status::FAILURE);
                    }
                    let longest = session.frame() as usize + VLAN;
                    if !self.send(nic, packet, longest, scratch) {
                        return Ok(Status::INVALID_RNDIS_PACKET);
                    }
                }
                (Traffic::CONTROL, message) if self.index == 0 => {
                    nic.counters.control_messages.one();
                    session.control(self, message)?;
                }
                _ => return Ok(Status::INVALID_RNDIS_PACKET),
            }
        }
        Ok(Status::SUCCESS)
    }

    /// Sends a frame, finished as the guest asks. Returns whether it is one at all.
    fn send(
        &mut self,
        nic: &Nic,
        packet: Packet<'_>,
        longest: usize,
        scratch: &mut Scratch,
    ) -> bool {
        let Packet { frame, tasks } = packet;
        if frame.len() < ETHERNET {
            return false;
        }
        let Scratch {
            frame: buffer,
            segment: piece,
            ..
        } = scratch;
        if tasks == Default::default() {
            if frame.len() > longest {
                return false;
            }
            self.emit(nic, frame);
            return true;
        }
        buffer.clear();
        buffer.extend_from_slice(frame);
        if let Some(tag) = tasks.vlan {
            insert_tag(buffer, tag);
        }
        let mut done = Ok(());
        if let Some(large) = tasks.large_send {
            nic.counters.large_sends.one();
            done = self.send_large(nic, buffer, large.segment(), longest, piece);
        } else {
            if buffer.len() > longest {
                return false;
            }
            if let Some(wanted) = tasks.checksum {
                // A frame that is not of that sort goes as it is, as through any switch.
                done = fill_checksums(buffer, wanted);
            }
            self.emit(nic, buffer);
        }
        if done == Err(NotApplicable) {
            nic.counters.sent_not_applicable.one();
        }
        true
    }

    /// Sends a TCP frame, in segments of at most `size` bytes of data, whoever cuts it.
    fn send_large(
        &mut self,
        nic: &Nic,
        frame: &mut [u8],
        size: usize,
        longest: usize,
        piece: &mut Vec<u8>,
    ) -> Result<(), NotApplicable> {
        match nic.large_sends() {
            LargeSends::Whole(longest) if frame.len() <= longest => {
                resize_large(frame)?;
                self.emit(nic, frame);
                return Ok(());
            }
            LargeSends::Cut if !self.is_blocked() => {
                let cut = leave_uncut(frame, size)?;
                if cut.headers.saturating_add(size) > longest {
                    return Err(NotApplicable);
                }
                if nic.send_large(frame, &cut).is_ok() {
                    self.blocked_since = None;
                    return Ok(());
                }
                // Without room for it now it waits in pieces.
            }
            _ => {}
        }
        let mut too_long = false;
        segment(frame, size, piece, |piece| {
            if piece.len() <= longest {
                self.emit(nic, piece);
            } else {
                too_long = true;
            }
        })?;
        if too_long { Err(NotApplicable) } else { Ok(()) }
    }

    /// Hands a frame to the network, behind those that wait for it.
    fn emit(&mut self, nic: &Nic, frame: &[u8]) {
        if !self.is_blocked() && nic.send(frame).is_ok() {
            self.blocked_since = None;
            return;
        }
        if !self.keep(frame) {
            nic.counters.sent_dropped.one();
        }
    }
}

/// Puts together what a packet carries: what is in a section, then what is in its pages (spec netvsc.md 6.1).
fn gather(
    session: &Session,
    channel: &HostChannel,
    taken: &Taken<'_>,
    bytes: &mut Vec<u8>,
) -> Option<()> {
    bytes.clear();
    if let Some(section) = taken.section {
        session.send.as_ref()?.read(section, bytes)?;
    }
    if taken.packet.kind() == Kind::GPA_DIRECT {
        let pages = channel.external_data(taken.packet).ok()?;
        let from = bytes.len();
        let length = pages.len().checked_add(from)?;
        if length > MAX_MESSAGES {
            return None;
        }
        bytes.resize(length, 0);
        pages.read(0, bytes.get_mut(from..)?).ok()?;
    } else if taken.section.is_none() {
        return None;
    }
    Some(())
}
