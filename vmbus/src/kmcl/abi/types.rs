//! The C side's types, constants and structures by their Windows names (spec kmcl.md 1.2 to 1.5).
//!
//! Each is declared once, here; Rust's types and the C header both come of it.

use core::ffi::c_void;
use core::fmt;
use core::mem::offset_of;

use super::callbacks::{
    PFN_VMB_CHANNEL_CLOSED, PFN_VMB_CHANNEL_CLOSED_EX, PFN_VMB_CHANNEL_OPENED,
    PFN_VMB_CHANNEL_OPENED_EX, PFN_VMB_CHANNEL_POST_STARTED, PFN_VMB_CHANNEL_POST_STARTED_EX,
    PFN_VMB_CHANNEL_STARTED, PFN_VMB_CHANNEL_STARTED_EX, PFN_VMB_CHANNEL_SUSPEND,
    PFN_VMB_CHANNEL_SUSPEND_EX, PINTERFACE_DEREFERENCE, PINTERFACE_REFERENCE, PVMB_DRIVER_ATTEND,
    PVMB_DRIVER_START, PVMB_DRIVER_STOP,
};
use super::declare::{constants, structures};
use crate::protocol::Guid;

/// 0 is false, everything else is true.
pub type BOOLEAN = u8;
/// 8 bits.
pub type UINT8 = u8;
/// 16 bits.
pub type UINT16 = u16;
/// 32 bits.
pub type UINT32 = u32;
/// 64 bits.
pub type UINT64 = u64;
/// 16 bits.
pub type USHORT = u16;
/// 32 bits.
pub type ULONG = u32;
/// A UTF-16 code unit.
pub type WCHAR = u16;
/// The number of a 4096-byte page of guest physical address space.
pub type PFN_NUMBER = u64;
/// Untyped memory.
pub type PVOID = *mut c_void;
/// A Windows handle: only the server block has any use for one.
pub type HANDLE = *mut c_void;

/// An MDL by its address.
pub type PMDL = *mut MDL;

/// Declares opaque handles: numbers that only the library can read.
macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)+) => {$(
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub usize);

        impl $name {
            /// No object.
            pub const NULL: Self = Self(0);

            /// Whether this names no object.
            pub const fn is_null(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    )+};
}

handles! {
    /// A channel object, from Allocate or Initialize until Cleanup.
    VMBCHANNEL;
    /// A packet to send, from Allocate until Free.
    VMBPACKET;
    /// A received packet, from its delivery until it is completed.
    VMBPACKETCOMPLETION;
    /// What channels are allocated on: the VMBus of one partition, as a driver is given it.
    PDEVICE_OBJECT;
}

/// How a function ended. Negative values are failures or warnings.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct NTSTATUS(pub i32);

impl NTSTATUS {
    /// The status with these 32 bits.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits as i32)
    }

    /// Whether C's `NT_SUCCESS` holds: the two upper bits are not those of a warning or an error.
    pub const fn is_success(self) -> bool {
        self.0 >= 0
    }

    /// A name where one is known.
    pub fn name(self) -> Option<&'static str> {
        CONSTANTS
            .iter()
            .find(|constant| constant.ty == "NTSTATUS" && constant.value as u32 == self.0 as u32)
            .map(|constant| constant.name)
    }
}

impl fmt::Display for NTSTATUS {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "NTSTATUS {:#010x}", self.0),
        }
    }
}

