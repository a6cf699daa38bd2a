//! `bench host`: Linux on our test machine, with VMBus, beside the same Linux on QEMU, with virtio.

mod exits;
mod report;
mod sides;
mod workload;

use std::{fs, process::ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use self::{
    exits::{Counter, Exits},
    report::{Report, Rounds, Row},
    sides::{CONTENTS, CPUS, DISK_MIB, Host, INITRD, KERNEL, MEMORY_MIB, Side},
    workload::{ALL, Amount, Workload},
};
use crate::{
    guest,
    machine::{Clock, Kind, Machine},
    packages::Packages,
    progress,
    referee::{Image, shell},
    workspace::Workspace,
};

/// Options of `bench host`.
#[derive(Debug, Args)]
pub struct Options {
    /// Rounds; in each, every workload runs on both
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Milliseconds of each workload of the disk, by the machine's clock
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(10..=60_000))]
    span: u32,
    /// Only workloads whose names hold this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Take the computer's own clock; without it the emulated processor runs one instruction each nanosecond
    #[arg(long)]
    wall: bool,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// How often what starting a workload costs is counted; the median of them is taken.
const STARTS: usize = 3;

/// Lets a thread that wakes up go before one that computes, as any Linux does. The nested machine has it off for
/// the sake of a device that has no part in this.
const SCHEDULER: (&str, &str) = ("/sys/kernel/debug/sched/features", "WAKEUP_PREEMPTION");

/// Runs it.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workloads: Vec<_> = ALL
        .into_iter()
        .filter(|workload| workload.name().contains(&options.filter))
        .collect();
    anyhow::ensure!(
        !workloads.is_empty(),
        "no workload's name holds {:?}",
        options.filter
    );
    let workspace = Workspace::find()?;
    let mut packages = Packages::new(&workspace.store())?;
    let tools = packages.tools()?;
    let image = Image::prepare(
        &workspace.store(),
        &packages.linux()?,
        &CONTENTS,
        &tools,
        &guest::build_agent(&workspace)?,
    )?;
    guest::build_vmm(&workspace)?;
    eprintln!(
        "machine: {} (its KVM's trace is ours to read)",
        Kind::Nested
    );
    let clock = if options.wall {
        Clock::Wall
    } else {
        Clock::Instructions
    };
    let machine = Machine::start(&workspace, &mut packages, Kind::Nested, clock)?;
    machine.write(SCHEDULER.0, SCHEDULER.1)?;
    shell::install(&machine, &tools)?;
    for (name, file) in [(KERNEL, &image.kernel), (INITRD, &image.initrd)] {
        let content = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        machine.put(name, &content)?;
    }
    sides::prepare(&machine)?;
    let mut counter = Counter::new(&machine)?;
    let mut start = |host, name| {
        let _step = progress::step(&format!("booting Linux on {name}"));
        Side::start(host, &machine, &mut counter).with_context(|| format!("Linux on {name}"))
    };
    let mut enlit = start(Host::Enlit, "enlit-vmm")?;
    let mut qemu = start(Host::Qemu, "QEMU")?;

    let before = enlit.own_exits()?;
    let mut rounds = Vec::new();
    let mut known: Vec<(Workload, [Exits; 2])> = Vec::new();
    for &workload in &workloads {
        let first = workload.first_alike();
        let starts = match known.iter().find(|(known, _)| *known == first) {
            Some((_, starts)) => starts.clone(),
            None => {
                let _step = progress::step(&format!("starting nothing but {}", first.name()));
                let starts = [&mut enlit, &mut qemu].map(|side| start_of(side, first, &counter));
                let [ours, theirs] = starts;
                let starts = [ours?, theirs?];
                known.push((first, starts.clone()));
                starts
            }
        };
        rounds.push(starts.map(Rounds::new));
    }
    for number in 1..=options.runs {
        for (&workload, [ours, theirs]) in workloads.iter().zip(&mut rounds) {
            let _step = progress::step(&format!(
                "round {number} of {}: {}",
                options.runs,
                workload.name()
            ));
            let amount = Amount::Full {
                milliseconds: options.span,
            };
            ours.runs.push(enlit.run(workload, amount, &counter)?);
            theirs.runs.push(qemu.run(workload, amount, &counter)?);
        }
    }
    let mut own_exits = enlit.own_exits()?;
    for (name, count) in &mut own_exits {
        *count -= before.get(name).copied().unwrap_or(0);
    }
    own_exits.retain(|_, count| *count != 0);
    let report = Report {
        conditions: conditions(&enlit.release()?, options),
        rows: rows(&workloads, &rounds),
        own_exits,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", report.text());
    }
    Ok(ExitCode::SUCCESS)
}

/// What starting a workload costs by itself.
fn start_of(side: &mut Side, workload: Workload, counter: &Counter) -> Result<Exits> {
    let mut counts = (0..STARTS)
        .map(|_| Ok(side.run(workload, Amount::Least, counter)?.exits))
        .collect::<Result<Vec<_>>>()?;
    counts.sort_by_key(Exits::counted);
    Ok(counts.swap_remove(STARTS / 2))
}

fn rows(workloads: &[Workload], rounds: &[[Rounds; 2]]) -> Vec<Row> {
    workloads
        .iter()
        .zip(rounds)
        .map(|(&workload, [ours, theirs])| Row::new(workload, ours, theirs))
        .collect()
}

/// What was compared with what, and how.
fn conditions(release: &str, options: &Options) -> Vec<String> {
    vec![
        format!(
            "Linux {release} with {CPUS} VP and {MEMORY_MIB} MiB, on two monitors in the same nested machine:"
        ),
        "  enlit-vmm    hv_storvsc and hv_netvsc by VMBus, Hyper-V's enlightenments".into(),
        "  QEMU         virtio-blk (with an I/O thread) and virtio-net by PCI, KVM's enlightenments".into(),
        format!(
            "disk: a raw file of {DISK_MIB} MiB in the machine's memory, written through its page cache; O_DIRECT, a thread for each request under way"
        ),
        "network: TAP to the machine's TCP stack, MTU 1500, offloads on, no vhost; a file by HTTP".into(),
        format!(
            "{} rounds in turns, the disk's of {} ms; medians. Exits by KVM's trace, less those of starting the workload.",
            options.runs, options.span
        ),
        if options.wall {
            "Times are by the computer's clock, and whatever else it does is in them.".into()
        } else {
            "Times are by counted instructions of guest and machine together, one a nanosecond.".into()
        },
    ]
}
