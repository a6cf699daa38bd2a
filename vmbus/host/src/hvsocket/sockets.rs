//! Which connections there are: offers them, gives up those that the guest does not open, and keeps them within limits
//! (spec hvsock.md 2 and 3).

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::format;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};

use vmbus::protocol::{Guid, OfferFlags, Version};

use super::connection::{Connection, Stage};
use super::{Service, Stream};
use crate::bus::{ConnectRequest, Device};
use crate::complaints::Complaints;
use crate::message_faults::{MessageFault, MessageFaults};
use crate::provider::{Connector, HostLink};
use crate::sync::Mutex;

/// One second in units of 100 ns.
const SECOND: u64 = 10_000_000;

/// The first of the ports that the host's ends have.
const FIRST_PORT: u32 = 1 << 30;

/// What keeps a guest, and the host's programs, from growing the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// The most connections, those included that the guest has yet to open.
    pub connections: usize,
    /// How long the guest may take to open one, in units of 100 ns.
    pub open_time: u64,
    /// How long a guest that has finished may take to read what is left for it, in units of 100 ns.
    pub linger: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            open_time: 5 * SECOND,
            linger: 10 * SECOND,
        }
    }
}

/// What listens at the host.
pub trait Backend: Send {
    /// Connects to whoever listens for this service; it must not block. `None` when nobody does.
    fn connect(&mut self, service: Service) -> Option<Box<dyn Stream>>;
}

/// A connection to the guest that a program of the host has asked for.
pub struct HostConnection {
    /// What it asks for.
    pub service: Service,
    /// The program's half.
    pub stream: Box<dyn Stream>,
    /// What the program has sent already.
    pub first: Vec<u8>,
    /// Whether the program is told by a line that the guest has accepted.
    pub greet: bool,
}

/// What goes wrong with connecting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ConnectFault {
    /// The guest's request is neither refused nor followed by an offer.
    NoAnswer,
    /// The offer names another endpoint than the guest asked for.
    WrongEndpoint,
    /// The guest's request is refused though somebody listens.
    Refuse,
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Counts {
    /// Connections now, those included that the guest has yet to open.
    pub connections: u64,
    /// Connections that were offered because the guest asked.
    pub from_guest: u64,
    /// Connections that were offered because a program of the host asked.
    pub from_host: u64,
    /// Requests of the guest that were refused.
    pub refused: u64,
    /// Offers that the guest did not open in time.
    pub expired: u64,
    /// Requests of programs that could not even be offered.
    pub dropped: u64,
    /// Bytes that came from the guest.
    pub bytes_from_guest: u64,
    /// Bytes that went to the guest.
    pub bytes_to_guest: u64,
    /// How often the guest did what no guest may do.
    pub complaints: u64,
}

/// What connections and handles share.
pub(super) struct Core {
    pub(super) limits: Limits,
    pub(super) faults: Mutex<MessageFaults>,
    pub(super) from_guest: AtomicU64,
    pub(super) to_guest: AtomicU64,
    link: Mutex<Option<HostLink>>,
    waiting: Mutex<VecDeque<HostConnection>>,
    connect_faults: Mutex<VecDeque<ConnectFault>>,
    counts: Mutex<Counts>,
    complaints: Mutex<Complaints>,
}

impl Core {
    pub(super) fn wake(&self) {
        let link = self.link.lock().clone();
        if let Some(link) = link {
            link.wake();
        }
    }

    pub(super) fn complain(&self, what: &'static str) {
        self.complaints.lock().add(what);
    }
}

/// What any thread can do with the sockets of a guest. Clones are the same.
#[derive(Clone)]
pub struct SocketsHandle(Arc<Core>);

impl SocketsHandle {
    /// Has a connection offered to the guest. When it comes to nothing, the stream is dropped, which ends it for the
    /// program; so it is at once when too many wait.
    pub fn connect(&self, connection: HostConnection) {
        let mut waiting = self.0.waiting.lock();
        if waiting.len() < self.0.limits.connections {
            waiting.push_back(connection);
            drop(waiting);
            self.0.wake();
        } else {
            drop(waiting);
            self.0.counts.lock().dropped += 1;
        }
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        Counts {
            bytes_from_guest: self.0.from_guest.load(Ordering::Relaxed),
            bytes_to_guest: self.0.to_guest.load(Ordering::Relaxed),
            complaints: self.0.complaints.lock().total(),
            ..*self.0.counts.lock()
        }
    }

