//! One end of one stream, without I/O: which pieces may come, which may go, and
//! how much waits in between.
//!
//! Both ends begin with [`WINDOW`] bytes of credit: so much they may send before
//! the other end has taken any of it. What is taken is given back as credit. So a
//! stream that nobody reads holds up its own sender and nothing else, and holds
//! at most [`WINDOW`] bytes each way.

use std::collections::VecDeque;

use crate::protocol::Piece;

/// Most bytes that are on their way in one direction.
pub const WINDOW: usize = 256 << 10;

/// Credit is given back in portions of at least this, or when nothing waits.
const PORTION: usize = WINDOW / 4;

/// One end of a stream.
#[derive(Debug)]
pub struct Flow {
    /// Bytes that we may send.
    credit: usize,
    /// We have sent [`Piece::End`].
    ended: bool,
    /// What came and was not taken.
    waiting: VecDeque<Vec<u8>>,
    /// Bytes that came and whose credit was not given back.
    held: usize,
    /// Of these, bytes that were taken.
    taken: usize,
    /// [`Piece::End`] came.
    their_end: bool,
    /// [`Piece::Reset`] came or went.
    reset: bool,
}

/// A piece that may not come in the stream's state: the other side is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More data than there was credit for, or data without a byte.
    #[error("data without credit")]
    Data,
    /// More credit than there can be.
    #[error("too much credit")]
    Credit,
    /// Data or another end after the end.
    #[error("something after the end")]
    AfterEnd,
}

/// What there is to do for the one who takes what came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// These bytes; tell of them by [`Flow::done`] when they are out of the way.
    Data(Vec<u8>),
    /// No more will come.
    End,
    /// The stream is broken off.
    Reset,
    /// Nothing yet.
    Wait,
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            credit: WINDOW,
            ended: false,
            waiting: VecDeque::new(),
            held: 0,
            taken: 0,
            their_end: false,
            reset: false,
        }
    }
}

impl Flow {
    /// Takes a piece from the other end.
    ///
    /// # Errors
    /// When it breaks the rules; the stream is then to be broken off.
    pub fn receive(&mut self, piece: Piece) -> Result<(), Violation> {
        if self.reset {
            return Ok(()); // It was on its way when the stream was broken off.
        }
        match piece {
            Piece::Data(_) | Piece::End if self.their_end => return Err(Violation::AfterEnd),
            Piece::Data(data) => {
                if data.is_empty() || data.len() > WINDOW - self.held {
                    return Err(Violation::Data);
                }
                self.held += data.len();
                self.waiting.push_back(data);
            }
            Piece::Credit(more) => {
                self.credit = usize::try_from(more)
                    .ok()
                    .and_then(|more| self.credit.checked_add(more))
                    .filter(|credit| *credit <= WINDOW)
                    .ok_or(Violation::Credit)?;
            }
            Piece::End => self.their_end = true,
            Piece::Reset => self.reset(),
        }
        Ok(())
    }

    /// Bytes that may be sent now.
    pub fn room(&self) -> usize {
        if self.ended || self.reset {
            0
        } else {
            self.credit
        }
    }

    /// So many bytes are being sent; at most [`Self::room`].
    pub fn sent(&mut self, bytes: usize) {
        self.credit = self.credit.saturating_sub(bytes);
    }

    /// We send our end.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// The stream is broken off, by either end: what waits is dropped.
    pub fn reset(&mut self) {
        self.reset = true;
        self.waiting.clear();
    }

    /// What came next.
    pub fn take(&mut self) -> Next {
        if self.reset {
            return Next::Reset;
        }
        match self.waiting.pop_front() {
            Some(data) => Next::Data(data),
            None if self.their_end => Next::End,
            None => Next::Wait,
        }
    }

    /// So many bytes from [`Self::take`] are out of the way. Gives the credit to send
    /// back, if it is time to.
    pub fn done(&mut self, bytes: usize) -> Option<u32> {
        self.taken = self.taken.saturating_add(bytes).min(self.held);
        if self.reset || self.their_end || self.taken == 0 {
            return None;
        }
        if self.taken < PORTION && !self.waiting.is_empty() {
            return None;
        }
        let credit = std::mem::take(&mut self.taken);
        self.held -= credit;
        u32::try_from(credit).ok()
    }

    /// Whether the stream was broken off.
    pub fn is_reset(&self) -> bool {
        self.reset
    }

