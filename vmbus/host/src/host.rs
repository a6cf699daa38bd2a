//! A host without a hypervisor: bus server, providers and the open channels between them.
//!
//! Whoever owns a [`Host`] brings the guest's messages ([`post`](Host::post)) and signals ([`signal`](Host::signal)), lets it
//! [`run`](Host::run), sets the event flags that this returns and delivers what [`poll_message`](Host::poll_message) returns:
//! a [`Machine`](crate::machine::Machine) in one process, or a virtual machine monitor. Times are in units of 100 ns.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroU16;

use vmbus::ids::{ChannelId, ConnectionId, GpadlHandle, VpIndex};
use vmbus::protocol::{Guid, Status, Version};

use crate::bus::{Device, Event, HvStatus, Lent, Message, Opening, Profile, Server};
use crate::channel::HostChannel;
use crate::faults::ChannelFaults;
use crate::memory::GuestMemory;
use crate::monitor::Watch;
use crate::provider::{Connector, HostLink, Link, Lists, Notify, Provider, Wish, Wishes};

/// Complaints and notices that are kept until somebody asks; the oldest go first.
const KEPT: usize = 1024;

/// How long a guest may take to let go of a device that is to be taken away: 30 s in units of 100 ns.
const PATIENCE: u64 = 300_000_000;

/// How often the host looks whether it has: 10 ms. Nobody signals it.
const LOOK: u64 = 100_000;

/// Something that the owner may want to know or has to act on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Notice {
    /// The guest has connected, with this version.
    Connected(Version),
    /// The guest has unloaded or made contact anew.
    Disconnected,
    /// A channel is open; its signals come on this connection.
    Opened(ChannelId, ConnectionId),
    /// A channel is no longer served.
    Closed(ChannelId),
    /// A device that [was to go](Host::take_away) has gone.
    Gone(ChannelId),
    /// The guest has given the number of a rescinded channel back.
    Released(ChannelId),
}

/// What came of letting the host run.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Ran {
    /// Whether it had anything to do.
    pub busy: bool,
    /// The channels whose event flag must be set, each with the VP.
    pub interrupts: Vec<(ChannelId, VpIndex)>,
}

/// The host.
pub struct Host {
    server: Server,
    providers: BTreeMap<ChannelId, Box<dyn Provider>>,
    /// Of every channel that has a provider.
    faults: BTreeMap<ChannelId, ChannelFaults>,
    open: BTreeMap<ChannelId, Open>,
    /// Primary channels of the devices that are about to be taken away.
    leaving: BTreeMap<ChannelId, Leaving>,
    /// Closed channels whose GPADL the guest has not got back.
    closing: Vec<HostChannel>,
    memory: GuestMemory,
    /// GPADLs that the guest has not got back.
    lent: BTreeMap<GpadlHandle, Arc<Lent>>,
    /// The host's eye on the guest's monitor page.
    watch: Option<Watch>,
    /// Channels to serve.
    signalled: BTreeSet<ChannelId>,
    /// Signals that came through the monitor page.
    monitored_signals: u64,
    complaints: VecDeque<&'static str>,
    notices: VecDeque<Notice>,
    /// How the next channel that is opened is answered.
    open_status: Status,
    wishes: Wishes,
    /// What the guest's sockets connect to.
    connector: Option<Box<dyn Connector>>,
    /// Whether the connector is to be served.
    connector_woken: bool,
}

/// A device that is about to be taken away.
#[derive(Clone, Copy, Default)]
struct Leaving {
    /// When the host looks at it again.
    next: u64,
    /// When the host's patience ends, once it has looked.
    until: Option<u64>,
}

struct Open {
    channel: HostChannel,
    /// Whether the provider still has it. One that was taken away stays in place until the guest knows.
    served: bool,
}

impl Host {
    /// A host of this kind, for a guest with this memory.
    pub fn new(profile: Profile, memory: GuestMemory) -> Self {
        Self {
            server: Server::new(profile),
            providers: BTreeMap::new(),
            faults: BTreeMap::new(),
            open: BTreeMap::new(),
            leaving: BTreeMap::new(),
            closing: Vec::new(),
            memory,
            lent: BTreeMap::new(),
            watch: None,
            signalled: BTreeSet::new(),
            monitored_signals: 0,
            complaints: VecDeque::new(),
            notices: VecDeque::new(),
            open_status: Status::SUCCESS,
            wishes: Wishes::default(),
            connector: None,
            connector_woken: false,
        }
    }

