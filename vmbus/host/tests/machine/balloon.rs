//! The balloon driver against a host that behaves as QEMU does.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use vmbus::drivers::balloon::message::CAPABILITIES;
use vmbus::drivers::balloon::protocol::floor;
use vmbus::drivers::balloon::{Balloon, Figures, GuestMemory, PageRange, Phase, Version};
use vmbus::ids::ChannelId;
use vmbus::protocol::{Guid, interface};
use vmbus_host::bus::{Device, Profile};
use vmbus_host::dynamic_memory::{DynamicMemory, POST_INIT_WAIT, Report, State};
use vmbus_host::machine::SharedDynamicMemory;

use crate::support::{SECOND, Vm};

/// Pages in a MiB.
pub const MIB: u64 = 256;

const INSTANCE: Guid = Guid::literal("1eccfd72-4b41-45ef-b73a-4a6e44c12924");

/// Pages that the guest's own code and data take.
const USED: u64 = 2 * MIB;

/// Free pages that the guest needs to live.
const RESERVE: u64 = MIB;

/// The guest's memory: pages from 0, some used, some free.
pub struct Ram {
    total: u64,
    free: Mutex<BTreeSet<u64>>,
    /// Whether no two free pages lie side by side.
    scattered: bool,
}

impl Ram {
    pub fn new(total: u64) -> Arc<Self> {
        Arc::new(Self {
            total,
            free: Mutex::new((USED..total).collect()),
            scattered: false,
        })
    }

    /// Every second page is in use for good.
    fn scattered(total: u64) -> Arc<Self> {
        Arc::new(Self {
            total,
            free: Mutex::new((USED..total).filter(|page| page % 2 == 0).collect()),
            scattered: true,
        })
    }

    fn free(&self) -> u64 {
        self.free.lock().unwrap().len() as u64
    }
}

impl GuestMemory for Ram {
    fn figures(&self) -> Figures {
        let free = self.free();
        Figures {
            total: self.total,
            free,
            committed: USED,
            reserve: RESERVE,
        }
    }

    fn take(&self, wanted: u64, block: u64) -> Option<PageRange> {
        let mut free = self.free.lock().unwrap();
        let count = block.min(wanted);
        let first = if block == 1 {
            free.first().copied()?
        } else if self.scattered {
            return None;
        } else {
            free.iter()
                .copied()
                .filter(|page| page % block == 0)
                .find(|&page| {
                    // Contiguous in a sorted set: the last of the block is as many entries further.
                    free.range(page..page + block).count() as u64 == block
                })?
        };
        for page in first..first + count {
            assert!(free.remove(&page));
        }
        Some(PageRange { first, count })
    }

    fn give_back(&self, range: PageRange) {
        let mut free = self.free.lock().unwrap();
        for page in range.first..range.first + range.count {
            assert!(page >= USED && page < self.total);
            assert!(free.insert(page), "page {page} was free already");
        }
    }
}

/// Offers dynamic memory for a guest of `ram` pages.
pub fn offer(vm: &Vm, ram: u64) -> (ChannelId, Arc<vmbus_host::sync::Mutex<DynamicMemory>>) {
    let provider = Arc::new(vmbus_host::sync::Mutex::new(DynamicMemory::new(ram)));
    let device = Device::new(interface::DYNAMIC_MEMORY, INSTANCE);
    let id = vm
        .machine
        .add(device, SharedDynamicMemory(provider.clone()))
        .unwrap();
    vm.machine.settle();
    (id, provider)
}

/// Lets time pass, and serves the balloon at its deadlines as a kernel's task does.
pub fn run(vm: &Vm, balloon: &Balloon, time: u64) {
    use vmbus::hypervisor::Hypervisor;
    let end = vm.machine.reference_time() + time;
    loop {
        vm.machine.settle();
        let now = vm.machine.reference_time();
        match balloon.deadline() {
            Some(at) if at <= now => balloon.service(now),
            Some(at) if at <= end => vm.machine.advance(at - now),
            _ if now < end => vm.machine.advance(end - now),
            _ => return,
        }
    }
}

