//! The synthetic MSRs: names, numbers, and typed values (TLFS, Partition and Virtual Processor
//! Properties; spec tlfs.md 2).
//!
//! A register's type says what it holds and how it may be used. One that takes a page or
//! starts code is [`Guarded`]: reading it is safe, writing it is not.

#![forbid(unsafe_code)]

use core::marker::PhantomData;

use super::hypercall::GuestOsId;
use super::vp::VpIndex;

/// A synthetic MSR that holds a `V` and may be used as `A` says.
pub struct Msr<V, A> {
    number: u32,
    marker: PhantomData<fn() -> (V, A)>,
}

impl<V, A> Clone for Msr<V, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<V, A> Copy for Msr<V, A> {}

impl<V, A> Msr<V, A> {
    const fn new(number: u32) -> Self {
        Self {
            number,
            marker: PhantomData,
        }
    }

    /// The register's number, as RDMSR and WRMSR take it in ECX.
    pub const fn number(self) -> u32 {
        self.number
    }
}

/// May be read only: writing raises #GP.
pub enum ReadOnly {}
/// May be written only.
pub enum WriteOnly {}
/// May be read and written.
pub enum ReadWrite {}
/// May be read; writing gives a page away or starts code, and is unsafe.
pub enum Guarded {}

/// Uses of a register that include reading it.
pub trait Readable {}
impl Readable for ReadOnly {}
impl Readable for ReadWrite {}
impl Readable for Guarded {}

/// Uses of a register that include writing it from safe code.
pub trait Writable {}
impl Writable for WriteOnly {}
impl Writable for ReadWrite {}

/// A value that a register holds.
pub trait Value: Copy {
    /// The value as the register shows it; every bit pattern is representable.
    fn from_bits(bits: u64) -> Self;
    /// The value as the register takes it.
    fn bits(self) -> u64;
}

impl Value for u64 {
    fn from_bits(bits: u64) -> Self {
        bits
    }

