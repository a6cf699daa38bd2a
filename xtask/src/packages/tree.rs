//! Programs of an unpacked tree of packages, and the shared libraries that they need.

use std::{
    io,
    path::{Path, PathBuf},
    process::Command,
};

/// The dynamic loader of an unpacked tree. Its usual path is an absolute link
/// that leads out of the tree.
const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";

/// Library directories of an unpacked tree.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

/// Where a distribution keeps programs.
const PROGRAMS: [&str; 4] = ["bin", "sbin", "usr/bin", "usr/sbin"];

/// An unpacked tree of packages.
#[derive(Debug, Clone)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The tree below `root`.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Its top directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The dynamic loader.
    pub fn loader(&self) -> PathBuf {
        self.root.join(LOADER)
    }

    /// The loader's options that make it look into this tree.
    pub fn loader_options(&self) -> [String; 2] {
        let places: Vec<_> = LIBRARIES
            .iter()
            .map(|directory| self.root.join(directory).display().to_string())
            .collect();
        ["--library-path".into(), places.join(":")]
    }

    /// A program by its name.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        PROGRAMS
            .iter()
            .map(|directory| self.root.join(directory).join(name))
            .find(|path| path.is_file())
    }

    /// The shared libraries that a program of the tree needs, the loader left out.
    pub fn libraries(&self, program: &Path) -> io::Result<Vec<PathBuf>> {
        libraries(&self.loader(), &self.loader_options(), program)
    }
}

/// The shared libraries that a program needs, by the word of the loader that starts it with
/// these options. None for a program that is linked statically.
///
/// # Errors
/// When the loader does not find one of them.
pub fn libraries(loader: &Path, options: &[String], program: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new(loader)
        .args(options)
        .arg("--list")
        .arg(program)
        .output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    if complaint.contains("error while loading shared libraries") {
        return Err(io::Error::other(complaint.trim().to_owned()));
    }
    Ok(listed(&String::from_utf8_lossy(&output.stdout)))
}

/// Files in the loader's list, the loader itself left out.
fn listed(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| line.split_once(" => ")?.1.split_whitespace().next())
        .filter(|path| path.starts_with('/') && !path.contains("/ld-linux"))
        .map(PathBuf::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_is_read() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibz.so.1 => /l/libz.so.1 (0x7f)\n\tlibno.so => not found\n\t/lib64/ld-linux-x86-64.so.2 => /l/ld-linux-x86-64.so.2 (0x7f)\n";
        assert_eq!(listed(text), [PathBuf::from("/l/libz.so.1")]);
    }

    #[test]
    fn a_program_is_found_where_distributions_keep_them() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("usr/sbin")).unwrap();
        std::fs::write(root.path().join("usr/sbin/tool"), "").unwrap();
        let tree = Tree::new(root.path().to_owned());
        assert!(tree.program("tool").is_some());
        assert!(tree.program("other").is_none());
    }
}
