//! A VMBus host inside of the guest, served by the heartbeat driver in C.
//!
//! The hosts that tests have offer no heartbeat. So the guest brings its own: the host of the tests on ordinary computers, and a
//! second VMBus stack on it. What is shown is the code: C of a stock compiler in the kernel, calling and called by the
//! function table, at PASSIVE and in an interrupt.

use core::sync::atomic::{AtomicBool, Ordering};

use embassy_time::{Duration, Timer};
use enlit::println;
use vmbus::bus::Config;
use vmbus::{ConnectionState, Vmbus};
use vmbus_c::Heartbeat;
use vmbus_host::bus::Profile;
use vmbus_host::integration::{self, Heartbeat as Provider, Host, Service};
use vmbus_host::machine::Machine;
use vmbus_host::sync::Mutex;

/// One second in units of 100 ns.
const SECOND: u64 = 10_000_000;

/// Lets ten seconds of the machine pass, and gives how many beats were answered meanwhile.
fn beats(machine: &Machine, service: &Mutex<Service<Provider>>) -> u64 {
    let before = service.lock().component.answered();
    machine.advance(10 * SECOND);
    let service = service.lock();
    assert!(
        service.complaints().is_empty(),
        "{:?}",
        service.complaints()
    );
    service.component.answered() - before
}

/// Negotiates, beats at PASSIVE and in an interrupt, and lets the driver end.
pub async fn heartbeat() {
    static IN_INTERRUPT: AtomicBool = AtomicBool::new(false);

    let machine = Machine::new(Profile::hyper_v());
    let vmbus = Vmbus::new(machine.clone(), Config::default());
    machine.attach(vmbus.clone());
    let (id, service) = integration::offer(&machine, Host::HyperV, Provider::new(u64::MAX - 2))
        .expect("an empty bus has room");
    let driver = Heartbeat::start(vmbus.client()).expect("the driver in C starts");
    vmbus.connect();
    machine.settle();
    assert!(
        matches!(vmbus.connection(), ConnectionState::Connected { .. }),
        "{}",
        vmbus.connection()
    );

    let count = beats(&machine, &service);
    println!(
        "heartbeat in C: {:?}, {count} beats at PASSIVE",
        service.lock().version()
    );
    assert!(count >= 4);

    let (inner, inner_service) = (machine.clone(), service.clone());
    enlit::selftest::on_interrupt(move || {
        assert!(beats(&inner, &inner_service) >= 4);
        IN_INTERRUPT.store(true, Ordering::Release);
    });
    enlit::selftest::raise_interrupt();
    while !IN_INTERRUPT.load(Ordering::Acquire) {
        Timer::after(Duration::from_millis(1)).await;
    }
    println!("heartbeat in C: beats in an interrupt");

    drop(driver);
    assert!(!machine.is_open(id), "the driver has closed its channel");
    assert!(
        machine.complaints().is_empty(),
        "{:?}",
        machine.complaints()
    );
}
