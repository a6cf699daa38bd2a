//! A disk that fails on request: slow, broken in places or at times, torn. What it does is the same for the same seed and the same
//! sequence of requests.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use alloc::vec::Vec;

use super::{Disk, DiskError, Geometry};

/// A fault: which requests, when among them, and what becomes of these.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// The requests that it is for.
    pub operations: Operations,
    /// Only those that touch these bytes of the disk; `None` for all. Flushes touch none of them.
    pub range: Option<Range<u64>>,
    /// Which of them.
    pub when: When,
    /// What happens.
    pub effect: Effect,
}

/// Kinds of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operations {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Flushes.
    pub flush: bool,
    /// Unmaps.
    pub unmap: bool,
}

impl Operations {
    /// No request.
    pub const NONE: Self = Self {
        read: false,
        write: false,
        flush: false,
        unmap: false,
    };
    /// Reads only.
    pub const READS: Self = Self {
        read: true,
        ..Self::NONE
    };
    /// Writes only.
    pub const WRITES: Self = Self {
        write: true,
        ..Self::NONE
    };
    /// Flushes only.
    pub const FLUSHES: Self = Self {
        flush: true,
        ..Self::NONE
    };
    /// Every request.
    pub const ALL: Self = Self {
        read: true,
        write: true,
        flush: true,
        unmap: true,
    };
}

/// Which of the requests that a fault is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum When {
    /// Each.
    Always,
    /// Every so many: the first one is that of this number. 0 is never.
    Every(u64),
    /// So many in a thousand, by the seed.
    PerMille(u32),
    /// The next so many; then the fault is over.
    Next(u64),
}

/// What happens to a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// It is done so much later.
    Delay(Duration),
    /// It is not done, and fails.
    Fail(Failure),
    /// Of a write some sectors at its start are written, as many as the seed says, and it fails with a medium error at the first one
    /// that is not. Other requests fail with a medium error.
    Tear,
}

/// How a request fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// [`DiskError::Medium`] at the first byte of the fault's range that the request touches.
    Medium,
    /// [`DiskError::NotReady`].
    NotReady,
    /// [`DiskError::NoSpace`].
    NoSpace,
}

/// How a request is kept waiting.
pub trait Pause: Send + Sync {
    /// Returns when the time is over.
    fn pause(&self, time: Duration);
}

/// Waits as long as it says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sleep;

impl Pause for Sleep {
    fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Keeps requests waiting until it is opened, however long they were to be delayed: for tests, that see who waits.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    open: bool,
    waiting: usize,
}

impl Gate {
    /// A gate that is shut.
    pub fn shut() -> Arc<Self> {
        Arc::default()
    }

    /// Lets everybody pass from now on.
    pub fn open(&self) {
        lock(&self.state).open = true;
        self.changed.notify_all();
    }

    /// Returns when so many requests wait at the gate.
    pub fn wait_for(&self, requests: usize) {
        let state = lock(&self.state);
        drop(self.wait(state, |state| state.waiting < requests));
    }

    fn wait<'a>(
        &self,
        state: MutexGuard<'a, GateState>,
        mut condition: impl FnMut(&GateState) -> bool,
    ) -> MutexGuard<'a, GateState> {
        let state = self.changed.wait_while(state, |state| condition(state));
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pause for Gate {
    fn pause(&self, _: Duration) {
        let mut state = lock(&self.state);
        state.waiting += 1;
        self.changed.notify_all();
        let mut state = self.wait(state, |state| !state.open);
        state.waiting -= 1;
    }
}

