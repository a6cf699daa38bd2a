//! From the first Rust line to `main`.

use core::future::Future;

use bootloader_api::BootInfo;
use spin::Once;

use crate::arch::{cpu, descriptors, entry, paging, per_cpu, physical};
use crate::command_line::{BadValue, CommandLine};
use crate::hyperv::Features;
use crate::machine::Machine;
use crate::memory::manager::{self, TakeOver};
use crate::memory::{self};
use crate::milestone::{self, Mark};
use crate::power::{self, OnPanic, cannot_start};
use crate::sync::Lock;
use crate::{acpi_tables, console, drivers, partition, task};

/// Names the async function that is the appliance, `async fn(Machine)`.
///
/// ```ignore
/// #![no_std]
/// #![no_main]
///
/// enlit::main!(main, requires = [enlit::Device::Balloon]);
///
/// async fn main(machine: enlit::Machine) {
///     enlit::println!("hello");
/// }
/// ```
#[macro_export]
macro_rules! main {
    ($main:path) => { $crate::main!($main, requires = []); };
    ($main:path, requires = [$($device:expr),* $(,)?]) => {
        #[unsafe(no_mangle)]
        fn __enlit_main() {
            $crate::run(&[$($device),*], $main);
        }
    };
}

/// The physical address of the ACPI root pointer, for after the switch.
static ROOT_POINTER: Once<Option<u64>> = Once::new();

/// What came of the search for the hypervisor. It is acted on once there is a way to power off.
static DETECTED: Once<Result<&'static Features, partition::Error>> = Once::new();

/// Memory half taken over, on its way across the switch.
static TAKE_OVER: Lock<Option<(paging::NewTables, TakeOver)>> = Lock::new(None);

/// The command line, copied out of the loader's memory.
static COMMAND_LINE: Lock<([u8; handover::COMMAND_LINE_MAX], usize)> =
    Lock::new(([0; handover::COMMAND_LINE_MAX], 0));

/// Where all entries meet: on a temporary stack and somebody else's page tables.
pub(crate) fn start(boot_info: &'static mut BootInfo, command_line: &[u8]) -> ! {
    descriptors::load_early();
    per_cpu::init_boot_vp();
    milestone::reached("kernel entry");
    {
        let mut kept = COMMAND_LINE.lock();
        let len = command_line.len().min(kept.0.len());
        kept.0[..len].copy_from_slice(&command_line[..len]);
        kept.1 = len;
        early_words(&CommandLine::from_bytes(&kept.0[..len]));
    }
    milestone::mark(Mark::Entry);
    console::init();
    // Before anything can fail: from here on the host hears of it.
    let detected = partition::detect();

    let Some(offset) = boot_info.physical_memory_offset.into_option() else {
        cannot_start(&"the loader did not map physical memory")
    };
    physical::set_loader_offset(offset);
    ROOT_POINTER.call_once(|| boot_info.rsdp_addr.into_option());
    DETECTED.call_once(|| detected);
    match manager::prepare(&boot_info.memory_regions) {
        Ok((tables, take_over)) => {
            *TAKE_OVER.lock() = Some((tables, take_over));
            paging::switch(tables, on_own_tables)
        }
        Err(error) => cannot_start(&error),
    }
}

/// The words that matter before there is a console.
fn early_words(line: &CommandLine<'_>) {
    if let Ok(Some(port)) = line.port("debug-exit") {
        power::set_debug_exit(port);
    }
    if let Ok(Some(port)) = line.port("mark") {
        milestone::set_mark_port(port);
    }
}

/// On our own page tables and the main stack.
extern "sysv64" fn on_own_tables() -> ! {
    let Some((tables, take_over)) = TAKE_OVER.lock().take() else {
        unreachable!("`start` put it there")
    };
    manager::complete(take_over, &tables);
    if load_descriptors().is_none() || memory::heap::init().is_none() {
        let bytes = manager::figures().ram * memory::FRAME_SIZE;
        cannot_start(&manager::Error::TooLittle { bytes });
    }
    let command_line = command_line();
    for bad in words(&command_line).into_iter().flatten() {
        log::warn!("{bad}");
    }
    milestone::reached("memory");
    acpi_tables::init(ROOT_POINTER.get().copied().flatten());

    let features = match DETECTED.get() {
        Some(Ok(features)) => features,
        Some(Err(error)) => cannot_start(error),
        None => unreachable!("`start` looked for the hypervisor"),
    };
    partition::init(features).unwrap_or_else(|error| cannot_start(&error));
    milestone::reached("hypervisor");

    entry::appliance();
    task::run()
}

/// Gives the boot VP its stacks.
fn load_descriptors() -> Option<()> {
    const INTERRUPT_STACK: u64 = 32 * 1024;
    const EXCEPTION_STACK: u64 = 8 * 1024;
    let stacks = per_cpu::Stacks {
        interrupt: manager::map_stack(INTERRUPT_STACK)?,
        double_fault: manager::map_stack(EXCEPTION_STACK)?,
        nmi: manager::map_stack(EXCEPTION_STACK)?,
        machine_check: manager::map_stack(EXCEPTION_STACK)?,
    };
    per_cpu::load_boot_vp_descriptors(stacks);
    Some(())
}

/// The command line, for good.
pub(crate) fn command_line() -> CommandLine<'static> {
    static TEXT: Once<alloc::string::String> = Once::new();
    let text = TEXT.call_once(|| {
        let kept = COMMAND_LINE.lock();
        CommandLine::from_bytes(&kept.0[..kept.1]).as_str().into()
    });
    CommandLine::new(text)
}

/// Obeys the kernel's own words; the answer is what was wrong with them.
fn words<'a>(line: &CommandLine<'a>) -> [Option<BadValue<'a>>; 4] {
    let on_panic = line.parse::<OnPanic>("on-panic", "poweroff, reboot or halt");
    if let Ok(Some(action)) = on_panic {
        power::set_on_panic(action);
    }
    [
        console::init_log(line).err(),
        on_panic.err(),
        line.port("debug-exit").err(),
        line.port("mark").err(),
    ]
}

/// Starts the boot's second half as a task: VMBus, drivers, and then the appliance.
///
/// Called by what [`main!`](crate::main) makes.
pub fn run<F>(requires: &'static [drivers::Device], main: fn(Machine) -> F)
where
    F: Future<Output = ()> + 'static,
{
    debug_assert!(!cpu::interrupts_enabled());
    task::spawn(async move {
        let machine = match drivers::start(requires).await {
            Ok(machine) => machine,
            Err(error) => cannot_start(&error),
        };
        milestone::reached("main");
        milestone::mark(Mark::Main);
        main(machine).await;
    });
}
