//! Integration components: the guest's drivers over anything that a host sends, and the host's services over anything that a guest
//! answers.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmbus::drivers::shutdown::Shutdown;
use vmbus::drivers::time_sync::TimeSync;
use vmbus::drivers::wall_clock::WallClock;
use vmbus::hypervisor::Hypervisor;
use vmbus::ids::ChannelId;
use vmbus::protocol::{Guid, interface};
use vmbus::ring::{Outgoing, PacketBuffer};
use vmbus_host::bus::{Device, Profile};
use vmbus_host::integration::{ANSWER_FLAGS, Component, Heartbeat, Host, Service};
use vmbus_host::machine::Machine;
use vmbus_host::provider::Manual;

use crate::guest::{SECOND, guest};
use crate::steps;

/// Something that the host, the guest or the clock does. `bool` says which device: shutdown or time sync.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Step<'a> {
    /// The host sends a message.
    Send(bool, &'a [u8]),
    /// It sends a message without the pipe's header, or with one of its own.
    SendRaw(bool, &'a [u8]),
    /// The appliance takes a request and agrees, or not.
    Decide(bool),
    /// The device goes and comes again.
    Again(bool),
    /// Time goes by, in units of 100 ns.
    Advance(u32),
}

/// The devices of a host, by interface.
const DEVICES: [Guid; 2] = [interface::TIME_SYNC, interface::SHUTDOWN];

fn add(machine: &Machine, which: bool) -> ChannelId {
    let device = DEVICES[usize::from(which)];
    let device = Device::new(device, Guid([u8::from(which); 16]));
    machine.add(device, Manual).expect("numbers are free")
}

/// The shutdown and time sync drivers with a host that sends anything: every answer has the length of its request, no request
/// is answered twice, and the wall clock never goes back.
pub fn ic(data: &[u8]) {
    let (machine, vmbus) = guest(Profile::hyper_v());
    let mut ids = [add(&machine, false), add(&machine, true)];
    let clock = Arc::new(WallClock::new());
    let shutdown = Shutdown::new(vmbus.client()).expect("a sound setting");
    let time_sync = TimeSync::new(vmbus.client(), clock.clone()).expect("a sound setting");
    vmbus.connect();
    machine.settle();
    let mut last: Option<Duration> = None;
    let (mut sent, mut answered) = ([0u32; 2], [0u32; 2]);
    let mut packet = PacketBuffer::default();
    for step in steps(data) {
        match step {
            Step::Send(which, message) => {
                let header = ((message.len() as u64) << 32 | 1).to_le_bytes();
                let packet = Outgoing::in_band([&header, message]);
                let done = machine.channel(ids[usize::from(which)], |host| host.send(&packet));
                sent[usize::from(which)] += u32::from(done == Some(Ok(())));
            }
            Step::SendRaw(which, bytes) => {
                let packet = Outgoing::in_band([bytes, &[]]);
                let done = machine.channel(ids[usize::from(which)], |host| host.send(&packet));
                sent[usize::from(which)] += u32::from(done == Some(Ok(())));
            }
            Step::Decide(yes) => {
                if let Some(request) = shutdown.take_request() {
                    // A host that is gone does not wait for the answer.
                    let _ = if yes {
                        request.accept()
                    } else {
                        request.refuse()
                    };
                }
            }
            Step::Again(which) => {
                machine.rescind(ids[usize::from(which)]);
                machine.settle();
                machine.advance(20 * SECOND);
                ids[usize::from(which)] = add(&machine, which);
                machine.settle();
                let offers = vmbus.snapshot().offers;
                let is_offered = |wanted| offers.iter().any(|info| info.offer.interface == wanted);
                shutdown.channel().attend(is_offered);
                time_sync.channel().attend(is_offered);
            }
            Step::Advance(by) => machine.advance(u64::from(by)),
        }
        machine.settle();
        for (id, count) in ids.iter().zip(&mut answered) {
            machine.channel(*id, |host| {
                while let Ok(true) = host.receive(&mut packet) {
                    *count += 1;
                }
                let _ = host.release();
            });
        }
        for (sent, answered) in sent.iter().zip(answered) {
            assert!(answered <= *sent, "an answer that nobody asked for");
        }
        let now = clock.utc(machine.reference_time());
        assert!(now >= last, "the clock went back from {last:?} to {now:?}");
        last = now;
    }
    drop((shutdown, time_sync));
    vmbus.begin_unload();
    machine.advance(60 * SECOND);
    assert_eq!(machine.shared_runs(), 0, "the memory comes back");
    assert_eq!(machine.complaints(), [] as [&str; 0]);
}

/// Something that happens to a host's service.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum ServiceStep<'a> {
    /// The guest opens or closes the channel.
    Open(bool),
    /// The guest sends bytes.
    Receive(&'a [u8]),
    /// The guest answers the last message in good order, with this status and these bytes from this offset on.
    Answer(u32, u8, &'a [u8]),
    /// Time goes by, in units of 100 ns.
    Advance(u32),
    /// The host negotiates anew.
    Renegotiate,
}

/// A service over answers of a guest: it complains, and goes on. The first byte chooses the component and the host.
pub fn host_ic(data: &[u8]) {
    let Some((choice, data)) = data.split_first() else {
        return;
    };
    let host = if choice & 0x80 == 0 {
        Host::HyperV
    } else {
        Host::OpenVmm
    };
    match choice % 3 {
        0 => service(Service::new(host, Heartbeat::new(1)), data),
        1 => service(
            Service::new(host, vmbus_host::integration::Shutdown::new()),
            data,
        ),
        _ => service(
            Service::new(host, vmbus_host::integration::TimeSync::new(1 << 57)),
            data,
        ),
    }
}

fn service<C: Component>(mut service: Service<C>, data: &[u8]) {
    let mut now = 1;
    let mut last = Vec::new();
    for step in steps(data) {
        match step {
            ServiceStep::Open(true) => service.opened(),
            ServiceStep::Open(false) => service.closed(),
            ServiceStep::Receive(bytes) => service.receive(now, bytes),
            ServiceStep::Answer(status, offset, bytes) => {
                let mut answer: Vec<u8> = last.clone();
                // The status and the flags of the message's header (spec ic.md 3).
                if let Some(field) = answer.get_mut(20..24) {
                    field.copy_from_slice(&status.to_le_bytes());
                }
                if let Some(flags) = answer.get_mut(25) {
                    *flags = ANSWER_FLAGS;
                }
                let places = answer.iter_mut().skip(usize::from(offset));
                places.zip(bytes).for_each(|(place, byte)| *place = *byte);
                service.receive(now, &answer);
            }
            ServiceStep::Advance(by) => now += u64::from(by),
            ServiceStep::Renegotiate => service.renegotiate(),
        }
        for count in 0.. {
            assert!(count < 100, "the service never falls silent");
            match service.poll_message(now) {
                Some(message) => last = message,
                None => break,
            }
        }
    }
}
