//! What this hypervisor offers, read once from CPUID (TLFS, Feature and Interface Discovery; spec
//! tlfs.md 1).
//!
//! Reading CPUID is a VM exit each time, so every leaf is read once, at detection, and the
//! decoded [`Features`] are passed around. Decoding is apart from the instruction, so that any
//! host can be imitated.

#![forbid(unsafe_code)]

use core::arch::x86_64::CpuidResult;
use core::fmt;

use bitflags::bitflags;

use super::instructions;

bitflags! {
    /// What this partition may do: leaf 0x40000003 EAX (bits 31:0) and EBX (bits 63:32).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Privileges: u64 {
        /// VP_RUNTIME.
        const VP_RUNTIME = 1 << 0;
        /// TIME_REF_COUNT.
        const REFERENCE_COUNTER = 1 << 1;
        /// SCONTROL to EOM and the SINTs.
        const SYNIC = 1 << 2;
        /// The STIMERs.
        const SYNTHETIC_TIMERS = 1 << 3;
        /// EOI, ICR, TPR and the VP assist page.
        const INTERRUPT_CONTROL = 1 << 4;
        /// GUEST_OS_ID and HYPERCALL.
        const HYPERCALL = 1 << 5;
        /// VP_INDEX.
        const VP_INDEX = 1 << 6;
        /// RESET.
        const RESET = 1 << 7;
        /// The statistics page MSRs.
        const STATISTICS_PAGES = 1 << 8;
        /// REFERENCE_TSC.
        const REFERENCE_TSC = 1 << 9;
        /// GUEST_IDLE.
        const GUEST_IDLE = 1 << 10;
        /// TSC_FREQUENCY and APIC_FREQUENCY.
        const FREQUENCIES = 1 << 11;
        /// The reenlightenment MSRs.
        const REENLIGHTENMENT = 1 << 13;
        /// TSC_INVARIANT_CONTROL.
        const TSC_INVARIANT = 1 << 15;
        /// HvCallCreatePartition.
        const CREATE_PARTITIONS = 1 << 32;
        /// HvCallGetPartitionId.
        const PARTITION_ID = 1 << 33;
        /// HvCallPostMessage. Some hosts take messages without saying so.
        const POST_MESSAGES = 1 << 36;
        /// HvCallSignalEvent. Some hosts take signals without saying so.
        const SIGNAL_EVENTS = 1 << 37;
        /// HvCallGetVpRegisters and HvCallSetVpRegisters.
        const VP_REGISTERS = 1 << 49;
        /// Extended hypercalls, codes above 0x8000.
        const EXTENDED_HYPERCALLS = 1 << 52;
        /// HvCallStartVirtualProcessor.
        const START_VP = 1 << 53;
        /// The partition may be isolated from its host; leaf 0x4000000C is valid.
        const ISOLATION = 1 << 54;
        // Other bits are kept as they are.
        const _ = !0;
    }

    /// What else there is: leaf 0x40000003 EDX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Services: u32 {
        /// Hypercall input in XMM registers.
        const XMM_INPUT = 1 << 4;
        /// The guest idle state.
        const GUEST_IDLE = 1 << 5;
        /// The frequency MSRs.
        const FREQUENCIES = 1 << 8;
        /// The crash MSRs.
        const CRASH = 1 << 10;
        /// Hypercall output in XMM registers.
        const XMM_OUTPUT = 1 << 15;
        /// Synthetic timers that raise an interrupt themselves.
        const DIRECT_TIMERS = 1 << 19;
        const _ = !0;
    }

    /// What the hypervisor advises: leaf 0x40000004 EAX.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Recommendations: u32 {
        /// Flush other VPs' translations by hypercall.
        const REMOTE_FLUSH = 1 << 2;
        /// Use MSRs for EOI, ICR and TPR.
        const APIC_MSRS = 1 << 3;
        /// Reset by MSR.
        const RESET = 1 << 4;
        /// Do not rely on watchdogs.
        const RELAXED_TIMING = 1 << 5;
        /// Do not use AutoEOI.
        const NO_AUTO_EOI = 1 << 9;
        /// Send inter-processor interrupts by hypercall.
        const CLUSTER_IPI = 1 << 10;
        /// This hypervisor itself runs under Hyper-V.
        const NESTED = 1 << 12;
        const _ = !0;
    }
}

