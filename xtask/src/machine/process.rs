//! No process outlives xtask: how children are tied to it, and what Ctrl-C does.

use std::{
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::packages::exists;

/// Exit status of a program that an interrupt ended, as shells count it.
const INTERRUPTED: i32 = 130;

static WAS_INTERRUPTED: AtomicBool = AtomicBool::new(false);
static STREAMS: Mutex<Vec<UnixStream>> = Mutex::new(Vec::new());

/// Puts `setpriv` before a command, so that the kernel ends the process when
/// the thread that started it ends, even if that is by a kill.
pub fn tied_to_us(command: Vec<String>) -> Vec<String> {
    if !exists("setpriv") {
        return command; // Ctrl-C still reaches it: it is in our process group.
    }
    ["setpriv", "--pdeathsig", "KILL", "--"]
        .map(str::to_owned)
        .into_iter()
        .chain(command)
        .collect()
}

/// Closes this stream on Ctrl-C. Whoever waits for the machine behind it then
/// sees it gone, gives up, and on the way out ends what was started.
pub fn close_on_interrupt(stream: UnixStream) {
    streams(|list| list.push(stream));
}

/// Whether Ctrl-C was pressed.
pub fn was_interrupted() -> bool {
    WAS_INTERRUPTED.load(Ordering::SeqCst)
}

/// Takes over Ctrl-C and termination requests.
pub fn handle_interrupts() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        let again = WAS_INTERRUPTED.swap(true, Ordering::SeqCst);
        let open = streams(|list| {
            list.iter()
                .filter(|stream| stream.shutdown(Shutdown::Both).is_ok())
                .count()
        });
        // Nothing to unwind, or no patience left.
        if open == 0 || again {
            std::process::exit(INTERRUPTED);
        }
    })
}

fn streams<T>(change: impl FnOnce(&mut Vec<UnixStream>) -> T) -> T {
    change(&mut STREAMS.lock().unwrap_or_else(PoisonError::into_inner))
}
