//! Our kernel on the test machine: every version of VMBus, every number of processors, and what the host asks for from
//! its control.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vmm::config::{
    Backend, Balloon, Config, Device, Lun, Network, Plain, Scsi, VersionNumber, Vsock,
};

use super::{Needs, PATIENCE, Stand, Test};
use crate::{
    console::READY,
    machine::{Ending, Vm},
};

/// Tests of our kernel on the test machine.
pub const TESTS: &[Test] = &[
    Test {
        name: "test-machine/versions",
        needs: Needs::HyperV,
        run: versions,
    },
    Test {
        name: "test-machine/processors",
        needs: Needs::HyperV,
        run: processors,
    },
    Test {
        name: "test-machine/offers",
        needs: Needs::HyperV,
        run: offers,
    },
    Test {
        name: "test-machine/power-off",
        needs: Needs::HyperV,
        run: |stand| asked_to_end(stand, "power-off", Ending::PoweredOff),
    },
    Test {
        name: "test-machine/reboot",
        needs: Needs::HyperV,
        run: |stand| asked_to_end(stand, "reboot", Ending::Reset),
    },
    Test {
        name: "test-machine/balloon",
        needs: Needs::HyperV,
        run: balloon,
    },
    Test {
        name: "test-machine/clock",
        needs: Needs::HyperV,
        run: clock,
    },
    Test {
        name: "test-machine/rescind",
        needs: Needs::HyperV,
        run: rescind,
    },
    Test {
        name: "test-machine/crash",
        needs: Needs::HyperV,
        run: crash,
    },
];

/// Devices that our kernel has drivers for, and the names that its table has for them.
const SERVED: [&str; 4] = ["balloon", "shutdown", "time-sync", "heartbeat"];

/// A kernel serves a device that comes back some seconds after the other went.
const RETURN: Duration = Duration::from_secs(120);

/// `hello` with these words and the devices that it serves.
fn hello(stand: &Stand, words: &str) -> Result<Config> {
    let file = "hello.elf";
    stand.machine().put(file, &stand.guests().hello.read()?)?;
    Ok(Config {
        cmdline: words.into(),
        devices: vec![
            Device::Balloon(Balloon::default()),
            Device::Shutdown(Plain::default()),
            Device::TimeSync(Plain::default()),
            Device::Heartbeat(Plain::default()),
        ],
        ..Config::new(file)
    })
}

fn versions(stand: &mut Stand) -> Result<String> {
    let mut spoken = Vec::new();
    for newest in VersionNumber::ALL {
        let mut config = hello(stand, "")?;
        config.vmbus.newest_version = Some(VersionNumber(newest));
        let expected = newest.to_string();
        stand
            .with_vmm(&config, |vm| {
                let shown = vm.expect(r"^ +VMBus +version (\S+)$", PATIENCE)?;
                ensure!(
                    shown[1] == expected,
                    "the guest speaks version {} with a host that knows {expected}",
                    shown[1]
                );
                vm.expect(READY, PATIENCE)?;
                served(vm)?;
                well_behaved(vm)
            })
            .with_context(|| format!("with version {expected}"))?;
        spoken.push(expected);
    }
    Ok(format!(
        "{}: every channel opens, and the heart beats",
        spoken.join(", ")
    ))
}

fn processors(stand: &mut Stand) -> Result<String> {
    for cpus in [1, 2, 4] {
        let mut config = hello(stand, "")?;
        config.cpus = cpus;
        stand
            .with_vmm(&config, |vm| {
                vm.expect(&format!(r"^ +processors +{cpus}, VP 0 runs$"), PATIENCE)?;
                vm.expect(READY, PATIENCE)?;
                served(vm)?;
                well_behaved(vm)
            })
            .with_context(|| format!("with {cpus} processors"))?;
    }
    Ok("1, 2 and 4".into())
}

fn offers(stand: &mut Stand) -> Result<String> {
    let mut config = hello(stand, "")?;
    config.devices.extend([
        Device::Scsi(Scsi {
            name: "disks".into(),
            queues: 4,
            luns: vec![Lun {
                lun: 0,
                file: None,
                memory_mib: Some(1),
                read_only: false,
            }],
        }),
        Device::Net(Network {
            name: "net".into(),
            mac: None,
            mtu: 1500,
            queues: 1,
            backend: Backend::Loop,
            pcap: None,
        }),
        Device::Kvp(Plain::default()),
        Device::Vsock(Vsock {
            name: None,
            path: "vsock".into(),
        }),
    ]);
    let names = [
        "dynamic memory: balloon",
        "shutdown: shutdown",
        "time synchronization: time sync",
        "heartbeat: heartbeat",
        "SCSI controller: no driver",
        "network adapter: no driver",
        "key-value pairs: no driver",
    ];
    stand.with_vmm(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        let console = vm.console();
        for name in names {
            let listed = console
                .lines()
                .any(|line| line.trim_start().starts_with("offer") && line.ends_with(name));
            ensure!(listed, "no offer `{name}` in the table{}", vm.last_words());
        }
        let unknown = console.matches("unknown device").count();
        ensure!(unknown == 0, "{unknown} offers have no name");
        well_behaved(vm)
    })?;
    Ok(format!("{} devices, each by its name", names.len()))
}

