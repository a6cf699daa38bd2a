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
    Channel, ChannelBuilder, ChannelError, EnabledChannel, ExternalData, IncomingPacket,
    OutgoingPacket, PacketError, ReceivedPacket, Refused, SendFailure, SendFlags, State,
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
}

/// A packet that the host has yet to read. Two sends of which one interrupts the other may end up in either order.
#[derive(Clone, Copy)]
struct Order {
    number: u64,
    kind: Kind,
    begun: u64,
    ended: u64,
}

struct Held {
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

type Waiting = (Pin<Box<dyn Future<Output = ()> + Send>>, Arc<Flag>);

/// The driver of one channel.
pub struct Driver {
    config: Config,
    enabled: Option<Arc<EnabledChannel>>,
    /// Waits for the channel's end.
    waiting: Option<Waiting>,
    phase: Phase,
    pub excuses: Excuses,
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
            },
            enabled: None,
            waiting: None,
            phase: Phase::Disabled,
            excuses: Excuses::default(),
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
        self.order
            .retain(|entry| entry.kind == Kind::Anonymous || live.contains_key(&entry.number));
        self.received = 0;
        self.deferred = None;
        self.completions.clear();
    }

    /// With what packet `number` was completed, if it was.
    pub fn completion(&self, number: u64) -> Option<Vec<u8>> {
        self.completions.get(&number).cloned()
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
    DropChannel,
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
        self.device(device, |device| {
            device
                .driver
                .enabled
                .as_ref()
                .map(|enabled| enabled.channel().clone())
        })
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
                (passive, Act::DropChannel),
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
            Act::DropChannel => self.drop_channel(device),
        }
    }

    fn enabled_now(&self, device: usize) -> bool {
        self.state_of(device) != State::Disabled
    }

    /// Enables the channel, if it is Disabled and its driver knows.
    pub fn enable(&self, device: usize) -> bool {
        let ready = self.device(device, |device| device.driver.phase == Phase::Disabled);
        if !ready {
            return false;
        }
        self.note(Some(device), "enable", 0);
        let builder = self.builder(device);
        let before = self.device(device, |device| {
            let driver = &mut device.driver;
            driver.phase = Phase::Enabled;
            driver.excuses = Excuses {
                rescinded: device.host.id.is_none(),
                ..Excuses::default()
            };
            driver.batch = 0;
            (driver.enabled.take(), driver.waiting.take())
        });
        drop(before);
        let enabled = match builder.enable(self.vmbus.client()) {
            Ok(enabled) => Arc::new(enabled),
            Err(error) => panic!("the configuration is sound: {error}"),
        };
        let whole = enabled.clone();
        let waiting: Waiting = (
            Box::pin(async move {
                let _ = whole.disabled().await;
            }),
            Arc::new(Flag(AtomicBool::new(true))),
        );
        self.device(device, |device| {
            device.driver.enabled = Some(enabled);
            device.driver.waiting = Some(waiting);
        });
        true
    }

    /// Begins to close the channel.
    pub fn disable(&self, device: usize) {
        let enabled = self.device(device, |device| {
            device.driver.excuses.disabled = true;
            device.driver.enabled.clone()
        });
        self.note(Some(device), "disable", 0);
        if let Some(enabled) = enabled {
            enabled.disable();
        }
    }

    /// Lets go of what owns the channel.
    fn drop_channel(&self, device: usize) -> bool {
        if !self.enabled_now(device) {
            return false;
        }
        // The handle stays reachable through a packet or a callback; here it is kept to look at the state.
        self.disable(device);
        let waiting = self.device(device, |device| device.driver.waiting.take());
        waiting.is_some()
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
    fn in_callback(&self) {
        if self.is_quiet() {
            return;
        }
        let (act, other) = self.with(|state| {
            let count = state.devices.len();
            (state.dice.one_in(6), state.dice.below(count))
        });
        if act && self.drive_deeper(other) {
            self.count();
        }
    }

    fn on_opened(&self, device: usize, channel: &Channel) -> Result<(), Refused> {
        let before = self.phase(device, Phase::Opened);
        assert_eq!(before, Phase::Enabled, "opened runs first, and once");
        assert_eq!(channel.state(), State::Opening);
        self.at_passive("opened");
        self.note(Some(device), "opened", 0);
        self.in_callback();
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
        assert_eq!(before, Phase::Opened, "started comes after opened");
        self.at_passive("started");
        self.note(Some(device), "started", 0);
        self.in_callback();
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
        self.in_callback();
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
        self.in_callback();
    }

    fn on_closed(&self, device: usize) {
        let before = self.phase(device, Phase::Closed);
        assert_eq!(before, Phase::Suspended, "closed comes after suspend");
        self.at_passive("closed");
        self.note(Some(device), "closed", 0);
        self.in_callback();
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
        self.check_reason(device, error);
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
    fn check_reason(&self, device: usize, error: ChannelError) {
        let messages = self.plan.messages;
        let allowed = self.with(|state| {
            let excuses = state.excuses;
            let device = &state.devices[device];
            let own = device.driver.excuses;
            match error {
                ChannelError::Disabled => own.disabled,
                ChannelError::Rescinded => own.rescinded || messages != Messages::Reliable,
                ChannelError::Unloaded => excuses.left || messages == Messages::Forged,
                ChannelError::Ring(_) | ChannelError::Pipe { .. } => !device.host.lawful,
                ChannelError::Packet(_) => own.failed || !device.host.lawful,
                ChannelError::Refused(_) => own.refused,
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
        self.in_callback();
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
            let held = driver.held.len();
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
        self.in_callback();
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
        let (kind, words, pages) = self.dice(|dice| {
            (
                dice.pick(&[
                    (5, Kind::Message),
                    (5, Kind::Transaction),
                    (2, Kind::External),
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
        let number = self.begin_send(device, kind, pages.as_ref().map(|pages| pages.first_page()));
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
        let number = self.begin_send(device, Kind::Anonymous, None);
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

    fn begin_send(&self, device: usize, kind: Kind, page: Option<PageNumber>) -> u64 {
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
            });
            if kind != Kind::Anonymous {
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
        self.device(device, |device| {
            let order = &mut device.driver.order;
            let Some(at) = order.iter().position(|entry| entry.number == number) else {
                panic!(
                    "the host has packet {number}, which was not sent, has failed, or came before"
                );
            };
            let begun = order[at].begun;
            let overtaken = order.iter().find(|entry| entry.ended < begun);
            if let Some(entry) = overtaken {
                panic!("packet {number} has overtaken packet {}", entry.number);
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
        if let Some(page) = live.page
            && self.plan.messages != Messages::Forged
            && self.host_holds(device, number)
        {
            assert!(
                self.machine.memory().find(page).is_some(),
                "packet {number}'s memory is given back while the host may write to it"
            );
        }
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
        self.in_callback();
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
        self.device(device, |device| {
            device.driver.order.retain(|entry| entry.number != number);
        });
        match error {
            PacketError::Removed(reason) => {
                let state = self.state_of(device);
                assert!(
                    matches!(state, State::Closing | State::Enabled | State::Disabled),
                    "packet {number} fails while the channel is {state}"
                );
                self.check_reason(device, reason);
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
        let waiting = self.device(device, |device| {
            let ready = |(_, flag): &mut Waiting| flag.0.swap(false, Ordering::SeqCst) || odd;
            device.driver.waiting.take_if(ready)
        });
        let Some((mut future, flag)) = waiting else {
            return false;
        };
        let waker = Waker::from(flag.clone());
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => {
                self.note(Some(device), "the wait is over", 0);
                assert_eq!(self.state_of(device), State::Disabled);
            }
            Poll::Pending => {
                self.device(device, |device| {
                    device.driver.waiting = Some((future, flag));
                });
            }
        }
        true
    }

    /// Looks at a channel from outside, between two steps.
    pub fn check_driver(&self, device: usize) {
        let state = self.state_of(device);
        let old = self.device(device, |device| {
            let driver = &mut device.driver;
            if state != State::Disabled || driver.phase == Phase::Disabled {
                return Vec::new();
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
            // They belong to a channel that is no more.
            std::mem::take(&mut driver.spare)
        });
        drop(old);
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
                State::Disabled | State::Active => true,
                State::Enabled => !offered || !connected,
                _ => false,
            };
            assert!(
                settled || !reliable,
                "channel {device} stays {state} when everything is at rest: {:?}",
                self.vmbus.snapshot()
            );
            self.device(device, |device| {
                let woken = device
                    .driver
                    .waiting
                    .as_ref()
                    .is_none_or(|_| state != State::Disabled);
                assert!(woken, "who waits for the channel's end is not woken");
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
                let left: Vec<u64> = driver.order.iter().map(|entry| entry.number).collect();
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
                (std::mem::take(&mut driver.spare), driver.waiting.take())
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