/// What the hypervisor offers this partition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Features {
    /// Leaf 1, which CPUID had to be asked for anyway: processor features for whoever needs them.
    pub processor: CpuidResult,
    /// The highest hypervisor leaf.
    pub max_leaf: u32,
    /// Who made the hypervisor, or who it says it is.
    pub vendor: Vendor,
    /// The hypervisor's version; all zero on hosts that do not tell.
    pub version: Version,
    /// What this partition may do.
    pub privileges: Privileges,
    /// What else there is.
    pub services: Services,
    /// What the hypervisor advises.
    pub recommendations: Recommendations,
    /// How often to spin on a lock before the hypervisor wants to know, if it does.
    pub spin_retries: Option<u32>,
    /// How many bits of a physical address are implemented, if reported.
    pub physical_address_bits: Option<u8>,
    /// How much the hypervisor supports at most.
    pub limits: Limits,
    /// How this partition is kept from its host.
    pub isolation: Isolation,
}

impl Features {
    /// Finds out by CPUID. At most 8 VM exits.
    ///
    /// # Errors
    /// When there is no hypervisor with Hyper-V's interface.
    pub fn detect() -> Result<Self, Absent> {
        Self::decode(instructions::cpuid)
    }

    /// Like [`detect`](Self::detect), for who has read leaf 1 already.
    ///
    /// # Errors
    /// When there is no hypervisor with Hyper-V's interface.
    pub fn detect_after(processor: CpuidResult) -> Result<Self, Absent> {
        Self::decode(|leaf| {
            if leaf == leaf::PROCESSOR {
                processor
            } else {
                instructions::cpuid(leaf)
            }
        })
    }

    /// Finds out from leaf values. Each leaf is asked for at most once.
    ///
    /// # Errors
    /// When there is no hypervisor with Hyper-V's interface.
    pub fn decode(mut cpuid: impl FnMut(u32) -> CpuidResult) -> Result<Self, Absent> {
        let processor = cpuid(leaf::PROCESSOR);
        if processor.ecx & HYPERVISOR_PRESENT == 0 {
            return Err(Absent::NoHypervisor);
        }
        let top = cpuid(leaf::RANGE);
        let vendor = Vendor::from_registers(top);
        // The vendor string decides nothing: hosts let their users choose it.
        let interface = cpuid(leaf::INTERFACE).eax;
        if interface != INTERFACE_HV1 {
            return Err(Absent::OtherInterface { vendor, interface });
        }
        if top.eax < leaf::LIMITS {
            return Err(Absent::TooFewLeaves { max_leaf: top.eax });
        }
        let version = cpuid(leaf::VERSION);
        let features = cpuid(leaf::FEATURES);
        let advice = cpuid(leaf::RECOMMENDATIONS);
        let limits = cpuid(leaf::LIMITS);
        let privileges =
            Privileges::from_bits_retain(u64::from(features.ebx) << 32 | u64::from(features.eax));
        let isolation = if privileges.contains(Privileges::ISOLATION) && top.eax >= leaf::ISOLATION
        {
            Isolation((cpuid(leaf::ISOLATION).ebx & 0xF) as u8)
        } else {
            Isolation::NONE
        };
        Ok(Self {
            processor,
            max_leaf: top.eax,
            vendor,
            version: Version::from_registers(version),
            privileges,
            services: Services::from_bits_retain(features.edx),
            recommendations: Recommendations::from_bits_retain(advice.eax),
            spin_retries: match advice.ebx {
                0 | u32::MAX => None,
                retries => Some(retries),
            },
            physical_address_bits: match (advice.ecx & 0x7F) as u8 {
                0 => None,
                bits => Some(bits),
            },
            limits: Limits {
                virtual_processors: reported(limits.eax),
                logical_processors: reported(limits.ebx),
                interrupt_vectors: reported(limits.ecx),
            },
            isolation,
        })
    }

