//! VMBus and the drivers that the kernel brings: connected, bound to devices, and served.

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use embassy_time::{Duration, Timer};
use spin::Once;
use vmbus::ConnectionState;
use vmbus::Vmbus;
use vmbus::bus::{self, ConnectError};
use vmbus::drivers::balloon::{Balloon, Figures, GuestMemory, PageRange, Phase};
use vmbus::drivers::shutdown::Shutdown;
use vmbus::drivers::standing::Standing;
use vmbus::drivers::time_sync::TimeSync;
use vmbus::drivers::wall_clock::WallClock;
use vmbus::ids::{ChannelId, VpIndex};
#[cfg(feature = "heartbeat")]
use vmbus::kmcl::abi::NTSTATUS;
use vmbus::kmcl::{ConfigError, Guid, State, interface};
use vmbus::protocol::Version;
#[cfg(feature = "heartbeat")]
use vmbus_c::Heartbeat;

use crate::arch::cpu::InterruptsOff;
use crate::arch::{apic, per_cpu};
use crate::hyperv::clock;
use crate::hyperv::message::MessageType;
use crate::hyperv::msr::Sint;
use crate::machine::Machine;
use crate::memory::{frames, manager};
use crate::milestone::{self, Mark};
use crate::partition::Partition;
use crate::start::command_line;
use crate::sync::Lock;
use crate::work::WorkItem;
use crate::{interrupt, services, task, work};

/// How long a required device may take from its offer until it is ready.
const PATIENCE: Duration = Duration::from_secs(20);

/// Frames that the balloon leaves free, whatever the host wants, for the heap to grow, page tables
/// and rings: 1 MiB and 1/64 of all RAM.
fn balloon_reserve(ram: u64) -> u64 {
    256 + ram / 64
}

/// A device that an appliance can insist on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    /// Dynamic memory: the host may take memory and give it back.
    Balloon,
}

impl Device {
    const ALL: [Self; 1] = [Self::Balloon];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Balloon => "balloon",
        }
    }

    const fn interface(self) -> Guid {
        match self {
            Self::Balloon => interface::DYNAMIC_MEMORY,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Balloon => f.write_str("dynamic memory (balloon)"),
        }
    }
}

/// Why the machine did not get as far as `main`.
#[derive(Debug)]
pub(crate) enum Error {
    /// `vmbus.version` names none that this stack speaks.
    UnknownVersion(String),
    /// There is no connection to the host.
    Connect(ConnectError),
    /// A driver is not made right.
    Driver(ConfigError),
    /// The same of one in C.
    #[cfg(feature = "heartbeat")]
    DriverInC(NTSTATUS),
    /// The host does not offer a required device.
    NotOffered { device: Device, offers: usize },
    /// The device was offered, but its channel did not open.
    NotOpened { device: Device, state: State },
    /// The host's side of the device does not want to talk to us.
    Refused {
        device: Device,
        reason: &'static str,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownVersion(version) => write!(
                f,
                "vmbus.version={version} on the command line is no VMBus version that this kernel speaks"
            ),
            Self::Connect(error) => error.fmt(f),
            Self::Driver(error) => error.fmt(f),
            #[cfg(feature = "heartbeat")]
            Self::DriverInC(status) => write!(f, "the heartbeat driver does not start: {status}"),
            Self::NotOffered { device, offers } => write!(
                f,
                "no {device} device: it is not among the {offers} channels that the host offers \
                 (require=none starts without)"
            ),
            Self::NotOpened { device, state } => write!(
                f,
                "the {device} device did not get ready within {} s: its channel is {state}",
                PATIENCE.as_secs()
            ),
            Self::Refused { device, reason } => {
                write!(f, "the host refuses to serve the {device} device: {reason}")
            }
        }
    }
}

/// What the interrupt handler and the work item need.
struct Bus {
    vmbus: Arc<Vmbus>,
    balloon: Balloon,
    shutdown: Shutdown,
    time_sync: TimeSync,
    /// The one in C.
    #[cfg(feature = "heartbeat")]
    heartbeat: Heartbeat,
    work: WorkItem,
    /// A message for which the stack had no room: the next one waits in its slot.
    held: Lock<Option<Vec<u8>>>,
    is_held: AtomicBool,
}

impl Bus {
    /// The channel of each driver.
    fn standing(&self) -> [&Standing; 3] {
        [
            self.balloon.channel(),
            self.shutdown.channel(),
            self.time_sync.channel(),
        ]
    }

