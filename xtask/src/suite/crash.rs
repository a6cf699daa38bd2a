//! Panics and faults: reported on the console with a backtrace, to the host
//! through the crash registers, and the run fails.

use anyhow::{Context, Result, ensure};

use super::{Needs, PATIENCE, Stand, Test};
use crate::{guest::Symboliser, machine::Ending};

/// Crash code of a panic.
const PANIC: u64 = 0x454e_0002;

/// Crash code of an exception, less its vector.
const EXCEPTION: u64 = 0x454e_0100;

/// Source file that every backtrace leads to.
const CALLER: &str = "selftest/src/main.rs";

/// Tests of crashes, and of what must not crash.
pub const TESTS: &[Test] = &[
    Test {
        name: "crash/panic-in-main",
        needs: Needs::HyperV,
        run: |stand| panics(stand, "panic-main", "asked to, in main"),
    },
    Test {
        name: "crash/panic-in-interrupt",
        needs: Needs::HyperV,
        run: |stand| panics(stand, "panic-interrupt", "asked to, in an interrupt"),
    },
    Test {
        name: "crash/panic-in-work-item",
        needs: Needs::HyperV,
        run: |stand| panics(stand, "panic-work", "asked to, in a work item"),
    },
    Test {
        name: "crash/out-of-memory",
        needs: Needs::HyperV,
        run: |stand| panics(stand, "out-of-memory", "memory"),
    },
    Test {
        name: "crash/null-page",
        needs: Needs::HyperV,
        run: |stand| faults(stand, "null", 14),
    },
    Test {
        name: "crash/write-to-code",
        needs: Needs::HyperV,
        run: |stand| faults(stand, "write-code", 14),
    },
    Test {
        name: "crash/run-data",
        needs: Needs::HyperV,
        run: |stand| faults(stand, "run-data", 14),
    },
    Test {
        name: "crash/invalid-opcode",
        needs: Needs::HyperV,
        run: |stand| faults(stand, "invalid-opcode", 6),
    },
    Test {
        name: "crash/stack-overflow",
        needs: Needs::HyperV,
        // The guard page faults, and there is no stack to handle it on.
        run: |stand| faults(stand, "overflow", 8),
    },
    Test {
        name: "kernel/memory-rights",
        needs: Needs::HyperV,
        run: |stand| passes(stand, "rights"),
    },
    Test {
        name: "kernel/work-queue",
        needs: Needs::HyperV,
        run: |stand| passes(stand, "work"),
    },
    Test {
        name: "kernel/timers",
        needs: Needs::HyperV,
        run: |stand| passes(stand, "timer"),
    },
    Test {
        name: "kernel/block-on",
        needs: Needs::HyperV,
        run: |stand| passes(stand, "block-on"),
    },
    Test {
        name: "kmcl/driver-in-c",
        needs: Needs::HyperV,
        run: |stand| passes(stand, "c-driver"),
    },
];

fn panics(stand: &mut Stand, name: &str, message: &str) -> Result<String> {
    crashes(stand, name, message, PANIC)
}

fn faults(stand: &mut Stand, name: &str, vector: u64) -> Result<String> {
    crashes(stand, name, "exception|fault|opcode", EXCEPTION + vector)
}

/// Boots, and expects a report with `message`, a backtrace that leads into the
/// guest's own code, and crash registers with `code`.
fn crashes(stand: &mut Stand, name: &str, message: &str, code: u64) -> Result<String> {
    let config = stand.selftest(name)?;
    let symboliser = Symboliser::open(&stand.guests().selftest.symbols)?;
    let (panicked, ending) = stand.with(&config, |vm| {
        vm.expect(&format!("^selftest: {name}$"), PATIENCE)?;
        vm.expect(&format!("(?i){message}"), PATIENCE)?;
        vm.expect(r"#0 0x[0-9a-f]{16}", PATIENCE)?;
        let panicked = vm.event("GUEST_PANICKED", PATIENCE, |_| true)?;
        Ok((panicked, vm.wait(PATIENCE)?))
    })?;
    ensure!(
        ending == Ending::Panicked,
        "expected a crash report, but {ending}"
    );
    let told = panicked["info"]["arg1"].as_u64();
    ensure!(
        told == Some(code),
        "the host was told {told:x?} instead of {code:#x}"
    );
    let place = stand
        .console
        .lines()
        .flat_map(|line| symboliser.below(line))
        .find(|place| place.contains(CALLER));
    let place = place.with_context(|| format!("the backtrace does not lead to {CALLER}"))?;
    Ok(format!(
        "reported with code {code:#x}, from {}",
        place.trim()
    ))
}

fn passes(stand: &mut Stand, name: &str) -> Result<String> {
    let config = stand.selftest(name)?;
    let ending = stand.with(&config, |vm| {
        vm.expect(&format!("^selftest: {name} passed$"), PATIENCE)?;
        vm.wait(PATIENCE)
    })?;
    ensure!(ending == Ending::PoweredOff, "passed, but {ending}");
    Ok("the guest's own checks".into())
}
