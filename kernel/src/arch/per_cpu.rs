//! What belongs to one VP, found through the GS base.

use core::cell::UnsafeCell;
use core::ptr;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::registers::model_specific::GsBase;

use super::descriptors::{Descriptors, StackSlot};
use crate::partition::VpPartition;

/// Everything that belongs to one virtual processor.
pub struct PerCpu {
    /// The VP index that the hypervisor gave; 0 until it was asked.
    vp_index: AtomicU32,
    descriptors: Descriptors,
    interrupt_stack_top: AtomicU64,
    /// External interrupts that found interrupts off: a fault of nested emulation, see `traps`.
    pub spurious_interrupts: AtomicU64,
    /// Work queued on this VP, a bit for each kind: see `work`.
    pub work: AtomicU64,
    /// External interrupts handled.
    pub interrupts: AtomicU64,
    /// The VP's part of the Hyper-V interface: SynIC, timer, hypercall input page.
    pub partition: Once<VpPartition>,
}

/// The stacks that a VP switches to, each given by its top.
#[derive(Clone, Copy, Debug)]
pub struct Stacks {
    /// For external interrupts.
    pub interrupt: u64,
    /// For double faults.
    pub double_fault: u64,
    /// For non-maskable interrupts.
    pub nmi: u64,
    /// For machine checks.
    pub machine_check: u64,
}

impl PerCpu {
    const fn new() -> Self {
        Self {
            vp_index: AtomicU32::new(0),
            descriptors: Descriptors::empty(),
            interrupt_stack_top: AtomicU64::new(0),
            spurious_interrupts: AtomicU64::new(0),
            work: AtomicU64::new(0),
            interrupts: AtomicU64::new(0),
            partition: Once::new(),
        }
    }

    /// The VP's index within the partition.
    pub fn vp_index(&self) -> u32 {
        self.vp_index.load(Ordering::Relaxed)
    }

    /// Says the VP's index within the partition.
    pub fn set_vp_index(&self, index: u32) {
        self.vp_index.store(index, Ordering::Relaxed);
    }

    pub(super) fn interrupt_stack_top(&self) -> u64 {
        self.interrupt_stack_top.load(Ordering::Relaxed)
    }
}

/// The boot VP's data: there before there is a heap. Other VPs will allocate theirs.
static BOOT_VP: PerCpu = PerCpu::new();

/// The GS base points at a cell that holds the address of the VP's data.
struct BasePointer(UnsafeCell<*const PerCpu>);

// SAFETY: written by one VP before it reads it.
unsafe impl Sync for BasePointer {}

static BOOT_BASE: BasePointer = BasePointer(UnsafeCell::new(ptr::null()));

/// Makes the boot VP's data reachable through [`current`].
pub fn init_boot_vp() {
    // SAFETY: nothing reads the cell before the GS base points at it.
    unsafe { *BOOT_BASE.0.get() = &BOOT_VP };
    let base = VirtAddr::from_ptr(BOOT_BASE.0.get());
    GsBase::write(base);
}

/// Gives the boot VP its stacks, fresh ones, and loads its descriptor tables.
///
/// # Panics
///
/// When it has them already.
pub fn load_boot_vp_descriptors(stacks: Stacks) {
    let before = BOOT_VP
        .interrupt_stack_top
        .swap(stacks.interrupt, Ordering::Relaxed);
    assert!(before == 0, "the boot VP's descriptors are loaded already");
    let exceptions = [
        (StackSlot::DoubleFault, stacks.double_fault),
        (StackSlot::Nmi, stacks.nmi),
        (StackSlot::MachineCheck, stacks.machine_check),
    ];
    // SAFETY: once, as the assertion sees to, on the only VP that runs.
    unsafe { BOOT_VP.descriptors.load(exceptions) };
    // Loading segments may have reset the base.
    init_boot_vp();
}

/// The data of the VP that runs this.
pub fn current() -> &'static PerCpu {
    let pointer: *const PerCpu;
    // SAFETY: `init_boot_vp` runs before anything that asks.
    unsafe {
        core::arch::asm!("mov {}, gs:[0]", out(reg) pointer, options(nostack, readonly, pure, preserves_flags));
    }
    // SAFETY: the cell holds the address of a static.
    unsafe { &*pointer }
}
