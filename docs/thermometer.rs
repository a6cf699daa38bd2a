//! A driver for a device that measures: it agrees with the host on a version, and then takes samples of 8 bytes.

extern crate alloc;

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmbus::kmcl::{
    Channel, ChannelBuilder, ChannelDriver, Client, ConfigError, EnabledChannel, ExternalData,
    Guid, ReceivedPacket, Timeout,
};

pub const INTERFACE: Guid = Guid::literal("5d6d2a2f-6f0c-4bd1-a8d5-9ff6a3a0c7e1");

/// The driver is the context of its callbacks.
#[derive(Default)]
pub struct Thermometer {
    ready: AtomicBool,
    last: AtomicU64,
}

impl Thermometer {
    /// Serves the device, now or when it comes, until the result is dropped.
    pub fn enable(self: &Arc<Self>, client: &Client) -> Result<EnabledChannel, ConfigError> {
        ChannelBuilder::new(INTERFACE)
            .friendly_name("thermometer")
            .maximum_packet_size(64)
            .driver(self.clone())
            .enable(client)
    }

    /// The last sample, while there is a device.
    pub fn last(&self) -> Option<u64> {
        let last = || self.last.load(Ordering::Relaxed);
        self.ready.load(Ordering::Acquire).then(last)
    }
}

impl ChannelDriver for Thermometer {
    /// At PASSIVE, when packets flow: the place to wait for the host. One second, in units of 100 ns.
    fn post_started(&self, channel: &Channel) {
        let (none, time) = (ExternalData::new(), Timeout::After(10_000_000));
        let mut answer = [0; 8];
        let got = channel.send_synchronous_request(b"version1", none, time, &mut answer);
        let agreed = got == Ok(8) && &answer == b"accepted";
        self.ready.store(agreed, Ordering::Release);
    }

    /// In the interrupt handler, for every packet; perhaps while `post_started` still runs.
    fn process_packet(&self, _: &Channel, packet: ReceivedPacket<'_>) {
        if let Some(sample) = packet.payload().first_chunk() {
            self.last
                .store(u64::from_le_bytes(*sample), Ordering::Relaxed);
        }
        packet.complete(&[]);
    }

    /// At PASSIVE, when the device is gone.
    fn closed(&self, _: &Channel) {
        self.ready.store(false, Ordering::Release);
    }
}