    fn bits(self) -> u64 {
        self
    }
}

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident: $number:literal, $value:ty, $access:ty;)*) => {
        $($(#[$doc])* pub const $name: Msr<$value, $access> = Msr::new($number);)*
    };
}

registers! {
    /// Who runs in this partition. Must not be zero while the hypercall page is enabled.
    GUEST_OS_ID: 0x4000_0000, GuestOsId, ReadWrite;
    /// Where the hypercall page is.
    HYPERCALL: 0x4000_0001, OverlayAddress, Guarded;
    /// The index of this VP, by which hypercalls and VMBus name it; not its APIC id.
    VP_INDEX: 0x4000_0002, VpIndex, ReadOnly;
    /// Writing bit 0 restarts the partition.
    RESET: 0x4000_0003, u64, ReadWrite;
    /// Run time of this VP in units of 100 ns.
    VP_RUNTIME: 0x4000_0010, u64, ReadOnly;
    /// Partition reference time in units of 100 ns.
    TIME_REF_COUNT: 0x4000_0020, u64, ReadOnly;
    /// Where the reference TSC page is.
    REFERENCE_TSC: 0x4000_0021, OverlayAddress, Guarded;
    /// Frequency of the time stamp counter in Hz.
    TSC_FREQUENCY: 0x4000_0022, u64, ReadOnly;
    /// Frequency of the APIC timer in Hz.
    APIC_FREQUENCY: 0x4000_0023, u64, ReadOnly;
    /// End of interrupt for the local APIC; write 0.
    EOI: 0x4000_0070, u64, WriteOnly;
    /// Interrupt command register: destination in 63:32, command in 31:0.
    ICR: 0x4000_0071, u64, Guarded;
    /// Task priority in 7:0; 64-bit code has CR8 for it.
    TPR: 0x4000_0072, u64, ReadWrite;
    /// Where the VP assist page is.
    VP_ASSIST_PAGE: 0x4000_0073, OverlayAddress, Guarded;
    /// SynIC control of this VP.
    SCONTROL: 0x4000_0080, SynicControl, ReadWrite;
    /// SynIC version, 1.
    SVERSION: 0x4000_0081, u64, ReadOnly;
    /// Where the event flags page of this VP is.
    SIEFP: 0x4000_0082, OverlayAddress, Guarded;
    /// Where the message page of this VP is.
    SIMP: 0x4000_0083, OverlayAddress, Guarded;
    /// End of message: any write makes the hypervisor look at its message queues again.
    EOM: 0x4000_0084, u64, WriteOnly;
    /// Configuration of synthetic timer 0.
    STIMER0_CONFIG: 0x4000_00B0, TimerConfig, ReadWrite;
    /// Expiry of synthetic timer 0: absolute reference time for a one-shot timer, 0 stops it.
    STIMER0_COUNT: 0x4000_00B1, u64, ReadWrite;
    /// Reading halts the VP until an interrupt arrives, even with interrupts off.
    GUEST_IDLE: 0x4000_00F0, u64, ReadOnly;
    /// Crash parameter 0.
    CRASH_P0: 0x4000_0100, u64, ReadWrite;
    /// Crash parameter 1.
    CRASH_P1: 0x4000_0101, u64, ReadWrite;
    /// Crash parameter 2.
    CRASH_P2: 0x4000_0102, u64, ReadWrite;
    /// Crash parameter 3; with a message the guest physical address of its text.
    CRASH_P3: 0x4000_0103, u64, ReadWrite;
    /// Crash parameter 4; with a message the length of its text in bytes.
    CRASH_P4: 0x4000_0104, u64, ReadWrite;
    /// Reads the crash actions that are supported, writing carries some out.
    CRASH_CTL: 0x4000_0105, CrashControl, ReadWrite;
}

/// The register of one synthetic interrupt source.
pub const fn sint(source: Sint) -> Msr<SintConfig, ReadWrite> {
    Msr::new(0x4000_0090 + source.0 as u32)
}

/// A synthetic interrupt source, SINT0 to SINT15.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sint(u8);

impl Sint {
    /// The source that the host uses for VMBus.
    pub const VMBUS: Self = Self(2);
    /// The source that this kernel uses for timer messages where timers cannot interrupt directly.
    /// Not VMBus's own, so that a timer never waits behind a VMBus message.
    pub const TIMER: Self = Self(3);

    /// The source with this number, if there is one.
    pub const fn new(number: u8) -> Option<Self> {
        if number < 16 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number, 0 to 15.
    pub const fn number(self) -> u8 {
        self.0
    }

    pub(super) const fn index(self) -> usize {
        // The mask tells the compiler what `new` has checked.
        (self.0 & 15) as usize
    }
}

/// An interrupt vector that a synthetic source may raise: 16 to 255.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Vector(u8);

impl Vector {
    /// The vector, if a synthetic source may raise it: below 16 the register write raises #GP.
    pub const fn new(number: u8) -> Option<Self> {
        if number >= 16 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The vector's number.
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// Declares a newtype over a register's 64 bits.
macro_rules! value {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct $name(u64);

        impl Value for $name {
            fn from_bits(bits: u64) -> Self {
                Self(bits)
            }

            fn bits(self) -> u64 {
                self.0
            }
        }
    };
}

value!(
    /// Where an overlay page is: 0 enabled, 1 locked (HYPERCALL only), 11:2 to be preserved, 63:12
    /// page number.
    OverlayAddress
);

impl OverlayAddress {
    const ENABLED: u64 = 1 << 0;
    const LOCKED: u64 = 1 << 1;
    const PAGE: u64 = !0xFFF;

    /// Whether the page is there.
    pub const fn enabled(self) -> bool {
        self.0 & Self::ENABLED != 0
    }

    /// Whether the register can no longer be changed (HYPERCALL only).
    pub const fn locked(self) -> bool {
        self.0 & Self::LOCKED != 0
    }

    /// The guest physical address of the page.
    pub const fn address(self) -> u64 {
        self.0 & Self::PAGE
    }

    /// The value that enables the page at `address`; bits without a meaning stay as they are.
    #[must_use]
    pub const fn enable_at(self, address: u64) -> Self {
        Self(self.0 & !Self::PAGE | address & Self::PAGE | Self::ENABLED)
    }

    /// The value that takes the page away.
    #[must_use]
    pub const fn disable(self) -> Self {
        Self(self.0 & !Self::PAGE & !Self::ENABLED)
    }
}

value!(
    /// SCONTROL: bit 0 turns the SynIC of this VP on, the rest is to be preserved.
    SynicControl
);

impl SynicControl {
    const ENABLED: u64 = 1 << 0;

    /// The value with the SynIC turned on or off.
    #[must_use]
    pub const fn with_enabled(self, enabled: bool) -> Self {
        if enabled {
            Self(self.0 | Self::ENABLED)
        } else {
            Self(self.0 & !Self::ENABLED)
        }
    }
}

value!(
    /// SINTx: 7:0 vector, 16 masked, 17 AutoEOI, 18 polling, the rest is to be preserved
    /// (spec tlfs.md 2.2).
    SintConfig
);

impl SintConfig {
    const VECTOR: u64 = 0xFF;
    const MASKED: u64 = 1 << 16;
    const AUTO_EOI: u64 = 1 << 17;
    const POLLING: u64 = 1 << 18;

    /// The value that makes the source raise `vector`. With `auto_eoi` the interrupt needs no EOI
    /// and must not get one.
    #[must_use]
    pub const fn raising(self, vector: Vector, auto_eoi: bool) -> Self {
        let kept = self.0 & !(Self::VECTOR | Self::MASKED | Self::AUTO_EOI | Self::POLLING);
        Self(kept | vector.0 as u64 | if auto_eoi { Self::AUTO_EOI } else { 0 })
    }

    /// The value that keeps the source from raising anything.
    #[must_use]
    pub const fn masked(self) -> Self {
        Self(self.0 | Self::MASKED)
    }
}

value!(
    /// STIMERx_CONFIG: 0 enable, 1 periodic, 2 lazy, 3 auto-enable, 11:4 vector, 12 direct mode,
    /// 19:16 SINT, the rest is zero (spec tlfs.md 2.3).
    TimerConfig
);

impl TimerConfig {
    const AUTO_ENABLE: u64 = 1 << 3;
    const DIRECT: u64 = 1 << 12;

    /// Stopped, and every other field at its reset value.
    pub const OFF: Self = Self(0);

    /// One-shot, started by a write of the count, raises `vector` itself.
    pub const fn direct(vector: Vector) -> Self {
        Self(Self::AUTO_ENABLE | Self::DIRECT | (vector.0 as u64) << 4)
    }

    /// One-shot, started by a write of the count, sends a message to `sint`, which must not be
    /// SINT0: the hypervisor refuses that.
    pub const fn message(sint: Sint) -> Self {
        Self(Self::AUTO_ENABLE | (sint.0 as u64) << 16)
    }
}

value!(
    /// CRASH_CTL: 63 notify, 62 there is a message, 61 no crash dump (spec tlfs.md 9).
    CrashControl
);

impl CrashControl {
    /// Tell the host of a crash.
    pub const NOTIFY: Self = Self(1 << 63);
    /// P3 and P4 name a message text.
    pub const MESSAGE: Self = Self(1 << 62);

    /// Whether every action of `other` is in this value.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The actions of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_the_specification() {
        assert_eq!(sint(Sint::VMBUS).number(), 0x4000_0092);
        assert_eq!(Sint::new(15).map(|s| sint(s).number()), Some(0x4000_009F));
        assert_eq!(Sint::new(16), None);
        assert_eq!(CRASH_CTL.number(), 0x4000_0105);
    }

    #[test]
    fn vectors_below_16_are_refused() {
        assert_eq!(Vector::new(15), None);
        assert_eq!(Vector::new(16).map(Vector::number), Some(16));
    }

    #[test]
    fn overlay_address_keeps_reserved_bits() {
        let before = OverlayAddress(0xFFFF_FFFF_FFFF_FFFC);
        assert_eq!(before.enable_at(0x1234_5000).0, 0x1234_5FFD);
        assert_eq!(before.enable_at(0x1234_5000).address(), 0x1234_5000);
        assert_eq!(before.enable_at(0x1234_5000).disable().0, 0xFFC);
    }

    #[test]
    fn sint_config_replaces_its_fields_and_keeps_the_rest() {
        let vector = Vector::new(0x51).unwrap();
        // Masked and polling before, with bits 8 and 40 that mean nothing to us.
        let before = SintConfig(1 << 40 | 1 << 18 | 1 << 16 | 1 << 8 | 0xFF);
        assert_eq!(before.raising(vector, false).0, 1 << 40 | 1 << 8 | 0x51);
        assert_eq!(
            before.raising(vector, true).0,
            1 << 40 | 1 << 17 | 1 << 8 | 0x51
        );
        assert_eq!(SintConfig(0x51).masked().0, 0x1_0051);
    }

    #[test]
    fn timer_config_words() {
        assert_eq!(TimerConfig::direct(Vector::new(0x52).unwrap()).0, 0x1528);
        assert_eq!(TimerConfig::message(Sint::TIMER).0, 0x3_0008);
    }
}
