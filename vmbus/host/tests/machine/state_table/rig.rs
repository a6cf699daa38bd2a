//! A fresh channel in any state of the table, something done to it there, and what comes of it.
//!
//! A column of the table has one or more places: moments at which a channel is in that state. Each is reached on
//! a machine of its own, by what a driver and a host do, never by touching the library's insides.

use std::future::Future;
use std::num::NonZeroU16;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use vmbus::bus::Config;
use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    Channel, ChannelBuilder, ConfigError, DisabledChannel, EnabledChannel, Gpadl, Refused, State,
};
use vmbus::protocol::monitor::MonitorId;
use vmbus::protocol::{Guid, MessageType};
use vmbus_host::bus::{Device, Fault, Profile, Rule};
use vmbus_host::provider::Manual;

use crate::support::{INSTANCE, INTERFACE, SECOND, Shelf, Vm, received};

/// A column of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Column {
    D,
    E,
    O,
    A,
    P,
    S,
    C,
}

impl Column {
    pub const ALL: [Self; 7] = [
        Self::D,
        Self::E,
        Self::O,
        Self::A,
        Self::P,
        Self::S,
        Self::C,
    ];

    fn places(self) -> &'static [Place] {
        match self {
            Self::D => &[Place::Fresh, Place::Ended],
            Self::E => &[Place::Waiting, Place::Connecting],
            Self::O => &[Place::InOpened, Place::InStarted],
            Self::A => &[Place::Active, Place::InPostStarted],
            Self::P => &[Place::Paused],
            Self::S => &[
                Place::InSuspendToPause,
                Place::DrainToPause,
                Place::InSuspendToClose,
                Place::DrainToClose,
            ],
            Self::C => &[Place::InClosed, Place::TearingDown],
        }
    }
}

/// A moment in the life of a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Made, never enabled. Its device is there.
    Fresh,
    /// Was open, and has ended. Its device is there.
    Ended,
    /// Enabled; there is no device.
    Waiting,
    /// Enabled; the host's answer to the ring GPADL is late.
    Connecting,
    /// In the opened callback.
    InOpened,
    /// In the started callback.
    InStarted,
    Active,
    /// In the post-started callback.
    InPostStarted,
    Paused,
    /// In the suspend callback of a pause; the driver holds a packet.
    InSuspendToPause,
    /// Pausing, as long as the driver holds a packet.
    DrainToPause,
    /// In the suspend callback of a close; the driver holds a packet.
    InSuspendToClose,
    /// Closing, as long as the driver holds a packet.
    DrainToClose,
    /// In the closed callback.
    InClosed,
    /// Closed; the host's answer to the teardown of the ring GPADL is late.
    TearingDown,
}

/// A callback that ran.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ran {
    Opened,
    Started,
    PostStarted,
    Packet,
    Complete,
    Suspend,
    Closed,
    Failure,
}

use Ran::{Closed, Failure, Opened, PostStarted, Started, Suspend};

/// What a call answered, or became of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Said {
    /// Done, or nothing was to be done.
    Done,
    /// Not over yet.
    Waits,
    /// `StateError::InCallback`.
    InCallback,
    /// `GpadlError::NotNow`.
    NotNow,
    /// `ConfigError::PrimaryNotOpen`.
    PrimaryNotOpen,
    /// There is no such thing now.
    Nothing,
    /// Not taken: `SendFailure::NotOpen`.
    Rejected,
    /// Taken; the host has not seen it.
    Queued,
    /// The host has it.
    AtHost,
    /// STATUS_DEVICE_REMOVED.
    Removed,
    /// STATUS_CANCELLED: its time was over.
    Cancelled,
    /// STATUS_BUFFER_OVERFLOW: not put into the ring at once.
    NotQueued,
    /// It could never have ended.
    WouldDeadlock,
    /// The host's answer came.
    Answered,
}

