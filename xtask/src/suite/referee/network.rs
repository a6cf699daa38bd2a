//! Network adapters: two of them on one wire, each in a network of its own, talk to each other
//! through Linux's stack, driver and offloads at both ends.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{
    Session, Test,
    config::{ADDRESS, WIRED},
    session::LONG,
};

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "referee/network/adapter",
        run: adapter,
    },
    Test {
        name: "referee/network/http-both-ways",
        run: http,
    },
    Test {
        name: "referee/network/without-offloads",
        run: without_offloads,
    },
    Test {
        name: "referee/network/vlan",
        run: vlan,
    },
    Test {
        name: "referee/network/link-down-and-up",
        run: link,
    },
    Test {
        name: "referee/network/mtu",
        run: mtu,
    },
    Test {
        name: "referee/network/channels-and-rss",
        run: channels,
    },
    Test {
        name: "referee/network/unbind-and-bind",
        run: bind,
    },
];

/// The two ends of the wire. The second is in a network namespace of its own.
pub(super) struct Ends {
    pub(super) near: String,
    far: String,
}

/// Runs what follows in the namespace of the far end.
pub(super) const THERE: &str = "nsenter -t $(cat /tmp/far.pid) -n";

/// KiB of what is served: the one by which large transfers are judged, and what shows that any
/// arrive. A frame costs milliseconds on the nested machine.
const FILES: [(&str, u32); 2] = [("large", 1024), ("small", 192)];

/// Brings up both ends, whatever state they are in.
pub(super) fn ends(session: &mut Session) -> Result<Ends> {
    let near = session.interface(WIRED[0])?;
    if !session.sh("ls /tmp")?.contains("far.pid") {
        let far = session.interface(WIRED[1])?;
        session.isolate(&far, "far")?;
        session.sh(&format!("echo {far} >/tmp/far.name"))?;
    }
    let far = session.sh("cat /tmp/far.name")?;
    session.sh(&format!(
        "ip address flush dev {near}; ip address add 192.0.2.1/24 dev {near}; ip link set {near} up; \
         {THERE} ip address flush dev {far}; {THERE} ip address add 192.0.2.2/24 dev {far}; \
         {THERE} ip link set {far} up; {THERE} ip link set lo up"
    ))?;
    reaches(session)?;
    Ok(Ends { near, far })
}

/// Waits until one end reaches the other.
pub(super) fn reaches(session: &mut Session) -> Result<()> {
    session.until("ping -q -c 1 -W 1 192.0.2.2 >/dev/null")
}

fn adapter(session: &mut Session) -> Result<String> {
    let ends = ends(session)?;
    let near = &ends.near;
    let driver = session.sh(&format!("ethtool -i {near} | sed -n 's/^driver: //p'"))?;
    ensure!(driver == "hv_netvsc", "{near} is driven by {driver}");
    let features = session.sh(&format!("ethtool -k {near}"))?;
    for wanted in [
        "rx-checksumming: on",
        "tx-checksumming: on",
        "tcp-segmentation-offload: on",
        "tx-tcp-segmentation: on",
        "tx-tcp6-segmentation: on",
        "tx-checksum-ip-generic: on",
    ] {
        // Linux names the one or the other kind of checksum.
        let alternative = wanted.replace("ip-generic", "ipv4");
        ensure!(
            features.contains(wanted) || features.contains(&alternative),
            "ethtool -k {near} does not say `{wanted}`:\n{features}"
        );
    }
    let address = session.sh(&format!("cat /sys/class/net/{near}/address"))?;
    ensure!(address == ADDRESS, "its address is {address}");
    let speed = session.sh(&format!("cat /sys/class/net/{near}/speed"))?;
    ensure!(
        speed.parse::<i64>()? > 0,
        "Linux does not know the link's speed"
    );
    Ok(format!(
        "hv_netvsc, {address}, {speed} Mbit/s, checksums and segmentation offloaded both ways"
    ))
}

