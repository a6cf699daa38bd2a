//! What the user's computer has and a VM shall reach, and the other way round: files and
//! Unix sockets. On this computer's own KVM they are at hand; into the nested machine they
//! are relayed.

use std::{
    io,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use agent::{protocol::Target, streams::End};
use anyhow::{Context, Result, anyhow};

use super::{
    files::{Access, Files},
    link::Link,
    sockets::Sockets,
};

/// Ways between the user's computer and the machine that runs the VMs. Cheap to clone; all
/// clones are the same.
#[derive(Clone)]
pub struct Reach {
    /// `None` when that is the same computer.
    nested: Option<Arc<Nested>>,
}

struct Nested {
    link: Link,
    files: Mutex<Option<Arc<Files>>>,
    /// Number of the next socket inside.
    next: AtomicU32,
    /// Sockets on the user's computer; they go with the machine.
    doors: Mutex<Vec<Door>>,
}

/// Something that lasts as long as the machine.
enum Door {
    Listener { _door: Listener },
    Sockets { _door: Sockets },
}

impl Reach {
    /// The VMs run on this computer.
    pub fn here() -> Self {
        Self { nested: None }
    }

    /// The VMs run behind this link.
    pub fn nested(link: Link) -> Self {
        Self {
            nested: Some(Arc::new(Nested {
                link,
                files: Mutex::default(),
                next: AtomicU32::new(0),
                doors: Mutex::default(),
            })),
        }
    }

    /// The path by which a VM's monitor finds this file of the user's.
    ///
    /// # Errors
    /// In the nested case the file is opened and locked here, so all that can be wrong with
    /// that is said here.
    pub fn file(&self, file: &Path, access: Access) -> Result<String> {
        let Some(nested) = &self.nested else {
            if access == Access::Create {
                std::fs::File::create(file)
                    .with_context(|| format!("cannot write {}", file.display()))?;
            }
            return text(&std::path::absolute(file)?);
        };
        let files = {
            let mut files = lock(&nested.files);
            match &*files {
                Some(files) => files.clone(),
                None => files.insert(Arc::new(Files::mount(&nested.link)?)).clone(),
            }
        };
        files.share(file, access)
    }

    /// Lets go of a file by its path inside: nothing uses it any more.
    pub fn forget_file(&self, inside: &str) {
        if let Some(nested) = &self.nested
            && let Some(files) = &*lock(&nested.files)
        {
            files.forget(inside);
        }
    }

    /// The path at which a VM's monitor can connect to arrive at this socket of the user's.
    pub fn socket(&self, socket: &Path) -> Result<String> {
        let Some(nested) = &self.nested else {
            return text(&std::path::absolute(socket)?);
        };
        let path = nested.new_socket();
        let socket = socket.to_owned();
        nested.link.listen(&path, move || {
            UnixStream::connect(&socket).and_then(End::of_socket)
        })?;
        Ok(path)
    }

    /// The path that a VM's monitor is to be given for its guest's sockets, if the user's
    /// programs are to find them at `path`: they connect there, and listen at `path_PORT`.
    pub fn guest_sockets(&self, path: &Path) -> Result<String> {
        let path = std::path::absolute(path)?;
        let Some(nested) = &self.nested else {
            return text(&path);
        };
        let inside = nested.new_socket();
        let listener = Listener::start(&path, nested.link.clone(), inside.clone())?;
        let sockets = Sockets::watch(&path, nested.link.clone(), inside.clone())?;
        lock(&nested.doors).extend([
            Door::Listener { _door: listener },
            Door::Sockets { _door: sockets },
        ]);
        Ok(inside)
    }

    /// Connects to a socket that is where the VMs run; `here` is where that is on this
    /// computer.
    pub fn connect(&self, here: &Path, path: &str) -> Result<UnixStream> {
        let Some(nested) = &self.nested else {
            let path = here.join(path);
            return UnixStream::connect(&path)
                .with_context(|| format!("cannot connect to {}", path.display()));
        };
        let (near, far) = UnixStream::pair()?;
        let end = End::of_socket(far)?;
        nested.link.open(Target::Socket(path.to_owned()), end)?;
        Ok(near)
    }
}

impl Nested {
    fn new_socket(&self) -> String {
        format!("socket-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// A socket on the user's computer; its connections arrive at one inside.
struct Listener {
    socket: Arc<UnixListener>,
    path: PathBuf,
    thread: Option<thread::JoinHandle<()>>,
}

impl Listener {
    fn start(path: &Path, link: Link, inside: String) -> Result<Self> {
        let socket = UnixListener::bind(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => anyhow!(
                "there is something at {} already: remove it, or choose another path",
                path.display()
            ),
            _ => anyhow!("cannot listen at {}: {error}", path.display()),
        })?;
        let socket = Arc::new(socket);
        let accepting = socket.clone();
        let thread = thread::spawn(move || {
            for connection in accepting.incoming() {
                let Ok(connection) = connection else { return };
                let (link, inside) = (link.clone(), inside.clone());
                // Nobody inside: the connection is closed.
                thread::spawn(move || {
                    drop(
                        End::of_socket(connection)
                            .map_err(Into::into)
                            .and_then(|end| link.open(Target::Socket(inside), end)),
                    );
                });
            }
        });
        Ok(Self {
            socket,
            path: path.to_owned(),
            thread: Some(thread),
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Wakes the thread.
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
        drop(std::fs::remove_file(&self.path));
    }
}

fn text(path: &Path) -> Result<String> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| anyhow!("the path {} is no UTF-8 text", path.display()))
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
