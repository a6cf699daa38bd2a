//! What commands are given.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Declares structures of arguments.
macro_rules! arguments {
    ($($(#[$meta:meta])* $name:ident { $($body:tt)* })+) => {
        $(
            $(#[$meta])*
            #[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
            #[serde(rename_all = "kebab-case", deny_unknown_fields)]
            pub struct $name { $($body)* }
        )+
    };
}

arguments! {
    /// Nothing.
    #[derive(Default)]
    NoArguments {}

    /// A device.
    DeviceName {
        /// Its name.
        pub device: String,
    }

    /// A device, or all.
    #[derive(Default)]
    SomeDevice {
        /// Its name.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub device: Option<String>,
    }

    /// How the guest shall end.
    #[derive(Default)]
    Shutdown {
        /// What comes after.
        #[serde(default)]
        pub kind: ShutdownKind,
        /// Whether the guest's programs can object.
        #[serde(default)]
        pub force: bool,
    }

    /// A move of the clock.
    TimeStep {
        /// How far, in milliseconds; below zero is back.
        pub milliseconds: i64,
    }

    /// A pool of values.
    #[derive(Default)]
    KvpPool {
        /// Which.
        #[serde(default)]
        pub pool: Pool,
    }

    /// A value's place.
    KvpKey {
        /// The pool.
        #[serde(default)]
        pub pool: Pool,
        /// The key.
        pub key: String,
    }

    /// A value for the guest.
    KvpSet {
        /// The pool.
        #[serde(default)]
        pub pool: Pool,
        /// The key.
        pub key: String,
        /// The value.
        pub value: KvpValue,
    }

    /// A network adapter.
    Nic {
        /// Its name.
        pub nic: String,
    }

    /// IP addresses for a network adapter (spec ic.md 8).
    IpSettings {
        /// The adapter.
        pub nic: String,
        /// Whether it shall ask a DHCP server.
        #[serde(default)]
        pub dhcp: bool,
        /// Addresses, as `192.0.2.5/24`.
        #[serde(default)]
        pub addresses: Vec<String>,
        /// Gateways.
        #[serde(default)]
        pub gateways: Vec<IpAddr>,
        /// Name servers.
        #[serde(default)]
        pub dns: Vec<IpAddr>,
    }

    /// A disk to add.
    DiskAdd {
        /// The SCSI controller.
        pub controller: String,
        /// The number, 0 to 63.
        pub lun: u8,
        /// A file: raw, VHDX or ISO, as its content says.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub file: Option<PathBuf>,
        /// Instead of a file: so many MiB of zeros.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub memory_mib: Option<u32>,
        /// Whether the guest can only read it.
        #[serde(default)]
        pub read_only: bool,
    }

    /// A disk to take out. Of a drive with a medium in it, it is the medium.
    DiskEject {
        /// The SCSI controller.
        pub controller: String,
        /// The number.
        pub lun: u8,
        /// Whether also against the guest's will, when it has locked the medium into the drive.
        #[serde(default)]
        pub force: bool,
    }

    /// A cable.
    Link {
        /// The network adapter.
        pub nic: String,
        /// Whether the cable is in.
        pub up: bool,
    }

    /// A packet size.
    Mtu {
        /// The network adapter.
        pub nic: String,
        /// Bytes of the largest packet in a frame.
        pub mtu: u32,
    }

    /// How much memory the guest should have.
    BalloonTarget {
        /// In MiB.
        pub target_mib: u32,
    }

    /// Memory for the guest.
    HotAdd {
        /// How much more, in MiB.
        pub mib: u32,
    }
}

/// What a guest does when it is asked to end.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownKind {
    /// It powers off.
    #[default]
    PowerOff,
    /// It restarts.
    Reboot,
    /// It hibernates.
    Hibernate,
}

/// A pool of key-value pairs (spec ic.md 8).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// Pool 0: what the host gives the guest.
    #[default]
    External,
    /// Pool 1: what the guest's programs tell the host.
    Guest,
    /// Pool 2: what the guest's system tells the host.
    Auto,
    /// Pool 3: what the host says of itself.
    AutoExternal,
    /// Pool 4: what neither tells the other's programs.
    AutoInternal,
}

/// A value.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum KvpValue {
    /// A number.
    Number(u64),
    /// Text.
    Text(String),
}
