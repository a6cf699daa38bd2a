//! Where the machine first runs kernel code: the PVH, Linux and hand-over entries.
//!
//! All three end in `start::start` with a [`BootInfo`], a command line and a
//! temporary stack; what they are given is in `handover`'s documentation and spec boot.md B2, B3.
//!
//! PVH and Linux arrive without page tables that are ours. Both build the same temporary ones:
//! the low 4 GiB at their own addresses and again at the kernel's link address.

use core::arch::global_asm;

use bootloader_api::BootInfo;
use bootloader_api::config::{BootloaderConfig, Mapping};

use super::physical::LowMemory;

/// Bytes of the temporary stack.
const BOOT_STACK_SIZE: usize = 32 * 1024;

/// Fills the temporary tables. The same text serves 32-bit and 64-bit code: `$r` is the letter
/// that begins the address registers' names. Uses AX, CX, DX and DI.
macro_rules! build_tables {
    ($r:literal) => {
        concat!(
            // Four page directories: 2048 pages of 2 MiB, present and writable.
            "mov ",
            $r,
            "di, offset boot_pd + {low}\n",
            "mov eax, 0x83\n",
            "mov ecx, 2048\n",
            "2:\n",
            "mov [",
            $r,
            "di], eax\n",
            "add eax, 0x200000\n",
            "add ",
            $r,
            "di, 8\n",
            "dec ecx\n",
            "jnz 2b\n",
            // The low table of pointers: 4 GiB at their own addresses.
            "mov ",
            $r,
            "di, offset boot_pdpt_low + {low}\n",
            "mov eax, offset boot_pd + {low} + 3\n",
            "mov ecx, 4\n",
            "3:\n",
            "mov [",
            $r,
            "di], eax\n",
            "add eax, 0x1000\n",
            "add ",
            $r,
            "di, 8\n",
            "dec ecx\n",
            "jnz 3b\n",
            // The high one: the first 2 GiB again at -2 GiB.
            "mov ",
            $r,
            "di, offset boot_pdpt_high + {low} + 510 * 8\n",
            "mov dword ptr [",
            $r,
            "di], offset boot_pd + {low} + 3\n",
            "mov dword ptr [",
            $r,
            "di + 8], offset boot_pd + {low} + 0x1003\n",
            "mov ",
            $r,
            "di, offset boot_pml4 + {low}\n",
            "mov dword ptr [",
            $r,
            "di], offset boot_pdpt_low + {low} + 3\n",
            "mov dword ptr [",
            $r,
            "di + 511 * 8], offset boot_pdpt_high + {low} + 3\n",
        )
    };
}

