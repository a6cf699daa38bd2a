//! One VM and the host above it, from the VM's start to its end.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use vmbus::ids::{ChannelId, ConnectionId};
use vmbus::protocol::{Guid, SINT};
use vmbus_host::bus::{HvStatus, Message};
use vmbus_host::host::{Host, Notice};

use super::events::Events;
use super::poll::{Poll, Sleep};
use super::vm::Vm;
use crate::config::Kind;
use crate::control::Event;

/// What is of no device is a connection of sockets.
const SOCKETS: &str = Kind::Vsock.name();

/// One VM and the host above it.
pub(super) struct Life {
    vm: Arc<dyn Vm>,
    host: Host,
    /// Messages that the guest has not had room for.
    messages: VecDeque<Message>,
    channels: BTreeMap<ChannelId, Open>,
    /// The names of devices, by their instance.
    names: BTreeMap<Guid, String>,
    posted: u64,
    delivered: u64,
    exits: u64,
    /// Primary channels of devices that have gone in good order.
    gone: Vec<ChannelId>,
}

struct Open {
    channel: Channel,
    counts: Counts,
}

/// An open channel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Channel {
    /// Its number on the bus.
    pub id: ChannelId,
    /// The name of its device.
    pub device: String,
    /// 0 for the primary channel of its device.
    pub index: u16,
    /// The VP that it interrupts.
    pub vp: u32,
    /// The event connection that the guest signals.
    pub connection: ConnectionId,
}

/// What was counted of a channel since it was opened.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Signals of the guest.
    pub signals: u64,
    /// Interrupts for the guest.
    pub interrupts: u64,
}

impl Life {
    pub(super) fn new(vm: Arc<dyn Vm>, host: Host, names: BTreeMap<Guid, String>) -> Self {
        Self {
            vm,
            host,
            messages: VecDeque::new(),
            channels: BTreeMap::new(),
            names,
            posted: 0,
            delivered: 0,
            exits: 0,
            gone: Vec::new(),
        }
    }

    pub(super) fn vm(&self) -> Arc<dyn Vm> {
        Arc::clone(&self.vm)
    }

    pub(super) fn host(&mut self) -> &mut Host {
        &mut self.host
    }

    /// The devices, by their primary channels, that have gone in good order since this was last asked.
    pub(super) fn take_gone(&mut self) -> Vec<ChannelId> {
        std::mem::take(&mut self.gone)
    }

    pub(super) fn waiting_messages(&self) -> usize {
        self.messages.len()
    }

    pub(super) fn post(&mut self, connection: ConnectionId, payload: &[u8]) -> HvStatus {
        self.posted += 1;
        let now = self.vm.reference_time();
        self.host.post(now, connection, payload)
    }

    /// A signal that made the VP leave the guest.
    pub(super) fn signal(&mut self, connection: ConnectionId, flag: u16) -> bool {
        self.exits += 1;
        let mut channels = self.channels.values_mut();
        if let Some(open) = channels.find(|open| open.channel.connection == connection) {
            open.counts.signals += 1;
        }
        self.host.signal(connection, flag)
    }

    /// A signal that came by the channel's descriptor.
    pub(super) fn signalled(&mut self, channel: ChannelId) {
        if let Some(open) = self.channels.get_mut(&channel) {
            open.counts.signals += 1;
            self.host.wake(channel);
        }
    }

    /// Lets the host run once and delivers what comes of it. Returns whether it did anything.
    pub(super) fn step(&mut self, poll: &Poll, events: &Events) -> bool {
        let now = self.vm.reference_time();
        let ran = self.host.run(now);
        self.notice(poll, events);
        for (id, vp) in ran.interrupts {
            let Some(channel) = self.host.channel(id) else {
                continue;
            };
            self.vm.set_event_flag(vp, SINT, channel.opening.event_flag);
            if let Some(open) = self.channels.get_mut(&id) {
                open.counts.interrupts += 1;
                open.channel.vp = vp.0;
            }
        }
        // All of them, so that none is due while the guest has no room.
        while let Some(message) = self.host.poll_message(now) {
            self.messages.push_back(message);
        }
        while let Some(message) = self.messages.front()
            && self.vm.deliver_message(message)
        {
            self.messages.pop_front();
            self.delivered += 1;
        }
        ran.busy
    }

    /// Until when the host has nothing to do.
    pub(super) fn sleep(&self) -> Sleep {
        match self.host.deadline() {
            None => Sleep::Unlimited,
            Some(at) => {
                let now = self.vm.reference_time();
                if at <= now {
                    Sleep::Not
                } else {
                    Sleep::Until { now, at }
                }
            }
        }
    }

    /// Acts on what the host has to say of its connection and its channels.
    fn notice(&mut self, poll: &Poll, events: &Events) {
        while let Some(notice) = self.host.poll_notice() {
            match notice {
                Notice::Connected(version) => events.push(Event::VmbusConnected {
                    version: version.to_string(),
                }),
                Notice::Disconnected => events.push(Event::VmbusDisconnected {}),
                Notice::Opened(id, connection) => self.opened(id, connection, poll, events),
                Notice::Closed(id) => self.closed(id, poll, events),
                Notice::Gone(id) => self.gone.push(id),
                Notice::Released(_) => {}
            }
        }
    }

    fn opened(&mut self, id: ChannelId, connection: ConnectionId, poll: &Poll, events: &Events) {
        let device = match self.host.device(id) {
            Some((_, instance)) => match self.names.get(&instance) {
                Some(name) => name.clone(),
                None => SOCKETS.to_owned(),
            },
            // Gone already; its end follows.
            None => String::new(),
        };
        let index = self.host.server().sub_channel_index(id).unwrap_or(0);
        let opening = self.host.channel(id).map(|channel| &channel.opening);
        let channel = Channel {
            id,
            device: device.clone(),
            index,
            vp: opening.map_or(0, |opening| opening.target_vp.0),
            connection,
        };
        // Without a descriptor the guest's signals come as exits.
        let vm = &self.vm;
        let _ = poll.add_channel(id, |signal| vm.route_signal(connection, Some(signal)));
        let counts = Counts::default();
        self.channels.insert(id, Open { channel, counts });
        events.push(Event::ChannelOpened {
            device,
            index,
            channel: id.0,
        });
        // What the guest has signalled before the descriptor was there.
        self.host.wake(id);
    }

    fn closed(&mut self, id: ChannelId, poll: &Poll, events: &Events) {
        let Some(Open { channel, .. }) = self.channels.remove(&id) else {
            return;
        };
        let _ = self.vm.route_signal(channel.connection, None);
        poll.remove_channel(id);
        events.push(Event::ChannelClosed {
            device: channel.device,
            index: channel.index,
            channel: id.0,
        });
    }

    /// The VM is gone: no provider touches its memory when this returns.
    pub(super) fn end(mut self, poll: &Poll, events: &Events) -> Arc<dyn Vm> {
        self.host.reset();
        self.notice(poll, events);
        self.vm
    }

    pub(super) fn channels(&self) -> Vec<(Channel, Counts)> {
        self.channels
            .values()
            .map(|open| (open.channel.clone(), open.counts))
            .collect()
    }

    pub(super) fn bus_counts(&self) -> BTreeMap<String, u64> {
        [
            ("messages-from-guest", self.posted),
            ("messages-to-guest", self.delivered),
            ("messages-waiting", self.messages.len() as u64),
            ("signals-by-exit", self.exits),
            ("signals-by-monitor-page", self.host.monitored_signals()),
        ]
        .map(|(name, count)| (name.to_owned(), count))
        .into()
    }
}
