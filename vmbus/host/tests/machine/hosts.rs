//! The whole way, connect to unload, on each kind of host.

use vmbus::ConnectionState;
use vmbus::drivers::balloon::Balloon;
use vmbus::protocol::Version;
use vmbus_host::bus::Profile;

use crate::balloon::{MIB, Ram, offer};
use crate::support::{SECOND, Vm};

fn whole_way(profile: Profile) {
    let name = profile.name;
    let vm = Vm::new(profile);
    let (id, provider) = offer(&vm, 512 * MIB);
    let ram = Ram::new(512 * MIB);
    let balloon = Balloon::new(vm.vmbus.client(), ram.clone()).unwrap();
    vm.connect();
    let run = |time| crate::balloon::run(&vm, &balloon, time);
    run(60 * SECOND);
    assert!(balloon.status().reports_sent >= 60, "{name}");

    provider.lock().set_target(256 * MIB);
    vm.machine.wake_provider(id);
    run(SECOND);
    assert_eq!(provider.lock().actual(), 256 * MIB, "{name}");
    assert_eq!(balloon.status().ballooned_pages, 256 * MIB, "{name}");

    provider.lock().set_target(512 * MIB);
    vm.machine.wake_provider(id);
    run(SECOND);
    assert_eq!(provider.lock().actual(), 512 * MIB, "{name}");
    assert_eq!(balloon.status().ballooned_pages, 0, "{name}");
    assert_eq!(provider.lock().complaints(), [] as [&str; 0], "{name}");

    // The device goes and comes; the driver's channel has ended then.
    vm.machine.rescind(id);
    vm.machine.settle();
    assert!(!vm.machine.is_open(id), "{name}");
    let (_, _again) = offer(&vm, 512 * MIB);
    let second = Balloon::new(vm.vmbus.client(), ram).unwrap();
    vm.machine.settle();
    assert!(second.status().version.is_some(), "{name}");

    vm.vmbus.begin_unload();
    vm.machine.settle();
    assert_eq!(
        vm.vmbus.connection(),
        ConnectionState::Unloaded { acknowledged: true },
        "{name}"
    );
    assert_eq!(vm.machine.shared_runs(), 0, "{name}");
    vm.assert_well_behaved();
}

#[test]
fn qemu() {
    whole_way(Profile::qemu());
}

#[test]
fn openvmm() {
    whole_way(Profile::openvmm());
}

#[test]
fn hyper_v() {
    whole_way(Profile::hyper_v());
}

#[test]
fn hyper_v_of_each_release() {
    for version in [
        Version::V2_4,
        Version::V3_0,
        Version::V4_0,
        Version::V4_1,
        Version::V5_0,
        Version::V5_3,
    ] {
        whole_way(Profile::hyper_v_up_to(version));
    }
}
