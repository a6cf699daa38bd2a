//! Makes a partition: asks KVM for what it needs, in the order in which KVM takes it.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_IRQ_ROUTING_HV_SINT, KVM_MSR_EXIT_REASON_FILTER, KvmIrqRouting, Msrs, kvm_cpuid_entry2,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_irq_routing_hv_sint, kvm_msr_entry,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use vmbus::ids::{PAGE_SIZE, PageNumber};
use vmbus_host::memory::GuestMemory;

use super::gate::Gate;
use super::synic::SINTS;
use super::vp::Vp;
use super::{Owner, Settings, Shared, cpuid, crash, lock};
use crate::platform::board::Board;
use crate::platform::io_apic::INPUTS;
use crate::platform::layout::{LOW_GAP, Layout};
use crate::{Error, sys};

/// Where KVM on Intel keeps three pages of its own, in the low MMIO gap: for guests in real mode.
const TSS: usize = 0xFFFB_D000;
const IDENTITY_MAP: u64 = 0xFFFB_C000;

/// The SynIC's end-of-message register.
pub const END_OF_MESSAGE: u32 = 0x4000_0084;

/// APIC ids from here on need a guest and a KVM that agree on wider ones.
const MOST_VPS: u32 = 255;

/// See the module's description.
pub fn create(
    settings: &Settings,
    console: Box<dyn Write + Send>,
    owner: Arc<dyn Owner>,
) -> Result<Arc<Shared>, Error> {
    let layout = Layout::new(settings.memory_mib, settings.hot_add_mib)?;
    let kvm = Kvm::new().map_err(|error| Error::NoKvm(error.into()))?;
    check(&kvm)?;
    let most = MOST_VPS.min(u32::try_from(kvm.get_max_vcpus()).unwrap_or(MOST_VPS));
    if !(1..=most).contains(&settings.vps) {
        return Err(Error::Processors {
            wanted: settings.vps,
            most,
        });
    }
    let vm = Arc::new(kvm.create_vm().map_err(failed("make a VM"))?);
    set_up_interrupts(&vm, settings.vps)?;
    filter_msrs(&vm)?;
    let descriptors = create_processors(&kvm, &vm, settings.vps)?;

    let board = Board::new(&vm, settings, console, Arc::clone(&owner));
    let vps: Vec<_> = descriptors
        .iter()
        .zip(0..)
        .map(|(fd, vp)| Vp::new(vp, fd))
        .collect();
    let shared = Arc::new(Shared {
        vm,
        settings: settings.clone(),
        layout,
        memory: GuestMemory::default(),
        runs: Mutex::default(),
        vps,
        gate: Gate::default(),
        board,
        crash: Mutex::new(crash::Registers::default()),
        owner,
        stopped_at: Mutex::new(Some(0)),
    });
    for range in shared.layout.ram() {
        let first = PageNumber(range.start / PAGE_SIZE as u64);
        shared.add_memory(
            first,
            ((range.end - range.start) / PAGE_SIZE as u64) as usize,
        )?;
    }
    for (vp, descriptor) in descriptors.into_iter().enumerate() {
        Vp::start(&shared, vp, descriptor)?;
    }
    Ok(shared)
}

impl Shared {
    /// Gives the guest new memory at `first`.
    pub fn add_memory(&self, first: PageNumber, count: usize) -> Result<(), Error> {
        let mib = (count * PAGE_SIZE) as u64 >> 20;
        let no_room = |error| Error::NoMemory { mib, error };
        let mut runs = lock(&self.runs);
        let pages = sys::mapping::map(first, count).map_err(no_room)?;
        let slot = runs.len() as u32;
        sys::mapping::give_to_guest(&self.vm, slot, &pages).map_err(no_room)?;
        self.memory.add(&pages);
        runs.push(pages);
        Ok(())
    }
}

fn check(kvm: &Kvm) -> Result<(), Error> {
    let has = |number: u32| kvm.check_extension_raw(number.into()) > 0;
    if !has(KVM_CAP_HYPERV_SYNIC2) {
        return Err(Error::Lacks("the Hyper-V SynIC (KVM_CAP_HYPERV_SYNIC2)"));
    }
    for (cap, name) in [
        (
            Cap::SplitIrqchip,
            "the local APIC alone (KVM_CAP_SPLIT_IRQCHIP)",
        ),
        (Cap::X86MsrFilter, "MSR filters (KVM_CAP_X86_MSR_FILTER)"),
        (
            Cap::X86UserSpaceMsr,
            "MSRs in user space (KVM_CAP_X86_USER_SPACE_MSR)",
        ),
    ] {
        if !kvm.check_extension(cap) {
            return Err(Error::Lacks(name));
        }
    }
    Ok(())
}

