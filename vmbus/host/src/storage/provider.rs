//! The provider of a SCSI controller's channels: packets out of the ring, answers into it.

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroU16;

use vmbus::protocol::{Guid, Status, interface};
use vmbus::ring::{Kind, Outgoing, PacketBuffer, PushError, RingError};

use super::activity::Activity;
use super::answer::{Answer, Results, Ticket, ended, malformed, report};
use super::controller::Controller;
use super::scsi::{self, Command, LogicalUnit, Outcome, Refusal, Sense, Step, Stop, Transfer};
use super::session::{Session, Verdict};
use super::vstor::{self, ProtocolVersion, Reply, Srb};
use crate::bus::Device;
use crate::channel::HostChannel;
use crate::memory::GuestBuffer;
use crate::provider::{Link, Provider};
use crate::sync::Mutex;
use crate::work::Executor;

/// Packets that are taken at one time, before others have their turn.
const BUDGET: usize = 512;

/// How long to wait for room in the ring before looking again, should the guest not say that there is some: 10 ms in units
/// of 100 ns.
const RETRY: u64 = 100_000;

/// How long a guest must have asked for nothing to have let go of a controller that is about to be taken away: 2 s.
const QUIET: u64 = 20_000_000;

/// The same for a guest that has not done what one does that lets go of its units: 10 s.
const SILENT: u64 = 100_000_000;

/// Serves one channel of a controller. Sub-channels are made when the guest asks for them.
pub struct Storvsp {
    shared: Arc<Shared>,
    /// Whether it is the primary channel.
    primary: bool,
    link: Option<Link>,
    open: Option<Open>,
}

/// What all channels of a controller have in common.
struct Shared {
    controller: Arc<Controller>,
    executor: Arc<dyn Executor>,
    session: Mutex<Session>,
    sub_channels: Mutex<Vec<Link>>,
}

/// An open channel.
struct Open {
    results: Arc<Results>,
    packet: PacketBuffer,
    /// Packets that have been taken and whose answer is not in the ring.
    taken: usize,
    unsent: VecDeque<Answer>,
    resets: Vec<Reset>,
    retry_at: Option<u64>,
    /// When the guest has asked for something last, or was told something.
    busy_at: u64,
    /// The controller is about to be taken away.
    leaving: bool,
    /// The ring is broken: the guest gets nothing more.
    broken: bool,
}

/// A reset that waits until what it stopped has ended.
struct Reset {
    answer: Answer,
    stopping: Vec<Arc<Activity>>,
}

impl Storvsp {
    /// Serves the primary channel of `controller`; work that takes time is done by `executor`.
    pub fn new(controller: Arc<Controller>, executor: Arc<dyn Executor>) -> Self {
        let session = Session::new(controller.properties());
        Self::of(
            Arc::new(Shared {
                controller,
                executor,
                session: Mutex::new(session),
                sub_channels: Mutex::default(),
            }),
            true,
        )
    }

    fn of(shared: Arc<Shared>, primary: bool) -> Self {
        Self {
            shared,
            primary,
            link: None,
            open: None,
        }
    }

    /// The device to offer for a controller.
    pub const fn device(instance: Guid) -> Device {
        Device::new(interface::SCSI_CONTROLLER, instance)
    }
}

impl Provider for Storvsp {
    fn attached(&mut self, link: Link) {
        if self.primary {
            self.shared.controller.attach(link.clone());
        } else {
            self.shared.sub_channels.lock().push(link.clone());
        }
        self.link = Some(link);
    }

    fn opened(&mut self, _channel: &mut HostChannel) -> Status {
        let Some(link) = self.link.clone() else {
            return Status::UNSUCCESSFUL;
        };
        self.open = Some(Open::new(link));
        Status::SUCCESS
    }

    fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        let Some(open) = self.open.as_mut().filter(|open| !open.broken) else {
            return;
        };
        let mut server = Server {
            shared: &self.shared,
            primary: self.primary,
            open,
        };
        if server.serve(now, channel).is_err() {
            open.broken = true;
            open.retry_at = None;
            self.shared.controller.counters.broken_rings.one();
        }
    }

    /// What is under way ends as if its unit were gone, and so does what still comes. A guest lets go of its units when it
    /// learns that, which takes commands: it looks which units are left, and flushes caches. It has let go when it has done
    /// so and no more come.
    ///
    /// That matters: after the rescind Linux can send nothing, and its driver leaves a command that cannot be sent waiting
    /// for ever, with the whole controller.
    fn leave(&mut self, now: u64, channel: &mut HostChannel) -> bool {
        let Some(open) = self.open.as_mut().filter(|open| !open.broken) else {
            return true;
        };
        let Some(version) = self.shared.session.lock().ready() else {
            return true;
        };
        if !open.leaving {
            open.leaving = true;
            open.busy_at = now;
            self.shared.controller.leave(version);
            channel.renew_lease();
            open.results.give_up();
        }
        self.serve(now, channel);
        let Some(open) = self.open.as_mut().filter(|open| !open.broken) else {
            return true;
        };
        if open.taken != 0 || !channel.is_drained().unwrap_or(true) {
            open.busy_at = now;
        }
        let done = self.shared.controller.is_let_go();
        now.saturating_sub(open.busy_at) >= if done { QUIET } else { SILENT }
    }

    fn closed(&mut self) {
        self.open = None;
        if !self.primary {
            return;
        }
        let shared = &self.shared;
        *shared.session.lock() = Session::new(shared.controller.properties());
        shared.controller.end_session();
        let sub_channels = core::mem::take(&mut *shared.sub_channels.lock());
        sub_channels.iter().for_each(Link::rescind);
    }

    fn deadline(&self) -> Option<u64> {
        self.open.as_ref()?.retry_at
    }
}

