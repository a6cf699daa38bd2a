//! All streams of one link: each is joined to something that can be read and
//! written on this side, by two threads of its own.
//!
//! Who reads the link calls [`Streams::receive`], which neither waits nor sends:
//! a stream that stands still holds up no other.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use crate::{
    flow::{Flow, Next},
    protocol::{CHUNK, Piece, StreamId},
};

/// Most streams that are open at one time.
pub const MOST: usize = 256;

/// What a stream is joined to on this side.
pub struct End {
    /// Where the bytes to send come from; its end is the stream's end.
    pub reader: Box<dyn Read + Send>,
    /// Where received bytes go. Dropped, after `finish`, when no more will come.
    pub writer: Box<dyn Write + Send>,
    /// Says that no more will be written.
    pub finish: Box<dyn FnOnce() + Send>,
    /// Makes reads and writes that wait come back, for good.
    pub abort: Box<dyn Fn() + Send + Sync>,
}

/// Which side of the link this is; it decides who chooses which stream ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `xtask`.
    Client,
    /// The agent.
    Agent,
}

/// The streams of a link. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct Streams {
    shared: Arc<Shared>,
}

type Sender = dyn Fn(StreamId, Piece) -> io::Result<()> + Send + Sync;

struct Shared {
    table: Mutex<HashMap<StreamId, Arc<Stream>>>,
    next: AtomicU32,
    send: Box<Sender>,
}

struct Stream {
    id: StreamId,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    flow: Flow,
    /// Ends what this side's threads wait in.
    abort: Option<Box<dyn Fn() + Send + Sync>>,
    /// How many of this side's two threads have come to their end.
    finished: u8,
}

impl Streams {
    /// No streams yet; `send` puts a piece on the link.
    pub fn new(
        side: Side,
        send: impl Fn(StreamId, Piece) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                table: Mutex::default(),
                next: AtomicU32::new(match side {
                    Side::Client => 0,
                    Side::Agent => 1,
                }),
                send: Box::new(send),
            }),
        }
    }

    /// A stream of ours that the other side does not know of yet. What comes for it
    /// waits until it is joined to something.
    ///
    /// # Errors
    /// When there are [`MOST`] streams already.
    pub fn reserve(&self) -> io::Result<StreamId> {
        let id = StreamId(self.shared.next.fetch_add(2, Ordering::Relaxed));
        self.announce(id)?;
        Ok(id)
    }

    /// A stream that the other side has named.
    ///
    /// # Errors
    /// When there are [`MOST`] streams already, or it is one of them.
    pub fn announce(&self, id: StreamId) -> io::Result<()> {
        let mut table = lock(&self.shared.table);
        if table.len() >= MOST {
            return Err(io::Error::other(format!("{MOST} streams are open already")));
        }
        if table.contains_key(&id) {
            return Err(io::Error::other(format!("stream {} is open already", id.0)));
        }
        let stream = Stream {
            id,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        table.insert(id, Arc::new(stream));
        Ok(())
    }

    /// Forgets a stream that came to nothing before it was joined.
    pub fn forget(&self, id: StreamId) {
        lock(&self.shared.table).remove(&id);
    }

    /// Joins a stream to its end on this side and lets it run.
    pub fn join(&self, id: StreamId, end: End) {
        let stream = lock(&self.shared.table).get(&id).cloned();
        let Some(stream) = stream else {
            return (end.abort)(); // The link has gone meanwhile.
        };
        let End {
            reader,
            writer,
            finish,
            abort,
        } = end;
        lock(&stream.state).abort = Some(abort);
        let (out, shared) = (stream.clone(), self.shared.clone());
        thread::spawn(move || shared.read_from(&out, reader));
        let shared = self.shared.clone();
        thread::spawn(move || shared.write_to(&stream, writer, finish));
    }

    /// Breaks a stream off.
    pub fn reset(&self, id: StreamId) {
        let stream = lock(&self.shared.table).get(&id).cloned();
        if let Some(stream) = stream {
            self.shared.break_off(&stream);
        }
    }

    /// Takes a piece from the link. Pieces of streams that are over are dropped.
    pub fn receive(&self, id: StreamId, piece: Piece) {
        let stream = lock(&self.shared.table).get(&id).cloned();
        let Some(stream) = stream else { return };
        let mut state = lock(&stream.state);
        if state.flow.receive(piece).is_err() {
            // The other side is broken, so what it thinks of the stream does not matter.
            state.flow.reset();
        }
        let is_reset = state.flow.is_reset();
        if is_reset && let Some(abort) = &state.abort {
            abort();
        }
        drop(state);
        stream.changed.notify_all();
        if is_reset {
            self.forget(id);
        }
    }

    /// The link has gone: breaks everything off.
    pub fn close(&self) {
        let all: Vec<_> = lock(&self.shared.table).drain().collect();
        for (_, stream) in all {
            let mut state = lock(&stream.state);
            state.flow.reset();
            if let Some(abort) = &state.abort {
                abort();
            }
            drop(state);
            stream.changed.notify_all();
        }
    }

    /// How many streams there are.
    pub fn count(&self) -> usize {
        lock(&self.shared.table).len()
    }
}

