//! Where a provider's slow work is done: at once, or by threads.
//!
//! A job leaves its result where the provider finds it and wakes the provider with its [`Link`](crate::provider::Link).

use alloc::boxed::Box;

/// A piece of work.
pub type Job = Box<dyn FnOnce() + Send>;

/// Does work that a provider must not wait for.
pub trait Executor: Send + Sync {
    /// Has `job` run: now, or soon on another thread.
    fn run(&self, job: Job);
}

/// Does each job before it returns: for tests, where everything comes in the same order each time.
#[derive(Clone, Copy, Default, Debug)]
pub struct Inline;

impl Executor for Inline {
    fn run(&self, job: Job) {
        job();
    }
}

#[cfg(feature = "std")]
pub use threads::Threads;

#[cfg(feature = "std")]
mod threads {
    use std::sync::{Arc, Mutex, PoisonError, mpsc};
    use std::thread::{self, JoinHandle};
    use std::vec::Vec;
    use std::{fmt, io};

    use super::{Executor, Job};

    /// A fixed number of threads. Dropping it waits until every job is done.
    pub struct Threads {
        jobs: Option<mpsc::Sender<Job>>,
        threads: Vec<JoinHandle<()>>,
    }

    impl Threads {
        /// Starts `count` threads with this name.
        ///
        /// # Errors
        /// When the system has no room for a thread.
        pub fn new(name: &str, count: usize) -> io::Result<Self> {
            let (jobs, queue) = mpsc::channel::<Job>();
            let queue = Arc::new(Mutex::new(queue));
            let start = |_| {
                let queue = Arc::clone(&queue);
                let next = move || {
                    let queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
                    queue.recv().ok()
                };
                thread::Builder::new().name(name.into()).spawn(move || {
                    while let Some(job) = next() {
                        job();
                    }
                })
            };
            Ok(Self {
                threads: (0..count.max(1)).map(start).collect::<io::Result<_>>()?,
                jobs: Some(jobs),
            })
        }
    }

    impl Executor for Threads {
        fn run(&self, job: Job) {
            let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
            // Every thread has gone, which only a panicking job brings about.
            if let Some(Err(mpsc::SendError(job))) = sent {
                job();
            }
        }
    }

    impl Drop for Threads {
        fn drop(&mut self) {
            self.jobs = None;
            for thread in self.threads.drain(..) {
                // A job that panicked has said so.
                drop(thread.join());
            }
        }
    }

    impl fmt::Debug for Threads {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "Threads({})", self.threads.len())
        }
    }

    #[cfg(test)]
    mod tests {
        use std::boxed::Box;
        use std::sync::atomic::{AtomicU32, Ordering};
        use std::sync::{Arc, Barrier};

        use super::*;

        #[test]
        fn jobs_run_side_by_side_and_are_done_when_the_threads_go() {
            let threads = Threads::new("test", 2).unwrap();
            let (both, done) = (Arc::new(Barrier::new(2)), Arc::new(AtomicU32::new(0)));
            for _ in 0..2 {
                let (both, done) = (both.clone(), done.clone());
                threads.run(Box::new(move || {
                    both.wait();
                    done.fetch_add(1, Ordering::SeqCst);
                }));
            }
            drop(threads);
            assert_eq!(done.load(Ordering::SeqCst), 2);
        }
    }
}