struct Setup {
    vm: Vm,
    id: ChannelId,
    provider: Arc<vmbus_host::sync::Mutex<DynamicMemory>>,
    ram: Arc<Ram>,
    balloon: Balloon,
}

impl Setup {
    fn new(ram: Arc<Ram>, prepare: impl FnOnce(&mut DynamicMemory)) -> Self {
        let vm = Vm::new(Profile::qemu());
        let (id, provider) = offer(&vm, ram.total);
        prepare(&mut provider.lock());
        let balloon = Balloon::new(vm.vmbus.client(), ram.clone()).unwrap();
        vm.connect();
        Self {
            vm,
            id,
            provider,
            ram,
            balloon,
        }
    }

    /// Past the time in which the host leaves a new guest alone.
    fn ready(ram: Arc<Ram>) -> Self {
        let setup = Self::new(ram, |_| {});
        setup.run(POST_INIT_WAIT);
        assert_eq!(setup.provider.lock().state(), State::Idle);
        setup
    }

    fn run(&self, time: u64) {
        run(&self.vm, &self.balloon, time);
    }

    /// The user wants the guest to have so many pages.
    fn target(&self, pages: u64) {
        self.provider.lock().set_target(pages);
        self.vm.machine.wake_provider(self.id);
        self.run(SECOND / 100);
    }

    /// The host sends a message of its own making.
    fn send(&self, kind: u16, id: u32, body: &[u8]) {
        let mut message = kind.to_le_bytes().to_vec();
        message.extend_from_slice(&(8 + body.len() as u16).to_le_bytes());
        message.extend_from_slice(&id.to_le_bytes());
        message.extend_from_slice(body);
        self.provider.lock().send_raw(message);
        self.vm.machine.wake_provider(self.id);
        self.run(0);
    }

    /// Guest, driver and host have the same figures, and nobody complains.
    fn assert_agreement(&self) {
        let held = self.balloon.status().ballooned_pages;
        assert_eq!(self.provider.lock().actual(), self.ram.total - held);
        assert_eq!(self.provider.lock().complaints(), [] as [&str; 0]);
        self.vm.assert_well_behaved();
    }
}

#[test]
fn the_newest_version_is_agreed_on() {
    let setup = Setup::new(Ram::new(256 * MIB), |_| {});
    let status = setup.balloon.status();
    assert_eq!(status.phase, Phase::Ready);
    assert_eq!(status.version, Some(Version::V2_0));
    assert_eq!(setup.provider.lock().capabilities(), Some(CAPABILITIES));
    setup.assert_agreement();
}

#[test]
fn older_versions_are_tried_in_turn() {
    for (newest, version) in [(0x1_0000, Version::V1_0), (0x0_0003, Version::V0_3)] {
        let setup = Setup::new(Ram::new(256 * MIB), |host| host.newest_version = newest);
        assert_eq!(setup.balloon.status().version, Some(version));
        setup.assert_agreement();
    }
}

#[test]
fn a_host_without_any_version_is_left_alone() {
    let setup = Setup::new(Ram::new(256 * MIB), |host| host.newest_version = 0);
    assert!(matches!(
        setup.balloon.status().phase,
        Phase::Refused(reason) if reason.contains("2.0, 1.0 and 0.3")
    ));
    assert_eq!(setup.balloon.deadline(), None);
}

#[test]
fn refused_capabilities_leave_the_device_idle() {
    let setup = Setup::new(Ram::new(256 * MIB), |host| {
        host.accepts_capabilities = false;
    });
    setup.run(100 * SECOND);
    assert!(matches!(setup.balloon.status().phase, Phase::Refused(_)));
    assert_eq!(setup.provider.lock().reports().0, 0);
}

