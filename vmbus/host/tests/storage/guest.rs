//! A small storage driver for tests, over the guest's stack. Its packets are written byte by byte (spec storvsc.md 2), so that
//! it shares no constant with the host.

use std::num::NonZeroU16;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use vmbus::hypervisor::Hypervisor;
use vmbus::ids::{ChannelId, PageNumber, VpIndex};
use vmbus::kmcl::{
    Channel, ChannelBuilder, EnabledChannel, ExternalData, PAGE_SIZE, Request, SharedPages, Timeout,
};
use vmbus::protocol::{Guid, interface};
use vmbus_host::bus::Profile;
use vmbus_host::disk::Disk;
use vmbus_host::storage::{Controller, Limits, Lun, Storvsp};
use vmbus_host::work::{Executor, Inline};

use crate::support::{Vm, is_active};

pub const INSTANCE: Guid = Guid::literal("01020304-0506-0708-090a-0b0c0d0e0f10");

/// Every version.
pub const VERSIONS: [u16; 5] = [0x0200, 0x0402, 0x0501, 0x0600, 0x0602];

pub const BEGIN: u32 = 7;
pub const END: u32 = 8;
pub const QUERY_VERSION: u32 = 9;
pub const QUERY_PROPERTIES: u32 = 10;
pub const CREATE_SUB_CHANNELS: u32 = 13;
pub const EXECUTE: u32 = 3;
pub const RESET_LUN: u32 = 4;
pub const RESET_BUS: u32 = 6;

pub const SUCCESS: u32 = 0;
pub const INVALID_PARAMETER: u32 = 0xC000_000D;
pub const INVALID_DEVICE_REQUEST: u32 = 0xC000_0010;
pub const REVISION_MISMATCH: u32 = 0xC000_0059;
pub const INVALID_DEVICE_STATE: u32 = 0xC000_0184;

/// A packet of `size` bytes with this operation and what follows the header.
pub fn packet(size: usize, operation: u32, body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; size.max(12 + body.len())];
    packet[..4].copy_from_slice(&operation.to_le_bytes());
    packet[4] = 1;
    packet[12..12 + body.len()].copy_from_slice(body);
    packet
}

pub fn packet_size(version: u16) -> usize {
    if version >= 0x0501 { 64 } else { 48 }
}

/// Where the data of a command goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Data<'a> {
    None,
    /// So many bytes from the device.
    In(usize),
    /// These to the device.
    Out(&'a [u8]),
}

impl Data<'_> {
    fn len(&self) -> usize {
        match self {
            Data::None => 0,
            Data::In(length) => *length,
            Data::Out(bytes) => bytes.len(),
        }
    }
}

/// A packet with a command.
pub fn srb(version: u16, lun: u8, cdb: &[u8], data: Data<'_>) -> Vec<u8> {
    let size = packet_size(version);
    let mut packet = packet(size, EXECUTE, &[]);
    packet[12..14].copy_from_slice(&((size - 12) as u16).to_le_bytes());
    packet[19] = lun;
    packet[20] = cdb.len() as u8;
    packet[21] = if size == 64 { 0x14 } else { 0x12 };
    packet[22] = match data {
        Data::Out(_) => 0,
        Data::In(_) => 1,
        Data::None => 2,
    };
    packet[24..28].copy_from_slice(&(data.len() as u32).to_le_bytes());
    packet[28..28 + cdb.len()].copy_from_slice(cdb);
    packet
}

/// The answer to a command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct End {
    pub status: u32,
    pub srb_status: u8,
    pub scsi_status: u8,
    pub transferred: u32,
    pub sense: Vec<u8>,
    /// All of the guest's buffer.
    pub data: Vec<u8>,
}

impl End {
    pub fn read(answer: &[u8], data: Vec<u8>) -> Self {
        assert_eq!(answer[..4], 1u32.to_le_bytes(), "COMPLETE_IO");
        let length = usize::from(answer[21]);
        Self {
            status: u32::from_le_bytes(*answer[8..].first_chunk().unwrap()),
            srb_status: answer[14],
            scsi_status: answer[15],
            transferred: u32::from_le_bytes(*answer[24..].first_chunk().unwrap()),
            sense: answer[28..28 + length].to_vec(),
            data,
        }
    }

