//! `cargo xtask ctl`: commands for a running VM.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Map, Value, json};

use crate::{run::Disk, workspace::Workspace};

/// Options of `ctl`.
#[derive(Debug, Args)]
pub struct Options {
    /// Name of the VM, if several run
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// What the VM is told.
#[derive(Debug, Subcommand)]
enum Command {
    /// Name the VMs that run
    List,
    /// Ask the guest to power off
    Shutdown {
        /// The guest's programs cannot object
        #[arg(long)]
        force: bool,
    },
    /// Ask the guest to restart
    Reboot {
        /// The guest's programs cannot object
        #[arg(long)]
        force: bool,
    },
    /// Ask the guest to hibernate
    Hibernate,
    /// End the VM at once
    Quit,
    /// Halt the virtual processors
    Stop,
    /// Let the virtual processors run again
    Cont,
    /// Whether the VM runs, and how far VMBus is
    Status,
    /// Whether the guest answers heartbeats
    Heartbeat,
    /// Have the guest set its clock by this computer's
    TimeSync,
    /// Move the clock that the guest is told
    TimeStep {
        /// How far; below zero is back
        #[arg(allow_negative_numbers = true)]
        milliseconds: i64,
    },
    /// Key-value pairs
    #[command(subcommand)]
    Kvp(Kvp),
    /// Disks
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Plug the network cable in or out
    Link {
        /// Which
        state: LinkState,
        /// The adapter
        #[arg(long, value_name = "NAME", default_value = "net0")]
        nic: String,
    },
    /// Set the largest packet of the network adapter
    Mtu {
        /// Bytes
        bytes: u16,
        /// The adapter
        #[arg(long, value_name = "NAME", default_value = "net0")]
        nic: String,
    },
    /// Set how much memory the guest should have
    Balloon {
        /// MiB
        mib: u32,
    },
    /// Give the guest more memory than it started with
    HotAdd {
        /// MiB
        mib: u32,
    },
    /// Take a device away
    Rescind {
        /// Its name
        device: String,
    },
    /// Offer a device again that was taken away: at once, or when the guest has let go of it
    Offer {
        /// Its name
        device: String,
    },
    /// Make something go wrong, as `fault scsi0 slow-disk lun=0 milliseconds=500`
    Fault {
        /// The device
        device: String,
        /// What: drop, delay, truncate, extend, transaction-id, spoil, corrupt-ring, stall, rescind,
        /// message, slow-disk, failing-disk, torn-writes or lossy-network
        kind: String,
        /// How, as `packets=3` or `direction=to-host`
        #[arg(value_name = "NAME=VALUE")]
        settings: Vec<String>,
    },
    /// End the faults of a device, or all
    FaultsClear {
        /// The device
        device: Option<String>,
    },
    /// What devices and channels have counted
    Counters {
        /// The device; without it all
        device: Option<String>,
    },
    /// The devices and their channels
    Devices,
    /// How often the virtual processors have left the guest, by reason
    Exits,
    /// Any command by its own name, with arguments as JSON
    Execute {
        /// The command
        name: String,
        /// Its arguments
        #[arg(default_value = "{}")]
        arguments: String,
    },
}

/// Commands for key-value pairs.
#[derive(Debug, Subcommand)]
enum Kvp {
    /// Give the guest a value
    Set {
        /// The key
        key: String,
        /// The value
        value: String,
        /// The pool: external, guest, auto, auto-external or auto-internal
        #[arg(long, default_value = "external")]
        pool: String,
    },
    /// Show one of the guest's values
    Get {
        /// The key
        key: String,
        /// The pool
        #[arg(long, default_value = "auto")]
        pool: String,
    },
    /// Show all values of a pool
    List {
        /// The pool
        #[arg(long, default_value = "auto")]
        pool: String,
    },
    /// Take a value away
    Delete {
        /// The key
        key: String,
        /// The pool
        #[arg(long, default_value = "external")]
        pool: String,
    },
}

/// Commands for disks.
#[derive(Debug, Subcommand)]
enum DiskCommand {
    /// Add one
    Add {
        /// The file; with `,ro` behind it read-only
        #[arg(value_name = "FILE[,ro]")]
        disk: Disk,
        /// Its number on the controller; without it the first free one
        #[arg(long)]
        lun: Option<u8>,
    },
    /// Take one out
    Eject {
        /// Its number on the controller
        lun: u8,
        /// Also when the guest has locked the medium into the drive
        #[arg(long)]
        force: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LinkState {
    /// The cable is in
    Up,
    /// The cable is out
    Down,
}

/// Carries it out; a refusal is one sentence.
pub fn run(options: &Options) -> Result<ExitCode> {
    let place = Place::of(&Workspace::find()?)?;
    if matches!(options.command, Command::List) {
        for name in place.running() {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (name, arguments) = options.command.words()?;
    let vm = choose(&place.running(), options.vm.as_deref())?;
    let result = place.ask(&vm, &name, arguments)?;
    if options.json {
        println!("{result}");
    } else {
        print!("{}", show(&result));
    }
    Ok(ExitCode::SUCCESS)
}

impl Command {
    /// The command as the control knows it, with its arguments.
    fn words(&self) -> Result<(String, Value)> {
        let shutdown =
            |kind: &str, force: bool| ("shutdown", json!({ "kind": kind, "force": force }));
        let (name, arguments) = match self {
            Self::List => bail!("`list` is for nobody in particular"),
            Self::Shutdown { force } => shutdown("power-off", *force),
            Self::Reboot { force } => shutdown("reboot", *force),
            Self::Hibernate => shutdown("hibernate", false),
            Self::Quit => ("quit", json!({})),
            Self::Stop => ("stop", json!({})),
            Self::Cont => ("cont", json!({})),
            Self::Status => ("query-status", json!({})),
            Self::Heartbeat => ("heartbeat", json!({})),
            Self::TimeSync => ("time-sync", json!({})),
            Self::TimeStep { milliseconds } => {
                ("time-step", json!({ "milliseconds": milliseconds }))
            }
            Self::Kvp(Kvp::Set { key, value, pool }) => (
                "kvp-set",
                json!({ "key": key, "value": value, "pool": pool }),
            ),
            Self::Kvp(Kvp::Get { key, pool }) => ("kvp-get", json!({ "key": key, "pool": pool })),
            Self::Kvp(Kvp::List { pool }) => ("kvp-list", json!({ "pool": pool })),
            Self::Kvp(Kvp::Delete { key, pool }) => {
                ("kvp-delete", json!({ "key": key, "pool": pool }))
            }
            Self::Disk(DiskCommand::Add { disk, lun }) => {
                // The VM's process has a working directory of its own.
                let file = std::path::absolute(&disk.file)?;
                let file = file.to_str().context("the path is no UTF-8 text")?;
                let mut arguments = json!({ "file": file, "read-only": disk.read_only });
                if let (Some(lun), Some(arguments)) = (lun, arguments.as_object_mut()) {
                    arguments.insert("lun".into(), (*lun).into());
                }
                ("disk-add", arguments)
            }
            Self::Disk(DiskCommand::Eject { lun, force }) => (
                "disk-eject",
                json!({ "controller": "scsi0", "lun": lun, "force": force }),
            ),
            Self::Link { state, nic } => (
                "link",
                json!({ "nic": nic, "up": matches!(state, LinkState::Up) }),
            ),
            Self::Mtu { bytes, nic } => ("mtu", json!({ "nic": nic, "mtu": bytes })),
            Self::Balloon { mib } => ("balloon", json!({ "target-mib": mib })),
            Self::HotAdd { mib } => ("hot-add", json!({ "mib": mib })),
            Self::Rescind { device } => ("rescind", json!({ "device": device })),
            Self::Offer { device } => ("offer", json!({ "device": device })),
            Self::Fault {
                device,
                kind,
                settings,
            } => ("fault", fault(device, kind, settings)?),
            Self::FaultsClear { device } => ("faults-clear", of_device(device.as_deref())),
            Self::Counters { device } => ("query-counters", of_device(device.as_deref())),
            Self::Devices => ("query-devices", json!({})),
            Self::Exits => ("query-exits", json!({})),
            Self::Execute { name, arguments } => {
                let arguments = serde_json::from_str(arguments)
                    .with_context(|| format!("{arguments:?} is no JSON"))?;
                (name.as_str(), arguments)
            }
        };
        Ok((name.to_owned(), arguments))
    }
}

fn of_device(device: Option<&str>) -> Value {
    match device {
        Some(device) => json!({ "device": device }),
        None => json!({}),
    }
}

fn fault(device: &str, kind: &str, settings: &[String]) -> Result<Value> {
    let mut arguments = Map::new();
    arguments.insert("device".into(), device.into());
    arguments.insert("kind".into(), kind.into());
    for setting in settings {
        let (name, value) = setting
            .split_once('=')
            .with_context(|| format!("{setting:?} is not of the form NAME=VALUE"))?;
        let value = match value.parse::<u64>() {
            Ok(number) => number.into(),
            Err(_) => Value::from(value),
        };
        arguments.insert(name.into(), value);
    }
    Ok(arguments.into())
}

/// The VM that is meant.
fn choose(running: &[String], wanted: Option<&str>) -> Result<String> {
    match (running, wanted) {
        (_, Some(wanted)) if running.iter().any(|name| name == wanted) => Ok(wanted.to_owned()),
        ([], Some(wanted)) => bail!("no VM is called {wanted}, and none runs"),
        (_, Some(wanted)) => bail!(
            "no VM is called {wanted}; those that run: {}",
            running.join(", ")
        ),
        ([], None) => bail!("no VM runs: start one by `cargo xtask run`"),
        ([only], None) => Ok(only.clone()),
        (_, None) => bail!(
            "several VMs run, so add --vm NAME with one of {}",
            running.join(", ")
        ),
    }
}

/// An answer for people: one `name: value` a line, nested ones indented; nothing for nothing.
fn show(value: &Value) -> String {
    let mut text = String::new();
    write_value(value, 0, &mut text);
    text
}

fn write_value(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match value {
                    Value::Object(inner) if inner.is_empty() => {}
                    Value::Array(inner) if inner.is_empty() => {}
                    Value::Null => {}
                    Value::Object(_) | Value::Array(_) => {
                        text.push_str(&format!("{indent}{name}:\n"));
                        write_value(value, depth + 1, text);
                    }
                    value => text.push_str(&format!("{indent}{name}: {}\n", plain(value))),
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                if item.is_object() && depth == 0 && index > 0 {
                    text.push('\n');
                }
                write_value(item, depth, text);
            }
        }
        Value::Null => {}
        value => text.push_str(&format!("{indent}{}\n", plain(value))),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    }
}

/// Whether a VM can be called so; it is a file's name.
pub fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=32).contains(&name.len()) && !name.starts_with('.') && name.chars().all(allowed)
}

/// The directory with the sockets of the VMs that run.
pub struct Place {
    directory: PathBuf,
    /// Leads to it by a short name: the path of a socket has at most 107 bytes.
    #[cfg(target_os = "linux")]
    short: fs::File,
}

impl Place {
    /// Makes it if need be.
    pub fn of(workspace: &Workspace) -> Result<Self> {
        Self::at(&workspace.store().join("run"))
    }

