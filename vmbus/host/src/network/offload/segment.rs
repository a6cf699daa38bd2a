//! Cuts TCP frames that are longer than the network takes (NDIS large send offload, version 2).

use alloc::vec::Vec;

use super::checksum::{begin_tcp, fill_all, fill_ip};
use super::{Headers, Ip, NotApplicable, Transport};

/// The least data of a segment: what IPv4's least MTU of 68 bytes leaves. Less would make a storm of one frame.
pub const MIN_SEGMENT: usize = 28;

/// Bits of the TCP flags byte that only the last segment has: FIN and PSH.
const LAST_ONLY: u8 = 0x09;

/// The bit that only the first segment has: CWR (RFC 3168 6.1.2).
const FIRST_ONLY: u8 = 0x80;

/// What is left of the headers of a frame to be cut, once they have been checked.
struct Large {
    headers: Headers,
    tcp: usize,
}

impl Large {
    fn find(frame: &[u8]) -> Result<Self, NotApplicable> {
        let headers = Headers::find(frame).ok_or(NotApplicable)?;
        match headers.transport {
            // The lengths in its headers are not to be relied on: they have no room for those of a large send.
            Some((Transport::Tcp, tcp)) => Ok(Self {
                headers: Headers {
                    end: frame.len(),
                    ..headers
                },
                tcp,
            }),
            _ => Err(NotApplicable),
        }
    }

    /// Sets the datagram's length and all checksums of a frame that has these headers.
    fn finish(&self, frame: &mut [u8]) -> Result<(), NotApplicable> {
        let headers = self.resize(frame)?;
        fill_all(frame, &headers)
    }

    /// Sets the datagram's length of a frame that has these headers.
    fn resize(&self, frame: &mut [u8]) -> Result<Headers, NotApplicable> {
        let headers = Headers {
            end: frame.len(),
            ..self.headers
        };
        let network = headers.network;
        let (place, length) = match headers.ip {
            Ip::V4 => (2, frame.len().saturating_sub(network)),
            Ip::V6 => (4, frame.len().saturating_sub(network + 40)),
        };
        let length = u16::try_from(length).map_err(|_| NotApplicable)?;
        put(frame, network + place, length.to_be_bytes()).ok_or(NotApplicable)?;
        Ok(headers)
    }
}

fn put<const N: usize>(frame: &mut [u8], at: usize, bytes: [u8; N]) -> Option<()> {
    *frame.get_mut(at..)?.first_chunk_mut::<N>()? = bytes;
    Some(())
}

fn get<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..)?.first_chunk::<N>().copied()
}

/// Cuts a TCP frame into such with at most `size` bytes of data each, with their own lengths, identifications, sequence
/// numbers, flags and checksums. Each is built in `buffer` and handed to `emit`.
///
/// # Errors
///
/// [`NotApplicable`] when this is no TCP frame, or `size` is below [`MIN_SEGMENT`]. Nothing was handed out then.
pub fn segment(
    frame: &[u8],
    size: usize,
    buffer: &mut Vec<u8>,
    mut emit: impl FnMut(&[u8]),
) -> Result<(), NotApplicable> {
    let large = Large::find(frame)?;
    let (head, data) = frame
        .split_at_checked(large.headers.payload)
        .ok_or(NotApplicable)?;
    let too_long = head.len().saturating_add(size) > usize::from(u16::MAX);
    if size < MIN_SEGMENT || too_long {
        return Err(NotApplicable);
    }
    let sequence = get::<4>(head, large.tcp + 4).ok_or(NotApplicable)?;
    let sequence = u32::from_be_bytes(sequence);
    let [flags] = get::<1>(head, large.tcp + 13).ok_or(NotApplicable)?;
    let identification = get::<2>(head, large.headers.network + 4).ok_or(NotApplicable)?;
    let identification = u16::from_be_bytes(identification);
    let count = data.len().div_ceil(size).max(1);
    for index in 0..count {
        let from = index * size;
        let piece = data.get(from..data.len().min(from + size));
        let piece = piece.ok_or(NotApplicable)?;
        buffer.clear();
        buffer.extend_from_slice(head);
        buffer.extend_from_slice(piece);
        let mut kept = flags;
        if index != 0 {
            kept &= !FIRST_ONLY;
        }
        if index + 1 != count {
            kept &= !LAST_ONLY;
        }
        // Both count around their ends.
        let place = sequence.wrapping_add(from as u32);
        put(buffer, large.tcp + 4, place.to_be_bytes()).ok_or(NotApplicable)?;
        put(buffer, large.tcp + 13, [kept]).ok_or(NotApplicable)?;
        if large.headers.ip == Ip::V4 {
            let number = identification.wrapping_add(index as u16);
            let at = large.headers.network + 4;
            put(buffer, at, number.to_be_bytes()).ok_or(NotApplicable)?;
        }
        large.finish(buffer)?;
        emit(buffer);
    }
    Ok(())
}

/// Sets lengths and checksums of a TCP frame that is to be cut, for a network that takes it whole.
///
/// # Errors
///
/// [`NotApplicable`] when this is no TCP frame, or longer than IP can say.
pub fn resize_large(frame: &mut [u8]) -> Result<(), NotApplicable> {
    let large = Large::find(frame)?;
    large.finish(frame)
}

/// What a network has to know to cut a TCP frame itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segmentation {
    /// Which IP it is.
    pub ip: Ip,
    /// Where the TCP header is, in bytes from the frame's beginning.
    pub tcp: usize,
    /// Bytes of all headers.
    pub headers: usize,
    /// Bytes of data in each segment but the last.
    pub size: u16,
    /// The first segment alone says that the congestion window was reduced (CWR).
    pub congestion: bool,
}

/// Sets the lengths and the IP checksum of a TCP frame for a network that cuts it. Where its TCP checksum belongs is the sum over
/// the pseudo header of the whole, as virtio asks for (virtio 1.3, 5.1.6.2).
///
/// # Errors
///
/// [`NotApplicable`] when this is no TCP frame, it is longer than IP can say, or `size` is below [`MIN_SEGMENT`].
pub fn leave_uncut(frame: &mut [u8], size: usize) -> Result<Segmentation, NotApplicable> {
    let large = Large::find(frame)?;
    let size = u16::try_from(size).map_err(|_| NotApplicable)?;
    if usize::from(size) < MIN_SEGMENT {
        return Err(NotApplicable);
    }
    let headers = large.resize(frame)?;
    if headers.ip == Ip::V4 {
        fill_ip(frame, &headers).ok_or(NotApplicable)?;
    }
    begin_tcp(frame, &headers).ok_or(NotApplicable)?;
    let [flags] = get::<1>(frame, large.tcp + 13).ok_or(NotApplicable)?;
    Ok(Segmentation {
        ip: headers.ip,
        tcp: large.tcp,
        headers: headers.payload,
        size,
        congestion: flags & FIRST_ONLY != 0,
    })
}
