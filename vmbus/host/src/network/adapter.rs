//! The objects of a network card that a guest queries and sets by RNDIS: addresses, packet filter, link, offloads and receive
//! side scaling (spec netvsc.md 7.4, 7.5 and 8; NDIS's documentation of the OIDs).

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use super::nic::{Mac, Nic};
use super::nvsp::Version;
use super::offload::{ETHERNET, Ip};
use super::oid;
use super::rndis::{ReceiveChecksum, Status};
use super::rss::{HashTypes, KEY, Rss, TABLE, Toeplitz};

/// Which frames the guest wants (OID_GEN_CURRENT_PACKET_FILTER).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Filter(pub u32);

impl Filter {
    /// To its own address.
    pub const DIRECTED: u32 = 0x01;
    /// To groups in its list.
    pub const MULTICAST: u32 = 0x02;
    /// To all groups.
    pub const ALL_MULTICAST: u32 = 0x04;
    /// To everybody.
    pub const BROADCAST: u32 = 0x08;
    /// All there are.
    pub const PROMISCUOUS: u32 = 0x20;

    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

/// What the guest has negotiated so far that its objects depend on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Negotiated {
    /// The protocol's version.
    pub version: Version,
    /// Bytes of the longest frame.
    pub frame: u32,
    /// Channels that the guest may have, the primary included.
    pub channels: u16,
}

/// Which offloads the guest has turned on. What it asks of a single frame is done in any case.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Offloads {
    /// The checksums, in the order of the parameters: IPv4, TCP and UDP over IPv4, TCP and UDP over IPv6.
    pub checksum: [Ways; 5],
    /// Large send of IPv4 and IPv6.
    pub large_send: [bool; 2],
}

impl Offloads {
    /// Whether checksums of received frames are verified for the guest.
    pub fn receives_checksums(&self) -> bool {
        self.checksum.iter().any(|ways| ways.receive)
    }

    /// The statements about a received frame's checksums that the guest wants.
    pub fn receive_mask(&self, version: Ip) -> u32 {
        let [ip, tcp4, udp4, tcp6, udp6] = self.checksum.map(|ways| ways.receive);
        let (ip, tcp, udp) = match version {
            Ip::V4 => (ip, tcp4, udp4),
            Ip::V6 => (false, tcp6, udp6),
        };
        let both = |on: bool, good: ReceiveChecksum, failed: ReceiveChecksum| {
            if on { good.and(failed).0 } else { 0 }
        };
        both(ip, ReceiveChecksum::IP_GOOD, ReceiveChecksum::IP_FAILED)
            | both(tcp, ReceiveChecksum::TCP_GOOD, ReceiveChecksum::TCP_FAILED)
            | both(udp, ReceiveChecksum::UDP_GOOD, ReceiveChecksum::UDP_FAILED)
    }
}

/// Which ways an offload is on.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Ways {
    /// For frames that the guest sends.
    pub send: bool,
    /// For frames that it receives.
    pub receive: bool,
}

/// The longest frame of a large send, as Hyper-V's switch has it.
const LARGE_SEND: u32 = 0xF53C;

/// Segments that a large send has at least.
const LARGE_SEND_SEGMENTS: u32 = 2;

/// Groups that a guest may be in.
const GROUPS: usize = 32;

/// Types of NDIS objects.
mod object {
    pub const DEFAULT: u8 = 0x80;
    pub const RSS_CAPABILITIES: u8 = 0x88;
    pub const RSS_PARAMETERS: u8 = 0x89;
    pub const OFFLOAD: u8 = 0xA7;
}

/// The objects.
#[derive(Debug)]
pub struct Adapter {
    nic: Arc<Nic>,
    negotiated: Negotiated,
    mac: Mac,
    filter: Filter,
    groups: Vec<Mac>,
    lookahead: u32,
    offloads: Offloads,
    rss: Option<Rss>,
    /// What RSS was before it was turned off, for parameters that say "unchanged".
    last_rss: Option<Rss>,
}

/// A SET that was refused, or what it has changed.
pub type SetResult = Result<(), Status>;

impl Adapter {
    /// The objects of a guest that has just begun.
    pub fn new(nic: Arc<Nic>, negotiated: Negotiated) -> Self {
        Self {
            mac: nic.config().mac,
            lookahead: negotiated.frame.saturating_sub(ETHERNET as u32),
            nic,
            negotiated,
            filter: Filter::default(),
            groups: Vec::new(),
            offloads: Offloads::default(),
            rss: None,
            last_rss: None,
        }
    }

