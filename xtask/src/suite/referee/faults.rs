//! A host that misbehaves on purpose: Linux's error handling recovers, or fails as it does on
//! Hyper-V, and the host stays up.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{
    Session, Test,
    config::{CONTROLLER, MEMORY, WIRED},
    network::{self, FETCH},
    session::LONG,
};
use crate::referee::Status;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "referee/faults/disk-reads-fail",
        run: |session| {
            failing(
                session,
                "read",
                "if=/dev/DISK of=/dev/null iflag=direct skip",
            )
        },
    },
    Test {
        name: "referee/faults/disk-writes-fail",
        run: |session| {
            failing(
                session,
                "write",
                "if=/dev/zero of=/dev/DISK oflag=direct seek",
            )
        },
    },
    Test {
        name: "referee/faults/flush-fails",
        run: flush,
    },
    Test {
        name: "referee/faults/slow-disk",
        run: slow,
    },
    Test {
        name: "referee/faults/disk-stalls",
        run: disk_stalls,
    },
    Test {
        name: "referee/faults/disk-taken-mid-transfer",
        run: disk_taken,
    },
    Test {
        name: "referee/faults/lossy-network",
        run: lossy,
    },
    Test {
        name: "referee/faults/network-stalls",
        run: network_stalls,
    },
    Test {
        name: "referee/faults/network-garbage",
        run: garbage,
    },
    Test {
        name: "referee/faults/network-taken-mid-transfer",
        run: network_taken,
    },
    Test {
        name: "referee/faults/host-stays-up",
        run: stays_up,
    },
];

fn fault(session: &mut Session, device: &str, kind: &str, more: Value) -> Result<()> {
    let mut arguments = json!({ "device": device, "kind": kind });
    if let (Some(all), Some(more)) = (arguments.as_object_mut(), more.as_object()) {
        all.extend(more.clone());
    }
    session.ctl("fault", arguments).map(drop)
}

fn clear(session: &mut Session, device: &str) -> Result<()> {
    session
        .ctl("faults-clear", json!({ "device": device }))
        .map(drop)
}

/// One block of the disk fails with these operands of `dd`; those around it do not, and it does not once the fault is gone.
fn failing(session: &mut Session, operation: &str, copy: &str) -> Result<String> {
    const BLOCK: u64 = 4096;
    const BAD: u64 = 1024;
    let disk = session.disk(CONTROLLER, MEMORY)?;
    fault(
        session,
        CONTROLLER,
        "failing-disk",
        json!({ "lun": MEMORY, "operation": operation, "offset": BAD * BLOCK, "length": BLOCK }),
    )?;
    let at = |block: u64| {
        let copy = copy.replace("DISK", &disk);
        format!("dd bs={BLOCK} count=1 {copy}={block}")
    };
    session.sh(&at(BAD - 1))?;
    session.sh(&at(BAD + 1))?;
    let said = session.fails(&at(BAD))?;
    ensure!(said.contains("I/O error"), "Linux's error is: {said}");
    clear(session, CONTROLLER)?;
    session.sh(&at(BAD))?;
    let sector = BAD * BLOCK / 512;
    let log = session.sh(&format!("dmesg | grep 'sector {sector} ' | tail -n 1"))?;
    ensure!(
        log.contains("critical medium error"),
        "Linux does not call it a medium error: {log:?}"
    );
    Ok(format!(
        "I/O error for that block alone; Linux: {}",
        log.split("] ").last().unwrap_or_default()
    ))
}

fn flush(session: &mut Session) -> Result<String> {
    let disk = session.disk(CONTROLLER, MEMORY)?;
    let command = format!("dd if=/dev/zero of=/dev/{disk} bs=4k count=1 conv=fsync");
    session.sh(&command)?;
    fault(
        session,
        CONTROLLER,
        "failing-disk",
        json!({ "lun": MEMORY, "operation": "flush" }),
    )?;
    session.fails(&command)?;
    clear(session, CONTROLLER)?;
    session.sh(&command)?;
    Ok("fsync fails while the disk cannot make writes durable".into())
}

fn slow(session: &mut Session) -> Result<String> {
    const TRANSFERS: u64 = 4;
    const EACH: u64 = 500;
    let disk = session.disk(CONTROLLER, MEMORY)?;
    fault(
        session,
        CONTROLLER,
        "slow-disk",
        json!({ "lun": MEMORY, "milliseconds": EACH }),
    )?;
    let spent: u64 = session
        .sh(&format!(
            "a=$(cut -d. -f1 /proc/uptime); \
             dd if=/dev/{disk} of=/dev/null bs=4k count={TRANSFERS} iflag=direct status=none && \
             echo $(($(cut -d. -f1 /proc/uptime) - a))"
        ))?
        .parse()?;
    clear(session, CONTROLLER)?;
    // Whole seconds were counted.
    ensure!(
        (spent + 1) * 1000 >= TRANSFERS * EACH,
        "{TRANSFERS} transfers took {spent} s"
    );
    Ok(format!(
        "{TRANSFERS} transfers of {EACH} ms each took {spent} s, and were right"
    ))
}

/// Linux's SCSI time limit passes, and the driver asks for patience, as it does on Hyper-V.
fn disk_stalls(session: &mut Session) -> Result<String> {
    let disk = session.disk(CONTROLLER, MEMORY)?;
    session.sh(&format!("echo 1 >/sys/block/{disk}/device/timeout"))?;
    fault(session, CONTROLLER, "stall", json!({}))?;
    session.guest().spawn(
        "stalled",
        &format!("dd if=/dev/{disk} of=/dev/null bs=64k count=8 iflag=direct status=none"),
    )?;
    session.sh("sleep 3; [ ! -e /tmp/stalled.end ]")?;
    clear(session, CONTROLLER)?;
    let done = session.guest().join("stalled", LONG)?;
    ensure!(
        done.status == Status::Exit(0),
        "after the stall: {}",
        done.output
    );
    session.sh(&format!("echo 60 >/sys/block/{disk}/device/timeout"))?;
    Ok("requests wait beyond Linux's time limit, and go on when the host does".into())
}

