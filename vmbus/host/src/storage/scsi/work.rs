//! What a command does to a disk: on any thread, piece by piece, until it is done or told to stop.

use alloc::sync::Arc;
use alloc::vec::Vec;

use super::sense::{Additional, Sense, SenseKey};
use super::transfer::{Outcome, Transfer};
use crate::disk::{Disk, DiskError};
use crate::storage::activity::Running;
use crate::storage::counters;
use crate::storage::vstor::Direction;
use crate::sync::Mutex;

/// Bytes that are moved at one time.
const PIECE: usize = 128 << 10;

/// Pieces of memory that are kept for the next command.
const KEPT_PIECES: usize = 16;

/// Memory in which data waits between guest and disk.
#[derive(Debug, Default)]
pub struct Pieces(Mutex<Vec<Vec<u8>>>);

impl Pieces {
    fn take(&self) -> Vec<u8> {
        let kept = self.0.lock().pop();
        kept.unwrap_or_else(|| alloc::vec![0; PIECE])
    }

    fn give_back(&self, piece: Vec<u8>) {
        let mut kept = self.0.lock();
        if kept.len() < KEPT_PIECES {
            kept.push(piece);
        }
    }
}

/// Bytes of a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The first.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// What is to be done.
#[derive(Clone, Debug)]
pub enum Operation {
    /// To the guest; with `through` from the medium itself.
    Read { extent: Extent, through: bool },
    /// From the guest; with `through` to the medium itself.
    Write { extent: Extent, through: bool },
    /// Whether it can be read, and with `compare` whether it is what the guest has.
    Verify {
        extent: Extent,
        compare: Option<Compare>,
    },
    /// Makes durable what was written.
    Flush,
    /// Gives these back; with `through` durably.
    Unmap { extents: Vec<Extent>, through: bool },
}

/// With what VERIFY compares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compare {
    /// With as many bytes.
    All,
    /// With one block, again and again.
    OneBlock,
}

/// A command on its way to the disk.
#[derive(Debug)]
pub struct Work {
    pub(super) disk: DiskHandle,
    pub(super) operation: Operation,
    pub(super) transfer: Transfer,
    pub(super) pieces: Arc<Pieces>,
    pub(super) counters: Arc<counters::Unit>,
    pub(super) running: Running,
}

/// A disk in a struct that can be printed.
#[derive(Clone)]
pub struct DiskHandle(pub Arc<dyn Disk>);

impl core::fmt::Debug for DiskHandle {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Disk({:?})", self.0.geometry())
    }
}

impl Work {
    /// Does it. Blocks for as long as the disk does. The command counts as under way until this value is dropped.
    pub fn run(&self) -> Outcome {
        let outcome = self.perform();
        self.counters.ended(&outcome);
        outcome
    }

    fn perform(&self) -> Outcome {
        let done = match &self.operation {
            Operation::Read { extent, through } => self.read(*extent, *through),
            Operation::Write { extent, through } => self.write(*extent, *through),
            Operation::Verify { extent, compare } => self.verify(*extent, *compare),
            Operation::Flush => self.flush().map(|()| 0),
            Operation::Unmap { extents, through } => self.unmap(extents, *through),
        };
        done.map_or_else(|outcome| outcome, Outcome::Good)
    }

    fn read(&self, extent: Extent, through: bool) -> Result<u32, Outcome> {
        if through && self.disk.0.write_cache() {
            self.flush()?;
        }
        let moved = self.for_each_piece(extent, |at, done, piece| {
            let disk = &self.disk.0;
            disk.read(at, piece)
                .map_err(|error| self.failed(&error, Direction::IN))?;
            Ok(self.transfer.put(done, piece)?)
        })?;
        self.counters.read_bytes.add(moved.into());
        Ok(moved)
    }

    fn write(&self, extent: Extent, through: bool) -> Result<u32, Outcome> {
        let moved = self.for_each_piece(extent, |at, done, piece| {
            self.transfer.get(done, piece)?;
            let disk = &self.disk.0;
            disk.write(at, piece)
                .map_err(|error| self.failed(&error, Direction::OUT))?;
            self.counters.written_bytes.add(piece.len() as u64);
            Ok(())
        })?;
        if through {
            self.flush()?;
        }
        Ok(moved)
    }

