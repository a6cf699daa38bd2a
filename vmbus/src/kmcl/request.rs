//! Requests: a packet, and waiting for its end, with a time limit.
//!
//! `VmbChannelSendSynchronousRequest` in three forms: [`Channel::request`] as a future, [`Channel::send_synchronous_request`] which
//! blocks, and [`Channel::try_send`] which never waits for anything (spec kmcl.md 1.9).

use core::fmt;
use core::future::Future;
use core::ops::Deref;
use core::pin::Pin;
use core::sync::atomic::{AtomicU32, Ordering};
use core::task::{Context, Poll};

use super::channel::{Channel, Shared, State};
use super::error::RequestError;
use super::external::ExternalData;
use super::outgoing::{Ending, OutgoingPacket};
use super::sender::{Order, Refusal, Sent};
use crate::hypervisor::Level;
use crate::ids::VpIndex;

/// How long a request waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Timeout {
    /// For ever.
    Never,
    /// So long from now, in units of 100 ns. Zero: the packet goes into the ring at once or not at all.
    After(u64),
    /// Until this reference time, in units of 100 ns.
    At(u64),
}

impl Timeout {
    /// The reference time at which it is over.
    fn end(self, now: u64) -> u64 {
        match self {
            Self::Never => u64::MAX,
            Self::After(time) => now.saturating_add(time),
            Self::At(time) => time,
        }
    }
}

/// A packet that has been sent, and the wait for its end: a future.
///
/// Dropping it gives the request up, as the end of its time does: a packet that still waits for room is not sent any more. One
/// that the host has stays with the library, lent memory included, until the host answers it or has
/// let go of the channel; the late answer is dropped and counted. Until then one packet fewer can be allocated.
#[must_use = "dropping a request gives it up"]
pub struct Request {
    channel: Channel,
    progress: Progress,
}

enum Progress {
    /// It was not sent.
    Refused(RequestError),
    Waiting {
        id: u64,
        until: u64,
    },
    Over,
}

/// What the host answered. Dropping it gives the packet back to the library.
pub struct Answer(OutgoingPacket);

impl Answer {
    /// Takes back the memory that was lent with the request.
    pub fn take_external_data(&mut self) -> ExternalData {
        self.0.take_external_data()
    }
}

impl Deref for Answer {
    type Target = [u8];

    /// The data of the host's completion packet, padded by the host to a multiple of 8 bytes. Empty for a message.
    fn deref(&self) -> &[u8] {
        self.0.answer()
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Answer").field(&self.len()).finish()
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("channel", &self.channel)
            .finish_non_exhaustive()
    }
}

impl Channel {
    /// Sends `data` as a request, now, and gives a future that waits for the answer. With `external` the host
    /// is lent memory for as long as it takes. At DISPATCH or PASSIVE.
    ///
    /// A channel that is not open yet, or paused, sends it when it is. A [`Timeout`] of zero does not wait for that or for
    /// room in the ring.
    ///
    /// # Errors
    ///
    /// The future tells them: see [`RequestError`]. Awaited inside of a callback that the answer cannot pass, it ends with
    /// [`RequestError::WouldDeadlock`].
    pub fn request(&self, data: &[u8], external: ExternalData, timeout: Timeout) -> Request {
        self.begin(data, external, true, timeout)
    }

    /// Sends `data` as a message, now, and gives a future that waits until it has entered the ring: a synchronous
    /// request without VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION. Its answer is empty.
    pub fn deliver(&self, data: &[u8], timeout: Timeout) -> Request {
        self.begin(data, ExternalData::new(), false, timeout)
    }

    /// Sends `data` as a request, waits for the answer at PASSIVE, and copies it into `answer`. Gives its length: a multiple of 8,
    /// because hosts pad what they send.
    ///
    /// # Errors
    ///
    /// Besides those of [`request`](Self::request): [`RequestError::WouldBlock`] at DISPATCH, [`RequestError::WouldDeadlock`] in the opened or started
    /// callback of this channel, or in its packet callbacks, and [`RequestError::AnswerTooLong`] when `answer` is too short. The
    /// request has been sent only in the last case.
    pub fn send_synchronous_request(
        &self,
        data: &[u8],
        external: ExternalData,
        timeout: Timeout,
        answer: &mut [u8],
    ) -> Result<usize, RequestError> {
        let client = self.client();
        if client.current_level() == Level::Dispatch {
            return Err(RequestError::WouldBlock);
        }
        if self.shared().is_below_caller() {
            return Err(RequestError::WouldDeadlock);
        }
        let received = client
            .block_on(self.request(data, external, timeout))
            .map_err(|_| RequestError::WouldBlock)??;
        let length = received.len();
        answer
            .get_mut(..length)
            .ok_or(RequestError::AnswerTooLong { length })?
            .copy_from_slice(&received);
        Ok(length)
    }

    /// Puts `data` into the ring as a message, now or not at all: it neither waits for room nor overtakes packets that do.
    /// Needs no packet. At DISPATCH or PASSIVE, in every callback.
    ///
    /// # Errors
    ///
    /// [`RequestError::NotQueued`] when there is no room or the channel is not open yet, [`RequestError::Removed`] when it ends or has
    /// ended, [`RequestError::Send`] when it can never be sent.
    pub fn try_send(&self, data: &[u8]) -> Result<(), RequestError> {
        let shared = self.shared();
        shared.check_mode().map_err(RequestError::Allocate)?;
        shared.check_data(data).map_err(RequestError::Send)?;
        shared.send_now(data).map_err(RequestError::from)
    }

