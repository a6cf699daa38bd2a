//! The heartbeat driver in C against a host's heartbeat component, in one process (spec ic.md 2 to 5).

#![allow(clippy::unwrap_used, unreachable_pub)]
#![cfg(target_arch = "x86_64")]

#[path = "../../host/tests/machine/support.rs"]
#[allow(dead_code, reason = "these tests need less of it")]
mod support;

use std::cell::Cell;
use std::sync::Arc;

use support::{SECOND, Vm};
use vmbus::ids::ChannelId;
use vmbus::kmcl::State;
use vmbus_c::Heartbeat;
use vmbus_host::bus::Profile;
use vmbus_host::integration::{
    self, ANSWER_FLAGS, Contact, Heartbeat as Provider, Host, REQUEST_FLAGS, Service, Stage,
    Version,
};

const OK: u32 = 0;
const FAILURE: u32 = 0x8000_4005;
const NOT_SUPPORTED: u32 = 0x8007_0032;
const INVALID_ARGUMENT: u32 = 0x8007_0057;

const NEGOTIATE: u16 = 0;
const BEAT: u16 = 1;

struct Setup {
    vm: Vm,
    id: Cell<ChannelId>,
    service: Arc<vmbus_host::sync::Mutex<Service<Provider>>>,
    driver: Heartbeat,
}

impl Setup {
    fn new(sequence: u64) -> Self {
        let vm = Vm::new(Profile::hyper_v());
        let (id, service) =
            integration::offer(&vm.machine, Host::HyperV, Provider::new(sequence)).unwrap();
        let driver = Heartbeat::start(vm.vmbus.client()).unwrap();
        vm.connect();
        Self {
            vm,
            id: Cell::new(id),
            service,
            driver,
        }
    }

    fn stage(&self) -> Stage {
        self.service.lock().stage()
    }

    fn answered(&self) -> u64 {
        self.service.lock().component.answered()
    }

    /// The host sends one odd message; the answers, without the pipe's header.
    fn odd(&self, message: Vec<u8>) -> Vec<Vec<u8>> {
        self.service.lock().send_raw(message);
        self.vm.machine.settle();
        self.service.lock().take_raw_answers()
    }

    /// The status of the one answer to an odd message.
    fn status(&self, message: Vec<u8>) -> u32 {
        let answers = self.odd(message);
        let [answer] = answers.as_slice() else {
            panic!("{} answers", answers.len());
        };
        assert_eq!(answer[17], ANSWER_FLAGS);
        u32::from_le_bytes(*answer[12..].first_chunk().unwrap())
    }

    fn assert_no_complaints(&self) {
        assert_eq!(self.service.lock().complaints(), [] as [&str; 0]);
        self.vm.assert_well_behaved();
    }
}

fn request(kind: u16, body: &[u8]) -> Vec<u8> {
    integration::message(kind, Version(3, 0), Version(3, 0), 7, REQUEST_FLAGS, body)
}

/// The body of a negotiation.
fn negotiation(frameworks: &[Version], messages: &[Version]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend_from_slice(&(frameworks.len() as u16).to_le_bytes());
    body.extend_from_slice(&(messages.len() as u16).to_le_bytes());
    body.extend_from_slice(&[0; 4]);
    for version in frameworks.iter().chain(messages) {
        body.extend_from_slice(&version.0.to_le_bytes());
        body.extend_from_slice(&version.1.to_le_bytes());
    }
    body
}

#[test]
fn it_picks_the_highest_versions_that_both_know() {
    let setup = Setup::new(1);
    let agreed = Stage::Ready {
        framework: Version(3, 0),
        message: Version(3, 0),
    };
    assert_eq!(setup.stage(), agreed);
    setup.assert_no_complaints();
}

#[test]
fn beats_go_back_plus_one_for_as_long_as_the_host_asks() {
    for sequence in [1, 0xFFFF_FFFE, u64::MAX - 1] {
        let setup = Setup::new(sequence);
        setup.vm.machine.advance(21 * SECOND);
        assert!(setup.answered() >= 10, "{} beats", setup.answered());
        let now = vmbus::hypervisor::Hypervisor::reference_time(&*setup.vm.machine);
        assert_eq!(setup.service.lock().component.contact(now), Contact::Ok);
        setup.assert_no_complaints();
    }
}

#[test]
fn it_negotiates_again_whenever_the_host_wants_to() {
    let setup = Setup::new(1);
    setup.service.lock().renegotiate();
    setup.vm.machine.advance(5 * SECOND);
    assert_eq!(setup.service.lock().negotiations(), 2);
    assert!(setup.answered() >= 2);
    setup.assert_no_complaints();
}

