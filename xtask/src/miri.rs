//! `cargo xtask miri`: the tests of the unsafe code, interpreted.
//!
//! Miri is a hundred times slower than the processor, so the runs below are chosen: every way into `vmbus/src/shared.rs`,
//! from the accesses themselves up to whole channels, and the C table with what it hands out by pointer: packets, memory, contexts
//! and answers. Tests that only repeat these accesses many times (long property tests, most tests of channels) are left to the processor.

use std::{
    process::{Command, ExitCode},
    sync::Mutex,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{nightly::Nightly, progress, suite, workspace::Workspace};

/// Options of `miri`.
#[derive(Debug, Args)]
pub struct Options {
    /// Run only those whose name holds this text
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

/// Some tests under Miri.
struct Run {
    name: &'static str,
    /// What cargo is to build and test.
    what: &'static [&'static str],
    /// Which of the tests.
    tests: &'static [&'static str],
    /// Flags for Miri beside [`FLAGS`].
    flags: &'static str,
}

const RUNS: [Run; 3] = [
    Run {
        name: "shared memory and rings",
        what: &["--package", "vmbus", "--lib"],
        tests: &[
            "shared::",
            "ring::",
            // These do the same accesses many times over.
            "--skip",
            "behaves_like_a_queue",
            "--skip",
            "survives_garbage",
            "--skip",
            "a_lying_consumer_harms_only_itself",
            "--skip",
            "the_length_field_limits_packets_in_big_rings",
        ],
        flags: "",
    },
    Run {
        name: "channels",
        what: &["--package", "vmbus-host", "--test", "machine"],
        // Data both ways at both levels, and memory that is given back in the middle of it.
        tests: &[
            "a_deferred_packet_comes_again_at_passive_before_all_others",
            "a_packet_that_the_driver_fails_closes_the_channel",
            "a_failed_packet_is_consumed_without_a_completion_and_delivery_stops",
        ],
        // The tests' machine and its guest own each other to the end.
        flags: " -Zmiri-ignore-leaks",
    },
    Run {
        name: "C table",
        what: &["--package", "vmbus-host", "--test", "abi"],
        tests: &[
            "it_sets_both_callbacks_and_returns_success_on_a_disabled_channel",
            "a_kept_packet_is_completed_once_and_its_handle_is_good_until_then",
            "a_packet_in_the_drivers_own_memory_needs_a_routine_and_is_never_freed",
            "gpadls_are_made_from_the_opened_callback_on_and_deleted",
            "the_answer_is_copied_and_its_length_told",
        ],
        flags: " -Zmiri-ignore-leaks",
    },
];

/// Cases of a property test: each runs the same unsafe code with other numbers.
const CASES: &str = "2";

/// Tests read variables. Loads see the newest value, not an old one that a weaker processor might give: Miri cannot do that
/// where accesses of different sizes meet, as they do in shared memory. Orderings are for the models to check.
const FLAGS: &str = "-Zmiri-disable-isolation -Zmiri-disable-weak-memory-emulation";

/// Runs the tests; fails when one fails.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let nightly = Nightly::find(&workspace)?;
    let wanted = options.filter.as_deref().unwrap_or_default();
    let runs: Vec<&Run> = RUNS
        .iter()
        .filter(|run| run.name.contains(wanted))
        .collect();
    if runs.is_empty() {
        let names = RUNS.map(|run| run.name).join(", ");
        bail!("nothing has {wanted:?} in its name: there are {names}");
    }
    {
        let _step = progress::step("building Miri's standard library");
        let output = nightly
            .cargo(&workspace)
            .args(["miri", "setup"])
            .output()
            .context("cannot start cargo")?;
        if !output.status.success() {
            bail!("Miri: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    for run in &runs {
        let _step = progress::step(&format!("building for Miri: {}", run.name));
        let output = command(&workspace, &nightly, run)
            .arg("--no-run")
            .output()
            .context("cannot start cargo")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr));
        }
    }
    let waiting = Mutex::new(runs.into_iter().rev().collect::<Vec<_>>());
    let failed = Mutex::new(0);
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some(run) = waiting.lock().ok().and_then(|mut runs| runs.pop()) {
                    let start = Instant::now();
                    let result = tests(&workspace, &nightly, run);
                    let seconds = start.elapsed().as_secs();
                    match result {
                        Ok(passed) => {
                            println!("ok    miri {}: {passed} tests ({seconds} s)", run.name);
                        }
                        Err(error) => {
                            println!("FAIL  miri {} ({seconds} s): {error:#}", run.name);
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

/// Runs some tests; says how many passed.
fn tests(workspace: &Workspace, nightly: &Nightly, run: &Run) -> Result<u32> {
    let output = command(workspace, nightly, run)
        .arg("--")
        .args(run.tests)
        .output()
        .context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (passed, _) = suite::totals(&text);
    if !output.status.success() {
        eprint!("{text}{}", String::from_utf8_lossy(&output.stderr));
        bail!("see above");
    }
    if passed == 0 {
        bail!("no test has such a name");
    }
    Ok(passed)
}

fn command(workspace: &Workspace, nightly: &Nightly, run: &Run) -> Command {
    let mut command = nightly.cargo(workspace);
    command
        .args(["miri", "test", "--quiet"])
        .args(run.what)
        .env("CARGO_TARGET_DIR", workspace.target().join("miri"))
        .env("MIRIFLAGS", format!("{FLAGS}{}", run.flags))
        .env("PROPTEST_CASES", CASES)
        .env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1");
    command
}