    /// Whom to tell when a provider asks for something: the owner then lets the host [`run`](Self::run).
    pub fn on_wish(&mut self, notify: Notify) {
        self.wishes.on_wish(notify);
    }

    /// Lets the guest connect to services of the host, and the host to those of the guest.
    pub fn set_connector(&mut self, mut connector: impl Connector + 'static) {
        connector.attached(HostLink::new(self.wishes.clone()));
        if let Some(version) = self.server.version() {
            connector.connected(version);
        }
        self.connector = Some(Box::new(connector));
    }

    /// Offers a device, served by `provider`. `None` when no channel number is free.
    pub fn add(&mut self, device: Device, provider: impl Provider + 'static) -> Option<ChannelId> {
        let id = self.server.add(device)?;
        self.attach(id, Box::new(provider), ChannelFaults::default());
        Some(id)
    }

    /// Offers a further channel of the device that `primary` belongs to. `None` when there is no such device, or it
    /// has a channel with this index.
    pub fn add_sub_channel(
        &mut self,
        primary: ChannelId,
        index: NonZeroU16,
        provider: Box<dyn Provider>,
    ) -> Option<ChannelId> {
        let faults = self.faults.get(&primary).cloned().unwrap_or_default();
        let id = self.server.add_sub_channel(primary, index)?;
        self.attach(id, provider, faults);
        Some(id)
    }

    fn attach(&mut self, id: ChannelId, mut provider: Box<dyn Provider>, faults: ChannelFaults) {
        let link = Link::new(id, self.wishes.clone());
        faults.attach(link.clone());
        self.faults.insert(id, faults);
        provider.attached(link);
        self.providers.insert(id, provider);
    }

    /// The channel has no provider any more.
    fn detach(&mut self, id: ChannelId) {
        self.providers.remove(&id);
        if let Some(faults) = self.faults.remove(&id) {
            faults.detach(&Link::new(id, self.wishes.clone()));
        }
    }

    /// What goes wrong on the channels of the device that a channel belongs to: inject something there.
    pub fn faults(&self, id: ChannelId) -> Option<ChannelFaults> {
        self.faults.get(&id).cloned()
    }

    /// Takes a device away in good order: its providers end what is under way and tell the guest, and when that has let go,
    /// or has had 30 s for it, the device is rescinded, and [`Notice::Gone`] tells so. Returns whether it is offered.
    ///
    /// A guest stops looking at its channels as soon as it hears of a rescind, so answers have to come before it.
    pub fn take_away(&mut self, id: ChannelId) -> bool {
        let there = self.server.is_offered(id);
        if there {
            self.leaving.entry(id).or_default();
        }
        there
    }

    /// Looks whether guests have let go of devices that are about to be taken away. Returns whether there was anything to do.
    fn let_go(&mut self, now: u64) -> bool {
        let due = self
            .leaving
            .iter()
            .filter(|(_, leaving)| leaving.next <= now);
        let due: Vec<_> = due.map(|(id, _)| *id).collect();
        for id in &due {
            let channels: Vec<_> = self.server.sub_channels(*id).chain([*id]).collect();
            let mut gone = true;
            for channel in channels {
                let open = self.open.get_mut(&channel).filter(|open| open.served);
                if let (Some(open), Some(provider)) = (open, self.providers.get_mut(&channel)) {
                    open.channel.set_time(now);
                    gone &= provider.leave(now, &mut open.channel);
                }
            }
            let patience = now.saturating_add(PATIENCE);
            let leaving = self.leaving.entry(*id).or_default();
            leaving.next = now.saturating_add(LOOK);
            if gone || *leaving.until.get_or_insert(patience) <= now {
                self.rescind(*id);
            }
        }
        !due.is_empty()
    }

    /// Takes a device away at once, or one sub-channel of it. Its providers are done with it before this returns.
    pub fn rescind(&mut self, id: ChannelId) -> bool {
        let subs: Vec<_> = self.server.sub_channels(id).collect();
        let there = self.server.rescind(id);
        for id in subs.into_iter().chain([id]) {
            self.retire(id);
            self.detach(id);
        }
        if self.leaving.remove(&id).is_some() {
            self.note(Notice::Gone(id));
        }
        // The host is done with the memory at once, and the guest need not wait until it says so.
        self.lent.retain(|_, lent| !lent.is_revoked());
        there
    }

