//! GPADLs of a driver: memory that it lends to the host for as long as it wants, named by a handle.
//!
//! The driver makes them from inside its opened callback until inside its closed callback, and owns each as a
//! [`Gpadl`]. The memory stays with the library until the host has let go of it (spec kmcl.md 1.10).

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::fmt;
use core::future::Future;
use core::ops::Range;
use core::pin::Pin;
use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use core::task::{Context, Poll};

use spin::Mutex;

use super::channel::{Channel, State};
use crate::bus::{self, Bus, GpaRange};
use crate::hypervisor::OutOfMemory;
use crate::ids::{GpadlHandle, PAGE_SIZE, PageNumber};
use crate::shared::SharedPages;

/// Memory lent to the host under a handle. Dropping it asks for it back in the background;
/// [`delete`](Self::delete) also waits for it.
///
/// One that is left when the closed callback has returned is a bug of the driver: that is logged and
/// counted, and it is taken back all the same.
#[must_use = "dropping it takes the memory back"]
pub struct Gpadl {
    channel: Channel,
    entry: Arc<Entry>,
    pages: Option<SharedPages>,
}

/// What the host may do with the memory: a hint for it, not a protection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GpadlAccess {
    /// Read and write.
    #[default]
    ReadWrite,
    /// Read only.
    ReadOnly,
}

/// The memory of a GPADL: one range for the host, in whatever pages it lies.
#[derive(Clone)]
pub enum GpadlSource {
    /// Whole pages of the library's.
    Pages(SharedPages),
    /// Pieces that follow each other. Where one ends and the next begins must be page boundaries.
    Pieces(Vec<(SharedPages, Range<usize>)>),
    /// Whole pages by number, of memory that `owner` keeps.
    PageNumbers {
        /// The pages, in order.
        pages: Vec<PageNumber>,
        /// Dropped when the host has let go of the pages.
        owner: Arc<dyn Any + Send + Sync>,
    },
}

/// Why there is no GPADL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GpadlError {
    /// The channel is not in a state in which GPADLs can be made, or has left it.
    NotNow(State),
    /// There is no memory in it, or more than one range can have.
    Length,
    /// Pieces meet elsewhere than at a page boundary.
    NotAligned,
    /// There is no memory for it.
    NoMemory(OutOfMemory),
    /// The bus refused it.
    Bus(bus::Error),
    /// The host did not take it.
    Host(bus::GpadlError),
}

