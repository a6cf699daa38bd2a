//! Integration components: the guest's drivers against a host's services, clause by clause (spec ic.md 2 to 7).

use std::cell::Cell;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use vmbus::drivers::ic::{self, Phase, Reply, Status};
use vmbus::drivers::shutdown::{Action, Reason, Shutdown, Withdrawn};
use vmbus::drivers::standing::Standing;
use vmbus::drivers::time_sync::TimeSync;
use vmbus::drivers::wall_clock::WallClock;
use vmbus::hypervisor::Hypervisor;
use vmbus::ids::ChannelId;
use vmbus::kmcl::State;
use vmbus::protocol::interface;
use vmbus_host::bus::Profile;
use vmbus_host::integration::{
    self as host, ANSWER_FLAGS, Component, Contact, GuestStatus, Host, REQUEST_FLAGS, SAMPLE, SYNC,
    Service, ShutdownRequest, Stage, Version,
};

use crate::support::{SECOND, Vm};

const OK: u32 = 0;
const FAILURE: u32 = 0x8000_4005;
const NOT_SUPPORTED: u32 = 0x8007_0032;
const INVALID_ARGUMENT: u32 = 0x8007_0057;

/// 1970-01-01 in units of 100 ns since 1601-01-01.
const UNIX_EPOCH: u64 = 116_444_736_000_000_000;

/// 2026-01-01 as hosts tell it, and as a time since the Unix epoch.
const NEW_YEAR: u64 = UNIX_EPOCH + NEW_YEAR_SECONDS * SECOND;
const NEW_YEAR_SECONDS: u64 = 1_767_225_600;

/// A guest with one driver, and a host that offers its component.
struct Setup<D, C> {
    vm: Vm,
    id: Cell<ChannelId>,
    service: Arc<vmbus_host::sync::Mutex<Service<C>>>,
    driver: D,
}

impl<D, C: Component> Setup<D, C> {
    /// Offers the component, and has the driver made and connected. `prepare` changes the service before.
    fn new(
        host: Host,
        component: C,
        driver: impl FnOnce(&Vm) -> D,
        prepare: impl FnOnce(&mut Service<C>),
    ) -> Self {
        let vm = Vm::new(match host {
            Host::HyperV => Profile::hyper_v(),
            Host::OpenVmm => Profile::openvmm(),
        });
        let (id, service) = host::offer(&vm.machine, host, component).unwrap();
        prepare(&mut service.lock());
        let driver = driver(&vm);
        vm.connect();
        Self {
            vm,
            id: Cell::new(id),
            service,
            driver,
        }
    }

    fn now(&self) -> u64 {
        self.vm.machine.reference_time()
    }

    /// Has the host do something, and lets both sides act on it.
    fn host<R>(&self, with: impl FnOnce(&mut Service<C>) -> R) -> R {
        let result = with(&mut self.service.lock());
        self.vm.machine.settle();
        result
    }

    /// The host sends one odd message; the answers, without the pipe's header.
    fn odd(&self, message: Vec<u8>) -> Vec<Vec<u8>> {
        self.host(|service| service.send_raw(message));
        self.service.lock().take_raw_answers()
    }

    fn stage(&self) -> Stage {
        self.service.lock().stage()
    }

    fn assert_ready(&self, framework: Version, message: Version) {
        assert_eq!(self.stage(), Stage::Ready { framework, message });
    }

    fn assert_no_complaints(&self) {
        assert_eq!(self.service.lock().complaints(), [] as [&str; 0]);
        self.vm.assert_well_behaved();
    }

    /// The device goes away.
    fn rescind(&self) {
        assert!(self.vm.machine.rescind(self.id.get()));
        self.vm.machine.settle();
    }

    /// It comes back.
    fn offer_again(&self) {
        self.id
            .set(host::offer_again(&self.vm.machine, &self.service).unwrap());
        self.vm.machine.settle();
    }

