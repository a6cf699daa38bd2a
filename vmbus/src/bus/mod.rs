//! The bus: connection, offers, GPADLs, opening and closing. It eats messages and times, and
//! makes messages and events; it never waits, posts or looks at memory.
//!
//! Whoever owns a [`Bus`] gives it every channel message ([`receive`](Bus::receive)), calls it again at its
//! [`deadline`](Bus::deadline), posts what [`poll_message`](Bus::poll_message) returns, in order, and handles what
//! [`poll_event`](Bus::poll_event) returns, until both return `None`. All times are
//! partition reference time in units of 100 ns.
//!
//! The host is not trusted: whatever it sends, the bus stays sound and reports an [`Event::Violation`].
//! Facts: spec vmbus.md, sections 1 to 4, 7 and 8.

mod connection;
mod event;
mod gpadl;
mod io;
mod negotiation;
mod offer;

use alloc::vec::Vec;

pub use event::{ConnectError, Error, Event, GpadlError, ModifyError, OpenError, Violation};
pub use gpadl::{GpaRange, MAX_PAGES, MAX_WORDS};
pub use offer::Offer;

use self::connection::{Connection, LateResponse};
use self::io::{Io, Refused, Subject};
use self::negotiation::{Negotiation, Step};
use crate::hypervisor::PostError;
use crate::ids::{ChannelId, ConnectionId, GpadlHandle, VpIndex};
use crate::protocol::message::{RequestOffers, Unload};
use crate::protocol::monitor::MonitorPages;
use crate::protocol::sizes::{Direction, MessageInfo};
use crate::protocol::{
    FeatureFlags, Guid, Header, LEGACY_CONNECTION, MessageType, Payload, Version,
};

/// Every version that the guest speaks, in the order in which it asks for them.
pub const VERSIONS: [Version; 9] = [
    Version::V6_0,
    Version::V5_3,
    Version::V5_2,
    Version::V5_1,
    Version::V5_0,
    Version::V4_1,
    Version::V4_0,
    Version::V3_0,
    Version::V2_4,
];

/// One second in units of 100 ns.
const SECOND: u64 = 10_000_000;

/// What the guest asks for, and how long it waits. Times are in units of 100 ns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// The versions to ask for, in this order.
    pub versions: Vec<Version>,
    /// The VP that channel messages shall go to; its SynIC is enabled.
    pub target_vp: VpIndex,
    /// Whether the stack shares two pages for monitored notification with the host. Channels use them only where their
    /// drivers choose so; without the pages every signal is a hypercall, which is always accepted and faster.
    pub monitor_pages: bool,
    /// How long to wait for the answer to one INITIATE_CONTACT: 2 s. At worst there is one for each version and
    /// one more.
    pub contact_timeout: u64,
    /// How long to wait for the offers, a GPADL, an open or modified channel: 10 s.
    pub response_timeout: u64,
    /// How long to wait for the host to let go of everything: 30 s.
    pub unload_timeout: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            versions: VERSIONS.into(),
            target_vp: VpIndex(0),
            monitor_pages: false,
            contact_timeout: 2 * SECOND,
            response_timeout: 10 * SECOND,
            unload_timeout: 30 * SECOND,
        }
    }
}

impl Config {
    /// The same, but asking for no version above `newest`.
    pub fn up_to(mut self, newest: Version) -> Self {
        self.versions.retain(|&version| version <= newest);
        self
    }
}

/// A message to post with type 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outgoing {
    /// Where to.
    pub connection: ConnectionId,
    /// What.
    pub payload: Payload,
}

/// How to open a channel (spec vmbus.md 3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OpenParameters {
    /// The GPADL of both rings, guest-to-host first; created on the same channel.
    pub ring: GpadlHandle,
    /// Where the host-to-guest ring begins, in pages from the start of the GPADL. Each ring has at least two pages.
    pub downstream_page: u32,
    /// The VP to interrupt, or [`NO_INTERRUPTS`].
    pub target_vp: VpIndex,
    /// Defined by the device; mostly zero.
    pub user_data: [u8; 120],
}

/// The target VP of a channel that the host shall not interrupt for.
pub const NO_INTERRUPTS: VpIndex = VpIndex(u32::MAX);

/// The guest's end of the bus.
#[derive(Debug)]
pub struct Bus {
    config: Config,
    state: State,
    io: Io,
    /// Where messages go.
    message_connection: ConnectionId,
    /// The host may still have what it was lent over a connection that this bus has given up.
    abandoned: bool,
    next_gpadl: u32,
    next_open_id: u32,
    monitor: Option<MonitorPages>,
}

#[derive(Debug)]
enum State {
    /// Not connected: not yet, not any more, or in vain.
    Idle,
    Negotiating {
        negotiation: Negotiation,
        deadline: u64,
    },
    Connected(Connection),
    Unloading {
        deadline: u64,
    },
}

