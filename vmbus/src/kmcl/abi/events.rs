//! A driver's callbacks in C, registered with the Rust API.

use alloc::sync::Arc;
use core::ffi::c_void;
use core::ptr;
use core::sync::atomic::Ordering;

use super::callbacks::{
    PFN_VMB_CHANNEL_PROCESS_PACKET, PFN_VMB_CHANNEL_PROCESS_PACKET_EX,
    PFN_VMB_CHANNEL_PROCESSING_COMPLETE, PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX,
};
use super::incoming::{self, Delivery};
use super::object::{ChannelObject, Config};
use super::types::{
    NTSTATUS, PVOID, STATUS_DEVICE_REMOVED, STATUS_INSUFFICIENT_RESOURCES, STATUS_SUCCESS,
    STATUS_UNSUCCESSFUL, VMB_CHANNEL_STATE_CHANGE_CALLBACKS, VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5,
    VMBCHANNEL,
};
use crate::bus::OpenError;
use crate::kmcl::{ChannelBuilder, ChannelError, Refused};

/// A pointer that only the driver follows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context(pub(super) *mut c_void);

// SAFETY: the library hands it around and never follows it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Default for Context {
    fn default() -> Self {
        Self(ptr::null_mut())
    }
}

/// What sees received packets.
#[derive(Clone, Copy, Default)]
pub(super) enum Process {
    #[default]
    Nothing,
    Plain(
        PFN_VMB_CHANNEL_PROCESS_PACKET,
        PFN_VMB_CHANNEL_PROCESSING_COMPLETE,
    ),
    Ex(
        Context,
        PFN_VMB_CHANNEL_PROCESS_PACKET_EX,
        PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX,
    ),
}

/// What hears of state changes.
#[derive(Clone, Copy, Default)]
pub(super) enum StateChange {
    #[default]
    Nothing,
    Plain(VMB_CHANNEL_STATE_CHANGE_CALLBACKS),
    Ex(Context, VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5),
}

// SAFETY: functions, and a context that only the driver follows.
unsafe impl Send for StateChange {}
// SAFETY: as above.
unsafe impl Sync for StateChange {}

/// A state-change callback in one of its two forms.
macro_rules! call {
    ($callbacks:expr, $field:ident, $channel:expr) => {
        match $callbacks {
            StateChange::Nothing => None,
            StateChange::Plain(callbacks) => callbacks.$field.map(|callback| {
                // SAFETY: the driver registered a function of this type for this channel.
                unsafe { callback($channel) }
            }),
            StateChange::Ex(context, callbacks) => callbacks.$field.map(|callback| {
                // SAFETY: the driver registered a function of this type for this channel.
                unsafe { callback($channel, context.0) }
            }),
        }
    };
}

impl Process {
    fn packet(self, channel: VMBCHANNEL, it: Delivery) {
        match self {
            Self::Plain(Some(callback), _) => {
                // SAFETY: the driver registered a function of this type; the buffer stays until the packet is completed.
                unsafe { callback(channel, it.handle, it.buffer, it.length, it.flags) };
            }
            Self::Ex(context, Some(callback), _) => {
                // SAFETY: as above.
                unsafe {
                    callback(
                        channel, context.0, it.handle, it.buffer, it.length, it.flags,
                    );
                }
            }
            _ => {}
        }
    }

    fn complete(self, channel: VMBCHANNEL, packets: u32) {
        match self {
            Self::Plain(_, Some(callback)) => {
                // SAFETY: the driver registered a function of this type.
                unsafe { callback(channel, packets) };
            }
            Self::Ex(context, _, Some(callback)) => {
                // SAFETY: as above.
                unsafe { callback(channel, context.0, packets) };
            }
            _ => {}
        }
    }
}

/// Registers all that the driver wants to hear of.
pub(super) fn register(
    mut builder: ChannelBuilder,
    object: &Arc<ChannelObject>,
    config: &Config,
) -> ChannelBuilder {
    let handle = object.handle;
    let process = config.process;
    if matches!(
        process,
        Process::Plain(Some(_), _) | Process::Ex(_, Some(_), _)
    ) {
        let place = (object.owner, object.place);
        builder = builder.process_packet_callbacks(
            move |_, packet| incoming::deliver(place, packet, |it| process.packet(handle, it)),
            move |_, packets| process.complete(handle, packets),
        );
    }
    let callbacks = config.state_change;
    let opened = object.clone();
    builder = builder
        .opened(move |_| {
            let status = call!(callbacks, EvtChannelOpened, handle).unwrap_or(STATUS_SUCCESS);
            if status.is_success() {
                return Ok(());
            }
            opened.refusal.store(status.0, Ordering::Relaxed);
            Err(Refused("its opened callback failed"))
        })
        .started(move |_| {
            call!(callbacks, EvtChannelStarted, handle);
        })
        .post_started(move |_| {
            call!(callbacks, EvtChannelPostStarted, handle);
        })
        .suspend(move |_| {
            call!(callbacks, EvtChannelSuspend, handle);
        })
        .closed(move |_| {
            call!(callbacks, EvtChannelClosed, handle);
        });
    if let Some(callback) = config.pnp_failure {
        let object = object.clone();
        builder = builder.failure(move |_, error| {
            let refusal = NTSTATUS(object.refusal.load(Ordering::Relaxed));
            if let Some(status) = open_failure(error, refusal) {
                // SAFETY: the driver registered a function of this type.
                unsafe { callback(handle, status) };
            }
        });
    }
    builder
}

/// The status of a channel that did not open; `None` for one that did.
fn open_failure(error: ChannelError, refusal: NTSTATUS) -> Option<NTSTATUS> {
    match error {
        ChannelError::Refused(_) => Some(refusal),
        ChannelError::NoMemory(_) => Some(STATUS_INSUFFICIENT_RESOURCES),
        // Hosts answer with an NTSTATUS, as a rule.
        ChannelError::Open(OpenError::Refused(status)) => {
            { Some(NTSTATUS::from_bits(status.0)).filter(|status| !status.is_success()) }
                .or(Some(STATUS_UNSUCCESSFUL))
        }
        ChannelError::Open(OpenError::Rescinded) => Some(STATUS_DEVICE_REMOVED),
        ChannelError::Bus(_) | ChannelError::Gpadl(_) | ChannelError::Open(_) => {
            Some(STATUS_UNSUCCESSFUL)
        }
        _ => None,
    }
}

/// A pointer without anything behind it.
pub(super) const NOTHING: PVOID = ptr::null_mut();