/// What a row of the table does.
pub enum Did {
    Now(Said),
    /// It goes on.
    Later(Pin<Box<dyn Future<Output = Said> + Send>>),
    /// It has an effect that can be looked at in the end.
    Then(Said, fn(&Rig) -> Said),
}

/// Begins to wait, and sees whether there is anything to wait for.
pub fn wait(future: impl Future<Output = Said> + Send + 'static) -> Did {
    let mut future: Pin<Box<dyn Future<Output = Said> + Send>> = Box::pin(future);
    match poll(&mut future) {
        Poll::Ready(said) => Did::Now(said),
        Poll::Pending => Did::Later(future),
    }
}

fn poll(future: &mut Pin<Box<dyn Future<Output = Said> + Send>>) -> Poll<Said> {
    future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
}

/// How the channels of a row differ from plain ones.
#[derive(Clone, Copy, Default)]
pub struct Setup {
    /// Built with `start_paused`.
    pub start_paused: bool,
    /// A sub-channel of an open channel.
    pub sub_channel: bool,
    /// Its primary channel is what pauses it.
    pub primary_paused: bool,
    /// The driver makes a GPADL in its opened callback.
    pub gpadl: bool,
    /// The host has a request of the driver.
    pub in_flight: bool,
    /// The driver holds a packet of the host.
    pub holds: bool,
    /// The channel signals through the monitor page.
    pub monitored: bool,
}

/// A row of the table.
pub struct Row {
    pub name: &'static str,
    pub setup: Setup,
    pub act: fn(&Rig) -> Did,
}

