//! Contact, versions, offers and the end of a connection.

use vmbus::bus::{Bus, Config, ConnectError, Event, VERSIONS, Violation};
use vmbus::hypervisor::PostError;
use vmbus::ids::PageNumber;
use vmbus::ids::{ChannelId, ConnectionId, VpIndex};
use vmbus::protocol::message::{InitiateContact, OfferChannel};
use vmbus::protocol::monitor::{MonitorId, MonitorPages};
use vmbus::protocol::{
    Body, ConnectionState, FeatureFlags, Guid, MessageType, Payload, Version, interface,
};
use vmbus_host::bus::{
    Device, Event as HostEvent, Fault, Message, Profile, Rule, Server, Versions,
};
use zerocopy::FromZeros;

use crate::world::{PROFILES, SECOND, World, check_size};

const ONE: ConnectionId = ConnectionId(1);
const FOUR: ConnectionId = ConnectionId(4);

fn connect(profile: Profile, config: Config) -> World {
    let mut world = World::new(profile, config);
    world.bus.connect(world.now);
    world
}

fn connected(world: &mut World) -> Version {
    match world.wait(|event| matches!(event, Event::Connected { .. } | Event::ConnectFailed(_))) {
        Event::Connected { version, .. } => version,
        event => panic!("{event:?}"),
    }
}

fn failure(world: &mut World) -> ConnectError {
    match world.wait(|event| matches!(event, Event::Connected { .. } | Event::ConnectFailed(_))) {
        Event::ConnectFailed(error) => error,
        event => panic!("{event:?}"),
    }
}

/// The versions asked for, and where.
fn contacts(world: &World) -> Vec<(u32, Version)> {
    let contact = |(connection, payload): &(ConnectionId, Payload)| {
        let (contact, _) = InitiateContact::parse(payload)?;
        Some((connection.0, Version(contact.version.get())))
    };
    world.posted.iter().filter_map(contact).collect()
}

#[test]
fn the_newest_version_of_both_is_chosen_on_every_host() {
    let releases = VERSIONS.map(Profile::hyper_v_up_to);
    let hosts = PROFILES
        .map(|profile| profile())
        .into_iter()
        .chain(releases);
    for profile in hosts {
        for newest in VERSIONS {
            let mut world = connect(profile.clone(), Config::default().up_to(newest));
            let both = VERSIONS.into_iter().filter(|&version| version <= newest);
            let expected = both
                .into_iter()
                .find(|&version| profile.versions.contain(version));
            assert_eq!(
                Some(connected(&mut world)),
                expected,
                "{} {newest}",
                profile.name
            );
            world.wait(|event| *event == Event::AllOffersDelivered);
            assert_eq!(world.bus.version(), expected);
            assert_eq!(world.bus.features(), FeatureFlags::NONE);
            assert_eq!(world.server.version(), expected);
            assert_eq!(world.bus.offers().count(), 2);
            assert_eq!(world.posted_count(MessageType::REQUEST_OFFERS), 1);
            let (last, _) = world.posted.last().unwrap();
            let named = if expected >= Some(Version::V5_0) {
                profile.named_connection
            } else {
                ONE
            };
            assert_eq!(*last, named, "later messages go where the host says");
            assert_eq!(world.now, 1000, "nobody waited for a time-out");
            world.assert_clean();
        }
    }
}

#[test]
fn qemu_is_reached_with_one_message_for_each_refusal() {
    let mut world = connect(Profile::qemu(), Config::default());
    assert_eq!(connected(&mut world), Version::V4_0);
    let expected = [(4, Version::V6_0), (1, Version::V4_1), (1, Version::V4_0)];
    assert_eq!(contacts(&world), expected);
    assert_eq!(world.posted.len(), 4);
}