impl Shared {
    /// Sends what the end says, as far as there is credit.
    fn read_from(&self, stream: &Stream, mut reader: Box<dyn Read + Send>) {
        let mut buffer = vec![0; CHUNK];
        loop {
            let room = {
                let mut state = lock(&stream.state);
                while state.flow.room() == 0 && !state.flow.is_reset() {
                    state = wait(&stream.changed, state);
                }
                state.flow.room().min(buffer.len())
            };
            if room == 0 {
                return;
            }
            let read = match reader.read(buffer.get_mut(..room).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read,
            };
            match read {
                Ok(0) => {
                    lock(&stream.state).flow.end();
                    drop((self.send)(stream.id, Piece::End));
                    return self.let_go(stream);
                }
                Ok(length) => {
                    lock(&stream.state).flow.sent(length);
                    let data = buffer.get(..length).unwrap_or_default().to_vec();
                    if (self.send)(stream.id, Piece::Data(data)).is_err() {
                        return self.break_off(stream);
                    }
                }
                Err(_) => return self.break_off(stream),
            }
        }
    }

    /// Gives the end what comes, and the credit for it back.
    fn write_to(
        &self,
        stream: &Stream,
        mut writer: Box<dyn Write + Send>,
        finish: Box<dyn FnOnce() + Send>,
    ) {
        loop {
            let next = {
                let mut state = lock(&stream.state);
                loop {
                    match state.flow.take() {
                        Next::Wait => state = wait(&stream.changed, state),
                        next => break next,
                    }
                }
            };
            match next {
                Next::Data(data) => {
                    if writer
                        .write_all(&data)
                        .and_then(|()| writer.flush())
                        .is_err()
                    {
                        return self.break_off(stream);
                    }
                    let credit = lock(&stream.state).flow.done(data.len());
                    if let Some(credit) = credit
                        && (self.send)(stream.id, Piece::Credit(credit)).is_err()
                    {
                        return self.break_off(stream);
                    }
                }
                Next::End => {
                    finish();
                    return self.let_go(stream);
                }
                Next::Reset | Next::Wait => return,
            }
        }
    }

    /// Breaks the stream off from this side, once.
    fn break_off(&self, stream: &Stream) {
        let was_reset = {
            let mut state = lock(&stream.state);
            let was_reset = state.flow.is_reset();
            state.flow.reset();
            if let Some(abort) = &state.abort {
                abort();
            }
            was_reset
        };
        stream.changed.notify_all();
        lock(&self.table).remove(&stream.id);
        if !was_reset {
            drop((self.send)(stream.id, Piece::Reset));
        }
    }

    /// One of the two threads has done its part.
    fn let_go(&self, stream: &Stream) {
        let finished = {
            let mut state = lock(&stream.state);
            state.finished += 1;
            state.finished
        };
        if finished == 2 {
            lock(&self.table).remove(&stream.id);
        }
    }
}

#[cfg(unix)]
impl End {
    /// Joins to a socket.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn of_socket(socket: std::os::unix::net::UnixStream) -> io::Result<Self> {
        use std::net::Shutdown;
        let (half, whole) = (socket.try_clone()?, socket.try_clone()?);
        Ok(Self {
            reader: Box::new(socket.try_clone()?),
            writer: Box::new(socket),
            // Both fail for a socket whose other end has gone, which is as good.
            finish: Box::new(move || drop(half.shutdown(Shutdown::Write))),
            abort: Box::new(move || drop(whole.shutdown(Shutdown::Both))),
        })
    }
}

fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked holding it left a whole value behind: each critical
    // section changes one value by calls that do not panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, unix))]
mod tests {
    use std::{
        os::unix::net::UnixStream,
        sync::mpsc,
        time::{Duration, Instant},
    };

    use super::*;
    use crate::flow::WINDOW;

    /// Two sides whose links are channels, each read by a thread as the real ones are.
    fn sides() -> (Streams, Streams) {
        let (to_agent, at_agent) = mpsc::channel::<(StreamId, Piece)>();
        let (to_client, at_client) = mpsc::channel::<(StreamId, Piece)>();
        let gone = |_| io::Error::other("the link has gone");
        let client = Streams::new(Side::Client, move |id, piece| {
            to_agent.send((id, piece)).map_err(gone)
        });
        let agent = Streams::new(Side::Agent, move |id, piece| {
            to_client.send((id, piece)).map_err(gone)
        });
        for (side, link) in [(client.clone(), at_client), (agent.clone(), at_agent)] {
            thread::spawn(move || {
                for (id, piece) in link {
                    side.receive(id, piece);
                }
            });
        }
        (client, agent)
    }

