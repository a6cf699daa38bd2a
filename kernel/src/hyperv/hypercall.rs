//! Hypercalls: who we are, the hypercall page, posting messages and signalling events (TLFS,
//! Hypercall Interface; spec tlfs.md 3 and 4).

#![allow(unsafe_code)]

use core::fmt;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use x86_64::instructions::interrupts::without_interrupts;
use zerocopy::{Immutable, IntoBytes};

use super::message::{MAX_PAYLOAD, MessageType};
use super::msr::{self, OverlayAddress, Value};
use super::overlay::{CodePage, PAGE_SIZE, Page, Shared};
use super::{clock, instructions};

/// The hypercall page, enabled: the way into the hypervisor for every VP.
#[derive(Debug)]
pub struct Hypercalls {
    page: CodePage,
}

impl Hypercalls {
    /// Says who we are and puts the hypercall page into place. Four VM exits.
    ///
    /// An identity or a page that firmware has left behind is replaced.
    ///
    /// # Errors
    /// When the hypervisor does not take the page.
    pub fn enable(identity: GuestOsId, page: CodePage) -> Result<Self, EnableError> {
        // First: the page cannot be enabled for a guest without a name.
        msr::GUEST_OS_ID.write(identity);
        let before = msr::HYPERCALL.read();
        if before.locked() {
            return Err(EnableError::Locked(before));
        }
        // SAFETY: the page was given to be replaced by the hypervisor's code.
        unsafe { msr::HYPERCALL.write_guarded(before.enable_at(page.address())) };
        let after = msr::HYPERCALL.read();
        if !after.enabled() || after.address() != page.address() {
            return Err(EnableError::Refused(after));
        }
        Ok(Self { page })
    }

    /// Takes the page and our name away again, for whoever runs in this partition after us. No
    /// hypercall can be made any more.
    pub fn disable(self) {
        let value = msr::HYPERCALL.read().disable();
        // SAFETY: the value names no page, and `self` was the only way to the old one.
        unsafe { msr::HYPERCALL.write_guarded(value) };
        msr::GUEST_OS_ID.write(GuestOsId::NONE);
    }

    /// Signals flag `flag` of the event port behind `connection` (HvCallSignalEvent, fast form, no
    /// memory involved). Callable anywhere.
    ///
    /// # Errors
    /// The hypervisor's status, when it is not success.
    pub fn signal_event(&self, connection: u32, flag: u16) -> Result<(), Status> {
        let input = signal_event_input(connection, flag);
        // SAFETY: the call reads its two registers and nothing else.
        unsafe { self.call(Control::fast(Code::SIGNAL_EVENT), input, 0) }
            .status()
            .ok()
    }

    /// # Safety
    /// What the call does with `input` and `output` must be sound.
    unsafe fn call(&self, control: Control, input: u64, output: u64) -> Outcome {
        // SAFETY: `enable` saw the page enabled and nobody can have disabled it since; the rest is
        // the caller's promise.
        Outcome(unsafe { instructions::hypercall(self.page.entry(), control.0, input, output) })
    }
}

/// Why there is no hypercall page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EnableError {
    /// Somebody has locked the register, which shows this value.
    Locked(OverlayAddress),
    /// The register shows this value and not the one written.
    Refused(OverlayAddress),
}

impl fmt::Display for EnableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked(value) => {
                write!(
                    f,
                    "the hypercall page is locked by earlier software (MSR 0x40000001 = {:#x})",
                    value.bits()
                )
            }
            Self::Refused(value) => {
                write!(
                    f,
                    "the hypervisor did not take the hypercall page (MSR 0x40000001 = {:#x})",
                    value.bits()
                )
            }
        }
    }
}

impl core::error::Error for EnableError {}

/// The page of one VP through which it posts messages. No two VPs may share one: the hypervisor
/// reads it during the call.
#[derive(Debug)]
pub struct MessagePoster {
    page: Shared<[AtomicU64; PAGE_SIZE / 8]>,
    taken: AtomicBool,
    posted: AtomicU64,
    retries: AtomicU64,
}

impl MessagePoster {
    /// Makes `page` the message page of a VP.
    pub fn new(page: Page) -> Self {
        Self {
            page: page.share(),
            taken: AtomicBool::new(false),
            posted: AtomicU64::new(0),
            retries: AtomicU64::new(0),
        }
    }

