//! Internet checksums of frames: computed for the guest, and verified for it (RFC 1071, RFC 8200 8.1).

use super::{Headers, Ip, Transport};
use crate::network::rndis::{ReceiveChecksum, TransmitChecksum};

/// The frame is not of the sort that the guest says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotApplicable;

/// The ones' complement sum of 16-bit words in network order, on top of `start`. An odd byte counts as the high half of a word.
pub fn sum(start: u32, bytes: &[u8]) -> u32 {
    // Eight bytes at a time: the sum of 64-bit words with end-around carry, folded, is that of the 16-bit ones
    // (RFC 1071 2.C).
    let (words, tail) = bytes.as_chunks::<8>();
    let mut total: u64 = 0;
    for word in words {
        let (next, carry) = total.overflowing_add(u64::from_be_bytes(*word));
        total = next + u64::from(carry);
    }
    let mut rest = [0; 8];
    for (to, from) in rest.iter_mut().zip(tail) {
        *to = *from;
    }
    let (next, carry) = total.overflowing_add(u64::from_be_bytes(rest));
    total = next + u64::from(carry);
    let mut folded = (total >> 32) + (total & 0xFFFF_FFFF) + u64::from(start);
    while folded >> 16 != 0 {
        folded = (folded >> 16) + (folded & 0xFFFF);
    }
    // Below 1 << 16 by now.
    folded as u32
}

/// The sum over the pseudo header of a datagram whose TCP or UDP part has `length` bytes.
fn pseudo_header(
    frame: &[u8],
    headers: &Headers,
    transport: Transport,
    length: usize,
) -> Option<u32> {
    let addresses = sum(0, headers.addresses(frame)?);
    let length = u32::try_from(length).ok()?;
    let [a, b, c, d] = length.to_be_bytes();
    Some(sum(addresses, &[a, b, c, d, 0, transport.number()]))
}

/// The length that counts for the checksum: the datagram's part behind the IP headers, and for UDP what its header says.
fn transport_length(frame: &[u8], headers: &Headers) -> Option<(Transport, usize, usize)> {
    let (transport, at) = headers.transport?;
    let room = headers.end.checked_sub(at)?;
    let length = match transport {
        Transport::Tcp => room,
        Transport::Udp => {
            let field = frame.get(at.checked_add(4)?..)?.first_chunk::<2>()?;
            match usize::from(u16::from_be_bytes(*field)) {
                // A large send of UDP, or a jumbogram.
                0 => room,
                length => length,
            }
        }
    };
    (length >= 8 && length <= room).then_some((transport, at, length))
}

/// Computes the TCP or UDP checksum in place.
fn fill_transport(frame: &mut [u8], headers: &Headers) -> Option<()> {
    let (transport, at, length) = transport_length(frame, headers)?;
    let pseudo = pseudo_header(frame, headers, transport, length)?;
    let end = at.checked_add(length)?;
    let part = frame.get_mut(at..end)?;
    let place = transport.checksum_offset();
    *part.get_mut(place..)?.first_chunk_mut::<2>()? = [0; 2];
    let mut checksum = !(sum(pseudo, part) as u16);
    // Zero says that there is none.
    if checksum == 0 && transport == Transport::Udp {
        checksum = 0xFFFF;
    }
    *part.get_mut(place..)?.first_chunk_mut::<2>()? = checksum.to_be_bytes();
    Some(())
}

/// Puts the sum over the pseudo header where the TCP checksum belongs, for somebody who adds the rest.
pub(super) fn begin_tcp(frame: &mut [u8], headers: &Headers) -> Option<()> {
    let (transport, at, length) = transport_length(frame, headers)?;
    let begun = pseudo_header(frame, headers, transport, length)? as u16;
    let place = at.checked_add(transport.checksum_offset())?;
    *frame.get_mut(place..)?.first_chunk_mut::<2>()? = begun.to_be_bytes();
    Some(())
}