#[test]
fn status_reports_come_every_second_with_true_figures() {
    let setup = Setup::new(Ram::new(256 * MIB), |_| {});
    setup.run(0);
    assert_eq!(setup.provider.lock().reports().0, 1, "the first at once");
    setup.run(10 * SECOND);
    let (count, report) = setup.provider.lock().reports();
    assert_eq!(count, 11);
    assert_eq!(
        report,
        Some(Report {
            available: setup.ram.free(),
            committed: USED + floor(256 * MIB),
        })
    );
    setup.assert_agreement();
}

#[test]
fn ballooned_pages_count_as_committed() {
    let setup = Setup::ready(Ram::new(256 * MIB));
    setup.target(200 * MIB);
    setup.run(2 * SECOND);
    let (_, report) = setup.provider.lock().reports();
    assert_eq!(
        report,
        Some(Report {
            available: 200 * MIB - USED,
            committed: USED + 56 * MIB + floor(256 * MIB),
        })
    );
}

#[test]
fn no_reports_when_the_host_wants_none() {
    let setup = Setup::new(Ram::new(256 * MIB), |host| host.status_reports = false);
    setup.run(100 * SECOND);
    assert_eq!(setup.provider.lock().reports().0, 0);
    assert!(!setup.balloon.status().reports);
    assert_eq!(setup.balloon.deadline(), None, "and the guest sleeps");
    setup.assert_agreement();
}

#[test]
fn up_and_down() {
    let setup = Setup::ready(Ram::new(512 * MIB));
    let free = setup.ram.free();
    setup.target(256 * MIB);
    assert_eq!(setup.provider.lock().actual(), 256 * MIB);
    assert_eq!(setup.ram.free(), free - 256 * MIB);
    let removed = setup.provider.lock().removed().to_vec();
    assert!(
        removed.iter().all(|&(first, _)| first % 512 == 0),
        "2 MiB blocks: {removed:?}"
    );
    setup.assert_agreement();
    setup.target(512 * MIB);
    assert_eq!(setup.provider.lock().actual(), 512 * MIB);
    assert_eq!(setup.ram.free(), free);
    setup.assert_agreement();
    for target in [300, 400, 350, 512, 280] {
        setup.target(target * MIB);
        assert_eq!(setup.provider.lock().actual(), target * MIB);
        setup.assert_agreement();
    }
}

#[test]
fn pages_that_make_no_whole_block_are_given_one_by_one() {
    let setup = Setup::ready(Ram::new(512 * MIB));
    setup.target(512 * MIB - 700);
    assert_eq!(setup.balloon.status().ballooned_pages, 700);
    setup.assert_agreement();
}

#[test]
fn scattered_memory_takes_several_messages() {
    let setup = Setup::ready(Ram::scattered(64 * MIB));
    setup.target(64 * MIB - 1500);
    assert_eq!(setup.balloon.status().ballooned_pages, 1500);
    assert_eq!(
        setup.provider.lock().balloon_responses(),
        3,
        "510 ranges in each message"
    );
    setup.assert_agreement();
    setup.target(64 * MIB);
    assert_eq!(setup.balloon.status().ballooned_pages, 0);
    setup.assert_agreement();
}

#[test]
fn an_answer_longer_than_the_ring_waits_for_room() {
    let setup = Setup::ready(Ram::scattered(64 * MIB));
    setup.target(64 * MIB - 4000);
    assert_eq!(setup.balloon.status().ballooned_pages, 4000);
    assert_eq!(setup.provider.lock().balloon_responses(), 8);
    setup.assert_agreement();
}

#[test]
fn memory_too_scattered_to_keep_track_of_stays_with_the_guest() {
    let setup = Setup::ready(Ram::scattered(128 * MIB));
    setup.target(128 * MIB - 6000);
    let status = setup.balloon.status();
    assert_eq!(status.ballooned_pages, 4095);
    assert!(status.partial_requests > 0);
    setup.assert_agreement();
    setup.target(128 * MIB);
    assert_eq!(setup.balloon.status().ballooned_pages, 0);
    setup.assert_agreement();
}