    /// Posts a message to the port behind `connection` (HvCallPostMessage), and again with growing
    /// pauses while the hypervisor is out of room, as `patience` says.
    ///
    /// Interrupts are off during each call and as the caller had them in the pauses. May be
    /// called at DISPATCH only with [`Patience::NONE`].
    ///
    /// # Errors
    /// See [`PostError`].
    pub fn post(
        &self,
        hypercalls: &Hypercalls,
        connection: u32,
        kind: MessageType,
        payload: &[u8],
        patience: Patience,
    ) -> Result<(), PostError> {
        let input = PostMessage::new(connection, kind, payload).ok_or(PostError::TooLong {
            length: payload.len(),
        })?;
        let mut retries = 0;
        let result = persist(
            patience,
            || self.try_post(hypercalls, &input),
            |delay| {
                retries += 1;
                wait(delay);
            },
        );
        self.retries.fetch_add(retries, Ordering::Relaxed);
        if result.is_ok() {
            self.posted.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    fn try_post(&self, hypercalls: &Hypercalls, input: &PostMessage) -> Status {
        without_interrupts(|| {
            // Taken already only if this is a fault handler, which interrupted a call on this VP.
            if self.taken.swap(true, Ordering::Acquire) {
                return Status::OBJECT_IN_USE;
            }
            let words = input
                .as_bytes()
                .chunks_exact(8)
                .filter_map(|bytes| bytes.try_into().ok());
            for (word, bytes) in self.page.iter().zip(words) {
                word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
            }
            // SAFETY: the call reads 256 bytes of a page that is shared for this, and writes
            // nothing.
            let outcome = unsafe {
                hypercalls.call(Control::memory(Code::POST_MESSAGE), self.page.address(), 0)
            };
            self.taken.store(false, Ordering::Release);
            outcome.status()
        })
    }

    /// How many messages were posted, and how many further attempts that took.
    pub fn statistics(&self) -> (u64, u64) {
        (
            self.posted.load(Ordering::Relaxed),
            self.retries.load(Ordering::Relaxed),
        )
    }
}

/// Why a message was not posted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PostError {
    /// There is no such connection. For the first message of VMBus it means that the host does
    /// not know this connection id.
    InvalidConnection,
    /// The hypervisor was out of room, last with this status, for as long as we were patient.
    Busy(Status),
    /// Any other status: trying again would not help.
    Failed(Status),
    /// The payload is longer than a message can be.
    TooLong {
        /// Its length in bytes.
        length: usize,
    },
}

impl fmt::Display for PostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidConnection => f.write_str("there is no such message connection"),
            Self::Busy(status) => write!(f, "the hypervisor took no message in time ({status})"),
            Self::Failed(status) => write!(f, "the hypervisor refused a message ({status})"),
            Self::TooLong { length } => write!(
                f,
                "{length} bytes are too long for a message, {MAX_PAYLOAD} fit"
            ),
        }
    }
}

impl core::error::Error for PostError {}

/// How long to go on trying. Times are in units of 100 ns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Patience {
    /// The first pause; each later one is twice as long.
    pub first: u64,
    /// No pause is longer.
    pub longest: u64,
    /// All pauses together are not longer.
    pub total: u64,
}

impl Patience {
    /// From 1 us doubling to 10 ms, 2 s in all: a host that is busy for longer does not answer
    /// any more.
    pub const NORMAL: Self = Self {
        first: 10,
        longest: 100_000,
        total: 20_000_000,
    };
    /// One attempt.
    pub const NONE: Self = Self {
        first: 0,
        longest: 0,
        total: 0,
    };
}

/// Repeats `attempt` while its status says that it may yet work, with `pause` between.
fn persist(
    patience: Patience,
    mut attempt: impl FnMut() -> Status,
    mut pause: impl FnMut(u64),
) -> Result<(), PostError> {
    let mut delay = patience.first.min(patience.longest);
    let mut left = patience.total;
    loop {
        match attempt() {
            Status::SUCCESS => return Ok(()),
            Status::INVALID_CONNECTION_ID => return Err(PostError::InvalidConnection),
            status if !status.is_busy() => return Err(PostError::Failed(status)),
            status if delay == 0 || delay > left => return Err(PostError::Busy(status)),
            _ => pause(delay),
        }
        left -= delay;
        delay = delay.saturating_mul(2).min(patience.longest);
    }
}

/// Spins until `delay` units of 100 ns have passed.
///
/// No PAUSE is shorter than a nanosecond, so the loop ends in time even if the clock stands still.
fn wait(delay: u64) {
    let start = clock::now();
    for _ in 0..delay.saturating_mul(100) {
        if clock::now().wrapping_sub(start) >= delay {
            break;
        }
        spin_loop();
    }
}

/// The input of HvCallPostMessage.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct PostMessage {
    connection: u32,
    reserved: u32,
    kind: u32,
    payload_size: u32,
    payload: [u8; MAX_PAYLOAD],
}

const _: () = assert!(size_of::<PostMessage>() == 256);

impl PostMessage {
    fn new(connection: u32, kind: MessageType, payload: &[u8]) -> Option<Self> {
        let mut input = Self {
            connection,
            reserved: 0,
            kind: kind.0,
            payload_size: u32::try_from(payload.len()).ok()?,
            payload: [0; MAX_PAYLOAD],
        };
        input
            .payload
            .get_mut(..payload.len())?
            .copy_from_slice(payload);
        Some(input)
    }
}

