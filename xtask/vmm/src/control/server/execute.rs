//! Every command, carried out.

use std::sync::Arc;

use super::Answer;
use crate::control::{
    ChannelState, Class, Command, Counters, DeviceState, DiskAdd, Exits, Failure, FaultsCleared,
    NoArguments,
};
use crate::devices::OpenDisk;
use crate::runner::Runner;

/// Carries a command out. `answer` is given now, or when the guest has answered.
pub fn execute(runner: &Arc<Runner>, command: Command, answer: Answer) {
    match command {
        Command::Capabilities(NoArguments {}) => answer.done(Ok(())),
        Command::Continue(NoArguments {}) => {
            runner.resume();
            answer.done(Ok(()));
        }
        Command::Stop(NoArguments {}) => {
            runner.pause();
            answer.done(Ok(()));
        }
        Command::Quit(NoArguments {}) => {
            answer.done(Ok(()));
            runner.quit();
        }
        Command::QueryStatus(NoArguments {}) => answer.give(Ok(runner.status())),
        Command::QueryDevices(NoArguments {}) => answer.give(Ok(devices(runner))),
        Command::QueryCounters(some) => answer.give(counters(runner, some.device.as_deref())),
        Command::QueryExits(NoArguments {}) => answer.give(exits(runner)),
        Command::Shutdown(how) => {
            answer.done(runner.devices().shut_down(&how, runner.events()));
        }
        Command::Heartbeat(NoArguments {}) => {
            let now = runner.vm().map_or(0, |vm| vm.reference_time());
            answer.give(runner.devices().heartbeat(now));
        }
        Command::TimeSync(NoArguments {}) => runner.devices().sync_time(answer),
        Command::TimeStep(step) => runner.devices().step_time(step.milliseconds, answer),
        Command::KvpSet(set) => runner.devices().set_value(&set, answer),
        Command::KvpGet(key) => runner.devices().value(key, answer),
        Command::KvpList(pool) => runner.devices().values(pool, answer),
        Command::KvpDelete(key) => runner.devices().delete_value(&key, answer),
        Command::KvpIpGet(nic) => runner.devices().ip_information(&nic.nic, answer),
        Command::KvpIpSet(settings) => runner.devices().set_ip_information(&settings, answer),
        Command::DiskAdd(disk) => answer.done(add_disk(runner, &disk)),
        Command::DiskEject(disk) => answer.done(runner.devices().eject_disk(&disk)),
        Command::Link(link) => answer.done(runner.devices().set_link(&link.nic, link.up)),
        Command::Mtu(mtu) => answer.done(runner.devices().set_mtu(&mtu.nic, mtu.mtu)),
        Command::Balloon(target) => {
            let devices = runner.devices();
            let set = runner.with_host(|host| devices.set_balloon(host, target.target_mib));
            answer.done(set.unwrap_or_else(|| Err(no_vm())));
        }
        Command::QueryBalloon(NoArguments {}) => {
            let devices = runner.devices();
            answer.give(devices.balloon().map(|balloon| balloon.state()));
        }
        Command::HotAdd(more) => answer.done(hot_add(runner, more.mib)),
        Command::Rescind(name) => {
            let mut devices = runner.devices();
            let result = devices.find(&name.device).and_then(|device| {
                let done = runner.with_host(|host| device.rescind(host));
                done.ok_or_else(no_vm)?
            });
            answer.done(result);
        }
        Command::Offer(name) => {
            let mut devices = runner.devices();
            let result = devices.find(&name.device).and_then(|device| {
                let done = runner.with_host(|host| device.offer(host));
                done.ok_or_else(no_vm)?
            });
            answer.done(result);
        }
        Command::Fault(on) => {
            let mut devices = runner.devices();
            let result = devices.find(&on.device).and_then(|device| {
                let done = runner.with_host(|host| device.inject(host, &on));
                done.ok_or_else(no_vm)?
            });
            answer.done(result);
        }
        Command::FaultsClear(some) => answer.give(clear_faults(runner, some.device.as_deref())),
    }
}

fn no_vm() -> Failure {
    Failure::new(Class::DeviceNotActive, "the VM has ended")
}

fn devices(runner: &Runner) -> Vec<DeviceState> {
    let devices = runner.devices();
    let open = runner.channels();
    let state = |device: &crate::devices::Device| {
        let channels = open.iter().map(|(channel, _)| channel);
        let of_device = channels.filter(|channel| channel.device == device.name());
        let mut channels: Vec<_> = of_device
            .map(|channel| ChannelState {
                channel: channel.id.0,
                index: channel.index,
                vp: channel.vp,
                connection: channel.connection.0,
            })
            .collect();
        channels.sort_by_key(|channel| channel.index);
        DeviceState {
            name: device.name().to_owned(),
            kind: device.kind(),
            instance: device.instance().map(|instance| instance.to_string()),
            offered: runner
                .with_host(|host| device.is_offered(host))
                .unwrap_or(false),
            channels,
        }
    };
    devices.iter().map(state).collect()
}

/// The bus itself counts under this name.
const BUS: &str = "vmbus";

fn counters(runner: &Runner, wanted: Option<&str>) -> Result<Vec<Counters>, Failure> {
    let mut devices = runner.devices();
    if let Some(name) = wanted.filter(|name| *name != BUS) {
        devices.find(name)?;
    }
    let mut all = vec![Counters {
        device: BUS.to_owned(),
        counters: runner.bus_counts(),
    }];
    let open = runner.channels();
    for device in devices.iter() {
        let mut counters = device.counters();
        for (channel, counts) in open.iter().filter(|(one, _)| one.device == device.name()) {
            let index = channel.index;
            counters.insert(format!("channel-{index}-signals"), counts.signals);
            counters.insert(format!("channel-{index}-interrupts"), counts.interrupts);
        }
        all.push(Counters {
            device: device.name().to_owned(),
            counters,
        });
    }
    all.retain(|counters| wanted.is_none_or(|wanted| counters.device == wanted));
    Ok(all)
}

fn exits(runner: &Runner) -> Result<Exits, Failure> {
    let exits = runner.vm().ok_or_else(no_vm)?.exits();
    let total = exits.here.values().sum();
    let kernel = exits.kernel.into_iter();
    let kernel = kernel.map(|(name, count)| (format!("kvm {name}"), count));
    Ok(Exits {
        total,
        reasons: exits.here.into_iter().chain(kernel).collect(),
    })
}

/// The file is opened with no lock held: it may take a while.
fn add_disk(runner: &Runner, disk: &DiskAdd) -> Result<(), Failure> {
    let opened = OpenDisk::open(disk)?;
    runner
        .devices()
        .add_disk(&disk.controller, disk.lun, opened)
}

fn hot_add(runner: &Runner, mib: u32) -> Result<(), Failure> {
    let vm = runner.vm().ok_or_else(no_vm)?;
    let devices = runner.devices();
    let added = runner.with_host(|host| devices.hot_add(host, &*vm, mib));
    added.ok_or_else(no_vm)?
}

fn clear_faults(runner: &Runner, wanted: Option<&str>) -> Result<FaultsCleared, Failure> {
    let mut devices = runner.devices();
    if let Some(name) = wanted {
        devices.find(name)?;
    }
    let chosen = devices
        .iter()
        .filter(|device| wanted.is_none_or(|wanted| wanted == device.name()));
    let clear = |device: &crate::devices::Device| {
        runner
            .with_host(|host| device.clear_faults(host))
            .unwrap_or(0)
    };
    Ok(FaultsCleared {
        hits: chosen.map(clear).sum(),
    })
}
