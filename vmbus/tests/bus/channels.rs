//! Opening, closing, target VPs and rescinds.

use vmbus::bus::{
    Error, Event, GpadlError, ModifyError, NO_INTERRUPTS, OpenError, OpenParameters, Violation,
};
use vmbus::hypervisor::PostError;
use vmbus::ids::{ChannelId, GpadlHandle, VpIndex};
use vmbus::protocol::message::{OpenChannel, OpenChannelResult};
use vmbus::protocol::{Body, Guid, MessageType, Payload, Status, Version, interface};
use vmbus_host::bus::{Device, Event as HostEvent, Fault, Profile, Rule};

use crate::world::{PROFILES, SECOND, World, parameters};

fn scsi(profile: Profile) -> (World, ChannelId) {
    let world = World::connected(profile);
    let channel = world.channel(interface::SCSI_CONTROLLER);
    (world, channel)
}

fn with_ring(profile: Profile) -> (World, ChannelId, GpadlHandle) {
    let (mut world, channel) = scsi(profile);
    let (ring, result) = world.gpadl(channel, 8);
    assert_eq!(result, Ok(()));
    (world, channel, ring)
}

#[test]
fn open_close_and_open_again() {
    for profile in PROFILES {
        let (mut world, channel) = scsi(profile());
        for _ in 0..3 {
            let (ring, result) = world.gpadl(channel, 8);
            assert_eq!(result, Ok(()));
            let mut parameters = parameters(ring);
            parameters.user_data[0] = 42;
            world.bus.open(world.now, channel, &parameters).unwrap();
            assert_eq!(world.opened(channel), Ok(()));
            assert!(world.server.is_open(channel));
            let opening = world
                .host_events
                .iter()
                .rev()
                .find_map(|event| match event {
                    HostEvent::Opening(opening) => Some(opening),
                    _ => None,
                });
            let opening = opening.unwrap();
            assert_eq!(opening.pages, crate::world::pages(8).collect::<Vec<_>>());
            assert_eq!((opening.downstream_page, opening.user_data[0]), (4, 42));
            let now = world.now;
            assert_eq!(
                world.bus.teardown_gpadl(now, ring),
                Err(Error::GpadlInUse(ring))
            );
            world.bus.close(channel).unwrap();
            world.teardown(ring);
            assert!(!world.server.is_open(channel));
            assert_eq!(world.server.gpadl_count(), 0);
        }
        world.assert_clean();
        assert_eq!(world.now, 1000);
    }
}

#[test]
fn a_refused_opening_can_be_tried_again() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    world.open_status = Some(Status(0xC000_0001));
    assert_eq!(
        world.open(channel, ring),
        Err(OpenError::Refused(Status(0xC000_0001)))
    );
    world.open_status = Some(Status::SUCCESS);
    assert_eq!(world.open(channel, ring), Ok(()));
    world.assert_clean();
}

#[test]
fn impossible_openings_are_refused() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    let other = world.channel(interface::DYNAMIC_MEMORY);
    let now = world.now;
    let mut open = |channel, ring, downstream_page| {
        let parameters = OpenParameters {
            downstream_page,
            ..parameters(ring)
        };
        world.bus.open(now, channel, &parameters).unwrap_err()
    };
    assert_eq!(
        open(ChannelId(99), ring, 4),
        Error::UnknownChannel(ChannelId(99))
    );
    assert_eq!(
        open(channel, GpadlHandle(99), 4),
        Error::UnknownGpadl(GpadlHandle(99))
    );
    assert_eq!(open(other, ring, 4), Error::BadGpadl(ring));
    for page in [0, 1, 7, 8, u32::MAX] {
        assert_eq!(open(channel, ring, page), Error::BadRing);
    }
    assert_eq!(world.bus.close(channel), Err(Error::NotOpen(channel)));
    let fresh = world.start_gpadl(channel, 8);
    assert_eq!(
        world.bus.open(now, channel, &parameters(fresh)),
        Err(Error::BadGpadl(fresh)),
        "the host has not taken it yet"
    );
    assert_eq!(world.open(channel, ring), Ok(()));
    assert_eq!(
        world.bus.open(now, channel, &parameters(ring)),
        Err(Error::NotClosed(channel))
    );
    world.assert_clean();
}

