//! The firmware's tables, as a Generation 2 VM has them: a VMBus, a serial port, a clock, no PCI, no HPET, no PIT, no
//! 8042 (spec boot.md A6; ACPI 6.5, chapter 5).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, facs::FACS};

use super::layout::{ACPI, IO_APIC, LOCAL_APIC, LOW_MMIO, Layout};
use super::{power, rtc};

/// The input of the I/O APIC that COM1 is connected to.
pub const SERIAL_INTERRUPT: u8 = 4;
/// COM1's registers.
pub const SERIAL_PORTS: std::ops::RangeInclusive<u16> = 0x3F8..=0x3FF;

const RTC_INTERRUPT: u8 = 8;
const SYSTEM_CONTROL_INTERRUPT: u8 = 9;
/// That of the VMBus device. Guests use a vector in the SINT.
const VMBUS_INTERRUPT: u8 = 5;

const OEM: [u8; 6] = *b"VRTUAL";
const TABLE: [u8; 8] = *b"MICROSFT";
const DSDT_OEM: [u8; 6] = *b"MSFTVM";
const DSDT_TABLE: [u8; 8] = *b"DSDT01  ";
const OEM_REVISION: u32 = 1;

/// Bytes of the header that tables share.
const HEADER: u32 = 36;

/// What of the machine the tables tell.
#[derive(Clone, Debug)]
pub struct Machine<'a> {
    /// Addresses.
    pub layout: &'a Layout,
    /// Processors; the APIC id is the VP index.
    pub vps: u32,
    /// Whether there is S4.
    pub hibernation: bool,
}

/// All tables, in one piece that belongs at [`ACPI`]'s start and begins with the root pointer. `None` when they do not fit
/// there: with more processors than a VM can have.
pub fn tables(machine: &Machine<'_>) -> Option<Vec<u8>> {
    let mut image = Image { bytes: vec![0; 64] };
    let facs = image.add(&bytes(&FACS::new()));
    let dsdt = image.add(dsdt(machine).as_slice());
    let tables = [
        bytes(&fadt(facs, dsdt)),
        madt(machine.vps).as_slice().to_vec(),
        waet().as_slice().to_vec(),
    ];
    let addresses = tables.map(|table| image.add(&table));
    let mut root = table(*b"XSDT", 1);
    for address in addresses {
        root.append(address);
    }
    let root = image.add(root.as_slice());
    let pointer = bytes(&Rsdp::new(OEM, root));
    image.bytes[..pointer.len()].copy_from_slice(&pointer);
    let room = ACPI.end - ACPI.start;
    (image.bytes.len() as u64 <= room).then_some(image.bytes)
}

/// Tables one after another.
struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Adds a table; gives its address.
    fn add(&mut self, table: &[u8]) -> u64 {
        // The FACS needs 64; others need nothing.
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let address = ACPI.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes(of: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    of.to_aml_bytes(&mut bytes);
    bytes
}

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER, revision, OEM, TABLE, OEM_REVISION)
}

