//! The kernel's entry of the 64-bit Linux boot protocol, in the state of the
//! monitors that use it.

use anyhow::{Result, ensure};

use super::{Needs, PATIENCE, Stand, Test, refuse::FAILED};
use crate::{
    console::READY,
    linux_boot::{self, Given, Monitor},
    machine::{Ending, VmConfig},
};

/// Tests of the entry.
pub const TESTS: &[Test] = &[
    Test {
        name: "linux-boot/openvmm",
        needs: Needs::HyperV,
        run: |stand| table(stand, Monitor::OpenVmm),
    },
    Test {
        name: "linux-boot/firecracker",
        needs: Needs::HyperV,
        run: |stand| table(stand, Monitor::Firecracker),
    },
    Test {
        name: "linux-boot/garbage",
        needs: Needs::HyperV,
        run: |stand| without_memory(stand, Given::Garbage, Ending::Panicked),
    },
    Test {
        name: "linux-boot/no-hyperv-openvmm",
        needs: Needs::Emulation,
        run: |stand| without_hyperv(stand, Monitor::OpenVmm),
    },
    Test {
        name: "linux-boot/no-hyperv-firecracker",
        needs: Needs::Emulation,
        run: |stand| without_hyperv(stand, Monitor::Firecracker),
    },
    Test {
        name: "linux-boot/no-memory",
        needs: Needs::Emulation,
        run: |stand| without_memory(stand, Given::NoMemory, Ending::DebugExit(FAILED)),
    },
];

/// `hello`, entered as the monitor does it.
fn hello(stand: &Stand, monitor: Monitor, given: Given, words: &[&str]) -> Result<VmConfig> {
    let elf = linux_boot::elf(&stand.guests().hello.read()?, monitor, given)?;
    let mut config = stand.kernel("linux-boot.elf", &elf)?;
    config.cmdline = words.iter().map(|&word| word.to_owned()).collect();
    Ok(config)
}

/// That it powers off shows that it has found the ACPI tables.
fn table(stand: &mut Stand, monitor: Monitor) -> Result<String> {
    let config = hello(stand, monitor, Given::ZeroPage, &["then=poweroff"])?;
    let (kib, ending) = stand.with(&config, |vm| {
        vm.expect(r"^ +processors +1, VP 0 runs", PATIENCE)?;
        vm.expect(r"^ +VMBus +version 4\.0", PATIENCE)?;
        let kib = vm.expect(r"^ +memory +(\d+) KiB", PATIENCE)?[1].parse::<u32>()?;
        vm.expect(READY, PATIENCE)?;
        Ok((kib, vm.wait(PATIENCE)?))
    })?;
    let given = config.memory * 1024;
    ensure!(
        (given - 1024..=given).contains(&kib),
        "the guest sees {kib} KiB of {given} KiB"
    );
    ensure!(
        ending == Ending::PoweredOff,
        "expected a power-off, but {ending}"
    );
    Ok(format!(
        "the table, with {kib} KiB; obeys the command line, powers off"
    ))
}

/// The command line arrives: a bad word is complained about, and the
/// debug-exit port is known.
fn without_hyperv(stand: &mut Stand, monitor: Monitor) -> Result<String> {
    let config = hello(stand, monitor, Given::ZeroPage, &["log=loud"])?;
    let (line, ending) = stand.with(&config, |vm| {
        vm.expect("command line: log=loud is ignored", PATIENCE)?;
        let line = vm.expect(r"^enlit: cannot start: (.*no Hyper-V.*)$", PATIENCE)?;
        Ok((line[1].clone(), vm.wait(PATIENCE)?))
    })?;
    ensure!(
        ending == Ending::DebugExit(FAILED),
        "expected a failing exit, but {ending}"
    );
    Ok(line)
}

/// The kernel says that it was given no memory, and the VM ends failing: without
/// a command line, by a crash report to the host.
fn without_memory(stand: &mut Stand, given: Given, end: Ending) -> Result<String> {
    let config = hello(stand, Monitor::OpenVmm, given, &[])?;
    stand.with(&config, |vm| {
        let line = vm.expect(
            "^enlit: cannot start: (the memory map has no usable memory.*)$",
            PATIENCE,
        )?;
        let ending = vm.wait(PATIENCE)?;
        ensure!(ending == end, "expected that {end}, but {ending}");
        Ok(line[1].clone())
    })
}
