//! Message header and bodies, byte for byte (spec vmbus.md 2 and 3).

use core::fmt;
use core::ops::Deref;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Guid, MAX_PAYLOAD, MessageType};

/// What every message begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// The [`MessageType`].
    pub kind: U32,
    /// Zero.
    pub padding: U32,
}

const _: () = assert!(size_of::<Header>() == 8);

impl Header {
    /// The header of a message of this type.
    pub const fn new(kind: MessageType) -> Self {
        Self {
            kind: U32::new(kind.0),
            padding: U32::ZERO,
        }
    }

    /// The type of the message that `payload` holds; `None` when it is shorter than a header.
    pub fn type_of(payload: &[u8]) -> Option<MessageType> {
        let (header, _) = Self::ref_from_prefix(payload).ok()?;
        Some(MessageType(header.kind.get()))
    }
}

/// What follows the header in messages of one type.
pub trait Body: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned {
    /// The type of the messages with this body.
    const TYPE: MessageType;

    /// The body in `payload` and the bytes after it. `None` when the message is of another
    /// type or shorter. Longer messages are good: some hosts pad them.
    fn parse(payload: &[u8]) -> Option<(&Self, &[u8])> {
        let (header, rest) = Header::ref_from_prefix(payload).ok()?;
        if header.kind.get() != Self::TYPE.0 {
            return None;
        }
        Self::ref_from_prefix(rest).ok()
    }
}

/// A whole message as it is posted: at most [`MAX_PAYLOAD`] bytes, kept in place.
#[derive(Clone, Copy)]
pub struct Payload {
    len: usize,
    bytes: [u8; MAX_PAYLOAD],
}

impl Payload {
    /// The message with this body.
    pub fn new<B: Body>(body: &B) -> Self {
        const { assert!(size_of::<Header>() + size_of::<B>() <= MAX_PAYLOAD) };
        let mut payload = Self {
            len: 0,
            bytes: [0; MAX_PAYLOAD],
        };
        payload.append(Header::new(B::TYPE).as_bytes());
        payload.append(body.as_bytes());
        payload
    }

    /// Adds bytes to the end. Returns whether they had room; if not, nothing is added.
    pub fn append(&mut self, bytes: &[u8]) -> bool {
        match self.bytes.get_mut(self.len..self.len + bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.len += bytes.len();
                true
            }
            None => false,
        }
    }

    /// How many bytes can still be added.
    pub const fn room(&self) -> usize {
        MAX_PAYLOAD - self.len
    }

    /// The type of the message.
    pub fn message_type(&self) -> MessageType {
        // A payload always begins with a header.
        Header::type_of(self).unwrap_or(MessageType(0))
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Payload {}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({} bytes)", self.message_type(), self.len)
    }
}

/// Declares bodies: each with its message type and the size of the whole message.
macro_rules! bodies {
    ($(
        $(#[$doc:meta])*
        $name:ident, $kind:ident, $total:literal { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)* }
    )+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $ty,)*
        }

        const _: () = assert!(size_of::<Header>() + size_of::<$name>() == $total);

        impl Body for $name {
            const TYPE: MessageType = MessageType::$kind;
        }
    )+};
}