    /// What a kernel does after each piece of the bus's work, when the host has let go of the channel. Hyper-V says nothing about
    /// a rescinded one, and the guest waits for ten seconds.
    fn attend(&self, channel: &Standing) -> bool {
        if channel.channel().state() == State::Closing {
            self.vm.machine.advance(10 * SECOND);
        }
        let offers = self.vm.vmbus.snapshot().offers;
        let again = channel.attend(|wanted| offers.iter().any(|o| o.offer.interface == wanted));
        self.vm.machine.settle();
        again
    }
}

type ForShutdown = Setup<Shutdown, host::Shutdown>;

fn shutdown(prepare: impl FnOnce(&mut Service<host::Shutdown>)) -> ForShutdown {
    let driver = |vm: &Vm| Shutdown::new(vm.vmbus.client()).unwrap();
    Setup::new(Host::HyperV, host::Shutdown::new(), driver, prepare)
}

impl ForShutdown {
    fn ask(&self, flags: u32) {
        self.host(|service| service.component.ask(ShutdownRequest::new(flags)));
    }

    fn answer(&self) -> Option<u32> {
        self.vm.machine.settle();
        self.service.lock().component.answer()
    }
}

type ForTimeSync = Setup<TimeSync, host::TimeSync>;

fn time_sync(host: Host, prepare: impl FnOnce(&mut Service<host::TimeSync>)) -> ForTimeSync {
    let driver = |vm: &Vm| TimeSync::new(vm.vmbus.client(), Arc::new(WallClock::new())).unwrap();
    Setup::new(host, host::TimeSync::new(NEW_YEAR), driver, prepare)
}

impl ForTimeSync {
    /// The guest's UTC; `None` before the first sample.
    fn utc(&self) -> Option<Duration> {
        self.driver.clock().utc(self.now())
    }

    /// How far the guest is ahead of the host, in units of 100 ns.
    fn error(&self) -> i128 {
        let now = self.now();
        let guest = self.driver.clock().utc(now).unwrap().as_nanos() as i128 / 100;
        let host = self.service.lock().component.wall(now) - UNIX_EPOCH;
        guest - i128::from(host)
    }
}

// Negotiation

#[test]
fn every_version_of_shutdown_is_negotiated_with_every_framework() {
    for framework in [Version(1, 0), Version(3, 0)] {
        for message in [Version(1, 0), Version(3, 0), Version(3, 1), Version(3, 2)] {
            let setup = shutdown(|service| {
                service.framework = vec![framework];
                service.messages = vec![message];
            });
            setup.assert_ready(framework, message);
            setup.ask(0);
            let request = setup.driver.take_request().expect("asked");
            request.accept().unwrap();
            assert_eq!(setup.answer(), Some(OK));
            setup.assert_no_complaints();
        }
    }
}

#[test]
fn every_version_of_time_sync_is_negotiated_and_sets_the_clock() {
    for framework in [Version(1, 0), Version(3, 0)] {
        for message in [Version(1, 0), Version(3, 0), Version(4, 0)] {
            let setup = time_sync(Host::HyperV, |service| {
                service.framework = vec![framework];
                service.messages = vec![message];
            });
            setup.assert_ready(framework, message);
            assert_eq!(setup.error(), 0);
            setup.assert_no_complaints();
        }
    }
}

#[test]
fn hyper_v_offers_all_versions_and_the_highest_are_picked() {
    shutdown(|_| {}).assert_ready(Version(3, 0), Version(3, 2));
    time_sync(Host::HyperV, |_| {}).assert_ready(Version(3, 0), Version(4, 0));
}

#[test]
fn openvmm_offers_time_sync_4_0_only() {
    let setup = time_sync(Host::OpenVmm, |service| {
        assert_eq!(service.messages, [Version(4, 0)]);
    });
    setup.assert_ready(Version(3, 0), Version(4, 0));
    assert_eq!(setup.error(), 0);
}

#[test]
fn without_a_common_version_the_guest_says_so_and_takes_a_better_offer_later() {
    let setup = shutdown(|service| service.messages = vec![Version(2, 0), Version(9, 9)]);
    assert_eq!(setup.stage(), Stage::NoCommonVersion);
    assert_eq!(setup.driver.status().phase, Phase::NoCommonVersion);
    setup.host(|service| {
        service.messages.push(Version(3, 1));
        service.renegotiate();
    });
    setup.assert_ready(Version(3, 0), Version(3, 1));
    setup.assert_no_complaints();
}

