//! Network adapters and what is at the other end of their cables.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmbus::protocol::{Guid, interface};
use vmbus_host::bus;
use vmbus_host::network::backend::{
    Backend, FaultControl, Faults, Faulty, Loop, Nowhere, Pair, Stream, Tap,
};
use vmbus_host::network::{self, Netvsp, Nic, Pcap};
use vmbus_host::provider::Provider;

use super::{Body, Counters, Devices, Part, Workshop, device_is_no, instance};
use crate::config::{self, Kind, Network};
use crate::control::{Failure, Fault};

/// Wires that have one end so far.
#[derive(Default)]
pub(super) struct Wires(BTreeMap<String, Pair>);

impl Wires {
    /// An end of the wire of this name.
    fn end(&mut self, wire: &str) -> Pair {
        if let Some(end) = self.0.remove(wire) {
            return end;
        }
        let (one, other) = Pair::new();
        self.0.insert(wire.to_owned(), other);
        one
    }
}

/// A network adapter.
pub(super) struct Adapter {
    instance: Guid,
    nic: Arc<Nic>,
    faults: FaultControl,
}

impl Adapter {
    /// Builds an adapter and plugs it in.
    ///
    /// # Errors
    /// When there is nobody at the other end, or the frames cannot be written down.
    pub(super) fn new(config: &Network, workshop: &mut Workshop) -> Result<Self, Failure> {
        let settings = network::Config {
            mtu: config.mtu,
            queues: config.queues,
            ..network::Config::new(config.name.clone(), config.mac().0)
        };
        let (nic, faults) = match &config.backend {
            config::Backend::None => plug(settings, Nowhere),
            config::Backend::Loop => plug(settings, Loop::default()),
            config::Backend::Wire(wire) => plug(settings, workshop.wires.end(wire)),
            config::Backend::Passt(socket) => {
                plug(settings, Stream::connect(socket).map_err(Failure::generic)?)
            }
            config::Backend::Tap(name) => {
                plug(settings, Tap::open(name).map_err(Failure::generic)?)
            }
        }?;
        if let Some(file) = &config.pcap {
            let pcap = Pcap::create(file).map_err(|error| {
                let desc = format!("the pcap file {} cannot be made: {error}", file.display());
                Failure::generic(desc)
            })?;
            nic.set_capture(Some(Box::new(pcap)));
        }
        Ok(Self {
            instance: instance::of(Kind::Net, &config.name),
            nic,
            faults,
        })
    }

    /// Its instance GUID.
    pub(super) fn instance(&self) -> Guid {
        self.instance
    }

    /// Its MAC address, in capitals with colons.
    pub(super) fn address(&self) -> String {
        let address = config::MacAddress(self.nic.config().mac);
        address.to_string().to_uppercase()
    }
}

/// An adapter plugged into a network that can misbehave.
fn plug(
    settings: network::Config,
    backend: impl Backend + 'static,
) -> Result<(Arc<Nic>, FaultControl), Failure> {
    let seed = settings.mac.iter();
    let seed = seed.fold(0, |seed, byte| seed << 8 | u64::from(*byte));
    let (backend, faults) = Faulty::new(backend, seed);
    let nic = Nic::new(settings, backend).map_err(Failure::generic)?;
    Ok((nic, faults))
}

impl Part for Adapter {
    fn offer(&self) -> Option<(bus::Device, Box<dyn Provider>)> {
        let device = bus::Device::new(interface::NETWORK, self.instance);
        Some((device, Box::new(Netvsp::new(self.nic.clone()))))
    }

    fn counters(&self) -> Counters {
        let counters = self.nic.counters();
        let mut counters: Counters = counters
            .iter()
            .map(|(name, count)| (name.replace('_', "-"), count))
            .collect();
        counters.insert("link-up".into(), u64::from(self.nic.link_up()));
        counters.insert("mtu".into(), u64::from(self.nic.mtu()));
        counters
    }

    fn inject(&self, fault: &Fault) -> Result<bool, Failure> {
        let Fault::LossyNetwork {
            loss,
            duplication,
            reordering,
            corruption,
            milliseconds,
        } = *fault
        else {
            return Ok(false);
        };
        self.faults.set(Faults {
            loss,
            duplication,
            reordering,
            corruption,
            delay: milliseconds.saturating_mul(10_000),
        });
        Ok(true)
    }

    fn clear_faults(&self) {
        self.faults.set(Faults::default());
    }
}

impl Devices {
    /// Plugs a cable in or out.
    ///
    /// # Errors
    /// When there is no such adapter.
    pub fn set_link(&mut self, nic: &str, up: bool) -> Result<(), Failure> {
        self.nic(nic)?.nic.set_link(up);
        Ok(())
    }

    /// Sets the largest packet of an adapter.
    ///
    /// # Errors
    /// When there is no such adapter, or it cannot have such packets.
    pub fn set_mtu(&mut self, nic: &str, mtu: u32) -> Result<(), Failure> {
        let set = self.nic(nic)?.nic.set_mtu(mtu);
        set.map_err(Failure::generic)
    }

    /// The network adapter of this name.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn nic(&mut self, name: &str) -> Result<&Adapter, Failure> {
        match &self.find(name)?.body {
            Body::Net(adapter) => Ok(adapter),
            _ => Err(device_is_no(name, "network adapter")),
        }
    }
}
