//! A live connection: its channels and GPADLs, and what each message means to them.

use alloc::vec::Vec;

use zerocopy::little_endian::U32;

use super::event::{Error, Event, GpadlError, ModifyError, OpenError, Violation};
use super::gpadl::{GpaRange, Transfer};
use super::io::{Io, Subject};
use super::negotiation::{Agreement, Negotiation};
use super::{NO_INTERRUPTS, Offer, OpenParameters};
use crate::hypervisor::PostError;
use crate::ids::{ChannelId, ConnectionId, GpadlHandle, VpIndex};
use crate::protocol::message::{
    AllOffersDelivered, CloseChannel, GpadlCreated, GpadlTeardown, GpadlTorndown, ModifyChannel,
    ModifyChannelResponse, OfferChannel, OpenChannel, OpenChannelResult, RelidReleased,
    RescindChannelOffer,
};
use crate::protocol::sizes::MessageInfo;
use crate::protocol::{Body, MessageType, Status, Version};

/// The least pages of a ring: its control page and one of data.
const MIN_RING_PAGES: u32 = 2;

#[derive(Debug)]
pub(super) struct Connection {
    agreement: Agreement,
    /// How it came about, for answers that are still under way.
    negotiation: Negotiation,
    /// When the host should have finished its offers.
    offers_due: Option<u64>,
    all_offers_delivered: bool,
    /// In the order of their numbers.
    channels: Vec<Channel>,
    gpadls: Vec<Gpadl>,
}

#[derive(Debug)]
struct Channel {
    offer: Offer,
    rescinded: bool,
    state: ChannelState,
    /// An opening that the guest has given up. If the host opens the channel after all, it must be closed.
    given_up: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum ChannelState {
    Closed,
    Opening {
        ring: GpadlHandle,
        interrupts: bool,
        open_id: u32,
        deadline: u64,
        /// The guest has closed it meanwhile.
        cancelled: bool,
    },
    Open {
        ring: GpadlHandle,
        interrupts: bool,
        modifying: Option<Modifying>,
    },
}

/// A MODIFY_CHANNEL that has no answer yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Modifying {
    target_vp: VpIndex,
    deadline: u64,
}

#[derive(Debug)]
struct Gpadl {
    handle: GpadlHandle,
    channel: ChannelId,
    pages: usize,
    state: GpadlState,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum GpadlState {
    Creating {
        deadline: u64,
        /// The guest has asked for its end meanwhile.
        unwanted: bool,
    },
    Created,
    /// GPADL_TEARDOWN is sent.
    Leaving {
        /// What to report at the end.
        reason: Leaving,
        deadline: Option<u64>,
    },
}

/// Why a GPADL is being torn down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Leaving {
    /// The guest asked for it.
    Asked,
    /// Its creation failed in a way that leaves open what the host knows.
    Failed(GpadlError),
}

impl Leaving {
    /// Why a GPADL goes whose creation ended with `error`: the guest may have asked for it already.
    fn failed(unwanted: bool, error: GpadlError) -> Self {
        if unwanted {
            Self::Asked
        } else {
            Self::Failed(error)
        }
    }
}

impl Channel {
    fn id(&self) -> ChannelId {
        self.offer.channel
    }

    fn uses(&self, handle: GpadlHandle) -> bool {
        match self.state {
            ChannelState::Closed => false,
            ChannelState::Opening { ring, .. } | ChannelState::Open { ring, .. } => ring == handle,
        }
    }

    fn wrong_state(&self, message: MessageType) -> Violation {
        Violation::WrongChannelState {
            message,
            channel: self.id(),
        }
    }

    fn send_close(&self, io: &mut Io) {
        io.notify(&CloseChannel {
            channel: U32::new(self.id().0),
        });
    }

