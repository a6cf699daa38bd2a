//! The guest's end: a driver that does all that a driver may, in no sensible order, and checks what it is told.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use vmbus::hypervisor::{Hypervisor, Level};
use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus::kmcl::{
    Answer, Channel, ChannelBuilder, ChannelError, DisabledChannel, EnabledChannel, ExternalData,
    Gpadl, GpadlError, IncomingPacket, OutgoingPacket, PacketError, ReceivedPacket, Refused,
    RequestError, SendFailure, SendFlags, State, StateError, Timeout,
};

use crate::decisions::Dice;
use crate::host::{INTERFACE, LONGEST, data, length, word};
use crate::world::{Messages, World};

/// How a channel is configured.
#[derive(Clone, Copy)]
struct Config {
    rings: (usize, usize),
    quota: u32,
    budget: u32,
    packets: usize,
    passive: bool,
    /// It opens paused.
    paused: bool,
    /// The driver sends messages only, and the host next to nothing: few signals hide that one is missing.
    one_way: bool,
}

/// How far the state-change callbacks have come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Disabled,
    Enabled,
    /// Opened has agreed.
    Opened,
    /// Started is running.
    Starting,
    /// Delivery is on.
    Running {
        /// PostStarted has run.
        post: bool,
    },
    Suspended,
    Closed,
    /// Failure has run: nothing comes after it.
    Failed,
}

/// What a driver or a host has done that ends a channel.
#[derive(Clone, Copy, Default)]
pub struct Excuses {
    pub rescinded: bool,
    disabled: bool,
    /// The driver failed a packet.
    failed: bool,
    /// The opened callback said no.
    refused: bool,
}

impl Excuses {
    fn or(self, other: Self) -> Self {
        Self {
            rescinded: self.rescinded || other.rescinded,
            disabled: self.disabled || other.disabled,
            failed: self.failed || other.failed,
            refused: self.refused || other.refused,
        }
    }
}

/// A packet that was accepted for sending and has not ended.
struct Live {
    kind: Kind,
    page: Option<PageNumber>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Message,
    Transaction,
    External,
    /// A message in a packet without a completion routine.
    Anonymous,
    /// A request, with a future that waits for its answer.
    Request,
    /// A message, with a future that waits until it is in the ring.
    Delivery,
    /// A message that went into the ring at once.
    Try,
}

/// A packet that the host has yet to read. Two sends of which one interrupts the other may end up in either order.
#[derive(Clone, Copy, Debug)]
struct Order {
    number: u64,
    kind: Kind,
    begun: u64,
    ended: u64,
    /// Given up by its sender: the host may get it or not.
    given_up: bool,
    /// When its sender gives it up, if it is not sent before.
    until: u64,
    /// It was accepted for certain. A request tells only when it is polled.
    sure: bool,
}

struct Held {
    life: u64,
    epoch: u64,
    number: u64,
    packet: IncomingPacket,
}

/// Set when a future may be polled.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A future, and whether it was woken.
struct Wait<T> {
    future: Pin<Box<dyn Future<Output = T> + Send>>,
    woken: Arc<Flag>,
}

impl<T> Wait<T> {
    fn new(future: impl Future<Output = T> + Send + 'static) -> Self {
        Self {
            future: Box::pin(future),
            woken: Arc::new(Flag(AtomicBool::new(true))),
        }
    }

    /// Whether it may be polled now; forgets that it was woken.
    fn is_due(&mut self, odd: bool) -> bool {
        self.woken.0.swap(false, Ordering::SeqCst) || odd
    }

    fn poll(&mut self) -> Poll<T> {
        let waker = Waker::from(self.woken.clone());
        self.future.as_mut().poll(&mut Context::from_waker(&waker))
    }
}

/// What a driver waits for.
enum Waiting {
    /// The channel's end; then it can be enabled again.
    Disabled(Wait<Result<DisabledChannel, StateError>>),
    Paused(Channel, Wait<()>),
    Request {
        number: u64,
        kind: Kind,
        until: u64,
        page: Option<PageNumber>,
        wait: Wait<Result<Answer, RequestError>>,
    },
    Created(Wait<Result<Gpadl, GpadlError>>),
    Deleted(Wait<()>),
}

impl Waiting {
    fn is_due(&mut self, odd: bool) -> bool {
        match self {
            Self::Disabled(wait) => wait.is_due(odd),
            Self::Paused(_, wait) | Self::Deleted(wait) => wait.is_due(odd),
            Self::Request { wait, .. } => wait.is_due(odd),
            Self::Created(wait) => wait.is_due(odd),
        }
    }
}

/// The driver of one channel.
pub struct Driver {
    config: Config,
    /// The channel, whoever owns it.
    channel: Option<Channel>,
    enabled: Option<EnabledChannel>,
    disabled: Option<DisabledChannel>,
    waiting: Vec<Waiting>,
    gpadls: Vec<Gpadl>,
    /// The driver wants nothing to flow.
    paused: bool,
    /// It changed its mind when the channel was about to end: that may be forgotten with the channel, or not.
    unsure: bool,
    /// How often the channel took its wish to pause or to start.
    wishes: u64,
    /// Channels built so far.
    life: u64,
    /// The opening that is over for the driver: its host may not know yet, and read what was left in the ring.
    over: u64,
    phase: Phase,
    pub excuses: Excuses,
    /// Those of the times before it was enabled last: a request may be looked at late.
    past: Excuses,
    held: Vec<Held>,
    spare: Vec<OutgoingPacket>,
    live: BTreeMap<u64, Live>,
    order: Vec<Order>,
    /// The number of the next packet.
    next: u64,
    /// Packets delivered since processing-complete ran last.
    batch: u32,
    /// The number of the packet that must come next.
    received: u64,
    /// The packet that must be delivered again before any other.
    deferred: Option<u64>,
    /// With what the packets of this opening were completed.
    completions: BTreeMap<u64, Vec<u8>>,
}

impl Driver {
    pub fn new(dice: &mut Dice) -> Self {
        let pages = |dice: &mut Dice| dice.between(1, 2) as usize;
        Self {
            config: Config {
                rings: (pages(dice), pages(dice)),
                quota: dice.between(1, 8) as u32,
                budget: dice.between(1, 8) as u32,
                packets: dice.between(2, 16) as usize,
                passive: dice.one_in(4),
                paused: dice.one_in(6),
                one_way: dice.one_in(3),
            },
            channel: None,
            enabled: None,
            disabled: None,
            waiting: Vec::new(),
            gpadls: Vec::new(),
            paused: false,
            unsure: false,
            wishes: 0,
            life: 0,
            over: 0,
            phase: Phase::Disabled,
            excuses: Excuses::default(),
            past: Excuses::default(),
            held: Vec::new(),
            spare: Vec::new(),
            live: BTreeMap::new(),
            order: Vec::new(),
            next: 0,
            batch: 0,
            received: 0,
            deferred: None,
            completions: BTreeMap::new(),
        }
    }

