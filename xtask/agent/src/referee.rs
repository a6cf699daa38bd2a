//! The Linux referee: brings up the Hyper-V drivers, says when the balloon is
//! bound, and stays.
//!
//! It marks the same points for the benchmarks as our kernel does: a byte on
//! the port that the word `mark=` of the command line names.

use std::{
    fs,
    io::{self, Seek, SeekFrom, Write},
    path::Path,
    thread,
};

use crate::init::{load_modules, mount_all};

/// A driver's bound devices appear here as links.
const DRIVER: &str = "/sys/bus/vmbus/drivers/hv_balloon";

/// Mark "the balloon is open" (the same number as the kernel's).
const MARK_BALLOON_OPEN: u8 = 3;

pub(crate) fn role() -> io::Result<()> {
    mount_all(&[("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")])?;
    load_modules()?;
    // Binding is done within the module's registration, for every device that
    // the bus has found by then; the bus module waits for the host's offers.
    let bound = bound_devices()?;
    if bound.is_empty() {
        return Err(io::Error::other("hv_balloon has bound no device"));
    }
    mark(MARK_BALLOON_OPEN)?;
    println!("referee: hv_balloon has bound {}", bound.join(" "));
    loop {
        thread::park();
    }
}

fn bound_devices() -> io::Result<Vec<String>> {
    let mut devices = Vec::new();
    for entry in fs::read_dir(Path::new(DRIVER))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_symlink() && name.contains('-') {
            devices.push(name);
        }
    }
    Ok(devices)
}

fn mark(byte: u8) -> io::Result<()> {
    let words = fs::read_to_string("/proc/cmdline")?;
    let Some(port) = words
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("mark=0x"))
        .and_then(|hex| u64::from_str_radix(hex, 16).ok())
    else {
        return Ok(());
    };
    let mut ports = fs::OpenOptions::new().write(true).open("/dev/port")?;
    ports.seek(SeekFrom::Start(port))?;
    ports.write_all(&[byte])
}