    fn verify(&self, extent: Extent, compare: Option<Compare>) -> Result<u32, Outcome> {
        let block = self.disk.0.geometry().logical.max(1) as usize;
        let mut expected = match compare {
            Some(_) => self.pieces.take(),
            None => Vec::new(),
        };
        let verified = self.for_each_piece(extent, |at, done, piece| {
            let disk = &self.disk.0;
            disk.read(at, piece)
                .map_err(|error| self.failed(&error, Direction::IN))?;
            let length = match compare {
                None => return Ok(()),
                Some(Compare::All) => piece.len(),
                Some(Compare::OneBlock) => block,
            };
            let start = if compare == Some(Compare::All) {
                done
            } else {
                0
            };
            let expected = expected.get_mut(..length).ok_or(Outcome::Invalid)?;
            self.transfer.get(start, expected)?;
            let differs = piece.chunks(length.max(1)).any(|chunk| chunk != expected);
            if differs {
                let sense = Sense::new(SenseKey::MISCOMPARE, Additional::MISCOMPARE);
                return Err(sense.into());
            }
            Ok(())
        });
        if compare.is_some() {
            self.pieces.give_back(expected);
        }
        let taken = match compare {
            None => 0,
            Some(Compare::All) => verified?,
            Some(Compare::OneBlock) => verified?.min(block as u32),
        };
        verified.map(|_| taken)
    }

    fn flush(&self) -> Result<(), Outcome> {
        self.counters.flushes.one();
        let flushed = self.disk.0.flush();
        flushed.map_err(|error| self.failed(&error, Direction::OUT))
    }

    fn unmap(&self, extents: &[Extent], through: bool) -> Result<u32, Outcome> {
        for extent in extents.iter().filter(|extent| extent.length != 0) {
            self.check_stopped()?;
            let unmapped = self.disk.0.unmap(extent.offset, extent.length);
            unmapped.map_err(|error| self.failed(&error, Direction::OUT))?;
            self.counters.unmapped_bytes.add(extent.length);
        }
        if through {
            self.flush()?;
        }
        Ok(self.transfer.room(Direction::OUT))
    }

    /// Cuts an extent into pieces, each with its place on the disk and in the guest's data. Returns the bytes of all.
    fn for_each_piece(
        &self,
        extent: Extent,
        mut each: impl FnMut(u64, usize, &mut [u8]) -> Result<(), Outcome>,
    ) -> Result<u32, Outcome> {
        let mut memory = self.pieces.take();
        let mut done = 0;
        let mut result = Ok(());
        while done < extent.length && result.is_ok() {
            let count = (extent.length - done).min(PIECE as u64) as usize;
            let at = extent.offset.saturating_add(done);
            let piece = memory.get_mut(..count).ok_or(Outcome::Invalid);
            result = self
                .check_stopped()
                .and(piece)
                .and_then(|piece| each(at, done as usize, piece));
            done += count as u64;
        }
        self.pieces.give_back(memory);
        result.map(|()| u32::try_from(done).unwrap_or(u32::MAX))
    }

    fn check_stopped(&self) -> Result<(), Outcome> {
        match self.running.stopped() {
            Some(why) => Err(Outcome::Stopped(why)),
            None => Ok(()),
        }
    }

    /// What a failure of the disk is in SCSI.
    fn failed(&self, error: &DiskError, direction: Direction) -> Outcome {
        let sense = match error {
            DiskError::OutOfRange => Sense::illegal(Additional::LBA_OUT_OF_RANGE),
            DiskError::ReadOnly => Sense::new(SenseKey::DATA_PROTECT, Additional::WRITE_PROTECTED),
            DiskError::Medium(offset) => {
                let code = if direction == Direction::IN {
                    Additional::UNRECOVERED_READ_ERROR
                } else {
                    Additional::WRITE_ERROR
                };
                let block = offset / u64::from(self.disk.0.geometry().logical.max(1));
                Sense::new(SenseKey::MEDIUM_ERROR, code).at_block(block)
            }
            DiskError::NotReady => Sense::new(SenseKey::NOT_READY, Additional::BECOMING_READY),
            DiskError::NoSpace => {
                Sense::new(SenseKey::DATA_PROTECT, Additional::SPACE_ALLOCATION_FAILED)
            }
            DiskError::Failed(_) => {
                Sense::new(SenseKey::HARDWARE_ERROR, Additional::INTERNAL_FAILURE)
            }
        };
        sense.into()
    }
}
