//! The running VM as `cargo xtask ctl` finds it: a socket below the store, whose clients
//! speak to the VM's control. Files are named as the user names them.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::on_test_machine::{CONTROLLER, access};
use crate::{
    ctl::{self, Place},
    machine::{Control, Reach},
    workspace::Workspace,
};

/// Longest line of a client in bytes.
const LONGEST_LINE: u64 = 1 << 20;

/// Disks of a controller.
const LUNS: u8 = 64;

/// A VM's name, held by its socket.
pub struct Session {
    path: PathBuf,
    listener: UnixListener,
}

impl Session {
    /// Takes the name, or the first free one that begins with it.
    pub fn reserve(workspace: &Workspace, wanted: &str) -> Result<Self> {
        ensure!(
            ctl::is_name(wanted),
            "{wanted:?} is no name for a VM: 1 to 32 letters, digits, `-`, `_` or `.`"
        );
        let place = Place::of(workspace)?;
        for number in 1..100 {
            let name = match number {
                1 => wanted.to_owned(),
                number => format!("{wanted}-{number}"),
            };
            // A socket that nobody listens at was left by one that was killed.
            if place.connect(&name).is_ok() {
                continue;
            }
            let path = place.socket(&name);
            drop(fs::remove_file(&path));
            let listener = place
                .listen(&name)
                .with_context(|| format!("cannot listen at {}", path.display()))?;
            if number > 1 {
                eprintln!("the VM's name is {name}: cargo xtask ctl --vm {name} ...");
            }
            return Ok(Self { path, listener });
        }
        bail!("too many VMs are called {wanted}");
    }

    /// Serves clients until the result is dropped.
    pub fn serve(self, control: Control, ways: Reach, names: Arc<Names>) -> Result<Serving> {
        let listener = Arc::new(self.listener);
        let accepting = listener.clone();
        let clients = Arc::new(Mutex::new(Vec::new()));
        let open = clients.clone();
        let thread = thread::spawn(move || {
            for client in accepting.incoming() {
                let Ok(client) = client else { return };
                if let Ok(copy) = client.try_clone() {
                    lock(&open).push(copy);
                }
                let (control, ways, names) = (control.clone(), ways.clone(), names.clone());
                thread::spawn(move || {
                    // A client that goes early has what it wanted.
                    drop(serve(&client, &control, &ways, &names));
                    drop(client.shutdown(Shutdown::Both));
                });
            }
        });
        Ok(Serving {
            listener,
            path: self.path,
            clients,
            thread: Some(thread),
        })
    }
}

/// Clients are being served.
pub struct Serving {
    listener: Arc<UnixListener>,
    path: PathBuf,
    clients: Arc<Mutex<Vec<UnixStream>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
        // Wakes the thread.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
        for client in lock(&self.clients).drain(..) {
            // It may have gone by itself.
            drop(client.shutdown(Shutdown::Read));
        }
    }
}

/// How files are called inside, and which disk is where.
#[derive(Debug, Default)]
pub struct Names(Mutex<Inside>);

#[derive(Debug, Default)]
struct Inside {
    /// The user's name by the one inside.
    names: BTreeMap<String, String>,
    /// The file inside, by controller and number.
    disks: HashMap<(String, u8), String>,
}

impl Names {
    /// A file is called so inside.
    pub fn add(&self, outside: &Path, inside: &str) {
        let outside = outside.display().to_string();
        lock(&self.0).names.insert(inside.to_owned(), outside);
    }

    /// A disk is in this place.
    pub fn insert(&self, controller: &str, lun: u8, inside: &str) {
        lock(&self.0)
            .disks
            .insert((controller.to_owned(), lun), inside.to_owned());
    }

    /// A disk has left its place; gives its file inside.
    fn remove(&self, controller: &str, lun: u8) -> Option<String> {
        let mut inside = lock(&self.0);
        let file = inside.disks.remove(&(controller.to_owned(), lun))?;
        inside.names.remove(&file);
        Some(file)
    }

    /// The first number without a disk.
    fn free(&self, controller: &str) -> Option<u8> {
        let inside = lock(&self.0);
        (0..LUNS).find(|lun| !inside.disks.contains_key(&(controller.to_owned(), *lun)))
    }

    /// A text with the user's names in it.
    pub fn outside(&self, text: &str) -> String {
        let inside = lock(&self.0);
        inside
            .names
            .iter()
            .fold(text.to_owned(), |text, (inside, outside)| {
                text.replace(inside, outside)
            })
    }
}

/// Serves a client to its end.
fn serve(client: &UnixStream, control: &Control, ways: &Reach, names: &Names) -> io::Result<()> {
    let mut lines = BufReader::new(client);
    loop {
        let mut line = String::new();
        if (&mut lines).take(LONGEST_LINE).read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = answer(&line, control, ways, names);
        let mut client = client;
        client.write_all(format!("{answer}\n").as_bytes())?;
    }
}

