//! The contract between whatever starts the Enlit kernel and the kernel itself.
//!
//! A kernel image is an ELF64 executable, linked at fixed virtual addresses in the top
//! 2 GiB ([`KERNEL_BASE`]) and at physical addresses from 2 MiB up. It can be entered in
//! three ways:
//!
//! | entry | who uses it | where it is found | state |
//! |---|---|---|---|
//! | 64-bit Linux | OpenVMM, Firecracker | `e_entry`, a physical address | boot.md B3 |
//! | PVH | QEMU `-kernel`, Cloud Hypervisor, Firecracker | ELF note "Xen", type 18 | boot.md B2 |
//! | hand-over | the `boot` EFI application | ELF note [`NOTE_NAME`], type [`NOTE_ENTRY`] | [`Entry`] |
//!
//! The first two land in the kernel's own entry code, which makes the same
//! [`bootloader_api::BootInfo`] from what it is given and goes on where a hand-over begins.
//!
//! What a loader owes the kernel at a hand-over:
//!
//! * long mode, paging on with NXE and CR0.WP set, interrupts off, direction flag clear;
//! * each `PT_LOAD` segment mapped at its `p_vaddr`, with the rights of its flags and none
//!   besides (W^X), `.bss` cleared. Each segment lies in one piece, anywhere in physical memory;
//!   `kernel_addr` and `kernel_len` name the physical range that holds them all;
//! * all physical memory mapped, writable and not executable, at
//!   [`BootInfo::physical_memory_offset`](bootloader_api::BootInfo::physical_memory_offset), and
//!   the first 4 GiB whatever is there, devices not cached;
//! * a stack of at least the size that the kernel's `.bootloader-config` section asks for,
//!   16-byte aligned at the point of a call;
//! * the regions of the memory map sorted by address and disjoint; what holds the kernel, the
//!   loader's page tables, its stack, the `BootInfo` and the command line is marked
//!   [`MemoryRegionKind::Bootloader`](bootloader_api::info::MemoryRegionKind::Bootloader).
//!   The kernel never hands those out before it has copied or replaced what it needs.
//!
//! What the kernel must not count on: the descriptor tables in GDTR and IDTR are whatever the loader
//! had and need not be mapped, so it loads its own before it loads a segment register or lets
//! anything trap. A page or two of the loader's code may be mapped, executable, in the lower half; they
//! are marked `Bootloader` too, and go with the loader's page tables.
//!
//! `bootloader_api` has no place for a command line, so it travels beside the `BootInfo` in
//! the two registers that follow.

#![no_std]
#![forbid(unsafe_code)]

use bootloader_api::BootInfo;

/// The hand-over entry of a kernel image (System V calling convention).
///
/// `boot_info` in RDI; the command line's virtual address in RSI and its length in bytes in RDX. The
/// command line is UTF-8 without a terminator; address 0 or length 0 means that there is none.
/// It lies in memory that the memory map calls `Bootloader`, as the `BootInfo` does.
pub type Entry = extern "sysv64" fn(
    boot_info: &'static mut BootInfo,
    command_line: *const u8,
    command_line_len: usize,
) -> !;

/// Virtual address of physical address 0 in the kernel image's own link: segments lie at
/// `KERNEL_BASE + p_paddr`.
pub const KERNEL_BASE: u64 = 0xFFFF_FFFF_8000_0000;

/// The longest command line that a loader may hand over, in bytes.
pub const COMMAND_LINE_MAX: usize = 4096;

/// Name of the ELF note that carries the hand-over entry, with its terminating zero.
pub const NOTE_NAME: &[u8; 6] = b"Enlit\0";

/// Type of the ELF note whose description is the virtual address (u64) of the [`Entry`].
pub const NOTE_ENTRY: u32 = 1;

/// ELF section that holds the serialized [`bootloader_api::BootloaderConfig`].
pub const CONFIG_SECTION: &str = ".bootloader-config";
