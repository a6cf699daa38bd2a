//! Sub-channels of a device: bound to their primary channel, and gone with it.

use std::num::NonZeroU16;
use std::sync::Mutex;

use vmbus::bus::{Config, VERSIONS};
use vmbus::ids::{ChannelId, VpIndex};
use vmbus::kmcl::{ChannelBuilder, ChannelError, ConfigError, EnabledChannel, State};
use vmbus::protocol::{MessageType, Version};
use vmbus_host::bus::{Device, Fault, Profile, RescindOrder, Rule};
use vmbus_host::provider::Manual;

use crate::support::{INSTANCE, INTERFACE, Journal, SECOND, Seen, Vm, is_active};

fn index(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn plain(journal: &Journal) -> ChannelBuilder {
    journal.builder(|_, packet| packet.complete(&[]))
}

/// A guest with an open primary channel, and the journal of that.
fn primary(profile: Profile, version: Version) -> (Vm, ChannelId, EnabledChannel, Journal) {
    let vm = Vm::with_config(profile, Config::default().up_to(version));
    let id = vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
    vm.connect();
    let journal = Journal::default();
    let channel = vm.enable(&plain(&journal));
    assert!(is_active(&channel));
    journal.take();
    (vm, id.unwrap(), channel, journal)
}

fn newest() -> (Vm, ChannelId, EnabledChannel, Journal) {
    primary(Profile::openvmm(), Version::V6_0)
}

fn offer(vm: &Vm, primary: ChannelId, number: u16) -> ChannelId {
    let id = vm.machine.add_sub_channel(primary, index(number), Manual);
    vm.machine.settle();
    id.unwrap()
}

#[test]
fn a_sub_channel_waits_for_its_late_offer_and_opens_in_every_version() {
    for profile in [Profile::openvmm, Profile::hyper_v, Profile::qemu] {
        for version in VERSIONS {
            if !profile().versions.contain(version) {
                continue;
            }
            let (vm, id, channel, _) = primary(profile(), version);
            let journal = Journal::default();
            let builder = plain(&journal).sub_channel_of(channel.channel(), index(2));
            let sub = vm.enable(&builder.target_vp(VpIndex(3)));
            assert_eq!(sub.channel().state(), State::Enabled, "no offer yet");
            offer(&vm, id, 1);
            assert_eq!(sub.channel().state(), State::Enabled, "another index");
            let second = offer(&vm, id, 2);
            assert!(is_active(&sub));
            assert_eq!(sub.channel().interface_instance(), Some(INSTANCE));
            vm.send(second, b"packet");
            assert_eq!(vm.machine.interrupted_vp(second), Some(VpIndex(3)));
            let packets = journal.take();
            assert!(packets.iter().any(|seen| matches!(seen, Seen::Packet(..))));
            vm.assert_well_behaved();
        }
    }
}

#[test]
fn an_offer_that_came_first_is_taken_at_once() {
    let (vm, id, channel, _) = newest();
    offer(&vm, id, 1);
    let journal = Journal::default();
    let sub = vm.enable(&plain(&journal).sub_channel_of(channel.channel(), index(1)));
    assert!(is_active(&sub));
}

#[test]
fn a_primary_channel_never_takes_the_offer_of_a_sub_channel() {
    let (vm, id, first, _) = newest();
    let second = vm.enable(&plain(&Journal::default()));
    offer(&vm, id, 1);
    assert!(is_active(&first));
    assert_eq!(second.channel().state(), State::Enabled);
    let driver = |offer: &vmbus::OfferInfo| offer.driver.is_some();
    let offers = vm.vmbus.snapshot().offers;
    assert_eq!(offers.iter().map(driver).collect::<Vec<_>>(), [true, false]);
}

#[test]
fn a_sub_channel_can_be_enabled_only_while_its_primary_is_open() {
    let vm = Vm::new(Profile::openvmm());
    vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
    let journal = Journal::default();
    let primary = vm.enable(&plain(&journal));
    let sub = plain(&journal).sub_channel_of(primary.channel(), index(1));
    let enable = || sub.enable(vm.vmbus.client()).map(drop).unwrap_err();
    assert_eq!(enable(), ConfigError::PrimaryNotOpen);
    vm.connect();
    assert!(is_active(&primary));
    drop(sub.enable(vm.vmbus.client()).unwrap());
    primary.disable();
    vm.machine.settle();
    assert_eq!(enable(), ConfigError::PrimaryNotOpen);
}

/// Two open sub-channels, all three channels with one journal of who saw what.
fn family(profile: Profile) -> (Vm, [ChannelId; 3], [EnabledChannel; 3], Order) {
    let order = Order::default();
    let vm = Vm::new(profile);
    let id = vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
    let id = id.unwrap();
    vm.connect();
    let primary = vm.enable(&order.builder("primary"));
    let mut subs = [1, 2].into_iter().map(|number| {
        let name = ["first", "second"][usize::from(number) - 1];
        let builder = order.builder(name);
        let builder = builder.sub_channel_of(primary.channel(), index(number));
        (offer(&vm, id, number), vm.enable(&builder))
    });
    let ((first, one), (second, two)) = (subs.next().unwrap(), subs.next().unwrap());
    drop(subs);
    assert_eq!(
        order.take(),
        [
            ("primary", "opened"),
            ("primary", "started"),
            ("first", "opened"),
            ("first", "started"),
            ("second", "opened"),
            ("second", "started"),
        ]
    );
    (vm, [id, first, second], [primary, one, two], order)
}

/// Which channel saw what, in order.
#[derive(Clone, Default)]
struct Order(std::sync::Arc<Mutex<Vec<(&'static str, &'static str)>>>);

impl Order {
    fn note(&self, who: &'static str, what: &'static str) {
        self.0.lock().unwrap().push((who, what));
    }

    fn take(&self) -> Vec<(&'static str, &'static str)> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    fn builder(&self, who: &'static str) -> ChannelBuilder {
        let [opened, started, suspend, closed] = std::array::from_fn(|_| self.clone());
        ChannelBuilder::new(INTERFACE)
            .opened(move |_| {
                opened.note(who, "opened");
                Ok(())
            })
            .started(move |_| started.note(who, "started"))
            .suspend(move |_| suspend.note(who, "suspend"))
            .closed(move |_| closed.note(who, "closed"))
    }
}

/// Where in `seen` this stands; it must be there once.
fn position(seen: &[(&'static str, &'static str)], what: (&'static str, &'static str)) -> usize {
    assert_eq!(
        seen.iter().filter(|other| **other == what).count(),
        1,
        "{what:?} in {seen:?}"
    );
    seen.iter().position(|other| *other == what).unwrap()
}

/// Each was suspended and closed once, and the sub-channels before the primary's closed callback (spec kmcl.md 6.1, 31).
fn assert_closed_in_order(order: &Order) {
    let seen = order.take();
    assert_eq!(seen.len(), 6, "{seen:?}");
    let end = position(&seen, ("primary", "closed"));
    for who in ["first", "second"] {
        let (suspend, closed) = (
            position(&seen, (who, "suspend")),
            position(&seen, (who, "closed")),
        );
        assert!(suspend < closed && closed < end, "{seen:?}");
    }
}

#[test]
fn sub_channels_go_down_before_their_primary_is_closed() {
    for profile in [Profile::openvmm(), Profile::hyper_v(), Profile::qemu()] {
        let (vm, _, channels, order) = family(profile);
        channels[0].disable();
        vm.machine.advance(30 * SECOND);
        assert!(
            channels
                .iter()
                .all(|channel| channel.channel().state() == State::Disabled)
        );
        assert_closed_in_order(&order);
        assert_eq!(vm.machine.shared_runs(), 0);
        vm.assert_well_behaved();
    }
}

#[test]
fn a_device_that_is_taken_away_ends_all_its_channels_whatever_the_order() {
    for rescind_order in [RescindOrder::PrimaryFirst, RescindOrder::SubChannelsFirst] {
        for delayed in 0..4 {
            for profile in [Profile::openvmm(), Profile::hyper_v()] {
                let (vm, [id, ..], channels, order) = family(Profile {
                    rescind_order,
                    ..profile
                });
                vm.machine.server(|server| {
                    server.inject(Rule {
                        skip: delayed,
                        ..Rule::once(MessageType::RESCIND_CHANNEL_OFFER, Fault::Delay(SECOND))
                    });
                });
                vm.machine.rescind(id);
                vm.machine.advance(40 * SECOND);
                for channel in &channels {
                    assert_eq!(channel.channel().state(), State::Disabled);
                }
                assert_closed_in_order(&order);
                assert_eq!(vm.machine.shared_runs(), 0);
                assert_eq!(
                    vm.vmbus.snapshot().offers.len(),
                    0,
                    "every number is released"
                );
                vm.assert_well_behaved();
            }
        }
    }
}

#[test]
fn a_sub_channel_that_is_taken_away_leaves_the_others_alone() {
    let (vm, [id, first, _], [primary, one, two], order) = family(Profile::openvmm());
    vm.machine.rescind(first);
    vm.machine.settle();
    assert_eq!(one.channel().state(), State::Disabled);
    assert!(is_active(&primary) && is_active(&two));
    assert_eq!(order.take(), [("first", "suspend"), ("first", "closed")]);
    offer(&vm, id, 1);
    let again = order
        .builder("again")
        .sub_channel_of(primary.channel(), index(1));
    assert!(is_active(&vm.enable(&again)));
    vm.assert_well_behaved();
}

#[test]
fn sub_channels_pause_and_start_with_their_primary() {
    let (vm, _, channels, order) = family(Profile::openvmm());
    let pause = channels[0].channel().pause().unwrap();
    vm.vmbus.client().block_on(pause).unwrap();
    for channel in &channels {
        assert_eq!(channel.channel().state(), State::Paused);
    }
    let mut seen = order.take();
    seen.sort_unstable();
    assert_eq!(
        seen,
        [
            ("first", "suspend"),
            ("primary", "suspend"),
            ("second", "suspend")
        ]
    );
    channels[0].channel().start().unwrap();
    vm.machine.settle();
    assert!(channels.iter().all(is_active));
    let mut seen = order.take();
    seen.sort_unstable();
    assert_eq!(
        seen,
        [
            ("first", "started"),
            ("primary", "started"),
            ("second", "started")
        ]
    );
    vm.assert_well_behaved();
}

#[test]
fn an_unload_ends_all_of_them_and_a_new_connection_has_only_the_primary() {
    let (vm, _, channels, order) = family(Profile::hyper_v());
    vm.vmbus.begin_unload();
    vm.machine.settle();
    assert!(
        channels
            .iter()
            .all(|channel| channel.channel().state() == State::Disabled)
    );
    assert_closed_in_order(&order);
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.connect();
    assert_eq!(vm.vmbus.snapshot().offers.len(), 1);
    vm.assert_well_behaved();
}

#[test]
fn a_failing_sub_channel_does_not_fail_its_primary() {
    let (vm, id, primary, _) = newest();
    let journal = Journal::default();
    let sub = vm.enable(&plain(&journal).sub_channel_of(primary.channel(), index(1)));
    let number = offer(&vm, id, 1);
    assert!(is_active(&sub));
    journal.take();
    vm.host(number, |host| {
        // The offset of the host's next packet, far outside the ring.
        let page = host.opening.downstream_page as usize;
        let producer = host.memory().atomic_u32(page * 4096).unwrap();
        producer.store(u32::MAX, std::sync::atomic::Ordering::SeqCst);
    });
    vm.machine.interrupt(number);
    vm.machine.settle();
    assert_eq!(sub.channel().state(), State::Disabled);
    let seen = journal.take();
    assert!(matches!(
        seen[..],
        [
            Seen::Suspend,
            Seen::Closed,
            Seen::Failure(ChannelError::Ring(_))
        ]
    ));
    assert!(is_active(&primary));
    vm.assert_well_behaved();
}

#[test]
fn a_new_contact_closes_sub_channels_before_their_primary() {
    let (vm, _, channels, order) = family(Profile::openvmm());
    vm.connect();
    for channel in &channels {
        assert_eq!(channel.channel().state(), State::Disabled);
    }
    assert_closed_in_order(&order);
}
