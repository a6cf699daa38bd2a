//! The header in front of each message of a pipe channel (spec vmbus.md 6.5).

use super::ChannelError;

/// Bytes of a pipe header.
pub(super) const HEADER: usize = 8;

/// The most data in one pipe message.
pub(super) const MAX_DATA: usize = 16384;

/// The message type of data.
const DATA: u32 = 1;

/// The header for `length` bytes of data, at most [`MAX_DATA`].
pub(super) fn header(length: usize) -> [u8; HEADER] {
    ((length as u64) << 32 | u64::from(DATA)).to_le_bytes()
}

/// Where the data of a received pipe message lies in its packet.
pub(super) fn parse(payload: &[u8]) -> Result<core::ops::Range<usize>, ChannelError> {
    let Some((header, data)) = payload.split_first_chunk::<HEADER>() else {
        return Err(ChannelError::Pipe { kind: 0, length: 0 });
    };
    let word = u64::from_le_bytes(*header);
    let (kind, length) = ((word & 0xFFFF_FFFF) as u32, (word >> 32) as u32);
    if kind != DATA || length as usize > data.len() {
        return Err(ChannelError::Pipe { kind, length });
    }
    Ok(HEADER..HEADER + length as usize)
}