#[test]
fn an_opening_without_an_answer_ends_and_is_undone_later() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    world.open_status = None;
    let begin = world.now;
    assert_eq!(world.open(channel, ring), Err(OpenError::NoReply));
    assert_eq!(world.now, begin + 10 * SECOND);
    // The host wakes up and opens it.
    world.server.finish_open(channel, Status::SUCCESS);
    world.settle();
    assert!(
        !world.server.is_open(channel),
        "the guest closes what it does not want any more"
    );
    assert_eq!(world.bus.violations(), 0);
    world.teardown(ring);
}

#[test]
fn an_opening_can_be_cancelled() {
    for status in [Status::SUCCESS, Status(1)] {
        let (mut world, channel, ring) = with_ring(Profile::openvmm());
        world.open_status = None;
        world
            .bus
            .open(world.now, channel, &parameters(ring))
            .unwrap();
        world.settle();
        world.bus.close(channel).unwrap();
        assert_eq!(world.bus.close(channel), Err(Error::NotOpen(channel)));
        let now = world.now;
        assert_eq!(
            world.bus.teardown_gpadl(now, ring),
            Err(Error::GpadlInUse(ring))
        );
        world.server.finish_open(channel, status);
        assert_eq!(world.opened(channel), Err(OpenError::Cancelled));
        world.teardown(ring);
        assert!(!world.server.is_open(channel));
        world.assert_clean();
    }
}

#[test]
fn an_opening_that_cannot_be_posted_fails() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    world.refuse.push_back(PostError::Busy);
    assert_eq!(
        world.open(channel, ring),
        Err(OpenError::Post(PostError::Busy))
    );
    assert_eq!(world.open(channel, ring), Ok(()));
}

#[test]
fn the_target_vp_can_be_changed_from_4_1() {
    for version in [
        Version::V4_0,
        Version::V4_1,
        Version::V5_2,
        Version::V5_3,
        Version::V6_0,
    ] {
        let (mut world, channel, ring) = with_ring(Profile::hyper_v_up_to(version));
        let now = world.now;
        let target_vp = VpIndex(1);
        if version < Version::V4_1 {
            let error = world
                .bus
                .modify_target_vp(now, channel, target_vp)
                .unwrap_err();
            assert_eq!(error, Error::NeedsVersion(Version::V4_1));
            continue;
        }
        let closed = world.bus.modify_target_vp(now, channel, target_vp);
        assert_eq!(closed, Err(Error::NotOpen(channel)));
        assert_eq!(world.open(channel, ring), Ok(()));
        let none = world.bus.modify_target_vp(now, channel, NO_INTERRUPTS);
        assert_eq!(none, Err(Error::CannotModify(channel)));
        world.bus.modify_target_vp(now, channel, target_vp).unwrap();
        if version >= Version::V5_3 {
            let second = world.bus.modify_target_vp(now, channel, VpIndex(2));
            assert_eq!(
                second,
                Err(Error::CannotModify(channel)),
                "one after the other"
            );
        }
        world.wait(|event| {
            *event
                == Event::TargetVpModified {
                    channel,
                    target_vp,
                    result: Ok(()),
                }
        });
        world.settle();
        assert!(
            world
                .host_events
                .contains(&HostEvent::TargetVp { channel, target_vp })
        );
        world.assert_clean();
    }
}

