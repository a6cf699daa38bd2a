//! Integration services, sockets and memory: what the host asks of Linux, and Linux of the host.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    Session, Test,
    config::WIRED,
    ended,
    session::{LONG, SOON},
};
use crate::machine::Ending;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "referee/services/heartbeat",
        run: heartbeat,
    },
    Test {
        name: "referee/services/time-step",
        run: time_step,
    },
    Test {
        name: "referee/services/kvp-from-host",
        run: kvp_from_host,
    },
    Test {
        name: "referee/services/kvp-from-guest",
        run: kvp_from_guest,
    },
    Test {
        name: "referee/services/kvp-addresses",
        run: kvp_addresses,
    },
    Test {
        name: "referee/memory/balloon",
        run: balloon,
    },
    Test {
        name: "referee/memory/hot-add",
        run: hot_add,
    },
];

/// Last of a group: the guest ends.
pub(super) const POWER_OFF: Test = Test {
    name: "referee/services/power-off-on-request",
    run: |session| ends_on_request(session, "power-off", Ending::PoweredOff),
};

/// Last of a group: the guest ends.
pub(super) const REBOOT: Test = Test {
    name: "referee/services/reboot-on-request",
    run: |session| ends_on_request(session, "reboot", Ending::Reset),
};

fn heartbeat(session: &mut Session) -> Result<String> {
    let state = session.ctl_until("heartbeat", json!({}), |state| {
        state["contact"] == "ok" && state["answered"].as_u64() > Some(1)
    })?;
    Ok(format!(
        "{} sent, {} answered",
        state["sent"], state["answered"]
    ))
}

/// Seconds of the guest's clock beyond the host's.
fn ahead(session: &mut Session) -> Result<i64> {
    let guest: i64 = session.sh("date +%s")?.parse()?;
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    Ok(guest - i64::try_from(host.as_secs())?)
}

fn time_step(session: &mut Session) -> Result<String> {
    // The nested machine's clock is its own, so only differences count.
    let before = ahead(session)?;
    for step in [3600, -7200, 3600] {
        let from = ahead(session)?;
        let now: i64 = session.sh("date +%s")?.parse()?;
        session.ctl("time-step", json!({ "milliseconds": step * 1000 }))?;
        let turn = now + step / 2;
        let there = if step > 0 { "-gt" } else { "-lt" };
        session.until(&format!("[ $(date +%s) {there} {turn} ]"))?;
        let moved = ahead(session)? - from;
        ensure!(
            moved.abs_diff(step) <= 5,
            "the clock should move by {step} s and moved by {moved} s"
        );
    }
    let left = ahead(session)? - before;
    ensure!(left.abs() <= 5, "{left} s are left of the steps");
    Ok("an hour ahead, two back, and one ahead: Linux steps its clock each time".into())
}

/// The daemon keeps each pool in a file of records: a key of 512 bytes and a value of 2048.
const POOLS: &str = "/var/lib/hyperv/.kvp_pool_";

fn daemon(session: &mut Session) -> Result<()> {
    session.until("[ -e /dev/vmbus/hv_kvp ]")?;
    session.sh("mkdir -p /var/lib/hyperv; pidof hv_kvp_daemon >/dev/null || hv_kvp_daemon")?;
    session.until(&format!("[ -e {POOLS}0 ]"))?;
    // The driver and the host come to terms when the daemon is there.
    session.until("dmesg | grep -q 'KVP IC version'")
}

fn kvp_from_host(session: &mut Session) -> Result<String> {
    daemon(session)?;
    let set = |session: &mut Session, key: &str, value: serde_json::Value| {
        session.ctl(
            "kvp-set",
            json!({ "pool": "external", "key": key, "value": value }),
        )
    };
    set(session, "colour", json!("blue"))?;
    set(session, "shape", json!("round"))?;
    set(session, "colour", json!("red"))?;
    let records = session.sh(&format!("strings -n 2 {POOLS}0"))?;
    ensure!(
        records == "colour\nred\nshape\nround",
        "the daemon's file says {records:?}"
    );
    session.ctl("kvp-delete", json!({ "pool": "external", "key": "colour" }))?;
    let records = session.sh(&format!("strings -n 2 {POOLS}0"))?;
    ensure!(
        records == "shape\nround",
        "the daemon's file says {records:?}"
    );
    let items = session.ctl("kvp-list", json!({ "pool": "external" }))?;
    ensure!(
        items["items"] == json!([{ "key": "shape", "value": "round" }]),
        "the host lists {items}"
    );
    Ok("set, changed, deleted and listed; the daemon's file says the same".into())
}

