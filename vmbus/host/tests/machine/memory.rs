//! Memory that the guest lends, as the host reaches it: in packets and as GPADLs; and interrupts on the VP that was asked for.

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use vmbus::hypervisor::Hypervisor;
use vmbus::ids::{PAGE_SIZE, VpIndex};
use vmbus::kmcl::{ExternalData, SendFlags, State};
use vmbus::protocol::MessageType;
use vmbus_host::bus::{Access, Device, Fault, Profile, Rule};
use vmbus_host::memory::AccessError;
use vmbus_host::provider::Manual;

use crate::support::{INSTANCE, INTERFACE, Journal, SECOND, Vm, is_active};

#[test]
fn the_host_reads_and_writes_the_memory_of_a_packet_until_it_completes_it() {
    let (vm, id) = Vm::with_device();
    let builder = Journal::default().builder(|_, packet| packet.complete(&[]));
    let channel = vm.enable(&builder.maximum_external_data(8192, 2));
    let pages = vm.machine.share_pages(2).unwrap();
    pages.write(4000, b"from the guest").unwrap();
    let mut external = ExternalData::new();
    external.push(pages.clone(), 4000..4200).unwrap();
    external.push(pages.clone(), 0..8).unwrap();
    let back = Arc::new(Mutex::new(None));
    let taken = back.clone();
    let mut packet = channel.channel().allocate_packet().unwrap();
    packet.set_completion_routine(Arc::new(
        move |mut packet: vmbus::kmcl::OutgoingPacket, result: Result<&[u8], _>| {
            *taken.lock().unwrap() =
                Some((packet.take_external_data(), result.map(<[u8]>::to_vec)));
        },
    ));
    packet
        .send_with_external_data(b"look", external, SendFlags::default())
        .unwrap();
    drop(pages);

    let packets = vm.host(id, |host| host.receive_all().unwrap());
    let [packet] = &packets[..] else {
        panic!("{packets:?}")
    };
    let lent = packet.external.as_ref().unwrap();
    assert_eq!((lent.len(), lent.ranges().len()), (208, 2));
    assert_eq!(&lent.to_vec().unwrap()[..14], b"from the guest");
    lent.write(90, b"from the host").unwrap();
    assert_eq!(lent.write(200, &[0; 9]), Err(AccessError::OutOfBounds));
    let id_of_it = packet.transaction.unwrap();
    vm.host(id, |host| host.complete(id_of_it, b"done").unwrap());
    vm.machine.settle();
    let (external, result) = back.lock().unwrap().take().unwrap();
    assert_eq!(&result.unwrap()[..4], b"done");
    assert_eq!(&lent.to_vec().unwrap()[90..103], b"from the host");
    drop(external);
    assert!(matches!(lent.to_vec(), Err(AccessError::NotShared(_))));
    drop(channel);
    vm.machine.settle();
    assert_eq!(lent.to_vec(), Err(AccessError::Revoked));
    vm.assert_well_behaved();
}

#[test]
fn interrupts_come_on_the_target_vp() {
    for vp in [0, 1, 7].map(VpIndex) {
        let (vm, id) = Vm::with_device();
        let machine = vm.machine.clone();
        let seen = Arc::new(Mutex::new(None));
        let note = seen.clone();
        let builder = Journal::default().builder(move |_, packet| {
            *note.lock().unwrap() = Some(machine.current_vp());
            packet.complete(&[]);
        });
        let channel = vm.enable(&builder.target_vp(vp));
        assert!(is_active(&channel));
        vm.send(id, b"hello");
        assert_eq!(*seen.lock().unwrap(), Some(vp));
        assert_eq!(vm.machine.interrupted_vp(id), Some(vp));
        assert_eq!(vm.machine.current_vp(), VpIndex(0));
        vm.assert_well_behaved();
    }
}