/// Serves the files at each end.
pub(super) fn serve(session: &mut Session) -> Result<()> {
    let make = FILES.map(|(name, kib)| {
        format!("[ -e {name} ] || dd if=/dev/urandom of={name} bs=1k count={kib} status=none")
    });
    session
        .sh(&format!(
            "mkdir -p /tmp/www && cd /tmp/www && {} && pidof httpd >/dev/null || {{ \
             httpd -p 192.0.2.1:80 -h /tmp/www; {THERE} httpd -p 192.0.2.2:80 -h /tmp/www; }}",
            make.map(|one| format!("{{ {one}; }}")).join(" && ")
        ))
        .map(drop)
}

/// Fetches a file at each end from the other.
pub(super) fn fetch_both_ways(session: &mut Session, file: &str) -> Result<()> {
    serve(session)?;
    for (there, server) in [("", "192.0.2.2"), (THERE, "192.0.2.1")] {
        session.guest().run_ok(
            &format!(
                "{there} wget -q -O /tmp/got http://{server}/{file} && \
                 cmp /tmp/got /tmp/www/{file} && rm /tmp/got"
            ),
            LONG,
        )?;
    }
    Ok(())
}

/// The small file both ways: the network carries.
pub(super) fn carries(session: &mut Session) -> Result<()> {
    fetch_both_ways(session, "small")
}

fn http(session: &mut Session) -> Result<String> {
    ends(session)?;
    fetch_both_ways(session, "large")?;
    Ok("1 MiB fetched each way, the same at the end".into())
}

fn without_offloads(session: &mut Session) -> Result<String> {
    let Ends { near, far } = ends(session)?;
    let all = "rx off tx off tso off gro off gso off sg off";
    session.sh(&format!(
        "ethtool -K {near} {all} && {THERE} ethtool -K {far} {all}"
    ))?;
    fetch_both_ways(session, "large")?;
    let all = "rx on tx on sg on gso on gro on tso on";
    session.sh(&format!(
        "ethtool -K {near} {all} && {THERE} ethtool -K {far} {all}"
    ))?;
    Ok("1 MiB each way with Linux's own checksums and segments".into())
}

fn vlan(session: &mut Session) -> Result<String> {
    let Ends { near, far } = ends(session)?;
    session.sh(&format!(
        "ip link add link {near} name tagged type vlan id 5 && \
         ip address add 198.51.100.1/24 dev tagged && ip link set tagged up && \
         {THERE} ip link add link {far} name tagged type vlan id 5 && \
         {THERE} ip address add 198.51.100.2/24 dev tagged && {THERE} ip link set tagged up"
    ))?;
    session.until("ping -c 1 -W 1 198.51.100.2 >/dev/null")?;
    serve(session)?;
    session.sh(&format!(
        "httpd -p 198.51.100.1:81 -h /tmp/www && \
         {THERE} wget -q -O /tmp/got http://198.51.100.1:81/small && \
         cmp /tmp/got /tmp/www/small && rm /tmp/got"
    ))?;
    // Another number is another network.
    session.sh(&format!(
        "{THERE} ip link delete tagged && {THERE} ip link add link {far} name tagged type vlan id 6 && \
         {THERE} ip address add 198.51.100.2/24 dev tagged && {THERE} ip link set tagged up"
    ))?;
    session.fails("ping -c 1 -W 1 198.51.100.2")?;
    session.sh(&format!(
        "ip link delete tagged; {THERE} ip link delete tagged"
    ))?;
    Ok("a file over VLAN 5; VLAN 6 is another network".into())
}