    /// Gives up an opening whose outcome is not known. The host may have opened the channel
    /// or may still do so: tell it to close.
    fn give_up_opening(&mut self, io: &mut Io, error: OpenError) {
        if let ChannelState::Opening {
            open_id, cancelled, ..
        } = self.state
        {
            self.send_close(io);
            self.given_up = Some(open_id);
            self.opening_failed(
                io,
                if cancelled {
                    OpenError::Cancelled
                } else {
                    error
                },
            );
        }
    }

    fn opening_failed(&mut self, io: &mut Io, error: OpenError) {
        self.state = ChannelState::Closed;
        io.report(Event::Opened {
            channel: self.id(),
            result: Err(error),
        });
    }

    /// Ends a MODIFY_CHANNEL under way.
    fn modified(&mut self, io: &mut Io, result: Result<(), ModifyError>) -> bool {
        let ChannelState::Open { modifying, .. } = &mut self.state else {
            return false;
        };
        let Some(Modifying { target_vp, .. }) = modifying.take() else {
            return false;
        };
        io.report(Event::TargetVpModified {
            channel: self.id(),
            target_vp,
            result,
        });
        true
    }

    fn deadline(&self) -> Option<u64> {
        match self.state {
            ChannelState::Closed => None,
            ChannelState::Opening { deadline, .. } => Some(deadline),
            ChannelState::Open { modifying, .. } => modifying.map(|modifying| modifying.deadline),
        }
    }
}

impl Gpadl {
    fn deadline(&self) -> Option<u64> {
        match self.state {
            GpadlState::Creating { deadline, .. } => Some(deadline),
            GpadlState::Created => None,
            GpadlState::Leaving { deadline, .. } => deadline,
        }
    }

    /// Tells the host to let go of it.
    fn leave(&mut self, io: &mut Io, reason: Leaving, deadline: u64) {
        io.send(
            Subject::Teardown(self.handle),
            &GpadlTeardown {
                channel: U32::new(self.channel.0),
                gpadl: U32::new(self.handle.0),
            },
        );
        self.state = GpadlState::Leaving {
            reason,
            deadline: Some(deadline),
        };
    }
}

impl Connection {
    pub(super) fn new(agreement: Agreement, negotiation: Negotiation, offers_due: u64) -> Self {
        Self {
            agreement,
            negotiation,
            offers_due: Some(offers_due),
            all_offers_delivered: false,
            channels: Vec::new(),
            gpadls: Vec::new(),
        }
    }

    pub(super) fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    pub(super) fn offers(&self) -> impl Iterator<Item = &Offer> {
        let there = self.channels.iter().filter(|channel| !channel.rescinded);
        there.map(|channel| &channel.offer)
    }

    pub(super) fn has_gpadl(&self, handle: GpadlHandle) -> bool {
        self.gpadls.iter().any(|gpadl| gpadl.handle == handle)
    }

    fn position(&self, id: ChannelId) -> Result<usize, usize> {
        self.channels.binary_search_by_key(&id, Channel::id)
    }

    /// A channel that the guest names.
    fn channel(&mut self, id: ChannelId) -> Result<&mut Channel, Error> {
        let position = self.position(id).map_err(|_| Error::UnknownChannel(id))?;
        self.channels
            .get_mut(position)
            .ok_or(Error::UnknownChannel(id))
    }

    /// A channel that a message names.
    fn named_channel(&mut self, message: MessageType, id: U32) -> Result<&mut Channel, Violation> {
        let channel = ChannelId(id.get());
        self.channel(channel)
            .map_err(|_| Violation::UnknownChannel { message, channel })
    }

    /// The place of a GPADL that a message names.
    fn named_gpadl(&self, message: MessageType, handle: U32) -> Result<usize, Violation> {
        let handle = GpadlHandle(handle.get());
        let mut gpadls = self.gpadls.iter();
        gpadls
            .position(|gpadl| gpadl.handle == handle)
            .ok_or(Violation::UnknownGpadl { message, handle })
    }

    // What the guest asks for.

