//! One round: a machine, a guest with a few channels, and the scheduler that decides what happens next.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vmbus::bus::Config;
use vmbus::hypervisor::{Hypervisor, Level};
use vmbus::ids::ChannelId;
use vmbus::kmcl::State as ChannelState;
use vmbus::protocol::{Guid, MessageType, Status, Version};
use vmbus::{ConnectionState, Vmbus};
use vmbus_host::bus::{Fault, Profile, Rule};
use vmbus_host::machine::{Guest, Interleave, Machine};

use crate::decisions::{Dice, Trace};
use crate::driver::Driver;
use crate::host::HostEnd;

/// One second in units of 100 ns.
pub const SECOND: u64 = 10_000_000;

/// How deep decisions are taken inside of what decisions led to.
const DEPTH: u32 = 3;

/// What a host finds wrong with messages that were on their way when it took the channel back.
const CROSSED: [&str; 5] = [
    "no such channel",
    "no such GPADL is incomplete",
    "OPEN for a rescinded channel",
    "GPADL for a rescinded channel",
    "the channel is not open",
];

/// What a host finds wrong with messages of a guest that has given up waiting for it.
const TOO_LATE: [&str; 2] = ["no such GPADL", "the channel is not open"];

/// What a host finds wrong with messages that were on their way when the guest made contact anew.
const LEFT: [&str; 3] = [
    "not connected",
    "no such channel",
    "no such GPADL is incomplete",
];

/// What may go wrong with messages in a round.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Messages {
    /// They come in order, early or late.
    Reliable,
    /// They are lost, doubled, and overtake each other.
    Lossy,
    /// The host says things that are not true.
    Forged,
}

/// What a round is like.
#[derive(Clone, Copy)]
pub struct Plan {
    pub messages: Messages,
    /// Whether the host writes garbage into rings.
    pub garbage: bool,
    /// Whether the host stops for good at the end.
    pub dies: bool,
    /// One call of the machine in so many is interrupted.
    density: u64,
}

/// What excuses a channel that does not open or a packet that fails.
#[derive(Clone, Copy, Default)]
pub struct Excuses {
    /// The host refuses.
    pub refused: bool,
    /// The host takes longer than the guest waits.
    pub slow: bool,
    /// Memory ran out.
    pub memory: bool,
    /// The guest left VMBus, or made contact anew.
    pub left: bool,
    /// The host took a channel back.
    pub rescinded: bool,
}

pub struct Device {
    pub instance: Guid,
    pub host: HostEnd,
    pub driver: Driver,
}

pub struct State {
    pub dice: Dice,
    pub devices: Vec<Device>,
    pub excuses: Excuses,
    /// The host does nothing at all.
    dead: bool,
    /// A clock for the order of sends that overlap.
    pub tick: u64,
}

pub struct World {
    me: Weak<World>,
    pub machine: Arc<Machine>,
    pub vmbus: Arc<Vmbus>,
    pub plan: Plan,
    state: Mutex<State>,
    trace: Arc<Mutex<Trace>>,
    depth: AtomicU32,
    /// The work queue runs below.
    working: AtomicU32,
    /// No more decisions: everything comes to rest.
    quiet: AtomicBool,
}

struct GuestEnd(Weak<World>);

impl Guest for GuestEnd {
    fn on_message(&self, payload: &[u8]) -> bool {
        self.0
            .upgrade()
            .is_none_or(|world| world.vmbus.on_message(payload))
    }

    fn on_event(&self, channel: ChannelId) {
        if let Some(world) = self.0.upgrade() {
            world.vmbus.on_event(channel);
        }
    }