#[test]
fn an_answer_of_exactly_two_messages() {
    let setup = Setup::ready(Ram::scattered(64 * MIB));
    setup.target(64 * MIB - 1020);
    assert_eq!(setup.balloon.status().ballooned_pages, 1020);
    assert_eq!(setup.provider.lock().balloon_responses(), 2);
    setup.assert_agreement();
}

#[test]
fn the_guest_keeps_what_it_needs() {
    let setup = Setup::ready(Ram::new(512 * MIB));
    setup.target(MIB);
    assert_eq!(
        setup.provider.lock().actual(),
        USED + RESERVE,
        "as far as possible, and no further"
    );
    let status = setup.balloon.status();
    assert!(status.partial_requests > 0);
    assert_eq!(status.phase, Phase::Ready, "alive and well");
    setup.assert_agreement();
    setup.target(512 * MIB);
    assert_eq!(setup.provider.lock().actual(), 512 * MIB);
    setup.assert_agreement();
}

#[test]
fn the_guest_keeps_free_memory_to_live() {
    let ram = Ram::new(512 * MIB);
    // The guest uses nearly everything itself.
    ram.free.lock().unwrap().retain(|page| *page < 8 * MIB);
    let setup = Setup::ready(ram);
    setup.target(256 * MIB);
    assert_eq!(setup.ram.free(), RESERVE);
    assert_eq!(setup.balloon.status().ballooned_pages, 5 * MIB);
    setup.target(255 * MIB);
    assert_eq!(
        setup.ram.free(),
        RESERVE,
        "nothing to give: an empty answer"
    );
    setup.assert_agreement();
}

#[test]
fn floors_follow_the_sheet() {
    for (total, kept) in [(64, 40), (128, 72), (512, 168), (2048, 360), (8192, 744)] {
        assert_eq!(floor(total * MIB), kept * MIB, "{total} MiB");
    }
    assert_eq!(floor(4 * MIB), 4 * MIB, "a tiny guest keeps all it has");
    assert_eq!(floor(0), 0);
    assert!(floor(u64::MAX) < u64::MAX / 16);
}

#[test]
fn pages_that_the_host_never_got_are_refused() {
    let setup = Setup::ready(Ram::new(512 * MIB));
    setup.target(256 * MIB);
    let (free, held) = (setup.ram.free(), setup.balloon.status().ballooned_pages);
    let mut body = vec![0, 0, 0, 0, 3, 0, 0, 0];
    for (first, count) in [(0u64, 1u64), (1 << 39, 512), (5, 0)] {
        body.extend_from_slice(&(first | count << 40).to_le_bytes());
    }
    setup.send(8, 99, &body);
    let status = setup.balloon.status();
    assert_eq!(status.refusals, 3);
    assert_eq!(status.ballooned_pages, held);
    assert_eq!(setup.ram.free(), free);
    assert_eq!(status.phase, Phase::Ready);
}

#[test]
fn the_same_pages_do_not_come_back_twice() {
    let setup = Setup::ready(Ram::new(512 * MIB));
    setup.target(256 * MIB);
    let (first, _) = setup.provider.lock().removed()[0];
    let mut body = vec![0, 0, 0, 0, 2, 0, 0, 0];
    for _ in 0..2 {
        body.extend_from_slice(&(first | 512 << 40).to_le_bytes());
    }
    setup.send(8, 99, &body);
    assert_eq!(setup.balloon.status().refusals, 1);
    assert_eq!(setup.balloon.status().ballooned_pages, 254 * MIB);
}

#[test]
fn hot_add_is_answered_with_a_refusal() {
    let setup = Setup::ready(Ram::new(256 * MIB));
    setup.provider.lock().hot_add((1 << 20, 128 * MIB));
    setup.vm.machine.wake_provider(setup.id);
    setup.run(0);
    assert_eq!(
        setup.provider.lock().hot_add_answer(),
        Some((0, 1)),
        "no pages, and never any"
    );
    assert_eq!(setup.balloon.status().refusals, 1);
    setup.target(200 * MIB);
    assert_eq!(
        setup.provider.lock().actual(),
        200 * MIB,
        "and life goes on"
    );
}

