//! A guest without a library: its end of the bus, memory that it lends, and rings that it writes what it likes into.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use vmbus::bus::{Bus, Config, Event, GpaRange, OpenParameters, Violation};
use vmbus::hypervisor::PostError;
use vmbus::ids::{ChannelId, ConnectionId, GpadlHandle, PAGE_SIZE, PageNumber, VpIndex};
use vmbus::ring::{Outgoing, PacketBuffer, PushError, Reader, Ring, Signal, Writer};
use vmbus::shared::SharedPages;
use vmbus_host::bus::{Device, HvStatus, Profile};
use vmbus_host::host::Host;
use vmbus_host::memory::GuestMemory;
use vmbus_host::provider::Provider;

/// The guest's first page.
const FIRST: u64 = 0x100;

/// Channels that have rings: the first pages of the guest's memory.
pub(crate) const CHANNELS: u16 = 3;

/// Pages of a channel's rings, and of the first of them.
const RINGS: usize = 4;
const UPSTREAM: usize = 2;

/// Pages of all rings.
pub(crate) const ALL_RINGS: usize = CHANNELS as usize * RINGS;

/// Turns after which guest and host must have fallen silent.
const TURNS: usize = 10_000;

/// The guest, and the host that it is on.
pub(crate) struct Wire {
    host: Host,
    bus: Bus,
    /// All of its memory.
    pub(crate) memory: SharedPages,
    pub(crate) now: u64,
    /// The device's channels that it was offered, by sub-channel index.
    offers: BTreeMap<u16, (ChannelId, ConnectionId)>,
    channels: BTreeMap<u16, Rings>,
    /// GPADLs that the host knows.
    created: BTreeSet<GpadlHandle>,
    /// Those of them that the guest wants back though the device may use them.
    demanded: BTreeSet<GpadlHandle>,
    /// Channels that were opened, until somebody looks.
    opened: BTreeSet<ChannelId>,
    /// Channels that were taken away, until their numbers are given back.
    leaving: Vec<ChannelId>,
    /// Rings that the host may still have, and their GPADLs.
    busy: BTreeMap<GpadlHandle, u16>,
}

struct Rings {
    id: ChannelId,
    connection: ConnectionId,
    gpadl: GpadlHandle,
    reader: Reader,
    writer: Writer,
}

impl Wire {
    /// A guest with so many pages, on a host with one device, whose channel is not open yet.
    pub(crate) fn new(pages: usize, device: Device, provider: impl Provider + 'static) -> Self {
        let memory = SharedPages::from_heap(PageNumber(FIRST), pages).expect("the heap has room");
        let guest = GuestMemory::default();
        guest.add(&memory);
        let mut host = Host::new(Profile::hyper_v(), guest);
        host.add(device, provider).expect("there is a number");
        let mut wire = Self {
            host,
            bus: Bus::new(Config::default()),
            memory,
            now: 1,
            offers: BTreeMap::new(),
            channels: BTreeMap::new(),
            created: BTreeSet::new(),
            demanded: BTreeSet::new(),
            opened: BTreeSet::new(),
            leaving: Vec::new(),
            busy: BTreeMap::new(),
        };
        wire.bus.connect(wire.now);
        wire.settle();
        wire
    }

