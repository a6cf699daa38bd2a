//! The host's SCSI controller, over packets and commands of a guest: every packet is answered, and memory that was not lent
//! stays as it is.

use std::collections::VecDeque;
use std::future::Future;
use std::num::NonZeroU16;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use serde::{Deserialize, Serialize};
use vmbus::Vmbus;
use vmbus::hypervisor::Hypervisor;
use vmbus::ids::PageNumber;
use vmbus::kmcl::{
    ChannelBuilder, EnabledChannel, ExternalData, PAGE_SIZE, Request, State, Timeout,
};
use vmbus::protocol::{Guid, interface};
use vmbus::shared::SharedPages;
use vmbus_host::bus::Profile;
use vmbus_host::disk::{Disk, Geometry, MemoryDisk};
use vmbus_host::machine::Machine;
use vmbus_host::storage::{Controller, Limits, Lun, Storvsp, scsi, vstor};
use vmbus_host::work::{Executor, Job};

use crate::guest::guest;
use crate::steps;

/// Something that happens between a guest and the controller.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// The guest sends these bytes, on which channel, and lends memory.
    Packet(u8, &'a [u8], Lent),
    /// The guest sends a command: to which unit, the CDB, the direction, and bytes of data.
    Command(u8, &'a [u8], u8, u16, Lent),
    /// The guest initialises with the version of this number.
    Initialise(u8),
    /// The guest opens a sub-channel that it was offered.
    OpenSubChannel(u8),
    /// One of the jobs that wait is done.
    Work(u8),
    /// A unit comes: a disk, or with `true` a drive.
    Add(u8, bool),
    /// A unit goes.
    Remove(u8),
    /// There is a disc in a drive, or none.
    Medium(u8, bool),
}

/// What memory a packet lends.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) enum Lent {
    /// None.
    Nothing,
    /// The guest's, from this byte on.
    Own(u16, u16),
    /// Pages that are not the guest's, from this number on, beyond [`RAM_END`].
    Foreign(u64, u16),
}

/// Page numbers from here on are never the guest's. A guest that lends its own rings ends its channel, and waits in vain.
const RAM_END: u64 = 1 << 32;

/// Versions as [`Step::Initialise`] counts them.
const VERSIONS: [u16; 5] = [0x0200, 0x0402, 0x0501, 0x0600, 0x0602];

/// Pages of the guest's that it lends from.
const PAGES: usize = 4;

/// What they hold.
const CONTENT: u8 = 0xA5;

/// Requests without an answer at one time.
const MAX_PENDING: usize = 64;

/// Jobs that wait until the input says so.
#[derive(Clone, Default)]
struct Jobs(Arc<Mutex<VecDeque<Job>>>);

impl Executor for Jobs {
    fn run(&self, job: Job) {
        self.0.lock().expect("nobody panics").push_back(job);
    }
}

impl Jobs {
    fn run_one(&self, which: u8) -> bool {
        let mut jobs = self.0.lock().expect("nobody panics");
        let index = usize::from(which) % jobs.len().max(1);
        let job = jobs.remove(index);
        drop(jobs);
        job.map(|job| job()).is_some()
    }
}

struct Guest {
    machine: Arc<Machine>,
    vmbus: Arc<Vmbus>,
    controller: Arc<Controller>,
    jobs: Jobs,
    channels: Vec<EnabledChannel>,
    memory: SharedPages,
    pending: Vec<(Request, Range<usize>)>,
}

fn disk() -> Lun {
    Lun::Disk(Arc::new(MemoryDisk::new(Geometry::of_bytes(1 << 20))))
}

fn disc() -> Arc<dyn Disk> {
    let disc = MemoryDisk::new(Geometry {
        sectors: 100,
        logical: 2048,
        physical: 2048,
    });
    Arc::new(disc.into_read_only())
}

fn drive() -> Lun {
    Lun::Dvd {
        identity: [2; 16],
        medium: Some(disc()),
    }
}

fn builder() -> ChannelBuilder {
    ChannelBuilder::new(interface::SCSI_CONTROLLER)
        .ring_pages(2, 8)
        .maximum_packet_size(256)
        .maximum_packet_count(MAX_PENDING * 4)
        .maximum_external_data(64 << 10, 1)
        .process_packet_callbacks(|_, packet| packet.complete(&[]), |_, _| {})
}

impl Guest {
    fn new() -> Option<Self> {
        let (machine, vmbus) = guest(Profile::hyper_v());
        let controller = Controller::new(Limits {
            sub_channels: 2,
            max_transfer: 64 << 10,
            depth: 8,
        });
        controller.add_lun(0, disk()).ok()?;
        controller.add_lun(1, drive()).ok()?;
        let jobs = Jobs::default();
        let provider = Storvsp::new(controller.clone(), Arc::new(jobs.clone()));
        machine.add(Storvsp::device(Guid([1; 16])), provider)?;
        vmbus.connect();
        machine.settle();
        let channel = builder().enable(vmbus.client()).ok()?;
        machine.settle();
        let memory = machine.share_pages(PAGES).ok()?;
        memory.write(0, &[CONTENT; PAGES * PAGE_SIZE]).ok()?;
        Some(Self {
            machine,
            vmbus,
            controller,
            jobs,
            channels: vec![channel],
            memory,
            pending: Vec::new(),
        })
    }

