//! What the firmware's ACPI tables say: processors (MADT) and how to power off (FADT, DSDT).

use acpi::address::AddressSpace;
use acpi::fadt::Fadt;
use acpi::madt::{Madt, MadtEntry};
use acpi::{AcpiError, AcpiTables};
use spin::Once;

use crate::acpi_check;
use crate::arch::physical::{DIRECT_MAP_SIZE, Mapped};
use crate::arch::{acpi as reach, port};
use crate::sleep_states::s5_sleep_type;

/// What was read, once.
static PLATFORM: Once<Platform> = Once::new();

/// The machine by its ACPI tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Platform {
    /// Processors that are enabled.
    pub(crate) processors: u32,
    power_off: Option<PowerOff>,
    /// The port to reset by, and what to write there.
    reset: Option<(u16, u8)>,
}

/// The register write that powers the machine off (ACPI 6.5, sections 4.8.3.2 and 4.8.3.7).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum PowerOff {
    /// PM1 control blocks: the sleep type with the enable bit.
    Pm1 { a: u16, b: Option<u16>, value: u16 },
    /// The sleep control register of hardware-reduced ACPI.
    SleepControl { port: u16, value: u8 },
}

/// Reads the tables behind `rsdp`. What is missing there is only missed when it is needed.
pub(crate) fn init(rsdp: Option<u64>) {
    let Some(rsdp) = rsdp else {
        log::warn!("acpi: no root pointer: power-off will not work");
        return;
    };
    if let Err(fault) = acpi_check::check(&Mapped, rsdp, DIRECT_MAP_SIZE) {
        log::warn!("acpi: tables at {rsdp:#x} are not used: {fault}");
        return;
    }
    match read(rsdp) {
        Ok(platform) => {
            PLATFORM.call_once(|| platform);
        }
        Err(error) => log::warn!("acpi: tables at {rsdp:#x} are not usable: {error:?}"),
    }
}

/// The machine by its tables; all empty where there are none.
pub(crate) fn platform() -> Platform {
    PLATFORM.get().copied().unwrap_or_default()
}

/// Tells the machine to power off; `false` when there is no way to. It may take a moment.
pub(crate) fn power_off() -> bool {
    match platform().power_off {
        Some(PowerOff::Pm1 { a, b, value }) => {
            port::write_u16(a, value);
            if let Some(b) = b {
                port::write_u16(b, value);
            }
        }
        Some(PowerOff::SleepControl { port, value }) => port::write_u8(port, value),
        None => return false,
    }
    true
}

/// Tells the machine to reset (ACPI 6.5, section 4.8.3.6); `false` when there is no way to. It may take a moment.
pub(crate) fn reset() -> bool {
    let Some((port, value)) = platform().reset else {
        return false;
    };
    port::write_u8(port, value);
    true
}

fn read(rsdp: u64) -> Result<Platform, AcpiError> {
    let tables = reach::tables(rsdp)?;
    let processors = tables.find_table::<Madt>().map(|madt| {
        let entries = madt.get();
        entries.entries().filter(is_enabled_processor).count() as u32
    });
    Ok(Platform {
        processors: processors.unwrap_or(0),
        power_off: power_off_by(&tables),
        reset: reset_by(&tables),
    })
}

fn is_enabled_processor(entry: &MadtEntry<'_>) -> bool {
    match entry {
        MadtEntry::LocalApic(processor) => processor.flags & 1 != 0,
        MadtEntry::LocalX2Apic(processor) => processor.flags & 1 != 0,
        _ => false,
    }
}

fn power_off_by(tables: &AcpiTables<reach::Handler>) -> Option<PowerOff> {
    let fadt = tables.find_table::<Fadt>().ok()?;
    let dsdt = tables.dsdt().ok()?;
    let sleep_type = s5_sleep_type(reach::byte_code(&dsdt))?;
    let flags = fadt.flags;
    if flags.system_is_hw_reduced_acpi() {
        let register = fadt.sleep_control_register().ok()??;
        let port = io_port(register.address_space, register.address)?;
        return Some(PowerOff::SleepControl {
            port,
            value: sleep_type << 2 | 1 << 5,
        });
    }
    let a = fadt.pm1a_control_block().ok()?;
    let a = io_port(a.address_space, a.address)?;
    let b = fadt.pm1b_control_block().ok().flatten();
    let b = b.and_then(|block| io_port(block.address_space, block.address));
    Some(PowerOff::Pm1 {
        a,
        b,
        value: u16::from(sleep_type) << 10 | 1 << 13,
    })
}

fn reset_by(tables: &AcpiTables<reach::Handler>) -> Option<(u16, u8)> {
    let fadt = tables.find_table::<Fadt>().ok()?;
    let flags = fadt.flags;
    if !flags.supports_system_reset_via_fadt() {
        return None;
    }
    let register = fadt.reset_register().ok()?;
    Some((
        io_port(register.address_space, register.address)?,
        fadt.reset_value,
    ))
}

fn io_port(space: AddressSpace, address: u64) -> Option<u16> {
    (space == AddressSpace::SystemIo)
        .then(|| u16::try_from(address).ok())?
        .filter(|&port| port != 0)
}
