//! GPADLs of any length on every host, and everything that can come in between.

use proptest::prelude::*;
use vmbus::bus::{Error, Event, GpaRange, GpadlError, MAX_PAGES, Violation};
use vmbus::hypervisor::PostError;
use vmbus::ids::{ChannelId, GpadlHandle, PageNumber};
use vmbus::protocol::message::GpadlCreated;
use vmbus::protocol::{MessageType, Payload, Status, interface};
use vmbus_host::bus::{Access, Event as HostEvent, Fault, MapError, Profile, Rule};

use crate::world::{PROFILES, SECOND, World, pages};

fn scsi(profile: Profile) -> (World, ChannelId) {
    let world = World::connected(profile);
    let channel = world.channel(interface::SCSI_CONTROLLER);
    (world, channel)
}

fn all_pages(world: &World, handle: GpadlHandle) -> Vec<PageNumber> {
    let ranges = world.server.gpadl(handle).unwrap().iter();
    ranges
        .flat_map(|range| range.pages.iter().copied())
        .collect()
}

#[test]
fn gpadls_of_every_length_arrive_whole() {
    for profile in PROFILES {
        let (mut world, channel) = scsi(profile());
        for (count, bodies) in [(1, 0), (26, 0), (27, 1), (54, 1), (55, 2), (8190, 292)] {
            world.posted.clear();
            let (handle, result) = world.gpadl(channel, count);
            assert_eq!(result, Ok(()), "{count} pages");
            assert_eq!(all_pages(&world, handle), pages(count).collect::<Vec<_>>());
            assert_eq!(world.posted_count(MessageType::GPADL_HEADER), 1);
            assert_eq!(
                world.posted_count(MessageType::GPADL_BODY),
                bodies,
                "{count} pages"
            );
            world.teardown(handle);
        }
        assert_eq!(
            GpaRange::whole_pages(pages(8191)),
            Err(Error::GpadlTooLong { words: 8192 })
        );
        assert_eq!(MAX_PAGES, 8190);
        world.assert_clean();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any ranges, several GPADLs at once: the host sees exactly what was lent.
    #[test]
    fn any_ranges_arrive_whole(
        gpadls in proptest::collection::vec(
            proptest::collection::vec(
                (0u32..4096, proptest::collection::vec(0u64..1 << 40, 1..120)), 1..4),
            1..4)
    ) {
        let (mut world, channel) = scsi(Profile::hyper_v());
        let mut lent = Vec::new();
        for ranges in gpadls {
            let ranges: Vec<GpaRange> = ranges.into_iter().map(|(byte_offset, pages)| GpaRange {
                byte_offset,
                byte_count: pages.len() as u32 * 4096 - byte_offset,
                pages: pages.into_iter().map(PageNumber).collect(),
            }).collect();
            let handle = world.bus.create_gpadl(world.now, channel, &ranges).unwrap();
            lent.push((handle, ranges));
        }
        for (handle, ranges) in lent {
            let created = Event::GpadlCreated { handle, result: Ok(()) };
            world.wait(|event| *event == created);
            let seen = world.server.gpadl(handle).unwrap();
            prop_assert_eq!(seen.len(), ranges.len());
            for (seen, range) in seen.iter().zip(&ranges) {
                prop_assert_eq!(seen.byte_offset, range.byte_offset);
                prop_assert_eq!(seen.byte_count, range.byte_count);
                prop_assert_eq!(&seen.pages, &range.pages);
            }
        }
        world.assert_clean();
    }
}

#[test]
fn a_refused_gpadl_is_told() {
    let (mut world, channel) = scsi(Profile::openvmm());
    world.server.refusals.gpadls = Some(Status(0xC000_009A));
    let (handle, result) = world.gpadl(channel, 100);
    assert_eq!(result, Err(GpadlError::Refused(Status(0xC000_009A))));
    let now = world.now;
    assert_eq!(
        world.bus.teardown_gpadl(now, handle),
        Err(Error::UnknownGpadl(handle))
    );
    world.assert_clean();
}

/// QEMU says nothing about GPADLs that it does not take.
#[test]
fn a_gpadl_that_is_dropped_without_a_word_ends() {
    let (mut world, channel) = scsi(Profile::qemu());
    let range = GpaRange {
        byte_offset: 8,
        byte_count: 100,
        pages: vec![PageNumber(5)],
    };
    let begin = world.now;
    let handle = world
        .bus
        .create_gpadl(world.now, channel, &[range])
        .unwrap();
    let result = Err(GpadlError::NotReleased);
    world.wait(|event| *event == Event::GpadlCreated { handle, result });
    assert_eq!(world.now, begin + 20 * SECOND);
    assert!(!GpadlError::NotReleased.frees_memory());
}

#[test]
fn a_gpadl_whose_answer_is_lost_is_taken_back() {
    let (mut world, channel) = scsi(Profile::openvmm());
    world
        .server
        .inject(Rule::once(MessageType::GPADL_CREATED, Fault::Drop));
    let (_, result) = world.gpadl(channel, 30);
    assert_eq!(result, Err(GpadlError::NoReply));
    assert!(GpadlError::NoReply.frees_memory());
    assert_eq!(world.server.gpadl_count(), 0);
    world.assert_clean();
}

#[test]
fn a_gpadl_whose_answer_is_late_is_taken_back() {
    let (mut world, channel) = scsi(Profile::openvmm());
    world.server.inject(Rule::once(
        MessageType::GPADL_CREATED,
        Fault::Delay(10 * SECOND + 1),
    ));
    world.server.inject(Rule::once(
        MessageType::GPADL_TORNDOWN,
        Fault::Delay(SECOND),
    ));
    let (_, result) = world.gpadl(channel, 30);
    assert_eq!(result, Err(GpadlError::NoReply));
    assert_eq!(world.server.gpadl_count(), 0);
    world.assert_clean();
}

#[test]
fn a_gpadl_that_cannot_be_posted_fails_and_sends_no_more() {
    for refused in 0..4 {
        let (mut world, channel) = scsi(Profile::openvmm());
        world.posted.clear();
        let handle = world.start_gpadl(channel, 100);
        for _ in 0..refused {
            let outgoing = world.bus.poll_message().unwrap();
            world
                .server
                .post(world.now, outgoing.connection, &outgoing.payload);
        }
        world.refuse.push_back(PostError::Busy);
        let result = Err(GpadlError::Post(PostError::Busy));
        world.wait(|event| *event == Event::GpadlCreated { handle, result });
        assert_eq!(world.posted.len(), 1, "only the refused one");
        let (_, result) = world.gpadl(channel, 100);
        assert_eq!(result, Ok(()), "another one is not disturbed");
    }
}

#[test]
fn a_gpadl_can_be_unwanted_before_it_exists() {
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
            world.teardown(handle);
            let created = |event: &Event| matches!(event, Event::GpadlCreated { .. });
            assert!(!world.events.iter().any(created), "it ends once");
            assert_eq!(world.server.gpadl_count(), 0);
            world.assert_clean();
        }
    }
}

