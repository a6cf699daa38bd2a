//! `bench boot`: exits between the marks of a boot.

use std::{
    collections::BTreeMap, fs, ops::Range, path::PathBuf, process::ExitCode, time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use serde::Serialize;

use super::{
    meter::{MARK_PORT, Mark, Meter, position, printed},
    referee, svg,
    trace::{Exit, Kind, by_kind},
};
use crate::{
    cli::What,
    console, floor,
    guest::{self, Symboliser},
    image::Image,
    machine::{self, Boot, Clock, Machine, VmConfig},
    packages::{Packages, Problem},
    progress,
    workspace::Workspace,
};

/// Options of `bench boot`.
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    what: What,
    /// Boots of each guest
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Draw the boot as a timeline into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Count instructions: the emulated processor runs one each nanosecond
    #[arg(long)]
    icount: bool,
    /// Leave the Linux guest out
    #[arg(long)]
    no_linux: bool,
}

/// Longest boot of a guest, whatever the clock: ten times of what it takes.
const PATIENCE: Duration = Duration::from_secs(180);

/// How long an idle guest is watched, in the clock of this computer.
const IDLE: Duration = Duration::from_secs(20);

/// Everything measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What times are: `nanoseconds` or `instructions`.
    pub clock: &'static str,
    /// The guests, ours first.
    pub guests: Vec<Guest>,
    /// Sizes in bytes.
    pub sizes: Sizes,
    /// Our guest when it has nothing to do.
    pub idle: Idle,
    /// What our guest says about memory and milestones.
    pub said: Vec<String>,
}

/// Sizes of what is booted, in bytes.
#[derive(Debug, Serialize)]
pub struct Sizes {
    /// Stripped kernel ELF.
    pub kernel: u64,
    /// EFI application with the kernel in it.
    pub efi: u64,
    /// Raw disk image.
    pub disk: u64,
    /// Linux kernel and initial RAM file system, if it took part.
    pub linux: Option<u64>,
}

/// An idle guest.
#[derive(Debug, Serialize)]
pub struct Idle {
    /// Watched for this long, in seconds of the machine's clock.
    pub seconds: f64,
    /// Exits by cause; those of the host itself are left out.
    pub exits: BTreeMap<String, u64>,
}

/// One guest over all runs.
#[derive(Debug, Serialize)]
pub struct Guest {
    /// Its name.
    pub name: &'static str,
    /// Counted exits from entry to open balloon: least, median, most.
    pub spread: [u64; 3],
    /// The run with the median count, in its phases.
    pub phases: Vec<Phase>,
    /// Time from the VM's first instruction to its being ready.
    pub ready_after: u64,
}

impl Guest {
    /// Counted exits from the VM's start on.
    fn counted(&self) -> u64 {
        self.phases.iter().map(|phase| phase.counted).sum()
    }

    /// All exits from the VM's start on.
    fn all(&self) -> u64 {
        self.phases
            .iter()
            .flat_map(|phase| phase.kinds.values())
            .sum()
    }
}

/// Exits between two points of a boot.
#[derive(Debug, Serialize)]
pub struct Phase {
    /// From where to where.
    pub name: &'static str,
    /// Sums by kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Sum of the kinds that count.
    pub counted: u64,
    /// Each counted exit explained: function, cause, how many.
    pub explained: Vec<Explained>,
    /// Time of each counted exit after the VM's first.
    #[serde(skip)]
    pub ticks: Vec<(u64, Kind)>,
    /// Length in the clock of the report.
    pub length: u64,
}

/// Exits that a function makes for one cause.
#[derive(Debug, Serialize)]
pub struct Explained {
    /// Function of the guest.
    pub function: String,
    /// Cause.
    pub cause: String,
    /// How many.
    pub count: u64,
}

/// One boot's exits and the points that part it.
struct Run {
    exits: Vec<Exit>,
    /// Index of the first exit of each phase, and the end.
    cuts: Vec<usize>,
}

