//! Which message exists from which version on, and how long it then is (spec vmbus.md 2).

use super::{FeatureFlags, MessageType, Version};

/// Who sends a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// The guest sends it.
    ToHost,
    /// The host sends it.
    ToGuest,
}

/// A message's size in bytes, from a version on and with these features negotiated. For GPADL_HEADER
/// and GPADL_BODY it is the part before the page numbers.
pub type Size = (Version, FeatureFlags, usize);

/// What is known about one type of message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageInfo {
    /// Its number.
    pub kind: MessageType,
    /// Who sends it.
    pub direction: Direction,
    /// Its sizes: the last one whose version and features apply counts.
    pub sizes: &'static [Size],
}

use Direction::{ToGuest, ToHost};
use FeatureFlags as F;
use MessageType as M;
use Version as V;

const fn info(kind: M, direction: Direction, sizes: &'static [Size]) -> MessageInfo {
    MessageInfo {
        kind,
        direction,
        sizes,
    }
}

/// Every message there is, by number.
pub const MESSAGES: [MessageInfo; 29] = [
    info(
        M::OFFER_CHANNEL,
        ToGuest,
        &[(V::V0_13, F::NONE, 190), (V::V1_1, F::NONE, 196)],
    ),
    info(
        M::RESCIND_CHANNEL_OFFER,
        ToGuest,
        &[(V::V0_13, F::NONE, 12)],
    ),
    info(M::REQUEST_OFFERS, ToHost, &[(V::V0_13, F::NONE, 8)]),
    info(M::ALL_OFFERS_DELIVERED, ToGuest, &[(V::V0_13, F::NONE, 8)]),
    info(
        M::OPEN_CHANNEL,
        ToHost,
        &[
            (V::V0_13, F::NONE, 148),
            (V::V6_0, F::GUEST_SIGNAL_PARAMETERS, 156),
            (V::V6_0, F::INTERRUPT_REDIRECTION, 156),
        ],
    ),
    info(M::OPEN_CHANNEL_RESULT, ToGuest, &[(V::V0_13, F::NONE, 20)]),
    info(M::CLOSE_CHANNEL, ToHost, &[(V::V0_13, F::NONE, 12)]),
    info(M::GPADL_HEADER, ToHost, &[(V::V0_13, F::NONE, 20)]),
    info(M::GPADL_BODY, ToHost, &[(V::V0_13, F::NONE, 16)]),
    info(M::GPADL_CREATED, ToGuest, &[(V::V0_13, F::NONE, 20)]),
    info(M::GPADL_TEARDOWN, ToHost, &[(V::V0_13, F::NONE, 16)]),
    info(M::GPADL_TORNDOWN, ToGuest, &[(V::V0_13, F::NONE, 12)]),
    info(M::RELID_RELEASED, ToHost, &[(V::V0_13, F::NONE, 12)]),
    info(
        M::INITIATE_CONTACT,
        ToHost,
        &[(V::V0_13, F::NONE, 40), (V::V6_0, F::CLIENT_ID, 56)],
    ),
    info(
        M::VERSION_RESPONSE,
        ToGuest,
        &[
            (V::V0_13, F::NONE, 16),
            (V::V6_0, F::NONE, 20),
            (V::V6_0, F::SERVER_MONITOR_PAGES, 40),
        ],
    ),
    info(M::UNLOAD, ToHost, &[(V::V0_13, F::NONE, 8)]),
    info(M::UNLOAD_COMPLETE, ToGuest, &[(V::V1_1, F::NONE, 8)]),
    info(M::OPEN_RESERVED_CHANNEL, ToHost, &[(V::V4_0, F::NONE, 28)]),
    info(
        M::CLOSE_RESERVED_CHANNEL,
        ToHost,
        &[(V::V0_13, F::NONE, 20)],
    ),
    info(
        M::CLOSE_RESERVED_RESPONSE,
        ToGuest,
        &[(V::V4_0, F::NONE, 12)],
    ),
    info(
        M::TL_CONNECT_REQUEST,
        ToHost,
        &[(V::V4_0, F::NONE, 40), (V::V5_2, F::NONE, 56)],
    ),
    info(M::MODIFY_CHANNEL, ToHost, &[(V::V4_1, F::NONE, 16)]),
    info(M::TL_CONNECT_RESULT, ToGuest, &[(V::V4_1, F::NONE, 44)]),
    info(
        M::MODIFY_CHANNEL_RESPONSE,
        ToGuest,
        &[(V::V5_3, F::NONE, 16)],
    ),
    info(
        M::MODIFY_CONNECTION,
        ToHost,
        &[(V::V6_0, F::MODIFY_CONNECTION, 24)],
    ),
    info(
        M::MODIFY_CONNECTION_RESPONSE,
        ToGuest,
        &[(V::V6_0, F::MODIFY_CONNECTION, 9)],
    ),
    info(M::PAUSE, ToHost, &[(V::V6_0, F::PAUSE_RESUME, 8)]),
    info(M::PAUSE_RESPONSE, ToGuest, &[(V::V6_0, F::PAUSE_RESUME, 8)]),
    info(M::RESUME, ToHost, &[(V::V6_0, F::PAUSE_RESUME, 8)]),
];

