//! Lets QEMU's main thread go first, where the agent owns the machine.
//!
//! QEMU's hv-balloon sends a request and then looks at once for an answer; one that the guest
//! gave in between, and whose signal is not handled yet, ends QEMU in an assertion (vmbus.c,
//! gpadl_iter_seek; 10.0.2). On the one processor of the test machine a main thread that the
//! processors' threads cannot interrupt never sees one. The only `unsafe` of the test machine.

#![allow(unsafe_code)]

use std::io;

/// Gives the process's first thread, and none that it makes, a real-time priority.
pub(crate) fn prefer(process: u32) -> io::Result<()> {
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    let priority: libc::c_int = 1;
    // SAFETY: the call reads one `sched_param`, which is an int. (The C library of the test
    // machine has no such function, so this is the system call.)
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            process,
            policy,
            &raw const priority,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