    /// The provider of a channel is done with it.
    fn retire(&mut self, id: ChannelId) {
        let Some(open) = self.open.get_mut(&id).filter(|open| open.served) else {
            return;
        };
        open.served = false;
        open.channel.end_lease();
        if let Some(provider) = self.providers.get_mut(&id) {
            provider.closed();
        }
        self.signalled.remove(&id);
        self.note(Notice::Closed(id));
    }

    /// The bus server.
    pub const fn server(&mut self) -> &mut Server {
        &mut self.server
    }

    /// The guest's memory.
    pub const fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The host's end of an open channel.
    pub fn channel(&mut self, id: ChannelId) -> Option<&mut HostChannel> {
        Some(&mut self.open.get_mut(&id)?.channel)
    }

    /// Whether a channel is open.
    pub fn is_open(&self, id: ChannelId) -> bool {
        self.open.contains_key(&id)
    }

    /// How the next channels that are opened are answered.
    pub const fn set_open_status(&mut self, status: Status) {
        self.open_status = status;
    }

    /// The host's eye on the guest's monitor page, if there is one.
    pub const fn watch(&mut self) -> Option<&mut Watch> {
        self.watch.as_mut()
    }

    /// Signals of the guest that the host found in the monitor page.
    pub const fn monitored_signals(&self) -> u64 {
        self.monitored_signals
    }

    /// Notes what no guest may do.
    pub fn complain(&mut self, what: &'static str) {
        if self.complaints.len() == KEPT {
            self.complaints.pop_front();
        }
        self.complaints.push_back(what);
    }

