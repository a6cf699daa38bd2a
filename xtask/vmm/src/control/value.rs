//! What commands return.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::Kind;

use super::arguments::KvpValue;

/// Declares structures that are returned.
macro_rules! values {
    ($($(#[$meta:meta])* $name:ident { $($body:tt)* })+) => {
        $(
            $(#[$meta])*
            #[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
            #[serde(rename_all = "kebab-case")]
            pub struct $name { $($body)* }
        )+
    };
}

values! {
    /// How the VM stands.
    Status {
        /// Whether the virtual processors run.
        pub running: bool,
        /// The same as a word.
        pub status: RunState,
        /// VMBus, if the guest has made contact.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub vmbus: Option<BusState>,
        /// What the guest did that no guest may do: the last thousand.
        pub complaints: Vec<String>,
    }

    /// The connection of the guest's VMBus.
    BusState {
        /// The version of the protocol, as `6.0`.
        pub version: String,
    }

    /// A device.
    DeviceState {
        /// Its name.
        pub name: String,
        /// What sort it is.
        pub kind: Kind,
        /// Its instance GUID. Connections of sockets have their own.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub instance: Option<String>,
        /// Whether the guest is offered it.
        pub offered: bool,
        /// Its open channels, the primary one first.
        pub channels: Vec<ChannelState>,
    }

    /// An open channel.
    ChannelState {
        /// Its number on the bus.
        pub channel: u32,
        /// 0 for the primary channel of its device.
        pub index: u16,
        /// The VP that it interrupts.
        pub vp: u32,
        /// The event connection that the guest signals.
        pub connection: u32,
    }

    /// What a device has counted.
    Counters {
        /// The device.
        pub device: String,
        /// Numbers by their names.
        pub counters: BTreeMap<String, u64>,
    }

    /// What clearing faults has ended.
    FaultsCleared {
        /// Packets that were hit.
        pub hits: u64,
    }

    /// How often the virtual processors have left the guest.
    Exits {
        /// All that came to the VMM.
        pub total: u64,
        /// Those by reason, and what KVM has counted, its names with `kvm` before them.
        pub reasons: BTreeMap<String, u64>,
    }

    /// Whether the guest answers heartbeats.
    HeartbeatState {
        /// In a word.
        pub contact: Contact,
        /// How its applications are, as it says.
        pub application: String,
        /// Heartbeats that should have been answered by now, since the last that was.
        pub missed: u64,
        /// How many were sent.
        pub sent: u64,
        /// How many were answered as they have to be.
        pub answered: u64,
    }

    /// How dynamic memory stands. In pages of 4096 bytes where it does not say MiB.
    BalloonState {
        /// What the guest has now, in MiB.
        pub actual_mib: u64,
        /// What the guest should have, in MiB.
        pub target_mib: u64,
        /// What the guest has given away.
        pub removed_pages: u64,
        /// The version of the protocol, once the guest has asked for one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub version: Option<String>,
        /// What the guest has free, as it says.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub available_pages: Option<u64>,
        /// What the guest needs, as it says.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub committed_pages: Option<u64>,
    }

    /// A key and its value.
    KvpItem {
        /// The key.
        pub key: String,
        /// The value.
        pub value: KvpValue,
    }

    /// The contents of a pool.
    KvpItems {
        /// In the guest's order.
        pub items: Vec<KvpItem>,
    }

    /// IP addresses of a network adapter.
    IpInformation {
        /// Whether it asks a DHCP server.
        pub dhcp: bool,
        /// Addresses, as `192.0.2.5/24`.
        pub addresses: Vec<String>,
        /// Gateways.
        pub gateways: Vec<String>,
        /// Name servers.
        pub dns: Vec<String>,
        /// What the guest wrote and is none of these.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pub unknown: Vec<String>,
    }
}

/// Whether the virtual processors run, as QMP says it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// They have not begun to.
    Prelaunch,
    /// They do.
    Running,
    /// They are halted.
    Paused,
    /// The guest has powered off.
    Shutdown,
    /// The guest has crashed.
    GuestPanicked,
}

/// Whether the guest is alive, as far as its heartbeat tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contact {
    /// It has never answered.
    Never,
    /// It answers.
    Ok,
    /// It has answered, and does not any more.
    Lost,
}
