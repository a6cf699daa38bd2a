//! The control stream's end in the machine: one thread that reads commands, has them carried out and writes what comes of them.
//!
//! It waits for nobody: a client that does not read is cut off when too much waits for it, a guest that does not
//! answer leaves its command waiting and no other. The host's thread only puts events and answers into queues.

mod answers;
mod client;
mod execute;
mod listener;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use answers::Answer;
pub use execute::execute;
pub use listener::ListenError;

use super::line::{Failure, Greeting, Request, Response};
use crate::runner::Runner;
use answers::{Answers, Ticket};
use client::Client;
use listener::Listener;

/// Clients at one time.
const CLIENTS: usize = 16;

/// How long a command may wait for the guest, by this system's clock. The guest's own limits are shorter, and by its
/// clock, which stands still while it is halted.
const PATIENCE: Duration = Duration::from_secs(90);

/// How long the last words may take.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Events of the poll that are taken at once.
const BATCH: usize = 32;

const LISTENER: u64 = u64::MAX;
const EVENTS: u64 = u64::MAX - 1;
const ANSWERS: u64 = u64::MAX - 2;

/// Where clients come from.
#[derive(Debug, Default)]
pub struct Ends {
    /// A stream that is there already.
    pub stream: Option<OwnedFd>,
    /// A Unix socket to listen at.
    pub path: Option<PathBuf>,
}

/// The running thread. Dropping it lets it say its last words.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    answers: Answers,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to listen. The stream that is there already is greeted at once.
    ///
    /// # Errors
    /// When somebody else listens there, or the system has no room.
    pub fn start(ends: Ends, runner: Arc<Runner>) -> Result<Self, ListenError> {
        let listener = ends.path.map(Listener::bind).transpose()?;
        let answers = Answers::new()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut state = State {
            runner,
            listener,
            epoll: Epoll::new()?,
            clients: BTreeMap::new(),
            next: 0,
            pending: BTreeMap::new(),
            answers: answers.clone(),
        };
        state.watch()?;
        if let Some(stream) = ends.stream {
            state.welcome(Client::inherited(stream)?)?;
        }
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("control".into())
            .spawn(move || state.run(&stopped))?;
        Ok(Self {
            stop,
            answers,
            thread: Some(thread),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.answers.wake();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            drop(thread.join());
        }
    }
}

struct State {
    runner: Arc<Runner>,
    listener: Option<Listener>,
    epoll: Epoll,
    clients: BTreeMap<u64, Client>,
    /// The number of the next client, and of the next ticket.
    next: u64,
    pending: BTreeMap<Ticket, Pending>,
    answers: Answers,
}

/// A command that is being carried out.
struct Pending {
    client: u64,
    id: Option<Value>,
    name: &'static str,
    until: Instant,
}

impl State {
    fn watch(&self) -> io::Result<()> {
        let add = |descriptor, token| {
            let event = EpollEvent::new(EventSet::IN, token);
            self.epoll.ctl(ControlOperation::Add, descriptor, event)
        };
        add(self.runner.events().descriptor().as_raw_fd(), EVENTS)?;
        add(self.answers.descriptor().as_raw_fd(), ANSWERS)?;
        match &self.listener {
            Some(listener) => add(listener.as_raw_fd(), LISTENER),
            None => Ok(()),
        }
    }

    fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::SeqCst) {
            let Ok(ready) = self.wait(self.patience()) else {
                break;
            };
            self.serve(&ready);
        }
        let end = Instant::now() + LAST_WORDS;
        self.serve(&[]);
        while self.clients.values().any(Client::has_output) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.wait(Some(left)).is_err() {
                break;
            }
            self.flush();
        }
    }

    /// How long the thread can sleep.
    fn patience(&self) -> Option<Duration> {
        let first = self.pending.values().map(|pending| pending.until).min();
        first.map(|until| until.saturating_duration_since(Instant::now()))
    }

    fn wait(&self, limit: Option<Duration>) -> io::Result<Vec<(u64, EventSet)>> {
        // Rounded up, so that what is due is due when it returns.
        let round = |limit: Duration| i32::try_from(limit.as_millis() + 1).unwrap_or(i32::MAX);
        let mut events = [EpollEvent::default(); BATCH];
        match self.epoll.wait(limit.map_or(-1, round), &mut events) {
            Ok(count) => {
                let ready = events.iter().take(count);
                Ok(ready
                    .map(|event| (event.data(), event.event_set()))
                    .collect())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn serve(&mut self, ready: &[(u64, EventSet)]) {
        for (token, set) in ready {
            match *token {
                EVENTS | ANSWERS => {}
                LISTENER => self.accept(),
                client => {
                    if set.contains(EventSet::IN) {
                        self.hear(client);
                    }
                    if set.intersects(EventSet::HANG_UP | EventSet::ERROR)
                        && let Some(client) = self.clients.get_mut(&client)
                    {
                        client.hang_up();
                    }
                }
            }
        }
        self.tell_answers();
        self.tell_events();
        self.flush();
    }

    fn accept(&mut self) {
        while let Some(client) = self.listener.as_ref().and_then(Listener::accept) {
            if self.clients.len() >= CLIENTS {
                continue;
            }
            // A client that cannot be watched is one that hears nothing and sees the end.
            let _ = self.welcome(client);
        }
    }

    fn welcome(&mut self, mut client: Client) -> io::Result<()> {
        let number = self.number();
        client.say(&Greeting.to_json());
        client.flush();
        let event = EpollEvent::new(client.interest(), number);
        self.epoll
            .ctl(ControlOperation::Add, client.as_raw_fd(), event)?;
        self.clients.insert(number, client);
        Ok(())
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Reads what a client says, and has it done.
    fn hear(&mut self, client: u64) {
        let Some(speaker) = self.clients.get_mut(&client) else {
            return;
        };
        for line in speaker.hear() {
            let request = match line {
                Ok(line) => Request::parse(&line),
                Err(failure) => Err(Response {
                    id: None,
                    result: Err(failure),
                }),
            };
            match request {
                Ok(Request { command, id }) => {
                    let ticket = Ticket(self.number());
                    let pending = Pending {
                        client,
                        id,
                        name: command.name(),
                        until: Instant::now() + PATIENCE,
                    };
                    self.pending.insert(ticket, pending);
                    execute(&self.runner, command, self.answers.answer(ticket));
                    // What is answered at once is answered in order.
                    self.tell_answers();
                }
                Err(response) => self.say(client, &response.to_json()),
            }
        }
    }

    fn tell_answers(&mut self) {
        for (ticket, result) in self.answers.take() {
            self.answer(ticket, result);
        }
        let now = Instant::now();
        let late = self.pending.iter();
        let late = late.filter(|(_, pending)| pending.until <= now);
        let late: Vec<_> = late.map(|(ticket, _)| *ticket).collect();
        for ticket in late {
            let name = self.pending.get(&ticket).map_or("", |pending| pending.name);
            let seconds = PATIENCE.as_secs();
            let desc = format!("the guest has not answered `{name}` within {seconds} s");
            self.answer(ticket, Err(Failure::generic(desc)));
        }
    }

    fn answer(&mut self, ticket: Ticket, result: Result<Value, Failure>) {
        if let Some(Pending { client, id, .. }) = self.pending.remove(&ticket) {
            self.say(client, &Response { id, result }.to_json());
        }
    }

    fn tell_events(&mut self) {
        for event in self.runner.events().take() {
            let clients = self.clients.values_mut();
            clients.for_each(|client| client.tell(&event));
        }
    }

    fn say(&mut self, client: u64, line: &Value) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.say(line);
        }
    }

    /// Writes what clients have room for, and lets go of those that are gone.
    fn flush(&mut self) {
        let mut gone = Vec::new();
        for (number, client) in &mut self.clients {
            let before = client.interest();
            client.flush();
            let mut pending = self.pending.values();
            let waits = pending.any(|pending| pending.client == *number);
            if client.is_gone() || client.is_content() && !waits {
                gone.push(*number);
            } else if client.interest() != before || client.has_output() {
                let event = EpollEvent::new(client.interest(), *number);
                let descriptor = client.as_raw_fd();
                if self
                    .epoll
                    .ctl(ControlOperation::Modify, descriptor, event)
                    .is_err()
                {
                    gone.push(*number);
                }
            }
        }
        for number in gone {
            // Closing it takes it out of the poll, too.
            self.clients.remove(&number);
            self.pending.retain(|_, pending| pending.client != number);
        }
    }
}
