//! Synthetic timer 0 of one VP, as a one-shot alarm in reference time (TLFS, Timers; spec tlfs.md
//! 2.3).
//!
//! Where the hypervisor can, the timer raises its interrupt itself (direct mode); elsewhere it
//! sends a message to a SINT. It is configured once; after that one register write arms it, and
//! none when it is armed for that time already.

#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::features::Features;
use super::message::{Message, MessageType};
use super::msr::{self, Sint, TimerConfig, Vector};

/// Synthetic timer 0 of one VP. All methods are for that VP alone, with interrupts off.
#[derive(Debug)]
pub struct Timer {
    mode: Mode,
    alarm: Alarm,
}

/// How the timer makes itself heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// It raises this vector, which needs an EOI like any interrupt.
    Direct(Vector),
    /// It sends a message to this SINT.
    Message(Sint),
}

impl Timer {
    /// Sets up the timer of the VP that runs this code, stopped: directly on `vector` where the
    /// hypervisor offers that, else by message to `sint`, which must not be SINT0. Two VM exits.
    /// Needs the privilege [`SYNTHETIC_TIMERS`](super::features::Privileges::SYNTHETIC_TIMERS).
    pub fn start(features: &Features, vector: Vector, sint: Sint) -> Self {
        let (mode, config) = if features.direct_timers() {
            (Mode::Direct(vector), TimerConfig::direct(vector))
        } else {
            (Mode::Message(sint), TimerConfig::message(sint))
        };
        // Fields may change only while the timer is off.
        msr::STIMER0_CONFIG.write(TimerConfig::OFF);
        msr::STIMER0_CONFIG.write(config);
        Self {
            mode,
            alarm: Alarm::new(),
        }
    }

    /// How the timer makes itself heard.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Has the timer expire at `deadline`, in reference time, instead of any earlier choice; at
    /// once if that has passed. One VM exit, or none if it is armed for that time already.
    pub fn arm(&self, deadline: u64) {
        if let Some(count) = self.alarm.arm(deadline) {
            msr::STIMER0_COUNT.write(count);
        }
    }

    /// Stops the timer. One VM exit, or none if it is not armed. An expiry that is already on its
    /// way still arrives.
    pub fn cancel(&self) {
        if let Some(count) = self.alarm.cancel() {
            msr::STIMER0_COUNT.write(count);
        }
    }

    /// To be called when the timer has made itself heard, before it is armed anew.
    pub fn expired(&self) {
        self.alarm.expired();
    }

    /// The deadline that the timer is armed for.
    pub fn deadline(&self) -> Option<u64> {
        self.alarm.deadline()
    }

    /// Turns the timer off for good.
    pub fn stop(&self) {
        self.alarm.cancel();
        msr::STIMER0_CONFIG.write(TimerConfig::OFF);
    }
}

/// What the timer's registers hold, as far as we know; 0 is "stopped", as in the count register.
///
/// Where an expiry comes in between, this errs towards "stopped": then the next arming writes the
/// register once more than needed, but none is ever left out.
#[derive(Debug)]
struct Alarm(AtomicU64);

impl Alarm {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// What to write into the count register for `deadline`.
    fn arm(&self, deadline: u64) -> Option<u64> {
        // A count of 0 would stop the timer; 1 is as much in the past.
        let count = deadline.max(1);
        (self.0.swap(count, Ordering::Relaxed) != count).then_some(count)
    }

    /// What to write into the count register to stop.
    fn cancel(&self) -> Option<u64> {
        (self.0.swap(0, Ordering::Relaxed) != 0).then_some(0)
    }

    fn expired(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn deadline(&self) -> Option<u64> {
        match self.0.load(Ordering::Relaxed) {
            0 => None,
            count => Some(count),
        }
    }
}

/// The message of a timer that has expired. Times are reference time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Expiry {
    /// Which timer of the VP: 0 to 3.
    pub timer: u32,
    reserved: u32,
    /// When it was to expire.
    pub expiration: u64,
    /// When the message was put into the slot.
    pub delivery: u64,
}

const _: () = assert!(size_of::<Expiry>() == 24);

impl Expiry {
    /// The expiry that `message` is about, if it is about one.
    pub fn parse(message: &Message) -> Option<Self> {
        if message.kind != MessageType::TIMER_EXPIRED {
            return None;
        }
        Self::read_from_prefix(message.payload())
            .ok()
            .map(|(expiry, _)| expiry)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Arm(u64),
        Cancel,
        Advance(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_u64..40).prop_map(Step::Arm),
            Just(Step::Cancel),
            (1_u64..10).prop_map(Step::Advance),
        ]
    }

    proptest! {
        /// A timer as the hypervisor runs it: it never lacks a write that matters, and never gets
        /// one that does not.
        #[test]
        fn register_follows_every_wish(steps in proptest::collection::vec(step(), 0..60)) {
            let alarm = Alarm::new();
            let (mut register, mut time, mut wish) = (0_u64, 0_u64, None);
            for step in steps {
                let write = match step {
                    Step::Arm(deadline) => {
                        wish = Some(deadline.max(1));
                        alarm.arm(deadline)
                    }
                    Step::Cancel => {
                        wish = None;
                        alarm.cancel()
                    }
                    Step::Advance(by) => {
                        time += by;
                        None
                    }
                };
                if let Some(count) = write {
                    prop_assert_ne!(count, register, "a write that changes nothing");
                    register = count;
                }
                prop_assert_eq!(register, wish.unwrap_or(0));
                prop_assert_eq!(alarm.deadline(), wish);
                // The expiry interrupt.
                if register != 0 && register <= time {
                    register = 0;
                    wish = None;
                    alarm.expired();
                }
            }
        }
    }

    #[test]
    fn late_expiry_after_rearming_costs_a_write_and_loses_nothing() {
        let alarm = Alarm::new();
        assert_eq!(alarm.arm(10), Some(10));
        // Expired in the hypervisor, but the interrupt is held off while a new deadline is set.
        assert_eq!(alarm.arm(20), Some(20));
        alarm.expired();
        assert_eq!(alarm.arm(20), Some(20));
    }

    #[test]
    fn a_deadline_of_zero_does_not_stop_the_timer() {
        assert_eq!(Alarm::new().arm(0), Some(1));
    }

    #[test]
    fn expiry_is_read_from_its_payload() {
        let mut bytes = [0; 24];
        bytes[8] = 0x10;
        bytes[16] = 0x20;
        let (expiry, _) = Expiry::read_from_prefix(&bytes).unwrap();
        assert_eq!(
            (expiry.timer, expiry.expiration, expiry.delivery),
            (0, 0x10, 0x20)
        );
    }
}
