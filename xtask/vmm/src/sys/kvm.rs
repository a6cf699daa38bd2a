//! KVM calls that kvm-ioctls does not have, and the part of a VP's exit record that it does not decode
//! (Linux, Documentation/virt/kvm/api.rst).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use kvm_bindings::{
    CpuId, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC, KVM_HYPERV_EVENTFD_DEASSIGN, KVMIO,
    kvm_cpuid2, kvm_hyperv_eventfd,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, SignalMaskHeader);
ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);
ioctl_iowr_nr!(KVM_GET_SUPPORTED_HV_CPUID, KVMIO, 0xc1, kvm_cpuid2);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// `struct kvm_signal_mask` up to its array.
#[repr(C)]
struct SignalMaskHeader {
    len: u32,
}

/// The same with the kernel's signal set, which is one word.
#[repr(C, packed)]
struct SignalMask {
    header: SignalMaskHeader,
    set: u64,
}

/// The Hyper-V leaves that this KVM supports for a VP.
pub fn supported_hyperv_cpuid(vp: &VcpuFd) -> io::Result<CpuId> {
    let mut cpuid = CpuId::new(64).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
    // SAFETY: `cpuid` has room for the number of entries that it names, and the kernel writes no more.
    let done = unsafe {
        ioctl_with_mut_ptr(
            vp,
            KVM_GET_SUPPORTED_HV_CPUID(),
            cpuid.as_mut_fam_struct_ptr(),
        )
    };
    check(done)?;
    Ok(cpuid)
}

/// Has the kernel signal `event` whenever the guest signals connection `id` with flag 0; `None` ends that.
pub fn route_signal(vm: &VmFd, id: u32, event: Option<&EventFd>) -> io::Result<()> {
    let route = kvm_hyperv_eventfd {
        conn_id: id,
        fd: event.map_or(-1, AsRawFd::as_raw_fd),
        flags: match event {
            Some(_) => 0,
            None => KVM_HYPERV_EVENTFD_DEASSIGN,
        },
        padding: [0; 3],
    };
    // SAFETY: the kernel reads the structure, and takes its own reference to the descriptor.
    check(unsafe { ioctl_with_ref(vm, KVM_HYPERV_EVENTFD(), &route) })
}

/// While the VP runs, the thread's blocked signals are those of `blocked` (bit n-1 for signal n), and not its own.
pub fn set_signal_mask(vp: &VcpuFd, blocked: u64) -> io::Result<()> {
    let mask = SignalMask {
        header: SignalMaskHeader {
            len: size_of::<u64>() as u32,
        },
        set: blocked,
    };
    // SAFETY: the kernel reads the header and as many bytes after it as that says.
    check(unsafe { ioctl_with_ref(vp, KVM_SET_SIGNAL_MASK(), &mask) })
}

/// The file with the statistics that KVM keeps of a VM or a VP.
pub fn statistics(of: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: makes a descriptor and touches no memory.
    let descriptor = unsafe { ioctl(of, KVM_GET_STATS_FD()) };
    check(descriptor.min(0))?;
    // SAFETY: the kernel has just made it, for us.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// Why a VP stopped in the Hyper-V part of KVM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HyperVExit {
    /// The guest has written a register of its SynIC. The values are those after the write.
    Synic {
        /// SCONTROL.
        control: u64,
        /// SIEFP.
        event_page: u64,
        /// SIMP.
        message_page: u64,
    },
    /// The guest makes a hypercall that KVM leaves to us.
    Hypercall {
        /// The control word.
        input: u64,
        /// RDX and R8: addresses, or the input itself in a fast call.
        parameters: [u64; 2],
    },
    /// Something that this VMM did not ask for.
    Other(u32),
}

/// Reads the exit record. To be called after an exit of kind Hyper-V only; else what it says has no meaning.
pub fn hyperv_exit(vp: &mut VcpuFd) -> HyperVExit {
    // SAFETY: all members of the union are plain numbers, so reading any is defined.
    let exit = unsafe { vp.get_kvm_run().__bindgen_anon_1.hyperv };
    match exit.type_ {
        KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: as above; the type says that it is this member.
            let synic = unsafe { exit.u.synic };
            HyperVExit::Synic {
                control: synic.control,
                event_page: synic.evt_page,
                message_page: synic.msg_page,
            }
        }
        KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: as above.
            let call = unsafe { exit.u.hcall };
            HyperVExit::Hypercall {
                input: call.input,
                parameters: call.params,
            }
        }
        other => HyperVExit::Other(other),
    }
}

/// Answers the hypercall of the last exit. To be called after an exit by hypercall only.
pub fn set_hypercall_result(vp: &mut VcpuFd, result: u64) {
    vp.get_kvm_run().__bindgen_anon_1.hyperv.u.hcall.result = result;
}

/// What KVM says of an internal error: its kind and its data. To be called after an exit by internal error only.
pub fn internal_error(vp: &mut VcpuFd) -> (u32, Vec<u64>) {
    // SAFETY: all members of the union are plain numbers, so reading any is defined.
    let error = unsafe { vp.get_kvm_run().__bindgen_anon_1.internal };
    let data = error.data.into_iter().take(error.ndata as usize);
    (error.suberror, data.collect())
}

fn check(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
