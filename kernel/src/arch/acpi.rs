//! Reaching the firmware's ACPI tables for the `acpi` crate.

use core::ptr::NonNull;

use acpi::{AcpiHandler, AcpiTables, AmlTable, PhysicalMapping};

use super::physical;
use crate::memory::manager;

/// Maps tables on demand in the direct map, where they stay.
#[derive(Clone, Copy, Debug)]
pub struct Handler;

impl AcpiHandler for Handler {
    unsafe fn map_physical_region<T>(
        &self,
        address: usize,
        size: usize,
    ) -> PhysicalMapping<Self, T> {
        let start = address as u64;
        let end = start.saturating_add(size as u64);
        if manager::map_physical(start..end, false).is_none() {
            panic!("no memory left to map the ACPI table at {start:#x}");
        }
        let Some(pointer) = NonNull::new(physical::pointer::<T>(start)) else {
            unreachable!("the direct map does not begin at address zero")
        };
        // SAFETY: mapped above, for good.
        unsafe { PhysicalMapping::new(address, pointer, size, size, *self) }
    }

    fn unmap_physical_region<T>(_region: &PhysicalMapping<Self, T>) {}
}

/// The tables behind the root pointer at this physical address.
pub fn tables(rsdp: u64) -> Result<AcpiTables<Handler>, acpi::AcpiError> {
    // SAFETY: the address came from the firmware or from a scan that checked signature and sum; the crate
    // checks the sum again.
    unsafe { AcpiTables::from_rsdp(Handler, rsdp as usize) }
}

/// The byte code of a table, copied nowhere: it stays mapped.
pub fn byte_code(table: &AmlTable) -> &'static [u8] {
    let start = table.address as u64;
    if manager::map_physical(start..start + u64::from(table.length), false).is_none() {
        return &[];
    }
    // SAFETY: mapped above, for good; firmware memory does not change.
    unsafe { core::slice::from_raw_parts(physical::pointer::<u8>(start), table.length as usize) }
}