impl fmt::Display for GpadlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotNow(state) => write!(f, "the channel is {state}"),
            Self::Length => f.write_str("no memory, or more than one GPADL can describe"),
            Self::NotAligned => f.write_str("the pieces do not meet at page boundaries"),
            Self::NoMemory(error) => error.fmt(f),
            Self::Bus(error) => error.fmt(f),
            Self::Host(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for GpadlError {}

impl Channel {
    /// Lends memory to the host. Ready when the host has confirmed it, so that the handle can be
    /// put in a message at once. Dropping the result before takes the memory back. Called at PASSIVE.
    ///
    /// `access` is the driver's word to the library; the messages of VMBus have no place for it.
    ///
    /// # Errors
    ///
    /// Every [`GpadlError`]; the state and the shape of the memory are checked before the host hears of it.
    pub fn create_gpadl(
        &self,
        source: GpadlSource,
        access: GpadlAccess,
    ) -> Result<CreateGpadl, GpadlError> {
        let shared = self.shared();
        // Before the shape of the memory is looked at.
        if shared.lifecycle.lock().open_channel().is_none() {
            return Err(GpadlError::NotNow(self.state()));
        }
        let range = source.range()?;
        let pages = match &source {
            GpadlSource::Pages(pages) => Some(pages.clone()),
            _ => None,
        };
        let entry = Arc::new(Entry {
            step: AtomicU8::new(Step::Wanted as u8),
            handle: AtomicU32::new(0),
            unwanted: AtomicBool::new(false),
            error: Mutex::new(None),
            range: Mutex::new(Some(range)),
            memory: Mutex::new(Some(source)),
            access,
        });
        // Under the lock: one that is lined up after the closing would stay there.
        let lifecycle = shared.lifecycle.lock();
        if lifecycle.open_channel().is_none() {
            drop(lifecycle);
            return Err(GpadlError::NotNow(self.state()));
        }
        shared.gpadls.entries.lock().push(entry.clone());
        drop(lifecycle);
        shared.client.request_attention();
        Ok(CreateGpadl {
            gpadl: Some(Gpadl {
                channel: self.clone(),
                entry,
                pages,
            }),
        })
    }

    /// Takes `pages` pages of memory and lends them to the host.
    ///
    /// # Errors
    ///
    /// As [`create_gpadl`](Self::create_gpadl).
    pub fn allocate_gpadl(&self, pages: usize) -> Result<CreateGpadl, GpadlError> {
        let memory = self
            .shared()
            .client
            .hypervisor
            .share_pages(pages)
            .map_err(GpadlError::NoMemory)?;
        self.create_gpadl(GpadlSource::Pages(memory), GpadlAccess::ReadWrite)
    }

    /// Does for the driver's GPADLs what can be done now. Also while a callback of the channel runs.
    pub(super) fn step_gpadls(&self, bus: &Mutex<Bus>) {
        let shared = self.shared();
        let entries = shared.gpadls.entries.lock().clone();
        for entry in entries {
            let now = shared.client.hypervisor.reference_time();
            match entry.step() {
                Step::Wanted if entry.unwanted.load(Ordering::SeqCst) => {
                    shared.gpadls.forget(&entry);
                }
                Step::Wanted => {
                    let channel = shared.lifecycle.lock().open_channel();
                    let range = entry.range.lock().take();
                    let created = match (channel, range) {
                        (Some(channel), Some(range)) => bus
                            .lock()
                            .create_gpadl(now, channel, &[range])
                            .map_err(GpadlError::Bus),
                        _ => Err(GpadlError::NotNow(self.state())),
                    };
                    match created {
                        Ok(handle) => {
                            entry.handle.store(handle.0, Ordering::SeqCst);
                            entry.set_step(Step::Creating);
                        }
                        Err(error) => shared.gpadls.fail(&entry, error),
                    }
                    shared.client.notify();
                }
                Step::Live if entry.unwanted.load(Ordering::SeqCst) => {
                    entry.set_step(Step::TearingDown);
                    if let Err(error) = bus.lock().teardown_gpadl(now, entry.handle()) {
                        log::warn!("{}: deleting a GPADL: {error}", self.friendly_name());
                        entry.keep(self);
                        shared.gpadls.forget(&entry);
                        shared.client.notify();
                    }
                }
                _ => {}
            }
        }
    }
}

impl GpadlSource {
    /// The memory as the one range that the host sees.
    fn range(&self) -> Result<GpaRange, GpadlError> {
        let whole = |pages: &mut dyn Iterator<Item = PageNumber>| {
            GpaRange::whole_pages(pages).map_err(|_| GpadlError::Length)
        };
        match self {
            Self::Pages(pages) => whole(&mut pages.pages()),
            Self::PageNumbers { pages, .. } => whole(&mut pages.iter().copied()),
            Self::Pieces(pieces) => range_of_pieces(pieces),
        }
    }
}

fn range_of_pieces(pieces: &[(SharedPages, Range<usize>)]) -> Result<GpaRange, GpadlError> {
    let (Some((_, first)), Some(last)) = (pieces.first(), pieces.len().checked_sub(1)) else {
        return Err(GpadlError::Length);
    };
    let byte_offset = (first.start % PAGE_SIZE) as u32;
    let mut byte_count = 0usize;
    let mut numbers = Vec::new();
    for (index, (pages, range)) in pieces.iter().enumerate() {
        if range.start >= range.end || range.end > pages.len() {
            return Err(GpadlError::Length);
        }
        if (index > 0 && !range.start.is_multiple_of(PAGE_SIZE))
            || (index < last && !range.end.is_multiple_of(PAGE_SIZE))
        {
            return Err(GpadlError::NotAligned);
        }
        byte_count = byte_count.saturating_add(range.len());
        let (begin, end) = (range.start / PAGE_SIZE, range.end.div_ceil(PAGE_SIZE));
        numbers.extend(pages.pages().skip(begin).take(end - begin));
        if numbers.len() > bus::MAX_PAGES {
            return Err(GpadlError::Length);
        }
    }
    Ok(GpaRange {
        byte_offset,
        byte_count: u32::try_from(byte_count).map_err(|_| GpadlError::Length)?,
        pages: numbers,
    })
}

impl Gpadl {
    /// The name that the host knows the memory by.
    pub fn handle(&self) -> GpadlHandle {
        self.entry.handle()
    }

    /// The memory, where it is the library's own.
    pub fn memory(&self) -> Option<&SharedPages> {
        self.pages.as_ref()
    }

    /// What the driver said that the host may do with the memory.
    pub fn access(&self) -> GpadlAccess {
        self.entry.access
    }

    /// The channel whose host knows the memory.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// Takes the memory back. Ready when the host has let go of it, however long it has it mapped.
    pub fn delete(self) -> DeleteGpadl {
        DeleteGpadl {
            channel: self.channel.clone(),
            entry: self.entry.clone(),
        }
    }
}

impl Drop for Gpadl {
    fn drop(&mut self) {
        self.entry.unwanted.store(true, Ordering::SeqCst);
        self.channel.shared().client.request_attention();
    }
}

/// A GPADL on its way to the host; see [`Channel::create_gpadl`].
#[must_use = "dropping it takes the memory back"]
pub struct CreateGpadl {
    /// Until it is handed out.
    gpadl: Option<Gpadl>,
}

impl Future for CreateGpadl {
    type Output = Result<Gpadl, GpadlError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(gpadl) = &self.gpadl else {
            return Poll::Pending;
        };
        let client = &gpadl.channel.shared().client;
        let entry = &gpadl.entry;
        let decided = || !matches!(entry.step(), Step::Wanted | Step::Creating);
        if client.poll_change(context, decided).is_pending() {
            return Poll::Pending;
        }
        let error = entry.error.lock().take();
        let gone = GpadlError::NotNow(gpadl.channel.state());
        let live = entry.step() == Step::Live;
        Poll::Ready(match self.gpadl.take() {
            Some(gpadl) if live => Ok(gpadl),
            _ => Err(error.unwrap_or(gone)),
        })
    }
}