#[test]
fn a_negotiation_that_comes_again_starts_over() {
    let setup = time_sync(Host::HyperV, |_| {});
    let before = setup.utc().unwrap();
    setup.vm.machine.advance(7 * SECOND);
    setup.host(|service| {
        service.messages = vec![Version(3, 0)];
        service.renegotiate();
    });
    setup.assert_ready(Version(3, 0), Version(3, 0));
    assert_eq!(setup.driver.status().component.negotiations, 2);
    setup.vm.machine.advance(20 * SECOND);
    assert!(setup.utc().unwrap() > before);
    assert_eq!(setup.error(), 0);
    setup.assert_no_complaints();
}

#[test]
fn a_negotiation_in_the_middle_of_a_request_waits_for_its_answer() {
    let setup = shutdown(|_| {});
    setup.ask(0);
    let request = setup.driver.take_request().expect("asked");
    setup.host(Service::renegotiate);
    // Guests do not read the next message before the answer to the first is sent.
    assert_eq!(setup.stage(), Stage::Negotiating);
    request.refuse().unwrap();
    setup.vm.machine.settle();
    setup.assert_ready(Version(3, 0), Version(3, 2));
    setup.ask(2);
    assert!(setup.driver.take_request().is_some());
    setup.assert_no_complaints();
}

#[test]
fn broken_version_lists_are_refused() {
    fn more_than_there_is(message: &mut Vec<u8>) {
        message.splice(host::HEADER..host::HEADER + 2, [200, 0]);
    }
    fn no_room_for_the_counts(message: &mut Vec<u8>) {
        message.truncate(host::HEADER + 4);
        message[4] = 24;
        message[18] = 4;
    }
    for alter in [more_than_there_is, no_room_for_the_counts] {
        let setup = shutdown(|service| service.alter = Some(alter));
        assert_eq!(setup.stage(), Stage::Failed(GuestStatus::INVALID_ARGUMENT));
        setup.host(|service| {
            service.alter = None;
            service.renegotiate();
        });
        setup.assert_ready(Version(3, 0), Version(3, 2));
        setup.assert_no_complaints();
    }
}

// Messages

/// A message of the shutdown component that the service knows nothing of.
fn odd_message(kind: u16, transaction: u8, flags: u8, body: &[u8]) -> Vec<u8> {
    host::message(kind, Version(3, 0), Version(3, 2), transaction, flags, body)
}

/// Status, transaction id and flags of an answer.
fn status_of(answer: &[u8]) -> (u32, u8, u8) {
    let status = answer[12..16].first_chunk().copied().unwrap();
    (u32::from_le_bytes(status), answer[16], answer[17])
}

#[test]
fn an_unknown_message_type_is_answered_as_not_supported() {
    let setup = shutdown(|_| {});
    for kind in [1, 2, 4, 8, 0xFFFF] {
        let answers = setup.odd(odd_message(kind, 7, REQUEST_FLAGS, b"what?"));
        assert_eq!(answers.len(), 1);
        assert_eq!(status_of(&answers[0]), (NOT_SUPPORTED, 7, ANSWER_FLAGS));
        assert_eq!(answers[0][20..], *b"what?");
    }
    assert_eq!(setup.driver.status().refused, 5);
    assert!(setup.driver.take_request().is_none());
}

#[test]
fn an_answer_has_the_transaction_id_of_its_request_and_all_its_bytes() {
    let setup = shutdown(|_| {});
    for transaction in [0, 1, 0x7F, 0xFF] {
        let message = odd_message(3, transaction, REQUEST_FLAGS, &[0; 12]);
        assert!(setup.odd(message.clone()).is_empty());
        setup.driver.take_request().unwrap().refuse().unwrap();
        setup.vm.machine.settle();
        let answers = setup.service.lock().take_raw_answers();
        assert_eq!(answers.len(), 1);
        assert_eq!(status_of(&answers[0]), (FAILURE, transaction, ANSWER_FLAGS));
        let (mut sent, mut answer) = (message[8..].to_vec(), answers[0].clone());
        sent.drain(12..18);
        answer.drain(12..18);
        assert_eq!(answer, sent);
    }
}

