//! What the bus tells: events, and every reason why something failed.

use alloc::vec::Vec;
use core::fmt;

use crate::hypervisor::PostError;
use crate::ids::{ChannelId, ConnectionId, GpadlHandle, VpIndex};
use crate::protocol::{ConnectionState, FeatureFlags, MessageType, Status, Version};

use super::Offer;

/// Something that happened on the bus, in the order in which it happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The host agreed to a version; offers follow. Whatever was known of an earlier connection is void. A host
    /// that answers late can take its agreement back before its first offer: then this comes again.
    Connected {
        /// The version in use.
        version: Version,
        /// The features in use.
        features: FeatureFlags,
    },
    /// There is no connection. The bus is at rest; [`connect`](super::Bus::connect) may be called again.
    ConnectFailed(ConnectError),
    /// A channel is there: at the start, or at any time later.
    Offered(Offer),
    /// The offers that existed at the start have all been reported.
    AllOffersDelivered,
    /// The host took a channel back. Close it if it is open, tear its GPADLs down, then
    /// [`release`](super::Bus::release) it.
    Rescinded(ChannelId),
    /// The outcome of [`create_gpadl`](super::Bus::create_gpadl). After an error the handle is void.
    GpadlCreated {
        /// The handle that the call returned.
        handle: GpadlHandle,
        /// Whether the host took it.
        result: Result<(), GpadlError>,
    },
    /// The host let go of a GPADL: it touches the memory no more. The handle is void.
    GpadlTornDown(GpadlHandle),
    /// The outcome of [`open`](super::Bus::open); exactly one for each.
    Opened {
        /// The channel.
        channel: ChannelId,
        /// Whether it is open now. After an error it is closed.
        result: Result<(), OpenError>,
    },
    /// The outcome of [`modify_target_vp`](super::Bus::modify_target_vp). Before version 5.3 hosts do not
    /// confirm it, and it comes at once: interrupts may still arrive on the old VP.
    TargetVpModified {
        /// The channel.
        channel: ChannelId,
        /// The VP that was asked for.
        target_vp: VpIndex,
        /// Whether the host did it.
        result: Result<(), ModifyError>,
    },
    /// The connection has ended by [`unload`](super::Bus::unload). Everything is void.
    Unloaded {
        /// Whether the host confirmed it. If not, it may still write to memory that was
        /// shared with it.
        acknowledged: bool,
    },
    /// The host, or the way to it, did what it should not; the bus goes on without it.
    Violation(Violation),
}

/// Why there is no connection. Its text is one sentence for the console.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ConnectError {
    /// The hypervisor knows no message connection: there is no VMBus.
    NoConnection {
        /// The connections that were tried.
        connections: Vec<ConnectionId>,
    },
    /// The host answered nothing at all.
    NoReply {
        /// The connections that were tried and that the hypervisor knows.
        connections: Vec<ConnectionId>,
        /// The versions that were tried, in order.
        versions: Vec<Version>,
    },
    /// The host has none of the versions.
    VersionRefused {
        /// Versions that the host refused, in order.
        refused: Vec<Version>,
        /// Versions that got no answer, in order.
        unanswered: Vec<Version>,
        /// Versions that were not tried because the host lacks
        /// [`MULTICLIENT_CONNECTION`](crate::protocol::MULTICLIENT_CONNECTION).
        skipped: Vec<Version>,
    },
    /// The host has the version, but did not connect.
    BadState {
        /// The version.
        version: Version,
        /// What the host said.
        state: ConnectionState,
    },
    /// A message could not be posted.
    Post {
        /// Where to.
        connection: ConnectionId,
        /// Which one.
        message: MessageType,
        /// Why.
        error: PostError,
    },
    /// No version was given to try.
    NoVersions,
}

/// Writes items with commas between them.
struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoConnection { connections } => write!(
                f,
                "no VMBus: the hypervisor has no message connection {}",
                List(connections)
            ),
            Self::NoReply {
                connections,
                versions,
            } => write!(
                f,
                "no VMBus: no reply on message connection {} to versions {}",
                List(connections),
                List(versions)
            ),
            Self::VersionRefused {
                refused,
                unanswered,
                skipped,
            } => {
                f.write_str("unsupported VMBus version: the host")?;
                let mut separator = " ";
                if !refused.is_empty() {
                    write!(f, "{separator}refused {}", List(refused))?;
                    separator = "; ";
                }
                if !unanswered.is_empty() {
                    write!(f, "{separator}did not answer {}", List(unanswered))?;
                    separator = "; ";
                }
                if !skipped.is_empty() {
                    write!(
                        f,
                        "{separator}has no message connection {} for {}",
                        crate::protocol::MULTICLIENT_CONNECTION,
                        List(skipped)
                    )?;
                }
                Ok(())
            }
            Self::BadState { version, state } => {
                write!(f, "VMBus {version} connection refused: {state}")
            }
            Self::Post {
                connection,
                message,
                error,
            } => write!(
                f,
                "no VMBus: {message} could not be posted on connection {connection}: {error}"
            ),
            Self::NoVersions => f.write_str("no VMBus: no protocol version is allowed"),
        }
    }
}

