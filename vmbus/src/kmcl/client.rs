//! The library as a whole: the channels of one VMBus, and the way from an interrupt to a channel.

use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::any::Any;
use core::fmt;
use core::future::poll_fn;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::task::{Context, Poll, Waker};

use spin::{Mutex, Once};

use super::channel::{Channel, Shared};
use super::deferred::Deferred;
use super::monitor::MonitorMemory;
use crate::hypervisor::{Hypervisor, Level};
use crate::ids::{ChannelId, VpIndex};
use crate::sync::DispatchLock;

/// The client interface of the library: what a driver is given to enable its channels on. Clones are the same.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

/// Channel numbers that share one piece of the table.
const CHUNK: usize = 64;
/// Pieces of the table: 2048 numbers in all.
const CHUNKS: usize = (ChannelId::MAX as usize + 1) / CHUNK;

/// A place in the table. Its lock is held for the time of a clone, and no two channels share it.
type Slot = DispatchLock<Option<Arc<Shared>>>;

/// The library itself.
pub(crate) struct Inner {
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    /// Open channels by number. Pieces come into being as numbers are used.
    table: [Once<Box<[Slot; CHUNK]>>; CHUNKS],
    /// Channels that want the dispatcher at PASSIVE.
    deferred: Deferred,
    /// Whether some channel wants its state looked at.
    attention: AtomicBool,
    /// Every channel that is not Disabled. PASSIVE only.
    pub(crate) channels: Mutex<Vec<Channel>>,
    /// Memory that the host may still touch although nobody uses it. PASSIVE only.
    kept: Mutex<Vec<Box<dyn Any + Send>>>,
    /// The pages for signals without hypercalls. PASSIVE only.
    pub(crate) monitor: Mutex<Option<MonitorMemory>>,
    /// Counts what async code may wait for.
    changes: AtomicU64,
    wakers: DispatchLock<Vec<Waker>>,
    /// Where channels without a target VP of their own are served.
    pub(crate) default_vp: VpIndex,
    /// The whole stack, for code that waits.
    stack: Once<Weak<dyn Serve>>,
}

/// The whole stack, as code sees it that waits for something in the middle of it.
pub(crate) trait Serve: Send + Sync {
    /// Does what is to be done at PASSIVE, also when this is called from a callback of a driver.
    fn serve(&self);
    /// When there is something to do without being asked; reference time.
    fn deadline(&self) -> Option<u64>;
}

impl Client {
    pub(crate) fn new(hypervisor: Arc<dyn Hypervisor>, default_vp: VpIndex) -> Self {
        Self(Arc::new(Inner {
            hypervisor,
            table: [const { Once::new() }; CHUNKS],
            deferred: Deferred::new(),
            attention: AtomicBool::new(false),
            channels: Mutex::new(Vec::new()),
            kept: Mutex::new(Vec::new()),
            monitor: Mutex::new(None),
            changes: AtomicU64::new(0),
            wakers: DispatchLock::new(Vec::new()),
            default_vp,
            stack: Once::new(),
        }))
    }

    pub(crate) fn set_stack(&self, stack: Weak<dyn Serve>) {
        self.0.stack.call_once(|| stack);
    }

    pub(super) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// Partition reference time in units of 100 ns.
    pub fn now(&self) -> u64 {
        self.0.hypervisor.reference_time()
    }

    /// Tells async code that waits in [`changed`](Self::changed) that there is something new. At DISPATCH or PASSIVE.
    pub fn notify(&self) {
        self.0.notify();
    }

    /// A number that grows with every change: of the connection, of an offer, of a channel's state, and with
    /// every [`notify`](Self::notify).
    pub fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::SeqCst)
    }

    /// Waits until [`changes`](Self::changes) is no longer `seen`, and returns it.
    pub async fn changed(&self, seen: u64) -> u64 {
        poll_fn(|context| {
            let now = self.changes();
            if now != seen {
                return Poll::Ready(now);
            }
            self.0.register(context.waker());
            // What came before the registration woke nobody.
            let now = self.changes();
            if now == seen {
                Poll::Pending
            } else {
                Poll::Ready(now)
            }
        })
        .await
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("kmcl::Client")
    }
}

impl Inner {
    fn slot(&self, id: ChannelId) -> Option<&Slot> {
        let index = id.index()?;
        self.table.get(index / CHUNK)?.get()?.get(index % CHUNK)
    }

    /// Makes a channel findable by its number. At PASSIVE.
    pub(super) fn install(&self, id: ChannelId, channel: &Channel) {
        let chunk = id.index().and_then(|index| self.table.get(index / CHUNK));
        if let Some(chunk) = chunk {
            chunk.call_once(|| Box::new([const { DispatchLock::new(None) }; CHUNK]));
        }
        if let Some(slot) = self.slot(id) {
            *slot.lock(&*self.hypervisor) = Some(channel.shared().clone());
        }
    }