#[test]
fn memory_that_the_host_keeps_stays_lent() {
    let (mut world, channel) = scsi(Profile::openvmm());
    let (handle, _) = world.gpadl(channel, 4);
    world.server.inject(Rule::once(
        MessageType::GPADL_TORNDOWN,
        Fault::Delay(100 * SECOND),
    ));
    let begin = world.now;
    world.bus.teardown_gpadl(world.now, handle).unwrap();
    let overdue = Event::Violation(Violation::TeardownOverdue(handle));
    world.wait(|event| *event == overdue);
    assert_eq!(world.now, begin + 10 * SECOND);
    let now = world.now;
    assert_eq!(
        world.bus.teardown_gpadl(now, handle),
        Err(Error::BadGpadl(handle))
    );
    world.wait(|event| *event == Event::GpadlTornDown(handle));
    assert_eq!(world.now, begin + 100 * SECOND);
    assert!(!world.events.contains(&overdue), "it is told once");
}

#[test]
fn answers_that_nobody_asked_for_are_violations() {
    let (mut world, channel) = scsi(Profile::openvmm());
    let (handle, _) = world.gpadl(channel, 4);
    world
        .server
        .inject(Rule::always(MessageType::GPADL_CREATED, Fault::Duplicate));
    world
        .server
        .inject(Rule::always(MessageType::GPADL_TORNDOWN, Fault::Duplicate));
    let (second, result) = world.gpadl(channel, 4);
    assert_eq!(result, Ok(()));
    world.teardown(second);
    world.settle();
    let violations: Vec<_> = world
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Violation(violation) => Some(violation.to_string()),
            _ => None,
        })
        .collect();
    let handle_text = second.to_string();
    assert_eq!(
        violations,
        [
            format!("GPADL_CREATED does not fit the state of GPADL {handle_text}"),
            format!("GPADL_TORNDOWN for GPADL {handle_text}, which does not exist"),
        ]
    );
    // The other one is unharmed.
    assert_eq!(all_pages(&world, handle).len(), 4);
    world.teardown(handle);
}

