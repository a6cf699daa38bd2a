//! A partition: processors, memory, SynIC and board of one VM, on KVM. It knows no VMBus: its owner does.
//!
//! Each virtual processor has a thread. What the guest wants of its owner comes as calls of [`Owner`] on these threads.
//! A partition is made stopped, ends once (the owner is told how) and is not started again: to reset a VM its
//! owner drops the partition and makes a new one.

mod counts;
mod cpuid;
mod crash;
mod gate;
mod hypercall;
mod setup;
mod statistics;
mod synic;
mod vp;

use std::io::Write;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::VmFd;
use vmbus::ids::{ConnectionId, PAGE_SIZE, PageNumber, VpIndex};
use vmbus::shared::SharedPages;
use vmbus_host::bus::{HvStatus, Message};
use vmbus_host::memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

pub use counts::{ExitCounts, ExitKind};
pub use crash::Crash;

use crate::boot::{self, Image};
use crate::platform::board::Board;
use crate::platform::layout::Layout;
use crate::{Error, sys};
use gate::Gate;
use vp::Vp;

/// What a partition is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// How much memory can be added while it runs, in MiB.
    pub hot_add_mib: u64,
    /// Virtual processors.
    pub vps: u32,
    /// Whether the guest can hibernate (ACPI S4).
    pub hibernation: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            hot_add_mib: 0,
            vps: 1,
            hibernation: false,
        }
    }
}

/// Whoever has the partition. Calls come on the threads of virtual processors, several at a time, and must not
/// block for long; [`Partition::pause`] waits for them, so it must not be called in one.
pub trait Owner: Send + Sync {
    /// The guest posts a message of type 1 to `connection` (HvPostMessage). The status is the guest's answer.
    fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> HvStatus;

    /// The guest signals an event that [`Partition::route_signal`] does not cover (HvSignalEvent).
    fn signal_event(&self, connection: ConnectionId, flag: u16) -> HvStatus;

    /// The message that [`Partition::deliver_message`] took last for this VP is in its slot, or was lost because
    /// the VP takes none: the next one can be given.
    fn message_delivered(&self, vp: VpIndex);

    /// The guest has read all input of COM1: [`Partition::console_input`] takes more.
    fn console_drained(&self);

    /// The guest has reported a crash, through its crash MSRs. It goes on running.
    fn crashed(&self, crash: Crash);

    /// The partition has ended: no VP runs guest code any more. Told once.
    fn ended(&self, end: End);
}

/// How a partition ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The guest has powered off (ACPI S5).
    PowerOff,
    /// The guest has saved itself and powered off (ACPI S4).
    Hibernated,
    /// The guest asked for a reset: by the reset register or the hypervisor's reset MSR.
    Reset,
    /// A processor took a triple fault, which resets the machine.
    TripleFault,
    /// The guest wrote this value to the debug-exit port. QEMU's process ends with status `value << 1 | 1`.
    DebugExit(u32),
    /// The VM cannot go on: what happened and the processor's state, several lines.
    Failed(String),
}

/// A VM without a host. Dropping it ends its threads.
#[derive(Debug)]
pub struct Partition {
    shared: Arc<Shared>,
}

/// What the threads share.
struct Shared {
    vm: Arc<VmFd>,
    settings: Settings,
    layout: Layout,
    memory: GuestMemory,
    /// All memory, in the order in which KVM has it.
    runs: Mutex<Vec<SharedPages>>,
    vps: Vec<Vp>,
    gate: Gate,
    board: Board,
    crash: Mutex<crash::Registers>,
    owner: Arc<dyn Owner>,
    /// KVM's clock in nanoseconds while the processors stand still: it begins when they first run.
    stopped_at: Mutex<Option<u64>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Partition")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Partition {
    /// Makes a partition without anything to run. What the guest writes to COM1 goes to `console`.
    pub fn new(
        settings: &Settings,
        console: Box<dyn Write + Send>,
        owner: Arc<dyn Owner>,
    ) -> Result<Self, Error> {
        setup::create(settings, console, owner).map(|shared| Self { shared })
    }

    /// Puts the kernel and what belongs to it into memory and sets the first processor to its entry. Once, before
    /// [`resume`](Self::resume).
    pub fn load(&self, image: &Image) -> Result<(), Error> {
        let shared = &self.shared;
        let runs = lock(&shared.runs).clone();
        let start = boot::load(image, &shared.layout, &shared.settings, &runs)?;
        shared.vps[0].set_start(start);
        Ok(())
    }

    /// Starts the processors, or lets them go on.
    pub fn resume(&self) {
        if !self.shared.gate.is_open() {
            self.shared.continue_clock();
            self.shared.gate.open();
        }
    }

    /// Stops the processors; none runs guest code when this returns. The guest's reference time stands still.
    pub fn pause(&self) {
        self.shared.stop();
        self.shared.gate.wait_until_empty();
        self.shared.stop_clock();
    }

    /// Whether the processors run.
    pub fn is_running(&self) -> bool {
        self.shared.gate.is_open()
    }

    /// The partition's reference time, in units of 100 ns.
    pub fn reference_time(&self) -> u64 {
        self.shared.reference_time()
    }

