//! A VM in the same process, whose guest is our own stack, with its host's thread turned by hand.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak, mpsc};

use serde_json::Value;
use vmbus::bus::Config as BusConfig;
use vmbus::drivers::balloon::{Balloon, Figures, GuestMemory as BalloonMemory, PageRange};
use vmbus::drivers::shutdown::Shutdown;
use vmbus::hypervisor::{Hypervisor, Level, OutOfMemory, PostError};
use vmbus::ids::{ChannelId, ConnectionId, PageNumber, VpIndex};
use vmbus::shared::SharedPages;
use vmbus::{ConnectionState, Vmbus};
use vmbus_host::bus::{HvStatus, Message};
use vmbus_host::memory::GuestMemory;
use vmbus_host::sync::Mutex;
use vmm_sys_util::eventfd::EventFd;

use crate::Error;
use crate::config::Config;
use crate::control::server::{Answer, execute};
use crate::control::{Command, Failure};
use crate::devices::Devices;
use crate::machine::profile;
use crate::runner::{Events, Exits, Runner, Sleep, Vm};

/// One second in units of 100 ns.
pub const SECOND: u64 = 10_000_000;

/// Pages of a MiB.
const MIB: u64 = 256;

/// The VM.
pub struct TestVm {
    runner: Weak<Runner>,
    memory: GuestMemory,
    time: AtomicU64,
    next_page: AtomicU64,
    routes: Mutex<BTreeMap<ConnectionId, EventFd>>,
    /// Event flags that are set and not handled.
    flags: Mutex<VecDeque<u16>>,
    slot: Mutex<Option<Message>>,
    refuses: AtomicBool,
    dispatch: AtomicBool,
    work: AtomicBool,
    discarded: AtomicU64,
    guest: Mutex<Option<Arc<Vmbus>>>,
}

impl TestVm {
    fn new(runner: &Arc<Runner>) -> Arc<Self> {
        let vm = Arc::new(Self {
            runner: Arc::downgrade(runner),
            memory: GuestMemory::default(),
            time: AtomicU64::new(1),
            next_page: AtomicU64::new(0x1000),
            routes: Mutex::default(),
            flags: Mutex::default(),
            slot: Mutex::default(),
            refuses: AtomicBool::new(false),
            dispatch: AtomicBool::new(false),
            work: AtomicBool::new(false),
            discarded: AtomicU64::new(0),
            guest: Mutex::default(),
        });
        *vm.guest.lock() = Some(Vmbus::new(vm.clone(), BusConfig::default()));
        vm
    }

    /// The guest's stack.
    pub fn guest(&self) -> Arc<Vmbus> {
        self.guest.lock().clone().expect("the VM has not ended")
    }

    /// Whether the guest leaves messages in their slot.
    pub fn refuse_messages(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Pages that the system was given.
    pub fn discarded(&self) -> u64 {
        self.discarded.load(Ordering::SeqCst)
    }

    fn runner(&self) -> Arc<Runner> {
        self.runner.upgrade().expect("the machine is there")
    }

    fn at_dispatch<R>(&self, code: impl FnOnce() -> R) -> R {
        let before = self.raise_to_dispatch();
        let result = code();
        self.lower(before);
        result
    }

    /// The guest does one thing. Returns whether there was any.
    fn step(&self) -> bool {
        let guest = self.guest();
        let flag = self.flags.lock().pop_front();
        if let Some(flag) = flag {
            self.at_dispatch(|| guest.on_event(ChannelId(u32::from(flag))));
            return true;
        }
        let message = self.slot.lock().take();
        if let Some(message) = message {
            let refuses = self.refuses.load(Ordering::SeqCst);
            if !refuses && self.at_dispatch(|| guest.on_message(&message.payload)) {
                self.runner().message_delivered(message.vp);
                return true;
            }
            *self.slot.lock() = Some(message);
        }
        let work = self.work.swap(false, Ordering::SeqCst);
        if work {
            guest.run_work();
        }
        work
    }
}

impl Vm for TestVm {
    fn reference_time(&self) -> u64 {
        self.time.load(Ordering::SeqCst)
    }

    fn set_event_flag(&self, _vp: VpIndex, sint: u8, flag: u16) -> bool {
        assert_eq!(sint, vmbus::protocol::SINT);
        self.flags.lock().push_back(flag);
        true
    }

