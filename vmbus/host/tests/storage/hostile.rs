//! A guest that sends anything: the host neither panics nor touches what was not lent to it, and serves on.

use std::ops::Range;
use std::sync::Arc;

use proptest::prelude::*;
use vmbus::hypervisor::Hypervisor;
use vmbus::ids::PageNumber;
use vmbus_host::disk::Disk;
use vmbus_host::storage::{Counts, Limits, Lun, Storvsp, scsi, vstor};
use vmbus_host::work::Inline;

use crate::disk::TestDisk;
use crate::guest::*;

/// A packet that is nearly right, or anything.
fn packets() -> impl Strategy<Value = Vec<u8>> {
    let anything = proptest::collection::vec(any::<u8>(), 0..100);
    let operation = (0u32..16, proptest::collection::vec(any::<u8>(), 0..90))
        .prop_map(|(operation, body)| packet(0, operation, &body));
    let cdb = proptest::collection::vec(any::<u8>(), 16..=16);
    let code = prop::sample::select(vec![
        0x00u8, 0x03, 0x08, 0x0A, 0x12, 0x15, 0x1A, 0x1B, 0x1E, 0x25, 0x28, 0x2A, 0x2F, 0x35, 0x42,
        0x43, 0x46, 0x4A, 0x51, 0x55, 0x5A, 0x88, 0x8A, 0x8F, 0x91, 0x9E, 0xA0, 0xA8, 0xAA, 0xAF,
        0xBD,
    ]);
    let command = (code, cdb, 0u8..4, 0u8..3, 0u32..20_000, 1u8..17).prop_map(
        |(code, mut cdb, lun, direction, length, cdb_length)| {
            cdb[0] = code;
            let mut packet = srb(0x0602, lun, &cdb, Data::None);
            packet[20] = cdb_length;
            packet[22] = direction;
            packet[24..28].copy_from_slice(&length.to_le_bytes());
            packet
        },
    );
    prop_oneof![1 => anything, 2 => operation, 6 => command]
}

#[derive(Clone, Debug)]
enum Lent {
    Nothing,
    /// Pages 2 and up of the guest's, from an offset on.
    Pages {
        offset: usize,
        length: usize,
    },
    /// Pages that the guest does not have.
    Foreign {
        first: u64,
        length: usize,
    },
}

fn lent() -> impl Strategy<Value = Lent> {
    prop_oneof![
        Just(Lent::Nothing),
        (0usize..4096, 1usize..12_000).prop_map(|(offset, length)| Lent::Pages { offset, length }),
        (1u64 << 32.., 1usize..9000).prop_map(|(first, length)| Lent::Foreign { first, length }),
    ]
}

fn disc() -> Lun {
    let disc = vmbus_host::disk::MemoryDisk::new(vmbus_host::disk::Geometry {
        sectors: 1000,
        logical: 2048,
        physical: 2048,
    });
    let medium: Arc<dyn Disk> = Arc::new(disc.into_read_only());
    Lun::Dvd {
        identity: [1; 16],
        medium: Some(medium),
    }
}

/// Where a [`vmbus_host::machine::Machine`] begins to number pages, and how far this guest comes.
const SHARED: Range<u64> = 0x1000..0x1100;

/// Data over the guest's own rings and pages of the bus: it has done that to itself, and nobody else has to know.
#[test]
fn a_guest_that_lends_its_rings_loses_its_channel_at_most() {
    let mut lent = 0;
    for page in SHARED.map(PageNumber) {
        let disk = TestDisk::small();
        disk.write(0, &[0xFF; 4096]).unwrap();
        let guest = Guest::with_disk(disk);
        if guest.vm.machine.memory().find(page).is_none() {
            continue;
        }
        lent += 1;
        let read = srb(guest.version, 0, &ten(0x28, 0, 8), Data::In(4096));
        let _read = guest.lend_pages(&read, vec![page], 4096);
        let _next = guest.start(0, 0, &[0; 6], Data::None);
        guest.vm.machine.settle();
        // Answered, though it may have masked the interrupt; or the host cannot read on.
        let Counts {
            packets, in_flight, ..
        } = guest.controller.counts();
        let answered = packets.answers == packets.packets;
        assert!(answered || packets.broken_rings == 1, "page {page}");
        assert_eq!(in_flight, 0, "page {page}");
        assert!(guest.vm.machine.rescind(guest.id), "page {page}");
        guest.vm.machine.settle();
        let again = Storvsp::new(guest.controller.clone(), Arc::new(Inline));
        let device = Storvsp::device(vmbus::protocol::Guid([9; 16]));
        assert!(guest.vm.machine.add(device, again).is_some(), "page {page}");
        guest.vm.machine.settle();
    }
    assert!(lent > 64, "both rings of 32 pages are among {lent} pages");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whatever_comes_every_packet_is_answered_and_nothing_else_is_touched(
        steps in proptest::collection::vec((packets(), lent()), 1..60),
        version in prop::sample::select(VERSIONS.to_vec()),
        initialised in any::<bool>(),
    ) {
        let limits = Limits { sub_channels: 2, ..Limits::default() };
        let guest = Guest::silent(limits, Arc::new(Inline));
        guest.controller.add_lun(0, Lun::Disk(TestDisk::small())).unwrap();
        guest.controller.add_lun(2, disc()).unwrap();
        let guest = if initialised { guest.ready(version) } else { guest };
        let memory = guest.vm.machine.share_pages(8).unwrap();
        let before = vec![0xA5; 8 * 4096];
        for (packet, lent) in steps {
            memory.write(0, &before).unwrap();
            let numbers: Vec<_> = memory.pages().collect();
            let (pending, touched) = match lent {
                Lent::Nothing => (guest.begin(0, &packet), 0..0),
                Lent::Pages { offset, length } => {
                    let end = offset + length;
                    let pages = numbers[2..2 + end.div_ceil(4096)].to_vec();
                    let pending = guest.lend_from(&packet, pages, offset..end);
                    (pending, 2 * 4096 + offset..2 * 4096 + end)
                }
                Lent::Foreign { first, length } => {
                    let pages = (0..length.div_ceil(4096) as u64)
                        .map(|page| PageNumber(first.wrapping_add(page)))
                        .filter(|page| !numbers.contains(page))
                        .collect::<Vec<_>>();
                    let length = length.min(pages.len() * 4096);
                    if length == 0 {
                        continue;
                    }
                    (guest.lend_from(&packet, pages, 0..length), 0..0)
                }
            };
            let answer = guest.wait(pending);
            prop_assert!(answer.len() == 48 || answer.len() == 64);
            prop_assert_eq!(&answer[..4], &[1, 0, 0, 0]);
            let mut after = vec![0; 8 * 4096];
            memory.read(0, &mut after).unwrap();
            for (at, byte) in after.iter().enumerate() {
                prop_assert!(*byte == 0xA5 || touched.contains(&at), "byte {}", at);
            }
        }
        let counts = guest.controller.counts();
        prop_assert_eq!(counts.packets.answers, counts.packets.packets);
        prop_assert_eq!(counts.in_flight, 0);
        guest.vm.assert_well_behaved();
    }

    #[test]
    fn any_bytes_can_be_parsed(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        version in prop::sample::select(VERSIONS.to_vec()),
    ) {
        for version in [None, Some(vstor::ProtocolVersion(version))] {
            if let Ok(vstor::Request::ExecuteSrb(srb)) = vstor::parse(&bytes, version) {
                prop_assert!((1..=16).contains(&srb.cdb().len()));
                let _ = scsi::decode(srb.cdb());
            }
        }
    }
}
