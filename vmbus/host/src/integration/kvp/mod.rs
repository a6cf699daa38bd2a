//! Key-value exchange: the host reads and writes what the guest keeps for it, and the addresses of its adapters
//! (spec ic.md 8).

mod ip;
mod value;

use alloc::string::String;
use alloc::vec::Vec;

use vmbus::protocol::{Guid, interface};
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

pub use ip::{IpInformation, Network, ParseNetworkError};
pub use value::{Entry, LONGEST_KEY, LONGEST_TEXT, Pool, Value};

use ip::{BinaryForm, TextForm};
use value::{EntryBody, KeyBody};

use super::message::{GuestStatus, Version};
use super::reply::{Outcomes, Promise, Reply, promise};
use super::requests::Requests;
use super::{Component, Handle, Host, RequestError};

/// Operations.
const GET: u8 = 0;
const SET: u8 = 1;
const DELETE: u8 = 2;
const ENUMERATE: u8 = 3;
const GET_IP: u8 = 4;
const SET_IP: u8 = 5;

/// The version from which IP information is binary.
const BINARY_IP: Version = Version(5, 0);

/// Requests that may wait for a guest that answers one at a time.
const QUEUE: usize = 64;

/// How long the guest may take for one answer: 45 s in units of 100 ns. Linux gives its daemon 30 s and then says no.
const TIME_LIMIT: u64 = 450_000_000;

/// The most entries of a pool: a guest that never ends its list must not grow the host.
const ENTRIES: usize = 1024;

/// The KVP component.
#[derive(Debug)]
pub struct Kvp {
    version: Version,
    requests: Requests<Job>,
    outcomes: Outcomes,
}

type Asked<T> = Promise<Result<T, RequestError>>;

/// A request, and who waits for its answer.
#[derive(Debug)]
enum Job {
    Get(Message, Asked<Value>),
    /// Something that has no answer but whether it was done.
    Do(Message, Asked<()>),
    List {
        pool: Pool,
        entries: Vec<Entry>,
        promise: Asked<Vec<Entry>>,
    },
    /// Goes through a pool, up to this key.
    Find {
        pool: Pool,
        key: String,
        /// The entry that is asked for.
        index: usize,
        promise: Asked<Value>,
    },
    GetIp(Message, Asked<IpInformation>),
}

/// The body of a request, made when it was asked for.
type Message = Vec<u8>;

impl Default for Kvp {
    fn default() -> Self {
        Self::new()
    }
}

impl Kvp {
    /// One that asks for nothing.
    pub fn new() -> Self {
        Self {
            version: Version(0, 0),
            requests: Requests::new(QUEUE, TIME_LIMIT),
            outcomes: Outcomes::default(),
        }
    }

    /// How long the guest may take for one answer, in units of 100 ns.
    pub fn set_time_limit(&mut self, limit: u64) {
        self.requests.time_limit = limit;
    }