/// Callbacks that ran, and the state in the end.
type Course = (&'static [Ran], State);

/// What a cell expects at one place.
#[derive(Clone, Copy)]
struct Expect {
    said: Said,
    finally: Option<Said>,
    now: Option<Course>,
    then: Option<Course>,
}

/// A cell of the table.
#[derive(Clone)]
pub struct Cell {
    all: Option<Expect>,
    places: Vec<(Place, Expect)>,
}

/// The call answers this, and the channel goes on as if there had been no call.
pub fn says(said: Said) -> Cell {
    let expect = Expect {
        said,
        finally: None,
        now: None,
        then: None,
    };
    Cell {
        all: Some(expect),
        places: Vec::new(),
    }
}

/// `Said::Done`, and the channel goes on as if there had been no call.
pub fn ok() -> Cell {
    says(Said::Done)
}

/// Only at this place; the other ones of the column have no such thing.
pub fn only(place: Place, cell: Cell) -> Cell {
    Cell {
        all: None,
        places: Vec::new(),
    }
    .at(place, cell)
}

impl Cell {
    fn change(mut self, change: impl FnOnce(&mut Expect)) -> Self {
        if let Some(expect) = &mut self.all {
            change(expect);
        }
        self
    }

    /// Which callbacks run at once, and where the channel is then.
    pub fn now(self, callbacks: &'static [Ran], state: State) -> Self {
        self.change(|expect| expect.now = Some((callbacks, state)))
    }

    /// The same for what follows when whatever kept the channel at its place is gone: it is enabled, the device comes, the host
    /// answers, the driver completes its packets.
    pub fn then(self, callbacks: &'static [Ran], state: State) -> Self {
        self.change(|expect| expect.then = Some((callbacks, state)))
    }

    /// Nothing more happens: the state stays.
    pub fn for_good(self, callbacks: &'static [Ran], state: State) -> Self {
        self.now(callbacks, state).then(&[], state)
    }

    /// What the call has come to in the end.
    pub fn finally(self, said: Said) -> Self {
        self.change(|expect| expect.finally = Some(said))
    }

    /// It is otherwise at this place.
    pub fn at(mut self, place: Place, cell: Cell) -> Self {
        self.places.extend(cell.all.map(|expect| (place, expect)));
        self
    }

    fn expect(&self, place: Place) -> Option<Expect> {
        let special = self.places.iter().find(|(at, _)| *at == place);
        special.map(|(_, expect)| *expect).or(self.all)
    }
}

/// Checks one cell, at every place of its column.
pub fn check(row: &Row, column: Column, cell: &Cell) {
    let mut places = 0;
    for &place in column.places() {
        let Some(expect) = cell.expect(place) else {
            continue;
        };
        places += 1;
        eprintln!("{} in {column:?}, {place:?}", row.name);
        let rig = Rig::new(row.setup, place);
        let mut did = rig.reach(row.act);
        let now = rig.course();
        let said = match &mut did {
            Did::Now(said) | Did::Then(said, _) => *said,
            Did::Later(future) => match poll(future) {
                Poll::Ready(said) => said,
                Poll::Pending => Said::Waits,
            },
        };
        let was_waiting = said == Said::Waits;
        assert_eq!(said, expect.said, "what the call says");
        let usual = rig.usual();
        assert_same(now, expect.now.unwrap_or(usual.0), "at once");
        rig.release();
        let finally = match &mut did {
            Did::Then(_, look) => look(&rig),
            Did::Later(future) if was_waiting => match poll(future) {
                Poll::Ready(said) => said,
                Poll::Pending => Said::Waits,
            },
            Did::Now(_) | Did::Later(_) => said,
        };
        assert_eq!(finally, expect.finally.unwrap_or(expect.said), "in the end");
        assert_same(rig.course(), expect.then.unwrap_or(usual.1), "then");
        drop(did);
        rig.finish();
    }
    assert!(places > 0, "no place of the column was looked at");
}

fn assert_same(seen: (Vec<Ran>, State), expected: Course, when: &str) {
    assert_eq!((&seen.0[..], seen.1), expected, "{when}");
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// The callback in which something is to be done, and what.
type Hook = (Ran, fn(&Rig) -> Did);

/// A channel, its driver, and its host.
pub struct Rig {
    pub vm: Vm,
    /// Runs of shared pages that belong to no channel.
    own_runs: usize,
    setup: Setup,
    place: Place,
    channel: Mutex<Option<Channel>>,
    disabled: Mutex<Option<DisabledChannel>>,
    enabled: Mutex<Option<Arc<EnabledChannel>>>,
    primary: Mutex<Option<(ChannelId, EnabledChannel)>>,
    /// The channel's own device, while there is one.
    pub device: Mutex<Option<ChannelId>>,
    ran: Mutex<Vec<Ran>>,
    /// What is to be done in a callback.
    hook: Mutex<Option<Hook>>,
    did: Mutex<Option<Did>>,
    /// Packets that the driver holds.
    pub shelf: Shelf,
    hold: AtomicBool,
    /// The opened callback refuses the channel.
    pub refuse: AtomicBool,
    pub gpadl: Mutex<Option<Gpadl>>,
    /// Packets that were taken for sending.
    pub accepted: AtomicUsize,
    /// How they ended.
    ends: Arc<Mutex<Vec<bool>>>,
    /// The host has received something.
    at_host: AtomicBool,
    /// The request that the host has.
    pub transaction: Mutex<Option<u64>>,
}

impl Rig {
    fn new(setup: Setup, place: Place) -> Arc<Self> {
        let config = Config {
            monitor_pages: setup.monitored,
            ..Config::default()
        };
        let profile = if setup.monitored {
            Profile::hyper_v()
        } else {
            Profile::openvmm()
        };
        let vm = Vm::with_config(profile, config);
        vm.connect();
        let rig = Arc::new(Self {
            own_runs: vm.machine.shared_runs(),
            vm,
            setup,
            place,
            channel: Mutex::default(),
            disabled: Mutex::default(),
            enabled: Mutex::default(),
            primary: Mutex::default(),
            device: Mutex::default(),
            ran: Mutex::default(),
            hook: Mutex::default(),
            did: Mutex::default(),
            shelf: Shelf::default(),
            hold: AtomicBool::new(false),
            refuse: AtomicBool::new(false),
            gpadl: Mutex::default(),
            accepted: AtomicUsize::new(0),
            ends: Arc::default(),
            at_host: AtomicBool::new(false),
            transaction: Mutex::default(),
        });
        let builder = rig.builder();
        let builder = if setup.sub_channel {
            rig.open_primary();
            let primary = lock(&rig.primary);
            let (_, primary) = primary.as_ref().unwrap();
            builder.sub_channel_of(primary.channel(), NonZeroU16::MIN)
        } else {
            builder
        };
        rig.put(builder.build(rig.vm.vmbus.client()).unwrap());
        rig
    }

    fn builder(self: &Arc<Self>) -> ChannelBuilder {
        let rig = Arc::downgrade(self);
        let call = move |ran: Ran| {
            let rig = rig.upgrade();
            rig.is_none_or(|rig| rig.called(ran))
        };
        let note = |ran: Ran| {
            let call = call.clone();
            move |_: &Channel| {
                call(ran);
            }
        };
        let holder = Arc::downgrade(self);
        let [opened, packet_came, complete, failure] = std::array::from_fn(|_| call.clone());
        let builder = ChannelBuilder::new(INTERFACE)
            .friendly_name("cell")
            .process_packet_callbacks(
                move |_, packet| {
                    packet_came(Ran::Packet);
                    let rig = holder.upgrade().unwrap();
                    if rig.hold.load(Ordering::SeqCst) {
                        lock(&rig.shelf).push(packet.hold());
                    } else {
                        packet.complete(&[]);
                    }
                },
                move |_, _| {
                    complete(Ran::Complete);
                },
            )
            .opened(move |_| {
                if opened(Opened) {
                    Ok(())
                } else {
                    Err(Refused("the table says so"))
                }
            })
            .started(note(Started))
            .post_started(note(PostStarted))
            .suspend(note(Suspend))
            .closed(note(Closed))
            .failure(move |_, _| {
                failure(Failure);
            });
        let builder = if self.setup.start_paused {
            builder.start_paused()
        } else {
            builder
        };
        if self.setup.monitored {
            builder.monitored_notification()
        } else {
            builder
        }
    }

    /// A callback runs. `false`: it fails.
    fn called(&self, ran: Ran) -> bool {
        if ran == Opened && self.setup.gpadl {
            let channel = self.channel();
            let gpadl = channel.allocate_gpadl(1).unwrap();
            let gpadl = channel.client().block_on(gpadl).unwrap().unwrap();
            *lock(&self.gpadl) = Some(gpadl);
        }
        lock(&self.ran).push(ran);
        let due = lock(&self.hook).take_if(|(at, _)| *at == ran);
        if let Some((_, act)) = due {
            lock(&self.ran).clear();
            let did = act(self);
            *lock(&self.did) = Some(did);
        }
        if ran == Closed {
            // As every driver must.
            drop(lock(&self.gpadl).take());
        }
        !(ran == Opened && self.refuse.load(Ordering::SeqCst))
    }

    fn open_primary(&self) {
        let device = Device::new(INTERFACE, INSTANCE);
        let id = self.vm.machine.add(device, Manual).unwrap();
        self.vm.machine.settle();
        let builder = ChannelBuilder::new(INTERFACE).friendly_name("primary");
        let primary = self.vm.enable(&builder);
        assert_eq!(primary.channel().state(), State::Active);
        *lock(&self.primary) = Some((id, primary));
    }

    pub fn primary(&self) -> Channel {
        let primary = lock(&self.primary);
        primary.as_ref().unwrap().1.channel().clone()
    }

    pub fn disable_primary(&self) {
        let primary = lock(&self.primary);
        primary.as_ref().unwrap().1.disable();
    }

    pub fn channel(&self) -> Channel {
        lock(&self.channel).clone().unwrap()
    }

    /// The owner of the channel, while it is enabled or has ended.
    pub fn enabled(&self) -> Arc<EnabledChannel> {
        lock(&self.enabled).clone().unwrap()
    }

    /// Takes the owner of the channel away.
    pub fn drop_owner(&self) {
        let owners = (lock(&self.disabled).take(), lock(&self.enabled).take());
        drop(owners);
    }

    pub fn put(&self, disabled: DisabledChannel) {
        *lock(&self.channel) = Some(disabled.channel().clone());
        *lock(&self.disabled) = Some(disabled);
    }

    /// The disabled channel, if its owner is still there.
    pub fn take_disabled(&self) -> Option<DisabledChannel> {
        let disabled = lock(&self.disabled).take();
        disabled.or_else(|| {
            let ended = Arc::into_inner(lock(&self.enabled).take()?).unwrap();
            let client = self.vm.vmbus.client();
            Some(client.block_on(ended.into_disabled()).unwrap().unwrap())
        })
    }

    /// Enables the channel if it is disabled and there is an owner.
    pub fn enable(&self) -> Option<Result<(), ConfigError>> {
        let disabled = self.take_disabled()?;
        Some(match disabled.enable() {
            Ok(enabled) => {
                *lock(&self.enabled) = Some(Arc::new(enabled));
                Ok(())
            }
            Err(error) => {
                self.put(error.channel);
                Err(error.reason)
            }
        })
    }

    /// The host offers the channel's device, once more if it was taken away.
    pub fn offer(&self) {
        let mut device = lock(&self.device);
        if device.is_some() {
            return;
        }
        let primary = lock(&self.primary).as_ref().map(|(id, _)| *id);
        let machine = &self.vm.machine;
        *device = match primary {
            Some(primary) => machine.add_sub_channel(primary, NonZeroU16::MIN, Manual),
            None => machine.add(
                Device {
                    mmio_megabytes: 8,
                    monitor_id: self.setup.monitored.then(|| MonitorId::new(37).unwrap()),
                    ..Device::new(INTERFACE, INSTANCE)
                },
                Manual,
            ),
        };
    }

    /// Another device of the kind comes.
    pub fn offer_another(&self) {
        let other = Guid::literal("00000000-0000-0000-0000-000000000001");
        let machine = &self.vm.machine;
        machine.add(Device::new(INTERFACE, other), Manual).unwrap();
    }

    fn settle(&self) {
        self.vm.machine.settle();
    }

    fn inject(&self, message: MessageType, skip: u32) {
        let rule = Rule {
            skip,
            ..Rule::once(message, Fault::Delay(SECOND))
        };
        self.vm.machine.server(|server| server.inject(rule));
    }

    /// Brings the channel to its place, acts there, and lets everything happen that happens by itself.
    fn reach(&self, act: fn(&Self) -> Did) -> Did {
        let hook = |ran| *lock(&self.hook) = Some((ran, act));
        let to_pause = matches!(self.place, Place::InSuspendToPause | Place::DrainToPause);
        if self.setup.primary_paused
            && matches!(
                self.place,
                Place::Fresh | Place::Ended | Place::Waiting | Place::Connecting | Place::InOpened
            )
        {
            self.pause_primary();
        }
        match self.place {
            Place::Fresh => {
                self.offer();
                self.settle();
            }
            Place::Ended => {
                self.become_open();
                self.enabled().disable();
                self.settle();
            }
            Place::Waiting => {
                self.enable().unwrap().unwrap();
                self.settle();
            }
            Place::Connecting => {
                self.inject(MessageType::GPADL_CREATED, 0);
                self.become_open();
            }
            Place::InOpened => {
                hook(Opened);
                self.become_open();
            }
            Place::InStarted if self.setup.in_flight => {
                self.become_active();
                self.pause();
                hook(Started);
                self.channel().start().unwrap();
                self.settle();
            }
            Place::InStarted => {
                hook(Started);
                self.become_active();
            }
            Place::InPostStarted => {
                hook(PostStarted);
                self.become_active();
            }
            Place::Active => self.become_active(),
            Place::Paused => {
                self.become_active();
                self.pause();
            }
            Place::InSuspendToPause
            | Place::DrainToPause
            | Place::InSuspendToClose
            | Place::DrainToClose => {
                self.become_active();
                self.hold_packet();
                if matches!(
                    self.place,
                    Place::InSuspendToPause | Place::InSuspendToClose
                ) {
                    hook(Suspend);
                }
                if to_pause {
                    self.pause();
                } else {
                    self.enabled().disable();
                    self.settle();
                }
            }
            Place::InClosed | Place::TearingDown => {
                self.become_active();
                // The driver's own GPADL goes first.
                self.inject(MessageType::GPADL_TORNDOWN, u32::from(self.setup.gpadl));
                if self.place == Place::InClosed {
                    hook(Closed);
                }
                self.enabled().disable();
                self.settle();
            }
        }
        let done = lock(&self.did).take();
        done.unwrap_or_else(|| {
            assert!(lock(&self.hook).is_none(), "the callback did not run");
            let (_, before) = self.usual_before();
            assert_eq!(self.channel().state(), before, "the place was not reached");
            lock(&self.ran).clear();
            let did = act(self);
            self.settle();
            did
        })
    }

    fn become_open(&self) {
        self.offer();
        self.enable().unwrap().unwrap();
        self.settle();
    }

    fn become_active(&self) {
        self.become_open();
        if self.setup.start_paused {
            self.channel().start().unwrap();
            self.settle();
        }
        if self.setup.in_flight {
            self.send(true).unwrap();
            self.look();
        }
        if self.setup.holds {
            self.hold_packet();
        }
    }

    fn pause(&self) {
        if self.setup.primary_paused {
            self.pause_primary();
        } else {
            drop(self.channel().pause().unwrap());
            self.settle();
        }
    }

    fn pause_primary(&self) {
        drop(self.primary().pause().unwrap());
        self.settle();
    }

    fn hold_packet(&self) {
        if lock(&self.shelf).is_empty() {
            self.hold.store(true, Ordering::SeqCst);
            self.host_sends();
            assert_eq!(lock(&self.shelf).len(), 1);
        }
    }

    /// The host sends a message, if the channel is open to it.
    pub fn host_sends(&self) {
        use vmbus::ring::Outgoing;
        let device = *lock(&self.device);
        let send = |host: &mut vmbus_host::channel::HostChannel| {
            host.send(&Outgoing::in_band([b"message!", &[]])).unwrap();
        };
        device.and_then(|device| self.vm.machine.channel(device, send));
    }

    /// The host answers the request that it has, if the channel is open to it.
    pub fn host_answers(&self) {
        let (device, transaction) = (*lock(&self.device), lock(&self.transaction).take());
        if let (Some(device), Some(transaction)) = (device, transaction) {
            let answer = |host: &mut vmbus_host::channel::HostChannel| {
                host.complete(transaction, b"answered").unwrap();
            };
            self.vm.machine.channel(device, answer);
        }
    }

    /// Sends a packet and has its end noted.
    pub fn send(&self, transaction: bool) -> Result<(), vmbus::kmcl::SendFailure> {
        let mut packet = self.channel().allocate_packet().unwrap();
        let ends = self.ends.clone();
        packet.set_completion_routine(Arc::new(move |_, result| {
            lock(&ends).push(result.is_ok());
        }));
        let sent = if transaction {
            packet.send_transaction(b"question")
        } else {
            packet.send(b"message!")
        };
        sent.map_err(|error| error.reason)?;
        self.accepted.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Where a packet is that was taken for sending.
    pub fn whereabouts(&self) -> Said {
        self.look();
        if lock(&self.ends).contains(&false) {
            Said::Removed
        } else if self.at_host.load(Ordering::SeqCst) {
            Said::AtHost
        } else {
            Said::Queued
        }
    }

    /// Whether the request of the driver has ended.
    pub fn request_ended(&self) -> Said {
        match lock(&self.ends).first() {
            None => Said::Waits,
            Some(true) => Said::Answered,
            Some(false) => Said::Removed,
        }
    }

    /// The host takes what it has got.
    pub fn look(&self) {
        let Some(device) = *lock(&self.device) else {
            return;
        };
        let packets = self.vm.machine.channel(device, received);
        for (transaction, _) in packets.into_iter().flatten() {
            self.at_host.store(true, Ordering::SeqCst);
            if transaction.is_some() {
                *lock(&self.transaction) = transaction;
            }
        }
    }

    /// The callbacks since the last look, and the state.
    fn course(&self) -> (Vec<Ran>, State) {
        let ran = std::mem::take(&mut *lock(&self.ran));
        (ran, self.channel().state())
    }

    /// The state at a place outside of callbacks.
    fn usual_before(&self) -> Course {
        self.usual().0
    }

    /// What happens at a place if nobody does anything: at once, and when the channel is let go on.
    fn usual(&self) -> (Course, Course) {
        let up: Course = if self.setup.start_paused || self.setup.primary_paused {
            (&[Opened], State::Paused)
        } else {
            (&[Opened, Started, PostStarted], State::Active)
        };
        let stays = |state| ((&[] as &[Ran], state), (&[] as &[Ran], state));
        match self.place {
            Place::Fresh | Place::Ended => ((&[], State::Disabled), up),
            Place::Waiting | Place::Connecting => ((&[], State::Enabled), up),
            Place::InOpened if up.1 == State::Paused => stays(State::Paused),
            Place::InOpened => (
                (&[Started, PostStarted], State::Active),
                (&[], State::Active),
            ),
            Place::InStarted => ((&[PostStarted], State::Active), (&[], State::Active)),
            Place::Active | Place::InPostStarted => stays(State::Active),
            Place::Paused => stays(State::Paused),
            Place::InSuspendToPause | Place::DrainToPause => {
                ((&[], State::Suspending), (&[], State::Paused))
            }
            Place::InSuspendToClose | Place::DrainToClose => {
                ((&[], State::Suspending), (&[Closed], State::Disabled))
            }
            Place::InClosed | Place::TearingDown => ((&[], State::Closing), (&[], State::Disabled)),
        }
    }

    /// Takes away what keeps the channel where it is.
    fn release(&self) {
        self.offer();
        match self.place {
            // A sub-channel may be refused; then it stays what it is.
            Place::Fresh | Place::Ended if self.channel().state() == State::Disabled => {
                let _ = self.enable();
            }
            Place::InSuspendToPause
            | Place::DrainToPause
            | Place::InSuspendToClose
            | Place::DrainToClose => self.complete_packets(),
            Place::Waiting | Place::Connecting | Place::InClosed | Place::TearingDown => {
                self.vm.machine.advance(15 * SECOND);
            }
            _ => {}
        }
        self.settle();
        self.look();
        if !self.setup.in_flight {
            self.host_answers();
        }
        self.settle();
    }

    /// The driver completes the packets that it holds.
    pub fn complete_packets(&self) {
        let packets: Vec<_> = lock(&self.shelf).drain(..).collect();
        for packet in packets {
            packet.complete(&[]);
        }
    }

    /// Ends everything, and sees that nothing is lost, whatever was done before.
    fn finish(&self) {
        self.hold.store(false, Ordering::SeqCst);
        self.complete_packets();
        let channel = self.channel();
        self.drop_owner();
        drop(lock(&self.primary).take());
        self.vm.machine.advance(30 * SECOND);
        assert_eq!(channel.state(), State::Disabled, "the channel ends");
        let ends = lock(&self.ends).len();
        let accepted = self.accepted.load(Ordering::SeqCst);
        assert_eq!(ends, accepted, "each packet ends once");
        let runs = self.vm.machine.shared_runs();
        assert_eq!(runs, self.own_runs, "memory comes back");
        assert_eq!(channel.counters().uncompleted_drops, 0);
        assert!(self.vm.vmbus.snapshot().channels.is_empty());
        self.vm.assert_well_behaved();
    }
}
