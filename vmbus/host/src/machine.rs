//! A machine in one process: a hypervisor and a host below a guest's VMBus stack.
//!
//! [`Machine`] implements [`Hypervisor`] over a [`Host`] and keeps time, interrupts and interrupt level of one VP. Nothing
//! happens by itself: [`settle`](Machine::settle) lets both sides run until neither has anything to do, [`advance`](Machine::advance)
//! moves the clock. An interrupt comes at once when the guest runs at PASSIVE, in the middle of whatever it
//! does, and else when it lowers its level.
//!
//! With an [`Interleave`] not even that happens by itself: it is asked wherever the guest calls the machine, and takes
//! the machine's steps one by one ([`step_host`](Machine::step_host) and the others).

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::num::NonZeroU16;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use spin::Once;
use vmbus::Vmbus;
use vmbus::hypervisor::{Hypervisor, Level, OutOfMemory, PostError};
use vmbus::ids::{ChannelId, ConnectionId, PageNumber, VpIndex};
use vmbus::protocol::{Guid, Status};
use vmbus::shared::SharedPages;

use crate::bus::{Device, HvStatus, Message, NO_INTERRUPTS, Profile, Server};
use crate::channel::HostChannel;
use crate::dynamic_memory::DynamicMemory;
use crate::host::Host;
use crate::memory::GuestMemory;
use crate::monitor::Watch;
use crate::provider::{Link, Provider};
use crate::sync::Mutex;

/// The guest's end: what the hypervisor interrupts.
pub trait Guest: Send + Sync {
    /// A message of type 1; `false` leaves it where it is.
    fn on_message(&self, payload: &[u8]) -> bool;
    /// An event flag was set.
    fn on_event(&self, channel: ChannelId);
    /// The deferred work.
    fn run_work(&self);
    /// When the deferred work has to run next.
    fn deadline(&self) -> Option<u64>;
}

impl Guest for Vmbus {
    fn on_message(&self, payload: &[u8]) -> bool {
        Self::on_message(self, payload)
    }

    fn on_event(&self, channel: ChannelId) {
        Self::on_event(self, channel);
    }

    fn run_work(&self) {
        Self::run_work(self);
    }

    fn deadline(&self) -> Option<u64> {
        Self::deadline(self)
    }
}

/// Decides what happens in the middle of what the guest does. A machine that has one delivers nothing unasked.
pub trait Interleave: Send + Sync {
    /// The guest calls the machine, at this level. At [`Level::Passive`] an interrupt may come now; at either level
    /// the host, which has processors of its own, may do something.
    fn at_call(&self, level: Level);

    /// The guest sleeps at PASSIVE until an interrupt has been handled, or until reference time `until`.
    fn asleep(&self, until: Option<u64>);
}

/// Dynamic memory behind a lock, so that a test can look at it while it serves.
#[derive(Clone, Debug)]
pub struct SharedDynamicMemory(pub Arc<Mutex<DynamicMemory>>);

impl Provider for SharedDynamicMemory {
    fn attached(&mut self, link: Link) {
        self.0.lock().set_link(link);
    }

    fn opened(&mut self, _channel: &mut HostChannel) -> Status {
        self.0.lock().opened();
        Status::SUCCESS
    }

    fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        let mut provider = self.0.lock();
        provider.serve(now, channel);
        let outcomes = provider.outcomes();
        drop(provider);
        outcomes.deliver();
    }

    fn closed(&mut self) {
        let mut provider = self.0.lock();
        provider.closed();
        let outcomes = provider.outcomes();
        drop(provider);
        outcomes.deliver();
    }

    fn deadline(&self) -> Option<u64> {
        self.0.lock().deadline()
    }
}

/// The machine.
pub struct Machine {
    host: Mutex<Host>,
    /// Pages that can still be shared.
    free_pages: AtomicUsize,
    /// Interrupts that could not be delivered yet, and the VP that each is for.
    pending: Mutex<VecDeque<(ChannelId, VpIndex)>>,
    /// The VP that runs the guest's code.
    vp: AtomicU32,
    /// Where the last interrupt of each channel went.
    interrupted: Mutex<BTreeMap<ChannelId, VpIndex>>,
    dispatch: AtomicBool,
    work_requested: AtomicBool,
    work_requests: AtomicU64,
    time: AtomicU64,
    next_page: AtomicU64,
    guest: Mutex<Option<Arc<dyn Guest>>>,
    signals: AtomicU64,
    /// A message that the guest had no room for.
    message_slot: Mutex<Option<Message>>,
    interleave: Once<Arc<dyn Interleave>>,
    /// Devices with address space for their registers.
    mmio: Mutex<BTreeMap<Guid, u64>>,
}

