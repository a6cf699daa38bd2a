//! The user's own network: Linux gets an address from passt, serves this computer by a forwarded
//! port and fetches from a server here, as a guest of `cargo xtask run` does.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context, Result, anyhow, ensure};

use super::{
    Session, Test,
    config::USER,
    session::{LONG, SOON},
};

pub(super) const TESTS: &[Test] = &[Test {
    name: "referee/network/passt",
    run: passt,
}];

/// The guest's port that a port of this computer leads to.
pub(super) const PORT: u16 = 8000;

/// Runs what follows where the adapter is: in a network of its own, for its address is this
/// computer's, whatever that is.
const THERE: &str = "nsenter -t $(cat /tmp/user.pid) -n";

/// What udhcpc calls with what it was told.
const DHCP: &str = "\
#!/bin/sh
[ \"$1\" = bound ] || exit 0
ip address add \"$ip/$mask\" dev \"$interface\"
ip route add default via \"${router%% *}\" dev \"$interface\"
echo \"$ip ${router%% *}\" >/tmp/user.lease
";

/// What is fetched: MiB, each way.
const MIB: usize = 4;

fn passt(session: &mut Session) -> Result<String> {
    let gateway = connect(session)?;

    // In by the forwarded port.
    session.guest().run_ok(
        &format!(
            "mkdir -p /tmp/user && dd if=/dev/urandom of=/tmp/user/file bs=1M count={MIB} status=none && \
             {THERE} httpd -p {PORT} -h /tmp/user"
        ),
        LONG,
    )?;
    let file = get(session.files().forwarded()?, "/file")?;
    ensure!(
        file.len() == MIB << 20,
        "{} bytes came, of {MIB} MiB that the guest has",
        file.len()
    );

    // What came goes back, from a server here, and the guest compares; passt takes the gateway's address for this computer's.
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = server.local_addr()?.port();
    let serving = thread::spawn(move || serve(&server, &file));
    let fetched = session.guest().run_ok(
        &format!(
            "{THERE} wget -q -O /tmp/user/fetched http://{gateway}:{port}/file && \
             cmp /tmp/user/fetched /tmp/user/file"
        ),
        LONG,
    );
    // Without a guest that asks, nobody ends the server's wait but ourselves.
    if fetched.is_err() {
        drop(TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
    }
    let served = serving.join().map_err(|_| anyhow!("the server panicked"))?;
    fetched?;
    served.context("the server on this computer")?;
    session.sh(&format!(
        "pkill -f 'httpd -p {PORT}'; kill $(cat /tmp/user.pid); rm -r /tmp/user"
    ))?;
    Ok(format!(
        "an address by DHCP; {MIB} MiB from the guest by a forwarded port of this computer, and {MIB} MiB to it from a server here"
    ))
}

/// Gets an address; gives the gateway's.
fn connect(session: &mut Session) -> Result<String> {
    let interface = session.interface(USER)?;
    session.isolate(&interface, "user")?;
    session.sh(&format!(
        "cat >/tmp/dhcp.sh <<'END'\n{DHCP}END\nchmod +x /tmp/dhcp.sh; {THERE} ip link set {interface} up"
    ))?;
    session.guest().run_ok(
        &format!("{THERE} udhcpc -i {interface} -s /tmp/dhcp.sh -n -q -f"),
        SOON,
    )?;
    session.sh("cut -d ' ' -f 2 /tmp/user.lease")
}

/// Fetches a file from a port of this computer, by HTTP.
fn get(port: u16, path: &str) -> Result<Vec<u8>> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
        .with_context(|| format!("port {port} of this computer"))?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer
        .windows(4)
        .position(|end| end == b"\r\n\r\n")
        .with_context(|| format!("no HTTP: {}", answer.escape_ascii()))?;
    let content = answer.split_off(head + 4);
    let status = String::from_utf8_lossy(&answer);
    ensure!(
        status.lines().next().is_some_and(|it| it.contains(" 200 ")),
        "the guest's server says {status}"
    );
    Ok(content)
}

/// Gives a file to the first who asks.
fn serve(listener: &TcpListener, content: &[u8]) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(LONG))?;
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "the request ends early");
        request.extend(byte);
    }
    write!(
        stream,
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
        content.len()
    )?;
    stream.write_all(content)?;
    Ok(stream.shutdown(Shutdown::Write)?)
}