    /// Sets event flag `flag` of `sint` on a VP and interrupts it, if the flag was not set. `false`: there is
    /// no such VP, or its SynIC takes no events.
    pub fn set_event_flag(&self, vp: VpIndex, sint: u8, flag: u16) -> bool {
        let found = self.shared.vp(vp);
        let set = found.and_then(|found| found.synic().set_event_flag(sint, flag));
        if set == Some(true) {
            self.shared.interrupt(vp, sint);
        }
        set.is_some()
    }

    /// Takes a message for delivery to its VP. `false`: the one before it is not in its slot yet; try again after
    /// [`Owner::message_delivered`]. A message to a VP that does not exist is lost.
    pub fn deliver_message(&self, message: &Message) -> bool {
        self.shared
            .vp(message.vp)
            .is_none_or(|vp| vp.take_message(message))
    }

    /// Has the kernel write to `event` when the guest signals `connection`, without stopping the VP for long; `None` ends that.
    pub fn route_signal(
        &self,
        connection: ConnectionId,
        event: Option<&EventFd>,
    ) -> Result<(), Error> {
        sys::kvm::route_signal(&self.shared.vm, connection.0, event).map_err(|error| Error::Kvm {
            what: "route the guest's signals",
            error,
        })
    }

    /// The guest's memory, including what is added later.
    pub fn memory(&self) -> GuestMemory {
        self.shared.memory.clone()
    }

    /// Where memory can be added, in pages.
    pub fn hot_add_range(&self) -> Range<PageNumber> {
        let pages = &self.shared.layout.hot_add;
        let page = |address| PageNumber(address / PAGE_SIZE as u64);
        page(pages.start)..page(pages.end)
    }

    /// Adds `count` pages of memory at `first`, which must lie in [`hot_add_range`](Self::hot_add_range) and be new.
    pub fn hot_add_memory(&self, first: PageNumber, count: usize) -> Result<(), Error> {
        let range = self.hot_add_range();
        let end = first.0.checked_add(count as u64);
        let fits = first >= range.start && end.is_some_and(|end| end <= range.end.0);
        if !fits {
            return Err(Error::NotForMemory { first, count });
        }
        self.shared.add_memory(first, count)
    }

    /// Gives the host the memory behind pages that the guest does not use (ballooned out). They read as zeros when the
    /// guest touches them again. What is no memory is skipped.
    pub fn discard(&self, first: PageNumber, count: u64) {
        for run in lock(&self.shared.runs).iter() {
            let start = run.first_page().0;
            let end = start + run.page_count() as u64;
            let from = first.0.clamp(start, end);
            let to = first.0.saturating_add(count).clamp(start, end);
            if from < to {
                // It is advice: what stays behind costs memory and does no harm.
                drop(sys::mapping::discard(
                    run,
                    (from - start) as usize,
                    (to - from) as usize,
                ));
            }
        }
    }

    /// Exits to this program by kind, since the partition was made.
    pub fn exits(&self) -> ExitCounts {
        self.shared.vps.iter().map(Vp::counts).sum()
    }

    /// KVM's own statistics of all VPs, by the names that it gives them: exits that it handled itself are among them.
    pub fn kernel_statistics(&self) -> std::collections::BTreeMap<String, u64> {
        statistics::sum(self.shared.vps.iter().filter_map(Vp::statistics))
    }

    /// Gives input to COM1. Returns how many bytes its FIFO took; the guest must read before more fit.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.shared.board.serial_input(bytes)
    }
}

impl Shared {
    fn vp(&self, index: VpIndex) -> Option<&Vp> {
        self.vps.get(usize::try_from(index.0).ok()?)
    }

    /// Raises a SINT. KVM drops it where the guest has masked it.
    fn interrupt(&self, vp: VpIndex, sint: u8) {
        let number = setup::synthetic_interrupt(vp.0, sint);
        // The routes were set up for every SINT of every VP.
        let _ = self.vm.set_irq_line(number, true);
    }

    fn kick_all(&self) {
        self.vps.iter().for_each(Vp::kick);
    }

    /// Closes the gate and calls everybody out.
    fn stop(&self) {
        self.gate.close();
        self.kick_all();
    }

    /// KVM's clock, which is the guest's reference time in nanoseconds.
    fn reference_time(&self) -> u64 {
        let stopped_at = *lock(&self.stopped_at);
        stopped_at.unwrap_or_else(|| self.clock()) / 100
    }

    fn clock(&self) -> u64 {
        // KVM has one for every VM.
        self.vm.get_clock().map_or(0, |clock| clock.clock)
    }

    fn stop_clock(&self) {
        let mut stopped_at = lock(&self.stopped_at);
        if stopped_at.is_none() {
            *stopped_at = Some(self.clock());
        }
    }

    fn continue_clock(&self) {
        let stopped_at = lock(&self.stopped_at).take();
        if let Some(clock) = stopped_at {
            let clock = kvm_clock_data {
                clock,
                ..Default::default()
            };
            // It fails only where there is no clock.
            let _ = self.vm.set_clock(&clock);
        }
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        self.shared.gate.quit();
        self.shared.kick_all();
        for vp in &self.shared.vps {
            vp.join();
        }
    }
}

/// A lock whose holder panicked ends the program anyway, in `panic = "abort"`.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