    /// A new opening begins: what was in the old rings is lost.
    pub fn host_opened(&mut self) {
        let live = &self.live;
        self.order.retain(|entry| {
            let lined_up = match entry.kind {
                Kind::Anonymous | Kind::Request | Kind::Delivery => true,
                Kind::Try => false,
                Kind::Message | Kind::Transaction | Kind::External => {
                    live.contains_key(&entry.number)
                }
            };
            lined_up && !entry.given_up
        });
        self.received = 0;
        self.deferred = None;
        self.completions.clear();
    }

    fn entry(&mut self, number: u64) -> Option<&mut Order> {
        self.order.iter_mut().find(|entry| entry.number == number)
    }

    /// With what packet `number` was completed, if it was.
    pub fn completion(&self, number: u64) -> Option<Vec<u8>> {
        self.completions.get(&number).cloned()
    }

    /// Whether next to nothing comes from the host.
    pub fn is_one_way(&self) -> bool {
        self.config.one_way
    }

    /// Packets that were delivered since the channel was opened.
    pub fn received(&self) -> u64 {
        self.received
    }
}

#[derive(Clone, Copy)]
enum Act {
    Send,
    SendAnonymous,
    Allocate,
    Discard,
    Complete,
    Forget,
    Quota,
    Passive,
    Disable,
    Enable,
    Request,
    Synchronous,
    Try,
    GiveUp,
    Pause,
    Start,
    CreateGpadl,
    DeleteGpadl,
}

/// What becomes of a delivered packet.
#[derive(Clone, Copy)]
enum Fate {
    Complete,
    Hold,
    Defer,
    Drop,
    Fail,
}

impl World {
    fn channel(&self, device: usize) -> Option<Channel> {
        self.device(device, |device| device.driver.channel.clone())
    }

    pub fn state_of(&self, device: usize) -> State {
        self.channel(device)
            .map_or(State::Disabled, |channel| channel.state())
    }

    /// The driver does something, at this level.
    pub fn drive(&self, device: usize, level: Level) -> bool {
        let passive = u64::from(level == Level::Passive);
        let act = self.dice(|dice| {
            dice.pick(&[
                (60, Act::Send),
                (6, Act::SendAnonymous),
                (6, Act::Allocate),
                (3, Act::Discard),
                (40, Act::Complete),
                (1, Act::Forget),
                (2, Act::Quota),
                (2, Act::Passive),
                (1, Act::Disable),
                (20 * passive, Act::Enable),
                (15, Act::Request),
                (2 * passive, Act::Synchronous),
                (6, Act::Try),
                (3, Act::GiveUp),
                (2, Act::Pause),
                (6, Act::Start),
                (2, Act::CreateGpadl),
                (3, Act::DeleteGpadl),
            ])
        });
        match act {
            Act::Send => self.send(device, None),
            Act::SendAnonymous => self.send_anonymous(device),
            Act::Allocate => self.allocate(device),
            Act::Discard => self.discard(device),
            Act::Complete => self.complete(device),
            Act::Forget => self.forget(device),
            Act::Quota => self.quota(device),
            Act::Passive => self.passive(device),
            Act::Disable => {
                self.enabled_now(device) && {
                    self.disable(device);
                    true
                }
            }
            Act::Enable => self.enable(device),
            Act::Request => self.request(device),
            Act::Synchronous => self.send_synchronously(device),
            Act::Try => self.try_send(device),
            Act::GiveUp => self.give_up(device),
            Act::Pause => self.pause(device),
            Act::Start => self.start(device),
            Act::CreateGpadl => self.create_gpadl(device, level),
            Act::DeleteGpadl => self.delete_gpadl(device),
        }
    }

    fn enabled_now(&self, device: usize) -> bool {
        self.state_of(device) != State::Disabled
    }

    /// Enables the channel, if it is Disabled and its driver knows.
    pub fn enable(&self, device: usize) -> bool {
        let (ready, enabled, disabled) = self.device(device, |device| {
            let driver = &mut device.driver;
            let ending = driver
                .waiting
                .iter()
                .any(|waiting| matches!(waiting, Waiting::Disabled(_)));
            let ready = driver.phase == Phase::Disabled && !ending;
            if !ready {
                return (false, None, None);
            }
            (true, driver.enabled.take(), driver.disabled.take())
        });
        if !ready {
            return false;
        }
        if let Some(enabled) = enabled {
            // It ended by itself; its owner may get it back, or let it go.
            if self.dice(|dice| dice.one_in(4)) {
                self.note(Some(device), "let go", 0);
                drop(enabled);
            } else {
                self.wait(
                    device,
                    Waiting::Disabled(Wait::new(enabled.into_disabled())),
                );
            }
            return true;
        }
        let fresh = self.dice(|dice| dice.one_in(6));
        self.note(Some(device), "enable", fresh.into());
        let disabled = match disabled {
            Some(disabled) if fresh => {
                drop(disabled.into_builder());
                None
            }
            disabled => disabled,
        };
        let built = disabled.is_none();
        let disabled =
            disabled.unwrap_or_else(|| match self.builder(device).build(self.vmbus.client()) {
                Ok(disabled) => disabled,
                Err(error) => panic!("the configuration is sound: {error}"),
            });
        let old = self.device(device, |device| {
            let driver = &mut device.driver;
            driver.phase = Phase::Enabled;
            driver.past = driver.past.or(driver.excuses);
            driver.excuses = Excuses {
                rescinded: device.host.id.is_none(),
                ..Excuses::default()
            };
            driver.batch = 0;
            driver.channel = Some(disabled.channel().clone());
            if !built {
                return Vec::new();
            }
            driver.life += 1;
            driver.paused = driver.config.paused;
            driver.unsure = false;
            // Packets belong to the channel that they were allocated on.
            std::mem::take(&mut driver.spare)
        });
        drop(old);
        let enabled = match disabled.enable() {
            Ok(enabled) => enabled,
            Err(error) => panic!("nothing is in the way: {error}"),
        };
        self.device(device, |device| device.driver.enabled = Some(enabled));
        true
    }

