//! The synthetic interrupt controller of one VP: messages and event flags, and the interrupts
//! that announce them (TLFS, Virtual Interrupt Controller; spec tlfs.md 5).

#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use super::event::{self, EventPage};
use super::features::Features;
use super::message::{self, Message, MessagePage};
use super::msr::{self, Sint, SintConfig, Vector};
use super::overlay::{Overlay, Page};

/// The SynIC of one VP. All methods are for that VP alone, except where they say otherwise.
pub struct Synic {
    messages: Overlay<MessagePage>,
    events: Overlay<EventPage>,
    auto_eoi: bool,
    statistics: Counters,
}

impl Synic {
    /// Turns on the SynIC of the VP that runs this code, and has each SINT of `routes` raise
    /// its vector. 6 VM exits and 2 for each route.
    ///
    /// The interrupts end by themselves (AutoEOI) unless the host advises against that: see
    /// [`auto_eoi`](Self::auto_eoi). Needs the privilege
    /// [`SYNIC`](super::features::Privileges::SYNIC).
    pub fn enable(
        features: &Features,
        messages: Page,
        events: Page,
        routes: &[(Sint, Vector)],
    ) -> Self {
        let synic = Self {
            messages: messages.enable(msr::SIMP),
            events: events.enable(msr::SIEFP),
            auto_eoi: features.auto_eoi(),
            statistics: Counters::default(),
        };
        for &(sint, vector) in routes {
            configure(sint, |config| config.raising(vector, synic.auto_eoi));
        }
        msr::SCONTROL.write(msr::SCONTROL.read().with_enabled(true));
        synic
    }

    /// Whether the interrupts of the SINTs end by themselves. If so the handler must not send an
    /// EOI.
    pub fn auto_eoi(&self) -> bool {
        self.auto_eoi
    }

    /// Takes the next message out of the slot of `sint`. Call it until it returns `None`: one
    /// interrupt may stand for several messages.
    pub fn take_message(&self, sint: Sint) -> Option<Message> {
        // Cannot fail: the page has a slot for every `Sint`.
        let slot = self.messages.slots.get(sint.index())?;
        let message = message::take(slot, || {
            count(&self.statistics.ends_of_message, 1);
            end_of_message();
        })?;
        count(&self.statistics.messages, 1);
        Some(message)
    }

    /// Calls `handle` with each event flag of `sint` that the host has set, lowest first, and
    /// clears it before. Returns how many there were.
    pub fn for_each_event(&self, sint: Sint, handle: impl FnMut(u16)) -> u32 {
        let events = self
            .events
            .flags
            .get(sint.index())
            .map_or(0, |flags| event::take(flags, handle));
        count(&self.statistics.events, events.into());
        events
    }

    /// Counts an interrupt that brought neither message nor event; hosts send some.
    pub fn count_empty_interrupt(&self) {
        count(&self.statistics.empty_interrupts, 1);
    }

    /// What has come in so far. May be read by any VP.
    pub fn statistics(&self) -> Statistics {
        let Counters {
            messages,
            ends_of_message,
            events,
            empty_interrupts,
        } = &self.statistics;
        Statistics {
            messages: messages.load(Ordering::Relaxed),
            ends_of_message: ends_of_message.load(Ordering::Relaxed),
            events: events.load(Ordering::Relaxed),
            empty_interrupts: empty_interrupts.load(Ordering::Relaxed),
        }
    }

    /// Keeps `sint` from raising interrupts. Its messages stay in the slot and can still be taken,
    /// so that a panicking kernel can poll for the host's last answer.
    pub fn mask(&self, sint: Sint) {
        configure(sint, SintConfig::masked);
    }

    /// Lets go of everything: masks the SINTs of `sources`, takes the pages away, turns the
    /// SynIC off. For the end of the kernel, after VMBus is unloaded.
    pub fn disable(&self, sources: &[Sint]) {
        for &sint in sources {
            self.mask(sint);
        }
        self.messages.disable();
        self.events.disable();
        msr::SCONTROL.write(msr::SCONTROL.read().with_enabled(false));
    }
}

/// What a SynIC has received.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Statistics {
    /// Messages taken, of every SINT.
    pub messages: u64,
    /// How often the hypervisor had to be told that a slot is free. Each is a VM exit.
    pub ends_of_message: u64,
    /// Event flags taken.
    pub events: u64,
    /// Interrupts that brought nothing.
    pub empty_interrupts: u64,
}

#[derive(Default)]
struct Counters {
    messages: AtomicU64,
    ends_of_message: AtomicU64,
    events: AtomicU64,
    empty_interrupts: AtomicU64,
}

/// Counts without a locked instruction: only this VP's interrupt handler writes.
fn count(counter: &AtomicU64, more: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(more),
        Ordering::Relaxed,
    );
}

/// Reads, changes and writes the configuration of a SINT: its reserved bits have to be kept.
fn configure(sint: Sint, change: impl FnOnce(SintConfig) -> SintConfig) {
    let register = msr::sint(sint);
    register.write(change(register.read()));
}

/// Makes the hypervisor look at its message queues again.
fn end_of_message() {
    msr::EOM.write(0);
}