impl core::error::Error for ConnectError {}

/// Why a GPADL does not exist.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GpadlError {
    /// The host refused it.
    Refused(Status),
    /// The channel was rescinded meanwhile.
    Rescinded,
    /// The host did not answer in time; it has let go of it since.
    NoReply,
    /// The host did not answer in time and, when asked to let go of it, did not answer either.
    NotReleased,
    /// A message could not be posted.
    Post(PostError),
}

impl GpadlError {
    /// Whether the memory can be used for something else now. If not, the host may still know of it: keep it until
    /// the connection has been unloaded.
    pub fn frees_memory(self) -> bool {
        self != Self::NotReleased
    }
}

impl fmt::Display for GpadlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(status) => write!(f, "the host refused the GPADL: {status}"),
            Self::Rescinded => f.write_str("the channel was rescinded"),
            Self::NoReply => f.write_str("the host did not answer the GPADL"),
            Self::NotReleased => f.write_str("the host neither took the GPADL nor let go of it"),
            Self::Post(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for GpadlError {}

/// Why a channel is not open.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenError {
    /// The host refused to open it.
    Refused(Status),
    /// The channel was rescinded meanwhile.
    Rescinded,
    /// The host did not answer in time.
    NoReply,
    /// It was closed before it was open.
    Cancelled,
    /// The message could not be posted.
    Post(PostError),
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(status) => write!(f, "the host refused to open the channel: {status}"),
            Self::Rescinded => f.write_str("the channel was rescinded"),
            Self::NoReply => f.write_str("the host did not answer OPEN_CHANNEL"),
            Self::Cancelled => f.write_str("the channel was closed while it was being opened"),
            Self::Post(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for OpenError {}

/// Why a channel still interrupts its old VP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ModifyError {
    /// The host refused.
    Refused(Status),
    /// The channel was closed or rescinded meanwhile.
    Closed,
    /// The host did not answer in time: which VP is interrupted is not known.
    NoReply,
    /// The message could not be posted.
    Post(PostError),
}

impl fmt::Display for ModifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(status) => write!(f, "the host refused the target VP: {status}"),
            Self::Closed => f.write_str("the channel was closed"),
            Self::NoReply => f.write_str("the host did not answer MODIFY_CHANNEL"),
            Self::Post(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for ModifyError {}

/// Why a call on the bus was refused; nothing was sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Error {
    /// There is no connection.
    NotConnected,
    /// No such channel is offered.
    UnknownChannel(ChannelId),
    /// No such GPADL exists.
    UnknownGpadl(GpadlHandle),
    /// The channel has been rescinded.
    Rescinded(ChannelId),
    /// The channel has not been rescinded.
    NotRescinded(ChannelId),
    /// The channel is not closed.
    NotClosed(ChannelId),
    /// The channel is not open.
    NotOpen(ChannelId),
    /// A GPADL has too many words for its 16-bit length field: at most 8190 pages in one range.
    GpadlTooLong {
        /// Range headers and page numbers.
        words: usize,
    },
    /// A GPADL range is empty, or its pages are not those that its length and offset need.
    BadRange,
    /// The GPADL is not ready, or on its way out, or of another channel.
    BadGpadl(GpadlHandle),
    /// The GPADL still holds the rings of a channel.
    GpadlInUse(GpadlHandle),
    /// Either ring would have fewer than two pages.
    BadRing,
    /// GPADLs of the channel still exist.
    GpadlsLeft(ChannelId),
    /// The version in use has no such message.
    NeedsVersion(Version),
    /// The channel was opened without interrupts, or is to be left without, or is being modified already.
    CannotModify(ChannelId),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConnected => f.write_str("VMBus is not connected"),
            Self::UnknownChannel(channel) => write!(f, "channel {channel} is not offered"),
            Self::UnknownGpadl(handle) => write!(f, "GPADL {handle} does not exist"),
            Self::Rescinded(channel) => write!(f, "channel {channel} has been rescinded"),
            Self::NotRescinded(channel) => write!(f, "channel {channel} has not been rescinded"),
            Self::NotClosed(channel) => write!(f, "channel {channel} is not closed"),
            Self::NotOpen(channel) => write!(f, "channel {channel} is not open"),
            Self::GpadlTooLong { words } => write!(
                f,
                "{words} range headers and page numbers do not fit a GPADL, which holds {}",
                super::gpadl::MAX_WORDS
            ),
            Self::BadRange => f.write_str("a GPADL range does not match its pages"),
            Self::BadGpadl(handle) => write!(f, "GPADL {handle} cannot be used for this"),
            Self::GpadlInUse(handle) => write!(f, "GPADL {handle} holds the rings of a channel"),
            Self::BadRing => f.write_str("a ring needs a control page and a data page at least"),
            Self::GpadlsLeft(channel) => write!(f, "channel {channel} still has GPADLs"),
            Self::NeedsVersion(version) => write!(f, "this needs VMBus {version}"),
            Self::CannotModify(channel) => {
                write!(
                    f,
                    "the target VP of channel {channel} cannot be changed now"
                )
            }
        }
    }
}

