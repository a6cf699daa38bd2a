//! Leaving in order: power-off and reboot.

use anyhow::{Result, ensure};

use super::{Needs, PATIENCE, Stand, Test};
use crate::{console::READY, machine::Ending};

/// Tests of the ways out.
pub const TESTS: &[Test] = &[
    Test {
        name: "power/off",
        needs: Needs::HyperV,
        run: |stand| leaves(stand, "then=poweroff", Ending::PoweredOff),
    },
    Test {
        name: "power/reboot",
        needs: Needs::HyperV,
        run: |stand| leaves(stand, "then=reboot", Ending::Reset),
    },
];

fn leaves(stand: &mut Stand, word: &str, wanted: Ending) -> Result<String> {
    let config = stand.hello(&[word])?;
    let ending = stand.with(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        // The host's answer to UNLOAD.
        vm.expect("the host has let go of VMBus", PATIENCE)?;
        vm.wait(PATIENCE)
    })?;
    ensure!(ending == wanted, "expected that {wanted}, but {ending}");
    Ok(format!("the host let go of VMBus, then {wanted}"))
}
