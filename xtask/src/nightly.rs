//! The pinned nightly toolchain, for what stable Rust lacks: sanitizers and Miri. Nothing that ships is built with it.

use std::{
    fs,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{progress, workspace::Workspace};

/// The one place that names the toolchain; `cargo fuzz` reads it, too.
const PIN: &str = "vmbus/fuzz/rust-toolchain.toml";

/// What that toolchain says of itself.
const RELEASE: &str = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)";

/// Components beside the compiler: Miri, and the library's source, of which Miri builds its own.
const COMPONENTS: [&str; 2] = ["miri", "rust-src"];

/// An installed nightly.
#[derive(Debug, Clone)]
pub struct Nightly {
    toolchain: String,
}

impl Nightly {
    /// The pinned nightly; installs it through rustup when no toolchain of this computer is that one.
    ///
    /// # Errors
    /// Without rustup, or when rustup cannot fetch the toolchain.
    pub fn find(workspace: &Workspace) -> Result<Self> {
        let pin = workspace.root().join(PIN);
        let text =
            fs::read_to_string(&pin).with_context(|| format!("cannot read {}", pin.display()))?;
        let channel = channel(&text).with_context(|| format!("{PIN} names no channel"))?;
        let others = rustup(&["toolchain", "list", "--quiet"])?;
        let others = others.lines().map(str::trim);
        let mut known =
            std::iter::once(channel).chain(others.filter(|it| it.starts_with("nightly")));
        if let Some(found) = known.find(|toolchain| is_complete(toolchain)) {
            return Ok(Self {
                toolchain: found.to_owned(),
            });
        }
        let _step = progress::step(&format!("installing the toolchain {channel}"));
        let mut arguments = vec!["toolchain", "install", channel, "--profile", "minimal"];
        for component in COMPONENTS {
            arguments.extend(["--component", component]);
        }
        rustup(&arguments).with_context(|| {
            format!("fuzzing and Miri need {channel}, and rustup cannot install it")
        })?;
        if !is_complete(channel) {
            bail!("{channel} is not {RELEASE}: {PIN} and xtask/src/nightly.rs disagree");
        }
        Ok(Self {
            toolchain: channel.to_owned(),
        })
    }

    /// Its cargo, at the top of the work tree.
    pub fn cargo(&self, workspace: &Workspace) -> Command {
        let mut command = command(&["run", &self.toolchain, "cargo"]);
        command.current_dir(workspace.root());
        command
    }
}

/// Whether this toolchain is installed, is the one, and has everything.
fn is_complete(toolchain: &str) -> bool {
    let version = rustup(&["run", toolchain, "rustc", "--version"]);
    let components = rustup(&["component", "list", "--installed", "--toolchain", toolchain]);
    version.is_ok_and(|version| version.trim() == RELEASE)
        && components.is_ok_and(|installed| {
            COMPONENTS
                .iter()
                .all(|wanted| installed.lines().any(|line| line.starts_with(wanted)))
        })
}

/// What rustup prints.
fn rustup(arguments: &[&str]) -> Result<String> {
    let output = command(arguments)
        .stdin(Stdio::null())
        .output()
        .context("cannot start rustup (https://rustup.rs)")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("rustup {}: {}", arguments.join(" "), text.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// rustup, without what the toolchain that runs xtask has left in the environment.
fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    command.args(arguments);
    for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "RUSTC", "RUSTDOC"] {
        command.env_remove(variable);
    }
    command
}

/// The channel that a toolchain file names.
fn channel(text: &str) -> Option<&str> {
    let line = text.lines().find_map(|line| line.strip_prefix("channel"))?;
    line.trim_start().strip_prefix('=')?.split('"').nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pin_is_a_dated_nightly() {
        let text = fs::read_to_string(Workspace::find().unwrap().root().join(PIN)).unwrap();
        let channel = channel(&text).unwrap();
        let date = channel.strip_prefix("nightly-").unwrap();
        assert_eq!(date.split('-').map(str::len).collect::<Vec<_>>(), [4, 2, 2]);
        for component in COMPONENTS {
            assert!(text.contains(&format!("\"{component}\"")), "{component}");
        }
    }
}