    /// Whether nothing more will go or come, and nothing waits.
    pub fn is_over(&self) -> bool {
        self.reset || (self.ended && self.their_end && self.waiting.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn data(bytes: usize) -> Piece {
        Piece::Data(vec![7; bytes])
    }

    #[test]
    fn an_end_may_send_a_window_and_then_only_what_was_taken() {
        let (mut near, mut far) = (Flow::default(), Flow::default());
        near.sent(WINDOW);
        far.receive(data(WINDOW)).unwrap();
        assert_eq!(near.room(), 0);
        let Next::Data(bytes) = far.take() else {
            panic!("nothing came");
        };
        let credit = far.done(bytes.len()).unwrap();
        near.receive(Piece::Credit(credit)).unwrap();
        assert_eq!(near.room(), WINDOW);
    }

    #[test]
    fn data_beyond_the_credit_is_a_violation() {
        let mut flow = Flow::default();
        flow.receive(data(WINDOW)).unwrap();
        assert_eq!(flow.receive(data(1)), Err(Violation::Data));
    }

    #[test]
    fn data_without_a_byte_is_a_violation_for_it_would_cost_no_credit() {
        assert_eq!(Flow::default().receive(data(0)), Err(Violation::Data));
    }

    #[test]
    fn credit_for_what_was_never_sent_is_a_violation() {
        assert_eq!(
            Flow::default().receive(Piece::Credit(1)),
            Err(Violation::Credit)
        );
    }

    #[test]
    fn what_came_before_the_end_comes_out_before_it() {
        let mut flow = Flow::default();
        flow.receive(data(3)).unwrap();
        flow.receive(Piece::End).unwrap();
        assert_eq!(flow.receive(data(1)), Err(Violation::AfterEnd));
        assert_eq!(flow.take(), Next::Data(vec![7; 3]));
        assert_eq!(flow.done(3), None, "nobody wants credit any more");
        assert_eq!(flow.take(), Next::End);
        assert!(!flow.is_over(), "our half is open");
        assert_eq!(flow.room(), WINDOW);
        flow.end();
        assert!(flow.is_over());
    }

    #[test]
    fn a_reset_drops_what_waits_and_what_still_comes() {
        let mut flow = Flow::default();
        flow.receive(data(3)).unwrap();
        flow.receive(Piece::Reset).unwrap();
        assert_eq!(flow.take(), Next::Reset);
        assert_eq!(flow.receive(data(WINDOW)), Ok(()));
        assert!(flow.waiting.is_empty());
        assert_eq!(flow.room(), 0);
        assert!(flow.is_over());
    }

    fn piece() -> impl Strategy<Value = Piece> {
        prop_oneof![
            4 => (0..WINDOW / 2).prop_map(data),
            2 => (0..WINDOW as u32 * 2).prop_map(Piece::Credit),
            1 => Just(Piece::End),
            1 => Just(Piece::Reset),
        ]
    }

    proptest! {
        #[test]
        fn whatever_comes_no_more_than_a_window_waits(
            steps in vec((piece(), any::<bool>()), 0..60),
        ) {
            let mut flow = Flow::default();
            for (piece, take) in steps {
                let _ = flow.receive(piece);
                if take && let Next::Data(bytes) = flow.take() {
                    flow.done(bytes.len());
                }
                let waiting: usize = flow.waiting.iter().map(Vec::len).sum();
                prop_assert!(waiting <= flow.held && flow.held <= WINDOW);
                prop_assert!(flow.taken <= flow.held && flow.room() <= WINDOW);
            }
        }

        #[test]
        fn two_honest_ends_never_break_the_rules_and_never_stand_still(
            sizes in vec(1..WINDOW, 1..40),
            takes in vec(any::<bool>(), 1..200),
        ) {
            let (mut near, mut far) = (Flow::default(), Flow::default());
            let (mut left, mut got): (usize, usize) = (sizes.iter().sum(), 0);
            let total = left;
            let mut sizes = sizes.into_iter().cycle();
            // First as it pleases, then until all has come over.
            for take in takes.into_iter().chain(std::iter::repeat_n(true, 20 * WINDOW)) {
                let bytes = sizes.next().unwrap_or(1).min(near.room()).min(left);
                if bytes > 0 {
                    near.sent(bytes);
                    left -= bytes;
                    far.receive(data(bytes)).unwrap();
                }
                if take && let Next::Data(bytes) = far.take() {
                    got += bytes.len();
                    if let Some(credit) = far.done(bytes.len()) {
                        near.receive(Piece::Credit(credit)).unwrap();
                    }
                }
                if got == total {
                    break;
                }
            }
            prop_assert_eq!(got, total);
        }
    }
}
