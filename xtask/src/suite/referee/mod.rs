//! Linux judges our host: Debian's kernel boots on the test machine, and its own Hyper-V drivers
//! and tools say whether a device is what it should be.
//!
//! A boot is the dear part, so the tests of a group share one, in their order. After a test that
//! ends the guest, or leaves it without an answer, those behind it get a new one. The nested
//! machine has one processor, so there each group has a machine of its own, and they run side by
//! side.

mod config;
mod drivers;
mod faults;
mod files;
mod iso;
mod log;
mod network;
mod services;
mod session;
mod sockets;
mod storage;
mod tap;
mod user_network;

use std::{
    fs,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use vmm::config::Config;

pub use self::session::Session;
use super::{Count, side_by_side};
use crate::{
    cli::Wish,
    guest,
    machine::{self, Choice, Clock, Ending, Kind, Machine, Purpose},
    packages::{DiskTools, Packages},
    progress,
    referee::{CMDLINE, Contents, Guest, Image, shell},
    workspace::Workspace,
};
use files::Files;

/// Tests that share a boot of Linux.
pub struct Group {
    /// The VM that Linux boots in; kernel and command line are put in later.
    config: fn(&Files) -> Result<Config>,
    /// Tests, in their order.
    tests: &'static [&'static [Test]],
}

/// A test of a device by Linux.
pub struct Test {
    /// Its name, `referee/area/what`.
    pub name: &'static str,
    /// Runs it; says what was checked.
    pub run: fn(&mut Session) -> Result<String>,
}

const GROUPS: &[Group] = &[
    Group {
        config: config::disks,
        tests: &[
            storage::TESTS,
            &[log::OF_DISKS, storage::SOUND],
            faults::DISKS,
        ],
    },
    Group {
        config: config::everything_else,
        tests: &[
            drivers::TESTS,
            network::TESTS,
            user_network::TESTS,
            tap::TESTS,
            services::TESTS,
            sockets::TESTS,
            &[log::OF_EVERYTHING_ELSE],
            faults::NETWORK,
        ],
    },
];

/// Names of the guest's files on the machine.
const KERNEL: &str = "linux.elf";
const INITRD: &str = "linux.initrd";

/// The names of all tests.
pub fn names() -> impl Iterator<Item = &'static str> {
    GROUPS
        .iter()
        .flat_map(|group| group.tests)
        .flat_map(|tests| *tests)
        .map(|test| test.name)
}

/// Runs the tests whose names hold `wanted`.
pub fn run(
    wanted: &str,
    machine: Wish,
    workspace: &Workspace,
    packages: &mut Packages,
    count: &mut Count,
) -> Result<()> {
    let Choice { kind, reason } = machine::choose(machine.into());
    println!("machine: our own, on {kind} ({reason})");
    let programs = packages.tools()?;
    let image = Image::prepare(
        &workspace.store(),
        &packages.linux()?,
        &Contents::JUDGE,
        &programs,
        &guest::build_agent(workspace)?,
    )?;
    let chosen = |group: &'static Group| -> Vec<&'static Test> {
        let tests = group.tests.iter().flat_map(|tests| *tests);
        tests
            .filter(|test| test.name.contains(wanted))
            .filter(|test| kind == Kind::Nested || test.name != tap::NAME)
            .collect()
    };
    let tools = packages.disk_tools()?;
    let passt = packages.passt()?;
    let groups = GROUPS.iter().map(|group| (group, chosen(group)));
    let groups: Vec<_> = groups.filter(|(_, tests)| !tests.is_empty()).collect();
    let start = |packages: &mut Packages| -> Result<Machine> {
        let machine =
            Machine::start_for(Purpose::TestMachine, workspace, packages, kind, Clock::Wall)?;
        for (name, file) in [(KERNEL, &image.kernel), (INITRD, &image.initrd)] {
            let content =
                fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            machine.put(name, &content)?;
        }
        if kind == Kind::Nested {
            shell::install(&machine, &programs)?;
        }
        Ok(machine)
    };
    if kind != Kind::Nested {
        let machine = &start(packages)?;
        let (tools, passt) = (&tools, passt.as_path());
        let on = On {
            machine,
            tools,
            passt,
        };
        let count = Mutex::new(count);
        return groups
            .iter()
            .try_for_each(|(group, tests)| run_group(group, tests, on, &count));
    }
    // Everything is fetched and built once, not by each.
    packages.qemu()?;
    guest::build_vmm(workspace)?;
    let count = Mutex::new(count);
    let (tools, passt, count) = (&tools, passt.as_path(), &count);
    side_by_side(&groups, |(group, tests)| {
        let machine = &start(&mut Packages::new(&workspace.store())?)?;
        let on = On {
            machine,
            tools,
            passt,
        };
        run_group(group, tests, on, count)
    })
}

