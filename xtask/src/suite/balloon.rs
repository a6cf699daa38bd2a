//! Dynamic memory: the host takes memory and gives it back, and both sides'
//! figures agree.

use std::time::Duration;

use anyhow::{Result, ensure};
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
/// guest needs the time; then requests take as long as there are pages.
const REQUEST: Duration = Duration::from_secs(240);

const MEMORY: u32 = 64;

const MIB: u64 = 1 << 20;

fn half_and_back(stand: &mut Stand) -> Result<String> {
    let mut config = stand.hello(&["status=2"])?;
    config.memory = MEMORY;
    let whole = u64::from(MEMORY) * MIB;
    let half = whole / 2;
    stand.with(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        for target in [half, whole] {
            vm.qmp("balloon", json!({ "value": target }))?;
            vm.event("BALLOON_CHANGE", REQUEST, |data| data["actual"] == target)?;
            let actual = actual(vm)?;
            ensure!(
                actual == target,
                "query-balloon says {actual} instead of {target}"
            );
            let given = (whole - target) / 1024;
            vm.expect(&format!(r"memory .*\b{given} KiB ballooned"), PATIENCE)?;
        }
        Ok(())
    })?;
    Ok(format!(
        "{MEMORY} MiB to {} MiB and back; query-balloon, event and guest agree",
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
        vm.event("BALLOON_CHANGE", REQUEST, |_| true)?;
        // It says that it gave less than was asked for ...
        vm.expect(r"balloon .* [1-9]\d* requests cut", PATIENCE)?;
        let left = actual(vm)?;
        ensure!(left > MIB, "all memory was given away");
        // ... is alive, and takes everything back.
        vm.qmp("balloon", json!({ "value": whole }))?;
        vm.event("BALLOON_CHANGE", REQUEST, |data| data["actual"] == whole)?;
        vm.expect(r"memory .*\b0 KiB ballooned", PATIENCE)?;
        Ok(left)
    })?;
    Ok(format!(
        "asked for all but 1 MiB, the guest kept {} KiB, said so, and took the rest back",
        left / 1024
    ))
}

/// The host's figure in bytes.
fn actual(vm: &mut Vm) -> Result<u64> {
    let answer = vm.qmp("query-balloon", json!({}))?;
    Ok(answer["actual"].as_u64().unwrap_or(0))
}
