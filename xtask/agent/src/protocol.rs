//! The words between `xtask` and an agent: requests, answers, events and the
//! pieces of streams, each in a frame of its own.
//!
//! A frame is a little-endian `u32` length and that many bytes of postcard.
//! Every request carries an id and gets exactly one answer with the same id, not
//! always in their order; events come unasked, in the order in which they happened.
//! Streams ([`crate::flow`]) run both ways beside them.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Largest body of a frame in bytes. A longer one means a broken stream.
pub const MAX_FRAME: usize = 1 << 20;

/// Bytes of a file that travel in one [`Request::Put`] or [`Event::Part`].
pub const CHUNK: usize = 128 << 10;

/// Names a VM for as long as the agent runs; chosen by the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VmId(pub u32);

/// Names a stream for as long as it is open. The client chooses even numbers, the
/// agent odd ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StreamId(pub u32);

/// Names a listening socket for as long as the agent runs; chosen by the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ListenerId(pub u32);

/// Pairs an answer with its request; chosen by the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u32);

/// A command for the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Writes `data` at `offset` of the file `name` in the agent's directory;
    /// offset 0 replaces the file.
    Put {
        /// Plain file name, no directories.
        name: String,
        /// Position of the first byte.
        offset: u64,
        /// At most [`CHUNK`] bytes.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
        /// Whether the file is a program.
        executable: bool,
    },
    /// Starts a VM: runs `program`, QEMU or the test machine, in the agent's
    /// directory. Its standard output is the guest's console, its standard input
    /// what [`Target::Input`] leads to, and its descriptor [`CONTROL_FD`] the
    /// stream of its QMP-shaped control.
    Start {
        /// The VM's name from here on.
        vm: VmId,
        /// Program and leading arguments (a loader, its options, QEMU).
        program: Vec<String>,
        /// Its further arguments.
        arguments: Vec<String>,
        /// Whether, in a machine of the agent's own, the program's first thread
        /// goes before those that it makes. QEMU needs that, see `priority`.
        first_thread_first: bool,
    },
    /// Sends one line to a VM's control.
    Qmp {
        /// The VM.
        vm: VmId,
        /// One JSON value, without the line end.
        line: String,
    },
    /// Ends a VM at once. Its [`Event::Exited`] follows.
    Kill {
        /// The VM.
        vm: VmId,
    },
    /// Reads a file of the agent's system, to its end. Its bytes come as
    /// [`Event::Part`]s before the answer.
    Read {
        /// Absolute path.
        path: String,
    },
    /// Writes an existing file of the agent's system (a kernel control file);
    /// what it held before goes.
    Write {
        /// Absolute path.
        path: String,
        /// Everything that is written, in one piece.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// Opens a stream to something on the agent's system.
    Open {
        /// The stream's name from here on.
        stream: StreamId,
        /// Where it leads.
        to: Target,
    },
    /// Listens on a new Unix socket of the agent's system; each connection comes as
    /// an [`Event::Incoming`].
    Listen {
        /// The listener's name from here on.
        listener: ListenerId,
        /// Path of the socket; in the agent's directory unless absolute.
        path: String,
    },
    /// Ends a listener and removes its socket. Connections that it accepted stay.
    Unlisten {
        /// The listener.
        listener: ListenerId,
    },
    /// Ends the agent, and with it the machine that it is the first process of.
    PowerOff,
}

/// Where a stream of the client leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// A Unix socket; its path is in the agent's directory unless absolute.
    Socket(String),
    /// A VM's standard input. There is one such stream in a VM's life.
    Input(VmId),
    /// A new FUSE file system at this absolute path, in a machine of the agent's own.
    /// The agent sends the kernel's requests and the client answers them, each with its
    /// length first, as FUSE has it.
    Files(String),
}

/// One piece of a stream, either way. Rules and bounds are [`crate::flow`]'s.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Piece {
    /// The next bytes, 1 to [`CHUNK`].
    Data(#[serde(with = "serde_bytes")] Vec<u8>),
    /// The receiver of data took so many bytes out of the way: as many more may come.
    Credit(u32),
    /// No more data will come from this side.
    End,
    /// The stream is broken off both ways; last piece.
    Reset,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The agent is up. First event of every stream.
    Hello {
        /// [`VERSION`] of the agent.
        version: u32,
    },
    /// Answer to the request `id`; on failure one sentence that says why.
    Answer {
        /// The request.
        id: RequestId,
        /// What came of it.
        result: Result<(), String>,
    },
    /// Piece of the file asked for by the request `id`.
    Part {
        /// The request.
        id: RequestId,
        /// The next bytes.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// The guest wrote to its console.
    Console {
        /// The VM.
        vm: VmId,
        /// Time of arrival.
        at: Nanoseconds,
        /// Raw bytes.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// The VM's program wrote to its standard error.
    Complaint {
        /// The VM.
        vm: VmId,
        /// Raw bytes.
        #[serde(with = "serde_bytes")]
        data: Vec<u8>,
    },
    /// The VM's control said something: answer or event.
    Qmp {
        /// The VM.
        vm: VmId,
        /// Time of arrival.
        at: Nanoseconds,
        /// One JSON value.
        line: String,
    },
    /// The VM has ended; its last event.
    Exited {
        /// The VM.
        vm: VmId,
        /// Time of its end.
        at: Nanoseconds,
        /// Exit status, or `None` when a signal ended it.
        status: Option<i32>,
    },
    /// Somebody has connected to a socket that is listened on.
    Incoming {
        /// The listener.
        listener: ListenerId,
        /// The stream to the one who connected, open at once.
        stream: StreamId,
    },
    /// A piece of a stream.
    Piece {
        /// The stream.
        stream: StreamId,
        /// The piece.
        piece: Piece,
    },
}

/// What the client says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Call {
    /// A request, to be answered.
    Request(Numbered),
    /// A piece of a stream.
    Piece {
        /// The stream.
        stream: StreamId,
        /// The piece.
        piece: Piece,
    },
}

/// Version of these words; client and agent must have the same.
pub const VERSION: u32 = 2;

/// File descriptor on which a VM's program finds the stream of its control.
pub const CONTROL_FD: i32 = 3;

/// Nanoseconds of the agent's clock, since the agent started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Nanoseconds(pub u64);

/// A request with its id, as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbered {
    /// Comes back in the answer.
    pub id: RequestId,
    /// What to do.
    pub request: Request,
}