#[test]
fn contact_has_the_fields_of_its_version() {
    for version in VERSIONS {
        let config = Config {
            versions: vec![version],
            target_vp: VpIndex(3),
            ..Config::default()
        };
        let mut bus = Bus::new(config);
        bus.connect(0);
        let outgoing = bus.poll_message().unwrap();
        check_size(&outgoing.payload, None);
        let (contact, rest) = InitiateContact::parse(&outgoing.payload).unwrap();
        assert!(rest.is_empty());
        let new = version >= Version::V5_0;
        assert_eq!(outgoing.connection, if new { FOUR } else { ONE });
        assert_eq!(contact.version.get(), version.0);
        assert_eq!(
            contact.target_vp.get(),
            if version >= Version::V3_0 { 3 } else { 0 }
        );
        assert_eq!(contact.target.sint, if new { 2 } else { 0 });
        assert_eq!(contact.target.vtl, 0);
        assert_eq!(contact.target.features.get(), 0);
        assert_eq!(contact.parent_to_child_monitor.get(), 0);
        assert_eq!(contact.child_to_parent_monitor.get(), 0);
    }
}

#[test]
fn silence_on_connection_4_leads_to_connection_1() {
    let mut world = World::new(Profile::openvmm(), Config::default());
    world
        .server
        .inject(Rule::once(MessageType::INITIATE_CONTACT, Fault::Drop));
    world.bus.connect(world.now);
    assert_eq!(connected(&mut world), Version::V6_0);
    assert_eq!(contacts(&world), [(4, Version::V6_0), (1, Version::V6_0)]);
    assert_eq!(world.now, 1000 + 2 * SECOND);
}

#[test]
fn a_version_that_is_dropped_without_a_word_is_followed_by_the_next() {
    let mut world = World::new(Profile::qemu(), Config::default());
    world
        .server
        .inject(Rule::once(MessageType::INITIATE_CONTACT, Fault::Drop));
    world.bus.connect(world.now);
    assert_eq!(connected(&mut world), Version::V4_0);
    assert_eq!(world.now, 1000 + 2 * SECOND);
}

#[test]
fn a_host_that_never_answers_is_no_vmbus_in_bounded_time() {
    for profile in PROFILES {
        let mut world = World::new(profile(), Config::default());
        world
            .server
            .inject(Rule::always(MessageType::INITIATE_CONTACT, Fault::Drop));
        world.bus.connect(world.now);
        let error = failure(&mut world);
        let tried = if world.server.profile().multiclient {
            "0x4, 0x1 to versions 6.0, 5.3, 5.2, 5.1, 5.0, 4.1, 4.0, 3.0, 2.4"
        } else {
            "0x1 to versions 4.1, 4.0, 3.0, 2.4"
        };
        assert_eq!(
            error.to_string(),
            format!("no VMBus: no reply on message connection {tried}")
        );
        assert!(world.now <= 1000 + 20 * SECOND, "{}", world.now);
        at_rest(&mut world.bus);
    }
}

/// A bus without a connection has nothing to say and nothing to wait for.
fn at_rest(bus: &mut Bus) {
    assert_eq!(bus.version(), None);
    assert_eq!(bus.offers().count(), 0);
    assert_eq!(bus.deadline(), None);
    assert!(bus.poll_message().is_none());
    assert!(bus.poll_event().is_none());
}

#[test]
fn no_message_connection_at_all_is_no_vmbus_at_once() {
    let mut world = World::new(Profile::qemu(), Config::default());
    world.refuse.extend([PostError::InvalidConnection; 2]);
    world.bus.connect(world.now);
    assert_eq!(
        failure(&mut world).to_string(),
        "no VMBus: the hypervisor has no message connection 0x4, 0x1"
    );
    assert_eq!(world.posted.len(), 2);
    assert_eq!(world.now, 1000);
    at_rest(&mut world.bus);
}

