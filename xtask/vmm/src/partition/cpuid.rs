//! What CPUID tells the guest: the processor as KVM has it, and a Hyper-V without KVM's own signature
//! (spec tlfs.md 1).

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 0x40000003 EAX: VP run time, reference counter, SynIC, synthetic timers, interrupt control, hypercalls, VP
/// index, reset, reference TSC, frequencies.
const PRIVILEGES_LOW: u32 = 0b1010_1111_1111;
/// EBX: PostMessages and SignalEvents.
const PRIVILEGES_HIGH: u32 = 1 << 4 | 1 << 5;
/// EDX: hypercall input in XMM registers, frequency MSRs, crash MSRs, hypercall output in XMM registers, direct mode of
/// synthetic timers.
const FEATURES: u32 = 1 << 4 | 1 << 8 | 1 << 10 | 1 << 15 | 1 << 19;
/// Leaf 0x40000004 EAX: remote TLB flushes, interrupt control and reset by MSR, relaxed timing, no AutoEOI, cluster IPIs, VP
/// sets, no sharing of cores.
const RECOMMENDATIONS: u32 =
    1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 18;

/// The highest leaf of the hypervisor: those after it are for nested hypervisors and debuggers.
const MAX_LEAF: u32 = 0x4000_0006;

const VENDOR: [u32; 3] = [
    u32::from_le_bytes(*b"Micr"),
    u32::from_le_bytes(*b"osof"),
    u32::from_le_bytes(*b"t Hv"),
];

/// Of leaf 1 ECX: VMX, the hypervisor bit, and the timer mode that Hyper-V keeps to itself.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Of leaf 1 EDX: the package has more than one logical processor.
const MULTI_THREADING: u32 = 1 << 28;
/// Of leaf 0x80000001 ECX: SVM.
const SVM: u32 = 1 << 2;

/// Whether KVM offers what a VMBus cannot do without; else what is missing.
pub fn check(hyperv: &[kvm_cpuid_entry2]) -> Result<(), &'static str> {
    let leaf = |function| hyperv.iter().find(|entry| entry.function == function);
    let low = leaf(0x4000_0003).map_or(0, |entry| entry.eax);
    match () {
        () if leaf(0x4000_0001).is_none() => Err("the Hyper-V interface"),
        () if low & 1 << 2 == 0 => Err("Hyper-V's SynIC"),
        () if low & 1 << 5 == 0 => Err("Hyper-V's hypercalls"),
        () if low & 1 << 6 == 0 => Err("Hyper-V's VP index"),
        () => Ok(()),
    }
}

/// The leaves of VP number `vp` of `vps`, from what KVM supports of the processor's and of Hyper-V's.
pub fn leaves(
    processor: &[kvm_cpuid_entry2],
    hyperv: &[kvm_cpuid_entry2],
    vp: u32,
    vps: u32,
) -> Vec<kvm_cpuid_entry2> {
    let is_hypervisor = |entry: &&kvm_cpuid_entry2| entry.function >> 28 == 4;
    // Topology is added below.
    let is_topology = |entry: &&kvm_cpuid_entry2| matches!(entry.function, 0xB | 0x1F);
    let mut leaves: Vec<_> = processor
        .iter()
        .filter(|entry| !is_hypervisor(entry) && !is_topology(entry))
        .copied()
        .collect();
    for entry in &mut leaves {
        identify(entry, vp, vps);
    }
    if leaves
        .iter()
        .any(|entry| entry.function == 0 && entry.eax >= 0xB)
    {
        leaves.extend(topology(vp, vps));
    }
    leaves.extend(
        hyperv
            .iter()
            .filter(|entry| entry.function <= MAX_LEAF)
            .copied()
            .map(|entry| shape(entry, vps)),
    );
    leaves
}

/// Bits of a physical address, by the leaves of a VP; between 36, which every processor with KVM has, and 52.
pub fn address_bits(leaves: &[kvm_cpuid_entry2]) -> u32 {
    let sizes = leaves.iter().find(|entry| entry.function == 0x8000_0008);
    sizes.map_or(0, |entry| entry.eax & 0xFF).clamp(36, 52)
}

/// Bits of an APIC id that number the processors.
fn id_bits(vps: u32) -> u32 {
    vps.next_power_of_two().trailing_zeros()
}

/// One package of `vps` cores, each with one thread.
fn identify(entry: &mut kvm_cpuid_entry2, vp: u32, vps: u32) {
    let most = vps.min(0xFF);
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xFFFF | most << 16 | vp << 24;
            entry.ecx = entry.ecx & !VMX & !TSC_DEADLINE | HYPERVISOR;
            entry.edx &= !MULTI_THREADING;
            if vps > 1 {
                entry.edx |= MULTI_THREADING;
            }
        }
        // Caches: cores in the package, and that no cache but the third is shared.
        4 if entry.eax & 0x1F != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level == 3 { most - 1 } else { 0 };
            entry.eax = entry.eax & 0x3FFF | sharing << 14 | (most - 1).min(0x3F) << 26;
        }
        0x8000_0001 => {
            entry.ecx &= !SVM;
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xF0FF | (most - 1) | id_bits(vps) << 12,
        // What an SVM guest of the guest could use.
        0x8000_000A => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_001E => (entry.eax, entry.ebx, entry.ecx) = (vp, vp & 0xFF, 0),
        _ => {}
    }
}

/// Leaf 0xB: threads of a core, and cores of the package.
fn topology(vp: u32, vps: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xB,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: vp,
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, id_bits(vps), vps, 2),
        level(2, 0, 0, 0),
    ]
}

