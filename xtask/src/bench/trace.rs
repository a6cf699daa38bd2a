//! Reads KVM's own account of a guest: the kernel's trace of VM exits, and the
//! events that say what each exit was about.

use std::{collections::BTreeMap, fmt};

/// One VM exit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Nanoseconds of the tracing system's clock, in steps of a microsecond.
    pub at: u64,
    /// Guest's instruction pointer.
    pub rip: u64,
    /// What it was about.
    pub cause: Cause,
}

/// Why a guest left to its host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// Access to an I/O port.
    Port {
        /// Port number.
        port: u16,
        /// Direction.
        write: bool,
        /// First value written or read.
        value: u32,
    },
    /// Access to a model-specific register.
    Msr {
        /// Register number.
        register: u32,
        /// Direction.
        write: bool,
    },
    /// A hypercall; its code, where the trace tells.
    Hypercall(Option<u16>),
    /// A CPUID leaf.
    Cpuid(u32),
    /// First touch of a page, or access to an emulated device's memory.
    PageFault {
        /// Guest physical address.
        address: u64,
    },
    /// The processor went to sleep.
    Halt,
    /// The host was interrupted while the guest ran; nothing of the guest's
    /// doing.
    HostInterrupt,
    /// Anything else, by KVM's name for it.
    Other(String),
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = |write: &bool| if *write { "write" } else { "read" };
        match self {
            Self::Port { port, write, .. } => write!(f, "port {} {port:#x}", verb(write)),
            Self::Msr { register, write } => {
                write!(f, "MSR {} {register:#x}", verb(write))?;
                msr_name(*register).map_or(Ok(()), |name| write!(f, " ({name})"))
            }
            Self::Hypercall(Some(code)) => write!(f, "hypercall {code:#x}"),
            Self::Hypercall(None) => write!(f, "hypercall"),
            Self::Cpuid(leaf) => write!(f, "CPUID {leaf:#x}"),
            Self::PageFault { .. } => write!(f, "nested page fault"),
            Self::Halt => write!(f, "halt"),
            Self::HostInterrupt => write!(f, "host interrupt"),
            Self::Other(name) => write!(f, "{name}"),
        }
    }
}

/// A kind of exit, for sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A byte for the console, or a look whether it takes one.
    Console,
    /// Another I/O port.
    Port,
    /// A model-specific register.
    Msr,
    /// A hypercall.
    Hypercall,
    /// CPUID.
    Cpuid,
    /// A nested page fault.
    PageFault,
    /// Sleep.
    Halt,
    /// An interrupt of the host.
    HostInterrupt,
    /// Anything else.
    Other,
}

impl Kind {
    /// All of them, in the order of the tables.
    pub const ALL: [Self; 9] = [
        Self::PageFault,
        Self::Msr,
        Self::Hypercall,
        Self::Cpuid,
        Self::Port,
        Self::Halt,
        Self::Other,
        Self::HostInterrupt,
        Self::Console,
    ];

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Console => "console bytes",
            Self::Port => "I/O ports",
            Self::Msr => "MSRs",
            Self::Hypercall => "hypercalls",
            Self::Cpuid => "CPUID",
            Self::PageFault => "nested page faults",
            Self::Halt => "halts",
            Self::HostInterrupt => "host interrupts",
            Self::Other => "other",
        }
    }

    /// Whether the sum that the aim is about counts it: console bytes depend on
    /// what is logged, host interrupts on how busy the host is.
    pub fn is_counted(self) -> bool {
        !matches!(self, Self::Console | Self::HostInterrupt)
    }
}

/// COM1's registers.
const COM1: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;

impl Cause {
    /// The kind it belongs to.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Port { port, .. } if COM1.contains(port) => Kind::Console,
            Self::Port { .. } => Kind::Port,
            Self::Msr { .. } => Kind::Msr,
            Self::Hypercall(_) => Kind::Hypercall,
            Self::Cpuid(_) => Kind::Cpuid,
            Self::PageFault { .. } => Kind::PageFault,
            Self::Halt => Kind::Halt,
            Self::HostInterrupt => Kind::HostInterrupt,
            Self::Other(_) => Kind::Other,
        }
    }
}

/// Sums exits by kind.
pub fn by_kind(exits: &[Exit]) -> BTreeMap<Kind, u64> {
    let mut sums = BTreeMap::new();
    for exit in exits {
        *sums.entry(exit.cause.kind()).or_default() += 1;
    }
    sums
}