    /// Begins to close the channel, in one of the ways that there are.
    pub fn disable(&self, device: usize) {
        let (enabled, way) = self.with(|state| {
            let driver = &mut state.devices[device].driver;
            driver.excuses.disabled = true;
            (driver.enabled.take(), state.dice.below(4))
        });
        self.note(Some(device), "disable", way as u64);
        let Some(enabled) = enabled else { return };
        match way {
            0 => drop(enabled),
            1 => self.wait(
                device,
                Waiting::Disabled(Wait::new(enabled.into_disabled())),
            ),
            _ => {
                enabled.disable();
                self.device(device, |device| device.driver.enabled = Some(enabled));
            }
        }
    }

    fn wait(&self, device: usize, waiting: Waiting) {
        self.device(device, |device| device.driver.waiting.push(waiting));
    }

    fn pause(&self, device: usize) -> bool {
        let Some(channel) = self.channel(device) else {
            return false;
        };
        let ending = matches!(channel.state(), State::Disabled | State::Closing);
        let (before, wishes) = self.device(device, |device| {
            let driver = &mut device.driver;
            driver.unsure |= ending;
            let before = std::mem::replace(&mut driver.paused, true);
            (before, driver.wishes)
        });
        let answer = channel.pause();
        self.wished(device, wishes, answer.is_ok(), |driver| {
            driver.paused = before;
        });
        let Ok(paused) = answer else {
            return false;
        };
        self.note(Some(device), "pause", 0);
        self.wait(device, Waiting::Paused(channel, Wait::new(paused)));
        true
    }

    fn start(&self, device: usize) -> bool {
        let paused = self.device(device, |device| {
            device.driver.paused || device.driver.unsure
        });
        let Some(channel) = self.channel(device).filter(|_| paused) else {
            return false;
        };
        let ending = matches!(channel.state(), State::Disabled | State::Closing);
        let (before, wishes) = self.device(device, |device| {
            let driver = &mut device.driver;
            let before = (
                std::mem::replace(&mut driver.paused, false),
                std::mem::replace(&mut driver.unsure, ending),
            );
            (before, driver.wishes)
        });
        let started = channel.start().is_ok();
        self.wished(device, wishes, started, |driver| {
            (driver.paused, driver.unsure) = before;
        });
        if !started {
            return false;
        }
        self.note(Some(device), "start", 0);
        true
    }

    /// Writes down that the channel took a wish to pause or start, or takes back what was written down of one that it refused.
    /// An interrupt in the middle of the call may have wished otherwise: then the last word is not known, or its own.
    fn wished(&self, device: usize, wishes: u64, taken: bool, undo: impl FnOnce(&mut Driver)) {
        self.device(device, |device| {
            let driver = &mut device.driver;
            let alone = driver.wishes == wishes;
            match taken {
                true => {
                    driver.wishes += 1;
                    driver.unsure |= !alone;
                }
                false if alone => undo(driver),
                false => {}
            }
        });
    }

    fn create_gpadl(&self, device: usize, level: Level) -> bool {
        let few = self.device(device, |device| device.driver.gpadls.len() < 3);
        let Some(channel) = self
            .channel(device)
            .filter(|_| few && level == Level::Passive)
        else {
            return false;
        };
        let pages = self.dice(|dice| dice.between(1, 40) as usize);
        let Ok(creating) = channel.allocate_gpadl(pages) else {
            return false;
        };
        self.note(Some(device), "create GPADL", pages as u64);
        self.wait(device, Waiting::Created(Wait::new(creating)));
        true
    }

    fn delete_gpadl(&self, device: usize) -> bool {
        let Some(gpadl) = self.device(device, |device| device.driver.gpadls.pop()) else {
            return false;
        };
        self.note(Some(device), "delete GPADL", gpadl.handle().0.into());
        if self.dice(|dice| dice.one_in(2)) {
            self.wait(device, Waiting::Deleted(Wait::new(gpadl.delete())));
        } else {
            drop(gpadl);
        }
        true
    }

    /// A request, or a message whose sender waits: with a time limit, or without.
    fn request(&self, device: usize) -> bool {
        let one_way = self.device(device, |device| device.driver.config.one_way);
        let Some(channel) = self.channel(device).filter(|_| !one_way) else {
            return false;
        };
        let (words, timeout, delivery, pages) = self.dice(|dice| {
            let timeout = match dice.below(4) {
                0 => Timeout::Never,
                1 => Timeout::After(0),
                _ => Timeout::After(dice.between(1, 100_000)),
            };
            (length(dice), timeout, dice.one_in(4), dice.below(3))
        });
        let pages = (!delivery && pages > 0)
            .then(|| self.machine.share_pages(pages).ok())
            .flatten();
        let page = pages.as_ref().map(|pages| pages.first_page());
        let kind = if delivery {
            Kind::Delivery
        } else {
            Kind::Request
        };
        let until = match timeout {
            Timeout::Never => u64::MAX,
            Timeout::After(time) | Timeout::At(time) => self.now() + time,
        };
        let mut external = ExternalData::new();
        if let Some(pages) = pages {
            let whole = 0..pages.len();
            assert!(
                external.push(pages, whole).is_ok(),
                "whole pages can be lent"
            );
        }
        let number = self.begin_send(device, kind, page, until);
        self.note(Some(device), "request", number);
        let bytes = data(device as u64, number, words);
        let wait = Wait::new(if delivery {
            channel.deliver(&bytes, timeout)
        } else {
            channel.request(&bytes, external, timeout)
        });
        self.accepted(device, number);
        self.wait(
            device,
            Waiting::Request {
                number,
                kind,
                until,
                page,
                wait,
            },
        );
        true
    }

    /// A request whose sender waits at PASSIVE and serves the stack meanwhile.
    fn send_synchronously(&self, device: usize) -> bool {
        let one_way = self.device(device, |device| device.driver.config.one_way);
        let Some(channel) = self.channel(device).filter(|_| !one_way) else {
            return false;
        };
        let (words, time) = self.dice(|dice| (length(dice), dice.between(1, 100_000)));
        let until = self.now() + time;
        let number = self.begin_send(device, Kind::Request, None, until);
        self.note(Some(device), "synchronous request", number);
        let mut answer = [0; LONGEST];
        let result = channel.send_synchronous_request(
            &data(device as u64, number, words),
            ExternalData::new(),
            Timeout::At(until),
            &mut answer,
        );
        self.accepted(device, number);
        match result {
            Ok(length) => {
                let (spoilt, answered) = self.device(device, |device| {
                    (device.host.spoilt, device.host.answered.contains(&number))
                });
                if !spoilt {
                    assert!(
                        answered,
                        "request {number} ends, and the host has not answered it"
                    );
                    assert_eq!(
                        answer.get(..length),
                        Some(&*data(0xA, number, length / 8)),
                        "the answer is request {number}'s own"
                    );
                }
                self.note(Some(device), "answered at once", number);
            }
            Err(RequestError::AnswerTooLong { .. }) => {
                let spoilt = self.device(device, |device| device.host.spoilt);
                assert!(spoilt, "no host answers at such length");
            }
            Err(error) => self.request_failed(device, number, until, error),
        }
        true
    }