    /// Lets guest and host speak until neither has more to say.
    pub(crate) fn settle(&mut self) {
        for turn in 0.. {
            assert!(turn < TURNS, "they never fall silent");
            let mut moved = false;
            while let Some(outgoing) = self.bus.poll_message() {
                moved = true;
                let status = self
                    .host
                    .post(self.now, outgoing.connection, &outgoing.payload);
                if status != HvStatus::SUCCESS {
                    let error = PostError::InvalidConnection;
                    self.bus.message_refused(self.now, error);
                }
            }
            moved |= self.host.run(self.now).busy;
            while let Some(message) = self.host.poll_message(self.now) {
                moved = true;
                self.bus.receive(self.now, &message.payload);
            }
            while let Some(event) = self.bus.poll_event() {
                moved = true;
                self.handle(event);
            }
            let bus = &mut self.bus;
            self.leaving.retain(|id| bus.release(*id).is_err());
            if !moved {
                return;
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Offered(offer) => {
                let place = (offer.channel, offer.connection);
                self.offers.insert(offer.sub_channel_index, place);
            }
            Event::Rescinded(id) => {
                self.offers.retain(|_, (offered, _)| *offered != id);
                let open = self.channels.iter().find(|(_, rings)| rings.id == id);
                if let Some(index) = open.map(|(index, _)| *index) {
                    self.close(index);
                }
                self.leaving.push(id);
            }
            Event::GpadlCreated { handle, result } => {
                assert_eq!(result, Ok(()), "there is nothing wrong with it");
                self.created.insert(handle);
            }
            Event::GpadlTornDown(handle) => {
                self.created.remove(&handle);
                self.busy.remove(&handle);
                self.demanded.remove(&handle);
            }
            Event::Opened {
                channel,
                result: Ok(()),
            } => {
                self.opened.insert(channel);
            }
            // The device may keep it.
            Event::Violation(Violation::TeardownOverdue(handle))
                if self.demanded.contains(&handle) => {}
            Event::Violation(violation) => panic!("the host: {violation:?}"),
            Event::ConnectFailed(error) => panic!("{error}"),
            _ => {}
        }
    }

    /// Time goes by.
    pub(crate) fn advance(&mut self, by: u64) {
        self.now += by;
        self.bus.tick(self.now);
        self.settle();
    }

    /// When the host wants to go on by itself.
    pub(crate) fn deadline(&self) -> Option<u64> {
        self.host.deadline()
    }

    fn pages(range: Range<usize>) -> GpaRange {
        let pages = range.map(|page| PageNumber(FIRST + page as u64));
        GpaRange::whole_pages(pages).expect("there are some")
    }

    /// Lends whole pages over the primary channel.
    pub(crate) fn lend(&mut self, pages: Range<usize>) -> Option<GpadlHandle> {
        let (id, _) = *self.offers.get(&0)?;
        self.lend_for(id, pages)
    }

    fn lend_for(&mut self, id: ChannelId, pages: Range<usize>) -> Option<GpadlHandle> {
        let range = Self::pages(pages);
        let handle = self.bus.create_gpadl(self.now, id, &[range]).ok()?;
        self.settle();
        self.created.contains(&handle).then_some(handle)
    }

    /// Wants pages back that the device may keep until its channel is closed.
    pub(crate) fn demand(&mut self, handle: GpadlHandle) {
        self.demanded.insert(handle);
        self.take_back(handle);
    }

    /// Whether the device keeps what the guest wants back.
    pub(crate) fn keeps_demanded(&self) -> bool {
        !self.demanded.is_empty()
    }

    /// Wants pages back that nobody uses.
    pub(crate) fn take_back(&mut self, handle: GpadlHandle) {
        // The host may have been told before.
        let _ = self.bus.teardown_gpadl(self.now, handle);
        self.settle();
    }

    /// Whether the host still knows a GPADL.
    pub(crate) fn is_lent(&self, handle: GpadlHandle) -> bool {
        self.created.contains(&handle)
    }

    /// Whether a channel is open.
    pub(crate) fn is_open(&self, index: u16) -> bool {
        self.channels.contains_key(&index)
    }

    /// Opens a channel, if it is offered and its rings are free.
    pub(crate) fn open(&mut self, index: u16) -> bool {
        let free = index < CHANNELS && !self.busy.values().any(|busy| *busy == index);
        let Some(&(id, connection)) = self.offers.get(&index).filter(|_| free) else {
            return false;
        };
        let first = usize::from(index) * RINGS;
        let memory = self.memory.slice(first, RINGS).expect("its pages");
        memory.clear();
        let Some(gpadl) = self.lend_for(id, first..first + RINGS) else {
            return false;
        };
        self.busy.insert(gpadl, index);
        let parameters = OpenParameters {
            ring: gpadl,
            downstream_page: UPSTREAM as u32,
            target_vp: VpIndex(0),
            user_data: [0; 120],
        };
        let asked = self.bus.open(self.now, id, &parameters);
        let (out, back) = Ring::split(&memory, UPSTREAM).expect("they are two rings");
        let rings = Rings {
            id,
            connection,
            gpadl,
            reader: Reader::new(back),
            writer: Writer::new(out).expect("its offsets are zero"),
        };
        self.settle();
        let is_open = asked.is_ok() && self.opened.remove(&id);
        if is_open {
            self.channels.insert(index, rings);
        } else {
            self.take_back(gpadl);
        }
        is_open
    }

    /// Closes a channel.
    pub(crate) fn close(&mut self, index: u16) {
        let Some(rings) = self.channels.remove(&index) else {
            return;
        };
        // It may have been taken away.
        let _ = self.bus.close(rings.id);
        let _ = self.bus.teardown_gpadl(self.now, rings.gpadl);
    }

    /// Writes a packet. Returns whether there was room, and a channel at all.
    pub(crate) fn write(&mut self, index: u16, packet: &Outgoing<'_>) -> bool {
        let Some(rings) = self.channels.get_mut(&index) else {
            return false;
        };
        match rings.writer.push(packet) {
            Ok(()) => {}
            Err(PushError::Full { .. } | PushError::TooLarge { .. }) => return false,
            Err(PushError::Ring(error)) => panic!("the host broke the ring: {error}"),
        }
        if rings.writer.publish().expect("the ring is sound") == Signal::Needed {
            self.host.signal(rings.connection, 0);
        }
        true
    }

    /// Reads a packet. Returns whether there was one.
    pub(crate) fn read(&mut self, index: u16, packet: &mut PacketBuffer) -> bool {
        let Some(rings) = self.channels.get_mut(&index) else {
            return false;
        };
        let found = rings.reader.read(packet).expect("the ring is sound");
        if rings.reader.publish().expect("the ring is sound") == Signal::Needed {
            self.host.signal(rings.connection, 0);
        }
        found
    }

    /// Where a page of the guest's lies for the host.
    pub(crate) fn number(page: usize) -> PageNumber {
        PageNumber(FIRST + page as u64)
    }

    /// Reads the guest's memory.
    pub(crate) fn get(&self, at: usize, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read(at, &mut bytes).expect("in bounds");
        bytes
    }

    /// Leaves the bus.
    pub(crate) fn unload(&mut self) {
        self.channels.clear();
        self.bus.unload(self.now);
        self.settle();
    }
}

/// Bytes of pages.
pub(crate) const fn bytes(pages: usize) -> usize {
    pages * PAGE_SIZE
}
