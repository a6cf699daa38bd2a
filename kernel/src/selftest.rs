//! What only tests need: faults on purpose, an interrupt of one's own, and a look at the page tables.

use alloc::boxed::Box;
use spin::Once;

use crate::arch::{apic, cpu, faults, image};
use crate::interrupt;
use crate::memory::manager;

pub use crate::arch::cpu::invalid_opcode;
pub use crate::arch::faults::{read_null, run_data, write_code};

static ACTION: Once<Box<dyn Fn() + Send + Sync>> = Once::new();

/// Has `action` run, at DISPATCH, by each [`raise_interrupt`].
pub fn on_interrupt(action: impl Fn() + Send + Sync + 'static) {
    ACTION.call_once(|| Box::new(action));
    interrupt::set_handler(interrupt::TEST, || {
        assert!(
            !cpu::interrupts_enabled(),
            "interrupts are off in a handler"
        );
        if let Some(action) = ACTION.get() {
            action();
        }
        apic::end_of_interrupt();
    });
}

/// Interrupts this VP.
pub fn raise_interrupt() {
    apic::interrupt_self(interrupt::TEST);
}

/// Checks that no page is both writable and executable, that the image has the rights of its parts, here and in
/// the direct map, and that the guards are there.
///
/// # Panics
///
/// When any of that is not so.
pub fn check_rights() {
    let rights = |address: u64| manager::try_rights(address);
    assert_eq!(rights(0), None, "the null page is mapped");
    for (part, wanted) in image::parts() {
        let (writable, executable) = match wanted {
            image::Rights::Code => (false, true),
            image::Rights::Constants => (false, false),
            image::Rights::Variables => (true, false),
        };
        for address in part.step_by(4096) {
            assert_eq!(
                rights(address),
                Some((writable, executable)),
                "{wanted:?} at {address:#x}"
            );
            let alias = faults::direct_map_address(address);
            let (alias_writable, alias_executable) =
                rights(alias).expect("the direct map shows the image");
            assert!(
                !alias_executable,
                "the direct map is executable at {alias:#x}"
            );
            assert_eq!(
                alias_writable, writable,
                "{wanted:?} in the direct map at {alias:#x}"
            );
        }
    }
    let (bottom, top) = faults::main_stack();
    assert_eq!(rights(bottom), Some((true, false)));
    assert_eq!(rights(bottom - 1), None, "no guard page below the stack");
    assert_eq!(rights(top), None, "no guard page above the stack");
}