/// The answer to a line.
fn answer(line: &str, control: &Control, ways: &Reach, names: &Names) -> Value {
    let request: Value = match serde_json::from_str(line) {
        Ok(request) => request,
        Err(error) => return failure(&format!("that is no command: {error}"), &Value::Null),
    };
    let id = request["id"].clone();
    let result = carry_out(&request, control, ways, names);
    match result {
        Ok(mut answer) => {
            if let Some(answer) = answer.as_object_mut() {
                answer.insert("id".into(), id);
            }
            answer
        }
        Err(error) => failure(&names.outside(&format!("{error:#}")), &id),
    }
}

fn failure(desc: &str, id: &Value) -> Value {
    json!({ "error": { "class": "GenericError", "desc": desc }, "id": id })
}

fn carry_out(request: &Value, control: &Control, ways: &Reach, names: &Names) -> Result<Value> {
    let name = request["execute"]
        .as_str()
        .context("`execute` names no command")?;
    let mut arguments = match &request["arguments"] {
        Value::Null => Map::new(),
        Value::Object(arguments) => arguments.clone(),
        _ => bail!("`arguments` is no object"),
    };
    match name {
        "disk-add" => add_disk(&mut arguments, control, ways, names),
        "disk-eject" => {
            let (controller, lun) = disk_of(&arguments);
            let result = control.run(name, Value::Object(arguments))?;
            if let Some(file) = lun.and_then(|lun| names.remove(&controller, lun)) {
                ways.forget_file(&file);
            }
            Ok(json!({ "return": result }))
        }
        _ => {
            let result = control.run(name, Value::Object(arguments))?;
            Ok(json!({ "return": result }))
        }
    }
}

fn disk_of(arguments: &Map<String, Value>) -> (String, Option<u8>) {
    let controller = arguments.get("controller").and_then(Value::as_str);
    let lun = arguments.get("lun").and_then(Value::as_u64);
    (
        controller.unwrap_or(CONTROLLER).to_owned(),
        lun.and_then(|lun| u8::try_from(lun).ok()),
    )
}

/// Adds a disk, by default in the first free place of the one controller; tells where.
fn add_disk(
    arguments: &mut Map<String, Value>,
    control: &Control,
    ways: &Reach,
    names: &Names,
) -> Result<Value> {
    let (controller, lun) = disk_of(arguments);
    let lun = lun
        .or_else(|| names.free(&controller))
        .with_context(|| format!("{controller} has {LUNS} disks already"))?;
    arguments.insert("controller".into(), controller.clone().into());
    arguments.insert("lun".into(), lun.into());
    let read_only = arguments.get("read-only").and_then(Value::as_bool);
    let inside = match arguments.get("file").and_then(Value::as_str) {
        Some(file) => {
            let file = PathBuf::from(file);
            let inside = ways.file(&file, access(&file, read_only.unwrap_or(false))?)?;
            names.add(&file, &inside);
            arguments.insert("file".into(), inside.clone().into());
            Some(inside)
        }
        None => None,
    };
    match control.run("disk-add", Value::Object(arguments.clone())) {
        Ok(_) => {
            names.insert(&controller, lun, inside.as_deref().unwrap_or_default());
            Ok(json!({ "return": { "controller": controller, "lun": lun } }))
        }
        Err(error) => {
            let error = anyhow::anyhow!(names.outside(&format!("{error:#}")));
            if let Some(inside) = &inside {
                ways.forget_file(inside);
            }
            Err(error)
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves a whole value behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_call_files_as_the_user_does() {
        let names = Names::default();
        names.add(Path::new("my disk.img"), "/user/0-my disk.img");
        names.add(Path::new("other.vhdx"), "/user/1-other.vhdx");
        assert_eq!(
            names.outside("disk /user/0-my disk.img is empty, /user/1-other.vhdx is not"),
            "disk my disk.img is empty, other.vhdx is not"
        );
    }

    #[test]
    fn the_first_place_without_a_disk_is_the_free_one() {
        let names = Names::default();
        assert_eq!(names.free("scsi0"), Some(0));
        names.insert("scsi0", 0, "/user/0-a");
        names.insert("scsi0", 2, "/user/1-b");
        assert_eq!(names.free("scsi0"), Some(1));
        assert_eq!(names.free("scsi1"), Some(0));
        names.insert("scsi0", 1, "/user/2-c");
        assert_eq!(names.free("scsi0"), Some(3));
        assert_eq!(names.remove("scsi0", 0).as_deref(), Some("/user/0-a"));
        assert_eq!(names.free("scsi0"), Some(0));
        assert_eq!(names.remove("scsi0", 0), None);
    }
}
