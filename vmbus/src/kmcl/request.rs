//! Requests: a packet, and waiting for its end, with a time limit.
//!
//! `VmbChannelSendSynchronousRequest` in three forms: [`Channel::request`] as a future, [`Channel::send_synchronous_request`] which
//! blocks, and [`Channel::try_send`] which never waits for anything (spec kmcl.md 1.9).

use alloc::boxed::Box;
use core::fmt;
use core::future::Future;
use core::mem;
use core::ops::Deref;
use core::pin::Pin;
use core::sync::atomic::{AtomicU32, Ordering};
use core::task::{Context, Poll, Waker};

use super::channel::{Channel, Shared, State};
use super::error::{ChannelError, RequestError};
use super::external::ExternalData;
use super::outgoing::{Body, Ending, OutgoingPacket};
use super::sender::{Abandoned, Order, Refusal, SendSide, Sent};
use super::slots::{Ended, Waiter};
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

    /// Whether no VP does.
    pub(super) fn is_idle(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }

    pub(super) fn is(&self, vp: VpIndex) -> bool {
        self.0.load(Ordering::SeqCst) == vp.0.wrapping_add(1)
    }
}

impl Shared {
    /// Runs a batch, and remembers meanwhile who does. Code at DISPATCH may not wait anyway.
    pub(super) fn in_batch<R>(&self, level: Level, batch: impl FnOnce() -> R) -> R {
        self.as_runner(&self.batch_runner, level, batch)
    }

    /// Runs code that the channel cannot make a step below, as `runner`.
    pub(super) fn as_runner<R>(
        &self,
        runner: &Runner,
        level: Level,
        code: impl FnOnce() -> R,
    ) -> R {
        if level == Level::Dispatch {
            return code();
        }
        let result = runner.during(self.client.hypervisor.current_vp(), code);
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

/// Who waits, for what, and until when.
impl Shared {
    /// Books the request that waits for the packet in a slot, if one does.
    pub(super) fn note_request(&self, side: &mut SendSide, index: usize, order: &Order<'_>) {
        if let Some(until) = order.request
            && let Some(slot) = side.slots.get_mut(index)
        {
            slot.waiter = Waiter::Waiting { waker: None, until };
            if until < self.request_at.fetch_min(until, Ordering::SeqCst) {
                // The one who sleeps until the deadline has to learn of it.
                self.client.request_work();
            }
        }
    }

    /// Tells a request that its packet has ended.
    pub(super) fn end_request(&self, body: Box<Body>, result: Result<(), ChannelError>) {
        let mut side = self.send.lock(&*self.client.hypervisor);
        let (waker, left) = side.slots.end_request(body, result);
        drop(side);
        if let Some(body) = left {
            self.put_aside(body);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Looks whether the packet of a request has ended; if not, `waker` will be woken when it does. `None` when the library has
    /// given the request up.
    fn poll_request(&self, id: u64, waker: Waker) -> Poll<Option<Ended>> {
        let mut waker = Some(waker);
        let mut side = self.send.lock(&*self.client.hypervisor);
        let Some((_, slot)) = side.slots.find(id) else {
            return Poll::Ready(None);
        };
        match mem::take(&mut slot.waiter) {
            Waiter::Ended(ended) => Poll::Ready(Some(ended)),
            Waiter::Waiting {
                waker: mut known,
                until,
            } => {
                mem::swap(&mut known, &mut waker);
                slot.waiter = Waiter::Waiting {
                    waker: known,
                    until,
                };
                // The one before is dropped while no lock is held.
                drop(side);
                drop(waker);
                Poll::Pending
            }
            other => {
                slot.waiter = other;
                Poll::Ready(None)
            }
        }
    }

    /// Why the library gave up a request whose time is not over.
    fn end_reason(&self) -> ChannelError {
        self.send.lock(&*self.client.hypervisor).reason()
    }

    /// Stops waiting for the packet of a request; nobody is woken.
    fn cancel_request(&self, id: u64) {
        let mut side = self.send.lock(&*self.client.hypervisor);
        let Some((index, _)) = side.slots.find(id) else {
            return;
        };
        let abandoned = side.abandon(index);
        drop(side);
        if abandoned.waited {
            self.counters.cancelled_requests.add(1);
        }
        drop(self.clean_up(abandoned));
    }

    /// Gives up every request whose time is over. At PASSIVE.
    pub(super) fn expire_requests(&self, now: u64) {
        // Those that come meanwhile lower it again.
        self.request_at.store(u64::MAX, Ordering::SeqCst);
        self.abandon_requests(|until| {
            let over = until <= now;
            if over {
                self.counters.cancelled_requests.add(1);
            } else {
                self.request_at.fetch_min(until, Ordering::SeqCst);
            }
            over
        });
    }

    /// Gives up every request because the channel ends: nobody may wait for what will not come, while the memory lent to the
    /// host stays with the library until the host has let go.
    pub(super) fn give_up_requests(&self) {
        self.abandon_requests(|_| true);
    }

    fn abandon_requests(&self, over: impl Fn(u64) -> bool) {
        for index in 0.. {
            let mut side = self.send.lock(&*self.client.hypervisor);
            let until = match side.slots.get_mut(index).map(|slot| &slot.waiter) {
                Some(Waiter::Waiting { until, .. }) => *until,
                Some(_) => continue,
                None => return,
            };
            if !over(until) {
                continue;
            }
            let abandoned = side.abandon(index);
            drop(side);
            if let Some(waker) = self.clean_up(abandoned) {
                waker.wake();
            }
        }
    }

    fn clean_up(&self, abandoned: Abandoned) -> Option<Waker> {
        if let Some(body) = abandoned.body {
            self.put_aside(body);
        }
        if abandoned.front {
            // What waits behind it may need less room.
            self.defer();
        }
        abandoned.waker
    }
}
