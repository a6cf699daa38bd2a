//! The two headers, and how one replaces the other (MS-VHDX 2.2.2).

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::MIB;
use crate::error::{Error, Part, Result};
use crate::format::{Guid, HEADERS, Header, SECTOR, is_sealed, read_structure, seal};
use crate::storage::Storage;

/// The longest log that is read: what is kept while replaying is bounded by it. Hyper-V and QEMU make logs of 1 MiB.
pub const MAX_LOG: u64 = 16 * MIB;

/// The current header, and where it is.
#[derive(Debug)]
pub struct Headers {
    current: Header,
    /// Which of the two places holds the current one.
    place: usize,
}

impl Headers {
    /// Reads both and chooses the current one.
    ///
    /// # Errors
    /// When none is valid, or the current one asks for what is not known.
    pub fn read(storage: &dyn Storage) -> Result<Self> {
        let mut found = [None, None];
        for (slot, offset) in found.iter_mut().zip(HEADERS) {
            let bytes = read_structure(storage, offset, SECTOR as usize)?;
            if is_sealed(&bytes, b"head") {
                *slot = Header::read_from_prefix(&bytes)
                    .ok()
                    .map(|(header, _)| header);
            }
        }
        let damaged = |why| Error::damaged(Part::Headers, why);
        let (place, current) = match found {
            [None, None] => return Err(damaged("neither of the two is valid")),
            [Some(first), None] => (0, first),
            [None, Some(second)] => (1, second),
            [Some(first), Some(second)] => match first.sequence.get().cmp(&second.sequence.get()) {
                std::cmp::Ordering::Greater => (0, first),
                std::cmp::Ordering::Less => (1, second),
                // The format knows no order between them, so they have to agree.
                std::cmp::Ordering::Equal if first == second => (0, first),
                std::cmp::Ordering::Equal => {
                    return Err(damaged("the two differ and have the same number"));
                }
            },
        };
        if current.version.get() != 1 {
            return Err(Error::Version(current.version.get()));
        }
        if !current.log.is_zero() && current.log_version.get() != 0 {
            return Err(Error::Version(current.log_version.get()));
        }
        let (offset, length) = (
            current.log_offset.get(),
            u64::from(current.log_length.get()),
        );
        if offset < MIB || !offset.is_multiple_of(MIB) || !length.is_multiple_of(MIB) {
            return Err(damaged("the log's place is not a multiple of 1 MiB"));
        }
        if length == 0 {
            return Err(damaged("they name no log"));
        }
        if length > MAX_LOG {
            return Err(Error::Unsupported(format!(
                "its log of {} MiB is too long",
                length / MIB
            )));
        }
        Ok(Self { current, place })
    }

    /// Headers of a new file, not yet written.
    pub fn new(log_offset: u64, log_length: u32) -> Self {
        Self {
            current: Header {
                signature: *b"head",
                checksum: 0.into(),
                sequence: 0.into(),
                file_write: Uuid::new_v4().into(),
                data_write: Uuid::new_v4().into(),
                log: Uuid::nil().into(),
                log_version: 0.into(),
                version: 1.into(),
                log_length: log_length.into(),
                log_offset: log_offset.into(),
            },
            place: 1,
        }
    }

    /// Changes the header: first the one that is not current, then, when that is durable, the other.
    pub fn update(
        &mut self,
        storage: &dyn Storage,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut header = self.current;
        change(&mut header);
        for _ in 0..HEADERS.len() {
            let next = header.sequence.get().checked_add(1);
            let next = next.ok_or_else(|| Error::damaged(Part::Headers, "no number is left"))?;
            header.sequence = next.into();
            header.checksum = 0.into();
            let place = (self.place + 1) % HEADERS.len();
            let mut bytes = [0; SECTOR as usize];
            bytes[..size_of::<Header>()].copy_from_slice(header.as_bytes());
            seal(&mut bytes);
            storage.write_at(HEADERS[place], &bytes)?;
            storage.sync()?;
            (self.current, self.place) = (header, place);
        }
        Ok(())
    }

    /// Where the log is: offset and length.
    pub fn log_place(&self) -> (u64, u64) {
        let header = &self.current;
        (header.log_offset.get(), header.log_length.get().into())
    }

    /// Which entries of the log count; zeros when none do.
    pub fn log(&self) -> Guid {
        self.current.log
    }

    /// What names the file's content.
    pub fn file_write(&self) -> Uuid {
        self.current.file_write.uuid()
    }

    /// What names the virtual disk's content.
    pub fn data_write(&self) -> Uuid {
        self.current.data_write.uuid()
    }
}