/// A GPADL on its way back from the host; see [`Gpadl::delete`].
#[derive(Debug)]
#[must_use = "the GPADL goes in the background"]
pub struct DeleteGpadl {
    channel: Channel,
    entry: Arc<Entry>,
}

impl Future for DeleteGpadl {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let gone = || self.entry.step() == Step::Gone;
        self.channel.shared().client.poll_change(context, gone)
    }
}

/// The GPADLs of one channel.
#[derive(Default)]
pub(super) struct Gpadls {
    /// PASSIVE only.
    entries: Mutex<Vec<Arc<Entry>>>,
}

/// One GPADL, as driver and library share it.
struct Entry {
    /// A [`Step`].
    step: AtomicU8,
    handle: AtomicU32,
    /// The driver does not want it any more.
    unwanted: AtomicBool,
    error: Mutex<Option<GpadlError>>,
    /// What to tell the host, until it has been told.
    range: Mutex<Option<GpaRange>>,
    /// Keeps the memory until the host has let go of it.
    memory: Mutex<Option<GpadlSource>>,
    access: GpadlAccess,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// The host has not been told.
    Wanted,
    /// The host has been told.
    Creating,
    /// The host knows it.
    Live,
    /// The host has been asked to let go of it.
    TearingDown,
    /// The host does not know it.
    Gone,
}

