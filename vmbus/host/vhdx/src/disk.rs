//! An open disk: reads, writes, gives back, makes durable.
//!
//! The content of a block is written in its place at once. Changes of the BAT are kept in memory until the next flush, which
//!
//! 1. syncs, so that the blocks that the BAT will name are durable, and what the log's last entry changed is too,
//! 2. writes the changed pages of the BAT as one entry of the log and syncs,
//! 3. writes the pages in their places, which the next flush's first step makes durable.
//!
//! A block's place is used for another block only after the BAT that no longer names it is durable.
//!
//! When the storage is full, the write that finds no room fails, and nothing else: log and BAT get their room before anything
//! depends on it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use uuid::Uuid;

use crate::bat::{Bat, Entry, State};
use crate::error::{Error, Result};
use crate::format::{Guid, SECTOR};
use crate::header::Headers;
use crate::log::{LogWriter, MAX_SECTORS};
use crate::metadata::Parameters;
use crate::opening::{self, Content};
use crate::region::Extent;
use crate::space::{Place, Space};
use crate::storage::Storage;

/// Changed pages of the BAT that are kept before they are written without a flush.
const MAX_DIRTY: usize = 64;

/// Bytes of places that wait for the BAT to be durable before they are used again. More are not kept waiting for a flush, or a
/// guest that writes blocks and gives them back would grow the file beyond its disk.
const MAX_RELEASED: u64 = 64 << 20;

/// A VHDX file that is open. All methods may be called from several threads at once.
///
/// Dropping it closes it, and cannot tell of errors: see [`close`](Self::close).
pub struct Vhdx {
    storage: Arc<dyn Storage>,
    parameters: Parameters,
    read_only: bool,
    blocks: RwLock<Blocks>,
    journal: Mutex<Journal>,
    /// The header says that the content has changed since the file was opened.
    modified: AtomicBool,
    /// What is durable is not known any more.
    stopped: AtomicBool,
}

/// Where the blocks are.
struct Blocks {
    bat: Bat,
    space: Space,
    /// Places that the BAT in memory names no more, and that on the disk still may.
    released: Vec<u64>,
}

impl Blocks {
    /// Whether the BAT is to be made durable without a flush.
    fn is_due(&self, block_size: u32) -> bool {
        let released = self.released.len() as u64 * u64::from(block_size);
        self.bat.dirty() > MAX_DIRTY || released > MAX_RELEASED
    }
}

/// What has an order on the disk. Locked before the blocks.
struct Journal {
    headers: Headers,
    log: Option<LogWriter>,
}

/// A part of a request that lies in one block.
struct Part {
    block: u64,
    /// Where in the block it begins.
    within: u64,
    /// Where in the request it begins.
    from: usize,
    length: usize,
}

impl Vhdx {
    /// Opens a disk. A log that is in use is replayed: in the file, or read-only over it.
    ///
    /// The storage must be nobody else's, unless all open it read-only.
    ///
    /// # Errors
    /// When the file is no disk that can be had here; it is unchanged then. Or when the storage fails.
    pub fn open(storage: Arc<dyn Storage>, read_only: bool) -> Result<Self> {
        let Content {
            mut headers,
            replay,
            parameters,
            bat,
            space,
        } = opening::read(&storage)?;
        let storage = match replay {
            Some(replay) if read_only => opening::view(&storage, Some(&replay)),
            Some(replay) => {
                headers.update(&storage, |header| header.file_write = Uuid::new_v4().into())?;
                replay.apply(&storage)?;
                storage.sync()?;
                headers.update(&storage, |header| header.log = Uuid::nil().into())?;
                storage
            }
            None => storage,
        };
        Ok(Self {
            storage,
            parameters,
            read_only,
            blocks: RwLock::new(Blocks {
                bat,
                space,
                released: Vec::new(),
            }),
            journal: Mutex::new(Journal { headers, log: None }),
            modified: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        })
    }

    /// What the disk is.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Whether it was opened for reading only.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Number of blocks whose content is in the file.
    pub fn present_blocks(&self) -> u64 {
        self.blocks().bat.present()
    }

    /// What names the content of the file: another one after each session that changed it.
    pub fn file_write_id(&self) -> Uuid {
        self.journal().headers.file_write()
    }

    /// What names the content of the virtual disk: another one after each session that changed it.
    pub fn data_write_id(&self) -> Uuid {
        self.journal().headers.data_write()
    }

