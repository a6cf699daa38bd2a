//! A host that misbehaves on purpose: Linux's error handling recovers, or fails as it does on
//! Hyper-V, and the host stays up.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{
    Session, Test,
    config::{ADDRESS, CONTROLLER, MEMORY, WIRED},
    log,
    network::{self, THERE},
    services,
    session::LONG,
};
use crate::referee::Status;

/// Faults of disks; the guest ends.
pub(super) const DISKS: &[Test] = &[
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
        name: "referee/faults/disks-taken",
        run: disk_taken,
    },
    Test {
        name: "referee/faults/host-stays-up-with-disks",
        run: stays_up,
    },
    services::POWER_OFF,
];

/// Faults of networks; the guest ends.
pub(super) const NETWORK: &[Test] = &[
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
        name: "referee/faults/network-taken",
        run: network_taken,
    },
    Test {
        name: "referee/faults/host-stays-up-with-networks",
        run: stays_up,
    },
    services::REBOOT,
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

/// Segments that TCP has sent again so far.
fn sent_again(session: &mut Session) -> Result<u64> {
    let again = "sed -n 's/^Tcp: \\([0-9]\\)/\\1/p' /proc/net/snmp | cut -d' ' -f 12";
    Ok(session.sh(again)?.parse()?)
}

/// The host ends what is under way and tells of it before it takes the controller away; Linux lets
/// go of every disk of it, and of the controller, which then can be offered again.
fn disk_taken(session: &mut Session) -> Result<String> {
    let disk = session.disk(CONTROLLER, MEMORY)?;
    // Slow enough that a request is under way when it goes.
    fault(
        session,
        CONTROLLER,
        "slow-disk",
        json!({ "lun": MEMORY, "milliseconds": 200 }),
    )?;
    session.guest().spawn(
        "taken",
        &format!("dd if=/dev/{disk} of=/dev/null bs=64k iflag=direct status=none"),
    )?;
    // The one in flight is told that its disk is gone; Linux makes of it what it does at that moment.
    let gone = |said: &str| said.contains("No such device") || said.contains("I/O error");
    let waits = format!("[ $(tr -d ' ' </sys/block/{disk}/inflight) != 00 ]");
    session.until(&waits)?;
    let directory = session.directory(CONTROLLER)?;
    session.ctl("rescind", json!({ "device": CONTROLLER }))?;
    let reader = session.guest().join("taken", LONG)?;
    ensure!(
        reader.status != Status::Exit(0) && gone(&reader.output),
        "the reader ends with {:?}: {}",
        reader.status,
        reader.output
    );
    // Its SCSI host is the last that goes.
    let hosts = "ls /sys/class/scsi_host | wc -l";
    session
        .guest()
        .until(&format!("[ ! -e {directory} -a $({hosts}) = 0 ]"), LONG)?;
    let left = session.sh("cat /proc/partitions | sed 1,2d")?;
    ensure!(left.is_empty(), "disks that are left: {left}");
    session.ctl("offer", json!({ "device": CONTROLLER }))?;
    clear(session, CONTROLLER)?;
    let found = format!("{directory}/host*/target*/*:0:0:{MEMORY}/block/*");
    session.guest().until(&format!("[ -e {found} ]"), LONG)?;
    let disk = session.disk(CONTROLLER, MEMORY)?;
    let read =
        |disk| format!("dd if=/dev/{disk} of=/dev/null bs=1M count=8 iflag=direct status=none");
    session.sh(&read(disk))?;
    // Asked to come back while it is still going, it does when it has gone.
    let old = session.sh(&format!("cat {found}/diskseq"))?;
    session.ctl("rescind", json!({ "device": CONTROLLER }))?;
    session.ctl("offer", json!({ "device": CONTROLLER }))?;
    session.guest().until(
        &format!("new=$(cat {found}/diskseq) && [ $new != {old} ]"),
        LONG,
    )?;
    let disk = session.disk(CONTROLLER, MEMORY)?;
    session.sh(&read(disk))?;
    Ok("the reader is told, and every disk of the controller goes; offered again, also while it is going, it is read from".into())
}

fn lossy(session: &mut Session) -> Result<String> {
    network::ends(session)?;
    let before = sent_again(session)?;
    fault(
        session,
        WIRED[0],
        "lossy-network",
        json!({ "loss": 30, "duplication": 10, "reordering": 10 }),
    )?;
    network::fetch_both_ways(session, "large")?;
    clear(session, WIRED[0])?;
    let again = sent_again(session)? - before;
    ensure!(again > 0, "TCP has sent nothing again: nothing was lost");
    Ok(format!(
        "files are the same both ways with losses, copies and disorder; {again} segments sent again"
    ))
}

