//! Progress on the terminal: one line for a step that takes longer than two
//! seconds.
//!
//! On a terminal the line shows the step and its time while it runs and stays
//! when it has ended. Elsewhere (a pipe, CI) a plain line is printed when the
//! step has run for two seconds and another when it ends.

use std::{
    io::IsTerminal,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Steps shorter than this leave no line.
const QUIET: Duration = Duration::from_secs(2);

/// A step that is under way; ends when dropped.
#[derive(Debug)]
pub struct Step {
    stop: Option<mpsc::Sender<()>>,
    line: Option<thread::JoinHandle<()>>,
    detail: Arc<Mutex<String>>,
}

/// Begins a step. `what` reads like "fetching QEMU".
pub fn step(what: &str) -> Step {
    let (stop, stopped) = mpsc::channel();
    let detail = Arc::new(Mutex::new(String::new()));
    let what = what.to_owned();
    let shown = detail.clone();
    let line = thread::spawn(move || run(&what, &shown, &stopped));
    Step {
        stop: Some(stop),
        line: Some(line),
        detail,
    }
}

impl Step {
    /// Shows what the step is at, on a terminal only.
    pub fn detail(&self, text: &str) {
        text.clone_into(&mut self.detail.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(line) = self.line.take() {
            // It only prints; if that failed there is nothing to be done.
            drop(line.join());
        }
    }
}

fn run(what: &str, detail: &Mutex<String>, stopped: &mpsc::Receiver<()>) {
    let start = Instant::now();
    if stopped.recv_timeout(QUIET) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    if std::io::stderr().is_terminal() {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.set_elapsed(start.elapsed());
        while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
            let detail = detail.lock().unwrap_or_else(PoisonError::into_inner);
            bar.set_message(if detail.is_empty() {
                what.to_owned()
            } else {
                format!("{what}: {detail}")
            });
            bar.tick();
        }
        bar.finish_and_clear();
    } else {
        eprintln!("    {what} ...");
        // The other end never sends; this waits for the step's end.
        let _ = stopped.recv();
    }
    eprintln!("    {what}: {:.1} s", start.elapsed().as_secs_f64());
}