fn disk_taken(session: &mut Session) -> Result<String> {
    let disk = session.disk(CONTROLLER, MEMORY)?;
    session.sh(&format!(
        "dd if=/bin/busybox of=/dev/{disk} bs=64k oflag=direct conv=fsync status=none 2>/dev/null; \
         dd if=/bin/busybox of=/dev/{disk} bs=64k conv=fsync status=none"
    ))?;
    // Slow enough that requests are under way when it goes.
    fault(
        session,
        CONTROLLER,
        "slow-disk",
        json!({ "lun": MEMORY, "milliseconds": 100 }),
    )?;
    session.guest().spawn(
        "taken",
        &format!(
            "while dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct status=none; do :; done"
        ),
    )?;
    session.sh(&format!(
        "until [ $(cut -c 1-9 /sys/block/{disk}/inflight | tr -d ' ') != 0 ]; do :; done"
    ))?;
    session.ctl("rescind", json!({ "device": CONTROLLER }))?;
    session.guest().join("taken", LONG)?;
    session.until(&format!("[ ! -e /sys/block/{disk} ]"))?;
    clear(session, CONTROLLER)?;
    session.ctl("offer", json!({ "device": CONTROLLER }))?;
    let disk = session.disk(CONTROLLER, MEMORY)?;
    session.sh(&format!(
        "cmp -n $(stat -c %s /bin/busybox) /bin/busybox /dev/{disk}"
    ))?;
    Ok(
        "the reader gets an error, the disks go; offered again, they are back with their data"
            .into(),
    )
}

fn lossy(session: &mut Session) -> Result<String> {
    network::ends(session)?;
    fault(
        session,
        WIRED[0],
        "lossy-network",
        json!({ "loss": 20, "duplication": 10, "reordering": 10 }),
    )?;
    network::fetch_both_ways(session)?;
    clear(session, WIRED[0])?;
    let again = session.sh("sed -n 's/^Tcp: //p' /proc/net/snmp | tail -n 1 | cut -d' ' -f 12")?;
    ensure!(again != "0", "TCP has sent nothing again: nothing was lost");
    Ok(format!(
        "the file is the same both ways with losses, copies and disorder; {again} segments sent again"
    ))
}

fn network_stalls(session: &mut Session) -> Result<String> {
    network::ends(session)?;
    fault(session, WIRED[0], "stall", json!({}))?;
    session.fails("ping -c 2 -W 1 192.0.2.2")?;
    clear(session, WIRED[0])?;
    session.until("ping -c 1 -W 1 192.0.2.2 >/dev/null")?;
    network::fetch_both_ways(session)?;
    Ok("nothing comes through, then everything".into())
}

/// Packets that no host may send. Linux's driver says what is wrong with them and goes on.
fn garbage(session: &mut Session) -> Result<String> {
    network::ends(session)?;
    let before = session.sh("dmesg | wc -l")?;
    for (kind, more) in [
        ("truncate", json!({ "bytes": 8, "packets": 3 })),
        ("corrupt", json!({ "offset": 0, "packets": 3 })),
        ("corrupt", json!({ "offset": 4, "packets": 3 })),
        ("wrong-transaction", json!({ "packets": 3 })),
    ] {
        fault(session, WIRED[0], kind, more)?;
        // Whatever becomes of these: they meet the packets.
        session
            .guest()
            .run("ping -c 6 -i 0.1 -W 1 192.0.2.2", LONG)?;
        clear(session, WIRED[0])?;
    }
    let said = session.sh(&format!(
        "dmesg | tail -n +$(({before} + 1)) | grep -c hv_netvsc || true"
    ))?;
    // A packet that Linux could not complete may have cost it a buffer; a new channel is whole.
    let near = session.interface(WIRED[0])?;
    session.sh(&format!(
        "ip link set {near} mtu 1400 && ip link set {near} mtu 1500"
    ))?;
    network::ends(session)?;
    network::fetch_both_ways(session)?;
    Ok(format!(
        "{said} complaints of hv_netvsc; the adapter works afterwards"
    ))
}

fn network_taken(session: &mut Session) -> Result<String> {
    network::ends(session)?;
    let near = session.interface(WIRED[0])?;
    session
        .guest()
        .spawn("fetch", &format!("while {FETCH}; do :; done"))?;
    session.until(&format!(
        "[ $(cat /sys/class/net/{near}/statistics/rx_bytes) -gt 1000000 ]"
    ))?;
    session.ctl("rescind", json!({ "device": WIRED[0] }))?;
    session.until(&format!("[ ! -e /sys/class/net/{near} ]"))?;
    session.sh("kill $(pidof wget) 2>/dev/null; true")?;
    session.guest().join("fetch", LONG)?;
    session.ctl("offer", json!({ "device": WIRED[0] }))?;
    network::ends(session)?;
    network::fetch_both_ways(session)?;
    Ok("the interface goes while a file comes in; offered again, it carries".into())
}

fn stays_up(session: &mut Session) -> Result<String> {
    let status = session.ctl("query-status", json!({}))?;
    ensure!(status["status"] == "running", "the host says {status}");
    let state = session.ctl_until("heartbeat", json!({}), |state| state["contact"] == "ok")?;
    Ok(format!(
        "running, {} heartbeats answered",
        state["answered"]
    ))
}