    /// Gives a request up.
    fn give_up(&self, device: usize) -> bool {
        let request = self.device(device, |device| {
            let waiting = &mut device.driver.waiting;
            let at = waiting
                .iter()
                .position(|waiting| matches!(waiting, Waiting::Request { .. }))?;
            let Waiting::Request { number, wait, .. } = waiting.swap_remove(at) else {
                return None;
            };
            if let Some(entry) = device.driver.entry(number) {
                entry.given_up = true;
            }
            Some((number, wait))
        });
        let Some((number, wait)) = request else {
            return false;
        };
        self.note(Some(device), "give up", number);
        drop(wait);
        true
    }

    fn try_send(&self, device: usize) -> bool {
        let Some(channel) = self.channel(device) else {
            return false;
        };
        let words = self.dice(length);
        let number = self.begin_send(device, Kind::Try, None, u64::MAX);
        self.note(Some(device), "try to send", number);
        match channel.try_send(&data(device as u64, number, words)) {
            Ok(()) => self.accepted(device, number),
            Err(
                RequestError::NotQueued
                | RequestError::Removed(_)
                | RequestError::Send(SendFailure::NotOpen),
            ) => {
                self.take_back(device, number);
            }
            Err(RequestError::Send(SendFailure::Ring(error))) => {
                let lawful = self.device(device, |device| device.host.lawful);
                assert!(!lawful, "{error} for no reason");
                self.take_back(device, number);
            }
            Err(error) => panic!("packet {number} cannot be tried: {error}"),
        }
        true
    }

    /// A request is over.
    fn on_request(
        &self,
        device: usize,
        number: u64,
        kind: Kind,
        until: u64,
        result: Result<Answer, RequestError>,
    ) {
        self.note(
            Some(device),
            if result.is_ok() {
                "answered"
            } else {
                "not answered"
            },
            number,
        );
        let error = match result {
            Ok(answer) => {
                // It may be looked at when the channel has been opened anew.
                let (spoilt, answered) = self.device(device, |device| {
                    (device.host.spoilt, device.host.answered.contains(&number))
                });
                if !spoilt && kind == Kind::Request {
                    assert!(
                        answered,
                        "request {number} ends, and the host has not answered it"
                    );
                    assert_eq!(
                        &*answer,
                        data(0xA, number, answer.len() / 8),
                        "the answer is request {number}'s own"
                    );
                }
                assert!(kind == Kind::Request || answer.is_empty());
                drop(answer);
                return;
            }
            Err(error) => error,
        };
        self.request_failed(device, number, until, error);
    }

    /// Looks whether a request may end like this.
    fn request_failed(&self, device: usize, number: u64, until: u64, error: RequestError) {
        self.note(Some(device), "failed", number);
        self.device(device, |device| {
            if let Some(entry) = device.driver.entry(number) {
                entry.given_up = true;
            }
        });
        match error {
            RequestError::Cancelled => assert!(
                self.now() >= until,
                "request {number} is cancelled before its time is over"
            ),
            RequestError::Removed(reason) => self.check_reason(device, reason, true),
            RequestError::NotQueued
            | RequestError::Allocate(_)
            | RequestError::Send(SendFailure::NotOpen) => {
                self.take_back(device, number);
            }
            RequestError::Send(SendFailure::Ring(error)) => {
                let spoilt = self.device(device, |device| device.host.spoilt);
                assert!(spoilt, "{error} for no reason");
            }
            other => panic!("request {number} fails: {other}"),
        }
    }

    fn builder(&self, device: usize) -> ChannelBuilder {
        let (config, instance) =
            self.device(device, |device| (device.driver.config, device.instance));
        let mut builder = ChannelBuilder::new(INTERFACE)
            .instance(instance)
            .friendly_name("simulated")
            .ring_pages(config.rings.0, config.rings.1)
            .maximum_packet_size(LONGEST)
            .maximum_packet_count(config.packets)
            .maximum_external_data(4 * PAGE_SIZE, 2)
            .transaction_quota(config.quota)
            .batch_budget(config.budget);
        if config.passive {
            builder = builder.incoming_processing_at_passive();
        }
        if config.paused {
            builder = builder.start_paused();
        }
        let worlds: [_; 8] = std::array::from_fn(|_| self.me());
        let [
            packets,
            batches,
            opened,
            started,
            post,
            suspend,
            closed,
            failure,
        ] = worlds;
        builder
            .process_packet_callbacks(
                move |_, packet| match packets.upgrade() {
                    Some(world) => world.on_packet(device, packet),
                    None => packet.complete(&[]),
                },
                move |_, count| {
                    if let Some(world) = batches.upgrade() {
                        world.on_batch(device, count);
                    }
                },
            )
            .opened(move |channel| match opened.upgrade() {
                Some(world) => world.on_opened(device, channel),
                None => Err(Refused("the world is gone")),
            })
            .started(move |_| {
                if let Some(world) = started.upgrade() {
                    world.on_started(device);
                }
            })
            .post_started(move |_| {
                if let Some(world) = post.upgrade() {
                    world.on_post_started(device);
                }
            })
            .suspend(move |_| {
                if let Some(world) = suspend.upgrade() {
                    world.on_suspend(device);
                }
            })
            .closed(move |_| {
                if let Some(world) = closed.upgrade() {
                    world.on_closed(device);
                }
            })
            .failure(move |_, error| {
                if let Some(world) = failure.upgrade() {
                    world.on_failure(device, error);
                }
            })
    }

    /// A callback runs: the driver may do something else there, too.
    fn in_callback(&self, device: usize) {
        if self.is_quiet() {
            return;
        }
        let (what, other) = self.with(|state| {
            let count = state.devices.len();
            (state.dice.below(8), state.dice.below(count))
        });
        let done = match what {
            0 => self.drive_deeper(other),
            1 => self.deeper(|| self.host_acts(device)),
            _ => false,
        };
        if done {
            self.count();
        }
    }

    fn on_opened(&self, device: usize, channel: &Channel) -> Result<(), Refused> {
        let before = self.phase(device, Phase::Opened);
        assert_eq!(before, Phase::Enabled, "opened runs first, and once");
        assert_eq!(channel.state(), State::Opening);
        self.at_passive("opened");
        self.note(Some(device), "opened", 0);
        self.in_callback(device);
        if !self.is_quiet() && self.dice(|dice| dice.one_in(25)) {
            self.note(Some(device), "the driver refuses", 0);
            self.device(device, |device| {
                device.driver.excuses.refused = true;
                // No other callback but failure may come now.
                device.driver.phase = Phase::Closed;
            });
            return Err(Refused("not today"));
        }
        Ok(())
    }

