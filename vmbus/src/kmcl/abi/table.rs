//! The function tables: every function declared once, with what carries it out (spec kmcl.md 1.5 to 1.11).

use core::ffi::c_void;
use core::mem::{offset_of, size_of};

use super::arguments::Argument;
use super::callbacks::{
    PFN_VMB_CHANNEL_PNP_FAILURE, PFN_VMB_CHANNEL_PROCESS_PACKET, PFN_VMB_CHANNEL_PROCESS_PACKET_EX,
    PFN_VMB_CHANNEL_PROCESSING_COMPLETE, PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX,
    PFN_VMB_CHANNEL_RESTORE_PACKET, PFN_VMB_CHANNEL_RESTORE_PACKET_EX, PFN_VMB_CHANNEL_SAVE_PACKET,
    PFN_VMB_CHANNEL_SAVE_PACKET_EX, PFN_VMB_PACKET_COMPLETION_ROUTINE,
    PFN_VMB_PACKET_COMPLETION_ROUTINE_EX,
};
use super::declare::{Function, Interface, prototype};
use super::types::{
    BOOLEAN, GUID, HANDLE, INTERFACE, LARGE_INTEGER, MDL, NTSTATUS, PDEVICE_OBJECT, PFN_NUMBER,
    PMDL, PVOID, UINT8, UINT16, UINT32, UINT64, ULONG, UNICODE_STRING, USHORT,
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS, VMB_TRANSFER_PAGE_RANGE, VMBCHANNEL, VMBPACKET,
    VMBPACKETCOMPLETION,
};
use super::{channel, configure, device, gpadl, incoming, memory, outgoing, server};

