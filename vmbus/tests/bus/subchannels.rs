//! Sub-channels: offered late, opened on VPs of their own, taken back in any order, in every version.

use std::num::NonZeroU16;

use vmbus::bus::{Config, Event, OpenParameters, VERSIONS};
use vmbus::ids::{ChannelId, GpadlHandle, VpIndex};
use vmbus::protocol::{Guid, MessageType, Version, interface};
use vmbus_host::bus::{Event as HostEvent, Fault, Profile, RescindOrder, Rule};

use crate::world::{PROFILES, SECOND, World, parameters};

fn index(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

/// A host that ends with this version, and its disk controller with an open primary channel.
fn device(profile: Profile, version: Version) -> (World, ChannelId) {
    let mut world = World::new(profile, Config::default().up_to(version));
    world.bus.connect(world.now);
    world.wait(|event| matches!(event, Event::AllOffersDelivered));
    assert_eq!(world.bus.version(), Some(version));
    let primary = world.channel(interface::SCSI_CONTROLLER);
    open(&mut world, primary, VpIndex(0));
    world.events.clear();
    (world, primary)
}

fn open(world: &mut World, channel: ChannelId, target_vp: VpIndex) -> GpadlHandle {
    let (ring, result) = world.gpadl(channel, 8);
    assert_eq!(result, Ok(()));
    let parameters = OpenParameters {
        target_vp,
        ..parameters(ring)
    };
    world.bus.open(world.now, channel, &parameters).unwrap();
    assert_eq!(world.opened(channel), Ok(()));
    ring
}

fn add(world: &mut World, primary: ChannelId, number: u16) -> ChannelId {
    let id = world.server.add_sub_channel(primary, index(number));
    let id = id.expect("the device has no such sub-channel yet");
    world.wait(|event| matches!(event, Event::Offered(offer) if offer.channel == id));
    id
}

/// The versions that both ends have, when the newest is `version`.
fn each_version(mut test: impl FnMut(Profile, Version)) {
    for profile in PROFILES {
        for version in VERSIONS {
            if profile().versions.contain(version) {
                test(profile(), version);
            }
        }
    }
}

#[test]
fn sub_channels_are_offered_late_with_type_and_instance_of_their_device() {
    each_version(|profile, version| {
        let (mut world, primary) = device(profile, version);
        let [first, second] = [1, 2].map(|number| add(&mut world, primary, number));
        let device = |number| {
            let instance = Guid([interface::SCSI_CONTROLLER.0[0]; 16]);
            let offer = world
                .bus
                .offer(interface::SCSI_CONTROLLER, instance, number);
            offer.map(|offer| offer.channel)
        };
        assert_eq!(
            [0, 1, 2, 3].map(device),
            [Some(primary), Some(first), Some(second), None]
        );
        let other = world.bus.offer(
            interface::DYNAMIC_MEMORY,
            Guid([interface::SCSI_CONTROLLER.0[0]; 16]),
            1,
        );
        assert_eq!(other, None);
        world.assert_clean();
    });
}

#[test]
fn sub_channels_open_and_close_beside_their_primary() {
    each_version(|profile, version| {
        let (mut world, primary) = device(profile, version);
        let sub = add(&mut world, primary, 1);
        let ring = open(&mut world, sub, VpIndex(1));
        let opening = world
            .host_events
            .iter()
            .rev()
            .find_map(|event| match event {
                HostEvent::Opening(opening) if opening.channel == sub => Some(opening.clone()),
                _ => None,
            });
        assert_eq!(opening.map(|opening| opening.target_vp), Some(VpIndex(1)));
        assert!(world.server.is_open(primary) && world.server.is_open(sub));
        world.bus.close(sub).unwrap();
        world.teardown(ring);
        assert!(world.server.is_open(primary) && !world.server.is_open(sub));
        assert!(world.bus.offers().any(|offer| offer.channel == sub));
        open(&mut world, sub, VpIndex(0));
        world.assert_clean();
    });
}

#[test]
fn the_vp_of_a_sub_channel_can_be_changed_alone() {
    for version in [Version::V4_1, Version::V5_2, Version::V5_3, Version::V6_0] {
        let (mut world, primary) = device(Profile::hyper_v(), version);
        let channel = add(&mut world, primary, 1);
        open(&mut world, channel, VpIndex(0));
        let target_vp = VpIndex(3);
        let now = world.now;
        world.bus.modify_target_vp(now, channel, target_vp).unwrap();
        world.wait(|event| {
            *event
                == Event::TargetVpModified {
                    channel,
                    target_vp,
                    result: Ok(()),
                }
        });
        world.settle();
        let modified = |event: &&HostEvent| matches!(event, HostEvent::TargetVp { .. });
        let modified: Vec<_> = world.host_events.iter().filter(modified).collect();
        assert_eq!(modified, [&HostEvent::TargetVp { channel, target_vp }]);
        world.assert_clean();
    }
}

/// Does what a guest owes for one rescinded channel.
fn retire(world: &mut World, channel: ChannelId, ring: GpadlHandle) {
    let _ = world.bus.close(channel);
    world.teardown(ring);
    world.bus.release(channel).unwrap();
    world.settle();
}

#[test]
fn a_device_is_taken_back_channel_by_channel_in_any_order() {
    // Both orders of hosts, and one that messages overtake each other in.
    for order in 0..3 {
        each_version(|mut profile, version| {
            profile.rescind_order = if order == 0 {
                RescindOrder::PrimaryFirst
            } else {
                RescindOrder::SubChannelsFirst
            };
            let releases = profile.relid_released;
            let (mut world, primary) = device(profile, version);
            let ring = |world: &World, channel| world.server.gpadls().of_channel(channel)[0];
            let mut channels = vec![(primary, ring(&world, primary))];
            for number in [1, 2] {
                let sub = add(&mut world, primary, number);
                channels.push((sub, open(&mut world, sub, VpIndex(number.into()))));
            }
            if order == 2 {
                let late = Fault::Delay(SECOND);
                world
                    .server
                    .inject(Rule::once(MessageType::RESCIND_CHANNEL_OFFER, late));
            }
            assert!(world.server.rescind(primary));
            let mut seen = Vec::new();
            while seen.len() < 3 {
                match world.wait(|event| matches!(event, Event::Rescinded(_))) {
                    Event::Rescinded(channel) => seen.push(channel),
                    _ => unreachable!(),
                }
            }
            let [first, second, third] = [0, 1, 2].map(|i: usize| channels[i].0);
            let expected = match order {
                0 => [first, second, third],
                1 => [second, third, first],
                _ => [third, first, second],
            };
            assert_eq!(seen, expected, "order {order}");
            for (channel, ring) in channels {
                retire(&mut world, channel, ring);
                assert_eq!(
                    world.host_events.contains(&HostEvent::Released(channel)),
                    releases
                );
            }
            assert_eq!(world.server.gpadl_count(), 0);
            world.assert_clean();
        });
    }
}

#[test]
fn a_sub_channel_is_taken_back_alone() {
    each_version(|profile, version| {
        let (mut world, primary) = device(profile, version);
        let sub = add(&mut world, primary, 1);
        let ring = open(&mut world, sub, VpIndex(0));
        assert!(world.server.rescind(sub));
        world.wait(|event| *event == Event::Rescinded(sub));
        assert!(world.server.is_open(primary));
        retire(&mut world, sub, ring);
        let again = add(&mut world, primary, 1);
        open(&mut world, again, VpIndex(0));
        world.assert_clean();
    });
}

#[test]
fn hosts_may_take_sub_channels_back_when_the_primary_closes() {
    for ends in [false, true] {
        let mut profile = Profile::openvmm();
        profile.sub_channels_end_with_primary = ends;
        let (mut world, primary) = device(profile, Version::V6_0);
        let sub = add(&mut world, primary, 1);
        let ring = open(&mut world, sub, VpIndex(0));
        world.bus.close(primary).unwrap();
        world.rest();
        assert_eq!(world.events.contains(&Event::Rescinded(sub)), ends);
        if ends {
            retire(&mut world, sub, ring);
        }
        world.assert_clean();
    }
}

#[test]
fn sub_channels_do_not_outlive_the_connection() {
    for unload in [false, true] {
        let (mut world, primary) = device(Profile::hyper_v(), Version::V6_0);
        let sub = add(&mut world, primary, 1);
        let now = world.now;
        if unload {
            world.bus.unload(now);
            world.wait(|event| matches!(event, Event::Unloaded { acknowledged: true }));
        }
        world.bus.connect(now);
        world.wait(|event| matches!(event, Event::AllOffersDelivered));
        let offers: Vec<_> = world.bus.offers().map(|offer| offer.channel).collect();
        assert!(offers.contains(&primary) && !offers.contains(&sub));
        world.assert_clean();
    }
}

#[test]
fn a_host_has_one_sub_channel_of_each_index() {
    let (mut world, primary) = device(Profile::openvmm(), Version::V6_0);
    let sub = add(&mut world, primary, 1);
    assert_eq!(world.server.add_sub_channel(primary, index(1)), None);
    assert_eq!(world.server.add_sub_channel(sub, index(2)), None);
    assert_eq!(world.server.add_sub_channel(ChannelId(99), index(1)), None);
    world.server.rescind(primary);
    assert_eq!(world.server.add_sub_channel(primary, index(2)), None);
}
