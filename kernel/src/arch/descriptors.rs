//! Segment descriptors, task state with its stacks, and the interrupt descriptor table.
//!
//! The three exceptions that may find a broken stack run on stacks of their own, which the
//! processor switches to. External interrupts must not: one delivered twice would overwrite the
//! frame of the first. They change stacks in `traps`, behind the check for that.

use core::cell::UnsafeCell;

use x86_64::PrivilegeLevel;
use x86_64::VirtAddr;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable, SegmentSelector};
use x86_64::structures::tss::TaskStateSegment;

use super::traps::{self, VECTORS};

/// Which stack of the task state a vector runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum StackSlot {
    /// Double faults: the way out of a stack that overflowed.
    DoubleFault = 1,
    /// Non-maskable interrupts.
    Nmi = 2,
    /// Machine checks.
    MachineCheck = 3,
}

/// One VP's descriptor table and task state. Must stay in place once loaded.
pub struct Descriptors {
    gdt: UnsafeCell<GlobalDescriptorTable>,
    tss: UnsafeCell<TaskStateSegment>,
}

// SAFETY: written only by the VP that it belongs to, before it is loaded there.
unsafe impl Sync for Descriptors {}

impl Descriptors {
    /// Descriptors that are not filled in yet.
    pub(super) const fn empty() -> Self {
        Self {
            gdt: UnsafeCell::new(GlobalDescriptorTable::new()),
            tss: UnsafeCell::new(TaskStateSegment::new()),
        }
    }

    /// Fills in the stacks (each given by its top) and loads everything on this VP.
    ///
    /// # Safety
    ///
    /// Called once, on the VP it is for, with stacks that nothing else uses.
    pub unsafe fn load(&'static self, stacks: [(StackSlot, u64); 3]) {
        // SAFETY: the caller's promise: nothing has loaded this yet.
        let gdt = unsafe { &mut *self.gdt.get() };
        // SAFETY: as above.
        let tss = unsafe { &mut *self.tss.get() };
        for (slot, top) in stacks {
            tss.interrupt_stack_table[slot as usize - 1] = VirtAddr::new(top);
        }
        let code = gdt.append(Descriptor::kernel_code_segment());
        let data = gdt.append(Descriptor::kernel_data_segment());
        // SAFETY: `self` is 'static.
        let tss_selector = gdt.append(unsafe { Descriptor::tss_segment_unchecked(self.tss.get()) });
        // SAFETY: `self` is 'static, and the table stays as it is from here on.
        unsafe { gdt.load_unsafe() };
        // SAFETY: the selectors are the ones just made.
        unsafe { load_segments(code, data) };
        // SAFETY: the descriptor names a task state that stays in place.
        unsafe { load_tss(tss_selector) };
        IDT.load(true);
    }
}

/// # Safety
///
/// The selectors name a 64-bit code and a data segment of the loaded table.
unsafe fn load_segments(code: SegmentSelector, data: SegmentSelector) {
    // SAFETY: by the caller's promise.
    unsafe { CS::set_reg(code) };
    // SAFETY: as above.
    unsafe { SS::set_reg(data) };
    // SAFETY: as above.
    unsafe { DS::set_reg(data) };
    // SAFETY: as above.
    unsafe { ES::set_reg(data) };
}

/// A gate of the table (AMD64 Architecture Programmer's Manual 2, section 4.8.4).
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    zero: u32,
}

const _: () = assert!(size_of::<Gate>() == 16);

impl Gate {
    const MISSING: Self = Self {
        offset_low: 0,
        selector: 0,
        stack: 0,
        kind: 0,
        offset_middle: 0,
        offset_high: 0,
        zero: 0,
    };
}

/// The table all VPs share.
struct Idt(UnsafeCell<[Gate; VECTORS]>);

// SAFETY: written before other VPs or interrupts exist.
unsafe impl Sync for Idt {}

static IDT: Idt = Idt(UnsafeCell::new([Gate::MISSING; VECTORS]));

impl Idt {
    fn load(&'static self, own_stacks: bool) {
        const INTERRUPT_GATE: u8 = 0x8E;
        // SAFETY: only called while booting, with interrupts off; see `Sync`.
        let gates = unsafe { &mut *self.0.get() };
        for (vector, gate) in gates.iter_mut().enumerate() {
            let offset = traps::stub(vector);
            let stack = match vector {
                _ if !own_stacks => 0,
                2 => StackSlot::Nmi as u8,
                8 => StackSlot::DoubleFault as u8,
                18 => StackSlot::MachineCheck as u8,
                _ => 0,
            };
            *gate = Gate {
                offset_low: offset as u16,
                selector: CS::get_reg().0,
                stack,
                kind: INTERRUPT_GATE,
                offset_middle: (offset >> 16) as u16,
                offset_high: (offset >> 32) as u32,
                zero: 0,
            };
        }
        let pointer = DescriptorTablePointer {
            limit: (size_of::<[Gate; VECTORS]>() - 1) as u16,
            base: VirtAddr::new(self.0.get().expose_provenance() as u64),
        };
        // SAFETY: all gates lead to stubs of this image.
        unsafe { lidt(&pointer) };
    }
}

/// Catches faults from the first moment on, on whatever stack there is, with the loader's code segment.
pub fn load_early() {
    static EARLY: UnsafeGdt = UnsafeGdt(UnsafeCell::new(GlobalDescriptorTable::new()));
    struct UnsafeGdt(UnsafeCell<GlobalDescriptorTable>);
    // SAFETY: used once, while booting.
    unsafe impl Sync for UnsafeGdt {}

    // SAFETY: called once, before anything else runs.
    let gdt = unsafe { &mut *EARLY.0.get() };
    let code = gdt.append(Descriptor::kernel_code_segment());
    let data = gdt.append(Descriptor::kernel_data_segment());
    debug_assert_eq!(code.rpl(), PrivilegeLevel::Ring0);
    // SAFETY: static, and not changed any more.
    unsafe { gdt.load_unsafe() };
    // SAFETY: the selectors are the ones just made.
    unsafe { load_segments(code, data) };
    IDT.load(false);
}
