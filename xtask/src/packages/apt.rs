//! apt with a state of its own: lists, cache and an empty "installed" record
//! below our store. Nothing of the system is written, no root is needed.
//!
//! With the empty record apt resolves a package's whole closure, down to the C
//! library, so what is unpacked runs whatever the system has installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use super::{
    problem::Problem,
    sources::{self, Source},
};

/// apt, ready to look up and download.
#[derive(Debug)]
pub struct Apt {
    directory: PathBuf,
    sources: Vec<Source>,
    codename: String,
}

/// A package version and the suite it would come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Version as dpkg writes it.
    pub version: String,
    /// Suite to prefer for it and what it needs; `None` for apt's own choice.
    pub release: Option<String>,
}

impl Apt {
    /// Prepares a private apt below `directory` and fetches the package lists.
    pub fn new(directory: &Path) -> Result<Self, Problem> {
        if !exists("apt-get") || !exists("dpkg-deb") {
            return Err(Problem::NoApt);
        }
        let codename = codename().unwrap_or_default();
        let sources = sources::of_release(&system_sources(), &codename);
        if sources.is_empty() {
            return Err(Problem::NoSource(if codename.is_empty() {
                "this release".into()
            } else {
                codename
            }));
        }
        let apt = Self {
            directory: directory.to_owned(),
            sources,
            codename,
        };
        apt.configure()?;
        apt.update()?;
        Ok(apt)
    }

    /// The newest version of `package` that is at least `least`; looks into the
    /// release's backports if the release itself has none.
    pub fn find(&mut self, package: &str, least: (u32, u32)) -> Result<Candidate, Problem> {
        if let Some(version) = self.policy(package, None)?
            && at_least(&version, least)
        {
            return Ok(Candidate {
                version,
                release: None,
            });
        }
        if let Some(source) = sources::backports(&self.sources, &self.codename) {
            self.sources.push(source);
            self.configure()?;
            self.update()?;
        }
        let release = format!("{}-backports", self.codename);
        match self.policy(package, Some(&release))? {
            Some(version) if at_least(&version, least) => Ok(Candidate {
                version,
                release: Some(release),
            }),
            version => Err(Problem::TooOld {
                package: package.to_owned(),
                wanted: format!("{}.{} or newer", least.0, least.1),
                newest: version.unwrap_or_else(|| "none".into()),
            }),
        }
    }

    /// Downloads `packages` and all they need; gives the `.deb` files.
    pub fn download_closure(
        &self,
        packages: &[&str],
        release: Option<&str>,
    ) -> Result<Vec<PathBuf>, Problem> {
        let archives = self.directory.join("cache/archives");
        clear(&archives)?;
        let mut arguments = vec!["install", "--download-only", "--yes", "--quiet"];
        if let Some(release) = release {
            arguments.extend(["--target-release", release]);
        }
        arguments.extend(packages);
        self.run("apt-get", &arguments, &self.directory)?;
        debs(&archives)
    }

    /// The names of `package` and of all it needs.
    pub fn closure_names(
        &self,
        package: &str,
        release: Option<&str>,
    ) -> Result<Vec<String>, Problem> {
        let mut arguments = vec!["install", "--simulate", "--quiet"];
        if let Some(release) = release {
            arguments.extend(["--target-release", release]);
        }
        arguments.push(package);
        let output = self.run("apt-get", &arguments, &self.directory)?;
        Ok(installed_names(&output))
    }

    /// Downloads exactly `packages` into the empty directory `into`.
    pub fn download(
        &self,
        packages: &[String],
        release: Option<&str>,
        into: &Path,
    ) -> Result<Vec<PathBuf>, Problem> {
        let mut arguments = vec!["download", "--quiet"];
        if let Some(release) = release {
            arguments.extend(["--target-release", release]);
        }
        arguments.extend(packages.iter().map(String::as_str));
        self.run("apt-get", &arguments, into)?;
        debs(into)
    }

