//! Making a [`BootInfo`] of what a direct boot gives, PVH or Linux.
//!
//! After this, nothing asks who booted. What is read here was written by the machine's monitor
//! into guest memory; it is copied out through [`PhysicalMemory`], so the code runs in tests on
//! any computer.

use bootloader_api::BootInfo;
use bootloader_api::info::{MemoryRegionKind, Optional};
use spin::{Mutex, MutexGuard};
use zerocopy::{FromBytes, IntoBytes};

use self::regions::RegionMap;

pub mod linux;
pub mod pvh;
pub mod regions;
pub mod rsdp;

/// Physical memory as the entry code sees it, before there are page tables of our own.
pub trait PhysicalMemory {
    /// Copies bytes from physical address `address`. Bytes that cannot be reached read as zero.
    fn read(&self, address: u64, destination: &mut [u8]);

    /// Copies one structure.
    fn get<T: FromBytes + IntoBytes>(&self, address: u64) -> T
    where
        Self: Sized,
    {
        let mut value = T::new_zeroed();
        self.read(address, value.as_mut_bytes());
        value
    }
}

/// What a direct boot told, in the image's own memory.
#[derive(Debug)]
pub struct DirectBoot {
    map: RegionMap,
    /// Physical address of the RSDP, where the monitor said it.
    rsdp: Option<u64>,
    command_line: [u8; handover::COMMAND_LINE_MAX],
    command_line_len: usize,
    boot_info: Option<BootInfo>,
}

impl DirectBoot {
    const fn new() -> Self {
        Self {
            map: RegionMap::new(),
            rsdp: None,
            command_line: [0; handover::COMMAND_LINE_MAX],
            command_line_len: 0,
            boot_info: None,
        }
    }

    /// Copies a command line: at most `len` bytes, up to a terminating zero.
    fn set_command_line(&mut self, memory: &impl PhysicalMemory, address: u64, len: usize) {
        let len = len.min(self.command_line.len());
        if address != 0 {
            memory.read(address, &mut self.command_line[..len]);
        }
        let end = self.command_line[..len].iter().position(|&byte| byte == 0);
        self.command_line_len = end.unwrap_or(len);
    }
}

/// The image's one [`DirectBoot`]: a machine is entered once.
static DIRECT_BOOT: Mutex<DirectBoot> = Mutex::new(DirectBoot::new());

/// Completes a hand-over from what `fill` reads: `kernel` is the physical range of the image.
fn hand_over(
    memory: &impl PhysicalMemory,
    kernel: core::ops::Range<u64>,
    fill: impl FnOnce(&mut DirectBoot),
) -> (&'static mut BootInfo, &'static [u8]) {
    let direct = MutexGuard::leak(DIRECT_BOOT.lock());
    fill(direct);
    direct
        .map
        .set(kernel.start, kernel.end, MemoryRegionKind::Bootloader);
    let rsdp = direct.rsdp.or_else(|| rsdp::scan(memory));
    let boot_info = direct
        .boot_info
        .insert(BootInfo::new(direct.map.as_mut_slice().into()));
    boot_info.rsdp_addr = rsdp.map_or(Optional::None, Optional::Some);
    // The temporary tables show the low 4 GiB at their own addresses.
    boot_info.physical_memory_offset = Optional::Some(0);
    boot_info.kernel_addr = kernel.start;
    boot_info.kernel_len = kernel.end - kernel.start;
    (boot_info, &direct.command_line[..direct.command_line_len])
}

#[cfg(test)]
pub(crate) mod fake {
    //! Physical memory that a test fills.

    use super::PhysicalMemory;
    use std::collections::BTreeMap;

    #[derive(Default)]
    pub(crate) struct Memory(BTreeMap<u64, u8>);

    impl Memory {
        pub(crate) fn put(&mut self, address: u64, bytes: &[u8]) {
            self.0.extend(
                bytes
                    .iter()
                    .enumerate()
                    .map(|(i, &b)| (address + i as u64, b)),
            );
        }
    }

    impl PhysicalMemory for Memory {
        fn read(&self, address: u64, destination: &mut [u8]) {
            for (i, byte) in destination.iter_mut().enumerate() {
                let at = address.checked_add(i as u64);
                *byte = at.and_then(|at| self.0.get(&at).copied()).unwrap_or(0);
            }
        }
    }
}
