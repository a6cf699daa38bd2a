//! What a guest and its card negotiate: version, configuration, buffers, sub-channels, and RNDIS's control messages (spec netvsc.md
//! 3, 4, 7 and 8). The order is OpenVMM's: what it ends the channel for, this does too.

use alloc::sync::Arc;
use alloc::vec::Vec;

use vmbus::ring::PacketBuffer;

use super::path::Path;
use super::receive::{Held, Pieces, ReceiveBuffer};
use super::send::{SECTION, SendBuffer};
use super::{Fault, LIMITS, MAX_FRAME, MIN_FRAME};
use crate::channel::HostChannel;
use crate::network::adapter::{Adapter, Negotiated};
use crate::network::nic::Nic;
use crate::network::nvsp::{self, Request, Status, Version};
use crate::network::rndis::{self, Indication, Message};

/// The operation that asks for sub-channels.
const ALLOCATE: u32 = 1;

/// Frames that may have come while no guest was there.
const STALE: usize = 4096;

/// What the guest's NDIS is configured for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Config {
    /// Bytes of the longest frame.
    frame: u32,
    capabilities: u64,
}

/// What the guest was told last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Announced {
    link_up: bool,
    mtu: u32,
}

impl Announced {
    fn now(nic: &Nic) -> Self {
        Self {
            link_up: nic.link_up(),
            mtu: nic.mtu(),
        }
    }
}

/// From the opening of the primary channel to its end.
#[derive(Debug)]
pub(super) struct Session {
    nic: Arc<Nic>,
    pub(super) version: Option<Version>,
    config: Option<Config>,
    has_ndis_version: bool,
    /// Receive buffers so far.
    buffers: u64,
    pub(super) receive: Option<ReceiveBuffer>,
    pub(super) send: Option<SendBuffer>,
    /// Set-up is over: an RNDIS message has come.
    is_set_up: bool,
    /// From RNDIS INITIALIZE to HALT.
    pub(super) adapter: Option<Adapter>,
    announced: Option<Announced>,
    /// Sub-channels, once they have been asked for.
    granted: Option<u16>,
    /// They have not been offered yet.
    to_offer: bool,
    /// Channels that the guest spreads its frames over.
    send_table: usize,
    /// A frame for a channel whose queue is full.
    pub(super) held: Option<Held>,
}

impl Session {
    pub(super) fn new(nic: Arc<Nic>) -> Self {
        Self {
            nic,
            version: None,
            config: None,
            has_ndis_version: false,
            buffers: 0,
            receive: None,
            send: None,
            is_set_up: false,
            adapter: None,
            announced: None,
            granted: None,
            to_offer: false,
            send_table: 1,
            held: None,
        }
    }

    /// Bytes of the longest frame that guest and host have agreed on.
    pub(super) fn frame(&self) -> u32 {
        self.config.map_or(MIN_FRAME, |config| config.frame)
    }

    /// Whether the guest has said that it has this capability.
    pub(super) fn has_capability(&self, bit: u64) -> bool {
        self.config
            .is_some_and(|config| config.capabilities & bit != 0)
    }

    /// The guest is done with pieces of the receive buffer. Returns the channels that waited for them.
    pub(super) fn take_back(&mut self, pieces: &Pieces) -> Vec<u16> {
        let buffer = self.receive.as_mut();
        buffer.map_or_else(Vec::new, |buffer| buffer.put_back(pieces))
    }

    /// Sub-channels to offer now.
    pub(super) fn take_granted(&mut self) -> Option<u16> {
        core::mem::take(&mut self.to_offer)
            .then_some(self.granted)
            .flatten()
    }

    /// Whether the guest should spread its frames anew, with so many channels open. It waits for the last of them to
    /// open, and is told when one closes.
    pub(super) fn wants_send_table(&mut self, open: usize) -> bool {
        let all = self.granted.map_or(1, |granted| usize::from(granted) + 1);
        let changed = open != self.send_table && (open == all || open < self.send_table);
        if changed {
            self.send_table = open;
        }
        changed
    }