    fn run_work(&self) {
        if let Some(world) = self.0.upgrade() {
            world.working.fetch_add(1, Ordering::Relaxed);
            world.vmbus.run_work();
            world.working.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn deadline(&self) -> Option<u64> {
        self.0.upgrade()?.vmbus.deadline()
    }
}

struct Hook(Weak<World>);

impl Interleave for Hook {
    fn at_call(&self, level: Level) {
        if let Some(world) = self.0.upgrade() {
            world.interleave(level);
        }
    }

    fn asleep(&self, until: Option<u64>) {
        if let Some(world) = self.0.upgrade() {
            world.asleep(until);
        }
    }
}

/// What the scheduler picks from.
#[derive(Clone, Copy)]
enum Act {
    Interrupt,
    SpuriousInterrupt,
    HostRuns,
    Message,
    Work,
    Clock,
    Guest,
    Host,
    Rescind,
    Offer,
    Refuse,
    Memory,
    Die,
    Garbage,
    MessageFault,
    Forge,
    Unload,
    Connect,
    Poll,
    Rest,
}

impl World {
    /// Plays one round, and gives the dice back.
    pub fn play(mut dice: Dice, trace: &Arc<Mutex<Trace>>) -> Dice {
        let profile = match dice.below(6) {
            0 => Profile::qemu(),
            1 | 2 => Profile::openvmm(),
            3 | 4 => Profile::hyper_v(),
            _ => Profile::hyper_v_up_to(Version::V4_0),
        };
        let plan = Plan {
            messages: dice.pick(&[
                (6, Messages::Reliable),
                (2, Messages::Lossy),
                (1, Messages::Forged),
            ]),
            garbage: dice.one_in(3),
            dies: dice.one_in(8),
            density: dice.pick(&[(2, 3), (2, 8), (2, 30), (1, 1_000_000)]),
        };
        let length = dice.between(200, 3000);
        let devices = dice.between(1, 4) as usize;
        let machine = Machine::new(profile);
        let vmbus = Vmbus::new(machine.clone(), Config::default());
        let world = Arc::new_cyclic(|me| Self {
            me: me.clone(),
            machine: machine.clone(),
            vmbus,
            plan,
            state: Mutex::new(State {
                dice,
                devices: Vec::new(),
                excuses: Excuses::default(),
                dead: false,
                tick: 0,
            }),
            trace: trace.clone(),
            depth: AtomicU32::new(0),
            working: AtomicU32::new(0),
            quiet: AtomicBool::new(true),
        });
        machine.attach(Arc::new(GuestEnd(world.me.clone())));
        machine.interleave(Arc::new(Hook(world.me.clone())));
        world.note(None, "round with devices", devices as u64);
        world.begin(devices);
        let end = world.steps() + length;
        while world.steps() < end && world.steps() < world.wanted() {
            world.step();
            world.check();
        }
        world.finish();
        machine.detach();
        let state = world.with(|state| {
            std::mem::replace(
                state,
                State {
                    dice: Dice::new(0),
                    devices: Vec::new(),
                    excuses: Excuses::default(),
                    dead: false,
                    tick: 0,
                },
            )
        });
        drop(state.devices);
        state.dice
    }

    /// A short look at the state. Nothing of guest or machine may be called, or dropped, meanwhile.
    pub fn with<R>(&self, look: impl FnOnce(&mut State) -> R) -> R {
        match self.state.try_lock() {
            Ok(mut state) => look(&mut state),
            Err(_) => panic!("the simulation looks at its own state twice at once"),
        }
    }

    pub fn device<R>(&self, device: usize, look: impl FnOnce(&mut Device) -> R) -> R {
        self.with(|state| look(&mut state.devices[device]))
    }

    pub fn dice<R>(&self, roll: impl FnOnce(&mut Dice) -> R) -> R {
        self.with(|state| roll(&mut state.dice))
    }

    /// Reference time.
    pub fn now(&self) -> u64 {
        self.machine.reference_time()
    }

    pub fn me(&self) -> Weak<World> {
        self.me.clone()
    }

    pub fn is_quiet(&self) -> bool {
        self.quiet.load(Ordering::Relaxed)
    }

    fn trace<R>(&self, with: impl FnOnce(&mut Trace) -> R) -> R {
        match self.trace.lock() {
            Ok(mut trace) => with(&mut trace),
            Err(_) => panic!("the trace is gone"),
        }
    }

    fn steps(&self) -> u64 {
        self.trace(|trace| trace.steps)
    }

    fn wanted(&self) -> u64 {
        self.trace(|trace| trace.wanted)
    }

    /// Writes down what happens.
    pub fn note(&self, device: Option<usize>, what: &'static str, number: u64) {
        let depth = self.depth.load(Ordering::Relaxed);
        self.trace(|trace| trace.note(depth, device, what, number));
    }

    /// A decision led to something.
    pub fn count(&self) {
        self.trace(|trace| trace.steps += 1);
    }

    /// Connects, offers the devices and enables a channel for each; nothing goes wrong yet.
    fn begin(&self, devices: usize) {
        for device in 0..devices {
            let new = self.with(|state| Device {
                instance: Guid([device as u8 + 1; 16]),
                host: HostEnd::default(),
                driver: Driver::new(&mut state.dice),
            });
            self.with(|state| state.devices.push(new));
            self.offer(device);
        }
        self.vmbus.connect();
        self.rest();
        for device in 0..devices {
            self.enable(device);
        }
        if self.dice(|dice| dice.one_in(2)) {
            self.rest();
        }
        self.quiet.store(false, Ordering::Relaxed);
    }

    /// One decision of the scheduler.
    fn step(&self) {
        let messages = self.plan.messages;
        let acts: [(u64, Act); 20] = [
            (60, Act::Interrupt),
            (8, Act::SpuriousInterrupt),
            (40, Act::HostRuns),
            (40, Act::Message),
            (60, Act::Work),
            (20, Act::Clock),
            (200, Act::Guest),
            (200, Act::Host),
            (3, Act::Rescind),
            (6, Act::Offer),
            (2, Act::Refuse),
            (2, Act::Memory),
            (1, Act::Die),
            (if self.plan.garbage { 3 } else { 0 }, Act::Garbage),
            (
                if messages == Messages::Lossy { 10 } else { 0 },
                Act::MessageFault,
            ),
            (if messages == Messages::Forged { 5 } else { 0 }, Act::Forge),
            (1, Act::Unload),
            (20, Act::Connect),
            (20, Act::Poll),
            (6, Act::Rest),
        ];
        let (act, device) = self.with(|state| {
            let count = state.devices.len();
            (state.dice.pick(&acts), state.dice.below(count))
        });
        if self.act(act, device) {
            self.count();
        }
    }

    /// Does one thing, at PASSIVE. Returns whether there was anything to do.
    fn act(&self, act: Act, device: usize) -> bool {
        match act {
            Act::Interrupt => self.interrupt(),
            Act::SpuriousInterrupt => self.spurious(device),
            Act::HostRuns => self.host_runs(),
            Act::Message => self.message(),
            Act::Work => self.work(),
            Act::Clock => self.clock(),
            Act::Guest => self.drive(device, Level::Passive),
            Act::Host => self.host_acts(device),
            Act::Rescind => self.rescind(device),
            Act::Offer => self.offer(device),
            Act::Refuse => self.refuse(),
            Act::Memory => self.memory(),
            Act::Die => self.die(),
            Act::Garbage => self.garbage(device),
            Act::MessageFault => self.message_fault(),
            Act::Forge => self.forge(),
            Act::Unload => self.unload(),
            Act::Connect => self.connect(),
            Act::Poll => self.poll(device),
            Act::Rest => self.pause_for_breath(),
        }
    }

    /// The guest's code has called the machine: perhaps something happens here.
    fn interleave(&self, level: Level) {
        if self.is_quiet() || self.depth.load(Ordering::Relaxed) >= DEPTH {
            return;
        }
        let density = self.plan.density;
        let (now, device) = self.with(|state| {
            let count = state.devices.len();
            (state.dice.one_in(density), state.dice.below(count))
        });
        if !now {
            return;
        }
        self.depth.fetch_add(1, Ordering::Relaxed);
        let done = if level == Level::Passive {
            let act = self.dice(|dice| {
                dice.pick(&[
                    (10, Act::Interrupt),
                    (1, Act::SpuriousInterrupt),
                    (3, Act::HostRuns),
                    (4, Act::Message),
                    (2, Act::Work),
                    (1, Act::Clock),
                    (5, Act::Guest),
                    (8, Act::Host),
                ])
            });
            match act {
                // Only code that runs in the work queue already may ask for it: another VP could.
                Act::Work if self.working.load(Ordering::Relaxed) == 0 => false,
                // The interrupt of some other device.
                Act::Guest => self
                    .machine
                    .at_dispatch(|| self.drive(device, Level::Dispatch)),
                act => self.act(act, device),
            }
        } else {
            self.host_acts(device)
        };
        if done {
            self.count();
        }
        self.depth.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether one more decision may be taken inside of those that led here.
    pub fn is_shallow(&self) -> bool {
        self.depth.load(Ordering::Relaxed) < DEPTH
    }

    /// Does something inside of something else.
    pub fn deeper(&self, what: impl FnOnce() -> bool) -> bool {
        if !self.is_shallow() {
            return false;
        }
        self.depth.fetch_add(1, Ordering::Relaxed);
        let done = what();
        self.depth.fetch_sub(1, Ordering::Relaxed);
        done
    }

    pub fn host_is_dead(&self) -> bool {
        self.with(|state| state.dead)
    }

    /// The guest waits at PASSIVE: other things happen until it has something to do, or its time is over.
    fn asleep(&self, until: Option<u64>) {
        for _ in 0..20 {
            if self.machine.work_waits() || until.is_some_and(|until| until <= self.now()) {
                return;
            }
            let (act, device) = self.with(|state| {
                let acts = [
                    (10, Act::Interrupt),
                    (10, Act::HostRuns),
                    (10, Act::Message),
                    (5, Act::Guest),
                    (10, Act::Host),
                ];
                let count = state.devices.len();
                (state.dice.pick(&acts), state.dice.below(count))
            });
            let done = self.deeper(|| match act {
                Act::Guest => self
                    .machine
                    .at_dispatch(|| self.drive(device, Level::Dispatch)),
                act => self.act(act, device),
            });
            if done {
                self.count();
            }
        }
        // Nothing else wakes it.
        let now = self.now();
        let time = until
            .map_or(1000, |until| until.saturating_sub(now))
            .clamp(1, 1000);
        self.machine.pass(time);
    }

    fn interrupt(&self) -> bool {
        let waiting = self.machine.pending_interrupts();
        if waiting == 0 || self.machine.level() == Level::Dispatch {
            return false;
        }
        let which = self.dice(|dice| dice.below(waiting));
        self.note(None, "an interrupt comes, of", waiting as u64);
        self.machine.step_interrupt(which)
    }

    fn spurious(&self, device: usize) -> bool {
        let Some(id) = self.device(device, |device| device.host.id) else {
            return false;
        };
        self.note(Some(device), "spurious interrupt of channel", id.0.into());
        self.machine.interrupt(id);
        true
    }

    /// The host handles messages and signals.
    fn host_runs(&self) -> bool {
        if self.with(|state| state.dead) {
            return false;
        }
        let busy = self.machine.step_host();
        if busy {
            self.note(None, "the host handles what came, at", self.now());
        }
        busy
    }

    fn message(&self) -> bool {
        let taken = self.machine.step_message();
        if taken {
            self.note(None, "a message comes, at", self.now());
        }
        taken
    }

    fn work(&self) -> bool {
        let odd = self.dice(|dice| dice.one_in(10));
        if self.depth.load(Ordering::Relaxed) == 0 {
            self.machine.step_deadline();
        }
        if !odd && !self.machine.work_waits() {
            return false;
        }
        self.note(None, "work", odd.into());
        if !self.machine.step_work() {
            GuestEnd(self.me.clone()).run_work();
        }
        true
    }

    fn clock(&self) -> bool {
        let time = self.with(|state| {
            let time = state.dice.pick(&[
                (20, 10),
                (20, 1000),
                (10, 20_000),
                (3, SECOND),
                (1, 11 * SECOND),
            ]);
            state.excuses.slow |= time >= SECOND;
            time
        });
        self.note(None, "time passes:", time);
        self.machine.pass(time);
        true
    }

    fn refuse(&self) -> bool {
        let which = self.with(|state| {
            state.excuses.refused = true;
            state.dice.below(4)
        });
        self.note(None, "the host refuses", which as u64);
        match which {
            0 => self
                .machine
                .server(|server| server.refusals.gpadls = Some(Status::UNSUCCESSFUL)),
            1 => self.machine.set_open_status(Status::UNSUCCESSFUL),
            _ => {
                self.machine.server(|server| server.refusals.gpadls = None);
                self.machine.set_open_status(Status::SUCCESS);
            }
        }
        true
    }

    fn memory(&self) -> bool {
        let pages = self.with(|state| {
            state.excuses.memory = true;
            state.dice.pick(&[(1, 0), (2, 4096)])
        });
        self.note(None, "free pages:", pages as u64);
        self.machine.set_free_pages(pages);
        true
    }

    fn die(&self) -> bool {
        let dead = self.with(|state| {
            state.excuses.slow = true;
            state.dead = !state.dead;
            state.dead
        });
        self.note(None, "the host is dead:", dead.into());
        true
    }

    fn message_fault(&self) -> bool {
        let (fault, skip, count, number) = self.dice(|dice| {
            let fault = match dice.below(4) {
                0 => Fault::Drop,
                1 => Fault::Duplicate,
                2 => Fault::Delay(dice.between(1, SECOND)),
                _ => Fault::Swap,
            };
            (
                fault,
                dice.below(3) as u32,
                dice.between(1, 2) as u32,
                dice.between(1, 25) as u32,
            )
        });
        // A lost answer is an answer that comes too late.
        self.with(|state| state.excuses.slow = true);
        self.note(None, "messages will go wrong, of type", number.into());
        self.machine.server(|server| {
            server.inject(Rule {
                kind: Some(MessageType(number)),
                skip,
                count,
                fault,
            });
        });
        true
    }

    /// A message that no honest host would send: a type that exists, and any numbers.
    fn forge(&self) -> bool {
        let bytes = self.with(|state| {
            state.excuses.refused = true;
            let dice = &mut state.dice;
            let mut bytes = vec![0; dice.between(0, 30) as usize * 8];
            for word in bytes.chunks_mut(4) {
                let value = match dice.below(4) {
                    0 => dice.number() as u32,
                    _ => dice.below(8) as u32,
                };
                word.copy_from_slice(&value.to_le_bytes());
            }
            if let Some(kind) = bytes.first_chunk_mut::<4>() {
                *kind = (dice.between(1, 26) as u32).to_le_bytes();
            }
            bytes
        });
        self.note(None, "the host lies in bytes", bytes.len() as u64);
        self.machine.server(|server| server.forge(&bytes));
        true
    }

    fn unload(&self) -> bool {
        self.with(|state| state.excuses.left = true);
        self.note(None, "the guest leaves", 0);
        self.vmbus.begin_unload();
        true
    }

    fn connect(&self) -> bool {
        if !matches!(
            self.vmbus.connection(),
            ConnectionState::Unloaded { .. } | ConnectionState::Failed(_)
        ) {
            return false;
        }
        self.with(|state| state.excuses.left = true);
        self.note(None, "the guest makes contact", 0);
        self.vmbus.connect();
        true
    }

    /// What must hold at any time.
    pub fn check(&self) {
        if self.plan.messages == Messages::Reliable {
            let excuses = self.with(|state| state.excuses);
            let mut complaints = self.machine.complaints();
            complaints.retain(|what| {
                !(excuses.rescinded && CROSSED.contains(what)
                    || excuses.slow && TOO_LATE.contains(what)
                    || excuses.left && LEFT.contains(what))
            });
            assert!(complaints.is_empty(), "the host complains: {complaints:?}");
        }
        let count = self.with(|state| state.devices.len());
        for device in 0..count {
            self.check_driver(device);
        }
    }

    /// Faults stop, and everything that can still happen happens.
    fn rest(&self) {
        self.quiet.store(true, Ordering::Relaxed);
        let devices = self.with(|state| {
            state.dead = false;
            state.devices.len()
        });
        self.machine.server(vmbus_host::bus::Server::heal);
        self.machine.set_open_status(Status::SUCCESS);
        self.machine.set_free_pages(4096);
        // Longer than any of the guest's time-outs.
        let horizon = self.now() + 100 * SECOND;
        // A full ring whose reader neither reads nor signals room is looked at each millisecond.
        for _ in 0..1_000_000 {
            let mut busy = self.machine.step_host();
            while self.machine.step_message() {
                busy = true;
            }
            while self.machine.step_interrupt(0) {
                busy = true;
            }
            busy |= self.machine.step_work();
            for device in 0..devices {
                busy |= self.host_serves(device);
                busy |= self.driver_completes(device);
                busy |= self.poll(device);
            }
            if busy {
                continue;
            }
            match self.machine.next_deadline() {
                Some(at) if at <= horizon => {
                    let now = self.now();
                    self.machine.pass(at.saturating_sub(now).max(1));
                    self.machine.step_deadline();
                }
                _ => {
                    self.check();
                    return;
                }
            }
        }
        panic!("guest and host never come to rest");
    }

    /// Everything comes to rest in the middle of the round.
    fn pause_for_breath(&self) -> bool {
        self.note(None, "faults stop for a while", 0);
        self.rest();
        self.check_rest();
        self.quiet.store(false, Ordering::Relaxed);
        true
    }

    /// Ends the round: everything comes to rest, nothing is left over, every channel ends.
    fn finish(&self) {
        if self.plan.dies {
            return self.finish_without_host();
        }
        self.note(None, "faults stop", 0);
        self.rest();
        self.check_rest();
        self.note(None, "the channels are closed", 0);
        let devices = self.with(|state| state.devices.len());
        for device in 0..devices {
            self.disable(device);
        }
        self.rest();
        let stuck = (0..devices).any(|device| self.state_of(device) != ChannelState::Disabled);
        if stuck || self.dice(|dice| dice.one_in(3)) {
            assert!(
                !stuck || self.plan.messages != Messages::Reliable,
                "a channel does not close: {:?}",
                (0..devices)
                    .map(|device| self.state_of(device))
                    .collect::<Vec<_>>()
            );
            // A lost message that nobody repeats is the end of what closing alone can do.
            self.unload();
            self.rest();
        }
        for device in 0..devices {
            assert_eq!(
                self.state_of(device),
                ChannelState::Disabled,
                "channel {device} never ends"
            );
        }
        self.drop_packets();
        self.check();
        let unloaded = matches!(
            self.vmbus.connection(),
            ConnectionState::Unloaded { acknowledged: true }
        );
        if self.plan.messages == Messages::Reliable && !self.with(|state| state.excuses.slow)
            || unloaded
        {
            assert_eq!(self.machine.shared_runs(), 0, "memory is not given back");
        }
    }

    /// The host never answers again: every packet ends and every channel closes all the same, and what the host may
    /// still write to stays away from everybody.
    fn finish_without_host(&self) {
        self.note(None, "the host is gone", 0);
        self.quiet.store(true, Ordering::Relaxed);
        let devices = self.with(|state| {
            state.dead = true;
            state.excuses.slow = true;
            state.devices.len()
        });
        for device in 0..devices {
            self.disable(device);
        }
        self.unload();
        let end = self.now() + 100 * SECOND;
        while self.now() < end {
            while self.machine.step_interrupt(0) {}
            while self.machine.step_work() {}
            for device in 0..devices {
                self.driver_completes(device);
                self.poll(device);
            }
            self.machine.pass(SECOND);
            self.machine.step_deadline();
        }
        for device in 0..devices {
            assert_eq!(
                self.state_of(device),
                ChannelState::Disabled,
                "channel {device} never ends"
            );
        }
        self.drop_packets();
        self.check();
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}