    fn deliver_message(&self, message: &Message) -> bool {
        let mut slot = self.slot.lock();
        let free = slot.is_none();
        if free {
            *slot = Some(message.clone());
        }
        free
    }

    fn route_signal(&self, connection: ConnectionId, event: Option<&EventFd>) -> Result<(), Error> {
        let mut routes = self.routes.lock();
        match event {
            Some(event) => routes.insert(connection, event.try_clone().map_err(Error::NoConsole)?),
            None => routes.remove(&connection),
        };
        Ok(())
    }

    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn resume(&self) {}

    fn pause(&self) {}

    fn hot_add_range(&self) -> Range<PageNumber> {
        PageNumber(0)..PageNumber(0)
    }

    fn hot_add_memory(&self, _first: PageNumber, _count: usize) -> Result<(), Error> {
        Ok(())
    }

    fn discard(&self, _first: PageNumber, count: u64) {
        self.discarded.fetch_add(count, Ordering::SeqCst);
    }

    fn console_input(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    fn exits(&self) -> Exits {
        Exits {
            here: [("hypercall".to_owned(), 1)].into(),
            kernel: [("exits".to_owned(), 3)].into(),
        }
    }
}

impl Hypervisor for TestVm {
    fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> Result<(), PostError> {
        match self.runner().post_message(connection, payload) {
            HvStatus::SUCCESS => Ok(()),
            HvStatus::INVALID_CONNECTION_ID => Err(PostError::InvalidConnection),
            HvStatus::INSUFFICIENT_BUFFERS => Err(PostError::Busy),
            HvStatus(other) => Err(PostError::Status(other)),
        }
    }

    fn signal_event(&self, connection: ConnectionId, flag: u16) {
        // As the kernel does it: what is not routed becomes an exit.
        let routed = self
            .routes
            .lock()
            .get(&connection)
            .map(|event| event.write(1));
        if routed.is_none() {
            self.runner().signal_event(connection, flag);
        }
    }

    fn share_pages(&self, count: usize) -> Result<SharedPages, OutOfMemory> {
        let first = self.next_page.fetch_add(count as u64, Ordering::SeqCst);
        let pages = SharedPages::from_heap(PageNumber(first), count);
        let pages = pages.ok_or(OutOfMemory { pages: count })?;
        self.memory.add(&pages);
        Ok(pages)
    }

    fn reference_time(&self) -> u64 {
        self.time.load(Ordering::SeqCst)
    }

    fn current_vp(&self) -> VpIndex {
        VpIndex(0)
    }

    fn raise_to_dispatch(&self) -> Level {
        if self.dispatch.swap(true, Ordering::SeqCst) {
            Level::Dispatch
        } else {
            Level::Passive
        }
    }

    fn lower(&self, level: Level) {
        self.dispatch
            .store(level == Level::Dispatch, Ordering::SeqCst);
    }

    fn wait_for_interrupt(&self, _until: Option<u64>) {
        unreachable!("no test blocks in the guest");
    }

    fn request_work(&self) {
        self.work.store(true, Ordering::SeqCst);
    }
}

/// A machine with a VM.
pub struct Rig {
    pub runner: Arc<Runner>,
    pub vm: Arc<TestVm>,
}

/// An answer that may come later.
pub struct Asked(mpsc::Receiver<Result<Value, Failure>>);

impl Asked {
    pub fn is_there(&self) -> bool {
        self.0.try_recv().is_ok()
    }

    pub fn take(&self) -> Result<Value, Failure> {
        self.0.try_recv().expect("an answer")
    }
}

impl Rig {
    /// A machine of this configuration whose guest has not begun.
    pub fn new(config: &Config) -> Self {
        let events = Events::new().unwrap();
        let devices = Devices::new(config, &events).unwrap();
        let runner = Runner::new(profile(config), devices, events).unwrap();
        let vm = TestVm::new(&runner);
        runner.begin(vm.clone()).unwrap();
        Self { runner, vm }
    }

    /// The guest is reset.
    pub fn start_anew(&mut self) {
        self.runner.finish();
        *self.vm.guest.lock() = None;
        self.vm = TestVm::new(&self.runner);
        self.runner.begin(self.vm.clone()).unwrap();
    }

    /// The guest makes contact.
    pub fn connect(&self) {
        self.vm.guest().connect();
        self.settle();
        let state = self.vm.guest().connection();
        assert!(
            matches!(
                state,
                ConnectionState::Connected {
                    all_offers_delivered: true,
                    ..
                }
            ),
            "{state}"
        );
    }

