//! The wire format of channel management: messages, their numbers and their sizes. No behaviour.
//!
//! Every message is a [`Header`] and then one of the bodies of [`message`], posted to the host or
//! found in the SIMP slot of SINT 2. Facts: spec vmbus.md, sections 1 to 3. All fields are little
//! endian and unaligned, so a body can be laid over any bytes.

pub mod guid;
pub mod interface;
pub mod message;
pub mod monitor;
pub mod sizes;

use core::fmt;

pub use guid::Guid;
pub use message::{Body, Header, Payload};

use crate::ids::ConnectionId;

/// The longest payload of a SynIC message, in bytes (TLFS, SynIC).
pub const MAX_PAYLOAD: usize = 240;

/// The synthetic interrupt source that carries VMBus messages and events.
pub const SINT: u8 = 2;

/// The message connection of protocol versions before 5.0; every host has it.
pub const LEGACY_CONNECTION: ConnectionId = ConnectionId(1);

/// The message connection to make contact on with versions from 5.0. The host's answer names the
/// connection for all later messages.
pub const MULTICLIENT_CONNECTION: ConnectionId = ConnectionId(4);

/// A protocol version: major number in the high half, minor in the low half. Later versions
/// compare greater (spec vmbus.md 1.2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u32);

impl Version {
    /// Windows Server 2008.
    pub const V0_13: Self = Self::new(0, 13);
    /// Windows Server 2008 R2: connection ids in offers, UNLOAD_COMPLETE.
    pub const V1_1: Self = Self::new(1, 1);
    /// Windows Server 2012: event flags per channel, target VP, sub-channels. The oldest version that this
    /// guest speaks.
    pub const V2_4: Self = Self::new(2, 4);
    /// Windows Server 2012 R2: target VP for messages.
    pub const V3_0: Self = Self::new(3, 0);
    /// Windows Server 2016: hvsocket.
    pub const V4_0: Self = Self::new(4, 0);
    /// MODIFY_CHANNEL.
    pub const V4_1: Self = Self::new(4, 1);
    /// Contact on connection 4.
    pub const V5_0: Self = Self::new(5, 0);
    /// Target VTL.
    pub const V5_1: Self = Self::new(5, 1);
    /// Windows Server 2019: silo id in hvsocket requests.
    pub const V5_2: Self = Self::new(5, 2);
    /// Windows Server 2022: MODIFY_CHANNEL is answered.
    pub const V5_3: Self = Self::new(5, 3);
    /// Feature flags.
    pub const V6_0: Self = Self::new(6, 0);

    /// The version `major.minor`.
    pub const fn new(major: u16, minor: u16) -> Self {
        Self((major as u32) << 16 | minor as u32)
    }

    /// The major number.
    pub const fn major(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// The minor number.
    pub const fn minor(self) -> u16 {
        self.0 as u16
    }

    /// The message connection to make contact on with this version.
    pub const fn contact_connection(self) -> ConnectionId {
        if self.0 >= Self::V5_0.0 {
            MULTICLIENT_CONNECTION
        } else {
            LEGACY_CONNECTION
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Version({self})")
    }
}

/// Declares a newtype over an integer with named values, or named bits.
macro_rules! named {
    (
        $(#[$doc:meta])* $name:ident($int:ty) {
            $($(#[$value_doc:meta])* $value:ident = $number:literal),+ $(,)?
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$value_doc])* pub const $value: Self = Self($number);)+

            /// The field's name for this value, where it has one.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$value => Some(stringify!($value)),)+
                    _ => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }
    };
}

named! {
    /// The number of a channel message (spec vmbus.md 2).
    MessageType(u32) {
        /// Host to guest: a channel is there.
        OFFER_CHANNEL = 1,
        /// Host to guest: a channel goes away.
        RESCIND_CHANNEL_OFFER = 2,
        /// Guest to host: send the offers.
        REQUEST_OFFERS = 3,
        /// Host to guest: the offers that exist now have all been sent.
        ALL_OFFERS_DELIVERED = 4,
        /// Guest to host: open a channel over a ring GPADL.
        OPEN_CHANNEL = 5,
        /// Host to guest: answer to OPEN_CHANNEL.
        OPEN_CHANNEL_RESULT = 6,
        /// Guest to host: close a channel; not answered.
        CLOSE_CHANNEL = 7,
        /// Guest to host: the start of a GPADL.
        GPADL_HEADER = 8,
        /// Guest to host: more pages of a GPADL.
        GPADL_BODY = 9,
        /// Host to guest: answer to a whole GPADL.
        GPADL_CREATED = 10,
        /// Guest to host: let go of a GPADL.
        GPADL_TEARDOWN = 11,
        /// Host to guest: answer to GPADL_TEARDOWN.
        GPADL_TORNDOWN = 12,
        /// Guest to host: a rescinded channel's number is free again.
        RELID_RELEASED = 13,
        /// Guest to host: connect, with a version.
        INITIATE_CONTACT = 14,
        /// Host to guest: answer to INITIATE_CONTACT.
        VERSION_RESPONSE = 15,
        /// Guest to host: disconnect.
        UNLOAD = 16,
        /// Host to guest: answer to UNLOAD.
        UNLOAD_COMPLETE = 17,
        /// Guest to host: open a reserved channel.
        OPEN_RESERVED_CHANNEL = 18,
        /// Guest to host: close a reserved channel.
        CLOSE_RESERVED_CHANNEL = 19,
        /// Host to guest: answer to CLOSE_RESERVED_CHANNEL.
        CLOSE_RESERVED_RESPONSE = 20,
        /// Guest to host: connect to an hvsocket service.
        TL_CONNECT_REQUEST = 21,
        /// Guest to host: interrupt another VP for a channel.
        MODIFY_CHANNEL = 22,
        /// Host to guest: TL_CONNECT_REQUEST failed.
        TL_CONNECT_RESULT = 23,
        /// Host to guest: answer to MODIFY_CHANNEL, from 5.3.
        MODIFY_CHANNEL_RESPONSE = 24,
        /// Guest to host: use other monitor pages.
        MODIFY_CONNECTION = 25,
        /// Host to guest: answer to MODIFY_CONNECTION.
        MODIFY_CONNECTION_RESPONSE = 26,
        /// Guest to host: send no more messages.
        PAUSE = 27,
        /// Host to guest: answer to PAUSE.
        PAUSE_RESPONSE = 28,
        /// Guest to host: send messages again.
        RESUME = 29,
    }
}

impl fmt::Display for MessageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "message type {:#x}", self.0),
        }
    }
}