#[test]
fn a_host_without_a_common_version_is_told_apart() {
    let old = Profile {
        versions: Versions::UpTo(Version::V1_1),
        ..Profile::qemu()
    };
    let mut world = connect(old, Config::default());
    assert_eq!(
        failure(&mut world).to_string(),
        "unsupported VMBus version: the host refused 4.1, 4.0, 3.0, 2.4; \
         has no message connection 0x4 for 6.0, 5.3, 5.2, 5.1, 5.0"
    );

    let strange = Profile {
        versions: Versions::Exactly(&[]),
        ..Profile::openvmm()
    };
    let mut world = World::new(strange, Config::default());
    world.server.inject(Rule {
        kind: Some(MessageType::INITIATE_CONTACT),
        skip: 6,
        count: 1,
        fault: Fault::Drop,
    });
    world.bus.connect(world.now);
    assert_eq!(
        failure(&mut world).to_string(),
        "unsupported VMBus version: the host refused 6.0, 5.3, 5.2, 5.1, 5.0, 4.1, 3.0, 2.4; \
         did not answer 4.0"
    );

    let config = Config {
        versions: vec![Version::V6_0, Version::V5_3],
        ..Config::default()
    };
    let mut world = connect(Profile::qemu(), config);
    assert_eq!(
        failure(&mut world).to_string(),
        "unsupported VMBus version: the host has no message connection 0x4 for 6.0, 5.3"
    );
    at_rest(&mut world.bus);
}

#[test]
fn a_bad_connection_state_is_told() {
    for (state, text) in [
        (
            1,
            "VMBus 5.3 connection refused: the host is low on resources (state 1)",
        ),
        (2, "VMBus 5.3 connection refused: the host failed (state 2)"),
        (
            77,
            "VMBus 5.3 connection refused: unknown connection state 77",
        ),
    ] {
        let mut world = World::new(Profile::hyper_v_up_to(Version::V5_3), Config::default());
        world.server.refusals.contact = Some(ConnectionState(state));
        world.bus.connect(world.now);
        assert_eq!(failure(&mut world).to_string(), text);
        at_rest(&mut world.bus);
    }
}

#[test]
fn a_hypercall_that_fails_is_told() {
    let mut world = World::new(Profile::openvmm(), Config::default());
    world.refuse.push_back(PostError::Status(6));
    world.bus.connect(world.now);
    assert_eq!(
        failure(&mut world).to_string(),
        "no VMBus: INITIATE_CONTACT could not be posted on connection 0x4: \
         HvCallPostMessage failed with status 0x0006"
    );
}

#[test]
fn nothing_to_ask_for_is_told() {
    let config = Config {
        versions: Vec::new(),
        ..Config::default()
    };
    let mut world = connect(Profile::openvmm(), config);
    assert_eq!(failure(&mut world), ConnectError::NoVersions);
}

#[test]
fn contact_can_be_made_again_after_a_failure() {
    let mut world = World::new(Profile::qemu(), Config::default());
    world.refuse.extend([PostError::InvalidConnection; 2]);
    world.bus.connect(world.now);
    failure(&mut world);
    world.bus.connect(world.now);
    assert_eq!(connected(&mut world), Version::V4_0);
}

/// Answers that come after their time are taken for those to later attempts. The guest may then connect with
/// an older version than it could, but never with another than the host.
#[test]
fn late_answers_do_not_part_guest_and_host() {
    let releases = VERSIONS.map(Profile::hyper_v_up_to);
    for profile in PROFILES
        .map(|profile| profile())
        .into_iter()
        .chain(releases)
    {
        for tenths in [5, 19, 21, 30, 39, 41, 55] {
            let mut world = World::new(profile.clone(), Config::default());
            let late = Fault::Delay(tenths * SECOND / 10);
            world
                .server
                .inject(Rule::always(MessageType::VERSION_RESPONSE, late));
            world.bus.connect(world.now);
            let end = |event: &Event| {
                matches!(event, Event::AllOffersDelivered | Event::ConnectFailed(_))
            };
            let failed = world.wait(end) != Event::AllOffersDelivered;
            let context = format!(
                "{} after {tenths} tenths: {:?}",
                profile.name,
                contacts(&world)
            );
            if failed {
                assert!(tenths >= 20, "nothing was late: {context}");
                continue;
            }
            world.rest();
            assert!(world.bus.version().is_some(), "{context}");
            assert_eq!(world.bus.version(), world.server.version(), "{context}");
            assert_eq!(world.bus.offers().count(), 2, "{context}");
        }
    }
}