    /// Takes a channel out of the table, unless another has its number by now. At PASSIVE.
    pub(super) fn uninstall(&self, id: ChannelId, channel: &Channel) {
        if let Some(slot) = self.slot(id) {
            let is_it = |known: &mut Arc<Shared>| Arc::ptr_eq(known, channel.shared());
            let gone = slot.lock(&*self.hypervisor).take_if(is_it);
            // Dropped here, where the lock is open and the level is what it was.
            drop(gone);
        }
    }

    fn find(&self, id: ChannelId) -> Option<Channel> {
        let shared = self.slot(id)?.lock(&*self.hypervisor).clone()?;
        Some(Channel::from_shared(shared))
    }

    /// Serves the interrupt of a channel. Returns whether there is such a channel.
    pub(crate) fn on_event(&self, id: ChannelId) -> bool {
        match self.find(id) {
            Some(channel) => {
                channel.dispatch(Level::Dispatch);
                true
            }
            None => false,
        }
    }

    /// Has the dispatcher run for a channel at PASSIVE.
    pub(super) fn defer(&self, id: ChannelId) {
        self.deferred.add(id);
        self.request_work();
    }

    /// Runs the dispatcher once for every channel that was deferred. At PASSIVE.
    pub(crate) fn run_deferred(&self) {
        self.deferred.serve_each(|id| {
            if let Some(channel) = self.find(id) {
                channel.dispatch(Level::Passive);
            }
        });
    }

    /// Keeps memory for as long as the host may touch it. At PASSIVE.
    pub(super) fn keep(&self, memory: Box<dyn Any + Send>) {
        self.kept.lock().push(memory);
    }

    /// The host touches nothing any more. At PASSIVE.
    pub(crate) fn release_kept(&self) {
        let kept = core::mem::take(&mut *self.kept.lock());
        // Owners of the driver's are dropped while no lock is held.
        drop(kept);
    }

    /// Ready when `look` says so; it is asked again after each change.
    pub(super) fn poll_change(
        &self,
        context: &mut Context<'_>,
        look: impl Fn() -> bool,
    ) -> Poll<()> {
        if look() {
            return Poll::Ready(());
        }
        self.register(context.waker());
        // What came before the registration woke nobody.
        if look() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// The whole stack, while it exists.
    pub(super) fn stack(&self) -> Option<Arc<dyn Serve>> {
        self.stack.get().and_then(Weak::upgrade)
    }

    pub(super) fn request_work(&self) {
        self.hypervisor.request_work();
    }

    /// Has the state of every channel looked at.
    pub(crate) fn request_attention(&self) {
        self.set_attention();
        self.request_work();
    }

    /// The same, for the one who is about to work and wants to sleep after that.
    pub(crate) fn set_attention(&self) {
        self.attention.store(true, Ordering::SeqCst);
    }

    /// Whether that was asked for since the last call.
    pub(crate) fn take_attention(&self) -> bool {
        self.attention.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn notify(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.request_work();
    }

    pub(crate) fn register(&self, waker: &Waker) {
        let mut wakers = self.wakers.lock(&*self.hypervisor);
        if !wakers.iter().any(|known| known.will_wake(waker)) {
            wakers.push(waker.clone());
        }
    }

    /// Wakes all who wait for a change. At PASSIVE.
    pub(crate) fn wake(&self) {
        loop {
            let waker = self.wakers.lock(&*self.hypervisor).pop();
            match waker {
                Some(waker) => waker.wake(),
                None => return,
            }
        }
    }

    /// The earliest time at which a ring has to be looked at without a signal, or a request given up.
    pub(crate) fn poll_deadline(&self) -> Option<u64> {
        let channels = self.channels.lock();
        channels
            .iter()
            .map(|channel| {
                let shared = channel.shared();
                let poll = shared.poll_at.load(Ordering::Relaxed);
                poll.min(shared.request_at.load(Ordering::SeqCst))
            })
            .min()
            .filter(|&at| at != u64::MAX)
    }

    /// Defers every channel whose ring has to be looked at by now, and gives up requests whose time is over. At PASSIVE.
    pub(crate) fn poll_rings(&self, now: u64) {
        let channels = self.channels.lock();
        let late = |channel: &&Channel| channel.shared().request_at.load(Ordering::SeqCst) <= now;
        let late: Vec<Channel> = channels.iter().filter(late).cloned().collect();
        drop(channels);
        for channel in late {
            channel.shared().expire_requests(now);
        }
        for channel in self.channels.lock().iter() {
            let shared = channel.shared();
            if shared.poll_at.load(Ordering::Relaxed) <= now {
                shared.poll_at.store(u64::MAX, Ordering::Relaxed);
                shared.defer();
            }
        }
    }
}
