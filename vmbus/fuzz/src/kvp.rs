//! Key-value exchange: the host's component over anything that a guest answers.

use serde::{Deserialize, Serialize};
use vmbus_host::integration::kvp::{IpInformation, Pool, Value};
use vmbus_host::integration::{ANSWER_FLAGS, Handle, Host, Kvp};

use crate::steps;

/// Something that happens to the component.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// The guest opens or closes the channel.
    Open(bool),
    /// The host's user asks for something.
    Ask(u8),
    /// The guest sends bytes.
    Receive(&'a [u8]),
    /// The guest answers the last message in good order, with this status and these bytes from this offset on.
    Answer(u32, u16, &'a [u8]),
    /// The guest agrees on the version with this index.
    Agree(u8),
    /// Time goes by, in units of 100 ns.
    Advance(u32),
}

fn ask(kvp: &Handle<Kvp>, what: u8) {
    let pools = Pool::ALL;
    let pool = pools[usize::from(what) % pools.len()];
    match what / 5 % 7 {
        0 => drop(kvp.get(pool, "key")),
        1 => drop(kvp.set(pool, "key", &Value::U64(7))),
        2 => drop(kvp.delete(pool, "key")),
        3 => drop(kvp.list(pool)),
        4 => drop(kvp.ip_information("{adapter}")),
        5 => drop(kvp.find(pool, "key")),
        _ => drop(kvp.set_ip_information(&IpInformation::default())),
    }
}

/// KVP over answers of a guest: every request comes to an end, and the component goes on.
pub fn host_kvp(data: &[u8]) {
    let kvp = Handle::new(Host::HyperV, Kvp::new());
    let mut now = 1;
    let mut last = Vec::new();
    for step in steps(data) {
        match step {
            Step::Open(true) => kvp.lock().opened(),
            Step::Open(false) => kvp.lock().closed(),
            Step::Ask(what) => ask(&kvp, what),
            Step::Receive(bytes) => kvp.lock().receive(now, bytes),
            Step::Answer(status, offset, bytes) => {
                let answer = answer(&last, status, usize::from(offset), bytes);
                kvp.lock().receive(now, &answer);
            }
            Step::Agree(version) => {
                let agreed = agree(&last, usize::from(version % 3));
                kvp.lock().receive(now, &agreed);
            }
            Step::Advance(by) => now += u64::from(by),
        }
        for count in 0.. {
            assert!(count < 100, "the component never falls silent");
            let message = kvp.lock().poll_message(now);
            match message {
                Some(message) => last = message,
                None => break,
            }
        }
    }
    kvp.lock().closed();
    assert_eq!(kvp.lock().deadline(), None, "nothing waits any more");
}

/// The last message as its answer: status and flags of the header (spec ic.md 3), and bytes from `offset` on.
fn answer(last: &[u8], status: u32, offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut answer = last.to_vec();
    if let Some(field) = answer.get_mut(20..24) {
        field.copy_from_slice(&status.to_le_bytes());
    }
    if let Some(flags) = answer.get_mut(25) {
        *flags = ANSWER_FLAGS;
    }
    let places = answer.iter_mut().skip(28 + offset);
    places.zip(bytes).for_each(|(place, byte)| *place = *byte);
    answer
}

/// The answer to a negotiation: framework 3.0, and message version 3.0, 4.0 or 5.0 (spec ic.md 4).
fn agree(last: &[u8], version: usize) -> Vec<u8> {
    let versions = [3, 0, 0, 0, 3 + version as u8, 0, 0, 0];
    let body = [[1, 0, 1, 0, 0, 0, 0, 0], versions].concat();
    answer(last, 0, 0, &body)
}
