//! Booting to the table, on machines of several sizes.

use anyhow::{Result, ensure};

use super::{Needs, PATIENCE, Stand, Test};
use crate::console::READY;

/// Tests of the boot with Hyper-V.
pub const TESTS: &[Test] = &[
    Test {
        name: "boot/table",
        needs: Needs::HyperV,
        run: table,
    },
    Test {
        name: "boot/64-mib",
        needs: Needs::HyperV,
        run: |stand| memory(stand, 64, 1),
    },
    Test {
        name: "boot/4-gib-2-vps",
        needs: Needs::HyperV,
        run: |stand| memory(stand, 4096, 2),
    },
    Test {
        name: "boot/least-memory",
        needs: Needs::HyperV,
        run: |stand| memory(stand, LEAST_MIB, 1),
    },
];

/// The least memory that the README states, in MiB.
const LEAST_MIB: u32 = 8;

/// Every fact of the table, as the nested machine and QEMU on KVM give it.
fn table(stand: &mut Stand) -> Result<String> {
    let config = stand.hello(&["counters"])?;
    stand.with(&config, |vm| {
        for row in [
            r"hypervisor +Microsoft Hv, version \d+\.",
            r"used +hypercall page",
            r"processors +1, VP 0 runs",
            r"clock +reference TSC page",
            r"timer +synthetic timer 0, direct",
            r"VMBus +version 4\.0",
            r"offer +\d+ dynamic memory: balloon",
            r"interface 525074dc-8985-46e2-8057-a307dc18a502",
            r"memory +\d+ KiB: \d+ KiB used",
            r"balloon +protocol \d\.\d",
            r"wall clock +not set: no device",
            r"interrupts +[1-9]\d* handled, \d+ spurious",
            r"boot +\d+ us +kernel entry",
            r"boot +\d+ us +main",
            r"channel +balloon: active",
            r"[1-9]\d* packets_received",
            r"channel +shutdown: enabled",
            r"channel +time sync: enabled",
        ] {
            vm.expect(&format!("^ +{row}"), PATIENCE)?;
        }
        vm.expect(READY, PATIENCE)
    })?;
    Ok(
        "hypervisor, features, clock, timer, offer with driver, memory, milestones, counters"
            .into(),
    )
}

fn memory(stand: &mut Stand, mib: u32, cpus: u32) -> Result<String> {
    let mut config = stand.hello(&[])?;
    config.memory = mib;
    config.cpus = cpus;
    let (processors, kib) = stand.with(&config, |vm| {
        let processors = vm.expect(r"processors +(\d+),", PATIENCE)?;
        let kib = vm.expect(r"memory +(\d+) KiB", PATIENCE)?;
        vm.expect(READY, PATIENCE)?;
        Ok((processors[1].clone(), kib[1].parse::<u32>()?))
    })?;
    ensure!(
        processors == cpus.to_string(),
        "the guest sees {processors} processors instead of {cpus}"
    );
    // Firmware keeps a part of the first MiB and some tables.
    ensure!(
        (mib * 1024 - 1024..=mib * 1024).contains(&kib),
        "the guest sees {kib} KiB of {mib} MiB"
    );
    Ok(format!(
        "{mib} MiB, {cpus} VPs: comes up and sees {kib} KiB"
    ))
}
