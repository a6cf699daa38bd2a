//! Defects that EMCL has (spec kmcl.md 4.3) and no other file has a test for. docs/kmcl.md lists all of them.

use std::sync::Arc;

use vmbus::kmcl::{ChannelBuilder, ChannelError, State};
use vmbus::ring::Outgoing;

use crate::support::{INTERFACE, Journal, Seen, Vm, is_active, received};

/// EMCL returns from a bad pipe message without freeing the packet. Here the same channel has as many of them as would use up all
/// places for packets several times over.
#[test]
fn emcl_6_a_bad_pipe_message_gives_its_place_back() {
    let (vm, id) = Vm::with_device();
    let journal = Journal::default();
    let client = vm.vmbus.client();
    let builder = journal
        .builder(|_, packet| packet.complete(&[]))
        .pipe()
        .transaction_quota(1)
        .maximum_packet_count(1);
    let mut disabled = builder.build(client).unwrap();
    let message = |kind: u8| [kind, 0, 0, 0, 8, 0, 0, 0];
    for _ in 0..20 {
        let channel = disabled.enable().unwrap();
        vm.machine.settle();
        vm.host(id, |host| {
            let bad = message(9);
            let bad = Outgoing::in_band([&bad, b"12345678"]);
            host.send(&bad).unwrap();
        });
        vm.machine.settle();
        assert_eq!(channel.channel().state(), State::Disabled);
        let reason = ChannelError::Pipe { kind: 9, length: 8 };
        assert!(journal.take().contains(&Seen::Failure(reason)));
        disabled = client.block_on(channel.into_disabled()).unwrap().unwrap();
    }
    let channel = disabled.enable().unwrap();
    vm.machine.settle();
    for _ in 0..20 {
        vm.host(id, |host| {
            let good = message(1);
            let good = Outgoing::in_band([&good, b"12345678"]);
            host.send(&good).unwrap();
        });
    }
    assert_eq!(channel.channel().counters().packets_received, 20);
    vm.assert_well_behaved();
}

/// In EMCL a receive callback that sends between the opening and its "running" flag trips an assertion. The first packets here
/// are there before delivery begins.
#[test]
fn emcl_7_a_callback_may_send_from_the_very_first_packet_on() {
    let (vm, id) = Vm::with_device();
    let vm = Arc::new(vm);
    let host = Arc::downgrade(&vm);
    let builder = ChannelBuilder::new(INTERFACE)
        .opened(move |channel| {
            channel.send_message(b"opened!!").unwrap();
            host.upgrade().unwrap().send_all(id, [1, 2]);
            Ok(())
        })
        .process_packet(|channel, packet| {
            channel.send_message(packet.payload()).unwrap();
            packet.complete(&[]);
        });
    let channel = vm.enable(&builder);
    assert!(is_active(&channel));
    let payloads: Vec<_> = vm
        .host(id, received)
        .into_iter()
        .map(|(_, payload)| payload)
        .collect();
    let mut expected = vec![b"opened!!".to_vec()];
    expected.extend([1u64, 2].map(|n| n.to_le_bytes().to_vec()));
    expected.sort();
    let mut sorted = payloads.clone();
    sorted.sort();
    assert_eq!(sorted, expected, "each once");
    assert_eq!(payloads[0], b"opened!!", "in order");
    vm.assert_well_behaved();
}

/// EMCL leaves one of its protocols installed when it stops. Here an ended channel leaves nothing that could find it.
#[test]
fn emcl_8_nothing_finds_a_channel_that_has_ended() {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(&ChannelBuilder::new(INTERFACE));
    assert_eq!(vm.vmbus.snapshot().channels.len(), 1);
    channel.disable();
    vm.machine.settle();
    let snapshot = vm.vmbus.snapshot();
    assert!(snapshot.channels.is_empty());
    assert!(snapshot.offers.iter().all(|offer| offer.driver.is_none()));
    let before = channel.channel().counters();
    vm.machine.interrupt(id);
    assert_eq!(vm.vmbus.snapshot().unclaimed_events, 1);
    assert_eq!(channel.channel().counters().batches, before.batches);
    assert_eq!(channel.channel().interface_instance(), None);
}