impl Machine {
    /// A machine with this kind of host.
    pub fn new(profile: Profile) -> Arc<Self> {
        Arc::new(Self {
            host: Mutex::new(Host::new(profile, GuestMemory::default())),
            free_pages: AtomicUsize::new(4096),
            pending: Mutex::new(VecDeque::new()),
            vp: AtomicU32::new(0),
            interrupted: Mutex::new(BTreeMap::new()),
            dispatch: AtomicBool::new(false),
            work_requested: AtomicBool::new(false),
            work_requests: AtomicU64::new(0),
            time: AtomicU64::new(1),
            next_page: AtomicU64::new(0x1000),
            guest: Mutex::new(None),
            signals: AtomicU64::new(0),
            message_slot: Mutex::new(None),
            interleave: Once::new(),
            mmio: Mutex::new(BTreeMap::new()),
        })
    }

    /// Connects the guest's end.
    pub fn attach(&self, guest: Arc<dyn Guest>) {
        *self.guest.lock() = Some(guest);
    }

    /// Takes the guest's end away.
    pub fn detach(&self) {
        *self.guest.lock() = None;
    }

    /// Leaves every decision to `interleave`, from now on.
    pub fn interleave(&self, interleave: Arc<dyn Interleave>) {
        self.interleave.call_once(|| interleave);
    }

    /// The level of the guest's code.
    pub fn level(&self) -> Level {
        if self.dispatch.load(Ordering::SeqCst) {
            Level::Dispatch
        } else {
            Level::Passive
        }
    }

    /// The host handles what has come to it. Returns whether anything had.
    pub fn step_host(&self) -> bool {
        self.run_host()
    }

    /// Delivers one of the interrupts that wait, if the guest runs at PASSIVE. Returns whether it did.
    pub fn step_interrupt(&self, which: usize) -> bool {
        let Some(guest) = self.guest().filter(|_| self.level() == Level::Passive) else {
            return false;
        };
        let next = self.pending.lock().remove(which);
        if let Some((id, vp)) = next {
            self.at_dispatch(|| self.on_vp(vp, || self.event(&*guest, id)));
        }
        next.is_some()
    }

    /// Delivers the next message, if the guest runs at PASSIVE; one that it has no room for stays. Returns whether
    /// one was taken.
    pub fn step_message(&self) -> bool {
        let Some(guest) = self.guest().filter(|_| self.level() == Level::Passive) else {
            return false;
        };
        let now = self.time.load(Ordering::SeqCst);
        let waiting = self.message_slot.lock().take();
        let next = waiting.or_else(|| self.host.lock().poll_message(now));
        let Some(message) = next else {
            return false;
        };
        let take = || guest.on_message(&message.payload);
        let taken = self.at_dispatch(|| self.on_vp(message.vp, take));
        if !taken {
            *self.message_slot.lock() = Some(message);
        }
        taken
    }

    /// Has the guest work, if it asked for that. Returns whether it did.
    pub fn step_work(&self) -> bool {
        let asked = self.work_requested.swap(false, Ordering::SeqCst);
        if let Some(guest) = self.guest().filter(|_| asked) {
            guest.run_work();
        }
        asked
    }

    /// Whether the guest has asked for work that has not begun.
    pub fn work_waits(&self) -> bool {
        self.work_requested.load(Ordering::SeqCst)
    }

    /// Interrupts that wait.
    pub fn pending_interrupts(&self) -> usize {
        self.pending.lock().len()
    }

    /// Moves the clock and does nothing else.
    pub fn pass(&self, time: u64) {
        self.time.fetch_add(time, Ordering::SeqCst);
    }