#[test]
fn a_target_vp_that_is_not_changed_is_told() {
    let (mut world, channel, ring) = with_ring(Profile::hyper_v());
    assert_eq!(world.open(channel, ring), Ok(()));
    let target_vp = VpIndex(1);
    let modify = |world: &mut World| {
        world
            .bus
            .modify_target_vp(world.now, channel, target_vp)
            .unwrap();
        match world.wait(|event| matches!(event, Event::TargetVpModified { .. })) {
            Event::TargetVpModified { result, .. } => result.unwrap_err(),
            _ => unreachable!(),
        }
    };
    world.server.refusals.modify = Some(Status(5));
    assert_eq!(modify(&mut world), ModifyError::Refused(Status(5)));
    world
        .server
        .inject(Rule::once(MessageType::MODIFY_CHANNEL, Fault::Drop));
    assert_eq!(modify(&mut world), ModifyError::NoReply);
    world.refuse.push_back(PostError::Busy);
    assert_eq!(modify(&mut world), ModifyError::Post(PostError::Busy));
}

#[test]
fn a_target_vp_that_was_reported_too_early_is_told() {
    let (mut world, channel, ring) = with_ring(Profile::hyper_v_up_to(Version::V4_1));
    assert_eq!(world.open(channel, ring), Ok(()));
    world.refuse.push_back(PostError::Busy);
    world
        .bus
        .modify_target_vp(world.now, channel, VpIndex(1))
        .unwrap();
    let (message, error) = (MessageType::MODIFY_CHANNEL, PostError::Busy);
    let violation = Violation::NotPosted { message, error };
    world.wait(|event| *event == Event::Violation(violation));
}

#[test]
fn a_channel_opened_without_interrupts_stays_so() {
    let (mut world, channel, ring) = with_ring(Profile::hyper_v());
    let parameters = OpenParameters {
        target_vp: NO_INTERRUPTS,
        ..parameters(ring)
    };
    world.bus.open(world.now, channel, &parameters).unwrap();
    assert_eq!(world.opened(channel), Ok(()));
    let error = world.bus.modify_target_vp(world.now, channel, VpIndex(0));
    assert_eq!(error, Err(Error::CannotModify(channel)));
}

/// Does what a guest owes to the host after a rescind, and sees that the number is free again.
fn retire(world: &mut World, channel: ChannelId, gpadls: &[GpadlHandle]) {
    world.wait(|event| *event == Event::Rescinded(channel));
    assert!(world.bus.offers().all(|offer| offer.channel != channel));
    let _ = world.bus.close(channel);
    for &gpadl in gpadls {
        assert_eq!(world.bus.release(channel), Err(Error::GpadlsLeft(channel)));
        world.teardown(gpadl);
    }
    world.bus.release(channel).unwrap();
    assert_eq!(
        world.bus.release(channel),
        Err(Error::UnknownChannel(channel))
    );
    world.settle();
    assert_eq!(world.server.gpadl_count(), 0);
    assert_eq!(world.posted_count(MessageType::RELID_RELEASED), 1);
    world.assert_clean();
    if world.server.profile().relid_released {
        assert!(world.host_events.contains(&HostEvent::Released(channel)));
        let again = world
            .server
            .add(Device::new(interface::SCSI_CONTROLLER, Guid([3; 16])));
        assert_eq!(again, Some(channel), "the number is used again");
        world.wait(|event| matches!(event, Event::Offered(offer) if offer.channel == channel));
        let (ring, result) = world.gpadl(channel, 8);
        assert_eq!(result, Ok(()));
        assert_eq!(world.open(channel, ring), Ok(()));
        world.assert_clean();
    }
}

#[test]
fn rescind_of_a_channel_that_is_not_used() {
    for profile in PROFILES {
        let (mut world, channel) = scsi(profile());
        assert_eq!(
            world.bus.release(channel),
            Err(Error::NotRescinded(channel))
        );
        assert!(world.server.rescind(channel));
        retire(&mut world, channel, &[]);
    }
}

#[test]
fn rescind_of_a_channel_with_gpadls() {
    for profile in PROFILES {
        let (mut world, channel, ring) = with_ring(profile());
        let (second, _) = world.gpadl(channel, 200);
        world.server.rescind(channel);
        retire(&mut world, channel, &[ring, second]);
    }
}

