//! `cargo xtask fuzz`: the fuzz targets of `vmbus/fuzz`, a while each.
//!
//! The targets are built here with the flags that `cargo fuzz` would give, so that nothing needs to be installed but the
//! pinned toolchain. `cargo fuzz run TARGET` in `vmbus/fuzz` does the same for one who has it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Mutex,
    thread,
};

use anyhow::{Context, Result, bail};
use cargo_metadata::MetadataCommand;
use clap::Args;

use crate::{nightly::Nightly, progress, workspace::Workspace};

/// The targets' manifest, from the top of the work tree.
pub const MANIFEST: &str = "vmbus/fuzz/Cargo.toml";

/// The target to build for: sanitizers want it named, or build scripts are built with them, too.
const HOST: &str = "x86_64-unknown-linux-gnu";

/// Coverage counters that libFuzzer reads, checks in the code, and AddressSanitizer.
const FLAGS: [&str; 9] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Ccodegen-units=1",
    "-Zsanitizer=address",
    "--cfg=fuzzing",
];

/// The longest input, in bytes.
const MAX_LENGTH: u32 = 4096;

/// The longest time for one input, in seconds: far more than any takes.
const TIMEOUT: u32 = 20;

/// Options of `fuzz`.
#[derive(Debug, Args)]
pub struct Options {
    /// Target to run; all of them without it
    target: Option<String>,
    /// Time for each target
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    seconds: u32,
    /// Name the targets and run nothing
    #[arg(long)]
    list: bool,
}

/// What came of a target.
struct Outcome {
    executions: u64,
    /// Coverage counters that were hit, and features: counters with how often, and more.
    coverage: u64,
    features: u64,
    /// Inputs that each reach something that no other reaches.
    inputs: u64,
}

/// Runs the targets; fails when one fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let mut targets = targets(&workspace)?;
    if let Some(wanted) = &options.target {
        targets.retain(|target| target == wanted);
        if targets.is_empty() {
            bail!("there is no target {wanted:?}; `cargo xtask fuzz --list` names them");
        }
    }
    if options.list {
        for target in targets {
            println!("{target}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let nightly = Nightly::find(&workspace)?;
    let programs = build(&workspace, &nightly)?;
    let waiting = Mutex::new(targets.into_iter());
    let failed = Mutex::new(0);
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(target) = next(&waiting) {
                    match fuzz(&workspace, &programs, &target, options.seconds) {
                        Ok(outcome) => println!(
                            "ok    fuzz {target}: {} inputs tried in {} s, {} coverage counters, {} features, corpus of {}",
                            outcome.executions,
                            options.seconds,
                            outcome.coverage,
                            outcome.features,
                            outcome.inputs,
                        ),
                        Err(error) => {
                            println!("FAIL  fuzz {target}: {error:#}");
                            if let Ok(mut failed) = failed.lock() {
                                *failed += 1;
                            }
                        }
                    }
                }
            });
        }
    });
    Ok(match failed.into_inner() {
        Ok(0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn next(waiting: &Mutex<std::vec::IntoIter<String>>) -> Option<String> {
    waiting.lock().ok()?.next()
}

/// The names of all targets.
fn targets(workspace: &Workspace) -> Result<Vec<String>> {
    let metadata = MetadataCommand::new()
        .manifest_path(workspace.root().join(MANIFEST))
        .no_deps()
        .exec()
        .context("cargo cannot describe the fuzz targets")?;
    let targets = metadata
        .packages
        .iter()
        .flat_map(|package| &package.targets);
    Ok(targets
        .filter(|target| target.is_bin())
        .map(|target| target.name.clone())
        .collect())
}

/// Builds all targets; gives the folder that they are in.
fn build(workspace: &Workspace, nightly: &Nightly) -> Result<PathBuf> {
    let folder = workspace.target().join("fuzz");
    let _step = progress::step("building the fuzz targets");
    let status = nightly
        .cargo(workspace)
        .args(["build", "--quiet", "--release", "--locked", "--bins"])
        .args(["--manifest-path", MANIFEST, "--target", HOST])
        .env("CARGO_TARGET_DIR", &folder)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!("the fuzz targets do not build (libFuzzer needs a C++ compiler)");
    }
    Ok(folder.join(HOST).join("release"))
}

/// Runs one target.
fn fuzz(workspace: &Workspace, programs: &Path, target: &str, seconds: u32) -> Result<Outcome> {
    let store = workspace.store().join("fuzz");
    let corpus = store.join("corpus").join(target);
    let artifacts = store.join("artifacts").join(target);
    for folder in [&corpus, &artifacts] {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let program = programs.join(target);
    let output = Command::new(&program)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_LENGTH}"))
        .arg(format!("-timeout={TIMEOUT}"))
        .arg("-print_final_stats=1")
        // Naming each new function takes longer than reaching it, and nobody reads it.
        .arg("-print_funcs=0")
        // The slash says that it is a folder.
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(&corpus)
        .arg(workspace.root().join("vmbus/fuzz/corpus").join(target))
        .current_dir(workspace.root())
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        eprintln!("{text}");
        let Some(input) = failed_input(&text) else {
            bail!("ended with {}, without an input", output.status);
        };
        bail!(
            "fails with {input}\n      again: {} -timeout={TIMEOUT} {input}",
            program.display()
        );
    }
    outcome(&text).context("libFuzzer said nothing of what it did")
}

/// The file in which libFuzzer put the input that failed.
fn failed_input(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once("Test unit written to ")?;
    rest.lines().next()
}

/// What libFuzzer's output says.
fn outcome(text: &str) -> Option<Outcome> {
    let number = |text: &str| {
        let digits = text.trim_start().split(|c: char| !c.is_ascii_digit());
        digits.into_iter().next()?.parse().ok()
    };
    let (_, executions) = text.rsplit_once("stat::number_of_executed_units:")?;
    let (_, coverage) = text.rsplit_once(" cov: ")?;
    let (_, features) = text.rsplit_once(" ft: ")?;
    let (_, inputs) = text.rsplit_once(" corp: ")?;
    Some(Outcome {
        executions: number(executions)?,
        coverage: number(coverage)?,
        features: number(features)?,
        inputs: number(inputs)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_did_is_read_from_its_output() {
        let text = "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 40Mb\n\
                    #99\tDONE   cov: 20 ft: 31 corp: 3/9b lim: 4 exec/s: 9 rss: 41Mb\n\
                    stat::number_of_executed_units: 99\nstat::average_exec_per_sec: 9\n";
        let outcome = outcome(text).unwrap();
        assert_eq!(
            (
                outcome.executions,
                outcome.coverage,
                outcome.features,
                outcome.inputs
            ),
            (99, 20, 31, 3)
        );
        let crash = "artifact_prefix='./'; Test unit written to ./crash-00ff\nBase64: AA==\n";
        assert_eq!(failed_input(crash), Some("./crash-00ff"));
        assert_eq!(failed_input("no crash"), None);
    }

    #[test]
    fn every_target_has_a_corpus() {
        let workspace = Workspace::find().unwrap();
        let targets = targets(&workspace).unwrap();
        assert!(!targets.is_empty());
        for target in targets {
            let corpus = workspace.root().join("vmbus/fuzz/corpus").join(&target);
            assert!(
                fs::read_dir(corpus).is_ok_and(|mut files| files.next().is_some()),
                "{target}"
            );
        }
    }
}