    pub(super) fn create_gpadl(
        &mut self,
        io: &mut Io,
        deadline: u64,
        handle: GpadlHandle,
        channel: ChannelId,
        ranges: &[GpaRange],
    ) -> Result<(), Error> {
        if self.channel(channel)?.rescinded {
            return Err(Error::Rescinded(channel));
        }
        io.send_gpadl(Transfer::new(handle, channel, ranges)?);
        self.gpadls.push(Gpadl {
            handle,
            channel,
            pages: ranges.iter().map(|range| range.pages.len()).sum(),
            state: GpadlState::Creating {
                deadline,
                unwanted: false,
            },
        });
        Ok(())
    }

    pub(super) fn teardown_gpadl(
        &mut self,
        io: &mut Io,
        deadline: u64,
        handle: GpadlHandle,
    ) -> Result<(), Error> {
        let mut gpadls = self.gpadls.iter_mut();
        let gpadl = gpadls
            .find(|gpadl| gpadl.handle == handle)
            .ok_or(Error::UnknownGpadl(handle))?;
        if self.channels.iter().any(|channel| channel.uses(handle)) {
            return Err(Error::GpadlInUse(handle));
        }
        match &mut gpadl.state {
            GpadlState::Creating { unwanted, .. } if !*unwanted => *unwanted = true,
            GpadlState::Created => gpadl.leave(io, Leaving::Asked, deadline),
            GpadlState::Leaving {
                reason: reason @ Leaving::Failed(_),
                ..
            } => *reason = Leaving::Asked,
            _ => return Err(Error::BadGpadl(handle)),
        }
        Ok(())
    }

    pub(super) fn open(
        &mut self,
        io: &mut Io,
        deadline: u64,
        id: ChannelId,
        open_id: u32,
        parameters: &OpenParameters,
    ) -> Result<(), Error> {
        let &OpenParameters {
            ring,
            downstream_page,
            target_vp,
            user_data,
        } = parameters;
        let mut gpadls = self.gpadls.iter();
        let gpadl = gpadls.find(|gpadl| gpadl.handle == ring);
        let ring_state = gpadl.map(|gpadl| (gpadl.pages, gpadl.channel, gpadl.state));
        let channel = self.channel(id)?;
        if channel.rescinded {
            return Err(Error::Rescinded(id));
        }
        if channel.state != ChannelState::Closed {
            return Err(Error::NotClosed(id));
        }
        let pages = match ring_state {
            None => return Err(Error::UnknownGpadl(ring)),
            Some((pages, of, GpadlState::Created)) if of == id => pages,
            Some(_) => return Err(Error::BadGpadl(ring)),
        };
        let downstream_pages = (pages as u64).saturating_sub(u64::from(downstream_page));
        if downstream_page < MIN_RING_PAGES || downstream_pages < u64::from(MIN_RING_PAGES) {
            return Err(Error::BadRing);
        }
        channel.state = ChannelState::Opening {
            ring,
            interrupts: target_vp != NO_INTERRUPTS,
            open_id,
            deadline,
            cancelled: false,
        };
        io.send(
            Subject::Open(id),
            &OpenChannel {
                channel: U32::new(id.0),
                open_id: U32::new(open_id),
                ring: U32::new(ring.0),
                target_vp: U32::new(target_vp.0),
                downstream_page: U32::new(downstream_page),
                user_data,
            },
        );
        Ok(())
    }

    pub(super) fn close(&mut self, io: &mut Io, id: ChannelId) -> Result<(), Error> {
        let channel = self.channel(id)?;
        match &mut channel.state {
            ChannelState::Opening { cancelled, .. } if !*cancelled => *cancelled = true,
            ChannelState::Open { .. } => {
                channel.modified(io, Err(ModifyError::Closed));
                channel.send_close(io);
                channel.state = ChannelState::Closed;
            }
            _ => return Err(Error::NotOpen(id)),
        }
        Ok(())
    }