impl fmt::Debug for Storvsp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Storvsp")
            .field("controller", &self.shared.controller)
            .field("primary", &self.primary)
            .finish_non_exhaustive()
    }
}

impl Open {
    fn new(link: Link) -> Self {
        Self {
            results: Arc::new(Results::new(link)),
            packet: PacketBuffer::default(),
            taken: 0,
            unsent: VecDeque::new(),
            resets: Vec::new(),
            retry_at: None,
            busy_at: 0,
            leaving: false,
            broken: false,
        }
    }

    /// Takes over what has been done since the last time.
    fn collect(&mut self) {
        // What a reset has stopped leaves its answer before it counts as ended, and so comes before the reset's.
        let link = &self.results.link;
        for reset in &mut self.resets {
            reset
                .stopping
                .retain(|activity| !activity.is_over(Some(link)));
        }
        self.unsent.extend(self.results.take());
        let (over, rest): (Vec<_>, Vec<_>) = core::mem::take(&mut self.resets)
            .into_iter()
            .partition(|reset| reset.stopping.is_empty());
        self.resets = rest;
        self.unsent
            .extend(over.into_iter().map(|reset| reset.answer));
    }
}

/// A provider at work.
struct Server<'a> {
    shared: &'a Arc<Shared>,
    primary: bool,
    open: &'a mut Open,
}

