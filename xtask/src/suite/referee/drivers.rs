//! Every driver of Linux finds its device and speaks the newest protocol that both know.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    Session, Test,
    config::{CONTROLLER, WIRED},
};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "referee/drivers/bus-version",
        run: bus_version,
    },
    Test {
        name: "referee/drivers/bound",
        run: bound,
    },
    Test {
        name: "referee/drivers/channels",
        run: channels,
    },
];

/// The newest version that this Linux knows (drivers/hv/connection.c, since 5.5).
const NEWEST: &str = "5.3";

fn bus_version(session: &mut Session) -> Result<String> {
    let said = session.sh("dmesg | grep 'Vmbus version'")?;
    ensure!(
        said.ends_with(&format!("Vmbus version:{NEWEST}")),
        "Linux says {said:?}"
    );
    let host = session.ctl("query-status", json!({}))?["vmbus"]["version"].clone();
    ensure!(host == NEWEST, "Linux says {NEWEST}, the host {host}");
    Ok(format!("VMBus {NEWEST}, as both say"))
}

/// Each kind of device, and Linux's driver for it.
const DRIVERS: [(&str, &str); 8] = [
    (CONTROLLER, "hv_storvsc"),
    (WIRED[0], "hv_netvsc"),
    ("heartbeat", "hv_utils"),
    ("shutdown", "hv_utils"),
    ("time-sync", "hv_utils"),
    ("kvp", "hv_utils"),
    ("balloon", "hv_balloon"),
    (WIRED[1], "hv_netvsc"),
];

fn bound(session: &mut Session) -> Result<String> {
    for (device, driver) in DRIVERS {
        let found = session.driver(device)?;
        ensure!(found == driver, "Linux binds {found} to {device}");
    }
    let mut names: Vec<_> = DRIVERS.iter().map(|(_, driver)| *driver).collect();
    names.sort_unstable();
    names.dedup();
    Ok(format!(
        "{} for {} devices",
        names.join(", "),
        DRIVERS.len()
    ))
}

/// A disk controller and a network adapter have a channel for each VP, each bound to one of its own.
fn channels(session: &mut Session) -> Result<String> {
    let cpus: usize = session.sh("nproc")?.parse()?;
    for device in [CONTROLLER, WIRED[0]] {
        let directory = session.directory(device)?;
        session.until(&format!(
            "[ $(ls {directory}/channels | wc -l) -eq {cpus} ]"
        ))?;
        let bound = session.sh(&format!("cat {directory}/channels/*/cpu | sort -u | wc -l"))?;
        ensure!(
            bound == cpus.to_string(),
            "the channels of {device} are bound to {bound} of {cpus} VPs"
        );
        let host = session.device(device)?;
        let open = host["channels"].as_array().context("channels")?.len();
        ensure!(open == cpus, "the host says that {open} are open");
    }
    Ok(format!(
        "{cpus} for a disk controller and a network adapter"
    ))
}