fn kvp_from_guest(session: &mut Session) -> Result<String> {
    daemon(session)?;
    session.sh(&format!(
        "{{ printf '%s' answer; head -c $((512 - 6)) /dev/zero; printf '%s' 42; \
         head -c $((2048 - 2)) /dev/zero; }} >{POOLS}1"
    ))?;
    let items = session.ctl("kvp-list", json!({ "pool": "guest" }))?;
    ensure!(
        items["items"] == json!([{ "key": "answer", "value": "42" }]),
        "the host lists {items}"
    );
    let item = session.ctl("kvp-get", json!({ "pool": "guest", "key": "answer" }))?;
    ensure!(item["value"] == "42", "the host gets {item}");
    let auto = session.ctl("kvp-list", json!({ "pool": "auto" }))?;
    let value = |key: &str| {
        auto["items"]
            .as_array()
            .and_then(|items| items.iter().find(|item| item["key"] == key))
            .and_then(|item| item["value"].as_str())
            .map(str::to_owned)
            .with_context(|| format!("Linux tells no {key}: {auto}"))
    };
    let release = session.sh("uname -r")?;
    let told = value("OSBuildNumber")?;
    ensure!(
        release.starts_with(&told) || told.starts_with(&release),
        "OSBuildNumber is {told} on {release}"
    );
    ensure!(value("ProcessorArchitecture")? == "x86_64", "{auto}");
    Ok(format!(
        "a value of the guest's programs; OSBuildNumber {told}, {} values in all",
        auto["items"].as_array().map_or(0, Vec::len)
    ))
}

fn kvp_addresses(session: &mut Session) -> Result<String> {
    daemon(session)?;
    let interface = session.interface(WIRED[0])?;
    session.ctl(
        "kvp-ip-set",
        json!({ "nic": WIRED[0], "dhcp": false, "addresses": ["203.0.113.5/24"],
                "gateways": ["203.0.113.1"], "dns": [] }),
    )?;
    session.until(&format!(
        "ip address show dev {interface} | grep -q 'inet 203.0.113.5/24'"
    ))?;
    let told = session.ctl("kvp-ip-get", json!({ "nic": WIRED[0] }))?;
    ensure!(
        told["addresses"]
            .as_array()
            .is_some_and(|list| list.iter().any(|address| address == "203.0.113.5/24")),
        "the host reads {told}"
    );
    session.sh(&format!("ip address flush dev {interface}"))?;
    Ok("addresses injected, and read back from Linux".into())
}

/// What Linux has, in MiB.
fn memory(session: &mut Session, what: &str) -> Result<u64> {
    let kib: u64 = session
        .sh(&format!(
            "sed -n 's/^{what}: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"
        ))?
        .parse()?;
    Ok(kib >> 10)
}

fn balloon(session: &mut Session) -> Result<String> {
    const TAKE: u64 = 64;
    session.sh("echo 3 >/proc/sys/vm/drop_caches")?;
    let whole = session.ctl("query-balloon", json!({}))?["actual-mib"]
        .as_u64()
        .context("actual-mib")?;
    let before = memory(session, "MemFree")?;
    session.ctl("balloon", json!({ "target-mib": whole - TAKE }))?;
    session.ctl_until("query-balloon", json!({}), |state| {
        state["actual-mib"] == whole - TAKE
    })?;
    let with = memory(session, "MemFree")?;
    ensure!(
        before.abs_diff(with + TAKE) < 32,
        "of {before} MiB free, {with} are left"
    );
    session.ctl("balloon", json!({ "target-mib": whole }))?;
    session.ctl_until("query-balloon", json!({}), |state| {
        state["actual-mib"] == whole
    })?;
    let after = memory(session, "MemFree")?;
    ensure!(
        before.abs_diff(after) < 32,
        "of {before} MiB free, {after} have come back"
    );
    // The memory that came back is memory.
    ensure!(after > TAKE + 32, "Linux has only {after} MiB left");
    session.sh(&format!(
        "mkdir -p /mnt/fill && mount -t tmpfs -o size=95% none /mnt/fill && \
         dd if=/dev/zero of=/mnt/fill/zeros bs=1M count={} status=none; \
         status=$?; umount /mnt/fill; exit $status",
        after - 32
    ))?;
    Ok(format!(
        "{TAKE} of {whole} MiB given and taken back; Linux's free memory {before}, {with}, {after} MiB"
    ))
}

fn hot_add(session: &mut Session) -> Result<String> {
    const MORE: u64 = 128;
    let before = memory(session, "MemTotal")?;
    session.ctl("hot-add", json!({ "mib": MORE }))?;
    session.guest().until(
        &format!(
            "[ $(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) -gt {} ]",
            (before + MORE - 16) << 10
        ),
        LONG,
    )?;
    let after = memory(session, "MemTotal")?;
    ensure!(after <= before + MORE, "{before} MiB became {after}");
    Ok(format!(
        "{MORE} MiB more: Linux had {before}, now {after} MiB"
    ))
}

fn ends_on_request(session: &mut Session, kind: &str, wanted: Ending) -> Result<String> {
    session.ctl("shutdown", json!({ "kind": kind }))?;
    let answer = session
        .guest()
        .vm()
        .event("SHUTDOWN_ANSWERED", SOON, |_| true)?;
    ensure!(answer["accepted"] == true, "Linux answers {answer}");
    let ending = session.guest().vm().wait(LONG)?;
    ended(ending, wanted)?;
    Ok(format!("Linux says yes, and {wanted}"))
}