/// The input of HvCallSignalEvent: connection id, flag number, 16 zero bits.
const fn signal_event_input(connection: u32, flag: u16) -> u64 {
    connection as u64 | (flag as u64) << 32
}

/// What a hypercall does.
#[derive(Clone, Copy)]
struct Code(u16);

impl Code {
    const POST_MESSAGE: Self = Self(0x5C);
    const SIGNAL_EVENT: Self = Self(0x5D);
}

/// The control word of a hypercall: 15:0 code, 16 fast; neither variable headers nor repetitions.
#[derive(Clone, Copy)]
struct Control(u64);

impl Control {
    /// Input and output in registers.
    const fn fast(code: Code) -> Self {
        Self(code.0 as u64 | 1 << 16)
    }

    /// Input and output in memory.
    const fn memory(code: Code) -> Self {
        Self(code.0 as u64)
    }
}

/// The result value of a hypercall: 15:0 status, the rest means nothing for calls without
/// repetitions.
#[derive(Clone, Copy)]
struct Outcome(u64);

impl Outcome {
    const fn status(self) -> Status {
        Status(self.0 as u16)
    }
}

/// How a hypercall ended (spec tlfs.md 3.3).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

macro_rules! statuses {
    ($($name:ident = $code:literal,)*) => {
        impl Status {
            $(#[doc = concat!("HV_STATUS_", stringify!($name), ".")] pub const $name: Self = Self($code);)*

            /// The name of the status, if it is known.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($code => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    SUCCESS = 0x00,
    INVALID_HYPERCALL_CODE = 0x02,
    INVALID_HYPERCALL_INPUT = 0x03,
    INVALID_ALIGNMENT = 0x04,
    INVALID_PARAMETER = 0x05,
    ACCESS_DENIED = 0x06,
    INVALID_PARTITION_STATE = 0x07,
    OPERATION_DENIED = 0x08,
    INSUFFICIENT_MEMORY = 0x0B,
    INVALID_PARTITION_ID = 0x0D,
    INVALID_VP_INDEX = 0x0E,
    INVALID_PORT_ID = 0x11,
    INVALID_CONNECTION_ID = 0x12,
    INSUFFICIENT_BUFFERS = 0x13,
    NOT_ACKNOWLEDGED = 0x14,
    INVALID_VP_STATE = 0x15,
    INVALID_SYNIC_STATE = 0x18,
    OBJECT_IN_USE = 0x19,
    NO_DATA = 0x1B,
    NO_RESOURCES = 0x1D,
    FEATURE_UNAVAILABLE = 0x1E,
    INSUFFICIENT_BUFFER = 0x33,
    INVALID_REGISTER_VALUE = 0x50,
    INVALID_VTL_STATE = 0x51,
    OPERATION_FAILED = 0x71,
    TIMEOUT = 0x78,
    CALL_PENDING = 0x79,
    VTL_ALREADY_ENABLED = 0x86,
}

impl Status {
    /// Whether the call was carried out.
    ///
    /// # Errors
    /// The status itself, if it was not.
    pub fn ok(self) -> Result<(), Self> {
        if self == Self::SUCCESS {
            Ok(())
        } else {
            Err(self)
        }
    }

    /// Whether the same message may be taken a little later. 0x33 is what an old
    /// specification prints for INSUFFICIENT_BUFFERS.
    pub const fn is_busy(self) -> bool {
        matches!(
            self,
            Self::INSUFFICIENT_BUFFERS
                | Self::INSUFFICIENT_BUFFER
                | Self::INSUFFICIENT_MEMORY
                | Self::NO_RESOURCES
                | Self::OBJECT_IN_USE
                | Self::TIMEOUT
        )
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "HV_STATUS_{name}, {:#x}", self.0),
            None => write!(f, "status {:#x}", self.0),
        }
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for Status {}

/// Who runs in this partition, in the form for open-source systems: 63 set, 62:56 system, 55:48
/// vendor's choice, 47:16 version, 15:0 build (spec tlfs.md 2.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestOsId(u64);

impl GuestOsId {
    /// Nobody: no hypercall page can be enabled.
    pub const NONE: Self = Self(0);

    /// This kernel. Its system number is not allocated by anyone: 1 to 4 are taken, and hosts
    /// only show it in diagnostics.
    pub const ENLIT: Self = Self::open_source(
        b'E',
        0,
        [
            decimal(env!("CARGO_PKG_VERSION_MAJOR")),
            decimal(env!("CARGO_PKG_VERSION_MINOR")),
            decimal(env!("CARGO_PKG_VERSION_PATCH")),
        ],
        0,
    );

    /// An open-source system; `system` has 7 bits.
    pub const fn open_source(
        system: u8,
        vendor: u8,
        [major, minor, patch]: [u8; 3],
        build: u16,
    ) -> Self {
        let version = (major as u64) << 16 | (minor as u64) << 8 | patch as u64;
        let system = (system & 0x7F) as u64;
        Self(1 << 63 | system << 56 | (vendor as u64) << 48 | version << 16 | build as u64)
    }
}

impl Value for GuestOsId {
    fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    fn bits(self) -> u64 {
        self.0
    }
}

/// A part of our own version number.
const fn decimal(text: &str) -> u8 {
    match u8::from_str_radix(text, 10) {
        Ok(value) => value,
        Err(_) => panic!("a part of the version number does not fit in a byte"),
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn control_words_and_inputs() {
        assert_eq!(Control::fast(Code::SIGNAL_EVENT).0, 0x1_005D);
        assert_eq!(Control::memory(Code::POST_MESSAGE).0, 0x5C);
        assert_eq!(signal_event_input(0x2005, 5), 0x0000_0005_0000_2005);
        assert_eq!(
            Outcome(0x0000_0FFF_FFFF_0013).status(),
            Status::INSUFFICIENT_BUFFERS
        );
    }

    #[test]
    fn post_message_layout() {
        let input = PostMessage::new(4, MessageType::CHANNEL, b"contact").unwrap();
        let bytes = input.as_bytes();
        assert_eq!(
            bytes[..16],
            [4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0]
        );
        assert_eq!(bytes[16..23], *b"contact");
        assert!(bytes[23..].iter().all(|&byte| byte == 0));
        assert!(PostMessage::new(1, MessageType::CHANNEL, &[0; 240]).is_some());
        assert!(PostMessage::new(1, MessageType::CHANNEL, &[0; 241]).is_none());
    }

    #[test]
    fn identity_is_open_source_and_not_zero() {
        let id = GuestOsId::ENLIT.bits();
        assert_eq!(id >> 63, 1);
        assert_ne!(id >> 56 & 0x7F, 0);
        assert_eq!(
            GuestOsId::open_source(1, 0, [6, 12, 9], 0).bits(),
            0x8100_0006_0C09_0000
        );
    }

    #[test]
    fn status_prints_its_name() {
        assert_eq!(
            Status(0x13).to_string(),
            "HV_STATUS_INSUFFICIENT_BUFFERS, 0x13"
        );
        assert_eq!(Status(0x1234).to_string(), "status 0x1234");
    }

    /// Runs `persist` against the given statuses, the last of which repeats for ever.
    fn run(patience: Patience, statuses: &[u16]) -> (Result<(), PostError>, Vec<u64>) {
        let mut attempts = statuses.iter();
        let mut last = Status(statuses[0]);
        let mut pauses = Vec::new();
        let result = persist(
            patience,
            || {
                last = attempts.next().map_or(last, |&status| Status(status));
                last
            },
            |delay| pauses.push(delay),
        );
        (result, pauses)
    }

    #[test]
    fn busy_hosts_are_asked_again_with_growing_pauses() {
        let (result, pauses) = run(Patience::NORMAL, &[0x13, 0x0B, 0x78, 0x33, 0]);
        assert_eq!(result, Ok(()));
        assert_eq!(pauses, [10, 20, 40, 80]);
    }

    #[test]
    fn patience_ends() {
        let (result, pauses) = run(Patience::NORMAL, &[0x13]);
        assert_eq!(result, Err(PostError::Busy(Status::INSUFFICIENT_BUFFERS)));
        assert!(pauses.iter().sum::<u64>() <= Patience::NORMAL.total);
        assert_eq!(pauses.iter().max(), Some(&Patience::NORMAL.longest));
    }

    #[test]
    fn other_failures_end_at_once() {
        assert_eq!(
            run(Patience::NORMAL, &[0x12]),
            (Err(PostError::InvalidConnection), Vec::new())
        );
        assert_eq!(
            run(Patience::NORMAL, &[0x06]),
            (Err(PostError::Failed(Status::ACCESS_DENIED)), Vec::new())
        );
        let none = run(Patience::NONE, &[0x13]);
        assert_eq!(
            none,
            (
                Err(PostError::Busy(Status::INSUFFICIENT_BUFFERS)),
                Vec::new()
            )
        );
    }

    proptest! {
        #[test]
        fn pauses_stay_within_bounds(
            first in 0_u64..1000,
            longest in 0_u64..100_000,
            total in 0_u64..10_000_000,
        ) {
            let patience = Patience { first, longest, total };
            let (result, pauses) = run(patience, &[0x13]);
            prop_assert!(matches!(result, Err(PostError::Busy(_))));
            prop_assert!(pauses.iter().sum::<u64>() <= total);
            prop_assert!(pauses.iter().all(|&pause| pause > 0 && pause <= longest));
        }
    }
}