#[test]
fn versions_one_zero_and_three_zero_are_spoken_and_no_other() {
    let setup = Setup::new(1);
    let old = [Version(1, 0)];
    for (frameworks, messages, picked) in [
        (&old[..], &old[..], Some((old[0], old[0]))),
        (
            &[Version(1, 0), Version(3, 0), Version(4, 0)],
            &[Version(2, 0), Version(1, 0)],
            Some((Version(3, 0), Version(1, 0))),
        ),
        (&[Version(2, 0)], &old[..], None),
        (&old[..], &[Version(3, 1)], None),
        (&[], &[], None),
    ] {
        let answers = setup.odd(request(NEGOTIATE, &negotiation(frameworks, messages)));
        let body = &answers[0][20..];
        match picked {
            Some((framework, message)) => assert_eq!(
                body[..16],
                negotiation(&[framework], &[message]),
                "{frameworks:?} {messages:?}"
            ),
            None => assert_eq!(body[..4], [0; 4], "{frameworks:?} {messages:?}"),
        }
        let beats = setup.status(request(BEAT, &[0; 40]));
        assert_eq!(beats, if picked.is_some() { OK } else { FAILURE });
    }
}

#[test]
fn messages_that_make_no_sense_are_refused_or_ignored_and_the_driver_goes_on() {
    let setup = Setup::new(1);
    let lies = |count: u16| {
        let mut body = negotiation(&[Version(3, 0)], &[Version(3, 0)]);
        body[..2].copy_from_slice(&count.to_le_bytes());
        body[2..4].copy_from_slice(&count.to_le_bytes());
        body
    };
    assert_eq!(setup.status(request(9, &[0; 40])), NOT_SUPPORTED);
    assert_eq!(setup.status(request(BEAT, &[0; 4])), INVALID_ARGUMENT);
    let mut short = request(BEAT, &[0; 40]);
    short.truncate(28 + 16);
    short[4..8].copy_from_slice(&36u32.to_le_bytes());
    assert_eq!(setup.status(short), INVALID_ARGUMENT);
    assert_eq!(setup.status(request(NEGOTIATE, &[])), INVALID_ARGUMENT);
    for count in [2, 100, u16::MAX] {
        assert_eq!(
            setup.status(request(NEGOTIATE, &lies(count))),
            INVALID_ARGUMENT
        );
    }
    // Without an answer: shorter than a header, longer than any message, and what is no request.
    let mut headless = request(BEAT, &[]);
    headless.truncate(8 + 12);
    headless[4..8].copy_from_slice(&12u32.to_le_bytes());
    assert!(setup.odd(headless).is_empty());
    assert!(setup.odd(request(BEAT, &[0; 2000])).is_empty());
    let mut answer = request(BEAT, &[0; 40]);
    answer[25] = ANSWER_FLAGS;
    assert!(setup.odd(answer).is_empty());

    setup.service.lock().renegotiate();
    setup.vm.machine.advance(5 * SECOND);
    assert!(setup.answered() >= 2);
}

#[test]
fn after_a_rescind_the_next_device_is_served() {
    let setup = Setup::new(1);
    setup.vm.machine.advance(5 * SECOND);
    let before = setup.answered();
    assert!(before > 0);
    assert!(setup.vm.machine.rescind(setup.id.get()));
    // Hyper-V does not say when it has let go of a rescinded channel, and the guest waits for a while.
    setup.vm.machine.advance(10 * SECOND);
    setup.driver.attend();
    assert_eq!(setup.stage(), Stage::Closed);
    let next = integration::offer_again(&setup.vm.machine, &setup.service).unwrap();
    setup.id.set(next);
    setup.vm.machine.advance(5 * SECOND);
    assert!(setup.answered() > before);
    setup.assert_no_complaints();
}

#[test]
fn a_driver_that_is_dropped_closes_its_channel_and_waits_for_the_end() {
    let setup = Setup::new(1);
    assert!(setup.vm.machine.is_open(setup.id.get()));
    drop(setup.driver);
    assert!(!setup.vm.machine.is_open(setup.id.get()));
    let channels = setup.vm.vmbus.snapshot().channels;
    assert!(channels.iter().all(|info| info.state == State::Disabled));
    assert_eq!(setup.vm.machine.shared_runs(), 0);
    setup.vm.assert_well_behaved();
}

#[test]
fn two_instances_know_nothing_of_each_other() {
    let (first, second) = (Setup::new(1), Setup::new(1000));
    first.vm.machine.advance(9 * SECOND);
    assert!(first.answered() >= 4);
    drop(first);
    second.vm.machine.advance(9 * SECOND);
    assert!(second.answered() >= 4);
    second.assert_no_complaints();
}
