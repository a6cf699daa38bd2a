//! One connection: the provider of its channel, which moves bytes between the rings and a stream (spec hvsock.md 5 and 6).

use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::Ordering;

use vmbus::ids::PAGE_SIZE;
use vmbus::protocol::Status;
use vmbus::ring::{Kind, Outgoing, PacketBuffer, PushError, RingError};

use super::framing::{self, Frame, HEADER, LAYOUT, MAX_DATA};
use super::sockets::Core;
use super::stream::{Stream, Transfer};
use crate::channel::HostChannel;
use crate::provider::{Link, Provider};
use crate::sync::Mutex;

/// Packets that are moved each way before others have their turn.
const BUDGET: usize = 64;

/// Time between looks at a guest that reads without telling: 10 ms in units of 100 ns.
const LOOK_AGAIN: u64 = 100_000;

/// How far a connection has come, for the one who offered it.
#[derive(Debug)]
pub(super) enum Stage {
    /// Its provider has not been put on a host.
    New,
    /// The guest may open it.
    Offered(Link),
    /// The guest has opened it.
    Open,
    /// The guest did not open it in time.
    Expired,
    /// It has ended.
    Over,
    /// No channel number was free.
    NeverOffered,
}

/// One connection.
pub(super) struct Connection {
    core: Arc<Core>,
    stage: Arc<Mutex<Stage>>,
    link: Option<Link>,
    /// Gone when the connection is over.
    stream: Option<Box<dyn Stream>>,
    packet: PacketBuffer,
    /// Bytes of the guest that the stream has yet to take, from `written` on.
    incoming: Vec<u8>,
    written: usize,
    /// The guest has said that it sends no more.
    guest_ended: bool,
    /// The stream knows.
    finished: bool,
    /// The program is gone: what the guest sends goes nowhere.
    discarding: bool,
    /// Packets that have no room in the ring yet: one, or two by a fault.
    outgoing: VecDeque<Vec<u8>>,
    /// The program has sent its last byte.
    stream_ended: bool,
    /// The guest has been told, as soon as `outgoing` is empty.
    end_made: bool,
    /// When the guest last took or gave something, since one side has finished.
    progress: Option<u64>,
    /// When to look again.
    retry: Option<u64>,
}

/// Why a connection cannot go on.
enum Failure {
    Ring,
    Guest(&'static str),
}

impl From<RingError> for Failure {
    fn from(_: RingError) -> Self {
        Self::Ring
    }
}

impl Connection {
    /// A connection between a channel that is to be offered and `stream`. The program gets `greeting` before any byte of the
    /// guest's; the guest gets `first` before any other byte of the program's.
    pub(super) fn new(
        core: Arc<Core>,
        stream: Box<dyn Stream>,
        greeting: Vec<u8>,
        first: &[u8],
    ) -> (Self, Arc<Mutex<Stage>>) {
        let stage = Arc::new(Mutex::new(Stage::New));
        let mut outgoing = VecDeque::new();
        for data in first.chunks(PAGE_SIZE / 8) {
            let mut packet = framing::blank(data.len());
            if let Some(place) = packet.get_mut(HEADER..) {
                place.copy_from_slice(data);
            }
            framing::finish(&mut packet, data.len());
            outgoing.push_back(packet);
        }
        let connection = Self {
            core,
            stage: stage.clone(),
            link: None,
            stream: Some(stream),
            packet: PacketBuffer::default(),
            incoming: greeting,
            written: 0,
            guest_ended: false,
            finished: false,
            discarding: false,
            outgoing,
            stream_ended: false,
            end_made: false,
            progress: None,
            retry: None,
        };
        (connection, stage)
    }

    fn wake(&self) {
        if let Some(link) = &self.link {
            link.wake();
        }
    }

    /// The connection is over: the program and the guest learn of it, and so does who offered it.
    fn end(&mut self) {
        if self.stream.take().is_none() {
            return;
        }
        self.retry = None;
        if let Some(link) = &self.link {
            link.rescind();
        }
        let mut stage = self.stage.lock();
        *stage = match *stage {
            Stage::New => Stage::NeverOffered,
            Stage::Expired => Stage::Expired,
            _ => Stage::Over,
        };
        drop(stage);
        self.core.wake();
    }

    /// Gives the stream what it has room for. Returns whether nothing is left.
    fn flush(&mut self) -> bool {
        while let Some(rest) = self.incoming.get(self.written..)
            && !rest.is_empty()
        {
            if self.discarding {
                break;
            }
            let Some(stream) = &mut self.stream else {
                break;
            };
            match stream.write(rest) {
                Transfer::Moved(count) => self.written = self.written.saturating_add(count),
                Transfer::Blocked => return false,
                Transfer::Ended => self.discarding = true,
            }
        }
        self.incoming.clear();
        self.written = 0;
        true
    }

    /// Moves what the guest has sent. Returns whether there was something.
    fn receive_from_guest(&mut self, channel: &mut HostChannel) -> Result<bool, Failure> {
        let mut moved = false;
        for turn in 0.. {
            if !self.flush() {
                break;
            }
            if turn == BUDGET {
                self.wake();
                break;
            }
            if !channel.receive(&mut self.packet)? {
                // A packet that came before its room was given back brings no signal.
                channel.release()?;
                if !channel.receive(&mut self.packet)? {
                    break;
                }
            }
            moved = true;
            self.take_packet().map_err(Failure::Guest)?;
        }
        channel.release()?;
        if self.guest_ended && !self.finished && self.incoming.is_empty() {
            self.finished = true;
            if let Some(stream) = &mut self.stream {
                stream.finish();
            }
        }
        Ok(moved)
    }