    fn at(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot use {}", directory.display()))?;
        Ok(Self {
            #[cfg(target_os = "linux")]
            short: fs::File::open(directory)?,
            directory: directory.to_owned(),
        })
    }

    /// A VM's socket.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.sock"))
    }

    /// The names of those that answer.
    fn running(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let file = entry.ok()?.file_name().into_string().ok()?;
                let name = file.strip_suffix(".sock")?;
                self.answers(name).then(|| name.to_owned())
            })
            .collect();
        names.sort();
        names
    }

    /// Has a command carried out.
    fn ask(&self, vm: &str, name: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": name, "arguments": arguments, "id": 1 });
        let answer = self.exchange(vm, &format!("{line}\n"))?;
        if answer.trim().is_empty() {
            bail!("the VM {vm} ended before it answered `{name}`");
        }
        let answer: Value = serde_json::from_str(&answer).context("the answer is no JSON")?;
        match answer.get("return") {
            Some(result) => Ok(result.clone()),
            None => bail!(
                "{}",
                answer["error"]["desc"]
                    .as_str()
                    .unwrap_or("it was refused without a reason")
            ),
        }
    }
}

#[cfg(target_os = "linux")]
mod sockets {
    use std::os::{
        fd::AsRawFd,
        unix::net::{UnixListener, UnixStream},
    };

