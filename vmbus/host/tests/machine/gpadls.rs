//! GPADLs that a driver makes: from every kind of memory, inside callbacks, and given back exactly when the host lets go.

use std::sync::{Arc, Mutex};

use vmbus::hypervisor::Hypervisor;
use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    Channel, ChannelBuilder, EnabledChannel, Gpadl, GpadlAccess, GpadlError, GpadlSource,
    PAGE_SIZE, SharedPages, State,
};
use vmbus::protocol::MessageType;
use vmbus_host::bus::{Access, Fault, Rule};

use crate::support::{INTERFACE, Journal, SECOND, Seen, Vm};

fn open() -> (Vm, ChannelId, EnabledChannel, Journal) {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
    journal.take();
    (vm, id, channel, journal)
}

fn create(vm: &Vm, channel: &Channel, source: GpadlSource) -> Result<Gpadl, GpadlError> {
    let creating = channel.create_gpadl(source, GpadlAccess::ReadWrite)?;
    vm.vmbus.client().block_on(creating).unwrap()
}

fn pages(vm: &Vm, count: usize) -> SharedPages {
    vm.machine.share_pages(count).unwrap()
}

/// What the host finds at the start of a GPADL.
fn seen_by_host(vm: &Vm, id: ChannelId, gpadl: &Gpadl, length: usize) -> Vec<u8> {
    vm.host(id, |host| {
        let mapped = host.map_gpadl(gpadl.handle(), Access::ReadWrite).unwrap();
        let mut bytes = vec![0; length];
        mapped.read(0, &mut bytes).unwrap();
        bytes
    })
}

#[test]
fn memory_of_every_kind_reaches_the_host() {
    let (vm, id, channel, _) = open();
    let channel = channel.channel();
    let memory = pages(&vm, 3);
    memory.write(PAGE_SIZE - 2, &[1, 2, 3, 4]).unwrap();

    let whole = create(&vm, channel, GpadlSource::Pages(memory.clone())).unwrap();
    assert_eq!(
        seen_by_host(&vm, id, &whole, PAGE_SIZE)[PAGE_SIZE - 2..],
        [1, 2]
    );

    let pieces = vec![
        (memory.clone(), PAGE_SIZE - 2..PAGE_SIZE),
        (memory.clone(), PAGE_SIZE..PAGE_SIZE + 2),
    ];
    let pieces = create(&vm, channel, GpadlSource::Pieces(pieces)).unwrap();
    assert_eq!(seen_by_host(&vm, id, &pieces, 4), [1, 2, 3, 4]);

    let numbers = GpadlSource::PageNumbers {
        pages: memory.pages().skip(1).collect(),
        owner: Arc::new(memory.clone()),
    };
    let numbers = create(&vm, channel, numbers).unwrap();
    assert_eq!(seen_by_host(&vm, id, &numbers, 2), [3, 4]);

    let creating = channel.allocate_gpadl(2).unwrap();
    let own = vm.vmbus.client().block_on(creating).unwrap().unwrap();
    own.memory().unwrap().write(0, b"own").unwrap();
    assert_eq!(seen_by_host(&vm, id, &own, 3), *b"own");

    let handles = [&whole, &pieces, &numbers, &own].map(Gpadl::handle);
    assert!((1..4).all(|i| !handles[..i].contains(&handles[i])));
    drop((whole, pieces, numbers, own));
    vm.machine.settle();
    // The rings are left.
    assert_eq!(vm.machine.server(|server| server.gpadl_count()), 1);
    vm.assert_well_behaved();
}

#[test]
fn memory_that_one_range_cannot_describe_is_refused_before_the_host_hears_of_it() {
    let (vm, _, channel, _) = open();
    let channel = channel.channel();
    let memory = pages(&vm, 2);
    for (pieces, error) in [
        (vec![], GpadlError::Length),
        (vec![(memory.clone(), 5..5)], GpadlError::Length),
        (
            vec![(memory.clone(), 0..2 * PAGE_SIZE + 1)],
            GpadlError::Length,
        ),
        (
            vec![
                (memory.clone(), 0..100),
                (memory.clone(), PAGE_SIZE..PAGE_SIZE + 1),
            ],
            GpadlError::NotAligned,
        ),
        (
            vec![
                (memory.clone(), 0..PAGE_SIZE),
                (memory.clone(), 1..PAGE_SIZE),
            ],
            GpadlError::NotAligned,
        ),
    ] {
        let refused = create(&vm, channel, GpadlSource::Pieces(pieces));
        assert_eq!(refused.err(), Some(error));
    }
    let too_many = GpadlSource::PageNumbers {
        pages: memory.pages().cycle().take(8191).collect(),
        owner: Arc::new(()),
    };
    assert_eq!(
        create(&vm, channel, too_many).err(),
        Some(GpadlError::Length)
    );
    assert_eq!(vm.machine.server(|server| server.gpadl_count()), 1);
}

