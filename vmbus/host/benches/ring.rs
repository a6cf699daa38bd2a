//! What a packet costs: through the ring, through the library with its callbacks, and there and back, beside a memcpy of
//! the same bytes. `cargo xtask bench ring` runs this and prints a table.
//!
//! One thread plays both ends, so that what is timed is the code and not the wake-up of another processor. The channel is a
//! real one: negotiated with the bus server, opened, and used through `vmbus::kmcl`. Under it is a [`Lean`] hypervisor and
//! not the test machine, whose locks and books would be most of what is measured; it costs what `cli`, `sti` and
//! a flag cost. The host's end is the ring's own `Reader` and `Writer`; its work is timed in the round trip only.
//!
//! Prints one JSON object per row.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmbus::Vmbus;
use vmbus::bus::Config;
use vmbus::hypervisor::{Hypervisor, Level, OutOfMemory, PostError};
use vmbus::ids::{ChannelId, ConnectionId, VpIndex};
use vmbus::kmcl::{Channel, ChannelBuilder, EnabledChannel, OutgoingPacket};
use vmbus::protocol::Guid;
use vmbus::ring::{Outgoing, PacketBuffer, Reader, Ring, Signal, Writer};
use vmbus::shared::SharedPages;
use vmbus_host::bus::{Device, Profile};
use vmbus_host::machine::Machine;
use vmbus_host::provider::Manual;
use zerocopy::{FromBytes, IntoBytes, KnownLayout};

const INTERFACE: Guid = Guid::literal("11111111-2222-3333-4444-555555555555");

/// Data pages of each ring: 256 KiB, so that some of the largest packets fit and all stays in a second-level cache.
const RING_PAGES: usize = 64;

/// Bytes of data per packet.
const SIZES: [usize; 7] = [16, 64, 256, 1024, 4096, 16384, 65536];

/// The most packets in one batch.
const BATCH: usize = 64;

/// Bytes of the answer in a round trip: what a status takes.
const ANSWER: usize = 16;

/// How long one round of measuring runs at least.
const ROUND: Duration = Duration::from_millis(20);

/// A hypervisor with the cost of a real one's fast paths. Messages and memory are the machine's.
struct Lean {
    machine: Arc<Machine>,
    dispatch: AtomicBool,
    work: AtomicBool,
    signals: AtomicU64,
}

impl Hypervisor for Lean {
    fn post_message(&self, connection: ConnectionId, payload: &[u8]) -> Result<(), PostError> {
        self.machine.post_message(connection, payload)
    }

    fn signal_event(&self, _: ConnectionId, _: u16) {
        self.signals.fetch_add(1, Ordering::Relaxed);
    }

    fn share_pages(&self, count: usize) -> Result<SharedPages, OutOfMemory> {
        self.machine.share_pages(count)
    }

    fn reference_time(&self) -> u64 {
        self.machine.reference_time()
    }

    fn current_vp(&self) -> VpIndex {
        VpIndex(0)
    }

    fn raise_to_dispatch(&self) -> Level {
        let before = self.dispatch.load(Ordering::Relaxed);
        self.dispatch.store(true, Ordering::Relaxed);
        if before {
            Level::Dispatch
        } else {
            Level::Passive
        }
    }

    fn lower(&self, level: Level) {
        if level == Level::Passive {
            self.dispatch.store(false, Ordering::Relaxed);
        }
    }

    fn wait_for_interrupt(&self, until: Option<u64>) {
        self.machine.wait_for_interrupt(until);
    }

    fn request_work(&self) {
        self.work.store(true, Ordering::Relaxed);
        self.machine.request_work();
    }
}

/// An open channel, and both ends of it.
struct World {
    hypervisor: Arc<Lean>,
    vmbus: Arc<Vmbus>,
    id: ChannelId,
    channel: EnabledChannel,
    /// The host's ends.
    reader: Reader,
    writer: Writer,
    buffer: PacketBuffer,
}