fn fadt(facs: u64, dsdt: u64) -> impl Aml {
    let port = |port: u16, bits: u8, access| {
        GAS::new(gas::AddressSpace::SystemIo, bits, 0, access, port.into())
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs as u32)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::UsePlatformClock)
        .gpe_info(power::GPE0.into(), 0, 4, 0, 0);
    fadt.dsdt = (dsdt as u32).into();
    fadt.sci_int = u16::from(SYSTEM_CONTROL_INTERRUPT).into();
    fadt.pm1a_evt_blk = u32::from(power::PM1A_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(power::PM1A_EVENT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(power::PM1A_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(power::PM1A_CONTROL, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(power::PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(power::PM_TIMER, 32, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = port(power::GPE0, 32, AccessSize::WordAccess);
    // Beyond 100 and 1000: there are no such states.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = rtc::CENTURY;
    // VGA is not present; nor are legacy devices and an 8042, whose bits stay clear.
    fadt.iapc_boot_arch = (1 << 2).into();
    fadt.reset_reg = port(power::RESET, 8, AccessSize::ByteAccess);
    fadt.reset_value = power::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"MsHyperV").into();
    fadt.finalize()
}

fn madt(vps: u32) -> Sdt {
    let mut madt = table(*b"APIC", 5);
    madt.append(LOCAL_APIC as u32);
    // Flags: no PIC.
    madt.append(0_u32);
    for vp in 0..vps {
        let uid = vp + 1;
        match (u8::try_from(vp), u8::try_from(uid)) {
            // A local APIC, enabled.
            (Ok(id @ ..=0xFE), Ok(uid)) => madt.append([0, 8, uid, id, 1, 0, 0, 0]),
            _ => {
                // A local x2APIC, enabled.
                madt.append([9_u8, 16, 0, 0]);
                madt.append([vp, 1, uid]);
            }
        }
    }
    // The I/O APIC, whose inputs are interrupts 0 and up.
    madt.append([1_u8, 12, 0, 0]);
    madt.append([IO_APIC as u32, 0]);
    // The SCI is level-triggered, active high.
    madt.append([2_u8, 10, 0, SYSTEM_CONTROL_INTERRUPT]);
    madt.append(u32::from(SYSTEM_CONTROL_INTERRUPT));
    madt.append(0b11_01_u16);
    // LINT1 of all processors is the NMI.
    madt.append([4_u8, 6, 0xFF, 0, 0, 1]);
    madt
}

/// The emulated clocks are good: one read of either is enough.
fn waet() -> Sdt {
    let mut waet = table(*b"WAET", 1);
    waet.append(0b11_u32);
    waet
}

/// The devices.
fn dsdt(machine: &Machine<'_>) -> Sdt {
    let hid = |name: &'static str| Name::new("_HID".into(), &name);
    let eisa = |name| Name::new("_HID".into(), &EISAName::new(name));
    let uid = |number: u32| Name::new("_UID".into(), &number);
    let edge = |number: u8| Interrupt::new(true, true, false, false, number.into());

    let local_apic = Memory32Fixed::new(true, LOCAL_APIC as u32, 0x1000);
    let io_apic = Memory32Fixed::new(true, IO_APIC as u32, 0x1000);
    let apic_resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&local_apic, &io_apic]),
    );
    let (apic_hid, zero) = (eisa("PNP0003"), uid(0));
    let apic = Device::new("APIC".into(), vec![&apic_hid, &zero, &apic_resources]);

    let vmbus_hid = hid("MSFT1000");
    let vmbus_cid = Name::new("_CID".into(), &"VMBus");
    let vmbus_status = Name::new("_STA".into(), &0x0F_u8);
    let vmbus_interrupt = edge(VMBUS_INTERRUPT);
    let vmbus_resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&vmbus_interrupt]),
    );
    let vmbus = Device::new(
        "VMBS".into(),
        vec![
            &vmbus_hid,
            &vmbus_cid,
            &zero,
            &vmbus_status,
            &vmbus_resources,
        ],
    );

    let window = AddressSpaceCacheable::NotCacheable;
    let low = (LOW_MMIO.start as u32, (LOW_MMIO.end - 1) as u32);
    let low = AddressSpace::new_memory(window, true, low.0, low.1, None);
    let window = AddressSpaceCacheable::NotCacheable;
    let high = &machine.layout.high_mmio;
    let high = AddressSpace::new_memory(window, true, high.start, high.end - 1, None);
    let windows = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&low, &high]));
    let module_hid = hid("ACPI0004");
    let module = Device::new(
        "VMOD".into(),
        vec![&module_hid, &zero, &windows, &apic, &vmbus],
    );

    let (first, last) = SERIAL_PORTS.into_inner();
    let serial_ports = IO::new(first, first, 1, (last - first + 1) as u8);
    let serial_interrupt = edge(SERIAL_INTERRUPT);
    let serial_resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&serial_ports, &serial_interrupt]),
    );
    let (serial_hid, one) = (eisa("PNP0501"), uid(1));
    let serial = Device::new("UAR1".into(), vec![&serial_hid, &one, &serial_resources]);

    let (first, last) = rtc::PORTS.into_inner();
    let clock_ports = IO::new(first, first, 1, (last - first + 1) as u8);
    let clock_interrupt = edge(RTC_INTERRUPT);
    let clock_resources = Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&clock_ports, &clock_interrupt]),
    );
    let clock_hid = eisa("PNP0B00");
    let clock = Device::new("RTC0".into(), vec![&clock_hid, &clock_resources]);

    let processor_hid = hid("ACPI0007");
    let processors: Vec<_> = (0..machine.vps)
        .map(|vp| (format!("P{vp:03X}"), uid(vp + 1)))
        .collect();
    let processors: Vec<_> = processors
        .iter()
        .map(|(name, uid)| Device::new(name.as_str().into(), vec![&processor_hid, uid]))
        .collect();

    let mut devices: Vec<&dyn Aml> = vec![&module, &serial, &clock];
    devices.extend(processors.iter().map(|processor| processor as &dyn Aml));
    let mut table = Sdt::new(*b"DSDT", HEADER, 2, DSDT_OEM, DSDT_TABLE, OEM_REVISION);
    table.append_slice(&bytes(&Scope::new("_SB_".into(), devices)));
    let states = [("_S0_", 0), ("_S4_", power::S4), ("_S5_", power::S5)];
    for (name, kind) in states {
        if name != "_S4_" || machine.hibernation {
            let state = Name::new(name.into(), &Package::new(vec![&kind, &0_u8]));
            table.append_slice(&bytes(&state));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;

    use acpi::madt::{Madt, MadtEntry};
    use acpi::{AcpiHandler, AcpiTables, PhysicalMapping};

    use super::*;

    fn image(vps: u32, hibernation: bool) -> Vec<u8> {
        let layout = Layout::new(256, 0).unwrap();
        let machine = Machine {
            layout: &layout,
            vps,
            hibernation,
        };
        tables(&machine).unwrap()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The tables that the root names, and the DSDT.
    fn found(image: &[u8]) -> Vec<&[u8]> {
        let at = |address: u64| {
            let table = &image[(address - ACPI.start) as usize..];
            let length = u32::from_le_bytes(table[4..8].try_into().unwrap());
            &table[..length as usize]
        };
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
        let root = at(number(&image[24..32]));
        let mut all: Vec<_> = root[36..]
            .chunks(8)
            .map(|entry| at(number(entry)))
            .collect();
        all.push(at(number(&all[0][140..148])));
        all.push(root);
        all
    }

    #[test]
    fn every_table_has_a_good_checksum() {
        let image = image(4, true);
        assert_eq!(sum(&image[..20]), 0, "the root pointer's first part");
        assert_eq!(sum(&image[..36]), 0, "all of the root pointer");
        let tables = found(&image);
        let names: Vec<_> = tables.iter().map(|table| &table[..4]).collect();
        let expected: [&[u8]; 5] = [b"FACP", b"APIC", b"WAET", b"DSDT", b"XSDT"];
        assert_eq!(names, expected);
        for table in tables {
            assert_eq!(sum(table), 0, "{}", table[..4].escape_ascii());
        }
    }

    fn contains(table: &[u8], part: &[u8]) -> bool {
        table.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn the_devices_are_those_of_a_generation_2_vm() {
        let image = image(2, true);
        let dsdt = found(&image)[3];
        for name in [
            "VMOD", "VMBS", "UAR1", "RTC0", "P000", "P001", "MSFT1000", "VMBus",
        ] {
            assert!(contains(dsdt, name.as_bytes()), "{name}");
        }
        assert!(!contains(dsdt, b"P002"));
        // Compressed identifiers of a PCI root, an 8042, an HPET and a PIT.
        for name in ["PNP0A03", "PNP0A08", "PNP0303", "PNP0103", "PNP0100"] {
            let id = bytes(&EISAName::new(name));
            assert!(!contains(dsdt, &id), "{name}");
        }
        let uart = bytes(&EISAName::new("PNP0501"));
        assert!(contains(dsdt, &uart));
    }

    #[test]
    fn hibernation_is_offered_where_it_is_enabled() {
        assert!(contains(found(&image(1, true))[3], b"_S4_"));
        assert!(!contains(found(&image(1, false))[3], b"_S4_"));
        assert!(contains(found(&image(1, false))[3], b"_S5_"));
    }

    #[test]
    fn the_fixed_table_names_the_registers_of_the_sheet() {
        let image = image(1, true);
        let fadt = found(&image)[0];
        assert_eq!((fadt.len(), fadt[8]), (276, 6), "revision 6");
        let word = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
        assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9, "the SCI");
        assert_eq!(
            [word(56), word(64), word(76), word(80)],
            [0x400, 0x404, 0x408, 0x40C]
        );
        assert_eq!(word(48), 0, "no SMI command: ACPI is always on");
        let reset = (fadt[116], word(120), fadt[128]);
        assert_eq!(reset, (1, 0x433, 1), "the reset register is port 0x433");
        assert_eq!(fadt[109], 4, "of legacy hardware only: VGA is not present");
        assert_ne!(word(112) & 1 << 10, 0, "the reset register may be used");
        assert_eq!(word(112) & 1 << 20, 0, "not hardware-reduced");
    }

    /// Gives the `acpi` crate the image as memory.
    #[derive(Clone)]
    struct Memory(std::sync::Arc<Vec<u8>>);

    impl AcpiHandler for Memory {
        #[allow(unsafe_code)]
        unsafe fn map_physical_region<T>(
            &self,
            address: usize,
            size: usize,
        ) -> PhysicalMapping<Self, T> {
            let offset = address - ACPI.start as usize;
            assert!(offset + size <= self.0.len());
            let at = NonNull::from(&self.0[offset]).cast();
            // SAFETY: the bytes live as long as the handler, which the mapping holds.
            unsafe { PhysicalMapping::new(address, at, size, size, self.clone()) }
        }

        fn unmap_physical_region<T>(_: &PhysicalMapping<Self, T>) {}
    }

    #[test]
    fn an_acpi_library_finds_processors_and_interrupts() {
        let memory = Memory(std::sync::Arc::new(image(300, true)));
        // SAFETY: the handler checks every access against the image.
        #[allow(unsafe_code)]
        let tables = unsafe { AcpiTables::from_rsdp(memory, ACPI.start as usize) }.unwrap();
        let madt = tables.find_table::<Madt>().unwrap();
        let (mut ids, mut others) = (Vec::new(), Vec::new());
        for entry in madt.get().entries() {
            match entry {
                MadtEntry::LocalApic(apic) => ids.push(u32::from(apic.apic_id)),
                MadtEntry::LocalX2Apic(apic) => ids.push(apic.x2apic_id),
                MadtEntry::IoApic(apic) => others.push(("I/O APIC", apic.io_apic_address)),
                MadtEntry::InterruptSourceOverride(it) => {
                    assert_eq!((it.irq, it.flags), (9, 0b1101), "level, active high");
                    others.push(("override", it.global_system_interrupt));
                }
                MadtEntry::LocalApicNmi(nmi) => others.push(("NMI", nmi.nmi_line.into())),
                _ => panic!("an entry of another kind"),
            }
        }
        assert!(ids.into_iter().eq(0..300));
        let expected = [("I/O APIC", IO_APIC as u32), ("override", 9), ("NMI", 1)];
        assert_eq!(others, expected);
    }

    #[test]
    fn more_processors_than_the_tables_have_room_for_are_refused() {
        let layout = Layout::new(256, 0).unwrap();
        let machine = Machine {
            layout: &layout,
            vps: 4095,
            hibernation: false,
        };
        assert_eq!(tables(&machine), None);
    }
}