#[test]
fn the_opened_callback_makes_gpadls_and_the_closed_callback_deletes_them() {
    let (vm, id) = Vm::with_device();
    let kept: Arc<Mutex<Option<Gpadl>>> = Arc::default();
    let (made, deleted) = (kept.clone(), kept.clone());
    let channel = ChannelBuilder::new(INTERFACE)
        .opened(move |channel| {
            let creating = channel.allocate_gpadl(4).unwrap();
            let gpadl = channel.client().block_on(creating).unwrap().unwrap();
            *made.lock().unwrap() = Some(gpadl);
            Ok(())
        })
        .closed(move |channel| {
            let gpadl = deleted.lock().unwrap().take().unwrap();
            channel.client().block_on(gpadl.delete()).unwrap();
        })
        .enable(vm.vmbus.client())
        .unwrap();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Active);
    assert_eq!(vm.host(id, |host| host.gpadls().len()), 1);
    channel.disable();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(channel.channel().counters().leaked_gpadls, 0);
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn deleting_waits_while_the_host_has_the_memory_mapped() {
    let (vm, id, channel, _) = open();
    let memory = pages(&vm, 1);
    let gpadl = create(&vm, channel.channel(), GpadlSource::Pages(memory)).unwrap();
    let mapped = vm.host(id, |host| host.map_gpadl(gpadl.handle(), Access::ReadWrite));
    let deleting = gpadl.delete();
    vm.machine.advance(60 * SECOND);
    // The rings, and the memory that nobody but the library holds any more.
    assert_eq!(vm.machine.shared_runs(), 2);
    drop(mapped);
    vm.vmbus.client().block_on(deleting).unwrap();
    assert_eq!(vm.machine.shared_runs(), 1);
    vm.assert_well_behaved();
}

#[test]
fn a_gpadl_left_after_closed_is_reported_and_taken_back() {
    let (vm, _, channel, journal) = open();
    let gpadl = create(&vm, channel.channel(), GpadlSource::Pages(pages(&vm, 1))).unwrap();
    channel.disable();
    vm.machine.settle();
    assert_eq!(journal.take(), [Seen::Suspend, Seen::Closed]);
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(channel.channel().counters().leaked_gpadls, 1);
    // The handle is stale, and deleting it again is harmless.
    vm.vmbus.client().block_on(gpadl.delete()).unwrap();
    assert_eq!(vm.machine.server(|server| server.gpadl_count()), 0);
    vm.assert_well_behaved();
}

#[test]
fn a_rescind_ends_a_creation() {
    let (vm, id, channel, _) = open();
    let memory = pages(&vm, 1);
    let creating = channel
        .channel()
        .create_gpadl(GpadlSource::Pages(memory), GpadlAccess::ReadOnly)
        .unwrap();
    vm.machine.server(|server| {
        server.inject(Rule::once(MessageType::GPADL_CREATED, Fault::Drop));
    });
    vm.machine.settle();
    vm.machine.rescind(id);
    let outcome = vm.vmbus.client().block_on(creating).unwrap();
    assert!(matches!(outcome, Err(GpadlError::Host(_))), "{outcome:?}");
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}

#[test]
fn a_creation_that_nobody_waits_for_is_undone() {
    let (vm, _, channel, _) = open();
    for settle_first in [false, true] {
        let memory = pages(&vm, 1);
        let source = GpadlSource::Pages(memory);
        let creating = channel
            .channel()
            .create_gpadl(source, GpadlAccess::ReadWrite);
        if settle_first {
            vm.machine.settle();
        }
        drop(creating);
        vm.machine.settle();
        assert_eq!(vm.machine.server(|server| server.gpadl_count()), 1);
        assert_eq!(vm.machine.shared_runs(), 1);
    }
    vm.assert_well_behaved();
}

#[test]
fn there_are_no_gpadls_before_opened_and_after_closed() {
    let (vm, _) = Vm::with_device();
    vm.machine.server(|server| {
        server.inject(Rule::once(
            MessageType::OPEN_CHANNEL_RESULT,
            Fault::Delay(SECOND),
        ));
    });
    let channel = vm.enable(&ChannelBuilder::new(INTERFACE));
    let create = || channel.channel().allocate_gpadl(1).err();
    assert_eq!(create(), Some(GpadlError::NotNow(State::Enabled)));
    vm.machine.advance(2 * SECOND);
    assert_eq!(create(), None);
    channel.disable();
    vm.machine.settle();
    assert_eq!(create(), Some(GpadlError::NotNow(State::Disabled)));
}

#[test]
fn unloading_gives_all_memory_back_when_the_host_has_confirmed_it() {
    for confirmed in [true, false] {
        let (vm, _, channel, _) = open();
        let gpadl = create(&vm, channel.channel(), GpadlSource::Pages(pages(&vm, 1))).unwrap();
        let page = gpadl.memory().unwrap().first_page();
        if !confirmed {
            vm.machine.server(|server| {
                server.inject(Rule::always(MessageType::UNLOAD_COMPLETE, Fault::Drop));
            });
        }
        vm.vmbus.begin_unload();
        vm.machine.advance(120 * SECOND);
        drop(gpadl);
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Disabled);
        assert_eq!(vm.machine.memory().was_given_back(page), confirmed);
    }
}