    /// Which frames the guest wants.
    pub fn filter(&self) -> Filter {
        self.filter
    }

    /// The offloads that are on.
    pub fn offloads(&self) -> &Offloads {
        &self.offloads
    }

    /// How received frames are spread.
    pub fn rss(&self) -> Option<&Rss> {
        self.rss.as_ref()
    }

    /// The guest has been granted sub-channels.
    pub fn set_channels(&mut self, channels: u16) {
        self.negotiated.channels = channels;
    }

    /// The MTU that counts: what the guest negotiated and the network allows.
    pub fn mtu(&self) -> u32 {
        let negotiated = self.negotiated.frame.saturating_sub(ETHERNET as u32);
        negotiated.min(self.nic.mtu())
    }

    /// Whether the guest wants a frame.
    pub fn wants(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else {
            return false;
        };
        let filter = self.filter;
        if filter.has(Filter::PROMISCUOUS) {
            return true;
        }
        let [first, ..] = *to;
        if *to == [0xFF; 6] {
            filter.has(Filter::BROADCAST)
        } else if first & 1 != 0 {
            filter.has(Filter::ALL_MULTICAST)
                || filter.has(Filter::MULTICAST) && self.groups.contains(to)
        } else {
            filter.has(Filter::DIRECTED) && *to == self.mac
        }
    }

    /// Sets everything back (RNDIS RESET).
    pub fn reset(&mut self) {
        *self = Self::new(self.nic.clone(), self.negotiated);
    }

    /// The value of an object.
    ///
    /// # Errors
    ///
    /// [`Status::NOT_SUPPORTED`] when there is none.
    pub fn query(&self, object: u32, input: &[u8]) -> Result<Vec<u8>, Status> {
        let config = self.nic.config();
        let counters = self.nic.counters();
        // Counters of 32 bits go around their ends.
        let low = |count: u64| number((count & 0xFFFF_FFFF) as u32);
        Ok(match object {
            oid::SUPPORTED_LIST => oid::ALL.iter().flat_map(|oid| oid.to_le_bytes()).collect(),
            oid::HARDWARE_STATUS | oid::MEDIA_SUPPORTED | oid::MEDIA_IN_USE => number(0),
            oid::MAXIMUM_LOOKAHEAD | oid::MAXIMUM_FRAME_SIZE => number(self.mtu()),
            oid::CURRENT_LOOKAHEAD => number(self.lookahead),
            oid::LINK_SPEED => number(u32::try_from(config.speed / 100).unwrap_or(u32::MAX)),
            oid::TRANSMIT_BUFFER_SPACE | oid::RECEIVE_BUFFER_SPACE => number(1 << 20),
            oid::TRANSMIT_BLOCK_SIZE | oid::RECEIVE_BLOCK_SIZE => number(1),
            oid::VENDOR_ID => number(0xFFFF_FFFF),
            oid::VENDOR_DESCRIPTION => b"Enlit network adapter\0".to_vec(),
            oid::CURRENT_PACKET_FILTER => number(self.filter.0),
            oid::DRIVER_VERSION => 0x061E_u16.to_le_bytes().to_vec(),
            oid::VENDOR_DRIVER_VERSION => number(1 << 16),
            oid::MAXIMUM_TOTAL_SIZE => number(self.mtu() + ETHERNET as u32),
            // Priority and VLAN in the packet's information; no loop-back, transfers are not pending.
            oid::MAC_OPTIONS => number(1 << 6 | 1 << 9),
            oid::MEDIA_CONNECT_STATUS => number(u32::from(!self.nic.link_up())),
            oid::MAXIMUM_SEND_PACKETS => number(super::netvsp::LIMITS.max_packets),
            oid::INTERRUPT_MODERATION => interrupt_moderation(),
            oid::RECEIVE_SCALE_CAPABILITIES => self.rss_capabilities(),
            oid::LINK_STATE => self.link_state(),
            oid::XMIT_OK => low(counters.sent_frames),
            oid::RCV_OK => low(counters.received_frames),
            oid::XMIT_ERROR => low(counters.sent_dropped + counters.sent_not_applicable),
            oid::RCV_ERROR => low(counters.received_oversized),
            oid::RCV_NO_BUFFER => low(counters.received_dropped),
            oid::RCV_ERROR_ALIGNMENT | oid::XMIT_ONE_COLLISION | oid::XMIT_MORE_COLLISIONS => {
                number(0)
            }
            oid::FRIENDLY_NAME => friendly_name(&config.name),
            oid::PERMANENT_ADDRESS => config.mac.to_vec(),
            oid::CURRENT_ADDRESS => self.mac.to_vec(),
            oid::MULTICAST_LIST => self.groups.concat(),
            oid::MAXIMUM_LIST_SIZE => number(GROUPS as u32),
            oid::TCP_OFFLOAD_HARDWARE_CAPABILITIES => {
                let all = Ways {
                    send: true,
                    receive: true,
                };
                let all = Offloads {
                    checksum: [all; 5],
                    large_send: [true; 2],
                };
                self.offload_object(&all, input)
            }
            oid::TCP_OFFLOAD_CURRENT_CONFIG => self.offload_object(&self.offloads, input),
            _ => return Err(Status::NOT_SUPPORTED),
        })
    }

