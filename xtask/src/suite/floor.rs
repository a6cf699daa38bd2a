//! The machine itself: does it boot, print and end as it says?

use anyhow::{Result, ensure};

use super::{Needs, PATIENCE, Stand, Test};
use crate::{floor, machine::Ending};

/// Tests of the machines, with the floor guest.
pub const TESTS: &[Test] = &[
    Test {
        name: "floor/hyperv",
        needs: Needs::HyperV,
        run: boots_and_ends,
    },
    Test {
        name: "floor/emulation",
        needs: Needs::Emulation,
        run: boots_and_ends,
    },
];

fn boots_and_ends(stand: &mut Stand) -> Result<String> {
    let config = stand.kernel("floor.elf", &floor::elf())?;
    let ending = stand.with(&config, |vm| {
        vm.expect(&format!("^{}$", floor::WORD), PATIENCE)?;
        vm.wait(PATIENCE)
    })?;
    ensure!(
        ending == Ending::DebugExit(floor::CODE),
        "expected code {}, but {ending}",
        floor::CODE
    );
    Ok("the word on the console, the code at the end".into())
}
