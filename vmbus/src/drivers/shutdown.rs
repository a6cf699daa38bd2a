//! Shutdown: the host asks the guest to power off or to restart (spec ic.md 6).
//!
//! The driver hands each request on as a [`ShutdownRequest`], which has to be accepted or refused: that is the answer that
//! the host waits for. To act is the matter of whoever accepted.

use alloc::string::String;
use alloc::sync::Arc;
use core::fmt;

use spin::Mutex;
use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::ic::{Component, ComponentStatus, Integration, Reply, Service, Status, Version, wire};
use super::standing::Standing;
use crate::kmcl::{Client, ConfigError, interface};

const COMPONENT: Component = Component {
    name: "shutdown",
    interface: interface::SHUTDOWN,
    kind: 3,
    versions: &[
        Version::new(1, 0),
        Version::new(3, 0),
        Version::new(3, 1),
        Version::new(3, 2),
    ],
    longest_body: size_of::<Body>() + TEXT,
};

wire! {
    /// The body, without the text behind it.
    Body, 12 {
        /// Why, as Windows codes it.
        reason: U32,
        /// How long the guest may take, in seconds.
        timeout: U32,
        /// [`FORCE`], and what to do.
        flags: U32,
    }
}

/// Bytes of text behind the body.
const TEXT: usize = 2048;

/// Flag: whatever is still running.
const FORCE: u32 = 1;
/// Flag: restart.
const RESTART: u32 = 2;
/// Flag: hibernate.
const HIBERNATE: u32 = 4;

/// What the guest is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Power off.
    PowerOff,
    /// Restart.
    Restart,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "power off",
            Self::Restart => "restart",
        })
    }
}

/// Why, as Windows codes it for its own shutdown: bit 31 is set when it was planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reason(pub u32);

impl Reason {
    /// Whether somebody had planned it.
    pub fn is_planned(self) -> bool {
        self.0 & 1 << 31 != 0
    }
}

/// What the host asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// What to do.
    pub action: Action,
    /// Whether to do it whatever is still running.
    pub force: bool,
    /// Why.
    pub reason: Reason,
    /// How long the guest may take, in seconds; 0 when the host does not say.
    pub timeout_seconds: u32,
    /// What the host's user says about it; mostly empty.
    pub text: String,
}

impl Request {
    /// Reads the body of a message. The error is the answer to it: hibernation is not supported, and what is not known fails.
    fn parse(body: &[u8]) -> Result<Self, Status> {
        let (fixed, text) = Body::read_from_prefix(body).map_err(|_| Status::INVALID_ARGUMENT)?;
        let flags = fixed.flags.get();
        // Other guests obey the bits whatever version was agreed on, so hosts may rely on it.
        let action = match flags & !FORCE {
            0 => Action::PowerOff,
            RESTART => Action::Restart,
            HIBERNATE => return Err(Status::NOT_SUPPORTED),
            _ => return Err(Status::FAILURE),
        };
        let (units, _) = text.as_chunks();
        let units = units
            .iter()
            .map(|&unit| u16::from_le_bytes(unit))
            .take_while(|&unit| unit != 0)
            .take(TEXT / 2);
        let text = char::decode_utf16(units)
            .map(|char| char.unwrap_or(char::REPLACEMENT_CHARACTER))
            .collect();
        Ok(Self {
            action,
            force: flags & FORCE != 0,
            reason: Reason(fixed.reason.get()),
            timeout_seconds: fixed.timeout.get(),
            text,
        })
    }
}

/// The shutdown driver. Somebody has to take the requests: the host waits for the answer to each.
pub struct Shutdown {
    client: Client,
    integration: Integration,
    desk: Arc<Desk>,
}

/// Where the request waits.
struct Desk {
    client: Client,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Counts requests, so that an answer cannot meet another one.
    serial: u64,
    /// Whether the last one is still to be answered.
    open: bool,
    /// The request, until it is taken.
    waiting: Option<Request>,
}

/// A request that is to be answered. Dropping it refuses it.
#[must_use = "dropping it refuses the request"]
pub struct ShutdownRequest<'a> {
    driver: &'a Shutdown,
    serial: u64,
    request: Request,
    answered: bool,
}

/// The host has withdrawn its request: the device is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Withdrawn;

impl fmt::Display for Withdrawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the host does not wait for the answer any more")
    }
}

impl core::error::Error for Withdrawn {}

impl Shutdown {
    /// Enables the driver. Called at PASSIVE.
    pub fn new(client: &Client) -> Result<Self, ConfigError> {
        let desk = Arc::new(Desk {
            client: client.clone(),
            inner: Mutex::default(),
        });
        let integration = Integration::new(client, desk.clone())?;
        Ok(Self {
            client: client.clone(),
            integration,
            desk,
        })
    }

