//! Interrupt vectors and their handlers.
//!
//! A handler runs at DISPATCH: interrupts off, on the VP's interrupt stack. It is short; the rest goes
//! to the work queue.

use core::sync::atomic::{AtomicBool, Ordering};

use spin::Once;

use crate::arch::{apic, cpu, per_cpu};

/// The first vector of external interrupts.
const FIRST: u8 = 0x20;

/// The vector of VMBus messages and events, which SINT2 raises.
pub const VMBUS: u8 = 0x21;

/// The vector of synthetic timer 0.
pub const TIMER: u8 = 0x22;

/// The vector that tests raise themselves.
pub(crate) const TEST: u8 = 0x23;

/// The vectors that can have a handler.
const COUNT: usize = 16;

static HANDLERS: [Once<fn()>; COUNT] = [const { Once::new() }; COUNT];

/// Sets the handler of a vector, once. The handler ends the interrupt itself where it needs that.
///
/// # Panics
///
/// When the vector is not one of the external ones.
pub fn set_handler(vector: u8, handler: fn()) {
    slot(vector)
        .expect("an external vector")
        .call_once(|| handler);
}

fn slot(vector: u8) -> Option<&'static Once<fn()>> {
    HANDLERS.get(usize::from(vector.checked_sub(FIRST)?))
}

/// Whether interrupts are on: the code runs at PASSIVE.
pub fn is_enabled() -> bool {
    cpu::interrupts_enabled()
}

pub(crate) fn dispatch(vector: u8) {
    per_cpu::current()
        .interrupts
        .fetch_add(1, Ordering::Relaxed);
    match slot(vector).and_then(Once::get) {
        Some(handler) => handler(),
        None if vector == apic::SPURIOUS_VECTOR => {}
        None => {
            // Some device that firmware has left on; once is enough to know.
            static SAID: AtomicBool = AtomicBool::new(false);
            if !SAID.swap(true, Ordering::Relaxed) {
                log::warn!("interrupt: vector {vector:#x} has no handler");
            }
            apic::end_of_interrupt();
        }
    }
}
