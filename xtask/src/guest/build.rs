//! Runs cargo for the targets that guests are made for.

use std::{
    env, fs,
    io::BufReader,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, anyhow, bail};
use cargo_metadata::Message;

use super::strip;
use crate::{packages::Problem, progress, workspace::Workspace};

/// Target of the kernel and all appliances.
const KERNEL_TARGET: &str = "x86_64-unknown-none";

/// Target of the EFI boot loader.
const EFI_TARGET: &str = "x86_64-unknown-uefi";

/// Target of what runs VMs, agent and test machine: linked statically, runs on any Linux.
const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// The cargo profile of [`Profile::Tool`].
const TOOL: &str = "tool";

/// How cargo optimises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As shipped.
    Release,
    /// Checks on, nothing optimised.
    Debug,
    /// Programs of the test machine: fast enough, and built in half the time of what is shipped.
    Tool,
}

/// An appliance that was built.
#[derive(Debug, Clone)]
pub struct Guest {
    /// The ELF with symbols and line numbers.
    pub symbols: PathBuf,
    /// The ELF that is booted, measured and put into the EFI file.
    pub stripped: PathBuf,
}

impl Guest {
    /// The bytes that are booted.
    pub fn read(&self) -> Result<Vec<u8>> {
        fs::read(&self.stripped).with_context(|| format!("cannot read {}", self.stripped.display()))
    }
}

/// Builds the appliance `package` and strips a copy of it.
pub fn build(workspace: &Workspace, package: &str, profile: Profile) -> Result<Guest> {
    let symbols = cargo(workspace, package, KERNEL_TARGET, profile, &[])?;
    let directory = workspace.store().join("guests").join(match profile {
        Profile::Release => "release",
        Profile::Debug => "debug",
        Profile::Tool => TOOL,
    });
    let stripped = directory.join(format!("{package}.elf"));
    let elf = fs::read(&symbols).with_context(|| format!("cannot read {}", symbols.display()))?;
    let bytes = strip(&elf).with_context(|| format!("cannot strip {}", symbols.display()))?;
    write_if_changed(&stripped, &bytes)?;
    Ok(Guest { symbols, stripped })
}

/// Builds the EFI file that carries `guest`; gives its path.
pub fn build_efi(
    workspace: &Workspace,
    package: &str,
    guest: &Guest,
    profile: Profile,
) -> Result<PathBuf> {
    let kernel = [("ENLIT_KERNEL", guest.stripped.as_path())];
    let built = cargo(workspace, "boot", EFI_TARGET, profile, &kernel)?;
    // The loader's own file holds whatever kernel was embedded last.
    let own = guest.stripped.with_file_name(format!("{package}.efi"));
    let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    write_if_changed(&own, &bytes)?;
    Ok(own)
}

/// Builds the nested machine's agent.
pub fn build_agent(workspace: &Workspace) -> Result<PathBuf> {
    cargo(workspace, "agent", STATIC_TARGET, Profile::Tool, &[])
}

/// Builds the test machine.
pub fn build_vmm(workspace: &Workspace) -> Result<PathBuf> {
    cargo(workspace, "vmm", STATIC_TARGET, Profile::Tool, &[])
}

/// Builds one package for one target; gives the path of its executable.
fn cargo(
    workspace: &Workspace,
    package: &str,
    target: &str,
    profile: Profile,
    variables: &[(&str, &Path)],
) -> Result<PathBuf> {
    let _step = progress::step(&format!("building {package}"));
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--quiet", "--package", package, "--target", target])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(workspace.root())
        .env("CARGO_TARGET_DIR", workspace.target())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    match profile {
        Profile::Release => drop(command.arg("--release")),
        Profile::Tool => drop(command.args(["--profile", TOOL])),
        Profile::Debug => {}
    }
    // What ships names no folder of the computer that it was built on.
    let flags: Vec<String> = sources_of_dependencies()
        .iter()
        .map(|folder| format!("--remap-path-prefix={}=deps", folder.display()))
        .collect();
    command.arg("--config");
    command.arg(format!("target.{target}.rustflags={flags:?}"));
    for (name, value) in variables {
        command.env(name, value);
    }
    let mut child = command.spawn().context("cannot start cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut executable = None;
    for message in Message::parse_stream(BufReader::new(output)) {
        if let Message::CompilerArtifact(artifact) = message?
            && (artifact.target.name == package
                || artifact.target.name == format!("enlit-{package}"))
        {
            executable = artifact.executable.or(executable);
        }
    }
    if !child.wait()?.success() {
        bail!("cargo cannot build {package} for {target} (see above)");
    }
    executable
        .map(Into::into)
        .ok_or_else(|| anyhow!("package {package} has no executable: an appliance is a binary"))
}

/// Folders below which cargo has unpacked the dependencies' sources, sorted.
fn sources_of_dependencies() -> Vec<PathBuf> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let entries = home.and_then(|home| fs::read_dir(home.join("registry/src")).ok());
    let mut folders: Vec<PathBuf> = entries
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    folders.sort();
    folders
}

/// Leaves a file that holds the bytes already untouched, so that what depends on
/// it is not built again.
fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let directory = path.parent().context("a file has a directory")?;
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(path, bytes))
        .map_err(Problem::file(path))?;
    Ok(())
}