impl fmt::Debug for NTSTATUS {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for NTSTATUS {}

constants! {
    group "NTSTATUS values that this interface returns.";
    /// Done.
    STATUS_SUCCESS: NTSTATUS = 0x0000_0000;
    /// Not yet; a success to NT_SUCCESS.
    STATUS_PENDING: NTSTATUS = 0x0000_0103;
    /// It did not fit. A warning, not a success.
    STATUS_BUFFER_OVERFLOW: NTSTATUS = 0x8000_0005;
    /// The operation failed for a reason that has no status of its own.
    STATUS_UNSUCCESSFUL: NTSTATUS = 0xC000_0001;
    /// Some argument, or the arguments together, make no sense.
    STATUS_INVALID_PARAMETER: NTSTATUS = 0xC000_000D;
    /// One part is fine, the next is awaited; no success to NT_SUCCESS.
    STATUS_MORE_PROCESSING_REQUIRED: NTSTATUS = 0xC000_0016;
    /// The buffer is too small for any progress.
    STATUS_BUFFER_TOO_SMALL: NTSTATUS = 0xC000_0023;
    /// Memory, packets or another bounded resource ran out.
    STATUS_INSUFFICIENT_RESOURCES: NTSTATUS = 0xC000_009A;
    /// Not for this end of a channel, or not in this partition.
    STATUS_NOT_SUPPORTED: NTSTATUS = 0xC000_00BB;
    /// The first argument is wrong: the handle, or the state of what it names.
    STATUS_INVALID_PARAMETER_1: NTSTATUS = 0xC000_00EF;
    /// The second argument is wrong.
    STATUS_INVALID_PARAMETER_2: NTSTATUS = 0xC000_00F0;
    /// The third argument is wrong.
    STATUS_INVALID_PARAMETER_3: NTSTATUS = 0xC000_00F1;
    /// The fourth argument is wrong.
    STATUS_INVALID_PARAMETER_4: NTSTATUS = 0xC000_00F2;
    /// The fifth argument is wrong.
    STATUS_INVALID_PARAMETER_5: NTSTATUS = 0xC000_00F3;
    /// The sixth argument is wrong.
    STATUS_INVALID_PARAMETER_6: NTSTATUS = 0xC000_00F4;
    /// Cancelled, or its time was up.
    STATUS_CANCELLED: NTSTATUS = 0xC000_0120;
    /// Not in this state: the call would wait for itself.
    STATUS_INVALID_DEVICE_STATE: NTSTATUS = 0xC000_0184;
    /// The channel has closed, or closes.
    STATUS_DEVICE_REMOVED: NTSTATUS = 0xC000_02B6;

    group "How a packet is sent.";
    /// A transaction: the packet stays in flight until the peer completes it. Needed to send external data.
    VMBUS_CHANNEL_FORMAT_FLAG_WAIT_FOR_COMPLETION: UINT32 = 0x1;
    /// VmbPacketSendWithExternalMdl: the given length counts even past the MDL's own, up to the end of its last page.
    VMBUS_CHANNEL_FORMAT_FLAG_FORCE_MDL_LENGTH: UINT32 = 0x2;
    /// The inline buffer is pageable. Nothing is paged here, so it changes nothing.
    VMBUS_CHANNEL_FORMAT_FLAG_PAGED_BUFFER: UINT32 = 0x4;
    /// The peer only writes the external data.
    VMBUS_CHANNEL_FORMAT_FLAG_DATA_IN_ONLY: UINT32 = 0x8;
    /// The peer only reads the external data.
    VMBUS_CHANNEL_FORMAT_FLAG_DATA_OUT_ONLY: UINT32 = 0x10;
    /// All of them.
    VMBUS_CHANNEL_FORMAT_FLAGS: UINT32 = 0x1F;

    group "How a GPADL is created.";
    /// The peer should only read the buffer. A hint, no protection.
    VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY: UINT32 = 0x1;
    /// All of them.
    VMBUS_CHANNEL_GPADL_FLAGS: UINT32 = 0x1;

    group "How a channel works.";
    /// Pipe mode: every message has a small header, and there are no transactions and no external data.
    VMBUS_CHANNEL_INIT_FLAG_IS_PIPE: UINT32 = 0x1;
    /// All of them.
    VMBUS_CHANNEL_INIT_FLAGS: UINT32 = 0x1;

    group "How a server's channel works; a guest has none.";
    /// Loopback.
    VMBUS_SERVER_CHANNEL_INIT_FLAG_LOOPBACK_OFFER: UINT32 = 0x1;
    /// Software in the guest may open the channel as a file.
    VMBUS_SERVER_CHANNEL_INIT_FLAG_ENUMERATE_DEVICE_INTERFACE: UINT32 = 0x2;
    /// Offered in pipe mode.
    VMBUS_SERVER_CHANNEL_INIT_FLAG_OFFER_AS_PIPE: UINT32 = 0x4;
    /// Offered anew after a restore.
    VMBUS_SERVER_CHANNEL_INIT_FLAG_FORCE_NEW_CHANNEL: UINT32 = 0x8;
    /// A Hyper-V socket.
    VMBUS_SERVER_CHANNEL_INIT_FLAG_TLNPI_PROVIDER_OFFER: UINT32 = 0x10;
    /// All of them.
    VMBUS_SERVER_CHANNEL_INIT_FLAGS: UINT32 = 0x1F;
    /// Bytes of the server's own data in an offer.
    VMBUS_SERVER_CHANNEL_INIT_MAXIMUM_OFFER_DATA: UINT32 = 120;

    group "What process-packet is told.";
    /// The packet names memory outside the ring; see VmbChannelPacketGetTransferPages.
    VMBUS_CHANNEL_PROCESS_PACKET_FLAG_EXTERNAL_DATA: UINT32 = 0x1;
    /// All of them.
    VMBUS_CHANNEL_PROCESS_PACKET_FLAGS: UINT32 = 0x1;

    group "How external data of a received packet is mapped.";
    /// To be read only.
    VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG_READ_ONLY: UINT32 = 0x1;
    /// All of them.
    VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAGS: UINT32 = 0x1;

    group "Versions of the interfaces, and of the state-change callbacks.";
    /// 41 functions.
    KMCL_CLIENT_INTERFACE_VERSION_V1: UINT32 = 1;
    /// 44 functions.
    KMCL_CLIENT_INTERFACE_VERSION_V2: UINT32 = 2;
    /// 46 functions.
    KMCL_CLIENT_INTERFACE_VERSION_V3: UINT32 = 3;
    /// 48 functions.
    KMCL_CLIENT_INTERFACE_VERSION_V4: UINT32 = 4;
    /// 57 functions.
    KMCL_CLIENT_INTERFACE_VERSION_V5: UINT32 = 5;
    /// The newest.
    KMCL_CLIENT_INTERFACE_VERSION_LATEST: UINT32 = 5;
    /// Client version 1 and 14 functions of servers.
    KMCL_SERVER_INTERFACE_VERSION_V1: UINT32 = 1;
    /// Client version 5 and 15 functions of servers.
    KMCL_SERVER_INTERFACE_VERSION_V5: UINT32 = 5;
    /// The newest.
    KMCL_SERVER_INTERFACE_VERSION_LATEST: UINT32 = 5;
    /// VMB_CHANNEL_STATE_CHANGE_CALLBACKS.
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION: UINT32 = 1;
    /// VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5.
    VMB_CHANNEL_STATE_CHANGE_CALLBACKS_VERSION_V5: UINT32 = 5;
}

/// What a query for the client interface asks for.
pub const KMCL_CLIENT_INTERFACE_TYPE: GUID =
    GUID::new(Guid::literal("4aecb860-e161-42bb-a5ca-77f3a9645905"));
/// What a query for the server interface asks for; there is none in a guest.
pub const KMCL_SERVER_INTERFACE_TYPE: GUID =
    GUID::new(Guid::literal("83b21474-c5b9-4f65-b5e7-720c692bd371"));

/// The two by their names, for the header.
pub(super) const GUIDS: &[(&str, GUID)] = &[
    ("KMCL_CLIENT_INTERFACE_TYPE", KMCL_CLIENT_INTERFACE_TYPE),
    ("KMCL_SERVER_INTERFACE_TYPE", KMCL_SERVER_INTERFACE_TYPE),
];

structures! {
    /// A GUID in the order of the wire: the first three fields little endian.
    #[derive(PartialEq, Eq)]
    struct GUID, _GUID {
        /// First group of digits.
        Data1: UINT32,
        /// Second group.
        Data2: UINT16,
        /// Third group.
        Data3: UINT16,
        /// The rest, as printed.
        Data4: [UINT8; 8],
    }

    /// A counted text of UTF-16 code units.
    struct UNICODE_STRING, _UNICODE_STRING {
        /// Bytes of text, without a terminating zero.
        Length: USHORT,
        /// Bytes of memory.
        MaximumLength: USHORT,
        /// The text.
        Buffer: *mut WCHAR,
    }

    /// A list of the pages of one buffer; MmGetMdlPfnArray gives the page numbers, which stand behind it.
    /// Chained by Next: each element is one range of the packet. VmbInitializeMdl fills it in.
    struct MDL, _MDL {
        /// The next element of the chain, or null.
        Next: *mut MDL,
        /// Where the buffer's first page is mapped, or null when only its page numbers are known.
        StartVa: PVOID,
        /// Bytes of the buffer.
        ByteCount: ULONG,
        /// Where the buffer begins in its first page.
        ByteOffset: ULONG,
        /// Page numbers that stand behind the structure.
        PageCount: ULONG,
        /// Which of the library's pages these are, or zero.
        Memory: ULONG,
    }

    /// A piece of a buffer that both ends know, as a transfer-page packet names it.
    struct VMB_TRANSFER_PAGE_RANGE, _VMB_TRANSFER_PAGE_RANGE {
        /// Bytes.
        ByteCount: UINT32,
        /// Where they begin in the buffer.
        ByteOffset: UINT32,
    }

    /// What every interface begins with.
    struct INTERFACE, _INTERFACE {
        /// Bytes of the whole interface.
        Size: USHORT,
        /// Its version.
        Version: USHORT,
        /// The provider's own: the device that was asked.
        Context: PVOID,
        /// Takes a reference.
        InterfaceReference: PINTERFACE_REFERENCE,
        /// Gives one back.
        InterfaceDereference: PINTERFACE_DEREFERENCE,
    }

    /// State-change callbacks without a context, each of them optional.
    struct VMB_CHANNEL_STATE_CHANGE_CALLBACKS, _VMB_CHANNEL_STATE_CHANGE_CALLBACKS {
        /// 1.
        Version: ULONG,
        /// Bytes of this structure.
        Size: ULONG,
        /// The channel has opened.
        EvtChannelOpened: PFN_VMB_CHANNEL_OPENED,
        /// The channel has closed.
        EvtChannelClosed: PFN_VMB_CHANNEL_CLOSED,
        /// Delivery has stopped.
        EvtChannelSuspend: PFN_VMB_CHANNEL_SUSPEND,
        /// Delivery is about to begin.
        EvtChannelStarted: PFN_VMB_CHANNEL_STARTED,
        /// Packets flow.
        EvtChannelPostStarted: PFN_VMB_CHANNEL_POST_STARTED,
    }

    /// State-change callbacks with a context, each of them optional.
    struct VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5, _VMB_CHANNEL_STATE_CHANGE_CALLBACKS_V5 {
        /// 5.
        Version: ULONG,
        /// Bytes of this structure.
        Size: ULONG,
        /// Handed to every callback.
        CallbackContext: PVOID,
        /// The channel has opened.
        EvtChannelOpened: PFN_VMB_CHANNEL_OPENED_EX,
        /// The channel has closed.
        EvtChannelClosed: PFN_VMB_CHANNEL_CLOSED_EX,
        /// Delivery has stopped.
        EvtChannelSuspend: PFN_VMB_CHANNEL_SUSPEND_EX,
        /// Delivery is about to begin.
        EvtChannelStarted: PFN_VMB_CHANNEL_STARTED_EX,
        /// Packets flow.
        EvtChannelPostStarted: PFN_VMB_CHANNEL_POST_STARTED_EX,
    }

    /// A driver written in C: what the kernel starts. An extension of this implementation.
    struct VMB_DRIVER, _VMB_DRIVER {
        /// For messages: ASCII, ended by a zero.
        Name: *const UINT8,
        /// Bytes of zeroed memory that each instance of the driver is given.
        ExtensionSize: UINT64,
        /// Starts the driver on a device.
        Start: PVMB_DRIVER_START,
        /// Ends it: everything that it has is given back before this returns.
        Stop: PVMB_DRIVER_STOP,
        /// Optional: has it look whether a channel that has ended is to be enabled again.
        Attend: PVMB_DRIVER_ATTEND,
    }
}

/// A 64-bit time: 100 ns units; negative is relative, positive absolute.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LARGE_INTEGER {
    /// All of it. In C there are halves beside it.
    pub QuadPart: i64,
}

impl GUID {
    /// The same GUID as the Rust API has it.
    pub const fn new(guid: Guid) -> Self {
        let [a0, a1, a2, a3, b0, b1, c0, c1, rest @ ..] = guid.0;
        Self {
            Data1: u32::from_le_bytes([a0, a1, a2, a3]),
            Data2: u16::from_le_bytes([b0, b1]),
            Data3: u16::from_le_bytes([c0, c1]),
            Data4: rest,
        }
    }

    /// The same GUID for the Rust API.
    pub const fn to_guid(self) -> Guid {
        let [a0, a1, a2, a3] = self.Data1.to_le_bytes();
        let [b0, b1] = self.Data2.to_le_bytes();
        let [c0, c1] = self.Data3.to_le_bytes();
        let [d0, d1, d2, d3, d4, d5, d6, d7] = self.Data4;
        Guid([
            a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, d2, d3, d4, d5, d6, d7,
        ])
    }
}
