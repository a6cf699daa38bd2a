//! Version negotiation: what to ask for next, on which connection, and what the answer means.
//!
//! Versions from 5.0 make contact on connection 4. A hypervisor that does not know it has an
//! older host, so these versions are skipped. A host that is silent there is asked again on
//! connection 1, where newer hosts answer too (spec vmbus.md 1.1), and only there from then on.
//! Hosts drop what they dislike without a word, so silence rules out one attempt and no more.

use alloc::vec::Vec;

use zerocopy::FromBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::Config;
use super::event::{ConnectError, Violation};
use crate::hypervisor::PostError;
use crate::ids::{ConnectionId, PAGE_SIZE, PageNumber};
use crate::protocol::message::{
    ContactTarget, Header, InitiateContact, ResponseFeatures, VersionResponse,
};
use crate::protocol::monitor::MonitorPages;
use crate::protocol::{
    Body, ConnectionState, FeatureFlags, LEGACY_CONNECTION, MULTICLIENT_CONNECTION, MessageType,
    Payload, SINT, Version,
};

/// The features that this guest asks for: none; it opens channels with the parameters of the offer.
const FEATURES: FeatureFlags = FeatureFlags::NONE;

/// The highest connection id: bits 31:24 are zero (TLFS, HvCallPostMessage).
const MAX_CONNECTION: u32 = 0x00FF_FFFF;

/// One INITIATE_CONTACT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Attempt {
    pub(super) version: Version,
    pub(super) connection: ConnectionId,
}

impl Attempt {
    /// The message for this attempt (spec vmbus.md 3.4: each field from its version on).
    pub(super) fn message(self, config: &Config, monitor: Option<MonitorPages>) -> Payload {
        let since = |version| self.version >= version;
        let address = |page: PageNumber| U64::new(page.0.saturating_mul(PAGE_SIZE as u64));
        let pages = monitor.map_or((U64::ZERO, U64::ZERO), |pages| {
            (
                address(pages.parent_to_child),
                address(pages.child_to_parent),
            )
        });
        Payload::new(&InitiateContact {
            version: U32::new(self.version.0),
            target_vp: U32::new(if since(Version::V3_0) {
                config.target_vp.0
            } else {
                0
            }),
            target: ContactTarget {
                sint: if since(Version::V5_0) { SINT } else { 0 },
                // VTL 0 from 5.1, zero before.
                vtl: 0,
                reserved: U16::ZERO,
                features: U32::new(if since(Version::V6_0) { FEATURES.0 } else { 0 }),
            },
            parent_to_child_monitor: pages.0,
            child_to_parent_monitor: pages.1,
        })
    }
}

/// What to do after something has happened.
#[derive(PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// Make this attempt.
    Try(Attempt),
    /// The host agreed.
    Agreed(Agreement),
    /// Nothing is left to try.
    Fail(ConnectError),
}

/// What guest and host agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Agreement {
    pub(super) version: Version,
    pub(super) features: FeatureFlags,
    /// Where messages go from now on.
    pub(super) connection: ConnectionId,
    /// Whether the host was given monitor pages.
    pub(super) monitored: bool,
}

/// What is known about connection 4.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Multiclient {
    /// Nothing speaks against it.
    Usable,
    /// An attempt got no answer there.
    Silent,
    /// The hypervisor does not know it.
    Absent,
}

/// The attempts made so far and what became of them.
#[derive(Clone, Debug)]
pub(super) struct Negotiation {
    versions: Vec<Version>,
    /// Index of the version after the current one.
    next: usize,
    current: Attempt,
    multiclient: Multiclient,
    /// Connections that were tried, without those that the hypervisor does not know.
    connections: Vec<ConnectionId>,
    refused: Vec<Version>,
    unanswered: Vec<Version>,
    skipped: Vec<Version>,
    /// Versions of attempts whose time ran out, each of which may still be answered.
    late: Vec<Version>,
}

impl Negotiation {
    /// Begins with the first version. `Err` when there is none.
    pub(super) fn new(config: &Config) -> Result<Self, ConnectError> {
        let first = *config.versions.first().ok_or(ConnectError::NoVersions)?;
        let connection = first.contact_connection();
        Ok(Self {
            versions: config.versions.clone(),
            next: 1,
            current: Attempt {
                version: first,
                connection,
            },
            multiclient: Multiclient::Usable,
            connections: [connection].into(),
            refused: Vec::new(),
            unanswered: Vec::new(),
            skipped: Vec::new(),
            late: Vec::new(),
        })
    }

    /// The attempt that waits for an answer.
    pub(super) fn current(&self) -> Attempt {
        self.current
    }

    /// Reads a VERSION_RESPONSE to the current attempt. `None` when it answers an earlier one.
    pub(super) fn response(&mut self, payload: &[u8]) -> Result<Option<Step>, Violation> {
        let response = Response::parse(payload)?;
        let Attempt {
            version,
            connection,
        } = self.current;
        if !response.supported {
            return Ok(Some(self.version_refused()));
        }
        if response.state != ConnectionState::SUCCESS {
            return Ok(Some(Step::Fail(ConnectError::BadState {
                version,
                state: response.state,
            })));
        }
        let connection = if version >= Version::V5_0 {
            response.connection()?
        } else {
            let selected = response.selected.map(Version);
            if selected.is_some_and(|selected| selected != version && self.late.contains(&selected))
            {
                return Ok(None);
            }
            connection
        };
        Ok(Some(Step::Agreed(Agreement {
            version,
            features: if version >= Version::V6_0 {
                response.features.intersection(FEATURES)
            } else {
                FeatureFlags::NONE
            },
            connection,
            monitored: false,
        })))
    }

