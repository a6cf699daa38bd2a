//! Hosts that offer less, or something else: the kernel takes the other way.

use anyhow::{Result, ensure};

use super::{Needs, PATIENCE, Stand, Test, refuse};
use crate::{console::READY, machine::Ending};

/// Tests of hosts with other features.
pub const TESTS: &[Test] = &[
    Test {
        name: "variants/xapic",
        needs: Needs::HyperV,
        run: |stand| shows(stand, &["x2apic=off", "hv-vapic=off"], r"^ +APIC +(xAPIC)$"),
    },
    Test {
        name: "variants/apic-msrs",
        needs: Needs::HyperV,
        run: |stand| {
            shows(
                stand,
                &["x2apic=off"],
                r"^ +APIC +(xAPIC with Hyper-V MSRs)$",
            )
        },
    },
    Test {
        name: "variants/timer-by-message",
        needs: Needs::HyperV,
        run: |stand| {
            shows(
                stand,
                &["hv-stimer-direct=off"],
                r"^ +timer +(.*by message)$",
            )
        },
    },
    Test {
        name: "variants/timers-by-message",
        needs: Needs::HyperV,
        run: |stand| {
            passes(
                stand,
                &["hv-stimer-direct=off"],
                "timer",
                Ending::PoweredOff,
            )
        },
    },
    Test {
        name: "variants/explicit-eoi",
        needs: Needs::HyperV,
        run: |stand| passes(stand, &["hv-avic"], "timer", Ending::PoweredOff),
    },
    Test {
        name: "variants/reset-by-acpi",
        needs: Needs::HyperV,
        run: |stand| passes(stand, &["hv-reset=off"], "reboot", Ending::Reset),
    },
    Test {
        name: "variants/vmbus-3.0",
        needs: Needs::HyperV,
        run: |stand| speaks(stand, "3.0"),
    },
    Test {
        name: "variants/vmbus-2.4",
        needs: Needs::HyperV,
        run: |stand| speaks(stand, "2.4"),
    },
    Test {
        name: "variants/no-clock",
        needs: Needs::HyperV,
        run: |stand| {
            let mut config = stand.hello(&[])?;
            config.cpu_flags = vec!["hv-stimer-direct=off,hv-stimer=off,hv-time=off"];
            refuse::refused(stand, &config, "reference counter")
        },
    },
    Test {
        name: "variants/no-crash-registers",
        needs: Needs::HyperV,
        run: |stand| {
            let mut config = stand.selftest("panic-main")?;
            config.cpu_flags = vec!["hv-crash=off"];
            let ending = stand.with(&config, |vm| {
                vm.expect("^panic on VP 0: ", PATIENCE)?;
                vm.expect("^enlit: the host takes no crash reports", PATIENCE)?;
                vm.wait(PATIENCE)
            })?;
            ensure!(
                ending == Ending::DebugExit(refuse::FAILED),
                "expected a failing exit, but {ending}"
            );
            Ok("reported on the console, failing exit".into())
        },
    },
];

/// `hello` comes up, and its table has a line like `row`.
fn shows(stand: &mut Stand, flags: &[&'static str], row: &str) -> Result<String> {
    let mut config = stand.hello(&["then=poweroff"])?;
    config.cpu_flags = flags.to_vec();
    let (line, ending) = stand.with(&config, |vm| {
        let line = vm.expect(row, PATIENCE)?;
        vm.expect(READY, PATIENCE)?;
        Ok((line[1].clone(), vm.wait(PATIENCE)?))
    })?;
    ensure!(
        ending == Ending::PoweredOff,
        "expected a power-off, but {ending}"
    );
    Ok(line)
}

/// `hello` comes up with this version of VMBus, and the balloon is served.
fn speaks(stand: &mut Stand, version: &str) -> Result<String> {
    let config = stand.hello(&[&format!("vmbus.version={version}")])?;
    stand.with(&config, |vm| {
        vm.expect(&format!("^ +VMBus +version {version}$"), PATIENCE)?;
        vm.expect("^ +balloon +protocol 2.0", PATIENCE)?;
        vm.expect(READY, PATIENCE)
    })?;
    Ok(format!("VMBus {version}, with its device"))
}

/// The guest's own checks called `name` pass, and it ends as it should.
fn passes(stand: &mut Stand, flags: &[&'static str], name: &str, wanted: Ending) -> Result<String> {
    let mut config = stand.selftest(name)?;
    config.cpu_flags = flags.to_vec();
    let ending = stand.with(&config, |vm| {
        vm.expect(&format!("^selftest: {name}"), PATIENCE)?;
        vm.wait(PATIENCE)
    })?;
    ensure!(ending == wanted, "expected that {wanted}, but {ending}");
    Ok(format!("selftest {name}: {wanted}"))
}
