//! The wire types of channel management over any bytes.

use vmbus::protocol::message::{
    AllOffersDelivered, CloseChannel, CloseReservedChannel, CloseReservedResponse, GpadlBody,
    GpadlCreated, GpadlHeader, GpadlTeardown, GpadlTorndown, InitiateContact, ModifyChannel,
    ModifyChannelResponse, ModifyConnection, ModifyConnectionResponse, OfferChannel, OpenChannel,
    OpenChannelResult, OpenReservedChannel, Pause, PauseResponse, RelidReleased, RequestOffers,
    RescindChannelOffer, Resume, TlConnectRequest, TlConnectResult, Unload, UnloadComplete,
    VersionResponse,
};
use vmbus::protocol::sizes::MessageInfo;
use vmbus::protocol::{Body, FeatureFlags, Guid, Header, Payload, Version};

/// Lays every body over the bytes of one message: where one fits, it and what follows it are the message again.
pub fn protocol(data: &[u8]) {
    let fitting = [
        fits::<OfferChannel>(data),
        fits::<RescindChannelOffer>(data),
        fits::<RequestOffers>(data),
        fits::<AllOffersDelivered>(data),
        fits::<OpenChannel>(data),
        fits::<OpenChannelResult>(data),
        fits::<CloseChannel>(data),
        fits::<GpadlHeader>(data),
        fits::<GpadlBody>(data),
        fits::<GpadlCreated>(data),
        fits::<GpadlTeardown>(data),
        fits::<GpadlTorndown>(data),
        fits::<RelidReleased>(data),
        fits::<InitiateContact>(data),
        fits::<VersionResponse>(data),
        fits::<Unload>(data),
        fits::<UnloadComplete>(data),
        fits::<OpenReservedChannel>(data),
        fits::<CloseReservedChannel>(data),
        fits::<CloseReservedResponse>(data),
        fits::<TlConnectRequest>(data),
        fits::<ModifyChannel>(data),
        fits::<TlConnectResult>(data),
        fits::<ModifyChannelResponse>(data),
        fits::<ModifyConnection>(data),
        fits::<ModifyConnectionResponse>(data),
        fits::<Pause>(data),
        fits::<PauseResponse>(data),
        fits::<Resume>(data),
    ];
    let count = fitting.into_iter().filter(|&fits| fits).count();
    assert!(count <= 1, "a message has one type");

    let Some(kind) = Header::type_of(data) else {
        assert_eq!(count, 0, "no body fits without a header");
        return;
    };
    let info = MessageInfo::of(kind);
    assert_eq!(info.is_some(), kind.name().is_some());
    if let Some(size) = info.and_then(|info| info.size(Version::V6_0, FeatureFlags(u32::MAX))) {
        assert!(
            data.len() < size || count == 1,
            "{kind} of its full size fits"
        );
    }
    assert!(!kind.to_string().is_empty());
    if let Some(bytes) = data.first_chunk::<16>() {
        assert_eq!(Guid(*bytes).to_string().len(), 36);
    }
}

/// Whether this is a message with body `B`.
fn fits<B: Body + Copy>(data: &[u8]) -> bool {
    let Some((body, rest)) = B::parse(data) else {
        return false;
    };
    let payload = Payload::new(body);
    assert_eq!(payload.message_type(), B::TYPE);
    assert_eq!(data.len(), payload.len() + rest.len());
    // The header's second word is padding, which is not kept.
    assert_eq!(payload.get(8..), data.get(8..payload.len()));
    true
}