/// Reads the text of the trace. Lines of other events are passed over. `None`
/// when the trace has lost events, and so cannot be counted.
pub fn parse(text: &str) -> Option<Vec<Exit>> {
    let mut exits: Vec<Exit> = Vec::new();
    for line in text.lines() {
        if line.contains("LOST") && line.starts_with("CPU:") {
            return None;
        }
        if let Some(entries) = line.strip_prefix("# entries-in-buffer/entries-written: ") {
            let (held, written) = entries.split_whitespace().next()?.split_once('/')?;
            if held != written {
                return None;
            }
        }
        let Some((at, name, rest)) = event(line) else {
            continue;
        };
        if name == "kvm_exit" {
            if let Some(exit) = exit(at, rest) {
                exits.push(exit);
            }
        } else if let Some(last) = exits.last_mut() {
            refine(&mut last.cause, name, rest);
        }
    }
    Some(exits)
}

/// Time, name and text of an event's line:
/// `task-pid [cpu] flags seconds.micros: name: text`.
fn event(line: &str) -> Option<(u64, &str, &str)> {
    if line.starts_with('#') {
        return None;
    }
    let (front, rest) = line.split_once(": ")?;
    let (name, text) = rest.split_once(": ")?;
    let (seconds, micros) = front.split_whitespace().next_back()?.split_once('.')?;
    let seconds: u64 = seconds.parse().ok()?;
    let micros: u64 = micros.parse().ok()?;
    Some((seconds * 1_000_000_000 + micros * 1000, name, text))
}

/// The word behind `name` in a text of words.
fn word<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut words = text.split_whitespace();
    words.by_ref().find(|word| *word == name)?;
    words.next()
}

fn number(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).ok()
}

fn exit(at: u64, text: &str) -> Option<Exit> {
    let rip = number(word(text, "rip")?)?;
    let info = |name: &str| word(text, name).and_then(number).unwrap_or(0);
    let cause = match word(text, "reason")? {
        // AMD's names, then Intel's.
        "hlt" | "HLT" => Cause::Halt,
        "interrupt" | "EXTERNAL_INTERRUPT" | "nmi" | "PREEMPTION_TIMER" => Cause::HostInterrupt,
        "npf" => Cause::PageFault {
            address: info("info2"),
        },
        "EPT_VIOLATION" | "EPT_MISCONFIG" => Cause::PageFault { address: 0 },
        "hypercall" | "vmmcall" | "VMCALL" => Cause::Hypercall(None),
        // Refined by the event that follows.
        other => Cause::Other(other.to_lowercase()),
    };
    Some(Exit { at, rip, cause })
}

/// Takes what a following event says about the last exit. An exit has one
/// cause: a second event (a device's own action) does not replace it.
fn refine(cause: &mut Cause, name: &str, text: &str) {
    let is_open = matches!(cause, Cause::Other(_));
    match name {
        "kvm_pio" if is_open => {
            if let (Some(port), Some(value)) = (
                word(text, "at").and_then(number),
                word(text, "val").and_then(number),
            ) {
                *cause = Cause::Port {
                    port: u16::try_from(port).unwrap_or(u16::MAX),
                    write: text.starts_with("pio_write"),
                    value: u32::try_from(value).unwrap_or(u32::MAX),
                };
            }
        }
        "kvm_msr" if is_open => {
            let mut words = text.split_whitespace();
            let write = words.next() == Some("msr_write");
            if let Some(register) = words.next().and_then(number) {
                *cause = Cause::Msr {
                    register: u32::try_from(register).unwrap_or(u32::MAX),
                    write,
                };
            }
        }
        "kvm_cpuid" if is_open => {
            if let Some(leaf) = word(text, "func").and_then(number) {
                *cause = Cause::Cpuid(u32::try_from(leaf).unwrap_or(u32::MAX));
            }
        }
        "kvm_hv_hypercall" => {
            let code = word(text, "code").and_then(number);
            *cause = Cause::Hypercall(code.and_then(|code| u16::try_from(code).ok()));
        }
        "kvm_page_fault" => {
            if let (Cause::PageFault { address: known @ 0 }, Some(address)) =
                (cause, word(text, "address").and_then(number))
            {
                *known = address;
            }
        }
        _ => {}
    }
}