    /// Sets the value of an object.
    ///
    /// # Errors
    ///
    /// [`Status::NOT_SUPPORTED`] when there is no such object or it cannot be set, [`Status::INVALID_LENGTH`] and
    /// [`Status::INVALID_DATA`] when it cannot have this value.
    pub fn set(&mut self, object: u32, input: &[u8]) -> SetResult {
        match object {
            oid::CURRENT_PACKET_FILTER => {
                self.filter = Filter(u32_at(input, 0)?);
                Ok(())
            }
            oid::CURRENT_LOOKAHEAD => {
                self.lookahead = u32_at(input, 0)?.min(self.mtu());
                Ok(())
            }
            oid::MULTICAST_LIST => self.set_groups(input),
            // Nothing is held back, whatever the guest prefers; version 2 of large send needs no encapsulation.
            oid::INTERRUPT_MODERATION | oid::TCP_OFFLOAD_ENCAPSULATION => Ok(()),
            oid::RNDIS_CONFIG_PARAMETER => self.set_parameter(input),
            oid::RECEIVE_SCALE_PARAMETERS => self.set_rss(input),
            oid::TCP_OFFLOAD_PARAMETERS => self.set_offloads(input),
            _ => Err(Status::NOT_SUPPORTED),
        }
    }

    fn set_groups(&mut self, input: &[u8]) -> SetResult {
        let (groups, rest) = input.as_chunks::<6>();
        if !rest.is_empty() || groups.len() > GROUPS {
            return Err(Status::INVALID_LENGTH);
        }
        self.groups = groups.to_vec();
        Ok(())
    }

