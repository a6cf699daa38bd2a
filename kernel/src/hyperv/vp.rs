//! One virtual processor: its index, and everything of this directory that belongs to it.

#![forbid(unsafe_code)]

use core::fmt;

use super::features::Features;
use super::hypercall::MessagePoster;
use super::msr::{self, Sint, Value, Vector};
use super::overlay::Page;
use super::stimer::{Expiry, Mode, Timer};
use super::synic::Synic;

/// The index of a VP within its partition; not its APIC id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VpIndex(pub u32);

impl VpIndex {
    /// The index of the VP that runs this code. One VM exit; the VP's own data should keep it.
    pub fn read() -> Self {
        msr::VP_INDEX.read()
    }
}

impl fmt::Display for VpIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Value for VpIndex {
    fn from_bits(bits: u64) -> Self {
        Self(bits as u32)
    }

    fn bits(self) -> u64 {
        self.0.into()
    }
}

/// The pages of one VP.
#[derive(Debug)]
pub struct Pages {
    /// For the messages that it posts.
    pub post: Page,
    /// For the messages that it receives.
    pub messages: Page,
    /// For its event flags.
    pub events: Page,
}

/// The interrupt vectors of one VP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vectors {
    /// VMBus messages and events.
    pub vmbus: Vector,
    /// Synthetic timer 0.
    pub timer: Vector,
}

/// What one VP has of the hypervisor. Belongs into that VP's own data.
pub struct VirtualProcessor {
    /// Its index.
    pub index: VpIndex,
    /// Its way to post messages.
    pub poster: MessagePoster,
    /// Its interrupt controller.
    pub synic: Synic,
    /// Its timer.
    pub timer: Timer,
}

const _: () = {
    // It lies in the VP's own data, whose statistics other VPs read.
    const fn shareable<T: Send + Sync>() {}
    shareable::<VirtualProcessor>();
};

impl VirtualProcessor {
    /// Sets up the VP that runs this code, with interrupts off and its local APIC on (an interrupt
    /// that a disabled APIC gets is lost): SynIC with VMBus on its SINT, and
    /// timer 0. The host must offer what [`Features::check`] asks for.
    pub fn start(features: &Features, pages: Pages, vectors: Vectors) -> Self {
        let vmbus = (Sint::VMBUS, vectors.vmbus);
        let timer = (Sint::TIMER, vectors.timer);
        // The timer's SINT is needed only where the timer cannot raise its vector itself.
        let routes: &[_] = if features.direct_timers() {
            &[vmbus]
        } else {
            &[vmbus, timer]
        };
        Self {
            index: VpIndex::read(),
            poster: MessagePoster::new(pages.post),
            synic: Synic::enable(features, pages.messages, pages.events, routes),
            timer: Timer::start(features, vectors.timer, Sint::TIMER),
        }
    }

    /// Whether an interrupt on the VMBus vector needs an EOI.
    pub fn vmbus_needs_eoi(&self) -> bool {
        !self.synic.auto_eoi()
    }

    /// Whether an interrupt on the timer's vector needs an EOI.
    pub fn timer_needs_eoi(&self) -> bool {
        match self.timer.mode() {
            Mode::Direct(_) => true,
            Mode::Message(_) => !self.synic.auto_eoi(),
        }
    }

    /// Handles an interrupt on the timer's vector: returns whether the timer has expired, and lets
    /// it be armed anew.
    pub fn take_expiry(&self) -> bool {
        let expired = match self.timer.mode() {
            Mode::Direct(_) => true,
            Mode::Message(sint) => {
                let mut expired = false;
                while let Some(message) = self.synic.take_message(sint) {
                    expired |= Expiry::parse(&message).is_some_and(|expiry| expiry.timer == 0);
                }
                expired
            }
        };
        if expired {
            self.timer.expired();
        }
        expired
    }

    /// Lets go of everything, for the end of the kernel.
    pub fn stop(&self) {
        self.timer.stop();
        self.synic.disable(match self.timer.mode() {
            Mode::Direct(_) => &[Sint::VMBUS],
            Mode::Message(_) => &[Sint::VMBUS, Sint::TIMER],
        });
    }
}