/// Names of Hyper-V's registers (TLFS, appendix "Hypervisor Synthetic MSRs").
fn msr_name(register: u32) -> Option<&'static str> {
    Some(match register {
        0x4000_0000 => "guest OS id",
        0x4000_0001 => "hypercall page",
        0x4000_0002 => "VP index",
        0x4000_0003 => "reset",
        0x4000_0010 => "VP runtime",
        0x4000_0020 => "reference counter",
        0x4000_0021 => "reference TSC page",
        0x4000_0022 => "TSC frequency",
        0x4000_0023 => "APIC frequency",
        0x4000_0070 => "EOI",
        0x4000_0071 => "ICR",
        0x4000_0072 => "TPR",
        0x4000_0073 => "VP assist page",
        0x4000_0080 => "SynIC control",
        0x4000_0081 => "SynIC version",
        0x4000_0082 => "event flags page",
        0x4000_0083 => "message page",
        0x4000_0084 => "EOM",
        0x4000_0090..=0x4000_009f => "SINT",
        0x4000_00b0 | 0x4000_00b2 | 0x4000_00b4 | 0x4000_00b6 => "timer configuration",
        0x4000_00b1 | 0x4000_00b3 | 0x4000_00b5 | 0x4000_00b7 => "timer count",
        0x4000_0100..=0x4000_0105 => "crash",
        0x1b => "APIC base",
        0x277 => "PAT",
        0x800..=0x8ff => "x2APIC",
        0xc000_0080 => "EFER",
        0xc000_0100..=0xc000_0102 => "FS/GS base",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#
# entries-in-buffer/entries-written: 9/9   #P:1
#
          loader-127     [000] d..1.    24.730328: kvm_exit: vcpu 0 reason io rip 0xec16 info1 0x0000000000700010 info2 0x000000000000ec18 intr_info 0x00000000 error_code 0x00000000
          loader-127     [000] .....    24.730495: kvm_pio: pio_write at 0x4e9 size 1 count 1 val 0x1 
          loader-127     [000] d..1.    24.731000: kvm_exit: vcpu 0 reason npf rip 0xffffffff80200000 info1 0x0000000100000014 info2 0x00000000000fe05b intr_info 0x00000000 error_code 0x00000000
          loader-127     [000] .....    24.731001: kvm_page_fault: vcpu 0 rip 0xe05b address 0x00000000000fe05b error_code 0x100000014
     CPU 0/KVM-99      [000] d..1.    24.732000: kvm_exit: vcpu 1 reason msr rip 0x10 info1 0x0000000000000001 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000
     CPU 0/KVM-99      [000] .....    24.732001: kvm_msr: msr_write 40000080 = 0x1
     CPU 0/KVM-99      [000] d..1.    25.000000: kvm_exit: vcpu 0 reason hypercall rip 0x20 info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000
     CPU 0/KVM-99      [000] .....    25.000001: kvm_hv_hypercall: code 0x5c slow var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0x1000 out 0x0
     CPU 0/KVM-99      [000] d..1.    26.000000: kvm_exit: vcpu 0 reason cpuid rip 0x30 info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000
     CPU 0/KVM-99      [000] .....    26.000001: kvm_cpuid: func 40000000 idx 0 rax 1 rbx 2 rcx 3 rdx 4, cpuid entry found
     CPU 0/KVM-99      [000] d..1.    27.000000: kvm_exit: vcpu 0 reason write_cr0 rip 0x40 info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000
     CPU 0/KVM-99      [000] d..1.    28.000000: kvm_exit: vcpu 0 reason io rip 0x40 info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000
     CPU 0/KVM-99      [000] .....    28.000001: kvm_pio: pio_read at 0x3fd size 1 count 1 val 0x60 
     CPU 0/KVM-99      [000] d..1.    29.000000: kvm_exit: vcpu 0 reason hlt rip 0x40 info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000
";

    #[test]
    fn exits_get_their_causes() {
        let exits = parse(TRACE).unwrap();
        let causes: Vec<_> = exits.iter().map(|exit| exit.cause.clone()).collect();
        assert_eq!(
            causes,
            [
                Cause::Port {
                    port: 0x4e9,
                    write: true,
                    value: 1
                },
                Cause::PageFault { address: 0xfe05b },
                Cause::Msr {
                    register: 0x4000_0080,
                    write: true
                },
                Cause::Hypercall(Some(0x5c)),
                Cause::Cpuid(0x4000_0000),
                Cause::Other("write_cr0".into()),
                Cause::Port {
                    port: 0x3fd,
                    write: false,
                    value: 0x60
                },
                Cause::Halt,
            ]
        );
        assert_eq!(exits[0].at, 24_730_328_000);
        assert_eq!(exits[1].rip, 0xffff_ffff_8020_0000);
        assert_eq!(
            causes[2].to_string(),
            "MSR write 0x40000080 (SynIC control)"
        );
    }

    #[test]
    fn console_bytes_are_counted_apart() {
        let sums = by_kind(&parse(TRACE).unwrap());
        assert_eq!(sums[&Kind::Console], 1);
        assert_eq!(sums[&Kind::Port], 1);
        assert_eq!(sums.values().sum::<u64>(), 8);
        assert!(!Kind::Console.is_counted());
    }

    #[test]
    fn every_kind_is_in_the_tables() {
        for exit in parse(TRACE).unwrap() {
            assert!(Kind::ALL.contains(&exit.cause.kind()));
        }
    }

    #[test]
    fn a_trace_with_losses_is_refused() {
        assert_eq!(
            parse("# entries-in-buffer/entries-written: 5/9   #P:1\n"),
            None
        );
        assert_eq!(parse("CPU:0 [LOST 17 EVENTS]\n"), None);
    }
}
