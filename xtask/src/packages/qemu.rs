//! A QEMU on this computer: how to start it, what it is made of.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::tree::{self, Tree};

/// Firmware directories of an unpacked tree.
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

/// A QEMU that has `vmbus-bridge` and `hv-balloon`.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
    /// Loader and its options, when the program comes with its own libraries.
    loader: Vec<String>,
    firmware: Vec<PathBuf>,
}

impl Qemu {
    /// The system's QEMU, if it is at least version `least` and has the devices.
    pub fn of_system(least: (u32, u32)) -> Option<Self> {
        let path = std::env::var_os("PATH")?;
        let program = std::env::split_paths(&path)
            .map(|directory| directory.join("qemu-system-x86_64"))
            .find(|path| path.is_file())?;
        let says = |arguments: &[&str]| {
            let output = Command::new(&program).args(arguments).output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let version = version(&says(&["--version"])?)?;
        let devices = says(&["-device", "help"])?;
        let fits = version >= least
            && ["\"vmbus-bridge\"", "\"hv-balloon\""]
                .iter()
                .all(|device| devices.contains(device));
        fits.then_some(())?;
        let firmware = says(&["-L", "help"])?.lines().map(PathBuf::from).collect();
        Some(Self {
            program,
            loader: Vec::new(),
            firmware,
        })
    }

    /// The QEMU of an unpacked tree. On failure the file that is missing.
    pub fn of_tree(tree: &Path) -> Result<Self, String> {
        let (loader, program) = in_tree(tree, "usr/bin/qemu-system-x86_64")?;
        Ok(Self {
            program,
            loader,
            firmware: FIRMWARE
                .iter()
                .map(|directory| tree.join(directory))
                .collect(),
        })
    }

    /// Program and leading arguments to start it with.
    pub fn command(&self) -> Vec<String> {
        let mut command = self.loader.clone();
        command.push(self.program.display().to_string());
        if !self.loader.is_empty() {
            for directory in &self.firmware {
                command.extend(["-L".into(), directory.display().to_string()]);
            }
        }
        command
    }

    /// The program file.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The dynamic loader and all shared libraries that the program needs.
    pub fn libraries(&self) -> std::io::Result<Vec<PathBuf>> {
        const SYSTEM_LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
        let (loader, options) = match self.loader.split_first() {
            Some((loader, options)) => (loader.as_str(), options),
            None => (SYSTEM_LOADER, &[][..]),
        };
        let mut libraries = vec![PathBuf::from(loader)];
        libraries.extend(tree::libraries(Path::new(loader), options, &self.program)?);
        Ok(libraries)
    }

    /// A firmware file by its name, e.g. `bios-256k.bin`.
    pub fn firmware(&self, name: &str) -> Option<PathBuf> {
        self.firmware
            .iter()
            .map(|directory| directory.join(name))
            .find_map(|path| fs::canonicalize(path).ok())
    }
}

/// A program of an unpacked tree, and the loader with its options that it is started by. On failure the file that is missing.
fn in_tree(tree: &Path, program: &str) -> Result<(Vec<String>, PathBuf), String> {
    let program = tree.join(program);
    let unpacked = Tree::new(tree.to_owned());
    let loader = unpacked.loader();
    for file in [&program, &loader] {
        if !file.is_file() {
            return Err(file.display().to_string());
        }
    }
    let loader = [loader.display().to_string()]
        .into_iter()
        .chain(unpacked.loader_options())
        .collect();
    Ok((loader, program))
}

/// QEMU's programs for disk images, each as program and leading arguments.
#[derive(Debug, Clone)]
pub struct DiskTools {
    /// `qemu-img`.
    pub img: Vec<String>,
    /// `qemu-io`.
    #[cfg(test)]
    pub io: Vec<String>,
}

impl DiskTools {
    /// The system's, if they are at least version `least`.
    pub fn of_system(least: (u32, u32)) -> Option<Self> {
        let fits = |program: &str| {
            let output = Command::new(program).arg("--version").output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            (version(&text)? >= least).then(|| vec![program.to_owned()])
        };
        Some(Self {
            img: fits("qemu-img")?,
            #[cfg(test)]
            io: fits("qemu-io")?,
        })
    }

    /// Those of an unpacked tree. On failure the file that is missing.
    pub fn of_tree(tree: &Path) -> Result<Self, String> {
        let command = |program: &str| {
            let (mut command, program) = in_tree(tree, program)?;
            command.push(program.display().to_string());
            Ok::<_, String>(command)
        };
        Ok(Self {
            img: command("usr/bin/qemu-img")?,
            #[cfg(test)]
            io: command("usr/bin/qemu-io")?,
        })
    }
}

/// Version in the first line of `--version`.
fn version(text: &str) -> Option<(u32, u32)> {
    let number = text.split_once("version ")?.1;
    let mut parts = number.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_the_first_line() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(version(text), Some((10, 0)));
        assert_eq!(version("no such thing"), None);
    }

    #[test]
    fn an_incomplete_tree_names_what_it_lacks() {
        let tree = tempfile::tempdir().unwrap();
        let missing = Qemu::of_tree(tree.path()).unwrap_err();
        assert!(missing.ends_with("usr/bin/qemu-system-x86_64"), "{missing}");
    }
}