    /// Whether all is there that this kernel cannot do without.
    ///
    /// The privileges to post messages and to signal events are not asked for: OpenVMM on KVM does
    /// both without granting them (spec tlfs.md 1.5).
    ///
    /// # Errors
    /// Names what is missing.
    pub fn check(&self) -> Result<(), Missing> {
        if self.isolation != Isolation::NONE {
            return Err(Missing::SharedMemory(self.isolation));
        }
        let missing = REQUIRED.difference(self.privileges);
        if missing.is_empty() {
            Ok(())
        } else {
            Err(Missing::Privileges(missing))
        }
    }

    /// Whether synthetic timers can raise an interrupt themselves.
    pub fn direct_timers(&self) -> bool {
        self.services.contains(Services::DIRECT_TIMERS)
    }

    /// Whether an interrupt of the SynIC may end by itself: the host has nothing against it.
    pub fn auto_eoi(&self) -> bool {
        !self.recommendations.contains(Recommendations::NO_AUTO_EOI)
    }

    /// Whether the frequency MSRs are there.
    pub fn frequencies(&self) -> bool {
        self.privileges.contains(Privileges::FREQUENCIES)
            && self.services.contains(Services::FREQUENCIES)
    }

    /// Every feature that a status table should show, and whether this kernel uses it here.
    pub fn capabilities(&self) -> impl Iterator<Item = Capability> {
        let has = |privilege| self.privileges.contains(privilege);
        let serves = |service| self.services.contains(service);
        let advises = |advice| self.recommendations.contains(advice);
        let direct = has(Privileges::SYNTHETIC_TIMERS) && self.direct_timers();
        [
            Capability::needed("hypercall page", has(Privileges::HYPERCALL)),
            Capability::needed("message posting", has(Privileges::POST_MESSAGES)),
            Capability::needed("event signalling", has(Privileges::SIGNAL_EVENTS)),
            Capability::needed("SynIC", has(Privileges::SYNIC)),
            Capability::used("AutoEOI", has(Privileges::SYNIC) && self.auto_eoi()),
            Capability::needed("VP index", has(Privileges::VP_INDEX)),
            Capability::needed("reference counter", has(Privileges::REFERENCE_COUNTER)),
            Capability::used("reference TSC page", has(Privileges::REFERENCE_TSC)),
            Capability::needed("synthetic timers", has(Privileges::SYNTHETIC_TIMERS)),
            Capability::used("direct timer interrupts", direct),
            Capability::unused("frequency MSRs", self.frequencies()),
            Capability::used("crash MSRs", serves(Services::CRASH)),
            Capability::used("reset MSR", has(Privileges::RESET)),
            Capability::unused("APIC MSRs", has(Privileges::INTERRUPT_CONTROL)),
            Capability::unused(
                "guest idle state",
                has(Privileges::GUEST_IDLE) && serves(Services::GUEST_IDLE),
            ),
            Capability::unused("reenlightenment", has(Privileges::REENLIGHTENMENT)),
            Capability::unused("XMM hypercall input", serves(Services::XMM_INPUT)),
            Capability::unused("extended hypercalls", has(Privileges::EXTENDED_HYPERCALLS)),
            Capability::unused("VP start by hypercall", has(Privileges::START_VP)),
            Capability::unused("remote TLB flush", advises(Recommendations::REMOTE_FLUSH)),
            Capability::unused("cluster IPI", advises(Recommendations::CLUSTER_IPI)),
        ]
        .into_iter()
    }
}

