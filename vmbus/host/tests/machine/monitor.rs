//! Monitored notification: bits in place of hypercalls, where driver, stack and host agree on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vmbus::ConnectionState;
use vmbus::bus::Config;
use vmbus::ids::ChannelId;
use vmbus::kmcl::{ChannelBuilder, EnabledChannel, LatencyError, State};
use vmbus::protocol::MessageType;
use vmbus::protocol::monitor::MonitorId;
use vmbus_host::bus::{Device, Fault, Profile, Rule};
use vmbus_host::channel::HostChannel;
use vmbus_host::provider::{Manual, Provider};

use crate::support::{INSTANCE, INTERFACE, Journal, SECOND, Vm, is_active, received};

fn bit() -> MonitorId {
    MonitorId::new(37).unwrap()
}

fn config() -> Config {
    Config {
        monitor_pages: true,
        ..Config::default()
    }
}

fn device() -> Device {
    Device {
        monitor_id: Some(bit()),
        ..Device::new(INTERFACE, INSTANCE)
    }
}

/// A connected guest with one device that has a bit.
fn vm(profile: Profile, config: Config) -> (Vm, ChannelId) {
    let vm = Vm::with_config(profile, config);
    let id = vm.machine.add(device(), Manual).unwrap();
    vm.connect();
    (vm, id)
}

fn builder() -> ChannelBuilder {
    Journal::default()
        .builder(|_, packet| packet.complete(&[]))
        .monitored_notification()
}

/// The signals of a send into an empty ring that nobody has masked: by hypercall and through the page.
fn signals_of_one_send(vm: &Vm, channel: &EnabledChannel) -> (u64, u64) {
    let counted = || {
        let counters = channel.channel().counters();
        (counters.signals_sent, counters.signals_monitored)
    };
    let (machine, before) = (vm.machine.signals(), counted());
    channel.channel().send_message(b"hello").unwrap();
    let after = counted();
    assert_eq!(vm.machine.signals() - machine, after.0 - before.0);
    (after.0 - before.0, after.1 - before.1)
}

#[test]
fn a_signal_is_a_bit_in_the_page_and_no_hypercall() {
    let (vm, id) = vm(Profile::hyper_v(), config());
    let channel = vm.enable(&builder());
    assert!(is_active(&channel));
    let word = |vm: &Vm| {
        vm.machine.watch(|watch| {
            let word = watch.page().atomic_u32(bit().pending_offset()).unwrap();
            word.load(Ordering::SeqCst)
        })
    };
    assert_eq!(word(&vm), Some(0));
    for n in 1..4 {
        assert_eq!(signals_of_one_send(&vm, &channel), (0, 1));
        assert_eq!(word(&vm), Some(bit().mask()));
        vm.machine.advance(SECOND);
        assert_eq!(word(&vm), Some(0));
        assert_eq!(vm.machine.monitored_signals(), n);
        assert_eq!(vm.host(id, received).len(), 1);
    }
    vm.assert_well_behaved();
}

#[test]
fn without_choice_pages_or_bit_each_signal_is_a_hypercall() {
    let plain = || Journal::default().builder(|_, packet| packet.complete(&[]));
    let no_pages = Config::default();
    let cases = [
        (
            "the driver did not choose it",
            plain(),
            Profile::hyper_v(),
            config(),
        ),
        (
            "the stack has no pages",
            builder(),
            Profile::hyper_v(),
            no_pages,
        ),
        (
            "the host has no monitor",
            builder(),
            Profile::openvmm(),
            config(),
        ),
        ("nor has this one", builder(), Profile::qemu(), config()),
    ];
    for (case, builder, profile, config) in cases {
        let (vm, _) = vm(profile, config);
        let channel = vm.enable(&builder);
        assert_eq!(signals_of_one_send(&vm, &channel), (1, 0), "{case}");
        assert_eq!(
            channel.channel().set_interrupt_latency(5),
            Err(LatencyError::NotMonitored),
            "{case}"
        );
        vm.machine.advance(SECOND);
        assert_eq!(vm.machine.monitored_signals(), 0, "{case}");
        vm.assert_well_behaved();
    }
}

#[test]
fn a_group_that_the_host_does_not_look_at_is_signalled_by_hypercall() {
    let (vm, _) = vm(Profile::hyper_v(), config());
    let channel = vm.enable(&builder());
    let others = !bit().enable_mask() & 0xF;
    vm.machine.watch(|watch| watch.enable(others).unwrap());
    assert_eq!(signals_of_one_send(&vm, &channel), (1, 0));
    vm.machine.watch(|watch| watch.enable(0xF).unwrap());
    vm.machine.settle();
}

#[test]
fn no_memory_for_the_pages_leaves_hypercalls() {
    let vm = Vm::with_config(Profile::hyper_v(), config());
    vm.machine.add(device(), Manual).unwrap();
    vm.machine.set_free_pages(0);
    vm.connect();
    vm.machine.set_free_pages(100);
    let channel = vm.enable(&builder());
    assert_eq!(signals_of_one_send(&vm, &channel), (1, 0));
}

/// A provider that counts how often it is woken.
struct Woken(Arc<AtomicU32>);

