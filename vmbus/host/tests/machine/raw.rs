//! Raw mode: the driver has the rings, and the library only hands on the host's signals.

use std::sync::{Arc, Mutex};

use vmbus::ids::ChannelId;
use vmbus::kmcl::{
    AllocateError, Channel, ChannelBuilder, ChannelError, ConfigError, Level, PacketBuffer,
    PacketKind, RawError, RawPacket, RingError, State,
};
use vmbus::ring::Outgoing;

use crate::support::{INTERFACE, Vm, number, received};

/// The levels at which the host's signals came.
type Signals = Arc<Mutex<Vec<Level>>>;

/// A channel whose driver does `work` at each signal.
fn raw(work: impl Fn(&Channel) + Send + Sync + 'static) -> (ChannelBuilder, Signals) {
    let signals = Signals::default();
    let seen = signals.clone();
    let builder = ChannelBuilder::new(INTERFACE)
        .friendly_name("raw")
        .ring_pages(1, 1)
        .queue_management_suppressed(move |channel| {
            seen.lock().unwrap().push(channel.client().current_level());
            work(channel);
        });
    (builder, signals)
}

/// Everything that is in the incoming ring.
fn read_all(channel: &Channel) -> Result<Vec<u64>, RawError> {
    let mut packet = PacketBuffer::default();
    channel.raw(|rings| {
        let mut all = Vec::new();
        while rings.read(&mut packet)? {
            all.push(number(packet.payload()));
        }
        Ok(all)
    })
}

fn open(builder: &ChannelBuilder) -> (Vm, ChannelId, vmbus::kmcl::EnabledChannel) {
    let (vm, id) = Vm::with_device();
    let channel = vm.enable(builder);
    assert_eq!(channel.channel().state(), State::Active);
    (vm, id, channel)
}

#[test]
fn an_interrupt_runs_the_callback_at_dispatch_and_nothing_else() {
    let (builder, signals) = raw(|_| {});
    let (vm, id, channel) = open(&builder);
    assert_eq!(
        std::mem::take(&mut *signals.lock().unwrap()),
        [Level::Passive],
        "once at the start"
    );
    vm.send_all(id, [1, 2]);
    assert_eq!(*signals.lock().unwrap(), [Level::Dispatch]);
    assert_eq!(
        channel.channel().counters().packets_received,
        0,
        "nobody has read"
    );
    assert_eq!(read_all(channel.channel()), Ok(vec![1, 2]));
    vm.assert_well_behaved();
}

#[test]
fn the_callback_runs_at_passive_when_asked() {
    let (builder, signals) = raw(|_| {});
    let (vm, id, _channel) = open(&builder.incoming_processing_at_passive());
    signals.lock().unwrap().clear();
    vm.send_all(id, [1]);
    assert_eq!(*signals.lock().unwrap(), []);
    vm.machine.settle();
    assert_eq!(*signals.lock().unwrap(), [Level::Passive]);
}

#[test]
fn packets_are_answered_from_the_callback() {
    let (builder, _) = raw(|channel| {
        channel
            .raw(|rings| {
                let mut packet = PacketBuffer::default();
                while let Some(head) = rings.peek()? {
                    assert_eq!(head.kind(), PacketKind::IN_BAND);
                    assert_eq!((head.transaction_id(), head.payload_length()), (0x55, 8));
                    assert!(head.completion_requested());
                    rings.read(&mut packet)?;
                    rings.write(&RawPacket::completion(head.transaction_id(), b"answered"))?;
                }
                Ok(())
            })
            .unwrap();
    });
    let (vm, id, _channel) = open(&builder);
    vm.host(id, |host| {
        let packet = Outgoing::in_band([b"question", &[]]);
        host.send(&packet.with_completion(0x55)).unwrap();
    });
    vm.host(id, |host| {
        let mut packet = PacketBuffer::default();
        assert!(host.receive(&mut packet).unwrap());
        assert_eq!(
            (packet.kind(), packet.transaction_id()),
            (PacketKind::COMPLETION, 0x55)
        );
        assert_eq!(packet.payload(), b"answered");
    });
}

