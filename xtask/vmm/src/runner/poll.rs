//! What the host's thread sleeps on: signals of channels, wakes from other threads, and a deadline.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use vmbus::ids::ChannelId;
use vmbus_host::provider::Notify;
use vmbus_host::sync::Mutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::Error;

/// Events that are taken at once.
const BATCH: usize = 64;

/// What is no channel.
const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// What the host's thread sleeps on.
pub(super) struct Poll {
    epoll: Epoll,
    wake: Arc<EventFd>,
    timer: Mutex<Timer>,
    /// Signals of open channels.
    signals: Mutex<BTreeMap<ChannelId, EventFd>>,
}

struct Timer {
    descriptor: TimerFd,
    /// The reference time that it is set for.
    set: Option<u64>,
}

/// Why a channel's signals do not come by a descriptor.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoRoute {
    #[error("there is no descriptor for a channel: {0}")]
    Descriptor(#[from] io::Error),
    #[error(transparent)]
    Vm(#[from] Error),
}

/// For how long the host's thread can sleep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sleep {
    /// Not at all.
    Not,
    /// Until something is due.
    Until {
        /// The reference time of now.
        now: u64,
        /// The reference time when it is due.
        at: u64,
    },
    /// Until it is woken.
    Unlimited,
}

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        let poll = Self {
            epoll: Epoll::new()?,
            wake: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            timer: Mutex::new(Timer {
                descriptor: TimerFd::new()?,
                set: None,
            }),
            signals: Mutex::new(BTreeMap::new()),
        };
        poll.add(&*poll.wake, WAKE)?;
        poll.add(&poll.timer.lock().descriptor, TIMER)?;
        Ok(poll)
    }

    fn add(&self, descriptor: &impl AsRawFd, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, token);
        self.epoll
            .ctl(ControlOperation::Add, descriptor.as_raw_fd(), event)
    }

    /// Wakes the thread, from any other.
    pub(super) fn wake(&self) {
        // One that is full wakes already.
        let _ = self.wake.write(1);
    }

    /// The same, for those who know nothing of this.
    pub(super) fn waker(&self) -> Notify {
        let wake = Arc::clone(&self.wake);
        Arc::new(move || {
            let _ = wake.write(1);
        })
    }

    /// A descriptor that wakes the thread on behalf of this channel, as `route` has it connected.
    pub(super) fn add_channel(
        &self,
        channel: ChannelId,
        route: impl FnOnce(&EventFd) -> Result<(), Error>,
    ) -> Result<(), NoRoute> {
        let signal = EventFd::new(EFD_NONBLOCK)?;
        self.add(&signal, u64::from(channel.0))?;
        route(&signal)?;
        self.signals.lock().insert(channel, signal);
        Ok(())
    }

    /// The channel is closed. Closing its descriptor takes it out of the poll.
    pub(super) fn remove_channel(&self, channel: ChannelId) {
        self.signals.lock().remove(&channel);
    }

    /// Sleeps. Returns the channels that were signalled.
    pub(super) fn wait(&self, sleep: Sleep) -> io::Result<Vec<ChannelId>> {
        let timeout = match sleep {
            Sleep::Not => 0,
            Sleep::Until { now, at } => {
                let mut timer = self.timer.lock();
                // Most turns leave the next deadline as it was.
                if timer.set != Some(at) {
                    let left = at.saturating_sub(now).max(1).saturating_mul(100);
                    timer.descriptor.reset(Duration::from_nanos(left), None)?;
                    timer.set = Some(at);
                }
                -1
            }
            // A timer that is still set wakes once too often.
            Sleep::Unlimited => -1,
        };
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let signals = self.signals.lock();
        let mut signalled = Vec::new();
        for event in events.iter().take(count) {
            match event.data() {
                WAKE => {
                    let _ = self.wake.read();
                }
                TIMER => {
                    let mut timer = self.timer.lock();
                    timer.descriptor.wait()?;
                    timer.set = None;
                }
                channel => {
                    let channel = ChannelId(u32::try_from(channel).unwrap_or(u32::MAX));
                    if let Some(signal) = signals.get(&channel) {
                        let _ = signal.read();
                        signalled.push(channel);
                    }
                }
            }
        }
        Ok(signalled)
    }
}