fn asked_to_end(stand: &mut Stand, kind: &str, wanted: Ending) -> Result<String> {
    let config = hello(stand, "")?;
    let ending = stand.with_vmm(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        served(vm)?;
        vm.ctl("shutdown", json!({ "kind": kind }))?;
        let answer = vm.event("SHUTDOWN_ANSWERED", PATIENCE, |_| true)?;
        ensure!(answer["accepted"] == true, "the guest refuses: {answer}");
        vm.expect("the host has let go of VMBus", PATIENCE)?;
        vm.wait(PATIENCE)
    })?;
    ensure!(ending == wanted, "expected that {wanted}, but {ending}");
    Ok(format!("the guest agreed, let go of VMBus, and {wanted}"))
}

fn balloon(stand: &mut Stand) -> Result<String> {
    let config = hello(stand, "status=1")?;
    let (whole, half) = (config.memory_mib, config.memory_mib / 2);
    stand.with_vmm(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        for target in [half, whole] {
            vm.ctl("balloon", json!({ "target-mib": target }))?;
            let there = |data: &Value| data["actual-mib"] == target;
            vm.event("BALLOON", PATIENCE, there)?;
            let given = (whole - target) * 1024;
            vm.expect(&format!(r"memory .*\b{given} KiB ballooned"), PATIENCE)?;
        }
        well_behaved(vm)
    })?;
    Ok(format!("{whole} MiB to {half} MiB and back"))
}

fn clock(stand: &mut Stand) -> Result<String> {
    let config = hello(stand, "status=1")?;
    let (before, after) = stand.with_vmm(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        let year = r"wall clock +(\d{4})-\d\d-\d\d \d\d:\d\d:\d\d UTC";
        let before: u32 = vm.expect(year, PATIENCE)?[1].parse()?;
        // Ten years and some days.
        let ahead: i64 = 3660 * 86_400 * 1000;
        vm.ctl("time-step", json!({ "milliseconds": ahead }))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let after: u32 = vm.expect(year, PATIENCE)?[1].parse()?;
            if after >= before + 10 {
                well_behaved(vm)?;
                return Ok((before, after));
            }
            if Instant::now() > deadline {
                bail!("the guest's year is still {after}{}", vm.last_words());
            }
        }
    })?;
    Ok(format!(
        "the host's clock went from {before} to {after}, and the guest's with it"
    ))
}

fn rescind(stand: &mut Stand) -> Result<String> {
    let config = hello(stand, "")?;
    stand.with_vmm(&config, |vm| {
        vm.expect(READY, PATIENCE)?;
        served(vm)?;
        for device in SERVED {
            vm.forget_events();
            vm.ctl("rescind", json!({ "device": device }))?;
            let of_it = |data: &Value| data["device"] == device;
            vm.event("CHANNEL_CLOSED", PATIENCE, of_it)?;
            vm.ctl("offer", json!({ "device": device }))?;
            vm.event("CHANNEL_OPENED", RETURN, of_it)?;
        }
        served(vm)?;
        well_behaved(vm)
    })?;
    Ok(format!(
        "{}: taken away, offered again, open again",
        SERVED.join(", ")
    ))
}

fn crash(stand: &mut Stand) -> Result<String> {
    let mut config = hello(stand, "selftest=panic-main")?;
    let file = "selftest.elf";
    stand
        .machine()
        .put(file, &stand.guests().selftest.read()?)?;
    config.kernel = file.into();
    let (report, ending) = stand.with_vmm(&config, |vm| {
        let report = vm.event("GUEST_PANICKED", PATIENCE, |_| true)?;
        Ok((report, vm.wait(PATIENCE)?))
    })?;
    ensure!(
        ending == Ending::Panicked,
        "expected a crash report, but {ending}"
    );
    let message = report["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains("asked to, in main"),
        "the host got this message: {message:?}"
    );
    Ok(format!(
        "the host got {:?}",
        message.lines().next().unwrap_or_default()
    ))
}

/// Every device that the kernel has a driver for is open, and the heart beats.
fn served(vm: &mut Vm) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let devices = vm.ctl("query-devices", json!({}))?;
        let list = devices.as_array().context("no list of devices")?;
        let open = |name: &str| {
            let device = list.iter().find(|device| device["name"] == name);
            device.and_then(|device| device["channels"].as_array().map(|all| !all.is_empty()))
        };
        let missing: Vec<_> = SERVED
            .into_iter()
            .filter(|name| open(name) != Some(true))
            .collect();
        let beats = vm.ctl("heartbeat", json!({}));
        let alive = beats.as_ref().is_ok_and(|state| state["contact"] == "ok");
        if missing.is_empty() && alive {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!(
                "not open: {}; heartbeat: {beats:?}{}",
                missing.join(", "),
                vm.last_words()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The host has seen nothing that no guest may do.
fn well_behaved(vm: &mut Vm) -> Result<()> {
    let status = vm.ctl("query-status", json!({}))?;
    let complaints = status["complaints"].as_array().context("no complaints")?;
    ensure!(complaints.is_empty(), "the host complains: {complaints:?}");
    Ok(())
}