fn network_stalls(session: &mut Session) -> Result<String> {
    network::ends(session)?;
    for direction in ["to-guest", "to-host"] {
        fault(
            session,
            WIRED[0],
            "stall",
            json!({ "direction": direction }),
        )?;
        session.fails("ping -q -c 3 -i 0.2 -W 1 192.0.2.2")?;
        clear(session, WIRED[0])?;
        network::reaches(session)?;
    }
    network::carries(session)?;
    Ok("nothing comes through, then everything, whichever ring stands still".into())
}

/// Packets that no host may send. Linux's driver says what is wrong with them and goes on.
///
/// Only packets with frames are hit: a send that is never completed keeps Linux's driver waiting
/// for ever when it closes the device. So the far end sends, and the near end says nothing.
fn garbage(session: &mut Session) -> Result<String> {
    const HIT: u64 = 3;
    let ends = network::ends(session)?;
    let silent = "/proc/sys/net/ipv4/icmp_echo_ignore_all";
    session.sh(&format!(
        "{THERE} arp -s 192.0.2.1 {ADDRESS} && echo 1 >{silent}"
    ))?;
    let count = "dmesg | grep -c hv_netvsc || true";
    // All that were hit so far; what goes wrong ends.
    let hits = |session: &mut Session| {
        session.ctl("faults-clear", json!({ "device": WIRED[0] }))?["hits"]
            .as_u64()
            .context("hits")
    };
    let mut hit = hits(session)?;
    let mut said = Vec::new();
    for (kind, more) in [
        ("truncate", json!({ "bytes": 4 })),
        ("extend", json!({ "bytes": 64 })),
        ("spoil", json!({ "at": 0 })),
        ("spoil", json!({ "at": 8 })),
        ("transaction-id", json!({})),
    ] {
        let before: u64 = session.sh(count)?.parse()?;
        let mut arguments = more;
        arguments["packets"] = json!(HIT);
        fault(session, WIRED[0], kind, arguments)?;
        session.fails(&format!("{THERE} ping -q -c 5 -i 0.1 -W 1 192.0.2.1"))?;
        let now = hits(session)?;
        ensure!(now - hit == HIT, "{kind}: {} packets were hit", now - hit);
        hit = now;
        let after: u64 = session.sh(count)?.parse()?;
        said.push(format!("{kind} {}", after - before));
    }
    session.sh(&format!("{THERE} arp -d 192.0.2.1; echo 0 >{silent}"))?;
    // What Linux did not give back has cost the host buffers; a channel that is opened anew is whole.
    network::carries(session)?;
    for mtu in [1400, 1500] {
        session.sh(&format!("ip link set {} mtu {mtu}", ends.near))?;
    }
    network::ends(session)?;
    network::carries(session)?;
    Ok(format!(
        "{HIT} frames each; complaints of hv_netvsc: {}; the adapter works on, and opened anew",
        said.join(", ")
    ))
}

/// The host has the guest let go of the card before it takes it away.
fn network_taken(session: &mut Session) -> Result<String> {
    let near = network::ends(session)?.near;
    network::carries(session)?;
    let received = format!("$(cat /sys/class/net/{near}/statistics/rx_bytes)");
    let before = session.sh(&format!("echo {received}"))?;
    session.guest().spawn(
        "fetch",
        "while wget -q -O /dev/null http://192.0.2.2/large; do :; done",
    )?;
    session.until(&format!("[ {received} -gt $(({before} + 100000)) ]"))?;
    session.ctl("rescind", json!({ "device": WIRED[0] }))?;
    session.until(&format!("[ ! -e /sys/class/net/{near} ]"))?;
    session.sh("kill $(pidof wget) 2>/dev/null; true")?;
    session.guest().join("fetch", LONG)?;
    session.ctl("offer", json!({ "device": WIRED[0] }))?;
    let near = network::ends(session)?.near;
    network::carries(session)?;
    // Asked to come back while it is still going, it does when it has gone.
    let index = session.sh(&format!("cat /sys/class/net/{near}/ifindex"))?;
    session.ctl("rescind", json!({ "device": WIRED[0] }))?;
    session.ctl("offer", json!({ "device": WIRED[0] }))?;
    session.until(&format!("! grep -qx {index} /sys/class/net/*/ifindex"))?;
    network::ends(session)?;
    network::carries(session)?;
    Ok("the interface goes while a file comes in; offered again, also while it is going, it carries".into())
}

fn stays_up(session: &mut Session) -> Result<String> {
    log::no_trouble(session)?;
    let status = session.ctl("query-status", json!({}))?;
    ensure!(status["status"] == "running", "the host says {status}");
    let state = session.ctl_until("heartbeat", json!({}), |state| state["contact"] == "ok")?;
    Ok(format!(
        "running, {} heartbeats answered, no trouble in the kernel's log",
        state["answered"]
    ))
}
