//! A network card as its owner sees it: address, MTU, link, counters, and the network that it is plugged into.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use super::backend::{Backend, LargeSends, SendError};
use super::counters::{Counters, Live};
use super::netvsp::MAX_FRAME;
use super::nvsp::Version;
use super::offload::ETHERNET;
use super::offload::Segmentation;
use crate::provider::Link;
use crate::sync::Mutex;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The least MTU, in bytes: what every host on the Internet takes (RFC 791).
pub const MIN_MTU: u32 = 576;

/// The largest MTU, in bytes.
pub const MAX_MTU: u32 = MAX_FRAME - ETHERNET as u32;

/// What a network card is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// For the user's eyes.
    pub name: String,
    /// The permanent address.
    pub mac: Mac,
    /// The longest payload of a frame in bytes, from [`MIN_MTU`] to [`MAX_MTU`].
    pub mtu: u32,
    /// Queues, and with them channels, at most; from 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Bits per second.
    pub speed: u64,
    /// The newest version of the protocol that it speaks.
    pub newest_version: Version,
}

/// The most queues of a card (spec netvsc.md 8).
pub const MAX_QUEUES: u16 = 64;

impl Config {
    /// A card of 10 Gbit/s with four queues and frames of the usual length.
    pub fn new(name: impl Into<String>, mac: Mac) -> Self {
        Self {
            name: name.into(),
            mac,
            mtu: 1500,
            queues: 4,
            speed: 10_000_000_000,
            newest_version: Version::V6_1,
        }
    }
}

/// A configuration that no card can have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ConfigError {
    /// The MTU is out of range.
    Mtu {
        /// The card.
        name: String,
        /// Bytes.
        mtu: u32,
    },
    /// The number of queues is out of range.
    Queues {
        /// The card.
        name: String,
        /// How many.
        queues: u16,
    },
    /// The address is one of a group of cards, or of none.
    Mac {
        /// The card.
        name: String,
        /// The address.
        mac: Mac,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mtu { name, mtu } => write!(
                f,
                "network {name}: the MTU must be from {MIN_MTU} to {MAX_MTU} bytes, not {mtu}"
            ),
            Self::Queues { name, queues } => {
                write!(
                    f,
                    "network {name}: there can be 1 to {MAX_QUEUES} queues, not {queues}"
                )
            }
            Self::Mac { name, mac } => {
                let [a, b, c, d, e, g] = mac;
                write!(
                    f,
                    "network {name}: {a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x} is not the address of one card"
                )
            }
        }
    }
}

impl core::error::Error for ConfigError {}

/// Which way a frame goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the guest.
    Sent,
    /// To the guest.
    Received,
}

/// Writes down the frames of a card, as the network sees them.
pub trait Capture: Send {
    /// Takes a frame.
    fn frame(&mut self, direction: Direction, frame: &[u8]);
    /// No frame follows for a while.
    fn flush(&mut self) {}
}

/// A network card.
pub struct Nic {
    config: Config,
    backend: Box<dyn Backend>,
    capture: Mutex<Option<Box<dyn Capture>>>,
    settings: Mutex<Settings>,
    /// The primary channel's, once there is one.
    link: Mutex<Option<Link>>,
    /// Why a channel is served no longer.
    failure: Mutex<Option<String>>,
    pub(super) counters: Live,
}

/// What can change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Settings {
    /// Whether the cable is in, as far as the owner wants it.
    pub(super) connected: bool,
    /// The card is about to be taken away from its guest: for that the cable is out.
    leaving: bool,
    /// Bytes.
    pub(super) mtu: u32,
}

impl Settings {
    const fn is_plugged(self) -> bool {
        self.connected && !self.leaving
    }
}

impl Nic {
    /// A card, plugged into this network.
    ///
    /// # Errors
    ///
    /// Whatever no card can have.
    pub fn new(config: Config, backend: impl Backend + 'static) -> Result<Arc<Self>, ConfigError> {
        check_mtu(&config.name, config.mtu)?;
        let name = || config.name.clone();
        if !(1..=MAX_QUEUES).contains(&config.queues) {
            let queues = config.queues;
            return Err(ConfigError::Queues {
                name: name(),
                queues,
            });
        }
        let [first, ..] = config.mac;
        if first & 1 != 0 || config.mac == [0; 6] {
            let mac = config.mac;
            return Err(ConfigError::Mac { name: name(), mac });
        }
        Ok(Arc::new(Self {
            settings: Mutex::new(Settings {
                connected: true,
                leaving: false,
                mtu: config.mtu,
            }),
            config,
            backend: Box::new(backend),
            capture: Mutex::new(None),
            link: Mutex::new(None),
            failure: Mutex::new(None),
            counters: Live::default(),
        }))
    }