#[test]
fn odd_messages_are_ignored_and_counted() {
    let setup = Setup::ready(Ram::new(256 * MIB));
    let odd: [(u16, &[u8]); 8] = [
        (0, &[]),
        (2, &1u64.to_le_bytes()),
        (4, &1u64.to_le_bytes()),
        (6, &[1, 2, 3]),
        (8, &[0, 0, 0, 0]),
        (8, &[0, 0, 0, 0, 255, 255, 255, 255]),
        (77, &[]),
        (0xFFFF, &[0; 100]),
    ];
    for (kind, body) in odd {
        setup.send(kind, 1, body);
    }
    // A header that tells of more than there is, and one shorter than itself.
    for size in [4000u16, 3] {
        let mut message = vec![6, 0];
        message.extend_from_slice(&size.to_le_bytes());
        message.extend_from_slice(&[0; 12]);
        setup.provider.lock().send_raw(message);
        setup.vm.machine.wake_provider(setup.id);
        setup.run(0);
    }
    let status = setup.balloon.status();
    assert_eq!(status.refusals, odd.len() as u64 + 2);
    assert_eq!(status.phase, Phase::Ready);
    setup.target(200 * MIB);
    assert_eq!(setup.provider.lock().actual(), 200 * MIB);
}

#[test]
fn the_most_memory_that_the_host_may_give_is_noted() {
    let setup = Setup::ready(Ram::new(256 * MIB));
    let mut body = vec![0, 0, 0, 0, 16, 0, 0, 0];
    body.extend_from_slice(&[0, 0, 0, 0, 8, 0, 0, 0]);
    body.extend_from_slice(&(1u64 << 33).to_le_bytes());
    setup.send(12, 1, &body);
    assert_eq!(setup.balloon.status().maximum_pages, Some(1 << 33));
    assert_eq!(setup.balloon.status().refusals, 0);
}

#[test]
fn a_silent_host_is_given_up_after_a_while() {
    use vmbus_host::provider::Manual;
    let vm = Vm::new(Profile::qemu());
    let device = Device::new(interface::DYNAMIC_MEMORY, INSTANCE);
    vm.machine.add(device, Manual).unwrap();
    let balloon = Balloon::new(vm.vmbus.client(), Ram::new(256 * MIB)).unwrap();
    vm.connect();
    assert_eq!(balloon.status().phase, Phase::Negotiating);
    run(&vm, &balloon, 10 * SECOND);
    assert!(matches!(balloon.status().phase, Phase::Refused(_)));
    assert_eq!(balloon.deadline(), None);
}

#[test]
fn random_targets_never_lose_a_page() {
    let setup = Setup::ready(Ram::new(64 * MIB));
    let mut seed = 1u64;
    for _ in 0..300 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        setup.target(seed % (64 * MIB) + 1);
        setup.assert_agreement();
        let status = setup.balloon.status();
        assert_eq!(setup.ram.free() + status.ballooned_pages, 64 * MIB - USED);
        assert!(setup.ram.free() >= RESERVE);
    }
}

#[test]
fn a_device_that_comes_back_is_served_again_with_the_pages_that_the_host_had() {
    let mut setup = Setup::ready(Ram::new(256 * MIB));
    setup.target(200 * MIB);
    assert_eq!(setup.balloon.status().ballooned_pages, 56 * MIB);
    assert!(setup.vm.machine.rescind(setup.id));
    setup.run(0);
    assert_eq!(setup.balloon.status().phase, Phase::Closed);
    assert!(setup.balloon.channel().attend(|_| false));
    let (id, provider) = offer(&setup.vm, setup.ram.total);
    (setup.id, setup.provider) = (id, provider);
    setup.run(POST_INIT_WAIT);
    let status = setup.balloon.status();
    assert_eq!(status.phase, Phase::Ready);
    assert_eq!(status.ballooned_pages, 56 * MIB);
    assert_eq!(setup.provider.lock().state(), State::Idle);
    setup.vm.assert_well_behaved();
}