    /// Asks for the guest's work if its deadline has come. Not in the middle of what the guest does.
    pub fn step_deadline(&self) {
        let due = |guest: Arc<dyn Guest>| guest.deadline();
        let now = self.time.load(Ordering::SeqCst);
        if self.guest().and_then(due).is_some_and(|at| at <= now) {
            self.work_requested.store(true, Ordering::SeqCst);
        }
    }

    fn called(&self) {
        if let Some(interleave) = self.interleave.get() {
            interleave.at_call(self.level());
        }
    }

    /// Offers a device, served by `provider`. `None` when no channel number is free.
    pub fn add(&self, device: Device, provider: impl Provider + 'static) -> Option<ChannelId> {
        self.host.lock().add(device, provider)
    }

    /// Offers a further channel of the device that `primary` belongs to, served by `provider`, as a device does whose
    /// protocol was asked for it. `None` when there is no such device, or it has a channel with this index.
    pub fn add_sub_channel(
        &self,
        primary: ChannelId,
        index: NonZeroU16,
        provider: impl Provider + 'static,
    ) -> Option<ChannelId> {
        let provider = Box::new(provider);
        self.host.lock().add_sub_channel(primary, index, provider)
    }

    /// Takes a device away, or one sub-channel of it. A host that closes its end does just this.
    pub fn rescind(&self, id: ChannelId) -> bool {
        self.host.lock().rescind(id)
    }

    /// The host.
    pub fn host<R>(&self, with: impl FnOnce(&mut Host) -> R) -> R {
        with(&mut self.host.lock())
    }

    /// The bus server.
    pub fn server<R>(&self, with: impl FnOnce(&mut Server) -> R) -> R {
        with(self.host.lock().server())
    }

    /// The host's end of an open channel; interrupts that become due are delivered.
    pub fn channel<R>(&self, id: ChannelId, with: impl FnOnce(&mut HostChannel) -> R) -> Option<R> {
        let (result, interrupt) = {
            let mut host = self.host.lock();
            let channel = host.channel(id)?;
            let result = with(channel);
            (result, channel.take_interrupt())
        };
        if let Some(vp) = interrupt {
            self.interrupt_vp(id, vp);
        }
        Some(result)
    }

    /// Sets a channel's event flag on its target VP, whatever the rings say: spurious and doubled interrupts.
    pub fn interrupt(&self, id: ChannelId) {
        let target = |channel: &mut HostChannel| channel.opening.target_vp;
        let vp = self.host.lock().channel(id).map_or(VpIndex(0), target);
        self.interrupt_vp(id, vp);
    }

    /// Sets a channel's event flag on any VP, as a host does that has not seen MODIFY_CHANNEL yet.
    pub fn interrupt_vp(&self, id: ChannelId, vp: VpIndex) {
        if vp != NO_INTERRUPTS {
            self.pending.lock().push_back((id, vp));
            self.deliver();
        }
    }

    /// The VP that took the last interrupt of a channel.
    pub fn interrupted_vp(&self, id: ChannelId) -> Option<VpIndex> {
        self.interrupted.lock().get(&id).copied()
    }

    /// The guest's memory as the host reaches it.
    pub fn memory(&self) -> GuestMemory {
        self.host.lock().memory().clone()
    }

    /// How the next channels that are opened are answered.
    pub fn set_open_status(&self, status: Status) {
        self.host.lock().set_open_status(status);
    }

    /// How many pages the guest can still share.
    pub fn set_free_pages(&self, pages: usize) {
        self.free_pages.store(pages, Ordering::SeqCst);
    }

    /// Has the provider of a channel look at it, as if the guest had signalled.
    pub fn wake_provider(&self, id: ChannelId) {
        self.host.lock().wake(id);
    }

    /// Whether a channel is open.
    pub fn is_open(&self, id: ChannelId) -> bool {
        self.host.lock().is_open(id)
    }

    /// Runs of shared pages that the guest has not given back.
    pub fn shared_runs(&self) -> usize {
        self.host.lock().memory().shared_runs()
    }

