//! The whole way, connect to unload, on each kind of host.

use std::num::NonZeroU16;
use std::sync::Arc;

use vmbus::ConnectionState;
use vmbus::drivers::balloon::Balloon;
use vmbus::protocol::{Guid, Version, interface};
use vmbus_host::bus::{Device, Profile};
use vmbus_host::channel::HostChannel;
use vmbus_host::host::Host;
use vmbus_host::memory::GuestMemory;
use vmbus_host::provider::{Link, Provider};

use crate::balloon::{MIB, Ram, offer};
use crate::support::{SECOND, Vm};

/// Asks for a sub-channel as soon as it can.
struct Asking {
    link: Option<Link>,
    _token: Arc<()>,
}

impl Provider for Asking {
    fn attached(&mut self, link: Link) {
        let token = self._token.clone();
        let inner = Self {
            link: Some(link.clone()),
            _token: token,
        };
        link.add_sub_channel(NonZeroU16::MIN, Box::new(inner));
        self.link = Some(link);
    }

    fn serve(&mut self, _now: u64, _channel: &mut HostChannel) {}
}

#[test]
fn nothing_is_left_of_a_host_that_ends_before_it_has_done_what_providers_asked_for() {
    let mut host = Host::new(Profile::hyper_v(), GuestMemory::default());
    let token = Arc::new(());
    let provider = Asking {
        link: None,
        _token: token.clone(),
    };
    let device = Device::new(interface::NETWORK, Guid([1; 16]));
    host.add(device, provider).unwrap();
    assert_eq!(
        Arc::strong_count(&token),
        3,
        "the device, and what it asks for"
    );
    drop(host);
    assert_eq!(Arc::strong_count(&token), 1);
}

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
    // Where the host keeps silent about the old channel's memory, the guest gives its number back only when it has waited.
    run(15 * SECOND);
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