#[test]
fn a_truncated_request_is_an_invalid_argument() {
    let setup = shutdown(|_| {});
    let full = odd_message(3, 9, REQUEST_FLAGS, &[0; 2060]);
    for length in [0, 11, 12, 2059] {
        // The message says 2060 bytes and has fewer.
        let mut message = full[..host::HEADER + length].to_vec();
        message[4..8].copy_from_slice(&(20 + length as u32).to_le_bytes());
        let answers = setup.odd(message);
        assert_eq!(answers.len(), 1, "{length}");
        assert_eq!(status_of(&answers[0]), (INVALID_ARGUMENT, 9, ANSWER_FLAGS));
        assert!(setup.driver.take_request().is_none());
    }
}

#[test]
fn what_is_no_request_is_not_answered() {
    let setup = shutdown(|_| {});
    let mut ignored = 0;
    // Among them answers: two ends that answer answers never stop.
    for flags in [0, 1, 2, 4, 5, 7] {
        assert!(setup.odd(odd_message(3, 1, flags, &[0; 12])).is_empty());
        ignored += 1;
        assert_eq!(setup.driver.status().ignored, ignored);
    }
    // A message of the pipe, and no header in it.
    for length in [0u32, 1, 19] {
        let mut message = 1u32.to_le_bytes().to_vec();
        message.extend_from_slice(&length.to_le_bytes());
        message.resize(8 + length as usize, 0xFF);
        assert!(setup.odd(message).is_empty());
        ignored += 1;
        assert_eq!(setup.driver.status().ignored, ignored);
    }
    // One that is too long to be sent back.
    assert!(
        setup
            .odd(odd_message(3, 1, REQUEST_FLAGS, &[0; 2061]))
            .is_empty()
    );
    assert_eq!(setup.driver.status().ignored, ignored + 1);
    setup.ask(0);
    assert!(setup.driver.take_request().is_some());
}

#[test]
fn a_host_that_does_not_read_its_answers_loses_the_channel() {
    use vmbus::ring::Outgoing;
    let setup = shutdown(|_| {});
    let state = || setup.driver.channel().channel().state();
    // What nobody supports is answered at once. The host fills the guest's outgoing ring without ever looking.
    let message = odd_message(9, 1, REQUEST_FLAGS, &[0; 2000]);
    for _ in 0..32 {
        setup.vm.machine.channel(setup.id.get(), |channel| {
            let _ = channel.send(&Outgoing::in_band([&message, &[]]));
        });
        setup.vm.vmbus.run_work();
    }
    setup.vm.machine.settle();
    assert_eq!(state(), State::Disabled);
    // It is not opened again for the same device,
    assert!(!setup.attend(setup.driver.channel()));
    assert_eq!(state(), State::Disabled);
    // but for the next one.
    setup.rescind();
    assert!(setup.attend(setup.driver.channel()));
    setup.offer_again();
    setup.assert_ready(Version(3, 0), Version(3, 2));
}

// Rescind and re-offer

#[test]
fn a_device_that_comes_back_is_served_again() {
    let setup = time_sync(Host::HyperV, |_| {});
    for _ in 0..3 {
        setup.rescind();
        assert_eq!(setup.driver.status().component.phase, Phase::Closed);
        let before = setup.utc().unwrap();
        assert!(setup.attend(setup.driver.channel()));
        assert_eq!(setup.driver.channel().channel().state(), State::Enabled);
        assert!(!setup.attend(setup.driver.channel()));
        // The clock runs on meanwhile.
        setup.vm.machine.advance(3 * SECOND);
        assert!(setup.utc().unwrap() >= before + Duration::from_secs(3));
        setup.offer_again();
        setup.assert_ready(Version(3, 0), Version(4, 0));
        assert_eq!(setup.error(), 0);
        setup.assert_no_complaints();
    }
}