named! {
    /// What a VERSION_RESPONSE says of the connection when the version is supported
    /// (spec vmbus.md 3.4).
    ConnectionState(u8) {
        /// Connected.
        SUCCESS = 0,
        /// The host lacks resources.
        LOW_RESOURCES = 1,
        /// Failed for another reason.
        UNKNOWN_FAILURE = 2,
    }
}

impl fmt::Display for ConnectionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SUCCESS => f.write_str("connected"),
            Self::LOW_RESOURCES => f.write_str("the host is low on resources (state 1)"),
            Self::UNKNOWN_FAILURE => f.write_str("the host failed (state 2)"),
            Self(state) => write!(f, "unknown connection state {state}"),
        }
    }
}

/// The outcome of an operation on the host: an NTSTATUS, or any other non-zero value on failure
/// (spec vmbus.md 3.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Status(pub u32);

impl Status {
    /// Success.
    pub const SUCCESS: Self = Self(0);
    /// A GPADL that makes no sense (OpenVMM).
    pub const UNSUCCESSFUL: Self = Self(0x8000_FFFF);

    /// Whether the operation succeeded.
    pub const fn is_success(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {:#010x}", self.0)
    }
}

/// Declares the set operations of a newtype over bits.
macro_rules! bits {
    ($name:ident) => {
        impl $name {
            /// No bit at all.
            pub const NONE: Self = Self(0);

            /// Whether every bit of `other` is set here.
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The bits of both.
            pub const fn union(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The bits that are in both.
            pub const fn intersection(self, other: Self) -> Self {
                Self(self.0 & other.0)
            }
        }
    };
}

named! {
    /// Optional parts of version 6.0 (spec vmbus.md 1.3).
    FeatureFlags(u32) {
        /// OPEN_CHANNEL names the connection and the event flag.
        GUEST_SIGNAL_PARAMETERS = 0x01,
        /// OPEN_CHANNEL can redirect the channel's interrupt.
        INTERRUPT_REDIRECTION = 0x02,
        /// MODIFY_CONNECTION exists.
        MODIFY_CONNECTION = 0x04,
        /// INITIATE_CONTACT ends with a client GUID.
        CLIENT_ID = 0x08,
        /// Confidential channels, with a paravisor.
        CONFIDENTIAL_CHANNELS = 0x10,
        /// PAUSE and RESUME exist.
        PAUSE_RESUME = 0x20,
        /// VERSION_RESPONSE names the monitor pages.
        SERVER_MONITOR_PAGES = 0x40,
        /// Offers may ask for pinned memory.
        GPA_PINNING = 0x80,
    }
}
bits!(FeatureFlags);

named! {
    /// What an offer says about its channel (spec vmbus.md 3.1).
    OfferFlags(u16) {
        /// The device has an interface that the guest may show to programs.
        ENUMERATE_DEVICE_INTERFACE = 0x1,
        /// The ring must be confidential memory.
        CONFIDENTIAL_RING = 0x2,
        /// External memory must be confidential.
        CONFIDENTIAL_EXTERNAL_MEMORY = 0x4,
        /// External memory must be pinned.
        REQUIRE_PINNED_MEMORY = 0x8,
        /// Packets carry pipe headers.
        NAMED_PIPE = 0x10,
        /// The offer comes from this partition.
        LOOPBACK = 0x100,
        /// The offer comes from the parent partition.
        PARENT = 0x200,
        /// Signals go through the monitor page.
        MONITORED_NOTIFICATION = 0x400,
        /// An hvsocket connection.
        TLNPI = 0x2000,
    }
}
bits!(OfferFlags);