    /// Enables the drivers again whose device went away, for when it comes back.
    fn attend(&self) {
        if !matches!(self.vmbus.connection(), ConnectionState::Connected { .. }) {
            return;
        }
        for channel in self.standing() {
            channel.attend(|interface| {
                let offers = self.vmbus.snapshot().offers;
                offers.iter().any(|info| info.offer.interface == interface)
            });
        }
        #[cfg(feature = "heartbeat")]
        self.heartbeat.attend();
    }
}

static BUS: Once<Bus> = Once::new();

/// The VMBus stack, once it was started.
pub(crate) fn vmbus() -> Option<&'static Arc<Vmbus>> {
    BUS.get().map(|bus| &bus.vmbus)
}

/// The balloon, once it was started.
pub(crate) fn balloon() -> Option<&'static Balloon> {
    BUS.get().map(|bus| &bus.balloon)
}

/// Connects to the host, binds the drivers and waits for what is required.
pub(crate) async fn start(requires: &'static [Device]) -> Result<Machine, Error> {
    let partition = Arc::new(Partition { work: Once::new() });
    let vmbus = Vmbus::new(partition.clone(), bus_config()?);
    let balloon = Balloon::new(vmbus.client(), Arc::new(Memory)).map_err(Error::Driver)?;
    let shutdown = Shutdown::new(vmbus.client()).map_err(Error::Driver)?;
    let wall_clock = Arc::new(WallClock::new());
    let time_sync = TimeSync::new(vmbus.client(), wall_clock).map_err(Error::Driver)?;
    #[cfg(feature = "heartbeat")]
    let heartbeat = Heartbeat::start(vmbus.client()).map_err(Error::DriverInC)?;
    let work = work::register("vmbus", run_work);
    partition.work.call_once(|| work);
    let bus = BUS.call_once(|| Bus {
        vmbus: vmbus.clone(),
        balloon,
        shutdown,
        time_sync,
        #[cfg(feature = "heartbeat")]
        heartbeat,
        work,
        held: Lock::new(None),
        is_held: AtomicBool::new(false),
    });
    services::clock::init(&bus.time_sync);
    task::spawn(services::shutdown::serve(&bus.shutdown));
    interrupt::set_handler(interrupt::VMBUS, on_interrupt);
    {
        // What came while there was no handler, as the firmware's last answer may have, would keep the slot full.
        let interrupts = InterruptsOff::enter();
        take_messages(bus);
        drop(interrupts);
    }
    vmbus.connect();

    let mut seen = vmbus.changes();
    loop {
        match vmbus.connection() {
            ConnectionState::Connected {
                all_offers_delivered: true,
                ..
            } => break,
            ConnectionState::Failed(error) => return Err(Error::Connect(error)),
            _ => seen = vmbus.changed(seen).await,
        }
    }
    milestone::reached("VMBus connected, offers known");
    for info in vmbus.snapshot().offers {
        let offer = info.offer;
        let name = offer.interface_name().unwrap_or("unknown device");
        log::debug!(
            "vmbus: channel {} is {name} {}",
            offer.channel,
            offer.instance
        );
    }
    for device in required(requires) {
        wait_for(&vmbus, device).await?;
    }
    Ok(Machine::new())
}

/// The versions to offer the host.
fn bus_config() -> Result<bus::Config, Error> {
    let mut config = bus::Config {
        target_vp: VpIndex(per_cpu::current().vp_index()),
        ..Default::default()
    };
    if let Some(text) = command_line().get("vmbus.version") {
        let wanted = text.split_once('.').and_then(|(major, minor)| {
            Some(Version::new(major.parse().ok()?, minor.parse().ok()?))
        });
        config.versions.retain(|&version| Some(version) == wanted);
        if config.versions.is_empty() {
            return Err(Error::UnknownVersion(text.into()));
        }
    }
    Ok(config)
}

/// What must be there: the command line's word, else the appliance's.
fn required(requires: &'static [Device]) -> Vec<Device> {
    match command_line().get("require") {
        None => requires.into(),
        Some("none") => Vec::new(),
        Some(names) => names
            .split(',')
            .filter_map(|name| {
                let device = Device::ALL.into_iter().find(|device| device.name() == name);
                if device.is_none() {
                    log::warn!("command line: require={name} is ignored, there is no such device");
                }
                device
            })
            .collect(),
    }
}