    /// What the guest did that no guest may do: memory given back too early, messages that hosts drop.
    pub fn complaints(&self) -> Vec<&'static str> {
        self.host.lock().complaints()
    }

    /// Signals that the guest sent.
    pub fn signals(&self) -> u64 {
        self.signals.load(Ordering::SeqCst)
    }

    /// Signals of the guest that the host found in the monitor page.
    pub fn monitored_signals(&self) -> u64 {
        self.host.lock().monitored_signals()
    }

    /// The host's eye on the guest's monitor page, if there is one.
    pub fn watch<R>(&self, with: impl FnOnce(&mut Watch) -> R) -> Option<R> {
        self.host.lock().watch().map(with)
    }

    /// How often the guest asked for work.
    pub fn work_requests(&self) -> u64 {
        self.work_requests.load(Ordering::SeqCst)
    }

    /// Runs `code` at DISPATCH, as an interrupt handler would.
    pub fn at_dispatch<R>(&self, code: impl FnOnce() -> R) -> R {
        let before = self.raise();
        let result = code();
        self.lower_to(before);
        result
    }

    fn raise(&self) -> Level {
        if self.dispatch.swap(true, Ordering::SeqCst) {
            Level::Dispatch
        } else {
            Level::Passive
        }
    }

    fn lower_to(&self, level: Level) {
        if level == Level::Passive {
            self.dispatch.store(false, Ordering::SeqCst);
            self.deliver();
        }
    }

    /// Moves the clock by `time` in units of 100 ns, stopping wherever guest or host wants to do something.
    pub fn advance(&self, time: u64) {
        let end = self.time.load(Ordering::SeqCst) + time;
        loop {
            self.settle();
            let now = self.time.load(Ordering::SeqCst);
            match self.next_deadline() {
                Some(at) if at <= end => {
                    // Somebody whose time has come and who does nothing would keep the clock from moving.
                    self.time.store(at.max(now + 1), Ordering::SeqCst);
                    self.work_requested.store(true, Ordering::SeqCst);
                }
                _ => break,
            }
        }
        self.time.store(end, Ordering::SeqCst);
        self.work_requested.store(true, Ordering::SeqCst);
        self.settle();
    }

    /// Lets guest and host run until neither has anything to do. Returns after many rounds even if they never end.
    pub fn settle(&self) {
        for _ in 0..100_000 {
            let mut busy = self.run_host();
            busy |= self.deliver_messages();
            self.deliver();
            if self.work_requested.swap(false, Ordering::SeqCst)
                && let Some(guest) = self.guest()
            {
                guest.run_work();
                busy = true;
            }
            if !busy {
                return;
            }
        }
        self.complain("guest and host never come to rest");
    }

    /// When guest or host wants to do something without being asked.
    pub fn next_deadline(&self) -> Option<u64> {
        let guest = self.guest().and_then(|guest| guest.deadline());
        let host = self.host.lock().deadline();
        guest.into_iter().chain(host).min()
    }

    fn guest(&self) -> Option<Arc<dyn Guest>> {
        self.guest.lock().clone()
    }

    /// Runs the guest's code on another VP, as far as the guest can tell.
    fn on_vp<R>(&self, vp: VpIndex, code: impl FnOnce() -> R) -> R {
        let before = self.vp.swap(vp.0, Ordering::SeqCst);
        let result = code();
        self.vp.store(before, Ordering::SeqCst);
        result
    }

    /// Sets an event flag on the VP that runs.
    fn event(&self, guest: &dyn Guest, id: ChannelId) {
        let vp = VpIndex(self.vp.load(Ordering::SeqCst));
        self.interrupted.lock().insert(id, vp);
        guest.on_event(id);
    }

    fn complain(&self, what: &'static str) {
        self.host.lock().complain(what);
    }

    /// Delivers the interrupts that wait, if the guest's level allows it.
    fn deliver(&self) {
        if self.interleave.get().is_some() {
            return;
        }
        let Some(guest) = self.guest() else {
            return;
        };
        while !self.dispatch.load(Ordering::SeqCst) {
            let next = self.pending.lock().pop_front();
            let Some((id, vp)) = next else {
                return;
            };
            self.dispatch.store(true, Ordering::SeqCst);
            self.on_vp(vp, || self.event(&*guest, id));
            self.dispatch.store(false, Ordering::SeqCst);
        }
    }

    fn deliver_messages(&self) -> bool {
        let Some(guest) = self.guest() else {
            return false;
        };
        let mut busy = false;
        loop {
            let now = self.time.load(Ordering::SeqCst);
            let mut slot = self.message_slot.lock();
            if slot.is_none() {
                *slot = self.host.lock().poll_message(now);
            }
            let Some(message) = slot.take() else {
                return busy;
            };
            drop(slot);
            busy = true;
            // A slot that is not emptied keeps its message until the guest has worked.
            let take = || guest.on_message(&message.payload);
            if !self.at_dispatch(|| self.on_vp(message.vp, take)) {
                *self.message_slot.lock() = Some(message);
                return busy;
            }
        }
    }

    fn run_host(&self) -> bool {
        let now = self.time.load(Ordering::SeqCst);
        let ran = self.host.lock().run(now);
        for (id, vp) in ran.interrupts {
            self.interrupt_vp(id, vp);
        }
        ran.busy
    }
}