    /// The command was done; gives what was transferred.
    #[track_caller]
    pub fn good(self) -> Vec<u8> {
        assert_eq!(
            (self.status, self.srb_status, self.scsi_status),
            (0, 1, 0),
            "{self:?}"
        );
        assert!(self.sense.is_empty());
        let mut data = self.data;
        data.truncate(self.transferred as usize);
        data
    }

    /// The unit refused: sense key, code and qualifier.
    #[track_caller]
    pub fn check(&self) -> (u8, u8, u8) {
        assert_eq!(
            (self.srb_status, self.scsi_status),
            (0x84, 2),
            "an error with sense data: {self:?}"
        );
        assert_eq!(self.transferred, 0);
        self.sense_code()
    }

    /// Sense key, code and qualifier.
    #[track_caller]
    pub fn sense_code(&self) -> (u8, u8, u8) {
        assert_eq!(self.sense.len(), 18);
        assert_eq!(self.sense[0] & 0x7F, 0x70);
        (self.sense[2], self.sense[12], self.sense[13])
    }
}

pub const ILLEGAL_OPCODE: (u8, u8, u8) = (5, 0x20, 0);
pub const OUT_OF_RANGE: (u8, u8, u8) = (5, 0x21, 0);
pub const INVALID_FIELD: (u8, u8, u8) = (5, 0x24, 0);
pub const NO_MEDIUM: (u8, u8, u8) = (2, 0x3A, 1);
pub const POWER_ON: (u8, u8, u8) = (6, 0x29, 0);

/// Tells a test on another thread that the machine has something to do.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let rung = self.rung.lock().unwrap();
        let patience = Duration::from_secs(60);
        let (mut rung, time) = self
            .changed
            .wait_timeout_while(rung, patience, |rung| !*rung)
            .unwrap();
        assert!(!time.timed_out(), "the host does nothing more");
        *rung = false;
    }
}

/// A packet that waits for its answer, and the memory that it lends.
pub struct Pending {
    request: Request,
    memory: Option<(SharedPages, usize, usize)>,
}

impl Pending {
    fn poll(&mut self) -> Option<Vec<u8>> {
        let mut context = Context::from_waker(Waker::noop());
        match Pin::new(&mut self.request).poll(&mut context) {
            Poll::Ready(answer) => Some(answer.unwrap().to_vec()),
            Poll::Pending => None,
        }
    }

    fn data(&self) -> Vec<u8> {
        let Some((pages, offset, length)) = &self.memory else {
            return Vec::new();
        };
        let mut data = vec![0; *length];
        pages.read(*offset, &mut data).unwrap();
        data
    }
}

/// A guest with an open controller.
pub struct Guest {
    pub vm: Vm,
    pub controller: Arc<Controller>,
    pub id: ChannelId,
    /// The primary channel, and sub-channels.
    pub channels: Vec<EnabledChannel>,
    pub version: u16,
    notices: Arc<Mutex<Vec<Vec<u8>>>>,
    bell: Arc<Bell>,
}

impl Guest {
    /// A guest that has opened the channel and said nothing.
    pub fn silent(limits: Limits, executor: Arc<dyn Executor>) -> Self {
        Self::on(Controller::new(limits), executor, 32)
    }

    /// The same with this controller, and rings of so many pages.
    pub fn on(controller: Arc<Controller>, executor: Arc<dyn Executor>, pages: usize) -> Self {
        let vm = Vm::new(Profile::hyper_v());
        let provider = Storvsp::new(controller.clone(), executor);
        let id = vm.machine.add(Storvsp::device(INSTANCE), provider).unwrap();
        let bell = Arc::new(Bell::default());
        let ring = bell.clone();
        vm.machine
            .host(|host| host.on_wish(Arc::new(move || ring.ring())));
        vm.connect();
        let notices = Arc::default();
        let channel = vm.enable(&builder(&notices, pages));
        assert!(is_active(&channel));
        Self {
            vm,
            controller,
            id,
            channels: vec![channel],
            version: 0x0602,
            notices,
            bell,
        }
    }