    /// Sets something by name; only the address can be.
    fn set_parameter(&mut self, input: &[u8]) -> SetResult {
        const STRING: u32 = 2;
        let text = |offset, length| -> Result<String, Status> {
            let bytes = part(input, u32_at(input, offset)?, u32_at(input, length)?)?;
            let units = bytes.as_chunks::<2>().0.iter();
            let units = units.map(|unit| u16::from_le_bytes(*unit));
            let text = char::decode_utf16(units).collect::<Result<String, _>>();
            let text = text.map_err(|_| Status::INVALID_DATA)?;
            Ok(text.trim_end_matches('\0').into())
        };
        if text(0, 4)? != "NetworkAddress" || u32_at(input, 8)? != STRING {
            return Err(Status::NOT_SUPPORTED);
        }
        let digits: Vec<u8> = text(12, 16)?
            .chars()
            .filter(|letter| !matches!(letter, '-' | ':'))
            .map(|letter| {
                letter
                    .to_digit(16)
                    .and_then(|digit| u8::try_from(digit).ok())
            })
            .collect::<Option<_>>()
            .ok_or(Status::INVALID_DATA)?;
        let bytes: Vec<u8> = digits
            .chunks(2)
            .map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit))
            .collect();
        let mac = Mac::try_from(bytes).map_err(|_| Status::INVALID_DATA)?;
        let [first, ..] = mac;
        if digits.len() != 12 || first & 1 != 0 || mac == [0; 6] {
            return Err(Status::INVALID_DATA);
        }
        self.mac = mac;
        Ok(())
    }

    fn link_state(&self) -> Vec<u8> {
        const FULL_DUPLEX: u32 = 2;
        let up = self.nic.link_up();
        let speed = if up { self.nic.config().speed } else { 0 };
        let mut bytes = header(object::DEFAULT, 1, 40);
        bytes.extend(number(if up { 1 } else { 2 }));
        bytes.extend(number(FULL_DUPLEX));
        bytes.extend(number(0));
        bytes.extend(speed.to_le_bytes());
        bytes.extend(speed.to_le_bytes());
        // No pause frames, nothing negotiated by itself.
        bytes.extend(number(0));
        bytes.extend(number(0));
        bytes
    }

    fn rss_capabilities(&self) -> Vec<u8> {
        /// Toeplitz over TCP and UDP of IPv4 and IPv6.
        const CAPABILITIES: u32 = 1 | 0x100 | 0x200 | 0x800 | 0x1000;
        let queues = self.nic.config().queues;
        let queues = if self.negotiated.version >= Version::V5 {
            queues
        } else {
            1
        };
        let mut bytes = header(object::RSS_CAPABILITIES, 2, 18);
        bytes.extend(number(CAPABILITIES));
        bytes.extend(number(u32::from(queues)));
        bytes.extend(number(u32::from(queues)));
        bytes.extend((TABLE as u16).to_le_bytes());
        bytes
    }

    /// The RSS parameters object: revision 1 has 28 bytes, 2 has 40, 3 has 44; tables lie behind.
    fn set_rss(&mut self, input: &[u8]) -> SetResult {
        const HASH_UNCHANGED: u16 = 2;
        const TABLE_UNCHANGED: u16 = 4;
        const KEY_UNCHANGED: u16 = 8;
        const DISABLE: u16 = 0x10;
        let [kind, ..] = *input.first_chunk::<4>().ok_or(Status::INVALID_LENGTH)?;
        if kind != object::RSS_PARAMETERS {
            return Err(Status::INVALID_DATA);
        }
        let flags = u16_at(input, 4)?;
        if flags & DISABLE != 0 {
            self.last_rss = self.rss.take().or(self.last_rss.take());
            return Ok(());
        }
        let last = self.rss.as_ref().or(self.last_rss.as_ref());
        let unchanged = last.ok_or(Status::INVALID_DATA);
        let types = match flags & HASH_UNCHANGED {
            0 => HashTypes(u32_at(input, 8)?),
            _ => unchanged?.types,
        };
        if types.0 & !HashTypes::TOEPLITZ == 0 || types.0 & 0xFF != HashTypes::TOEPLITZ {
            // Nothing is hashed, so nothing is spread.
            if types.0 != 0 {
                return Err(Status::INVALID_DATA);
            }
            self.last_rss = self.rss.take().or(self.last_rss.take());
            return Ok(());
        }
        let hash = match flags & KEY_UNCHANGED {
            0 => {
                let key = part(input, u32_at(input, 24)?, u32::from(u16_at(input, 20)?))?;
                let key = <[u8; KEY]>::try_from(key).map_err(|_| Status::INVALID_LENGTH)?;
                Toeplitz::new(key)
            }
            _ => unchanged?.hash.clone(),
        };
        let table = match flags & TABLE_UNCHANGED {
            0 => {
                let table = part(input, u32_at(input, 16)?, u32::from(u16_at(input, 12)?))?;
                self.rss_table(table)?
            }
            _ => unchanged?.table.clone(),
        };
        self.last_rss = None;
        self.rss = Some(Rss { types, hash, table });
        Ok(())
    }

    fn rss_table(&self, bytes: &[u8]) -> Result<Vec<u16>, Status> {
        let (entries, rest) = bytes.as_chunks::<4>();
        if !rest.is_empty() || !(1..=TABLE).contains(&entries.len()) {
            return Err(Status::INVALID_LENGTH);
        }
        let channels = self.negotiated.channels;
        let entries = entries.iter().map(|entry| {
            let queue = u16::try_from(u32::from_le_bytes(*entry)).ok();
            queue.filter(|queue| *queue < channels)
        });
        entries.collect::<Option<_>>().ok_or(Status::INVALID_DATA)
    }

    /// The NDIS offload object, in the newest revision that version and guest know.
    fn offload_object(&self, offloads: &Offloads, input: &[u8]) -> Vec<u8> {
        const ETHERNET_802_3: u32 = 2;
        let newest = match self.negotiated.version {
            version if version >= Version::V5 => 3,
            version if version >= Version::V4 => 2,
            _ => 1,
        };
        // A guest may say first how much it understands.
        let asked = match input.first_chunk::<4>() {
            Some([object::OFFLOAD, revision, ..]) => *revision,
            _ => newest,
        };
        let revision = asked.clamp(1, newest);
        let size: u16 = match revision {
            1 => 112,
            2 => 144,
            _ => 156,
        };
        let mut bytes = header(object::OFFLOAD, revision, size);
        let [ip, tcp4, udp4, tcp6, udp6] = offloads.checksum;
        let bit = |on: bool, place: u32| u32::from(on) << place;
        let v4 = |ip: bool, tcp: bool, udp: bool| {
            bit(ip, 0) | bit(tcp, 2) | bit(tcp, 4) | bit(udp, 6) | bit(ip, 8)
        };
        let v6 =
            |tcp: bool, udp: bool| bit(tcp || udp, 0) | bit(tcp, 2) | bit(tcp, 4) | bit(udp, 6);
        for flags in [
            v4(ip.send, tcp4.send, udp4.send),
            v4(ip.receive, tcp4.receive, udp4.receive),
            v6(tcp6.send, udp6.send),
            v6(tcp6.receive, udp6.receive),
        ] {
            bytes.extend(number(if flags == 0 { 0 } else { ETHERNET_802_3 }));
            bytes.extend(number(flags));
        }
        // Large send of the first sort and IPsec: none.
        bytes.resize(80, 0);
        let [large4, large6] = offloads.large_send;
        for on in [large4, large6] {
            let fields = [ETHERNET_802_3, LARGE_SEND, LARGE_SEND_SEGMENTS];
            for field in fields {
                bytes.extend(number(if on { field } else { 0 }));
            }
        }
        // Behind extension headers, and with TCP options.
        bytes.extend(number(if large6 { 0b101 } else { 0 }));
        bytes.resize(usize::from(size), 0);
        bytes
    }

    /// The offload parameters object: revision 1 has 20 bytes, 2 has 24, 3 has 28.
    fn set_offloads(&mut self, input: &[u8]) -> SetResult {
        const OFF: u8 = 1;
        const ON: u8 = 2;
        let [kind, ..] = *input.first_chunk::<4>().ok_or(Status::INVALID_LENGTH)?;
        let fields = input.get(4..16).ok_or(Status::INVALID_LENGTH)?;
        let (checksums, rest) = fields
            .split_first_chunk::<5>()
            .ok_or(Status::INVALID_LENGTH)?;
        let [large1, ipsec, large4, large6, ..] =
            *rest.first_chunk::<7>().ok_or(Status::INVALID_LENGTH)?;
        if kind != object::DEFAULT || large1 > OFF || ipsec > OFF {
            return Err(Status::INVALID_DATA);
        }
        let mut offloads = self.offloads;
        for (ways, value) in offloads.checksum.iter_mut().zip(checksums) {
            let (send, receive) = match value {
                0 => continue,
                1 => (false, false),
                2 => (true, false),
                3 => (false, true),
                4 => (true, true),
                _ => return Err(Status::INVALID_DATA),
            };
            *ways = Ways { send, receive };
        }
        for (on, value) in offloads.large_send.iter_mut().zip([large4, large6]) {
            match value {
                0 => {}
                OFF => *on = false,
                ON => *on = true,
                _ => return Err(Status::INVALID_DATA),
            }
        }
        self.offloads = offloads;
        Ok(())
    }
}