    use super::*;

    /// How a VM's end is seen.
    const GONE: [io::ErrorKind; 2] = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];

    impl Place {
        fn short(&self, name: &str) -> PathBuf {
            format!("/proc/self/fd/{}/{name}.sock", self.short.as_raw_fd()).into()
        }

        /// Connects to a VM.
        pub fn connect(&self, name: &str) -> io::Result<UnixStream> {
            UnixStream::connect(self.short(name))
        }

        /// Listens in the name of a VM.
        pub fn listen(&self, name: &str) -> io::Result<UnixListener> {
            UnixListener::bind(self.short(name))
        }

        pub(super) fn answers(&self, name: &str) -> bool {
            self.connect(name).is_ok()
        }

        pub(super) fn exchange(&self, vm: &str, line: &str) -> io::Result<String> {
            let mut stream = self.connect(vm)?;
            let mut answer = String::new();
            let exchanged = stream
                .write_all(line.as_bytes())
                .and_then(|()| BufReader::new(stream).read_line(&mut answer));
            match exchanged {
                // It has gone meanwhile: no answer, as when it goes a moment later.
                Err(error) if GONE.contains(&error.kind()) => Ok(String::new()),
                exchanged => exchanged.map(|_| answer),
            }
        }
    }
}

/// No VM runs on other systems.
#[cfg(not(target_os = "linux"))]
impl Place {
    fn answers(&self, _: &str) -> bool {
        false
    }