/// A leaf of Hyper-V, without what this VM has not.
fn shape(mut entry: kvm_cpuid_entry2, vps: u32) -> kvm_cpuid_entry2 {
    match entry.function {
        0x4000_0000 => {
            entry.eax = MAX_LEAF;
            [entry.ebx, entry.ecx, entry.edx] = VENDOR;
        }
        0x4000_0003 => {
            entry.eax &= PRIVILEGES_LOW;
            entry.ebx &= PRIVILEGES_HIGH;
            entry.ecx = 0;
            entry.edx &= FEATURES;
        }
        0x4000_0004 => entry.eax &= RECOMMENDATIONS,
        // Limits: VPs; no others are told.
        0x4000_0005 => (entry.eax, entry.ebx, entry.ecx) = (vps, 0, 0),
        _ => {}
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// A processor on which every bit is set, and a KVM that supports everything.
    fn full(vp: u32, vps: u32) -> Vec<kvm_cpuid_entry2> {
        let all = [u32::MAX; 4];
        let processor = [
            entry(0, [0x20, 0, 0, 0]),
            entry(1, all),
            entry(0xB, all),
            entry(0x4000_0000, [0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D]),
            entry(0x4000_0001, all),
            entry(0x8000_0001, all),
            entry(0x8000_0008, all),
        ];
        let hyperv: Vec<_> = (0x4000_0000..=0x4000_000A)
            .chain(0x4000_0080..=0x4000_0082)
            .map(|function| match function {
                0x4000_0001 => entry(function, [0x3123_7648, 0, 0, 0]),
                _ => entry(function, all),
            })
            .collect();
        leaves(&processor, &hyperv, vp, vps)
    }

    fn registers(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let mut found = leaves
            .iter()
            .filter(|entry| (entry.function, entry.index) == (function, index));
        let entry = found.next().unwrap();
        assert_eq!(found.next(), None, "leaf {function:#x} twice");
        [entry.eax, entry.ebx, entry.ecx, entry.edx]
    }

    #[test]
    fn the_hypervisor_is_hyper_v_and_nothing_else() {
        let leaves = full(0, 1);
        let [max, vendor @ ..] = registers(&leaves, 0x4000_0000, 0);
        assert_eq!(
            (max, vendor),
            (0x4000_0006, [0x7263_694D, 0x666F_736F, 0x7648_2074])
        );
        assert_eq!(registers(&leaves, 0x4000_0001, 0)[0], 0x3123_7648);
        let beyond =
            |entry: &kvm_cpuid_entry2| (0x4000_0007..0x5000_0000).contains(&entry.function);
        assert!(!leaves.iter().any(beyond));
        assert_ne!(registers(&leaves, 1, 0)[2] & HYPERVISOR, 0);
    }

    #[test]
    fn privileges_are_those_that_a_child_partition_has_here() {
        let leaves = full(0, 1);
        let [low, high, _, features] = registers(&leaves, 0x4000_0003, 0);
        for bit in [0, 1, 2, 3, 4, 5, 6, 7, 9, 11] {
            assert_ne!(low & 1 << bit, 0, "privilege {bit}");
        }
        assert_eq!(low & 1 << 13, 0, "no reenlightenment");
        assert_eq!(high, 0x30, "PostMessages and SignalEvents alone");
        for bit in [8, 10, 19] {
            assert_ne!(features & 1 << bit, 0, "feature {bit}");
        }
        assert_eq!(features & 0b11 << 11 & features & 0b10, 0, "no debugging");
        assert_eq!(registers(&leaves, 0x4000_0005, 0), [1, 0, 0, u32::MAX]);
    }

    #[test]
    fn what_kvm_does_not_support_is_not_promised() {
        let hyperv = [entry(0x4000_0003, [0b100, 0x10, 0, 0])];
        let leaves = leaves(&[], &hyperv, 0, 1);
        assert_eq!(registers(&leaves, 0x4000_0003, 0), [0b100, 0x10, 0, 0]);
    }

    #[test]
    fn processors_are_cores_of_one_package_numbered_by_vp_index() {
        for (vp, vps, bits) in [(0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 2), (64, 65, 7)] {
            let leaves = full(vp, vps);
            assert_eq!(registers(&leaves, 1, 0)[1] >> 16, vp << 8 | vps);
            assert_eq!(registers(&leaves, 0xB, 0), [0, 1, 0x100, vp]);
            assert_eq!(registers(&leaves, 0xB, 1), [bits, vps, 0x201, vp]);
            let [_, _, ecx, _] = registers(&leaves, 0x8000_0008, 0);
            assert_eq!(ecx & 0xF0FF, bits << 12 | (vps - 1));
        }
    }

    #[test]
    fn nested_virtualisation_is_not_offered() {
        let leaves = full(0, 1);
        assert_eq!(registers(&leaves, 1, 0)[2] & VMX, 0);
        assert_eq!(registers(&leaves, 0x8000_0001, 0)[2] & SVM, 0);
    }

    #[test]
    fn a_kvm_without_what_a_vmbus_needs_is_told_by_name() {
        let with = |low| {
            let leaves = [
                entry(0x4000_0001, [0; 4]),
                entry(0x4000_0003, [low, 0, 0, 0]),
            ];
            check(&leaves)
        };
        assert_eq!(check(&[]), Err("the Hyper-V interface"));
        assert_eq!(with(0b110_0000), Err("Hyper-V's SynIC"));
        assert_eq!(with(0b100_0100), Err("Hyper-V's hypercalls"));
        assert_eq!(with(0b010_0100), Err("Hyper-V's VP index"));
        assert_eq!(with(0b110_0100), Ok(()));
    }
}