impl World {
    fn new() -> Self {
        let machine = Machine::new(Profile::openvmm());
        let hypervisor = Arc::new(Lean {
            machine: machine.clone(),
            dispatch: AtomicBool::new(false),
            work: AtomicBool::new(false),
            signals: AtomicU64::new(0),
        });
        let vmbus = Vmbus::new(hypervisor.clone(), Config::default());
        machine.attach(vmbus.clone());
        let id = machine
            .add(Device::new(INTERFACE, INTERFACE), Manual)
            .unwrap();
        vmbus.connect();
        machine.settle();
        let channel = ChannelBuilder::new(INTERFACE)
            .ring_pages(RING_PAGES, RING_PAGES)
            .maximum_packet_size(*SIZES.last().unwrap())
            .batch_budget(u32::MAX)
            .process_packet_callbacks(
                |_, packet| {
                    black_box(packet.payload());
                    packet.complete(&[]);
                },
                |_, count| {
                    black_box(count);
                },
            )
            .enable(vmbus.client())
            .unwrap();
        machine.settle();
        let (memory, downstream) = machine
            .channel(id, |host| {
                (host.memory().clone(), host.opening.downstream_page)
            })
            .expect("the channel is open");
        let (up, down) = Ring::split(&memory, downstream as usize).unwrap();
        // Two packets exist: one that rows share, and one that the round trip keeps.
        drop([(); 2].map(|()| channel.channel().allocate_packet().unwrap()));
        Self {
            hypervisor,
            vmbus,
            id,
            channel,
            reader: Reader::new(up),
            writer: Writer::new(down).unwrap(),
            buffer: PacketBuffer::with_capacity(1 << 17).unwrap(),
        }
    }

    fn channel(&self) -> &Channel {
        self.channel.channel()
    }

    /// The host writes `count` packets and shows them. Returns whether it interrupts.
    fn fill(&mut self, data: &[u8], count: usize) -> bool {
        for _ in 0..count {
            self.writer.push(&Outgoing::in_band([data, &[]])).unwrap();
        }
        self.writer.publish().unwrap() == Signal::Needed
    }

    /// The host takes all packets.
    fn drain(&mut self) {
        while self.reader.read(&mut self.buffer).unwrap() {}
        let _ = self.reader.publish().unwrap();
    }
}

/// One thing that is measured: does a batch of packets, and tells how long it took.
type Step = Box<dyn FnMut(&mut World, usize) -> Duration>;