    /// What the guest did that no guest may do: the first of it.
    pub fn complaints(&self) -> Vec<&'static str> {
        self.0.complaints.lock().first().into()
    }

    /// The next `count` packets to the guest, on whichever connection, have this fault.
    pub fn inject(&self, fault: MessageFault, count: u32) {
        self.0.faults.lock().inject(fault, count);
    }

    /// The guest's next request meets this fault, behind those asked for before.
    pub fn inject_connect(&self, fault: ConnectFault) {
        self.0.connect_faults.lock().push_back(fault);
    }

    /// Nothing goes wrong any more.
    pub fn heal(&self) {
        self.0.faults.lock().clear();
        self.0.connect_faults.lock().clear();
    }
}

impl fmt::Debug for SocketsHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counts().fmt(f)
    }
}

/// The sockets of a guest: what its host connects it with.
pub struct Sockets {
    core: Arc<Core>,
    backend: Box<dyn Backend>,
    /// The guest's, while it is on the bus.
    version: Option<Version>,
    requests: VecDeque<ConnectRequest>,
    tracked: Vec<Tracked>,
    next_port: u32,
}

/// A connection that was offered.
struct Tracked {
    endpoint: Guid,
    service: Guid,
    /// What the guest asked, if it did.
    asked: Option<ConnectRequest>,
    stage: Arc<Mutex<Stage>>,
    /// When the guest's time to open it ends.
    until: Option<u64>,
}

impl Sockets {
    /// Sockets of a guest, which connect it to `backend`'s services.
    pub fn new(backend: impl Backend + 'static, limits: Limits) -> Self {
        Self {
            core: Arc::new(Core {
                limits,
                faults: Mutex::new(MessageFaults::new()),
                from_guest: AtomicU64::new(0),
                to_guest: AtomicU64::new(0),
                link: Mutex::new(None),
                waiting: Mutex::new(VecDeque::new()),
                connect_faults: Mutex::new(VecDeque::new()),
                counts: Mutex::new(Counts::default()),
                complaints: Mutex::new(Complaints::new()),
            }),
            backend: Box::new(backend),
            version: None,
            requests: VecDeque::new(),
            tracked: Vec::new(),
            next_port: FIRST_PORT,
        }
    }

    /// What any thread can do with them.
    pub fn handle(&self) -> SocketsHandle {
        SocketsHandle(self.core.clone())
    }

    fn link(&self) -> Option<HostLink> {
        self.core.link.lock().clone()
    }

    fn refuse(&self, request: ConnectRequest) {
        self.core.counts.lock().refused += 1;
        if let Some(link) = self.link() {
            link.refuse(request);
        }
    }

    /// Looks at the connections that were offered, and forgets those that are over.
    fn look(&mut self, now: u64) {
        let limit = now.saturating_add(self.core.limits.open_time);
        let mut never_offered = Vec::new();
        let counts = &self.core.counts;
        self.tracked.retain_mut(|tracked| {
            let mut stage = tracked.stage.lock();
            match &*stage {
                Stage::New | Stage::Open => true,
                Stage::Offered(link) => {
                    if *tracked.until.get_or_insert(limit) > now {
                        return true;
                    }
                    link.rescind();
                    *stage = Stage::Expired;
                    counts.lock().expired += 1;
                    false
                }
                Stage::NeverOffered => {
                    never_offered.extend(tracked.asked);
                    false
                }
                Stage::Expired | Stage::Over => false,
            }
        });
        for request in never_offered {
            self.refuse(request);
        }
    }

    /// Whether one more connection may be offered.
    fn has_room(&self) -> bool {
        let speaks = self.version >= Some(Version::V4_0);
        speaks && self.tracked.len() < self.core.limits.connections
    }

    fn is_taken(&self, service: Guid, endpoint: Guid) -> bool {
        let mut tracked = self.tracked.iter();
        tracked.any(|it| (it.service, it.endpoint) == (service, endpoint))
    }