bodies! {
    /// A channel is there, from version 1.1 (spec vmbus.md 3.1).
    OfferChannel, OFFER_CHANNEL, 196 {
        /// What kind of device it is.
        interface: Guid,
        /// Which device it is.
        instance: Guid,
        /// Not used; old hosts leave garbage here.
        reserved: [u8; 16],
        /// [`OfferFlags`](super::OfferFlags).
        flags: U16,
        /// MMIO space that the device needs, in MiB.
        mmio_megabytes: U16,
        /// Defined by the device.
        user_data: [u8; 120],
        /// 0 for a device's primary channel, 1.. for its sub-channels.
        sub_channel_index: U16,
        /// MMIO space that the device could use, in MiB.
        optional_mmio_megabytes: U16,
        /// Channel id.
        channel: U32,
        /// Bit in the monitor page, where one is allocated.
        monitor_id: u8,
        /// Bit 0: a monitor bit is allocated.
        monitor_allocated: u8,
        /// Bit 0: the channel has an event connection of its own.
        dedicated_interrupt: U16,
        /// The event connection to signal.
        connection: U32,
    }

    /// A channel goes away.
    RescindChannelOffer, RESCIND_CHANNEL_OFFER, 12 {
        /// Channel id.
        channel: U32,
    }

    /// Send the offers; once per connection.
    RequestOffers, REQUEST_OFFERS, 8 {}

    /// The offers that exist now have all been sent.
    AllOffersDelivered, ALL_OFFERS_DELIVERED, 8 {}

    /// Open a channel (spec vmbus.md 3.2). [`SignalParameters`] follow it where they
    /// were negotiated.
    OpenChannel, OPEN_CHANNEL, 148 {
        /// Channel id.
        channel: U32,
        /// Any number; the answer repeats it.
        open_id: U32,
        /// GPADL of both rings.
        ring: U32,
        /// VP to interrupt; 0xFFFFFFFF for none.
        target_vp: U32,
        /// Where the host-to-guest ring begins, in pages from the start of the GPADL.
        downstream_page: U32,
        /// Defined by the device.
        user_data: [u8; 120],
    }

    /// Answer to OPEN_CHANNEL.
    OpenChannelResult, OPEN_CHANNEL_RESULT, 20 {
        /// Channel id.
        channel: U32,
        /// That of the OPEN_CHANNEL.
        open_id: U32,
        /// [`Status`](super::Status).
        status: U32,
    }

    /// Close a channel.
    CloseChannel, CLOSE_CHANNEL, 12 {
        /// Channel id.
        channel: U32,
    }

    /// The start of a GPADL: as many 8-byte words of its ranges as fit follow
    /// (spec vmbus.md 3.3).
    GpadlHeader, GPADL_HEADER, 20 {
        /// Channel id.
        channel: U32,
        /// Handle.
        gpadl: U32,
        /// Bytes of all ranges, in this message and the bodies after it.
        range_bytes: U16,
        /// How many ranges there are.
        range_count: U16,
    }

    /// More words of a GPADL follow.
    GpadlBody, GPADL_BODY, 16 {
        /// Counts the bodies; hosts ignore it.
        number: U32,
        /// Handle.
        gpadl: U32,
    }

    /// Answer to a whole GPADL.
    GpadlCreated, GPADL_CREATED, 20 {
        /// Channel id.
        channel: U32,
        /// Handle.
        gpadl: U32,
        /// [`Status`](super::Status).
        status: U32,
    }

    /// Let go of a GPADL.
    GpadlTeardown, GPADL_TEARDOWN, 16 {
        /// Channel id.
        channel: U32,
        /// Handle.
        gpadl: U32,
    }

    /// Answer to GPADL_TEARDOWN: the host touches the memory no more.
    GpadlTorndown, GPADL_TORNDOWN, 12 {
        /// Handle.
        gpadl: U32,
    }

    /// A rescinded channel's number is free again.
    RelidReleased, RELID_RELEASED, 12 {
        /// Channel id.
        channel: U32,
    }

    /// Connect with a version (spec vmbus.md 3.4). A [`Guid`] of the client follows where
    /// [`FeatureFlags::CLIENT_ID`](super::FeatureFlags::CLIENT_ID) is asked for.
    InitiateContact, INITIATE_CONTACT, 40 {
        /// [`Version`](super::Version).
        version: U32,
        /// VP that messages go to, from 3.0; else 0.
        target_vp: U32,
        /// Where messages go on that VP, and features, from 5.0.
        target: ContactTarget,
        /// Monitor page that the host writes, as a guest physical address; 0 for none.
        parent_to_child_monitor: U64,
        /// Monitor page that the guest writes; both or neither.
        child_to_parent_monitor: U64,
    }

    /// Answer to INITIATE_CONTACT.
    VersionResponse, VERSION_RESPONSE, 16 {
        /// 1 when the version is supported.
        supported: u8,
        /// [`ConnectionState`](super::ConnectionState), when it is supported.
        state: u8,
        /// Zero.
        padding: U16,
        /// From 5.0 the message connection to use from now on, else the selected version.
        /// QEMU leaves it to chance.
        selected: U32,
    }

    /// Disconnect: the host lets go of everything.
    Unload, UNLOAD, 8 {}

    /// Answer to UNLOAD.
    UnloadComplete, UNLOAD_COMPLETE, 8 {}

    /// Open a reserved channel, from 4.0.
    OpenReservedChannel, OPEN_RESERVED_CHANNEL, 28 {
        /// Channel id.
        channel: U32,
        /// VP to interrupt.
        target_vp: U32,
        /// SINT to interrupt with.
        target_sint: U32,
        /// GPADL of both rings.
        ring: U32,
        /// Where the host-to-guest ring begins, in pages.
        downstream_page: U32,
    }

    /// Close a reserved channel.
    CloseReservedChannel, CLOSE_RESERVED_CHANNEL, 20 {
        /// Channel id.
        channel: U32,
        /// VP to send the answer to.
        target_vp: U32,
        /// SINT to send the answer to.
        target_sint: U32,
    }

    /// Answer to CLOSE_RESERVED_CHANNEL.
    CloseReservedResponse, CLOSE_RESERVED_RESPONSE, 12 {
        /// Channel id.
        channel: U32,
    }

    /// Connect to an hvsocket service, from 4.0 (spec hvsock.md 2). A [`Guid`] of the silo
    /// follows from 5.2.
    TlConnectRequest, TL_CONNECT_REQUEST, 40 {
        /// The guest's end.
        endpoint: Guid,
        /// The service at the host.
        service: Guid,
    }

    /// Interrupt another VP for an open channel, from 4.1.
    ModifyChannel, MODIFY_CHANNEL, 16 {
        /// Channel id.
        channel: U32,
        /// VP to interrupt; not 0xFFFFFFFF.
        target_vp: U32,
    }

    /// An hvsocket connection failed, from 4.1.
    TlConnectResult, TL_CONNECT_RESULT, 44 {
        /// The guest's end.
        endpoint: Guid,
        /// The service at the host.
        service: Guid,
        /// [`Status`](super::Status).
        status: U32,
    }

    /// Answer to MODIFY_CHANNEL, from 5.3.
    ModifyChannelResponse, MODIFY_CHANNEL_RESPONSE, 16 {
        /// Channel id.
        channel: U32,
        /// [`Status`](super::Status).
        status: U32,
    }

    /// Use other monitor pages, where negotiated.
    ModifyConnection, MODIFY_CONNECTION, 24 {
        /// Monitor page that the host writes.
        parent_to_child_monitor: U64,
        /// Monitor page that the guest writes.
        child_to_parent_monitor: U64,
    }

    /// Answer to MODIFY_CONNECTION.
    ModifyConnectionResponse, MODIFY_CONNECTION_RESPONSE, 9 {
        /// [`ConnectionState`](super::ConnectionState).
        state: u8,
    }

    /// Send no more messages.
    Pause, PAUSE, 8 {}

    /// Answer to PAUSE.
    PauseResponse, PAUSE_RESPONSE, 8 {}

    /// Send messages again.
    Resume, RESUME, 8 {}
}