impl core::error::Error for Error {}

/// What the host, or the way to it, did wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// A message without a whole header.
    NoHeader {
        /// Its length in bytes.
        len: usize,
    },
    /// A message too short for its type.
    Short {
        /// The type.
        message: MessageType,
        /// Its length in bytes.
        len: usize,
    },
    /// A message of no known type, or of one that only a guest sends.
    UnknownMessage(MessageType),
    /// A message that has no place now: wrong state of the bus, or not of the version in use.
    Unexpected(MessageType),
    /// A message about a channel that is not offered.
    UnknownChannel {
        /// The message.
        message: MessageType,
        /// The channel it names.
        channel: ChannelId,
    },
    /// A message that does not fit the state of its channel.
    WrongChannelState {
        /// The message.
        message: MessageType,
        /// The channel it names.
        channel: ChannelId,
    },
    /// A message about a GPADL that does not exist, or is of another channel.
    UnknownGpadl {
        /// The message.
        message: MessageType,
        /// The handle it names.
        handle: GpadlHandle,
    },
    /// A message that does not fit the state of its GPADL.
    WrongGpadlState {
        /// The message.
        message: MessageType,
        /// The handle it names.
        handle: GpadlHandle,
    },
    /// An offer of a channel number that no channel can have.
    BadChannelId(ChannelId),
    /// An offer names a monitor bit that no page has. The channel is there without it.
    BadMonitorId {
        /// The channel.
        channel: ChannelId,
        /// The bit.
        id: u8,
    },
    /// An offer of a channel number that is in use.
    DuplicateOffer(ChannelId),
    /// The host named a message connection that no hypervisor has.
    BadConnection(ConnectionId),
    /// The host has not finished its offers in time.
    OffersOverdue,
    /// The host has not let go of a GPADL in time. The bus goes on waiting.
    TeardownOverdue(GpadlHandle),
    /// A message that nobody waits for could not be posted.
    NotPosted {
        /// The message.
        message: MessageType,
        /// Why.
        error: PostError,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHeader { len } => write!(f, "message of {len} bytes has no header"),
            Self::Short { message, len } => write!(f, "{message} of {len} bytes is too short"),
            Self::UnknownMessage(message) => write!(f, "{message} is not for a guest"),
            Self::Unexpected(message) => write!(f, "{message} is not expected now"),
            Self::UnknownChannel { message, channel } => {
                write!(f, "{message} for channel {channel}, which is not offered")
            }
            Self::WrongChannelState { message, channel } => {
                write!(f, "{message} does not fit the state of channel {channel}")
            }
            Self::UnknownGpadl { message, handle } => {
                write!(f, "{message} for GPADL {handle}, which does not exist")
            }
            Self::WrongGpadlState { message, handle } => {
                write!(f, "{message} does not fit the state of GPADL {handle}")
            }
            Self::BadChannelId(channel) => {
                write!(
                    f,
                    "offer of channel {channel}, which is not 1 to {}",
                    ChannelId::MAX
                )
            }
            Self::BadMonitorId { channel, id } => {
                write!(
                    f,
                    "offer of channel {channel} with monitor bit {id}, which is not 0 to 127"
                )
            }
            Self::DuplicateOffer(channel) => {
                write!(f, "offer of channel {channel}, which is offered already")
            }
            Self::BadConnection(connection) => {
                write!(f, "{connection} cannot be a message connection")
            }
            Self::OffersOverdue => f.write_str("the host has not finished its offers in time"),
            Self::TeardownOverdue(handle) => {
                write!(f, "the host has not let go of GPADL {handle} in time")
            }
            Self::NotPosted { message, error } => write!(f, "{message} was not posted: {error}"),
        }
    }
}