    fn on_started(&self, device: usize) {
        let before = self.phase(device, Phase::Starting);
        assert!(
            matches!(before, Phase::Opened | Phase::Suspended),
            "started comes after opened or suspend: {before:?}"
        );
        self.at_passive("started");
        self.note(Some(device), "started", 0);
        self.in_callback(device);
        let before = self.phase(device, Phase::Running { post: false });
        assert_eq!(before, Phase::Starting, "nothing comes during started");
    }

    fn on_post_started(&self, device: usize) {
        let before = self.phase(device, Phase::Running { post: true });
        assert_eq!(
            before,
            Phase::Running { post: false },
            "post-started comes once, after started"
        );
        self.at_passive("post-started");
        self.note(Some(device), "post-started", 0);
        self.in_callback(device);
    }

    fn on_suspend(&self, device: usize) {
        let before = self.phase(device, Phase::Suspended);
        assert_eq!(
            before,
            Phase::Running { post: true },
            "suspend comes while the channel runs"
        );
        self.at_passive("suspend");
        self.note(Some(device), "suspend", 0);
        self.in_callback(device);
    }

    fn on_closed(&self, device: usize) {
        let before = self.phase(device, Phase::Closed);
        assert!(
            matches!(before, Phase::Suspended | Phase::Opened),
            "closed comes after suspend, or when nothing flowed: {before:?}"
        );
        self.at_passive("closed");
        self.check_drained(device);
        self.note(Some(device), "closed", 0);
        self.in_callback(device);
        // The last moment to take GPADLs back. A driver that forgets is a bug that does no harm.
        let forgets = !self.is_quiet() && self.dice(|dice| dice.one_in(4));
        while !forgets && self.delete_gpadl(device) {}
    }

    fn on_failure(&self, device: usize, error: ChannelError) {
        let before = self.phase(device, Phase::Failed);
        assert!(
            matches!(before, Phase::Enabled | Phase::Closed),
            "failure comes last: {before:?}"
        );
        assert!(!error.is_orderly(), "{error} is no failure");
        self.at_passive("failure");
        self.note(Some(device), "failure", 0);
        self.check_reason(device, error, false);
    }

    fn phase(&self, device: usize, next: Phase) -> Phase {
        self.device(device, |device| {
            std::mem::replace(&mut device.driver.phase, next)
        })
    }

    fn at_passive(&self, callback: &str) {
        assert_eq!(
            self.machine.level(),
            Level::Passive,
            "{callback} runs at PASSIVE"
        );
    }

    /// Whether this may be the reason of a channel's end.
    fn check_reason(&self, device: usize, error: ChannelError, late: bool) {
        let messages = self.plan.messages;
        let allowed = self.with(|state| {
            let excuses = state.excuses;
            let device = &state.devices[device];
            let own = if late {
                device.driver.excuses.or(device.driver.past)
            } else {
                device.driver.excuses
            };
            match error {
                ChannelError::Disabled => own.disabled || late,
                ChannelError::Rescinded => own.rescinded || messages != Messages::Reliable,
                ChannelError::Unloaded => excuses.left || messages == Messages::Forged,
                ChannelError::Ring(_) | ChannelError::Pipe { .. } => late || !device.host.lawful,
                ChannelError::Packet(_) => own.failed || !device.host.lawful,
                ChannelError::Refused(_) => own.refused,
                // A request made while the channel is being paused.
                ChannelError::Pausing => late,
                ChannelError::NoMemory(_) => excuses.memory,
                _ => {
                    excuses.refused
                        || excuses.slow
                        || excuses.left
                        || own.rescinded
                        || messages != Messages::Reliable
                }
            }
        });
        assert!(allowed, "nothing explains that the channel ends: {error}");
    }

    fn on_packet(&self, device: usize, packet: ReceivedPacket<'_>) {
        let level = self.machine.level();
        assert_eq!(
            packet.level(),
            level,
            "the level is what the driver is told"
        );
        let (number, epoch, again) = (
            word(packet.payload(), 0),
            word(packet.payload(), 1),
            self.received(device, &packet),
        );
        self.note(Some(device), "packet", number);
        self.in_callback(device);
        let fate = if self.is_quiet() {
            Fate::Complete
        } else {
            self.dice(|dice| {
                let fail = u64::from(dice.one_in(8));
                dice.pick(&[
                    (60, Fate::Complete),
                    (30, Fate::Hold),
                    (if again { 1 } else { 8 }, Fate::Defer),
                    (1, Fate::Drop),
                    (fail, Fate::Fail),
                ])
            })
        };
        match fate {
            Fate::Complete => {
                let bytes = self.completes(device, epoch, number, false);
                packet.complete(&bytes);
            }
            Fate::Hold => {
                let packet = packet.hold();
                self.device(device, |device| {
                    device.driver.held.push(Held {
                        life: device.driver.life,
                        epoch,
                        number,
                        packet,
                    });
                });
            }
            Fate::Defer => {
                self.note(Some(device), "deferred", number);
                self.device(device, |device| {
                    device.driver.batch -= 1;
                    device.driver.received -= 1;
                    device.driver.deferred = Some(number);
                });
                packet.defer_to_passive();
            }
            Fate::Drop => {
                self.note(Some(device), "dropped", number);
                let _ = self.completes(device, epoch, number, true);
                drop(packet);
            }
            Fate::Fail => {
                self.note(Some(device), "failed", number);
                self.device(device, |device| device.driver.excuses.failed = true);
                packet.fail("not this one");
            }
        }
    }

    /// Checks that a packet comes where it must. Returns whether it comes again.
    fn received(&self, device: usize, packet: &ReceivedPacket<'_>) -> bool {
        let payload = packet.payload();
        let (number, epoch) = (word(payload, 0), word(payload, 1));
        self.device(device, |device| {
            let (driver, host) = (&mut device.driver, &device.host);
            assert!(
                matches!(driver.phase, Phase::Running { .. }),
                "a packet is delivered while the channel is {:?}",
                driver.phase
            );
            driver.batch += 1;
            let again = driver.deferred.take();
            let expected = driver.received;
            driver.received += 1;
            if !host.lawful {
                return again.is_some();
            }
            assert_eq!(epoch, host.epoch, "a packet of another opening");
            assert_eq!(number, expected, "packets come in order, each once");
            assert_eq!(
                payload,
                data(epoch, number, payload.len() / 8),
                "packet {number} comes as it was sent"
            );
            if again.is_some() {
                assert_eq!(packet.level(), Level::Passive, "deferred to PASSIVE");
            }
            let life = driver.life;
            let held = driver.held.iter().filter(|held| held.life == life).count();
            assert!(
                held < driver.config.quota as usize,
                "the quota is {}, and the driver has {held} packets",
                driver.config.quota
            );
            again.is_some()
        })
    }