/// What stands at offset 16 of INITIATE_CONTACT from 5.0 on; all zero for the older versions
/// from 2.4, whose hosts ignore it.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ContactTarget {
    /// SINT that messages go to, from 5.0.
    pub sint: u8,
    /// VTL that messages go to, from 5.1.
    pub vtl: u8,
    /// Zero.
    pub reserved: U16,
    /// [`FeatureFlags`](super::FeatureFlags) that are asked for, from 6.0.
    pub features: U32,
}

const _: () = assert!(size_of::<ContactTarget>() == 8);

/// What follows OPEN_CHANNEL when
/// [`FeatureFlags::GUEST_SIGNAL_PARAMETERS`](super::FeatureFlags::GUEST_SIGNAL_PARAMETERS) or
/// [`FeatureFlags::INTERRUPT_REDIRECTION`](super::FeatureFlags::INTERRUPT_REDIRECTION)
/// was negotiated.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SignalParameters {
    /// Event connection that the guest will signal.
    pub connection: U32,
    /// Event flag that the host will set.
    pub event_flag: U16,
    /// Bit 0: redirect the interrupt.
    pub open_flags: U16,
}

const _: () = assert!(size_of::<SignalParameters>() == 8);

/// The four bytes that follow VERSION_RESPONSE from 6.0: the features that were asked for and that the host has.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ResponseFeatures {
    /// [`FeatureFlags`](super::FeatureFlags).
    pub features: U32,
}

const _: () = assert!(size_of::<ResponseFeatures>() == 4);

/// What follows [`ResponseFeatures`] when
/// [`FeatureFlags::SERVER_MONITOR_PAGES`](super::FeatureFlags::SERVER_MONITOR_PAGES) was negotiated.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ServerMonitorPages {
    /// Zero.
    pub padding: U32,
    /// Guest physical address of the page that the host writes.
    pub parent_to_child: U64,
    /// Guest physical address of the page that the guest writes.
    pub child_to_parent: U64,
}

const _: () = assert!(size_of::<ServerMonitorPages>() == 20);

/// What each range of a GPADL begins with; its page numbers follow as [`U64`].
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct RangeHeader {
    /// Length in bytes.
    pub byte_count: U32,
    /// Where the range begins in its first page.
    pub byte_offset: U32,
}

const _: () = assert!(size_of::<RangeHeader>() == 8);