    /// A guest that is ready for commands in the newest version, with one disk.
    pub fn with_disk(disk: Arc<dyn Disk>) -> Self {
        Self::with_lun(Lun::Disk(disk))
    }

    /// The same with any unit.
    pub fn with_lun(lun: Lun) -> Self {
        let guest = Self::silent(Limits::default(), Arc::new(Inline));
        guest.controller.add_lun(0, lun).unwrap();
        guest.ready(0x0602)
    }

    /// Initialises with this version.
    pub fn ready(mut self, version: u16) -> Self {
        self.initialise(version);
        self
    }

    /// One that has initialised with this version.
    pub fn of_version(self, version: u16) -> Self {
        Self { version, ..self }
    }

    pub fn initialise(&mut self, version: u16) {
        self.version = version;
        let size = packet_size(version);
        for (operation, body) in [
            (BEGIN, [0; 4]),
            (QUERY_VERSION, [version as u8, (version >> 8) as u8, 0, 0]),
            (QUERY_PROPERTIES, [0; 4]),
            (END, [0; 4]),
        ] {
            let (status, answer) = self.say(&packet(size, operation, &body));
            assert_eq!(status, SUCCESS, "operation {operation}");
            assert_eq!(answer.len(), size);
        }
    }

    pub fn primary(&self) -> &Channel {
        self.channels[0].channel()
    }

    /// Sends a packet on the primary channel; gives the status of the answer, and the answer.
    #[track_caller]
    pub fn say(&self, packet: &[u8]) -> (u32, Vec<u8>) {
        let answer = self.wait(self.begin(0, packet));
        assert_eq!(answer[..4], 1u32.to_le_bytes(), "COMPLETE_IO");
        let status = u32::from_le_bytes(*answer[8..].first_chunk().unwrap());
        (status, answer)
    }

    /// Sends a packet without data on a channel.
    pub fn begin(&self, channel: usize, packet: &[u8]) -> Pending {
        let channel = self.channels[channel].channel();
        Pending {
            request: channel.request(packet, ExternalData::new(), Timeout::Never),
            memory: None,
        }
    }

    /// Sends a packet that lends memory, which begins `offset` bytes into a page.
    pub fn lend(
        &self,
        channel: usize,
        packet: &[u8],
        offset: usize,
        length: usize,
        content: &[u8],
    ) -> Pending {
        let pages = (offset + length).div_ceil(PAGE_SIZE).max(1);
        let pages = self.vm.machine.share_pages(pages).unwrap();
        pages.write(offset, content).unwrap();
        let mut external = ExternalData::new();
        external
            .push(pages.clone(), offset..offset + length)
            .unwrap();
        let channel = self.channels[channel].channel();
        Pending {
            request: channel.request(packet, external, Timeout::Never),
            memory: Some((pages, offset, length)),
        }
    }

    /// Sends a packet that lends these pages in this order.
    pub fn lend_pages(&self, packet: &[u8], pages: Vec<PageNumber>, length: usize) -> Pending {
        self.lend_from(packet, pages, 0..length)
    }

    /// Sends a packet that lends a range of these pages, which nobody checks.
    pub fn lend_from(&self, packet: &[u8], pages: Vec<PageNumber>, range: Range<usize>) -> Pending {
        let mut external = ExternalData::new();
        external.push_page_list(pages, range, Arc::new(())).unwrap();
        Pending {
            request: self.primary().request(packet, external, Timeout::Never),
            memory: None,
        }
    }

    /// Waits for an answer, also if other threads work on it.
    pub fn wait(&self, mut pending: Pending) -> Vec<u8> {
        loop {
            self.vm.machine.settle();
            if let Some(answer) = pending.poll() {
                return answer;
            }
            self.bell.wait();
        }
    }