#[test]
fn a_device_that_comes_back_before_anybody_looks_is_served_again() {
    let setup = shutdown(|_| {});
    setup.rescind();
    setup.offer_again();
    assert_eq!(setup.stage(), Stage::Closed);
    assert!(setup.attend(setup.driver.channel()));
    setup.assert_ready(Version(3, 0), Version(3, 2));
    setup.assert_no_complaints();
}

#[test]
fn a_request_is_withdrawn_with_its_device() {
    let setup = shutdown(|_| {});
    setup.ask(0);
    let request = setup.driver.take_request().expect("asked");
    setup.rescind();
    setup.attend(setup.driver.channel());
    setup.offer_again();
    setup.ask(2);
    // The answer to the first is not taken for one to the second.
    assert_eq!(request.accept(), Err(Withdrawn));
    assert_eq!(setup.answer(), None);
    let request = setup.driver.take_request().expect("asked again");
    assert_eq!(request.request().action, Action::Restart);
    request.accept().unwrap();
    assert_eq!(setup.answer(), Some(OK));
    setup.assert_no_complaints();
}

// Shutdown

#[test]
fn a_shutdown_request_arrives_with_everything_that_the_host_says() {
    let setup = shutdown(|_| {});
    setup.host(|service| {
        service.component.ask(ShutdownRequest {
            reason: 0x8002_0003,
            timeout_seconds: 300,
            flags: 3,
            text: "maintenance, at last".into(),
        });
    });
    let request = setup.driver.take_request().expect("asked");
    let content = request.request();
    assert_eq!(content.action, Action::Restart);
    assert!(content.force);
    assert_eq!(content.reason, Reason(0x8002_0003));
    assert!(content.reason.is_planned());
    assert_eq!(content.timeout_seconds, 300);
    assert_eq!(content.text, "maintenance, at last");
    assert_eq!(setup.answer(), None);
    request.accept().unwrap();
    assert_eq!(setup.answer(), Some(OK));
    setup.assert_no_complaints();
}

#[test]
fn a_refused_or_dropped_request_fails_and_the_next_one_is_served() {
    let setup = shutdown(|_| {});
    setup.ask(0);
    setup.driver.take_request().unwrap().refuse().unwrap();
    assert_eq!(setup.answer(), Some(FAILURE));
    setup.ask(0);
    drop(setup.driver.take_request().unwrap());
    assert_eq!(setup.answer(), Some(FAILURE));
    setup.ask(1);
    setup.driver.take_request().unwrap().accept().unwrap();
    assert_eq!(setup.answer(), Some(OK));
    setup.assert_no_complaints();
}

#[test]
fn hibernation_is_refused_as_not_supported() {
    let setup = shutdown(|_| {});
    for (flags, status) in [
        (4, NOT_SUPPORTED),
        (5, NOT_SUPPORTED),
        (6, FAILURE),
        (8, FAILURE),
    ] {
        setup.ask(flags);
        assert!(setup.driver.take_request().is_none());
        assert_eq!(setup.answer(), Some(status));
    }
    setup.assert_no_complaints();
}

#[test]
fn the_host_has_the_answer_before_the_guest_leaves_vmbus() {
    let setup = shutdown(|_| {});
    setup.ask(0);
    setup.driver.take_request().unwrap().accept().unwrap();
    setup.vm.vmbus.begin_unload();
    setup.vm.machine.settle();
    assert_eq!(setup.service.lock().component.answer(), Some(OK));
    assert_eq!(
        setup.vm.vmbus.connection(),
        vmbus::ConnectionState::Unloaded { acknowledged: true }
    );
    setup.assert_no_complaints();
}

#[test]
fn who_waits_for_a_request_is_woken_by_it() {
    let setup = shutdown(|_| {});
    let mut next = pin!(setup.driver.next_request());
    let mut context = Context::from_waker(Waker::noop());
    assert!(next.as_mut().poll(&mut context).is_pending());
    setup.ask(2);
    match next.as_mut().poll(&mut context) {
        Poll::Ready(request) => request.accept().unwrap(),
        Poll::Pending => panic!("still waiting"),
    }
    assert_eq!(setup.answer(), Some(OK));
}