impl Entry {
    fn step(&self) -> Step {
        match self.step.load(Ordering::SeqCst) {
            0 => Step::Wanted,
            1 => Step::Creating,
            2 => Step::Live,
            3 => Step::TearingDown,
            _ => Step::Gone,
        }
    }

    fn set_step(&self, step: Step) {
        self.step.store(step as u8, Ordering::SeqCst);
    }

    fn handle(&self) -> GpadlHandle {
        GpadlHandle(self.handle.load(Ordering::SeqCst))
    }

    /// Keeps the memory aside: the host may still touch it.
    fn keep(&self, channel: &Channel) {
        if let Some(memory) = self.memory.lock().take() {
            channel.shared().client.keep(Box::new(memory));
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("step", &self.step())
            .field("handle", &self.handle())
            .finish_non_exhaustive()
    }
}

impl Gpadls {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.lock().is_empty()
    }

    fn find(&self, handle: GpadlHandle) -> Option<Arc<Entry>> {
        let entries = self.entries.lock();
        let known = |entry: &&Arc<Entry>| {
            entry.handle() == handle && matches!(entry.step(), Step::Creating | Step::TearingDown)
        };
        entries.iter().find(known).cloned()
    }

    /// The host knows nothing of it any more.
    fn forget(&self, entry: &Arc<Entry>) {
        entry.set_step(Step::Gone);
        let memory = entry.memory.lock().take();
        self.entries
            .lock()
            .retain(|other| !Arc::ptr_eq(other, entry));
        // An owner of the driver's is dropped while no lock is held.
        drop(memory);
    }

    fn fail(&self, entry: &Arc<Entry>, error: GpadlError) {
        *entry.error.lock() = Some(error);
        self.forget(entry);
    }

    pub(super) fn on_created(
        &self,
        channel: &Channel,
        handle: GpadlHandle,
        result: Result<(), bus::GpadlError>,
    ) -> bool {
        let Some(entry) = self.find(handle) else {
            return false;
        };
        match result {
            Ok(()) => entry.set_step(Step::Live),
            Err(error) => {
                if !error.frees_memory() {
                    entry.keep(channel);
                }
                self.fail(&entry, GpadlError::Host(error));
            }
        }
        channel.shared().client.notify();
        channel.shared().client.request_attention();
        true
    }

    pub(super) fn on_torn_down(&self, channel: &Channel, handle: GpadlHandle) -> bool {
        let Some(entry) = self.find(handle) else {
            return false;
        };
        self.forget(&entry);
        channel.shared().client.notify();
        true
    }

    /// The closed callback has run: whatever is left is taken back.
    pub(super) fn force_deletion(&self, channel: &Channel) {
        for entry in self.entries.lock().iter() {
            if !entry.unwanted.swap(true, Ordering::SeqCst) {
                channel.shared().counters.leaked_gpadls.add(1);
                log::error!(
                    "{}: driver bug: GPADL {} was left when the channel was closed",
                    channel.friendly_name(),
                    entry.handle()
                );
            }
        }
    }

    /// The connection is no more. Unless `acknowledged`, the host may still touch the memory.
    pub(super) fn disconnected(&self, channel: &Channel, acknowledged: bool) {
        let entries = core::mem::take(&mut *self.entries.lock());
        for entry in entries {
            if !acknowledged && entry.step() != Step::Wanted {
                entry.keep(channel);
            }
            self.fail(&entry, GpadlError::NotNow(channel.state()));
        }
        channel.shared().client.notify();
    }
}

impl fmt::Debug for Gpadl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gpadl").field(&self.entry).finish()
    }
}

impl fmt::Debug for CreateGpadl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CreateGpadl").field(&self.gpadl).finish()
    }
}
