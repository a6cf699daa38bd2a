//! The data of one command: guest memory, in one direction, and how the command ends.

use alloc::vec::Vec;

use super::sense::Sense;
use crate::memory::{AccessError, GuestBuffer};
use crate::storage::vstor::Direction;

/// How a command ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Done, with so many bytes transferred: as many as were asked for, or all that there are.
    Good(u32),
    /// Done, but the guest's buffer took only so many of the bytes that its own CDB asked for.
    Overrun(u32),
    /// The unit refuses or fails.
    Check(Sense),
    /// The request contradicts itself or its memory cannot be used.
    Invalid,
    /// Given up because of a reset, or because the unit was taken away.
    Stopped(Stop),
}

/// Why commands are given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// The guest has reset the unit.
    Reset,
    /// The unit was taken away.
    Removed,
}

impl Outcome {
    /// Done; there was no data.
    pub const DONE: Self = Self::Good(0);
}

impl From<Sense> for Outcome {
    fn from(sense: Sense) -> Self {
        Self::Check(sense)
    }
}

impl From<AccessError> for Outcome {
    fn from(_: AccessError) -> Self {
        Self::Invalid
    }
}

/// The guest's memory for the data of one command.
#[derive(Clone, Debug)]
pub struct Transfer {
    buffer: Option<GuestBuffer>,
    length: u32,
    direction: Direction,
}

impl Transfer {
    /// `length` bytes of `buffer`. `None` when there are fewer.
    pub fn new(buffer: Option<GuestBuffer>, length: u32, direction: Direction) -> Option<Self> {
        let there = buffer.as_ref().map_or(0, GuestBuffer::len);
        (there >= length as usize).then_some(Self {
            buffer,
            length,
            direction,
        })
    }

    /// How many bytes can go this way.
    pub fn room(&self, direction: Direction) -> u32 {
        if self.direction == direction {
            self.length
        } else {
            0
        }
    }

    /// Whether there is data that goes the other way.
    fn is_against(&self, direction: Direction) -> bool {
        self.length != 0 && self.direction != direction
    }

    /// Gives the guest `bytes`, or as many as it asked for in the CDB and has room for.
    pub fn deliver(&self, bytes: &[u8], allocation: u32) -> Outcome {
        let wanted = bytes.len().min(allocation as usize);
        if wanted != 0 && self.is_against(Direction::IN) {
            return Outcome::Invalid;
        }
        let count = wanted.min(self.room(Direction::IN) as usize);
        let part = bytes.get(..count).unwrap_or_default();
        if let Err(error) = self.put(0, part) {
            return error.into();
        }
        // Not longer than the length, which has 32 bits.
        let moved = count as u32;
        if count < wanted {
            Outcome::Overrun(moved)
        } else {
            Outcome::Good(moved)
        }
    }

    /// Takes a parameter list of `length` bytes from the guest.
    ///
    /// # Errors
    ///
    /// [`Outcome::Invalid`] when the guest does not give that many.
    pub fn take(&self, length: u16) -> Result<Vec<u8>, Outcome> {
        let mut bytes = alloc::vec![0; length.into()];
        if u32::from(length) > self.room(Direction::OUT) {
            return Err(Outcome::Invalid);
        }
        self.get(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies from the guest.
    ///
    /// # Errors
    ///
    /// When the guest's memory cannot be reached.
    pub fn get(&self, offset: usize, bytes: &mut [u8]) -> Result<(), AccessError> {
        match &self.buffer {
            Some(buffer) => buffer.read(offset, bytes),
            None if bytes.is_empty() => Ok(()),
            None => Err(AccessError::NoExternalData),
        }
    }

    /// Copies to the guest.
    ///
    /// # Errors
    ///
    /// When the guest's memory cannot be reached.
    pub fn put(&self, offset: usize, bytes: &[u8]) -> Result<(), AccessError> {
        match &self.buffer {
            Some(buffer) => buffer.write(offset, bytes),
            None if bytes.is_empty() => Ok(()),
            None => Err(AccessError::NoExternalData),
        }
    }
}