impl Server<'_> {
    fn serve(&mut self, now: u64, channel: &mut HostChannel) -> Result<(), RingError> {
        let counters = &self.shared.controller.counters;
        let depth = self.shared.controller.limits().depth.max(1);
        let mut budget = BUDGET;
        channel.mask()?;
        loop {
            self.open.collect();
            self.send(now, channel)?;
            if budget == 0 {
                // There may be more: after the others.
                self.open.results.link.wake();
                return Ok(());
            }
            // What is under way wakes this channel when it ends, so the guest need not signal.
            if !self.shared.controller.is_quiet(&self.open.results.link) {
                return Ok(());
            }
            let room = depth.saturating_sub(self.open.taken);
            if room == 0 {
                counters.held_back.one();
                return Ok(());
            }
            let taken = self.take(channel, room.min(budget))?;
            if taken != 0 {
                self.open.busy_at = now;
            }
            budget = budget.saturating_sub(taken);
            if taken == 0 {
                if !channel.unmask()? {
                    return Ok(());
                }
                channel.mask()?;
            }
        }
    }

    /// Sends the answers that wait, and what there is to tell, as far as there is room.
    fn send(&mut self, now: u64, channel: &mut HostChannel) -> Result<(), RingError> {
        let controller = &self.shared.controller;
        self.open.retry_at = None;
        let mut full = false;
        while let Some(answer) = self.open.unsent.front().filter(|_| !full) {
            let packet = Outgoing::completion(answer.transaction, answer.reply.bytes());
            full = !push(channel, &packet)?;
            if !full {
                self.open.unsent.pop_front();
                self.open.taken = self.open.taken.saturating_sub(1);
                controller.counters.answers.one();
            }
        }
        let version = self.shared.session.lock().ready().filter(|_| self.primary);
        while let Some((version, notice)) = version
            .filter(|_| !full)
            .and_then(|version| Some((version, controller.next_notice(version)?)))
        {
            let reply = vstor::notice(version, notice);
            full = !push(channel, &Outgoing::in_band([reply.bytes(), &[]]))?;
            if full {
                controller.put_back(notice);
            } else {
                controller.counters.notices.one();
            }
        }
        channel.publish()?;
        if full {
            controller.counters.ring_full.one();
            self.open.retry_at = Some(now.saturating_add(RETRY));
        }
        Ok(())
    }

    /// Takes up to `most` packets; returns how many there were.
    fn take(&mut self, channel: &mut HostChannel, most: usize) -> Result<usize, RingError> {
        let mut packet = core::mem::take(&mut self.open.packet);
        let mut count = 0;
        let mut result = Ok(());
        while count < most {
            match channel.receive(&mut packet) {
                Ok(true) => self.handle(channel, &packet),
                Ok(false) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            count += 1;
        }
        self.open.packet = packet;
        if count != 0 {
            channel.release()?;
        }
        result.map(|()| count)
    }

    fn handle(&mut self, channel: &HostChannel, packet: &PacketBuffer) {
        let counters = &self.shared.controller.counters;
        counters.packets.one();
        let expected = matches!(packet.kind(), Kind::IN_BAND | Kind::GPA_DIRECT);
        if !packet.completion_requested() || !expected {
            counters.unanswerable.one();
            return;
        }
        self.open.taken += 1;
        let transaction = packet.transaction_id();
        let payload = packet.payload();
        let mut session = self.shared.session.lock();
        let size = session.reply_size(payload.len());
        let verdict = match vstor::parse(payload, session.version()) {
            Ok(request) if self.primary => session.on_primary(&request, payload.len()),
            Ok(request) => session.on_sub_channel(&request, payload.len()),
            Err((operation, error)) => {
                let ready = session.ready();
                drop(session);
                counters.malformed.one();
                let reply = malformed(ready, size, operation, error);
                return self.answer(transaction, reply);
            }
        };
        drop(session);
        match verdict {
            Verdict::Reply(reply) => self.answer(transaction, reply),
            Verdict::Refuse(reply) => {
                counters.refused.one();
                self.answer(transaction, reply);
            }
            Verdict::Begin(reply) => {
                self.shared.controller.begin_session();
                self.answer(transaction, reply);
            }
            Verdict::SubChannels(count, reply) => {
                self.offer(count);
                self.answer(transaction, reply);
            }
            Verdict::Reset(address, reply) => {
                counters.resets.one();
                let stopping = self.shared.controller.reset(address);
                let answer = Answer { transaction, reply };
                self.open.resets.push(Reset { answer, stopping });
            }
            Verdict::Execute(srb, version) => {
                counters.commands.one();
                let buffer = channel.external_data(packet).ok();
                self.execute(transaction, srb, version, buffer);
            }
        }
    }

    fn answer(&mut self, transaction: u64, reply: Reply) {
        self.open.unsent.push_back(Answer { transaction, reply });
    }

    fn offer(&self, count: u16) {
        for index in (1..=count).filter_map(NonZeroU16::new) {
            let provider = Storvsp::of(Arc::clone(self.shared), false);
            let link = &self.open.results.link;
            link.add_sub_channel(index, Box::new(provider));
        }
    }

    fn execute(
        &mut self,
        transaction: u64,
        srb: Srb,
        version: ProtocolVersion,
        buffer: Option<GuestBuffer>,
    ) {
        let controller = &self.shared.controller;
        let unit = controller.find(srb.address);
        match self.start(&srb, unit.as_deref(), buffer) {
            Step::Done(outcome) => {
                let reply = ended(version, &srb, unit.as_deref(), &outcome);
                self.answer(transaction, reply);
            }
            Step::Work(work) => {
                let results = &self.open.results;
                let running = controller.begin();
                let ticket = Ticket::new(results, transaction, (srb, version), unit, running);
                self.shared.executor.run(Box::new(move || {
                    let outcome = work.run();
                    ticket.finish(&outcome);
                }));
            }
        }
    }

    /// Begins a command, at a unit or at what stands in for it.
    fn start(&self, srb: &Srb, unit: Option<&LogicalUnit>, buffer: Option<GuestBuffer>) -> Step {
        let controller = &self.shared.controller;
        let fits = srb.transfer_length <= controller.limits().max_transfer;
        let transfer = Transfer::new(buffer, srb.transfer_length, srb.direction);
        let Some(transfer) = transfer.filter(|_| fits) else {
            if let Some(unit) = unit {
                unit.counters().ended(&Outcome::Invalid);
            }
            return Outcome::Invalid.into();
        };
        let command = match scsi::decode(srb.cdb()) {
            Ok(command) => command,
            Err(refusal) => {
                let outcome = match refusal {
                    Refusal::Length => Outcome::Invalid,
                    Refusal::Sense(sense) => Outcome::Check(sense),
                };
                if let Some(unit) = unit {
                    unit.counters().ended(&outcome);
                }
                return outcome.into();
            }
        };
        if unit.is_none() {
            controller.note(srb.address, &command);
        }
        match (command, unit) {
            (Command::ReportLuns { select, allocation }, _) => {
                let address = srb.address;
                report(
                    &controller.report(address.path, address.target),
                    select,
                    allocation,
                    &transfer,
                )
                .into()
            }
            (command, Some(unit)) => unit.start(&command, transfer),
            (
                Command::Inquiry {
                    vital, allocation, ..
                },
                None,
            ) => {
                if vital {
                    return Sense::invalid_cdb(1).into();
                }
                transfer
                    .deliver(&scsi::standard(None), allocation.into())
                    .into()
            }
            (_, None) => {
                controller.counters.no_unit.one();
                Outcome::Stopped(Stop::Removed).into()
            }
        }
    }
}

/// Pushes a packet. Returns whether there was room; if not, the guest will signal when there is.
fn push(channel: &mut HostChannel, packet: &Outgoing<'_>) -> Result<bool, RingError> {
    loop {
        match channel.push(packet) {
            Ok(()) => return Ok(true),
            Err(PushError::Full { need }) => {
                channel.publish()?;
                if !channel.wait_for_room(need)? {
                    return Ok(false);
                }
            }
            // A ring in which no answer fits.
            Err(PushError::TooLarge { .. }) => return Err(RingError::Memory),
            Err(PushError::Ring(error)) => return Err(error),
        }
    }
}
