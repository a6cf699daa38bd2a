//! `cargo xtask sim`: the deterministic simulation of `vmbus/sim`, built with optimisation and every check.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::workspace::Workspace;

/// The profile of Cargo.toml in which the simulation is built.
pub const PROFILE: &str = "sim";

/// Options of `sim`.
#[derive(Debug, Args)]
pub struct Options {
    /// What decides everything; without it a fresh one
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many decisions to take
    #[arg(long, value_name = "M", default_value_t = 1_000_000)]
    steps: u64,
    /// Print every action
    #[arg(long)]
    trace: bool,
}

/// Builds the simulation and runs it.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut command = command(&Workspace::find()?, options.steps);
    if let Some(seed) = options.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if options.trace {
        command.arg("--trace");
    }
    let status = command.status().context("cannot start cargo")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn command(workspace: &Workspace, steps: u64) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["run", "--quiet", "--package", "vmbus-sim"])
        .args(["--profile", PROFILE])
        .args(["--", "--steps", &steps.to_string()])
        .current_dir(workspace.root())
        .env("CARGO_TARGET_DIR", workspace.target());
    command
}
