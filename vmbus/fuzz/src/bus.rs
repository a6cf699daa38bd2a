//! The guest's bus, its host saying anything at any time.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use vmbus::bus::{Bus, Config, Event, GpaRange, OpenParameters};
use vmbus::hypervisor::PostError;
use vmbus::ids::{ChannelId, GpadlHandle, PageNumber, VpIndex};
use vmbus::protocol::MAX_PAYLOAD;
use vmbus::protocol::sizes::{Direction, MessageInfo};

use crate::steps;

/// Something that the host, the guest or the clock does.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// A message from the host.
    Receive(&'a [u8]),
    /// The guest's next message is posted.
    Post,
    /// The guest's next message is not posted, and why.
    Refuse(u16),
    /// All of the guest's messages are posted.
    PostAll,
    /// Time goes by, in units of 100 ns.
    Tick(u32),
    Connect,
    Unload,
    /// So many pages for this channel.
    CreateGpadl(u32, u16),
    Teardown(u32),
    /// This channel over this GPADL.
    Open(u32, u32),
    Close(u32),
    Release(u32),
    Modify(u32),
}

/// A bus, and what its events say that there is.
struct Guest {
    bus: Bus,
    now: u64,
    /// Openings and GPADLs whose outcome has yet to come.
    opening: BTreeSet<u32>,
    creating: BTreeSet<u32>,
    /// GPADLs that the host has.
    created: BTreeSet<u32>,
    /// Channels that were offered and not rescinded.
    offered: BTreeSet<u32>,
}

impl Guest {
    fn forget(&mut self) {
        self.opening.clear();
        self.creating.clear();
        self.created.clear();
        self.offered.clear();
    }

    fn post(&mut self) -> bool {
        let Some(outgoing) = self.bus.poll_message() else {
            return false;
        };
        let kind = outgoing.payload.message_type();
        let info = MessageInfo::of(kind).expect("the guest sends messages that there are");
        assert_eq!(info.direction, Direction::ToHost, "{kind}");
        assert!(outgoing.payload.len() <= MAX_PAYLOAD);
        true
    }

    fn events(&mut self) {
        let mut violations = 0;
        while let Some(event) = self.bus.poll_event() {
            match event {
                Event::Connected { .. } | Event::Unloaded { .. } => self.forget(),
                Event::ConnectFailed(error) => {
                    assert!(!error.to_string().is_empty());
                    self.forget();
                }
                Event::Offered(offer) => {
                    assert!(offer.channel.index().is_some());
                    assert!(self.offered.insert(offer.channel.0), "offered twice");
                }
                Event::Rescinded(channel) => {
                    assert!(self.offered.remove(&channel.0), "never offered");
                    assert!(
                        !self.opening.contains(&channel.0),
                        "the outcome comes first"
                    );
                }
                Event::GpadlCreated { handle, result } => {
                    assert!(self.creating.remove(&handle.0), "an outcome twice");
                    if result.is_ok() {
                        self.created.insert(handle.0);
                    }
                }
                Event::GpadlTornDown(handle) => {
                    let was_created = self.created.remove(&handle.0);
                    assert!(
                        was_created || self.creating.remove(&handle.0),
                        "memory comes back twice"
                    );
                }
                Event::Opened { channel, .. } => {
                    assert!(self.opening.remove(&channel.0), "an outcome twice");
                }
                Event::Violation(violation) => {
                    violations += 1;
                    assert!(!violation.to_string().is_empty());
                }
                _ => {}
            }
        }
        assert!(violations <= 32, "a host cannot fill the log");
        let offers: BTreeSet<_> = self.bus.offers().map(|offer| offer.channel.0).collect();
        assert_eq!(offers, self.offered, "offers and events agree");
    }

    fn play(&mut self, step: &Step<'_>) {
        let now = self.now;
        match *step {
            Step::Receive(message) => self.bus.receive(now, message),
            Step::Post => drop(self.post()),
            Step::PostAll => while self.post() {},
            Step::Refuse(how) => {
                if self.post() {
                    let error = match how {
                        0 => PostError::InvalidConnection,
                        1 => PostError::Busy,
                        status => PostError::Status(status),
                    };
                    self.bus.message_refused(now, error);
                }
            }
            Step::Tick(by) => {
                self.now += u64::from(by);
                self.bus.tick(self.now);
                let deadline = self.bus.deadline();
                assert!(
                    deadline.is_none_or(|at| at > self.now),
                    "what was due is done"
                );
            }
            Step::Connect => {
                self.events();
                self.bus.connect(now);
                self.forget();
            }
            Step::Unload => {
                self.events();
                self.bus.unload(now);
                self.forget();
            }
            Step::CreateGpadl(channel, pages) => {
                self.events();
                let pages = (0..u64::from(pages) % 80).map(PageNumber);
                if let Ok(range) = GpaRange::whole_pages(pages)
                    && let Ok(handle) = self.bus.create_gpadl(now, ChannelId(channel), &[range])
                {
                    assert!(!self.created.contains(&handle.0), "handles are unique");
                    assert!(self.creating.insert(handle.0), "handles are unique");
                }
            }
            Step::Teardown(handle) => {
                self.events();
                let result = self.bus.teardown_gpadl(now, GpadlHandle(handle));
                // From now on the host alone decides when it lets go, and may never.
                if result.is_ok() && self.creating.remove(&handle) {
                    self.created.insert(handle);
                }
            }
            Step::Open(channel, ring) => {
                self.events();
                let parameters = OpenParameters {
                    ring: GpadlHandle(ring),
                    downstream_page: 2,
                    target_vp: VpIndex(0),
                    user_data: [0; 120],
                };
                if self.bus.open(now, ChannelId(channel), &parameters).is_ok() {
                    assert!(self.offered.contains(&channel), "open without an offer");
                    assert!(self.opening.insert(channel), "opened twice");
                }
            }
            Step::Close(channel) => {
                let _ = self.bus.close(ChannelId(channel));
            }
            Step::Release(channel) => {
                self.events();
                if self.bus.release(ChannelId(channel)).is_ok() {
                    assert!(!self.offered.contains(&channel), "it was rescinded");
                }
            }
            Step::Modify(channel) => {
                let channel = ChannelId(channel);
                let _ = self.bus.modify_target_vp(now, channel, VpIndex(1));
            }
        }
    }
}

/// A host that sends anything, and a guest that asks for anything: the bus stays sound, tells of each outcome once,
/// and when the host falls silent every question still has an outcome.
pub fn bus_messages(data: &[u8]) {
    let mut guest = Guest {
        bus: Bus::new(Config::default()),
        now: 1,
        opening: BTreeSet::new(),
        creating: BTreeSet::new(),
        created: BTreeSet::new(),
        offered: BTreeSet::new(),
    };
    steps(data).for_each(|step| guest.play(&step));
    for _ in 0..1000 {
        while guest.post() {}
        guest.events();
        let Some(deadline) = guest.bus.deadline() else {
            break;
        };
        guest.now = guest.now.max(deadline);
        guest.bus.tick(guest.now);
    }
    assert_eq!(guest.bus.deadline(), None, "the bus never comes to rest");
    assert_eq!(guest.opening, BTreeSet::new(), "openings without outcome");
    assert_eq!(guest.creating, BTreeSet::new(), "GPADLs without outcome");
}