    fn blocks(&self) -> RwLockReadGuard<'_, Blocks> {
        self.blocks.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocks_mut(&self) -> RwLockWriteGuard<'_, Blocks> {
        self.blocks.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, length: u64) -> Result<()> {
        let sector = u64::from(self.parameters.logical_sector);
        let whole = offset.is_multiple_of(sector) && length.is_multiple_of(sector);
        let end = offset.checked_add(length);
        if whole && end.is_some_and(|end| end <= self.parameters.size) {
            Ok(())
        } else {
            Err(Error::OutOfRange)
        }
    }

    fn parts(&self, offset: u64, length: usize) -> impl Iterator<Item = Part> + use<> {
        let block_size = u64::from(self.parameters.block_size);
        let mut from = 0;
        std::iter::from_fn(move || {
            (from < length).then(|| {
                let at = offset + from as u64;
                let within = at % block_size;
                let rest = (length - from) as u64;
                let part = Part {
                    block: at / block_size,
                    within,
                    from,
                    length: rest.min(block_size - within) as usize,
                };
                from += part.length;
                part
            })
        })
    }

    /// Reads from `offset` on.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when it is not whole sectors of the disk, [`Error::Io`].
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        self.check(offset, data.len() as u64)?;
        let blocks = self.blocks();
        for part in self.parts(offset, data.len()) {
            let into = &mut data[part.from..part.from + part.length];
            let entry = blocks.bat.entry(part.block);
            match entry.state {
                State::Present => self.storage.read_at(entry.offset + part.within, into)?,
                _ => into.fill(0),
            }
        }
        Ok(())
    }

    /// Writes from `offset` on; durable after the next [`flush`](Self::flush). On an error any of the sectors may have been written.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] when it is not whole sectors of the disk, [`Error::ReadOnly`], [`Error::Stopped`], [`Error::Io`].
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.check(offset, data.len() as u64)?;
        self.begin()?;
        let present = {
            let blocks = self.blocks();
            let present = |block| blocks.bat.entry(block).state == State::Present;
            let all = self
                .parts(offset, data.len())
                .all(|part| present(part.block));
            if all {
                for part in self.parts(offset, data.len()) {
                    let entry = blocks.bat.entry(part.block);
                    let from = &data[part.from..part.from + part.length];
                    self.storage.write_at(entry.offset + part.within, from)?;
                }
            }
            all
        };
        if present {
            return Ok(());
        }
        let due = {
            let mut blocks = self.blocks_mut();
            for part in self.parts(offset, data.len()) {
                let from = &data[part.from..part.from + part.length];
                self.write_part(&mut blocks, &part, from)?;
            }
            blocks.is_due(self.parameters.block_size)
        };
        if due {
            self.commit()?;
        }
        Ok(())
    }

    fn write_part(&self, blocks: &mut Blocks, part: &Part, data: &[u8]) -> Result<()> {
        let entry = blocks.bat.entry(part.block);
        if entry.state == State::Present {
            return Ok(self.storage.write_at(entry.offset + part.within, data)?);
        }
        if let Some(hole) = blocks.bat.hole(part.block) {
            self.storage.write_at(hole, &[0; SECTOR as usize])?;
        }
        let place = match entry.offset {
            0 => blocks.space.allocate()?,
            held => Place::Used(held),
        };
        let (Place::New(offset) | Place::Used(offset)) = place;
        let done = self.fill(place, blocks.space.end(), part.within, data);
        if let Err(error) = done {
            // Who held a place goes on holding it.
            if entry.offset == 0 {
                blocks.space.release(offset);
            }
            return Err(error);
        }
        let state = State::Present;
        blocks.bat.set(part.block, Entry { state, offset });
        Ok(())
    }

    /// Puts data into a block that has just got its place, and zeros around it.
    fn fill(&self, place: Place, end: u64, within: u64, data: &[u8]) -> Result<()> {
        let offset = match place {
            Place::New(offset) => {
                if self.storage.length()? < end {
                    self.storage.set_length(end)?;
                }
                offset
            }
            Place::Used(offset) => {
                // A held last block may lie at the end of a file that was cut there.
                let block = offset + u64::from(self.parameters.block_size);
                if self.storage.length()? < block {
                    self.storage.set_length(block)?;
                }
                let after = within + data.len() as u64;
                self.storage.zero(offset, within)?;
                self.storage.zero(offset + after, block - offset - after)?;
                offset
            }
        };
        Ok(self.storage.write_at(offset + within, data)?)
    }

    /// Gives back the blocks that lie wholly in this range: they read as zeros. Durable after the next [`flush`](Self::flush).
    ///
    /// A fixed disk keeps its blocks and their content.
    ///
    /// # Errors
    /// As of [`write`](Self::write).
    pub fn unmap(&self, offset: u64, length: u64) -> Result<()> {
        self.check(offset, length)?;
        self.begin()?;
        if self.parameters.fixed {
            return Ok(());
        }
        let block_size = u64::from(self.parameters.block_size);
        let end = offset + length;
        let last = if end == self.parameters.size {
            self.parameters.blocks()
        } else {
            end / block_size
        };
        let due = {
            let mut blocks = self.blocks_mut();
            let first = offset.div_ceil(block_size);
            for (block, place) in blocks.bat.present_among(first..last.max(first)) {
                let unmapped = Entry {
                    state: State::Unmapped,
                    offset: 0,
                };
                blocks.bat.set(block, unmapped);
                blocks.released.push(place);
            }
            blocks.is_due(self.parameters.block_size)
        };
        if due {
            self.commit()?;
        }
        Ok(())
    }

    /// Makes every write and unmap that has returned durable.
    ///
    /// # Errors
    /// [`Error::Stopped`], [`Error::Io`]; the disk takes no more writes then.
    pub fn flush(&self) -> Result<()> {
        if self.read_only || !self.modified.load(Ordering::Acquire) {
            return Ok(());
        }
        self.running()?;
        if self.blocks().bat.dirty() == 0 {
            // Somebody may be on the way to make the BAT durable that names what was written.
            let _journal = self.journal();
            return self.essential(|| Ok(self.storage.sync()?));
        }
        self.commit()
    }

    fn running(&self) -> Result<()> {
        if self.stopped.load(Ordering::Acquire) {
            Err(Error::Stopped)
        } else {
            Ok(())
        }
    }

    /// Does what must not fail: after a failure nobody knows what is durable.
    fn essential<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.running()?;
        let result = work();
        if result.is_err() {
            self.stopped.store(true, Ordering::Release);
        }
        result
    }

    /// Before the first change: the header says that file and disk are no longer what they were.
    fn begin(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        self.running()?;
        if self.modified.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut journal = self.journal();
        if self.modified.load(Ordering::Acquire) {
            return Ok(());
        }
        journal.make_room(&self.storage)?;
        self.essential(|| {
            journal.headers.update(&self.storage, |header| {
                header.file_write = Uuid::new_v4().into();
                header.data_write = Uuid::new_v4().into();
            })
        })?;
        self.modified.store(true, Ordering::Release);
        Ok(())
    }

    /// Makes the BAT durable as it is now, with all blocks that it names.
    fn commit(&self) -> Result<()> {
        let mut journal = self.journal();
        self.essential(|| {
            let (pages, released) = {
                let mut blocks = self.blocks_mut();
                let released = std::mem::take(&mut blocks.released);
                (blocks.bat.take_dirty(), released)
            };
            for sectors in pages.chunks(MAX_SECTORS) {
                // The blocks, and what the last entry changed.
                self.storage.sync()?;
                journal.log(&self.storage, sectors)?;
                for (offset, bytes) in sectors {
                    self.storage.write_at(*offset, &bytes[..])?;
                }
            }
            if pages.is_empty() {
                self.storage.sync()?;
            }
            let mut blocks = self.blocks_mut();
            for offset in released {
                blocks.space.release(offset);
            }
            Ok(())
        })
    }

    /// Makes everything durable and leaves a file whose log is not in use.
    ///
    /// # Errors
    /// As of [`flush`](Self::flush).
    pub fn close(self) -> Result<()> {
        self.finish()
    }

    fn finish(&self) -> Result<()> {
        self.flush()?;
        let mut journal = self.journal();
        if journal.log.is_some() {
            self.essential(|| {
                self.storage.sync()?;
                let nobody: Guid = Uuid::nil().into();
                journal
                    .headers
                    .update(&self.storage, |header| header.log = nobody)
            })?;
            journal.log = None;
        }
        self.modified.store(false, Ordering::Release);
        Ok(())
    }
}

