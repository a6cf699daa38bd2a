//! The end of the machine in good order: by itself, or because the host asks for it.

use core::future::pending;
use core::sync::atomic::{AtomicBool, Ordering};

use alloc::sync::Arc;
use embassy_time::{Duration, Instant, Timer};
use vmbus::ConnectionState;
use vmbus::drivers::shutdown::Shutdown;

pub use vmbus::drivers::shutdown::{Action, Reason, Request};

use super::{Decision, Hook};
use crate::sync::Lock;
use crate::{drivers, partition, power};

/// How long the host has at most to read the answer to its request.
const READING_TIME: Duration = Duration::from_secs(2);

static HOOK: Lock<Option<Arc<Hook>>> = Lock::new(None);

/// Sets the hook in place of the one before.
pub(crate) fn set_hook(hook: Hook) {
    let before = HOOK.lock().replace(Arc::new(hook));
    drop(before);
}

/// Serves the host's requests for as long as the machine lives.
pub(crate) async fn serve(driver: &'static Shutdown) {
    loop {
        let asked = driver.next_request().await;
        let request = asked.request();
        let action = request.action;
        log::info!(
            "shutdown: the host asks the guest to {action}{}{}{}",
            if request.force { " by force" } else { "" },
            if request.text.is_empty() { "" } else { ": " },
            request.text
        );
        let hook = HOOK.lock().clone();
        let decision = match hook {
            Some(hook) => hook.decide(request.clone()).await,
            None => Decision::Accept,
        };
        let answered = match decision {
            Decision::Accept => asked.accept(),
            Decision::Refuse => asked.refuse(),
        };
        match (decision, answered) {
            (Decision::Refuse, _) => log::info!("shutdown: refused"),
            // Then it is not to be obeyed either.
            (Decision::Accept, Err(withdrawn)) => log::warn!("shutdown: {withdrawn}"),
            (Decision::Accept, Ok(())) => {
                answer_read(driver).await;
                match action {
                    Action::PowerOff => power_off().await,
                    Action::Restart => reboot().await,
                }
            }
        }
    }
}

/// Waits until the host has read the answer: a channel that closes takes unread messages with it.
async fn answer_read(driver: &Shutdown) {
    let end = Instant::now() + READING_TIME;
    let channel = driver.channel().channel();
    while !channel.is_drained() {
        if Instant::now() > end {
            log::warn!("shutdown: the host does not read the answer");
            return;
        }
        // No event tells.
        Timer::after(Duration::from_millis(1)).await;
    }
}

/// Leaves VMBus and powers off.
pub(crate) async fn power_off() -> ! {
    leave("power off").await;
    power::power_off_now();
    // Never a machine that neither runs nor ends.
    power::reboot_now()
}

/// Leaves VMBus and reboots, by the hypervisor's reset register.
pub(crate) async fn reboot() -> ! {
    leave("reboot").await;
    power::reboot_now()
}

async fn leave(what: &str) {
    static LEAVING: AtomicBool = AtomicBool::new(false);
    if LEAVING.swap(true, Ordering::Relaxed) {
        // The one who was first ends the machine.
        return pending().await;
    }
    log::info!("machine: leaving VMBus to {what}");
    let Some(vmbus) = drivers::vmbus() else {
        return;
    };
    vmbus.begin_unload();
    let mut seen = vmbus.changes();
    while !matches!(
        vmbus.connection(),
        ConnectionState::Unloaded { .. } | ConnectionState::Failed(_)
    ) {
        seen = vmbus.changed(seen).await;
    }
    match vmbus.connection() {
        ConnectionState::Unloaded { acknowledged: true } => {
            log::info!("machine: the host has let go of VMBus");
        }
        _ => log::warn!("machine: the host did not confirm that it has let go of VMBus"),
    }
    partition::stop();
}