impl Hypervisor for Machine {
    fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> Result<(), PostError> {
        self.called();
        let now = self.time.load(Ordering::SeqCst);
        for _ in 0..4 {
            let status = self.host.lock().post(now, connection, payload);
            match status {
                HvStatus::SUCCESS => return Ok(()),
                HvStatus::INVALID_CONNECTION_ID => return Err(PostError::InvalidConnection),
                HvStatus::INSUFFICIENT_BUFFERS => {
                    self.run_host();
                }
                HvStatus(other) => return Err(PostError::Status(other)),
            }
        }
        Err(PostError::Busy)
    }

    fn signal_event(&self, connection: ConnectionId, flag: u16) {
        self.signals.fetch_add(1, Ordering::SeqCst);
        self.host.lock().signal(connection, flag);
        self.called();
    }

    fn share_pages(&self, count: usize) -> Result<SharedPages, OutOfMemory> {
        if count > self.free_pages.load(Ordering::SeqCst) {
            return Err(OutOfMemory { pages: count });
        }
        let first = self.next_page.fetch_add(count as u64 + 1, Ordering::SeqCst);
        let first = PageNumber(first);
        let pages = SharedPages::from_heap(first, count).ok_or(OutOfMemory { pages: count })?;
        self.host.lock().memory().add(&pages);
        Ok(pages)
    }

    fn reference_time(&self) -> u64 {
        self.time.load(Ordering::SeqCst)
    }

    fn current_vp(&self) -> VpIndex {
        VpIndex(self.vp.load(Ordering::SeqCst))
    }

    fn raise_to_dispatch(&self) -> Level {
        self.called();
        self.raise()
    }

    fn lower(&self, level: Level) {
        self.lower_to(level);
        self.called();
    }

    fn mmio_space(&self, instance: Guid, bytes: u64) -> Option<u64> {
        let mut spaces = self.mmio.lock();
        // Places of 4 GiB, from 1 TiB on.
        let next = (256 + spaces.len() as u64) << 32;
        (bytes <= 1 << 32).then(|| *spaces.entry(instance).or_insert(next))
    }

    fn wait_for_interrupt(&self, until: Option<u64>) {
        if let Some(interleave) = self.interleave.get() {
            if !self.work_requested.swap(false, Ordering::SeqCst) {
                interleave.asleep(until);
            }
            return;
        }
        for _ in 0..100_000 {
            if self.work_requested.swap(false, Ordering::SeqCst) {
                return;
            }
            let mut busy = self.run_host();
            busy |= self.deliver_messages();
            self.deliver();
            if !busy && !self.work_requested.load(Ordering::SeqCst) {
                let now = self.time.load(Ordering::SeqCst);
                let next = self.next_deadline().into_iter().chain(until).min();
                assert!(next.is_some(), "the guest waits for what will never happen");
                let next = next.map_or(now, |at| at.max(now + 1));
                self.time.store(next, Ordering::SeqCst);
                if until.is_some_and(|until| until <= next) {
                    return;
                }
            }
        }
        self.complain("guest and host never come to rest");
    }

    fn request_work(&self) {
        self.work_requests.fetch_add(1, Ordering::SeqCst);
        self.work_requested.store(true, Ordering::SeqCst);
        self.called();
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Machine")
    }
}
