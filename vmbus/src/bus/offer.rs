//! Offers: the channels that the host has for the guest.

use super::event::Violation;
use crate::ids::{ChannelId, ConnectionId};
use crate::protocol::message::OfferChannel;
use crate::protocol::monitor::MonitorId;
use crate::protocol::{Guid, OfferFlags, interface};

/// A channel as the host offered it (spec vmbus.md 3.1).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// The channel's number; also its event flag.
    pub channel: ChannelId,
    /// What kind of device it is.
    pub interface: Guid,
    /// Which device it is. The sub-channels of a device have that of their primary channel.
    pub instance: Guid,
    /// 0 for a primary channel, 1.. for sub-channels.
    pub sub_channel_index: u16,
    /// What else the host says.
    pub flags: OfferFlags,
    /// MMIO space that the device needs, in MiB.
    pub mmio_megabytes: u16,
    /// MMIO space that the device could use, in MiB.
    pub optional_mmio_megabytes: u16,
    /// Defined by the device.
    pub user_data: [u8; 120],
    /// The channel's bit in the monitor pages, if guest and host have such pages and the host allocated one.
    pub monitor_id: Option<MonitorId>,
    /// Whether the channel has an event connection of its own; all have on the hosts of today.
    pub dedicated_interrupt: bool,
    /// The event connection to signal.
    pub connection: ConnectionId,
}

impl Offer {
    /// The name of the interface, where it is a known one.
    pub fn interface_name(&self) -> Option<&'static str> {
        interface::name(&self.interface)
    }

    /// Takes an offer off the wire, if its channel number is one that a channel can have.
    pub(super) fn from_wire(wire: &OfferChannel) -> Result<Self, Violation> {
        let channel = ChannelId(wire.channel.get());
        if channel.index().is_none() {
            return Err(Violation::BadChannelId(channel));
        }
        Ok(Self {
            channel,
            interface: wire.interface,
            instance: wire.instance,
            sub_channel_index: wire.sub_channel_index.get(),
            flags: OfferFlags(wire.flags.get()),
            mmio_megabytes: wire.mmio_megabytes.get(),
            optional_mmio_megabytes: wire.optional_mmio_megabytes.get(),
            user_data: wire.user_data,
            monitor_id: None,
            dedicated_interrupt: wire.dedicated_interrupt.get() & 1 != 0,
            connection: ConnectionId(wire.connection.get()),
        })
    }

    /// Takes the channel's bit in the monitor pages off the wire. A bit that does not exist is none: the channel
    /// can be signalled without it.
    pub(super) fn take_monitor(&mut self, wire: &OfferChannel) -> Result<(), Violation> {
        if wire.monitor_allocated & 1 != 0 {
            self.monitor_id = MonitorId::new(wire.monitor_id);
            if self.monitor_id.is_none() {
                return Err(Violation::BadMonitorId {
                    channel: self.channel,
                    id: wire.monitor_id,
                });
            }
        }
        Ok(())
    }
}