impl Provider for Woken {
    fn serve(&mut self, _now: u64, _channel: &mut HostChannel) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn the_host_sees_a_signal_when_its_latency_has_passed() {
    let vm = Vm::with_config(Profile::hyper_v(), config());
    let woken = Arc::new(AtomicU32::new(0));
    vm.machine.add(device(), Woken(woken.clone())).unwrap();
    vm.connect();
    let channel = vm.enable(&builder());
    let before = Profile::hyper_v().monitor_latency;
    assert_eq!(channel.channel().set_interrupt_latency(5000), Ok(before));
    assert_eq!(channel.channel().set_interrupt_latency(5000), Ok(5000));
    let mut seen = woken.load(Ordering::SeqCst);
    for latency in [5000, 0, 1, u16::MAX] {
        channel.channel().set_interrupt_latency(latency).unwrap();
        channel.channel().send_message(b"hello").unwrap();
        if latency > 0 {
            vm.machine.advance(u64::from(latency) - 1);
            assert_eq!(woken.load(Ordering::SeqCst), seen, "{latency}");
        }
        vm.machine.advance(1);
        seen += 1;
        assert_eq!(woken.load(Ordering::SeqCst), seen, "{latency}");
        vm.host(vm.machine_channel(), received);
    }
    vm.assert_well_behaved();
}

impl Vm {
    /// The one channel of the one device.
    fn machine_channel(&self) -> ChannelId {
        self.vmbus.snapshot().offers[0].offer.channel
    }
}

#[test]
fn the_latency_can_be_set_from_opened_to_closed_and_not_outside() {
    let (vm, _) = vm(Profile::hyper_v(), config());
    let results = Arc::new(std::sync::Mutex::new(Vec::new()));
    let note = |name: &'static str| {
        let results = results.clone();
        move |channel: &vmbus::kmcl::Channel| {
            let result = channel.set_interrupt_latency(7);
            results.lock().unwrap().push((name, result.is_ok()));
        }
    };
    let opened = note("opened");
    let builder = ChannelBuilder::new(INTERFACE)
        .monitored_notification()
        .opened(move |channel| {
            opened(channel);
            Ok(())
        })
        .started(note("started"))
        .post_started(note("post-started"))
        .suspend(note("suspend"))
        .closed(note("closed"));
    let channel = builder.enable(vm.vmbus.client()).unwrap();
    let enabled = channel.channel().set_interrupt_latency(7);
    assert_eq!(enabled, Err(LatencyError::NotOpen(State::Enabled)));
    vm.machine.settle();
    assert_eq!(channel.channel().set_interrupt_latency(8), Ok(7));
    channel.disable();
    vm.machine.settle();
    let disabled = channel.channel().set_interrupt_latency(7);
    assert_eq!(disabled, Err(LatencyError::NotOpen(State::Disabled)));
    let expected = ["opened", "started", "post-started", "suspend", "closed"];
    assert_eq!(*results.lock().unwrap(), expected.map(|name| (name, true)));
    assert!(!enabled.unwrap_err().to_string().is_empty());
}

#[test]
fn the_pages_are_the_hosts_from_contact_to_unload() {
    let (vm, _) = vm(Profile::hyper_v(), config());
    assert_eq!(vm.machine.shared_runs(), 2);
    let channel = vm.enable(&builder());
    vm.connect();
    assert_eq!(
        vm.machine.shared_runs(),
        2,
        "the next contact names the same"
    );
    assert_eq!(channel.channel().state(), State::Disabled);
    let channel = vm.enable(&builder());
    assert_eq!(signals_of_one_send(&vm, &channel), (0, 1));
    vm.vmbus.begin_unload();
    vm.machine.settle();
    assert_eq!(
        vm.vmbus.connection(),
        ConnectionState::Unloaded { acknowledged: true }
    );
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.connect();
    let channel = vm.enable(&builder());
    assert_eq!(signals_of_one_send(&vm, &channel), (0, 1));
    vm.machine
        .server(|server| server.inject(Rule::always(MessageType::UNLOAD, Fault::Drop)));
    vm.vmbus.begin_unload();
    vm.machine.advance(100 * SECOND);
    assert!(
        vm.machine.shared_runs() >= 2,
        "the host may still write to them"
    );
    vm.assert_well_behaved();
}

#[test]
fn a_rescinded_channel_leaves_its_bit_to_the_next() {
    let (vm, id) = vm(Profile::hyper_v(), config());
    let first = vm.enable(&builder());
    assert_eq!(signals_of_one_send(&vm, &first), (0, 1));
    vm.machine.rescind(id);
    // This host says nothing of the memory of a rescinded channel.
    vm.machine.advance(15 * SECOND);
    assert_eq!(first.channel().state(), State::Disabled);
    vm.machine.add(device(), Manual).unwrap();
    vm.machine.settle();
    let second = vm.enable(&builder());
    vm.machine.advance(SECOND);
    let seen = vm.machine.monitored_signals();
    assert_eq!(signals_of_one_send(&vm, &second), (0, 1));
    vm.machine.advance(SECOND);
    assert_eq!(vm.machine.monitored_signals(), seen + 1);
    vm.assert_well_behaved();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever stands in the pages, the guest signals one way or the other and sends on.
    #[test]
    fn any_bytes_in_the_monitor_page_only_choose_the_way_of_a_signal(
        writes in proptest::collection::vec((0usize..4096, any::<u8>()), 1..200),
        latency in any::<u16>(),
    ) {
        let (vm, id) = vm(Profile::hyper_v(), config());
        let channel = vm.enable(&builder());
        for chunk in writes.chunks(20) {
            vm.machine.watch(|watch| {
                for (offset, byte) in chunk {
                    watch.page().write(*offset, &[*byte]).unwrap();
                }
            });
            prop_assert!(channel.channel().set_interrupt_latency(latency).is_ok());
            let (hypercalls, bits) = signals_of_one_send(&vm, &channel);
            prop_assert_eq!(hypercalls + bits, 1);
            prop_assert_eq!(vm.host(id, received).len(), 1);
            prop_assert!(is_active(&channel));
        }
    }
}
