//! Where the linker put the kernel image.

use core::ops::Range;

/// Rights of a part of the image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rights {
    /// Code: readable and executable.
    Code,
    /// Constants: readable.
    Constants,
    /// Variables: readable and writable.
    Variables,
}

unsafe extern "C" {
    static hypercall_page: u8;
    static kernel_start: u8;
    static kernel_rodata_start: u8;
    static kernel_data_start: u8;
    static kernel_boot_start: u8;
    static kernel_end: u8;
}

/// The virtual addresses of the parts that stay for good, each page-aligned.
pub fn parts() -> [(Range<u64>, Rights); 3] {
    let [start, rodata, data, boot] = [
        (&raw const kernel_start).addr() as u64,
        (&raw const kernel_rodata_start).addr() as u64,
        (&raw const kernel_data_start).addr() as u64,
        (&raw const kernel_boot_start).addr() as u64,
    ];
    [
        (start..rodata, Rights::Code),
        (rodata..data, Rights::Constants),
        (data..boot, Rights::Variables),
    ]
}

/// The whole image's virtual addresses, with what is only needed while booting.
pub fn range() -> Range<u64> {
    (&raw const kernel_start).addr() as u64..(&raw const kernel_end).addr() as u64
}

/// The virtual address of the page that is set aside for the hypervisor's code.
pub fn hypercall_page_address() -> u64 {
    (&raw const hypercall_page).addr() as u64
}

/// Whether an address lies in the kernel's code.
pub fn is_code(address: u64) -> bool {
    let [(code, _), ..] = parts();
    code.contains(&address)
}

/// The physical addresses of the whole image when it was loaded where it is linked: by PVH and by the Linux protocol.
pub fn physical_range_at_link() -> Range<u64> {
    let Range { start, end } = range();
    start - handover::KERNEL_BASE..end - handover::KERNEL_BASE
}
