//! What the control stream asks the integration components, in its own terms.

use serde::Serialize;
use vmbus_host::integration::{Kvp, Reply, RequestError, Shutdown, TimeSync};

use super::integration::{Integration, failure};
use super::net::Adapter;
use super::{Body, Devices, kvp, shutdown};
use crate::config::Kind;
use crate::control::server::Answer;
use crate::control::{
    self, Failure, HeartbeatState, IpSettings, KvpKey, KvpPool, KvpSet, NoArguments,
};
use crate::runner::Events;

impl Devices {
    /// Whether the guest is alive, at this reference time.
    ///
    /// # Errors
    /// When the machine has no such device.
    pub fn heartbeat(&self, now: u64) -> Result<HeartbeatState, Failure> {
        self.one(Kind::Heartbeat, |device| match &device.body {
            Body::Heartbeat(heartbeat) => Some(heartbeat.state(now)),
            _ => None,
        })
    }

    /// Asks the guest to end. Its answer is an event.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn shut_down(&self, how: &control::Shutdown, events: &Events) -> Result<(), Failure> {
        shutdown::ask(&self.shutdown()?.handle, how, events)
    }

    /// Has the guest set its clock.
    pub fn sync_time(&self, answer: Answer) {
        match self.time_sync() {
            Ok(time) => later("time-sync", time.handle.sync_now(), answer, |()| {
                NoArguments {}
            }),
            Err(failure) => answer.done(Err(failure)),
        }
    }

    /// Moves the clock that the guest is told, and has the guest set its own.
    pub fn step_time(&self, milliseconds: i64, answer: Answer) {
        match self.time_sync() {
            Ok(time) => {
                time.step(milliseconds);
                later("time-sync", time.handle.sync_now(), answer, |()| {
                    NoArguments {}
                });
            }
            Err(failure) => answer.done(Err(failure)),
        }
    }

    /// Gives the guest a value.
    pub fn set_value(&self, set: &KvpSet, answer: Answer) {
        self.ask_kvp(answer, |kvp, answer| {
            let value = kvp::value(&set.value);
            let reply = kvp.handle.set(kvp::pool(set.pool), &set.key, &value);
            later("kvp", reply, answer, |()| NoArguments {});
        });
    }

    /// Gets a value of the guest's.
    pub fn value(&self, KvpKey { pool, key }: KvpKey, answer: Answer) {
        self.ask_kvp(answer, |kvp, answer| {
            let reply = kvp.handle.find(kvp::pool(pool), &key);
            later("kvp", reply, answer, |value| control::KvpItem {
                key,
                value: kvp::shown(value),
            });
        });
    }

    /// Gets all values of a pool.
    pub fn values(&self, KvpPool { pool }: KvpPool, answer: Answer) {
        self.ask_kvp(answer, |kvp, answer| {
            let reply = kvp.handle.list(kvp::pool(pool));
            later("kvp", reply, answer, kvp::items);
        });
    }

    /// Takes a value from the guest.
    pub fn delete_value(&self, KvpKey { pool, key }: &KvpKey, answer: Answer) {
        self.ask_kvp(answer, |kvp, answer| {
            let reply = kvp.handle.delete(kvp::pool(*pool), key);
            later("kvp", reply, answer, |()| NoArguments {});
        });
    }

    /// Gets the IP addresses of a network adapter, which Linux knows by its MAC address here.
    pub fn ip_information(&mut self, nic: &str, answer: Answer) {
        match self.nic(nic).map(Adapter::address) {
            Ok(address) => self.ask_kvp(answer, |kvp, answer| {
                let reply = kvp.handle.ip_information(&address);
                later("kvp", reply, answer, kvp::information);
            }),
            Err(failure) => answer.done(Err(failure)),
        }
    }

    /// Gives a network adapter IP addresses. Linux knows it by its instance here.
    pub fn set_ip_information(&mut self, settings: &IpSettings, answer: Answer) {
        let instance = self.nic(&settings.nic).map(Adapter::instance);
        let information =
            instance.and_then(|instance| kvp::settings(format!("{{{instance}}}"), settings));
        match information {
            Ok(information) => self.ask_kvp(answer, |kvp, answer| {
                let reply = kvp.handle.set_ip_information(&information);
                later("kvp", reply, answer, |()| NoArguments {});
            }),
            Err(failure) => answer.done(Err(failure)),
        }
    }

    fn ask_kvp(&self, answer: Answer, ask: impl FnOnce(&Integration<Kvp>, Answer)) {
        let kvp = self.one(Kind::Kvp, |device| match &device.body {
            Body::Kvp(kvp) => Some(kvp),
            _ => None,
        });
        match kvp {
            Ok(kvp) => ask(kvp, answer),
            Err(failure) => answer.done(Err(failure)),
        }
    }
}

impl Devices {
    fn shutdown(&self) -> Result<&Integration<Shutdown>, Failure> {
        self.one(Kind::Shutdown, |device| match &device.body {
            Body::Shutdown(shutdown) => Some(shutdown),
            _ => None,
        })
    }

    fn time_sync(&self) -> Result<&Integration<TimeSync>, Failure> {
        self.one(Kind::TimeSync, |device| match &device.body {
            Body::TimeSync(time) => Some(time),
            _ => None,
        })
    }
}

/// Answers when the guest has.
fn later<T: Send + 'static, R: Serialize>(
    device: &'static str,
    reply: Reply<Result<T, RequestError>>,
    answer: Answer,
    shown: impl FnOnce(T) -> R + Send + 'static,
) {
    reply.then(move |result| {
        answer.give(result.map(shown).map_err(|error| failure(device, error)));
    });
}