impl Run {
    /// Counted exits after the firmware's.
    fn counted(&self) -> u64 {
        let own = self.cuts.get(1).copied().unwrap_or(0);
        let end = self.cuts.last().copied().unwrap_or(0);
        counted(self.exits.get(own..end).unwrap_or_default())
    }
}

fn counted(exits: &[Exit]) -> u64 {
    exits
        .iter()
        .filter(|exit| exit.cause.kind().is_counted())
        .count() as u64
}

/// Runs it.
pub fn run(options: &Options) -> Result<ExitCode> {
    let workspace = Workspace::find()?;
    let mut packages = Packages::new(&workspace.store())?;
    let image = Image::build(
        &workspace,
        &options.what.package,
        options.what.profile(),
        None,
    )?;
    let clock = if options.icount {
        Clock::Instructions
    } else {
        Clock::Wall
    };
    let kind = machine::Kind::Nested;
    eprintln!("machine: {kind} (its KVM's trace is ours to read)");
    let machine = Machine::start(&workspace, &mut packages, kind, clock)?;
    let meter = Meter::new(&machine)?;
    let symboliser = Symboliser::open(&image.guest.symbols)?;

    let kernel = image.guest.read()?;
    machine.put("guest.elf", &kernel)?;
    let mut config = VmConfig::new(Boot::Kernel {
        file: "guest.elf".into(),
        initrd: None,
    });
    config.cmdline = vec![format!("mark={MARK_PORT:#x}")];
    let mut said = Vec::new();
    let mut idle = None;
    let mut runs = Vec::new();
    for number in 1..=options.runs {
        let _step = progress::step(&format!("boot {number} of {}", options.what.package));
        let mut vm = meter.start(&config)?;
        vm.expect(console::READY, PATIENCE)?;
        runs.push(own_run(meter.exits()?)?);
        if number == options.runs {
            said = vm.console().lines().map(str::to_owned).collect();
            idle = Some(watch_idle(&meter, &mut vm)?);
        }
    }
    let mut guests = vec![summary(
        "enlit",
        &[
            "firmware",
            "kernel entry to open balloon",
            "open balloon to main",
        ],
        runs,
        |exit| symboliser.function_of_instruction(exit.rip),
    )];

    let mut linux_size = None;
    if !options.no_linux {
        let step = progress::step("preparing Linux as a guest");
        let agent = guest::build_agent(&workspace)?;
        let (config, size) = referee::prepare(&machine, &packages.linux()?, &agent)?;
        linux_size = Some(size);
        drop(step);
        let mut runs = Vec::new();
        for number in 1..=options.runs {
            let _step = progress::step(&format!("boot {number} of Linux"));
            let mut vm = meter.start(&config)?;
            vm.expect(referee::READY, PATIENCE)?;
            runs.push(linux_run(meter.exits()?)?);
        }
        guests.push(summary(
            "linux",
            &["firmware", "kernel entry to open balloon"],
            runs,
            |_| "Linux".into(),
        ));
    }

    machine.put("floor.elf", &floor::elf())?;
    let mut runs = Vec::new();
    for _ in 0..options.runs {
        let mut vm = meter.start(&VmConfig::new(Boot::Kernel {
            file: "floor.elf".into(),
            initrd: None,
        }))?;
        vm.wait(PATIENCE)?;
        let exits = meter.exits()?;
        let cuts = vec![0, exits.len()];
        runs.push(Run { exits, cuts });
    }
    guests.push(summary("floor", &["firmware"], runs, |_| "firmware".into()));

    let report = Report {
        clock: match clock {
            Clock::Wall => "nanoseconds",
            Clock::Instructions => "instructions",
        },
        guests,
        sizes: Sizes {
            kernel: kernel.len() as u64,
            efi: image.efi.len() as u64,
            disk: image.disk.len() as u64,
            linux: linux_size,
        },
        idle: idle.ok_or_else(|| anyhow!("no run was made"))?,
        said,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    if let Some(path) = &options.svg {
        fs::write(path, svg::timeline(&report)).map_err(Problem::file(path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Parts our guest's boot at its marks.
fn own_run(exits: Vec<Exit>) -> Result<Run> {
    let at = |mark: Mark| {
        position(&exits, mark).ok_or_else(|| anyhow!("the guest made no mark {mark:?}"))
    };
    // The marks' own exits are the instrument's, not the guest's.
    let (entry, main, open) = (at(Mark::Entry)?, at(Mark::Main)?, at(Mark::BalloonOpen)?);
    ensure!(
        entry < open && open < main,
        "the guest's marks are out of order"
    );
    let marks = [entry, open, main];
    // Before the first mark there is none, before the second one, and so on.
    let cuts = vec![0, entry, open - 1, main - 2];
    let exits = exits
        .into_iter()
        .enumerate()
        .filter(|(index, _)| !marks.contains(index))
        .map(|(_, exit)| exit)
        .collect();
    Ok(Run { exits, cuts })
}

/// Parts Linux's boot: its first instruction is the first above the firmware.
fn linux_run(exits: Vec<Exit>) -> Result<Run> {
    /// Where the kernel starts, by physical address. Firmware and option ROMs are
    /// below, and what the firmware moves up is at the end of memory.
    const LOADED_AT: Range<u64> = 0x100_0000..0x400_0000;
    /// Where it runs.
    const KERNEL_HALF: u64 = 0xffff_8000_0000_0000;
    let entry = exits
        .iter()
        .position(|exit| LOADED_AT.contains(&exit.rip) || exit.rip >= KERNEL_HALF)
        .context("Linux has not started")?;
    let open = printed(&exits, referee::FIRST_WORD).context("Linux has printed nothing")?;
    let mut exits = exits;
    exits.truncate(open);
    let cuts = vec![0, entry, exits.len()];
    Ok(Run { exits, cuts })
}

fn summary(
    name: &'static str,
    phases: &[&'static str],
    mut runs: Vec<Run>,
    function: impl Fn(&Exit) -> String,
) -> Guest {
    runs.sort_by_key(Run::counted);
    let spread = [
        runs.first().map_or(0, Run::counted),
        runs.get(runs.len() / 2).map_or(0, Run::counted),
        runs.last().map_or(0, Run::counted),
    ];
    let middle = runs.len() / 2;
    let run = runs.swap_remove(middle);
    let start = run.exits.first().map_or(0, |exit| exit.at);
    let time = |index: usize| {
        run.exits
            .get(index)
            .or(run.exits.last())
            .map_or(0, |exit| exit.at)
    };
    let phases = phases
        .iter()
        .zip(run.cuts.windows(2))
        .map(|(name, cut)| {
            let exits = run.exits.get(cut[0]..cut[1]).unwrap_or_default();
            Phase {
                name,
                kinds: by_kind(exits)
                    .into_iter()
                    .map(|(kind, count)| (kind.name(), count))
                    .collect(),
                counted: counted(exits),
                explained: explain(exits, &function),
                ticks: exits
                    .iter()
                    .map(|exit| (exit.at - start, exit.cause.kind()))
                    .collect(),
                length: time(cut[1]) - time(cut[0]),
            }
        })
        .collect();
    let end = run.cuts.last().copied().unwrap_or(0);
    Guest {
        name,
        spread,
        phases,
        ready_after: time(end) - start,
    }
}

/// Groups counted exits by function and cause, in the order of their first
/// appearance.
fn explain(exits: &[Exit], function: impl Fn(&Exit) -> String) -> Vec<Explained> {
    let mut groups: Vec<Explained> = Vec::new();
    for exit in exits.iter().filter(|exit| exit.cause.kind().is_counted()) {
        let (function, cause) = (function(exit), exit.cause.to_string());
        let known = groups
            .iter_mut()
            .find(|group| group.function == function && group.cause == cause);
        match known {
            Some(group) => group.count += 1,
            None => groups.push(Explained {
                function,
                cause,
                count: 1,
            }),
        }
    }
    groups
}

fn watch_idle(meter: &Meter, vm: &mut machine::Vm) -> Result<Idle> {
    let _step = progress::step("watching the idle guest");
    // Whatever the guest still says about its start is not idleness.
    while !vm
        .console_piece(Duration::from_secs(1))?
        .unwrap_or_default()
        .is_empty()
    {}
    meter.clear()?;
    let start = meter.uptime()?;
    meter.idle(vm, IDLE)?;
    let exits = meter.exits()?;
    let seconds = meter.uptime()? - start;
    let mut sums = BTreeMap::new();
    for exit in exits
        .iter()
        .filter(|exit| exit.cause.kind() != Kind::HostInterrupt)
    {
        *sums.entry(exit.cause.to_string()).or_default() += 1;
    }
    Ok(Idle {
        seconds,
        exits: sums,
    })
}

fn print(report: &Report) {
    println!("VM exits (median of the runs; least and most in brackets)");
    println!();
    for guest in &report.guests {
        println!(
            "{}: {} counted from kernel entry on [{} to {}], ready after {:.3} x 10^9 {}",
            guest.name,
            guest.spread[1],
            guest.spread[0],
            guest.spread[2],
            guest.ready_after as f64 / 1e9,
            report.clock,
        );
    }
    if let Some(floor) = report.guests.last() {
        println!();
        println!("from VM start to ready, less the floor:");
        for guest in report
            .guests
            .iter()
            .filter(|guest| guest.name != floor.name)
        {
            println!(
                "  {:<8} {:>8} exits, {:>8} with console and host interrupts, {:.3} x 10^9 {}",
                guest.name,
                guest.counted().saturating_sub(floor.counted()),
                guest.all().saturating_sub(floor.all()),
                guest.ready_after.saturating_sub(floor.ready_after) as f64 / 1e9,
                report.clock,
            );
        }
    }
    for guest in &report.guests {
        println!();
        print!("{:<22}", guest.name);
        for phase in &guest.phases {
            print!("{:>30}", phase.name);
        }
        println!();
        for kind in Kind::ALL {
            let counts: Vec<_> = guest
                .phases
                .iter()
                .map(|phase| phase.kinds.get(kind.name()).copied().unwrap_or(0))
                .collect();
            if counts.iter().all(|count| *count == 0) {
                continue;
            }
            let note = if kind.is_counted() { "" } else { " (apart)" };
            print!("  {:<20}", format!("{}{note}", kind.name()));
            for count in counts {
                print!("{count:>30}");
            }
            println!();
        }
        print!("  {:<20}", "counted");
        for phase in &guest.phases {
            print!("{:>30}", phase.counted);
        }
        println!();
    }
    if let Some(own) = report.guests.first() {
        for phase in own.phases.iter().skip(1) {
            if phase.explained.is_empty() {
                continue;
            }
            println!();
            println!("{}, every counted exit:", phase.name);
            for group in &phase.explained {
                println!(
                    "  {:>5}  {:<44} {}",
                    group.count, group.cause, group.function
                );
            }
        }
    }
    println!();
    println!(
        "idle for {:.0} s: {}",
        report.idle.seconds,
        if report.idle.exits.is_empty() {
            "no exit".to_owned()
        } else {
            report
                .idle
                .exits
                .iter()
                .map(|(cause, count)| {
                    format!("{cause} {:.2}/s", *count as f64 / report.idle.seconds)
                })
                .collect::<Vec<_>>()
                .join(", ")
        }
    );
    println!();
    let sizes = &report.sizes;
    println!(
        "kernel ELF {} bytes, EFI file {} bytes, disk image {} bytes",
        sizes.kernel, sizes.efi, sizes.disk
    );
    if let Some(linux) = sizes.linux {
        println!("Linux kernel and initial RAM file system {linux} bytes");
    }
    println!();
    println!("the guest's own account:");
    for line in &report.said {
        println!("  {line}");
    }
}