impl Bus {
    /// A bus that is not connected.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            state: State::Idle,
            io: Io::default(),
            message_connection: LEGACY_CONNECTION,
            abandoned: false,
            next_gpadl: 1,
            next_open_id: 1,
            monitor: None,
        }
    }

    /// Sets the monitor pages that the host is given at the next [`connect`](Self::connect): zeroed, and shared with it
    /// until [`Event::Unloaded`] or for good. `None`, as at the start: offers come without monitor bits.
    pub fn set_monitor_pages(&mut self, pages: Option<MonitorPages>) {
        self.monitor = pages;
    }

    /// What the bus was made with.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Makes contact with the host. Ends with [`Event::Connected`] or [`Event::ConnectFailed`].
    ///
    /// The host drops whatever it knows of an earlier connection of this partition, also of
    /// one that this bus still has: all its channels and GPADLs are void without further events. The
    /// host may write to their memory until [`Event::Connected`].
    pub fn connect(&mut self, now: u64) {
        self.io.drop_messages();
        self.abandoned |= matches!(self.state, State::Connected(_) | State::Unloading { .. });
        self.state = State::Idle;
        match Negotiation::new(&self.config) {
            Ok(negotiation) => {
                let first = Step::Try(negotiation.current());
                self.state = State::Negotiating {
                    negotiation,
                    deadline: 0,
                };
                self.negotiate(now, first);
            }
            Err(error) => self.fail(error),
        }
    }

    /// Ends the connection: the host drops everything and then touches no shared memory any more.
    /// Messages that have not been polled yet are dropped, and so are the outcomes of calls under way. Ends with
    /// [`Event::Unloaded`]; at once, when there is no connection: unacknowledged, if the end of an earlier one was.
    pub fn unload(&mut self, now: u64) {
        match self.state {
            State::Connected(_) => {
                self.io.drop_messages();
                self.io.send(Subject::Unload, &Unload {});
                self.state = State::Unloading {
                    deadline: now.saturating_add(self.config.unload_timeout),
                };
            }
            State::Unloading { .. } => {}
            State::Idle | State::Negotiating { .. } => self.unloaded(!self.abandoned),
        }
    }

    /// Handles one channel message from the host: the payload of a SynIC message of type 1.
    pub fn receive(&mut self, now: u64, payload: &[u8]) {
        let Some(kind) = Header::type_of(payload) else {
            return self
                .io
                .violation(Violation::NoHeader { len: payload.len() });
        };
        if !MessageInfo::of(kind).is_some_and(|info| info.direction == Direction::ToGuest) {
            return self.io.violation(Violation::UnknownMessage(kind));
        }
        match (&mut self.state, kind) {
            (State::Unloading { .. }, MessageType::UNLOAD_COMPLETE) => self.unloaded(true),
            // Sent before the host saw UNLOAD.
            (State::Unloading { .. }, _) => {}
            (_, MessageType::VERSION_RESPONSE) => self.version_response(now, payload),
            (State::Connected(connection), _) => {
                let timeout = self.config.response_timeout;
                if let Err(violation) =
                    connection.receive(&mut self.io, now.saturating_add(timeout), kind, payload)
                {
                    self.io.violation(violation);
                }
            }
            (State::Idle | State::Negotiating { .. }, _) => {
                self.io.violation(Violation::Unexpected(kind));
            }
        }
    }

    /// Handles the time-outs that have come.
    pub fn tick(&mut self, now: u64) {
        self.io.tick(now);
        match &mut self.state {
            State::Idle => {}
            State::Negotiating {
                negotiation,
                deadline,
            } => {
                if *deadline <= now {
                    let step = negotiation.timed_out();
                    self.negotiate(now, step);
                }
            }
            State::Connected(connection) => {
                let deadline = now.saturating_add(self.config.response_timeout);
                connection.tick(&mut self.io, now, deadline);
            }
            State::Unloading { deadline } => {
                if *deadline <= now {
                    self.unloaded(false);
                }
            }
        }
    }

    /// When [`tick`](Self::tick) has something to do.
    pub fn deadline(&self) -> Option<u64> {
        let state = match &self.state {
            State::Idle => None,
            State::Negotiating { deadline, .. } | State::Unloading { deadline } => Some(*deadline),
            State::Connected(connection) => connection.deadline(),
        };
        state.into_iter().chain(self.io.deadline()).min()
    }

    /// The next message to post. If it cannot be posted, call
    /// [`message_refused`](Self::message_refused) before polling again.
    pub fn poll_message(&mut self) -> Option<Outgoing> {
        Some(Outgoing {
            payload: self.io.poll_message()?,
            connection: self.message_connection,
        })
    }

    /// The message polled last could not be posted.
    pub fn message_refused(&mut self, now: u64, error: PostError) {
        let Refused::Failed(subject) = self.io.message_refused(now, error) else {
            return;
        };
        match (&mut self.state, subject) {
            (State::Negotiating { negotiation, .. }, Subject::Contact) => {
                let step = negotiation.not_posted(error);
                self.negotiate(now, step);
            }
            (State::Connected(_), Subject::RequestOffers) => self.fail(ConnectError::Post {
                connection: self.message_connection,
                message: MessageType::REQUEST_OFFERS,
                error,
            }),
            (State::Unloading { .. }, Subject::Unload) => self.unloaded(false),
            (State::Connected(connection), subject) => {
                connection.not_posted(&mut self.io, subject, error);
            }
            _ => {}
        }
    }

    /// The next event to handle.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.io.poll_event()
    }

    /// Describes memory to the host. The call takes any number of ranges with up to [`MAX_WORDS`] range headers
    /// and page numbers in all. Ends with [`Event::GpadlCreated`]. The memory stays lent until
    /// that says otherwise, or until [`Event::GpadlTornDown`].
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`], [`Error::UnknownChannel`], [`Error::Rescinded`], [`Error::BadRange`],
    /// [`Error::GpadlTooLong`].
    pub fn create_gpadl(
        &mut self,
        now: u64,
        channel: ChannelId,
        ranges: &[GpaRange],
    ) -> Result<GpadlHandle, Error> {
        let deadline = now.saturating_add(self.config.response_timeout);
        let mut number = self.next_gpadl;
        let (connection, io) = self.parts()?;
        while connection.has_gpadl(GpadlHandle(number)) {
            number = following(number);
        }
        let handle = GpadlHandle(number);
        connection.create_gpadl(io, deadline, handle, channel, ranges)?;
        self.next_gpadl = following(number);
        Ok(handle)
    }

    /// Asks the host to let go of a GPADL. Ends with [`Event::GpadlTornDown`], however long it takes: the host
    /// may have the memory mapped. Only for a rescinded channel, about which hosts may keep silent, the wait is
    /// limited. A GPADL that is still being created is torn down instead of being reported as created.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`], [`Error::UnknownGpadl`]; [`Error::GpadlInUse`] while it holds the rings of a channel
    /// that is not closed; [`Error::BadGpadl`] when it is being torn down already.
    pub fn teardown_gpadl(&mut self, now: u64, handle: GpadlHandle) -> Result<(), Error> {
        let deadline = now.saturating_add(self.config.response_timeout);
        let (connection, io) = self.parts()?;
        connection.teardown_gpadl(io, deadline, handle)
    }

    /// Opens a channel. Ends with one [`Event::Opened`]. Interrupts may come before that.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`], [`Error::UnknownChannel`], [`Error::Rescinded`], [`Error::NotClosed`],
    /// [`Error::UnknownGpadl`], [`Error::BadGpadl`], [`Error::BadRing`].
    pub fn open(
        &mut self,
        now: u64,
        channel: ChannelId,
        parameters: &OpenParameters,
    ) -> Result<(), Error> {
        let deadline = now.saturating_add(self.config.response_timeout);
        let open_id = self.next_open_id;
        let (connection, io) = self.parts()?;
        connection.open(io, deadline, channel, open_id, parameters)?;
        self.next_open_id = following(open_id);
        Ok(())
    }

    /// Closes a channel that is open or being opened. The host does not confirm it: tear the
    /// rings' GPADL down to know when their memory is free. A channel that is being opened ends with [`Event::Opened`]
    /// and [`OpenError::Cancelled`], and is closed only then.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`], [`Error::UnknownChannel`], [`Error::NotOpen`].
    pub fn close(&mut self, channel: ChannelId) -> Result<(), Error> {
        let (connection, io) = self.parts()?;
        connection.close(io, channel)
    }

    /// Gives the number of a rescinded channel back to the host, which may then offer it
    /// anew. The channel is forgotten.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`], [`Error::UnknownChannel`], [`Error::NotRescinded`]; [`Error::NotClosed`] and
    /// [`Error::GpadlsLeft`] while something of it is left.
    pub fn release(&mut self, channel: ChannelId) -> Result<(), Error> {
        let (connection, io) = self.parts()?;
        connection.release(io, channel)
    }

    /// Has the host interrupt another VP for an open channel. Ends with [`Event::TargetVpModified`].
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`], [`Error::NeedsVersion`] below 4.1, [`Error::UnknownChannel`], [`Error::NotOpen`],
    /// [`Error::CannotModify`].
    pub fn modify_target_vp(
        &mut self,
        now: u64,
        channel: ChannelId,
        target_vp: VpIndex,
    ) -> Result<(), Error> {
        let deadline = now.saturating_add(self.config.response_timeout);
        let (connection, io) = self.parts()?;
        connection.modify_target_vp(io, deadline, channel, target_vp)
    }

    /// The version in use; `None` when there is no connection.
    pub fn version(&self) -> Option<Version> {
        Some(self.connected()?.agreement().version)
    }

    /// The features in use; none when there is no connection.
    pub fn features(&self) -> FeatureFlags {
        self.connected().map_or(FeatureFlags::NONE, |connection| {
            connection.agreement().features
        })
    }

    /// The channels on offer, by number; rescinded ones are not.
    pub fn offers(&self) -> impl Iterator<Item = &Offer> {
        self.connected().into_iter().flat_map(Connection::offers)
    }

    /// The offer of one channel of a device: 0 for its primary channel, 1.. for its sub-channels. If the host, against
    /// the rules, offers two of them, the one with the lower number. Rescinded ones are not on offer.
    pub fn offer(&self, interface: Guid, instance: Guid, sub_channel_index: u16) -> Option<&Offer> {
        self.offers().find(|offer| {
            offer.interface == interface
                && offer.instance == instance
                && offer.sub_channel_index == sub_channel_index
        })
    }

    /// How often the host has violated the protocol since the bus was made.
    pub fn violations(&self) -> u64 {
        self.io.violations()
    }

    fn connected(&self) -> Option<&Connection> {
        match &self.state {
            State::Connected(connection) => Some(connection),
            _ => None,
        }
    }

    /// The live connection, and the way out for what it has to say.
    fn parts(&mut self) -> Result<(&mut Connection, &mut Io), Error> {
        match &mut self.state {
            State::Connected(connection) => Ok((connection, &mut self.io)),
            _ => Err(Error::NotConnected),
        }
    }

    fn version_response(&mut self, now: u64, payload: &[u8]) {
        let step = match &mut self.state {
            State::Negotiating { negotiation, .. } if self.io.all_sent() => {
                negotiation.response(payload)
            }
            // Nothing answers a message that has not been sent.
            State::Negotiating { negotiation, .. } => negotiation.stale_response(),
            State::Connected(connection) => match connection.late_response(payload) {
                Ok(LateResponse::Confirmed(to)) => {
                    self.message_connection = to;
                    Ok(None)
                }
                Ok(LateResponse::Refused(mut negotiation)) => {
                    let step = negotiation.version_refused();
                    self.state = State::Negotiating {
                        negotiation,
                        deadline: 0,
                    };
                    Ok(Some(step))
                }
                Err(violation) => Err(violation),
            },
            State::Idle | State::Unloading { .. } => {
                Err(Violation::Unexpected(MessageType::VERSION_RESPONSE))
            }
        };
        match step {
            Ok(Some(step)) => self.negotiate(now, step),
            Ok(None) => {}
            Err(violation) => self.io.violation(violation),
        }
    }

    /// Does what the negotiation under way says.
    fn negotiate(&mut self, now: u64, step: Step) {
        self.io.drop_messages();
        match (step, core::mem::replace(&mut self.state, State::Idle)) {
            (Step::Try(attempt), State::Negotiating { negotiation, .. }) => {
                self.message_connection = attempt.connection;
                self.io.send_payload(
                    Subject::Contact,
                    attempt.message(&self.config, self.monitor),
                );
                self.state = State::Negotiating {
                    negotiation,
                    deadline: now.saturating_add(self.config.contact_timeout),
                };
            }
            (Step::Agreed(mut agreement), State::Negotiating { negotiation, .. }) => {
                agreement.monitored = self.monitor.is_some();
                self.message_connection = agreement.connection;
                self.io.send(Subject::RequestOffers, &RequestOffers {});
                // Making contact has made the host drop everything.
                self.abandoned = false;
                self.io.report(Event::Connected {
                    version: agreement.version,
                    features: agreement.features,
                });
                self.state = State::Connected(Connection::new(
                    agreement,
                    negotiation,
                    now.saturating_add(self.config.response_timeout),
                ));
            }
            (Step::Fail(error), _) => self.fail(error),
            // Only a negotiation takes steps.
            (_, state) => self.state = state,
        }
    }

    fn fail(&mut self, error: ConnectError) {
        self.io.drop_messages();
        self.state = State::Idle;
        self.io.report(Event::ConnectFailed(error));
    }

    fn unloaded(&mut self, acknowledged: bool) {
        self.io.drop_messages();
        self.state = State::Idle;
        self.abandoned = !acknowledged;
        self.io.report(Event::Unloaded { acknowledged });
    }
}

/// The number after `number`, never zero.
fn following(number: u32) -> u32 {
    number.checked_add(1).unwrap_or(1)
}
