//! Shutdown: the host's user asks the guest to power off, to restart or to hibernate (spec ic.md 6).

use alloc::vec::Vec;

use vmbus::protocol::{Guid, interface};

use super::{Component, Host, Version};

/// Bytes of a request's body.
const BODY: usize = 2060;

/// A planned shutdown, as hosts code it.
pub const PLANNED: u32 = 0x8000_0000;

/// The shutdown component.
#[derive(Debug, Default)]
pub struct Shutdown {
    wanted: Option<ShutdownRequest>,
    answer: Option<u32>,
}

/// What the host asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShutdownRequest {
    /// Why.
    pub reason: u32,
    /// How long the guest may take, in seconds.
    pub timeout_seconds: u32,
    /// Bit 0 force, bit 1 restart, bit 2 hibernate.
    pub flags: u32,
    /// For the guest's log.
    pub text: &'static str,
}

impl ShutdownRequest {
    /// A planned request with these flags.
    pub fn new(flags: u32) -> Self {
        Self {
            reason: PLANNED,
            timeout_seconds: 0,
            flags,
            text: "",
        }
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(BODY);
        for word in [self.reason, self.timeout_seconds, self.flags] {
            body.extend_from_slice(&word.to_le_bytes());
        }
        for unit in self.text.encode_utf16() {
            body.extend_from_slice(&unit.to_le_bytes());
        }
        body.resize(BODY, 0);
        body
    }
}

impl Shutdown {
    /// One that asks for nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the guest, as soon as no other request is under way.
    pub fn ask(&mut self, request: ShutdownRequest) {
        self.wanted = Some(request);
        self.answer = None;
    }

    /// The status that the guest has answered the last request with.
    pub fn answer(&self) -> Option<u32> {
        self.answer
    }
}

impl Component for Shutdown {
    const KIND: u16 = 3;
    const INTERFACE: Guid = interface::SHUTDOWN;
    const INSTANCE: Guid = Guid::literal("b6650ff7-33bc-4840-8048-e0676786f393");

    fn versions(_host: Host) -> &'static [Version] {
        &[Version(1, 0), Version(3, 0), Version(3, 1), Version(3, 2)]
    }

    fn ready(&mut self, _now: u64, _version: Version) {}

    fn request(&mut self, _now: u64) -> Option<Vec<u8>> {
        Some(self.wanted.take()?.body())
    }

    fn answered(
        &mut self,
        _now: u64,
        request: &[u8],
        status: u32,
        answer: &[u8],
    ) -> Result<(), &'static str> {
        self.answer = Some(status);
        if request == answer {
            Ok(())
        } else {
            Err("a shutdown request that comes back changed")
        }
    }

    fn deadline(&self) -> Option<u64> {
        self.wanted.as_ref().map(|_| 0)
    }

    fn stopped(&mut self) {
        self.wanted = None;
    }
}
