//! The board around the processors: addresses, firmware tables and the few devices that are not on the VMBus
//! (spec boot.md A6).

pub mod acpi;
#[cfg(target_os = "linux")]
pub mod board;
pub mod io_apic;
pub mod layout;
pub mod power;
pub mod rtc;