    /// Takes a VERSION_RESPONSE that came before the current attempt was made: it can only answer an
    /// earlier one.
    pub(super) fn stale_response(&mut self) -> Result<Option<Step>, Violation> {
        match self.late.pop() {
            Some(_) => Ok(None),
            None => Err(Violation::Unexpected(MessageType::VERSION_RESPONSE)),
        }
    }

    /// Reads a VERSION_RESPONSE that came after an agreement: the answer to one of the attempts whose time ran
    /// out was taken for that to the last one. `None` when there is no such attempt; otherwise where messages go
    /// now, or `None` again when the host is not connected after all.
    pub(super) fn late_response(
        &mut self,
        payload: &[u8],
    ) -> Result<Option<Option<ConnectionId>>, Violation> {
        let response = Response::parse(payload)?;
        if self.late.pop().is_none() {
            return Ok(None);
        }
        Ok(Some(if !response.supported {
            None
        } else if self.current.version >= Version::V5_0 {
            Some(response.connection()?)
        } else {
            Some(self.current.connection)
        }))
    }

    /// The host does not have the current version.
    pub(super) fn version_refused(&mut self) -> Step {
        self.refused.push(self.current.version);
        self.advance()
    }

    /// No answer came in time.
    pub(super) fn timed_out(&mut self) -> Step {
        self.late.push(self.current.version);
        self.silent()
    }

    fn silent(&mut self) -> Step {
        if self.current.connection == MULTICLIENT_CONNECTION {
            self.multiclient = Multiclient::Silent;
            return self.attempt(self.current.version, LEGACY_CONNECTION);
        }
        self.unanswered.push(self.current.version);
        self.advance()
    }

    /// The message could not be posted.
    pub(super) fn not_posted(&mut self, error: PostError) -> Step {
        let Attempt {
            version,
            connection,
        } = self.current;
        match (connection, error) {
            (MULTICLIENT_CONNECTION, PostError::InvalidConnection) => {
                self.multiclient = Multiclient::Absent;
                self.connections.retain(|&tried| tried != connection);
                self.skipped.push(version);
                self.advance()
            }
            (MULTICLIENT_CONNECTION, PostError::Busy) => self.silent(),
            (_, PostError::InvalidConnection)
                if self.refused.is_empty() && self.late.is_empty() =>
            {
                let absent = self.multiclient == Multiclient::Absent;
                let multiclient = absent.then_some(MULTICLIENT_CONNECTION);
                Step::Fail(ConnectError::NoConnection {
                    connections: multiclient.into_iter().chain([connection]).collect(),
                })
            }
            (_, PostError::InvalidConnection) => {
                self.unanswered.push(version);
                self.fail()
            }
            _ => Step::Fail(ConnectError::Post {
                connection,
                message: MessageType::INITIATE_CONTACT,
                error,
            }),
        }
    }

    /// Goes on to the next version that can be tried.
    fn advance(&mut self) -> Step {
        while let Some(&version) = self.versions.get(self.next) {
            self.next += 1;
            let usual = version.contact_connection();
            let connection = match self.multiclient {
                Multiclient::Silent => LEGACY_CONNECTION,
                Multiclient::Absent if usual == MULTICLIENT_CONNECTION => {
                    self.skipped.push(version);
                    continue;
                }
                _ => usual,
            };
            return self.attempt(version, connection);
        }
        self.fail()
    }

    fn attempt(&mut self, version: Version, connection: ConnectionId) -> Step {
        self.current = Attempt {
            version,
            connection,
        };
        if !self.connections.contains(&connection) {
            self.connections.push(connection);
        }
        Step::Try(self.current)
    }

    /// Says why nothing is left to try.
    fn fail(&self) -> Step {
        Step::Fail(if self.refused.is_empty() && !self.unanswered.is_empty() {
            ConnectError::NoReply {
                connections: self.connections.clone(),
                versions: self.unanswered.clone(),
            }
        } else {
            ConnectError::VersionRefused {
                refused: self.refused.clone(),
                unanswered: self.unanswered.clone(),
                skipped: self.skipped.clone(),
            }
        })
    }
}

/// The fields of a VERSION_RESPONSE. Those that a short message does not reach are absent: all but the
/// first two may be missing or garbage below 5.0 (QEMU).
struct Response {
    supported: bool,
    state: ConnectionState,
    selected: Option<u32>,
    features: FeatureFlags,
    len: usize,
}

impl Response {
    fn parse(payload: &[u8]) -> Result<Self, Violation> {
        let len = payload.len();
        let body = payload.get(size_of::<Header>()..).unwrap_or(&[]);
        let &[supported, state, ..] = body else {
            return Err(Violation::Short {
                message: MessageType::VERSION_RESPONSE,
                len,
            });
        };
        let whole = VersionResponse::parse(payload);
        Ok(Self {
            supported: supported != 0,
            state: ConnectionState(state),
            selected: whole.map(|(body, _)| body.selected.get()),
            features: whole
                .and_then(|(_, rest)| ResponseFeatures::read_from_prefix(rest).ok())
                .map_or(FeatureFlags::NONE, |(rest, _)| {
                    FeatureFlags(rest.features.get())
                }),
            len,
        })
    }

    /// The connection for later messages, as hosts from 5.0 name it.
    fn connection(&self) -> Result<ConnectionId, Violation> {
        match self.selected {
            Some(id @ 1..=MAX_CONNECTION) => Ok(ConnectionId(id)),
            Some(id) => Err(Violation::BadConnection(ConnectionId(id))),
            None => Err(Violation::Short {
                message: MessageType::VERSION_RESPONSE,
                len: self.len,
            }),
        }
    }
}