#[test]
fn requests_carry_the_drivers_own_transaction_ids() {
    let (builder, _) = raw(|_| {});
    let (vm, id, channel) = open(&builder);
    channel
        .channel()
        .raw(|rings| rings.write(&RawPacket::in_band(b"question").with_completion(77)))
        .unwrap();
    assert_eq!(vm.host(id, received), [(Some(77), b"question".to_vec())]);
}

#[test]
fn one_signal_for_all_that_one_access_has_done() {
    let (builder, _) = raw(|_| {});
    let (vm, _id, channel) = open(&builder);
    let before = vm.machine.signals();
    channel
        .channel()
        .raw(|rings| {
            for _ in 0..3 {
                rings.write(&RawPacket::in_band(b"question"))?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(vm.machine.signals(), before + 1);
    channel
        .channel()
        .raw(|rings| rings.write(&RawPacket::in_band(b"more")))
        .unwrap();
    assert_eq!(vm.machine.signals(), before + 1, "the ring was not empty");
}

#[test]
fn masked_signals_do_not_come_and_unmasking_finds_what_they_would_have_told() {
    let (builder, signals) = raw(|_| {});
    let (vm, id, channel) = open(&builder);
    signals.lock().unwrap().clear();
    channel.channel().raw(|rings| rings.mask()).unwrap();
    vm.send_all(id, [1]);
    assert_eq!(*signals.lock().unwrap(), []);
    assert_eq!(channel.channel().raw(|rings| rings.unmask()), Ok(true));
    assert_eq!(read_all(channel.channel()), Ok(vec![1]));
    assert_eq!(channel.channel().raw(|rings| rings.unmask()), Ok(false));
}

#[test]
fn a_full_ring_is_waited_for() {
    let (builder, signals) = raw(|_| {});
    let (vm, id, channel) = open(&builder);
    signals.lock().unwrap().clear();
    let channel = channel.channel();
    let packet = RawPacket::in_band(&[1; 1000]);
    let full = channel.raw(|rings| {
        loop {
            rings.write(&packet)?;
        }
        #[expect(unreachable_code, reason = "gives the closure its type")]
        Ok(())
    });
    assert_eq!(full, Err(RawError::Full { need: 1024 }));
    assert_eq!(channel.raw(|rings| rings.wait_for_room(1024)), Ok(false));
    assert_eq!(*signals.lock().unwrap(), []);
    assert_eq!(vm.host(id, received).len(), 3);
    assert_eq!(*signals.lock().unwrap(), [Level::Dispatch], "there is room");
    assert_eq!(channel.raw(|rings| rings.wait_for_room(1024)), Ok(true));
    let huge = [0; 5000];
    assert!(matches!(
        channel.raw(|rings| rings.write(&RawPacket::in_band(&huge))),
        Err(RawError::TooLarge { .. })
    ));
}

#[test]
fn a_signal_while_the_rings_are_in_use_is_not_lost() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let results = seen.clone();
    let (builder, signals) = raw(move |channel| {
        results.lock().unwrap().push(read_all(channel));
    });
    let (vm, id, channel) = open(&builder);
    signals.lock().unwrap().clear();
    seen.lock().unwrap().clear();
    channel
        .channel()
        .raw(|_| {
            // The interrupt comes below this very access.
            vm.send_all(id, [5]);
            Ok(())
        })
        .unwrap();
    vm.machine.settle();
    assert_eq!(*seen.lock().unwrap(), [Err(RawError::Busy), Ok(vec![5])]);
    assert_eq!(*signals.lock().unwrap(), [Level::Dispatch, Level::Passive]);
}

#[test]
fn a_broken_ring_fails_the_channel() {
    let (builder, _) = raw(|channel| {
        let _ = read_all(channel);
    });
    let (vm, id, channel) = open(&builder);
    vm.host(id, |host| {
        let producer = host.memory().atomic_u32(2 * 4096).unwrap();
        producer.store(4, std::sync::atomic::Ordering::SeqCst);
    });
    let error = RingError::ProducerOffset(4);
    assert_eq!(read_all(channel.channel()), Err(RawError::Ring(error)));
    assert_eq!(
        read_all(channel.channel()),
        Err(RawError::NotOpen),
        "from then on"
    );
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    vm.assert_well_behaved();
}

#[test]
fn the_rings_are_there_while_the_channel_is_open() {
    let errors = Arc::new(Mutex::new(Vec::new()));
    let (builder, _) = raw(|_| {});
    let [opened, suspend, closed] = std::array::from_fn(|_| errors.clone());
    let builder = builder
        .opened(move |channel| {
            opened.lock().unwrap().push(read_all(channel));
            Ok(())
        })
        .suspend(move |channel| suspend.lock().unwrap().push(read_all(channel)))
        .closed(move |channel| closed.lock().unwrap().push(read_all(channel)));
    let (vm, id, channel) = open(&builder);
    let handle = channel.channel().clone();
    assert_eq!(read_all(&handle), Ok(vec![]));
    channel.disable();
    vm.machine.settle();
    assert_eq!(
        *errors.lock().unwrap(),
        [Err(RawError::NotOpen), Ok(vec![]), Err(RawError::NotOpen)],
        "opened, suspend, closed"
    );
    assert_eq!(read_all(&handle), Err(RawError::NotOpen));
    vm.machine.interrupt(id);
    vm.assert_well_behaved();
}

#[test]
fn raw_mode_and_packet_callbacks_exclude_each_other() {
    let (vm, _) = Vm::with_device();
    let (builder, _) = raw(|_| {});
    let both = builder
        .clone()
        .process_packet_callbacks(|_, packet| packet.complete(&[]), |_, _| {});
    assert_eq!(both.enable(vm.vmbus.client()).err(), Some(ConfigError::Raw));
    assert_eq!(
        builder.clone().pipe().enable(vm.vmbus.client()).err(),
        Some(ConfigError::Raw)
    );

    let channel = vm.enable(&builder);
    assert_eq!(
        channel.channel().allocate_packet().err(),
        Some(AllocateError::Raw)
    );
    drop(channel);
    vm.machine.settle();
    let ordinary = vm.enable(&ChannelBuilder::new(INTERFACE));
    assert_eq!(ordinary.channel().raw(|_| Ok(())), Err(RawError::NotRaw));
}

#[test]
fn a_failed_raw_channel_tells_its_driver_why() {
    let reasons = Arc::new(Mutex::new(Vec::new()));
    let seen = reasons.clone();
    let (builder, _) = raw(|channel| {
        let _ = read_all(channel);
    });
    let (vm, id, _channel) =
        open(&builder.failure(move |_, error| seen.lock().unwrap().push(error)));
    vm.host(id, |host| {
        let producer = host.memory().atomic_u32(2 * 4096).unwrap();
        producer.store(9, std::sync::atomic::Ordering::SeqCst);
    });
    vm.machine.interrupt(id);
    vm.machine.settle();
    let reason = ChannelError::Ring(RingError::ProducerOffset(9));
    assert_eq!(*reasons.lock().unwrap(), [reason]);
}

#[test]
fn a_channel_does_not_leave_while_its_driver_has_the_rings() {
    let (builder, _) = raw(|_| {});
    let (vm, _, channel) = open(&builder);
    let client = vm.vmbus.client();
    channel
        .channel()
        .raw(|rings| {
            vm.vmbus.begin_unload();
            // Whoever waits here serves the stack.
            let seen = client.changes();
            client.notify();
            client.block_on(client.changed(seen)).unwrap();
            vm.machine.settle();
            assert_eq!(channel.channel().state(), State::Active);
            rings.peek().map(drop)
        })
        .unwrap();
    vm.machine.settle();
    assert_eq!(channel.channel().state(), State::Disabled);
    assert_eq!(vm.machine.shared_runs(), 0);
    vm.assert_well_behaved();
}