    fn send(&mut self, channel: u8, packet: &[u8], lent: Lent) {
        let index = usize::from(channel) % self.channels.len();
        let channel = self.channels[index].channel();
        // A sub-channel that nobody has offered.
        if channel.state() != State::Active {
            return;
        }
        let packet = &packet[..packet.len().min(256)];
        let mut external = ExternalData::new();
        let mut touched = 0..0;
        match lent {
            Lent::Nothing => {}
            Lent::Own(offset, length) => {
                let all = self.memory.len();
                let offset = usize::from(offset) % all;
                touched = offset..(offset + usize::from(length)).min(all);
                // An empty range cannot be lent.
                let _ = external.push(self.memory.clone(), touched.clone());
            }
            Lent::Foreign(first, length) => {
                let first = first | RAM_END;
                let pages: Vec<_> = (0..usize::from(length).div_ceil(PAGE_SIZE) as u64)
                    .map(|page| PageNumber(first.saturating_add(page)))
                    .collect();
                let _ = external.push_page_list(pages, 0..usize::from(length), Arc::new(()));
            }
        }
        let request = channel.request(packet, external, Timeout::Never);
        self.pending.push((request, touched));
    }

    fn initialise(&mut self, version: u8) {
        let version = VERSIONS[usize::from(version) % VERSIONS.len()].to_le_bytes();
        for operation in [7, 9, 10, 8, 13] {
            let mut packet = [0; 64];
            packet[0] = operation;
            packet[12..14].copy_from_slice(if operation == 13 { &[2, 0] } else { &version });
            self.send(0, &packet, Lent::Nothing);
        }
    }

    /// Takes what has been answered.
    fn settle(&mut self) {
        self.machine.settle();
        let mut context = Context::from_waker(Waker::noop());
        self.pending.retain_mut(|(request, _)| {
            let answer = match Pin::new(request).poll(&mut context) {
                Poll::Pending => return true,
                Poll::Ready(answer) => answer.expect("the channel stays open"),
            };
            assert!(matches!(answer.len(), 48 | 64), "a packet of some version");
            assert_eq!(answer[..4], [1, 0, 0, 0], "COMPLETE_IO");
            false
        });
    }

    fn check_memory(&self, touched: &[Range<usize>]) {
        let mut content = [0; PAGES * PAGE_SIZE];
        self.memory.read(0, &mut content).expect("in bounds");
        // In order of where they begin.
        let mut lent_to = 0;
        let end = content.len()..content.len();
        for range in touched.iter().cloned().chain(std::iter::once(end)) {
            if let Some(between) = content.get(lent_to..range.start) {
                let same = between == &[CONTENT; PAGES * PAGE_SIZE][..between.len()];
                assert!(same, "bytes {lent_to}..{} were not lent", range.start);
            }
            lent_to = lent_to.max(range.end);
        }
    }

    fn play(&mut self, step: Step<'_>) {
        match step {
            Step::Packet(channel, packet, lent) => self.send(channel, packet, lent),
            Step::Command(lun, cdb, direction, length, lent) => {
                let mut packet = [0; 64];
                (packet[0], packet[12], packet[19]) = (3, 0x34, lun);
                let cdb = &cdb[..cdb.len().min(16)];
                (packet[20], packet[21], packet[22]) = (cdb.len() as u8, 0x14, direction);
                packet[24..26].copy_from_slice(&length.to_le_bytes());
                packet[28..28 + cdb.len()].copy_from_slice(cdb);
                self.send(lun >> 4, &packet, lent);
            }
            Step::Initialise(version) => self.initialise(version),
            Step::OpenSubChannel(index) => {
                let index = NonZeroU16::new(u16::from(index % 2) + 1).expect("1 or 2");
                let primary = self.channels[0].channel();
                let builder = builder().sub_channel_of(primary, index);
                if self.channels.len() < 3
                    && let Ok(channel) = builder.enable(self.vmbus.client())
                {
                    self.channels.push(channel);
                }
            }
            Step::Work(which) => drop(self.jobs.run_one(which)),
            Step::Add(lun, false) => drop(self.controller.add_lun(lun, disk())),
            Step::Add(lun, true) => drop(self.controller.add_lun(lun, drive())),
            Step::Remove(lun) => drop(self.controller.remove_lun(lun)),
            Step::Medium(lun, present) => {
                let medium = present.then(disc);
                drop(self.controller.change_medium(lun, medium, false));
            }
        }
    }
}

/// The SCSI controller over what a guest sends. What waits for work waits until the input, or its end, has it done.
pub fn storvsp(data: &[u8]) {
    for version in [None, Some(vstor::ProtocolVersion::V6_2)] {
        if let Ok(vstor::Request::ExecuteSrb(srb)) = vstor::parse(data, version) {
            assert!((1..=vstor::MAX_CDB).contains(&srb.cdb().len()));
        }
    }
    // Anything is a command, or is refused.
    let _ = scsi::decode(data);
    let mut guest = Guest::new().expect("the machine has room");
    let mut touched = Vec::new();
    for step in steps(data) {
        guest.play(step);
        touched.extend(guest.pending.iter().map(|(_, touched)| touched.clone()));
        guest.settle();
        if guest.pending.len() > MAX_PENDING {
            while guest.jobs.run_one(0) {}
            guest.settle();
        }
        touched.sort_by_key(|range| (range.start, range.end));
        touched.dedup();
    }
    loop {
        let worked = guest.jobs.run_one(0);
        guest.settle();
        if !worked {
            break;
        }
    }
    guest.check_memory(&touched);
    assert!(guest.pending.is_empty(), "every packet is answered");
    let counts = guest.controller.counts();
    assert_eq!(counts.in_flight, 0);
    assert_eq!(counts.packets.broken_rings, 0);
    // The bus keeps a channel, and so its machine, until the host has closed it.
    guest.channels.clear();
    guest.settle();
}