    /// The answer, if it is there without waiting.
    pub fn poll(&self, pending: &mut Pending) -> Option<End> {
        self.vm.machine.settle();
        let answer = pending.poll()?;
        Some(End::read(&answer, pending.data()))
    }

    pub fn finish(&self, mut pending: Pending) -> End {
        loop {
            if let Some(end) = self.poll(&mut pending) {
                return end;
            }
            self.bell.wait();
        }
    }

    /// Begins a command on a channel.
    pub fn start(&self, channel: usize, lun: u8, cdb: &[u8], data: Data<'_>) -> Pending {
        self.start_at(channel, lun, cdb, data, 0)
    }

    /// The same with data that begins `offset` bytes into a page.
    pub fn start_at(
        &self,
        channel: usize,
        lun: u8,
        cdb: &[u8],
        data: Data<'_>,
        offset: usize,
    ) -> Pending {
        let packet = srb(self.version, lun, cdb, data);
        match data {
            Data::None | Data::In(0) | Data::Out([]) => self.begin(channel, &packet),
            Data::In(length) => self.lend(channel, &packet, offset, length, &[]),
            Data::Out(bytes) => self.lend(channel, &packet, offset, bytes.len(), bytes),
        }
    }

    /// Has a command done by a unit.
    pub fn on_lun(&self, lun: u8, cdb: &[u8], data: Data<'_>) -> End {
        self.finish(self.start(0, lun, cdb, data))
    }

    /// Has a command done by unit 0.
    pub fn command(&self, cdb: &[u8], data: Data<'_>) -> End {
        self.on_lun(0, cdb, data)
    }

    /// What the host has told unasked.
    pub fn notices(&self) -> Vec<Vec<u8>> {
        self.vm.machine.settle();
        std::mem::take(&mut *self.notices.lock().unwrap())
    }

    /// Asks for sub-channels and opens them.
    pub fn add_sub_channels(&mut self, count: u16) {
        let body = count.to_le_bytes();
        let packet = packet(packet_size(self.version), CREATE_SUB_CHANNELS, &body);
        assert_eq!(self.say(&packet).0, SUCCESS);
        for index in 1..=count {
            let builder = builder(&self.notices, 32)
                .sub_channel_of(self.primary(), NonZeroU16::new(index).unwrap())
                .target_vp(VpIndex(u32::from(index)));
            let channel = self.vm.enable(&builder);
            assert!(is_active(&channel), "sub-channel {index}");
            self.channels.push(channel);
        }
    }
}

fn builder(notices: &Arc<Mutex<Vec<Vec<u8>>>>, pages: usize) -> ChannelBuilder {
    let notices = notices.clone();
    ChannelBuilder::new(interface::SCSI_CONTROLLER)
        .friendly_name("storage")
        .ring_pages(pages, pages)
        .maximum_packet_size(128)
        .maximum_packet_count(1024)
        .maximum_external_data(if pages < 32 { 64 << 10 } else { 8 << 20 }, 4)
        .process_packet_callbacks(
            move |_, packet| {
                notices.lock().unwrap().push(packet.payload().to_vec());
                packet.complete(&[]);
            },
            |_, _| {},
        )
}

/// READ(10) or WRITE(10).
pub fn ten(code: u8, block: u32, count: u16) -> [u8; 10] {
    let [a, b, c, d] = block.to_be_bytes();
    let [high, low] = count.to_be_bytes();
    [code, 0, a, b, c, d, 0, high, low, 0]
}

/// READ(16), WRITE(16) and others.
pub fn sixteen(code: u8, flags: u8, block: u64, count: u32) -> [u8; 16] {
    let mut cdb = [0; 16];
    cdb[0] = code;
    cdb[1] = flags;
    cdb[2..10].copy_from_slice(&block.to_be_bytes());
    cdb[10..14].copy_from_slice(&count.to_be_bytes());
    cdb
}

/// Bytes that differ from their neighbours.
pub fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    let next = move |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(next).collect()
}
