//! What all roles need as a system's first process: file systems, modules,
//! power-off; and the agent's role itself.

use std::{env, fs, io, path::Path, process};

use agent::server;
use rustix::{
    mount::{MountFlags, mount},
    system::{RebootCommand, init_module, reboot},
};

use crate::{fetch, load, referee, shell};

/// Name of the virtio port that leads to `xtask`.
const PORT: &str = "enlit";

/// Where uploaded files go.
const FILES: &str = "/files";

/// Modules to load, one file each, in the order of their names.
const MODULES: &str = "/modules";

pub(crate) fn main() {
    if process::id() != 1 {
        let words: Vec<_> = env::args().collect();
        let result = match words.get(1).map(String::as_str) {
            Some("fetch") => fetch::main(words.get(2..).unwrap_or_default()),
            Some("load") => load::main(words.get(2..).unwrap_or_default()),
            _ => Err(io::Error::other(
                "the agent is the first process of a Linux VM and runs nowhere else",
            )),
        };
        if let Err(error) = result {
            eprintln!("error: {error}");
            process::exit(1);
        }
        return;
    }
    // Words that the kernel does not know come before it.
    let role = env::args().next_back();
    let result = match role.as_deref() {
        Some("agent") => agent_role(),
        Some("referee") => referee::role(),
        Some("shell") => shell::role(),
        other => Err(io::Error::other(format!("no such role: {other:?}"))),
    };
    if let Err(error) = result {
        eprintln!("error: {error}");
    }
    power_off();
}

fn agent_role() -> io::Result<()> {
    mount_all(&[
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
    ])?;
    load_modules()?;
    // A guest's memory is mapped whole and touched in part: a 4 GiB guest fits
    // in a smaller machine.
    fs::write("/proc/sys/vm/overcommit_memory", "1")?;
    fs::create_dir_all(FILES)?;
    let port = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(find_port()?)?;
    server::serve(port.try_clone()?, port, Path::new(FILES))?;
    Ok(())
}

/// Mounts each (type, directory), making the directory if need be.
pub(crate) fn mount_all(list: &[(&str, &str)]) -> io::Result<()> {
    for (kind, directory) in list {
        fs::create_dir_all(directory)?;
        mount(*kind, *directory, *kind, MountFlags::empty(), None).map_err(|error| {
            io::Error::other(format!("cannot mount {kind} on {directory}: {error}"))
        })?;
    }
    Ok(())
}

/// Loads every module below [`MODULES`]. The first that does not load is the error; those
/// behind it are tried all the same.
pub(crate) fn load_modules() -> io::Result<()> {
    let mut files = fs::read_dir(MODULES)?
        .map(|entry| Ok(entry?.path()))
        .collect::<io::Result<Vec<_>>>()?;
    files.sort();
    let mut result = Ok(());
    for file in files {
        let loaded = init_module(&fs::read(&file)?, c"")
            .map_err(|error| io::Error::other(format!("cannot load {}: {error}", file.display())));
        result = result.and(loaded);
    }
    result
}

/// The device node of the port named [`PORT`].
fn find_port() -> io::Result<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name"));
        if name.is_ok_and(|name| name.trim_end() == PORT) {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    Err(io::Error::other(format!("no virtio port is named {PORT}")))
}

fn power_off() {
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("error: cannot power off: {error}");
    }
}
