//! The console: a serial port, and `log` on top of it.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

use self::serial::Serial;
use crate::command_line::{BadValue, CommandLine};
use crate::hyperv::clock;
use crate::sync::Lock;

mod serial;

static SERIAL: Lock<Option<Serial>> = Lock::new(None);

/// Set when the machine is going down: output does not wait for locks any more.
static DYING: AtomicBool = AtomicBool::new(false);

/// Finds the serial port. Without one, output goes nowhere.
pub(crate) fn init() {
    *SERIAL.lock() = Serial::find();
}

/// Sets the log level that the command line asks for, `info` by default.
pub(crate) fn init_log<'a>(command_line: &CommandLine<'a>) -> Result<(), BadValue<'a>> {
    static LOGGER: Logger = Logger;
    // Fails only if there is a logger already, which then is this one.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(LevelFilter::Info);
    let levels = "off, error, warn, info, debug or trace";
    if let Some(level) = command_line.parse("log", levels)? {
        log::set_max_level(level);
    }
    Ok(())
}

/// From now on a report is being made: output goes out whatever was interrupted.
pub(crate) fn prepare_for_report() {
    DYING.store(true, Ordering::Relaxed);
}

/// Prints text as it is. Use [`print!`](crate::print) and [`println!`](crate::println).
pub fn write(arguments: fmt::Arguments<'_>) {
    let guard = if DYING.load(Ordering::Relaxed) {
        SERIAL.try_lock()
    } else {
        Some(SERIAL.lock())
    };
    match guard {
        Some(mut serial) => {
            if let Some(serial) = serial.as_mut() {
                // The port's writer reports no errors.
                let _ = serial.write_fmt(arguments);
                serial.flush();
            }
        }
        // Whoever holds the port will not go on: begin with a new view of it.
        None => {
            let mut serial = Serial::assume();
            let _ = serial.write_fmt(arguments);
            serial.flush();
        }
    }
}

/// Prints to the console.
#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => { $crate::console::write(format_args!($($argument)*)) };
}

/// Prints a line to the console.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($argument:tt)*) => { $crate::console::write(format_args!("{}\n", format_args!($($argument)*))) };
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let microseconds = clock::now() / 10;
            let (seconds, rest) = (microseconds / 1_000_000, microseconds % 1_000_000);
            // Messages begin with their subject; the module is for those who look deeper.
            match record.module_path() {
                Some(module) if log::max_level() >= LevelFilter::Debug => write(format_args!(
                    "[{seconds:4}.{rest:06}] {:5} {module}: {}\n",
                    record.level(),
                    record.args()
                )),
                _ => write(format_args!(
                    "[{seconds:4}.{rest:06}] {:5} {}\n",
                    record.level(),
                    record.args()
                )),
            }
        }
    }

    fn flush(&self) {}
}