#[test]
fn rescind_of_an_open_channel() {
    for profile in PROFILES {
        let (mut world, channel, ring) = with_ring(profile());
        assert_eq!(world.open(channel, ring), Ok(()));
        world.server.rescind(channel);
        world.settle();
        assert_eq!(world.bus.release(channel), Err(Error::NotClosed(channel)));
        retire(&mut world, channel, &[ring]);
    }
}

#[test]
fn rescind_of_a_closed_channel() {
    for profile in PROFILES {
        let (mut world, channel, ring) = with_ring(profile());
        assert_eq!(world.open(channel, ring), Ok(()));
        world.bus.close(channel).unwrap();
        world.settle();
        world.server.rescind(channel);
        retire(&mut world, channel, &[ring]);
    }
}

#[test]
fn rescind_of_a_channel_whose_vp_is_being_changed() {
    let (mut world, channel, ring) = with_ring(Profile::hyper_v());
    assert_eq!(world.open(channel, ring), Ok(()));
    world
        .server
        .inject(Rule::once(MessageType::MODIFY_CHANNEL, Fault::Drop));
    world
        .bus
        .modify_target_vp(world.now, channel, VpIndex(1))
        .unwrap();
    world.settle();
    world.server.rescind(channel);
    let result = Err(ModifyError::Closed);
    world.wait(|event| {
        *event
            == Event::TargetVpModified {
                channel,
                target_vp: VpIndex(1),
                result,
            }
    });
    retire(&mut world, channel, &[ring]);
}

#[test]
fn rescind_during_an_opening() {
    for profile in PROFILES {
        // Once before the host has seen OPEN_CHANNEL, once before it has answered.
        for seen in [false, true] {
            let (mut world, channel, ring) = with_ring(profile());
            world.open_status = None;
            world
                .bus
                .open(world.now, channel, &parameters(ring))
                .unwrap();
            if seen {
                world.settle();
            }
            world.server.rescind(channel);
            assert_eq!(world.opened(channel), Err(OpenError::Rescinded));
            world.server.finish_open(channel, Status::SUCCESS);
            world.settle();
            assert!(!world.server.is_open(channel));
            // What crossed the rescind is dropped by the host.
            let dropped = |event: &HostEvent| matches!(event, HostEvent::Dropped { .. });
            world.host_events.retain(|event| !dropped(event));
            world.open_status = Some(Status::SUCCESS);
            retire(&mut world, channel, &[ring]);
        }
    }
}

/// The host's answer and its rescind cross the guest's wish to stop.
#[test]
fn rescind_right_after_an_opening_was_granted() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    world.open_status = None;
    world
        .bus
        .open(world.now, channel, &parameters(ring))
        .unwrap();
    world.settle();
    // The rescind overtakes the result.
    world
        .server
        .inject(Rule::once(MessageType::OPEN_CHANNEL_RESULT, Fault::Swap));
    world.server.finish_open(channel, Status::SUCCESS);
    world.server.rescind(channel);
    assert_eq!(world.opened(channel), Err(OpenError::Rescinded));
    world.settle();
    assert!(!world.server.is_open(channel));
    assert_eq!(world.bus.violations(), 0);
    let dropped = |event: &HostEvent| matches!(event, HostEvent::Dropped { .. });
    world.host_events.retain(|event| !dropped(event));
    world.open_status = Some(Status::SUCCESS);
    retire(&mut world, channel, &[ring]);
}

#[test]
fn rescind_while_a_gpadl_is_created() {
    for profile in PROFILES {
        for posted in 0..5 {
            let (mut world, channel) = scsi(profile());
            let handle = world.start_gpadl(channel, 100);
            for _ in 0..posted {
                if let Some(outgoing) = world.bus.poll_message() {
                    world
                        .server
                        .post(world.now, outgoing.connection, &outgoing.payload);
                    world.server.run(world.now);
                }
            }
            // The rescind overtakes GPADL_CREATED, if that is under way.
            world
                .server
                .inject(Rule::once(MessageType::GPADL_CREATED, Fault::Delay(1)));
            world.server.rescind(channel);
            let event = world.wait(|event| matches!(event, Event::GpadlCreated { .. }));
            let created = Event::GpadlCreated {
                handle,
                result: Ok(()),
            };
            let failed = Event::GpadlCreated {
                handle,
                result: Err(GpadlError::Rescinded),
            };
            let dropped = |event: &HostEvent| matches!(event, HostEvent::Dropped { .. });
            world.host_events.retain(|event| !dropped(event));
            if event == created {
                retire(&mut world, channel, &[handle]);
            } else {
                assert_eq!(event, failed);
                retire(&mut world, channel, &[]);
            }
        }
    }
}

