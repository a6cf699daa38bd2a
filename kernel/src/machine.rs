//! The machine as an appliance sees it.

use vmbus::Snapshot;
use vmbus::Vmbus;
use vmbus::drivers::balloon;

use crate::arch::{apic, heap, per_cpu};
use crate::command_line::CommandLine;
use crate::hyperv::{Features, clock, synic};
use crate::memory::manager;
use crate::milestone::{self, Milestone};
use crate::services::clock::Clock;
use crate::services::shutdown::{self, Request};
use crate::services::{Decision, Hook};
use crate::{acpi_tables, drivers, partition, start};

/// Everything that an appliance is given. There is one.
#[derive(Debug)]
pub struct Machine {
    _one: (),
}

/// Memory of the machine at one moment, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Memory {
    /// RAM that the machine was given.
    pub ram: u64,
    /// RAM that nobody uses.
    pub free: u64,
    /// RAM that the host has taken by the balloon.
    pub ballooned: u64,
    /// Heap in use.
    pub heap_used: u64,
    /// Heap that is mapped.
    pub heap_size: u64,
}

impl Memory {
    /// RAM that kernel and appliance use.
    pub fn used(&self) -> u64 {
        self.ram
            .saturating_sub(self.free)
            .saturating_sub(self.ballooned)
    }
}

/// Interrupts of the boot VP since it started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interrupts {
    /// Handled.
    pub handled: u64,
    /// Found interrupts off, which hardware cannot do: counted and ignored.
    pub spurious: u64,
    /// What the SynIC brought.
    pub synic: Option<synic::Statistics>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self { _one: () }
    }

    /// The command line.
    pub fn command_line(&self) -> CommandLine<'static> {
        start::command_line()
    }

    /// What the hypervisor offers.
    pub fn hypervisor(&self) -> &'static Features {
        partition::features()
    }

    /// Where the time comes from.
    pub fn clock_source(&self) -> clock::Source {
        clock::source()
    }

    /// How the synthetic timer makes itself heard.
    pub fn timer_mode(&self) -> &'static str {
        use crate::hyperv::stimer::Mode;
        match per_cpu::current().partition.get().map(|vp| vp.timer.mode()) {
            Some(Mode::Direct(_)) => "direct",
            Some(Mode::Message(_)) => "by message",
            None => "none",
        }
    }

    /// How the APIC is reached.
    pub fn apic(&self) -> Option<apic::Access> {
        partition::apic_access()
    }

    /// The index of the VP that runs this.
    pub fn vp_index(&self) -> u32 {
        per_cpu::current().vp_index()
    }

    /// Processors that the firmware names as enabled. Only one of them runs.
    pub fn processors(&self) -> u32 {
        acpi_tables::platform().processors
    }

    /// The VMBus stack, to enable channels of one's own.
    pub fn vmbus(&self) -> &'static Vmbus {
        drivers::vmbus().expect("VMBus was started before the appliance")
    }

    /// The connection to the host, its offers, and who serves them.
    pub fn vmbus_snapshot(&self) -> Snapshot {
        self.vmbus().snapshot()
    }

    /// How the balloon stands.
    pub fn balloon(&self) -> balloon::Status {
        drivers::balloon()
            .expect("the balloon was started before the appliance")
            .status()
    }

    /// How much memory there is.
    pub fn memory(&self) -> Memory {
        let figures = manager::figures();
        let heap = heap::usage();
        Memory {
            ram: figures.ram * 4096,
            free: figures.free * 4096,
            ballooned: self.balloon().ballooned_pages * 4096,
            heap_used: heap.used as u64,
            heap_size: heap.size as u64,
        }
    }

    /// What interrupts there were.
    pub fn interrupts(&self) -> Interrupts {
        use core::sync::atomic::Ordering::Relaxed;
        let cpu = per_cpu::current();
        Interrupts {
            handled: cpu.interrupts.load(Relaxed),
            spurious: cpu.spurious_interrupts.load(Relaxed),
            synic: cpu.partition.get().map(|vp| vp.synic.statistics()),
        }
    }

    /// When the boot got where.
    pub fn milestones(&self) -> impl Iterator<Item = Milestone> {
        milestone::all()
    }

    /// The wall clock.
    pub fn clock(&self) -> Clock {
        Clock::new()
    }

    /// Has `hook` decide what becomes of the host's requests to power off or to restart, in place of the hook before. Without one, all
    /// are accepted.
    ///
    /// The hook returns a [`Decision`], or a future of one: it may wait, and put the appliance's things in order, for as
    /// long as the host's patience lasts ([`Request::timeout_seconds`]). The host gets its answer when the hook is done. A request
    /// that is accepted is then obeyed: the machine leaves VMBus and powers off or restarts.
    pub fn on_shutdown<D>(&self, hook: impl Fn(Request) -> D + Send + Sync + 'static)
    where
        D: IntoFuture<Output = Decision>,
        D::IntoFuture: 'static,
    {
        shutdown::set_hook(Hook::new(hook));
    }

    /// Leaves VMBus and powers off.
    pub async fn power_off(&self) -> ! {
        shutdown::power_off().await
    }

    /// Leaves VMBus and reboots, by the hypervisor's reset register.
    pub async fn reboot(&self) -> ! {
        shutdown::reboot().await
    }
}
