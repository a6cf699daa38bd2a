//! Key-value exchange, clause by clause (spec ic.md 8): the host's end against a small guest end.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmbus::drivers::ic::{self, Integration, Reply as Answer, Status, Version as GuestVersion};
use vmbus::ids::ChannelId;
use vmbus::protocol::interface;
use vmbus_host::bus::Profile;
use vmbus_host::integration::kvp::{Entry, IpInformation, LONGEST_KEY, LONGEST_TEXT, Pool, Value};
use vmbus_host::integration::{
    GuestStatus, Handle, Host, Kvp, Reply, RequestError, Stage, Version,
};
use vmbus_host::message_faults::MessageFault;

use crate::support::{SECOND, Vm};

static COMPONENT: ic::Component = ic::Component {
    name: "kvp",
    interface: interface::KEY_VALUE_PAIRS,
    kind: 2,
    versions: &[
        GuestVersion::new(3, 0),
        GuestVersion::new(4, 0),
        GuestVersion::new(5, 0),
    ],
    longest_body: 7428,
};

/// Operations of a request.
const GET: u8 = 0;
const SET: u8 = 1;
const DELETE: u8 = 2;
const ENUMERATE: u8 = 3;
const GET_IP: u8 = 4;
const SET_IP: u8 = 5;

const NOT_FOUND: Status = Status(0x8004_1002);
const NO_MORE_ITEMS: Status = Status(0x8007_0103);

/// Type, key and value as they are on the wire; keys are what they are sorted by.
type Raw = (u32, Vec<u8>);

/// A guest end of KVP: keeps what it is told to keep, and speaks in bytes.
#[derive(Default)]
struct Guest {
    pools: Mutex<BTreeMap<(u8, Vec<u8>), Raw>>,
    /// The last message about addresses: version and bytes.
    ip: Mutex<Option<(GuestVersion, Vec<u8>)>>,
    /// Every operation that came, with its pool and length.
    seen: Mutex<Vec<(u8, u8, usize)>>,
    /// Does something else instead.
    instead: Mutex<Option<Instead>>,
}

type Instead = Box<dyn FnMut(&mut [u8]) -> Answer + Send>;

fn word(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(*bytes[at..].first_chunk().unwrap()) as usize
}

fn put(body: &mut [u8], at: usize, word: usize) {
    body[at..at + 4].copy_from_slice(&(word as u32).to_le_bytes());
}

impl Guest {
    fn fill(body: &mut [u8], at: usize, key: &[u8], value: &Raw) {
        put(body, at, value.0 as usize);
        put(body, at + 4, key.len());
        put(body, at + 8, value.1.len());
        body[at + 12..at + 12 + key.len()].copy_from_slice(key);
        body[at + 524..at + 524 + value.1.len()].copy_from_slice(&value.1);
    }
}

impl ic::Service for Guest {
    fn component(&self) -> &'static ic::Component {
        &COMPONENT
    }

    fn request(&self, _now: u64, version: GuestVersion, body: &mut [u8]) -> Answer {
        let (operation, pool) = (body[0], body[1]);
        self.seen
            .lock()
            .unwrap()
            .push((operation, pool, body.len()));
        if let Some(instead) = &mut *self.instead.lock().unwrap() {
            return instead(body);
        }
        let mut pools = self.pools.lock().unwrap();
        let key_at = |at: usize, size: usize| (pool, body[at..at + size].to_vec());
        Answer::Now(match operation {
            GET => match pools.get(&key_at(16, word(body, 8))) {
                Some(value) => {
                    let key = body[16..16 + word(body, 8)].to_vec();
                    Self::fill(body, 4, &key, value);
                    Status::OK
                }
                None => NOT_FOUND,
            },
            SET => {
                let key = key_at(16, word(body, 8));
                let value = body[528..528 + word(body, 12)].to_vec();
                pools.insert(key, (word(body, 4) as u32, value));
                Status::OK
            }
            DELETE => match pools.remove(&key_at(8, word(body, 4))) {
                Some(_) => Status::OK,
                None => NOT_FOUND,
            },
            ENUMERATE => {
                let mut of_pool = pools.iter().filter(|((of, _), _)| *of == pool);
                match of_pool.nth(word(body, 4)) {
                    Some(((_, key), value)) => {
                        Self::fill(body, 8, key, value);
                        Status::OK
                    }
                    None => NO_MORE_ITEMS,
                }
            }
            GET_IP => match &*self.ip.lock().unwrap() {
                Some((of, bytes)) if *of == version => {
                    body[2..].copy_from_slice(&bytes[2..]);
                    Status::OK
                }
                _ => NOT_FOUND,
            },
            SET_IP => {
                *self.ip.lock().unwrap() = Some((version, body.to_vec()));
                Status::OK
            }
            _ => Status::INVALID_ARGUMENT,
        })
    }
}

