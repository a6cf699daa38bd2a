//! The types of the functions that drivers write (spec kmcl.md 1.12).

use super::declare::callbacks;
use super::types::{
    NTSTATUS, PDEVICE_OBJECT, PVOID, UINT32, VMBCHANNEL, VMBPACKET, VMBPACKETCOMPLETION,
};

callbacks! {
    /// Takes or gives back a reference to an interface.
    fn INTERFACE_REFERENCE PINTERFACE_REFERENCE(Context: PVOID);
    /// Takes or gives back a reference to an interface.
    fn INTERFACE_DEREFERENCE PINTERFACE_DEREFERENCE(Context: PVOID);

    /// At PASSIVE: the channel has opened and nothing flows yet. Sends are lined up; GPADLs can be created.
    /// A failure closes the channel again.
    fn EVT_VMB_CHANNEL_OPENED PFN_VMB_CHANNEL_OPENED(Channel: VMBCHANNEL) -> NTSTATUS;
    /// The same with the registered context.
    fn EVT_VMB_CHANNEL_OPENED_EX PFN_VMB_CHANNEL_OPENED_EX(Channel: VMBCHANNEL, CallbackContext: PVOID) -> NTSTATUS;
    /// At PASSIVE: delivery is about to begin. Must not wait for a packet or a completion.
    fn EVT_VMB_CHANNEL_STARTED PFN_VMB_CHANNEL_STARTED(Channel: VMBCHANNEL);
    /// The same with the registered context.
    fn EVT_VMB_CHANNEL_STARTED_EX PFN_VMB_CHANNEL_STARTED_EX(Channel: VMBCHANNEL, CallbackContext: PVOID);
    /// At PASSIVE: packets flow, and some may have been delivered already. The place to negotiate.
    fn EVT_VMB_CHANNEL_POST_STARTED PFN_VMB_CHANNEL_POST_STARTED(Channel: VMBCHANNEL);
    /// The same with the registered context.
    fn EVT_VMB_CHANNEL_POST_STARTED_EX PFN_VMB_CHANNEL_POST_STARTED_EX(Channel: VMBCHANNEL, CallbackContext: PVOID);
    /// At PASSIVE: no packet is being delivered or will be until the channel is started again. Every
    /// delivered packet must be completed, now or later; the channel waits for that.
    fn EVT_VMB_CHANNEL_SUSPEND PFN_VMB_CHANNEL_SUSPEND(Channel: VMBCHANNEL);
    /// The same with the registered context.
    fn EVT_VMB_CHANNEL_SUSPEND_EX PFN_VMB_CHANNEL_SUSPEND_EX(Channel: VMBCHANNEL, CallbackContext: PVOID);
    /// At PASSIVE: the channel has closed. Every GPADL must be deleted here.
    fn EVT_VMB_CHANNEL_CLOSED PFN_VMB_CHANNEL_CLOSED(Channel: VMBCHANNEL);
    /// The same with the registered context.
    fn EVT_VMB_CHANNEL_CLOSED_EX PFN_VMB_CHANNEL_CLOSED_EX(Channel: VMBCHANNEL, CallbackContext: PVOID);
    /// At PASSIVE: a device was there, but its channel could not be opened.
    fn EVT_VMB_CHANNEL_PNP_FAILURE PFN_VMB_CHANNEL_PNP_FAILURE(Channel: VMBCHANNEL, FailureStatus: NTSTATUS);

    /// At DISPATCH or PASSIVE: one packet was received. Buffer stays until the packet is completed.
    fn EVT_VMB_CHANNEL_PROCESS_PACKET PFN_VMB_CHANNEL_PROCESS_PACKET(Channel: VMBCHANNEL, Packet: VMBPACKETCOMPLETION, Buffer: PVOID, BufferLength: UINT32, Flags: UINT32);
    /// The same with the registered context.
    fn EVT_VMB_CHANNEL_PROCESS_PACKET_EX PFN_VMB_CHANNEL_PROCESS_PACKET_EX(Channel: VMBCHANNEL, CallbackContext: PVOID, Packet: VMBPACKETCOMPLETION, Buffer: PVOID, BufferLength: UINT32, Flags: UINT32);
    /// At DISPATCH or PASSIVE: a batch has ended, after its last packet. Never called for an empty batch.
    fn EVT_VMB_CHANNEL_PROCESSING_COMPLETE PFN_VMB_CHANNEL_PROCESSING_COMPLETE(Channel: VMBCHANNEL, PacketsProcessed: UINT32);
    /// The same with the registered context.
    fn EVT_VMB_CHANNEL_PROCESSING_COMPLETE_EX PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX(Channel: VMBCHANNEL, CallbackContext: PVOID, PacketsProcessed: UINT32);
    /// At DISPATCH or PASSIVE, exactly once for each accepted send: the peer completed it, or, when no completion was
    /// asked for, it has entered the ring; or it failed. The packet is the driver's again. Buffer ends with the call.
    fn EVT_VMB_PACKET_COMPLETION_ROUTINE PFN_VMB_PACKET_COMPLETION_ROUTINE(Packet: VMBPACKET, Status: NTSTATUS, Buffer: PVOID, BufferLength: UINT32);
    /// The same with the registered context.
    fn EVT_VMB_PACKET_COMPLETION_ROUTINE_EX PFN_VMB_PACKET_COMPLETION_ROUTINE_EX(Packet: VMBPACKET, CallbackContext: PVOID, Status: NTSTATUS, Buffer: PVOID, BufferLength: UINT32);

    /// Servers only.
    fn EVT_VMB_CHANNEL_SAVE_PACKET PFN_VMB_CHANNEL_SAVE_PACKET(Channel: VMBCHANNEL, Packet: VMBPACKETCOMPLETION, SaveBuf: PVOID, SaveBufSize: UINT32, BytesNeeded: *mut UINT32) -> NTSTATUS;
    /// Servers only.
    fn EVT_VMB_CHANNEL_SAVE_PACKET_EX PFN_VMB_CHANNEL_SAVE_PACKET_EX(Channel: VMBCHANNEL, CallbackContext: PVOID, Packet: VMBPACKETCOMPLETION, SaveBuf: PVOID, SaveBufSize: UINT32, BytesNeeded: *mut UINT32) -> NTSTATUS;
    /// Servers only.
    fn EVT_VMB_CHANNEL_RESTORE_PACKET PFN_VMB_CHANNEL_RESTORE_PACKET(Channel: VMBCHANNEL, LibBuf: PVOID, LibBufSize: UINT32, SaveBuf: PVOID, SaveBufSize: UINT32) -> NTSTATUS;
    /// Servers only.
    fn EVT_VMB_CHANNEL_RESTORE_PACKET_EX PFN_VMB_CHANNEL_RESTORE_PACKET_EX(Channel: VMBCHANNEL, CallbackContext: PVOID, LibBuf: PVOID, LibBufSize: UINT32, SaveBuf: PVOID, SaveBufSize: UINT32) -> NTSTATUS;

    /// Starts a driver of this implementation on a device, with zeroed memory of its own.
    fn VMB_DRIVER_START PVMB_DRIVER_START(Device: PDEVICE_OBJECT, Extension: PVOID) -> NTSTATUS;
    /// Ends it.
    fn VMB_DRIVER_STOP PVMB_DRIVER_STOP(Device: PDEVICE_OBJECT, Extension: PVOID);
    /// Called at PASSIVE, outside of the driver's callbacks, after each piece of the bus's work.
    fn VMB_DRIVER_ATTEND PVMB_DRIVER_ATTEND(Device: PDEVICE_OBJECT, Extension: PVOID);
}