    fn begin(
        &self,
        data: &[u8],
        external: ExternalData,
        transaction: bool,
        timeout: Timeout,
    ) -> Request {
        let until = timeout.end(self.shared().client.hypervisor.reference_time());
        let order = Order {
            data,
            transaction,
            request: Some(until),
            may_wait: timeout != Timeout::After(0),
        };
        let progress = match self.submit_request(external, &order) {
            Ok(id) => Progress::Waiting { id, until },
            Err(error) => Progress::Refused(error),
        };
        Request {
            channel: self.clone(),
            progress,
        }
    }

    fn submit_request(
        &self,
        external: ExternalData,
        order: &Order<'_>,
    ) -> Result<u64, RequestError> {
        let shared = self.shared();
        let mut body = shared.take_packet().map_err(RequestError::Allocate)?;
        body.ending = Ending::Request;
        body.external = external;
        let ready = body
            .reserve_answer(shared.config.maximum_packet_size)
            .map_err(RequestError::Allocate)
            .and_then(|()| shared.prepare(&mut body, order).map_err(RequestError::Send));
        let sent = match ready {
            Ok(()) => shared
                .send(body, order)
                .map_err(|(body, refusal)| (body, refusal.into())),
            Err(error) => Err((body, error)),
        };
        match sent {
            Ok(Sent::Accepted { id }) => Ok(id),
            Ok(Sent::Done { id, body }) => {
                self.finish_packet(body, Ok(&[]));
                Ok(id)
            }
            Err((body, error)) => {
                shared.put_aside(body);
                Err(error)
            }
        }
    }
}

/// The VP that runs a certain piece of code now, if one does.
#[derive(Default)]
pub(super) struct Runner(AtomicU32);

impl Runner {
    /// Runs `code` on `vp`.
    pub(super) fn during<R>(&self, vp: VpIndex, code: impl FnOnce() -> R) -> R {
        let outer = self.0.swap(vp.0.wrapping_add(1), Ordering::SeqCst);
        let result = code();
        self.0.store(outer, Ordering::SeqCst);
        result
    }

    pub(super) fn is(&self, vp: VpIndex) -> bool {
        self.0.load(Ordering::SeqCst) == vp.0.wrapping_add(1)
    }
}

impl Shared {
    /// Runs a batch, and remembers meanwhile who does. Code at DISPATCH may not wait anyway.
    pub(super) fn in_batch<R>(&self, level: Level, batch: impl FnOnce() -> R) -> R {
        if level == Level::Dispatch {
            return batch();
        }
        let vp = self.client.hypervisor.current_vp();
        let result = self.batch_runner.during(vp, batch);
        self.catch_up();
        result
    }

    /// Whether the caller runs, at PASSIVE, inside of one of this channel's callbacks that the channel cannot go on
    /// without: opened, started, or those of a batch.
    fn is_below_caller(&self) -> bool {
        let me = self.client.hypervisor.current_vp();
        (self.state() == State::Opening && self.caller.is(me)) || self.batch_runner.is(me)
    }
}

impl Future for Request {
    type Output = Result<Answer, RequestError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let (id, until) = match self.progress {
            Progress::Waiting { id, until } => (id, until),
            Progress::Refused(error) => {
                self.progress = Progress::Over;
                return Poll::Ready(Err(error));
            }
            // Whoever asks again has had the answer.
            Progress::Over => return Poll::Ready(Err(RequestError::Cancelled)),
        };
        let shared = self.channel.shared();
        let hypervisor = &*shared.client.hypervisor;
        let error = match shared.poll_request(id, context.waker().clone()) {
            Poll::Ready(Some((body, result))) => {
                let answer = Answer(OutgoingPacket::new(self.channel.clone(), body));
                self.progress = Progress::Over;
                return Poll::Ready(match result {
                    Ok(()) => Ok(answer),
                    Err(reason) => Err(RequestError::Removed(reason)),
                });
            }
            Poll::Ready(None) if hypervisor.reference_time() < until => {
                RequestError::Removed(shared.end_reason())
            }
            Poll::Ready(None) => RequestError::Cancelled,
            Poll::Pending if hypervisor.reference_time() >= until => {
                shared.cancel_request(id);
                RequestError::Cancelled
            }
            Poll::Pending
                if hypervisor.current_level() == Level::Passive && shared.is_below_caller() =>
            {
                shared.cancel_request(id);
                RequestError::WouldDeadlock
            }
            Poll::Pending => return Poll::Pending,
        };
        self.progress = Progress::Over;
        Poll::Ready(Err(error))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Progress::Waiting { id, .. } = self.progress {
            self.channel.shared().cancel_request(id);
        }
    }
}

impl From<Refusal> for RequestError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Full => Self::NotQueued,
            Refusal::Ended(reason) => Self::Removed(reason),
            Refusal::Failure(reason) => Self::Send(reason),
        }
    }
}