/// Declares the functions: Rust's and C's tables, the functions with C's calling convention and linkage, and the list of them.
macro_rules! functions {
    (
        client 1 $v1:tt
        client 2 $v2:tt
        client 3 $v3:tt
        client 4 $v4:tt
        client 5 $v5:tt
        server 1 $s1:tt
        server 5 $s5:tt
        linked $linked:tt
        extension $extension:tt
    ) => {
        functions!(@define $v1);
        functions!(@define $v2);
        functions!(@define $v3);
        functions!(@define $v4);
        functions!(@define $v5);
        functions!(@define $s1);
        functions!(@define $s5);
        functions!(@define $linked);
        functions!(@define $extension);

        functions!(@table
            /// The client table of version 1.
            KMCL_CLIENT_INTERFACE_V1, client_v1, INTERFACE, $v1);
        functions!(@table
            /// The client table of version 2.
            KMCL_CLIENT_INTERFACE_V2, client_v2, INTERFACE, $v1 $v2);
        functions!(@table
            /// The client table of version 3.
            KMCL_CLIENT_INTERFACE_V3, client_v3, INTERFACE, $v1 $v2 $v3);
        functions!(@table
            /// The client table of version 4.
            KMCL_CLIENT_INTERFACE_V4, client_v4, INTERFACE, $v1 $v2 $v3 $v4);
        functions!(@table
            /// The client table of version 5.
            KMCL_CLIENT_INTERFACE_V5, client_v5, INTERFACE, $v1 $v2 $v3 $v4 $v5);
        functions!(@table
            /// What servers have besides client version 1.
            KMCL_SERVER_ONLY_METHODS, server_only_v1, (), $s1);
        functions!(@table
            /// What servers have besides client version 5.
            KMCL_SERVER_ONLY_METHODS_V5, server_only_v5, (), $s1 $s5);
        functions!(@table
            /// The server table of version 1. Its functions for servers refuse.
            KMCL_SERVER_INTERFACE_V1, server_v1, INTERFACE, $v1 $s1);
        functions!(@table
            /// The server table of version 5, in its C layout. Its functions for servers refuse.
            KMCL_SERVER_INTERFACE_V5, server_v5, INTERFACE, $v1 $v2 $v3 $v4 $v5 $s1 $s5);

        /// Every function, in the order of the tables.
        pub const FUNCTIONS: &[Function] = {
            const CLIENT: usize = size_of::<INTERFACE>();
            functions!(@list
                [(KMCL_CLIENT_INTERFACE_V5, CLIENT) Client 1 $v1]
                [(KMCL_CLIENT_INTERFACE_V5, CLIENT) Client 2 $v2]
                [(KMCL_CLIENT_INTERFACE_V5, CLIENT) Client 3 $v3]
                [(KMCL_CLIENT_INTERFACE_V5, CLIENT) Client 4 $v4]
                [(KMCL_CLIENT_INTERFACE_V5, CLIENT) Client 5 $v5]
                [(KMCL_SERVER_ONLY_METHODS_V5, 0) Server 1 $s1]
                [(KMCL_SERVER_ONLY_METHODS_V5, 0) Server 5 $s5]
                $linked $extension)
        };
    };

    // The functions as C calls them.
    (@define {$(
        $(#[doc = $doc:literal])+
        $(@$not_for_guests:ident)? fn $name:ident($($parameter:ident: $ty:ty),* $(,)?) $(-> $result:ident)? = $does:path;
    )+}) => {$(
        $(#[doc = $doc])+
        ///
        /// # Safety
        ///
        /// Each pointer is null or points to what its parameter is for, of the length that goes with it, for the time that
        /// the function says; each callback is a function of its type.
        #[allow(clippy::too_many_arguments, clippy::multiple_unsafe_ops_per_block)]
        #[cfg_attr(not(test), unsafe(no_mangle))]
        pub unsafe extern "win64" fn $name($($parameter: $ty),*) $(-> $result)? {
            // SAFETY: the caller's promise is what the conversions ask for.
            $(let $parameter = unsafe { Argument::into_safe($parameter) };)*
            $does($($parameter),*)
        }
    )+};

    // A table and what fills it.
    (@table $(#[doc = $doc:literal])+ $table:ident, $make:ident, INTERFACE, $({$(
        $(#[doc = $about:literal])+
        $(@$not_for_guests:ident)? fn $name:ident($($parameter:ident: $ty:ty),* $(,)?) $(-> $result:ident)? = $does:path;
    )+})+) => {
        $(#[doc = $doc])+
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $table {
            /// The header.
            pub Interface: INTERFACE,
            $($($(#[doc = $about])+ pub $name: unsafe extern "win64" fn($($ty),*) $(-> $result)?,)+)+
        }

        impl $table {
            /// The table behind this header.
            pub const fn new(header: INTERFACE) -> Self {
                Self { Interface: header, $($($name,)+)+ }
            }
        }

        /// Names and offsets of the table's members.
        pub(super) const fn $make() -> (usize, &'static [(&'static str, usize)]) {
            (size_of::<$table>(), &[$($((stringify!($name), offset_of!($table, $name)),)+)+])
        }
    };
    (@table $(#[doc = $doc:literal])+ $table:ident, $make:ident, (), $({$(
        $(#[doc = $about:literal])+
        $(@$not_for_guests:ident)? fn $name:ident($($parameter:ident: $ty:ty),* $(,)?) $(-> $result:ident)? = $does:path;
    )+})+) => {
        $(#[doc = $doc])+
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $table {
            $($($(#[doc = $about])+ pub $name: unsafe extern "win64" fn($($ty),*) $(-> $result)?,)+)+
        }

        /// Names and offsets of the table's members.
        pub(super) const fn $make() -> (usize, &'static [(&'static str, usize)]) {
            (size_of::<$table>(), &[$($((stringify!($name), offset_of!($table, $name)),)+)+])
        }
    };

    (@list
        $([$place:tt $interface:ident $version:literal {$(
            $(#[doc = $about:literal])+
            $(@$not_for_guests:ident)? fn $name:ident($($parameter:ident: $ty:ty),* $(,)?) $(-> $result:ident)? = $does:path;
        )+}])+
        {$(
            $(#[doc = $linked_about:literal])+
            fn $linked_name:ident($($linked_parameter:ident: $linked_ty:ty),* $(,)?) $(-> $linked_result:ident)? = $linked_does:path;
        )+}
        {$(
            $(#[doc = $own_about:literal])+
            fn $own_name:ident($($own_parameter:ident: $own_ty:ty),* $(,)?) $(-> $own_result:ident)? = $own_does:path;
        )+}
    ) => {
        &[
            $($(Function {
                name: stringify!($name),
                interface: Interface::$interface {
                    version: $version,
                    slot: functions!(@slot $place $name),
                },
                applies_to_guest: functions!(@applies $($not_for_guests)?),
                prototype: prototype!(($($parameter: $ty),*) $(-> $result)?),
                doc: &[$($about),+],
            },)+)+
            $(Function {
                name: stringify!($linked_name),
                interface: Interface::Linked,
                applies_to_guest: true,
                prototype: prototype!(($($linked_parameter: $linked_ty),*) $(-> $linked_result)?),
                doc: &[$($linked_about),+],
            },)+
            $(Function {
                name: stringify!($own_name),
                interface: Interface::Extension,
                applies_to_guest: true,
                prototype: prototype!(($($own_parameter: $own_ty),*) $(-> $own_result)?),
                doc: &[$($own_about),+],
            },)+
        ]
    };
    (@slot ($table:ident, $start:expr) $name:ident) => {
        ((offset_of!($table, $name) - $start) / size_of::<*const c_void>() + 1) as u8
    };
    (@applies) => { true };
    (@applies windows) => { false };
    (@applies server) => { false };
}

functions! {
    client 1 {
        /// Makes a channel on a device, in the Disabled state. At PASSIVE. Ends with VmbChannelCleanup.
        /// INVALID_PARAMETER_1: no such device. NOT_SUPPORTED: IsServer is true.
        /// INVALID_PARAMETER_3: Channel is null. INSUFFICIENT_RESOURCES: too many channels.
        fn VmbChannelAllocate(ParentDeviceObject: PDEVICE_OBJECT, IsServer: BOOLEAN, Channel: *mut VMBCHANNEL) -> NTSTATUS = channel::allocate;
        /// Ends a Disabled channel; its handle and those of its packets are no longer valid. At PASSIVE.
        fn VmbChannelCleanup(Channel: VMBCHANNEL) = channel::cleanup;
        /// Lends memory from VmbAllocateSharedPages to the host under a handle; waits for the host's word. At PASSIVE, from
        /// the opened callback on. INVALID_PARAMETER_1 to _5: channel or state, flags, memory, length, null result.
        /// CANCELLED: the channel ended. UNSUCCESSFUL: the host refused.
        fn VmbChannelCreateGpadlFromBuffer(Channel: VMBCHANNEL, Flags: UINT32, Buffer: PVOID, ByteCount: UINT32, GpadlHandle: *mut UINT32) -> NTSTATUS = gpadl::create_from_buffer;
        /// The same for a piece of a chain of MDLs of such memory; inner edges must lie on page boundaries. A length of zero means
        /// to the end. INVALID_PARAMETER_1 to _6: channel or state, flags, MDL, offset, length, null result.
        fn VmbChannelCreateGpadlFromMdl(Channel: VMBCHANNEL, Flags: UINT32, Mdl: *mut MDL, StartOffsetWithinMdl: UINT32, DataLengthWithinMdl: UINT32, GpadlHandle: *mut UINT32) -> NTSTATUS = gpadl::create_from_mdl;
        /// Takes lent memory back; waits until the host has let go. At PASSIVE. Every GPADL must be deleted in the closed
        /// callback at the latest.
        fn VmbChannelDeleteGpadl(Channel: VMBCHANNEL, GpadlHandle: UINT32) = gpadl::delete;
        /// Closes the channel and waits until it is Disabled. At PASSIVE, not in a callback of the channel.
        fn VmbChannelDisable(Channel: VMBCHANNEL) = channel::disable;
        /// Has a matching offer opened, now or when it comes; returns at once. At PASSIVE.
        /// INVALID_PARAMETER_1: channel or state. INVALID_PARAMETER: the configuration cannot work; the log says why.
        fn VmbChannelEnable(Channel: VMBCHANNEL) -> NTSTATUS = channel::enable;
        /// The instance of the device that the channel is bound to; zeros while it is bound to none. At PASSIVE.
        fn VmbChannelGetInterfaceInstance(Channel: VMBCHANNEL, InterfaceInstance: *mut GUID) = channel::get_interface_instance;
        /// Guest physical address and bytes of the device's register space; zeros when it has none. From the opened callback on.
        fn VmbChannelGetMmioSpace(Channel: VMBCHANNEL, MmioAddress: *mut UINT64, MmioSize: *mut UINT64) = channel::get_mmio_space;
        /// The driver's own pointer.
        fn VmbChannelGetPointer(Channel: VMBCHANNEL) -> PVOID = channel::get_pointer;
        /// Bytes of context for each received packet. INVALID_PARAMETER_1: channel or state.
        fn VmbChannelInitSetClientContextSize(Channel: VMBCHANNEL, ContextSize: UINT32) -> NTSTATUS = configure::client_context_size;
        /// Pipe mode or not. INVALID_PARAMETER_1: channel or state; _2: unknown bits.
        fn VmbChannelInitSetFlags(Channel: VMBCHANNEL, Flags: UINT32) -> NTSTATUS = configure::flags;
        /// The name for logs and counters; it is copied, and can be set once.
        /// INVALID_PARAMETER_1: channel or state; _2: a name is set, or this is none.
        fn VmbChannelInitSetFriendlyName(Channel: VMBCHANNEL, Name: *const UNICODE_STRING) -> NTSTATUS = configure::friendly_name;
        /// The most bytes and the longest chain of a packet's external data.
        /// INVALID_PARAMETER_1: channel or state; _2: no bytes; _3: no chain.
        fn VmbChannelInitSetMaximumExternalData(Channel: VMBCHANNEL, DataSize: UINT32, ChainLength: UINT32) -> NTSTATUS = configure::maximum_external_data;
        /// The most bytes of a packet's inline data. INVALID_PARAMETER_1: channel or state; _2: zero.
        fn VmbChannelInitSetMaximumPacketSize(Channel: VMBCHANNEL, PacketSize: UINT32) -> NTSTATUS = configure::maximum_packet_size;
        /// What runs for every received packet, and, if given, when the incoming ring has become empty.
        /// Replaces what the Ex form has set. INVALID_PARAMETER_1: channel or state.
        fn VmbChannelInitSetProcessPacketCallbacks(Channel: VMBCHANNEL, ProcessPacketCallback: PFN_VMB_CHANNEL_PROCESS_PACKET, ProcessingCompleteCallback: PFN_VMB_CHANNEL_PROCESSING_COMPLETE) -> NTSTATUS = configure::process_packet_callbacks;
        /// What runs when the channel changes its state; the structure is copied.
        /// INVALID_PARAMETER_1: channel or state; _2: unknown version or size, or null.
        fn VmbChannelInitSetStateChangeCallbacks(Channel: VMBCHANNEL, Callbacks: *const VMB_CHANNEL_STATE_CHANGE_CALLBACKS) -> NTSTATUS = configure::state_change_callbacks;
        /// Ends the use of a received packet; the bytes go to the host if it asked for a completion. Owed once for each packet.
        fn VmbChannelPacketComplete(PacketCompletionContext: VMBPACKETCOMPLETION, PacketCompletionBuffer: PVOID, BufSize: UINT32) = incoming::complete;
        /// Only in process-packet: has the packet delivered again at PASSIVE, before any later one.
        fn VmbChannelPacketDeferToPassive(PacketCompletionContext: VMBPACKETCOMPLETION) = incoming::defer_to_passive;
        /// Only in process-packet: gives up on the channel, which is closed. The packet needs no completion.
        fn VmbChannelPacketFail(PacketCompletionContext: VMBPACKETCOMPLETION) = incoming::fail;
        /// A guest's packets lend no pages of the host's: NOT_SUPPORTED, after INVALID_PARAMETER_1 to _3: packet, flags, null result.
        /// Transfer pages are external data that a guest gets: VmbChannelPacketGetTransferPages.
        fn VmbChannelPacketGetExternalData(PacketCompletionContext: VMBPACKETCOMPLETION, Flags: UINT32, Mdl: *mut PMDL) -> NTSTATUS = incoming::get_external_data;
        /// Stops delivery, and waits until the suspend callback has run and every delivered packet is completed.
        /// On a Disabled channel: it will start paused. At PASSIVE, not in a state-change callback.
        fn VmbChannelPause(Channel: VMBCHANNEL) = channel::pause;
        /// Sends and waits for the answer, at PASSIVE; with a zero timeout and no WAIT flag, sends or not, at any level.
        /// BUFFER_OVERFLOW: no room, nothing was sent, or the answer is longer than the buffer. CANCELLED: its time was up.
        /// DEVICE_REMOVED: the channel is closed or closes. INVALID_DEVICE_STATE: it would wait for itself, or at DISPATCH.
        fn VmbChannelSendSynchronousRequest(Channel: VMBCHANNEL, Buffer: PVOID, BufferSize: UINT32, ExternalDataMdl: *mut MDL, Flags: UINT32, CompletionBuffer: PVOID, CompletionBufferSize: *mut UINT32, Timeout: *const LARGE_INTEGER) -> NTSTATUS = outgoing::send_synchronous_request;
        /// Whether packets are delivered at PASSIVE only; from the next batch on.
        fn VmbChannelSetIncomingProcessingAtPassive(Channel: VMBCHANNEL, RequirePassive: BOOLEAN) = channel::set_incoming_processing_at_passive;
        /// How long the host may wait before it looks at what was sent, in units of 100 ns. From the opened callback on.
        /// INVALID_PARAMETER_1: channel or state; _3: null result. NOT_SUPPORTED: the device has no monitored notification.
        fn VmbChannelSetInterruptLatency(Channel: VMBCHANNEL, Latency: UINT16, OriginalLatency: *mut UINT16) -> NTSTATUS = channel::set_interrupt_latency;
        /// Sets the driver's own pointer. In any state.
        fn VmbChannelSetPointer(Channel: VMBCHANNEL, Pointer: PVOID) = channel::set_pointer;
        /// The most packets that may be delivered and not yet completed. Raising it restarts nothing: the next completion does.
        fn VmbChannelSetTransactionQuota(Channel: VMBCHANNEL, Quota: UINT32) = channel::set_transaction_quota;
        /// Bytes that VmbPacketInitialize needs with the configuration as it is; 0 for no channel.
        fn VmbChannelSizeofPacket(Channel: VMBCHANNEL) -> UINT32 = outgoing::size_of_packet;
        /// Ends a pause. At PASSIVE, not in a state-change callback.
        fn VmbChannelStart(Channel: VMBCHANNEL) = channel::start;
        /// Data pages of the rings, without their control pages. Without it they follow the maxima.
        /// INVALID_PARAMETER_1: channel or state; _2, _3: no page.
        fn VmbClientChannelInitSetRingBufferPageCount(Channel: VMBCHANNEL, IncomingPageCount: UINT32, OutgoingPageCount: UINT32) -> NTSTATUS = configure::ring_buffer_page_count;
        /// Which device to open: the interface, and the instance or null for any. The callback hears of a device that could
        /// not be opened. INVALID_PARAMETER_1: channel or state; _2: no interface.
        fn VmbClientChannelInitSetTargetPnp(Channel: VMBCHANNEL, InterfaceType: *const GUID, InterfaceInstance: *const GUID, PnpFailureCallback: PFN_VMB_CHANNEL_PNP_FAILURE) -> NTSTATUS = configure::target_pnp;
        /// A packet to send with all that it will need; null when there is none. Its completion frees it unless a routine is set.
        fn VmbPacketAllocate(Channel: VMBCHANNEL) -> VMBPACKET = outgoing::allocate;
        /// Frees a packet of VmbPacketAllocate that is not in flight.
        fn VmbPacketFree(Packet: VMBPACKET) = outgoing::free;
        /// The channel of a packet.
        fn VmbPacketGetChannel(Packet: VMBPACKET) -> VMBCHANNEL = outgoing::get_channel;
        /// The driver's own pointer.
        fn VmbPacketGetPointer(Packet: VMBPACKET) -> PVOID = outgoing::get_pointer;
        /// Makes a packet of the driver's own memory, whose address is the handle. A completion routine must be set before it is
        /// sent. INVALID_PARAMETER_1: channel; _2: null, or memory of a packet in flight; _3: less than VmbChannelSizeofPacket.
        /// INSUFFICIENT_RESOURCES: the channel has no more packets.
        fn VmbPacketInitialize(Channel: VMBCHANNEL, Packet: VMBPACKET, ByteCount: UINT32) -> NTSTATUS = outgoing::initialize;
        /// Sends, or lines the packet up while the ring is full. The buffer is free on return; a chain of MDLs is lent until the
        /// packet completes and needs the WAIT flag. INVALID_PARAMETER_1: packet, or in flight, or without routine; _2: null
        /// buffer; _3: longer than the channel's maximum. INVALID_PARAMETER: flags or external data. DEVICE_REMOVED: not open.
        fn VmbPacketSend(Packet: VMBPACKET, Buffer: PVOID, BufferLength: UINT32, ExternalDataMdl: *mut MDL, Flags: UINT32) -> NTSTATUS = outgoing::send;
        /// The same with a piece of the chain; a length of zero means to the end.
        fn VmbPacketSendWithExternalMdl(Packet: VMBPACKET, Buffer: PVOID, BufferLength: UINT32, ExternalDataMdl: *mut MDL, MdlOffset: UINT32, MdlLength: UINT32, Flags: UINT32) -> NTSTATUS = outgoing::send_with_external_mdl;
        /// The same with whole pages by their numbers; the driver keeps them until the packet completes.
        fn VmbPacketSendWithExternalPfns(Packet: VMBPACKET, Buffer: PVOID, BufferLength: UINT32, ExternalDataPfns: *mut PFN_NUMBER, PfnLength: UINT32, Flags: UINT32) -> NTSTATUS = outgoing::send_with_external_pfns;
        /// What runs when the packet has ended. Not while it is in flight.
        fn VmbPacketSetCompletionRoutine(Packet: VMBPACKET, CompletionRoutine: PFN_VMB_PACKET_COMPLETION_ROUTINE) = outgoing::set_completion_routine;
        /// Sets the driver's own pointer.
        fn VmbPacketSetPointer(Packet: VMBPACKET, Pointer: PVOID) = outgoing::set_pointer;
    }
    client 2 {
        /// The context of a received packet, of VmbChannelInitSetClientContextSize bytes; null when there is none.
        fn VmbChannelPacketGetClientContext(PacketCompletionContext: VMBPACKETCOMPLETION) -> PVOID = incoming::get_client_context;
        /// There are no device objects below a channel: gives null.
        @windows fn VmbChannelGetTargetDeviceObject(Channel: VMBCHANNEL, DeviceObject: *mut PDEVICE_OBJECT) = channel::get_target_device_object;
        /// The device that the channel was allocated on.
        fn VmbChannelGetParentDeviceObject(Channel: VMBCHANNEL, DeviceObject: *mut PDEVICE_OBJECT) = channel::get_parent_device_object;
    }
    client 3 {
        /// Sizes of staging memory for guests with encrypted memory; this is none, so they are checked and that is all.
        /// INVALID_PARAMETER_1: channel or state; _2 to _4: no whole number of pages.
        fn VmbChannelInitSetBounceBufferSizes(Channel: VMBCHANNEL, InitialBufferSize: UINT32, BufferSizeIncrement: UINT32, MaximumBufferSize: UINT32) -> NTSTATUS = configure::bounce_buffer_sizes;
        /// NOT_SUPPORTED: memory is not encrypted, so nothing is staged. INVALID_PARAMETER_1: channel.
        /// INVALID_PARAMETER: no whole number of pages.
        fn VmbChannelAllocateBounceBuffer(Channel: VMBCHANNEL, BufferSize: UINT32) -> NTSTATUS = configure::allocate_bounce_buffer;
    }
    client 4 {
        /// The most packets to send that exist at one time. INVALID_PARAMETER_1: channel or state; _2: zero.
        fn VmbChannelInitSetMaximumPacketCount(Channel: VMBCHANNEL, PacketCount: UINT32) -> NTSTATUS = configure::maximum_packet_count;
        /// Lends pages to the host by their numbers; the driver keeps them until the GPADL is deleted.
        /// INVALID_PARAMETER_1 to _5 as for VmbChannelCreateGpadlFromBuffer.
        fn VmbChannelCreateGpadlFromPfnList(Channel: VMBCHANNEL, Flags: UINT32, PfnList: *mut PFN_NUMBER, PfnListCount: UINT32, GpadlHandle: *mut UINT32) -> NTSTATUS = gpadl::create_from_pfn_list;
    }
    client 5 {
        /// Makes the channel a sub-channel: opened only while the primary is open, and ended and paused with it.
        /// INVALID_PARAMETER_1: channel or state; _2: no such primary, or one is set; _3: zero.
        fn VmbChannelInitSetPrimaryChannel(Channel: VMBCHANNEL, PrimaryChannel: VMBCHANNEL, SubChannelIndex: UINT16) -> NTSTATUS = configure::primary_channel;
        /// VmbChannelAllocate with the driver's own memory, whose address is the handle. INVALID_PARAMETER_1: no such device;
        /// _3: null, or it is a channel already; _4: less than VmbSizeofChannel. NOT_SUPPORTED: IsServer is true.
        fn VmbChannelInitialize(ParentDeviceObject: PDEVICE_OBJECT, IsServer: BOOLEAN, Channel: VMBCHANNEL, BufferSize: ULONG) -> NTSTATUS = channel::initialize;
        /// The share of time that the channel may take in interrupts, in percent, 1 to 100; beyond it goes on in the work queue.
        fn VmbChannelSetAllowableDpcCpuUsage(Channel: VMBCHANNEL, CpuPercentage: UINT8) = channel::set_allowable_dpc_cpu_usage;
        /// The VP that takes the channel's interrupts. INVALID_PARAMETER_1: channel or state.
        fn VmbClientChannelInitSetTargetProcessorIndex(Channel: VMBCHANNEL, ProcessorIndex: ULONG) -> NTSTATUS = configure::target_processor_index;
        /// Bytes that VmbChannelInitialize needs.
        fn VmbSizeofChannel() -> ULONG = channel::size_of_channel;
        /// Bytes of context for each packet of VmbPacketAllocate. INVALID_PARAMETER_1: channel or state.
        fn VmbChannelInitSetInlinePacketContextSize(Channel: VMBCHANNEL, ContextSize: UINT32) -> NTSTATUS = configure::inline_packet_context_size;
        /// That context; null when there is none.
        fn VmbPacketGetInlinePacketContextPointer(Packet: VMBPACKET) -> PVOID = outgoing::get_inline_context;
        /// VmbChannelInitSetProcessPacketCallbacks with a context; replaces what that has set.
        fn VmbChannelInitSetProcessPacketCallbacksEx(Channel: VMBCHANNEL, CallbackContext: PVOID, ProcessPacketCallback: PFN_VMB_CHANNEL_PROCESS_PACKET_EX, ProcessingCompleteCallback: PFN_VMB_CHANNEL_PROCESSING_COMPLETE_EX) -> NTSTATUS = configure::process_packet_callbacks_ex;
        /// VmbPacketSetCompletionRoutine with a context; replaces what that has set.
        fn VmbPacketSetCompletionRoutineEx(Packet: VMBPACKET, CallbackContext: PVOID, CompletionRoutine: PFN_VMB_PACKET_COMPLETION_ROUTINE_EX) = outgoing::set_completion_routine_ex;
    }
    server 1 {
        /// Maps a client's buffer.
        @server fn VmbChannelMapGpadl(Channel: VMBCHANNEL, Flags: UINT32, GpadlHandle: UINT32, Mdl: *mut PMDL) -> NTSTATUS = server::map_gpadl;
        /// Takes up a saved state.
        @server fn VmbChannelRestoreFromBuffer(Channel: VMBCHANNEL, Buffer: PVOID, BufferSize: ULONG) -> NTSTATUS = server::restore_from_buffer;
        /// Begins to save the state.
        @server fn VmbChannelSaveBegin(Channel: VMBCHANNEL) -> NTSTATUS = server::save_begin;
        /// Saves one piece.
        @server fn VmbChannelSaveContinue(Channel: VMBCHANNEL, SaveBuffer: PVOID, SaveBufferSize: ULONG, BytesFilled: *mut ULONG, BytesRequired: *mut ULONG) -> NTSTATUS = server::save_continue;
        /// Ends saving.
        @server fn VmbChannelSaveEnd(Channel: VMBCHANNEL) = server::save_end;
        /// Ends a mapping.
        @server fn VmbChannelUnmapGpadl(Channel: VMBCHANNEL, GpadlHandle: UINT32) = server::unmap_gpadl;
        /// Converts a handle of the worker process.
        @server fn VmbConvertVmbusHandleToKernelHandle(VmbusHandle: HANDLE, KernelHandle: *mut HANDLE) -> NTSTATUS = server::convert_handle;
        /// Takes up a saved packet.
        @server fn VmbPacketRestore(Packet: VMBPACKET, Buffer: PVOID, BufferSize: ULONG) -> NTSTATUS = server::packet_restore;
        /// Sets flags of the offer.
        @server fn VmbServerChannelInitSetFlags(Channel: VMBCHANNEL, Flags: UINT32) -> NTSTATUS = server::set_flags;
        /// Asks for register space in the guest.
        @server fn VmbServerChannelInitSetMmioMegabytes(Channel: VMBCHANNEL, MmioMegabytes: UINT16, MmioMegabytesOptional: UINT16) -> NTSTATUS = server::set_mmio_megabytes;
        /// Sets what saves and restores packets.
        @server fn VmbServerChannelInitSetSaveRestorePacketCallbacks(Channel: VMBCHANNEL, SavePacketCallback: PFN_VMB_CHANNEL_SAVE_PACKET, RestorePacketCallback: PFN_VMB_CHANNEL_RESTORE_PACKET) -> NTSTATUS = server::set_save_restore;
        /// Names what is offered.
        @server fn VmbServerChannelInitSetTargetInterfaceId(Channel: VMBCHANNEL, InterfaceType: GUID, InterfaceInstance: GUID) -> NTSTATUS = server::set_target_interface;
        /// Offers to one trust level only.
        @server fn VmbServerChannelInitSetTargetVtl(Channel: VMBCHANNEL, TargetVtl: UINT8) -> NTSTATUS = server::set_target_vtl;
        /// Names the VM to offer to.
        @server fn VmbServerChannelInitSetVmbusHandle(Channel: VMBCHANNEL, VmbusHandle: HANDLE) -> NTSTATUS = server::set_vmbus_handle;
    }
    server 5 {
        /// The same with a context.
        @server fn VmbServerChannelInitSetSaveRestorePacketCallbacksEx(Channel: VMBCHANNEL, SaveRestoreContext: PVOID, SavePacketCallback: PFN_VMB_CHANNEL_SAVE_PACKET_EX, RestorePacketCallback: PFN_VMB_CHANNEL_RESTORE_PACKET_EX) -> NTSTATUS = server::set_save_restore_ex;
    }
    linked {
        /// Allocates pages and lends them to the host. As VmbChannelCreateGpadlFromBuffer; INVALID_PARAMETER_3: no page;
        /// _4: null result. INSUFFICIENT_RESOURCES: no memory.
        fn VmbChannelCreateGpadl(Channel: VMBCHANNEL, Flags: UINT32, PageCount: UINT32, GpadlHandle: *mut UINT32) -> NTSTATUS = gpadl::create;
        /// Where the pages of VmbChannelCreateGpadl are mapped. INVALID_PARAMETER_1: channel; _3: no such GPADL; _4: null result.
        fn VmbChannelGetSystemAddressForGpadl(Channel: VMBCHANNEL, Flags: UINT32, GpadlHandle: UINT32, SystemAddress: *mut PVOID) -> NTSTATUS = gpadl::get_system_address;
    }
    extension {
        /// Fills an interface of this size and version, as a query-interface request does on Windows.
        /// INVALID_PARAMETER_1: no such device; _2, _3: null. NOT_SUPPORTED: no such interface or version, a server's included.
        /// INVALID_PARAMETER_4: the size is not that of the version.
        fn VmbQueryInterface(Device: PDEVICE_OBJECT, InterfaceType: *const GUID, Interface: *mut INTERFACE, Size: USHORT, Version: USHORT) -> NTSTATUS = device::query_interface_c;
        /// Zeroed pages that can be lent to the host, contiguous, or null. At PASSIVE.
        fn VmbAllocateSharedPages(Device: PDEVICE_OBJECT, PageCount: UINT32) -> PVOID = memory::allocate_shared_pages;
        /// Gives such pages back. What is still lent stays with the library until the host has let go. At PASSIVE.
        fn VmbFreeSharedPages(Pages: PVOID) = memory::free_shared_pages;
        /// Makes an MDL of a buffer in such pages, in memory of VMB_MDL_SIZE bytes. INVALID_PARAMETER_1: null; _2: less
        /// memory; _3: no such pages; _4: no length, or beyond their end.
        fn VmbInitializeMdl(Mdl: *mut MDL, MdlSize: UINT32, Buffer: PVOID, Length: UINT32) -> NTSTATUS = memory::initialize_mdl;
        /// What a transfer-page packet names. RangeCount: in, room in Ranges; out, how many there are.
        /// INVALID_PARAMETER_1: packet, or none of that kind; _2, _3: null. BUFFER_OVERFLOW: there are more than fit.
        fn VmbChannelPacketGetTransferPages(PacketCompletionContext: VMBPACKETCOMPLETION, SetId: *mut UINT16, RangeCount: *mut UINT32, Ranges: *mut VMB_TRANSFER_PAGE_RANGE) -> NTSTATUS = incoming::get_transfer_pages;
        /// Writes a line to the log: a text of ASCII or UTF-8, ended by a zero, cut after 200 bytes.
        fn VmbLog(Device: PDEVICE_OBJECT, Text: *const UINT8) = device::log;
    }
}