    /// A stream from a socket at the client to one at the agent.
    fn stream(client: &Streams, agent: &Streams) -> (UnixStream, UnixStream) {
        let (here, near) = UnixStream::pair().expect("the streams of the test");
        let (there, far) = UnixStream::pair().expect("the streams of the test");
        for socket in [&here, &there] {
            socket
                .set_read_timeout(Some(Duration::from_secs(20)))
                .expect("the streams of the test");
        }
        let id = client.reserve().expect("the streams of the test");
        agent.announce(id).expect("the streams of the test");
        agent.join(id, End::of_socket(far).expect("the streams of the test"));
        client.join(id, End::of_socket(near).expect("the streams of the test"));
        (here, there)
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at * 31 % 251) as u8).collect()
    }

    fn until(what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "{what}");
            thread::yield_now();
        }
    }

    #[test]
    fn many_windows_of_bytes_go_both_ways_at_once_and_arrive_whole() {
        let (client, agent) = sides();
        let (here, there) = stream(&client, &agent);
        let (out, back) = (pattern(WINDOW * 9 + 5), pattern(WINDOW * 7 + 1));
        let exchange = |mut socket: UnixStream, mine: Vec<u8>| {
            let mut writer = socket.try_clone().unwrap();
            let sending = thread::spawn(move || {
                writer.write_all(&mine).unwrap();
                writer.shutdown(std::net::Shutdown::Write).unwrap();
            });
            let receiving = thread::spawn(move || {
                let mut theirs = Vec::new();
                socket.read_to_end(&mut theirs).unwrap();
                theirs
            });
            (sending, receiving)
        };
        let near = exchange(here, out.clone());
        let far = exchange(there, back.clone());
        assert!(near.1.join().unwrap() == back, "what came back differs");
        assert!(far.1.join().unwrap() == out, "what went out differs");
        until("both sides forget the stream", || {
            client.count() == 0 && agent.count() == 0
        });
    }

    #[test]
    fn a_half_closed_stream_still_carries_the_other_half() {
        let (client, agent) = sides();
        let (mut here, mut there) = stream(&client, &agent);
        here.write_all(b"all I have").unwrap();
        here.shutdown(std::net::Shutdown::Write).unwrap();
        let mut got = String::new();
        there.read_to_string(&mut got).unwrap();
        assert_eq!(got, "all I have");
        there.write_all(b"an answer").unwrap();
        drop(there);
        let mut answer = String::new();
        here.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "an answer");
    }

    #[test]
    fn a_stream_that_nobody_reads_stops_its_sender_and_no_other() {
        let (client, agent) = sides();
        let (here, _unread) = stream(&client, &agent);
        here.set_nonblocking(true).unwrap();
        // All that fits: socket buffers on both sides and a window.
        let mut taken = 0;
        let mut last = Instant::now();
        while last.elapsed() < Duration::from_millis(300) {
            if let Ok(length) = (&here).write(&[0; 4096]) {
                taken += length;
                last = Instant::now();
                assert!(taken < 8 << 20, "the stream takes without bound");
            }
        }
        let (mut other, mut far) = stream(&client, &agent);
        other.write_all(b"x").unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).unwrap();
    }

    #[test]
    fn a_reader_that_goes_away_is_noticed_by_the_sender() {
        let (client, agent) = sides();
        let (mut here, there) = stream(&client, &agent);
        drop(there);
        let deadline = Instant::now() + Duration::from_secs(20);
        while here.write_all(&[0; 4096]).is_ok() {
            assert!(Instant::now() < deadline, "nobody said that it has gone");
        }
        until("both sides forget the stream", || {
            client.count() == 0 && agent.count() == 0
        });
    }

    #[test]
    fn when_the_link_goes_every_end_is_closed() {
        let (client, agent) = sides();
        let (mut here, mut there) = stream(&client, &agent);
        client.close();
        agent.close();
        let mut rest = Vec::new();
        assert!(matches!(here.read_to_end(&mut rest), Ok(0)));
        assert!(matches!(there.read_to_end(&mut rest), Ok(0)));
    }

    #[test]
    fn data_that_comes_before_the_stream_is_joined_waits_for_it() {
        let (client, agent) = sides();
        let (mut here, near) = UnixStream::pair().unwrap();
        let id = agent.reserve().unwrap();
        client.announce(id).unwrap();
        client.receive(id, Piece::Data(b"early".to_vec()));
        client.receive(id, Piece::End);
        client.join(id, End::of_socket(near).unwrap());
        let mut got = String::new();
        here.read_to_string(&mut got).unwrap();
        assert_eq!(got, "early");
    }

    #[test]
    fn a_side_that_breaks_the_rules_loses_the_stream() {
        let (client, agent) = sides();
        let (mut here, _there) = stream(&client, &agent);
        client.receive(StreamId(0), Piece::Credit(1));
        assert!(matches!(here.read(&mut [0]), Ok(0)));
        assert_eq!(client.count(), 0);
    }

    #[test]
    fn no_more_than_the_most_streams_can_be_open() {
        let (client, _agent) = sides();
        for _ in 0..MOST {
            client.reserve().unwrap();
        }
        assert!(client.reserve().is_err());
        client.forget(StreamId(0));
        client.reserve().unwrap();
    }
}
