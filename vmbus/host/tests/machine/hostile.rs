//! A host that keeps to no rule, below a guest with a primary channel, sub-channels, GPADLs and monitor pages: channels
//! end with a reason, each packet ends once, and nothing panics or hangs.

use std::future::Future;
use std::num::NonZeroU16;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};

use proptest::prelude::*;
use vmbus::ConnectionState;
use vmbus::bus::Config;
use vmbus::ids::{ChannelId, VpIndex};
use vmbus::kmcl::{
    ChannelBuilder, EnabledChannel, Gpadl, GpadlError, OutgoingPacket, PacketError, State,
};
use vmbus::protocol::message::OfferChannel;
use vmbus::protocol::monitor::MonitorId;
use vmbus::protocol::sizes::MESSAGES;
use vmbus::protocol::{MAX_PAYLOAD, Payload};
use vmbus::ring::{Kind, Outgoing};
use vmbus_host::bus::{Device, Profile};
use vmbus_host::provider::Manual;
use zerocopy::FromZeros;

use crate::support::{INSTANCE, INTERFACE, SECOND, Vm};

/// Something that host, guest or clock does. Numbers of channels are small, so that they mostly exist.
#[derive(Clone, Debug)]
enum Step {
    /// Any bytes as a message.
    Garbage(Vec<u8>),
    /// A message of this row of the table, with small numbers in its fields, cut or padded.
    Message(usize, [u32; 4], i8),
    /// An offer of the device: channel, sub-channel index, monitor bit.
    Offer(u32, u16, u8),
    /// An event flag.
    Event(u32, u32),
    /// Bytes anywhere in the rings.
    Ring(u32, u16, Vec<u8>),
    /// A number in a field of a control page: of which ring, which, what.
    Control(u32, bool, u8, u32),
    /// Bytes anywhere in the monitor page.
    Monitor(u16, u8),
    /// A packet in good order.
    Send(u32),
    /// The host takes packets and answers them.
    Take(u32),
    /// The host takes a channel back by the rules.
    Rescind(u32),
    /// The host offers one more sub-channel by the rules.
    AddSub(u16),
    /// The guest sends: on which of its channels, and whether it wants an answer.
    GuestSend(usize, bool),
    /// The guest lends memory, or takes some back.
    Lend(usize),
    TakeBack,
    /// The guest enables what has ended, or disables one.
    Enable,
    Disable(usize),
    Pause,
    Start,
    Latency(usize, u16),
    Settle,
    Advance(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let id = || 0u32..7;
    let channel = || 0usize..3;
    prop_oneof![
        1 => proptest::collection::vec(any::<u8>(), 0..260).prop_map(Step::Garbage),
        6 => (0..MESSAGES.len(), [id(), id(), 0u32..12, 0u32..5], -4i8..4)
            .prop_map(|(row, fields, resize)| Step::Message(row, fields, resize)),
        3 => (id(), 0u16..4, any::<u8>()).prop_map(|(id, index, bit)| Step::Offer(id, index, bit)),
        3 => (prop_oneof![id(), any::<u32>()], 0u32..3).prop_map(|(id, vp)| Step::Event(id, vp)),
        2 => (id(), any::<u16>(), proptest::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(id, at, bytes)| Step::Ring(id, at, bytes)),
        2 => (id(), any::<bool>(), 0u8..5, prop_oneof![Just(0), 0u32..20_000, any::<u32>()])
            .prop_map(|(id, down, field, value)| Step::Control(id, down, field, value)),
        2 => (any::<u16>(), any::<u8>()).prop_map(|(at, byte)| Step::Monitor(at, byte)),
        4 => id().prop_map(Step::Send),
        4 => id().prop_map(Step::Take),
        1 => id().prop_map(Step::Rescind),
        2 => (1u16..4).prop_map(Step::AddSub),
        6 => (channel(), any::<bool>()).prop_map(|(channel, ask)| Step::GuestSend(channel, ask)),
        3 => channel().prop_map(Step::Lend),
        2 => Just(Step::TakeBack),
        4 => Just(Step::Enable),
        1 => channel().prop_map(Step::Disable),
        1 => Just(Step::Pause),
        2 => Just(Step::Start),
        1 => (channel(), any::<u16>()).prop_map(|(channel, latency)| Step::Latency(channel, latency)),
        4 => Just(Step::Settle),
        2 => (0u32..200_000_000).prop_map(Step::Advance),
    ]
}

/// What a driver may be told next (spec kmcl.md 1.13).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    Opened,
    Started,
    /// Packets, and suspend.
    Flow,
    /// Started anew, or closed.
    Rest,
    /// Only the reason.
    Over,
}