fn number(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

/// The header of an NDIS object.
fn header(kind: u8, revision: u8, size: u16) -> Vec<u8> {
    let [low, high] = size.to_le_bytes();
    alloc::vec![kind, revision, low, high]
}

/// OID_GEN_INTERRUPT_MODERATION: an object that says "not supported".
fn interrupt_moderation() -> Vec<u8> {
    let mut bytes = header(object::DEFAULT, 1, 12);
    bytes.extend(number(0));
    bytes.extend(number(1));
    bytes
}

/// A name in UTF-16 with its end, in a buffer of fixed size.
fn friendly_name(name: &str) -> Vec<u8> {
    /// Characters, the end included.
    const LENGTH: usize = 256;
    let units = name.encode_utf16().take(LENGTH - 1);
    let mut bytes: Vec<u8> = units.flat_map(u16::to_le_bytes).collect();
    bytes.resize(2 * LENGTH, 0);
    bytes
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Status> {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk::<2>);
    field
        .map(|field| u16::from_le_bytes(*field))
        .ok_or(Status::INVALID_LENGTH)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Status> {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk::<4>);
    field
        .map(|field| u32::from_le_bytes(*field))
        .ok_or(Status::INVALID_LENGTH)
}

fn part(bytes: &[u8], offset: u32, length: u32) -> Result<&[u8], Status> {
    let (offset, length) = (offset as usize, length as usize);
    let end = offset.checked_add(length).ok_or(Status::INVALID_LENGTH)?;
    bytes.get(offset..end).ok_or(Status::INVALID_LENGTH)
}
