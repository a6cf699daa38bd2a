//! The probe's entry, its console and its end.

use bootloader_api::BootloaderConfig;
use bootloader_api::config::Mapping;
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use x86_64::instructions::port::{PortReadOnly, PortWriteOnly};

/// Stack that the probe asks for: no whole number of pages, so that rounding is seen.
pub(crate) const STACK_SIZE: u64 = 50_000;

const CONFIG: BootloaderConfig = {
    let mut config = BootloaderConfig::new_default();
    config.kernel_stack_size = STACK_SIZE;
    config.mappings.physical_memory = Some(Mapping::Dynamic);
    config
};

#[used]
#[unsafe(link_section = ".bootloader-config")]
static SERIALIZED_CONFIG: [u8; BootloaderConfig::SERIALIZED_LEN] = CONFIG.serialize();

// The note, and an entry that passes its stack pointer on as a fourth argument.
core::arch::global_asm!(
    ".pushsection .note.enlit, \"a\", @note",
    ".balign 4",
    ".long 6, 8, {kind}",
    ".asciz \"Enlit\"",
    ".balign 4",
    ".quad probe_entry",
    ".popsection",
    ".global probe_entry",
    "probe_entry:",
    "mov rcx, rsp",
    "jmp {run}",
    kind = const handover::NOTE_ENTRY,
    run = sym crate::checks::run,
);

/// COM1, as the firmware or QEMU left it.
pub(crate) struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the line status and the data register of COM1.
            unsafe { while PortReadOnly::<u8>::new(0x3FD).read() & 0x20 == 0 {} }
            // SAFETY: as above.
            unsafe { PortWriteOnly::new(0x3F8).write(byte) };
        }
        Ok(())
    }
}

/// Ends QEMU.
pub(crate) fn exit(well: bool) -> ! {
    let code: u32 = if well { 0x10 } else { 0x11 };
    // SAFETY: QEMU's isa-debug-exit; without the device nobody listens at the port.
    unsafe { PortWriteOnly::new(0xF4).write(code) };
    loop {
        x86_64::instructions::hlt();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Serial, "{info}");
    exit(false)
}