impl MessageInfo {
    /// The message of this type; `None` for numbers that no version knows.
    pub fn of(kind: MessageType) -> Option<&'static Self> {
        let index = usize::try_from(kind.0).ok()?.checked_sub(1)?;
        MESSAGES.get(index)
    }

    /// The message's size in bytes with this version and these features; `None` where it
    /// does not exist.
    pub fn size(&self, version: Version, features: FeatureFlags) -> Option<usize> {
        self.sizes
            .iter()
            .rev()
            .find(|(since, needs, _)| *since <= version && features.contains(*needs))
            .map(|&(_, _, size)| size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Guid;
    use crate::protocol::message::{
        Body, ContactTarget, GpadlBody, GpadlHeader, Header, InitiateContact,
        ModifyConnectionResponse, OfferChannel, OpenChannel, ResponseFeatures, ServerMonitorPages,
        SignalParameters, TlConnectRequest, TlConnectResult, VersionResponse,
    };

    #[test]
    fn the_table_is_in_the_order_of_the_numbers() {
        for (number, info) in (1..).zip(MESSAGES) {
            assert_eq!(info.kind, MessageType(number));
        }
        assert!(MessageInfo::of(MessageType(0)).is_none());
        assert!(MessageInfo::of(MessageType(30)).is_none());
        assert!(MessageInfo::of(MessageType(u32::MAX)).is_none());
    }

    fn total<B: Body>() -> usize {
        size_of::<Header>() + size_of::<B>()
    }

    fn at(kind: MessageType, version: Version, features: FeatureFlags) -> Option<usize> {
        MessageInfo::of(kind)?.size(version, features)
    }

    #[test]
    fn the_bodies_have_the_sizes_of_the_table() {
        let v4 = Version::V4_0;
        let v6 = Version::V6_0;
        let none = FeatureFlags::NONE;
        assert_eq!(at(M::OFFER_CHANNEL, Version::V0_13, none), Some(190));
        assert_eq!(
            at(M::OFFER_CHANNEL, v4, none),
            Some(total::<OfferChannel>())
        );
        assert_eq!(at(M::OPEN_CHANNEL, v6, none), Some(total::<OpenChannel>()));
        for features in [F::GUEST_SIGNAL_PARAMETERS, F::INTERRUPT_REDIRECTION] {
            assert_eq!(
                at(M::OPEN_CHANNEL, v6, features),
                Some(total::<OpenChannel>() + size_of::<SignalParameters>())
            );
        }
        assert_eq!(at(M::GPADL_HEADER, v4, none), Some(total::<GpadlHeader>()));
        assert_eq!(at(M::GPADL_BODY, v4, none), Some(total::<GpadlBody>()));
        assert_eq!(
            at(M::INITIATE_CONTACT, v6, F::CLIENT_ID),
            Some(total::<InitiateContact>() + size_of::<Guid>())
        );
        assert_eq!(
            at(M::INITIATE_CONTACT, v6, none),
            Some(32 + size_of::<ContactTarget>())
        );
        assert_eq!(
            at(M::VERSION_RESPONSE, v4, none),
            Some(total::<VersionResponse>())
        );
        let with_features = total::<VersionResponse>() + size_of::<ResponseFeatures>();
        assert_eq!(at(M::VERSION_RESPONSE, v6, none), Some(with_features));
        assert_eq!(
            at(M::VERSION_RESPONSE, v6, F::SERVER_MONITOR_PAGES),
            Some(with_features + size_of::<ServerMonitorPages>())
        );
        assert_eq!(
            at(M::TL_CONNECT_REQUEST, v4, none),
            Some(total::<TlConnectRequest>())
        );
        assert_eq!(
            at(M::TL_CONNECT_REQUEST, Version::V5_2, none),
            Some(total::<TlConnectRequest>() + size_of::<Guid>())
        );
        assert_eq!(at(M::TL_CONNECT_RESULT, v4, none), None);
        assert_eq!(
            at(M::TL_CONNECT_RESULT, v6, none),
            Some(total::<TlConnectResult>())
        );
        assert_eq!(at(M::MODIFY_CONNECTION_RESPONSE, v6, none), None);
        assert_eq!(
            at(M::MODIFY_CONNECTION_RESPONSE, v6, F::MODIFY_CONNECTION),
            Some(total::<ModifyConnectionResponse>())
        );
    }
}
