//! A network behind a TAP device of Linux. It needs no privileges when the device exists and belongs to the user.

use std::fmt;
use std::io;
use std::string::{String, ToString};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::vec::Vec;

use tun::{Configuration, Device, Layer};

use super::queue::Queue;
use super::{Backend, SendError, Waker};
use crate::sync::Mutex;

/// The longest frame in bytes.
const LONGEST: usize = 64 << 10;

/// How long the reader sleeps before it looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);

/// The device cannot be used.
#[derive(Debug)]
pub struct TapError {
    name: String,
    reason: String,
}

impl fmt::Display for TapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TAP device {}: {}", self.name, self.reason)
    }
}

impl std::error::Error for TapError {}

/// The network.
pub struct Tap {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    device: Device,
    incoming: Queue,
    closing: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Tap {
    /// Opens the device with this name. One that does not exist is made, for as long as it is open, if the user may do so.
    ///
    /// # Errors
    ///
    /// One sentence with the name of the device.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let failed = |reason: String| TapError {
            name: name.into(),
            reason,
        };
        let mut config = Configuration::default();
        config.tun_name(name).layer(Layer::L2);
        // Addresses and state of the device are the user's.
        config.platform_config(|platform| {
            platform.ensure_root_privileges(false);
        });
        let device = Device::new(&config).map_err(|error| {
            failed(match io::Error::from(error) {
                error if error.kind() == io::ErrorKind::PermissionDenied => {
                    "it is not there, or not yours (make it with: ip tuntap add mode tap user $USER)".into()
                }
                error if error.kind() == io::ErrorKind::ResourceBusy => "somebody else has it".into(),
                error => error.to_string(),
            })
        })?;
        let shared = Arc::new(Shared {
            device,
            incoming: Queue::default(),
            closing: AtomicBool::new(false),
            waker: Mutex::new(None),
        });
        let reader = shared.clone();
        let thread = thread::Builder::new().name("network in".into());
        let thread = thread.spawn(move || reader.read_all());
        let thread = thread.map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }
}

impl Shared {
    fn read_all(&self) {
        let mut buffer = std::vec![0; LONGEST];
        while !self.closing.load(Ordering::SeqCst) {
            let length = match self.device.recv_timeout(&mut buffer, LOOK) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => continue,
                Err(_) => {
                    // The device is down, perhaps, which can change.
                    self.incoming.wait_for_close(LOOK);
                    continue;
                }
            };
            let frame = buffer.get(..length).unwrap_or_default().to_vec();
            match self.incoming.push_waiting(frame) {
                None => return,
                Some(true) => {
                    let waker = self.waker.lock().clone();
                    if let Some(waker) = waker {
                        waker();
                    }
                }
                Some(false) => {}
            }
        }
    }
}

impl Backend for Tap {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        match self.shared.device.send(frame) {
            Ok(_) => Ok(()),
            // A device that is down, or a frame beyond its MTU.
            Err(_) => Err(SendError::Down),
        }
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.shared.incoming.pop().0
    }

    fn set_waker(&self, waker: Option<Waker>) {
        *self.shared.waker.lock() = waker.clone();
        if let Some(waker) = waker {
            waker();
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.shared.incoming.close();
        if let Some(thread) = self.thread.take() {
            // A thread that has panicked has said so.
            let _ = thread.join();
        }
    }
}