struct Setup {
    vm: Vm,
    id: ChannelId,
    kvp: Handle<Kvp>,
    guest: Arc<Guest>,
    driver: Integration,
}

const ALL: [Version; 3] = [Version(3, 0), Version(4, 0), Version(5, 0)];

impl Setup {
    fn new() -> Self {
        Self::with(&ALL)
    }

    /// A host that offers these versions.
    fn with(versions: &[Version]) -> Self {
        let vm = Vm::new(Profile::hyper_v());
        let kvp = Handle::new(Host::HyperV, Kvp::new());
        kvp.lock().messages = versions.into();
        let id = vm
            .machine
            .add(Handle::<Kvp>::device(), kvp.clone())
            .unwrap();
        let guest = Arc::new(Guest::default());
        let driver = Integration::new(vm.vmbus.client(), guest.clone()).unwrap();
        vm.connect();
        Self {
            vm,
            id,
            kvp,
            guest,
            driver,
        }
    }

    /// The answer, which comes at once.
    fn now<T>(&self, reply: Reply<Result<T, RequestError>>) -> Result<T, RequestError> {
        self.vm.machine.settle();
        reply.take().expect("answered")
    }

    fn set(&self, pool: Pool, key: &str, value: &Value) {
        assert_eq!(self.now(self.kvp.set(pool, key, value)), Ok(()));
    }

    fn instead(&self, act: impl FnMut(&mut [u8]) -> Answer + Send + 'static) {
        *self.guest.instead.lock().unwrap() = Some(Box::new(act));
    }

    fn as_usual(&self) {
        *self.guest.instead.lock().unwrap() = None;
    }

    fn assert_no_complaints(&self) {
        assert_eq!(self.kvp.lock().complaints(), [] as [&str; 0]);
        self.vm.assert_well_behaved();
    }
}

fn text(text: &str) -> Value {
    Value::Text(text.into())
}

fn ip() -> IpInformation {
    IpInformation {
        adapter: "{f8615163-0000-1000-2000-00155d010203}".into(),
        dhcp: true,
        addresses: vec![
            "10.0.0.2/24".parse().unwrap(),
            "fe80::5/64".parse().unwrap(),
        ],
        gateways: vec!["10.0.0.1".parse().unwrap()],
        dns: vec!["1.1.1.1".parse().unwrap()],
        unknown: vec![],
    }
}

#[test]
fn every_version_is_negotiated_and_keeps_values() {
    for version in ALL {
        let setup = Setup::with(&[version]);
        assert_eq!(setup.kvp.version(), Some(version));
        setup.set(Pool::External, "greeting", &text("grüße 🦀"));
        assert_eq!(
            setup.now(setup.kvp.get(Pool::External, "greeting")),
            Ok(text("grüße 🦀"))
        );
        setup.assert_no_complaints();
    }
    assert_eq!(Setup::new().kvp.version(), Some(Version(5, 0)));
}

#[test]
fn values_of_every_type_go_and_come_back_in_every_pool() {
    let setup = Setup::new();
    let values = [
        text(""),
        Value::Expandable("%HOME%".into()),
        Value::U32(7),
        Value::U64(u64::MAX),
    ];
    for pool in Pool::ALL {
        for value in &values {
            setup.set(pool, "key", value);
            assert_eq!(setup.now(setup.kvp.get(pool, "key")).as_ref(), Ok(value));
        }
    }
    setup.assert_no_complaints();
}

#[test]
fn messages_have_the_lengths_of_the_sheet() {
    let setup = Setup::with(&[Version(4, 0)]);
    setup.set(Pool::Guest, "key", &text("value"));
    setup.now(setup.kvp.get(Pool::Guest, "key")).unwrap();
    setup.now(setup.kvp.list(Pool::Guest)).unwrap();
    setup.now(setup.kvp.delete(Pool::Guest, "key")).unwrap();
    setup.now(setup.kvp.set_ip_information(&ip())).unwrap();
    setup.now(setup.kvp.ip_information("{x}")).unwrap();
    assert_eq!(
        *setup.guest.seen.lock().unwrap(),
        [
            (SET, 1, 2576),
            (GET, 1, 2576),
            (ENUMERATE, 1, 2580),
            (ENUMERATE, 1, 2580),
            (DELETE, 1, 520),
            (SET_IP, 1, 7428),
            (GET_IP, 1, 7428),
        ]
    );
}

