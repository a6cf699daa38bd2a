//! Software that the test machine is made of: QEMU with its firmware and
//! libraries, and a Linux kernel with modules; and the tools of the Linux guest that
//! judges our host.
//!
//! What the system has and fits is used. Otherwise packages are fetched by name
//! through apt and unpacked below `target/enlit/packages`, each set in a
//! directory of its own that appears in one piece (unpacked beside it, then
//! renamed), so its being there is all there is to check at the next start. One
//! at a time fetches, of all threads and programs. To fetch anew, remove the directory.

mod apt;
mod problem;
mod qemu;
mod sources;
mod tree;

use std::{
    env,
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use self::apt::Apt;
pub use self::qemu::DiskTools;
pub use self::{apt::exists, problem::Problem, qemu::Qemu, tree::Tree};
use crate::{keep::key, progress};

/// Oldest QEMU that serves: the first with `hv-balloon`.
const QEMU_LEAST: (u32, u32) = (8, 2);

/// Kernel packages, by distribution: the first one that the sources have.
const LINUX_PACKAGES: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-virtual"];

/// Oldest kernel that serves in the test machine.
const LINUX_LEAST: (u32, u32) = (6, 8);

/// Packages of the Linux guest's tools.
const TOOLS: [&str; 8] = [
    "busybox-static",
    "e2fsprogs",
    "ethtool",
    "fdisk",
    "hyperv-daemons",
    "sg3-utils",
    "socat",
    "xxhash",
];

/// Where packages are kept, and the one apt that fetches them.
#[derive(Debug)]
pub struct Packages {
    directory: PathBuf,
    apt: Option<Apt>,
}

impl Packages {
    /// The store below `store`; nothing is fetched yet.
    ///
    /// # Errors
    /// On a system where VMs cannot be run at all.
    pub fn new(store: &Path) -> Result<Self, Problem> {
        if env::consts::OS != "linux" {
            return Err(Problem::System(env::consts::OS));
        }
        if env::consts::ARCH != "x86_64" {
            return Err(Problem::Architecture(env::consts::ARCH));
        }
        Ok(Self {
            directory: store.join("packages"),
            apt: None,
        })
    }

    /// A QEMU that fits: the system's or a fetched one.
    pub fn qemu(&mut self) -> Result<Qemu, Problem> {
        if let Some(qemu) = Qemu::of_system(QEMU_LEAST) {
            return Ok(qemu);
        }
        let tree = self.qemu_tree()?;
        Qemu::of_tree(&tree).map_err(|file| Problem::Incomplete {
            package: "qemu-system-x86",
            file,
            store: self.directory.clone(),
        })
    }

    /// The firmware that starts EFI files (an OVMF image without stored
    /// variables).
    pub fn ovmf(&mut self) -> Result<PathBuf, Problem> {
        const PLACES: [&str; 3] = [
            "usr/share/ovmf/OVMF.fd",
            "usr/share/qemu/OVMF.fd",
            "usr/share/OVMF/OVMF.fd",
        ];
        let find = |root: &Path| {
            PLACES
                .iter()
                .map(|place| root.join(place))
                .find(|path| path.is_file())
        };
        if let Some(path) = find(Path::new("/")) {
            return Ok(path);
        }
        let tree = self.set("ovmf", |apt, into| {
            apt.download(&["ovmf".to_owned()], None, into)
        })?;
        find(&tree).ok_or_else(|| Problem::Incomplete {
            package: "ovmf",
            file: "OVMF.fd".into(),
            store: self.directory.clone(),
        })
    }

    /// passt: a user's network for a guest, without privileges.
    pub fn passt(&mut self) -> Result<PathBuf, Problem> {
        if let Some(program) = apt::find("passt") {
            return Ok(program);
        }
        let tree = self.set("passt", |apt, into| {
            apt.download(&["passt".to_owned()], None, into)
        })?;
        let program = tree.join("usr/bin/passt");
        if program.is_file() {
            return Ok(program);
        }
        Err(Problem::Incomplete {
            package: "passt",
            file: "usr/bin/passt".into(),
            store: self.directory.clone(),
        })
    }

    /// A tree with a Linux kernel in `boot` and its modules in `lib/modules` or
    /// `usr/lib/modules`.
    pub fn linux(&mut self) -> Result<PathBuf, Problem> {
        self.set("linux", |apt, into| {
            let mut problem = Problem::NoAptForLinux;
            for package in LINUX_PACKAGES {
                match apt.find(package, LINUX_LEAST) {
                    Ok(found) => {
                        let release = found.release.as_deref();
                        let mut names = apt.closure_names(package, release)?;
                        names.retain(|name| {
                            (name.starts_with("linux-image-") && name != package)
                                || name.starts_with("linux-modules-")
                        });
                        return apt.download(&names, release, into);
                    }
                    Err(error) => problem = error,
                }
            }
            Err(problem)
        })
        .map_err(|problem| match problem {
            Problem::NoApt => Problem::NoAptForLinux,
            other => other,
        })
    }

    /// QEMU's programs for disk images: the system's or fetched ones. Before 8.0 they damaged VHDX files when they wrote to them.
    pub fn disk_tools(&mut self) -> Result<DiskTools, Problem> {
        const LEAST: (u32, u32) = (8, 0);
        if let Some(tools) = DiskTools::of_system(LEAST) {
            return Ok(tools);
        }
        let tree = self.set("qemu-utils", |apt, _| {
            let found = apt.find("qemu-utils", LEAST)?;
            apt.download_closure(&["qemu-utils"], found.release.as_deref())
        })?;
        DiskTools::of_tree(&tree).map_err(|file| Problem::Incomplete {
            package: "qemu-utils",
            file,
            store: self.directory.clone(),
        })
    }

    /// The tools of the Linux guest, with their libraries.
    pub fn tools(&mut self) -> Result<Tree, Problem> {
        // Another list is another set.
        let name = format!("tools-{}", key(&[TOOLS.join(" ").as_bytes()]));
        self.set(&name, |apt, into| {
            // What else these packages want is for installing them.
            let is_library = |name: &str| name.starts_with("lib") && !name.contains("perl");
            let mut names = Vec::new();
            for package in TOOLS {
                names.extend(apt.closure_names(package, None)?);
            }
            names.retain(|name| TOOLS.contains(&name.as_str()) || is_library(name));
            names.sort();
            names.dedup();
            apt.download(&names, None, into)
        })
        .map(Tree::new)
        .map_err(|problem| match problem {
            Problem::NoApt => Problem::NoAptForLinux,
            other => other,
        })
    }

    fn qemu_tree(&mut self) -> Result<PathBuf, Problem> {
        self.set("qemu", |apt, _| {
            let found = apt.find("qemu-system-x86", QEMU_LEAST)?;
            apt.download_closure(&["qemu-system-x86"], found.release.as_deref())
        })
    }

    /// The directory of a package set; fetches and unpacks it if it is not there.
    fn set(
        &mut self,
        name: &str,
        fetch: impl FnOnce(&mut Apt, &Path) -> Result<Vec<PathBuf>, Problem>,
    ) -> Result<PathBuf, Problem> {
        made(&self.directory, name, || {
            let apt = match &mut self.apt {
                Some(apt) => apt,
                none => {
                    let _step = progress::step("reading the package lists");
                    none.insert(Apt::new(&self.directory.join("apt"))?)
                }
            };
            let scratch = |what: &str| {
                tempfile::Builder::new()
                    .prefix(&format!("{name}-{what}-"))
                    .tempdir_in(&self.directory)
                    .map_err(Problem::file(&self.directory))
            };
            let download = scratch("download")?;
            let unpacked = scratch("unpacked")?;
            let debs = {
                let _step = progress::step(&format!("fetching the packages of {name}"));
                fetch(apt, download.path())?
            };
            let step = progress::step(&format!("unpacking {} packages of {name}", debs.len()));
            for deb in &debs {
                if let Some(name) = deb.file_name() {
                    step.detail(&name.to_string_lossy());
                }
                apt::unpack(deb, unpacked.path())?;
            }
            apt.clean()?;
            Ok(unpacked)
        })
    }
}

/// A directory of the store; `make` makes what will become it if it is not there. Of all threads and programs one at a time
/// makes something.
fn made(
    store: &Path,
    name: &str,
    make: impl FnOnce() -> Result<TempDir, Problem>,
) -> Result<PathBuf, Problem> {
    let tree = store.join(name);
    if tree.is_dir() {
        return Ok(tree);
    }
    fs::create_dir_all(store).map_err(Problem::file(store))?;
    let _turn = turn(store)?;
    // Another may have made it meanwhile.
    if !tree.is_dir() {
        // The scratch directory is private; the tree is for everybody.
        fs::rename(make()?.path(), &tree).map_err(Problem::file(&tree))?;
    }
    Ok(tree)
}

/// Waits until nobody else makes something in the store. Nobody else does while the file is open.
fn turn(store: &Path) -> Result<File, Problem> {
    let path = store.join("lock");
    let file = File::create(&path).map_err(Problem::file(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let _step = progress::step("waiting for another that fetches packages");
            file.lock().map_err(Problem::file(&path))?;
        }
        Err(TryLockError::Error(error)) => return Err(Problem::file(&path)(error)),
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Barrier, Mutex},
        thread,
    };

    use super::*;

    #[test]
    fn one_at_a_time_fetches_and_the_others_take_what_it_fetched() {
        let store = TempDir::new().unwrap();
        let (start, fetches) = (Barrier::new(4), Mutex::new(0));
        let make = || {
            let mut fetches = fetches.try_lock().expect("one at a time");
            *fetches += 1;
            let made = TempDir::new_in(store.path()).unwrap();
            fs::write(made.path().join("file"), "content").unwrap();
            // Time for the others to do the same.
            thread::yield_now();
            Ok(made)
        };
        let fetch = || {
            start.wait();
            let tree = made(store.path(), "set", make).unwrap();
            assert!(tree.join("file").is_file());
        };
        thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(fetch))));
        assert_eq!(*fetches.lock().unwrap(), 1);
    }
}
