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
use super::{Backend, LargeSends, SendError, Waker};
use crate::network::offload::{Ip, Segmentation, Transport};
use crate::sync::Mutex;

/// The longest frame in bytes.
const LONGEST: usize = 64 << 10;

/// Bytes that precede every frame (`struct virtio_net_hdr`, virtio 1.3, 5.1.6, without `num_buffers`).
const HEADER: usize = 10;

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
    /// To put a frame and its header together in.
    outgoing: Mutex<Vec<u8>>,
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
            platform.ensure_root_privileges(false).vnet_hdr(true);
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
        device
            .set_nonblock()
            .map_err(|error| failed(error.to_string()))?;
        let shared = Arc::new(Shared {
            device,
            outgoing: Mutex::new(Vec::new()),
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
    fn write(&self, header: [u8; HEADER], frame: &[u8]) -> Result<(), SendError> {
        let mut whole = self.outgoing.lock();
        whole.clear();
        whole.extend_from_slice(&header);
        whole.extend_from_slice(frame);
        match self.device.send(&whole) {
            Ok(_) => Ok(()),
            // A device that is down, or a frame beyond its MTU.
            Err(_) => Err(SendError::Down),
        }
    }

    fn read_all(&self) {
        let mut buffer = std::vec![0; HEADER + LONGEST];
        while !self.closing.load(Ordering::SeqCst) {
            let received = match self.device.recv(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.device.recv_timeout(&mut buffer, LOOK)
                }
                received => received,
            };
            let length = match received {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => continue,
                Err(_) => {
                    // The device is down, perhaps, which can change.
                    self.incoming.wait_for_close(LOOK);
                    continue;
                }
            };
            // Nobody has told the device that we take anything else than whole frames, so nothing in the header matters.
            let frame = buffer.get(HEADER..length).unwrap_or_default().to_vec();
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

/// What the device has to know of a frame that it cuts. All numbers are of this computer's byte order.
fn header(cut: &Segmentation) -> [u8; HEADER] {
    const NEEDS_CHECKSUM: u8 = 1;
    const CONGESTION: u8 = 0x80;
    let kind = match cut.ip {
        Ip::V4 => 1,
        Ip::V6 => 4,
    };
    let kind = kind | if cut.congestion { CONGESTION } else { 0 };
    // No frame that has been cut in two here is that long.
    let number = |number: usize| u16::try_from(number).unwrap_or(u16::MAX);
    let mut header = [NEEDS_CHECKSUM, kind, 0, 0, 0, 0, 0, 0, 0, 0];
    let numbers = [
        number(cut.headers),
        cut.size,
        number(cut.tcp),
        number(Transport::Tcp.checksum_offset()),
    ];
    for (place, number) in header.as_chunks_mut().0.iter_mut().skip(1).zip(numbers) {
        *place = number.to_ne_bytes();
    }
    header
}

impl Backend for Tap {
    fn send(&self, frame: &[u8]) -> Result<(), SendError> {
        self.shared.write([0; HEADER], frame)
    }

    fn large_sends(&self) -> LargeSends {
        LargeSends::Cut
    }

    fn send_large(&self, frame: &[u8], cut: &Segmentation) -> Result<(), SendError> {
        self.shared.write(header(cut), frame)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_to_be_cut_is_announced_as_virtio_does() {
        let cut = Segmentation {
            ip: Ip::V6,
            tcp: 54,
            headers: 86,
            size: 1428,
            congestion: true,
        };
        let [flags, kind, numbers @ ..] = header(&cut);
        assert_eq!((flags, kind), (1, 0x84));
        let numbers = numbers
            .as_chunks()
            .0
            .iter()
            .map(|of| u16::from_ne_bytes(*of));
        assert!(numbers.eq([86, 1428, 54, 16]));
        let plain = Segmentation {
            ip: Ip::V4,
            congestion: false,
            ..cut
        };
        assert_eq!(header(&plain)[..2], [1, 1]);
    }
}