/// The local APICs, and a way to each SINT.
fn set_up_interrupts(vm: &VmFd, vps: u32) -> Result<(), Error> {
    let split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        args: [INPUTS.into(), 0, 0, 0],
        ..Default::default()
    };
    vm.set_identity_map_address(IDENTITY_MAP)
        .and_then(|()| vm.set_tss_address(TSS))
        .and_then(|()| vm.enable_cap(&split))
        .map_err(failed("make local APICs"))?;
    let routes: Vec<_> = (0..vps)
        .flat_map(|vp| (0..SINTS).map(move |sint| (vp, sint)))
        .map(|(vp, sint)| {
            let mut route = kvm_irq_routing_entry {
                gsi: synthetic_interrupt(vp, sint),
                type_: KVM_IRQ_ROUTING_HV_SINT,
                ..Default::default()
            };
            route.u.hv_sint = kvm_irq_routing_hv_sint {
                vcpu: vp,
                sint: sint.into(),
            };
            route
        })
        .collect();
    let routes = KvmIrqRouting::from_entries(&routes)
        .map_err(|_| failed("route interrupts")(kvm_ioctls::Error::new(libc::E2BIG)))?;
    vm.set_gsi_routing(&routes)
        .map_err(failed("route interrupts"))
}

/// The number under which KVM is asked to raise a SINT of a VP.
pub fn synthetic_interrupt(vp: u32, sint: u8) -> u32 {
    u32::from(INPUTS) + vp * u32::from(SINTS) + u32::from(sint)
}

/// Has KVM leave the crash MSRs to us, and tell us of the ends of messages.
fn filter_msrs(vm: &VmFd) -> Result<(), Error> {
    let user_space = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [KVM_MSR_EXIT_REASON_FILTER.into(), 0, 0, 0],
        ..Default::default()
    };
    let range = |flags, base, msr_count| MsrFilterRange {
        flags,
        base,
        msr_count,
        // Bits that are clear are those that KVM leaves alone.
        bitmap: &[0],
    };
    let both = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
    let crash = range(both, *crash::MSRS.start(), crash::MSRS.count() as u32);
    let message = range(MsrFilterRangeFlags::WRITE, END_OF_MESSAGE, 1);
    vm.enable_cap(&user_space)
        .and_then(|()| vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[message, crash]))
        .map_err(failed("filter MSRs"))
}

fn create_processors(kvm: &Kvm, vm: &VmFd, vps: u32) -> Result<Vec<VcpuFd>, Error> {
    let processor = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("tell what the processor is"))?;
    let mut all = Vec::new();
    for vp in 0..vps {
        let fd = vm
            .create_vcpu(vp.into())
            .map_err(failed("make a virtual processor"))?;
        let synic = kvm_enable_cap {
            cap: KVM_CAP_HYPERV_SYNIC2,
            ..Default::default()
        };
        fd.enable_cap(&synic).map_err(failed("enable the SynIC"))?;
        let hyperv = sys::kvm::supported_hyperv_cpuid(&fd).map_err(|error| Error::Kvm {
            what: "tell what it has of Hyper-V",
            error,
        })?;
        cpuid::check(hyperv.as_slice()).map_err(Error::Lacks)?;
        let leaves = cpuid::leaves(processor.as_slice(), hyperv.as_slice(), vp, vps);
        set_cpuid(&fd, &leaves)?;
        set_memory_types(&fd, cpuid::address_bits(&leaves))?;
        all.push(fd);
    }
    Ok(all)
}

fn set_cpuid(fd: &VcpuFd, leaves: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let leaves = kvm_bindings::CpuId::from_entries(leaves)
        .map_err(|_| failed("set CPUID")(kvm_ioctls::Error::new(libc::E2BIG)))?;
    fd.set_cpuid2(&leaves).map_err(failed("set CPUID"))
}

/// The MTRRs as firmware leaves them: memory is write-back, the low MMIO gap and the legacy hole are not (spec boot.md A4).
fn set_memory_types(fd: &VcpuFd, address_bits: u32) -> Result<(), Error> {
    const WRITE_BACK: u64 = 6;
    /// The mask of a variable range is valid.
    const VALID: u64 = 1 << 11;
    let addresses = (1_u64 << address_bits) - 1;
    let mut msrs = Vec::new();
    let mut set = |index: u32, data: u64| {
        msrs.push(kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
    };
    let mask = |size: u64| addresses & !(size - 1) | VALID;
    // Default: uncached; fixed and variable ranges are on.
    set(0x2FF, 0xC00);
    // 0 to 512 KiB, to 640 KiB.
    set(0x250, 0x0606_0606_0606_0606);
    set(0x258, 0x0606_0606_0606_0606);
    let low_gap = LOW_GAP.end - LOW_GAP.start;
    // Where ranges overlap, uncached wins.
    let mut ranges = vec![(0, LOW_GAP.end, WRITE_BACK), (LOW_GAP.start, low_gap, 0)];
    // From 4 GiB on each range is as large as all before it, to 256 GiB.
    ranges.extend((32..address_bits.min(38)).map(|bit| (1 << bit, 1 << bit, WRITE_BACK)));
    for (index, (base, size, kind)) in (0x200..).step_by(2).zip(ranges) {
        set(index, base | kind);
        set(index + 1, mask(size));
    }
    let count = msrs.len();
    let msrs = Msrs::from_entries(&msrs)
        .map_err(|_| failed("set MTRRs")(kvm_ioctls::Error::new(libc::E2BIG)))?;
    match fd.set_msrs(&msrs).map_err(failed("set MTRRs"))? {
        done if done == count => Ok(()),
        _ => Err(failed("set MTRRs")(kvm_ioctls::Error::new(libc::EINVAL))),
    }
}

/// Says what KVM could not do.
pub fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| Error::Kvm {
        what,
        error: io::Error::from(error),
    }
}