/// The answer to 6.0 on connection 4 comes late and is taken for that on connection 1, which then turns out to be
/// a refusal.
#[test]
fn a_late_refusal_takes_the_negotiation_up_again() {
    let mut bus = Bus::new(Config::default());
    bus.connect(0);
    bus.poll_message().unwrap();
    bus.tick(2 * SECOND);
    bus.poll_message().unwrap();
    bus.receive(
        2 * SECOND,
        &[15, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0],
    );
    assert!(matches!(bus.poll_event(), Some(Event::Connected { .. })));
    bus.receive(
        2 * SECOND,
        &[15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    let outgoing = bus.poll_message().unwrap();
    let (contact, _) = InitiateContact::parse(&outgoing.payload).unwrap();
    assert_eq!(Version(contact.version.get()), Version::V5_3);
    assert_eq!(outgoing.connection, ONE);
    assert_eq!(bus.version(), None);
    assert!(
        bus.poll_message().is_none(),
        "the offers are not asked for any more"
    );
    assert_eq!(bus.violations(), 0);
}

#[test]
fn a_second_answer_to_one_contact_is_a_violation() {
    let mut world = World::new(Profile::openvmm(), Config::default());
    world
        .server
        .inject(Rule::once(MessageType::VERSION_RESPONSE, Fault::Duplicate));
    world.bus.connect(world.now);
    world.wait(|event| *event == Event::AllOffersDelivered);
    let unexpected = Violation::Unexpected(MessageType::VERSION_RESPONSE);
    world.wait(|event| *event == Event::Violation(unexpected));
    assert_eq!(world.bus.version(), Some(Version::V6_0));
}

#[test]
fn an_impossible_message_connection_is_not_used() {
    for id in [0u32, 0x0100_0000, u32::MAX] {
        let mut bus = Bus::new(Config::default());
        bus.connect(0);
        bus.poll_message().unwrap();
        let mut answer = vec![15, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        answer.extend(id.to_le_bytes());
        bus.receive(0, &answer);
        let violation = Violation::BadConnection(ConnectionId(id));
        assert_eq!(bus.poll_event(), Some(Event::Violation(violation)));
        assert_eq!(bus.version(), None);
        bus.tick(2 * SECOND);
        assert_eq!(bus.poll_message().unwrap().connection, ONE);
    }
}

#[test]
fn a_connection_that_is_not_there_yet_is_tried_again() {
    let mut world = World::new(Profile::hyper_v(), Config::default());
    world.bus.connect(world.now);
    let contact = world.bus.poll_message().unwrap();
    world
        .server
        .post(world.now, contact.connection, &contact.payload);
    world.refuse.extend([PostError::InvalidConnection; 5]);
    world.wait(|event| *event == Event::AllOffersDelivered);
    assert_eq!(world.posted_count(MessageType::REQUEST_OFFERS), 6);
    assert!(world.now > 1000 && world.now < 1000 + SECOND);
    world.assert_clean();
}

#[test]
fn each_message_has_its_own_retries() {
    let mut world = World::connected(Profile::openvmm());
    let channel = world.channel(interface::SCSI_CONTROLLER);
    for _ in 0..10 {
        world.refuse.extend([PostError::InvalidConnection; 15]);
        let (handle, result) = world.gpadl(channel, 30);
        assert_eq!(result, Ok(()));
        world.teardown(handle);
    }
    world.assert_clean();
}

#[test]
fn a_connection_that_never_comes_up_fails() {
    let mut world = World::new(Profile::hyper_v(), Config::default());
    world.bus.connect(world.now);
    let contact = world.bus.poll_message().unwrap();
    world
        .server
        .post(world.now, contact.connection, &contact.payload);
    world.refuse.extend([PostError::InvalidConnection; 100]);
    let event = world.wait(|event| matches!(event, Event::ConnectFailed(_)));
    let Event::ConnectFailed(error) = event else {
        panic!()
    };
    assert_eq!(
        error.to_string(),
        "no VMBus: REQUEST_OFFERS could not be posted on connection 0x14: \
         the host has no such message connection"
    );
    at_rest(&mut world.bus);
}

#[test]
fn offers_that_never_end_are_told() {
    let mut world = World::new(Profile::openvmm(), Config::default());
    world
        .server
        .inject(Rule::once(MessageType::ALL_OFFERS_DELIVERED, Fault::Drop));
    world.bus.connect(world.now);
    world.wait(|event| *event == Event::Violation(Violation::OffersOverdue));
    assert_eq!(world.bus.offers().count(), 2);
    assert_eq!(world.bus.deadline(), None);
}

#[test]
fn offers_say_what_the_host_said() {
    for profile in PROFILES {
        let mut world = World::new(profile(), Config::default());
        let device = Device {
            sub_channel_index: 0,
            mmio_megabytes: 12,
            user_data: [7; 120],
            monitor_id: MonitorId::new(9),
            ..Device::new(interface::VIDEO, Guid([5; 16]))
        };
        let channel = world.server.add(device).unwrap();
        world.bus.connect(world.now);
        world.wait(|event| *event == Event::AllOffersDelivered);
        let offer = world
            .bus
            .offers()
            .find(|offer| offer.channel == channel)
            .unwrap()
            .clone();
        assert_eq!(offer.interface_name(), Some("video"));
        assert_eq!(offer.instance, Guid([5; 16]));
        assert_eq!((offer.mmio_megabytes, offer.user_data), (12, [7; 120]));
        assert_eq!(offer.connection, world.server.event_connection(channel));
        assert_eq!(offer.monitor_id, None, "there are no monitor pages");
        assert!(offer.dedicated_interrupt);
        world.assert_clean();
    }
}

const MONITOR: MonitorPages = MonitorPages {
    parent_to_child: PageNumber(0x123),
    child_to_parent: PageNumber(0x10_0456),
};

#[test]
fn hosts_are_given_both_monitor_pages_in_every_version() {
    for profile in PROFILES {
        for version in VERSIONS {
            if !profile().versions.contain(version) {
                continue;
            }
            let mut world = World::new(profile(), Config::default().up_to(version));
            let device = Device {
                monitor_id: MonitorId::new(127),
                ..Device::new(interface::VIDEO, Guid([5; 16]))
            };
            let channel = world.server.add(device).unwrap();
            for pages in [Some(MONITOR), None] {
                world.bus.set_monitor_pages(pages);
                world.bus.connect(world.now);
                world.wait(|event| *event == Event::AllOffersDelivered);
                let contact = world.posted.iter().rev().find_map(|(_, payload)| {
                    InitiateContact::parse(payload).map(|(contact, _)| *contact)
                });
                let contact = contact.unwrap();
                let expected = if pages.is_some() {
                    (0x12_3000, 0x1_0045_6000)
                } else {
                    (0, 0)
                };
                assert_eq!(
                    (
                        contact.parent_to_child_monitor.get(),
                        contact.child_to_parent_monitor.get()
                    ),
                    expected
                );
                let monitors = world.server.profile().monitors;
                assert_eq!(world.server.monitor_pages(), pages.filter(|_| monitors));
                let offer = world.bus.offers().find(|offer| offer.channel == channel);
                let expected = MonitorId::new(127).filter(|_| monitors && pages.is_some());
                assert_eq!(offer.unwrap().monitor_id, expected);
                world.assert_clean();
            }
        }
    }
}

#[test]
fn a_monitor_bit_that_no_page_has_is_a_violation_and_the_channel_is_there() {
    for (monitored, id) in [(true, 127), (true, 128), (true, 255), (false, 255)] {
        let mut world = World::new(Profile::hyper_v(), Config::default());
        world.bus.set_monitor_pages(monitored.then_some(MONITOR));
        world.bus.connect(world.now);
        world.wait(|event| *event == Event::AllOffersDelivered);
        world.events.clear();
        let channel = ChannelId(77);
        let offer = OfferChannel {
            channel: channel.0.into(),
            monitor_id: id,
            monitor_allocated: 1,
            ..OfferChannel::new_zeroed()
        };
        world.bus.receive(world.now, &Payload::new(&offer));
        let offered = world.wait(|event| matches!(event, Event::Offered(_)));
        let Event::Offered(offer) = offered else {
            panic!()
        };
        assert_eq!(offer.monitor_id, MonitorId::new(id).filter(|_| monitored));
        let violation = Violation::BadMonitorId { channel, id };
        assert_eq!(
            world.events.contains(&Event::Violation(violation)),
            monitored && id > 127
        );
    }
}

#[test]
fn offers_come_late_and_for_sub_channels() {
    let mut world = World::new(Profile::hyper_v(), Config::default());
    let late = Device {
        late: true,
        ..Device::new(interface::HEARTBEAT, Guid([1; 16]))
    };
    let late = world.server.add(late).unwrap();
    world.bus.connect(world.now);
    world.wait(|event| *event == Event::AllOffersDelivered);
    let is_offer = |id: ChannelId| move |event: &Event| matches!(event, Event::Offered(offer) if offer.channel == id);
    world.wait(is_offer(late));
    for sub_channel_index in 1..=3 {
        let sub_channel = Device {
            sub_channel_index,
            ..Device::new(interface::SCSI_CONTROLLER, Guid([2; 16]))
        };
        let id = world.server.add(sub_channel).unwrap();
        let Event::Offered(offer) = world.wait(is_offer(id)) else {
            panic!()
        };
        assert_eq!(offer.sub_channel_index, sub_channel_index);
    }
    let ids: Vec<_> = world.bus.offers().map(|offer| offer.channel.0).collect();
    assert_eq!(ids, [1, 2, 3, 4, 5, 6]);
    world.assert_clean();
}

#[test]
fn impossible_offers_are_violations() {
    let mut world = World::connected(Profile::openvmm());
    let offer = |channel: u32| {
        let mut offer = OfferChannel::new_zeroed();
        offer.channel = channel.into();
        Payload::new(&offer)
    };
    for (id, violation) in [
        (0, Violation::BadChannelId(ChannelId(0))),
        (2048, Violation::BadChannelId(ChannelId(2048))),
        (u32::MAX, Violation::BadChannelId(ChannelId(u32::MAX))),
        (1, Violation::DuplicateOffer(ChannelId(1))),
    ] {
        world.bus.receive(world.now, &offer(id));
        assert_eq!(world.bus.poll_event(), Some(Event::Violation(violation)));
    }
    assert_eq!(world.bus.offers().count(), 2);
    let short = offer(9);
    world.bus.receive(world.now, &short[..195]);
    let message = MessageType::OFFER_CHANNEL;
    let violation = Violation::Short { message, len: 195 };
    assert_eq!(world.bus.poll_event(), Some(Event::Violation(violation)));
    world.bus.receive(world.now, &offer(2047));
    assert!(matches!(world.bus.poll_event(), Some(Event::Offered(_))));
}

#[test]
fn violations_that_nobody_fetches_do_not_pile_up() {
    let mut world = World::connected(Profile::openvmm());
    for _ in 0..10_000 {
        world.bus.receive(world.now, &[]);
    }
    assert_eq!(world.bus.violations(), 10_000);
    let waiting = std::iter::from_fn(|| world.bus.poll_event()).count();
    assert!((1..100).contains(&waiting), "{waiting}");
}

#[test]
fn unload_ends_everything() {
    for profile in PROFILES {
        let mut world = World::connected(profile());
        let channel = world.channel(interface::SCSI_CONTROLLER);
        let (ring, result) = world.gpadl(channel, 8);
        assert_eq!(result, Ok(()));
        assert_eq!(world.open(channel, ring), Ok(()));
        // Not posted yet when the end comes.
        world.start_gpadl(channel, 100);
        world.bus.unload(world.now);
        let Event::Unloaded { acknowledged } =
            world.wait(|event| matches!(event, Event::Unloaded { .. }))
        else {
            panic!()
        };
        assert!(acknowledged);
        assert_eq!(world.server.version(), None);
        assert_eq!(world.server.gpadl_count(), 0);
        assert!(world.host_events.contains(&HostEvent::Closed(channel)));
        world.assert_clean();
        at_rest(&mut world.bus);
        world.bus.connect(world.now);
        world.wait(|event| *event == Event::AllOffersDelivered);
    }
}

#[test]
fn an_unload_without_an_answer_ends_too() {
    let mut world = World::connected(Profile::hyper_v());
    world
        .server
        .inject(Rule::once(MessageType::UNLOAD_COMPLETE, Fault::Drop));
    let begin = world.now;
    world.bus.unload(world.now);
    world.wait(|event| {
        *event
            == Event::Unloaded {
                acknowledged: false,
            }
    });
    assert_eq!(world.now, begin + 30 * SECOND);
    at_rest(&mut world.bus);
}

#[test]
fn an_unload_that_cannot_be_posted_ends_too() {
    let mut world = World::connected(Profile::hyper_v());
    world.refuse.push_back(PostError::Busy);
    world.bus.unload(world.now);
    world.wait(|event| {
        *event
            == Event::Unloaded {
                acknowledged: false,
            }
    });
    at_rest(&mut world.bus);
}

#[test]
fn without_a_connection_unload_is_done_at_once() {
    let mut bus = Bus::new(Config::default());
    bus.unload(0);
    assert_eq!(
        bus.poll_event(),
        Some(Event::Unloaded { acknowledged: true })
    );
    bus.connect(0);
    bus.unload(0);
    assert_eq!(
        bus.poll_event(),
        Some(Event::Unloaded { acknowledged: true })
    );
    at_rest(&mut bus);
}

#[test]
fn a_host_that_did_not_confirm_the_end_has_not_confirmed_it_when_the_guest_leaves_again() {
    let mut world = World::connected(Profile::hyper_v());
    world
        .server
        .inject(Rule::once(MessageType::UNLOAD_COMPLETE, Fault::Drop));
    let unconfirmed = Event::Unloaded {
        acknowledged: false,
    };
    world.bus.unload(world.now);
    world.wait(|event| *event == unconfirmed);
    world.bus.unload(world.now);
    assert_eq!(world.bus.poll_event(), Some(unconfirmed.clone()));
    // Contact that was not answered yet has not reset the host for certain, either.
    world.bus.connect(world.now);
    world.bus.unload(world.now);
    assert_eq!(world.bus.poll_event(), Some(unconfirmed));
    world.bus.connect(world.now);
    world.wait(|event| *event == Event::AllOffersDelivered);
    world.bus.unload(world.now);
    world.wait(|event| *event == Event::Unloaded { acknowledged: true });
}

#[test]
fn contact_while_connected_is_a_reset() {
    for profile in PROFILES {
        let mut world = World::connected(profile());
        let channel = world.channel(interface::DYNAMIC_MEMORY);
        let (ring, _) = world.gpadl(channel, 8);
        assert_eq!(world.open(channel, ring), Ok(()));
        world.bus.connect(world.now);
        assert_eq!(world.bus.offers().count(), 0);
        world.wait(|event| *event == Event::AllOffersDelivered);
        assert_eq!(world.bus.offers().count(), 2);
        assert!(!world.server.is_open(channel));
        assert_eq!(world.server.gpadl_count(), 0);
        let (ring, result) = world.gpadl(channel, 8);
        assert_eq!(result, Ok(()));
        assert_eq!(world.open(channel, ring), Ok(()));
        world.assert_clean();
    }
}

/// The kernel before this one crashed: its messages may still be under way.
#[test]
fn what_is_left_of_an_earlier_kernel_does_no_harm() {
    let mut world = World::connected(Profile::openvmm());
    world.server.rescind(ChannelId(1));
    world
        .server
        .add(Device::new(interface::NETWORK, Guid([8; 16])));
    world.bus = Bus::new(Config::default());
    world.bus.connect(world.now);
    world.wait(|event| *event == Event::AllOffersDelivered);
    assert_eq!(world.bus.offers().count(), 2);
    assert!(world.bus.violations() > 0, "the old messages are told");
}

#[test]
fn messages_lost_doubled_and_out_of_order_never_part_guest_and_host() {
    for fault in [Fault::Duplicate, Fault::Swap] {
        for kind in [
            MessageType::OFFER_CHANNEL,
            MessageType::ALL_OFFERS_DELIVERED,
        ] {
            let mut world = World::new(Profile::openvmm(), Config::default());
            world.server.inject(Rule::always(kind, fault));
            world.bus.connect(world.now);
            world.wait(|event| *event == Event::AllOffersDelivered);
            world.rest();
            assert_eq!(world.bus.offers().count(), 2);
        }
    }
}

/// The server itself, where the guest above never goes.
#[test]
fn the_server_is_as_strict_as_the_host_it_imitates() {
    let contact = |version: Version, sint: u8, features: u32| {
        let mut contact = InitiateContact::new_zeroed();
        contact.version = version.0.into();
        contact.target.sint = sint;
        contact.target.features = features.into();
        contact
    };
    let reply = |profile: Profile, on: ConnectionId, payload: &[u8]| -> Option<Message> {
        let mut server = Server::new(profile);
        server.post(0, on, payload);
        server.run(0);
        server.poll_message(0)
    };
    let openvmm = Profile::openvmm;
    let ok = Payload::new(&contact(Version::V5_3, 2, 0));
    let bad = Payload::new(&contact(Version::V5_3, 0, 0));
    assert!(reply(openvmm(), FOUR, &ok).is_some());
    assert!(reply(openvmm(), FOUR, &bad).is_none());
    assert!(reply(openvmm(), ONE, &bad).is_some());
    let short = Payload::new(&contact(Version::V6_0, 2, FeatureFlags::CLIENT_ID.0));
    let mut long = short;
    long.append(&[1; 16]);
    assert!(reply(openvmm(), FOUR, &short).is_none());
    assert_eq!(reply(openvmm(), FOUR, &long).unwrap().payload.len(), 20);
    let mut one_page = contact(Version::V4_0, 0, 0);
    one_page.child_to_parent_monitor = 0x1000.into();
    let answer = reply(openvmm(), ONE, &Payload::new(&one_page)).unwrap();
    assert_eq!(answer.payload[8..10], [1, 2]);
    let answer = reply(
        Profile::qemu(),
        ONE,
        &Payload::new(&contact(Version::V4_0, 0, 0)),
    )
    .unwrap();
    assert_eq!(answer.payload.len(), 16);
    assert_ne!(answer.payload[10..], [0; 6], "padding is garbage");
    assert!(reply(Profile::qemu(), FOUR, &ok).is_none());
}