    /// Notes that a packet is about to be completed, and with what.
    fn completes(&self, device: usize, epoch: u64, number: u64, dropped: bool) -> Vec<u8> {
        self.with(|state| {
            let words = state.dice.between(2, 12) as usize;
            let device = &mut state.devices[device];
            let bytes = if dropped {
                Vec::new()
            } else {
                data(0xC, number, words)
            };
            if epoch == device.host.epoch {
                device.driver.completions.insert(number, bytes.clone());
            }
            bytes
        })
    }

    fn on_batch(&self, device: usize, count: u32) {
        self.note(Some(device), "processing complete", count.into());
        let (phase, batch) = self.device(device, |device| {
            let driver = &mut device.driver;
            (driver.phase, std::mem::take(&mut driver.batch))
        });
        assert!(
            matches!(phase, Phase::Running { .. }),
            "processing-complete runs while the channel is {phase:?}"
        );
        assert!(count > 0, "processing-complete of nothing");
        assert_eq!(count, batch, "processing-complete tells of every packet");
        self.in_callback(device);
    }

    fn allocate(&self, device: usize) -> bool {
        let few = self.device(device, |device| device.driver.spare.len() < 4);
        let Some(packet) = self
            .channel(device)
            .filter(|_| few)
            .and_then(|channel| channel.allocate_packet().ok())
        else {
            return false;
        };
        self.note(Some(device), "allocate", 0);
        self.device(device, |device| device.driver.spare.push(packet));
        true
    }

    fn discard(&self, device: usize) -> bool {
        let packet = self.device(device, |device| device.driver.spare.pop());
        packet.is_some()
    }

    /// Sends a packet of any kind: this one, one that was allocated before, or a new one.
    fn send(&self, device: usize, packet: Option<OutgoingPacket>) -> bool {
        let Some(channel) = self.channel(device) else {
            return false;
        };
        let packet = packet.or_else(|| {
            let spare = self.device(device, |device| device.driver.spare.pop());
            // Packets belong to the channel that they were allocated on.
            spare.or_else(|| channel.allocate_packet().ok())
        });
        let Some(mut packet) = packet else {
            return false;
        };
        let one_way = self.device(device, |device| device.driver.config.one_way);
        let (kind, words, pages) = self.dice(|dice| {
            let transactions = u64::from(!one_way);
            (
                dice.pick(&[
                    (5, Kind::Message),
                    (5 * transactions, Kind::Transaction),
                    (2 * transactions, Kind::External),
                ]),
                length(dice),
                dice.between(1, 3) as usize,
            )
        });
        let pages = (kind == Kind::External)
            .then(|| self.machine.share_pages(pages).ok())
            .flatten();
        let kind = if kind == Kind::External && pages.is_none() {
            Kind::Message
        } else {
            kind
        };
        let page = pages.as_ref().map(|pages| pages.first_page());
        let number = self.begin_send(device, kind, page, u64::MAX);
        self.note(Some(device), "send", number);
        let world = self.me();
        packet.set_completion_routine(Arc::new(move |packet, result| {
            if let Some(world) = world.upgrade() {
                world.on_ended(device, number, packet, result);
            }
        }));
        let bytes = data(device as u64, number, words);
        let result = match (kind, pages) {
            (Kind::Transaction, _) => packet.send_transaction(&bytes),
            (Kind::External, Some(pages)) => {
                let mut external = ExternalData::new();
                let whole = 0..pages.len();
                assert!(
                    external.push(pages, whole).is_ok(),
                    "whole pages can be lent"
                );
                packet.send_with_external_data(&bytes, external, SendFlags::default())
            }
            _ => packet.send(&bytes),
        };
        match result {
            Ok(()) => {
                self.accepted(device, number);
                true
            }
            Err(error) => {
                self.refused(device, number, error.reason);
                // Not as it was: it goes aside.
                drop(error.packet);
                false
            }
        }
    }

    fn send_anonymous(&self, device: usize) -> bool {
        let Some(channel) = self.channel(device) else {
            return false;
        };
        let words = self.dice(length);
        let number = self.begin_send(device, Kind::Anonymous, None, u64::MAX);
        self.note(Some(device), "send without a routine", number);
        let accepted = channel
            .send_message(&data(device as u64, number, words))
            .is_ok();
        if accepted {
            self.accepted(device, number);
        } else {
            self.take_back(device, number);
        }
        accepted
    }

    fn begin_send(&self, device: usize, kind: Kind, page: Option<PageNumber>, until: u64) -> u64 {
        self.with(|state| {
            state.tick += 1;
            let begun = state.tick;
            let driver = &mut state.devices[device].driver;
            let number = driver.next;
            driver.next += 1;
            driver.order.push(Order {
                number,
                kind,
                begun,
                ended: u64::MAX,
                given_up: false,
                until,
                sure: !matches!(kind, Kind::Request | Kind::Delivery),
            });
            if matches!(kind, Kind::Message | Kind::Transaction | Kind::External) {
                driver.live.insert(number, Live { kind, page });
            }
            number
        })
    }

    /// A send has returned.
    fn accepted(&self, device: usize, number: u64) {
        self.with(|state| {
            state.tick += 1;
            let now = state.tick;
            let order = &mut state.devices[device].driver.order;
            if let Some(entry) = order.iter_mut().find(|entry| entry.number == number) {
                entry.ended = now;
            }
        });
    }

    fn take_back(&self, device: usize, number: u64) -> Option<Live> {
        self.device(device, |device| {
            let driver = &mut device.driver;
            driver.order.retain(|entry| entry.number != number);
            driver.live.remove(&number)
        })
    }

    fn refused(&self, device: usize, number: u64, reason: SendFailure) {
        self.note(Some(device), "refused", number);
        let live = self.take_back(device, number);
        assert!(live.is_some(), "a refused packet {number} has ended, too");
        let lawful = self.device(device, |device| device.host.lawful);
        match reason {
            SendFailure::NotOpen => {}
            SendFailure::Ring(_) => assert!(!lawful, "{reason} for no reason"),
            _ => panic!("packet {number} is refused: {reason}"),
        }
    }

