//! The functions of servers: a guest has no server, so they refuse (spec kmcl.md 1.11 and 5).

use super::arguments::{Memory, Out};
use super::types::{
    GUID, HANDLE, NTSTATUS, PMDL, STATUS_NOT_SUPPORTED, ULONG, VMBCHANNEL, VMBPACKET,
};

/// Says so; for functions without a result that is all there is to see.
fn refuse(name: &str) -> NTSTATUS {
    log::warn!("driver bug: {name} is for servers, and this is a guest");
    STATUS_NOT_SUPPORTED
}

/// Declares functions that refuse.
macro_rules! refusals {
    ($($does:ident = $name:literal ($($ty:ty),*) $(-> $result:ident)?;)+) => {$(
        pub(super) fn $does($(_: $ty),*) $(-> $result)? {
            let status = refuse($name);
            refusals!(@end status $($result)?)
        }
    )+};
    (@end $status:ident) => {{ let _ = $status; }};
    (@end $status:ident $result:ident) => { $status };
}

refusals! {
    map_gpadl = "VmbChannelMapGpadl" (VMBCHANNEL, u32, u32, Out<PMDL>) -> NTSTATUS;
    restore_from_buffer = "VmbChannelRestoreFromBuffer" (VMBCHANNEL, Memory, ULONG) -> NTSTATUS;
    save_begin = "VmbChannelSaveBegin" (VMBCHANNEL) -> NTSTATUS;
    save_continue = "VmbChannelSaveContinue" (VMBCHANNEL, Memory, ULONG, Out<ULONG>, Out<ULONG>) -> NTSTATUS;
    save_end = "VmbChannelSaveEnd" (VMBCHANNEL);
    unmap_gpadl = "VmbChannelUnmapGpadl" (VMBCHANNEL, u32);
    convert_handle = "VmbConvertVmbusHandleToKernelHandle" (Memory, Out<HANDLE>) -> NTSTATUS;
    packet_restore = "VmbPacketRestore" (VMBPACKET, Memory, ULONG) -> NTSTATUS;
    set_flags = "VmbServerChannelInitSetFlags" (VMBCHANNEL, u32) -> NTSTATUS;
    set_mmio_megabytes = "VmbServerChannelInitSetMmioMegabytes" (VMBCHANNEL, u16, u16) -> NTSTATUS;
    set_save_restore = "VmbServerChannelInitSetSaveRestorePacketCallbacks" (
        VMBCHANNEL,
        super::callbacks::PFN_VMB_CHANNEL_SAVE_PACKET,
        super::callbacks::PFN_VMB_CHANNEL_RESTORE_PACKET
    ) -> NTSTATUS;
    set_target_interface = "VmbServerChannelInitSetTargetInterfaceId" (VMBCHANNEL, GUID, GUID) -> NTSTATUS;
    set_target_vtl = "VmbServerChannelInitSetTargetVtl" (VMBCHANNEL, u8) -> NTSTATUS;
    set_vmbus_handle = "VmbServerChannelInitSetVmbusHandle" (VMBCHANNEL, Memory) -> NTSTATUS;
    set_save_restore_ex = "VmbServerChannelInitSetSaveRestorePacketCallbacksEx" (
        VMBCHANNEL,
        Memory,
        super::callbacks::PFN_VMB_CHANNEL_SAVE_PACKET_EX,
        super::callbacks::PFN_VMB_CHANNEL_RESTORE_PACKET_EX
    ) -> NTSTATUS;
}