/// One line of the status table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capability {
    /// What it is called.
    pub name: &'static str,
    /// Whether the hypervisor says that it is there.
    pub offered: bool,
    /// Whether this kernel uses it here. What cannot be done without is used even where the
    /// hypervisor does not offer it.
    pub used: bool,
}

impl Capability {
    const fn needed(name: &'static str, offered: bool) -> Self {
        Self {
            name,
            offered,
            used: true,
        }
    }

    const fn used(name: &'static str, offered: bool) -> Self {
        Self {
            name,
            offered,
            used: offered,
        }
    }

    const fn unused(name: &'static str, offered: bool) -> Self {
        Self {
            name,
            offered,
            used: false,
        }
    }
}

/// Why there is no Hyper-V here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Absent {
    /// CPUID shows no hypervisor at all.
    NoHypervisor,
    /// There is a hypervisor, but it does not speak Hyper-V's interface.
    OtherInterface {
        /// Who it says it is.
        vendor: Vendor,
        /// The interface it shows instead of "Hv#1" (leaf 0x40000001 EAX).
        interface: u32,
    },
    /// The interface is right, but leaves that every Hyper-V has are not there.
    TooFewLeaves {
        /// The highest leaf there is.
        max_leaf: u32,
    },
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoHypervisor => f.write_str(
                "no Hyper-V here: CPUID shows no hypervisor (leaf 1 ECX bit 31 is clear)",
            ),
            Self::OtherInterface { vendor, interface } => write!(
                f,
                "no Hyper-V here: the hypervisor is \"{vendor}\", its interface {interface:#010x} is not \"Hv#1\" \
                 (on QEMU with KVM give the CPU its hv-* flags)"
            ),
            Self::TooFewLeaves { max_leaf } => write!(
                f,
                "no usable Hyper-V here: the highest CPUID leaf is {max_leaf:#010x}, {:#010x} is needed",
                leaf::LIMITS
            ),
        }
    }
}

impl core::error::Error for Absent {}

/// What this kernel cannot do without and the hypervisor does not give.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Missing {
    /// These privileges.
    Privileges(Privileges),
    /// Memory that the host can reach: the partition is isolated from its host.
    SharedMemory(Isolation),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let missing = match self {
            Self::Privileges(missing) => *missing,
            Self::SharedMemory(isolation) => {
                return write!(
                    f,
                    "this partition is isolated from its host ({isolation}): not supported"
                );
            }
        };
        f.write_str("the hypervisor does not offer ")?;
        let mut separator = "";
        for (privilege, name) in REQUIRED_NAMES {
            if missing.contains(privilege) {
                write!(f, "{separator}{name}")?;
                separator = ", ";
            }
        }
        Ok(())
    }
}

impl core::error::Error for Missing {}

const REQUIRED: Privileges = Privileges::REFERENCE_COUNTER
    .union(Privileges::SYNIC)
    .union(Privileges::SYNTHETIC_TIMERS)
    .union(Privileges::HYPERCALL)
    .union(Privileges::VP_INDEX);

/// Each required privilege, and the flag that makes QEMU grant it.
const REQUIRED_NAMES: [(Privileges, &str); 5] = [
    (
        Privileges::HYPERCALL,
        "the hypercall page (QEMU: any hv-* flag)",
    ),
    (Privileges::VP_INDEX, "the VP index (QEMU: hv-vpindex)"),
    (Privileges::SYNIC, "the SynIC (QEMU: hv-synic)"),
    (
        Privileges::REFERENCE_COUNTER,
        "the reference counter (QEMU: hv-time)",
    ),
    (
        Privileges::SYNTHETIC_TIMERS,
        "synthetic timers (QEMU: hv-stimer)",
    ),
];

/// The vendor string, 12 bytes. For show only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Vendor(pub [u8; 12]);

impl Vendor {
    /// What Hyper-V says.
    pub const MICROSOFT: Self = Self(*b"Microsoft Hv");