    /// The host has read packet `number`: no packet sent before it may come after it.
    pub fn check_order(&self, device: usize, number: u64) {
        let now = self.now();
        self.with(|state| {
            let left = state.excuses.left;
            let device = &mut state.devices[device];
            let (excuses, lawful) = (device.driver.excuses, device.host.lawful);
            if device.driver.over == device.host.epoch {
                return;
            }
            let order = &mut device.driver.order;
            let Some(at) = order.iter().position(|entry| entry.number == number) else {
                panic!(
                    "the host has packet {number}, which was not sent, has failed, or came before"
                );
            };
            let begun = order[at].begun;
            // Requests are given up as soon as the channel has to end.
            let ending = left || excuses.rescinded || excuses.disabled || excuses.failed || !lawful;
            let overtaken = order.iter().find(|entry| {
                let waits = matches!(entry.kind, Kind::Request | Kind::Delivery);
                let gone = waits && (ending || now >= entry.until) || entry.given_up;
                entry.ended < begun && entry.sure && !gone
            });
            if let Some(entry) = overtaken {
                panic!("packet {number} has overtaken packet {entry:?}");
            }
            order.remove(at);
        });
    }

    /// A packet has ended.
    fn on_ended(
        &self,
        device: usize,
        number: u64,
        mut packet: OutgoingPacket,
        result: Result<&[u8], PacketError>,
    ) {
        let Some(live) = self.device(device, |device| device.driver.live.remove(&number)) else {
            panic!("packet {number} ends, and it was not sent or has ended before");
        };
        self.note(
            Some(device),
            if result.is_ok() { "sent" } else { "not sent" },
            number,
        );
        match result {
            Ok(answer) => self.check_answer(device, number, live.kind, answer),
            Err(error) => self.check_failure(device, number, error),
        }
        drop(packet.take_external_data());
        self.check_memory(device, number, live.page);
        let fate = if self.is_quiet() {
            0
        } else {
            self.dice(|dice| dice.below(8))
        };
        match fate {
            1 if self.deeper_allowed() => {
                self.send_deeper(device, packet);
            }
            2 => self.device(device, |device| device.driver.spare.push(packet)),
            _ => drop(packet),
        }
        self.in_callback(device);
    }

    fn check_answer(&self, device: usize, number: u64, kind: Kind, answer: &[u8]) {
        let phase = self.device(device, |device| device.driver.phase);
        assert!(
            matches!(
                phase,
                Phase::Running { .. } | Phase::Starting | Phase::Suspended
            ),
            "packet {number} enters the ring while the channel is {phase:?}"
        );
        if kind == Kind::Message {
            assert!(answer.is_empty(), "nobody answers a message");
            return;
        }
        let (lawful, answered) = self.device(device, |device| {
            (device.host.lawful, device.host.answered.contains(&number))
        });
        if lawful {
            assert!(
                answered,
                "packet {number} ends, and the host has not answered it"
            );
            assert_eq!(
                answer,
                data(0xA, number, answer.len() / 8),
                "the answer is packet {number}'s own"
            );
        }
    }

    fn check_failure(&self, device: usize, number: u64, error: PacketError) {
        // A host that does not know of the channel's end yet may read it still.
        self.device(device, |device| {
            if let Some(entry) = device.driver.entry(number) {
                entry.given_up = true;
            }
        });
        match error {
            PacketError::Removed(reason) => {
                let state = self.state_of(device);
                assert!(
                    matches!(state, State::Closing | State::Enabled | State::Disabled),
                    "packet {number} fails while the channel is {state}"
                );
                self.check_reason(device, reason, false);
            }
        }
    }

    /// Completes a packet that the driver holds.
    fn complete(&self, device: usize) -> bool {
        let held = self.with(|state| {
            let held = &mut state.devices[device].driver.held;
            (!held.is_empty()).then(|| held.swap_remove(state.dice.below(held.len())))
        });
        let Some(held) = held else { return false };
        self.note(Some(device), "complete", held.number);
        let bytes = self.completes(device, held.epoch, held.number, false);
        held.packet.complete(&bytes);
        true
    }

    /// Drops a packet that the driver holds: a bug of the driver, and it completes all the same.
    fn forget(&self, device: usize) -> bool {
        let Some(held) = self.device(device, |device| device.driver.held.pop()) else {
            return false;
        };
        self.note(Some(device), "drop", held.number);
        let _ = self.completes(device, held.epoch, held.number, true);
        drop(held.packet);
        true
    }

    /// Completes all that the driver holds.
    pub fn driver_completes(&self, device: usize) -> bool {
        let mut busy = false;
        while self.complete(device) {
            busy = true;
        }
        busy
    }

    fn quota(&self, device: usize) -> bool {
        let Some(channel) = self.channel(device) else {
            return false;
        };
        let quota = self.dice(|dice| dice.between(1, 10) as u32);
        self.note(Some(device), "quota", quota.into());
        channel.set_transaction_quota(quota);
        true
    }

    fn passive(&self, device: usize) -> bool {
        let Some(channel) = self.channel(device) else {
            return false;
        };
        let passive = self.dice(|dice| dice.one_in(2));
        self.note(Some(device), "at PASSIVE:", passive.into());
        channel.set_incoming_processing_at_passive(passive);
        true
    }

    /// Polls what waits, if it was woken, or for no reason.
    pub fn poll(&self, device: usize) -> bool {
        let odd = !self.is_quiet() && self.dice(|dice| dice.one_in(8));
        let due: Vec<Waiting> = self.device(device, |device| {
            let waiting = &mut device.driver.waiting;
            waiting
                .extract_if(.., |waiting| waiting.is_due(odd))
                .collect()
        });
        let busy = !due.is_empty();
        for waiting in due {
            self.poll_one(device, waiting);
        }
        busy
    }

