//! One boot of Linux with its devices: how tests find what they judge.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::files::Files;
use crate::referee::{Done, Guest, Status};

/// Longest wait for something that happens at once.
pub const SOON: Duration = Duration::from_secs(30);

/// Longest wait for something that takes as long as there is data.
pub const LONG: Duration = Duration::from_secs(120);

/// A guest, and what its host gives it.
pub struct Session<'a> {
    guest: Guest,
    files: Files<'a>,
}

impl<'a> Session<'a> {
    /// Of a guest that has come up.
    pub fn new(guest: Guest, files: Files<'a>) -> Self {
        Self { guest, files }
    }

    /// What the host gives it.
    pub fn files(&self) -> &Files<'a> {
        &self.files
    }

    /// The guest.
    pub fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }

    /// Whether the guest can be used further.
    pub fn answers(&mut self) -> bool {
        self.guest.run("true", SOON).is_ok()
    }

    /// Runs a command that must succeed.
    pub fn sh(&mut self, command: &str) -> Result<String> {
        self.guest.sh(command)
    }

    /// Runs a command that must fail, within its time limit; gives what it printed.
    pub fn fails(&mut self, command: &str) -> Result<String> {
        let Done { status, output } = self.guest.run(command, LONG)?;
        ensure!(
            matches!(status, Status::Exit(1..)),
            "in the guest, `{command}` should fail, but it ended with {status:?}:\n{output}"
        );
        Ok(output)
    }

    /// Waits until a condition of the shell holds.
    pub fn until(&mut self, condition: &str) -> Result<()> {
        self.guest.until(condition, SOON)
    }

    /// Runs a command of the control stream.
    pub fn ctl(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.guest.vm().ctl(command, arguments)
    }

    /// Asks a query again and again until its answer is as wanted.
    pub fn ctl_until(
        &mut self,
        command: &str,
        arguments: Value,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + LONG;
        loop {
            let answer = self.ctl(command, arguments.clone())?;
            if wanted(&answer) {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                bail!("`{command}` still says {answer} after {} s", LONG.as_secs());
            }
            // Time for the guest; the loop's condition is the answer's.
            self.sh("usleep 100000")?;
        }
    }

    /// The state of a device, as the host sees it.
    pub fn device(&mut self, name: &str) -> Result<Value> {
        let devices = self.ctl("query-devices", json!({}))?;
        devices
            .as_array()
            .and_then(|list| list.iter().find(|device| device["name"] == name))
            .cloned()
            .ok_or_else(|| anyhow!("the host has no device {name}: {devices}"))
    }

    /// A device's directory in Linux's sysfs, once the bus has made it.
    pub fn directory(&mut self, device: &str) -> Result<String> {
        let instance = self.device(device)?["instance"]
            .as_str()
            .context("a device has an instance GUID")?
            .trim_matches(['{', '}'])
            .to_lowercase();
        let directory = format!("/sys/bus/vmbus/devices/{instance}");
        self.until(&format!("[ -e {directory} ]"))?;
        Ok(directory)
    }

    /// Waits until Linux has bound a device; gives the driver's name.
    pub fn driver(&mut self, device: &str) -> Result<String> {
        let directory = self.directory(device)?;
        self.until(&format!("[ -e {directory}/driver ]"))?;
        self.sh(&format!("basename $(readlink {directory}/driver)"))
    }

    /// Waits for a disk; gives its name below /dev.
    pub fn disk(&mut self, controller: &str, lun: u8) -> Result<String> {
        let directory = self.directory(controller)?;
        let found = format!("{directory}/host*/target*/*:0:0:{lun}/block/*");
        self.until(&format!("[ -e {found} ]"))?;
        self.sh(&format!("basename {found}"))
    }

    /// Waits for a network interface; gives its name.
    pub fn interface(&mut self, device: &str) -> Result<String> {
        let directory = self.directory(device)?;
        self.until(&format!("[ -e {directory}/net/* ]"))?;
        self.sh(&format!("basename {directory}/net/*"))
    }

    /// Moves a network interface to a network namespace of its own, which lives as long as the process whose number is in
    /// `/tmp/NAME.pid`.
    pub fn isolate(&mut self, interface: &str, name: &str) -> Result<()> {
        let pid = format!("$(cat /tmp/{name}.pid)");
        self.sh(&format!(
            "{{ unshare -n sleep 100000 </dev/null >/dev/null 2>&1 & echo $! >/tmp/{name}.pid; }}"
        ))?;
        self.until(&format!(
            "[ $(readlink /proc/{pid}/ns/net) != $(readlink /proc/self/ns/net) ]"
        ))?;
        self.sh(&format!("ip link set {interface} netns {pid}"))
            .map(drop)
    }

    /// What Linux says of a processor that stood still: it looks for a timer that did not come.
    pub fn stall(&mut self) -> Option<String> {
        let said = "dmesg | grep -m 1 -E 'rcu: .*(stall|starved|timer wakeup)'";
        let done = self.guest.run(said, SOON).ok()?;
        (done.status == Status::Exit(0)).then_some(done.output)
    }

    /// For the report of a failure: what the kernel said last, if it can still be asked, and before it what it said of trouble.
    pub fn report(&mut self) -> String {
        let said = "dmesg | grep -E 'rcu|stall|hung|BUG|WARNING' | tail -n 20; dmesg | tail -n 30";
        match self.guest.run(said, SOON) {
            Ok(done) => done.output,
            Err(_) => self.guest.vm().last_words(),
        }
    }
}