    pub(super) fn release(&mut self, io: &mut Io, id: ChannelId) -> Result<(), Error> {
        let position = self.position(id).map_err(|_| Error::UnknownChannel(id))?;
        let channel = self.channel(id)?;
        if !channel.rescinded {
            return Err(Error::NotRescinded(id));
        }
        if channel.state != ChannelState::Closed {
            return Err(Error::NotClosed(id));
        }
        if self.gpadls.iter().any(|gpadl| gpadl.channel == id) {
            return Err(Error::GpadlsLeft(id));
        }
        self.channels.remove(position);
        io.notify(&RelidReleased {
            channel: U32::new(id.0),
        });
        Ok(())
    }

    pub(super) fn modify_target_vp(
        &mut self,
        io: &mut Io,
        deadline: u64,
        id: ChannelId,
        target_vp: VpIndex,
    ) -> Result<(), Error> {
        let version = self.agreement.version;
        if version < Version::V4_1 {
            return Err(Error::NeedsVersion(Version::V4_1));
        }
        let channel = self.channel(id)?;
        let ChannelState::Open {
            interrupts,
            modifying,
            ..
        } = &mut channel.state
        else {
            return Err(Error::NotOpen(id));
        };
        if channel.rescinded || modifying.is_some() || !*interrupts || target_vp == NO_INTERRUPTS {
            return Err(Error::CannotModify(id));
        }
        *modifying = Some(Modifying {
            target_vp,
            deadline,
        });
        io.send(
            Subject::Modify(id),
            &ModifyChannel {
                channel: U32::new(id.0),
                target_vp: U32::new(target_vp.0),
            },
        );
        if version < Version::V5_3 {
            channel.modified(io, Ok(()));
        }
        Ok(())
    }

    // What the host says.

    /// Handles a message; all but VERSION_RESPONSE. Waits that begin with it end at `deadline`.
    pub(super) fn receive(
        &mut self,
        io: &mut Io,
        deadline: u64,
        kind: MessageType,
        payload: &[u8],
    ) -> Result<(), Violation> {
        let Agreement {
            version, features, ..
        } = self.agreement;
        if MessageInfo::of(kind)
            .and_then(|info| info.size(version, features))
            .is_none()
        {
            return Err(Violation::Unexpected(kind));
        }
        match kind {
            MessageType::OFFER_CHANNEL => self.offered(io, body(payload)?),
            MessageType::RESCIND_CHANNEL_OFFER => self.rescinded(io, deadline, body(payload)?),
            MessageType::ALL_OFFERS_DELIVERED => self.all_offers_delivered(io, body(payload)?),
            MessageType::OPEN_CHANNEL_RESULT => self.opened(io, body(payload)?),
            MessageType::GPADL_CREATED => self.gpadl_created(io, deadline, body(payload)?),
            MessageType::GPADL_TORNDOWN => self.gpadl_torn_down(io, body(payload)?),
            MessageType::MODIFY_CHANNEL_RESPONSE => self.modified(io, body(payload)?),
            // Answers to questions that the guest does not ask.
            _ => Err(Violation::Unexpected(kind)),
        }
    }

    /// Handles a VERSION_RESPONSE. Only answers to earlier attempts can come now.
    pub(super) fn late_response(&mut self, payload: &[u8]) -> Result<LateResponse, Violation> {
        let unexpected = Violation::Unexpected(MessageType::VERSION_RESPONSE);
        match self.negotiation.late_response(payload)?.ok_or(unexpected)? {
            Some(connection) => Ok(LateResponse::Confirmed(connection)),
            None if self.channels.is_empty() && !self.all_offers_delivered => {
                Ok(LateResponse::Refused(self.negotiation.clone()))
            }
            // A host that makes offers is connected.
            None => Err(unexpected),
        }
    }