    fn exchange(&self, _: &str, _: &str) -> io::Result<String> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn words(line: &str) -> (String, Value) {
        Line::try_parse_from(std::iter::once("ctl").chain(line.split_whitespace()))
            .unwrap()
            .options
            .command
            .words()
            .unwrap()
    }

    #[test]
    fn every_command_is_one_that_the_control_knows_with_arguments_that_it_takes() {
        for line in [
            "shutdown",
            "shutdown --force",
            "reboot",
            "hibernate",
            "quit",
            "stop",
            "cont",
            "status",
            "heartbeat",
            "time-sync",
            "time-step -1500",
            "kvp set colour blue",
            "kvp get OSName",
            "kvp list --pool guest",
            "kvp delete colour",
            "disk eject 1 --force",
            "link down",
            "link up --nic net1",
            "mtu 1400",
            "balloon 128",
            "hot-add 64",
            "rescind net0",
            "offer net0",
            "fault net0 drop packets=3 direction=to-host",
            "fault scsi0 slow-disk lun=0 milliseconds=500",
            "fault kvp message what=wrong-id",
            "faults-clear",
            "faults-clear net0",
            "counters",
            "counters scsi0",
            "devices",
            "exits",
            "execute query-balloon",
        ] {
            let (name, arguments) = words(line);
            let arguments = arguments.as_object().unwrap().clone();
            let parsed = vmm::control::Command::parse(&name, arguments);
            assert!(parsed.is_ok(), "{line}: {parsed:?}");
        }
    }

    #[test]
    fn a_disk_is_named_by_its_whole_path() {
        let (name, arguments) = words("disk add some.img,ro --lun 3");
        assert_eq!(name, "disk-add");
        assert!(Path::new(arguments["file"].as_str().unwrap()).is_absolute());
        assert_eq!(arguments["read-only"], true);
        assert_eq!(arguments["lun"], 3);
        assert!(words("disk add some.img").1.get("lun").is_none());
    }

    #[test]
    fn which_vm_is_meant_or_why_none() {
        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let refusal = |list: &[&str], wanted| choose(&names(list), wanted).unwrap_err().to_string();
        assert_eq!(choose(&names(&["hello"]), None).unwrap(), "hello");
        assert_eq!(choose(&names(&["a", "b"]), Some("b")).unwrap(), "b");
        assert_eq!(
            refusal(&[], None),
            "no VM runs: start one by `cargo xtask run`"
        );
        assert_eq!(refusal(&[], Some("x")), "no VM is called x, and none runs");
        assert_eq!(
            refusal(&["a"], Some("x")),
            "no VM is called x; those that run: a"
        );
        assert_eq!(
            refusal(&["a", "b"], None),
            "several VMs run, so add --vm NAME with one of a, b"
        );
    }

    #[test]
    fn answers_are_lines_that_people_read() {
        let devices = json!([
            { "name": "net0", "offered": true, "channels": [{ "channel": 3, "vp": 0 }] },
            { "name": "kvp", "offered": false, "channels": [] },
        ]);
        assert_eq!(
            show(&devices),
            "channels:\n  channel: 3\n  vp: 0\nname: net0\noffered: true\n\nname: kvp\noffered: false\n"
        );
        assert_eq!(show(&json!({})), "");
        assert_eq!(show(&json!("text")), "text\n");
    }

    #[test]
    fn names_are_names_of_files() {
        for name in ["hello", "a-b_c.2"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", ".hidden", "a/b", "a b", &"x".repeat(33)] {
            assert!(!is_name(name), "{name}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn only_those_that_answer_run_and_long_paths_do_not_matter() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("x".repeat(120));
        let place = Place::at(&deep).unwrap();
        assert!(place.running().is_empty());
        let listener = place.listen("hello").unwrap();
        drop(place.listen("killed").unwrap());
        assert_eq!(place.running(), ["hello"]);
        drop(listener);
        assert!(place.running().is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn refusals_come_as_the_control_words_them() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::at(directory.path()).unwrap();
        let listener = place.listen("vm").unwrap();
        let answering = std::thread::spawn(move || {
            for answer in [
                r#"{"return":{"x":1},"id":1}"#,
                r#"{"error":{"class":"GenericError","desc":"disk x is empty"},"id":1}"#,
            ] {
                let (mut client, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&client).read_line(&mut line).unwrap();
                assert!(line.contains("query-exits"));
                writeln!(client, "{answer}").unwrap();
            }
            drop(listener.accept().unwrap());
        });
        let ask = || place.ask("vm", "query-exits", json!({}));
        assert_eq!(ask().unwrap()["x"], 1);
        assert_eq!(ask().unwrap_err().to_string(), "disk x is empty");
        let ended = ask().unwrap_err().to_string();
        assert_eq!(ended, "the VM vm ended before it answered `query-exits`");
        answering.join().unwrap();
    }
}