fn link(session: &mut Session) -> Result<String> {
    let Ends { near, .. } = ends(session)?;
    session.ctl("link", json!({ "nic": WIRED[0], "up": false }))?;
    session.until(&format!("[ $(cat /sys/class/net/{near}/carrier) = 0 ]"))?;
    session.fails("ping -c 1 -W 1 192.0.2.2")?;
    session.ctl("link", json!({ "nic": WIRED[0], "up": true }))?;
    session.until(&format!("[ $(cat /sys/class/net/{near}/carrier) = 1 ]"))?;
    reaches(session)?;
    Ok("carrier lost and found, and it carries again".into())
}

/// A change of the MTU has Linux close the device and open it anew.
fn mtu(session: &mut Session) -> Result<String> {
    let Ends { near, far } = ends(session)?;
    for mtu in [1400, 9000, 1500] {
        session.sh(&format!(
            "ip link set {near} mtu {mtu} && {THERE} ip link set {far} mtu {mtu}"
        ))?;
        reaches(session)?;
        let payload = mtu - 28;
        let packets = format!("$(cat /sys/class/net/{near}/statistics/tx_packets)");
        let sent: u32 = session
            .sh(&format!(
                "a={packets}; ping -q -i 0.1 -c 4 -W 5 -s {payload} 192.0.2.2 >/dev/null && \
                 echo $(({packets} - a))"
            ))?
            .parse()?;
        ensure!(
            (4..8).contains(&sent),
            "4 packets of {mtu} bytes went as {sent}"
        );
    }
    carries(session)?;
    Ok("1400, 9000 and 1500: whole packets, and a file afterwards".into())
}

fn channels(session: &mut Session) -> Result<String> {
    let Ends { near, far } = ends(session)?;
    let combined = |session: &mut Session| {
        session.sh(&format!(
            "ethtool -l {near} | sed -n 's/^Combined:[^0-9]*//p' | tail -n 1"
        ))
    };
    let cpus = session.sh("nproc")?;
    let all = combined(session)?;
    ensure!(all == cpus, "Linux uses {all} channels on {cpus} VPs");
    let table = session.sh(&format!(
        "ethtool -x {near} | sed -n 's/^ *[0-9]*: *//p' | tr -s ' ' '\\n' | sort -u | wc -l"
    ))?;
    ensure!(
        table == cpus,
        "the indirection table leads to {table} channels"
    );
    serve(session)?;
    // Several connections spread over the channels of both.
    let spread = |session: &mut Session, interface: &str, there: &str| {
        session.sh(&format!(
            "{there} ethtool -S {interface} | grep -cE 'rx_queue_[0-9]*_packets: [1-9]'"
        ))
    };
    session.guest().run_ok(
        "head -c 20000 /tmp/www/small >/tmp/www/part; for n in $(seq 12); do \
         wget -q -O /dev/null http://192.0.2.2/part & done; wait",
        LONG,
    )?;
    let used = spread(session, &near, "")?;
    ensure!(
        used.parse::<u32>()? > 1,
        "12 connections came in on {used} channel"
    );
    let there = spread(session, &far, THERE)?;
    session.sh(&format!("ethtool -L {near} combined 2"))?;
    reaches(session)?;
    let two = combined(session)?;
    ensure!(two == "2", "asked for 2 channels, Linux uses {two}");
    carries(session)?;
    session.sh(&format!("ethtool -L {near} combined {cpus}"))?;
    reaches(session)?;
    Ok(format!(
        "{all} channels, 12 connections came in on {used} of them here and {there} there; with 2, and with {cpus} again"
    ))
}

fn bind(session: &mut Session) -> Result<String> {
    let directory = session.directory(WIRED[0])?;
    let drivers = "/sys/bus/vmbus/drivers/hv_netvsc";
    for _ in 0..2 {
        session.sh(&format!("basename {directory} >{drivers}/unbind"))?;
        session.until(&format!("[ ! -e {directory}/net ]"))?;
        session.sh(&format!("basename {directory} >{drivers}/bind"))?;
        session.interface(WIRED[0])?;
    }
    ends(session)?;
    carries(session)?;
    Ok("taken from the driver and given back, twice; a file afterwards".into())
}