global_asm!(
    // The tables and the stack live at the end of the image and are given back later.
    ".pushsection .boot.bss, \"aw\", @nobits",
    ".balign 4096",
    "boot_pml4: .skip 4096",
    "boot_pdpt_low: .skip 4096",
    "boot_pdpt_high: .skip 4096",
    "boot_pd: .skip 4 * 4096",
    "boot_stack: .skip {stack_size}",
    "boot_stack_top:",
    ".popsection",

    ".pushsection .rodata.boot, \"a\"",
    ".balign 8",
    "boot_gdt:",
    ".quad 0",
    ".quad 0x00af9b000000ffff", // 0x08: 64-bit code
    ".quad 0x00cf93000000ffff", // 0x10: data
    "boot_gdt_pointer:",
    ".word boot_gdt_pointer - boot_gdt - 1",
    ".quad boot_gdt + {low}",
    ".popsection",

    // Two notes in one segment: the PVH entry first, then the hand-over entry.
    ".pushsection .note.enlit, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long pvh_entry + {low}",
    ".long 6, 8, {note_entry}",
    ".asciz \"Enlit\"",
    ".balign 4",
    ".quad handover_entry",
    ".popsection",

    // The hypervisor's code takes this page's place. Until then, and behind that code, it is
    // breakpoints.
    ".pushsection .text.hypercall_page, \"ax\"",
    ".balign 4096",
    ".global hypercall_page",
    "hypercall_page: .skip 4096, 0xCC",
    ".popsection",

    ".pushsection .text.entry, \"ax\"",
    ".code32",
    ".global pvh_entry",
    "pvh_entry:",
    "cli",
    "cld",
    "mov esi, ebx", // the start info; BX is free from here on
    "mov edi, offset bss_start_physical",
    "mov ecx, offset bss_size",
    "shr ecx, 2",
    "xor eax, eax",
    "rep stosd",
    build_tables!("e"),
    "mov eax, offset boot_pml4 + {low}",
    "mov cr3, eax",
    "mov eax, 0x60", // CR4.MCE and PAE
    "mov cr4, eax",
    "mov ecx, 0xC0000080",
    "xor edx, edx",
    "mov eax, 0x900", // EFER.NXE and EFER.LME
    "wrmsr",
    "mov eax, 0x80010021", // CR0.PG, WP, NE and PE
    "mov cr0, eax",
    "lgdt [boot_gdt_pointer + {low}]",
    // A far return reaches any address form that the assembler can encode in 32 bits.
    "mov esp, offset boot_stack_top + {low}",
    "mov eax, 0x08",
    "push eax",
    "mov eax, offset pvh_entry_64 + {low}",
    "push eax",
    "retf",
    ".code64",
    "pvh_entry_64:",
    "mov edi, esi",
    "lea rax, [rip + {pvh_start}]",
    "jmp 5f",

    ".global linux_entry",
    "linux_entry:",
    "cli",
    "cld",
    "mov r8, rsi", // boot_params
    "mov rdi, offset bss_start_physical",
    "mov rcx, offset bss_size",
    "shr rcx, 3",
    "xor eax, eax",
    "rep stosq",
    build_tables!("r"),
    "mov ecx, 0xC0000080",
    "rdmsr",
    "or eax, 0x800", // EFER.NXE
    "wrmsr",
    // CR0.PG, WP, NE and PE as above; CD and NW go, which Firecracker leaves set.
    "mov eax, 0x80010021",
    "mov cr0, rax",
    "mov rax, offset boot_pml4 + {low}",
    "mov cr3, rax",
    "mov eax, 0x60", // CR4.MCE and PAE, and nothing that the monitor may have set besides
    "mov cr4, rax",
    "lgdt [boot_gdt_pointer + {low}]",
    "mov rsp, offset boot_stack_top + {low}",
    "push 0x08",
    "lea rax, [rip + 4f]",
    "push rax",
    "retfq",
    "4:",
    "mov rdi, r8",
    "lea rax, [rip + {linux_start}]",
    // Both: RDI is what the loader gave, RAX where to go on, still at low addresses.
    "5:",
    "mov ecx, 0x10",
    "mov ds, ecx",
    "mov es, ecx",
    "mov ss, ecx",
    "xor ecx, ecx",
    "mov fs, ecx",
    "mov gs, ecx",
    "mov rcx, {base}",
    "add rax, rcx",
    "mov rsp, offset boot_stack_top",
    "xor ebp, ebp", // ends backtraces
    "push rbp",
    "jmp rax",
    ".popsection",
    base = const handover::KERNEL_BASE as i64,
    low = const handover::KERNEL_BASE.wrapping_neg(),
    stack_size = const BOOT_STACK_SIZE,
    note_entry = const handover::NOTE_ENTRY,
    pvh_start = sym pvh_start,
    linux_start = sym linux_start,
);

const _: () = assert!(handover::NOTE_NAME.len() == 6);

/// What the kernel asks of a loader.
const CONFIG: BootloaderConfig = {
    let mut config = BootloaderConfig::new_default();
    config.kernel_stack_size = BOOT_STACK_SIZE as u64;
    config.mappings.physical_memory = Some(Mapping::Dynamic);
    config
};

#[used]
#[unsafe(link_section = ".bootloader-config")]
static CONFIG_BYTES: [u8; BootloaderConfig::SERIALIZED_LEN] = CONFIG.serialize();

extern "sysv64" fn pvh_start(start_info: u64) -> ! {
    let (boot_info, command_line) = crate::boot::pvh::boot_info(
        &LowMemory,
        super::image::physical_range_at_link(),
        start_info,
    );
    crate::start::start(boot_info, command_line)
}

extern "sysv64" fn linux_start(boot_params: u64) -> ! {
    let (boot_info, command_line) = crate::boot::linux::boot_info(
        &LowMemory,
        super::image::physical_range_at_link(),
        boot_params,
    );
    crate::start::start(boot_info, command_line)
}

#[unsafe(no_mangle)]
extern "sysv64" fn handover_entry(
    boot_info: &'static mut BootInfo,
    command_line: *const u8,
    command_line_len: usize,
) -> ! {
    let command_line = if command_line.is_null() || command_line_len > handover::COMMAND_LINE_MAX {
        &[]
    } else {
        // SAFETY: the contract of `handover::Entry`.
        unsafe { core::slice::from_raw_parts(command_line, command_line_len) }
    };
    crate::start::start(boot_info, command_line)
}

unsafe extern "Rust" {
    /// What [`main!`](crate::main) makes of the appliance's `main`.
    safe fn __enlit_main();
}

/// Calls the appliance's part of the boot.
pub fn appliance() {
    __enlit_main();
}