    /// Removes downloaded archives: what is unpacked is what is used.
    pub fn clean(&self) -> Result<(), Problem> {
        clear(&self.directory.join("cache/archives"))
    }

    fn update(&self) -> Result<(), Problem> {
        self.run("apt-get", &["update", "--quiet"], &self.directory)
            .map(drop)
    }

    fn policy(&self, package: &str, release: Option<&str>) -> Result<Option<String>, Problem> {
        let mut arguments = vec!["policy"];
        if let Some(release) = release {
            arguments.extend(["--target-release", release]);
        }
        arguments.push(package);
        let output = self.run("apt-cache", &arguments, &self.directory)?;
        Ok(candidate(&output))
    }

    /// Writes apt's configuration and source list. Hooks of the system are
    /// cleared: they clean or refresh what is the system's.
    fn configure(&self) -> Result<(), Problem> {
        for sub in ["etc/parts", "state/lists/partial", "cache/archives/partial"] {
            let path = self.directory.join(sub);
            fs::create_dir_all(&path).map_err(Problem::file(path))?;
        }
        let stanzas: Vec<_> = self.sources.iter().map(Source::to_deb822).collect();
        let root = self.directory.display();
        let configuration = format!(
            "#clear APT::Update::Pre-Invoke;\n\
             #clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n\
             #clear DPkg::Pre-Invoke;\n\
             #clear DPkg::Post-Invoke;\n\
             #clear DPkg::Pre-Install-Pkgs;\n\
             #clear Acquire::IndexTargets::deb::DEP-11;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons-small;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons;\n\
             #clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;\n\
             Dir::Etc::sourcelist \"/dev/null\";\n\
             Dir::Etc::sourceparts \"{root}/etc/parts\";\n\
             Dir::Etc::preferences \"/dev/null\";\n\
             Dir::Etc::preferencesparts \"{root}/etc/none\";\n\
             Dir::State \"{root}/state\";\n\
             Dir::State::status \"{root}/state/status\";\n\
             Dir::Cache \"{root}/cache\";\n\
             Dir::Cache::archives \"archives\";\n\
             Dir::Cache::pkgcache \"pkgcache.bin\";\n\
             Dir::Cache::srcpkgcache \"srcpkgcache.bin\";\n\
             APT::Install-Recommends \"false\";\n\
             APT::Keep-Downloaded-Packages \"true\";\n\
             APT::Sandbox::User \"root\";\n\
             Acquire::Languages \"none\";\n\
             Acquire::Retries \"3\";\n"
        );
        for (name, text) in [
            ("etc/parts/release.sources", stanzas.join("\n")),
            ("etc/apt.conf", configuration),
            ("state/status", String::new()),
        ] {
            let path = self.directory.join(name);
            fs::write(&path, text).map_err(Problem::file(path))?;
        }
        Ok(())
    }

