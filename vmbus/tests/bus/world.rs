//! A guest's bus and a host's server with a hypervisor between them, and a clock that jumps from one
//! deadline to the next.

use std::collections::VecDeque;

use vmbus::bus::{Bus, Config, Event, GpaRange, GpadlError, OpenError, OpenParameters};
use vmbus::hypervisor::PostError;
use vmbus::ids::{ChannelId, ConnectionId, GpadlHandle, PageNumber, VpIndex};
use vmbus::protocol::message::{Body, InitiateContact};
use vmbus::protocol::sizes::{Direction, MessageInfo};
use vmbus::protocol::{FeatureFlags, Guid, MessageType, Payload, Status, Version, interface};
use vmbus_host::bus::{Device, Event as HostEvent, HvStatus, Message, Profile, Server};

/// One second in units of 100 ns.
pub(crate) const SECOND: u64 = 10_000_000;

/// Every host of spec hosts.md.
pub(crate) const PROFILES: [fn() -> Profile; 3] =
    [Profile::qemu, Profile::openvmm, Profile::hyper_v];

pub(crate) struct World {
    pub(crate) bus: Bus,
    pub(crate) server: Server,
    pub(crate) now: u64,
    /// What the guest was told and nobody has waited for yet.
    pub(crate) events: VecDeque<Event>,
    /// What the host's owner was told.
    pub(crate) host_events: Vec<HostEvent>,
    /// What the guest posted, refused messages included.
    pub(crate) posted: Vec<(ConnectionId, Payload)>,
    /// Outcomes of the next posts that the hypervisor does not pass on.
    pub(crate) refuse: VecDeque<PostError>,
    /// How the host answers OPEN_CHANNEL; `None` leaves it open.
    pub(crate) open_status: Option<Status>,
}

impl World {
    /// A host of this kind with two devices, and a guest that has not made contact yet.
    pub(crate) fn new(profile: Profile, config: Config) -> Self {
        let mut server = Server::new(profile);
        for interface in [interface::SCSI_CONTROLLER, interface::DYNAMIC_MEMORY] {
            server
                .add(Device::new(interface, Guid([interface.0[0]; 16])))
                .unwrap();
        }
        Self {
            bus: Bus::new(config),
            server,
            now: 1000,
            events: VecDeque::new(),
            host_events: Vec::new(),
            posted: Vec::new(),
            refuse: VecDeque::new(),
            open_status: Some(Status::SUCCESS),
        }
    }

    /// The same, connected and with all offers delivered.
    pub(crate) fn connected(profile: Profile) -> Self {
        let mut world = Self::new(profile, Config::default());
        world.bus.connect(world.now);
        world.wait(|event| matches!(event, Event::AllOffersDelivered));
        world.settle();
        world.events.clear();
        world
    }

    /// The channel of the device with this interface.
    pub(crate) fn channel(&self, interface: Guid) -> ChannelId {
        let mut offers = self.bus.offers();
        offers
            .find(|offer| offer.interface == interface)
            .unwrap()
            .channel
    }

    /// Hands messages over, in both directions, until nothing moves without the clock.
    pub(crate) fn settle(&mut self) {
        loop {
            let mut moved = false;
            while let Some(outgoing) = self.bus.poll_message() {
                moved = true;
                self.posted.push((outgoing.connection, outgoing.payload));
                check_size(&outgoing.payload, self.bus.version());
                if let Err(error) = self.post(outgoing.connection, &outgoing.payload) {
                    self.bus.message_refused(self.now, error);
                }
            }
            self.server.run(self.now);
            moved |= self.run_host();
            while let Some(message) = self.server.poll_message(self.now) {
                moved = true;
                self.deliver(&message);
            }
            while let Some(event) = self.bus.poll_event() {
                moved = true;
                self.events.push_back(event);
            }
            if !moved {
                return;
            }
        }
    }

    fn deliver(&mut self, message: &Message) {
        assert!(message.payload.len() <= 240);
        self.bus.receive(self.now, &message.payload);
    }

    /// The host's devices: they do nothing but say whether they open.
    fn run_host(&mut self) -> bool {
        let mut moved = false;
        while let Some(event) = self.server.poll_event() {
            moved = true;
            if let (HostEvent::Opening(opening), Some(status)) = (&event, self.open_status) {
                self.server.finish_open(opening.channel, status);
            }
            self.host_events.push(event);
        }
        moved
    }

    /// The hypercall, with the retries that a hypervisor layer makes.
    fn post(&mut self, connection: ConnectionId, payload: &[u8]) -> Result<(), PostError> {
        if let Some(error) = self.refuse.pop_front() {
            return Err(error);
        }
        for _ in 0..3 {
            match self.server.post(self.now, connection, payload) {
                HvStatus::SUCCESS => return Ok(()),
                HvStatus::INVALID_CONNECTION_ID => return Err(PostError::InvalidConnection),
                HvStatus::INSUFFICIENT_BUFFERS => self.server.run(self.now),
                HvStatus(status) => return Err(PostError::Status(status)),
            }
        }
        Err(PostError::Busy)
    }