/// The IPv4 header with its options.
fn ip_header(frame: &[u8], headers: &Headers) -> Option<core::ops::Range<usize>> {
    if headers.ip != Ip::V4 {
        return None;
    }
    let words = usize::from(frame.get(headers.network)? & 0xF);
    let end = headers.network.checked_add(4 * words.max(5))?;
    (end <= frame.len()).then_some(headers.network..end)
}

/// Computes the checksum of the IPv4 header in place.
pub(super) fn fill_ip(frame: &mut [u8], headers: &Headers) -> Option<()> {
    let header = frame.get_mut(ip_header(frame, headers)?)?;
    *header.get_mut(10..)?.first_chunk_mut::<2>()? = [0; 2];
    let checksum = !(sum(0, header) as u16);
    *header.get_mut(10..)?.first_chunk_mut::<2>()? = checksum.to_be_bytes();
    Some(())
}

/// Computes the checksums that the guest has left to the host.
///
/// # Errors
///
/// [`NotApplicable`] when the frame has not the headers for it; the rest is done.
pub fn fill_checksums(frame: &mut [u8], wanted: TransmitChecksum) -> Result<(), NotApplicable> {
    let headers = Headers::find(frame).ok_or(NotApplicable)?;
    let mut done = Some(());
    if wanted.ip() {
        done = done.and(fill_ip(frame, &headers));
    }
    let transport = headers.transport.map(|(transport, _)| transport);
    if wanted.tcp() || wanted.udp() {
        let is_meant = match transport {
            Some(Transport::Tcp) => wanted.tcp(),
            Some(Transport::Udp) => wanted.udp(),
            None => false,
        };
        let filled = is_meant.then(|| fill_transport(frame, &headers)).flatten();
        done = done.and(filled);
    }
    done.ok_or(NotApplicable)
}

/// Computes all checksums of a TCP frame whose headers are known.
pub(super) fn fill_all(frame: &mut [u8], headers: &Headers) -> Result<(), NotApplicable> {
    if headers.ip == Ip::V4 {
        fill_ip(frame, headers).ok_or(NotApplicable)?;
    }
    fill_transport(frame, headers).ok_or(NotApplicable)
}

/// Verifies the checksums of a frame. `None` when there is nothing to say: no IPv4 header, no whole TCP or UDP datagram,
/// or a UDP datagram without a checksum.
pub fn verify_checksums(frame: &[u8], headers: &Headers) -> Option<ReceiveChecksum> {
    let mut result = None;
    let mut say = |good: bool, [right, wrong]: [ReceiveChecksum; 2]| {
        let word = if good { right } else { wrong };
        let before = result.unwrap_or(ReceiveChecksum(0));
        result = Some(ReceiveChecksum::and(before, word));
    };
    if let Some(header) = ip_header(frame, headers).and_then(|header| frame.get(header)) {
        let good = sum(0, header) == 0xFFFF;
        say(good, [ReceiveChecksum::IP_GOOD, ReceiveChecksum::IP_FAILED]);
    }
    if let Some((transport, good)) = verify_transport(frame, headers) {
        say(
            good,
            match transport {
                Transport::Tcp => [ReceiveChecksum::TCP_GOOD, ReceiveChecksum::TCP_FAILED],
                Transport::Udp => [ReceiveChecksum::UDP_GOOD, ReceiveChecksum::UDP_FAILED],
            },
        );
    }
    result
}

fn verify_transport(frame: &[u8], headers: &Headers) -> Option<(Transport, bool)> {
    let (transport, at, length) = transport_length(frame, headers)?;
    let part = frame.get(at..at.checked_add(length)?)?;
    let field = part
        .get(transport.checksum_offset()..)?
        .first_chunk::<2>()?;
    if *field == [0; 2] && transport == Transport::Udp {
        // Over IPv4 there may be none. Over IPv6 there must be, and the guest may judge.
        return None;
    }
    let pseudo = pseudo_header(frame, headers, transport, length)?;
    Some((transport, sum(pseudo, part) == 0xFFFF))
}
