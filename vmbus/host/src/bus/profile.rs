//! The habits of the hosts that a guest may meet (spec hosts.md).

use vmbus::ids::ConnectionId;
use vmbus::protocol::{FeatureFlags, Status, Version};

/// Which versions a host takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Versions {
    /// Just these.
    Exactly(&'static [Version]),
    /// Any number that is not greater.
    UpTo(Version),
}

impl Versions {
    /// Whether the host takes this version.
    pub fn contain(self, version: Version) -> bool {
        match self {
            Self::Exactly(versions) => versions.contains(&version),
            Self::UpTo(newest) => version <= newest,
        }
    }
}

/// The order in which a host sends the offers that exist at the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OfferOrder {
    /// As the devices were added.
    Added,
    /// By interface, then by instance.
    Sorted,
    /// The last device first: an order that nobody may rely on.
    Reversed,
}

/// The order in which a host takes back the channels of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RescindOrder {
    /// The primary channel, then its sub-channels.
    PrimaryFirst,
    /// The sub-channels, then their primary channel.
    SubChannelsFirst,
}

/// What a host takes as a GPADL, and says when it is something else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GpadlRule {
    /// One range of whole pages; all else is dropped without a word.
    OneAlignedRange,
    /// Any ranges; those that do not match their pages are refused with this status.
    AnyRanges(Status),
}

/// How a host behaves where hosts differ.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Profile {
    /// The host's name.
    pub name: &'static str,
    /// The versions it takes.
    pub versions: Versions,
    /// The features of version 6.0 that it has.
    pub features: FeatureFlags,
    /// Whether it has message connection 4.
    pub multiclient: bool,
    /// From version 5.0, the connection that it names for later messages.
    pub named_connection: ConnectionId,
    /// Whether later messages must come on that connection.
    pub only_named_connection: bool,
    /// Whether contact on connection 4 must name SINT 2 (from 5.0) and VTL 0 (from 5.1); else it is dropped.
    pub checks_target: bool,
    /// How many messages of the guest it queues; more are refused as busy.
    pub inbox: usize,
    /// The payload of its messages is rounded up to a multiple of this, with garbage.
    pub padding: usize,
    /// The length of its VERSION_RESPONSE before padding, for versions below 6.0.
    pub version_response: usize,
    /// Whether hypercalls with messages of type 18 and above fail with INVALID_HYPERCALL_INPUT.
    pub refuses_new_messages: bool,
    /// The event connection of channel 0; those of the others follow.
    pub event_connections: u32,
    /// The order of the first offers.
    pub offer_order: OfferOrder,
    /// Whether it answers each REQUEST_OFFERS, not only the first.
    pub repeats_offers: bool,
    /// What it takes as a GPADL.
    pub gpadls: GpadlRule,
    /// Whether it handles RELID_RELEASED.
    pub relid_released: bool,
    /// Whether it answers GPADL_TEARDOWN for a rescinded channel.
    pub torn_down_after_rescind: bool,
    /// The order in which it takes back the channels of a device. Any other comes from
    /// [`Fault::Swap`](super::Fault::Swap) and [`Fault::Delay`](super::Fault::Delay).
    pub rescind_order: RescindOrder,
    /// Whether it takes back the sub-channels of a device whose primary channel the guest closes.
    pub sub_channels_end_with_primary: bool,
    /// Whether it gives channels a bit in the monitor pages, when the guest has such pages.
    pub monitors: bool,
    /// How long a bit may wait to be seen, in units of 100 ns, until the guest says otherwise. Hyper-V's value is not
    /// public.
    pub monitor_latency: u16,
}

/// All versions but the drafts.
const ALL: &[Version] = &[
    Version::V0_13,
    Version::V1_1,
    Version::V2_4,
    Version::V3_0,
    Version::V4_0,
    Version::V4_1,
    Version::V5_0,
    Version::V5_1,
    Version::V5_2,
    Version::V5_3,
    Version::V6_0,
];