/// Writes one frame and flushes it.
///
/// # Errors
/// What the stream reports; `InvalidData` when the value is longer than
/// [`MAX_FRAME`].
pub fn send<T: Serialize>(stream: &mut impl Write, value: &T) -> io::Result<()> {
    let body = postcard::to_stdvec(value).map_err(io::Error::other)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MAX_FRAME)
        .ok_or_else(|| invalid("a frame to send is too long"))?;
    let mut frame = Vec::with_capacity(body.len() + 4);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    stream.write_all(&frame)?;
    stream.flush()
}

/// Reads one frame; `None` when the stream ends between two frames.
///
/// # Errors
/// What the stream reports; `InvalidData` when the frame is too long or does
/// not hold a `T`, `UnexpectedEof` when the stream ends inside a frame.
pub fn receive<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    match stream.read(&mut length)? {
        0 => return Ok(None),
        n => stream.read_exact(length.get_mut(n..).unwrap_or_default())?,
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(invalid("a received frame is too long"));
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    postcard::from_bytes(&body)
        .map(Some)
        .map_err(|_| invalid("a received frame makes no sense"))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn round(event: &Event) -> Event {
        let mut stream = Vec::new();
        send(&mut stream, event).unwrap();
        receive(&mut stream.as_slice()).unwrap().unwrap()
    }

    #[test]
    fn frames_come_back_as_they_went() {
        for event in [
            Event::Hello { version: VERSION },
            Event::Console {
                vm: VmId(3),
                at: Nanoseconds(u64::MAX),
                data: vec![0, 255, 10],
            },
            Event::Answer {
                id: RequestId(9),
                result: Err("no such file".into()),
            },
            Event::Incoming {
                listener: ListenerId(1),
                stream: StreamId(3),
            },
        ] {
            assert_eq!(round(&event), event);
        }
    }

    #[test]
    fn an_ended_stream_is_no_error_but_half_a_frame_is() {
        let mut stream = Vec::new();
        send(&mut stream, &Event::Hello { version: 1 }).unwrap();
        let half = &stream[..stream.len() - 1];
        assert!(receive::<Event>(&mut &[][..]).unwrap().is_none());
        assert_eq!(
            receive::<Event>(&mut &half[..]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        assert_eq!(
            receive::<Event>(&mut &half[..2]).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_both_ways() {
        let big = Event::Part {
            id: RequestId(0),
            data: vec![0; MAX_FRAME],
        };
        assert!(send(&mut Vec::new(), &big).is_err());
        let mut stream = &[0xff, 0xff, 0xff, 0x7f, 0, 0][..];
        assert_eq!(
            receive::<Event>(&mut stream).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    fn piece() -> impl Strategy<Value = Piece> {
        prop_oneof![
            vec(any::<u8>(), 0..CHUNK / 64).prop_map(Piece::Data),
            any::<u32>().prop_map(Piece::Credit),
            Just(Piece::End),
            Just(Piece::Reset),
        ]
    }

    proptest! {
        #[test]
        fn pieces_come_back_as_they_went_one_by_one(pieces in vec((any::<u32>(), piece()), 0..20)) {
            let calls: Vec<_> = pieces
                .into_iter()
                .map(|(stream, piece)| Call::Piece { stream: StreamId(stream), piece })
                .collect();
            let mut stream = Vec::new();
            for call in &calls {
                send(&mut stream, call).unwrap();
            }
            let mut rest = stream.as_slice();
            for call in &calls {
                let back = receive::<Call>(&mut rest).unwrap();
                prop_assert_eq!(back.as_ref(), Some(call));
            }
            prop_assert!(receive::<Call>(&mut rest).unwrap().is_none());
        }

        #[test]
        fn any_bytes_are_frames_or_an_error_and_always_come_to_an_end(
            bytes in vec(any::<u8>(), 0..400),
            lengths_are_right: bool,
        ) {
            let mut stream = bytes.clone();
            if lengths_are_right {
                let length = u32::try_from(bytes.len()).unwrap();
                stream.splice(0..0, length.to_le_bytes());
            }
            let mut calls = stream.as_slice();
            while let Ok(Some(_)) = receive::<Call>(&mut calls) {}
            let mut events = stream.as_slice();
            while let Ok(Some(_)) = receive::<Event>(&mut events) {}
        }

        #[test]
        fn a_stream_cut_anywhere_is_told_from_one_that_has_ended(
            data in vec(any::<u8>(), 0..100),
            cut: prop::sample::Index,
        ) {
            let mut stream = Vec::new();
            send(&mut stream, &Piece::Data(data)).unwrap();
            let cut = cut.index(stream.len());
            let result = receive::<Piece>(&mut &stream[..cut]);
            match cut {
                0 => prop_assert!(matches!(result, Ok(None))),
                _ => prop_assert!(result.is_err()),
            }
        }
    }
}