/// A row's name, and what makes its step for packets of a size.
type Measurement = (&'static str, fn(usize) -> Step);

const ROWS: [Measurement; 6] = [
    ("memcpy in", memcpy_in),
    ("send", send),
    ("memcpy out", memcpy_out),
    ("receive", receive),
    ("dispatch", dispatch),
    ("round trip", round_trip),
];

/// A page: the areas that are copied to and from lie as a ring does.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Bytes between the starts of packets with `size` bytes of data.
fn stride(size: usize) -> usize {
    size.next_multiple_of(8) + 24
}

/// Copies to where packets lie: one after the other around an area as large as the ring.
fn memcpy_in(size: usize) -> Step {
    let data = vec![0x5A; size];
    let mut area = vec![Page([0; 4096]); RING_PAGES];
    let mut at = 0;
    Box::new(move |_, count| {
        let area = area.as_mut_bytes();
        timed(&mut || {
            for _ in 0..count {
                if at + stride(size) > area.len() {
                    at = 0;
                }
                black_box(&mut area[at + 16..at + 16 + size]).copy_from_slice(black_box(&data));
                at += stride(size);
            }
        })
    })
}

/// Copies from where packets lie.
fn memcpy_out(size: usize) -> Step {
    let mut data = vec![0; size];
    let mut area = vec![Page([0x5A; 4096]); RING_PAGES];
    let mut at = 0;
    Box::new(move |_, count| {
        let area = area.as_mut_bytes();
        timed(&mut || {
            for _ in 0..count {
                if at + stride(size) > area.len() {
                    at = 0;
                }
                black_box(&mut data[..]).copy_from_slice(black_box(&area[at + 16..at + 16 + size]));
                at += stride(size);
            }
        })
    })
}

/// `Channel::allocate_packet` and `OutgoingPacket::send`.
fn send(size: usize) -> Step {
    let data = vec![0x5A; size];
    Box::new(move |world, count| {
        let channel = world.channel();
        let time = timed(&mut || {
            for _ in 0..count {
                let packet = channel.allocate_packet().unwrap();
                packet.send(black_box(&data)).unwrap();
            }
        });
        world.drain();
        time
    })
}

/// The ring alone: `Reader::read` and `Reader::publish`, in a ring of its own.
fn receive(size: usize) -> Step {
    let pages = SharedPages::from_heap(vmbus::ids::PageNumber(1), RING_PAGES + 1).unwrap();
    let ring = Ring::new(&pages, 0, RING_PAGES + 1).unwrap();
    let mut writer = Writer::new(ring.clone()).unwrap();
    let mut reader = Reader::new(ring);
    let mut buffer = PacketBuffer::with_capacity(size).unwrap();
    let data = vec![0x5A; size];
    Box::new(move |_, count| {
        for _ in 0..count {
            writer.push(&Outgoing::in_band([&data, &[]])).unwrap();
        }
        let _ = writer.publish().unwrap();
        timed(&mut || {
            for _ in 0..count {
                assert!(reader.read(&mut buffer).unwrap());
                black_box(buffer.payload());
            }
            let _ = reader.publish().unwrap();
        })
    })
}

/// An interrupt: the dispatcher, the process-packet callback for each packet, processing-complete.
fn dispatch(size: usize) -> Step {
    let data = vec![0x5A; size];
    Box::new(move |world, count| {
        assert!(world.fill(&data, count), "the guest has unmasked");
        timed(&mut || world.vmbus.on_event(world.id))
    })
}

/// `OutgoingPacket::send_transaction`, the host's answer, the interrupt, and the completion routine: one at a time, both ends
/// timed.
fn round_trip(size: usize) -> Step {
    let data = vec![0x5A; size];
    let idle: Arc<std::sync::Mutex<Option<OutgoingPacket>>> = Arc::default();
    let mut begun = false;
    Box::new(move |world, count| {
        if !begun {
            begun = true;
            let mut packet = world.channel().allocate_packet().unwrap();
            let back = idle.clone();
            packet.set_completion_routine(Arc::new(move |packet, answer| {
                black_box(answer.unwrap());
                *back.lock().unwrap() = Some(packet);
            }));
            *idle.lock().unwrap() = Some(packet);
        }
        timed(&mut || {
            for _ in 0..count {
                let packet = idle.lock().unwrap().take().expect("it has come back");
                packet.send_transaction(black_box(&data)).unwrap();
                assert!(world.reader.read(&mut world.buffer).unwrap());
                let _ = world.reader.publish().unwrap();
                let id = world.buffer.transaction_id();
                let answer = Outgoing::completion(id, &[0; ANSWER]);
                world.writer.push(&answer).unwrap();
                assert_eq!(world.writer.publish(), Ok(Signal::Needed));
                world.vmbus.on_event(world.id);
            }
        })
    })
}

/// Runs the work of a row, and tells how long it took.
fn timed(work: &mut dyn FnMut()) -> Duration {
    let start = Instant::now();
    counted(work);
    start.elapsed()
}

/// All that a row is about happens in here, and nothing else: a tool that counts instructions is told this name.
#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
}

/// Packets of a batch: as many as fill half a ring, up to [`BATCH`].
fn batch(size: usize) -> usize {
    (RING_PAGES * 4096 / 2 / stride(size)).clamp(1, BATCH)
}