    fn from_registers(leaf: CpuidResult) -> Self {
        let mut text = [0; 12];
        let registers = [leaf.ebx, leaf.ecx, leaf.edx];
        for (bytes, register) in text.chunks_exact_mut(4).zip(registers) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
        Self(text)
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self
            .0
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |last| last + 1);
        self.0
            .iter()
            .take(end)
            .try_for_each(|byte| write!(f, "{}", byte.escape_ascii()))
    }
}

impl fmt::Debug for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// The hypervisor's version (leaf 0x40000002).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Version {
    /// Major version.
    pub major: u16,
    /// Minor version.
    pub minor: u16,
    /// Build number.
    pub build: u32,
    /// Service pack.
    pub service_pack: u32,
    /// Service branch.
    pub service_branch: u8,
    /// Service number, 24 bits.
    pub service_number: u32,
}

impl Version {
    fn from_registers(leaf: CpuidResult) -> Self {
        Self {
            major: (leaf.ebx >> 16) as u16,
            minor: leaf.ebx as u16,
            build: leaf.eax,
            service_pack: leaf.ecx,
            service_branch: (leaf.edx >> 24) as u8,
            service_number: leaf.edx & 0xFF_FFFF,
        }
    }

    /// Whether the host tells its version at all.
    pub fn is_known(self) -> bool {
        self != Self::default()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_known() {
            let Self {
                major,
                minor,
                build,
                service_number,
                ..
            } = self;
            write!(f, "{major}.{minor}.{build}.{service_number}")
        } else {
            f.write_str("unknown version")
        }
    }
}

/// Implementation limits (leaf 0x40000005); `None` where the host does not report one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Most VPs in a partition.
    pub virtual_processors: Option<u32>,
    /// Most logical processors of the machine.
    pub logical_processors: Option<u32>,
    /// Most interrupt vectors that can be remapped.
    pub interrupt_vectors: Option<u32>,
}

/// How a partition is kept from its host (leaf 0x4000000C EBX 3:0).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isolation(pub u8);

impl Isolation {
    /// Not at all.
    pub const NONE: Self = Self(0);
    /// By the hypervisor.
    pub const VBS: Self = Self(1);
    /// By AMD SEV-SNP.
    pub const SNP: Self = Self(2);
    /// By Intel TDX.
    pub const TDX: Self = Self(3);
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => f.write_str("not isolated"),
            Self::VBS => f.write_str("VBS"),
            Self::SNP => f.write_str("SEV-SNP"),
            Self::TDX => f.write_str("TDX"),
            Self(other) => write!(f, "isolation type {other}"),
        }
    }
}

/// CPUID leaves.
mod leaf {
    pub(super) const PROCESSOR: u32 = 1;
    pub(super) const RANGE: u32 = 0x4000_0000;
    pub(super) const INTERFACE: u32 = 0x4000_0001;
    pub(super) const VERSION: u32 = 0x4000_0002;
    pub(super) const FEATURES: u32 = 0x4000_0003;
    pub(super) const RECOMMENDATIONS: u32 = 0x4000_0004;
    pub(super) const LIMITS: u32 = 0x4000_0005;
    pub(super) const ISOLATION: u32 = 0x4000_000C;
}

/// Leaf 1 ECX.
const HYPERVISOR_PRESENT: u32 = 1 << 31;
/// "Hv#1".
const INTERFACE_HV1: u32 = u32::from_le_bytes(*b"Hv#1");