    /// Lets host and guest run until neither has anything to do.
    pub fn settle(&self) {
        for _ in 0..100_000 {
            let sleep = self.runner.turn();
            let mut busy = sleep == Sleep::Not;
            let before = self.signals();
            self.runner.attend(Sleep::Not).unwrap();
            busy |= self.signals() != before;
            while self.vm.step() {
                busy = true;
            }
            if !busy {
                return;
            }
        }
        panic!("host and guest never come to rest");
    }

    fn signals(&self) -> u64 {
        let channels = self.runner.channels();
        channels.iter().map(|(_, counts)| counts.signals).sum()
    }

    /// Lets time pass, stopping wherever one of them wants to do something.
    pub fn advance(&self, time: u64) {
        let end = Vm::reference_time(&*self.vm) + time;
        loop {
            self.settle();
            let now = Vm::reference_time(&*self.vm);
            let host = match self.runner.turn() {
                Sleep::Until { at, .. } => Some(at),
                Sleep::Not => Some(now),
                Sleep::Unlimited => None,
            };
            let guest = self.vm.guest().deadline();
            let next = host.into_iter().chain(guest).min();
            match next.filter(|at| *at <= end && now < end) {
                Some(at) => self.vm.time.store(at.max(now + 1), Ordering::SeqCst),
                None if now < end => self.vm.time.store(end, Ordering::SeqCst),
                None => return,
            }
            self.vm.request_work();
        }
    }

    /// Has a command carried out.
    pub fn ask(&self, command: Command) -> (Asked, ()) {
        let (sender, receiver) = mpsc::channel();
        let answer = Answer::new(move |result| {
            // A test may not want to know.
            let _ = sender.send(result);
        });
        (Asked(receiver), execute(&self.runner, command, answer))
    }

    fn answer(&self, name: &str, arguments: Value) -> Result<Value, Failure> {
        let Value::Object(arguments) = arguments else {
            unreachable!("arguments are an object")
        };
        let (asked, ()) = self.ask(Command::parse(name, arguments)?);
        self.settle();
        asked.take()
    }

    /// What a command returns.
    pub fn returns(&self, name: &str, arguments: Value) -> Value {
        self.answer(name, arguments).expect(name)
    }

    /// Why a command fails.
    pub fn fails(&self, name: &str, arguments: Value) -> String {
        self.answer(name, arguments).expect_err(name).desc
    }

    /// The guest's driver of dynamic memory, with 64 MiB.
    pub fn balloon(&self) -> Balloon {
        let ram = Arc::new(Ram(Mutex::new((MIB..64 * MIB).collect())));
        Balloon::new(self.vm.guest().client(), ram).unwrap()
    }

    /// Lets time pass, and serves the balloon at its deadlines as a kernel's task does.
    pub fn serve_balloon(&self, balloon: &Balloon, time: u64) {
        let end = Vm::reference_time(&*self.vm) + time;
        loop {
            self.settle();
            let now = Vm::reference_time(&*self.vm);
            match balloon.deadline() {
                Some(at) if at <= now => balloon.service(now),
                Some(at) if at <= end => self.advance(at - now),
                _ if now < end => self.advance(end - now),
                _ => return,
            }
        }
    }

    /// The guest's driver of requests to end.
    pub fn shutdown(&self) -> Shutdown {
        Shutdown::new(self.vm.guest().client()).unwrap()
    }
}

/// The guest's memory: its free pages.
struct Ram(Mutex<BTreeSet<u64>>);

impl BalloonMemory for Ram {
    fn figures(&self) -> Figures {
        Figures {
            total: 64 * MIB,
            free: self.0.lock().len() as u64,
            committed: MIB,
            reserve: MIB,
        }
    }

    fn take(&self, wanted: u64, block: u64) -> Option<PageRange> {
        let mut free = self.0.lock();
        let count = block.min(wanted);
        let first = *free
            .iter()
            .find(|&&page| free.range(page..page + count).count() as u64 == count)?;
        (first..first + count).for_each(|page| assert!(free.remove(&page)));
        Some(PageRange { first, count })
    }

    fn give_back(&self, range: PageRange) {
        let mut free = self.0.lock();
        let pages = range.first..range.first + range.count;
        pages.for_each(|page| assert!(free.insert(page)));
    }
}
