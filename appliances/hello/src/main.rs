//! Shows the machine that it runs on, then stays up and answers the host.
//!
//! | word on the command line | meaning |
//! |---|---|
//! | `counters` | show what every channel has counted, with the table and with each status |
//! | `then=poweroff`, `then=reboot` | leave when the table is shown |
//! | `status=SECONDS` | show memory, clock and interrupts again each so many seconds |

#![no_std]
#![no_main]
#![forbid(unsafe_code)]

mod table;

use embassy_time::{Duration, Timer};
use enlit::{Device, Machine, println};

enlit::main!(main, requires = [Device::Balloon]);

async fn main(machine: Machine) {
    let counters = match machine.command_line().get("counters") {
        None => false,
        Some("") => true,
        Some(other) => {
            println!("hello: counters={other} is ignored, the word has no value");
            false
        }
    };
    table::show(&machine, counters);
    match machine.command_line().get("then") {
        Some("poweroff") => machine.power_off().await,
        Some("reboot") => machine.reboot().await,
        Some(other) => println!("hello: then={other} is ignored, expected poweroff or reboot"),
        None => {}
    }
    match machine
        .command_line()
        .parse::<u64>("status", "a number of seconds")
    {
        Ok(Some(seconds)) if seconds > 0 => loop {
            Timer::after(Duration::from_secs(seconds)).await;
            table::show_status(&machine, counters);
        },
        Ok(_) => {}
        Err(bad) => println!("hello: {bad}"),
    }
    // The host is served by the kernel: nothing is left to do here.
}