    fn offered(&mut self, io: &mut Io, wire: &OfferChannel) -> Result<(), Violation> {
        let mut offer = Offer::from_wire(wire)?;
        if self.agreement.monitored
            && let Err(violation) = offer.take_monitor(wire)
        {
            io.violation(violation);
        }
        match self.position(offer.channel) {
            Ok(_) => Err(Violation::DuplicateOffer(offer.channel)),
            Err(position) => {
                self.channels.insert(
                    position,
                    Channel {
                        offer: offer.clone(),
                        rescinded: false,
                        state: ChannelState::Closed,
                        given_up: None,
                    },
                );
                io.report(Event::Offered(offer));
                Ok(())
            }
        }
    }

    fn all_offers_delivered(
        &mut self,
        io: &mut Io,
        _: &AllOffersDelivered,
    ) -> Result<(), Violation> {
        if self.all_offers_delivered {
            return Err(Violation::Unexpected(MessageType::ALL_OFFERS_DELIVERED));
        }
        self.all_offers_delivered = true;
        self.offers_due = None;
        io.report(Event::AllOffersDelivered);
        Ok(())
    }

    fn rescinded(
        &mut self,
        io: &mut Io,
        deadline: u64,
        wire: &RescindChannelOffer,
    ) -> Result<(), Violation> {
        let message = MessageType::RESCIND_CHANNEL_OFFER;
        let channel = self.named_channel(message, wire.channel)?;
        if channel.rescinded {
            return Err(channel.wrong_state(message));
        }
        channel.rescinded = true;
        let id = channel.id();
        channel.give_up_opening(io, OpenError::Rescinded);
        channel.modified(io, Err(ModifyError::Closed));
        for gpadl in self.gpadls.iter_mut().filter(|gpadl| gpadl.channel == id) {
            match &mut gpadl.state {
                &mut GpadlState::Creating { unwanted, .. } => {
                    let reason = Leaving::failed(unwanted, GpadlError::Rescinded);
                    gpadl.leave(io, reason, deadline);
                }
                GpadlState::Created => {}
                // Hosts may keep silent about a rescinded channel: wait no longer than this.
                GpadlState::Leaving {
                    deadline: until, ..
                } => *until = Some(deadline),
            }
        }
        io.report(Event::Rescinded(id));
        Ok(())
    }

    fn opened(&mut self, io: &mut Io, wire: &OpenChannelResult) -> Result<(), Violation> {
        let message = MessageType::OPEN_CHANNEL_RESULT;
        let channel = self.named_channel(message, wire.channel)?;
        let status = Status(wire.status.get());
        match channel.state {
            ChannelState::Opening {
                ring,
                interrupts,
                open_id,
                cancelled,
                ..
            } if open_id == wire.open_id.get() => {
                if !status.is_success() {
                    let refused = OpenError::Refused(status);
                    channel.opening_failed(
                        io,
                        if cancelled {
                            OpenError::Cancelled
                        } else {
                            refused
                        },
                    );
                } else if cancelled {
                    channel.send_close(io);
                    channel.opening_failed(io, OpenError::Cancelled);
                } else {
                    channel.state = ChannelState::Open {
                        ring,
                        interrupts,
                        modifying: None,
                    };
                    io.report(Event::Opened {
                        channel: channel.id(),
                        result: Ok(()),
                    });
                }
                Ok(())
            }
            state if channel.given_up == Some(wire.open_id.get()) => {
                channel.given_up = None;
                if status.is_success() && state == ChannelState::Closed {
                    channel.send_close(io);
                }
                Ok(())
            }
            _ => Err(channel.wrong_state(message)),
        }
    }