    /// Answers a guest that asks for a service of the host.
    fn answer(&mut self, request: ConnectRequest) {
        let fault = self.core.connect_faults.lock().pop_front();
        let mut endpoint = request.endpoint;
        match fault {
            Some(ConnectFault::NoAnswer) => return,
            Some(ConnectFault::Refuse) => return self.refuse(request),
            Some(ConnectFault::WrongEndpoint) => endpoint.0 = endpoint.0.map(|byte| !byte),
            None => {}
        }
        if !self.has_room() || self.is_taken(request.service, request.endpoint) {
            return self.refuse(request);
        }
        let service = Service(request.service);
        match self.backend.connect(service) {
            Some(stream) => {
                self.core.counts.lock().from_guest += 1;
                let connection = Connection::new(self.core.clone(), stream, Vec::new(), &[]);
                self.offer(request.service, endpoint, Some(request), connection);
            }
            None => self.refuse(request),
        }
    }

    /// Offers the guest a connection that a program of the host asks for.
    fn call(&mut self, connection: HostConnection) {
        let HostConnection {
            service,
            stream,
            first,
            greet,
        } = connection;
        if !self.has_room() {
            self.core.counts.lock().dropped += 1;
            return;
        }
        let local = self.free_port(service);
        let greeting = match (greet, service.port_number()) {
            (false, _) => Vec::new(),
            (true, Some(_)) => format!("OK {local}\n").into(),
            (true, None) => format!("OK {}\n", local.0).into(),
        };
        self.core.counts.lock().from_host += 1;
        let connection = Connection::new(self.core.clone(), stream, greeting, &first);
        self.offer(service.0, local.0, None, connection);
    }

    /// A port for the host's end of a connection to this service.
    fn free_port(&mut self, service: Service) -> Service {
        loop {
            let port = Service::port(self.next_port);
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            // There are more ports than connections.
            if !self.is_taken(service.0, port.0) {
                return port;
            }
        }
    }

    fn offer(
        &mut self,
        service: Guid,
        endpoint: Guid,
        asked: Option<ConnectRequest>,
        (connection, stage): (Connection, Arc<Mutex<Stage>>),
    ) {
        let from_host = asked.is_none();
        let device = Device {
            flags: OfferFlags::ENUMERATE_DEVICE_INTERFACE
                .union(OfferFlags::NAMED_PIPE)
                .union(OfferFlags::TLNPI),
            user_data: user_data(from_host, self.version),
            ..Device::new(service, endpoint)
        };
        self.tracked.push(Tracked {
            endpoint,
            service,
            asked,
            stage,
            until: None,
        });
        if let Some(link) = self.link() {
            link.offer(device, Box::new(connection));
        }
    }
}

/// What the offer of a connection says besides (spec hvsock.md 2): a pipe of bytes, who asked, and no silo.
fn user_data(from_host: bool, version: Option<Version>) -> [u8; 120] {
    let mut data = [0; 120];
    // The pipe's type, 0, stands before; whether it is for a container, 0, and the silo behind.
    data[4] = u8::from(from_host);
    data[6] = u8::from(version >= Some(Version::V5_2));
    data
}

impl Connector for Sockets {
    fn attached(&mut self, link: HostLink) {
        *self.core.link.lock() = Some(link);
    }

    fn connected(&mut self, version: Version) {
        self.version = Some(version);
        // A program may have asked before.
        self.core.wake();
    }

    fn requested(&mut self, request: ConnectRequest) {
        if self.requests.len() < self.core.limits.connections {
            self.requests.push_back(request);
            self.core.wake();
        } else {
            self.refuse(request);
        }
    }

    fn serve(&mut self, now: u64) {
        self.look(now);
        while let Some(request) = self.requests.pop_front() {
            self.answer(request);
        }
        loop {
            let next = self.core.waiting.lock().pop_front();
            let Some(connection) = next else {
                break;
            };
            self.call(connection);
        }
        self.core.counts.lock().connections = self.tracked.len() as u64;
    }

    fn disconnected(&mut self) {
        self.version = None;
        self.requests.clear();
        // Those that were open have ended by themselves.
        for tracked in self.tracked.drain(..) {
            let mut stage = tracked.stage.lock();
            if let Stage::Offered(link) = &*stage {
                link.rescind();
                *stage = Stage::Expired;
            }
        }
        self.core.wake();
    }

    fn deadline(&self) -> Option<u64> {
        let offered = self.tracked.iter().filter(|tracked| {
            let stage = tracked.stage.lock();
            matches!(*stage, Stage::Offered(_))
        });
        // One that is new here has its time set when it is looked at.
        offered.map(|tracked| tracked.until.unwrap_or(0)).min()
    }
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.handle().fmt(f)
    }
}
