//! The Linux referee: brings up the Hyper-V drivers, says when the balloon is
//! bound, and stays. The benchmarks find that line in the trace of the console's
//! port.

use std::{fs, io, os::fd::OwnedFd, thread};

use rustix::net::{
    AddressFamily, RecvFlags, SocketType, bind,
    netlink::{KOBJECT_UEVENT, SocketAddrNetlink},
    recv, socket,
};

use crate::init::{load_modules, mount_all};

/// A driver's bound devices appear here as links.
const DRIVER: &str = "/sys/bus/vmbus/drivers/hv_balloon";

pub(crate) fn role() -> io::Result<()> {
    mount_all(&[("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")])?;
    // Devices are bound by a kernel thread of the bus, which is announced.
    let changes = device_changes()?;
    load_modules()?;
    let bound = loop {
        let bound = bound_devices()?;
        if !bound.is_empty() {
            break bound;
        }
        let mut announcement = [0; 4096];
        recv(&changes, &mut announcement, RecvFlags::empty())?;
    };
    println!("referee: hv_balloon has bound {}", bound.join(" "));
    loop {
        thread::park();
    }
}

/// A socket with the kernel's announcements of device changes (netlink, group 1
/// of kobject uevents).
fn device_changes() -> io::Result<OwnedFd> {
    let changes = socket(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        Some(KOBJECT_UEVENT),
    )?;
    bind(&changes, &SocketAddrNetlink::new(0, 1))?;
    Ok(changes)
}

fn bound_devices() -> io::Result<Vec<String>> {
    let mut devices = Vec::new();
    let entries = fs::read_dir(DRIVER)
        .map_err(|error| io::Error::other(format!("cannot read {DRIVER}: {error}")))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_symlink() && name.contains('-') {
            devices.push(name);
        }
    }
    Ok(devices)
}