/// What a driver lends for longer than a packet (spec kmcl.md 1.10).
#[test]
fn the_host_maps_a_gpadl_and_the_guest_gets_it_back_when_it_is_unmapped() {
    for profile in [Profile::openvmm(), Profile::hyper_v(), Profile::qemu()] {
        let vm = Vm::new(profile);
        let id = vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
        let id = id.unwrap();
        vm.connect();
        let channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
        let client = vm.vmbus.client();
        let gpadl = channel.channel().allocate_gpadl(3).unwrap();
        let gpadl = client.block_on(gpadl).unwrap().unwrap();
        let memory = gpadl.memory().unwrap().clone();
        let runs = vm.machine.shared_runs();
        let handles = vm.host(id, |host| host.gpadls());
        assert_eq!(handles, [gpadl.handle()]);

        let mapped = vm.host(id, |host| host.map_gpadl(gpadl.handle(), Access::ReadWrite));
        let mapped = mapped.unwrap();
        assert_eq!(mapped.len(), 3 * PAGE_SIZE);
        mapped.write(PAGE_SIZE - 2, b"host").unwrap();
        let mut bytes = [0; 4];
        memory.read(PAGE_SIZE - 2, &mut bytes).unwrap();
        assert_eq!(&bytes, b"host");
        drop(memory);

        let mut gone = Box::pin(gpadl.delete());
        let mut context = Context::from_waker(Waker::noop());
        vm.machine.settle();
        vm.machine.advance(100 * SECOND);
        assert!(
            gone.as_mut().poll(&mut context).is_pending(),
            "it is mapped"
        );
        assert_eq!(vm.machine.shared_runs(), runs);
        mapped.read(0, &mut bytes).unwrap();
        drop(mapped);
        vm.machine.settle();
        assert!(gone.as_mut().poll(&mut context).is_ready());
        drop(gone);
        assert_eq!(vm.machine.shared_runs(), runs - 1);
        vm.assert_well_behaved();
    }
}

#[test]
fn a_mapping_for_reading_does_not_write() {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(&Journal::default().builder(|_, packet| packet.complete(&[])));
    let gpadl = channel.channel().allocate_gpadl(1).unwrap();
    let gpadl = vm.vmbus.client().block_on(gpadl).unwrap().unwrap();
    let mapped = vm.host(id, |host| host.map_gpadl(gpadl.handle(), Access::Read));
    let mapped = mapped.unwrap();
    assert_eq!(mapped.write(0, &[1]), Err(AccessError::ReadOnly));
    assert_eq!(mapped.read(4096, &mut [0]), Err(AccessError::OutOfBounds));
    vm.machine.rescind(id);
    assert_eq!(mapped.read(0, &mut [0]), Err(AccessError::Revoked));
    vm.machine.advance(20 * SECOND);
    assert_eq!(channel.channel().state(), State::Disabled);
    drop(gpadl);
}

/// The host answers late, or never: the driver is told, and no memory is given back too early.
#[test]
fn a_gpadl_whose_channel_goes_meanwhile_ends() {
    for profile in [Profile::openvmm(), Profile::hyper_v()] {
        for message in [MessageType::GPADL_CREATED, MessageType::GPADL_TORNDOWN] {
            for fault in [Fault::Drop, Fault::Delay(SECOND)] {
                let vm = Vm::new(profile.clone());
                let id = vm.machine.add(Device::new(INTERFACE, INSTANCE), Manual);
                let id = id.unwrap();
                vm.connect();
                let journal = Journal::default();
                let channel = vm.enable(&journal.builder(|_, packet| packet.complete(&[])));
                vm.machine
                    .server(|server| server.inject(Rule::once(message, fault)));
                let gpadl = channel.channel().allocate_gpadl(60).unwrap();
                let mut gpadl = Box::pin(gpadl);
                let mut context = Context::from_waker(Waker::noop());
                vm.machine.settle();
                let mut delete = None;
                if let Poll::Ready(gpadl) = gpadl.as_mut().poll(&mut context) {
                    delete = Some(Box::pin(gpadl.unwrap().delete()));
                }
                vm.machine.settle();
                vm.machine.rescind(id);
                vm.machine.advance(60 * SECOND);
                match &mut delete {
                    Some(delete) => assert!(delete.as_mut().poll(&mut context).is_ready()),
                    None => assert!(matches!(
                        gpadl.as_mut().poll(&mut context),
                        Poll::Ready(Err(_))
                    )),
                }
                assert_eq!(channel.channel().state(), State::Disabled);
                assert_eq!(vm.vmbus.snapshot().offers.len(), 0);
                vm.assert_well_behaved();
            }
        }
    }
}
