//! What can stand in the way of getting a package, each in one sentence that
//! says what to do.

use std::{io, path::PathBuf};

/// Why a package cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// Not a Linux system.
    #[error(
        "VMs are run on Linux only, and this is {0}: use a Linux computer or a Linux VM for `run`, `test` and `bench` (`build` and `image` work here)"
    )]
    System(&'static str),
    /// Not an x86-64 processor.
    #[error(
        "the test machine needs an x86_64 computer, and this is {0}: run this command on one (`build` and `image` work here)"
    )]
    Architecture(&'static str),
    /// No apt on this system.
    #[error(
        "there is no QEMU 8.2 or newer with `vmbus-bridge` and `hv-balloon` here, and no `apt-get` to fetch one: install qemu-system-x86_64 with this system's package manager and start again"
    )]
    NoApt,
    /// What the nested machine is made of comes from packages only.
    #[error(
        "the nested test machine is built from Debian or Ubuntu packages, and there is no `apt-get` here: use a computer whose /dev/kvm offers Hyper-V, or a Debian or Ubuntu system"
    )]
    NoAptForLinux,
    /// The package sources cannot be reached.
    #[error(
        "the package sources cannot be reached ({0}): check the network connection and apt's proxy settings, then start again"
    )]
    Network(String),
    /// No room.
    #[error("the disk that holds {} is full: free about 1 GiB there and start again", .0.display())]
    DiskFull(PathBuf),
    /// The configured sources have no entry for this release.
    #[error(
        "apt's configuration names no package source for {0}: add this system's usual entries to /etc/apt/sources.list and start again"
    )]
    NoSource(String),
    /// The sources have no such package, or only too old ones.
    #[error(
        "this system's package sources have no {package} {wanted} (newest: {newest}): use Debian 12 or newer, or Ubuntu 24.04 or newer"
    )]
    TooOld {
        /// Package name.
        package: String,
        /// What is wanted, in words.
        wanted: String,
        /// Newest version found, or "none".
        newest: String,
    },
    /// A package lacks a file that every version of it should have.
    #[error("the package {package} holds no {file}: remove {} and start again", .store.display())]
    Incomplete {
        /// Package set.
        package: &'static str,
        /// Missing file.
        file: String,
        /// Where packages are kept.
        store: PathBuf,
    },
    /// apt or dpkg-deb failed in a way not foreseen above.
    #[error("`{command}` failed: {message}")]
    Tool {
        /// The command.
        command: String,
        /// Last words of its error output.
        message: String,
    },
    /// The file system refused.
    #[error("cannot use {}: {source}", .path.display())]
    File {
        /// The path in question.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl Problem {
    /// An error of the file system at `path`.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            let path = path.into();
            if source.kind() == io::ErrorKind::StorageFull {
                Self::DiskFull(path)
            } else {
                Self::File { path, source }
            }
        }
    }

    /// Reads the error output of apt or dpkg-deb. `directory` is where it wrote.
    pub fn from_tool(command: &str, stderr: &str, directory: &std::path::Path) -> Self {
        const FULL: [&str; 3] = [
            "No space left on device",
            "enough free space",
            "Disk quota exceeded",
        ];
        const NETWORK: [&str; 8] = [
            "Temporary failure resolving",
            "Could not resolve",
            "Could not connect",
            "Unable to connect",
            "Connection failed",
            "Connection timed out",
            "Network is unreachable",
            "Failed to fetch",
        ];
        let line_with = |words: &[&str]| {
            stderr
                .lines()
                .find(|line| words.iter().any(|word| line.contains(word)))
                .map(|line| tidy(line).to_owned())
        };
        if line_with(&FULL).is_some() {
            return Self::DiskFull(directory.to_owned());
        }
        if let Some(line) = line_with(&NETWORK) {
            return Self::Network(line);
        }
        let message = stderr.lines().map(tidy).rfind(|line| !line.is_empty());
        Self::Tool {
            command: command.to_owned(),
            message: message.unwrap_or("it gave no reason").to_owned(),
        }
    }
}

/// apt's line without its `E: ` or `W: `.
fn tidy(line: &str) -> &str {
    let line = line.trim();
    line.strip_prefix("E: ")
        .or_else(|| line.strip_prefix("W: "))
        .unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(stderr: &str) -> Problem {
        Problem::from_tool("apt-get update", stderr, Path::new("/there"))
    }

    #[test]
    fn a_missing_network_is_told_from_other_failures() {
        let problem = read(
            "W: Failed to fetch x  Temporary failure resolving 'y'\nE: Some index files failed\n",
        );
        assert!(matches!(problem, Problem::Network(_)), "{problem}");
        assert!(problem.to_string().contains("check the network"));
    }

    #[test]
    fn a_full_disk_wins_over_the_failed_download_that_it_causes() {
        let problem = read("E: Failed to fetch x  write (28: No space left on device)\n");
        assert!(matches!(problem, Problem::DiskFull(_)), "{problem}");
        let problem = read("E: You don't have enough free space in /there/.\n");
        assert!(matches!(problem, Problem::DiskFull(_)), "{problem}");
        let error = io::Error::from(io::ErrorKind::StorageFull);
        assert!(matches!(
            Problem::file("/there")(error),
            Problem::DiskFull(_)
        ));
    }

    #[test]
    fn anything_else_ends_with_the_tools_last_words() {
        let problem = read("N: note\nE: Broken packages\n\n");
        assert_eq!(
            problem.to_string(),
            "`apt-get update` failed: Broken packages"
        );
        assert!(read("").to_string().contains("no reason"));
    }
}
