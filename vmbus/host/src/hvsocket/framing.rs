//! Packets of a byte-mode pipe (spec hvsock.md 5, vmbus.md 6.5).

use alloc::vec::Vec;

use crate::message_faults::Layout;

/// The most data in one packet, in bytes.
pub const MAX_DATA: usize = 16384;

/// Bytes in front of the data.
pub(super) const HEADER: usize = 8;

/// The type of a packet with data.
const DATA: u32 = 1;

/// Where faults find the fields of the header; packets have no id.
pub(super) const LAYOUT: Layout = Layout {
    id: 0..0,
    kind: 0..4,
    length: 4..8,
    envelope: None,
};

/// What a packet of the guest says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Frame<'p> {
    /// Bytes of the stream, at least one.
    Data(&'p [u8]),
    /// The guest sends no more.
    End,
}

/// Takes a packet apart. An error is what no guest may send.
pub(super) fn parse(payload: &[u8]) -> Result<Frame<'_>, &'static str> {
    let Some((header, data)) = payload.split_first_chunk::<HEADER>() else {
        return Err("a packet without a pipe header");
    };
    let word = u64::from_le_bytes(*header);
    let (kind, length) = ((word & 0xFFFF_FFFF) as u32, (word >> 32) as usize);
    if kind != DATA {
        return Err("a pipe packet of another type than data");
    }
    if length > MAX_DATA {
        return Err("a pipe packet with more data than any may have");
    }
    match data.get(..length) {
        None => Err("a pipe packet shorter than it says"),
        // Packets are padded to 8 bytes.
        Some(_) if data.len() >= length + 8 => Err("a pipe packet longer than it says"),
        Some([]) => Ok(Frame::End),
        Some(data) => Ok(Frame::Data(data)),
    }
}

/// Room for a packet with up to `data` bytes.
pub(super) fn blank(data: usize) -> Vec<u8> {
    alloc::vec![0; HEADER + data]
}

/// Makes `packet` one with the first `data` bytes behind its header; none is the end.
pub(super) fn finish(packet: &mut Vec<u8>, data: usize) {
    packet.truncate(HEADER + data);
    let header = ((data as u64) << 32 | u64::from(DATA)).to_le_bytes();
    if let Some(place) = packet.get_mut(..HEADER) {
        place.copy_from_slice(&header);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(data: &[u8]) -> Vec<u8> {
        let mut packet = blank(data.len());
        packet[HEADER..].copy_from_slice(data);
        finish(&mut packet, data.len());
        packet
    }

    #[test]
    fn data_comes_back_and_no_data_is_the_end() {
        assert_eq!(parse(&packet(b"abc")), Ok(Frame::Data(b"abc")));
        assert_eq!(parse(&packet(b"")), Ok(Frame::End));
        let mut padded = packet(b"abc");
        padded.extend([0xA5; 5]);
        assert_eq!(parse(&padded), Ok(Frame::Data(b"abc")));
        assert!(parse(&packet(&[7; MAX_DATA])).is_ok());
    }

    #[test]
    fn other_types_and_lengths_that_do_not_fit_are_errors() {
        assert!(parse(&[]).is_err());
        assert!(parse(&[1, 0, 0, 0, 0, 0, 0]).is_err());
        for kind in [0, 2, 3, 4, 5] {
            let mut packet = packet(b"abc");
            packet[0] = kind;
            assert!(parse(&packet).is_err());
        }
        for length in [4, 255] {
            let mut packet = packet(b"abc");
            packet[4] = length;
            assert!(parse(&packet).is_err());
        }
        let mut long = packet(b"abc");
        long.extend([0; 8]);
        assert!(parse(&long).is_err());
        assert!(parse(&packet(&[7; MAX_DATA + 1])).is_err());
    }

    proptest! {
        #[test]
        fn whatever_comes_is_data_within_the_packet_or_an_error(bytes: Vec<u8>) {
            if let Ok(Frame::Data(data)) = parse(&bytes) {
                prop_assert!(!data.is_empty() && data.len() + HEADER <= bytes.len());
            }
        }
    }
}