    fn ask<T: Send + 'static>(
        &mut self,
        message: Result<Message, RequestError>,
        job: impl FnOnce(Message, Asked<T>) -> Job,
    ) -> Reply<Result<T, RequestError>> {
        let message = match message {
            Ok(message) => message,
            Err(error) => return Reply::ready(Err(error)),
        };
        let (promise, reply) = promise();
        match self.requests.push(job(message, promise)) {
            Ok(()) => reply,
            Err(_) => Reply::ready(Err(RequestError::Busy)),
        }
    }

    fn ip_message(&self, operation: u8, info: &IpInformation) -> Result<Message, RequestError> {
        let pool = Pool::Guest.number();
        if self.version >= BINARY_IP {
            let mut message = Vec::from(BinaryForm::new(operation, pool, info)?.as_bytes());
            message.resize(BinaryForm::MESSAGE, 0);
            Ok(message)
        } else {
            Ok(TextForm::new(operation, pool, info)?.as_bytes().into())
        }
    }

    fn read_ip(&self, answer: &[u8]) -> Result<IpInformation, RequestError> {
        let short = RequestError::Malformed("IP information that is too short");
        if self.version >= BINARY_IP {
            let form = BinaryForm::ref_from_prefix(answer);
            form.map_err(|_| short)?.0.read()
        } else {
            let form = TextForm::ref_from_prefix(answer);
            form.map_err(|_| short)?.0.read()
        }
    }

    fn end(&mut self, job: Job, error: RequestError) {
        let outcomes = &mut self.outcomes;
        match job {
            Job::Get(_, promise) => outcomes.add(promise, Err(error)),
            Job::Do(_, promise) => outcomes.add(promise, Err(error)),
            Job::List { promise, .. } => outcomes.add(promise, Err(error)),
            Job::Find { promise, .. } => outcomes.add(promise, Err(error)),
            Job::GetIp(_, promise) => outcomes.add(promise, Err(error)),
        }
    }

    /// One more entry of a list, or its end.
    fn listed(
        &mut self,
        pool: Pool,
        mut entries: Vec<Entry>,
        promise: Asked<Vec<Entry>>,
        status: GuestStatus,
        answer: &[u8],
    ) {
        let outcome = match status {
            GuestStatus::NO_MORE_ITEMS => Ok(entries),
            GuestStatus::OK if entries.len() >= ENTRIES => {
                Err(RequestError::Malformed("a list that does not end"))
            }
            GuestStatus::OK => match entry_body(answer, ENTRY_OF_LIST).and_then(EntryBody::read) {
                Ok(entry) => {
                    entries.push(entry);
                    return self.requests.again(Job::List {
                        pool,
                        entries,
                        promise,
                    });
                }
                Err(error) => Err(error),
            },
            status => Err(RequestError::Guest(status)),
        };
        self.outcomes.add(promise, outcome);
    }

    /// One more entry of a pool that is searched.
    fn looked_at(
        &mut self,
        (pool, key, index): (Pool, String, usize),
        promise: Asked<Value>,
        status: GuestStatus,
        answer: &[u8],
    ) {
        let outcome = match status {
            GuestStatus::NO_MORE_ITEMS => Err(RequestError::Guest(GuestStatus::NOT_FOUND)),
            GuestStatus::OK if index >= ENTRIES => {
                Err(RequestError::Malformed("a list that does not end"))
            }
            GuestStatus::OK => match entry_body(answer, ENTRY_OF_LIST).and_then(EntryBody::read) {
                Ok(entry) if entry.key == key => Ok(entry.value),
                Ok(_) => {
                    return self.requests.again(Job::Find {
                        pool,
                        key,
                        index: index + 1,
                        promise,
                    });
                }
                Err(error) => Err(error),
            },
            status => Err(RequestError::Guest(status)),
        };
        self.outcomes.add(promise, outcome);
    }
}

impl Handle<Kvp> {
    /// The value of a key, as Hyper-V finds it: by going through the pool. That works with every guest; what Linux answers to
    /// [`get`](Self::get) does not.
    pub fn find(&self, pool: Pool, key: &str) -> Reply<Result<Value, RequestError>> {
        self.ask(|kvp| {
            kvp.ask(Ok(Vec::new()), |_, promise| Job::Find {
                pool,
                key: key.into(),
                index: 0,
                promise,
            })
        })
    }

    /// The value of a key, by a request of its own. Linux's answer lacks the first four bytes of the value: its driver takes the
    /// daemon's answer for one to an enumeration, whose value lies behind an index.
    pub fn get(&self, pool: Pool, key: &str) -> Reply<Result<Value, RequestError>> {
        let body = EntryBody::key(key).map(|body| request(GET, pool, body.as_bytes()));
        self.ask(|kvp| kvp.ask(body, Job::Get))
    }

    /// Adds a key, or gives it another value.
    pub fn set(&self, pool: Pool, key: &str, value: &Value) -> Reply<Result<(), RequestError>> {
        let body = EntryBody::entry(key, value).map(|body| request(SET, pool, body.as_bytes()));
        self.ask(|kvp| kvp.ask(body, Job::Do))
    }

    /// Takes a key away.
    pub fn delete(&self, pool: Pool, key: &str) -> Reply<Result<(), RequestError>> {
        let body = KeyBody::new(key).map(|body| request(DELETE, pool, body.as_bytes()));
        self.ask(|kvp| kvp.ask(body, Job::Do))
    }

    /// All keys of a pool with their values, in the guest's order.
    pub fn list(&self, pool: Pool) -> Reply<Result<Vec<Entry>, RequestError>> {
        self.ask(|kvp| {
            kvp.ask(Ok(Vec::new()), |_, promise| Job::List {
                pool,
                entries: Vec::new(),
                promise,
            })
        })
    }

    /// The addresses of an adapter.
    pub fn ip_information(&self, adapter: &str) -> Reply<Result<IpInformation, RequestError>> {
        self.ask(|kvp| {
            let message = kvp.ip_message(GET_IP, &IpInformation::of(adapter));
            kvp.ask(message, Job::GetIp)
        })
    }