/// Zero means "not reported".
fn reported(value: u32) -> Option<u32> {
    (value != 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::string::{String, ToString};
    use std::vec::Vec;

    use super::*;

    /// A host as its CPUID shows it, in the order EAX, EBX, ECX, EDX.
    struct Host(BTreeMap<u32, [u32; 4]>);

    impl Host {
        fn new(leaves: &[(u32, [u32; 4])]) -> Self {
            Self(leaves.iter().copied().collect())
        }

        fn decode(&self) -> (Result<Features, Absent>, Vec<u32>) {
            let mut read = Vec::new();
            let result = Features::decode(|leaf| {
                read.push(leaf);
                let [eax, ebx, ecx, edx] = self.0.get(&leaf).copied().unwrap_or([0; 4]);
                CpuidResult { eax, ebx, ecx, edx }
            });
            (result, read)
        }

        fn features(&self) -> Features {
            let (result, read) = self.decode();
            let mut once = read.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), read.len(), "a leaf was read twice: {read:x?}");
            assert!(read.len() <= 8, "{} VM exits", read.len());
            result.unwrap()
        }

        fn refusal(&self) -> Absent {
            self.decode().0.unwrap_err()
        }
    }

    const PRESENT: (u32, [u32; 4]) = (1, [0x0080_0F82, 0, 1 << 31 | 1 << 21, 0]);
    const MICROSOFT: [u32; 3] = [0x7263_694D, 0x666F_736F, 0x7648_2074];
    const HV1: (u32, [u32; 4]) = (0x4000_0001, [0x3123_7648, 0, 0, 0]);

    fn range(max: u32, [ebx, ecx, edx]: [u32; 3]) -> (u32, [u32; 4]) {
        (0x4000_0000, [max, ebx, ecx, edx])
    }

    fn openvmm_on_kvm() -> Host {
        Host::new(&[
            PRESENT,
            range(0x4000_0005, MICROSOFT),
            HV1,
            (0x4000_0003, [0x87F, 0, 0, 0x100]),
            (0x4000_0004, [0x200, u32::MAX, 0, 0]),
        ])
    }

    fn hyper_v() -> Host {
        Host::new(&[
            PRESENT,
            range(0x4000_000C, MICROSOFT),
            HV1,
            (0x4000_0002, [20348, 0x000A_0000, 0, 0x0100_0BB8]),
            (
                0x4000_0003,
                [0x2EFF, 0x0030_0030, 0, 1 << 10 | 1 << 8 | 1 << 4 | 1 << 19],
            ),
            (0x4000_0004, [0x0000_0E04, 0x0FFF, 46, 0]),
            (0x4000_0005, [240, 512, 0x400, 0]),
        ])
    }

    fn offered(features: &Features, name: &str) -> (bool, bool) {
        let found = features
            .capabilities()
            .find(|capability| capability.name == name)
            .unwrap();
        (found.offered, found.used)
    }

    #[test]
    fn openvmm_is_enough_without_message_privileges() {
        let features = openvmm_on_kvm().features();
        assert_eq!(features.check(), Ok(()));
        assert!(!features.privileges.contains(Privileges::POST_MESSAGES));
        assert_eq!(offered(&features, "message posting"), (false, true));
        assert_eq!(offered(&features, "reference TSC page"), (false, false));
        assert_eq!(
            offered(&features, "direct timer interrupts"),
            (false, false)
        );
        assert_eq!(offered(&features, "AutoEOI"), (false, false));
        assert!(features.frequencies());
        assert!(!features.version.is_known());
        assert_eq!(features.version.to_string(), "unknown version");
        assert_eq!(features.spin_retries, None);
        assert_eq!(features.limits.virtual_processors, None);
    }

    #[test]
    fn hyper_v_is_decoded_in_full() {
        let features = hyper_v().features();
        assert_eq!(features.check(), Ok(()));
        assert_eq!(features.vendor, Vendor::MICROSOFT);
        assert_eq!(features.version.to_string(), "10.0.20348.3000");
        assert_eq!(features.version.service_branch, 1);
        assert!(
            features
                .privileges
                .contains(Privileges::POST_MESSAGES | Privileges::SIGNAL_EVENTS)
        );
        assert!(
            features
                .privileges
                .contains(Privileges::START_VP | Privileges::EXTENDED_HYPERCALLS)
        );
        assert!(features.direct_timers());
        assert!(!features.auto_eoi());
        assert_eq!(offered(&features, "crash MSRs"), (true, true));
        assert_eq!(offered(&features, "cluster IPI"), (true, false));
        assert_eq!(features.spin_retries, Some(0xFFF));
        assert_eq!(features.physical_address_bits, Some(46));
        assert_eq!(features.limits.logical_processors, Some(512));
        assert_eq!(features.isolation, Isolation::NONE);
    }

    #[test]
    fn openvmm_emulator_has_no_counted_frequencies() {
        // Bits 1, 2, 3, 5, 6, 9; direct timers.
        let features = Host::new(&[
            PRESENT,
            range(0x4000_0005, MICROSOFT),
            HV1,
            (0x4000_0003, [0x26E, 0, 0, 1 << 19]),
        ])
        .features();
        assert_eq!(features.check(), Ok(()));
        assert_eq!(offered(&features, "reference TSC page"), (true, true));
        assert_eq!(offered(&features, "direct timer interrupts"), (true, true));
        assert_eq!(offered(&features, "AutoEOI"), (true, true));
        assert!(!features.frequencies());
    }

    #[test]
    fn vendor_string_does_not_decide() {
        let other = Vendor::from_registers(CpuidResult {
            eax: 0,
            ebx: 0x6163_6562,
            ecx: 0x0065_7375,
            edx: 0,
        });
        assert_eq!(other.to_string(), "because");
        let host = Host::new(&[
            PRESENT,
            range(0x4000_0005, [0x6163_6562, 0x0065_7375, 0]),
            HV1,
        ]);
        assert_eq!(host.features().vendor, other);
    }

    #[test]
    fn isolation_is_read_only_where_it_is_valid() {
        let mut host = hyper_v();
        host.0.insert(0x4000_000C, [0, 2, 0, 0]);
        assert_eq!(host.features().isolation, Isolation::NONE);
        host.0.get_mut(&0x4000_0003).unwrap()[1] |= 1 << 22;
        let features = host.features();
        assert_eq!(features.isolation, Isolation::SNP);
        let error = features.check().unwrap_err().to_string();
        assert!(error.contains("SEV-SNP"), "{error}");
    }

    #[test]
    fn each_absence_says_what_is_wrong() {
        let bare = Host::new(&[(1, [0, 0, 0, 0])]);
        assert_eq!(bare.refusal(), Absent::NoHypervisor);
        assert_eq!(
            bare.decode().1,
            [1],
            "nothing may be asked of a hypervisor that is not there"
        );

        let text: String = "TCGTCGTCGTCG".into();
        let tcg = Host::new(&[
            PRESENT,
            range(0x4000_0001, [0x5447_4354, 0x4354_4743, 0x4743_5447]),
        ]);
        assert_eq!(tcg.refusal().to_string().matches(&text).count(), 1);

        let short = Host::new(&[PRESENT, range(0x4000_0004, MICROSOFT), HV1]);
        assert_eq!(
            short.refusal(),
            Absent::TooFewLeaves {
                max_leaf: 0x4000_0004
            }
        );
        assert!(short.refusal().to_string().contains("0x40000005 is needed"));
    }

    #[test]
    fn missing_privileges_are_named() {
        let mut host = openvmm_on_kvm();
        host.0.get_mut(&0x4000_0003).unwrap()[0] &= !(1 << 2 | 1 << 6);
        let error = host.features().check().unwrap_err().to_string();
        assert_eq!(
            error,
            "the hypervisor does not offer the VP index (QEMU: hv-vpindex), the SynIC (QEMU: hv-synic)"
        );
    }

    #[test]
    fn every_required_privilege_has_a_name() {
        let named = REQUIRED_NAMES
            .iter()
            .fold(Privileges::empty(), |all, (privilege, _)| all | *privilege);
        assert_eq!(named, REQUIRED);
    }
}