    /// What it was made as.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Writes all frames down from now on, or no longer.
    pub fn set_capture(&self, capture: Option<Box<dyn Capture>>) {
        *self.capture.lock() = capture;
    }

    /// Takes the cable out, or puts it in.
    pub fn set_link(&self, connected: bool) {
        self.settings.lock().connected = connected;
        self.wake();
    }

    /// Whether frames flow: the cable is in, and there is a network at its other end.
    pub fn link_up(&self) -> bool {
        self.settings.lock().is_plugged() && self.backend.is_up()
    }

    /// Changes the longest payload of a frame in bytes.
    ///
    /// A running guest does not take it at once: what it negotiated counts until it negotiates again, as far as it is not longer.
    /// It is told that the network has changed, and finds the new value in OID_GEN_MAXIMUM_FRAME_SIZE. Linux asks for that only
    /// when it sets the card up: at its start, and when its user changes the MTU or the channels.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Mtu`].
    pub fn set_mtu(&self, mtu: u32) -> Result<(), ConfigError> {
        check_mtu(&self.config.name, mtu)?;
        self.settings.lock().mtu = mtu;
        self.wake();
        Ok(())
    }

    /// The longest payload of a frame in bytes.
    pub fn mtu(&self) -> u32 {
        self.settings.lock().mtu
    }

    /// What it has counted so far.
    pub fn counters(&self) -> Counters {
        self.counters.read()
    }

    /// What the guest did last that no guest may do, such that a channel is served no longer.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().clone()
    }

    pub(super) fn fail(&self, what: String) {
        self.counters.protocol_errors.one();
        *self.failure.lock() = Some(what);
    }

    fn wake(&self) {
        let link = self.link.lock().clone();
        if let Some(link) = link {
            link.wake();
        }
    }

    /// A host offers the card; `link` is that of the primary channel.
    pub(super) fn attach(&self, link: Link) {
        self.settings.lock().leaving = false;
        *self.link.lock() = Some(link.clone());
        self.backend.set_waker(Some(Arc::new(move || link.wake())));
    }

    /// The card is about to be taken away: nothing goes to its guest or comes from it any more.
    pub(super) fn leave(&self) {
        self.settings.lock().leaving = true;
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// What the network does with large frames. While frames are written down they are cut here, so that they are written
    /// down as they go.
    pub(super) fn large_sends(&self) -> LargeSends {
        match self.backend.large_sends() {
            LargeSends::Cut if self.capture.lock().is_some() => LargeSends::None,
            does => does,
        }
    }

    /// Hands a frame of the guest to the network.
    ///
    /// # Errors
    ///
    /// The network has no room for it now.
    pub(super) fn send(&self, frame: &[u8]) -> Result<(), Full> {
        self.send_by(frame, || self.backend.send(frame))
    }

    /// Hands a TCP frame to a network that cuts it.
    ///
    /// # Errors
    ///
    /// As of [`send`](Self::send).
    pub(super) fn send_large(&self, frame: &[u8], cut: &Segmentation) -> Result<(), Full> {
        self.send_by(frame, || self.backend.send_large(frame, cut))
    }

    fn send_by(
        &self,
        frame: &[u8],
        send: impl FnOnce() -> Result<(), SendError>,
    ) -> Result<(), Full> {
        if !self.settings.lock().is_plugged() {
            self.counters.sent_link_down.one();
            return Ok(());
        }
        match send() {
            Ok(()) => {
                self.counters.sent_frames.one();
                self.counters.sent_bytes.add(frame.len() as u64);
                self.write_down(Direction::Sent, frame);
                Ok(())
            }
            Err(SendError::Full) => Err(Full),
            Err(SendError::Down) => {
                self.counters.sent_link_down.one();
                Ok(())
            }
        }
    }

    /// The next frame of the network.
    pub(super) fn receive(&self) -> Option<Vec<u8>> {
        let frame = self.backend.receive()?;
        self.write_down(Direction::Received, &frame);
        Some(frame)
    }

    fn write_down(&self, direction: Direction, frame: &[u8]) {
        if let Some(capture) = &mut *self.capture.lock() {
            capture.frame(direction, frame);
        }
    }

    /// Nothing flows for a while.
    pub(super) fn rest(&self) {
        if let Some(capture) = &mut *self.capture.lock() {
            capture.flush();
        }
    }
}

/// The network has no room for a frame.
pub(super) struct Full;

fn check_mtu(name: &str, mtu: u32) -> Result<(), ConfigError> {
    if (MIN_MTU..=MAX_MTU).contains(&mtu) {
        return Ok(());
    }
    Err(ConfigError::Mtu {
        name: name.into(),
        mtu,
    })
}

impl fmt::Debug for Nic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nic")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
