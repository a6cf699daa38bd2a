//! A driver's channel that is enabled again when its device comes back.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use spin::Mutex;

use crate::kmcl::{Channel, ChannelBuilder, Client, ConfigError, EnabledChannel, Guid, State};

/// A channel for as long as the driver lives, whatever the host does with the device.
///
/// A channel ends with its device. For the next one of its kind somebody has to enable it again:
/// [`attend`](Self::attend), after each piece of the bus's work.
pub struct Standing {
    client: Client,
    interface: Guid,
    builder: ChannelBuilder,
    channel: Mutex<EnabledChannel>,
    /// The channel has ended because something was wrong.
    failed: Arc<AtomicBool>,
}

impl Standing {
    /// Enables the channel that `builder` describes, for devices of `interface`. Called at PASSIVE.
    pub fn new(
        client: &Client,
        interface: Guid,
        builder: ChannelBuilder,
    ) -> Result<Self, ConfigError> {
        let failed = Arc::new(AtomicBool::new(false));
        let note = failed.clone();
        let builder = builder.failure(move |_, _| note.store(true, Ordering::SeqCst));
        let channel = builder.enable(client)?;
        Ok(Self {
            client: client.clone(),
            interface,
            builder,
            channel: Mutex::new(channel),
            failed,
        })
    }

    /// The channel of now. At PASSIVE.
    pub fn channel(&self) -> Channel {
        self.channel.lock().channel().clone()
    }

    /// The device class that it is for.
    pub fn interface(&self) -> Guid {
        self.interface
    }

    /// Enables the channel again if it has ended: at once if its device was taken away, else, because
    /// the host broke the rules on it, when `is_offered` says that no device of the class is left. Returns
    /// whether it did. At PASSIVE.
    pub fn attend(&self, is_offered: impl FnOnce(Guid) -> bool) -> bool {
        let mut channel = self.channel.lock();
        if channel.channel().state() != State::Disabled
            || (self.failed.load(Ordering::SeqCst) && is_offered(self.interface))
        {
            return false;
        }
        match self.builder.enable(&self.client) {
            Ok(next) => {
                self.failed.store(false, Ordering::SeqCst);
                *channel = next;
                true
            }
            // It was fine the first time.
            Err(error) => {
                log::error!("{}: {error}", channel.channel().friendly_name());
                false
            }
        }
    }
}

impl fmt::Debug for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.channel.lock().fmt(f)
    }
}
