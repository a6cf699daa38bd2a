//! The user's own network for a guest: passt, which needs no privileges, and its forwarded
//! ports.

use std::{
    fs,
    io::{self, Read},
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::options::Forward;
use crate::machine::process;

/// Longest time until passt listens; usually half a second.
const UP: Duration = Duration::from_secs(20);

/// Largest packet in a frame: the network adapter's.
const MTU: u16 = 1500;

/// A running passt. Dropping it ends it.
pub struct Passt {
    child: Child,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Passt {
    /// Starts it and waits until it listens.
    pub fn start(program: &Path, ports: &[Forward]) -> Result<Self> {
        check_ports(ports)?;
        let directory = tempfile::tempdir().context("cannot make a scratch directory")?;
        let (socket, log) = (
            directory.path().join("passt.sock"),
            directory.path().join("passt.log"),
        );
        let mut words = vec![program.display().to_string()];
        words.extend(arguments(&socket, &log, ports, is_root()));
        let mut words = process::tied_to_us(words).into_iter();
        let child = Command::new(words.next().context("passt has no name")?)
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut passt = Self {
            child,
            socket,
            _directory: directory,
        };
        passt.wait()?;
        Ok(passt)
    }

    /// The socket that it listens at.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    fn wait(&mut self) -> Result<()> {
        let deadline = Instant::now() + UP;
        while !self.socket.exists() {
            if self.child.try_wait()?.is_some() {
                let mut said = String::new();
                if let Some(mut stderr) = self.child.stderr.take() {
                    stderr.read_to_string(&mut said)?;
                }
                bail!("passt does not start: {}", reason(&said));
            }
            if Instant::now() > deadline {
                bail!("passt does not listen after {} s", UP.as_secs());
            }
            // It announces nothing that could be waited for.
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It ends by itself when its client goes; it may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn arguments(socket: &Path, log: &Path, ports: &[Forward], is_root: bool) -> Vec<String> {
    let mut words: Vec<String> = [
        "--foreground",
        "--one-off",
        "--socket",
        &socket.display().to_string(),
        "--log-file",
        &log.display().to_string(),
        // What it announces by DHCP; without it, more than an adapter takes.
        "--mtu",
        &MTU.to_string(),
    ]
    .map(str::to_owned)
    .into();
    // It would become `nobody`, who may not use our directory.
    if is_root {
        words.extend(["--runas".into(), "0".into()]);
    }
    for port in ports {
        let kind = if port.udp { "-u" } else { "-t" };
        let spec = format!("{}/{}:{}", port.address, port.host, port.guest);
        words.extend([kind.into(), spec]);
    }
    words
}

/// passt's last line, and what to do about the one that is met most often.
fn reason(said: &str) -> String {
    let line = said.trim().lines().next_back().unwrap_or_default();
    if line.is_empty() {
        "it gives no reason".into()
    } else if said.contains("user namespace") {
        format!(
            "{line}; it needs user namespaces, which are switched off here (or leave the network out: --net none)"
        )
    } else {
        line.to_owned()
    }
}

/// passt itself says nothing when a port is taken.
pub fn check_ports(ports: &[Forward]) -> Result<()> {
    for (index, port) in ports.iter().enumerate() {
        let at = (port.address, port.host);
        let taken = match port.udp {
            true => UdpSocket::bind(at).err(),
            false => TcpListener::bind(at).err(),
        };
        let twice = ports
            .iter()
            .take(index)
            .any(|other| (other.address, other.host, other.udp) == (at.0, at.1, port.udp));
        let number = port.host;
        match taken {
            _ if twice => bail!("port {number} is forwarded twice"),
            None => {}
            Some(error) if error.kind() == io::ErrorKind::AddrInUse => {
                bail!(
                    "port {number} is in use by another program: choose another one for --forward"
                )
            }
            Some(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                bail!(
                    "port {number} is for the superuser only: choose one above 1023 for --forward"
                )
            }
            Some(error) => bail!("port {number} of {} cannot be used: {error}", port.address),
        }
    }
    Ok(())
}

fn is_root() -> bool {
    // A system without it has other things missing.
    fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| status.lines().any(|line| line.starts_with("Uid:\t0\t")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(text: &str) -> Forward {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_in_use_is_one_sentence() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = check_ports(&[forward(&format!("{port}:80"))]).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("port {port} is in use by another program: choose another one for --forward")
        );
        let free = {
            let passing = TcpListener::bind("127.0.0.1:0").unwrap();
            passing.local_addr().unwrap().port()
        };
        let once = forward(&format!("{free}:80"));
        check_ports(&[once]).unwrap();
        let twice = check_ports(&[once, once]).unwrap_err();
        assert_eq!(twice.to_string(), format!("port {free} is forwarded twice"));
    }

    #[test]
    fn passt_is_told_of_ports_and_stays_root_only_if_we_are() {
        let ports = [forward("8080:80"), forward("0.0.0.0:53:5353/udp")];
        let words = arguments(Path::new("/s"), Path::new("/l"), &ports, false).join(" ");
        assert!(words.contains("--socket /s --log-file /l --mtu 1500"));
        assert!(words.ends_with("-t 127.0.0.1/8080:80 -u 0.0.0.0/53:5353"));
        assert!(!words.contains("runas"));
        let words = arguments(Path::new("/s"), Path::new("/l"), &[], true).join(" ");
        assert!(words.ends_with("--runas 0"));
    }

    #[test]
    fn what_passt_said_last_is_the_reason() {
        assert_eq!(reason("a\nb\n"), "b");
        assert_eq!(reason(""), "it gives no reason");
        assert!(reason("Couldn't create user namespace: x").contains("--net none"));
    }
}
