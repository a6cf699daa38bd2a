//! Faults on purpose, for tests: each must end in a report.

use core::ptr;
use core::sync::atomic::AtomicU8;

use super::paging::STACKS;
use super::{image, physical};
use crate::memory::FRAME_SIZE;
use crate::memory::manager;

/// Reads address zero.
pub fn read_null() {
    // SAFETY: faults, and the fault's handler does not return.
    let value = unsafe { ptr::with_exposed_provenance::<u64>(8).read_volatile() };
    panic!("address 8 was read: {value:#x}");
}

/// Writes to the kernel's code.
pub fn write_code() {
    let [(code, _), ..] = image::parts();
    // SAFETY: faults, and the fault's handler does not return.
    unsafe { ptr::with_exposed_provenance_mut::<u8>(code.start as usize).write_volatile(0) };
    panic!("code was written");
}

/// Runs instructions in the kernel's variables.
pub fn run_data() {
    static RETURN: AtomicU8 = AtomicU8::new(0xC3);
    // SAFETY: the function is called only here, and that faults.
    let function: extern "sysv64" fn() = unsafe { core::mem::transmute(RETURN.as_ptr()) };
    function();
    panic!("data was run");
}

/// Where the direct map shows the memory behind an address of the image.
pub(crate) fn direct_map_address(address: u64) -> u64 {
    manager::translate(address).map_or(0, |physical| physical::DIRECT_MAP + physical)
}

/// The main stack's first byte and the byte after its last.
pub(crate) fn main_stack() -> (u64, u64) {
    let bottom = STACKS + FRAME_SIZE;
    (bottom, bottom + manager::MAIN_STACK)
}