#[test]
fn keys_and_text_on_the_wire_are_utf_16_with_an_end_that_counts() {
    let setup = Setup::new();
    setup.set(Pool::External, "ä", &text("🦀"));
    let pools = setup.guest.pools.lock().unwrap();
    let ((pool, key), (kind, value)) = pools.first_key_value().unwrap();
    assert_eq!((*pool, *kind), (0, 1));
    assert_eq!(*key, [0xE4, 0, 0, 0]);
    assert_eq!(*value, [0x3E, 0xD8, 0x80, 0xDD, 0, 0]);
}

#[test]
fn a_pool_is_listed_from_its_first_entry_to_its_last() {
    let setup = Setup::new();
    assert_eq!(setup.now(setup.kvp.list(Pool::Guest)), Ok(vec![]));
    let entries: Vec<_> = (10..60)
        .map(|number| Entry {
            key: format!("key {number}"),
            value: text(&format!("value {number}")),
        })
        .collect();
    for entry in &entries {
        setup.set(Pool::Guest, &entry.key, &entry.value);
    }
    setup.set(Pool::External, "other", &text("pool"));
    assert_eq!(setup.now(setup.kvp.list(Pool::Guest)), Ok(entries));
    setup.assert_no_complaints();
}

#[test]
fn a_key_is_found_by_going_through_its_pool_also_where_a_get_is_answered_wrongly() {
    let setup = Setup::new();
    for number in 10..15 {
        let value = text(&format!("value {number}"));
        setup.set(Pool::Guest, &format!("key {number}"), &value);
    }
    setup.guest.seen.lock().unwrap().clear();
    let find = |key| setup.now(setup.kvp.find(Pool::Guest, key));
    assert_eq!(find("key 12"), Ok(text("value 12")));
    let seen = std::mem::take(&mut *setup.guest.seen.lock().unwrap());
    assert_eq!(seen, [(ENUMERATE, 1, 2580); 3], "no further than the key");
    let missing = Err(RequestError::Guest(GuestStatus::NOT_FOUND));
    assert_eq!(find("key 1"), missing, "not the beginning of one");
    assert_eq!(
        setup.now(setup.kvp.find(Pool::External, "key 12")),
        missing,
        "not in another pool"
    );
    setup.assert_no_complaints();
    let refused = Err(RequestError::Guest(GuestStatus::MACHINE_LOCKED));
    setup.instead(|_| Answer::Now(Status(GuestStatus::MACHINE_LOCKED.0)));
    assert_eq!(setup.now(setup.kvp.find(Pool::Guest, "key 12")), refused);
}

#[test]
fn a_deleted_key_is_gone_and_the_guests_error_code_is_passed_on() {
    let setup = Setup::new();
    setup.set(Pool::External, "key", &text("value"));
    assert_eq!(setup.now(setup.kvp.delete(Pool::External, "key")), Ok(()));
    let gone = RequestError::Guest(GuestStatus::NOT_FOUND);
    assert_eq!(
        setup.now(setup.kvp.delete(Pool::External, "key")),
        Err(gone.clone())
    );
    assert_eq!(
        setup.now(setup.kvp.get(Pool::External, "key")),
        Err(gone.clone())
    );
    assert_eq!(
        gone.to_string(),
        "the guest answered: not found (0x80041002)"
    );
    for status in [GuestStatus::DISK_FULL, GuestStatus::MACHINE_LOCKED] {
        setup.instead(move |_| Answer::Now(Status(status.0)));
        let refused = Err(RequestError::Guest(status));
        assert_eq!(
            setup.now(setup.kvp.set(Pool::Guest, "k", &text("v"))),
            refused
        );
        assert_eq!(
            setup.now(setup.kvp.list(Pool::Guest)),
            Err(RequestError::Guest(status))
        );
    }
    setup.assert_no_complaints();
}

#[test]
fn what_is_too_long_never_leaves_the_host() {
    let setup = Setup::new();
    setup.set(
        Pool::Guest,
        &"k".repeat(LONGEST_KEY),
        &text(&"v".repeat(LONGEST_TEXT)),
    );
    let before = setup.guest.seen.lock().unwrap().len();
    let long_key = "k".repeat(LONGEST_KEY + 1);
    let long_value = text(&"v".repeat(LONGEST_TEXT + 1));
    for reply in [
        setup.kvp.set(Pool::Guest, &long_key, &text("v")),
        setup.kvp.set(Pool::Guest, "k", &long_value),
        setup.kvp.delete(Pool::Guest, &long_key),
    ] {
        assert!(matches!(
            reply.take(),
            Some(Err(RequestError::TooLong { .. }))
        ));
    }
    assert!(matches!(
        setup.kvp.set(Pool::Guest, "", &text("v")).take(),
        Some(Err(RequestError::Invalid(_)))
    ));
    assert_eq!(setup.guest.seen.lock().unwrap().len(), before);
    let error = setup.kvp.get(Pool::Guest, &long_key).take().unwrap();
    assert_eq!(error.unwrap_err().to_string(), "the key is longer than 255");
}

