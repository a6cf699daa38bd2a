//! Files and sockets of this computer, as VMs on the machine reach them. No guest takes
//! part.

#[cfg(target_os = "linux")]
pub use self::linux::TESTS;

use super::Test;

/// There are no machines.
#[cfg(not(target_os = "linux"))]
pub const TESTS: &[Test] = &[];

#[cfg(target_os = "linux")]
mod linux {
    use std::{
        fs,
        io::{Read, Write},
        net::Shutdown,
        os::unix::net::{UnixListener, UnixStream},
        thread,
        time::Duration,
    };

    use anyhow::{Context, Result, ensure};

    use super::Test;
    use crate::{
        machine::{Access, Kind},
        suite::{Needs, Stand},
    };

    /// Tests of the ways between this computer and the machine.
    pub const TESTS: &[Test] = &[
        Test {
            name: "machine/files",
            needs: Needs::HyperV,
            run: files,
        },
        Test {
            name: "machine/sockets",
            needs: Needs::HyperV,
            run: sockets,
        },
    ];

    /// More than one window of a stream, and no multiple of anything.
    const LENGTH: usize = 5 * (1 << 20) + 12345;

    fn pattern() -> Vec<u8> {
        (0..LENGTH as u32)
            .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect()
    }

    fn files(stand: &mut Stand) -> Result<String> {
        let machine = stand.machine();
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("a disk.img");
        fs::write(&file, pattern())?;
        let inside = machine.share(&file, Access::Write)?;
        ensure!(machine.read(&inside)? == pattern(), "what is read differs");
        machine.write(&inside, "short")?;
        ensure!(fs::read(&file)? == b"short", "it was not written anew");
        if machine.kind() != Kind::Nested {
            return Ok("read and written in place".into());
        }

        let again = machine.share(&file, Access::Read);
        let refused = again.err().context("a locked file was shared twice")?;
        ensure!(
            refused.to_string() == format!("disk {} is in use by another process", file.display()),
            "{refused}"
        );
        let other = directory.path().join("read only");
        fs::write(&other, "mine")?;
        let inside = machine.share(&other, Access::Read)?;
        ensure!(
            machine.write(&inside, "yours").is_err(),
            "a file that is only to be read was written"
        );
        ensure!(fs::read(&other)? == b"mine", "it was changed");
        ensure!(
            machine.read("/user/../user/no such file").is_err(),
            "there is a file that was not shared"
        );
        Ok(format!(
            "{LENGTH} bytes read, written anew through the nested machine; locked against others"
        ))
    }

    fn sockets(stand: &mut Stand) -> Result<String> {
        let machine = stand.machine();
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("echo");
        let listener = UnixListener::bind(&path)?;
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                thread::spawn(move || echo(connection));
            }
        });
        let inside = machine.reach(&path)?;
        let there_and_back = machine.connect(&inside)?;
        exchange(&there_and_back)?;

        // A door of this computer that leads to the same echo, by way of inside.
        let door = directory.path().join("door");
        let guest = machine.guest_sockets(&door)?;
        if machine.kind() == Kind::Nested {
            let port = directory.path().join("door_5000");
            let answering = UnixListener::bind(&port)?;
            let twin = format!("{guest}_5000");
            // The twin comes when the socket has been noticed.
            let mut near = retry(|| machine.connect(&twin))?;
            let (mut far, _) = answering.accept()?;
            far.write_all(b"hello")?;
            drop(far);
            let mut got = String::new();
            near.read_to_string(&mut got)?;
            ensure!(got == "hello", "the twin said {got:?}");
            fs::remove_file(&port)?;
            retry(|| {
                let gone = machine.connect(&twin).is_err();
                ensure!(gone, "the twin stays when the socket is gone");
                Ok(())
            })?;
            // Nobody listens inside: closed, and nothing else.
            let mut nobody = UnixStream::connect(&door)?;
            nobody.set_read_timeout(Some(Duration::from_secs(20)))?;
            ensure!(nobody.read(&mut [0])? == 0, "somebody answered");
        }
        Ok(format!(
            "{LENGTH} bytes through a stream and back; sockets for a guest come and go"
        ))
    }

    fn echo(connection: UnixStream) {
        let (mut from, mut to) = (&connection, &connection);
        // A stream that breaks off is seen by the other end.
        drop(std::io::copy(&mut from, &mut to));
        drop(connection.shutdown(Shutdown::Write));
    }

    fn exchange(connection: &UnixStream) -> Result<()> {
        connection.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut writer = connection.try_clone()?;
        let sending = thread::spawn(move || {
            writer.write_all(&pattern())?;
            writer.shutdown(Shutdown::Write)
        });
        let (mut got, mut reader) = (Vec::new(), connection);
        reader.read_to_end(&mut got)?;
        drop(sending.join());
        ensure!(
            got == pattern(),
            "{} bytes came back, not the same",
            got.len()
        );
        Ok(())
    }

    /// Tries for up to ten seconds.
    fn retry<T>(attempt: impl Fn() -> Result<T>) -> Result<T> {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            match attempt() {
                Err(_) if std::time::Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(20));
                }
                result => return result,
            }
        }
    }
}