    /// Tells the guest what has changed outside. One that is behind hears of the last state when it is not any more.
    pub(super) fn announce(&mut self, nic: &Nic, path: &mut Path) -> Result<(), Fault> {
        let Some(last) = self.announced.filter(|_| !path.is_behind()) else {
            return Ok(());
        };
        let now = Announced::now(nic);
        self.announced = Some(now);
        if now.mtu != last.mtu {
            path.message(rndis::indicate_status(Indication::NETWORK_CHANGE, &[]))?;
        }
        if now.link_up != last.link_up {
            let indication = if now.link_up {
                Indication::MEDIA_CONNECT
            } else {
                Indication::MEDIA_DISCONNECT
            };
            path.message(rndis::indicate_status(indication, &[]))?;
        }
        Ok(())
    }

    /// An RNDIS message comes. All that it needs must have been set up; only the send buffer may be missing.
    pub(super) fn expect_rndis(&mut self) -> Result<(), Fault> {
        if !self.is_set_up {
            if self.version.is_none() || self.receive.is_none() || !self.has_ndis_version {
                return Err(Fault::Protocol("an RNDIS message before the set-up"));
            }
            self.is_set_up = true;
        }
        Ok(())
    }

    /// Takes an NVSP message, other than those that carry RNDIS.
    pub(super) fn handle(
        &mut self,
        path: &mut Path,
        channel: &HostChannel,
        packet: &PacketBuffer,
        request: Request,
    ) -> Result<(), Fault> {
        if let Request::Init { min, max } = request {
            return self.init(path, packet, min, max);
        }
        let version = self
            .version
            .ok_or(Fault::Protocol("an NVSP message before INIT"))?;
        match request {
            Request::NdisConfig {
                frame,
                capabilities,
            } => {
                if version < Version::V2 || self.config.is_some() || self.receive.is_some() {
                    return Err(Fault::Protocol(
                        "an NDIS configuration that has no place here",
                    ));
                }
                let range = MIN_FRAME..=MAX_FRAME;
                let is_sane = range.contains(&frame);
                let frame = if is_sane { frame } else { MIN_FRAME };
                self.config = Some(Config {
                    frame,
                    capabilities,
                });
                path.answer(packet, Vec::new());
            }
            Request::NdisVersion { .. } => {
                if core::mem::replace(&mut self.has_ndis_version, true) {
                    return Err(Fault::Protocol("a second NDIS version"));
                }
                path.answer(packet, Vec::new());
            }
            Request::SendReceiveBuffer { gpadl, id } => {
                if self.receive.is_some() || version >= Version::V2 && self.config.is_none() {
                    return Err(Fault::Protocol("a receive buffer that has no place here"));
                }
                self.buffers += 1;
                let epoch = self.buffers;
                self.receive = ReceiveBuffer::new(channel, gpadl, id, self.frame(), epoch);
                let layout = self.receive.as_ref().map(|buffer| buffer.layout);
                path.answer(packet, nvsp::receive_buffer_complete(version, layout));
            }
            Request::SendSendBuffer { gpadl, id } => {
                if self.send.is_some() {
                    return Err(Fault::Protocol("a second send buffer"));
                }
                self.send = SendBuffer::new(channel, gpadl, id);
                let section = self.send.as_ref().map(|_| SECTION);
                path.answer(packet, nvsp::send_buffer_complete(version, section));
            }
            Request::RevokeReceiveBuffer { id } => {
                if self.receive.as_ref().is_some_and(|buffer| buffer.id == id) {
                    self.receive = None;
                    self.is_set_up = false;
                    path.forget_pieces();
                }
                path.answer(packet, Vec::new());
            }
            Request::RevokeSendBuffer { id } => {
                if self.send.as_ref().is_some_and(|buffer| buffer.id == id) {
                    self.send = None;
                }
                path.answer(packet, Vec::new());
            }
            Request::SubChannels { operation, count } => {
                let (status, granted) = self.grant(version, operation, count);
                path.answer(
                    packet,
                    nvsp::sub_channels_complete(version, status, granted),
                );
            }
            // There is no virtual function to switch to; OpenVMM completes it all the same.
            Request::SwitchDataPath(_) => path.answer(packet, Vec::new()),
            Request::Init { .. } | Request::RndisPacket { .. } | Request::Unknown(_) => {
                return Err(Fault::Protocol("an NVSP message of an unknown type"));
            }
        }
        Ok(())
    }