#[test]
fn addresses_are_text_before_5_0_and_binary_from_then_on() {
    for version in ALL {
        let setup = Setup::with(&[version]);
        assert_eq!(setup.now(setup.kvp.set_ip_information(&ip())), Ok(()));
        assert_eq!(
            setup.now(setup.kvp.ip_information("{f8615163}")),
            Ok(ip()),
            "{version}"
        );
        let kept = setup.guest.ip.lock().unwrap();
        let bytes = &kept.as_ref().unwrap().1;
        if version < Version(5, 0) {
            assert_eq!(bytes[2..6], [b'{', 0, b'f', 0]);
            assert_eq!(bytes[258..264], [3, 1, b'1', 0, b'0', 0]);
        } else {
            assert_eq!(bytes[4..16], [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
            assert_eq!(bytes[28..32], [b'{', 0, b'f', 0]);
            assert_eq!(bytes[284..286], [3, 1]);
            assert_eq!(bytes[288..292], [10, 0, 0, 2]);
        }
        setup.assert_no_complaints();
    }
}

#[test]
fn an_unknown_adapter_is_the_guests_error() {
    let setup = Setup::new();
    assert_eq!(
        setup.now(setup.kvp.ip_information("{what}")),
        Err(RequestError::Guest(GuestStatus::NOT_FOUND))
    );
}

#[test]
fn requests_are_sent_one_at_a_time_in_order_and_no_more_wait_than_there_is_room_for() {
    let setup = Setup::new();
    setup.instead(|_| Answer::Later);
    let replies: Vec<_> = (0..100)
        .map(|number| {
            setup
                .kvp
                .set(Pool::Guest, &format!("key {number}"), &text("v"))
        })
        .collect();
    setup.vm.machine.settle();
    assert_eq!(setup.guest.seen.lock().unwrap().len(), 1, "one at a time");
    let busy = replies
        .iter()
        .filter(|reply| matches!(reply.take(), Some(Err(RequestError::Busy))))
        .count();
    assert_eq!(busy, 36, "64 wait");
    setup.as_usual();
    assert!(setup.driver.answer(Status::OK));
    setup.vm.machine.settle();
    assert_eq!(setup.guest.seen.lock().unwrap().len(), 64);
    let done = replies.iter().filter(|reply| reply.take() == Some(Ok(())));
    assert_eq!(done.count(), 64);
    setup.assert_no_complaints();
}

#[test]
fn a_guest_that_takes_too_long_fails_the_request_and_its_late_answer_harms_nobody() {
    let setup = Setup::new();
    setup.instead(|_| Answer::Later);
    let first = setup.kvp.get(Pool::Guest, "slow");
    setup.vm.machine.advance(44 * SECOND);
    assert!(!first.is_done());
    setup.vm.machine.advance(2 * SECOND);
    assert_eq!(first.take(), Some(Err(RequestError::TimedOut)));
    // The guest reads nothing else before it has answered.
    setup.as_usual();
    let second = setup.kvp.set(Pool::Guest, "next", &text("value"));
    setup.vm.machine.settle();
    assert!(!second.is_done());
    assert!(setup.driver.answer(NOT_FOUND));
    setup.vm.machine.settle();
    assert_eq!(second.take(), Some(Ok(())));
    setup.assert_no_complaints();
}

#[test]
fn time_runs_for_requests_that_wait_behind_a_slow_one_too() {
    let setup = Setup::new();
    setup.kvp.lock().component.set_time_limit(5 * SECOND);
    setup.instead(|_| Answer::Later);
    let replies = [
        setup.kvp.get(Pool::Guest, "a"),
        setup.kvp.get(Pool::Guest, "b"),
    ];
    setup.vm.machine.advance(6 * SECOND);
    for reply in replies {
        assert_eq!(reply.take(), Some(Err(RequestError::TimedOut)));
    }
    assert_eq!(setup.guest.seen.lock().unwrap().len(), 1);
}

#[test]
fn a_channel_that_closes_fails_what_waits_and_a_closed_one_is_not_asked() {
    let setup = Setup::new();
    setup.instead(|_| Answer::Later);
    let replies = [
        setup.kvp.get(Pool::Guest, "a"),
        setup.kvp.get(Pool::Guest, "b"),
    ];
    setup.vm.machine.settle();
    setup.vm.machine.rescind(setup.id);
    setup.vm.machine.settle();
    for reply in replies {
        assert_eq!(reply.take(), Some(Err(RequestError::Closed)));
    }
    assert_eq!(setup.kvp.stage(), Stage::Closed);
    let reply = setup.kvp.get(Pool::Guest, "a");
    assert_eq!(reply.take(), Some(Err(RequestError::NotOpen)));
    assert_eq!(
        RequestError::NotOpen.to_string(),
        "the guest has not opened this component"
    );
}

#[test]
fn a_guest_without_a_common_version_is_not_asked() {
    let setup = Setup::with(&[Version(9, 0)]);
    let reply = setup.kvp.list(Pool::Auto);
    assert_eq!(reply.take(), Some(Err(RequestError::NoCommonVersion)));
}

#[test]
fn who_asks_may_be_called_and_may_ask_again_from_there() {
    let setup = Setup::new();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (again, note) = (setup.kvp.clone(), seen.clone());
    let first = setup.kvp.set(Pool::Guest, "key", &text("value"));
    first.then(move |done| {
        assert_eq!(done, Ok(()));
        let noted = note.clone();
        again
            .get(Pool::Guest, "key")
            .then(move |value| noted.lock().unwrap().push(value));
    });
    setup.vm.machine.settle();
    assert_eq!(*seen.lock().unwrap(), [Ok(text("value"))]);
}

#[test]
fn a_list_that_never_ends_is_given_up() {
    let setup = Setup::new();
    setup.instead(|body| {
        let (key, value) = ([b'k', 0, 0, 0], (1, vec![0, 0]));
        Guest::fill(body, 8, &key, &value);
        Answer::Now(Status::OK)
    });
    let endless = RequestError::Malformed("a list that does not end");
    assert_eq!(setup.now(setup.kvp.list(Pool::Guest)), Err(endless.clone()));
    let found = setup.now(setup.kvp.find(Pool::Guest, "other"));
    assert_eq!(found, Err(endless));
}

#[test]
fn an_answer_to_another_operation_is_complained_about() {
    let setup = Setup::new();
    setup.instead(|body| {
        body[0] = DELETE;
        Answer::Now(Status::OK)
    });
    let reply = setup.kvp.get(Pool::Guest, "key");
    setup.vm.machine.settle();
    assert!(reply.is_done());
    assert_eq!(
        setup.kvp.lock().complaints(),
        ["an answer to another operation, or of another pool"]
    );
}

#[test]
fn every_fault_in_messages_ends_and_the_next_request_is_served() {
    for fault in MessageFault::all() {
        let setup = Setup::new();
        setup.kvp.inject(fault, 1);
        let reply = setup.kvp.set(Pool::Guest, "key", &text("value"));
        setup.vm.machine.advance(60 * SECOND);
        assert!(reply.is_done(), "{fault}");
        setup.set(Pool::Guest, "next", &text("value"));
        // The negotiation is a message, too.
        setup.kvp.inject(fault, 1);
        setup.kvp.renegotiate();
        setup.vm.machine.advance(60 * SECOND);
        setup.kvp.heal();
        if setup.kvp.lock().ready().is_err() {
            setup.kvp.renegotiate();
            setup.vm.machine.settle();
        }
        setup.set(Pool::Guest, "again", &text("value"));
        assert_eq!(setup.kvp.lock().complaints(), [] as [&str; 0], "{fault}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whatever_a_guest_answers_the_host_goes_on(
        version in 0usize..3,
        writes in proptest::collection::vec((any::<u16>(), any::<Vec<u8>>(), any::<bool>()), 1..12),
    ) {
        let setup = Setup::with(&[ALL[version]]);
        let mut writes = writes.into_iter().cycle();
        setup.instead(move |body| {
            let (at, bytes, ok) = writes.next().unwrap();
            let at = usize::from(at) % body.len();
            let room = body.len() - at;
            let count = bytes.len().min(room);
            body[at..at + count].copy_from_slice(&bytes[..count]);
            Answer::Now(if ok { Status::OK } else { NO_MORE_ITEMS })
        });
        let list = setup.kvp.list(Pool::Auto);
        let get = setup.kvp.get(Pool::Guest, "key");
        let ip = setup.kvp.ip_information("{}");
        setup.vm.machine.advance(SECOND);
        prop_assert!(list.is_done() && get.is_done() && ip.is_done());
        setup.as_usual();
        setup.set(Pool::Guest, "key", &text("value"));
    }
}
