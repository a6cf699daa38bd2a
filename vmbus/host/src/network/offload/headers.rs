//! Where the headers of a frame are.

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

/// A version of IP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ip {
    /// Version 4.
    V4,
    /// Version 6.
    V6,
}

/// A transport protocol that cards know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// The protocol's number in IP headers.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Where the checksum is in the protocol's header.
    pub fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// Where the headers of a frame with an IP datagram are, in bytes from its beginning.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers {
    /// Which IP it is.
    pub ip: Ip,
    /// The IP header.
    pub network: usize,
    /// The TCP or UDP header, if the whole of one is in the frame and the datagram is not a fragment.
    pub transport: Option<(Transport, usize)>,
    /// Behind the TCP or UDP header.
    pub payload: usize,
    /// Behind the datagram. A length of zero, as in a large send, stands for all of the frame.
    pub end: usize,
    /// Whether the datagram is a fragment of one.
    pub fragment: bool,
}

impl Headers {
    /// Finds the headers. `None` when there is no datagram in the frame, or it ends in the middle of a header.
    pub fn find(frame: &[u8]) -> Option<Self> {
        let packet = LaxSlicedPacket::from_ethernet(frame).ok()?;
        // All slices are parts of the frame.
        let offset = |part: &[u8]| part.as_ptr().addr().checked_sub(frame.as_ptr().addr());
        let net = packet.net.as_ref()?;
        let (ip, header, fragment) = match net {
            LaxNetSlice::Ipv4(v4) => {
                let fragment = v4.is_payload_fragmented();
                (Ip::V4, offset(v4.header().slice())?, fragment)
            }
            LaxNetSlice::Ipv6(v6) => {
                let fragment = v6.is_payload_fragmented();
                (Ip::V6, offset(v6.header().slice())?, fragment)
            }
            LaxNetSlice::Arp(_) => return None,
        };
        let datagram = net.ip_payload_ref()?.payload;
        let start = offset(datagram)?;
        let end = start.checked_add(datagram.len())?;
        let transport = match packet.transport.as_ref().filter(|_| !fragment) {
            Some(TransportSlice::Tcp(tcp)) => {
                let length = tcp.header_slice().len();
                Some((Transport::Tcp, offset(tcp.slice())?, length))
            }
            Some(TransportSlice::Udp(udp)) => Some((Transport::Udp, offset(udp.slice())?, 8)),
            _ => None,
        };
        Some(Self {
            ip,
            network: header,
            payload: transport.map_or(start, |(_, at, length)| at + length),
            transport: transport.map(|(transport, at, _)| (transport, at)),
            end,
            fragment,
        })
    }

    /// Source and destination address, one behind the other.
    pub fn addresses<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let (first, length) = match self.ip {
            Ip::V4 => (12, 8),
            Ip::V6 => (8, 32),
        };
        let from = self.network.checked_add(first)?;
        frame.get(from..from.checked_add(length)?)
    }

    /// Source and destination port, one behind the other.
    pub fn ports<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let (_, at) = self.transport?;
        frame.get(at..at.checked_add(4)?)
    }
}
