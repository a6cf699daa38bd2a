//! Faults in the messages that a provider makes: what a broken host would send instead.
//!
//! Faults of the channel below (delay, stall, a corrupted ring) are not the matter of this file: they need not know what
//! the bytes mean. These do.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;
use core::str::FromStr;

/// What happens to a message of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MessageFault {
    /// It has another transaction id, or belongs to another connection.
    WrongId,
    /// It has a type that nobody knows.
    WrongType,
    /// It has fewer bytes than it says.
    Short,
    /// It has more bytes than it says, and more than any message of its kind.
    Oversized,
    /// It says that it is longer than it is.
    Overstated,
    /// It is never sent: the guest waits for the answer, or the host for one to it.
    Lost,
    /// It comes twice.
    Twice,
}

/// Every fault and its name on a command line.
const NAMES: [(MessageFault, &str); 7] = [
    (MessageFault::WrongId, "wrong-id"),
    (MessageFault::WrongType, "wrong-type"),
    (MessageFault::Short, "short"),
    (MessageFault::Oversized, "oversized"),
    (MessageFault::Overstated, "overstated"),
    (MessageFault::Lost, "lost"),
    (MessageFault::Twice, "twice"),
];

impl MessageFault {
    /// Every fault.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.into_iter().map(|(fault, _)| fault)
    }
}

impl fmt::Display for MessageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(fault, _)| fault == self);
        f.write_str(name.map_or("", |(_, name)| name))
    }
}

/// The text names no fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UnknownFault;

impl fmt::Display for UnknownFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a fault in messages is one of")?;
        for (at, (_, name)) in NAMES.iter().enumerate() {
            write!(f, "{} {name}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl core::error::Error for UnknownFault {}

impl FromStr for MessageFault {
    type Err = UnknownFault;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fault = NAMES.iter().find(|(_, name)| *name == text);
        fault.map(|(fault, _)| *fault).ok_or(UnknownFault)
    }
}

/// Where a provider's messages keep what a fault changes, in bytes from the start.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// The id of the transaction; empty when messages have none.
    pub(crate) id: Range<usize>,
    /// The type.
    pub(crate) kind: Range<usize>,
    /// The length, little endian.
    pub(crate) length: Range<usize>,
    /// The length of what follows in the packet, when the message lies in an envelope that has to stay whole: 32 bits, little
    /// endian.
    pub(crate) envelope: Option<Range<usize>>,
}

/// Bytes that are added to an oversized message: more than a page.
const EXCESS: usize = 4200;

/// The faults that wait for a message.
#[derive(Debug, Default)]
pub(crate) struct MessageFaults(VecDeque<(MessageFault, u32)>);

impl MessageFaults {
    /// None.
    pub(crate) const fn new() -> Self {
        Self(VecDeque::new())
    }

    /// The next `count` messages, behind those that have a fault already, have this one.
    pub(crate) fn inject(&mut self, fault: MessageFault, count: u32) {
        if count > 0 {
            self.0.push_back((fault, count));
        }
    }

    /// Nothing goes wrong any more.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether a message would have a fault.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn next(&mut self) -> Option<MessageFault> {
        let (fault, count) = self.0.front_mut()?;
        let fault = *fault;
        *count -= 1;
        if *count == 0 {
            self.0.pop_front();
        }
        Some(fault)
    }

    /// Gives `send` what is sent instead of `message`: nothing, one message or two.
    pub(crate) fn apply(
        &mut self,
        layout: &Layout,
        mut message: Vec<u8>,
        mut send: impl FnMut(Vec<u8>),
    ) {
        let Some(fault) = self.next() else {
            return send(message);
        };
        let length = message.len();
        match fault {
            MessageFault::WrongId => invert(&mut message, &layout.id),
            MessageFault::WrongType => invert(&mut message, &layout.kind),
            MessageFault::Short => resize(&mut message, length / 2, layout),
            MessageFault::Oversized => resize(&mut message, length + EXCESS, layout),
            MessageFault::Overstated => {
                for byte in message.get_mut(layout.length.clone()).into_iter().flatten() {
                    *byte = 0xFF;
                }
            }
            MessageFault::Lost => return,
            MessageFault::Twice => send(message.clone()),
        }
        send(message);
    }
}

fn resize(message: &mut Vec<u8>, length: usize, layout: &Layout) {
    message.resize(length, 0xA5);
    let Some(envelope) = &layout.envelope else {
        return;
    };
    let follows = length.saturating_sub(envelope.end) as u32;
    if let Some(place) = message.get_mut(envelope.clone()) {
        place.copy_from_slice(&follows.to_le_bytes());
    }
}

fn invert(message: &mut [u8], place: &Range<usize>) {
    for byte in message.get_mut(place.clone()).into_iter().flatten() {
        *byte ^= 0xFF;
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    const LAYOUT: Layout = Layout {
        id: 0..1,
        kind: 1..2,
        length: 2..4,
        envelope: None,
    };

    fn faulty(fault: MessageFault) -> Vec<Vec<u8>> {
        let mut faults = MessageFaults::new();
        faults.inject(fault, 1);
        let mut sent = Vec::new();
        faults.apply(&LAYOUT, alloc::vec![1, 2, 6, 0, 9, 9], |message| {
            sent.push(message);
        });
        assert!(faults.is_empty());
        sent
    }

    #[test]
    fn each_fault_does_what_its_name_says() {
        use MessageFault as Fault;
        assert_eq!(faulty(Fault::WrongId), [[0xFE, 2, 6, 0, 9, 9]]);
        assert_eq!(faulty(Fault::WrongType), [[1, 0xFD, 6, 0, 9, 9]]);
        assert_eq!(faulty(Fault::Short), [[1, 2, 6]]);
        assert_eq!(faulty(Fault::Oversized)[0].len(), 6 + EXCESS);
        assert_eq!(faulty(Fault::Overstated), [[1, 2, 0xFF, 0xFF, 9, 9]]);
        assert_eq!(faulty(Fault::Lost), [[0; 6]; 0]);
        assert_eq!(faulty(Fault::Twice), [[1, 2, 6, 0, 9, 9]; 2]);
    }

    #[test]
    fn an_envelope_stays_whole() {
        let layout = Layout {
            envelope: Some(0..4),
            ..LAYOUT
        };
        let mut faults = MessageFaults::new();
        faults.inject(MessageFault::Short, 1);
        faults.apply(
            &layout,
            alloc::vec![8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
            |short| {
                assert_eq!(short, [2, 0, 0, 0, 1, 2]);
            },
        );
    }

    #[test]
    fn a_fault_meets_as_many_messages_as_it_was_asked_for() {
        let mut faults = MessageFaults::new();
        faults.inject(MessageFault::Lost, 2);
        faults.inject(MessageFault::Twice, 1);
        let mut sent = Vec::new();
        for number in 0..4 {
            faults.apply(&LAYOUT, alloc::vec![number], |message| sent.push(message));
        }
        assert_eq!(sent, [[2], [2], [3]]);
    }

    #[test]
    fn every_fault_has_a_name_that_is_read_back() {
        for fault in MessageFault::all() {
            assert_eq!(fault.to_string().parse(), Ok(fault));
        }
        let unknown = "slow".parse::<MessageFault>().unwrap_err();
        assert!(
            unknown.to_string().ends_with(
                "one of wrong-id, wrong-type, short, oversized, overstated, lost, twice"
            )
        );
    }
}