// Time sync

#[test]
fn there_is_no_time_before_the_first_sample() {
    let setup = time_sync(Host::HyperV, |service| {
        service.messages = vec![Version(9, 0)];
    });
    assert_eq!(setup.utc(), None);
    setup.host(|service| {
        service.messages = vec![Version(4, 0)];
        service.renegotiate();
    });
    assert_eq!(setup.utc().map(|utc| utc.as_secs()), Some(NEW_YEAR_SECONDS));
}

#[test]
fn the_first_sync_sets_the_clock_and_samples_every_five_seconds_keep_it() {
    let setup = time_sync(Host::OpenVmm, |_| {});
    setup.vm.machine.advance(60 * SECOND);
    let status = setup.driver.status();
    assert_eq!(status.clock.samples, 13);
    assert_eq!(status.clock.steps, 0);
    assert_eq!(status.clock.last_error, 0);
    assert_eq!(setup.error(), 0);
    assert!(
        setup
            .service
            .lock()
            .component
            .answers()
            .iter()
            .all(|&status| status == OK)
    );
    setup.assert_no_complaints();
}

#[test]
fn a_message_that_was_under_way_before_4_0_is_as_old_as_half_its_round_trip() {
    let setup = time_sync(Host::HyperV, |service| {
        service.messages = vec![Version(3, 0)];
        service.component.round_trip = 400;
    });
    setup.vm.machine.advance(60 * SECOND);
    assert_eq!(setup.error(), 0);
}

#[test]
fn sync_after_a_restore_moves_the_clock_forward_at_once() {
    let setup = time_sync(Host::HyperV, |_| {});
    let now = setup.now();
    setup.host(|service| {
        service.component.step(3600 * SECOND as i64);
        service.component.sync(now);
    });
    assert_eq!(setup.error(), 0);
    assert_eq!(setup.driver.status().clock.steps, 1);
    setup.assert_no_complaints();
}

#[test]
fn a_host_whose_clock_is_set_back_is_followed_without_going_back() {
    let setup = time_sync(Host::HyperV, |_| {});
    let now = setup.now();
    setup.host(|service| {
        service.component.step(-60 * SECOND as i64);
        service.component.sync(now);
    });
    let mut last = setup.utc().unwrap();
    for _ in 0..150 {
        setup.vm.machine.advance(SECOND);
        let next = setup.utc().unwrap();
        assert!(next > last);
        last = next;
    }
    // A minute at half speed takes two; then there is less than an eighth of a second to mend gently.
    assert!(
        (0..=1_250_000).contains(&setup.error()),
        "{}",
        setup.error()
    );
    setup.vm.machine.advance(256 * SECOND);
    assert_eq!(setup.error(), 0);
    setup.assert_no_complaints();
}

#[test]
fn absurd_and_old_samples_do_not_move_the_clock() {
    let setup = time_sync(Host::HyperV, |_| {});
    let now = setup.now();
    let before = setup.driver.status().clock;
    let absurd = [
        (0, now),
        (UNIX_EPOCH - 1, now),
        (u64::MAX, now),
        (NEW_YEAR, now + SECOND),
        (NEW_YEAR, u64::MAX),
    ];
    setup.host(|service| {
        for (wall, reference) in absurd {
            let body = service.component.body(wall, reference, SYNC);
            service.component.send_body(body);
        }
    });
    let status = setup.driver.status().clock;
    assert_eq!(status.refused, absurd.len() as u64);
    assert_eq!(status.samples, before.samples);
    assert!(
        setup.service.lock().component.answers()[1..]
            .iter()
            .all(|&status| status == INVALID_ARGUMENT)
    );
    setup.host(|service| {
        let body = service
            .component
            .body(NEW_YEAR + 99 * SECOND, now - 1, SAMPLE);
        service.component.send_body(body);
    });
    assert_eq!(setup.driver.status().clock.old, 1);
    assert_eq!(setup.error(), 0);
    setup.assert_no_complaints();
}

