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
struct Ends {
    near: String,
    far: String,
}

/// Runs what follows in the namespace of the far end.
const THERE: &str = "nsenter -t $(cat /tmp/far.pid) -n";

/// MiB of the file that is fetched.
const FILE: u32 = 8;

/// Brings up both ends, whatever state they are in.
fn ends(session: &mut Session) -> Result<Ends> {
    let near = session.interface(WIRED[0])?;
    if !session.sh("ls /tmp")?.contains("far.pid") {
        let far = session.interface(WIRED[1])?;
        session.sh(&format!(
            "{{ unshare -n sleep 100000 </dev/null >/dev/null 2>&1 & echo $! >/tmp/far.pid; }}; \
             echo {far} >/tmp/far.name"
        ))?;
        session.until(
            "[ $(readlink /proc/$(cat /tmp/far.pid)/ns/net) != $(readlink /proc/self/ns/net) ]",
        )?;
        session.sh(&format!("ip link set {far} netns $(cat /tmp/far.pid)"))?;
    }
    let far = session.sh("cat /tmp/far.name")?;
    session.sh(&format!(
        "ip address flush dev {near}; ip address add 192.0.2.1/24 dev {near}; ip link set {near} up; \
         {THERE} ip address flush dev {far}; {THERE} ip address add 192.0.2.2/24 dev {far}; \
         {THERE} ip link set {far} up; {THERE} ip link set lo up"
    ))?;
    session.until("ping -c 1 -W 1 192.0.2.2 >/dev/null")?;
    Ok(Ends { near, far })
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

/// Serves a file at each end and fetches it from the other.
fn fetch_both_ways(session: &mut Session) -> Result<()> {
    session.sh(&format!(
        "mkdir -p /tmp/www && [ -e /tmp/www/file ] || \
         dd if=/dev/urandom of=/tmp/www/file bs=1M count={FILE} status=none; \
         pidof httpd >/dev/null || {{ httpd -p 192.0.2.1:80 -h /tmp/www; \
         {THERE} httpd -p 192.0.2.2:80 -h /tmp/www; }}"
    ))?;
    session.guest().run_ok(
        "wget -q -O /tmp/a http://192.0.2.2/file && cmp /tmp/a /tmp/www/file",
        LONG,
    )?;
    session.guest().run_ok(
        &format!("{THERE} wget -q -O /tmp/b http://192.0.2.1/file && cmp /tmp/b /tmp/www/file"),
        LONG,
    )?;
    session.sh("rm -f /tmp/a /tmp/b").map(drop)
}

fn http(session: &mut Session) -> Result<String> {
    ends(session)?;
    fetch_both_ways(session)?;
    Ok(format!("{FILE} MiB fetched each way, the same at the end"))
}

fn without_offloads(session: &mut Session) -> Result<String> {
    let Ends { near, far } = ends(session)?;
    let all = "rx off tx off tso off gro off gso off sg off";
    session.sh(&format!(
        "ethtool -K {near} {all} && {THERE} ethtool -K {far} {all}"
    ))?;
    fetch_both_ways(session)?;
    let all = "rx on tx on sg on gso on gro on tso on";
    session.sh(&format!(
        "ethtool -K {near} {all} && {THERE} ethtool -K {far} {all}"
    ))?;
    Ok(format!(
        "{FILE} MiB each way with Linux's own checksums and segments"
    ))
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
    session.sh(
        "mkdir -p /tmp/vlan && cp /bin/busybox /tmp/vlan && httpd -p 198.51.100.1:81 -h /tmp/vlan",
    )?;
    session.sh(&format!(
        "{THERE} wget -q -O /tmp/v http://198.51.100.1:81/busybox && cmp /tmp/v /bin/busybox"
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
    session.until("ping -c 1 -W 1 192.0.2.2 >/dev/null")?;
    Ok("carrier lost and found, and it carries again".into())
}

/// A change of the MTU has Linux close the device and open it anew.
fn mtu(session: &mut Session) -> Result<String> {
    let Ends { near, far } = ends(session)?;
    for mtu in [1400, 9000, 1500] {
        session.sh(&format!(
            "ip link set {near} mtu {mtu} && {THERE} ip link set {far} mtu {mtu}"
        ))?;
        ends(session)?;
        let payload = mtu - 28;
        session.sh(&format!("ping -c 2 -W 5 -s {payload} 192.0.2.2"))?;
        let packets = format!("$(cat /sys/class/net/{near}/statistics/tx_packets)");
        let sent: u32 = session
            .sh(&format!(
                "a={packets}; ping -c 4 -W 5 -s {payload} 192.0.2.2 >/dev/null; echo $(({packets} - a))"
            ))?
            .parse()?;
        ensure!(
            (4..8).contains(&sent),
            "4 packets of {mtu} bytes went as {sent}"
        );
    }
    fetch_both_ways(session)?;
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
    // Several connections spread over the channels of both.
    let spread = |session: &mut Session, interface: &str, there: &str| {
        session.sh(&format!(
            "{there} ethtool -S {interface} | grep -cE 'rx_queue_[0-9]*_packets: [1-9]'"
        ))
    };
    session.guest().run_ok(
        "head -c 1000000 /tmp/www/file >/tmp/www/part; for n in 1 2 3 4 5 6 7 8 9 10 11 12; do \
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
    ends(session)?;
    let two = combined(session)?;
    ensure!(two == "2", "asked for 2 channels, Linux uses {two}");
    fetch_both_ways(session)?;
    session.sh(&format!("ethtool -L {near} combined {cpus}"))?;
    ends(session)?;
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
    fetch_both_ways(session)?;
    Ok("taken from the driver and given back, twice; a file afterwards".into())
}