#[test]
fn success_before_the_last_body_is_a_violation() {
    let (mut world, channel) = scsi(Profile::openvmm());
    let handle = world.start_gpadl(channel, 100);
    let first = world.bus.poll_message().unwrap();
    let created = Payload::new(&GpadlCreated {
        channel: channel.0.into(),
        gpadl: handle.0.into(),
        status: 0.into(),
    });
    world.bus.receive(world.now, &created);
    assert_eq!(world.bus.violations(), 1);
    world
        .server
        .post(world.now, first.connection, &first.payload);
    world.wait(|event| {
        *event
            == Event::GpadlCreated {
                handle,
                result: Ok(()),
            }
    });
    assert!(
        !world
            .host_events
            .iter()
            .any(|event| matches!(event, HostEvent::Dropped { .. }))
    );
}

#[test]
fn a_gpadl_that_is_gone_is_not_posted_again() {
    let (mut world, channel) = scsi(Profile::openvmm());
    let handle = world.start_gpadl(channel, 100);
    world.bus.poll_message().unwrap();
    let refused = Payload::new(&GpadlCreated {
        channel: channel.0.into(),
        gpadl: handle.0.into(),
        status: 1.into(),
    });
    world.bus.receive(world.now, &refused);
    world
        .bus
        .message_refused(world.now, PostError::InvalidConnection);
    let result = Err(GpadlError::Refused(Status(1)));
    assert_eq!(
        world.bus.poll_event(),
        Some(Event::GpadlCreated { handle, result })
    );
    world.rest();
    assert_eq!(world.posted_count(MessageType::GPADL_HEADER), 0);
    assert_eq!(world.posted_count(MessageType::GPADL_BODY), 0);
}

/// Delete blocks while the server has it mapped (spec kmcl.md 1.10).
#[test]
fn memory_that_the_host_has_mapped_stays_lent_until_it_is_unmapped() {
    for profile in PROFILES {
        let (mut world, channel) = scsi(profile());
        let (handle, _) = world.gpadl(channel, 4);
        let gpadls = world.server.gpadls().clone();
        let mapped = gpadls.map(channel, handle, Access::ReadWrite).unwrap();
        let pages: Vec<_> = mapped
            .ranges()
            .iter()
            .flat_map(|range| &range.pages)
            .collect();
        assert_eq!(pages, all_pages(&world, handle).iter().collect::<Vec<_>>());
        let again = gpadls.map(channel, handle, Access::Read);
        assert_eq!(again.unwrap_err(), MapError::Mapped(handle));
        let now = world.now;
        world.bus.teardown_gpadl(now, handle).unwrap();
        world.rest();
        assert!(!world.events.contains(&Event::GpadlTornDown(handle)));
        assert!(!mapped.is_revoked());
        drop(mapped);
        world.wait(|event| *event == Event::GpadlTornDown(handle));
        assert_eq!(
            gpadls.map(channel, handle, Access::Read).unwrap_err(),
            MapError::Unknown(handle)
        );
        assert_eq!(world.server.gpadl_count(), 0);
    }
}

#[test]
fn a_rescind_takes_mapped_memory_from_the_host() {
    for profile in PROFILES {
        let (mut world, channel) = scsi(profile());
        let other = world.channel(interface::DYNAMIC_MEMORY);
        let (handle, _) = world.gpadl(channel, 4);
        let gpadls = world.server.gpadls().clone();
        assert_eq!(
            gpadls.map(other, handle, Access::Read).unwrap_err(),
            MapError::Unknown(handle),
            "a GPADL is its channel's"
        );
        let mapped = gpadls.map(channel, handle, Access::Read).unwrap();
        world.server.rescind(channel);
        world.wait(|event| *event == Event::Rescinded(channel));
        assert!(mapped.is_revoked());
        world.teardown(handle);
        world.bus.release(channel).unwrap();
        world.settle();
        world.assert_clean();
    }
}

/// A channel can have many, each with its own life.
#[test]
fn gpadls_of_one_channel_come_and_go_in_any_order() {
    for profile in PROFILES {
        let (mut world, channel) = scsi(profile());
        let handles: Vec<_> = (1..20).map(|i| world.start_gpadl(channel, 5 * i)).collect();
        for &handle in &handles {
            let result = Ok(());
            world.wait(|event| *event == Event::GpadlCreated { handle, result });
        }
        assert_eq!(world.server.gpadls().of_channel(channel), handles);
        for &handle in handles
            .iter()
            .step_by(2)
            .chain(handles.iter().skip(1).step_by(2).rev())
        {
            let mapped = world.server.gpadls().map(channel, handle, Access::Read);
            assert_eq!(mapped.unwrap().ranges().len(), 1);
            world.teardown(handle);
        }
        world.assert_clean();
    }
}
