//! What an appliance says to a shutdown request of the host, at once or after a while.

use core::future::{Future, IntoFuture, Ready, ready};
use core::pin::Pin;

use alloc::boxed::Box;
use vmbus::drivers::shutdown::Request;

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// The machine powers off or restarts, as the host asks.
    Accept,
    /// The machine goes on, and the host is told that it does.
    Refuse,
}

/// A decision is a future that is ready: hooks that need not wait return it as it is.
impl IntoFuture for Decision {
    type Output = Self;
    type IntoFuture = Ready<Self>;

    fn into_future(self) -> Ready<Self> {
        ready(self)
    }
}

/// A future of the executor's own VP.
type Deciding = Pin<Box<dyn Future<Output = Decision>>>;

/// A hook of an appliance.
pub(crate) struct Hook(Box<dyn Fn(Request) -> Deciding + Send + Sync>);

impl Hook {
    pub(crate) fn new<D>(hook: impl Fn(Request) -> D + Send + Sync + 'static) -> Self
    where
        D: IntoFuture<Output = Decision>,
        D::IntoFuture: 'static,
    {
        Self(Box::new(move |request| {
            Box::pin(hook(request).into_future())
        }))
    }

    pub(crate) fn decide(&self, request: Request) -> Deciding {
        (self.0)(request)
    }
}

#[cfg(test)]
mod tests {
    use core::cell::Cell;
    use core::task::{Context, Poll, Waker};

    use vmbus::drivers::shutdown::{Action, Reason};

    use super::*;

    fn request(force: bool) -> Request {
        Request {
            action: Action::Restart,
            force,
            reason: Reason(0),
            timeout_seconds: 3,
            text: "why".into(),
        }
    }

    fn poll(deciding: &mut Deciding) -> Poll<Decision> {
        deciding
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_hook_may_decide_at_once() {
        let hook = Hook::new(|request| {
            if request.force {
                Decision::Accept
            } else {
                Decision::Refuse
            }
        });
        for (force, decision) in [(true, Decision::Accept), (false, Decision::Refuse)] {
            let mut deciding = hook.decide(request(force));
            assert_eq!(poll(&mut deciding), Poll::Ready(decision));
        }
    }

    #[test]
    fn a_hook_may_take_its_time() {
        let hook = Hook::new(|request| async move {
            let waited = Cell::new(0);
            core::future::poll_fn(|_| {
                waited.set(waited.get() + 1);
                if waited.get() > request.timeout_seconds {
                    Poll::Ready(Decision::Accept)
                } else {
                    Poll::Pending
                }
            })
            .await
        });
        let mut deciding = hook.decide(request(false));
        for _ in 0..3 {
            assert_eq!(poll(&mut deciding), Poll::Pending);
        }
        assert_eq!(poll(&mut deciding), Poll::Ready(Decision::Accept));
    }
}