    /// Takes the request that waits, if there is one. At PASSIVE.
    pub fn take_request(&self) -> Option<ShutdownRequest<'_>> {
        let mut inner = self.desk.inner.lock();
        let request = inner.waiting.take()?;
        Some(ShutdownRequest {
            driver: self,
            serial: inner.serial,
            request,
            answered: false,
        })
    }

    /// Waits for a request.
    pub async fn next_request(&self) -> ShutdownRequest<'_> {
        loop {
            let seen = self.client.changes();
            if let Some(request) = self.take_request() {
                return request;
            }
            self.client.changed(seen).await;
        }
    }

    /// How it stands. At PASSIVE.
    pub fn status(&self) -> ComponentStatus {
        self.integration.status()
    }

    /// The channel.
    pub fn channel(&self) -> &Standing {
        self.integration.channel()
    }

    fn answer(&self, serial: u64, status: Status) -> Result<(), Withdrawn> {
        {
            let mut inner = self.desk.inner.lock();
            if inner.serial != serial || !inner.open {
                return Err(Withdrawn);
            }
            inner.open = false;
        }
        if self.integration.answer(status) {
            Ok(())
        } else {
            Err(Withdrawn)
        }
    }
}

impl ShutdownRequest<'_> {
    /// What the host asks for.
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Tells the host that the guest will do it. Then do it. At PASSIVE.
    pub fn accept(mut self) -> Result<(), Withdrawn> {
        self.answered = true;
        self.driver.answer(self.serial, Status::OK)
    }

    /// Tells the host that the guest will not do it. At PASSIVE.
    pub fn refuse(mut self) -> Result<(), Withdrawn> {
        self.answered = true;
        self.driver.answer(self.serial, Status::FAILURE)
    }
}

impl Drop for ShutdownRequest<'_> {
    fn drop(&mut self) {
        if !self.answered {
            // If the host is gone, nobody waits for it.
            let _ = self.driver.answer(self.serial, Status::FAILURE);
        }
    }
}

impl Service for Desk {
    fn component(&self) -> &'static Component {
        &COMPONENT
    }

    fn request(&self, _now: u64, _version: Version, body: &mut [u8]) -> Reply {
        match Request::parse(body) {
            Ok(request) => {
                let mut inner = self.inner.lock();
                inner.serial += 1;
                inner.open = true;
                inner.waiting = Some(request);
                drop(inner);
                self.client.notify();
                Reply::Later
            }
            Err(status) => Reply::Now(status),
        }
    }

    fn withdrawn(&self) {
        let mut inner = self.inner.lock();
        inner.open = false;
        inner.waiting = None;
    }
}

impl fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.integration.fmt(f)
    }
}

impl fmt::Debug for ShutdownRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.request.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn body(flags: u32, text: &str) -> Vec<u8> {
        let words = [0x8000_0000, 30, flags];
        let mut body: Vec<u8> = words
            .iter()
            .flat_map(|word: &u32| word.to_le_bytes())
            .collect();
        body.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
        body.resize(2060, 0);
        body
    }

    #[test]
    fn the_body_has_reason_timeout_force_and_text() {
        assert_eq!(
            Request::parse(&body(1, "Wartung äöü 𝄞")),
            Ok(Request {
                action: Action::PowerOff,
                force: true,
                reason: Reason(0x8000_0000),
                timeout_seconds: 30,
                text: "Wartung äöü 𝄞".into(),
            })
        );
    }

    #[test]
    fn the_flags_name_the_action() {
        let action = |flags| Request::parse(&body(flags, "")).map(|r| (r.action, r.force));
        assert_eq!(action(0), Ok((Action::PowerOff, false)));
        assert_eq!(action(1), Ok((Action::PowerOff, true)));
        assert_eq!(action(2), Ok((Action::Restart, false)));
        assert_eq!(action(3), Ok((Action::Restart, true)));
        for hibernate in [4, 5] {
            assert_eq!(action(hibernate), Err(Status::NOT_SUPPORTED));
        }
        for unknown in [6, 7, 8, 1 << 31] {
            assert_eq!(action(unknown), Err(Status::FAILURE));
        }
    }

    #[test]
    fn the_text_may_be_missing_cut_or_no_text_at_all() {
        assert!(Request::parse(&body(0, "")[..12]).is_ok());
        assert_eq!(
            Request::parse(&body(0, "")[..11]),
            Err(Status::INVALID_ARGUMENT)
        );
        let mut odd = body(0, "a");
        odd.truncate(15);
        assert_eq!(Request::parse(&odd).unwrap().text, "a");
        let mut lone = body(0, "");
        lone[12..14].copy_from_slice(&0xD800u16.to_le_bytes());
        assert_eq!(Request::parse(&lone).unwrap().text, "\u{FFFD}");
        // Without an end it ends with the message.
        let full = "x".repeat(1024);
        assert_eq!(Request::parse(&body(0, &full)).unwrap().text, full);
    }
}