impl Profile {
    /// QEMU's vmbus-bridge.
    pub const fn qemu() -> Self {
        Self {
            name: "QEMU",
            versions: Versions::UpTo(Version::V4_0),
            features: FeatureFlags::NONE,
            multiclient: false,
            named_connection: ConnectionId(1),
            only_named_connection: false,
            checks_target: false,
            inbox: 4,
            padding: 8,
            version_response: 10,
            refuses_new_messages: true,
            event_connections: 0x1_0000,
            offer_order: OfferOrder::Added,
            repeats_offers: true,
            gpadls: GpadlRule::OneAlignedRange,
            relid_released: false,
            torn_down_after_rescind: true,
            rescind_order: RescindOrder::SubChannelsFirst,
            sub_channels_end_with_primary: true,
            monitors: false,
            monitor_latency: 0,
        }
    }

    /// OpenVMM's server for VTL 0.
    pub const fn openvmm() -> Self {
        Self {
            name: "OpenVMM",
            versions: Versions::Exactly(ALL),
            features: FeatureFlags::GUEST_SIGNAL_PARAMETERS
                .union(FeatureFlags::INTERRUPT_REDIRECTION)
                .union(FeatureFlags::MODIFY_CONNECTION)
                .union(FeatureFlags::CLIENT_ID)
                .union(FeatureFlags::PAUSE_RESUME),
            multiclient: true,
            named_connection: ConnectionId(4),
            only_named_connection: false,
            checks_target: true,
            inbox: 64,
            padding: 1,
            version_response: 16,
            refuses_new_messages: false,
            event_connections: 0x2000,
            offer_order: OfferOrder::Sorted,
            repeats_offers: false,
            gpadls: GpadlRule::AnyRanges(Status::UNSUCCESSFUL),
            relid_released: true,
            torn_down_after_rescind: true,
            rescind_order: RescindOrder::SubChannelsFirst,
            sub_channels_end_with_primary: true,
            monitors: false,
            monitor_latency: 0,
        }
    }

    /// Hyper-V of today. Where its habits are not public, the least convenient for a guest are taken.
    pub const fn hyper_v() -> Self {
        Self {
            name: "Hyper-V",
            versions: Versions::Exactly(ALL),
            features: FeatureFlags::GUEST_SIGNAL_PARAMETERS
                .union(FeatureFlags::INTERRUPT_REDIRECTION)
                .union(FeatureFlags::MODIFY_CONNECTION)
                .union(FeatureFlags::CLIENT_ID),
            multiclient: true,
            named_connection: ConnectionId(0x14),
            only_named_connection: true,
            checks_target: true,
            inbox: 16,
            padding: 1,
            version_response: 16,
            refuses_new_messages: false,
            event_connections: 0x1_0800,
            offer_order: OfferOrder::Reversed,
            repeats_offers: false,
            gpadls: GpadlRule::AnyRanges(Status::UNSUCCESSFUL),
            relid_released: true,
            torn_down_after_rescind: false,
            rescind_order: RescindOrder::PrimaryFirst,
            sub_channels_end_with_primary: false,
            monitors: true,
            monitor_latency: 1000,
        }
    }

    /// The test machine: what a guest finds most often, and nothing that must be polled. It answers each GPADL_TEARDOWN
    /// and names the connection that the guest used.
    pub const fn test_machine() -> Self {
        Self {
            name: "Enlit's test machine",
            offer_order: OfferOrder::Added,
            ..Self::openvmm()
        }
    }

    /// The same host, but of a time when this was the newest version.
    #[must_use]
    pub const fn up_to(self, newest: Version) -> Self {
        Self {
            versions: Versions::UpTo(newest),
            multiclient: newest.0 >= Version::V5_0.0,
            ..self
        }
    }

    /// Hyper-V of a release that ends with this version.
    pub const fn hyper_v_up_to(newest: Version) -> Self {
        Self::hyper_v().up_to(newest)
    }
}