    fn init(
        &mut self,
        path: &mut Path,
        packet: &PacketBuffer,
        min: Version,
        max: Version,
    ) -> Result<(), Fault> {
        if self.version.is_some() {
            return Err(Fault::Protocol("a second INIT"));
        }
        let newest = self.nic.config().newest_version;
        let accepted = min == max && min.is_known() && min <= newest;
        let status = if accepted {
            self.version = Some(min);
            Status::SUCCESS
        } else {
            Status::NONE
        };
        path.answer(packet, nvsp::init_complete(min, status));
        Ok(())
    }

    fn grant(&mut self, version: Version, operation: u32, count: u32) -> (Status, u32) {
        let most = self.nic.config().queues.saturating_sub(1);
        let is_right = version >= Version::V5 && operation == ALLOCATE;
        let first = self.granted.is_none() && self.adapter.is_some();
        if !is_right || !first || count == 0 || most == 0 {
            return (Status::FAILURE, 0);
        }
        let granted = most.min(u16::try_from(count).unwrap_or(u16::MAX));
        self.granted = Some(granted);
        self.to_offer = true;
        if let Some(adapter) = &mut self.adapter {
            adapter.set_channels(granted + 1);
        }
        (Status::SUCCESS, u32::from(granted))
    }

    /// Takes a control message of RNDIS.
    pub(super) fn control(&mut self, path: &mut Path, message: Message<'_>) -> Result<(), Fault> {
        let uninitialized = rndis::Status::FAILURE;
        match message {
            Message::Initialize { id, major, .. } => {
                let status = if major == 1 {
                    self.initialize();
                    rndis::Status::SUCCESS
                } else {
                    rndis::Status::BAD_VERSION
                };
                path.message(rndis::initialize_complete(id, status, LIMITS))
            }
            Message::Halt => {
                self.adapter = None;
                self.announced = None;
                Ok(())
            }
            Message::Query { id, oid, input } => {
                let adapter = self.adapter.as_ref().ok_or(uninitialized);
                let answer = adapter.and_then(|adapter| adapter.query(oid, input));
                let answer = answer.as_deref().map_err(|status| *status);
                path.message(rndis::query_complete(id, answer))
            }
            Message::Set { id, oid, input } => {
                let adapter = self.adapter.as_mut().ok_or(uninitialized);
                let status = match adapter.and_then(|adapter| adapter.set(oid, input)) {
                    Ok(()) => rndis::Status::SUCCESS,
                    Err(status) => status,
                };
                path.message(rndis::set_complete(id, status))
            }
            Message::Reset => {
                if let Some(adapter) = &mut self.adapter {
                    adapter.reset();
                }
                path.message(rndis::reset_complete(rndis::Status::SUCCESS))
            }
            Message::Keepalive { id } => path.message(rndis::keepalive_complete(id)),
            // Answers to questions that the host did not ask.
            Message::Other(_) | Message::Packet(_) => Ok(()),
        }
    }

    fn initialize(&mut self) {
        // What came for the guest while it was not there is not for it.
        for _ in 0..STALE {
            if self.nic.receive().is_none() {
                break;
            }
            self.nic.counters.received_filtered.one();
        }
        let negotiated = Negotiated {
            version: self.version.unwrap_or(Version::V1),
            frame: self.frame(),
            channels: self.granted.unwrap_or(0) + 1,
        };
        self.adapter = Some(Adapter::new(self.nic.clone(), negotiated));
        self.announced = Some(Announced::now(&self.nic));
    }
}