/// Waits until a required device is served.
async fn wait_for(vmbus: &Vmbus, device: Device) -> Result<(), Error> {
    let offers = vmbus.snapshot().offers;
    if !offers
        .iter()
        .any(|info| info.offer.interface == device.interface())
    {
        return Err(Error::NotOffered {
            device,
            offers: offers.len(),
        });
    }
    let Device::Balloon = device;
    let Some(balloon) = balloon() else {
        unreachable!("started before anything is waited for")
    };
    let deadline = clock::now() + PATIENCE.as_ticks();
    let mut seen = vmbus.changes();
    loop {
        match balloon.status().phase {
            Phase::Ready => break,
            Phase::Refused(reason) => return Err(Error::Refused { device, reason }),
            Phase::Closed | Phase::Negotiating => {}
        }
        let left = deadline.saturating_sub(clock::now());
        if left == 0 {
            let state = balloon.channel().channel().state();
            return Err(Error::NotOpened { device, state });
        }
        let timeout = Timer::after(Duration::from_ticks(left));
        seen = match embassy_futures::select::select(vmbus.changed(seen), timeout).await {
            embassy_futures::select::Either::First(seen) => seen,
            embassy_futures::select::Either::Second(()) => seen,
        };
    }
    milestone::reached("balloon ready");
    milestone::mark(Mark::Balloon);
    Ok(())
}

/// The interrupt of SINT2: events first, then messages, as Windows does it.
fn on_interrupt() {
    let (Some(bus), Some(vp)) = (BUS.get(), per_cpu::current().partition.get()) else {
        return;
    };
    let events = vp.synic.for_each_event(Sint::VMBUS, |flag| {
        bus.vmbus.on_event(ChannelId(flag.into()));
    });
    let messages = take_messages(bus);
    if events == 0 && messages == 0 {
        vp.synic.count_empty_interrupt();
    }
    if vp.vmbus_needs_eoi() {
        apic::end_of_interrupt();
    }
}

/// Hands on the messages in the slot, as many as there is room for, with interrupts off.
fn take_messages(bus: &Bus) -> u32 {
    let Some(vp) = per_cpu::current().partition.get() else {
        return 0;
    };
    let mut taken = 0;
    while !bus.is_held.load(Ordering::Acquire) {
        let Some(message) = vp.synic.take_message(Sint::VMBUS) else {
            break;
        };
        taken += 1;
        if message.kind != MessageType::CHANNEL {
            log::debug!("vmbus: a message of type {:?} is not ours", message.kind);
        } else if !bus.vmbus.on_message(message.payload()) {
            *bus.held.lock() = Some(message.payload().into());
            bus.is_held.store(true, Ordering::Release);
        }
    }
    taken
}

/// The stack's and the balloon's PASSIVE work.
fn run_work() {
    let Some(bus) = BUS.get() else { return };
    bus.vmbus.run_work();
    bus.attend();
    offer_held();
    let now = clock::now();
    if bus
        .balloon
        .deadline()
        .is_some_and(|deadline| deadline <= now)
    {
        bus.balloon.service(now);
    }
    let next = bus
        .vmbus
        .deadline()
        .into_iter()
        .chain(bus.balloon.deadline())
        .min();
    bus.work.queue_at(next);
}

/// Offers the stack, which has emptied its inbox, the message that it had no room for, and those behind it. If an interrupt
/// has filled the inbox again meanwhile, the message stays, and more work has been asked for.
pub(crate) fn offer_held() {
    let Some(bus) = BUS.get().filter(|bus| bus.is_held.load(Ordering::Acquire)) else {
        return;
    };
    let interrupts = InterruptsOff::enter();
    let taken = bus
        .held
        .lock()
        .take_if(|payload| bus.vmbus.on_message(payload));
    if taken.is_some() {
        bus.is_held.store(false, Ordering::Release);
        take_messages(bus);
    }
    drop(interrupts);
}

/// The frame set as the balloon sees it.
struct Memory;

impl GuestMemory for Memory {
    fn figures(&self) -> Figures {
        let figures = manager::figures();
        let held = balloon_pages();
        Figures {
            total: figures.ram,
            free: figures.free,
            committed: figures
                .ram
                .saturating_sub(figures.free)
                .saturating_sub(held),
            reserve: balloon_reserve(figures.ram),
        }
    }

    fn take(&self, wanted: u64, block: u64) -> Option<PageRange> {
        let (first, count) = if block >= frames::BLOCK {
            (manager::take_block()?, frames::BLOCK)
        } else {
            (manager::take_loose()?, 1)
        };
        if count > wanted {
            manager::give_back(first..first + count);
            return None;
        }
        BALLOONED.fetch_add(count, Ordering::Relaxed);
        Some(PageRange { first, count })
    }

    fn give_back(&self, range: PageRange) {
        BALLOONED.fetch_sub(range.count, Ordering::Relaxed);
        manager::give_back(range.first..range.first + range.count);
    }
}

/// Counted here too: the driver asks for figures while it holds its own count.
static BALLOONED: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);

/// Pages that the host has now.
fn balloon_pages() -> u64 {
    BALLOONED.load(Ordering::Relaxed)
}