    fn gpadl_created(
        &mut self,
        io: &mut Io,
        deadline: u64,
        wire: &GpadlCreated,
    ) -> Result<(), Violation> {
        let message = MessageType::GPADL_CREATED;
        let position = self.named_gpadl(message, wire.gpadl)?;
        let handle = GpadlHandle(wire.gpadl.get());
        let Some(gpadl) = self.gpadls.get_mut(position) else {
            return Ok(());
        };
        if gpadl.channel.0 != wire.channel.get() {
            return Err(Violation::UnknownGpadl { message, handle });
        }
        let status = Status(wire.status.get());
        match gpadl.state {
            // The host cannot have taken what it has not seen, but it can refuse that.
            GpadlState::Creating { .. } if status.is_success() && io.is_sending(handle) => {
                Err(Violation::WrongGpadlState { message, handle })
            }
            GpadlState::Creating { unwanted, .. } if status.is_success() => {
                if unwanted {
                    gpadl.leave(io, Leaving::Asked, deadline);
                } else {
                    gpadl.state = GpadlState::Created;
                    io.report(Event::GpadlCreated {
                        handle,
                        result: Ok(()),
                    });
                }
                Ok(())
            }
            GpadlState::Creating { unwanted, .. } => {
                let reason = Leaving::failed(unwanted, GpadlError::Refused(status));
                self.gpadl_gone(io, position, reason);
                Ok(())
            }
            GpadlState::Created => Err(Violation::WrongGpadlState { message, handle }),
            // Late: the answer to GPADL_TEARDOWN follows, unless there never was a GPADL.
            GpadlState::Leaving { reason, .. } => {
                if !status.is_success() {
                    self.gpadl_gone(io, position, reason);
                }
                Ok(())
            }
        }
    }

    fn gpadl_torn_down(&mut self, io: &mut Io, wire: &GpadlTorndown) -> Result<(), Violation> {
        let message = MessageType::GPADL_TORNDOWN;
        let position = self.named_gpadl(message, wire.gpadl)?;
        match self.gpadls.get(position).map(|gpadl| gpadl.state) {
            Some(GpadlState::Leaving { reason, .. }) => {
                self.gpadl_gone(io, position, reason);
                Ok(())
            }
            _ => Err(Violation::WrongGpadlState {
                message,
                handle: GpadlHandle(wire.gpadl.get()),
            }),
        }
    }

    /// Forgets a GPADL and reports what became of it.
    fn gpadl_gone(&mut self, io: &mut Io, position: usize, reason: Leaving) {
        let handle = self.gpadls.swap_remove(position).handle;
        io.stop_sending(handle);
        io.report(match reason {
            Leaving::Asked => Event::GpadlTornDown(handle),
            Leaving::Failed(error) => Event::GpadlCreated {
                handle,
                result: Err(error),
            },
        });
    }

    fn modified(&mut self, io: &mut Io, wire: &ModifyChannelResponse) -> Result<(), Violation> {
        let message = MessageType::MODIFY_CHANNEL_RESPONSE;
        let channel = self.named_channel(message, wire.channel)?;
        let status = Status(wire.status.get());
        let result = if status.is_success() {
            Ok(())
        } else {
            Err(ModifyError::Refused(status))
        };
        if channel.modified(io, result) {
            Ok(())
        } else {
            Err(channel.wrong_state(message))
        }
    }

    // What the hypervisor and the clock say.

