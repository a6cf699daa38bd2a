//! The log: what must change in one piece is written here first (MS-VHDX 2.3).

mod replay;
mod search;
mod writer;

pub use replay::{Replay, Replayed};
pub use search::search;
pub use writer::{LogWriter, MAX_SECTORS};

use std::io;

use crate::format::SECTOR;
use crate::region::Extent;
use crate::storage::Storage;

/// Reads bytes of the log from a place in it on, round its end; place and length are whole sectors.
fn read(storage: &dyn Storage, log: Extent, at: u64, data: &mut [u8]) -> io::Result<()> {
    for (number, sector) in (0..).zip(data.chunks_mut(SECTOR as usize)) {
        let within = (at + number * SECTOR) % log.length;
        storage.read_at(log.offset + within, sector)?;
    }
    Ok(())
}