#[test]
fn rescind_while_a_gpadl_is_torn_down() {
    for profile in PROFILES {
        let (mut world, channel, ring) = with_ring(profile());
        world
            .server
            .inject(Rule::once(MessageType::GPADL_TEARDOWN, Fault::Drop));
        world.bus.teardown_gpadl(world.now, ring).unwrap();
        world.settle();
        world.server.rescind(channel);
        world.settle();
        assert_eq!(world.bus.release(channel), Err(Error::GpadlsLeft(channel)));
        // The host never saw GPADL_TEARDOWN: only the time-out ends it.
        world.wait(|event| *event == Event::GpadlTornDown(ring));
        world.bus.release(channel).unwrap();
    }
}

#[test]
fn a_rescinded_channel_takes_nothing_new() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    world.server.rescind(channel);
    world.settle();
    let now = world.now;
    assert_eq!(
        world.bus.open(now, channel, &parameters(ring)),
        Err(Error::Rescinded(channel))
    );
    let range = vmbus::bus::GpaRange::whole_pages(crate::world::pages(1)).unwrap();
    assert_eq!(
        world.bus.create_gpadl(now, channel, &[range]),
        Err(Error::Rescinded(channel))
    );
    assert_eq!(world.bus.violations(), 0);
    assert!(!world.server.rescind(channel), "there is no second rescind");
}

/// The answer to an opening that was given up does not count for the next one.
#[test]
fn answers_are_told_apart_by_their_open_id() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    let mut posted = Vec::new();
    for attempt in 0..2 {
        world
            .bus
            .open(world.now, channel, &parameters(ring))
            .unwrap();
        let open = world.bus.poll_message().unwrap().payload;
        posted.push(OpenChannel::parse(&open).unwrap().0.open_id);
        if attempt == 0 {
            world.now = world.bus.deadline().unwrap();
            world.bus.tick(world.now);
            let result = Err(OpenError::NoReply);
            assert_eq!(
                world.bus.poll_event(),
                Some(Event::Opened { channel, result })
            );
            let close = world.bus.poll_message().unwrap().payload;
            assert_eq!(close.message_type(), MessageType::CLOSE_CHANNEL);
        }
    }
    let result = |open_id| {
        Payload::new(&OpenChannelResult {
            channel: channel.0.into(),
            open_id,
            status: 0.into(),
        })
    };
    world.bus.receive(world.now, &result(posted[0]));
    assert_eq!(world.bus.poll_event(), None, "late, and no violation");
    world.bus.receive(world.now, &result(77.into()));
    assert_eq!(world.bus.violations(), 1, "never asked for");
    world.bus.poll_event().unwrap();
    world.bus.receive(world.now, &result(posted[1]));
    assert_eq!(
        world.bus.poll_event(),
        Some(Event::Opened {
            channel,
            result: Ok(())
        })
    );
    assert_eq!(world.bus.poll_message(), None);
}

#[test]
fn rescind_ends_the_wait_for_an_overdue_teardown() {
    let (mut world, channel, ring) = with_ring(Profile::openvmm());
    world
        .server
        .inject(Rule::once(MessageType::GPADL_TEARDOWN, Fault::Drop));
    world.bus.teardown_gpadl(world.now, ring).unwrap();
    world.wait(|event| *event == Event::Violation(Violation::TeardownOverdue(ring)));
    assert_eq!(world.bus.deadline(), None);
    world.server.rescind(channel);
    world.wait(|event| *event == Event::GpadlTornDown(ring));
    world.bus.release(channel).unwrap();
}
