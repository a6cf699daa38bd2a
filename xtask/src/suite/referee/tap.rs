//! A TAP device of the machine: Linux here and Linux there exchange a file over it, and nobody cuts
//! or sums what either has left to the other.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{
    Session, Test,
    config::{TAP, TAPPED},
    session::{LONG, SOON},
};
use crate::referee::shell;

pub(super) const TESTS: &[Test] = &[Test {
    name: NAME,
    run: tap,
}];

/// The test's name. A user's machine has no TAP device for us, so it is for the nested machine only.
pub(super) const NAME: &str = "referee/network/tap";

/// Runs what follows in the namespace of the adapter.
const THERE: &str = "nsenter -t $(cat /tmp/tap.pid) -n";

/// The network's addresses without the last part (RFC 5737): the machine is 1, the guest is 2.
const NETWORK: &str = "203.0.113";

/// Bytes that are fetched, each way.
const BYTES: u64 = 2 << 20;

/// Bytes of data in a frame of the network.
const FRAME: u64 = 1460;

fn tap(session: &mut Session) -> Result<String> {
    let interface = session.interface(TAPPED)?;
    session.isolate(&interface, "tap")?;
    session.sh(&format!(
        "{THERE} ip address add {NETWORK}.2/24 dev {interface} && {THERE} ip link set {interface} up && \
         mkdir -p /tmp/tapped && dd if=/dev/urandom of=/tmp/tapped/file bs={BYTES} count=1 iflag=fullblock status=none && \
         {THERE} httpd -p {NETWORK}.2:80 -h /tmp/tapped"
    ))?;
    let there =
        |session: &Session, command: &str| shell::run(session.files().machine(), command, LONG);
    there(
        session,
        &format!(
            "ip address add {NETWORK}.1/24 dev {TAP} && ip link set {TAP} up && mkdir -p tapped && \
             httpd -p {NETWORK}.1:80 -h tapped </dev/null >/dev/null 2>&1 3>&-"
        ),
    )?;
    session.guest().until(
        &format!("{THERE} ping -q -c 1 -W 1 {NETWORK}.1 >/dev/null"),
        SOON,
    )?;
    let before = Counts::read(session)?;
    there(
        session,
        &format!("wget -q -O tapped/file http://{NETWORK}.2/file"),
    )?;
    let after = Counts::read(session)?;
    let (large, frames) = (after.large - before.large, after.frames - before.frames);
    ensure!(
        large > 0 && frames < BYTES / FRAME / 2,
        "{BYTES} bytes went in {frames} frames, {large} of them large"
    );
    session.guest().run_ok(
        &format!(
            "{THERE} wget -q -O /tmp/tapped/back http://{NETWORK}.1/file && \
             cmp /tmp/tapped/back /tmp/tapped/file && rm -r /tmp/tapped && \
             pkill -f 'httpd -p {NETWORK}'; kill $(cat /tmp/tap.pid)"
        ),
        LONG,
    )?;
    Ok(format!(
        "{} MiB to the machine in {frames} frames, {large} of them large ones that the device cut; the same came back",
        BYTES >> 20
    ))
}

/// What the host has counted of what the guest sent.
struct Counts {
    frames: u64,
    large: u64,
}

impl Counts {
    fn read(session: &mut Session) -> Result<Self> {
        let counters = session.ctl("query-counters", json!({ "device": TAPPED }))?;
        let get = |name: &str| {
            counters[0]["counters"][name]
                .as_u64()
                .with_context(|| format!("the host does not count {name}: {counters}"))
        };
        Ok(Self {
            frames: get("sent-frames")?,
            large: get("large-sends")?,
        })
    }
}
