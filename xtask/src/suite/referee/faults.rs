//! A host that misbehaves on purpose: Linux's error handling recovers, or fails as it does on
//! Hyper-V, and the host stays up.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{
    Session, Test,
    config::{CONTROLLER, MEMORY},
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
    session.fails(&at(BAD))?;
    clear(session, CONTROLLER)?;
    session.sh(&at(BAD))?;
    let sector = BAD * BLOCK / 512;
    let log = session.sh(&format!("dmesg | grep 'sector {sector} ' | tail -n 1"))?;
    // Linux tries a failed write again before it gives up, and then says less.
    ensure!(
        log.contains("critical medium error") || log.contains("I/O error"),
        "Linux says of it: {log:?}"
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

fn stays_up(session: &mut Session) -> Result<String> {
    let status = session.ctl("query-status", json!({}))?;
    ensure!(status["status"] == "running", "the host says {status}");
    let state = session.ctl_until("heartbeat", json!({}), |state| state["contact"] == "ok")?;
    Ok(format!(
        "running, {} heartbeats answered",
        state["answered"]
    ))
}
