//! Memory that the guest lends, as the host reaches it: in packets, and interrupts on the VP that was asked for.

use std::sync::{Arc, Mutex};

use vmbus::hypervisor::Hypervisor;
use vmbus::ids::VpIndex;
use vmbus::kmcl::{ExternalData, SendFlags};
use vmbus_host::memory::AccessError;

use crate::support::{Journal, Vm, is_active};

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
    drop(channel);
    vm.machine.settle();
    assert!(matches!(lent.to_vec(), Err(AccessError::NotShared(_))));
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