    /// Goes on until an event of the guest passes, and returns it. The events before it are kept.
    ///
    /// # Panics
    ///
    /// When nothing is left to happen, or after 1000 s.
    pub(crate) fn wait(&mut self, mut wanted: impl FnMut(&Event) -> bool) -> Event {
        let limit = self.now + 1000 * SECOND;
        loop {
            self.settle();
            if let Some(position) = self.events.iter().position(&mut wanted) {
                return self.events.remove(position).unwrap();
            }
            assert!(
                self.advance() && self.now < limit,
                "waits for ever: {:?}",
                self.events
            );
        }
    }

    /// Lets everything happen that time alone brings about.
    pub(crate) fn rest(&mut self) {
        self.settle();
        while self.advance() {
            self.settle();
        }
    }

    /// Moves the clock to the next deadline of either side. Returns whether there is one.
    fn advance(&mut self) -> bool {
        let deadlines = self
            .bus
            .deadline()
            .into_iter()
            .chain(self.server.deadline());
        let Some(next) = deadlines.min() else {
            return false;
        };
        self.now = self.now.max(next);
        self.bus.tick(self.now);
        true
    }

    /// Lends a GPADL of whole pages to the host and waits for the outcome.
    pub(crate) fn gpadl(
        &mut self,
        channel: ChannelId,
        count: usize,
    ) -> (GpadlHandle, Result<(), GpadlError>) {
        let handle = self.start_gpadl(channel, count);
        match self
            .wait(|event| matches!(event, Event::GpadlCreated { handle: of, .. } if *of == handle))
        {
            Event::GpadlCreated { result, .. } => (handle, result),
            _ => unreachable!(),
        }
    }

    pub(crate) fn start_gpadl(&mut self, channel: ChannelId, count: usize) -> GpadlHandle {
        let range = GpaRange::whole_pages(pages(count)).unwrap();
        self.bus.create_gpadl(self.now, channel, &[range]).unwrap()
    }

    /// Takes a GPADL back.
    pub(crate) fn teardown(&mut self, handle: GpadlHandle) {
        self.bus.teardown_gpadl(self.now, handle).unwrap();
        self.wait(|event| *event == Event::GpadlTornDown(handle));
    }

    /// Opens a channel over a GPADL of 8 pages and waits for the outcome.
    pub(crate) fn open(&mut self, channel: ChannelId, ring: GpadlHandle) -> Result<(), OpenError> {
        self.bus.open(self.now, channel, &parameters(ring)).unwrap();
        self.opened(channel)
    }

    /// Waits for the outcome of an opening.
    pub(crate) fn opened(&mut self, channel: ChannelId) -> Result<(), OpenError> {
        match self
            .wait(|event| matches!(event, Event::Opened { channel: of, .. } if *of == channel))
        {
            Event::Opened { result, .. } => result,
            _ => unreachable!(),
        }
    }

    /// The messages of this type that the guest posted.
    pub(crate) fn posted_count(&self, kind: MessageType) -> usize {
        self.posted
            .iter()
            .filter(|(_, payload)| payload.message_type() == kind)
            .count()
    }

    /// Panics when the host dropped a message of the guest, or the guest complains of the host.
    pub(crate) fn assert_clean(&self) {
        let dropped = |event: &&HostEvent| matches!(event, HostEvent::Dropped { .. });
        let dropped: Vec<_> = self.host_events.iter().filter(dropped).collect();
        assert!(dropped.is_empty(), "{dropped:?}");
        assert_eq!(self.bus.violations(), 0, "{:?}", self.events);
    }
}

/// Pages that do not lie side by side.
pub(crate) fn pages(count: usize) -> impl Iterator<Item = PageNumber> {
    (0..count as u64).map(|i| PageNumber(0x10_0000 + 3 * i))
}

/// Rings of four pages each.
pub(crate) fn parameters(ring: GpadlHandle) -> OpenParameters {
    OpenParameters {
        ring,
        downstream_page: 4,
        target_vp: VpIndex(0),
        user_data: [0; 120],
    }
}

/// Every message has exactly the size that the table gives for the version in use.
pub(crate) fn check_size(payload: &Payload, version: Option<Version>) {
    let kind = payload.message_type();
    let info = MessageInfo::of(kind).unwrap();
    assert_eq!(info.direction, Direction::ToHost, "{kind}");
    let version = match InitiateContact::parse(payload) {
        Some((contact, _)) => Version(contact.version.get()),
        // After UNLOAD the guest has no version any more.
        None => version.unwrap_or(Version::V2_4),
    };
    let size = info.size(version, FeatureFlags::NONE);
    match kind {
        MessageType::GPADL_HEADER | MessageType::GPADL_BODY => {
            let fixed = size.unwrap();
            assert!(payload.len() > fixed && payload.len() <= 240);
            assert_eq!((payload.len() - fixed) % 8, 0);
        }
        _ => assert_eq!(Some(payload.len()), size, "{kind} of version {version}"),
    }
}