/// What a group runs on, and with.
#[derive(Clone, Copy)]
pub struct On<'a> {
    machine: &'a Machine,
    /// What looks at its disks afterwards.
    tools: &'a DiskTools,
    /// The program.
    passt: &'a Path,
}

/// What all groups count in.
type Total<'a> = Mutex<&'a mut Count>;

fn add(count: &Total, what: impl FnOnce(&mut Count)) {
    what(&mut count.lock().unwrap_or_else(PoisonError::into_inner));
}

fn run_group(group: &Group, tests: &[&Test], on: On, count: &Total) -> Result<()> {
    let mut tests = tests.iter();
    let mut session: Option<Session> = None;
    while let Some(test) = tests.next() {
        let mut here = match session.take() {
            Some(session) => session,
            None => match boot(group, on, count) {
                Ok(session) => session,
                Err(error) => {
                    // Nothing that needs it can be said of the rest.
                    for test in [test].into_iter().chain(tests.by_ref()) {
                        println!("FAIL  {}: {error:#}", test.name);
                        add(count, |count| count.failed += 1);
                    }
                    return Ok(());
                }
            },
        };
        let mut start = Instant::now();
        let mut result = attempt(test, &mut here);
        let nested = on.machine.kind() == Kind::Nested;
        if let Err(error) = &result
            && let Some(evidence) = nested.then(|| here.stall()).flatten()
        {
            println!(
                "AGAIN {}: {error:#}\n      Linux missed a timer, likely a fault of the emulator, which may lose a timer interrupt of the small Linux: {evidence}",
                test.name
            );
            start = Instant::now();
            result = boot(group, on, count).and_then(|new| {
                here = new;
                attempt(test, &mut here)
            });
            if result.is_ok() {
                add(count, |count| count.repeated += 1);
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        match result {
            Ok(checked) => {
                println!("ok    {} ({seconds:.1} s): {checked}", test.name);
                add(count, |count| count.passed += 1);
            }
            Err(error) => {
                let report = here.report();
                println!("FAIL  {} ({seconds:.1} s): {error:#}\n{report}", test.name);
                add(count, |count| count.failed += 1);
            }
        }
        session = here.answers().then_some(here);
    }
    Ok(())
}

fn attempt(test: &Test, session: &mut Session) -> Result<String> {
    let _step = progress::step(test.name);
    (test.run)(session)
}

/// Boots Linux. It fails to come up about once in sixty times on the nested machine, which is
/// the emulator's fault; so it is tried once more, and that is said.
fn boot<'a>(group: &Group, on: On<'a>, count: &Total) -> Result<Session<'a>> {
    match boot_once(group, on)? {
        (Err(error), _) if on.machine.kind() == Kind::Nested => {
            println!("AGAIN Linux does not come up: {error:#}");
            let (guest, files) = boot_once(group, on)?;
            add(count, |count| count.repeated += 1);
            Ok(Session::new(guest?, files))
        }
        (guest, files) => Ok(Session::new(guest?, files)),
    }
}

/// Starts the VM and waits for Linux.
fn boot_once<'a>(group: &Group, on: On<'a>) -> Result<(Result<Guest>, Files<'a>)> {
    let start = Instant::now();
    let files = Files::new(on)?;
    let mut config = (group.config)(&files)?;
    config.kernel = KERNEL.into();
    config.initrd = Some(INITRD.into());
    config.cmdline = CMDLINE.to_owned();
    let vm = on.machine.run_vmm(&config)?;
    let guest = {
        let _step = progress::step("booting Linux");
        Guest::come_up(vm)
    };
    println!(
        "      Linux, {:.1} s: {}",
        start.elapsed().as_secs_f64(),
        if guest.is_ok() { "up" } else { "not up" }
    );
    Ok((guest, files))
}

/// The guest has ended, and in this way.
fn ended(found: Ending, wanted: Ending) -> Result<()> {
    ensure!(found == wanted, "expected that {wanted}, but {found}");
    Ok(())
}
