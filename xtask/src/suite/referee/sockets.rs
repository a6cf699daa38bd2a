//! Sockets between host and guest: Linux's `AF_VSOCK` over VMBus at one end, Unix sockets of this
//! computer at the other.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::{
    Session, Test,
    config::SOCKETS,
    files::{pattern, sum},
    session::{LONG, SOON},
};
use crate::referee::Status;

pub(super) const TESTS: &[Test] = &[
    Test {
        name: "referee/sockets/guest-connects",
        run: guest_connects,
    },
    Test {
        name: "referee/sockets/host-connects",
        run: host_connects,
    },
    Test {
        name: "referee/sockets/nobody-listens",
        run: nobody_listens,
    },
];

/// A port of the host's, and one of the guest's.
const HOST_PORT: u32 = 5000;
const GUEST_PORT: u32 = 5001;
/// Nobody listens there.
const NO_PORT: u32 = 5999;

/// Bytes for the guest.
const BYTES: usize = 1 << 20;

/// What the guest sends.
const FILE: &str = "/bin/busybox";

/// The guest sends a file and says that it has no more; the host, which has seen that, answers
/// with other bytes and closes, and the guest sees that.
fn guest_connects(session: &mut Session) -> Result<String> {
    let path = session.files().path(&format!("{SOCKETS}_{HOST_PORT}"));
    let listener = UnixListener::bind(&path)?;
    let wanted = session.sh(&format!("xxhsum -q -H1 {FILE} | cut -d' ' -f1"))?;
    let length: usize = session.sh(&format!("stat -c %s {FILE}"))?.parse()?;
    let host = thread::spawn(move || -> Result<(usize, String)> {
        let mut stream = accept(&listener)?;
        let mut bytes = Vec::new();
        stream
            .read_to_end(&mut bytes)
            .context("the host cannot read to the end of what the guest sends")?;
        stream.write_all(&pattern(BYTES))?;
        Ok((bytes.len(), sum(&bytes)))
    });
    let guest = session.guest().run_ok(
        &format!(
            "socat -t 60 STDIO VSOCK-CONNECT:2:{HOST_PORT} <{FILE} >/tmp/answer && \
             xxhsum -q -H1 /tmp/answer | cut -d' ' -f1 && rm /tmp/answer"
        ),
        LONG,
    )?;
    let (received, found) = host
        .join()
        .map_err(|_| anyhow!("the host's end has failed"))??;
    std::fs::remove_file(&path)?;
    ensure!(
        (received, &found) == (length, &wanted),
        "the guest sent {length} bytes with the checksum {wanted}; \
         the host has {received} bytes with {found}"
    );
    let sent = sum(&pattern(BYTES));
    ensure!(
        guest == sent,
        "the host sent {BYTES} bytes with the checksum {sent}; the guest's have {guest}"
    );
    Ok(format!(
        "{length} bytes to the host, the half close, {BYTES} bytes back and the close, checksums right"
    ))
}

/// The same the other way: a program of the guest's waits for the host, which sends bytes and says
/// that it has no more; the guest answers with their checksum and a file.
fn host_connects(session: &mut Session) -> Result<String> {
    let wanted = session.sh(&format!("xxhsum -q -H1 {FILE} | cut -d' ' -f1"))?;
    session.guest().spawn(
        "listener",
        &format!(
            "socat VSOCK-LISTEN:{GUEST_PORT} SYSTEM:'xxhsum -q -H1 - | cut -c 1-16; cat {FILE}'"
        ),
    )?;
    let mut stream = greet(session, GUEST_PORT)?;
    stream.write_all(&pattern(BYTES))?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .context("the host cannot read to the end of what the guest answers")?;
    let done = session.guest().join("listener", SOON)?;
    ensure!(
        done.status == Status::Exit(0),
        "socat in the guest: {}",
        done.output
    );
    let (said, file) = answer
        .split_at_checked(17)
        .context("the guest's answer is short")?;
    let sent = sum(&pattern(BYTES));
    ensure!(
        said == format!("{sent}\n").as_bytes(),
        "the host sent bytes with the checksum {sent}; the guest says {:?}",
        String::from_utf8_lossy(said)
    );
    let found = sum(file);
    ensure!(
        found == wanted,
        "the guest sent a file with the checksum {wanted}; the host's has {found}"
    );
    Ok(format!(
        "{BYTES} bytes to the guest, the half close, {} bytes back and the close, checksums right",
        file.len()
    ))
}

fn nobody_listens(session: &mut Session) -> Result<String> {
    let said = session.fails(&format!(
        "socat -u OPEN:/dev/null VSOCK-CONNECT:2:{NO_PORT}"
    ))?;
    // Linux takes no notice of a host's refusal (drivers/hv/channel_mgmt.c has no handler for the
    // result of a connect request), and gives up after two seconds.
    ensure!(
        said.contains("Connection timed out"),
        "the guest is told: {said}"
    );
    let mut stream = UnixStream::connect(session.files().path(SOCKETS))?;
    stream.set_read_timeout(Some(LONG))?;
    stream.write_all(format!("CONNECT {NO_PORT}\n").as_bytes())?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => return Err(error.into()),
        _ => {}
    }
    ensure!(
        answer.is_empty(),
        "the host is told {:?}",
        String::from_utf8_lossy(&answer)
    );
    Ok(format!(
        "the guest is told {:?}, the host's connection is closed",
        said.rsplit(": ").next().unwrap_or_default().trim()
    ))
}

/// Waits for a connection.
fn accept(listener: &UnixListener) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let deadline = Instant::now() + LONG;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(LONG))?;
                return Ok(stream);
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error.into()),
            Err(_) if Instant::now() > deadline => bail!("the guest's connection does not come"),
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Connects to a port of the guest's, as soon as somebody listens there.
fn greet(session: &mut Session, port: u32) -> Result<UnixStream> {
    let deadline = Instant::now() + SOON;
    loop {
        let mut stream = UnixStream::connect(session.files().path(SOCKETS))?;
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") && stream.read(&mut byte).is_ok_and(|count| count == 1) {
            line.extend_from_slice(&byte);
        }
        let line = String::from_utf8_lossy(&line).into_owned();
        match line.strip_prefix("OK ") {
            Some(_) => return Ok(stream),
            None if !line.is_empty() => bail!("the host answers {line:?}"),
            None if Instant::now() > deadline => {
                bail!("nobody listens at port {port} of the guest")
            }
            None => session.sh("usleep 50000").map(drop)?,
        }
    }
}