#[test]
fn a_probe_is_answered_and_moves_nothing() {
    let setup = time_sync(Host::HyperV, |_| {});
    let samples = setup.driver.status().clock.samples;
    setup.host(|service| {
        let body = service.component.body(NEW_YEAR + 99 * SECOND, 0, 0);
        service.component.send_body(body);
    });
    assert_eq!(setup.driver.status().clock.samples, samples);
    assert_eq!(setup.error(), 0);
    setup.assert_no_complaints();
}

// The heartbeat provider, against the simplest guest there is

/// A guest that answers heartbeats by a rule.
struct Heart(fn(&mut [u8]) -> Reply);

/// As the specification has it.
fn beat(body: &mut [u8]) -> Reply {
    let (number, _) = body.split_first_chunk_mut::<8>().unwrap();
    *number = u64::from_le_bytes(*number).wrapping_add(1).to_le_bytes();
    Reply::Now(Status::OK)
}

static HEART: ic::Component = ic::Component {
    name: "heartbeat",
    interface: interface::HEARTBEAT,
    kind: 1,
    versions: &[
        ic::Version::new(1, 0),
        ic::Version::new(3, 0),
        ic::Version::new(3, 1),
    ],
    longest_body: 40,
};

impl ic::Service for Heart {
    fn component(&self) -> &'static ic::Component {
        &HEART
    }

    fn request(&self, _now: u64, _version: ic::Version, body: &mut [u8]) -> Reply {
        (self.0)(body)
    }
}

type ForHeartbeat = Setup<ic::Integration, host::Heartbeat>;

fn heartbeat(component: host::Heartbeat, rule: fn(&mut [u8]) -> Reply) -> ForHeartbeat {
    let driver = |vm: &Vm| ic::Integration::new(vm.vmbus.client(), Arc::new(Heart(rule))).unwrap();
    let setup = Setup::new(Host::HyperV, component, driver, |_| {});
    setup.vm.machine.advance(20 * SECOND);
    setup
}

#[test]
fn heartbeats_come_every_two_seconds_and_go_back_plus_one() {
    for (sequence, size) in [(0, 40), (41, 16), (u64::MAX, 40)] {
        let mut component = host::Heartbeat::new(sequence);
        component.body_size = size;
        let setup = heartbeat(component, beat);
        let service = setup.service.lock();
        assert_eq!(service.version(), Some(Version(3, 1)));
        assert_eq!(service.component.sent(), 11);
        assert_eq!(service.component.answered(), 11);
        assert_eq!(service.component.contact(setup.now()), Contact::Ok);
        assert_eq!(service.complaints(), [] as [&str; 0]);
    }
}

#[test]
fn a_heart_that_stops_is_noticed() {
    let setup = heartbeat(host::Heartbeat::new(1), |_| Reply::Later);
    {
        let service = setup.service.lock();
        assert_eq!(service.component.sent(), 1);
        assert_eq!(service.component.contact(setup.now()), Contact::Never);
    }
    // The answer comes after all.
    assert!(setup.driver.answer(Status::FAILURE));
    setup.vm.machine.settle();
    let service = setup.service.lock();
    assert_eq!(
        service.complaints(),
        ["a heartbeat that is answered with a failure"]
    );
    drop(service);

    let setup = heartbeat(host::Heartbeat::new(1), |body| {
        if body[0] < 5 {
            beat(body)
        } else {
            Reply::Later
        }
    });
    let service = setup.service.lock();
    assert_eq!(service.component.answered(), 4);
    assert_eq!(service.component.contact(setup.now()), Contact::Lost);
}

#[test]
fn a_wrong_heartbeat_is_complained_about() {
    let wrong_number = |_: &mut [u8]| Reply::Now(Status::OK);
    assert!(
        heartbeat(host::Heartbeat::new(1), wrong_number)
            .service
            .lock()
            .complaints()
            .contains(&"a heartbeat with the wrong number")
    );
    let other_bytes = |body: &mut [u8]| {
        body[20] = 0;
        beat(body)
    };
    assert!(
        heartbeat(host::Heartbeat::new(1), other_bytes)
            .service
            .lock()
            .complaints()
            .contains(&"a heartbeat with other bytes changed")
    );
}
