//! Why a request to a guest came to nothing.

use alloc::string::String;
use core::fmt;

use super::message::{GuestStatus, Version};

/// Why a request to a guest came to nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum RequestError {
    /// The guest has no driver for the component, or has not started it.
    NotOpen,
    /// Guest and host have not agreed on a version yet.
    Negotiating,
    /// The guest knows none of the versions that the host offers.
    NoCommonVersion,
    /// The guest has answered the negotiation with this status.
    Negotiation(GuestStatus),
    /// The guest speaks a version that has no such request.
    TooOld {
        /// What the guest speaks.
        speaks: Version,
        /// What the request needs.
        needs: Version,
    },
    /// Something in the request is longer than the protocol has room for.
    TooLong {
        /// What.
        what: &'static str,
        /// The most units of UTF-16, or elements.
        limit: usize,
    },
    /// Something in the request is not what it should be.
    Invalid(String),
    /// Too many requests wait already.
    Busy,
    /// The guest has not answered in time.
    TimedOut,
    /// The guest closed the channel, or the device was taken away, before it answered.
    Closed,
    /// The guest said no, and why.
    Guest(GuestStatus),
    /// The guest's answer makes no sense.
    Malformed(&'static str),
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOpen => f.write_str("the guest has not opened this component"),
            Self::Negotiating => f.write_str("the guest has not agreed on a version yet"),
            Self::NoCommonVersion => f.write_str("the guest speaks none of the host's versions"),
            Self::Negotiation(status) => write!(f, "the guest refused the negotiation: {status}"),
            Self::TooOld { speaks, needs } => {
                write!(
                    f,
                    "the guest speaks version {speaks}, and this needs {needs}"
                )
            }
            Self::TooLong { what, limit } => write!(f, "{what} is longer than {limit}"),
            Self::Invalid(what) => f.write_str(what),
            Self::Busy => f.write_str("too many requests wait for the guest's answer"),
            Self::TimedOut => f.write_str("the guest has not answered in time"),
            Self::Closed => f.write_str("the guest closed the channel before it answered"),
            Self::Guest(status) => write!(f, "the guest answered: {status}"),
            Self::Malformed(what) => write!(f, "the guest's answer makes no sense: {what}"),
        }
    }
}

impl core::error::Error for RequestError {}
