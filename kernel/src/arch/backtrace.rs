//! The calls that led somewhere, by frame pointers.

use core::ptr;

use super::image;
use crate::memory::manager;

/// The return addresses above the frame that `frame_pointer` points at, innermost first.
///
/// Every step is checked: the chain must go through mapped memory, to addresses of kernel code. It may go
/// from one stack to another, so its length is limited as well.
pub fn from_frame(frame_pointer: u64) -> impl Iterator<Item = u64> {
    let mut frame = frame_pointer;
    core::iter::from_fn(move || {
        let readable = |address: u64| manager::try_rights(address).is_some();
        let end = frame.checked_add(15)?;
        if frame == 0 || !frame.is_multiple_of(8) || !readable(frame) || !readable(end) {
            return None;
        }
        let pointer: *const [u64; 2] = ptr::with_exposed_provenance(frame as usize);
        // SAFETY: mapped, aligned memory; any bytes are words.
        let [next, address] = unsafe { pointer.read_volatile() };
        if !image::is_code(address) {
            return None;
        }
        frame = next;
        Some(address)
    })
    .take(64)
}

/// The frame pointer of the function that this is inlined into.
#[inline(always)]
pub fn frame_pointer() -> u64 {
    let value;
    // SAFETY: copies a register.
    unsafe {
        core::arch::asm!("mov {}, rbp", out(reg) value, options(nomem, nostack, preserves_flags));
    };
    value
}