    fn poll_one(&self, device: usize, mut waiting: Waiting) {
        match &mut waiting {
            Waiting::Disabled(wait) => match wait.poll() {
                Poll::Ready(Ok(disabled)) => {
                    self.note(Some(device), "the channel is back", 0);
                    assert_eq!(disabled.channel().state(), State::Disabled);
                    self.device(device, |device| device.driver.disabled = Some(disabled));
                    return;
                }
                Poll::Ready(Err(error)) => panic!("nobody is in a callback here: {error}"),
                Poll::Pending => {}
            },
            Waiting::Paused(channel, wait) => {
                if wait.poll().is_ready() {
                    let state = channel.state();
                    self.note(Some(device), "the pause is there", 0);
                    let started = self.device(device, |device| {
                        !device.driver.paused || device.driver.unsure
                    });
                    assert!(
                        started
                            || !self.is_quiet()
                            || matches!(state, State::Paused | State::Enabled | State::Disabled),
                        "paused, and {state}"
                    );
                    return;
                }
            }
            Waiting::Deleted(wait) => {
                if wait.poll().is_ready() {
                    self.note(Some(device), "the GPADL is deleted", 0);
                    return;
                }
            }
            Waiting::Created(wait) => match wait.poll() {
                Poll::Ready(Ok(gpadl)) => {
                    self.note(Some(device), "GPADL", gpadl.handle().0.into());
                    self.device(device, |device| device.driver.gpadls.push(gpadl));
                    return;
                }
                Poll::Ready(Err(_)) => {
                    self.note(Some(device), "no GPADL", 0);
                    return;
                }
                Poll::Pending => {}
            },
            Waiting::Request {
                number,
                kind,
                until,
                wait,
                page,
            } => {
                if let Poll::Ready(result) = wait.poll() {
                    let (number, kind, until, page) = (*number, *kind, *until, *page);
                    self.on_request(device, number, kind, until, result);
                    self.check_memory(device, number, page);
                    return;
                }
                let number = *number;
                self.device(device, |device| {
                    if let Some(entry) = device.driver.entry(number) {
                        entry.sure = true;
                    }
                });
            }
        }
        self.wait(device, waiting);
    }

    /// The memory of a packet that has ended is gone only if the host has let go of it.
    fn check_memory(&self, device: usize, number: u64, page: Option<PageNumber>) {
        // A host that answers what it did not mean to has let go.
        let spoilt = self.device(device, |device| device.host.spoilt);
        if let Some(page) = page
            && !spoilt
            && self.plan.messages != Messages::Forged
            && self.host_holds(device, number)
        {
            assert!(
                self.machine.memory().find(page).is_some(),
                "packet {number}'s memory is given back while the host may write to it"
            );
        }
    }

    /// The channel goes on only when the driver has completed all that it held; nobody waits for it when the guest leaves.
    fn check_drained(&self, device: usize) {
        let held = self.with(|state| {
            let left = state.excuses.left;
            let driver = &state.devices[device].driver;
            let mine = |held: &&Held| held.life == driver.life && !left;
            driver.held.iter().filter(mine).count()
        });
        assert_eq!(held, 0, "the driver still has packets");
    }

    /// Looks at a channel from outside, between two steps.
    pub fn check_driver(&self, device: usize) {
        let state = self.state_of(device);
        if state == State::Paused {
            self.check_drained(device);
        }
        self.device(device, |device| {
            let driver = &mut device.driver;
            if state != State::Disabled || driver.phase == Phase::Disabled {
                return;
            }
            assert!(
                driver.live.is_empty(),
                "the channel is disabled, and packets have not ended: {:?}",
                driver.live.keys()
            );
            assert!(
                !matches!(
                    driver.phase,
                    Phase::Opened | Phase::Starting | Phase::Running { .. } | Phase::Suspended
                ),
                "the channel is disabled, and the driver was told of it last: {:?}",
                driver.phase
            );
            assert_eq!(driver.batch, 0, "processing-complete is owed");
            driver.phase = Phase::Disabled;
            driver.order.clear();
            driver.over = device.host.epoch;
            driver.paused = driver.config.paused;
        });
    }

    /// What must hold once everything has come to rest.
    pub fn check_rest(&self) {
        let devices = self.with(|state| state.devices.len());
        let connected = matches!(
            self.vmbus.connection(),
            vmbus::ConnectionState::Connected {
                all_offers_delivered: true,
                ..
            }
        );
        for device in 0..devices {
            let state = self.state_of(device);
            let reliable = self.plan.messages == Messages::Reliable;
            let (offered, lawful) = self.device(device, |device| {
                (device.host.id.is_some(), device.host.lawful)
            });
            let settled = match state {
                State::Disabled | State::Active | State::Paused => true,
                State::Enabled => !offered || !connected,
                _ => false,
            };
            assert!(
                settled || !reliable,
                "channel {device} stays {state} when everything is at rest: {:?}",
                self.vmbus.snapshot()
            );
            self.device(device, |device| {
                for waiting in &device.driver.waiting {
                    let (what, stays) = match waiting {
                        Waiting::Disabled(_) => ("end", state != State::Disabled),
                        Waiting::Paused(..) => ("pause", !settled),
                        Waiting::Request { .. } => {
                            ("answer", !matches!(state, State::Active | State::Disabled))
                        }
                        Waiting::Created(_) => ("GPADL", !settled),
                        Waiting::Deleted(_) => ("GPADL's end", !settled),
                    };
                    assert!(
                        stays || !lawful || !reliable,
                        "who waits for the channel's {what} is not woken: it is {state}"
                    );
                }
                let flows = match state {
                    State::Active => !device.driver.paused,
                    State::Paused => device.driver.paused,
                    _ => true,
                };
                assert!(
                    flows || !reliable || device.driver.unsure,
                    "the channel is {state}, and the driver wants otherwise"
                );
            });
            let there = self.device(device, |device| device.host.open);
            if state != State::Active || !lawful || !there || self.plan.messages == Messages::Forged
            {
                continue;
            }
            self.device(device, |device| {
                let driver = &device.driver;
                assert!(
                    driver.live.is_empty(),
                    "packets never end: {:?}",
                    driver.live.keys()
                );
                let left: Vec<u64> = driver
                    .order
                    .iter()
                    .filter(|entry| !entry.given_up)
                    .map(|entry| entry.number)
                    .collect();
                assert!(left.is_empty(), "the host never gets packets {left:?}");
                assert_eq!(driver.deferred, None, "a deferred packet never comes again");
                assert_eq!(driver.batch, 0, "processing-complete is owed");
            });
            self.check_host_at_rest(device);
        }
    }

    /// The driver gives everything back.
    pub fn drop_packets(&self) {
        let devices = self.with(|state| state.devices.len());
        for device in 0..devices {
            self.driver_completes(device);
            let left = self.device(device, |device| {
                let driver = &mut device.driver;
                (
                    std::mem::take(&mut driver.spare),
                    std::mem::take(&mut driver.waiting),
                    std::mem::take(&mut driver.gpadls),
                )
            });
            drop(left);
        }
    }

    fn deeper_allowed(&self) -> bool {
        !self.is_quiet() && self.is_shallow()
    }

    fn drive_deeper(&self, device: usize) -> bool {
        self.deeper(|| self.drive(device, Level::Dispatch))
    }

    fn send_deeper(&self, device: usize, packet: OutgoingPacket) -> bool {
        self.deeper(|| self.send(device, Some(packet)))
    }
}
