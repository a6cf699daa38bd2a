//! Faults on request: what the control stream asks for, in the terms of channels.

use vmbus_host::faults::{ChannelFault, ChannelRule, Direction};
use vmbus_host::host::Host;

use super::Device;
use crate::control::{self, Failure, Fault, FaultOn, Misfit};

impl Device {
    /// Makes something go wrong with this device.
    ///
    /// # Errors
    /// When this kind of device cannot have such a fault, or it makes no sense.
    pub fn inject(&self, host: &Host, on: &FaultOn) -> Result<(), Failure> {
        let name = on.fault.name();
        if let Some(fault) = of_channel(&on.fault) {
            let rule = ChannelRule {
                direction: match on.direction.unwrap_or_default() {
                    control::Direction::ToGuest => Direction::ToGuest,
                    control::Direction::ToHost => Direction::FromGuest,
                },
                skip: on.skip.unwrap_or(0),
                count: match fault {
                    // What happens once cannot happen again.
                    ChannelFault::Rescind => Some(1),
                    _ => on.packets,
                },
                fault,
            };
            return self.channel_faults(host)?.inject(rule).map_err(|_| {
                let desc = format!("the fault `{name}` can only happen to packets to the guest");
                Failure::generic(desc)
            });
        }
        if on.direction.is_some() || on.skip.is_some() || on.packets.is_some() {
            return Err(Failure::generic(format!(
                "the fault `{name}` is none of packets: it has no direction and no number of them"
            )));
        }
        if self.body.part().inject(&on.fault)? {
            return Ok(());
        }
        Err(Failure::generic(Misfit {
            device: self.name.clone(),
            kind: self.kind,
            fault: name,
        }))
    }

    /// Nothing goes wrong with it any more. Returns how many packets were hit.
    pub fn clear_faults(&self, host: &Host) -> u64 {
        self.body.part().clear_faults();
        self.channel_faults(host).map_or(0, |faults| faults.clear())
    }
}

/// The fault of a channel's packets.
fn of_channel(fault: &Fault) -> Option<ChannelFault> {
    Some(match *fault {
        Fault::Drop {} => ChannelFault::Drop,
        Fault::Delay { milliseconds } => ChannelFault::Delay(milliseconds.saturating_mul(10_000)),
        Fault::Truncate { bytes } => ChannelFault::Truncate(bytes as usize),
        Fault::Extend { bytes } => ChannelFault::Extend(bytes as usize),
        Fault::TransactionId { bits } => ChannelFault::TransactionId(bits),
        Fault::Spoil { at, bits } => ChannelFault::Spoil {
            at: at as usize,
            bits,
        },
        Fault::CorruptRing {} => ChannelFault::CorruptRing,
        Fault::Stall {} => ChannelFault::Stall,
        Fault::Rescind {} => ChannelFault::Rescind,
        Fault::Message { .. }
        | Fault::SlowDisk { .. }
        | Fault::FailingDisk { .. }
        | Fault::TornWrites { .. }
        | Fault::LossyNetwork { .. } => return None,
    })
}