/// One channel's driver: notes what should not happen.
struct Driver {
    expect: Mutex<Expect>,
    wrong: Mutex<Vec<String>>,
}

impl Driver {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            expect: Mutex::new(Expect::Opened),
            wrong: Mutex::new(Vec::new()),
        })
    }

    /// Something happened that is right in these states.
    fn see(&self, what: &str, right: &[Expect], next: Expect) {
        let mut expect = self.expect.lock().unwrap();
        if !right.contains(&expect) {
            let wrong = format!("{what} when {:?} was due", *expect);
            self.wrong.lock().unwrap().push(wrong);
        }
        *expect = next;
    }

    fn builder(self: &Arc<Self>) -> ChannelBuilder {
        use Expect::{Flow, Opened, Over, Rest, Started};
        let [packet, complete, opened, started, suspend, closed, failure] =
            std::array::from_fn(|_| self.clone());
        ChannelBuilder::new(INTERFACE)
            .friendly_name("test")
            .instance(INSTANCE)
            .monitored_notification()
            .maximum_packet_count(8)
            .process_packet_callbacks(
                move |_, received| {
                    packet.see("a packet", &[Flow], Flow);
                    received.complete(b"thanks");
                },
                move |_, count| {
                    complete.see("processing-complete", &[Flow], Flow);
                    assert!(count > 0);
                },
            )
            .opened(move |_| {
                opened.see("opened", &[Opened], Started);
                Ok(())
            })
            .started(move |_| started.see("started", &[Started, Rest], Flow))
            .suspend(move |_| suspend.see("suspend", &[Flow], Rest))
            // A channel that never started is closed without suspend.
            .closed(move |_| closed.see("closed", &[Rest, Started], Over))
            .failure(move |_, reason| {
                failure.see("failure", &[Opened, Over], Over);
                assert!(!reason.to_string().is_empty());
            })
    }
}

type Creating = Pin<Box<dyn Future<Output = Result<Gpadl, GpadlError>>>>;

struct World {
    vm: Vm,
    primary: ChannelId,
    drivers: Vec<Arc<Driver>>,
    /// The primary channel and two sub-channels, as far as they could be enabled.
    channels: [Option<EnabledChannel>; 3],
    creating: Vec<Creating>,
    gpadls: Vec<Gpadl>,
    /// How often each packet ended.
    ended: Arc<Mutex<Vec<u32>>>,
}

fn device() -> Device {
    Device {
        monitor_id: MonitorId::new(3),
        ..Device::new(INTERFACE, INSTANCE)
    }
}

impl World {
    fn new(profile: Profile) -> Self {
        let config = Config {
            monitor_pages: true,
            ..Config::default()
        };
        let vm = Vm::with_config(profile, config);
        let primary = vm.machine.add(device(), Manual).unwrap();
        vm.connect();
        let mut world = Self {
            vm,
            primary,
            drivers: Vec::new(),
            channels: [None, None, None],
            creating: Vec::new(),
            gpadls: Vec::new(),
            ended: Arc::default(),
        };
        world.take(Step::Enable);
        world.take(Step::Settle);
        world.take(Step::AddSub(1));
        world.take(Step::Enable);
        world.take(Step::Settle);
        world
    }

