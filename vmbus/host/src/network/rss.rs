//! Receive side scaling: which queue a received frame goes to (spec netvsc.md 8; Microsoft, "RSS Hashing Functions").

use alloc::boxed::Box;
use alloc::vec::Vec;

use super::offload::{Headers, Ip, Transport};

/// Bytes of a key.
pub const KEY: usize = 40;

/// The most entries of the indirection table.
pub const TABLE: usize = 128;

/// Which fields are hashed: bit 0 is the Toeplitz function, the others are kinds of frames.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct HashTypes(pub u32);

impl HashTypes {
    /// The Toeplitz function, the only one.
    pub const TOEPLITZ: u32 = 1;
    /// Addresses of IPv4.
    pub const IPV4: u32 = 0x100;
    /// Addresses and ports of TCP over IPv4.
    pub const TCP_IPV4: u32 = 0x200;
    /// Addresses of IPv6.
    pub const IPV6: u32 = 0x400;
    /// Addresses and ports of TCP over IPv6.
    pub const TCP_IPV6: u32 = 0x1000;
    /// Addresses and ports of UDP over IPv4.
    pub const UDP_IPV4: u32 = 0x4000;
    /// Addresses and ports of UDP over IPv6.
    pub const UDP_IPV6: u32 = 0x8000;

    fn has(self, kind: u32) -> bool {
        self.0 & kind != 0
    }
}

/// The Toeplitz hash with one key.
#[derive(Clone, Debug)]
pub struct Toeplitz {
    key: [u8; KEY],
    /// The 32 bits of the key that begin at each bit.
    windows: Box<[u32]>,
}

impl Toeplitz {
    /// The hash with this key.
    pub fn new(key: [u8; KEY]) -> Self {
        let mut bits = key.iter().flat_map(|byte| {
            let byte = *byte;
            (0..8).rev().map(move |bit| u32::from(byte >> bit & 1))
        });
        let first = bits.by_ref().take(32).fold(0, |word, bit| word << 1 | bit);
        let rest = bits.scan(first, |word, bit| {
            *word = *word << 1 | bit;
            Some(*word)
        });
        let windows: Vec<u32> = core::iter::once(first).chain(rest).collect();
        Self {
            key,
            windows: windows.into_boxed_slice(),
        }
    }

    /// The key.
    pub fn key(&self) -> &[u8; KEY] {
        &self.key
    }

    /// The hash of all parts, one behind the other. What lies behind the key's reach does not count.
    pub fn hash<'a>(&self, parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
        let bytes = parts.into_iter().flatten();
        bytes
            .zip(self.windows.chunks(8))
            .fold(0, |hash, (byte, windows)| {
                let mut hash = hash;
                for (bit, window) in windows.iter().enumerate() {
                    if byte << bit & 0x80 != 0 {
                        hash ^= window;
                    }
                }
                hash
            })
    }
}

/// What a guest has asked for.
#[derive(Clone, Debug)]
pub struct Rss {
    /// What is hashed.
    pub types: HashTypes,
    /// How.
    pub hash: Toeplitz,
    /// The queue for each value of the hash's low bits.
    pub table: Vec<u16>,
}

impl Rss {
    /// The hash of a frame, if it is of a kind that is hashed.
    pub fn hash(&self, frame: &[u8], headers: &Headers) -> Option<u32> {
        let addresses = headers.addresses(frame)?;
        let (plain, tcp, udp) = match headers.ip {
            Ip::V4 => (HashTypes::IPV4, HashTypes::TCP_IPV4, HashTypes::UDP_IPV4),
            Ip::V6 => (HashTypes::IPV6, HashTypes::TCP_IPV6, HashTypes::UDP_IPV6),
        };
        let with_ports = match headers.transport {
            Some((Transport::Tcp, _)) => self.types.has(tcp),
            Some((Transport::Udp, _)) => self.types.has(udp),
            None => false,
        };
        if with_ports {
            let ports = headers.ports(frame)?;
            Some(self.hash.hash([addresses, ports]))
        } else {
            self.types.has(plain).then(|| self.hash.hash([addresses]))
        }
    }

    /// The queue for a hash.
    pub fn queue(&self, hash: u32) -> u16 {
        let index = (hash as usize).checked_rem(self.table.len());
        let entry = index.and_then(|index| self.table.get(index));
        entry.copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key of Microsoft's verification suite.
    const MICROSOFT: [u8; KEY] = [
        0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f,
        0xb0, 0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30,
        0xf2, 0x0c, 0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
    ];

    fn check(source: &[u8], destination: &[u8], ports: [u16; 2], plain: u32, tcp: u32) {
        let toeplitz = Toeplitz::new(MICROSOFT);
        assert_eq!(toeplitz.hash([source, destination]), plain);
        let [from, to] = ports.map(u16::to_be_bytes);
        assert_eq!(toeplitz.hash([source, destination, &from, &to]), tcp);
    }

    #[test]
    fn hashes_of_ipv4_are_those_that_microsoft_published() {
        for (source, from, destination, to, plain, tcp) in [
            (
                [66, 9, 149, 187],
                2794,
                [161, 142, 100, 80],
                1766,
                0x323e_8fc2,
                0x51cc_c178,
            ),
            (
                [199, 92, 111, 2],
                14230,
                [65, 69, 140, 83],
                4739,
                0xd718_262a,
                0xc626_b0ea,
            ),
            (
                [24, 19, 198, 95],
                12898,
                [12, 22, 207, 184],
                38024,
                0xd2d0_a5de,
                0x5c2b_394a,
            ),
            (
                [38, 27, 205, 30],
                48228,
                [209, 142, 163, 6],
                2217,
                0x8298_9176,
                0xafc7_327f,
            ),
            (
                [153, 39, 163, 191],
                44251,
                [202, 188, 127, 2],
                1303,
                0x5d18_09c5,
                0x10e8_28a2,
            ),
        ] {
            check(&source, &destination, [from, to], plain, tcp);
        }
    }

    #[test]
    fn hashes_of_ipv6_are_those_that_microsoft_published() {
        for (source, from, destination, to, plain, tcp) in [
            (
                "3ffe:2501:200:1fff::7",
                2794,
                "3ffe:2501:200:3::1",
                1766,
                0x2cc1_8cd5,
                0x4020_7d3d,
            ),
            (
                "3ffe:501:8::260:97ff:fe40:efab",
                14230,
                "ff02::1",
                4739,
                0x0f0c_461c,
                0xdde5_1bbf,
            ),
            (
                "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
                44251,
                "fe80::200:f8ff:fe21:67cf",
                38024,
                0x4b61_e985,
                0x02d1_feef,
            ),
        ] {
            let bytes = |text: &str| text.parse::<core::net::Ipv6Addr>().unwrap().octets();
            check(&bytes(source), &bytes(destination), [from, to], plain, tcp);
        }
    }

    #[test]
    fn an_empty_table_leads_to_the_first_queue() {
        let rss = Rss {
            types: HashTypes(0x101),
            hash: Toeplitz::new(MICROSOFT),
            table: Vec::new(),
        };
        assert_eq!(rss.queue(77), 0);
    }
}
