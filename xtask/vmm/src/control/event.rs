//! What happens without being asked for.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::value::BalloonState;

/// Something that happened. The names in capitals are QEMU's where QEMU has such an event.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(
    tag = "event",
    content = "data",
    rename_all = "SCREAMING_SNAKE_CASE",
    rename_all_fields = "kebab-case"
)]
pub enum Event {
    /// The VM ends.
    Shutdown {
        /// Whether the guest asked for it.
        guest: bool,
        /// Why.
        reason: Reason,
    },
    /// The guest starts anew.
    Reset {
        /// Whether the guest asked for it.
        guest: bool,
        /// Why.
        reason: Reason,
    },
    /// The guest has reported a crash through the crash registers (spec tlfs.md).
    GuestPanicked {
        /// The five parameters.
        parameters: [u64; 5],
        /// Its text, if it left one.
        message: Option<String>,
    },
    /// The virtual processors run.
    Resume {},
    /// The virtual processors are halted.
    Stop {},
    /// The guest has made contact.
    VmbusConnected {
        /// The version of the protocol.
        version: String,
    },
    /// The guest has unloaded, or makes contact anew.
    VmbusDisconnected {},
    /// The guest has opened a channel.
    ChannelOpened {
        /// The device.
        device: String,
        /// 0 for its primary channel.
        index: u16,
        /// The channel's number on the bus.
        channel: u32,
    },
    /// The guest has closed a channel, or it was taken away.
    ChannelClosed {
        /// The device.
        device: String,
        /// 0 for its primary channel.
        index: u16,
        /// The channel's number on the bus.
        channel: u32,
    },
    /// A device that was taken away has gone: the guest has let go of it, or its time was up.
    DeviceGone {
        /// The device.
        device: String,
    },
    /// The guest has given memory, taken it back, or been given more.
    Balloon(BalloonState),
    /// The guest has answered a request to end.
    ShutdownAnswered {
        /// Whether it will.
        accepted: bool,
        /// The guest's status: 0, or why not. None when it did not answer.
        status: Option<u32>,
        /// Why not, in words.
        reason: Option<String>,
    },
    /// Events of this many had to be dropped: nobody read them fast enough.
    EventsLost {
        /// How many.
        count: u64,
    },
}

/// Why a VM ends or starts anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The guest has powered off.
    GuestShutdown,
    /// The guest has asked for a reset, or fallen into a triple fault.
    GuestReset,
    /// The guest has crashed.
    GuestPanic,
    /// `quit`.
    HostQmpQuit,
    /// The machine itself has failed.
    HostError,
}

/// An event, and when it happened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TimedEvent {
    /// What.
    #[serde(flatten)]
    pub event: Event,
    /// When.
    pub timestamp: Timestamp,
}

/// A moment, as QMP writes it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: u64,
    /// And so many microseconds.
    pub microseconds: u32,
}

impl Timestamp {
    /// Now.
    pub fn now() -> Self {
        // A clock before 1970 is wrong anyway.
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            seconds: since.as_secs(),
            microseconds: since.subsec_micros(),
        }
    }
}

impl Event {
    /// Whether a client that misses it cannot know how the VM stands. Such events are never dropped; a VM has few of them.
    pub fn is_milestone(&self) -> bool {
        matches!(
            self,
            Self::Shutdown { .. }
                | Self::Reset { .. }
                | Self::GuestPanicked { .. }
                | Self::EventsLost { .. }
        )
    }
}