    fn take_packet(&mut self) -> Result<(), &'static str> {
        if self.packet.kind() != Kind::IN_BAND {
            return Err("a packet on a socket that is not in band");
        }
        match framing::parse(self.packet.payload())? {
            Frame::Data(_) if self.guest_ended => Err("data on a socket behind its end"),
            Frame::Data(data) => {
                self.incoming.extend_from_slice(data);
                let bytes = data.len() as u64;
                self.core.from_guest.fetch_add(bytes, Ordering::Relaxed);
                Ok(())
            }
            Frame::End => {
                self.guest_ended = true;
                Ok(())
            }
        }
    }

    /// Moves what the program has sent. Returns whether there was something.
    fn send_to_guest(&mut self, channel: &mut HostChannel) -> Result<bool, Failure> {
        let chunk = chunk(channel);
        let mut moved = false;
        for _ in 0..BUDGET {
            while let Some(packet) = self.outgoing.front() {
                match channel.send(&Outgoing::in_band([packet, &[]])) {
                    Ok(()) => {}
                    Err(PushError::Full { need }) => {
                        if channel.wait_for_room(need)? {
                            continue;
                        }
                        return Ok(moved);
                    }
                    // Only a fault makes packets that long.
                    Err(PushError::TooLarge { .. }) => {}
                    Err(PushError::Ring(error)) => return Err(error.into()),
                }
                moved = true;
                self.outgoing.pop_front();
            }
            channel.stop_waiting()?;
            if self.end_made {
                return Ok(moved);
            }
            let mut packet = framing::blank(chunk);
            let read = match (&mut self.stream, packet.get_mut(HEADER..)) {
                (Some(stream), Some(room)) if !self.stream_ended => stream.read(room),
                _ => Transfer::Ended,
            };
            let count = match read {
                Transfer::Moved(count) => count.min(chunk),
                Transfer::Blocked => return Ok(moved),
                Transfer::Ended => {
                    self.stream_ended = true;
                    self.end_made = true;
                    0
                }
            };
            self.core
                .to_guest
                .fetch_add(count as u64, Ordering::Relaxed);
            framing::finish(&mut packet, count);
            let outgoing = &mut self.outgoing;
            let mut faults = self.core.faults.lock();
            faults.apply(&LAYOUT, packet, |packet| outgoing.push_back(packet));
        }
        self.wake();
        Ok(moved)
    }

    fn serve_both(&mut self, now: u64, channel: &mut HostChannel) -> Result<(), Failure> {
        self.retry = None;
        let moved = self.receive_from_guest(channel)? | self.send_to_guest(channel)?;
        let told = self.end_made && self.outgoing.is_empty();
        let drained = channel.is_drained()?;
        // Nothing of the guest's will reach the program any more.
        let heard = self.finished || self.discarding;
        if heard && told && drained {
            self.end();
        } else if heard && !(drained && self.outgoing.is_empty()) {
            // The guest may have gone without reading on, or is slow.
            if moved || self.progress.is_none() {
                self.progress = Some(now);
            }
            let since = self.progress.unwrap_or(now);
            if now >= since.saturating_add(self.core.limits.linger) {
                self.end();
            } else {
                self.retry = Some(now.saturating_add(LOOK_AGAIN));
            }
        } else {
            self.progress = None;
            // A guest that does not signal room is looked at.
            let stuck = !self.outgoing.is_empty();
            self.retry = stuck.then(|| now.saturating_add(LOOK_AGAIN));
        }
        Ok(())
    }
}

/// Bytes of data in a packet to this guest: so many that several fit its ring.
fn chunk(channel: &HostChannel) -> usize {
    let opening = &channel.opening;
    let pages = opening.pages.len();
    let pages = pages.saturating_sub(opening.downstream_page as usize + 1);
    (pages * PAGE_SIZE / 4).clamp(PAGE_SIZE / 8, MAX_DATA)
}

impl Provider for Connection {
    fn attached(&mut self, link: Link) {
        let mut stage = self.stage.lock();
        if let Stage::New = *stage {
            *stage = Stage::Offered(link.clone());
        }
        drop(stage);
        self.link = Some(link);
        // Its time begins.
        self.core.wake();
    }

    fn opened(&mut self, _channel: &mut HostChannel) -> Status {
        let mut stage = self.stage.lock();
        let Stage::Offered(link) = &*stage else {
            // Too late, or once more.
            return Status::UNSUCCESSFUL;
        };
        let link = link.clone();
        *stage = Stage::Open;
        drop(stage);
        if let Some(stream) = &mut self.stream {
            stream.attach(link);
        }
        self.wake();
        Status::SUCCESS
    }

    fn serve(&mut self, now: u64, channel: &mut HostChannel) {
        if self.stream.is_none() {
            return;
        }
        if let Err(failure) = self.serve_both(now, channel) {
            self.core.complain(match failure {
                Failure::Ring => "a socket's ring is broken",
                Failure::Guest(what) => what,
            });
            self.end();
        }
    }

    fn closed(&mut self) {
        self.flush();
        self.end();
    }

    fn deadline(&self) -> Option<u64> {
        self.retry
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("stage", &self.stage)
            .finish_non_exhaustive()
    }
}
