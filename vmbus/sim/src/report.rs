//! A whole run: rounds until all steps are done, and what is said when something is wrong.

use std::cell::RefCell;
use std::fmt;
use std::panic;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::Duration;

use crate::decisions::{Dice, Trace};
use crate::world::World;

/// A run in which one step takes so long hangs.
const PATIENCE: Duration = Duration::from_secs(10);

thread_local! {
    static CURRENT: RefCell<Option<Arc<Mutex<Trace>>>> = const { RefCell::new(None) };
}

/// How a run ended in which nothing was wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Outcome {
    /// What decided everything.
    pub seed: u64,
    /// Decisions taken.
    pub steps: u64,
    /// Machines that were used up.
    pub rounds: u64,
    /// A hash of everything that happened: the same for every run of a seed and a number of steps.
    pub trace: u64,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} steps in {} rounds, trace {:016x}",
            self.seed, self.steps, self.rounds, self.trace
        )
    }
}

/// Runs `steps` steps of `seed`, and prints every action if `print`.
///
/// # Panics
///
/// When anything is wrong; then the seed, the step, the last actions and how to replay them are on standard error.
pub fn run(seed: u64, steps: u64, print: bool) -> Outcome {
    install_hook();
    let trace = Arc::new(Mutex::new(Trace::new(seed, steps, print)));
    CURRENT.with(|current| *current.borrow_mut() = Some(trace.clone()));
    let (done, watched) = channel::<()>();
    let watcher = thread::spawn({
        let trace = trace.clone();
        move || watch(&trace, &watched)
    });

    let mut dice = Dice::new(seed);
    while steps_of(&trace) < steps {
        if let Ok(mut trace) = trace.lock() {
            trace.round += 1;
        }
        dice = World::play(dice, &trace);
    }

    drop(done);
    // It ends by itself, and has nothing to say.
    let _ = watcher.join();
    CURRENT.with(|current| *current.borrow_mut() = None);
    let trace = trace
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    Outcome {
        seed,
        steps: trace.steps,
        rounds: trace.round,
        trace: trace.hash(),
    }
}

fn steps_of(trace: &Mutex<Trace>) -> u64 {
    trace.lock().map_or(u64::MAX, |trace| trace.steps)
}

/// Ends the process when a run makes no progress: a deadlock is a failure like any other.
fn watch(trace: &Mutex<Trace>, done: &std::sync::mpsc::Receiver<()>) {
    let mut seen = None;
    loop {
        match done.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
        let Ok(trace) = trace.lock() else { return };
        let now = (trace.round, trace.hash());
        if seen == Some(now) {
            eprintln!("nothing has happened for {PATIENCE:?}: the guest hangs\n{trace}");
            std::process::exit(1);
        }
        seen = Some(now);
    }
}

/// Has every panic in a run tell how to replay it.
fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            before(info);
            CURRENT.with(|current| {
                let Ok(mut current) = current.try_borrow_mut() else {
                    return;
                };
                let Some(trace) = current.take() else {
                    return;
                };
                match trace.try_lock() {
                    Ok(trace) => eprintln!("{trace}"),
                    Err(_) => eprintln!("the trace is in use"),
                }
            });
        }));
    });
}

/// A seed that nobody has chosen.
pub fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // Few digits, so that it is easily passed on.
    RandomState::new().hash_one(0) % 1_000_000_000
}
