//! This machine as a partition: the Hyper-V interface set up, and the VMBus stack's view of it.

use core::fmt;

use spin::Once;
use vmbus::hypervisor::{Hypervisor, Level, OutOfMemory, PostError};
use vmbus::ids::{ConnectionId, VpIndex};
use vmbus::shared::SharedPages;

use crate::arch::{apic, cpu, per_cpu};
use crate::hyperv::features::{Absent, Features, Missing};
use crate::hyperv::hypercall::{self, EnableError, GuestOsId, Hypercalls, Patience};
use crate::hyperv::message::MessageType;
use crate::hyperv::msr::Vector;
use crate::hyperv::vp::{Pages, Vectors};
use crate::hyperv::{VirtualProcessor, clock, crash, reset};
use crate::memory::manager;
use crate::work::WorkItem;
use crate::{drivers, interrupt, milestone, task};

/// The boot VP's part of the Hyper-V interface, kept with its other data.
pub(crate) type VpPartition = VirtualProcessor;

static FEATURES: Once<Features> = Once::new();
static HYPERCALLS: Once<Hypercalls> = Once::new();
static APIC: Once<apic::Access> = Once::new();

/// Why the Hyper-V interface cannot be used.
#[derive(Debug)]
pub(crate) enum Error {
    Absent(Absent),
    Missing(Missing),
    Hypercalls(EnableError),
    OutOfMemory,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(absent) => absent.fmt(f),
            Self::Missing(missing) => missing.fmt(f),
            Self::Hypercalls(error) => error.fmt(f),
            Self::OutOfMemory => {
                f.write_str("no memory is left for the pages shared with the hypervisor")
            }
        }
    }
}

/// Finds the hypervisor. From here on there is a clock and a way to report a crash, if it has them.
pub(crate) fn detect() -> Result<&'static Features, Error> {
    let features = Features::detect().map_err(Error::Absent)?;
    let features = FEATURES.call_once(|| features);
    // First without a page each: whatever fails from here on can be reported.
    crash::init(features, None);
    clock::init(features, None);
    features.check().map_err(Error::Missing)?;
    Ok(features)
}

/// Sets up everything of the Hyper-V interface that belongs to the machine and to the boot VP,
/// with interrupts off.
pub(crate) fn init(features: &'static Features) -> Result<(), Error> {
    let page = || manager::hypervisor_page().ok_or(Error::OutOfMemory);
    clock::init(features, Some(page()?));
    milestone::anchor();
    crash::init(features, Some(page()?));
    let code = manager::hypercall_page().ok_or(Error::OutOfMemory)?;
    let hypercalls = Hypercalls::enable(GuestOsId::ENLIT, code).map_err(Error::Hypercalls)?;
    HYPERCALLS.call_once(|| hypercalls);

    let access = apic::init(features).ok_or(Error::OutOfMemory)?;
    APIC.call_once(|| access);
    interrupt::set_handler(interrupt::TIMER, task::time::on_interrupt);
    let pages = Pages {
        post: page()?,
        messages: page()?,
        events: page()?,
    };
    let vectors = Vectors {
        vmbus: vector(interrupt::VMBUS),
        timer: vector(interrupt::TIMER),
    };
    let vp = VirtualProcessor::start(features, pages, vectors);
    let cpu = per_cpu::current();
    cpu.set_vp_index(vp.index.0);
    cpu.partition.call_once(|| vp);
    Ok(())
}

fn vector(number: u8) -> Vector {
    Vector::new(number).expect("vectors of external interrupts are above 16")
}

/// What the hypervisor offers.
///
/// # Panics
///
/// Before it was detected: a machine that gets as far as `main` has one.
pub(crate) fn features() -> &'static Features {
    FEATURES
        .get()
        .expect("the hypervisor was detected while booting")
}

/// How the APIC is reached.
pub(crate) fn apic_access() -> Option<apic::Access> {
    APIC.get().copied()
}

/// Restarts the partition. Returns only if the hypervisor has no way to do that.
pub(crate) fn reset() {
    if let Some(features) = FEATURES.get() {
        reset::reset(features);
    }
}

/// Lets go of the SynIC and the timer, before the machine ends.
pub(crate) fn stop() {
    cpu::disable_interrupts();
    if let Some(vp) = per_cpu::current().partition.get() {
        vp.stop();
    }
}

/// The hypervisor as the VMBus stack sees it.
pub(crate) struct Partition {
    /// Runs the stack's PASSIVE work.
    pub(crate) work: Once<WorkItem>,
}

impl Hypervisor for Partition {
    fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> Result<(), PostError> {
        let (Some(hypercalls), Some(vp)) = (HYPERCALLS.get(), per_cpu::current().partition.get())
        else {
            return Err(PostError::Busy);
        };
        let kind = MessageType::CHANNEL;
        vp.poster
            .post(hypercalls, connection.0, kind, payload, Patience::NORMAL)
            .map_err(|error| match error {
                hypercall::PostError::InvalidConnection => PostError::InvalidConnection,
                hypercall::PostError::Busy(_) => PostError::Busy,
                hypercall::PostError::Failed(status) => PostError::Status(status.0),
                hypercall::PostError::TooLong { .. } => {
                    PostError::Status(hypercall::Status::INVALID_PARAMETER.0)
                }
            })
    }

    fn signal_event(&self, connection: ConnectionId, flag: u16) {
        let Some(hypercalls) = HYPERCALLS.get() else {
            return;
        };
        if let Err(status) = hypercalls.signal_event(connection.0, flag) {
            log::warn!("vmbus: signalling connection {connection} failed: {status}");
        }
    }

    fn share_pages(&self, count: usize) -> Result<SharedPages, OutOfMemory> {
        manager::share_pages(count)
    }

    fn reference_time(&self) -> u64 {
        clock::now()
    }

    fn current_vp(&self) -> VpIndex {
        VpIndex(per_cpu::current().vp_index())
    }

    fn raise_to_dispatch(&self) -> Level {
        let level = if cpu::interrupts_enabled() {
            Level::Passive
        } else {
            Level::Dispatch
        };
        cpu::disable_interrupts();
        level
    }

    fn lower(&self, level: Level) {
        if level == Level::Passive {
            cpu::enable_interrupts();
        }
    }

    fn wait_for_interrupt(&self, until: Option<u64>) {
        let Some(work) = self.work.get() else {
            return;
        };
        drivers::offer_held();
        work.queue_at(until);
        task::time::update();
        cpu::disable_interrupts();
        if work.take() || task::time::is_stale() {
            cpu::enable_interrupts();
        } else {
            cpu::enable_interrupts_and_halt();
        }
    }

    fn request_work(&self) {
        if let Some(work) = self.work.get() {
            work.queue();
        }
    }
}