impl<P: Pause + ?Sized> Pause for Arc<P> {
    fn pause(&self, time: Duration) {
        (**self).pause(time);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk with faults. Without one it is the disk that it wraps.
pub struct FaultyDisk {
    disk: Arc<dyn Disk>,
    pause: Arc<dyn Pause>,
    plan: Mutex<Plan>,
}

#[derive(Debug)]
struct Plan {
    random: u64,
    faults: Vec<Active>,
    struck: u64,
}

/// A fault and the requests that it has seen.
#[derive(Debug)]
struct Active {
    fault: Fault,
    seen: u64,
}

/// A request, as far as faults care.
#[derive(Clone, Copy)]
struct Request {
    operation: Operations,
    offset: u64,
    length: u64,
}

/// What becomes of a request.
#[derive(Default)]
struct Fate {
    delay: Duration,
    error: Option<DiskError>,
    /// Bytes of a write that are written all the same.
    torn: u64,
}

impl FaultyDisk {
    /// A disk without faults as yet, whose chances come from this seed. Delayed requests sleep.
    pub fn new(disk: Arc<dyn Disk>, seed: u64) -> Self {
        Self::with_pause(disk, seed, Arc::new(Sleep))
    }

    /// The same, with another way to keep requests waiting.
    pub fn with_pause(disk: Arc<dyn Disk>, seed: u64, pause: Arc<dyn Pause>) -> Self {
        Self {
            disk,
            pause,
            plan: Mutex::new(Plan {
                random: seed,
                faults: Vec::new(),
                struck: 0,
            }),
        }
    }

    /// Adds a fault. Several may strike the same request: delays add up, the first failure counts.
    pub fn add(&self, fault: Fault) {
        lock(&self.plan).faults.push(Active { fault, seen: 0 });
    }

    /// Ends all faults. Requests that wait go on waiting.
    pub fn clear(&self) {
        lock(&self.plan).faults.clear();
    }

    /// How often a fault has struck.
    pub fn struck(&self) -> u64 {
        lock(&self.plan).struck
    }

    /// Waits, if it has to, and fails, if it has to; then bytes of a write that are written are told.
    fn meet(&self, request: Request) -> Result<(), (DiskError, u64)> {
        let sector = self.disk.geometry().logical;
        let fate = lock(&self.plan).decide(request, sector);
        if !fate.delay.is_zero() {
            self.pause.pause(fate.delay);
        }
        fate.error.map_or(Ok(()), |error| Err((error, fate.torn)))
    }

    fn pass(&self, request: Request) -> Result<(), DiskError> {
        self.meet(request).map_err(|(error, _)| error)
    }
}

impl Plan {
    /// The next number of the seed's sequence (splitmix64).
    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn decide(&mut self, request: Request, sector: u32) -> Fate {
        let mut fate = Fate::default();
        for index in 0..self.faults.len() {
            let Some(at) = self.faults[index].fault.touches(request) else {
                continue;
            };
            let chance = match self.faults[index].fault.when {
                When::PerMille(_) => self.next() % 1000,
                _ => 0,
            };
            if !self.faults[index].strikes(chance) {
                continue;
            }
            self.struck += 1;
            let failure = match self.faults[index].fault.effect {
                Effect::Delay(time) => {
                    fate.delay = fate.delay.saturating_add(time);
                    continue;
                }
                Effect::Fail(failure) => failure,
                Effect::Tear => {
                    let sectors = request.length / u64::from(sector);
                    let torn = self.next() % sectors.max(1) * u64::from(sector);
                    if fate.error.is_none() && request.operation.write {
                        fate.torn = torn;
                        fate.error = Some(DiskError::Medium(request.offset.saturating_add(torn)));
                    }
                    Failure::Medium
                }
            };
            fate.error.get_or_insert(match failure {
                Failure::Medium => DiskError::Medium(at),
                Failure::NotReady => DiskError::NotReady,
                Failure::NoSpace => DiskError::NoSpace,
            });
        }
        self.faults.retain(|active| match active.fault.when {
            When::Next(count) => active.seen < count,
            _ => true,
        });
        fate
    }
}

impl Fault {
    /// The first byte that the request touches and the fault is for.
    fn touches(&self, request: Request) -> Option<u64> {
        let (asked, had) = (self.operations, request.operation);
        let kind = asked.read && had.read
            || asked.write && had.write
            || asked.flush && had.flush
            || asked.unmap && had.unmap;
        if !kind {
            return None;
        }
        let Some(range) = &self.range else {
            return Some(request.offset);
        };
        let end = request.offset.saturating_add(request.length);
        let first = request.offset.max(range.start);
        (first < end.min(range.end)).then_some(first)
    }
}

impl Active {
    fn strikes(&mut self, chance: u64) -> bool {
        self.seen = self.seen.saturating_add(1);
        match self.fault.when {
            When::Always => true,
            When::Every(count) => count != 0 && self.seen.is_multiple_of(count),
            When::PerMille(rate) => chance < u64::from(rate),
            When::Next(count) => self.seen <= count,
        }
    }
}

impl Disk for FaultyDisk {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn identity(&self) -> [u8; 16] {
        self.disk.identity()
    }

    fn write_cache(&self) -> bool {
        self.disk.write_cache()
    }

    fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), DiskError> {
        self.pass(Request {
            operation: Operations::READS,
            offset,
            length: data.len() as u64,
        })?;
        self.disk.read(offset, data)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let met = self.meet(Request {
            operation: Operations::WRITES,
            offset,
            length: data.len() as u64,
        });
        let Err((error, torn)) = met else {
            return self.disk.write(offset, data);
        };
        let written = usize::try_from(torn).ok().and_then(|torn| data.get(..torn));
        if let Some(written) = written.filter(|written| !written.is_empty()) {
            self.disk.write(offset, written)?;
        }
        Err(error)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.pass(Request {
            operation: Operations::FLUSHES,
            offset: 0,
            length: 0,
        })?;
        self.disk.flush()
    }

    fn unmap(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.pass(Request {
            operation: Operations {
                unmap: true,
                ..Operations::NONE
            },
            offset,
            length,
        })?;
        self.disk.unmap(offset, length)
    }

    fn can_unmap(&self) -> bool {
        self.disk.can_unmap()
    }

    fn unmap_granularity(&self) -> u64 {
        self.disk.unmap_granularity()
    }
}