    /// A message other than REQUEST_OFFERS and UNLOAD could not be posted.
    pub(super) fn not_posted(&mut self, io: &mut Io, subject: Subject, error: PostError) {
        let position = |handle| self.gpadls.iter().position(|gpadl| gpadl.handle == handle);
        match subject {
            Subject::Open(id) => {
                if let Ok(channel) = self.channel(id)
                    && let ChannelState::Opening { cancelled, .. } = channel.state
                {
                    let error = OpenError::Post(error);
                    channel.opening_failed(
                        io,
                        if cancelled {
                            OpenError::Cancelled
                        } else {
                            error
                        },
                    );
                }
            }
            Subject::Modify(id) => {
                let failed = Err(ModifyError::Post(error));
                if !self
                    .channel(id)
                    .is_ok_and(|channel| channel.modified(io, failed))
                {
                    // Below 5.3 it has been reported as done already.
                    let message = MessageType::MODIFY_CHANNEL;
                    io.violation(Violation::NotPosted { message, error });
                }
            }
            Subject::Gpadl(handle) => {
                // The host has not all of it, so it cannot use it.
                if let Some(position) = position(handle)
                    && let Some(gpadl) = self.gpadls.get(position)
                {
                    let reason = match gpadl.state {
                        GpadlState::Leaving { reason, .. } => reason,
                        GpadlState::Creating { unwanted, .. } => {
                            Leaving::failed(unwanted, GpadlError::Post(error))
                        }
                        GpadlState::Created => return,
                    };
                    self.gpadl_gone(io, position, reason);
                }
            }
            Subject::Teardown(_) => io.violation(Violation::NotPosted {
                message: MessageType::GPADL_TEARDOWN,
                error,
            }),
            Subject::Notice(message) => io.violation(Violation::NotPosted { message, error }),
            Subject::Contact | Subject::RequestOffers | Subject::Unload => {}
        }
    }

    /// Handles the time-outs that have come. Waits that begin now end at `deadline`.
    pub(super) fn tick(&mut self, io: &mut Io, now: u64, deadline: u64) {
        let due = |at: Option<u64>| at.is_some_and(|at| at <= now);
        if due(self.offers_due) {
            self.offers_due = None;
            io.violation(Violation::OffersOverdue);
        }
        for channel in self
            .channels
            .iter_mut()
            .filter(|channel| due(channel.deadline()))
        {
            channel.give_up_opening(io, OpenError::NoReply);
            channel.modified(io, Err(ModifyError::NoReply));
        }
        // From the end, because gone ones are replaced by the last.
        for position in (0..self.gpadls.len()).rev() {
            self.gpadl_tick(io, position, now, deadline);
        }
    }

    fn gpadl_tick(&mut self, io: &mut Io, position: usize, now: u64, deadline: u64) {
        let Some(gpadl) = self.gpadls.get_mut(position) else {
            return;
        };
        if gpadl.deadline().is_none_or(|at| at > now) {
            return;
        }
        let id = gpadl.channel;
        match &mut gpadl.state {
            &mut GpadlState::Creating { unwanted, .. } => {
                let reason = Leaving::failed(unwanted, GpadlError::NoReply);
                gpadl.leave(io, reason, deadline);
            }
            GpadlState::Created => {}
            &mut GpadlState::Leaving {
                reason: Leaving::Failed(error),
                ..
            } => {
                let error = match error {
                    GpadlError::NoReply => GpadlError::NotReleased,
                    error => error,
                };
                self.gpadl_gone(io, position, Leaving::Failed(error));
            }
            GpadlState::Leaving {
                reason: Leaving::Asked,
                deadline,
            } => {
                *deadline = None;
                let handle = gpadl.handle;
                if self.channel(id).is_ok_and(|channel| channel.rescinded) {
                    self.gpadl_gone(io, position, Leaving::Asked);
                } else {
                    io.violation(Violation::TeardownOverdue(handle));
                }
            }
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        let channels = self.channels.iter().filter_map(Channel::deadline);
        let gpadls = self.gpadls.iter().filter_map(Gpadl::deadline);
        channels.chain(gpadls).chain(self.offers_due).min()
    }
}

/// What a VERSION_RESPONSE to an earlier attempt means.
pub(super) enum LateResponse {
    /// The host is connected, and messages go here.
    Confirmed(ConnectionId),
    /// The host is not connected: negotiate on.
    Refused(Negotiation),
}

/// The body of a message whose type has been looked at.
fn body<B: Body>(payload: &[u8]) -> Result<&B, Violation> {
    match B::parse(payload) {
        Some((body, _)) => Ok(body),
        None => Err(Violation::Short {
            message: B::TYPE,
            len: payload.len(),
        }),
    }
}