    fn message(&self, bytes: &[u8]) {
        let machine = &self.vm.machine;
        machine.at_dispatch(|| self.vm.vmbus.on_message(bytes));
    }

    fn enable(&mut self) {
        let client = self.vm.vmbus.client();
        for number in 0..3u16 {
            let over = |channel: &EnabledChannel| channel.channel().state() == State::Disabled;
            if !self.channels[usize::from(number)].as_ref().is_none_or(over) {
                continue;
            }
            let driver = Driver::new();
            let builder = match (NonZeroU16::new(number), &self.channels[0]) {
                (None, _) => driver.builder(),
                (Some(index), Some(primary)) => {
                    driver.builder().sub_channel_of(primary.channel(), index)
                }
                (Some(_), None) => return,
            };
            // Refused while the primary channel is not open.
            if let Ok(channel) = builder.enable(client) {
                self.drivers.push(driver);
                self.channels[usize::from(number)] = Some(channel);
            }
        }
    }

    fn guest_send(&self, channel: usize, ask: bool) {
        let Some(channel) = &self.channels[channel] else {
            return;
        };
        let Ok(mut packet) = channel.channel().allocate_packet() else {
            return;
        };
        let ended = self.ended.clone();
        let number = {
            let mut ended = ended.lock().unwrap();
            ended.push(0);
            ended.len() - 1
        };
        let counts = ended.clone();
        packet.set_completion_routine(Arc::new(
            move |_: OutgoingPacket, _: Result<&[u8], PacketError>| {
                counts.lock().unwrap()[number] += 1;
            },
        ));
        let sent = if ask {
            packet.send_transaction(&[7; 100])
        } else {
            packet.send(&[7; 500])
        };
        if sent.is_err() {
            // It came back and is nobody's any more.
            ended.lock().unwrap()[number] += 1;
        }
    }

    fn poll_gpadls(&mut self) {
        let mut context = Context::from_waker(Waker::noop());
        let gpadls = &mut self.gpadls;
        self.creating
            .retain_mut(|creating| match creating.as_mut().poll(&mut context) {
                std::task::Poll::Pending => true,
                std::task::Poll::Ready(created) => {
                    gpadls.extend(created.ok());
                    false
                }
            });
    }

