//! A queue of messages that can be made to lose, double, delay and reorder them.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use vmbus::protocol::MessageType;

/// What happens to a message on its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// It is lost.
    Drop,
    /// It comes twice.
    Duplicate,
    /// It comes later by this time, in units of 100 ns, and others overtake it.
    Delay(u64),
    /// The next message comes before it.
    Swap,
}

/// Which messages meet a fault. The types tell the directions apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rule {
    /// Messages of this type; of every type when `None`.
    pub kind: Option<MessageType>,
    /// How many such messages pass unharmed first.
    pub skip: u32,
    /// How many meet the fault then.
    pub count: u32,
    /// What happens to them.
    pub fault: Fault,
}

impl Rule {
    /// Every message of this type meets the fault.
    pub const fn always(kind: MessageType, fault: Fault) -> Self {
        Self {
            kind: Some(kind),
            skip: 0,
            count: u32::MAX,
            fault,
        }
    }

    /// The next message of this type meets the fault.
    pub const fn once(kind: MessageType, fault: Fault) -> Self {
        Self {
            kind: Some(kind),
            skip: 0,
            count: 1,
            fault,
        }
    }
}

#[derive(Debug)]
pub(super) struct Line<T> {
    queue: VecDeque<(u64, T)>,
    /// Waits for the message that overtakes it.
    swapped: Option<T>,
    rules: Vec<Rule>,
}

impl<T: Clone> Line<T> {
    pub(super) const fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            swapped: None,
            rules: Vec::new(),
        }
    }

    pub(super) fn inject(&mut self, rule: Rule) {
        self.rules.push(rule);
    }

    /// Forgets every rule, and brings a message that waits to be overtaken.
    pub(super) fn heal(&mut self) {
        self.rules.clear();
        if let Some(overtaken) = self.swapped.take() {
            self.queue.push_back((0, overtaken));
        }
    }

    /// Forgets what is under way.
    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.swapped = None;
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len() + usize::from(self.swapped.is_some())
    }

    pub(super) fn push(&mut self, now: u64, kind: MessageType, message: T) {
        match self.fault(kind) {
            Some(Fault::Drop) => {}
            Some(Fault::Duplicate) => {
                self.put(now, message.clone());
                self.put(now, message);
            }
            Some(Fault::Delay(by)) => self.put(now.saturating_add(by), message),
            Some(Fault::Swap) if self.swapped.is_none() => self.swapped = Some(message),
            Some(Fault::Swap) | None => self.put(now, message),
        }
    }

    fn put(&mut self, at: u64, message: T) {
        self.queue.push_back((at, message));
        if let Some(overtaken) = self.swapped.take() {
            self.queue.push_back((at, overtaken));
        }
    }

    /// The fault that a message of this type meets now.
    fn fault(&mut self, kind: MessageType) -> Option<Fault> {
        let concerns = |rule: &&mut Rule| rule.count > 0 && rule.kind.is_none_or(|of| of == kind);
        let rule = self.rules.iter_mut().find(concerns)?;
        if rule.skip > 0 {
            rule.skip -= 1;
            return None;
        }
        rule.count -= 1;
        Some(rule.fault)
    }

    /// The next message that has arrived by now.
    pub(super) fn pop(&mut self, now: u64) -> Option<T> {
        match self.queue.iter().position(|(at, _)| *at <= now) {
            Some(position) => self.queue.remove(position).map(|(_, message)| message),
            // Nothing came that could overtake it.
            None if self.queue.is_empty() => self.swapped.take(),
            None => None,
        }
    }

    /// When the next message arrives.
    pub(super) fn deadline(&self) -> Option<u64> {
        let swapped = self.swapped.is_some().then_some(0);
        self.queue.iter().map(|(at, _)| *at).chain(swapped).min()
    }
}