    /// Has the guest give an adapter these addresses.
    pub fn set_ip_information(&self, info: &IpInformation) -> Reply<Result<(), RequestError>> {
        self.ask(|kvp| {
            if let Some(unknown) = info.unknown.first() {
                let what: String = alloc::format!("'{unknown}' is no address");
                return Reply::ready(Err(RequestError::Invalid(what)));
            }
            let message = kvp.ip_message(SET_IP, info);
            kvp.ask(message, Job::Do)
        })
    }

    fn ask<T>(
        &self,
        ask: impl FnOnce(&mut Kvp) -> Reply<Result<T, RequestError>>,
    ) -> Reply<Result<T, RequestError>> {
        self.act(|service| match service.ready() {
            Ok(_) => ask(&mut service.component),
            Err(error) => Reply::ready(Err(error)),
        })
    }
}

/// Header and body of a request.
fn request(operation: u8, pool: Pool, body: &[u8]) -> Message {
    let mut message = Vec::from([operation, pool.number(), 0, 0]);
    message.extend_from_slice(body);
    message
}

/// Asks for an entry of a pool.
fn entry_at(pool: Pool, index: usize) -> Message {
    // Pools that do not end are given up long before.
    let index = U32::new(u32::try_from(index).unwrap_or(u32::MAX));
    let mut body = Vec::from(index.as_bytes());
    body.extend_from_slice(EntryBody::new_zeroed().as_bytes());
    request(ENUMERATE, pool, &body)
}

/// Where the entry begins in the answer to a get, and to an enumerate.
const ENTRY_OF_GET: usize = 4;
const ENTRY_OF_LIST: usize = 8;

fn entry_body(answer: &[u8], at: usize) -> Result<&EntryBody, RequestError> {
    let body = answer.get(at..).map(EntryBody::ref_from_prefix);
    match body {
        Some(Ok((body, _))) => Ok(body),
        _ => Err(RequestError::Malformed("an entry that is too short")),
    }
}

impl Component for Kvp {
    const KIND: u16 = 2;
    const INTERFACE: Guid = interface::KEY_VALUE_PAIRS;
    const INSTANCE: Guid = Guid::literal("242ff919-07db-4180-9c2e-b86cb68c8c55");

    fn versions(_host: Host) -> &'static [Version] {
        &[Version(3, 0), Version(4, 0), BINARY_IP]
    }

    fn ready(&mut self, _now: u64, version: Version) {
        self.version = version;
    }

    fn request(&mut self, _now: u64) -> Option<Vec<u8>> {
        Some(match self.requests.next()? {
            Job::Get(message, _) | Job::Do(message, _) | Job::GetIp(message, _) => message.clone(),
            Job::List { pool, entries, .. } => entry_at(*pool, entries.len()),
            Job::Find { pool, index, .. } => entry_at(*pool, *index),
        })
    }

    fn answered(
        &mut self,
        _now: u64,
        request: &[u8],
        status: u32,
        answer: &[u8],
    ) -> Result<(), &'static str> {
        let status = GuestStatus(status);
        let done = if status.is_ok() {
            Ok(())
        } else {
            Err(RequestError::Guest(status))
        };
        match self.requests.answered() {
            Some(Job::Get(_, promise)) => {
                let value = done
                    .and_then(|()| entry_body(answer, ENTRY_OF_GET))
                    .and_then(EntryBody::read_value);
                self.outcomes.add(promise, value);
            }
            Some(Job::Do(_, promise)) => self.outcomes.add(promise, done),
            Some(Job::List {
                pool,
                entries,
                promise,
            }) => self.listed(pool, entries, promise, status, answer),
            Some(Job::Find {
                pool,
                key,
                index,
                promise,
            }) => self.looked_at((pool, key, index), promise, status, answer),
            Some(Job::GetIp(_, promise)) => {
                let info = done.and_then(|()| self.read_ip(answer));
                self.outcomes.add(promise, info);
            }
            // Nobody waits any more.
            None => {}
        }
        if request.get(..2) == answer.get(..2) {
            Ok(())
        } else {
            Err("an answer to another operation, or of another pool")
        }
    }

    fn deadline(&self) -> Option<u64> {
        self.requests.is_waiting().then_some(0)
    }

    fn stopped(&mut self) {
        for job in self.requests.drain() {
            self.end(job, RequestError::Closed);
        }
    }

    fn unanswered(&mut self, why: RequestError) {
        if let Some(job) = self.requests.answered() {
            self.end(job, why);
        }
    }

    fn expiry(&self) -> Option<u64> {
        self.requests.expiry()
    }

    fn expire(&mut self, now: u64) {
        for job in self.requests.expire(now) {
            self.end(job, RequestError::TimedOut);
        }
    }

    fn outcomes(&mut self) -> Outcomes {
        core::mem::take(&mut self.outcomes)
    }
}
