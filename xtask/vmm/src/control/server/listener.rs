//! A Unix socket that clients connect to.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::client::Client;

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody else is there.
    #[error("the control socket {} is in use: another machine listens there", path.display())]
    InUse {
        /// Where.
        path: PathBuf,
    },
    /// There is something else.
    #[error("the control socket {} cannot be made: there is a file of that name", path.display())]
    NoSocket {
        /// Where.
        path: PathBuf,
    },
    /// The system does not let it.
    #[error("the control socket {} cannot be made: {cause}", path.display())]
    Cannot {
        /// Where.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The system has no room.
    #[error("there can be no control stream: {0}")]
    System(#[from] io::Error),
}

/// A socket in the file system. Dropping it takes it away.
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Makes a socket. One that a machine has left behind is replaced.
    pub(super) fn bind(path: PathBuf) -> Result<Self, ListenError> {
        clear(&path)?;
        let bound = UnixListener::bind(&path).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => Ok(Self { socket, path }),
            Err(cause) => Err(ListenError::Cannot { path, cause }),
        }
    }

    /// The next client that waits.
    pub(super) fn accept(&self) -> Option<Client> {
        loop {
            match self.socket.accept() {
                Ok((stream, _)) => match Client::new(stream) {
                    Ok(client) => return Some(client),
                    // It sees the end at once.
                    Err(_) => continue,
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return None,
            }
        }
    }
}

/// Takes away a socket that nobody listens at.
fn clear(path: &Path) -> Result<(), ListenError> {
    use std::os::unix::fs::FileTypeExt;
    let path = path.to_owned();
    let Ok(metadata) = path.symlink_metadata() else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(ListenError::NoSocket { path });
    }
    match UnixStream::connect(&path) {
        Ok(_) => Err(ListenError::InUse { path }),
        Err(_) => match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(cause) => Err(ListenError::Cannot { path, cause }),
        },
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have taken it away.
        let _ = fs::remove_file(&self.path);
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
