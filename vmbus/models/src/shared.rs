//! Ring memory that tells a data race: the fields of a control page are loom's atomics, and the words of packets are
//! cells whose accesses must be ordered by those.

use std::cell::Cell;
use std::fmt;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};

use crate::ids::PAGE_SIZE;

/// Offsets of the fields of a control page.
const FIELDS: [usize; 5] = [0, 4, 8, 12, 64];

#[derive(Clone)]
pub struct SharedPages(Arc<Memory>);

struct Memory {
    pages: usize,
    /// The fields of page 0.
    fields: [AtomicU32; FIELDS.len()],
    /// The words of all pages; those of page 0 are not used.
    words: Vec<Word>,
}

/// Eight bytes of packets. Loom's threads take turns on one thread, so a plain cell holds the value; the other
/// one is loom's, which ends the run at an access that is not ordered behind the last one.
#[derive(Default)]
pub struct Word {
    value: Cell<u64>,
    accesses: UnsafeCell<()>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfBounds;

impl SharedPages {
    pub fn new(pages: usize) -> Self {
        Self(Arc::new(Memory {
            pages,
            fields: std::array::from_fn(|_| AtomicU32::new(0)),
            words: (0..pages * PAGE_SIZE / 8)
                .map(|_| Word::default())
                .collect(),
        }))
    }

    pub fn page_count(&self) -> usize {
        self.0.pages
    }

    pub fn atomic_u32(&self, offset: usize) -> Result<&AtomicU32, OutOfBounds> {
        let index = FIELDS.iter().position(|&field| field == offset);
        self.0
            .fields
            .get(index.ok_or(OutOfBounds)?)
            .ok_or(OutOfBounds)
    }

    pub fn atomic_u64(&self, offset: usize) -> Result<&Word, OutOfBounds> {
        if !offset.is_multiple_of(8) {
            return Err(OutOfBounds);
        }
        self.0.words.get(offset / 8).ok_or(OutOfBounds)
    }

    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<(), OutOfBounds> {
        for (index, chunk) in bytes.chunks_mut(8).enumerate() {
            let word = self.atomic_u64(offset + index * 8)?.load(Ordering::Relaxed);
            chunk.copy_from_slice(&word.to_ne_bytes()[..chunk.len()]);
        }
        Ok(())
    }

    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), OutOfBounds> {
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let word = u64::from_ne_bytes(chunk.try_into().map_err(|_| OutOfBounds)?);
            self.atomic_u64(offset + index * 8)?
                .store(word, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Word {
    pub fn load(&self, _: Ordering) -> u64 {
        self.accesses.with(|_| self.value.get())
    }

    pub fn store(&self, value: u64, _: Ordering) {
        self.accesses.with_mut(|_| self.value.set(value));
    }
}

impl fmt::Debug for SharedPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedPages")
    }
}
