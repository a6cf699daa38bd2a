//! Sockets between guest and host: each connection is a channel of its own (spec hvsock.md).
//!
//! [`Sockets`] is the host's [`Connector`](crate::provider::Connector): it offers channels, and knows which are under
//! way. A connection moves bytes between its channel and a [`Stream`], with bounded buffers and back-pressure
//! both ways; it does no I/O but through the stream. [`unix`] makes streams of Unix sockets, by the text protocol that
//! other virtual machine monitors have.

mod address;
mod connection;
mod framing;
#[cfg(all(feature = "std", unix))]
mod greeting;
mod sockets;
mod stream;
#[cfg(all(feature = "std", unix))]
pub mod unix;

pub use address::{ParseServiceError, Service};
pub use framing::MAX_DATA;
pub use sockets::{Backend, ConnectFault, Counts, HostConnection, Limits, Sockets, SocketsHandle};
pub use stream::{MemoryEnd, MemoryStream, Stream, Transfer, memory_stream};