/// What was measured.
struct Row {
    name: &'static str,
    size: usize,
    /// Nanoseconds per packet, one figure per round, sorted.
    rounds: Vec<f64>,
    signals_per_packet: f64,
    allocations: u64,
}

impl Row {
    fn print(&self) {
        let at = |part: f64| self.rounds[((self.rounds.len() - 1) as f64 * part).round() as usize];
        let median = at(0.5);
        println!(
            "{{\"row\":\"{}\",\"bytes\":{},\"batch\":{},\"ns\":{median:.3},\"ns_low\":{:.3},\"ns_high\":{:.3},\
             \"gb_per_s\":{:.4},\"signals_per_packet\":{:.5},\"allocations\":{}}}",
            self.name,
            self.size,
            if self.name == "round trip" {
                1
            } else {
                batch(self.size)
            },
            at(0.1),
            at(0.9),
            self.size as f64 / median,
            self.signals_per_packet,
            self.allocations,
        );
    }
}

/// One round: batches until the time is over. The median batch, in nanoseconds per packet: whatever interrupts some of them
/// does not count.
fn round(
    world: &mut World,
    step: &mut Step,
    size: usize,
    packets: &mut u64,
    batches: &mut Vec<Duration>,
) -> f64 {
    let count = batch(size);
    batches.clear();
    let begin = Instant::now();
    while begin.elapsed() < ROUND && batches.len() < batches.capacity() {
        batches.push(step(world, count));
    }
    *packets += (batches.len() * count) as u64;
    batches.sort_unstable();
    batches[batches.len() / 2].as_nanos() as f64 / count as f64
}

/// What reading the clock costs by itself.
fn clock() -> f64 {
    let mut times: Vec<_> = (0..1001).map(|_| timed(&mut || ())).collect();
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let number = |name: &str| value(name).map(|text| text.parse::<usize>().expect("a number"));

    // For a tool that counts instructions: so many packets and no clock.
    if let (Some(name), Some(size), Some(packets)) =
        (value("--row"), number("--bytes"), number("--packets"))
    {
        let (_, make) = ROWS.iter().find(|row| row.0 == name).expect("a row");
        let mut world = World::new();
        let mut step = make(size);
        for _ in 0..packets.div_ceil(batch(size)) {
            step(&mut world, batch(size));
        }
        return;
    }

    let rounds = number("--rounds").unwrap_or(15);
    let clock = clock();
    let mut batches = Vec::with_capacity(1 << 16);
    let mut failed = false;
    for size in SIZES {
        let mut world = World::new();
        let mut steps: Vec<(&str, Step, Row)> = ROWS
            .iter()
            .map(|(name, make)| {
                let row = Row {
                    name,
                    size,
                    rounds: Vec::with_capacity(rounds),
                    signals_per_packet: 0.0,
                    allocations: 0,
                };
                (*name, make(size), row)
            })
            .collect();
        // The rows take turns, so that whatever slows the computer for a while meets all of them. The first round warms up.
        for turn in 0..=rounds {
            for (_, step, row) in &mut steps {
                let before = world.hypervisor.signals.load(Ordering::Relaxed);
                let (mut packets, mut ns) = (0, 0.0);
                let heap = allocation_counter::measure(|| {
                    ns = round(&mut world, step, size, &mut packets, &mut batches);
                });
                if turn == 0 {
                    continue;
                }
                let signals = world.hypervisor.signals.load(Ordering::Relaxed) - before;
                row.rounds.push(ns - clock / batch(size) as f64);
                row.signals_per_packet = signals as f64 / packets as f64;
                row.allocations += heap.count_total;
            }
        }
        for (_, _, mut row) in steps {
            row.rounds.sort_by(f64::total_cmp);
            row.print();
            failed |= row.allocations != 0;
        }
    }
    assert!(!failed, "something allocated in steady state");
}