    /// What the guest did that no guest may do, as far as it is kept.
    pub fn complaints(&self) -> Vec<&'static str> {
        self.complaints.iter().copied().collect()
    }

    /// The next thing that the owner may want to know.
    pub fn poll_notice(&mut self) -> Option<Notice> {
        self.notices.pop_front()
    }

    fn note(&mut self, notice: Notice) {
        if self.notices.len() == KEPT {
            self.notices.pop_front();
        }
        self.notices.push_back(notice);
    }

    /// The guest's memory begins anew: nothing is open any more, and what was under way is gone. The devices stay.
    pub fn reset(&mut self) {
        self.server.reset();
        while let Some(event) = self.server.poll_event() {
            self.handle(event);
        }
        // Before channel numbers are given out anew.
        self.fulfil();
    }

    /// Takes a message that the guest posts; the status is that of the hypercall.
    pub fn post(&mut self, now: u64, connection: ConnectionId, payload: &[u8]) -> HvStatus {
        self.server.post(now, connection, payload)
    }

    /// The guest signals an event connection. Returns whether a channel is behind it.
    pub fn signal(&mut self, connection: ConnectionId, flag: u16) -> bool {
        let server = &self.server;
        let mut open = self.open.keys().copied();
        let target = open.find(|id| server.event_connection(*id) == connection);
        match target {
            Some(id) if flag == 0 => {
                self.signalled.insert(id);
            }
            Some(_) => self.complain("an event flag other than 0"),
            // A rescinded channel may be signalled until the guest knows.
            None => {}
        }
        target.is_some()
    }

    /// Has the provider of a channel look at it, as if the guest had signalled.
    pub fn wake(&mut self, id: ChannelId) {
        self.signalled.insert(id);
    }

    /// The next message for the guest.
    pub fn poll_message(&mut self, now: u64) -> Option<Message> {
        self.server.poll_message(now)
    }

    /// When the host wants to [`run`](Self::run) without being asked.
    pub fn deadline(&self) -> Option<u64> {
        let served = |id: &&ChannelId| self.open.get(id).is_some_and(|open| open.served);
        let providers = self.providers.iter();
        let provider = providers
            .filter(|(id, _)| served(id))
            .filter_map(|(_, provider)| provider.deadline())
            .min();
        let channels = self.open.values().filter(|open| open.served);
        let delayed = channels.filter_map(|open| open.channel.deadline()).min();
        let watch = self.watch.as_ref().and_then(Watch::deadline);
        let leaving = self.leaving.values().map(|leaving| leaving.next).min();
        [self.server.deadline(), provider, delayed, watch, leaving]
            .into_iter()
            .flatten()
            .min()
    }

    /// Handles the guest's messages, and has every provider serve its channel that has something to do.
    pub fn run(&mut self, now: u64) -> Ran {
        let mut ran = Ran::default();
        self.server.run(now);
        ran.busy |= self.fulfil();
        while let Some(event) = self.server.poll_event() {
            ran.busy = true;
            self.handle(event);
        }
        ran.busy |= self.connect(now);
        ran.busy |= self.look(now);
        ran.busy |= self.let_go(now);
        for (id, open) in &mut self.open {
            if let Some(provider) = self.providers.get_mut(id).filter(|_| open.served) {
                let deadlines = provider.deadline().into_iter();
                let mut deadlines = deadlines.chain(open.channel.deadline());
                let due = deadlines.any(|at| at <= now);
                // A signal that the guest forgets leaves the provider asleep.
                if self.signalled.remove(id) || due {
                    ran.busy = true;
                    open.channel.set_time(now);
                    provider.serve(now, &mut open.channel);
                    if open.channel.take_unseen() {
                        self.signalled.insert(*id);
                    }
                }
            }
            if let Some(vp) = open.channel.take_interrupt() {
                ran.interrupts.push((*id, vp));
            }
        }
        ran.busy |= self.fulfil() | !ran.interrupts.is_empty();
        ran
    }

    /// Does what providers have asked for. Returns whether they had.
    fn fulfil(&mut self) -> bool {
        let Lists {
            woken,
            connector,
            others,
        } = self.wishes.take();
        let busy = !woken.is_empty() || connector || !others.is_empty();
        self.signalled.extend(woken);
        self.connector_woken |= connector;
        for wish in others {
            match wish {
                Wish::SubChannel(primary, index, provider) => {
                    self.add_sub_channel(primary, index, provider);
                }
                Wish::Rescind(id) => {
                    self.rescind(id);
                }
                Wish::Offer(device, provider) => {
                    if let Some(id) = self.server.add(*device) {
                        self.attach(id, provider, ChannelFaults::default());
                    }
                }
                Wish::Refuse(request) => self.server.refuse(request),
            }
        }
        busy
    }

    /// Serves the connector, if it has something to do. Returns whether it had.
    fn connect(&mut self, now: u64) -> bool {
        let woken = core::mem::take(&mut self.connector_woken);
        let Some(connector) = &mut self.connector else {
            return false;
        };
        let busy = woken || connector.deadline().is_some_and(|at| at <= now);
        if busy {
            connector.serve(now);
        }
        busy
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Opening(opening) => self.open(opening),
            Event::Closed(id) => {
                self.retire(id);
                if let Some(open) = self.open.remove(&id) {
                    self.check(&open.channel);
                    // The guest may open and close it with the same rings for ever.
                    let ring = open.channel.opening.ring;
                    self.closing.retain(|channel| channel.opening.ring != ring);
                    self.closing.push(open.channel);
                }
            }
            Event::Rescinded(id) => {
                self.retire(id);
                self.detach(id);
            }
            Event::GpadlTornDown(handle) => {
                let (gone, rest): (Vec<_>, Vec<_>) = core::mem::take(&mut self.closing)
                    .into_iter()
                    .partition(|channel| channel.opening.ring == handle);
                self.closing = rest;
                gone.iter().for_each(|channel| self.check(channel));
                // The guest does not close a channel that was taken away.
                let ids = self.open.iter();
                let ids = ids.filter(|(_, open)| open.channel.opening.ring == handle);
                let ids: Vec<_> = ids.map(|(id, _)| *id).collect();
                for id in ids {
                    self.retire(id);
                    self.open.remove(&id);
                }
                self.check_lent(handle);
            }
            Event::Disconnected => self.disconnected(),
            Event::Connect(request) => match &mut self.connector {
                Some(connector) => connector.requested(request),
                None => self.server.refuse(request),
            },
            Event::GpadlCreated(handle) => {
                let lent = self.server.gpadls().get(handle);
                if let Some(lent) = lent.filter(|lent| !lent.is_revoked()) {
                    self.lent.insert(handle, lent);
                }
            }
            Event::TargetVp { channel, target_vp } => {
                if let Some(open) = self.open.get_mut(&channel) {
                    open.channel.opening.target_vp = target_vp;
                }
            }
            Event::Dropped { reason, .. } => self.complain(reason),
            Event::Connected(version) => {
                let pages = self.server.monitor_pages();
                self.watch = pages.and_then(|pages| Watch::new(&self.memory, pages));
                if pages.is_some() && self.watch.is_none() {
                    self.complain("the monitor pages are not shared");
                }
                if let Some(connector) = &mut self.connector {
                    connector.connected(version);
                }
                self.note(Notice::Connected(version));
            }
            Event::Released(id) => self.note(Notice::Released(id)),
        }
    }

    fn disconnected(&mut self) {
        if let Some(watch) = self.watch.take()
            && !watch.page().is_slice()
            && watch.page().handle_count() == 1
        {
            self.complain("monitor pages were given back while the host had them");
        }
        let gone = core::mem::take(&mut self.closing);
        gone.iter().for_each(|channel| self.check(channel));
        let ids: Vec<_> = self.open.keys().copied().collect();
        ids.into_iter().for_each(|id| self.retire(id));
        let open = core::mem::take(&mut self.open);
        open.values().for_each(|open| self.check(&open.channel));
        let handles: Vec<_> = self.lent.keys().copied().collect();
        handles
            .into_iter()
            .for_each(|handle| self.check_lent(handle));
        // Sub-channels went with the connection.
        let gone = self.providers.keys().copied();
        let gone: Vec<_> = gone.filter(|id| !self.server.is_offered(*id)).collect();
        gone.into_iter().for_each(|id| self.detach(id));
        if let Some(connector) = &mut self.connector {
            connector.disconnected();
        }
        self.note(Notice::Disconnected);
    }

    /// Looks at the monitor page. Returns whether anything was there.
    fn look(&mut self, now: u64) -> bool {
        let bits = self.watch.as_mut().and_then(|watch| watch.poll(now).ok());
        let bits = bits.unwrap_or_default();
        for &bit in &bits {
            self.monitored_signals += 1;
            // A channel may have been closed since.
            self.signalled.extend(self.server.monitored_channel(bit));
        }
        !bits.is_empty()
    }

    /// The guest cannot know yet that the host is done with the memory, so it must still have it.
    fn check(&mut self, channel: &HostChannel) {
        let lent = self.lent.contains_key(&channel.opening.ring);
        if lent && !channel.guest_holds_memory() {
            self.complain("ring memory was given back while the host had it");
        }
    }

    /// The same for the memory of a GPADL, which the guest still lends at this moment.
    fn check_lent(&mut self, handle: GpadlHandle) {
        let Some(lent) = self.lent.remove(&handle) else {
            return;
        };
        let pages = lent.ranges().iter().flat_map(|range| &range.pages);
        if pages
            .into_iter()
            .any(|page| self.memory.was_given_back(*page))
        {
            self.complain("GPADL memory was given back while the host had it");
        }
    }

    fn open(&mut self, opening: Opening) {
        let (id, connection) = (opening.channel, opening.connection);
        let memory = self.memory.view(&opening.pages);
        let channel = memory.and_then(|memory| HostChannel::new(opening, memory).ok());
        let channel = channel.map(|channel| channel.reaching(&self.memory, self.server.gpadls()));
        let status = match (channel, self.providers.get_mut(&id)) {
            (Some(mut channel), Some(provider)) if self.open_status.is_success() => {
                if let (Some(watch), Some(bit)) = (&self.watch, self.server.monitor_bit(id)) {
                    let latency = self.server.profile().monitor_latency;
                    // The page was within the guest's memory when the connection began.
                    let _ = watch.set_up(bit, self.server.event_connection(id), latency);
                }
                channel.set_faults(self.faults.get(&id).cloned().unwrap_or_default());
                let status = provider.opened(&mut channel);
                if status.is_success() {
                    let served = true;
                    self.open.insert(id, Open { channel, served });
                    self.note(Notice::Opened(id, connection));
                }
                status
            }
            (Some(_), _) if !self.open_status.is_success() => self.open_status,
            _ => Status::UNSUCCESSFUL,
        };
        self.server.finish_open(id, status);
    }

    /// The device that a channel belongs to, while it is offered.
    pub fn device(&self, id: ChannelId) -> Option<(Guid, Guid)> {
        self.server.device(id)
    }
}

impl Drop for Host {
    /// What was asked for and not done may hold providers, and they hold links to the list that it is in.
    fn drop(&mut self) {
        drop(self.wishes.take());
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}
