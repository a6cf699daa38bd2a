//! The table: a line for each fact, its name on the left.

use core::fmt::Display;

use enlit::services::Utc;
use enlit::vmbus::ConnectionState;
use enlit::vmbus::drivers::ic::Phase;
use enlit::{Machine, println};

/// Shows everything; what channels have counted only on request.
pub(crate) fn show(machine: &Machine, counters: bool) {
    println!("enlit {}", env!("CARGO_PKG_VERSION"));
    show_partition(machine);
    show_bus(machine);
    show_memory(machine);
    show_balloon(machine);
    show_clock(machine);
    show_interrupts(machine);
    show_boot(machine);
    if counters {
        show_counters(machine);
    }
    println!("hello: ready");
}

/// Shows what changes while the machine runs.
pub(crate) fn show_status(machine: &Machine, counters: bool) {
    show_memory(machine);
    show_balloon(machine);
    show_clock(machine);
    show_interrupts(machine);
    if counters {
        show_counters(machine);
    }
}

fn row(name: &str, value: impl Display) {
    println!("  {name:<14} {value}");
}

fn show_partition(machine: &Machine) {
    let features = machine.hypervisor();
    row(
        "hypervisor",
        format_args!("{}, version {}", features.vendor, features.version),
    );
    let mut label = "used";
    let mut names = features
        .capabilities()
        .filter(|c| c.used)
        .map(|c| c.name)
        .peekable();
    while let Some(first) = names.next() {
        match names.next() {
            Some(second) => row(label, format_args!("{first:<26}{second}")),
            None => row(label, first),
        }
        label = "";
    }
    let mut label = "offered";
    let mut names = features
        .capabilities()
        .filter(|c| c.offered && !c.used)
        .map(|c| c.name)
        .peekable();
    while let Some(first) = names.next() {
        match names.next() {
            Some(second) => row(label, format_args!("{first:<26}{second} (not used)")),
            None => row(label, format_args!("{first} (not used)")),
        }
        label = "";
    }
    let vps = machine.processors();
    row(
        "processors",
        format_args!("{vps}, VP {} runs", machine.vp_index()),
    );
    if let Some(apic) = machine.apic() {
        row("APIC", apic);
    }
    row("clock", machine.clock_source());
    row(
        "timer",
        format_args!("synthetic timer 0, {}", machine.timer_mode()),
    );
}

fn show_bus(machine: &Machine) {
    let snapshot = machine.vmbus_snapshot();
    match &snapshot.connection {
        ConnectionState::Connected { version, .. } => {
            row("VMBus", format_args!("version {version}"));
        }
        other => row("VMBus", format_args!("{other:?}")),
    }
    for info in &snapshot.offers {
        let offer = &info.offer;
        let name = offer.interface_name().unwrap_or("unknown device");
        let driver = info.driver.as_deref().unwrap_or("no driver");
        row(
            "offer",
            format_args!("{:>4} {name}: {driver}", offer.channel),
        );
        row("", format_args!("     interface {}", offer.interface));
        row("", format_args!("     instance  {}", offer.instance));
    }
    if snapshot.offers.is_empty() {
        row("offer", "none");
    }
}

fn show_memory(machine: &Machine) {
    let memory = machine.memory();
    let kib = |bytes: u64| bytes / 1024;
    row(
        "memory",
        format_args!(
            "{} KiB: {} KiB used, {} KiB free, {} KiB ballooned",
            kib(memory.ram),
            kib(memory.used()),
            kib(memory.free),
            kib(memory.ballooned)
        ),
    );
    row(
        "heap",
        format_args!(
            "{} of {} KiB used",
            memory.heap_used.div_ceil(1024),
            kib(memory.heap_size)
        ),
    );
}

fn show_balloon(machine: &Machine) {
    let balloon = machine.balloon();
    match balloon.version {
        Some(version) => row(
            "balloon",
            format_args!(
                "protocol {version}: {} pages with the host, {} reports, {} requests cut, {} refused",
                balloon.ballooned_pages,
                balloon.reports_sent,
                balloon.partial_requests,
                balloon.refusals
            ),
        ),
        None => row("balloon", "no device"),
    }
}

fn show_clock(machine: &Machine) {
    let clock = machine.clock();
    let status = clock.status();
    match (clock.utc(), status) {
        (Some(utc), Some(status)) => row(
            "wall clock",
            format_args!(
                "{} UTC: {} samples, {} steps, {} refused",
                Utc(utc),
                status.clock.samples,
                status.clock.steps,
                status.clock.refused
            ),
        ),
        (None, Some(status)) => match status.component.phase {
            Phase::Closed => row("wall clock", "not set: no device"),
            Phase::NoCommonVersion => row("wall clock", "not set: no common version"),
            Phase::Negotiating | Phase::Ready { .. } => {
                row("wall clock", "not set: the host has not told the time yet");
            }
        },
        (_, None) => row("wall clock", "not started"),
    }
}

fn show_counters(machine: &Machine) {
    for channel in machine.vmbus_snapshot().channels {
        row(
            "channel",
            format_args!("{}: {}", channel.name, channel.state),
        );
        for (name, count) in channel.counters.iter() {
            row("", format_args!("{count:>12} {name}"));
        }
    }
}

fn show_interrupts(machine: &Machine) {
    let interrupts = machine.interrupts();
    row(
        "interrupts",
        format_args!(
            "{} handled, {} spurious",
            interrupts.handled, interrupts.spurious
        ),
    );
    if let Some(synic) = interrupts.synic {
        row(
            "SynIC",
            format_args!(
                "{} messages ({} EOM), {} events, {} empty",
                synic.messages, synic.ends_of_message, synic.events, synic.empty_interrupts
            ),
        );
    }
}

fn show_boot(machine: &Machine) {
    let mut first = None;
    for milestone in machine.milestones() {
        let start = *first.get_or_insert(milestone.at);
        let microseconds = milestone.at.saturating_sub(start) / 10;
        row(
            "boot",
            format_args!("{microseconds:>8} us  {}", milestone.name),
        );
    }
}
