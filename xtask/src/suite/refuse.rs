//! Machines that the kernel cannot work on: one line says why, the host is
//! told, and the VM ends with a failing status.

use anyhow::{Context, Result, ensure};

use super::{Needs, PATIENCE, Stand, Test, guests::DISK_WORD};
use crate::machine::{Boot, Ending, VmConfig};

/// Tests of machines that lack something.
pub const TESTS: &[Test] = &[
    Test {
        name: "refuse/no-hyperv-pvh",
        needs: Needs::Emulation,
        run: |stand| {
            let config = stand.hello(&[])?;
            without_hyperv(stand, &config)
        },
    },
    Test {
        name: "refuse/no-hyperv-efi",
        needs: Needs::Emulation,
        run: |stand| {
            stand
                .machine()
                .put("hello.efi", &stand.guests().hello_efi)?;
            let config = VmConfig::new(Boot::Efi {
                file: "hello.efi".into(),
                firmware: firmware(stand)?,
            });
            without_hyperv(stand, &config)
        },
    },
    Test {
        name: "refuse/no-hyperv-disk",
        needs: Needs::Emulation,
        run: |stand| {
            stand
                .machine()
                .put("hello.img", &stand.guests().hello_disk)?;
            let config = VmConfig::new(Boot::Disk {
                file: "hello.img".into(),
                firmware: firmware(stand)?,
            });
            // The word has come from the file on the disk.
            without_hyperv_after(stand, &config, &format!("{DISK_WORD} is ignored"))
        },
    },
    Test {
        name: "refuse/no-vmbus",
        needs: Needs::HyperV,
        run: |stand| {
            let mut config = stand.hello(&[])?;
            config.vmbus = false;
            refused(stand, &config, "VMBus")
        },
    },
    Test {
        name: "refuse/no-balloon",
        needs: Needs::HyperV,
        run: |stand| {
            let mut config = stand.hello(&[])?;
            config.balloon = false;
            refused(stand, &config, r"no dynamic memory \(balloon\) device")
        },
    },
    Test {
        name: "refuse/vmbus-version",
        needs: Needs::HyperV,
        run: |stand| {
            let config = stand.hello(&["vmbus.version=6.0"])?;
            refused(stand, &config, "version")
        },
    },
];

/// What the kernel writes to the debug-exit port when it has failed.
pub(super) const FAILED: u8 = 0x10;

fn firmware(stand: &Stand) -> Result<String> {
    let path = stand.machine().ovmf().context("there is no OVMF here")?;
    Ok(path.display().to_string())
}

fn without_hyperv(stand: &mut Stand, config: &VmConfig) -> Result<String> {
    without_hyperv_after(stand, config, "")
}

/// `before` must be printed first.
fn without_hyperv_after(stand: &mut Stand, config: &VmConfig, before: &str) -> Result<String> {
    let (line, ending) = stand.with(config, |vm| {
        // Not from the line's start: the firmware leaves its escape sequences there.
        let line = vm.expect(r"enlit: cannot start: (.*Hyper-V.*)$", PATIENCE)?;
        Ok((line[1].clone(), vm.wait(PATIENCE)?))
    })?;
    ensure!(
        stand.console.contains(before),
        "the guest did not print {before:?}"
    );
    // Without Hyper-V there are no crash registers.
    ensure!(
        ending == Ending::DebugExit(FAILED),
        "expected a failing exit, but {ending}"
    );
    Ok(line)
}

pub(super) fn refused(stand: &mut Stand, config: &VmConfig, reason: &str) -> Result<String> {
    let (line, ending) = stand.with(config, |vm| {
        let line = vm.expect(&format!("^enlit: cannot start: (.*{reason}.*)$"), PATIENCE)?;
        Ok((line[1].clone(), vm.wait(PATIENCE)?))
    })?;
    ensure!(
        ending == Ending::Panicked,
        "expected a crash report, but {ending}"
    );
    Ok(line)
}
