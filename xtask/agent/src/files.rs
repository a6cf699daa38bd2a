//! The user's files in the agent's own machine: a FUSE file system whose requests
//! travel to the client, which answers them.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::fd::AsRawFd,
};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, unmount},
};

use crate::{
    messages::{Cut, Whole},
    streams::End,
};

/// Mounts a new file system and gives its requests and answers.
pub(crate) fn mount(directory: &str) -> io::Result<End> {
    // What is mounted on a user's computer is not ours to decide.
    if std::process::id() != 1 {
        return Err(io::Error::other("the files are at hand without it"));
    }
    fs::create_dir_all(directory)?;
    let device: File = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other\0",
        device.as_raw_fd()
    );
    let options =
        std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).map_err(io::Error::other)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("enlit", directory, "fuse", flags, Some(options))?;
    let directory = directory.to_owned();
    Ok(End {
        reader: Box::new(Whole::new(Device(device.try_clone()?))),
        writer: Box::new(Cut::new(Device(device))),
        finish: Box::new(|| ()),
        // Programs that wait for a file get an error. It fails when it was unmounted already.
        abort: Box::new(move || {
            let _ = unmount(
                directory.as_str(),
                UnmountFlags::FORCE | UnmountFlags::DETACH,
            );
        }),
    })
}

/// The kernel's device of the file system: one request a read, one answer a write.
struct Device(File);

impl Read for Device {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.0.read(to) {
                // The one who asked has gone; the next request, please.
                Err(error) if is(&error, Errno::NOENT) => {}
                // Unmounted.
                Err(error) if is(&error, Errno::NODEV) => return Ok(0),
                read => return read,
            }
        }
    }
}

impl Write for Device {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self.0.write(from) {
            // The one who asked has gone.
            Err(error) if is(&error, Errno::NOENT) => Ok(from.len()),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn is(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}
