//! Dynamic memory: the host takes memory and gives it back, and both sides'
//! figures agree.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::{Needs, PATIENCE, Stand, Test};
use crate::{console::READY, machine::Vm};

/// Tests of the balloon.
pub const TESTS: &[Test] = &[
    Test {
        name: "balloon/half-and-back",
        needs: Needs::HyperV,
        run: half_and_back,
    },
    Test {
        name: "balloon/more-than-can-be-given",
        needs: Needs::HyperV,
        run: too_much,
    },
];

/// QEMU waits 50 s after the handshake before its first request, in case a
/// guest needs the time; the request itself takes as long as there are pages.
const REQUEST: Duration = Duration::from_secs(240);

/// The guest's memory in MiB. It gives half: with much less, the guest keeps more
/// than half to live.
const MEMORY: u32 = 256;

const MIB: u64 = 1 << 20;

fn half_and_back(stand: &mut Stand) -> Result<String> {
    let mut config = stand.hello(&["status=2"])?;
    config.memory = MEMORY;
    let whole = u64::from(MEMORY) * MIB;
    let half = whole / 2;
    stand.with(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        let before = available(vm)?;
        for target in [half, whole] {
            vm.qmp("balloon", json!({ "value": target }))?;
            settle(vm, |actual| actual == target)?;
            let given = (whole - target) / 1024;
            vm.expect(&format!(r"memory .*\b{given} KiB ballooned"), PATIENCE)?;
            // What the guest reports to the host moves with it, but for what it
            // uses itself.
            let expected = before - (whole - target);
            let reported = available(vm)?;
            ensure!(
                reported.abs_diff(expected) < MIB,
                "the guest reports {reported} bytes available, expected about {expected}"
            );
        }
        Ok(())
    })?;
    Ok(format!(
        "{MEMORY} MiB to {} MiB and back; query-balloon, the guest's status reports and its \
         table agree",
        half / MIB
    ))
}

fn too_much(stand: &mut Stand) -> Result<String> {
    let mut config = stand.hello(&["status=2"])?;
    config.memory = MEMORY;
    let whole = u64::from(MEMORY) * MIB;
    let left = stand.with(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        vm.qmp("balloon", json!({ "value": MIB }))?;
        // It says that it gave less than was asked for ...
        vm.expect(r"balloon .* [1-9]\d* requests cut", REQUEST)?;
        let left = settle(vm, |actual| actual < whole)?;
        ensure!(left > MIB, "all memory was given away");
        // ... is alive, and takes everything back.
        vm.qmp("balloon", json!({ "value": whole }))?;
        settle(vm, |actual| actual == whole)?;
        vm.expect(r"memory .*\b0 KiB ballooned", PATIENCE)?;
        Ok(left)
    })?;
    Ok(format!(
        "asked for all but 1 MiB, the guest kept {} KiB, said so, and took the rest back",
        left / 1024
    ))
}

/// Looks at the host's figure after each of the guest's status reports until it
/// is as wanted; gives it in bytes.
fn settle(vm: &mut Vm, wanted: impl Fn(u64) -> bool) -> Result<u64> {
    let deadline = Instant::now() + REQUEST;
    loop {
        available(vm)?;
        let answer = vm.qmp("query-balloon", json!({}))?;
        let actual = answer["actual"].as_u64().unwrap_or(0);
        if wanted(actual) {
            return Ok(actual);
        }
        if Instant::now() > deadline {
            bail!(
                "query-balloon still says {actual} after {} s{}",
                REQUEST.as_secs(),
                vm.last_words()
            );
        }
    }
}

/// The free memory in the guest's next status report, in bytes.
fn available(vm: &mut Vm) -> Result<u64> {
    vm.forget_events();
    let report = vm.event("HV_BALLOON_STATUS_REPORT", PATIENCE, |_| true)?;
    Ok(report["available"].as_u64().unwrap_or(0))
}