    fn take(&mut self, step: Step) {
        let machine = self.vm.machine.clone();
        match step {
            Step::Garbage(bytes) => self.message(&bytes),
            Step::Message(row, fields, resize) => {
                let info = &MESSAGES[row];
                let size = info.sizes.last().unwrap().2;
                let mut message = info.kind.0.to_le_bytes().to_vec();
                message.extend([0; 4]);
                fields
                    .iter()
                    .for_each(|field| message.extend(field.to_le_bytes()));
                let size = size.saturating_add_signed(isize::from(resize));
                message.resize(size.min(MAX_PAYLOAD), 0);
                self.message(&message);
            }
            Step::Offer(channel, index, bit) => {
                let offer = OfferChannel {
                    interface: INTERFACE,
                    instance: INSTANCE,
                    channel: channel.into(),
                    sub_channel_index: index.into(),
                    monitor_id: bit,
                    monitor_allocated: 1,
                    ..OfferChannel::new_zeroed()
                };
                self.message(&Payload::new(&offer));
            }
            Step::Event(id, vp) => machine.interrupt_vp(ChannelId(id), VpIndex(vp)),
            Step::Ring(id, at, bytes) => {
                machine.channel(ChannelId(id), |host| {
                    let offset = usize::from(at) % host.memory().len();
                    let _ = host.memory().write(offset, &bytes);
                });
                machine.interrupt(ChannelId(id));
            }
            Step::Control(id, down, field, value) => {
                machine.channel(ChannelId(id), |host| {
                    let page = if down {
                        host.opening.downstream_page
                    } else {
                        0
                    };
                    // The five words that have a meaning.
                    let at = [0, 4, 8, 12, 64][usize::from(field)];
                    let offset = page as usize * 4096 + at;
                    let _ = host.memory().write(offset, &value.to_le_bytes());
                });
                machine.interrupt(ChannelId(id));
            }
            Step::Monitor(at, byte) => {
                machine.watch(|watch| watch.page().write(usize::from(at) % 4096, &[byte]));
            }
            Step::Send(id) => {
                let packet = Outgoing::in_band([&[1; 24], &[]]);
                machine.channel(ChannelId(id), |host| host.send(&packet).is_ok());
            }
            Step::Take(id) => {
                machine.channel(ChannelId(id), |host| {
                    for packet in host.receive_all().unwrap_or_default() {
                        if let (true, Some(id)) =
                            (packet.kind != Kind::COMPLETION, packet.transaction)
                        {
                            let _ = host.complete(id, b"answer");
                        }
                    }
                });
            }
            Step::Rescind(id) => {
                machine.rescind(ChannelId(id));
                if ChannelId(id) == self.primary {
                    self.primary = machine.add(device(), Manual).unwrap_or(self.primary);
                }
            }
            Step::AddSub(index) => {
                let index = NonZeroU16::new(index).unwrap();
                machine.add_sub_channel(self.primary, index, Manual);
            }
            Step::GuestSend(channel, ask) => self.guest_send(channel, ask),
            Step::Lend(channel) => {
                if let Some(channel) = &self.channels[channel]
                    && self.creating.len() + self.gpadls.len() < 8
                    && let Ok(creating) = channel.channel().allocate_gpadl(2)
                {
                    self.creating.push(Box::pin(creating));
                }
            }
            Step::TakeBack => drop(self.gpadls.pop()),
            Step::Enable => self.enable(),
            Step::Disable(channel) => {
                if let Some(channel) = &self.channels[channel] {
                    channel.disable();
                }
            }
            Step::Pause => {
                if let Some(primary) = &self.channels[0] {
                    let _ = primary.channel().pause();
                }
            }
            Step::Start => {
                if let Some(primary) = &self.channels[0] {
                    let _ = primary.channel().start();
                }
            }
            Step::Latency(channel, latency) => {
                if let Some(channel) = &self.channels[channel] {
                    let _ = channel.channel().set_interrupt_latency(latency);
                }
            }
            Step::Settle => machine.settle(),
            Step::Advance(time) => machine.advance(time.into()),
        }
        self.poll_gpadls();
        for driver in &self.drivers {
            assert_eq!(*driver.wrong.lock().unwrap(), [] as [&str; 0]);
        }
    }

    /// Everything ends, whatever the host has done before.
    fn finish(mut self) {
        self.gpadls.clear();
        self.creating.clear();
        for channel in self.channels.iter().flatten() {
            channel.disable();
        }
        self.vm.vmbus.begin_unload();
        self.vm.machine.advance(300 * SECOND);
        self.take(Step::Settle);
        for channel in self.channels.iter().flatten() {
            assert_eq!(channel.channel().state(), State::Disabled);
        }
        let ended = self.ended.lock().unwrap();
        assert!(ended.iter().all(|count| *count == 1), "{ended:?}");
        assert!(matches!(
            self.vm.vmbus.connection(),
            ConnectionState::Unloaded { .. }
        ));
        let restless = "guest and host never come to rest";
        assert!(!self.vm.machine.complaints().contains(&restless));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn whatever_a_host_does_channels_end_and_packets_end_once(
        host in 0usize..3,
        steps in proptest::collection::vec(step(), 0..120),
    ) {
        let profile = [Profile::openvmm, Profile::hyper_v, Profile::qemu][host]();
        let mut world = World::new(profile);
        steps.into_iter().for_each(|step| world.take(step));
        world.finish();
    }
}
