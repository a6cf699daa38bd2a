//! Reports of what should not happen: panics and processor exceptions.
//!
//! Addresses are printed one a line as `  #N 0x...`, which `cargo xtask` turns into
//! names and source lines.

use core::fmt;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::arch::traps::TrapFrame;
use crate::arch::{backtrace, cpu, paging, per_cpu};
use crate::power::{self, CrashState};
use crate::{console, println};

/// Reports that have begun: a fault in a report must not start reports without end.
static DEPTH: AtomicU32 = AtomicU32::new(0);

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    begin();
    println!("\npanic on VP {}: {info}", per_cpu::current().vp_index());
    let frame_pointer = backtrace::frame_pointer();
    print_backtrace(None, frame_pointer);
    let state = CrashState {
        vector: None,
        rip: caller(frame_pointer),
        rax: 0,
        rsp: frame_pointer,
    };
    power::crashed(&state, info)
}

/// Reports an exception and ends the machine.
pub(crate) fn exception(frame: &TrapFrame, fault_address: u64) -> ! {
    begin();
    let name = name(frame.vector);
    println!(
        "\nexception {} ({name}) on VP {}",
        frame.vector,
        per_cpu::current().vp_index()
    );
    if frame.vector == 14 {
        println!(
            "  {}",
            PageFault {
                code: frame.error_code,
                address: fault_address
            }
        );
    } else if frame.error_code != 0 {
        println!("  error code {:#x}", frame.error_code);
    }
    if matches!(frame.vector, 8 | 14) && paging::is_stack_guard(fault_address) {
        println!("  a stack has overflowed into its guard page");
    }
    println!(
        "  rip {:#018x}  rflags {:#010x}  cs {:#x}",
        frame.rip, frame.rflags, frame.cs
    );
    println!(
        "  rsp {:#018x}  rbp {:#018x}  cr2 {fault_address:#018x}",
        frame.rsp, frame.rbp
    );
    println!(
        "  rax {:#018x}  rbx {:#018x}  rcx {:#018x}",
        frame.rax, frame.rbx, frame.rcx
    );
    println!(
        "  rdx {:#018x}  rsi {:#018x}  rdi {:#018x}",
        frame.rdx, frame.rsi, frame.rdi
    );
    println!(
        "  r8  {:#018x}  r9  {:#018x}  r10 {:#018x}",
        frame.r8, frame.r9, frame.r10
    );
    println!(
        "  r11 {:#018x}  r12 {:#018x}  r13 {:#018x}",
        frame.r11, frame.r12, frame.r13
    );
    println!("  r14 {:#018x}  r15 {:#018x}", frame.r14, frame.r15);
    print_backtrace(Some(frame.rip), frame.rbp);
    let state = CrashState {
        vector: Some(frame.vector),
        rip: frame.rip,
        rax: frame.rax,
        rsp: frame.rsp,
    };
    let text = format_args!(
        "exception {} ({name}), error code {:#x}, at {:#x}, address {fault_address:#x}",
        frame.vector, frame.error_code, frame.rip
    );
    power::crashed(&state, &text)
}

fn begin() {
    cpu::disable_interrupts();
    console::prepare_for_report();
    if DEPTH.fetch_add(1, Ordering::Relaxed) >= 2 {
        // The report itself fails, twice: say nothing more.
        let state = CrashState {
            vector: None,
            rip: 0,
            rax: 0,
            rsp: 0,
        };
        power::crashed(&state, &"a crash report failed");
    }
}

fn print_backtrace(first: Option<u64>, frame_pointer: u64) {
    println!("backtrace:");
    for (number, address) in first
        .into_iter()
        .chain(backtrace::from_frame(frame_pointer))
        .enumerate()
    {
        println!("  #{number} {address:#018x}");
    }
}

fn caller(frame_pointer: u64) -> u64 {
    backtrace::from_frame(frame_pointer).next().unwrap_or(0)
}

/// The cause of a page fault (AMD64 Architecture Programmer's Manual 2, section 8.4.2).
struct PageFault {
    code: u64,
    address: u64,
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |n: u32| self.code & (1 << n) != 0;
        let access = match (bit(4), bit(1)) {
            (true, _) => "executing",
            (_, true) => "writing",
            _ => "reading",
        };
        let cause = if bit(0) {
            "is not allowed there"
        } else {
            "found nothing mapped"
        };
        write!(f, "{access} at {:#x} {cause}", self.address)
    }
}

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug",
        2 => "non-maskable interrupt",
        3 => "breakpoint",
        4 => "overflow",
        5 => "bound range",
        6 => "invalid opcode",
        7 => "device not available",
        8 => "double fault",
        10 => "invalid TSS",
        11 => "segment not present",
        12 => "stack fault",
        13 => "general protection",
        14 => "page fault",
        16 => "x87 floating point",
        17 => "alignment check",
        18 => "machine check",
        19 => "SIMD floating point",
        21 => "control protection",
        _ => "reserved",
    }
}
