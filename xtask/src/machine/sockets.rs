//! The user's sockets for a guest's connections, `PATH_PORT`, brought into the nested
//! machine: each has its twin there for as long as it is there.

use std::{
    collections::HashMap,
    fs,
    io::{PipeWriter, pipe},
    mem::MaybeUninit,
    os::{
        fd::OwnedFd,
        unix::{fs::FileTypeExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    thread,
};

use agent::{protocol::ListenerId, streams::End};
use anyhow::{Context, Result};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::inotify::{self, CreateFlags, Reader, WatchFlags},
};

use super::link::Link;

/// Watches a directory for such sockets. Ends when dropped.
pub struct Sockets {
    stop: Option<PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
}

/// The twins that there are.
struct Twins {
    link: Link,
    directory: PathBuf,
    /// How the names of the sockets begin.
    prefix: String,
    /// How the paths of their twins begin.
    inside: String,
    there: HashMap<String, ListenerId>,
}

impl Sockets {
    /// Brings in the sockets that are named like `path` with `_` and something behind it,
    /// those that are there and those that come; `inside` stands for `path` in there.
    pub fn watch(path: &Path, link: Link, inside: String) -> Result<Self> {
        let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut twins = Twins {
            link,
            directory,
            prefix: format!("{name}_"),
            inside,
            there: HashMap::new(),
        };
        let watched = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let changes =
            WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
        inotify::add_watch(&watched, &twins.directory, changes)
            .with_context(|| format!("cannot watch {}", twins.directory.display()))?;
        twins.look();
        let (stopped, stop) = pipe()?;
        let stopped = OwnedFd::from(stopped);
        let thread = thread::spawn(move || {
            while wait(&watched, &stopped) {
                twins.look();
            }
        });
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Waits for a change of the directory; `false` when it is to be no more.
fn wait(watched: &OwnedFd, stopped: &OwnedFd) -> bool {
    let mut both = [
        PollFd::new(watched, PollFlags::IN),
        PollFd::new(stopped, PollFlags::IN),
    ];
    match poll(&mut both, None) {
        Err(rustix::io::Errno::INTR) => return true,
        Err(_) => return false,
        Ok(_) => {}
    }
    if both.iter().skip(1).any(|stop| !stop.revents().is_empty()) {
        return false;
    }
    // What has changed is looked up; only that it did matters.
    let mut buffer = [const { MaybeUninit::uninit() }; 4096];
    let mut changes = Reader::new(watched, &mut buffer);
    while changes.next().is_ok() {}
    true
}

impl Twins {
    /// Makes twins of new sockets, and ends those of sockets that have gone.
    fn look(&mut self) {
        let now = sockets(&self.directory, &self.prefix);
        for suffix in &now {
            if !self.there.contains_key(suffix) {
                let socket = self.directory.join(format!("{}{suffix}", self.prefix));
                let twin = format!("{}_{suffix}", self.inside);
                let accept = move || UnixStream::connect(&socket).and_then(End::of_socket);
                // Without it the guest's connection is refused, as without the socket.
                if let Ok(listener) = self.link.listen(&twin, accept) {
                    self.there.insert(suffix.clone(), listener);
                }
            }
        }
        let link = &self.link;
        self.there.retain(|suffix, listener| {
            let stays = now.contains(suffix);
            if !stays {
                drop(link.unlisten(*listener));
            }
            stays
        });
    }
}

/// What follows `prefix` in the names of a directory's sockets.
fn sockets(directory: &Path, prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = entry.file_name().into_string().ok()?;
            let suffix = name.strip_prefix(prefix).filter(|rest| !rest.is_empty())?;
            let is_socket = entry.file_type().ok()?.is_socket();
            is_socket.then(|| suffix.to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn sockets_are_told_by_their_kind_and_the_beginning_of_their_name() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let _listening = UnixListener::bind(at("v_5000")).unwrap();
        let _other = UnixListener::bind(at("w_5000")).unwrap();
        let _itself = UnixListener::bind(at("v")).unwrap();
        let _nothing = UnixListener::bind(at("v_")).unwrap();
        fs::write(at("v_file"), "").unwrap();
        assert_eq!(sockets(directory.path(), "v_"), ["5000"]);
    }
}