    fn run(&self, tool: &str, arguments: &[&str], within: &Path) -> Result<String, Problem> {
        let mut command = Command::new(tool);
        command
            .arg("--config-file")
            .arg(self.directory.join("etc/apt.conf"))
            .args(arguments)
            .current_dir(within)
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        let first = arguments.first().copied().unwrap_or_default();
        let output = finish(&mut command, &format!("{tool} {first}"), &self.directory)?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        // `apt-get update` calls a source that it cannot reach a warning.
        if stderr
            .lines()
            .any(|line| line.starts_with("W: Failed to fetch"))
        {
            return Err(Problem::from_tool(tool, &stderr, &self.directory));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Unpacks a `.deb` into `tree`.
pub fn unpack(deb: &Path, tree: &Path) -> Result<(), Problem> {
    let mut command = Command::new("dpkg-deb");
    command.arg("--extract").arg(deb).arg(tree);
    finish(&mut command, "dpkg-deb --extract", tree).map(drop)
}

fn finish(command: &mut Command, name: &str, directory: &Path) -> Result<Output, Problem> {
    let output = command.output().map_err(|error| Problem::Tool {
        command: name.to_owned(),
        message: error.to_string(),
    })?;
    if output.status.success() {
        Ok(output)
    } else {
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(Problem::from_tool(name, &stderr, directory))
    }
}

/// Whether a program is on the search path.
pub fn exists(program: &str) -> bool {
    find(program).is_some()
}

/// Where the system has a program.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

fn system_sources() -> Vec<Source> {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let mut found = sources::parse_list(&read(Path::new("/etc/apt/sources.list")));
    let mut parts: Vec<_> = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    parts.sort();
    for path in parts {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => found.extend(sources::parse_list(&read(&path))),
            Some("sources") => found.extend(sources::parse_deb822(&read(&path))),
            _ => {}
        }
    }
    found
}

/// The running release's code name, from os-release.
fn codename() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    field(&text, "VERSION_CODENAME")
}

fn field(os_release: &str, name: &str) -> Option<String> {
    os_release
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .map(|value| value.trim_matches('"').to_owned())
        .filter(|value| !value.is_empty())
}

/// The candidate's version in the output of `apt-cache policy`.
fn candidate(policy: &str) -> Option<String> {
    policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "))
        .filter(|version| *version != "(none)")
        .map(str::to_owned)
}

/// Package names in the output of `apt-get --simulate install`.
fn installed_names(output: &str) -> Vec<String> {
    output
        .lines()
        .filter_map(|line| line.strip_prefix("Inst "))
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// Whether a dpkg version's upstream part is `least` or newer.
fn at_least(version: &str, least: (u32, u32)) -> bool {
    let upstream = version.split_once(':').map_or(version, |(_, rest)| rest);
    let mut numbers = upstream
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|digits| digits.parse::<u32>().ok());
    let major = numbers.next().unwrap_or(0);
    let minor = numbers.next().unwrap_or(0);
    (major, minor) >= least
}

fn debs(directory: &Path) -> Result<Vec<PathBuf>, Problem> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(Problem::file(directory))? {
        let path = entry.map_err(Problem::file(directory))?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn clear(directory: &Path) -> Result<(), Problem> {
    for deb in debs(directory)? {
        fs::remove_file(&deb).map_err(Problem::file(deb))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_their_upstream_part() {
        assert!(at_least("1:10.0.2+ds-2+deb13u1~bpo12+1", (8, 2)));
        assert!(at_least("1:8.2.2+ds-0ubuntu1", (8, 2)));
        assert!(at_least("9.0", (8, 2)));
        assert!(!at_least("1:7.2+dfsg-7+deb12u18+b3", (8, 2)));
        assert!(!at_least("1:8.1.5", (8, 2)));
        assert!(!at_least("none", (8, 2)));
    }

    #[test]
    fn the_candidate_is_read_from_the_policy() {
        let policy = "qemu-system-x86:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg\n";
        assert_eq!(candidate(policy).as_deref(), Some("1:7.2+dfsg"));
        assert_eq!(candidate("x:\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }

    #[test]
    fn simulated_installs_name_their_packages() {
        let output = "NOTE: x\nInst gcc-12-base (12.2.0 Debian:12/oldstable [amd64])\nInst libc6 (2.36 [amd64]) []\nConf libc6 (2.36)\n";
        assert_eq!(installed_names(output), ["gcc-12-base", "libc6"]);
    }

    #[test]
    fn os_release_fields_may_be_quoted_or_missing() {
        let text = "ID=debian\nVERSION_CODENAME=\"bookworm\"\n";
        assert_eq!(field(text, "VERSION_CODENAME").as_deref(), Some("bookworm"));
        assert_eq!(field(text, "VERSION"), None);
        assert_eq!(field("VERSION_CODENAME=\n", "VERSION_CODENAME"), None);
    }
}