impl Journal {
    /// Fills the log, which is not in use yet, with zeros: it may be a hole in the file.
    fn make_room(&self, storage: &dyn Storage) -> Result<()> {
        let (place, size) = self.headers.log_place();
        // No longer than what is read.
        let zeros = vec![0; usize::try_from(size).unwrap_or(0)];
        Ok(storage.write_at(place, &zeros)?)
    }

    /// Makes an entry of the log durable, and the log known.
    fn log(
        &mut self,
        storage: &dyn Storage,
        sectors: &[(u64, Box<[u8; SECTOR as usize]>)],
    ) -> Result<()> {
        let length = storage.length()?;
        if let Some(log) = &mut self.log {
            log.write(storage, sectors, length)?;
            return Ok(storage.sync()?);
        }
        let (offset, length_of_log) = self.headers.log_place();
        let extent = Extent {
            offset,
            length: length_of_log,
        };
        // The header names a log only when it holds an entry.
        let mut log = LogWriter::new(extent);
        log.write(storage, sectors, length)?;
        storage.sync()?;
        let guid = log.guid();
        self.headers.update(storage, |header| header.log = guid)?;
        self.log = Some(log);
        Ok(())
    }
}

impl Drop for Vhdx {
    fn drop(&mut self) {
        // Closing again after `close` finds nothing to do.
        let _ = self.finish();
    }
}
